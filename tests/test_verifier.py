"""The ratio as a verifier: which candidates there are, which is kept, and the commands that ask for it."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import onefold
from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold import cli
from onefold.errors import UserError
from onefold.metrics import Record
from onefold.paths import per_token
from onefold.sampling import Sampler, generate, noises
from onefold.training.run import Run
from onefold.verifier import Verifier

SHAPE, ONE = (4, 4), Sampler(1)
APART = 2**32
"""Seeds between two candidates of an image."""


class Samples:
    """What a verifier asks of a network, with arithmetic that is the same to the bit in any batch."""

    def __init__(self, denoise: Callable[..., Tensor], shape: tuple[int, int] = SHAPE) -> None:
        self.denoise, self.shape, self.config = denoise, shape, SimpleNamespace(classes=10)

    def sample_latents(
        self, seeds: Sequence[int], labels: Sequence[int] | None, sampler: Sampler, *, batch: int = 256
    ) -> Iterator[Tensor]:
        return generate(self.denoise, self.shape, seeds, labels, sampler, null_label=10, batch=batch)


def noise_itself(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return z_t


def bent(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return 3 * z_t / (1 + z_t.abs()) + (0 if y is None else per_token(y.float()))


def first_number(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return x_t[:, 0, 0]


def kept(verifier: Verifier, seeds: Sequence[int], labels: list[int] | None = None, batch: int = 256) -> Tensor:
    return torch.cat(list(verifier.sample_latents(seeds, labels, ONE, batch=batch)))


def candidates_of(samples: Samples, seed: int, count: int, label: int | None = None) -> Tensor:
    seeds = [seed + j * APART for j in range(count)]
    return torch.cat(list(samples.sample_latents(seeds, None if label is None else [label] * count, ONE)))


def which(samples: Samples, verifier: Verifier, seeds: Sequence[int]) -> Tensor:
    """The number of the candidate that is kept for each seed."""
    every = [[seed + j * APART for seed in seeds] for j in range(verifier.candidates)]
    made = torch.stack([torch.cat(list(samples.sample_latents(own, None, ONE))) for own in every], 1)
    same = (made == kept(verifier, seeds)[:, None]).flatten(2).all(2)
    assert (same.sum(1) == 1).all(), "candidates are all different"
    return same.int().argmax(1)


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["best", "resample"])
def test_of_one_candidate_that_one_is_kept(choice: str):
    samples, labels = Samples(bent), [k % 10 for k in range(7)]
    plain = torch.cat(list(samples.sample_latents(range(5, 12), labels, ONE)))
    assert torch.equal(kept(Verifier(samples, first_number, 1, choice), range(5, 12), labels), plain)


def test_the_best_is_the_one_with_the_largest_ratio():
    """With the ratio asked at t = 0.9, on noise that the candidate was not made from."""
    samples = Samples(bent)
    for seed, label in ((0, 3), (1, 0), (77, 10)):
        z = candidates_of(samples, seed, 5, label)
        seeds = [seed + j * APART for j in range(5)]
        _, fresh = itertools.islice(noises(seeds, SHAPE), 2)
        assert torch.equal(z, bent(next(noises(seeds, SHAPE)), torch.zeros(5), torch.full((5,), label)))
        logits = first_number(0.9 * z + (1 - 0.9) * fresh, torch.zeros(5), None)
        best = kept(Verifier(samples, first_number, 5), [seed], [label])
        assert torch.equal(best[0], z[logits.argmax()])


def test_more_candidates_are_added_to_those_before():
    samples = Samples(noise_itself)
    seeds = range(40)
    few, many = (which(samples, Verifier(samples, first_number, n), seeds) for n in (2, 4))
    assert ((many == few) | (many >= 2)).all()
    assert set(many.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("choice", ["best", "resample"])
def test_the_choice_does_not_depend_on_batch_order_or_number(choice: str):
    verifier = Verifier(Samples(bent), first_number, 3, choice)
    seeds, labels = list(range(10, 20)), [k % 3 for k in range(10)]
    whole = kept(verifier, seeds, labels)
    for batch in (1, 2, 3, 7, 30):
        assert torch.equal(kept(verifier, seeds, labels, batch), whole), batch
    assert torch.equal(kept(verifier, seeds[4:], labels[4:], 4), whole[4:])
    assert torch.equal(kept(verifier, seeds[::-1], labels[::-1], 7), whole.flip(0))


def test_batches_hold_no_more_candidates_than_asked_for():
    sizes: list[int] = []

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        sizes.append(len(x_t))
        return x_t[:, 0, 0]

    parts = list(Verifier(Samples(bent), ratio, 3).sample_latents(range(5), None, ONE, batch=7))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert sizes == [6, 6, 3]


def test_the_ratio_is_asked_with_the_image_s_label_at_the_level():
    seen: list[tuple[Tensor, Tensor | None]] = []

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append((t, y))
        return x_t[:, 0, 0]

    kept(Verifier(Samples(bent), ratio, 2, level=0.7), [1, 2], [5, 10])
    kept(Verifier(Samples(bent), ratio, 2, level=0.7), [1, 2])
    (t, y), (_, none) = seen
    assert y is not None
    assert y.tolist() == [5, 5, 10, 10]
    assert y.dtype == torch.int64
    assert t.tolist() == [pytest.approx(0.7)] * 4
    assert none is None


# --- resampling -------------------------------------------------------------------------------------------------------


def test_resampling_draws_in_proportion_to_the_ratio():
    """The number of times that each candidate is kept, against softmax(ℓ): χ² of 2 degrees of freedom."""
    logits, seeds = torch.tensor([0.0, math.log(2), math.log(5)]), range(1000)
    samples = Samples(noise_itself)
    verifier = Verifier(samples, lambda x_t, t, y: logits.repeat(len(x_t) // 3), 3, "resample")
    chosen = which(samples, verifier, seeds).bincount(minlength=3)
    expected = len(seeds) * logits.softmax(0)
    assert expected.tolist() == pytest.approx([125, 250, 625])
    assert ((chosen - expected).square() / expected).sum() < 9.2, chosen  # 1 in 100 by chance, but these seeds do not


def test_the_draw_does_not_depend_on_the_noise_of_the_candidates():
    """Where the ratio knows nothing, what is kept has the distribution of what was made."""
    samples = Samples(noise_itself)
    verifier = Verifier(samples, lambda x_t, t, y: torch.zeros(len(x_t)), 2, "resample")
    z = kept(verifier, range(3000))
    deviation = (2 / len(z)) ** 0.5
    assert (z.square().mean(0) - 1).abs().max() < 4 * deviation
    assert (z.mean(0)).abs().max() < 4 / len(z) ** 0.5


def test_with_the_exact_ratio_resampling_leads_to_the_data():
    """Samples are N(0, 1), data N(½, 1): of 16 candidates the one that is kept is nearly distributed as data."""
    samples = Samples(noise_itself, (1, 1))
    verifier = Verifier(samples, lambda x_t, t, y: 0.5 * x_t[:, 0, 0] - 0.125, 16, "resample", level=1.0)
    x = kept(verifier, range(1000)).flatten()
    assert x.mean().item() == pytest.approx(0.5, abs=0.1)
    assert x.var().item() == pytest.approx(1, abs=0.15)


def test_too_few_candidates_are_one_line():
    with pytest.raises(UserError, match=r"^best of 0: 0 candidates are too few; give 1 or more$"):
        Verifier(Samples(bent), first_number, 0)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    teacher = onefold.train(tiny(training__images=16), folder / "teacher", quiet=True)
    config = one_step_from(teacher.folder, training__images=48, onestep__critic_warmup=0)
    return {"teacher": teacher, "onestep": onefold.train(config, folder / "onestep", quiet=True)}


@pytest.fixture
def run(runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(runs["onestep"].folder, tmp_path / "run")
    shutil.copytree(runs["teacher"].folder, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_sample_chooses_among_candidates_and_says_so(run: Path):
    made: dict[str, bytes] = {}
    for name, *options in (
        ("plain",),
        ("one", "--best-of", "1"),
        ("best", "--best-of", "4"),
        ("again", "--best-of", "4", "--batch", "5"),
        ("drawn", "--resample", "4"),
    ):
        out = Path(f"{name}.png")
        assert cli.run(["sample", str(run), "--n", "12", "--out", str(out), *options]) == 0
        made[name] = pixels(out)
    assert made["plain"] == made["one"]
    assert made["best"] == made["again"]
    assert len({made["plain"], made["best"], made["drawn"]}) == 3
    with Image.open("best.png") as best, Image.open("drawn.png") as drawn, Image.open("plain.png") as plain:
        assert best.text["choice"] == "best of 4"
        assert drawn.text["choice"] == "resampled from 4"
        assert "choice" not in plain.text
        assert best.text["seeds"] == plain.text["seeds"] == "0…11"


def test_separate_images_say_so_too(run: Path):
    assert cli.run(["sample", str(run), "--n", "2", "--best-of", "2", "--separate", "--out", "folder"]) == 0
    with Image.open("folder/seed1-class1.png") as image:
        assert image.text["choice"] == "best of 2"


def test_evaluate_measures_the_choice(run: Path, capsys: pytest.CaptureFixture[str]):
    found: dict[str, Any] = {}
    for options in ([], ["--best-of", "1"], ["--best-of", "3"], ["--resample", "3"]):
        assert cli.run(["evaluate", str(run), "--images", "20", "--json", *options]) == 0
        found[" ".join(options)] = json.loads(capsys.readouterr().out)
    assert {
        path.stem.removeprefix("refine-1-guidance-1-shift-1-seed-0") for path in (run / "evaluation").iterdir()
    } == {
        "",
        "-best-of-1",
        "-best-of-3",
        "-resample-3",
    }
    samplers = [record["protocol"]["sampler"] for record in found.values()]
    choices = ("", ", best of 1", ", best of 3", ", resampled from 3")
    assert samplers == [f"refine from t = 0.3{choice}" for choice in choices]
    distances = [record["frechet_distance"] for record in found.values()]
    assert distances[0] == distances[1]
    assert len(set(distances)) == 3
    assert all(Record.read(path)["reconstruction"] for path in (run / "evaluation").iterdir())


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("run --best-of 2 --resample 3", "--best-of: cannot go with --resample; choose one"),
        ("run --best-of 0", "--best-of: 0 is not positive; give at least 1"),
        ("run --resample -1", "--resample: -1 is not positive; give at least 1"),
        (
            "teacher --best-of 2",
            "--best-of: teacher has no ratio network; give a run made with `onefold onestep RUN --method ratio`",
        ),
        ("teacher --resample 2", "--resample: teacher has no ratio network"),
        ("damaged --best-of 2", "damaged/ratio: does not hold a ratio network"),
        ("run --best-of x", "--best-of"),
    ],
)
def test_wrong_choices_are_one_line(
    run: Path, command: str, options: str, told: str, capsys: pytest.CaptureFixture[str]
):
    if "damaged" in options:
        shutil.copytree(run, "damaged")
        os.truncate("damaged/ratio/model.safetensors", 99)
    assert cli.run([command, *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert not Path("samples.png").exists()
