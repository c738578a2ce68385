"""Data: open a source (`open_dataset`), load it in a fixed order (`Loader`), look into it, convert it."""

from onefold.data.convert import Conversion, convert
from onefold.data.dataset import Dataset, Subset, holdout, with_classes_of
from onefold.data.inspect import Inspection, Values, contact_sheet, describe, inspect
from onefold.data.listing import Unreadable
from onefold.data.loader import Loader, indices, read_all, read_batches
from onefold.data.source import as_dataset, open_dataset, register_reader
from onefold.pixels import to_float, to_uint8

__all__ = [
    "Conversion",
    "Dataset",
    "Inspection",
    "Loader",
    "Subset",
    "Unreadable",
    "Values",
    "as_dataset",
    "contact_sheet",
    "convert",
    "describe",
    "holdout",
    "indices",
    "inspect",
    "open_dataset",
    "read_all",
    "read_batches",
    "register_reader",
    "to_float",
    "to_uint8",
    "with_classes_of",
]
