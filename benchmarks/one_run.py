"""One run over several seeds: one step, few and many steps of the same network, as JSON and as a Markdown table.

    python benchmarks/one_run.py --seeds 5 --json-file docs/results/one-run-digits.json
    python benchmarks/one_run.py --brief --json-file docs/results/one-run-pass.json  # one step: two passes, one
    python benchmarks/one_run.py --brief -c onerun.updates=1 onerun.share=1.0
    python benchmarks/one_run.py fashion --data fashion-mnist --seeds 1

Each run is that of `onefold train RECIPE --one-step`. Its shared weights are those of plain training to the bit
(`tests/test_one_run.py`), so its own 50 steps are also those of a run without a generator. Evaluations and the file are
as in `onestep_digits.py`. A finished run is not trained again, nor measured (`rows.json` in its folder); an interrupted
one is continued.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

import command
import onefold
from onefold.metrics import psnr
from onefold.sampling import Sampler
from onefold.training.one_run import with_one_step
from onefold.training.run import Run
from onestep_digits import Measured, measured, summarised

STEPS = (2, 4, 8, 16, 50)
COMPARED = 1000


def rows_of(run: Run, *, brief: bool) -> dict[str, Measured]:
    """What is measured of a run, by row."""
    kept = run.folder / "rows.json"
    if kept.exists():
        return {name: Measured(*row) for name, row in json.loads(kept.read_text()).items()}
    own = run.network.sampler
    rows = {"1 step": measured(run)}
    if run.network.config.jump_exit:
        rows["1 pass"] = measured(run, own.with_options(solver="one_pass"))
    if not brief:
        rows |= {f"{steps} steps": measured(run, own.with_options(steps=steps)) for steps in STEPS}
        rows["denoiser, 50 steps"] = measured(run, Sampler(50))
    kept.write_text(json.dumps(rows, indent=1))
    return rows


def agreement(run: Run) -> float | None:
    """PSNR in dB of pictures made in one pass against those decoded from the same samples, if the network can."""
    if not run.network.config.jump_exit:
        return None
    pictures = (run.network.sample(COMPARED, solver=name) for name in ("one_pass", "refine"))
    return psnr(*(torch.from_numpy(each).permute(0, 3, 1, 2) for each in pictures))


def main(
    recipe: Positional[str] = "digits",
    seeds: int = 3,
    first: int = 0,
    data: str | None = None,
    images: int | None = None,
    change: Annotated[tuple[str, ...], arg(aliases=["-c"])] = (),
    brief: bool = False,
    out: Path = Path("runs/one-run"),
    json_file: Path | None = None,
) -> None:
    """Train with the seeds `first`, `first` + 1, …, evaluate and summarise.

    `change`: settings, as name=value; `brief`: one step only.
    """
    command.check_out(out)
    found: list[dict[str, Measured]] = []
    agreements: list[float | None] = []
    for seed in range(first, first + seeds):
        folder = out / f"{recipe}{seed}"
        if (folder / "rows.json").exists():
            run = onefold.load_run(folder)
        elif (folder / "config.json").exists():
            run = onefold.train(None, folder, resume=True)
        else:
            wanted = {"training.seed": seed, "data.source": data, "training.images": images}
            changes = {name: value for name, value in wanted.items() if value is not None}
            changes |= command.settings_of(change)
            run = onefold.train(with_one_step(onefold.recipe(recipe).with_changes(changes)), folder)
        found.append(rows_of(run, brief=brief))
        agreements.append(agreement(run))
    summary = summarised(found)
    if json_file is not None:
        about = {"onefold": onefold.__version__, "recipe": recipe, "changes": list(change)}
        about["psnr of one pass to two"] = agreements
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, "rows": summary}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main)
