"""The table of a study: arms in rows, numbers as mean ± standard deviation over seeds.

`table.json` holds every number of every trial with its protocol, and mean and standard deviation (divisor n − 1);
`table.csv` has one line per arm and seed; `table.md` is the human-readable table. All numbers come from the trials'
records, except for two kinds from their logs: `training.images_per_second` is the median, `health.…` the last health
that was measured (see `training.health`), such as `health.prediction_rank` and the rank of its target,
`health.effective_rank`, with `health.images`, when that was.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onefold import __version__
from onefold.data.messages import count_text
from onefold.files import write_whole
from onefold.metrics import Record, protocol_differences
from onefold.studies.study import Arm, Study, Trial
from onefold.training.run import Run

__all__ = ["arm_settings", "line", "trial_numbers", "write"]


def write(study: Study, trials: Sequence[Trial], out: Path) -> None:
    """Write `table.json`, `table.csv` and `table.md`."""
    write_whole(out / "table.json", json.dumps(_as_json(study, trials, out), indent=2, ensure_ascii=False) + "\n")
    write_whole(out / "table.csv", _as_csv(study, trials))
    write_whole(out / "table.md", _as_markdown(study, trials))


def line(study: Study, record: Record) -> str:
    """A one-line summary of a record."""
    numbers = record.numbers()
    parts = (f"{c.title} {numbers[c.key]:.{c.digits}f}" for c in study.columns[:4] if c.key in numbers)
    return ", ".join(parts)


def trial_numbers(trial: Trial) -> dict[str, float]:
    """All numbers of a trial by dotted name; empty if it has no record."""
    record = trial.record
    if record is None:
        return {}
    history = Run(trial.folder, trial.config).history
    speeds = [speed for entry in history if (speed := entry["images_per_second"])]
    trained = {"training.images_per_second": statistics.median(speeds)} if speeds else {}
    return {**record.numbers(), **trained, **_last_health(history)}


def _last_health(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scalars of the last health in a log, without those that were not finite."""
    measured = [entry for entry in history if entry.get("health")]
    if not measured:
        return {}
    found = {"images": measured[-1]["images"], **measured[-1]["health"]}
    return {f"health.{name}": value for name, value in found.items() if isinstance(value, int | float)}


def arm_settings(study: Study) -> dict[str, dict[str, Any]]:
    """By arm, the settings in which the arms differ from one another; None where an arm does not read it."""
    names = list(dict.fromkeys(name for arm in study.arms for name in arm.changes))
    found = {arm.name: {name: _value(study, arm, name) for name in names} for arm in study.arms}
    differing = [name for name in names if len({str(value[name]) for value in found.values()} - {"None"}) > 1]
    return {arm: {name: values[name] for name in differing} for arm, values in found.items()}


def _value(study: Study, arm: Arm, name: str) -> Any:
    if name in arm.ignored_settings:
        return None
    value: Any = study.arm_config(arm)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _arm_trials(arm: Arm, trials: Sequence[Trial]) -> list[Trial]:
    return sorted((trial for trial in trials if trial.arm.name == arm.name), key=lambda trial: trial.seed)


def _statistics(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, float, float | None]]:
    """Name, mean and standard deviation of each number; for a single seed the last is None."""
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        yield name, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _as_json(study: Study, trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    settings = arm_settings(study)
    arms: list[dict[str, Any]] = []
    for arm in study.arms:
        seeds: list[dict[str, Any]] = []
        for trial in _arm_trials(arm, trials):
            found: dict[str, Any] = {"seed": trial.seed, "run": trial.folder.relative_to(out).as_posix()}
            if (record := trial.record) is not None:
                told = {"protocol": record["protocol"], "subject": record.get("subject")}  # older ones have none
                found |= {"numbers": trial_numbers(trial), **told}
            seeds.append(found if record else {**found, "failed": trial.failure})
        summary = list(_statistics([found["numbers"] for found in seeds if "numbers" in found]))
        arms.append(
            {
                "name": arm.name,
                "title": arm.title,
                "changes": dict(arm.changes),
                "settings": settings[arm.name],
                "mean": {name: mean for name, mean, _ in summary},
                "std": {name: std for name, _, std in summary},
                "seeds": seeds,
            }
        )
    return {"study": study.name, "onefold": __version__, "command": study.command, "arms": arms}


def _as_csv(study: Study, trials: Sequence[Trial]) -> str:
    settings = arm_settings(study)
    switches = list(settings[study.arms[0].name])
    rows = [(trial, trial_numbers(trial)) for arm in study.arms for trial in _arm_trials(arm, trials)]
    names = list(dict.fromkeys([c.key for c in study.columns] + [name for _, numbers in rows for name in numbers]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", *switches, *names, "failed"])
    for trial, numbers in rows:
        values = [numbers.get(name, "") for name in names]
        writer.writerow([trial.arm.name, trial.seed, *settings[trial.arm.name].values(), *values, trial.failure or ""])
    return text.getvalue()


def _as_markdown(study: Study, trials: Sequence[Trial]) -> str:
    settings = arm_settings(study)
    switches = list(settings[study.arms[0].name]) if study.shows_settings else []
    shown = [c for c in study.columns if any(c.key in trial_numbers(trial) for trial in trials)]
    header = ["arm", *(name.split(".")[-1].replace("_", " ") for name in switches), *(c.title for c in shown)]
    rows = [header, ["---"] * (1 + len(switches)) + ["---:"] * len(shown)]
    for arm in study.arms:
        finished = [numbers for trial in _arm_trials(arm, trials) if (numbers := trial_numbers(trial))]
        some = "" if len(finished) == study.seeds else f" ({len(finished)} of {count_text(study.seeds, 'seed')})"
        summary = {name: (mean, std) for name, mean, std in _statistics(finished)}
        cells = [_cell(*summary[c.key], c.digits) if c.key in summary else "–" for c in shown]
        rows.append([arm.title + some, *(_word(settings[arm.name][name]) for name in switches), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([f"# Study: {study.name}", *_notes(study, trials), table, *_failures(trials)]) + "\n"


def _cell(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:,.{digits}f}" + ("" if std is None else f" ± {std:,.{digits}f}")


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value).replace("_", " ")


def _notes(study: Study, trials: Sequence[Trial]) -> Iterator[str]:
    records = [record for trial in trials if (record := trial.record) is not None]
    config, spread = study.config, "mean ± standard deviation over seeds" if study.seeds > 1 else "a first trial"
    named = "--change and its row name" if study.arguments.get("change") else "its row names"
    yield (
        f"{count_text(study.seeds, 'seed')}: {spread}. Every arm is the recipe {config.recipe} except for "
        f"what {named}, trained on {config.training.images:,} images of {config.data.source} in batches of "
        f"{config.training.batch}."
    )
    if begun := [arm for arm in study.arms if arm.teacher]:
        images = study.arm_config(begun[0]).training.images
        yield f"One-step generators start from the arm trained before them and see {images:,} more images."
    if records:
        p = records[-1]["protocol"]
        few = ", fewer than the Fréchet distance needs" if p["few_images"] else ""
        steps = count_text(p["steps"], f"{p['sampler']} step")
        yield (
            f"Samples: {p['generated_images']:,} against as many training images{few}; features of "
            f"{p['extractor']}; {steps}, guidance {p['guidance']:g}. Reconstructions and "
            f"latents: test images. onefold {p['version']}, `{study.command}`."
        )
        differing = {name for record in records for name in protocol_differences(records[0], record)}
        if begun:  # a diffusion model and a one-step generator differ in these
            differing -= {"ema", "sampler", "selection", "steps"}
        if differing := sorted(differing):
            yield f"**The records differ in {', '.join(differing)}: their numbers are not comparable.**"


def _failures(trials: Sequence[Trial]) -> Iterator[str]:
    failed = [f"- {trial.arm.title}, seed {trial.seed}: {trial.failure}" for trial in trials if trial.failure]
    if failed:
        yield "Failed:\n\n" + "\n".join(failed)
