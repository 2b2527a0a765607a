"""Stop requests and checkpoint intervals."""

import multiprocessing
import os
import signal
import sys

import pytest

from internals import preemption
from internals.errors import RunError, StopRequested
from internals.preemption import CheckpointTimer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def no_request(monkeypatch):
    """Install the signal handlers of a training; restore the previous ones afterwards."""
    numbers = [getattr(signal, name) for name in preemption.STOP_SIGNALS]
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(preemption._StopRequest, "signal_name", None)
    preemption.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def no_check() -> None:
    pass


def timer_of(saves: list, every_steps: int | None = None, minutes: float = 10) -> CheckpointTimer:
    return CheckpointTimer(every_steps, minutes, lambda **kwargs: saves.append(kwargs))


@pytest.mark.parametrize("name", preemption.STOP_SIGNALS)
def test_signal_saves_and_stops_after_step(name, capfd):
    saves = []
    timer = timer_of(saves)
    timer.after_step(1, no_check)
    preemption.raise_if_stop_requested()
    os.kill(os.getpid(), getattr(signal, name))
    assert f"{name}: stopping after this step" in capfd.readouterr().err
    assert not saves
    with pytest.raises(StopRequested):
        timer.after_step(2, no_check)
    assert len(saves) == 1
    with pytest.raises(StopRequested):
        preemption.raise_if_stop_requested()


def test_second_interrupt_ends_immediately():
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.stop_requested()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_ignored_hangup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    preemption.install_signal_handlers()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not preemption.stop_requested()


def test_checkpoints_are_due_by_steps_and_time(monkeypatch):
    saves, now = [], [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    timer = timer_of(saves, every_steps=4, minutes=1)
    saved_after = []
    for step in range(1, 11):
        now[0] += 25
        if step == 9:
            timer.save(best=True)  # the save after an epoch
        before = len(saves)
        timer.after_step(step, no_check)
        if len(saves) > before:
            saved_after.append(step)
    # after 75 s, at step 4, 75 s later, at step 8; the save after the epoch restarts the minute
    assert saved_after == [3, 4, 7, 8]
    assert saves == [{}, {}, {}, {}, {"best": True}]


def test_checkpoint_interval_in_minutes_only():
    saves = []
    timer = timer_of(saves)
    for step in range(1, 100):
        timer.after_step(step, no_check)
    assert not saves


def test_seconds_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])

    def write() -> None:
        now[0] += 2.5

    timer = CheckpointTimer(1, 10, write)
    timer.after_step(1, no_check)
    timer.after_step(2, no_check)
    assert timer.seconds_saving == 5


def test_state_that_fails_check_is_not_saved():
    saves = []

    def check() -> None:
        raise RunError("the loss is not finite")

    timer = timer_of(saves, every_steps=2)
    timer.after_step(1, check)  # not due, so not checked
    with pytest.raises(RunError):
        timer.after_step(2, check)
    assert not saves


def test_signal_during_save_saves_once():
    saves = []

    def write() -> None:
        saves.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        CheckpointTimer(1, 10, write).after_step(1, no_check)
    assert len(saves) == 1


def test_stop_request_is_shared_by_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(preemption.LAUNCH_FOLDER_VARIABLE, str(tmp_path))
    assert not preemption.stop_requested()
    (tmp_path / "stop").write_text("SIGUSR1")
    assert preemption.stop_requested()
    assert "SIGUSR1: stopping after this step" in capsys.readouterr().out
    assert preemption.stop_requested()
    assert (tmp_path / "asked").read_text() == "SIGUSR1"  # for the processes on other machines


def test_process_without_launcher_ends(monkeypatch):
    saves = []
    timer = timer_of(saves, every_steps=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    timer.after_step(1, no_check)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(RuntimeError, match="the launcher of this process has exited"):
        timer.after_step(2, no_check)
    assert len(saves) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot fork safely")
def test_workers_are_forked():
    before = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("forkserver", force=True)
        preemption.use_forked_workers()
        assert multiprocessing.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)
