"""What a run tells, drawn for people. Reads logs and records, and knows nothing of training."""
