"""The page: of one run all there is to see; of several, first how they compare."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from onefold.errors import UserError, writing
from onefold.files import write_whole
from onefold.metrics.record import Record
from onefold.pictures import curves
from onefold.pictures.grids import grid
from onefold.report import html, pictures, records
from onefold.summary import command, facts, network_facts, read_records
from onefold.training.run import Run

__all__ = ["write"]

Say = Callable[[str], None]
COMPARED = 30
"""Samples of each run that are shown side by side."""


def write(runs: Sequence[Run], path: Path, *, device: torch.device | str = "cpu", say: Say = lambda line: None) -> None:
    """Write the page of runs that have a model.

    Args:
        runs: One, or several to be compared.
        path: The file to write.
        device: Where networks run.
        say: Told what is being done, a line each.

    Raises:
        UserError: a run without a model, or a file that cannot be written. Images that are gone are only left out.
    """
    for run in runs:
        run.network.to(device)
    names = _names(runs)
    body = [html.heading(1, " and ".join(names))]
    if len(runs) == 1:
        body += _sections(runs[0], say)
    else:
        say("comparing")
        body += _comparison(runs, names)
        for run, name in zip(runs, names, strict=True):
            body.append(html.details(f"All of {name}", _sections(run, say)))
    with writing(path):
        write_whole(path, html.document(f"onefold: {' and '.join(names)}", body))


def _names(runs: Sequence[Run]) -> list[str]:
    """The name of each folder, and as much of its path as tells it from the others."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{runs[0].folder}: is given twice; give each run once")


def _sections(run: Run, say: Say) -> Iterator[str]:
    """All of one run."""
    say(f"{run.folder}: drawing curves and samples")
    yield html.table({**facts(run), **network_facts(run.network)})
    made = command(run)
    yield html.heading(2, "Make it again")
    if made is None:
        yield html.paragraph("What it was made of came from Python, or is no longer where it was.")
    else:
        yield f"<pre>{html.text(made)}</pre>"
    yield from pictures.of_network(run.network)
    yield html.heading(2, "Numbers")
    yield from records.section(read_records(run))
    drawn = curves.drawings(run.history)
    if drawn:
        yield html.heading(2, "Course of the training")
        yield html.figures(html.figure(drawing, f"{title[:1].upper()}{title[1:]}.") for title, drawing in drawn.items())
    yield from pictures.over_training(run)
    try:
        train, test = run.open_data(say)
    except UserError as error:
        yield html.paragraph(f"Neighbours, reconstructions and latents are left out: {error}")
        return
    say(f"{run.folder}: comparing with its images")
    yield from pictures.of_data(run.network, train, test)


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """Records, samples of the same seeds, and what the runs are, side by side."""
    yield html.heading(2, "Numbers")
    yield from records.section(_all_records(runs, names))
    yield html.heading(2, "The same seeds")
    yield html.figures(
        html.figure(html.image(grid(run.network.sample(COMPARED), columns=10), f"samples of {name}"), f"{name}.")
        for run, name in zip(runs, names, strict=True)
    )
    yield html.heading(2, "The runs")
    described = [{**facts(run), **network_facts(run.network)} for run in runs]
    keys = dict.fromkeys(key for each in described for key in each)
    yield html.grid_table(names, {key: [(each.get(key, "–"), False) for each in described] for key in keys})


def _all_records(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Record]:
    return {
        f"{name}: {title}": record
        for run, name in zip(runs, names, strict=True)
        for title, record in read_records(run).items()
    }
