"""Features by a pretrained vision transformer in a folder, as `transformers` writes it: DINOv2 and CLIP.

    DINOv2   the class token after the last norm             FD-DINOv2 is the Fréchet distance of it
    CLIP     the image's embedding, projected where the folder has a projection

The folder holds `config.json`, one file of weights (`.safetensors`: nothing is unpickled), whose SHA-256 is the
extractor's, and `preprocessor_config.json`, which says size, mean and standard deviation. Images are resized as for
every external network, whole and without a crop, straight to the size that the network is given at the end: so does
the FD-DINOv2 of Stein et al. Nothing is downloaded.

Reference: Stein et al. 2023, arXiv:2306.04675; Kynkäänniemi et al. 2022, arXiv:2203.06026, for CLIP.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.files import refuse_placeholder
from onefold.metrics.external import Run

KINDS = {
    "dinov2": ("Dinov2Model", "pooler_output"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "pooler_output"),
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds"),
}
"""`model_type` of the configuration → class of transformers, and the output that is the features."""
UNPROJECTED = {"CLIPVisionModelWithProjection": ("CLIPVisionModel", "pooler_output")}
PROJECTION = "visual_projection.weight"


def weights_of(folder: Path) -> Path:
    """The one file of weights in a folder. Raises `UserError` if it has none or several."""
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        cure = "give a folder as save_pretrained of transformers writes it, with one model.safetensors"
        raise UserError(f"{folder}: holds {len(found) or 'no'} .safetensors files; {cure}")
    refuse_placeholder(found[0])
    return found[0]


def pretrained(folder: Path, device: torch.device | str) -> Run:
    """The network in a folder, as a function of float images (B, 3, size, size) that gives features (B, d).

    Raises `UserError` if transformers is not installed, the folder holds no DINOv2 or CLIP, or weights are missing.
    """
    kind = _read(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}: config.json has the model_type {kind!r}; give one of {', '.join(KINDS)}")
    try:
        transformers = import_module("transformers")
    except ImportError:
        raise UserError(f"{folder}: needs transformers; pip install 'onefold[features]'") from None
    name, output = KINDS[kind]
    network, missing = _load(transformers, name, folder)
    if missing == {PROJECTION} and name in UNPROJECTED:
        name, output = UNPROJECTED[name]
        network, missing = _load(transformers, name, folder)
    if missing:
        raise UserError(f"{folder}: its weights lack {sorted(missing)[0]}; get the whole folder again")
    network = network.to(device, torch.float32).eval().requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return network(pixel_values=x)[output]

    return run


def preparation(folder: Path) -> tuple[int, list[float], list[float]]:
    """Size, mean and standard deviation of a network's images, from the folder's `preprocessor_config.json`.

    Raises `UserError` if it is missing, not square, or says no such thing.
    """
    path = folder / "preprocessor_config.json"
    described = _read(path)
    try:
        size = described["crop_size"] if described.get("do_center_crop") else described["size"]
        if isinstance(size, dict):
            sides = {size["height"], size["width"]} if "height" in size else {size["shortest_edge"]}
        else:
            sides = {size}
        (side,) = (int(each) for each in sides)
        mean, std = ([float(value) for value in described[name]] for name in ("image_mean", "image_std"))
        if side < 1 or {len(mean), len(std)} != {3} or min(std) <= 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: has no square size, image_mean and image_std of 3; get it again") from None
    return side, mean, std


def _load(transformers: Any, name: str, folder: Path) -> tuple[Any, set[str]]:
    """A network of this class, and the names of the weights that the folder lacks."""
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with torch.device("meta"):  # torch then lists its constructors, before transformers replaces one while it loads
        torch.empty(0)
    try:
        with _quiet(transformers):
            network, found = getattr(transformers, name).from_pretrained(str(folder), **options)
    except Exception as error:  # whatever a configuration can break
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: transformers cannot open it ({why}); get the whole folder again") from None
    return network, set(found["missing_keys"])


@contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """Without its bars and warnings: a whole CLIP has a half for text, of which it would warn."""
    logging = transformers.utils.logging
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _read(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        cure = "give a folder as save_pretrained of transformers writes it, with its image processor"
        raise UserError(f"{path}: no such file; {cure}") from None
    except ValueError:
        raise UserError(f"{path}: is no JSON; get it again") from None
    if not isinstance(described, dict):
        raise UserError(f"{path}: is no JSON object; get it again")
    return described
