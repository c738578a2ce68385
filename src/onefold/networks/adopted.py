"""Networks from elsewhere: what a file or folder holds, as a network of this package.

    the folder of a diffusers pipeline of a UNet2DModel (DDPMPipeline …)    `unet.UNet`, a teacher in pixel space
    the folder of an AutoencoderKL or AutoencoderDC                         `frozen_codec.FrozenCodec`
    a pickle of EDM or EDM2                                                 `edm.EDM`, `edm2.EDM2`, likewise teachers

Everything is read from the disk, and nothing in it is executed: weights of diffusers are safetensors, and pickles go
through a reader that knows only tensors and plain containers (`unpickled.py`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from onefold.errors import UserError, reason
from onefold.networks.base import Network, NetworkConfig, build
from onefold.networks.edm import UNETS
from onefold.networks.foreign import Foreign
from onefold.networks.frozen_codec import FrozenCodec, codec_factor
from onefold.networks.library import diffusers
from onefold.networks.unpickled import Record, read_pickle, tensors_of

__all__ = ["adopt"]

CODECS = ("AutoencoderKL", "AutoencoderDC")
UNREAD = ("in_channels", "out_channels", "label_dim", "augment_dim", "dropout", "label_dropout", "clip_act")
"""Options of a U-Net that are given otherwise, or that matter only while EDM trains it."""


def adopt(source: str | Path, *, classes: int | None = None, **sizes: Any) -> Network:
    """The network in a file or folder from elsewhere, ready for use; `save_pretrained` keeps it as one of this package.

    Args:
        source: The folder of a diffusers pipeline of a `UNet2DModel`, or of an autoencoder; or a pickle of EDM or EDM2.
        classes: Classes of the images. Default: the network's own; beside an autoencoder, none. Of a `UNet2DModel`, one
            less than it has class vectors: then the last of them is that of "no class".
        sizes: Of the denoiser beside an autoencoder, whose weights are random: `image_size`, `patch`, `width`, `depth`
            and `heads`, as in `NetworkConfig`.

    Raises:
        UserError: nothing there, something else, or a pickle that would execute code.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; networks from elsewhere are read from the disk")
    if path.is_file():
        config, weights = _edm(path)
    elif (path / "model_index.json").is_file():
        config, weights = _pipeline(path, classes)
    else:
        config, weights = _autoencoder(path, classes or 0, sizes)
    if sizes and not issubclass(config.kind, FrozenCodec):
        raise UserError(f"{path}: has sizes of its own; leave {', '.join(sizes)} out")
    if classes not in (None, config.classes):
        raise UserError(f"{path}: knows {config.classes} classes, not {classes}; leave this out")
    network = build(config)
    assert isinstance(network, Foreign | FrozenCodec)
    try:
        network.adopt(weights)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path}: its weights are not those of its configuration ({reason(error)[:200]})") from error
    return network.eval()


def _pipeline(path: Path, classes: int | None) -> tuple[NetworkConfig, Mapping[str, Tensor]]:
    """Configuration and weights of a pipeline that consists of a `UNet2DModel` and a scheduler."""
    parts = {name: kind for name, kind in _json(path / "model_index.json").items() if not name.startswith("_")}
    if parts.get("unet", [None, None])[1] != "UNet2DModel" or set(parts) != {"unet", "scheduler"}:
        raise UserError(
            f"{path}: consists of {', '.join(parts)}; give a pipeline of a UNet2DModel and a scheduler alone"
        )
    unet, scheduler = _json(path / "unet" / "config.json"), _json(path / "scheduler" / "scheduler_config.json")
    _check_unet(path / "unet", unet)
    _check_scheduler(path / "scheduler", scheduler)
    unet, weights = _model(path / "unet", "UNet2DModel")
    size, vectors = unet["sample_size"], unet.get("num_class_embeds") or 0
    found = classes if classes is not None and classes == vectors - 1 > 0 else vectors
    config = NetworkConfig(
        image_size=_pair(size),
        channels=unet["in_channels"],
        classes=found,
        architecture="unet",
        foreign=json.dumps({"unet": unet, "scheduler": scheduler}, sort_keys=True),
    )
    return config, weights


def _check_unet(path: Path, unet: Mapping[str, Any]) -> None:
    """Refuse a U-Net that is no denoiser of images as DDPM has it."""
    if not unet.get("sample_size"):
        raise UserError(f"{path / 'config.json'}: sample_size is missing; write the size of its images there")
    if unet["in_channels"] not in (1, 3) or unet["out_channels"] != unet["in_channels"]:
        channels = f"{unet['in_channels']} channels in and {unet['out_channels']} out"
        raise UserError(f"{path}: has {channels}; only denoisers of grey or RGB images can be adopted")
    if unet.get("class_embed_type") or unet.get("center_input_sample"):
        raise UserError(f"{path}: class_embed_type and center_input_sample are not supported; give a plain UNet2DModel")
    if unet.get("time_embedding_type", "positional") != "positional":
        raise UserError(f"{path}: its times are {unet['time_embedding_type']}, not the positions of DDPM; give another")


def _check_scheduler(path: Path, scheduler: Mapping[str, Any]) -> None:
    """Refuse a scheduler that is not one of a table of ᾱ."""
    kind = scheduler.get("_class_name")
    if "beta_schedule" not in scheduler or "num_train_timesteps" not in scheduler:
        raise UserError(f"{path}: {kind} has no schedule of betas, as DDPM has; give a pipeline with a DDPMScheduler")
    predicts = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("thresholding") or predicts not in ("epsilon", "sample", "v_prediction"):
        raise UserError(
            f"{path}: thresholding and prediction_type {predicts!r} are not supported; give another pipeline"
        )


def _autoencoder(path: Path, classes: int, sizes: dict[str, Any]) -> tuple[NetworkConfig, Mapping[str, Tensor]]:
    """Configuration and weights of an autoencoder, whose denoiser is new."""
    codec = _json(path / "config.json")
    kind = codec.get("_class_name")
    if kind == "UNet2DModel":
        raise UserError(f"{path}: lacks the schedule that it was trained by; give the folder of the whole pipeline")
    if kind not in CODECS:
        known = f"a pipeline of a UNet2DModel, {' or '.join(CODECS)}"
        raise UserError(f"{path}: holds {kind or 'something else'}; give the folder of {known}, or a pickle of EDM")
    codec, weights = _model(path, kind)
    factor = codec_factor(codec)
    size = codec.get("sample_size") or 8 * factor
    plain: dict[str, Any] = {"image_size": _pair(size), "patch": factor}
    config = NetworkConfig(
        **(plain | sizes),
        channels=codec["in_channels"],
        classes=classes,
        architecture="frozen_codec",
        foreign=json.dumps(codec, sort_keys=True),
    )
    return config, weights


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of what is given as one number, or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _edm(path: Path) -> tuple[NetworkConfig, Mapping[str, Tensor]]:
    """Configuration and weights of the average in a pickle of EDM or EDM2."""
    found = read_pickle(path)
    outer = found.get("ema") if isinstance(found, dict) else None
    if not isinstance(outer, Record) or outer.name not in ("EDMPrecond", "Precond"):
        kind = outer.name if isinstance(outer, Record) else "no network by the name ema"
        raise UserError(f"{path}: holds {kind}; give a pickle of EDM (EDMPrecond) or EDM2 (Precond)")
    second = outer.name == "Precond"
    inner = outer.state.get("_modules", {}).get("unet" if second else "model")
    if not isinstance(inner, Record) or (inner.name not in UNETS and not second):
        raise UserError(f"{path}: has a U-Net that is not known; those of EDM are {' and '.join(UNETS)}")
    options = {**inner.state.get("_init_kwargs", {}), "kind": inner.name}
    options |= {name: outer.state[name] for name in ("img_resolution", "img_channels", "sigma_data")}
    options = {name: value for name, value in options.items() if name not in UNREAD}
    if inner.state.get("_init_args") or not all(
        isinstance(value, int | float | str | list) for value in options.values()
    ):
        raise UserError(f"{path}: does not say plainly how its U-Net was made; give a pickle as EDM writes it")
    if options["img_channels"] not in (1, 3):
        raise UserError(
            f"{path}: has {options['img_channels']} channels; only denoisers of grey or RGB images are read"
        )
    if "skip" in (options.get("encoder_type"), options.get("decoder_type")) or options.get("clip_act", 256) != 256:
        raise UserError(f"{path}: has options that EDM's own networks lack (skip, clip_act); give another")
    config = NetworkConfig(
        image_size=_pair(options["img_resolution"]),
        channels=options["img_channels"],
        classes=outer.state["label_dim"],
        architecture="edm2" if second else "edm",
        foreign=json.dumps(options, sort_keys=True),
    )
    return config, dict(tensors_of(inner))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({reason(error)}); give the folder that diffusers has saved"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no configuration of diffusers; give the folder that diffusers has saved")
    return found


def _model(folder: Path, kind: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Full configuration and weights of a model that diffusers has saved, in single precision.

    Read by diffusers, which knows how earlier versions of it have called them.
    """
    options = {
        "local_files_only": True,
        "use_safetensors": True,
        "low_cpu_mem_usage": False,
        "output_loading_info": True,
    }
    library = diffusers()
    try:
        model, about = getattr(library, kind).from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        cure = "load it with diffusers and save it anew as safetensors, model.save_pretrained(folder)"
        raise UserError(f"{folder}: cannot be read ({reason(error)[:200]}); {cure}") from error
    if about["missing_keys"]:
        raise UserError(f"{folder}: lacks weights ({sorted(about['missing_keys'])[0]}); copy or download it whole")
    config = {name: value for name, value in model.config.items() if name == "_class_name" or name[0] != "_"}
    return {**config, "_class_name": kind}, {name: value.float() for name, value in model.state_dict().items()}
