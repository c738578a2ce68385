"""Where networks come from and go to: folders, the package, and repositories on the Hugging Face hub."""

import re
from pathlib import Path

from onefold.errors import UserError, printable, reason

__all__ = ["PACKAGED", "locate", "packaged", "upload"]

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
