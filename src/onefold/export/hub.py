"""The Hugging Face hub: a folder with a network's files, a picture and a model card, ready to be uploaded.

    README.md            the card: front matter, what was trained, on what, numbers with their protocol, how to load
    samples.png          images of the seeds 0, 1, …
    config.json, sampler.json, model.safetensors

The card is filled from the run and its evaluation records; of a network without a run it says what the network is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onefold.data.messages import count_text
from onefold.errors import writing
from onefold.metrics.record import Record
from onefold.networks import Network, OneFold
from onefold.networks.source import packaged
from onefold.pictures.grids import sample_grid
from onefold.summary import class_text, facts, network_facts, read_records
from onefold.training.run import Run

__all__ = ["card", "write"]

SHOWN = 60
TASK = "unconditional-image-generation"
"""The hub's word for what has no text as its input."""
INDEXED = ("frechet_distance", "class_accuracy", "precision", "recall", "reconstruction.psnr")
"""Numbers for the card's front matter."""
LEFT_OUT = ("few", "images_per_second")


def write(network: Network, folder: Path, *, run: Run | None = None, name: str) -> list[Path]:
    """Write the folder; returns its files.

    Args:
        network: What is published.
        folder: Where to.
        run: The run that it is of, if there is one.
        name: Title of the card: "owner/name" of the repository, or a name alone, to which an owner is still to come.

    Raises:
        UserError: a file cannot be written.
    """
    with writing(folder):
        network.save_pretrained(folder)
        sample_grid(network, folder / "samples.png", count=SHOWN, columns=10)
        (folder / "README.md").write_text(card(network, run, name), encoding="utf-8")
    return [folder / file for file in ("README.md", "config.json", "sampler.json", "model.safetensors", "samples.png")]


def card(network: Network, run: Run | None, name: str) -> str:
    """The model card, in Markdown with a front matter in YAML."""
    records = {} if run is None else read_records(run)
    kind = "onefold.OneFold" if isinstance(network, OneFold) else "onefold.networks.Network"
    one = network.sampler.jumps and network.sampler.steps == 1
    how = "in one step" if one else f"in {count_text(network.sampler.steps, 'step')}"
    source = name if "/" in name or name in packaged() else f"OWNER/{name}"  # the hub has no names without an owner
    about = "; ".join(filter(None, (network_facts(network)["images"], class_text(network))))
    parts = [
        f"---\n{_front_matter(records, name, one)}---\n\n# {name}\n",
        f"Generates images {how}: {about}.\n",
        f"![{SHOWN} images, of the seeds 0 to {SHOWN - 1}](samples.png)\n",
        "## Use\n",
        "```sh\npip install -e .  # from a clone of onefold\n```\n",
        "```python\nimport onefold\n\n"
        f'network = {kind}.from_pretrained("{source}")  # or the path of this folder\n'
        "images = network.sample(16, seed=0)  # uint8 (n, H, W, C); image k has the seed 0 + k\n```\n",
        "## The network\n",
        _table(network_facts(network)),
    ]
    if run is not None:
        parts += ["## Training\n", _table(facts(run))]
    if records:
        parts += ["## Numbers\n", "Numbers compare only with those of the same protocol.\n"]
        parts += [_record(title, record) for title, record in records.items()]
    return "\n".join(parts)


def _front_matter(records: Mapping[str, Record], name: str, one: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=str(record["protocol"]["data"]),
            dataset_name=str(record["protocol"]["data"]),
            metric_type=metric,
            metric_name=f"{metric}, {title}",
            metric_value=record.numbers()[metric],
        )
        for title, record in records.items()
        for metric in INDEXED
        if metric in record.numbers()
    ]
    tags = ["onefold", "diffusion", "image-generation", *(["one-step-generation"] if one else [])]
    titled = name if results else None
    data = ModelCardData(
        library_name="onefold", pipeline_tag=TASK, tags=tags, model_name=titled, eval_results=results or None
    )
    return f"{data.to_yaml().rstrip()}\n"


def _record(title: str, record: Record) -> str:
    """The numbers of a record, and below them how they were measured."""
    numbers = {key: f"{value:.4g}" for key, value in record.numbers().items() if key not in LEFT_OUT}
    how = {key: value for key, value in record["protocol"].items() if value is not None}
    return f"### {title}\n\n{_table(numbers)}\nMeasured by this protocol:\n\n{_table(how)}"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(key.replace('_', ' '))} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
