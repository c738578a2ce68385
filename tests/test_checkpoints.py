import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers_runs import batch, differing, fresh, newest, tensors, tiny
from onefold.cli import run as command
from onefold.errors import UserError
from onefold.files import write_tensors
from onefold.networks.one_network import OneFold
from onefold.training import pieces
from onefold.training.checkpoint import checkpoints, restore, save
from onefold.training.config import Config
from onefold.training.conversion import one_step_config
from onefold.training.loop import train
from onefold.training.phases import phases_of
from onefold.training.run import Run
from onefold.training.state import Counters, Skips, TrainingState
from onefold.training.step import training_step

CPU = torch.device("cpu")
FILES = ["network.safetensors", "average-0.safetensors", "average-1.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("run"), quiet=True)


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy to be damaged, with checkpoints at 144 and 160 images."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return Run(tmp_path / "run", finished.config)


def stepped(config: Config, steps: int) -> TrainingState:
    state = fresh(config)
    for k in range(steps):
        training_step(state, *batch(start=16 * k), config)
    return state


def loaded_from(config: Config, path: Path) -> TrainingState:
    """A state of its own with what a checkpoint holds."""
    state = fresh(config)
    restore(state, config, path)
    return state


def signed(path: Path) -> None:
    """Write `COMPLETE` anew, as if what is there now had been saved."""
    (path / "COMPLETE").unlink(missing_ok=True)
    (path / "checksums.json").unlink(missing_ok=True)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    (path / "COMPLETE").write_text(json.dumps(sizes))


def leftovers(folder: Path) -> list[str]:
    """Whatever lies in a run folder that a finished save does not leave there."""
    found = [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".tmp", ".part")]
    known = {"config.json", "log.jsonl", "samples", "checkpoints", "model"}
    found += [path for path in folder.iterdir() if path.name not in known]
    return [str(path.relative_to(folder)) for path in found]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("steps", [0, 3])
def test_there_and_back_to_the_bit(tmp_path: Path, optimizer: str, steps: int):
    config = tiny(training__optimizer=optimizer)
    state = stepped(config, steps)
    state.counters.rollbacks, state.skips = 1, Skips(CPU, 5, 2)
    path = save(state, config, tmp_path)
    assert path == tmp_path / "checkpoints" / f"{16 * steps:09d}"
    loaded = loaded_from(config, path)
    expected = Counters(images=16 * steps, skipped=5, skipped_in_row=2, rollbacks=1)
    assert loaded.counters == state.counters == expected
    assert loaded.read_skips() == 2
    assert loaded.counters == expected
    assert differing(tensors(state), tensors(loaded)) == []
    for each in (state, loaded):  # and they go on alike
        training_step(each, *batch(), config)
    assert differing(tensors(state), tensors(loaded)) == []
    assert [p.requires_grad for p in loaded.averages[0].parameters()].count(True) == 0
    assert all(p.requires_grad for p in loaded.network.parameters())


def test_settings_that_came_later_have_their_defaults(tmp_path: Path):
    """A checkpoint of a version that did not know of networks from elsewhere."""
    config = tiny()
    state = stepped(config, 1)
    path = save(state, config, tmp_path)
    described = json.loads((path / "state.json").read_text())
    assert described["network"].pop("foreign") == ""
    (path / "state.json").write_text(json.dumps(described))
    signed(path)
    assert differing(tensors(state), tensors(loaded_from(config, path))) == []
    described["network"]["depth"] = 2
    (path / "state.json").write_text(json.dumps(described))
    signed(path)
    with pytest.raises(UserError, match="belongs to another network than this run's"):
        loaded_from(config, path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_is_restored_in_place(tmp_path: Path, optimizer: str):
    config = tiny(training__optimizer=optimizer)
    state = stepped(config, 2)
    path = save(state, config, tmp_path)
    before = tensors(state)
    objects = [*state.modules.values(), *state.optimizers["network"], *state.network.parameters()]
    places = [p.data_ptr() for module in state.modules.values() for p in module.parameters()]
    training_step(state, *batch(), config)
    assert differing(tensors(state), before)
    restore(state, config, path)
    assert differing(tensors(state), before) == []
    assert state.counters.images == 32
    now = [*state.modules.values(), *state.optimizers["network"], *state.network.parameters()]
    assert all(a is b for a, b in zip(objects, now, strict=True))
    assert places == [p.data_ptr() for module in state.modules.values() for p in module.parameters()]


def test_a_state_is_restored_across_phases(tmp_path: Path):
    """From the second phase back to the first, and from the first on to the second."""
    config = tiny(phases=("self_distillation", "one_step"), onestep__critic_warmup=32)
    first, second = stepped(config, 2), stepped(config, 1)
    second.counters.images = 160
    second.enter(phases_of(config)[1])
    training_step(second, *batch(), config)
    paths = [save(state, config, tmp_path) for state in (first, second)]
    kept = [tensors(first), tensors(second)]
    restore(first, config, paths[1])
    restore(second, config, paths[0])
    assert differing(tensors(first), kept[1]) == differing(tensors(second), kept[0]) == []
    assert (first.counters, second.counters) == (Counters(images=176, phase=1), Counters(images=32))


KINDS: dict[str, Config] = {
    "one network": tiny(training__ema_half_lives=(8, 16, 32)),
    "three networks": tiny(network__architecture="three_networks", network__depth=3),
    "one step": one_step_config(tiny()),
    "one step, unchosen": one_step_config(tiny()).with_changes({"onestep.selects": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_a_file_for_each_module(kind: str, tmp_path: Path):
    config = KINDS[kind]
    state = fresh(config)
    path = save(state, config, tmp_path)
    modules = {"network", *(f"average-{k}" for k in range(len(config.training.ema_half_lives)))}
    if "one_step" in config.phases:
        modules |= {"teacher", "critic"} | ({"best"} if config.onestep.selects else set())
    assert state.modules.keys() == modules
    expected = {f"{name}.safetensors" for name in modules}
    assert {file.name for file in path.iterdir()} == expected | {
        "optimizer.safetensors",
        "state.json",
        "checksums.json",
        "COMPLETE",
    }
    for name, module in state.modules.items():
        assert differing(load_file(path / f"{name}.safetensors"), dict(module.state_dict())) == []


def test_moments_stand_under_the_names_of_their_modules(finished: Run):
    moments = load_file(checkpoints(finished.folder)[-1] / "optimizer.safetensors")
    kinds = {(module, optimizer) for module, optimizer, _, _ in (name.split("/") for name in moments)}
    assert kinds == {("network", "0"), ("network", "1")}
    assert {name.split("/")[3] for name in moments} == {"step", "exp_avg", "exp_avg_sq", "momentum"}


def test_a_checkpoint_holds_these_files(finished: Run):
    path = checkpoints(finished.folder)[-1]
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "checksums.json", "COMPLETE"])
    sizes = json.loads((path / "COMPLETE").read_text())
    assert sizes == {name: (path / name).stat().st_size for name in [*FILES, "checksums.json"]}
    described = json.loads((path / "state.json").read_text())
    assert described["counters"] == asdict(Counters(images=160))


def test_complete_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whenever a file is written, none of the folder's checkpoints that holds `COMPLETE` lacks anything."""
    config, written = tiny(), []

    def write_and_look(values: dict[str, torch.Tensor], path: Path) -> None:
        write_tensors(values, path)
        written.append(path.name)
        assert not (path.parent / "COMPLETE").exists()

    monkeypatch.setattr(pieces, "write_tensors", write_and_look)
    save(stepped(config, 1), config, tmp_path)
    assert set(written) == {name for name in FILES if name != "state.json"}


def test_no_pickle_is_written_or_read(run: Run, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("pickle")

    for owner, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    shutil.rmtree(run.folder / "checkpoints" / "000000160")
    train(None, run.folder, resume=True, quiet=True)
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".safetensors", ".png") or path.name == "COMPLETE"
            assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path} is a pickle or torch's zip"


# --- half-written -----------------------------------------------------------------------------------------------------


def unsigned(path: Path) -> None:
    (path / "COMPLETE").unlink()


def empty_complete(path: Path) -> None:
    (path / "COMPLETE").write_text("")


def cut_complete(path: Path) -> None:
    (path / "COMPLETE").write_text((path / "COMPLETE").read_text()[:-9])


def complete_of_another_kind(path: Path) -> None:
    (path / "COMPLETE").write_text('["network.safetensors"]')


def cut_file(path: Path) -> None:
    os.truncate(path / "average-1.safetensors", 1000)


def longer_file(path: Path) -> None:
    with (path / "optimizer.safetensors").open("ab") as file:
        file.write(b"more")


def missing_file(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


HALVES = [unsigned, empty_complete, cut_complete, complete_of_another_kind, cut_file, longer_file, missing_file]


@pytest.mark.parametrize("damage", HALVES)
def test_a_half_written_checkpoint_is_passed_over(run: Run, finished: Run, damage: Callable[[Path], None]):
    damage(run.folder / "checkpoints" / "000000160")
    assert [path.name for path in checkpoints(run.folder)] == ["000000144"]
    train(None, run.folder, resume=True, quiet=True)
    assert [path.name for path in checkpoints(run.folder)] == ["000000144", "000000160"]
    assert differing(newest(run.folder), newest(finished.folder)) == []


def test_without_a_complete_checkpoint_it_starts_again(run: Run, finished: Run):
    for path in checkpoints(run.folder):
        missing_file(path)
    train(None, run.folder, resume=True, quiet=True)
    assert differing(newest(run.folder), newest(finished.folder)) == []
    assert len(run.history) == 5


def test_an_incomplete_checkpoint_cannot_be_loaded_by_name(run: Run):
    path = run.folder / "checkpoints" / "000000160"
    missing_file(path)
    with pytest.raises(UserError, match="incomplete"):
        loaded_from(run.config, path)


def test_folders_with_other_names_are_passed_over(run: Run):
    checkpoints_folder = run.folder / "checkpoints"
    for name in ("000000160-copy", "best", "9.old", ".writing-000000999"):
        shutil.copytree(checkpoints_folder / "000000160", checkpoints_folder / name)
    assert [path.name for path in checkpoints(run.folder)] == ["000000144", "000000160"]


def test_checkpoints_are_in_order_of_their_numbers(tmp_path: Path):
    for images in (9, 1_000_000_000, 999_999_999):
        path = tmp_path / "checkpoints" / f"{images:09d}"
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
        signed(path)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [9, 999_999_999, 1_000_000_000]


# --- foreign ----------------------------------------------------------------------------------------------------------


def other_format(path: Path) -> None:
    described = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(described | {"format": "another program's checkpoint 7"}))


def other_network(path: Path) -> None:
    described = json.loads((path / "state.json").read_text())
    described["network"]["depth"] = 2
    (path / "state.json").write_text(json.dumps(described))


def no_counters(path: Path) -> None:
    described = json.loads((path / "state.json").read_text())
    del described["counters"]
    (path / "state.json").write_text(json.dumps(described))


def unknown_counter(path: Path) -> None:
    described = json.loads((path / "state.json").read_text())
    described["counters"]["epochs"] = 3
    (path / "state.json").write_text(json.dumps(described))


def garbage_json(path: Path) -> None:
    (path / "state.json").write_bytes(b"\x80\x04\xff{")


def json_of_another_kind(path: Path) -> None:
    (path / "state.json").write_text("[1, 2]")


def foreign_network(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path / "network.safetensors")


def network_of_another_shape(path: Path) -> None:
    values = load_file(path / "network.safetensors")
    save_file(values | {"roles.weight": torch.zeros(3, 7)}, path / "network.safetensors")


def foreign_average(path: Path) -> None:
    save_file({}, path / "average-1.safetensors")


def no_safetensors(path: Path) -> None:
    (path / "network.safetensors").write_bytes(b"PK\x03\x04 a torch file")


def foreign_optimizer(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path / "optimizer.safetensors")


def empty_optimizer(path: Path) -> None:
    save_file({}, path / "optimizer.safetensors")


def optimizer_of_another_shape(path: Path) -> None:
    values = load_file(path / "optimizer.safetensors")
    name = next(name for name in values if name.endswith("exp_avg"))
    save_file(values | {name: torch.zeros(1)}, path / "optimizer.safetensors")


def optimizer_with_a_hole(path: Path) -> None:
    values = load_file(path / "optimizer.safetensors")
    gone = next(name for name in values if name.endswith("exp_avg"))
    save_file({name: value for name, value in values.items() if name != gone}, path / "optimizer.safetensors")


FOREIGN = [other_format, other_network, no_counters, unknown_counter, garbage_json, json_of_another_kind]
FOREIGN += [foreign_network, network_of_another_shape, foreign_average, no_safetensors]
FOREIGN += [foreign_optimizer, empty_optimizer, optimizer_of_another_shape, optimizer_with_a_hole]


@pytest.mark.parametrize("change", FOREIGN)
def test_a_foreign_checkpoint_is_refused(run: Run, change: Callable[[Path], None]):
    path = run.folder / "checkpoints" / "000000160"
    change(path)
    signed(path)
    with pytest.raises(UserError) as caught:
        loaded_from(run.config, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        train(None, run.folder, resume=True, quiet=True)


def test_the_state_of_another_optimizer_is_refused(run: Run):
    """A config.json that was edited by hand after the start."""
    path = run.folder / "checkpoints" / "000000160"
    other = run.config.with_changes({"training.optimizer": "adamw"})
    with pytest.raises(UserError) as caught:
        loaded_from(other, path)
    assert "\n" not in str(caught.value)


# --- which are kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [160]),
        (2, 0, [144, 160]),
        (99, 0, [32, 64, 80, 96, 112, 128, 144, 160]),
        (1, 64, [64, 128, 160]),
        (2, 80, [80, 144, 160]),
    ],
)
def test_old_checkpoints_are_deleted(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]):
    config = tiny(training__keep_last=keep_last, training__keep_every=keep_every)
    state = stepped(config, 1)
    for images in (32, 64, 80, 96, 112, 128, 144, 160):
        state.counters.images = images
        save(state, config, tmp_path)
    assert [int(path.name) for path in checkpoints(tmp_path)] == kept
    assert leftovers(tmp_path) == []


def test_what_a_killed_save_left_is_deleted_by_the_next(tmp_path: Path):
    config = tiny()
    state = stepped(config, 1)
    half = tmp_path / "checkpoints" / ".writing-000000008"
    half.mkdir(parents=True)
    (half / "network.safetensors").write_bytes(b"half")
    save(state, config, tmp_path)
    assert leftovers(tmp_path) == []


# --- a full disk ------------------------------------------------------------------------------------------------------


def is_a_help(error: UserError, folder: Path) -> None:
    assert "\n" not in str(error)
    assert "no space left" in str(error)
    assert str(folder) in str(error)


@pytest.mark.parametrize("which", range(5), ids=[*FILES[:4], "model"])
def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int):
    config = tiny()
    state = stepped(config, 1)
    first = save(state, config, tmp_path)
    before, model = tensors(state), OneFold.from_pretrained(tmp_path).state_dict()
    training_step(state, *batch(), config)
    calls = 0

    def full(values: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > which:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_tensors(values, path)

    with monkeypatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.startswith("onefold")]:
            if getattr(module, "write_tensors", None) is write_tensors:
                patch.setattr(module, "write_tensors", full)
        with pytest.raises(UserError) as caught:
            save(state, config, tmp_path)
    is_a_help(caught.value, tmp_path)
    assert first in checkpoints(tmp_path)
    assert differing(tensors(loaded_from(config, first)), before) == []
    assert differing(OneFold.from_pretrained(tmp_path).state_dict(), model) == []
    assert leftovers(tmp_path) == []

    second = save(state, config, tmp_path)  # there is room again
    assert checkpoints(tmp_path) == [first, second]
    assert differing(tensors(loaded_from(config, second)), tensors(state)) == []


@pytest.mark.parametrize("place", ["onefold.training.log.RunLog.write", "onefold.pictures.grids.save_png"])
def test_a_full_disk_is_one_line_wherever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
):
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train(tiny(training__images=48), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000048")
    monkeypatch.setattr(place, full)
    assert command(["train", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "run") in captured.err


ON_A_SMALL_DISK = """
onefold() { "$PYTHON" -c 'from onefold.cli import main; main()' "$@"; }
disk=$1
shift
mount -t tmpfs -o size=600k tmpfs "$disk" || exit 9
onefold train digits --quiet --out "$disk/run" "$@"
echo "code $?" "$(find "$disk" -name '.*')" "$(ls "$disk/run/checkpoints")"
mount -o remount,size=64m "$disk"
onefold train --resume --quiet --out "$disk/run"
echo "code $?" "$(ls "$disk/run/checkpoints")"
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_really_full_disk(tmp_path: Path):
    """A disk with room for one checkpoint and a half, which then grows. (A mount that only this process sees.)"""
    options = "--network.width 32 --network.depth 1 --network.heads 2 --training.images 96 --training.batch 16"
    options += " --training.checkpoint-every 48 --training.precision float32 --sampler.steps 2"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", ON_A_SMALL_DISK, "bash", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*inside, *options.split()], capture_output=True, text=True, env=environment)
    if done.returncode in (1, 9) and "code" not in done.stdout:
        pytest.skip(f"no private mounts here: {done.stderr}")
    first, second = done.stdout.split("code ")[1:]
    assert first.split() == ["2", "000000048"], "the earlier checkpoint and no temporary file"
    assert second.split() == ["0", "000000048", "000000096"]
    assert done.stderr.count("\n") == 1
    assert "000000096: the checkpoint could not be written (no space left on the disk)" in done.stderr
