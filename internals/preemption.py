"""Preemption: stop requests by signals or from the launcher, and when to save a checkpoint.

A signal handler only records the signal; between two steps all processes agree to save and stop.
Under `start_scripts/launch.py` they communicate by files: `stop`, from the launcher to all
processes; `asked`, from a process that received a signal to the others; `exit`, the exit code of
the first process to exit, for the launcher (see `failures.exit_with_code`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import utils
from internals.errors import StopRequested

# The launcher forwards signals as a file in this folder: torchrun would kill the processes 30
# seconds after a signal (its `--shutdown-timeout` is newer than the oldest supported torch).
LAUNCH_FOLDER_VARIABLE = "FASTER_RCNN_LAUNCH"
# SIGUSR1 is the usual warning of Slurm, SIGHUP tells that the terminal was closed.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class _StopRequest:
    """The stop request that this process has received.

    Attributes:
        signal_name: Name of the signal, None without a request.
        grace_seconds: Time to finish a step after a SIGTERM under torchrun, before this process
            is killed.
    """

    signal_name: str | None = None
    grace_seconds = 60


def install_signal_handlers() -> None:
    """Record the signals in STOP_SIGNALS, except for those that nohup ignores."""
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _record_signal)


def restore_signal_handlers() -> None:
    """Undo `install_signal_handlers`: from here on there is nothing to save."""
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is _record_signal:
            signal.signal(number, signal.SIG_DFL)


def cancel_deadline() -> None:
    """Cancel the alarm of a received or later SIGTERM, as this process is about to exit."""
    _StopRequest.grace_seconds = 0  # signal.alarm(0) sets no alarm
    if os.name == "posix":
        signal.alarm(0)


def _record_signal(number: int, frame: object) -> None:
    if _StopRequest.signal_name is None:
        _StopRequest.signal_name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C now ends this process immediately
        if utils.rank() == 0:  # print is not reentrant, and the signal may have interrupted one
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{_StopRequest.signal_name}: stopping after this step\n".encode())
    # Under torchrun a SIGTERM may also mean that another process has failed. This one may then hang
    # in a step: the alarm ends it before torchrun kills it.
    if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ and os.name == "posix":
        signal.alarm(_StopRequest.grace_seconds)


def launch_file(name: str) -> Path | None:
    """Return the path of a file shared with the launcher, None without the launcher."""
    folder = os.environ.get(LAUNCH_FOLDER_VARIABLE)
    return Path(folder) / name if folder else None


def stop_requested() -> bool:
    """Check whether this process has received a stop request; others may not have yet.

    Under the launcher a request is forwarded to the other processes by a file, so that they need
    not reach the end of an evaluation first.
    """
    if _StopRequest.signal_name is None:
        for file in (launch_file("stop"), launch_file("asked")):
            if file and file.exists():
                _StopRequest.signal_name = file.read_text()
                utils.log(f"{_StopRequest.signal_name}: stopping after this step")
                break
    elif (file := launch_file("asked")) and not file.exists():
        file.write_text(_StopRequest.signal_name)
    return _StopRequest.signal_name is not None


def raise_if_stop_requested() -> None:
    """Raise StopRequested in every process if one has a stop request; all must call this."""
    if utils.start_max(stop_requested())():
        raise StopRequested


class CheckpointTimer:
    """Decides between steps when to save and when to stop, on all processes alike.

    Attributes:
        every_steps: Steps between two saves; None for saves by time only.
        interval: Seconds from one save to the next, checked between steps.
        write: Writes a checkpoint.
        seconds_saving: The total time of saving.
    """

    SAVE, STOP = 1, 2  # larger numbers take precedence

    def __init__(self, every_steps: int | None, minutes: float, write: Callable[..., None]):
        self.every_steps = every_steps
        self.interval = 60 * minutes
        self.write = write
        self.last_save = self.last_step = time.monotonic()
        self.seconds_saving = 0.0
        self._agreement: Callable[[], int] | None = None  # of the last step
        self._launcher_pid = os.getppid()

    def save(self, **kwargs) -> None:
        """Save now; a pending alarm is cancelled, however long the save takes."""
        if os.name == "posix":
            signal.alarm(0)
        if self._agreement:  # a stop request in it is still one after the save
            self._agreement()
            self._agreement = None
        start = time.monotonic()
        self.write(**kwargs)
        self.last_save = time.monotonic()
        self.seconds_saving += self.last_save - start

    def after_step(self, step: int, check: Callable[[], None]) -> None:
        """Save if a checkpoint is due, unless `check()` raises an error.

        Raises:
            StopRequested: A process has a stop request, and the checkpoint is saved.
        """
        now = time.monotonic()
        _StopRequest.grace_seconds = 5 + 3 * round(now - self.last_step)
        action = self._agreed_action(now - self.last_save >= self.interval)
        if self.every_steps and step % self.every_steps == 0:
            action = max(action, self.SAVE)
        if action:
            check()
            self.save()
        if action == self.STOP:
            raise StopRequested
        if action:
            raise_if_stop_requested()  # for a request during the save, without a second save
        self.last_step = time.monotonic()

    def _agreed_action(self, due: bool) -> int:
        """Return what all processes do now; with several, what one of them wanted a step ago.

        So a step does not wait until the slowest process has finished it.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._launcher_pid:
            raise RuntimeError("the launcher of this process has exited")
        action = 0
        if stop_requested():
            action = self.STOP
        elif due and utils.rank() == 0:  # the clocks of others differ
            action = self.SAVE
        if utils.world_size() == 1:
            return action
        previous, self._agreement = self._agreement, utils.start_max(action)
        return previous() if previous else 0


# ------------------------------------------------------------------------------ loading processes


def ignore_signals_in_worker(worker: int) -> None:
    """Keep a loading process alive during a save when its process group receives a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def use_forked_workers() -> None:
    """Start loading processes by fork on Linux, also on Python 3.14, whose default is forkserver.

    Forked processes share the memory of the data set, and end when this process is killed.
    """
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)


def kill_workers() -> None:
    """Kill the remaining loading processes: they ignore SIGTERM for a while, and save nothing."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch would report them as killed
    for child in multiprocessing.active_children():
        child.kill()
