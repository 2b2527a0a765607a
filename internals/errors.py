"""The exceptions of the recipe: errors that the user can correct, and failures of a run."""


class UserError(ValueError):
    """An error in the command line, the data or a checkpoint: exit code 2.

    The message names the error, the file and id, and what to do.
    """


class DataError(UserError):
    """An error in the data; errors of one `kind` are counted together."""

    def __init__(self, message: str, kind: str = ""):
        # The DataLoader adds the traceback of the worker to the message: remove it.
        super().__init__(message.rpartition("DataError: ")[2].strip())
        self.kind = kind


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not match the model or data."""


class RunError(RuntimeError):
    """A run that cannot continue, such as after an infinite loss: exit code 1.

    The message names the error, the step or image, and what to try.
    """


class ImageError(RunError):
    """A failure while an image was loaded that is not the fault of its file, such as of memory."""

    def __init__(self, message: str):
        # The DataLoader adds the traceback of the worker to the message: remove it.
        added, _, message = message.rpartition(f"{type(self).__name__}: ")
        self.worker_traceback = "".join(added.rpartition("\n")[:2])
        super().__init__(message.strip())


class UnexpectedImageError(ImageError):
    """An unknown error while an image was loaded or augmented; shown with its traceback."""


class StopRequested(Exception):  # noqa: N818 - no error
    """A requested stop; raised by all processes after saving: exit code 75."""
