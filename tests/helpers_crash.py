"""A program for test_faults.py: trains in forks of itself, kills them, and prints what became of the runs.

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
from onefold.errors import UserError
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


def kill_at_random(config: Config, folder: Path, kills: int) -> None:
    """Runs that save at each step, killed again and again at random moments until they are through; `kills` in all.

    Before each kill a run has certain checkpoints, of which the newest must still be there after it.
    """
    config = config.with_changes({"training.images": 768})
    whole = folder / "whole"
    begin_or_go_on(config, whole)
    expected, choose, done, lost, failures = outcome(whole), random.Random(kills), 0, 0, list[str]()
    while done < kills:
        killed, code = folder / f"killed at {done}", -1
        while code != 0:
            pid = fork(lambda killed=killed: begin_or_go_on(config, killed))
            time.sleep(choose.uniform(0.02, 0.2) * (1 + done % 50 / 20))
            before = newest_of(killed)
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL), code
            done += code != 0
            lost += newest_of(killed) < before
        found = outcome(killed)
        failures += [f"{killed.name}: other {key}" for key in expected if expected[key] != found[key]]
    print(json.dumps({"kills": done, "lost": lost, "failures": failures}))


def newest_of(folder: Path) -> int:
    """Images of the newest complete checkpoint, −1 without."""
    found = checkpoints(folder)
    return int(found[-1].name) if found else -1


def two_jobs(config: Config, folder: Path, kills: int) -> None:
    """A second job in the folder of one that is training: it is refused, and the first comes to what it would have."""
    config = config.with_changes({"training.images": 320})
    whole, shared = folder / "whole", folder / "shared"
    begin_or_go_on(config, whole)
    pid, refused, others = fork(lambda: begin_or_go_on(config, shared)), 0, list[str]()
    while newest_of(shared) < 16 * 4:
        time.sleep(0.01)
    for resume in (True, False, True):
        try:
            train(None if resume else config, shared, resume=resume, quiet=True)
        except UserError as error:
            refused += "another process is working in this folder" in str(error) or "holds a run already" in str(error)
        else:
            others.append("a second job has trained")
    code = ended(pid)
    print(json.dumps({"refused": refused, "others": others, "code": code, "same": outcome(whole) == outcome(shared)}))


def kill_at_each_touch(config: Config, folder: Path, kills: int) -> None:
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


def main(mode: str, folder: Path, kills: int) -> None:
    np.savez(folder / "images.npz", images=noise(40, 4, 4, 1))
    data = {"data__source": str(folder / "images.npz"), "data__test": None}
    config = tiny(**data, training__images=64, training__log_every=16, training__checkpoint_every=16)
    begin_or_go_on(config, folder / "warm")  # whatever torch does only once is done before the forks
    modes = {"random": kill_at_random, "touches": kill_at_each_touch, "two": two_jobs}
    modes[mode](config, folder, kills)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
