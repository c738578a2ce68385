"""`onefold adopt`.

What needs torch is imported where it is used, so that `--help` does without it.
"""

from pathlib import Path

from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable, quoted

__all__ = ["adopt"]


def adopt(
    source: Positional[Path],
    /,
    out: Path | None = None,
    classes: int | None = None,
    size: int | None = None,
    patch: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> None:
    """Make a network from elsewhere one of onefold: a DDPM of diffusers, EDM, EDM2, or an autoencoder.

    Example: onefold adopt ddpm-cifar10-32 --out networks/ddpm

    Nothing is downloaded, and no code of the file is executed.

    Args:
        source: A folder that diffusers has saved, of a pipeline of a UNet2DModel or of an AutoencoderKL or
            AutoencoderDC; or a pickle of EDM or EDM2. What it was trained under, such as its licence, still holds.
        out: Folder to write, a new or empty one. Default: the source's name, here.
        classes: Classes of the images. Default: the network's; beside an autoencoder none. One less than a UNet2DModel
            has class vectors, if the last is that of no class.
        size: Beside an autoencoder: height and width of the images. Default: its own; training reads it from the data.
        patch: Beside an autoencoder: pixels per token, a multiple of those per latent. Default: those.
        width: Beside an autoencoder: width of the denoiser, whose weights are random …
        depth: … its number of blocks …
        heads: … and its attention heads.
    """
    from onefold.files import is_unused
    from onefold.networks import adopt as adopted
    from onefold.summary import network_facts

    folder = out or Path(source.resolve().stem)
    sizes = {"image_size": None if size is None else (size, size)}
    sizes |= {"patch": patch, "width": width, "depth": depth, "heads": heads}
    network = adopted(source, classes=classes, **{name: value for name, value in sizes.items() if value is not None})
    if not is_unused(folder):  # by default the name of the source, which may be here
        raise UserError(f"{folder}: is not an empty folder; choose another --out")
    network.save_pretrained(folder)
    for name, value in network_facts(network).items():
        console.print(printable(f"{name:<10} {value}"))
    then = (
        f"onefold train RECIPE --from {quoted(folder)} --data IMAGES"
        if "diffusion" in network.phases
        else (f"onefold onestep {quoted(folder)} --data IMAGES")
    )
    console.print(printable(f"{folder}: a saved network; next, `{then}`"))
