"""A process that runs one trial for `trials`: `python -m onefold.studies.worker`, the trial as JSON on standard input.

Standard input stays open as long as the parent lives; when it closes, this process ends too, after a checkpoint, so
that a killed study leaves no training running behind. Wrong input is one line on standard output and exit code 2.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from onefold import settings
from onefold.errors import Interrupted, UserError
from onefold.studies.study import Arm, Trial, explain_disk_errors
from onefold.studies.trials import run_trial
from onefold.training.config import Config


def main() -> int:
    """Run the trial; returns the exit code."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(task["threads"])
    config = settings.from_json(Config, task["config"], "task")
    teacher = Path(task["teacher"]) if task.get("teacher") else None
    trial = Trial(Arm(**task["arm"]), task["seed"], Path(task["folder"]), config, teacher, task["features"])
    try:
        with explain_disk_errors(trial.folder):
            run_trial(trial, task["images"], quiet=True)
    except UserError as error:
        print(error, flush=True)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 128 + signal.SIGTERM
    return 0


def _follow_parent() -> None:
    while os.read(0, 1):  # unbuffered: a thread waiting for sys.stdin would keep the process from ending
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
