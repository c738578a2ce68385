"""A program for test_interruption.py: trains in forks of itself, kills them, and prints what became of the runs.

Forks, because they start in no time; a process of its own, because forks want one without threads.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers_runs import log, tiny
from onefold.network import OneFold
from onefold.training.config import Config
from onefold.training.loop import train
from onefold.training.state import checkpoints

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.truncate"}


def forked(work: Callable[[], None]) -> int:
    """Do `work` in a fork and wait for it; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def at_each_touch(folder: Path, act: Callable[[int], None]) -> None:
    """From now on call `act(k)` before this process's k-th look at or change of a file of the run."""
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in TOUCHES and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            count += 1
            act(count)

    sys.addaudithook(hook)


def result(folder: Path) -> dict[str, object]:
    """What a finished run comes to: hashes of the newest checkpoint and of the model, and the log."""
    files = [*sorted(checkpoints(folder)[-1].glob("*.safetensors")), *sorted((folder / "model").iterdir())]
    hashes = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    left = [path.name for path in folder.rglob(".*")]
    return {"hashes": hashes, "log": log(folder), "left": left, "kept": [path.name for path in checkpoints(folder)]}


def begin_or_go_on(config: Config, folder: Path) -> None:
    train(config, folder, resume=(folder / "config.json").exists(), quiet=True)


def kill_at_random(folder: Path) -> None:
    """A run that saves at each step, killed again and again at random moments until it is through."""
    config = tiny(training__images=256, training__checkpoint_every=16)
    assert forked(lambda: begin_or_go_on(config, folder / "whole")) == 0
    choose, kills = random.Random(0), 0
    for attempt in range(200):
        pid = _fork(lambda: begin_or_go_on(config, folder / "killed"))
        time.sleep(choose.uniform(0.05, 0.25) * (1 + attempt / 10))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
        if code == 0:
            break
    print(json.dumps({"kills": kills, "whole": result(folder / "whole"), "killed": result(folder / "killed")}))


def kill_at_each_touch(folder: Path) -> None:
    """The last step of a run, with its log line, pictures, checkpoint and model, killed before each file operation."""
    config = tiny(training__images=48, training__checkpoint_every=16, training__keep_last=1)
    start, whole, killed, count = folder / "start", folder / "whole", folder / "killed", folder / "count"
    assert forked(lambda: begin_or_go_on(tiny(training__images=32, training__decay=0, training__checkpoint_every=16), start)) == 0
    for path in (start / "config.json",):
        path.write_text(path.read_text().replace('"images": 32', '"images": 48', 1))

    def go_on(where: Path, act: Callable[[int], None]) -> None:
        at_each_touch(where, act)
        begin_or_go_on(config, where)

    shutil.copytree(start, whole)
    assert forked(lambda: go_on(whole, lambda k: count.write_text(str(k)))) == 0
    expected, failures = result(whole), []
    for at in range(1, int(count.read_text()) + 1):
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(start, killed)
        code = forked(lambda at=at: go_on(killed, lambda k: os.kill(os.getpid(), signal.SIGKILL) if k == at else None))
        assert code == -signal.SIGKILL, code

        def look_and_go_on() -> None:
            OneFold.from_pretrained(killed)
            begin_or_go_on(config, killed)

        code = forked(look_and_go_on)
        found = result(killed) if code == 0 else {"code": code}
        failures += [{"at": at, "found": found}] if found != expected else []
    print(json.dumps({"touches": int(count.read_text()), "expected": expected, "failures": failures}))


if __name__ == "__main__":
    {"random": kill_at_random, "touch": kill_at_each_touch}[sys.argv[1]](Path(sys.argv[2]))
