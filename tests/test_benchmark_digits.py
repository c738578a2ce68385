"""The files of benchmarks/onestep_digits.py and digits_seeds.py, from runs of milliseconds."""

import functools
import json
import statistics
from pathlib import Path

import pytest

import digits_seeds
import onefold
import onestep_digits
from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold.evaluation import evaluate
from onefold.metrics import protocol_differences
from onefold.training.loop import train
from onefold.training.run import load_run

few = functools.partial(evaluate, images=20)


def test_every_row_and_run_of_one_step_has_its_protocol_and_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for seed in (0, 1):
        teacher = train(tiny(training__seed=seed), tmp_path / f"run{seed}", quiet=True)
        config = one_step_from(teacher.folder, onestep__selects=False, training__on_collapse="ignore")
        fast = train(config, tmp_path / f"run{seed}-ratio", quiet=True)
        (fast.folder / "curves.png").touch()  # of so short a run there are none
    monkeypatch.setattr(onestep_digits, "evaluate", few)
    monkeypatch.setattr(onestep_digits, "SEEDS", (0, 100))
    onestep_digits.main((tmp_path / "run0", tmp_path / "run1"), json_file=tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    for row in rows.values():
        assert [about["subject"]["training_seed"] for about in row["records"]] == [0, 1]
        assert protocol_differences(*row["records"]) == []
    before, after, best = (rows[name]["records"][1] for name in ("1 step, before", "1 step", "best of 4"))
    assert before["subject"]["model_sha256"] == load_run(tmp_path / "run1").model_sha256
    assert after["subject"] == best["subject"]
    assert after["subject"]["model_sha256"] == load_run(tmp_path / "run1-ratio").model_sha256
    assert "best of 4" in best["protocol"]["sampler"]
    evaluations = [few(tmp_path / "run1-ratio", seed=seed)["test"] for seed in onestep_digits.SEEDS]
    for name in ("frechet_distance", "floor", "kid", "precision", "recall"):
        mean = statistics.mean(numbers[name] for numbers in evaluations)
        assert rows["1 step"][f"test.{name}"]["values"][1] == pytest.approx(mean)
    assert "| best of 4 |" in capsys.readouterr().out


def test_every_seed_of_the_recipe_has_its_protocol_and_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digits_seeds, "evaluate", few)
    monkeypatch.setattr(onefold, "recipe", lambda name, training: tiny(training__seed=training["seed"]))
    digits_seeds.main(2, tmp_path, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [about["subject"]["training_seed"] for about in found["records"]] == [0, 1]
    assert protocol_differences(*found["records"]) == []
    record = few(tmp_path / "seed1")
    assert found["records"][1] == {name: record[name] for name in ("protocol", "subject")}
    for name in ("frechet_distance", "floor", "kid", "precision", "recall"):
        assert found[f"test.{name}"]["values"][1] == pytest.approx(record["test"][name])
