"""How a command ends: one message of all its processes, and one exit code.

0 done; 1 failed; 2 the command line, the data or a checkpoint is wrong; 75 stopped on request.
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
from internals.errors import RunError, StopRequested, UserError

FAILED, WRONG_USE, STOPPED = 1, 2, 75  # the last is BSD's EX_TEMPFAIL: nothing is wrong, try again


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; if it ends before its time, say why in one message, and exit."""
    try:
        main()
    except StopRequested:
        utils.log("stopped as asked; every step of a training is saved, go on with --resume auto")
        exit_with_code(STOPPED)
    except UserError as error:
        abort(str(error), WRONG_USE)
    except RunError as error:
        abort(str(error), FAILED)
    except KeyboardInterrupt:
        abort("interrupted", FAILED)
    except Exception as error:
        if remedy := remedy_for(error):
            abort(remedy, FAILED)
        if lost_connection(error):
            abort(f"ended because of {first_failed_rank()}\n({error})", FAILED)
        abort(f"{type(error).__name__}: {error}", FAILED, traceback.format_exc())


def remedy_for(error: Exception) -> str | None:
    """What to say of errors of the system that people meet, with what to do about them."""
    text = str(error)
    if "DataLoader worker" in text:
        return (
            f"{error}. A loading process was killed, most often because memory or shared memory "
            "(/dev/shm) ran out: lower --workers or --batch-size, or start a container with "
            "--ipc=host or a larger --shm-size. Go on with --resume auto"
        )
    if "Too many open files" in text:
        return (
            f"{error}. Raise the limit with ulimit -n 65536, or lower --workers; then --resume auto"
        )
    if is_out_of_memory(error):
        return f"out of memory: lower --batch-size, or use --device cpu ({text.splitlines()[0]})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename} cannot be written: " if error.filename else ""
        return f"{where}{error.strerror}: make room, then run it again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a device or of a CPU (whose allocator has no error class)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def abort(message: str, exit_code: int, details: str = "") -> None:
    """End this process with the one message of all processes, unless another one has given it."""
    preemption.restore_signal_handlers()
    together = utils.message_store() is not None
    if report_failure(message) and (together or utils.rank() == 0):
        where = f" of rank {utils.rank()}" if details and together else ""
        command = Path(sys.argv[0]).name
        print(f"{details}{command}: error{where}: {message}", file=sys.stderr, flush=True)
    if together:
        time.sleep(1)  # torchrun ends all when one ends, so the message has to be out before
    elif utils.rank() != 0:
        time.sleep(20)  # before they have met, rank 0 most likely has the same to say
    exit_with_code(exit_code)


def exit_with_code(exit_code: int) -> None:
    """End with an exit code that the launcher hands on, though torchrun would make it 1."""
    file = preemption.launch_file("exit")
    if file:
        with contextlib.suppress(FileExistsError), file.open("x") as opened:
            opened.write(str(exit_code))
        if exit_code == STOPPED:
            sys.exit(0)  # which torchrun does not take for a reason to start again
    sys.exit(exit_code)


def exit_if_already_finished() -> None:
    """When torchrun starts again what had ended for good, end at once."""
    file = preemption.launch_file("exit")
    try:
        exit_code = int(file.read_text() or 1) if file else None
    except FileNotFoundError:  # never written, or taken away by the first process just now
        return
    if exit_code not in (None, FAILED):
        sys.exit(exit_code)
    if file and utils.local_rank() == 0:
        file.unlink(missing_ok=True)


# ------------------------------------------------------------------- failing with other processes

# What Gloo's errors have in their text, which is all that tells them from others.
LOST = ("gloo", "connection closed by peer", "connection reset", "pair closure", "timed out")


def lost_connection(error: BaseException) -> bool:
    """Whether the error only says that another process is gone or does not answer."""
    text = str(error).lower()
    return isinstance(error, utils.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in LOST)
    )


def report_failure(message: str) -> bool:
    """Leave for the other processes why this one ends; False if another one was first."""
    message, store = f"rank {utils.rank()}: {message}", utils.message_store()
    try:
        return store is None or store.compare_set("failure", "", message).decode() == message
    except utils.DistError:  # the store went with its host
        return True


def first_failed_rank(timeout_seconds: float = 2) -> str:
    """After contact was lost: what the first process to fail has left, or which ones are silent."""
    store = utils.message_store()
    try:
        store.set(f"waiting/{utils.rank()}", "")
        time.sleep(timeout_seconds)  # the others lose contact at about the same time
        if store.check(["failure"]):
            return store.get("failure").decode()
        silent = [r for r in range(utils.world_size()) if not store.check([f"waiting/{r}"])]
    except utils.DistError:
        silent = []
    names = ", ".join(map(str, silent)) or "0 or its machine"
    return f"rank {names}: gone, or did not answer in time (--timeout-minutes)"
