"""Being asked to stop, by a signal or by the launcher, and agreeing on it between two steps.

A signal is only noted; between two steps all processes agree to save and to stop. Under
`start_scripts/launch.py` processes tell each other by files: `stop`, from the launcher to all;
`asked`, from a process that got a signal itself to the others; `exit`, the exit code, from the
first process to end to the launcher (see `failures.exit_with_code`).
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import utils
from internals.errors import StopRequested

# The launcher hands on what it is sent as a file in this folder, because torchrun would kill the
# processes after 30 seconds (`--shutdown-timeout` is newer than the torch that is required).
LAUNCH_FOLDER_VARIABLE = "FASTER_RCNN_LAUNCH"
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is Slurm's usual warning


class _StopRequest:
    """What this process knows of a request to stop."""

    signal_name: str | None = None
    grace_seconds = 60  # until a process that torchrun ends gives up waiting for its step to end


def install_signal_handlers() -> None:
    """From now on note signals instead of dying of them."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _note_signal)


def restore_signal_handlers() -> None:
    """Undo `install_signal_handlers`: there is nothing left to save."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _note_signal(number: int, frame: object) -> None:
    if _StopRequest.signal_name is None:
        _StopRequest.signal_name = signal.Signals(number).name
        if utils.rank() == 0:  # not by print, which may be what the signal interrupted
            os.write(2, f"\n{_StopRequest.signal_name}: stopping after this step\n".encode())
    elif number == signal.SIGINT:
        restore_signal_handlers()
        signal.raise_signal(number)
    # Under torchrun a SIGTERM may also mean that another process has failed. Where no step ends, as
    # in one that hangs, nothing else would end this process before torchrun kills it.
    if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ and os.name == "posix":
        signal.alarm(_StopRequest.grace_seconds)


def launch_file(name: str) -> Path | None:
    """A file by which the launcher and its processes tell each other something."""
    folder = os.environ.get(LAUNCH_FOLDER_VARIABLE)
    return Path(folder) / name if folder else None


def stop_requested() -> bool:
    """Whether this process knows of a request to stop; others may not know yet.

    Those of one launcher do: what one was asked, it leaves for the others, which may be far from
    the end of an evaluation.
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
    """Raise StopRequested in every process if one was asked to stop; all have to call it."""
    if utils.all_reduce(torch.tensor(int(stop_requested())), "max"):
        raise StopRequested


class CheckpointTimer:
    """Decides between steps, for all processes alike, when to save and when to stop.

    `seconds_saving` is how long the training has waited for its checkpoints.
    """

    SAVE, STOP = 1, 2

    def __init__(self, every_steps: int | None, minutes: float, write: Callable[..., None]):
        """Let `write()` be called every `every_steps` steps, and `minutes` after the last save."""
        self.every_steps, self.interval, self.write = every_steps, 60 * minutes, write
        self.last_save = self.last_step = time.monotonic()
        self.seconds_saving = 0.0
        self._launcher = os.getppid()

    def save(self, **kwargs) -> None:
        """Save now, in the time that it takes."""
        if os.name == "posix":
            signal.alarm(0)
        begin = time.monotonic()
        self.write(**kwargs)
        self.last_save = time.monotonic()
        self.seconds_saving += self.last_save - begin

    def after_step(self, step: int, check: Callable[[], None]) -> None:
        """Save if it is time to and `check()` raises nothing.

        Raises:
            StopRequested: a process was asked to stop, and everything is saved.
        """
        now = time.monotonic()
        _StopRequest.grace_seconds = 3 + 3 * round(now - self.last_step)
        due = now - self.last_save >= self.interval
        due = due or (bool(self.every_steps) and step % self.every_steps == 0)
        action = self._sync_action(due)
        if action:
            check()
            self.save()
        if action == self.STOP:
            raise StopRequested
        if action:
            raise_if_stop_requested()  # a request during the save needs no second one
        self.last_step = time.monotonic()

    def _sync_action(self, due: bool) -> int:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._launcher:
            raise RuntimeError("the launcher of this process is gone")
        action = 0
        if stop_requested():
            action = self.STOP
        elif due and utils.rank() == 0:  # whose clock decides
            action = self.SAVE
        return int(utils.all_reduce(torch.tensor(action), "max"))


# ------------------------------------------------------------------------------ loading processes


def ignore_signals_in_worker(worker: int) -> None:
    """For a loading process: outlive signals sent to a whole group, for as long as a save takes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def use_forked_workers() -> None:
    """Let loading processes be copies of this one, on Linux.

    Copies share the memory of its data set, and end when it is killed. Without this, Python 3.14
    and later start them from a server of their own, where they do neither.
    """
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)


def kill_workers() -> None:
    """End the loading processes that are left: they hold nothing, and outlive a polite request."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch would report them as killed
    for child in multiprocessing.active_children():
        child.kill()
