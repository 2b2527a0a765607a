"""The two families of errors: what the user can mend, and what a run died of."""


class UserError(ValueError):
    """The command line, the data or a checkpoint is wrong: exit code 2.

    The message names the file and the id, and says what to do.
    """


class DataError(UserError):
    """Something wrong with the data; `kind` is what to count it under in a list of many."""

    def __init__(self, message: str, kind: str = ""):
        # A DataLoader worker's error arrives as a text with its traceback: keep what was said.
        super().__init__(message.rpartition("DataError: ")[2].strip())
        self.kind = kind


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit."""


class RunError(RuntimeError):
    """A run that cannot go on, such as one with infinite losses: exit code 1.

    The message says where, and what to try.
    """


class StopRequested(Exception):
    """Asked to stop, on every process, after everything was saved: exit code 75."""
