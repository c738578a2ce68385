"""Running a study, from its current state to its end or to an interruption.

check → lock → study.json → trials, each reported when it ends → table → pictures
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from onefold.data.messages import count_text
from onefold.errors import Interrupted, TrainingAborted, UserError
from onefold.files import locked
from onefold.studies import figures, table
from onefold.studies.study import Study, Trial, begin, check, explain_disk_errors
from onefold.studies.trials import run_trials

__all__ = ["run_study"]

Say = Callable[[str], None]


def run_study(
    study: Study, out: str | Path, *, jobs: int = 1, say: Say = lambda line: None, quiet: bool = False
) -> list[Trial]:
    """Train and evaluate what is not finished, then write the table and the pictures into `out`.

    Args:
        study: What to compare; if `out` already holds it, only seeds or arms may have been added.
        out: The study's folder.
        jobs: Trials to run at a time, each in a process of its own if there are several.
        say: Called with one line for each trial that ends.
        quiet: No progress bars (there are none with several jobs either way).

    Returns all trials; each has a `record`, or says in `failure` why it has none.

    Raises:
        UserError: wrong input, another study in `out`, or a full disk; finished trials are kept.
        TrainingAborted: a process ended without a result, or no trial could be trained to its end.
        Interrupted: SIGTERM or Ctrl-C; everything is saved, and the same call continues.
    """
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} is not positive; give at least 1")
    out = Path(out)
    with explain_disk_errors(out):
        check(study, out, say)
        with locked(out) as lock:
            study = begin(study, out)
            trials = study.trials(out)
            kept = sum(trial.is_settled for trial in trials)
            size = f"{count_text(len(study.arms), 'arm')} × {count_text(study.seeds, 'seed')}"
            say(f"{out}: {size}" + (f", {kept} finished before" if kept else ""))
            clock = _Clock(study, trials, say)
            try:
                run_trials(trials, study.images, jobs=jobs, lock=lock, on_end=clock.report, quiet=quiet)
            except (Interrupted, KeyboardInterrupt) as error:
                number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
                done = f"stopped with {sum(t.is_settled for t in trials)} of {len(trials)} trainings finished"
                raise Interrupted(number, f"{out}: {done}; the same command continues") from error
            except (UserError, TrainingAborted) as error:
                raise type(error)(f"{error}; what is finished is kept, and the same command continues") from error
            table.write(study, trials, out)
            finished = [trial for trial in trials if trial.record_path.exists()]
            if not finished:
                raise TrainingAborted(f"{out}: no training reached its end; the first: {trials[0].failure}")
            figures.write(study, finished, out)
    return trials


class _Clock:
    """Reports the result of each trial and how long the rest will take."""

    def __init__(self, study: Study, trials: list[Trial], say: Say) -> None:
        self.study, self.trials, self.say = study, trials, say
        self.start = time.perf_counter()
        self.before = sum(trial.is_settled for trial in trials)

    def report(self, trial: Trial, seconds: float) -> None:
        arms = self.study.arms
        where = f"arm {arms.index(trial.arm) + 1} of {len(arms)}, {trial.arm.name}, seed {trial.seed}: {seconds:.0f} s"
        record = trial.record
        what = f"failed: {trial.failure}" if record is None else table.line(self.study, record)
        done = sum(trial.is_settled for trial in self.trials)
        left = (time.perf_counter() - self.start) / (done - self.before) * (len(self.trials) - done)
        self.say(f"{where}; {what}" + (f" ({count_text(round(left / 60), 'minute')} left)" if left >= 60 else ""))
