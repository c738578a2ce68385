"""Fingerprints of the results of training, to show that a code change does not change any number.

    python benchmarks/fingerprint.py --json-file before.json           # with one version of onefold
    python benchmarks/fingerprint.py --compare before.json             # with the other, on the same machine

Small networks are trained on the digits for 48 steps: self-distillation, three networks through both phases, pixels,
and one-step generators by ratio, score and DMD; in micro-batches; and each once more, resumed in the middle. A
fingerprint is the SHA-256 over the tensors in a file of the last checkpoint, whatever their names, so that it survives
renaming. It is reproducible only on the same machine with the same version of torch.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from onefold.cli import run as command

SMALL = ["--network.width", "32", "--network.depth", "3", "--network.heads", "2", "--objective.draws", "2"]
RUN = ["--training.batch", "16", "--training.device", "cpu", "--training.precision", "float32"]
RUN += ["--training.compile", "no", "--training.checkpoint-every", "384", "--training.keep-last", "9"]
LENGTH = 768
PIXELS = ["--architecture", "pixels"]
"""In onefold 0.1.0 before the networks registered themselves: --network.space pixels."""

TRAININGS: dict[str, list[str]] = {
    "self_distillation": [],
    "self_distillation-micro": ["--training.micro-batch", "5"],
    "three_networks": ["--architecture", "three-networks"],
    "pixels": PIXELS,
}
RATIO = ["--method", "ratio"]
ONE_STEP: dict[str, tuple[str, list[str]]] = {
    "ratio": ("self_distillation", RATIO),
    "score": ("self_distillation", ["--method", "score"]),
    "dmd": ("self_distillation", ["--method", "dmd"]),
    "ratio-micro": ("self_distillation", [*RATIO, "--training.micro-batch", "5"]),
    "ratio-two_updates": ("self_distillation", [*RATIO, "--onestep.critic-updates", "2"]),
    "ratio-pixels": ("pixels", RATIO),
    "score-three_networks": ("three_networks", ["--method", "score"]),
}


def trained(out: Path, arguments: list[str]) -> dict[str, dict[str, str]]:
    """Run the command to its end, and once more from its middle; returns the fingerprints of both."""
    length = [] if arguments[0] == "onestep" else ["--training.images", str(LENGTH)]
    if command([*arguments, *RUN, *length, "--out", str(out), "--quiet"]):
        sys.exit(f"{' '.join(arguments)}: failed")
    whole = fingerprints(out)
    shutil.rmtree(newest(out))
    again = ["train", "--resume"] if arguments[0] == "train" else [*arguments[:2], "--resume"]
    if command([*again, "--out", str(out), "--quiet"]):
        sys.exit(f"{' '.join(arguments)}: cannot be resumed")
    return {"whole": whole, "resumed": fingerprints(out)}


def newest(run: Path) -> Path:
    return max(path for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def fingerprints(run: Path) -> dict[str, str]:
    """Fingerprints of the tensor files in the latest checkpoint, except for the teacher's, which does not change."""
    files = sorted(newest(run).glob("*.safetensors"))
    return {file.stem: fingerprint(load_file(file)) for file in files if file.stem != "teacher"}


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    each = sorted(hashlib.sha256(str(v.dtype).encode() + v.numpy().tobytes()).hexdigest() for v in tensors.values())
    return hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def main() -> None:
    """Train all, print, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json-file", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, arguments in TRAININGS.items():
            found[case] = trained(folder / case, ["train", "digits", *SMALL, *arguments])
        for case, (teacher, arguments) in ONE_STEP.items():
            length = ["--images", str(LENGTH), "--onestep.measured", "40", "--training.health-every", "192"]
            found[case] = trained(folder / case, ["onestep", str(folder / teacher), *length, *arguments])
    for case, both in found.items():
        resumed = "resumed alike" if both["whole"] == both["resumed"] else "RESUMED OTHERWISE"
        print(f"{case:<24} {resumed}  " + "  ".join(f"{k} {v}" for k, v in both["whole"].items()))
    if options.json_file:
        options.json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.compare:
        other = json.loads(options.compare.read_text(encoding="utf-8"))
        differing = [
            f"{case} {which} {file}"
            for case, runs in other.items()
            for which, files in runs.items()
            for file, value in files.items()
            if found[case][which].get(file) != value
        ]
        print("\n".join(["differing:", *differing]) if differing else "all the same")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
