"""End a command with one message from all its processes, and one exit code.

0 done; 1 failed; 2 error in the command line, the data or a checkpoint; 75 stopped on request.
"""

import contextlib
import errno
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import utils
from internals import preemption
from internals.errors import (
    DataError,
    ImageError,
    RunError,
    StopRequested,
    UnexpectedImageError,
    UserError,
)

FAILED, WRONG_USE, STOPPED = 1, 2, 75  # 75 is EX_TEMPFAIL of BSD: try again later

# What receiving from a killed worker may raise, before PyTorch notices. Not BrokenPipeError, which
# is what writing to a closed pipe raises, such as the standard output of `... | head`.
LOST_WORKER = (ConnectionResetError, ConnectionRefusedError, EOFError)
# In PyTorch's messages: of a worker that was killed, and of an exception that a worker raised.
KILLED_WORKER, RAISED_IN_WORKER = "DataLoader worker (pid", "in DataLoader worker process"


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; on an error print one message and exit with the exit code of its type."""
    if hasattr(sys.stdout, "reconfigure"):  # names need not be in the encoding of the console
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _await_worker_error(main)
    except StopRequested:
        utils.log("stopped: to continue a training, run the same command with --resume auto")
        exit_with_code(STOPPED)
    except UserError as error:
        abort(str(error), WRONG_USE)
    except UnexpectedImageError as error:
        abort(str(error), FAILED, error.worker_traceback or traceback.format_exc())
    except RunError as error:
        abort(str(error), FAILED)
    except KeyboardInterrupt:
        abort("interrupted", FAILED)
    except Exception as error:
        if message := explain_system_error(error):
            abort(message, FAILED)
        if is_connection_lost(error):
            abort(f"another process failed: {find_first_failure()}\n({error})", FAILED)
        abort(f"{type(error).__name__}: {error}", FAILED, traceback.format_exc())


def _await_worker_error(main: Callable[[], None]) -> None:
    """Run `main`; after a broken pipe let PyTorch raise that a worker was killed, if so."""
    try:
        main()
    except LOST_WORKER:
        time.sleep(1)  # the pipe breaks before the signal arrives
        raise


def explain_system_error(error: Exception) -> str | None:
    """Return a message on what to do about a common system error, None for other errors."""
    text = str(error)
    raised_in_worker = RAISED_IN_WORKER in text
    if KILLED_WORKER in text or (isinstance(error, LOST_WORKER) and not raised_in_worker):
        return (
            f"{text or 'pipe closed'}. A loading process was killed, most often because memory or "
            "shared memory (/dev/shm) ran out: lower --workers or --batch-size, or start the "
            "container with --ipc=host or a larger --shm-size. Then continue with --resume auto"
        )
    if "Too many open files" in text:
        return (
            f"{error}. Raise the limit with ulimit -n 65536, or lower --workers, and continue "
            "with --resume auto"
        )
    if is_out_of_memory(error) and raised_in_worker:
        return f"a loading process is {OUT_OF_MEMORY}"
    if is_out_of_memory(error):
        return f"out of memory: lower --batch-size, or use --device cpu ({text.splitlines()[0]})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename} cannot be written: " if error.filename else ""
        return f"{where}{error.strerror}: free some space, then run it again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return None


OUT_OF_MEMORY = "out of memory: lower --workers or --batch-size, then continue with --resume auto"


def image_error(image: str, error: Exception) -> DataError | ImageError:
    """Return an error that names the image during whose loading or augmentation `error` occurred.

    Args:
        image: Its file and id.
        error: Any error.
    """
    if isinstance(error, UserError):
        return DataError(f"{image}: {error}")
    if is_out_of_memory(error):
        return ImageError(f"{image}: {OUT_OF_MEMORY}")
    is_lost_worker = isinstance(error, LOST_WORKER)  # not in the worker itself
    if not is_lost_worker and (message := explain_system_error(error)):
        return ImageError(f"{image}: {message}")
    return UnexpectedImageError(f"{image} cannot be loaded: {type(error).__name__}: {error}")


def is_out_of_memory(error: Exception) -> bool:
    """Check for out of memory, on a device or on the CPU (whose allocator has no error class)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, RunError)
        and any(words in str(error) for words in ("allocate memory", "MPS backend out of memory"))
    )


def abort(message: str, exit_code: int, details: str = "") -> None:
    """Exit with a message, unless another process has already printed one for all."""
    preemption.restore_signal_handlers()
    is_connected = utils.message_store() is not None
    if report_failure(message) and (is_connected or utils.rank() == 0):
        where = f" of rank {utils.rank()}" if details and is_connected else ""
        command = Path(sys.argv[0]).name
        print(f"{details}{command}: error{where}: {message}", file=sys.stderr, flush=True)
    if is_connected:
        time.sleep(1)  # torchrun ends all processes when one exits: let the message appear first
    elif utils.rank() != 0:
        time.sleep(20)  # not connected yet: rank 0 most likely has the same error, and prints it
    exit_with_code(exit_code)


def exit_with_code(exit_code: int) -> None:
    """Exit with an exit code that the launcher passes on; torchrun alone would turn it into 1."""
    file = preemption.launch_file("exit")
    if file:
        with contextlib.suppress(FileExistsError), file.open("x") as opened:
            opened.write(str(exit_code))
        if exit_code == STOPPED:
            sys.exit(0)  # or torchrun would restart the processes
    sys.exit(exit_code)


def exit_if_already_finished() -> None:
    """Exit if torchrun restarts a process after a run that must not be repeated."""
    file = preemption.launch_file("exit")
    try:
        exit_code = int(file.read_text() or 1) if file else None
    except FileNotFoundError:  # not written, or just removed by the first process
        return
    if exit_code not in (None, FAILED):
        sys.exit(exit_code)
    if file and utils.local_rank() == 0:
        file.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- several processes

# Parts of the messages of Gloo, whose errors are plain RuntimeErrors.
LOST_CONNECTION = (
    "gloo",
    "connection closed by peer",
    "connection reset",
    "pair closure",
    "timed out",
)


def is_connection_lost(error: BaseException) -> bool:
    """Check whether an error only reports that another process has exited or does not respond."""
    text = str(error).lower()
    return isinstance(error, utils.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in LOST_CONNECTION)
    )


def report_failure(message: str) -> bool:
    """Publish why this process ends; return False if another one has published first."""
    message, store = f"rank {utils.rank()}: {message}", utils.message_store()
    try:
        return store is None or store.compare_set("failure", "", message).decode() == message
    except utils.DistError:  # the process that hosts the store has exited
        return True


def find_first_failure(timeout_seconds: float = 2) -> str:
    """Return the message of the first process that failed, or which ranks do not respond."""
    preemption.cancel_deadline()
    store = utils.message_store()
    try:
        store.set(f"waiting/{utils.rank()}", "")
        time.sleep(timeout_seconds)  # the others lose the connection at about the same time
        if store.check(["failure"]):
            return store.get("failure").decode()
        silent = [r for r in range(utils.world_size()) if not store.check([f"waiting/{r}"])]
    except utils.DistError:
        silent = []
    names = ", ".join(map(str, silent)) or "0 or its machine"
    return f"rank {names}: exited or did not respond in time (--timeout-minutes)"
