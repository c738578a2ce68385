"""The library diffusers, an extra (`onefold[foreign]`) that is imported when it is needed: it takes seconds."""

import importlib
from typing import Any

from onefold.errors import UserError

__all__ = ["diffusers"]


def diffusers() -> Any:
    """The module. Raises a UserError where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError(f"diffusers: cannot be imported ({error}); pip install 'onefold[foreign]'") from error
