"""Where networks come from and go to: folders, the package, and repositories on the Hugging Face hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from onefold.errors import UserError, printable, reason

if TYPE_CHECKING:
    from onefold.networks.base import NetworkConfig

__all__ = ["PACKAGED", "check_fits", "is_run", "locate", "packaged", "upload"]

PACKAGED = Path(__file__).parent.parent / "pretrained"
"""The networks that come with the package, a folder each."""


def packaged() -> tuple[str, ...]:
    """Names of the networks that come with the package."""
    return tuple(sorted(path.parent.name for path in PACKAGED.glob("*/config.json")))


def locate(source: str | Path) -> Path:
    """The folder that holds a network's files: of a saved network, in a run, in the package, or of a download.

    A folder of that name goes first, then a network in the package (`packaged`), then the hub ("owner/name").

    Raises:
        UserError: a name that the hub refuses.
    """
    folder = Path(source)
    if not folder.exists():
        if str(source) in packaged():
            return PACKAGED / str(source)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            return _download(str(source))
    return folder / "model" if (folder / "model").is_dir() else folder


def check_fits(config: "NetworkConfig", tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of numbers so large that they cannot be those of these weights.

    Raises:
        ValueError: a network of this size would have far more weights.
    """
    if not config.kind.__module__.startswith("onefold."):  # whose weights only it knows
        return
    numbers = 2**22 + sum(value.numel() for value in tensors.values())
    inputs = config.channels * config.patch**2 + config.latent_channels + config.classes
    matrix = config.width * max(config.width, inputs)
    if matrix > numbers or config.depth > 100 + len(tensors) or config.tokens > 2**24:
        raise ValueError("config.json describes a far larger one")


def is_run(path: Path) -> bool:
    """Whether a `config.json` is that of a run, which holds more than a network's."""
    try:
        return "onefold" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # whatever it is, it is not a run's
        return False


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a repository "owner/name" on the hub, which is made if it is missing; returns its address.

    Raises:
        UserError: no connection, no token, or a name that the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a network of onefold")
    except Exception as error:  # of the hub's client, or of whichever library it connects by
        cure = "check the name and the connection, and log in with `hf auth login`"
        why = printable(reason(error)[:200])
        raise UserError(f"{repository}: not uploaded ({type(error).__name__}: {why}); {cure}") from error
    return str(address)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"no such folder: {repository}; nor does the hub give out a network of that name "
            f"({type(error).__name__}); check the spelling, or the connection"
        ) from error
