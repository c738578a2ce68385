import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import onefold
from data_images import cut, encode, noise, write_folder, write_zip
from helpers_runs import differing, newest, tiny
from onefold import cli, metrics
from onefold.commands import demo, estimate
from onefold.metrics import Record
from onefold.networks.base import Network
from onefold.recipes import recipe
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import Run, load_run
from onefold.training.state import TrainingState
from onefold.training.step import training_step

SMALL = [
    *("--network.width", "32", "--network.depth", "1", "--network.heads", "2", "--sampler.steps", "2"),
    *("--training.images", "32", "--training.batch", "16", "--training.precision", "float32", "--quiet"),
]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own to work in, with things that are wrong in it; no network; a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("digits") / "run", quiet=True)


@pytest.fixture
def run(trained: Run) -> Path:
    """A run in the present folder, named run."""
    shutil.copytree(trained.folder, "run")
    return Path("run")


def call(*words: object) -> int:
    """The exit code; the parser leaves by itself after it has shown help."""
    try:
        return cli.run([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def text(path: str | Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image).astype(int)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"]], ids=str)
def test_the_overview_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert call(*words) == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in shown
        assert (cli.command(name).__doc__ or "").splitlines()[0] in shown


def test_onefold_alone_shows_where_to_begin(capsys: pytest.CaptureFixture[str]):
    assert call() == 0
    shown = capsys.readouterr().out
    for name in ("data inspect", "train", "sample", "onestep", "evaluate"):
        assert f"  onefold {name} " in shown
    assert "`onefold --help` shows all commands" in shown


@pytest.mark.parametrize("name", [*cli.COMMANDS, "train digits", "train imagenet256-b"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_with_an_example(name: str, flag: str, capsys: pytest.CaptureFixture[str]):
    assert call(*name.split(), flag) == 0
    captured = capsys.readouterr()
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out).split())
    command = "train" if name.startswith("train") else name
    assert f"Example: onefold {command}" in shown
    example = re.search(rf"Example: (onefold {command}.*?)(?: Args|╭| usage| positional| options|$)", shown)
    assert example is not None
    for option in re.findall(r"--[a-z][a-z0-9.-]*", example[1][:100]):
        assert f"{option} " in shown.replace(example[1], "", 1), f"the example uses {option}"
    assert captured.err == ""
    assert "(default: )" not in shown


def test_a_group_of_commands_has_help(capsys: pytest.CaptureFixture[str]):
    assert call("data", "--help") == 0
    assert "data convert" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"onefold {onefold.__version__}\n"


def test_the_package_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "onefold", "bogus"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onefold: bogus: no such command; choose one of demo, train,")


# --- wrong input ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, str]] = [
    ("bogus", "bogus"),
    ("data", "followed by one of inspect, convert, stats"),
    ("data bogus", "data bogus"),
    # train: recipe and options
    ("train", "recipe"),
    ("train cifar", "cifar10"),
    ("train faces", "train: no recipe is named faces; choose one of digits, fashion, cifar10, "),
    ("train face", "imagenet256-b, auto"),
    ("train --data folder", "recipe"),
    ("train digits more", "more"),
    ("train digits --bogus 3", "--bogus"),
    ("train digits --training.bogus 3", "--training.bogus"),
    ("train digits --training.batch x", "--training.batch"),
    ("train digits --training.batch", "--training.batch"),
    ("train digits --training.batch 1.5", "--training.batch"),
    ("train digits --training.batch 0", "training.batch"),
    ("train digits --training.batch -1", "training.batch"),
    ("train digits --training.images 0", "training.images"),
    ("train digits --training.seed -1", "training.seed"),
    ("train digits --training.seed 9999999999999999999999", "training.seed"),
    ("train digits --training.micro-batch 0", "training.micro_batch"),
    ("train digits --training.learning-rate -1", "training.learning_rate"),
    ("train digits --training.learning-rate nan", "training.learning_rate"),
    ("train digits --training.betas 2 2", "training.betas"),
    ("train digits --training.betas 0.9", "--training.betas"),
    ("train digits --training.optimizer sgd", "--training.optimizer"),
    ("train digits --training.device tpu $small --out new", "tpu"),
    ("train digits --network.patch 0", "network.patch"),
    ("train digits --network.heads 5", "network.heads"),
    ("train digits --objective.draws 0", "objective.draws"),
    ("train digits --objective.time.mean nan", "objective.time.mean"),
    ("train digits --network.classes 0 --sampler.guidance 2 $small --out new", "guidance: 2 needs classes"),
    ("train digits --data.holdout 1", "data.holdout"),
    ("train digits --steps 0", "--steps"),
    ("train digits --steps -3", "--steps"),
    ("train digits --steps x", "--steps"),
    # train: data
    ("train fashion --out new", "fashion-mnist: no such file or folder; for the recipe, it is the folder of Fashion-"),
    ("train cifar10 --data folder --test-data cifar10-test.zip --out new", "nothing is downloaded; say with --test-d"),
    ("train digits --data missing $small --out new", "missing: no such file or folder; give an image folder"),
    ("train digits --data missing.zip $small --out new", "missing.zip"),
    ("train digits --data empty $small --out new", "empty"),
    ("train digits --data corrupt $small --out new", "7.png"),
    ("train digits --data garbage $small --out new", "7.png"),
    ("train digits --data mixed $small --out new", "7.png"),
    ("train digits --data small $small --out new", "network.patch"),
    ("train digits --data odd $small --out new", "7×9"),
    ("train digits --data bad.zip $small --out new", "bad.zip"),
    ("train digits --data bad.npz $small --out new", "bad.npz"),
    ("train digits --data file $small --out new", "file"),
    ("train digits --data folder --test-data digits:test $small --out new", "digits:test"),
    ("train digits --test-data missing $small --out new", "missing"),
    # train: the run's folder
    ("train digits $small --out folder", "folder"),
    ("train digits $small --out file", "file"),
    ("train digits $small --out file/run", "file/run"),
    ("train digits $small --out run", "run"),
    ("train --resume --out missing", "missing"),
    ("train --resume --out folder", "folder"),
    ("train --resume --out file", "file"),
    ("train --resume", "runs/digits"),
    ("train --resume --training.batch 8", "--training.batch"),
    ("train --resume --data=digits", "runs/digits: not a run"),
    ("onestep run --resume --training.batch 8", "--training.batch"),
    ("train --resume --out run --images 160", "--images: 160 do not make run longer, which has 160"),
    ("train --resume --out run --images 0", "training.images: 0 is not positive"),
    # sample
    ("sample", "sample"),
    ("sample missing", "missing"),
    ("sample folder", "folder"),
    ("sample file", "file"),
    ("sample runs/missing", "runs/missing"),
    ("sample runs/my--run", "runs/my--run"),
    ("sample runs/..", "runs/.."),
    ("sample run --n 0", "n: 0"),
    ("sample run --n -1", "n: -1"),
    ("sample run --n x", "--n"),
    ("sample run --labels 11", "labels: 11"),
    ("sample run --labels -1", "labels: -1"),
    ("sample run --labels 1 2 --n 3", "labels"),
    ("sample run --labels dog", "labels: 'dog' is no class of this network"),
    ("sample run --steps 0", "steps: 0"),
    ("sample run --seed -1", "seed: -1"),
    ("sample run --batch 0", "batch"),
    ("sample run --batch -1", "batch"),
    ("sample run --shift 0", "shift"),
    ("sample run --guidance nan", "guidance"),
    ("sample unconditional --guidance 2", "guidance: 2 needs classes"),
    ("sample run --solver rk4", "solver: 'rk4' is not one of 'euler', 'heun', 'renoise', 'refine'"),
    (
        "sample run --solver refine",
        "solver: 'refine' needs a one-step generator; make one with `onefold onestep RUN` or",
    ),
    ("sample run --solver renoise --steps 1", "solver: 'renoise' needs a one-step generator"),
    ("sample run/model --solver refine", "solver: 'refine' needs a one-step generator"),
    ("evaluate run --images 20 --solver refine", "solver: 'refine' needs a one-step generator"),
    ("sample run --n 2 --out file/x.png", "file/x.png"),
    ("sample run --n 2 --out folder", "folder"),
    ("sample run --n 2 --out x.xyz", "x.xyz"),
    ("sample run --n 2 --out full.png", "full.png"),
    ("sample run --n 2 --separate --out file", "file"),
    # reconstruct
    ("reconstruct", "reconstruct"),
    ("reconstruct run", "images"),
    ("reconstruct missing folder/1.png", "missing"),
    ("reconstruct run missing.png", "missing.png"),
    ("reconstruct run corrupt/7.png", "corrupt/7.png"),
    ("reconstruct run odd/7.png", "odd/7.png"),
    ("reconstruct run bad.zip", "bad.zip"),
    ("reconstruct run folder", "folder"),
    ("reconstruct run digits:test --out file/x.png", "file/x.png"),
    # evaluate
    ("evaluate", "evaluate"),
    ("evaluate missing", "missing"),
    ("evaluate run/model", "run/model/config.json: not the configuration of a run; give run"),
    ("evaluate run/samples", "run/samples: not a run (no config.json); give run"),
    (
        "evaluate digits",
        "digits: not a run (no config.json); the package has images and a network of that name, but no run; make one",
    ),
    ("sweep digits:test --steps 1 2", "digits:test: not a run (no config.json); the package has images of that name"),
    ("evaluate run --images 0", "images: 0"),
    ("evaluate run --images x", "--images"),
    ("evaluate run --images 20 --seed -1", "seed"),
    ("evaluate run --images 20 --batch 0", "batch"),
    ("evaluate run --steps 0", "steps: 0"),
    ("evaluate unconditional --images 20 --guidance 0", "guidance: 0 needs classes"),
    ("evaluate run --device tpu", "tpu"),
    ("evaluate run --features missing.pt", "missing.pt: no such file; give a .safetensors, .pt, "),
    ("evaluate run --features missing", "a folder, or one of the names inception, dinov2, clip"),
    ("evaluate run --features file", "file"),
    ("evaluate run --features bad.pt", "bad.pt"),
    ("evaluate run --reference missing", "missing"),
    ("evaluate run --reference file", "file"),
    # estimate, data, demo
    ("estimate", "estimate"),
    ("estimate cifar", "cifar10"),
    ("estimate auto", "no recipe is named auto; `onefold train auto --data …` measures by itself; here, choose one"),
    ("estimate digits --seconds x", "--seconds"),
    ("estimate digits --training.micro-batch 0", "micro_batch"),
    ("estimate digits --training.device tpu", "tpu"),
    ("estimate digits --data missing", "missing"),
    ("estimate digits --seconds -1", "seconds: -1.0 is not a length of time"),
    ("train digits --network.image-size 4 4", "--network.image-size: size and channels are read from the data"),
    ("train digits --network.channels=3", "--network.channels=3: size and channels are read from the data"),
    ("train cifar10 --resume --out run", "run: is a run of digits, not of cifar10"),
    ("onestep run --resume --out run", "run: is not a one-step run"),
    ("demo --out run", "run: holds another run than this demo's"),
    ("estimate digits --network.patch 3 --data digits", "patch 3"),
    ("estimate digits --architecture two", "--architecture: 'two' is not known; choose one of one-network, "),
    ("train digits --network.space pixels --out new", "--network.space"),
    ("data inspect", "data inspect"),
    ("data inspect missing", "missing"),
    ("data inspect empty", "empty"),
    ("data inspect bad.zip", "bad.zip"),
    ("data inspect folder --sheet file/x.png", "file/x.png"),
    ("data convert folder out.zip", "--size"),
    ("data convert folder out.zip --size 0", "--size"),
    ("data convert folder out.zip --size x", "--size"),
    ("data convert folder out.txt --size 4", "out.txt"),
    ("data convert missing out.zip --size 4", "missing"),
    ("data convert corrupt out.zip --size 4", "7.png"),
    ("data stats missing", "missing"),
    ("data stats digits --out file/x", "file/x"),
    ("demo --seed -1", "seed"),
    ("demo --seed x", "--seed"),
    ("demo --out folder", "folder"),
    ("demo --out file", "file"),
]


@pytest.fixture(scope="module")
def wrong_things(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the lines above stumble over, and a good run."""
    here = tmp_path_factory.mktemp("wrong")

    def pictures(name: str, height: int, width: int) -> dict[str, bytes]:
        return {f"{name}/{k}.png": encode(noise(height, width, 3, seed=k)) for k in range(24)}

    write_folder(here, pictures("folder", 8, 8))
    write_folder(here, pictures("corrupt", 8, 8) | {"corrupt/7.png": cut(encode(noise(8, 8, 3)))})
    write_folder(here, pictures("garbage", 8, 8) | {"garbage/7.png": b"hello"})
    write_folder(here, pictures("mixed", 8, 8) | {"mixed/7.png": encode(noise(8, 9, 3))})
    write_folder(here, pictures("small", 1, 1) | pictures("odd", 7, 9))
    (here / "empty").mkdir()
    for name in ("file", "bad.zip", "bad.npz", "bad.pt"):
        (here / name).write_bytes(b"PK\x03\x04 not what its name says")
    (here / "full.png").symlink_to("/dev/full")
    shutil.copytree(trained.folder, here / "run")
    train(tiny(network__classes=0, training__images=16), here / "unconditional", quiet=True)
    return here


@pytest.mark.parametrize(("line", "named"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_and_code_2(
    wrong_things: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    named: str,
):
    if named == "full.png" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    monkeypatch.chdir(wrong_things)
    for left_by_a_failure in ("new", "runs"):
        shutil.rmtree(left_by_a_failure, ignore_errors=True)
    before = set(Path().rglob("*"))
    assert call(*(word for each in line.split() for word in (SMALL if each == "$small" else [each]))) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("onefold: ")
    assert named in captured.err
    if "corrupt" not in line:  # that is found out only when it is read, within the run
        assert set(Path().rglob("*")) == before, "nothing is begun with wrong input"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits --bogus 3", "Unrecognized options: --bogus, 3;"),
        ("train digits --training.batch x", "--training.batch: 'x' is not a whole number;"),
        ("train digits --training.learning-rate x", "--training.learning-rate: 'x' is not a number;"),
        ("train digits --training.precision x", "--training.precision: 'x' is not one of 'auto', 'float32', 'tf32', "),
        ("train digits --training.batch", "--training.batch: needs a value;"),
        ("train digits --training.betas 0.9", "--training.betas: needs 2 values;"),
        ("train digits --steps x", "--steps: 'x' is not a whole number;"),
        ("sample run --steps x", "--steps: 'x' is not a whole number;"),
        ("study bias --widths 4 x", "--widths: '4', 'x' is not a list of whole numbers;"),
        ("train digits --training.batch 0", "training.batch: 0 is not positive; give at least 1;"),
        ("sample", "needs PATH (a run's folder, a saved network's folder, "),
        ("export run", "needs --to {hub,onnx,diffusers,web};"),
        ("data convert a", "needs PATH (the zip to write; never the source itself) and --size INT (side of the square"),
        ("sweep run --steps x", "--steps: 'x' is not what it takes;"),
        ("sample run --solvr heun", "Unrecognized options: --solvr, heun (perhaps --solver STR?);"),
    ],
)
def test_the_parser_s_frames_are_taken_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoding: str, line: str, message: str
):
    """It draws them in other signs where the terminal knows only ASCII."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert call(*line.split()) == 2
    words = line.split()
    name = " ".join(words[: 2 if words[0] in ("data", "study", "train") else 1])
    shown = capsys.readouterr().err
    assert shown.startswith(f"onefold: {name}: {message}")
    assert not re.search(r"[│╭╮╰╯─]|--{4,}|For full helptext|Argument helptext", shown)


def test_a_suggestion_is_passed_on(capsys: pytest.CaptureFixture[str]):
    assert call("train", "digits", "--training.learning-rat", "1e-3") == 2
    assert "--training.learning-rate" in capsys.readouterr().err


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "digits", "--steps", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "onefold: --steps: 0 is not positive; give at least 1\n"


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_is_the_library_s_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert call("train", "digits", *SMALL, "--out", "by-hand") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    sizes = {"network": {"width": 32, "depth": 1, "heads": 2}, "sampler": {"steps": 2}}
    config = recipe("digits", **sizes, training={"images": 32, "batch": 16, "precision": "float32"})
    by_library = train(config, tmp_path / "by-library", quiet=True)
    assert load_run("by-hand").config == by_library.config
    assert differing(newest(Path("by-hand")), newest(by_library.folder)) == []


def test_train_says_where_the_run_is(capsys: pytest.CaptureFixture[str]):
    assert call("train", "digits", *SMALL[:-1]) == 0
    shown = capsys.readouterr().out
    assert "32 images" in shown
    assert "run: runs/digits" in shown
    assert "onefold evaluate runs/digits" in shown


def test_train_takes_data_steps_and_settings():
    images = {f"{c}/{k}.png": encode(noise(4, 6, 3, seed=50 * ord(c) + k)) for c in "abc" for k in range(16)}
    write_zip(Path("images.zip"), images)
    words = [
        "--data",
        "images.zip",
        "--steps",
        "3",
        "--objective.time.kind",
        "logit_normal",
        "--training.betas",
        "0.8",
        "0.9",
    ]
    assert call("train", "digits", *SMALL, *words, "--out", "run") == 0
    config = load_run("run").config
    assert (config.data.source, config.data.test) == (str(Path("images.zip").absolute()), None)
    assert (config.network.image_size, config.network.channels, config.network.classes) == ((4, 6), 3, 3)
    assert (config.training.images, config.training.betas) == (48, (0.8, 0.9))
    assert config.objective.time.kind == "logit_normal"
    assert checkpoints(Path("run"))[-1].name == "000000048"


def test_train_takes_test_data():
    np.savez("train.npz", images=noise(40, 4, 4, 1))
    np.savez("test.npz", images=noise(10, 4, 4, 1, seed=1))
    assert call("train", "digits", *SMALL, "--data", "train.npz", "--test-data", "test.npz", "--out", "run") == 0
    assert load_run("run").config.data.test == str(Path("test.npz").absolute())


def test_a_patch_for_other_images_can_be_chosen():
    """9×9 pixels are no multiple of the recipe's own patch, nor 8×8 ones of this one."""
    np.savez("images.npz", images=noise(40, 9, 9, 1))
    assert call("train", "digits", *SMALL, "--data", "images.npz", "--network.patch", "3", "--out", "run") == 0
    assert load_run("run").config.network.tokens == 9


def test_unreadable_images_can_be_skipped(capsys: pytest.CaptureFixture[str]):
    pictures = {f"{k}.png": encode(noise(4, 4, seed=k)) for k in range(40)}
    write_folder(Path("images"), pictures | {"7.png": b"hello"})
    assert call("train", "digits", *SMALL, "--data", "images", "--unreadable", "skip", "--out", "run") == 0
    assert load_run("run").config.data.unreadable == "skip"
    assert Path("run/skipped.txt").read_text(encoding="utf-8") == "7.png\n"
    assert call("train", "digits", *SMALL[:-1], "--data", "images", "--unreadable", "skip", "--out", "loud") == 0
    assert "left out 1 image that cannot be read (7.png); see loud/skipped.txt" in capsys.readouterr().out


def test_resume_goes_on(run: Path, trained: Run, capsys: pytest.CaptureFixture[str]):
    for path in checkpoints(run):
        shutil.rmtree(path)
    assert call("train", "--resume", "--out", run) == 0
    assert "finished" not in capsys.readouterr().out
    assert differing(newest(run), newest(trained.folder)) == []


def test_resume_of_a_finished_run_says_so(run: Path, trained: Run, capsys: pytest.CaptureFixture[str]):
    assert call("train", "--resume", "--out", run) == 0
    assert (
        "run: already finished, at 160 images; --images with a larger number makes it longer" in capsys.readouterr().out
    )
    assert differing(newest(run), newest(trained.folder)) == []
    assert call("train", "--resume", "--out", run, "--quiet") == 0
    assert capsys.readouterr().out == ""


# --- sample -----------------------------------------------------------------------------------------------------------


def test_a_grid_knows_its_seeds_labels_and_sampler(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("sample", run, "--n", "12", "--seed", "7", "--out", "grid.png") == 0
    assert "grid.png: 12 images, 2 steps" in capsys.readouterr().out
    labels = [(7 + k) % 10 for k in range(12)]
    assert text("grid.png") == {
        "network": "run",
        "seeds": "7…18",
        "labels": str(labels),
        "steps": "2",
        "guidance": "1.0",
        "solver": "euler",
    }
    assert pixels("grid.png").shape == (3 * 49 + 1, 4 * 49 + 1)


def test_a_picture_is_named_by_what_was_asked_for(run: Path, capsys: pytest.CaptureFixture[str]):
    """Other settings leave an earlier picture as it is, and what is replaced is said."""
    for options in ([], ["--steps", "1", "--guidance", "1.5", "--seed", "3"], ["--solver", "heun", "--shift", "2"]):
        assert call("sample", run, "-n", "2", *options) == 0
    named = {"run-samples.png", "run-samples-steps-1-guidance-1.5-seed-3.png", "run-samples-solver-heun-shift-2.png"}
    assert {path.name for path in Path().glob("*.png")} == named
    assert "replaces" not in capsys.readouterr().out
    assert call("sample", run, "-n", "2", "--labels", "3") == 0
    assert capsys.readouterr().out == "run-samples.png: 2 images, 2 steps; replaces what was there\n"
    for options, replaces in (("--steps 1", False), ("--steps 3", False), ("--steps 3 --labels 7 8", False)):
        assert call("sample", run, "-n", "2", "--separate", *options.split()) == 0
        assert ("replaces" in capsys.readouterr().out) == replaces
    assert call("sample", run, "-n", "2", "--separate", "--steps", "3") == 0
    assert capsys.readouterr().out == "run-samples-steps-3: 2 images, 3 steps; replaces what was there\n"


def test_a_run_in_the_folder_runs_is_named(run: Path, capsys: pytest.CaptureFixture[str]):
    Path("runs").mkdir()
    run.rename("runs/digits")
    assert call("evaluate", "digits") == 2
    assert capsys.readouterr().err == "onefold: digits: not a run (no config.json); give runs/digits\n"


def test_names_are_printed_as_they_are(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("sample", run, "--n", "2", "--out", "[red]:car:.png") == 0
    assert capsys.readouterr().out == "[red]:car:.png: 2 images, 2 steps\n"


def test_the_default_is_a_grid_of_64_in_the_present_folder(run: Path):
    assert call("sample", run) == 0
    assert text("run-samples.png")["seeds"] == "0…63"


@pytest.mark.parametrize(
    ("options", "labels"),
    [(["--labels", "3"], "[3, 3, 3]"), (["--labels", "3", "0", "10"], "[3, 0, 10]"), ([], "[0, 1, 2]")],
    ids=str,
)
def test_labels_of_one_or_all(run: Path, options: list[str], labels: str):
    assert call("sample", run, "--n", "3", *options) == 0
    assert text("run-samples.png")["labels"] == labels


def test_separate_images_are_named_by_seed_and_label(run: Path):
    assert call("sample", run, "--n", "3", "--seed", "9", "--separate", "--out", "folder") == 0
    found = sorted(path.name for path in Path("folder").iterdir())
    assert found == ["seed10-class0.png", "seed11-class1.png", "seed9-class9.png"]
    assert {text(f"folder/{name}")["seed"] for name in found} == {"9", "10", "11"}
    assert text("folder/seed10-class0.png")["label"] == "0"
    assert pixels("folder/seed10-class0.png").shape == (8, 8)


def test_an_image_depends_on_its_seed_and_label_alone(run: Path):
    """Whatever the batch and the number of images; but for rounding, 1 of 255 here and there."""
    for name, *options in (
        ("all", "--n", "9"),
        ("batches", "--n", "9", "--batch", "2"),
        ("single", "--n", "9", "--batch", "1"),
        ("fewer", "--n", "5"),
        ("later", "--n", "4", "--seed", "4"),
        ("guided", "--n", "9", "--guidance", "2", "--batch", "4"),
        ("guided-all", "--n", "9", "--guidance", "2"),
    ):
        assert call("sample", run, "--separate", "--out", name, *options) == 0
    for name in ("batches", "single", "fewer", "later"):
        for path in Path(name).iterdir():
            assert np.abs(pixels(path) - pixels(Path("all") / path.name)).max() <= 1
    for path in Path("guided").iterdir():
        assert np.abs(pixels(path) - pixels(Path("guided-all") / path.name)).max() <= 1
    assert np.abs(pixels("all/seed3-class3.png") - pixels("all/seed4-class4.png")).max() > 1
    assert np.abs(pixels("guided/seed3-class3.png") - pixels("all/seed3-class3.png")).max() > 1


def test_options_of_the_sampler_are_used(run: Path):
    grids = []
    for options in ([], ["--steps", "1"], ["--steps", "5"], ["--steps", "5", "--solver", "heun"], ["--shift", "3"]):
        assert call("sample", run, "--n", "16", *options, "--out", "grid.png") == 0
        grids.append(pixels("grid.png").tobytes())
    assert len(set(grids)) == len(grids)


def test_a_saved_network_is_sampled_with_its_own_sampler(run: Path):
    assert call("sample", run / "model", "--n", "2") == 0
    assert text("run-samples.png")["steps"] == "2"
    (run / "model" / "sampler.json").unlink()
    assert call("sample", run / "model", "--n", "2") == 0
    assert text("run-samples.png")["steps"] == "50"


def test_a_run_whose_model_lacks_a_sampler_is_sampled_with_the_run_s(run: Path):
    (run / "model" / "sampler.json").unlink()
    assert call("sample", run, "--n", "2") == 0
    assert text("run-samples.png")["steps"] == "2"
    assert load_run(run).network.sampler.steps == 2


def test_precision_is_written_into_pictures_and_records(run: Path):
    assert call("sample", run, "--n", "2") == 0
    plain = pixels("run-samples.png")
    assert call("sample", run, "--n", "2", "--precision", "bfloat16", "--device", "cpu") == 0
    assert text("run-samples.png")["precision"] == "bfloat16"
    assert not np.array_equal(pixels("run-samples.png"), plain)
    assert call("evaluate", run, "--precision", "bfloat16", "--images", "20", "--quiet") == 0
    (path,) = (run / "evaluation").glob("*.json")
    assert json.loads(path.read_text())["protocol"]["precision"] == "bfloat16"


def test_separate_images_are_those_of_the_grid_in_any_batches(run: Path):
    assert call("sample", run, "--n", "7", "--separate", "--batch", "2", "--out", "each") == 0
    network = Network.from_pretrained(run)
    expected = network.sample(7)[..., 0].astype(int)
    found = [pixels(f"each/seed{k}-class{k}.png").astype(int) for k in range(7)]
    assert np.abs(np.stack(found) - expected).max() <= 1


def test_unconditional_samples_have_no_labels():
    np.savez("images.npz", images=noise(40, 4, 4, 1))
    assert call("train", "digits", *SMALL, "--data", "images.npz", "--out", "run") == 0
    assert call("sample", "run", "--n", "2", "--separate", "--out", "folder") == 0
    assert sorted(path.name for path in Path("folder").iterdir()) == ["seed0.png", "seed1.png"]
    assert text("folder/seed0.png")["label"] == "none"


# --- evaluate, reconstruct, estimate, data, demo ----------------------------------------------------------------------


def test_evaluate_writes_a_record_and_prints_it(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("evaluate", run, "--images", "20", "--json") == 0
    (written,) = (run / "evaluation").glob("*.json")
    assert json.loads(capsys.readouterr().out) == metrics.Record.read(written)
    assert call("evaluate", run, "--images", "20", "--quiet") == 0
    shown = capsys.readouterr().out
    for word in ("Fréchet distance", "KID", "class accuracy", "precision", "recall", "PSNR", "effective rank"):
        assert word in shown


def test_records_of_other_settings_lie_beside_each_other(run: Path):
    changes = [[], ["--steps", "1"], ["--guidance", "2"], ["--solver", "heun"], ["--seed", "1"], ["--shift", "2"]]
    for options in changes:
        assert call("evaluate", run, "--images", "8", "--quiet", *options) == 0
    assert len(list((run / "evaluation").iterdir())) == len(changes)


def test_evaluate_against_stored_statistics(run: Path):
    assert call("data", "stats", "digits", "--out", "stats.safetensors") == 0
    assert call("evaluate", run, "--images", "20", "--quiet", "--reference", "stats.safetensors") == 0
    (written,) = (run / "evaluation").glob("*.json")
    assert metrics.Record.read(written)["frechet_to_reference"] > 0


def test_a_record_that_cannot_be_written_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "evaluation").write_text("a file where the folder belongs")
    assert call("evaluate", run, "--images", "8", "--quiet") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "evaluation" in captured.err


def test_reconstruct_says_how_well(run: Path, capsys: pytest.CaptureFixture[str]):
    assert call("reconstruct", run, "digits:test") == 0
    assert re.search(r"reconstructions\.png: 30 images, PSNR \d+\.\d\d dB", capsys.readouterr().out)
    assert text("run-reconstructions.png")["network"] == "run"
    assert call("reconstruct", run, "digits:test") == 0
    assert capsys.readouterr().out.endswith(" dB; replaces what was there\n")


def test_estimate_counts_and_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert call("estimate", "imagenet256-b", "--seconds", "0") == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "expected time" not in shown
    monkeypatch.setattr(estimate, "recipe", lambda name, **overrides: tiny().with_changes(overrides))
    assert call("estimate", "digits", "--seconds", "0.05", "--training.micro-batch", "4") == 0
    shown = capsys.readouterr().out
    assert "4 in a pass" in shown
    assert "expected time" in shown


def test_estimate_of_the_baseline(capsys: pytest.CaptureFixture[str]):
    for architecture, shared in (("one-network", ", 97.9 %"), ("three-networks", " ")):
        assert call("estimate", "digits", "--seconds", "0", "--architecture", architecture) == 0
        assert f"0.99M{shared}" in capsys.readouterr().out


def test_estimate_of_pixels_has_no_latent(capsys: pytest.CaptureFixture[str]):
    for architecture, shown in (("one-network", True), ("pixels", False)):
        assert call("estimate", "digits", "--seconds", "0", "--architecture", architecture) == 0
        assert ("values per value of the image" in capsys.readouterr().out) == shown


def test_estimate_of_other_images_and_networks(capsys: pytest.CaptureFixture[str]):
    write_folder(Path("photos"), {f"{k}.png": encode(noise(6, 8, 3, seed=k)) for k in range(4)})
    assert call("estimate", "digits", "--seconds", "0", "--data", "photos", "--network.latent-channels", "7") == 0
    assert "6×8×3 as 12 tokens × 7" in capsys.readouterr().out


def test_data_commands(capsys: pytest.CaptureFixture[str]):
    write_folder(Path("photos"), {f"{k}.png": encode(noise(8 + k, 9, 3, seed=k)) for k in range(6)})
    assert call("data", "inspect", "photos", "--sheet", "sheet.png") == 0
    capsys.readouterr()
    assert call("data", "convert", "photos", "photos.zip", "--size", "4", "--height", "6", "--quiet") == 0
    assert call("data", "inspect", "photos.zip", "--all", "--sheet", "sheet.png") == 0
    shown = capsys.readouterr().out
    assert "photos.zip" in shown
    assert onefold.data.open_dataset("photos.zip").image_shape == (6, 4, 3)
    assert Path("sheet.png").exists()


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def filled(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr(estimate.costs, "estimate", filled)
    assert call("estimate", "digits") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Tried to allocate 2.00 GiB" in said
    assert "--training.micro-batch" in said


def test_demo_trains_once_and_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "recipe", lambda name, **overrides: tiny().with_changes(overrides))
    monkeypatch.setattr(demo, "evaluate", functools.partial(demo.evaluate, images=20))
    assert call("demo", "--out", "shown", "--seed", "3", "--quiet") == 0
    shown = capsys.readouterr().out
    for name in ("shown/samples.png", "shown/one-step.png"):
        assert name in shown
        assert Path(name).exists()
    records = {name: Record.read(Path("shown/evaluation") / f"{name}.json") for name in ("demo", "demo-many")}
    assert {name: record["protocol"]["steps"] for name, record in records.items()} == {"demo": 1, "demo-many": 2}
    assert load_run("shown").config.training.seed == 3
    before = newest(Path("shown"))
    assert call("demo", "--out", "shown", "--seed", "3", "--quiet") == 0
    assert differing(before, newest(Path("shown"))) == []
    assert "shown: was trained before" in capsys.readouterr().out
    assert call("demo", "--out", "shown", "--seed", "4", "--quiet") == 2
    assert "shown: holds another run than this demo's" in capsys.readouterr().err


def test_an_interrupted_demo_says_how_it_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """After a signal amid the training, the same command ends where it would have ended without."""
    monkeypatch.setattr(demo, "recipe", lambda name, **overrides: tiny().with_changes(overrides))
    monkeypatch.setattr(demo, "evaluate", functools.partial(demo.evaluate, images=20))

    def signalled(state: TrainingState, *rest: Any) -> dict[str, torch.Tensor]:
        if state.counters.images == 48:
            signal.raise_signal(signal.SIGTERM)
        return training_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", signalled)
        assert call("demo", "--out", "shown", "--quiet") == 143
    assert capsys.readouterr().err == "onefold: shown: stopped and saved; the same command goes on\n"
    assert call("demo", "--out", "shown", "--quiet") == 0
    assert "shown: goes on from" in capsys.readouterr().out


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onefold.training.run.open_data", stop)
    assert call("train", "--resume", "--out", run) == 130
    assert capsys.readouterr().err == "onefold: interrupted\n"
