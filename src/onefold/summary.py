"""What a finished run is, in words: its network, its data, its training, its records, and the command that makes it.

The report and the model card show the same; here it is gathered once.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from onefold import settings
from onefold.data.messages import count_text
from onefold.data.objects import source_name
from onefold.errors import UserError, quoted
from onefold.metrics.record import Record
from onefold.networks import Network
from onefold.recipes import RECIPES, recipe
from onefold.training.config import Config
from onefold.training.conversion import converted
from onefold.training.one_run import with_one_step
from onefold.training.prepare import IN_MEMORY
from onefold.training.run import Run

__all__ = ["class_text", "command", "facts", "network_facts", "read_records", "seconds_of"]

OBJECT = source_name(None).removeprefix("NoneType")
"""How the name of data ends that were given as a Python object."""
OWN_OPTIONS = {
    "recipe": None,
    "start": None,
    "start_sha256": None,
    "network.image_size": None,
    "network.channels": None,
    "network.classes": None,
    "network.class_names": None,
    "data.mirrored": None,
    "network.architecture": "--architecture",
    "data.source": "--data",
    "data.test": "--test-data",
    "data.unreadable": "--unreadable",
    "data.labels_from": "--labels-from",
    "training.images": "--images",
    "training.on_collapse": "--on-collapse",
    "onestep.method": "--method",
}
"""Options whose name is not that of the setting; None: it is read from the data, or given otherwise."""


def network_facts(network: Network) -> dict[str, str]:
    """The network, its latents and its sampler, by what a person calls them."""
    config, sampler = network.config, network.sampler
    height, width = config.image_size
    many = sum(p.numel() for p in network.parameters())
    guided = "" if sampler.guidance == 1 else f", guidance {sampler.guidance:g}"
    step = f"{count_text(sampler.steps, 'step')}, solver {sampler.solver}{guided}"
    return {
        "images": f"{height}×{width}, {count_text(config.channels, 'channel')}",
        "classes": class_text(network) or "none",
        "network": f"{type(network).__name__}, {many:,} parameters",
        "latents": f"{config.tokens} tokens × {count_text(config.latent_channels, 'channel')}",
        "sampling": step + (f", from t = {sampler.start:g}" if sampler.start else ""),
    }


def class_text(network: Network, most: int = 12) -> str:
    """The names of the classes, or their number where there are no names or many; empty if there are no classes."""
    config = network.config
    if config.class_names and config.classes <= most:
        return ", ".join(config.class_names)
    return count_text(config.classes, "class", "classes") if config.classes else ""


def facts(run: Run) -> dict[str, str]:
    """What a run was trained on, how and for how long, by what a person calls them; without paths."""
    config, training = run.config, run.config.training
    described = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    found = {"trained on": _data_text(run), "recipe": config.recipe, "phases": ", ".join(config.phases)}
    if config.start:
        found["started from"] = f"{Path(config.start).name} (SHA-256 {config.start_sha256[:12]}…)"
    seconds = seconds_of(run)
    seen = f"{run.images:,} images seen" + (f" of {run.length:,}" if run.images < run.length else "")
    found["length"] = seen + ("" if seconds is None else f", {_duration(seconds)} of steps")
    found["step"] = f"{count_text(training.batch)}, {training.optimizer}, {training.precision}, seed {training.seed}"
    commit = described.get("commit")
    found["code"] = f"onefold {described.get('onefold')}" + (f", commit {commit[:12]}" if commit else "")
    return found


def seconds_of(run: Run) -> float | None:
    """Seconds of training by the log, without pictures and checkpoints; None before its first line."""
    seconds, before = 0.0, 0
    for line in run.history:
        if line.get("images_per_second"):
            seconds += (line["images"] - before) / line["images_per_second"]
        before = line["images"]
    return seconds or None


def read_records(run: Run) -> dict[str, Record]:
    """The run's evaluation records by the name of their file. Files that hold no record are left out."""
    found: dict[str, Record] = {}
    for path in sorted((run.folder / "evaluation").glob("*.json")):
        try:
            found[path.stem] = Record.read(path)
        except UserError:
            continue
    return found


def command(run: Run) -> str | None:
    """The command that makes such a run again, with every setting that is not the default; None if there is none.

    There is none for a run whose images or network came from Python, nor for a one-step run whose teacher is no longer
    where it was.
    """
    config, out = run.config, ["--out", quoted(run.folder)]
    if config.data.source.endswith(OBJECT) or config.start == IN_MEMORY:
        return None
    if config.phases == ("one_step",):
        rank, training = config.network.jump_rank, config.training
        begins = partial(converted, config.start, method=config.onestep.method, unfinished=True)
        try:
            usual, whole = begins(), begins(rank=rank)
            base = begins(rank=rank, images=training.images, batch=training.batch)  # on which other lengths depend
        except UserError:
            return None
        own = {"training.images": whole.training.images, "training.batch": whole.training.batch}
        base = base.with_changes({**own, "onestep.method": "score"})  # the command's own defaults
        words = ["onefold", "onestep", quoted(config.start)]
        words += [] if rank == usual.network.jump_rank else ["--rank", str(rank)]
    else:
        name = config.recipe if config.recipe in RECIPES else "digits"
        base = recipe(name).with_changes({"network.architecture": config.network.architecture})
        words = ["onefold", "train", name]
        if config.network.architecture != recipe(name).network.architecture:
            words += ["--architecture", config.network.architecture.replace("_", "-")]
        if config.start:
            words += ["--from", quoted(config.start)]
        if config.phases == ("one_run",):
            words += ["--one-step"]
            base = with_one_step(base.with_changes({"training.images": config.training.images}))
            base = replace(base, training=recipe(name).training)
        if config.phases == config.network.kind.phases:
            config = config.with_changes({"phases": ()})
    return " ".join([*words, *_options(config, base), *out])


def _options(config: Config, base: Config) -> Iterator[str]:
    """An option for each setting that differs."""
    default = dict(settings.each(base))
    for name, value in settings.each(config):
        option = OWN_OPTIONS.get(name, f"--{name.replace('_', '-')}")
        if value == default[name] or option is None or name == "network.architecture":
            continue
        if isinstance(value, bool) and isinstance(default[name], bool):  # a flag, where None is no choice
            group, _, last = option.rpartition(".")
            yield option if value else f"{group}.no-{last}"
            continue
        yield option
        yield from (shlex.quote(str(part)) for part in (value if isinstance(value, tuple) else (value,)))


def _data_text(run: Run) -> str:
    """The source, how many images, and how they are split."""
    path = run.folder / "data.json"
    source = Path(run.config.data.source).name or run.config.data.source
    if not path.is_file():
        return source
    data = json.loads(path.read_text(encoding="utf-8"))
    train, test = data["train"], data["test"]
    return f"{source}: {count_text(train['images'])} to train on, {count_text(test['images'])} to test with"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return count_text(round(seconds), "second")
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{hours:.1f} hours"
