"""Data: open a source (`open_dataset`), load it in a fixed order (`Loader`), look into it, convert it."""

from onefold.data.convert import Conversion, convert
from onefold.data.dataset import Dataset, Subset, holdout
from onefold.data.inspect import Inspection, Values, describe, inspect
from onefold.data.listing import Unreadable
from onefold.data.loader import Loader, read_all
from onefold.data.order import indices
from onefold.data.sheet import contact_sheet
from onefold.data.source import as_dataset, open_dataset
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
    "to_float",
    "to_uint8",
]
