"""Export: a network in the forms that other programs read. A file per target, and the model card."""
