"""diffusers: a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

    model_index.json     the pipeline's class and default options
    pipeline.py          sampling, in one step or many (a copy of `pipeline/pipeline.py` here)
    network/             network.py, config.json and the weights

Its code needs torch and diffusers alone, not onefold; it is that of `OneFold`, so that other architectures are refused.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from onefold.errors import UserError, writing
from onefold.files import write_tensors
from onefold.networks import Network, OneFold

__all__ = ["write"]

CODE = Path(__file__).parent / "pipeline"
"""What is copied into the folder."""
WRITTEN_FOR = "0.31.0"
"""Version of diffusers that the files' format is as old as."""


def write(network: Network, folder: Path) -> list[Path]:
    """Write the pipeline; returns its files.

    Raises:
        UserError: another architecture, a setting that the pipeline does not know, or a file that cannot be written.
    """
    if not isinstance(network, OneFold):
        cure = "export it --to hub or --to onnx"
        raise UserError(f"--to diffusers: the code is that of OneFold, and this is a {type(network).__name__}; {cure}")
    sampler = network.sampler
    if sampler.guidance != 1 and sampler.guidance_interval != (0, 1):
        raise UserError("--to diffusers: the pipeline knows no guidance interval; export it --to hub")
    kept = (
        *("image_size", "channels", "classes", "class_names", "patch", "latent_channels"),
        *("width", "depth", "heads", "latent_norm", "jump_rank", "output"),
    )
    config = {"_class_name": "OneFoldNetwork", "_diffusers_version": WRITTEN_FOR}
    config |= {name: value for name, value in asdict(network.config).items() if name in kept}
    index = {
        "_class_name": ["pipeline", "OneFoldPipeline"],
        "_diffusers_version": WRITTEN_FOR,
        "network": ["network", "OneFoldNetwork"],
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance,
        "start": sampler.start,
        "jumps": sampler.jumps,
        "shift": sampler.shift,
    }
    inside = folder / "network"
    with writing(folder):
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CODE / "pipeline.py", folder / "pipeline.py")
        shutil.copyfile(CODE / "network.py", inside / "network.py")
        for path, content in ((folder / "model_index.json", index), (inside / "config.json", config)):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        known = {name: value for name, value in network.state_dict().items() if not name.startswith("jump_exit.")}
        write_tensors(known, inside / "diffusion_pytorch_model.safetensors")
    return [folder / "model_index.json", folder / "pipeline.py", *sorted(inside.iterdir())]
