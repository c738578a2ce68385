"""Feature extractors that many papers measure with: where they come from, and where they are kept.

Nothing is downloaded but by `Source.fetch`, which `onefold prefetch` calls where it is told to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onefold.errors import UserError, printable, quoted, reason
from onefold.files import cache_folder

FOLDER = ("config.json", "preprocessor_config.json", "model.safetensors")


@dataclass(frozen=True)
class Source:
    """An extractor that can be had: a file at an address, or files of a repository on the Hugging Face hub."""

    name: str
    """By which `onefold evaluate --features` knows it."""
    gives: str
    """What the Fréchet distance of it is called."""
    address: str
    """https://… of a file, or owner/name on the hub."""
    files: tuple[str, ...]
    size: str
    licence: str

    @property
    def place(self) -> Path:
        """The file or folder that it is kept in."""
        folder = cache_folder() / "features"
        return folder / self.files[0] if self.is_file else folder / self.name

    @property
    def is_file(self) -> bool:
        """Whether it is one file at an address."""
        return "://" in self.address

    @property
    def is_kept(self) -> bool:
        """Whether all its files are there."""
        return all(((self.place.parent if self.is_file else self.place) / name).is_file() for name in self.files)

    def kept(self) -> Path:
        """Its place. Raises `UserError` if it is not there."""
        if not self.is_kept:
            cure = f"`onefold prefetch {self.name}` says what it would download"
            raise UserError(f"{self.name}: not at {self.place}; {cure}, or give a file of your own")
        return self.place

    def fetch(self, say: Callable[[str], None] = lambda line: None) -> Path:
        """Download it, unless it is there; returns its place.

        Raises:
            UserError: no connection, or a server or disk that fails.
        """
        if self.is_kept:
            return self.place
        say(f"downloading {self.address} to {self.place}")
        try:
            if self.is_file:
                import torch

                self.place.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.address, str(self.place), progress=False)
            else:
                from huggingface_hub import snapshot_download

                snapshot_download(self.address, allow_patterns=list(self.files), local_dir=self.place)
        except Exception as error:  # of the hub's client, or of whichever library it connects by
            cure = f"check the connection, or bring {', '.join(self.files)} to {quoted(self.place)}"
            why = printable(reason(error)[:200])
            raise UserError(f"{self.name}: not downloaded ({type(error).__name__}: {why}); {cure}") from error
        return self.place


SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        Source(
            "inception",
            "FID",
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
            ("inception-2015-12-05.pt",),
            "some 0.1 GB",
            "none beside the file; it was published with StyleGAN2-ADA, whose licence is NVIDIA's, non-commercial",
        ),
        Source("dinov2", "FD-DINOv2", "facebook/dinov2-large", FOLDER, "1.2 GB", "Apache-2.0"),
        Source(
            "clip",
            "FD-CLIP",
            "openai/clip-vit-large-patch14",
            FOLDER,
            "1.7 GB",
            "none on its hub page; MIT in the repository of OpenAI's CLIP",
        ),
    )
}
"""By name."""
