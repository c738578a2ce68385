"""The trials of a study: one after another in this process, or several at once in processes of their own.

A trial trains an ordinary run (or continues it from its latest checkpoint), evaluates it and writes the record. If
training cannot continue, that is the trial's result; wrong input and a full disk stop the study. Ctrl-C or SIGTERM
stops every training after a checkpoint.

With several processes, each uses its share of the threads. The number of threads determines the order of summation, so
trials agree to the bit only with the same number of jobs.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from onefold import metrics, settings
from onefold.compute import resolve_device
from onefold.data import read_all
from onefold.errors import Interrupted, TrainingAborted, UserError
from onefold.evaluation import drawn, evaluate
from onefold.files import write_whole
from onefold.metrics import spectrum
from onefold.pixels import to_float
from onefold.studies.study import Trial
from onefold.training.checkpoint import checkpoints
from onefold.training.datasets import open_data
from onefold.training.interruption import Interruption
from onefold.training.loop import train
from onefold.training.run import Run

__all__ = ["run_trial", "run_trials"]

OnTrialEnd = Callable[[Trial, float], None]
"""Called with each trial that has ended and its duration in seconds."""

BATCH = 256


def run_trials(trials: Sequence[Trial], images: int, *, jobs: int, lock: int, on_end: OnTrialEnd, quiet: bool) -> None:
    """Run all trials that are not settled, `jobs` at a time; `lock` is the descriptor of the study's lock.

    Raises:
        UserError: wrong input, or a full disk.
        Interrupted: a signal was received; every training has been saved.
    """
    left = [trial for trial in trials if not trial.is_settled]
    if jobs > 1:
        _run_in_parallel(left, images, jobs, lock, on_end)
        return
    for trial in left:
        torch.compiler.reset()  # otherwise what was compiled for earlier trials would count against this one
        start = time.perf_counter()
        run_trial(trial, images, quiet=quiet)
        on_end(trial, time.perf_counter() - start)


def run_trial(trial: Trial, images: int, *, quiet: bool) -> None:
    """Train and evaluate; afterwards the trial has a record, or says why training could not continue."""
    if (reason := trial.teacher_failure) is not None:
        write_whole(trial.failure_path, json.dumps({"reason": f"its teacher failed: {reason}"}) + "\n")
        return
    try:
        if checkpoints(trial.folder):
            run = train(None, trial.folder, resume=True, quiet=quiet)
        else:  # what a stopped process may have left is not a run yet
            shutil.rmtree(trial.folder, ignore_errors=True)
            run = train(trial.config, trial.folder, quiet=quiet)
    except TrainingAborted as error:
        reason = str(error).removeprefix(f"{trial.folder}: ")
        write_whole(trial.failure_path, json.dumps({"reason": reason}) + "\n")
        return
    device = resolve_device(run.config.training.device)
    extractor = metrics.from_file(trial.features, device=device) if trial.features else None
    record = evaluate(run, images=images, batch=BATCH, extractor=extractor, device=device)
    write_whole(trial.spectrum_path, json.dumps(_spectra(run, images, device)) + "\n")
    record.write(trial.record_path)


@torch.no_grad()
def _spectra(run: Run, images: int, device: torch.device) -> dict[str, list[float]]:
    """Standard deviations along principal directions, descending, of the latents of the record's test images."""
    _, test = open_data(run.config.data)
    x, _ = read_all(test, drawn(test, images, seed=0))
    network = run.network.to(device)
    z = torch.cat([network.encode(to_float(part.to(device))).cpu() for part in x.split(BATCH)])
    return {"token": spectrum(z.flatten(0, 1)).tolist(), "whole": spectrum(z.flatten(1)).tolist()}


# --- several at once --------------------------------------------------------------------------------------------------


def _run_in_parallel(trials: list[Trial], images: int, jobs: int, lock: int, on_end: OnTrialEnd) -> None:
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(trials)
    running: dict[subprocess.Popen[str], tuple[Trial, float]] = {}
    with Interruption() as interruption:
        try:
            while (waiting or running) and not interruption.signal:
                while len(running) < jobs and (trial := _next(waiting, [trial for trial, _ in running.values()])):
                    waiting.remove(trial)
                    running[_start_process(trial, images, threads, lock)] = trial, time.perf_counter()
                over = [process for process in running if process.poll() is not None]
                for process in over:
                    trial, start = running.pop(process)
                    _check_end(process, trial)
                    on_end(trial, time.perf_counter() - start)
                if not over:
                    time.sleep(0.1)
        finally:
            _stop(list(running))
    if interruption.signal:
        raise Interrupted(interruption.signal, "stopped; every training is saved")


def _next(waiting: Sequence[Trial], running: Sequence[Trial]) -> Trial | None:
    """The first trial that need not wait for the one that it starts from."""
    unfinished = {trial.folder for trial in (*waiting, *running)}
    return next((trial for trial in waiting if trial.teacher not in unfinished), None)


def _start_process(trial: Trial, images: int, threads: int, lock: int) -> subprocess.Popen[str]:
    """A process for one trial, in a session of its own, so that Ctrl-C reaches it through this one only."""
    task = {
        "arm": {**asdict(trial.arm), "changes": dict(trial.arm.changes)},
        "seed": trial.seed,
        "folder": str(trial.folder),
        "teacher": str(trial.teacher) if trial.teacher else None,
        "config": settings.to_json(trial.config),
        "images": images,
        "features": trial.features,
        "threads": threads,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "onefold.studies.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(lock,),
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    return process


def _check_end(process: subprocess.Popen[str], trial: Trial) -> None:
    said = process.communicate()[0].strip()
    if process.returncode == 2 and said:
        raise UserError(said)
    if not trial.is_settled:
        ended = f"the process that trained it ended with code {process.returncode}"
        raise TrainingAborted(f"{trial.folder}: {ended}{' (out of memory?)' if process.returncode == -9 else ''}")


def _stop(processes: list[subprocess.Popen[str]]) -> None:
    """Ask them to save and stop; a second Ctrl-C while they do so ends them at once."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.communicate()
