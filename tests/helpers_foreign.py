"""Small models in the formats of others, made on the spot."""

import copy
import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALL = {"img_resolution": 8, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
"""What the U-Nets of EDM and EDM2 have in common here."""
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddpmpp": ("EDMPrecond", "SongUNet", SMALL),
    "ncsnpp": (
        "EDMPrecond",
        "SongUNet",
        {
            **SMALL,
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": [1, 3, 3, 1],
        },
    ),
    "adm": ("EDMPrecond", "DhariwalUNet", {**SMALL, "model_channels": 64}),
    "edm2": ("Precond", "UNet", {**SMALL, "model_channels": 64}),
}
"""By name: the classes of the outer and of the inner network, and options of the latter."""


def waves(shape: tuple[int, ...], k: int) -> Tensor:
    """Numbers as if they were random, the same everywhere, as large as weights of this shape are."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    inner = max(1, count // shape[0]) if len(shape) > 1 else 10
    index = torch.arange(1, count + 1, dtype=torch.float64)
    values = (43758.5453 * torch.sin(12.9898 * index + 78.233 * k)).remainder(1) - 0.5
    return (values * (24 / inner) ** 0.5).float().reshape(shape)


def named(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Such numbers for each name; the filters of a change of resolution are left out."""
    names = [name for name in sorted(shapes) if not name.endswith("resample_filter")]
    return {name: waves(tuple(shapes[name]), k) for k, name in enumerate(names)}


class Saved(nn.Module):
    """A module as `torch_utils.persistence` pickles it: with the name of its class and its source code."""

    def __init__(self, kind: str, source: str, **attributes: Any) -> None:
        super().__init__()
        self.__dict__ |= {"_kind": kind, "_source": source} | attributes

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_kind", "_source")}
        meta = {"type": "class", "version": 6, "module_src": self._source, "class_name": self._kind, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def write_edm(
    path: Path, name: str, weights: Mapping[str, Tensor], *, classes: int, channels: int = 3, **more: Any
) -> Path:
    """A pickle as EDM writes them, with its weights by name; the source code in it would leave a file `executed`."""
    outer, inner, options = KINDS[name]
    source = f"open({str(path.parent / 'executed')!r}, 'w').close()"
    given = {**options, "img_channels": channels, "label_dim": classes, "dropout": 0.1, **more}
    if inner != "UNet":
        given |= {"in_channels": channels, "out_channels": channels, "augment_dim": 9}
        del given["img_channels"]
    unet = Saved(inner, source, _init_args=(), _init_kwargs=copy.deepcopy(given))
    for key, value in weights.items():
        at: nn.Module = unet
        *places, last = key.split(".")
        for place in places:
            if place not in at._modules:
                at.add_module(place, nn.ModuleDict() if place in ("enc", "dec") else Saved("Conv2d", source))
            at = at._modules[place]  # type: ignore[assignment]
        if last in ("freqs", "phases", "resample_filter"):
            at.register_buffer(last, value)
        else:
            at.register_parameter(last, nn.Parameter(value))
    facts = {"img_resolution": options["img_resolution"], "img_channels": channels, "label_dim": classes}
    whole = Saved(outer, source, sigma_data=0.5, use_fp16=True, **facts)
    whole.add_module("unet" if outer == "Precond" else "model", unet)
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("the loader that executes the source code")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = (
        module.__name__,
        "_reconstruct_persistent_obj",
    )
    module.__dict__["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    try:
        path.write_bytes(pickle.dumps({"ema": whole, "loss_fn": None, "dataset_kwargs": {"path": "images.zip"}}))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return path
