"""The web: a folder with a one-step generator and a page that runs it in the browser, for any server of plain files.

    index.html, page.css, page.js, noise.js    the page, and the noise of a seed as torch draws it
    generator.onnx, config.json                see `onnx`
    ort.wasm.min.mjs, ort-wasm-simd-threaded.* onnxruntime-web, copied from its npm package

Nothing is fetched from elsewhere, neither here nor by the page.
"""

import shutil
from pathlib import Path

from onefold.errors import UserError, writing
from onefold.export import onnx
from onefold.networks import Network

__all__ = ["RUNTIME", "write"]

PAGE = Path(__file__).parent / "page"
RUNTIME = Path("node_modules") / "onnxruntime-web" / "dist"
"""Where `npm install onnxruntime-web` puts its files."""
NEEDED = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LEAST = 16
"""Numbers of a latent; torch draws fewer in another order."""


def write(network: Network, folder: Path, *, runtime: Path = RUNTIME) -> list[Path]:
    """Write the page; returns its files.

    Args:
        network: A one-step generator.
        folder: Where to.
        runtime: Folder with onnxruntime-web's files.

    Raises:
        UserError: no one-step generator, a file that is not there, or one that cannot be written.
    """
    if not network.sampler.jumps:
        raise UserError("--to web: needs a one-step generator; make one with `onefold onestep RUN`")
    if network.config.tokens * network.config.latent_channels < LEAST:
        raise UserError(f"--to web: latents of fewer than {LEAST} numbers are not drawn there as here; use --to onnx")
    for name in NEEDED:
        if not (runtime / name).is_file():
            cure = "run `npm install onnxruntime-web` here, or name its folder dist with --runtime"
            raise UserError(f"{runtime / name}: no such file; {cure}")
    onnx.write(network, folder, roles=("generator",))
    with writing(folder):
        for path in [*sorted(PAGE.iterdir()), *(runtime / name for name in NEEDED)]:
            shutil.copyfile(path, folder / path.name)
    return sorted(folder.iterdir())
