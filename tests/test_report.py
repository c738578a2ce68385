"""The report: one page that loads nothing, shows what the run is, and ranks only what can be compared."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import randomised
from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold import cli
from onefold.metrics.record import Protocol, Record, Subject
from onefold.networks import NetworkConfig, build
from onefold.pictures import curves
from onefold.report import html, pictures, records
from onefold.training.loop import train
from onefold.training.run import Run

VOID = {"meta", "img"}
LOADING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}


class Page(HTMLParser):
    """What a browser would read: text, pictures, and addresses that it would ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.pictures: list[np.ndarray] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), "no script"
            if name in LOADING and not (value or "").startswith("#"):
                self.addresses.append(str(value))
        if tag == "img":
            content = str(dict(attributes)["src"]).removeprefix("data:image/png;base64,")
            self.pictures.append(np.array(Image.open(io.BytesIO(base64.b64decode(content)))))
            assert dict(attributes)["alt"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def record(run: str = "0", **changes: object) -> Record:
    protocol = Protocol(
        data="digits",
        data_sha256="0" * 64,
        split="train",
        extractor="e",
        extractor_sha256="1" * 64,
        resize="none",
        real_images=9,
        generated_images=9,
        few_images=True,
        **{name: value for name, value in changes.items() if name in ("steps", "seed")},  # type: ignore[arg-type]
    )
    subject = Subject(
        model_sha256=run, training_seed=0, images_seen=64, checkpoint=64, training_commit=None, commit=None
    )
    numbers = {name: value for name, value in changes.items() if name not in ("steps", "seed")}
    return Record.of(protocol, subject, **numbers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run with an odd name and a one-step generator made of it."""
    place = tmp_path_factory.mktemp("report")
    run = train(tiny(training__images=64, training__health_every=32), place / "a <b>run", quiet=True)
    record(steps=2, frechet_distance=1.25).write(run.folder / "evaluation" / "two.json")
    fast = train(one_step_from(run.folder, training__images=64), place / "fast", quiet=True)
    return run, fast


def test_a_run_is_on_one_page_that_loads_nothing(runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]):
    run, _ = runs
    assert cli.run(["report", str(run.folder)]) == 0
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == len(page.pictures) >= 5
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert page.headings == [
        "a <b>run",
        "Make it again",
        "Samples",
        "Classes",
        "Between seeds",
        "Numbers",
        "Course of the training",
        "Samples over training",
        "Nearest training images",
        "Reconstructions",
        "Spectrum of the latents",
    ]
    for shown in (
        "digits: 1,437 images to train on",
        "onefold train digits",
        "1.25",
        "two: protocol",
        "2 steps, seeds",
    ):
        assert shown in page.text
    assert len(re.findall("currentColor", text)) > 10
    assert "report.html: " in capsys.readouterr().out


def test_several_runs_are_compared(runs: tuple[Run, Run], tmp_path: Path):
    run, fast = runs
    assert cli.run(["report", str(run.folder), str(fast.folder), "--out", str(tmp_path / "both.html"), "--quiet"]) == 0
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert page.headings[:4] == ["a <b>run and fast", "Numbers", "The same seeds", "The runs"]
    assert page.text.count("Spectrum of the latents") == 2
    assert "The same seeds and classes in 50 steps" in page.text, "of the one-step run"
    assert "No evaluation yet" in page.text


def test_images_that_are_gone_are_left_out(runs: tuple[Run, Run], tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0].folder, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"source": "digits"', f'"source": "{tmp_path / "gone.zip"}"'))
    assert cli.run(["report", str(folder), "--quiet"]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Neighbours, reconstructions and latents are left out: " in page.text
    assert "gone.zip" in page.text
    assert "Samples" in page.headings


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["missing"], "missing: not a run"),
        ([], "report: "),
        (["RUN", "RUN"], "is given twice; give each run once"),
        (["RUN", "FAST", "--data", "digits"], "--data: belongs to one run"),
        (["RUN", "--out", "/dev/null/x.html"], "/dev/null/x.html: cannot be written"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], line: str, runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
):
    places = {"RUN": str(runs[0].folder), "FAST": str(runs[1].folder)}
    assert cli.run(["report", *(places.get(word, word) for word in words), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


# --- records ----------------------------------------------------------------------------------------------------------


def test_only_numbers_of_one_protocol_are_ranked():
    found = {
        "a": record("a", steps=50, frechet_distance=2.0, precision=0.5, images_per_second=1.0),
        "b": record("b", steps=50, frechet_distance=3.0, precision=0.7, images_per_second=2.0),
        "c": record("c", steps=1, frechet_distance=1.0, precision=0.9, images_per_second=3.0),
    }
    assert records.groups(found) == [["a", "b"], ["c"]]
    assert records.best(found, "frechet_distance") == {"a"}, "the least, and not c, which is of another protocol"
    assert records.best(found, "precision") == {"b"}
    assert records.best(found, "images_per_second") == set(), "it is of the machine"
    assert records.unlike(found) == ["a and c are not ranked: their protocols differ in steps (50 and 1)."]
    text = "\n".join(records.section(found))
    assert text.count("★</td>") == 2
    assert '<td class="number best">2 ★</td>' in text
    assert "a and c are not ranked" in text


def test_a_single_record_has_no_rank():
    found = {"a": record(frechet_distance=2.0)}
    assert records.best(found, "frechet_distance") == set()
    assert records.unlike(found) == []
    assert "★" not in "\n".join(records.section(found))


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest():
    pool = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    images = pool[[7, 3]].astype(int) + 3 * (pool[[7, 3]] < 128) - 3 * (pool[[7, 3]] >= 128)
    assert (pictures.nearest(images.astype(np.uint8), pool) == pool[[7, 3]]).all()


@pytest.mark.parametrize("classes", [0, 10])
def test_the_way_between_seeds_begins_and_ends_with_them(classes: int):
    network = randomised(build(NetworkConfig(width=32, depth=1, heads=2, classes=classes)), 1).eval()
    network.sampler = network.sampler.with_options(steps=2)
    rows = pictures.between(network, rows=3).reshape(3, 10, 8, 8, 1)
    for k in range(3):
        labels = [k] if classes else None
        for column, seed in ((0, 2 * k), (9, 2 * k + 1)):
            image = network.sample(1, seed=seed, labels=labels)[0]
            assert np.abs(rows[k, column].astype(int) - image).max() <= 1


def test_curves_in_a_page_have_its_colour_and_ids_of_their_own():
    history = [
        {"images": 100 * k, "reconstruction": 1 / k, "health": {"psnr": 10.0 + k, "latent_std": 1.0}}
        for k in range(1, 4)
    ]
    drawn = curves.drawings(history)
    assert {"losses on training batches", "reconstruction of test images, PSNR in dB"} <= drawn.keys()
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)), "no id twice on a page"
    for svg in drawn.values():
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert not re.search(r'<svg[^>]* (?:width|height)="', svg)
        for used in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg):
            assert f'id="{"".join(used)}"' in svg
    assert curves.drawings(history[:1]) == {}


def test_text_is_escaped():
    assert html.text('<a href="x">&') == "&lt;a href=&quot;x&quot;&gt;&amp;"
    grey, two = np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3, 2), np.uint8)
    for pixels in (grey, two, np.zeros((2, 3, 3), np.uint8), torch.zeros(2, 3, 5).byte().numpy()):
        assert Page(html.image(pixels, "x")).pictures[0].shape[:2] == (2, 3)
