"""Several ranks: they take the steps of one process, and what befalls one of them ends all, with the cause said once.

Each test is a program of `helpers_ranks.py`, whose ranks are real processes that speak through gloo; the last is
torchrun itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from onefold.compute import resolve_device
from onefold.data import Loader, open_dataset
from onefold.errors import UserError
from onefold.training.checkpoint import checkpoints
from onefold.training.engine import Ranks, joined, ranks
from onefold.training.run import load_run

pytestmark = pytest.mark.timeout(600)  # ranks wait for each other: on a busy machine each exchange takes a while
TESTS = Path(__file__).parent
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def program(mode: str, folder: Path) -> Any:
    words = [sys.executable, str(TESTS / "helpers_ranks.py"), mode, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=ALONE, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the same steps ---------------------------------------------------------------------------------------------------


def test_ranks_take_the_steps_of_one_process(tmp_path: Path):
    """In 20 steps of every phase weights, moments, averages and log stay the same, up to rounding in float32."""
    found = program("agree", tmp_path)
    ranks = {"ranks", "sharded"}
    both = ranks | {"accumulated"}
    wanted = {"plain": both, "ratio": both} | dict.fromkeys(("adamw", "stages", "joint", "score", "low rank"), ranks)
    assert {name: set(differences) for name, differences in found.items()} == wanted
    for name, differences in found.items():
        assert all(difference < 1e-5 for difference in differences.values()), (name, differences)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return program("elastic", tmp_path_factory.mktemp("elastic"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(elastic: dict[str, Any], engine: str):
    """Two, stopped by a signal to the second; one, stopped; two: the same weights and log as of one in one go."""
    assert elastic["one"]["codes"] == [0]
    found = elastic[engine]
    assert [stop["codes"] for stop in found["stops"]] == [[143, 143], [143], [0, 0]]
    assert found["places"] == ["000000064", "000000112", "000000160"]
    one, two = ["optimizer.safetensors"], ["optimizer-1-of-2.safetensors", "optimizer-2-of-2.safetensors"]
    assert found["files"] == ([one, one, one] if engine == "ddp" else [two, one, two])
    assert found["farthest"] < 1e-5
    whole, run = found["pictures"]
    assert whole == run
    for stop in found["stops"] if engine == "ddp" else ():
        assert len(set(stop["weights"])) == 1, "the ranks have other weights"
    first = found["stops"][0]
    assert "".join(first["err"]).count("\n") == 1
    assert "stopped at 64 of 160 images, saved; go on with --resume" in "".join(first["err"])


def test_samples_and_records_do_not_depend_on_the_number_of_ranks(tmp_path: Path):
    found = program("evaluation", tmp_path)
    alone, both = found["pictures"]
    assert len(alone) == 8
    assert alone == both
    for name in ("grid", "separate", "record"):
        assert found[f"{name} by 1"]["codes"] == [0]
        assert found[f"{name} by 2"]["codes"] == [0, 0]
        assert found[f"{name} by 2"]["out"][1] == "", "the first alone prints"
    records = [json.loads(found[f"record by {count}"]["out"][0]) for count in (1, 2)]
    speeds = [record.pop("images_per_second") for record in records]
    assert min(speeds) > 0
    assert records[0] == records[1]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return program("faults", tmp_path_factory.mktemp("faults"))


def test_nan_in_one_rank_skips_the_step_in_all(faults: dict[str, Any]):
    found = faults["skips"]
    assert found["codes"] == [0, 0]
    assert found["skipped"] == [0, 0, *[1] * 8]
    assert found["weights"][0] == found["weights"][1]


def test_nan_that_stays_in_one_rank_rolls_all_back(faults: dict[str, Any]):
    found = faults["rolls back"]
    assert found["codes"] == [0, 0]
    assert "".join(found["err"]).count("back to 48 images") == 1
    assert found["images"] == list(range(16, 336, 16))
    assert found["skipped"][-1] == 10
    assert found["weights"][0] == found["weights"][1]


@pytest.mark.parametrize("how", ["killed", "killed, sharded", "hangs"])
def test_a_rank_that_dies_or_hangs_is_named(faults: dict[str, Any], how: str):
    found = faults[how]
    assert found["codes"] == [3, -signal.SIGKILL]
    assert found["err"][0].startswith("onefold: rank 1 (process ")
    assert found["err"][0].endswith("died or not answered in time; go on with --resume\n")
    assert found["err"][0].count("\n") == 1
    assert found["saved"] == ["000000048"]


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("refuses", 2, "photo.png: cannot be read; give another"),
        ("all refuse", 2, "network.image_size: 8×8 is not divisible by patch 3"),
        (
            "odd",
            2,
            "training.batch: 16 images cannot be divided among 3 ranks; give 15 or 18, or launch one of 1, 2, 4",
        ),
        (
            "few",
            2,
            "onerun.share: 3 of 16 images cannot be divided among 2 ranks, as --engine fsdp needs; give 0.125 or",
        ),
        ("alarm", 3, "the latents collapse at 32 images, saved: so it says"),
        ("apart", 2, "is not one folder for all ranks (rank 0 finds it at 48 images, another at 160); choose one that"),
        ("alone", 2, "estimate: is the work of one process; leave the launcher (torchrun) out"),
    ],
)
def test_what_ends_the_ranks_is_said_once(faults: dict[str, Any], name: str, code: int, line: str):
    found, said = faults[name], "".join(faults[name]["err"])
    assert set(found["codes"]) == {code}
    assert line in said
    assert said.count("\n") == 1, said
    assert found["out"] == [""] * len(found["codes"])


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(7, 3), (16, 4), (2, 5), (0, 2)])
def test_spans_are_the_whole_in_order(total: int, count: int):
    spans = [Ranks(rank, count).span(total) for rank in range(count)]
    assert [k for start, stop in spans for k in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1


def test_the_loader_gives_its_part_of_each_batch():
    data = open_dataset("digits")
    for in_memory in (True, False):
        whole, part = (
            Loader(data, batch=10, seed=3, start=1430, in_memory=in_memory, part=part) for part in (None, (4, 7))
        )
        for _ in range(3):
            (x, y), (own_x, own_y) = next(whole), next(part)
            assert torch.equal(x[4:7], own_x)
            assert torch.equal(y[4:7], own_y)
        assert part.seen == whole.seen == 1460
        whole.close()
        part.close()


def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch):
    """Seen by the refusal of one that no machine has."""
    monkeypatch.setenv("LOCAL_RANK", "99")
    for name in ("cuda", "cuda:98"):
        with pytest.raises(UserError, match=f"'cuda:{99 if name == 'cuda' else 98}' cannot be used here"):
            resolve_device(name)
    assert resolve_device("cpu").type == "cpu"


def test_a_rank_that_no_other_meets_says_where_it_waited(monkeypatch: pytest.MonkeyPatch):
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ONEFOLD_TIMEOUT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(UserError, match=f"rank 0: the 2 ranks have not met at 127.0.0.1:{place['MASTER_PORT']}"),
        joined(),
    ):
        pass
    assert ranks().count == 1


# --- the launcher -----------------------------------------------------------------------------------------------------


def test_torchrun(tmp_path: Path):
    """Started by torchrun, and stopped by a signal to it."""
    run = tmp_path / "run"
    words = (
        "train digits --network.width 32 --network.depth 1 --network.heads 2 --training.batch 8 --training.images 3992"
    )
    words += " --training.log-every 8 --training.precision float32 --training.device cpu"
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "onefold",
    ]
    process = subprocess.Popen(
        [sys.executable, *launch, *words.split(), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ALONE,
    )
    while not ((run / "log.jsonl").exists() and load_run(run).history):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("digits: 1,437 images to train on") == 1, out
    assert "2 ranks, 4 images of a batch each" in err
    assert err.count("saved; go on with --resume") == 1, err
    reached = int(checkpoints(run)[-1].name)
    assert 0 < reached < 3992
