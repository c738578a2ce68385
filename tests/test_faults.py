"""Faults that really happen to long jobs, done to real processes: no finished checkpoint is lost, and the run goes on.

A full disk, truncated and foreign checkpoints are in test_checkpoints.py, signals in test_interruption.py. `make
nightly` kills many more times. The table is in docs/reliability.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import NIGHTLY
from helpers_runs import differing, newest, tiny
from onefold.cli import run as command
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import Run

TESTS = Path(__file__).parent
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
KILLS = 50 if NIGHTLY else 8


def crash(mode: str, folder: Path, kills: int = 0) -> dict[str, Any]:
    program = [sys.executable, str(TESTS / "helpers_crash.py"), mode, str(folder), str(kills)]
    done = subprocess.run(program, capture_output=True, text=True, env=ALONE, timeout=2400 if NIGHTLY else 240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kills_at_random_moments_change_nothing(tmp_path: Path):
    found = crash("random", tmp_path, KILLS)
    assert found["kills"] >= KILLS
    assert (found["lost"], found["failures"]) == (0, [])


def test_a_kill_before_any_file_operation_changes_nothing(tmp_path: Path):
    found = crash("touches", tmp_path)
    assert found["touches"] > 30
    assert found["failures"] == []


def test_a_second_job_is_refused_and_the_first_goes_on(tmp_path: Path):
    assert crash("two", tmp_path) == {"refused": 3, "others": [], "code": 0, "same": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(training__keep_last=3), tmp_path_factory.mktemp("run") / "run", quiet=True)


FILES = ["network.safetensors", "average-1.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("where", ["head", "middle", "end"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_run_goes_on_from_the_checkpoint_before(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, where: str
):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before, last, end = checkpoints(folder)[-3:]
    shutil.rmtree(end)  # as if it had been killed before
    data = bytearray((last / name).read_bytes())
    data[{"head": 20, "middle": len(data) // 2, "end": len(data) - 2}[where]] ^= 1
    (last / name).write_bytes(data)
    assert command(["train", "--resume", "--quiet", "--out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{last}: {name} is damaged: its checksum does not match; delete the checkpoint to continue" in said
    assert before.is_dir()
    shutil.rmtree(last)
    train(None, folder, resume=True, quiet=True)
    assert differing(newest(folder), newest(finished.folder)) == []


ON_A_DISK_THAT_TURNS_READ_ONLY = """
onefold() { "$PYTHON" -c 'from onefold.cli import main; main()' "$@"; }
disk=$1
shift
mount -t tmpfs -o size=64m tmpfs "$disk" || exit 9
onefold train digits --quiet --out "$disk/run" "$@"
rm -r "$disk/run/checkpoints/000000096"
mount -o remount,ro "$disk"
onefold train --resume --quiet --out "$disk/run"
echo "code $?" "$(ls "$disk/run/checkpoints")"
onefold train digits --quiet --out "$disk/other" "$@"
echo "code $?"
mount -o remount,rw "$disk"
onefold train --resume --quiet --out "$disk/run"
echo "code $?" "$(ls "$disk/run/checkpoints")"
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_read_only_disk(tmp_path: Path):
    """It turns read-only between two checkpoints, and back. (A mount that only this process sees.)"""
    options = "--network.width 32 --network.depth 1 --network.heads 2 --training.images 96 --training.batch 16"
    options += " --training.checkpoint-every 48 --training.precision float32 --sampler.steps 2"
    program = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", ON_A_DISK_THAT_TURNS_READ_ONLY, "bash"]
    environment = ALONE | {"PYTHON": sys.executable}
    done = subprocess.run([*program, str(tmp_path), *options.split()], capture_output=True, text=True, env=environment)
    if done.returncode in (1, 9) and "code" not in done.stdout:
        pytest.skip(f"no private mounts here: {done.stderr}")
    resumed, begun, again = (part.split() for part in done.stdout.split("code ")[1:])
    assert resumed == ["2", "000000048"]
    assert begun == ["2"]
    assert again == ["0", "000000048", "000000096"]
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("Read-only file system" in line for line in lines), done.stderr
