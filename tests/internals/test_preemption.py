"""Requests to stop, and when a checkpoint is due."""

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
    """Handle signals as a training does; afterwards let this process be as it was."""
    numbers = [getattr(signal, name) for name in preemption.STOP_SIGNALS]
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(preemption._StopRequest, "signal_name", None)
    preemption.install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def nothing() -> None:
    pass


def timer_of(saves: list, every_steps: int | None = None, minutes: float = 10) -> CheckpointTimer:
    return CheckpointTimer(every_steps, minutes, lambda **kwargs: saves.append(kwargs))


@pytest.mark.parametrize("name", preemption.STOP_SIGNALS)
def test_signal_saves_and_stops_after_the_step(name, capfd):
    saves = []
    timer = timer_of(saves)
    timer.after_step(1, nothing)
    preemption.raise_if_stop_requested()
    os.kill(os.getpid(), getattr(signal, name))
    assert f"{name}: stopping after this step" in capfd.readouterr().err
    assert not saves
    with pytest.raises(StopRequested):
        timer.after_step(2, nothing)
    assert len(saves) == 1
    with pytest.raises(StopRequested):
        preemption.raise_if_stop_requested()


def test_second_interrupt_ends_at_once():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        raised = []
        patch.setattr(signal, "raise_signal", raised.append)
        os.kill(os.getpid(), signal.SIGINT)
    assert raised == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_checkpoints_are_due_by_steps_and_by_the_clock(monkeypatch):
    saves, now = [], [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    timer = timer_of(saves, every_steps=4, minutes=1)
    saved_after = []
    for step in range(1, 11):
        now[0] += 25
        if step == 9:
            timer.save(best=True)  # as after an epoch
        before = len(saves)
        timer.after_step(step, nothing)
        if len(saves) > before:
            saved_after.append(step)
    # after 75 s, step 4, 75 s later, step 8; then 60 s are not over since the epoch's
    assert saved_after == [3, 4, 7, 8]
    assert saves == [{}, {}, {}, {}, {"best": True}]


def test_without_a_number_of_steps_the_clock_alone_decides():
    saves = []
    timer = timer_of(saves)
    for step in range(1, 100):
        timer.after_step(step, nothing)
    assert not saves


def test_time_of_saving_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])

    def write() -> None:
        now[0] += 2.5

    timer = CheckpointTimer(1, 10, write)
    timer.after_step(1, nothing)
    timer.after_step(2, nothing)
    assert timer.seconds_saving == 5


def test_what_the_check_refuses_is_not_saved():
    saves = []

    def check() -> None:
        raise RunError("the loss is not finite")

    timer = timer_of(saves, every_steps=2)
    timer.after_step(1, check)  # not due, so nothing is checked
    with pytest.raises(RunError):
        timer.after_step(2, check)
    assert not saves


def test_signal_during_a_save_causes_no_second_one():
    saves = []

    def write() -> None:
        saves.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        CheckpointTimer(1, 10, write).after_step(1, nothing)
    assert len(saves) == 1


def test_processes_of_a_launcher_share_a_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(preemption.LAUNCH_FOLDER_VARIABLE, str(tmp_path))
    assert not preemption.stop_requested()
    (tmp_path / "stop").write_text("SIGUSR1")
    assert preemption.stop_requested()
    assert "SIGUSR1: stopping after this step" in capsys.readouterr().out
    assert preemption.stop_requested()
    assert (tmp_path / "asked").read_text() == "SIGUSR1"  # for processes of other machines


def test_process_without_its_launcher_ends(monkeypatch):
    saves = []
    timer = timer_of(saves, every_steps=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    timer.after_step(1, nothing)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(RuntimeError, match="the launcher of this process is gone"):
        timer.after_step(2, nothing)
    assert len(saves) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="others cannot fork safely")
def test_loading_processes_are_forked_whatever_the_default_is():
    before = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("forkserver", force=True)
        preemption.use_forked_workers()
        assert multiprocessing.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)
