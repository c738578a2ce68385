"""A program for test_interruption.py: trains in forks of itself, kills them, and prints what became of the runs.

Forks, because they start in no time; a process of its own, because only one without threads may fork.
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

import numpy as np

from data_images import noise
from helpers_runs import log, tiny
from onefold.networks.one_network import OneFold
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.loop import train

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.truncate"}


def fork(work: Callable[[], None]) -> int:
    """Begin `work` in a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """Wait for a child; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_each_touch(folder: Path, act: Callable[[int], None]) -> None:
    """From now on call `act(k)` before this process's k-th look at or change of a file in `folder`."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in TOUCHES and str(arguments[0]).startswith(str(folder)):
            count += 1
            act(count)

    sys.addaudithook(hook)


def outcome(folder: Path) -> dict[str, object]:
    """What a run has come to: hashes of its newest checkpoint and its model, the log, and what else lies around."""
    newest = checkpoints(folder)[-1]
    files = [*sorted(newest.glob("*.safetensors")), *sorted((folder / "model").iterdir())]
    return {
        "newest": newest.name,
        "hashes": {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "log": log(folder),
        "hidden": sorted(path.name for path in folder.rglob(".*")),
    }


def begin_or_go_on(config: Config, folder: Path) -> None:
    train(config, folder, resume=(folder / "config.json").exists(), quiet=True)


def kill_at_random(config: Config, folder: Path) -> None:
    """A run that saves at each step, killed again and again at random moments until it is through."""
    config = config.with_changes({"training.images": 768})
    whole, killed = folder / "whole", folder / "killed"
    begin_or_go_on(config, whole)
    choose, kills, code = random.Random(0), 0, -1
    while code != 0:
        pid = fork(lambda: begin_or_go_on(config, killed))
        time.sleep(choose.uniform(0.02, 0.2) * (1 + kills / 20))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
    print(json.dumps({"kills": kills, "whole": outcome(whole), "killed": outcome(killed)}))


def kill_at_each_touch(config: Config, folder: Path) -> None:
    """The last step of a run, with its log line, pictures, checkpoint and model, killed before each file operation.

    After each kill the model must load, and the run must go on to where it would have come without.
    """
    start, whole, killed, count = folder / "start", folder / "whole", folder / "killed", folder / "count"
    begin_or_go_on(config, whole)
    shutil.copytree(whole, start)
    shutil.rmtree(checkpoints(start)[-1])
    before = shutil.copytree(checkpoints(start)[-1], folder / "before")
    (start / "model" / "model.safetensors").write_bytes((before / "average-1.safetensors").read_bytes())
    expected, failures = outcome(whole), []

    def go_on(act: Callable[[int], None]) -> None:
        at_each_touch(killed, act)
        begin_or_go_on(config, killed)

    def look_and_go_on() -> None:
        OneFold.from_pretrained(killed)
        begin_or_go_on(config, killed)

    shutil.copytree(start, killed)
    assert ended(fork(lambda: go_on(lambda k: count.write_text(str(k)) and None))) == 0
    touches = int(count.read_text())
    for at in range(1, touches + 1):
        shutil.rmtree(killed)
        shutil.copytree(start, killed)

        def die(k: int, at: int = at) -> None:
            if k == at:
                os.kill(os.getpid(), signal.SIGKILL)

        code = ended(fork(lambda die=die: go_on(die)))
        assert code == -signal.SIGKILL, code
        code = ended(fork(look_and_go_on))
        found = outcome(killed) if code == 0 else {"code": code}
        wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        failures += [f"killed before touch {at}: other {', '.join(wrong)}"] if wrong else []
    print(json.dumps({"touches": touches, "failures": failures}))


def main(mode: str, folder: Path) -> None:
    np.savez(folder / "images.npz", images=noise(40, 4, 4, 1))
    data = {"data__source": str(folder / "images.npz"), "data__test": None}
    config = tiny(**data, training__images=64, training__log_every=16, training__checkpoint_every=16)
    begin_or_go_on(config, folder / "warm")  # whatever torch does only once is done before the forks
    {"random": kill_at_random, "touches": kill_at_each_touch}[mode](config, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
