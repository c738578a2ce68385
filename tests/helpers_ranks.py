"""A program for test_ranks.py: works in several ranks, which are forks of itself, and prints what became of it.

Forks, because they start in no time; a process of its own, because only one without threads may fork.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # before there are forks: it takes a while

from helpers_crash import ended, fork
from helpers_runs import log, newest, tensors, tiny
from onefold import cli
from onefold.errors import UserError
from onefold.files import sha256_of
from onefold.training import engine, loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.conversion import converted
from onefold.training.engine import Engine, ranks
from onefold.training.health import HealthMonitor
from onefold.training.loop import train
from onefold.training.run import Run
from onefold.training.sharding import local
from onefold.training.state import TrainingState

LAST: list[TrainingState] = []
"""The state of this rank's last step."""
Work = Callable[[], Any]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launcher(port: int) -> int:
    """A process that keeps the store through which ranks find each other, as torchrun's does; returns its id."""

    def work() -> None:
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        time.sleep(600)
        del store

    return fork(work)


def ended_soon(pid: int, seconds: float = 10) -> int:
    """Wait for a child, and kill it if it does not end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def together(count: int, folder: Path, work: Work, before: Callable[[int], None] = lambda rank: None) -> dict[str, Any]:
    """`work` by ranks, which `before` prepares; the exit code and words of each, and a hash of its weights and moments.

    As by a launcher, those that do not end soon after the first are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, begun, honest = free_port(), time.monotonic(), loop.training_step

    def one(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place["TORCHELASTIC_USE_AGENT_STORE"] = True
        os.environ.update({name: str(value) for name, value in place.items()})
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)

        def step(state: TrainingState, *rest: Any) -> dict[str, torch.Tensor]:
            LAST[:] = [state]
            return honest(state, *rest)

        loop.training_step = step
        before(rank)
        code = work() or 0
        found = tensors(LAST[0]) if LAST else {}
        known = hashlib.sha256(b"".join(local(value).cpu().numpy().tobytes() for value in found.values()))
        (folder / f"weights-{rank}").write_text(known.hexdigest())
        os._exit(code)

    keeper = launcher(port)
    pids = [fork(lambda rank=rank: one(rank)) for rank in range(count)]
    codes = [ended(pids[0]), *map(ended_soon, pids[1:])]
    os.kill(keeper, signal.SIGKILL)
    ended(keeper)
    told = {name: [(folder / f"{name}-{rank}").read_text() for rank in range(count)] for name in ("out", "err")}
    weights = [file.read_text() for rank in range(count) if (file := folder / f"weights-{rank}").exists()]
    return {"codes": codes, **told, "weights": weights, "seconds": time.monotonic() - begun}


def alone(run: Run, line: dict[str, Any]) -> None:
    """A callback, which the first rank calls and which may do what it likes, such as evaluate."""
    assert ranks().count == 1


def trained(config: Config, folder: Path, count: int = 1, engine: Engine = "ddp") -> None:
    """A run by so many ranks."""
    if count == 1:
        train(config, folder, quiet=True)
        return
    words = folder.with_name(f"{folder.name}-words")
    work = partial(train, config, folder, quiet=True, callbacks=[alone], engine=engine)
    done = together(count, words, lambda: work() and None)
    assert done["codes"] == [0] * count, done["err"]
    assert len(set(done["weights"])) == (1 if engine == "ddp" else count), "the ranks have other weights"


def farthest(one: Path, other: Path) -> float:
    """The largest difference of two runs in any number of their newest checkpoints, models and logs."""
    a, b = newest(one), newest(other)
    assert a.keys() == b.keys()
    found = [(a[name].double() - b[name].double()).abs().max().item() for name in a]
    for x, y in zip(log(one), log(other), strict=True):
        assert x.keys() == y.keys()
        found += [abs(x[name] - y[name]) for name in x if isinstance(x[name], int | float)]
    return max(found)


def agree(folder: Path) -> None:
    """20 steps of 16 images of each phase: whole, in micro-batches, by ranks, and by ranks that hold shards."""
    engine.BUCKET = 1000  # several of them
    length = {"training.images": 320, "training.ema_half_lives": (32, 64), "training.log_every": 80}
    length["training.checkpoint_every"] = 320
    plain = tiny().with_changes(length | {"objective.perceptual_weight": 0.1})
    adamw = plain.with_changes({"training.optimizer": "adamw", "objective.draws": 2})
    stages = tiny(network__architecture="three_networks", network__depth=3).with_changes(length)
    trained(plain, folder / "teacher")
    # Upkeep and penalty are of 2 images of 16: of four ranks, two have none.
    short = {"onestep.critic_warmup": 64, "onestep.measured": 40, "training.precision": "float32"}
    step = converted(folder / "teacher", rank=0).with_changes(length | short)
    changes = converted(folder / "teacher", rank=3).with_changes(length | short)
    ratio = step.with_changes(
        {"onestep.method": "ratio", "onestep.ratio.level_normalised": True, "onestep.selects": False}
    )
    score = step.with_changes({"onestep.method": "dmd", "onestep.score.adversarial": 0.5, "onestep.selects": True})
    joint = tiny(phases=("one_run",), network__jump_rank=3, onerun__measured=40).with_changes(length)
    kinds = {"plain": (plain, 2), "adamw": (adamw, 2), "stages": (stages, 2), "joint": (joint, 2)}
    kinds |= {"ratio": (ratio, 4), "score": (score, 2), "low rank": (changes, 2)}
    found: dict[str, dict[str, float]] = {}
    for name, (config, count) in kinds.items():
        places = {kind: folder / name / kind for kind in ("whole", "accumulated", "ranks", "sharded")}
        trained(config, places["whole"])
        if name in ("plain", "ratio"):  # of the others, other tests
            trained(config.with_changes({"training.micro_batch": 16 // count}), places["accumulated"])
        trained(config, places["ranks"], count)
        # Four ranks have shards of other sizes, some of them empty; two have 2 images of 16 between them.
        shards = 4 if name == "joint" else 2
        saves = {"training.micro_batch": 4, "training.recompute": True} if name == "adamw" else {}
        trained(config.with_changes(saves), places["sharded"], shards, "fsdp")
        found[name] = {
            kind: farthest(places["whole"], each) for kind, each in places.items() if kind != "whole" and each.exists()
        }
    print(json.dumps(found))


WORDS = "train digits --network.width 32 --network.depth 1 --network.heads 2 --training.batch 16 --training.images 160"
WORDS += " --training.warmup 32 --training.ema-half-lives 32 64 --training.log-every 16 --training.health-every 160"
WORDS += " --training.sample-every 64 --training.checkpoint-every 48 --training.precision float32 --training.device cpu"


def command(folder: Path, words: str = WORDS) -> Callable[[], int]:
    """The command of a tiny run, or another, in a folder."""
    return lambda: cli.run([*words.split(), "--quiet", "--out", str(folder)])


def at_step(images: int, act: Callable[[], None], *, of: int = 1) -> Callable[[int], None]:
    """Prepares rank `of` to `act` after its step that reaches `images`."""

    def prepare(rank: int) -> None:
        honest = loop.training_step

        def step(state: TrainingState, *rest: Any) -> dict[str, torch.Tensor]:
            values = honest(state, *rest)
            if rank == of and state.counters.images == images:
                act()
            return values

        loop.training_step = step

    return prepare


def elastic(folder: Path) -> None:
    """A run of two ranks, stopped by a signal to the second, gone on with by one process, stopped, and by two again.

    Without shards and with; by one process it is the same.
    """
    whole = folder / "whole"
    found: dict[str, Any] = {"one": together(1, folder / "one", command(whole, f"{WORDS} --engine fsdp"))}

    def terminate() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # which launchers pass on

    for how in ("ddp", "fsdp"):
        run, words, option = folder / how, folder / f"{how}-words", f"--engine {how}"
        again, resume = command(run, "train --resume"), command(run, f"train --resume {option}")
        end = at_step(112, lambda: signal.raise_signal(signal.SIGTERM), of=0)
        begins = command(run, f"{WORDS} {option}")
        found[how] = told = {"stops": [], "places": [], "files": []}
        for count, work, before in (
            (2, begins, at_step(64, terminate)),
            (1, again, end),
            (2, resume, lambda rank: None),
        ):
            told["stops"].append(together(count, words / str(len(told["stops"])), work, before))
            place = checkpoints(run)[-1]
            told["places"].append(place.name)
            told["files"].append(sorted(file.name for file in place.glob("optimizer*")))
        told["pictures"] = [[path.name for path in sorted((each / "samples").iterdir())] for each in (whole, run)]
        told["farthest"] = farthest(whole, run)
    print(json.dumps(found))


def not_a_number(first: int, last: int) -> Callable[[int], None]:
    """Prepares the second rank to see NaN in the steps that begin at `first` to `last` images, until it rolls back."""

    def prepare(rank: int) -> None:
        honest = loop.training_step

        def step(state: TrainingState, x: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
            broken = rank == 1 and first <= state.counters.images <= last and not state.counters.rollbacks
            return honest(state, x * float("nan") if broken else x, *rest)

        loop.training_step = step

    return prepare


def other_weights(rank: int) -> None:
    """Prepares the second rank to begin with other weights than the first, and to see NaN once."""
    honest = loop.TrainingState.fresh

    def fresh(*arguments: Any) -> TrainingState:
        state = honest(*arguments)
        for p in state.network.parameters():
            p.data += rank
        return state

    loop.TrainingState.fresh = fresh
    not_a_number(32, 32)(rank)


def refuse() -> None:
    raise UserError("photo.png: cannot be read; give another")


def hang() -> None:
    time.sleep(600)


def alarmed(rank: int) -> None:
    HealthMonitor.judge = lambda self, log: "so it says"


def impatient(rank: int) -> None:
    os.environ["ONEFOLD_TIMEOUT"] = "3"
    at_step(64, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGSTOP) and None)(rank)


def faults(folder: Path) -> None:
    """What befalls one rank, and what becomes of all."""

    def tried(name: str, words: str = "", *, count: int = 2, before: Callable[[int], None] = lambda rank: None) -> None:
        work = command(folder / name, f"{WORDS} {words}")
        found[name] = together(count, folder / f"{name}-ranks", work, before)
        if (folder / name).exists():
            lines = log(folder / name)
            found[name] |= {
                "images": [line["images"] for line in lines],
                "skipped": [line["skipped"] for line in lines],
            }
            found[name] |= {"saved": [path.name for path in checkpoints(folder / name)]}

    found: dict[str, dict[str, Any]] = {}
    tried("skips", before=other_weights)
    tried("rolls back", "--training.images 320", before=not_a_number(64, 320))
    tried("killed", before=at_step(64, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    tried("killed, sharded", "--engine fsdp", before=at_step(64, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    tried("few", "--engine fsdp --one-step --onerun.share 0.2")
    tried("hangs", before=impatient)
    tried("refuses", before=at_step(64, refuse))
    tried("alarm", "--on-collapse stop --training.health-every 32", before=alarmed)
    tried("all refuse", "--network.patch 3")
    tried("odd", count=3)
    # The folders of a run at 48 images and of one that is through.
    at = {"0": command(folder / "killed", "train --resume"), "1": command(folder / "skips", "train --resume")}
    found["apart"] = together(2, folder / "apart", lambda: at[os.environ["RANK"]]())
    found["alone"] = together(2, folder / "alone", lambda: cli.run(["estimate", "digits"]))
    print(json.dumps(found))


def evaluation(folder: Path) -> None:
    """Samples and a record by one process and by two ranks."""
    run = folder / "run"
    assert command(run)() == 0
    work = {
        "grid": f"sample {run} -n 7 --out {{}}/grid.png",
        "separate": f"sample {run} -n 7 --separate --out {{}}/separate",
        "record": f"evaluate {run} --images 51 --json",
    }
    found: dict[str, Any] = {}
    for count in (1, 2):
        for name, words in work.items():
            place = folder / f"by-{count}"
            found[f"{name} by {count}"] = together(count, place, lambda w=words, p=place: cli.run(w.format(p).split()))
    files = [sorted((folder / f"by-{count}").rglob("*.png")) for count in (1, 2)]
    found["pictures"] = [[[path.name, sha256_of(path)] for path in each] for each in files]
    print(json.dumps(found))


def main(mode: str, folder: Path) -> None:
    trained(tiny(training__images=32, training__log_every=16), folder / "warm")  # what is done only once, before forks
    {"agree": agree, "elastic": elastic, "faults": faults, "evaluation": evaluation}[mode](folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
