"""The errors that reach a person.

A `UserError` is wrong input: the command prints its single line and exits with 2. Its text names the file or
option, says what is wrong and how to mend it. `TrainingAborted` is a training that cannot go on (exit code 3).
"""


class UserError(ValueError):
    """Wrong input; `str(error)` is one line that names the cause and the cure. Exit code 2."""


class TrainingAborted(RuntimeError):
    """Training met non-finite numbers or a collapse that it cannot leave. Exit code 3."""
