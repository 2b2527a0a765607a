"""Messages and exit codes of commands that end with an error."""

import errno
import os
import signal

import pytest
import torch

from internals import failures, preemption
from internals.errors import (
    CheckpointError,
    DataError,
    ImageError,
    RunError,
    StopRequested,
    UnexpectedImageError,
    UserError,
)


@pytest.fixture(autouse=True)
def signal_handlers(monkeypatch):
    """Restore the signal handlers, which the end of a command sets to the default."""
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    names = [name for name in preemption.STOP_SIGNALS if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


IN_WORKER = "in DataLoader worker process 0.\nOriginal Traceback ..."


def end_with(error: BaseException) -> int:
    """Return the exit code of a command that raises `error`."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        failures.run_command(main)
    return caught.value.code


def test_command_that_returns_does_not_exit():
    failures.run_command(lambda: None)


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (UserError("a.json: wrong"), 2, "a.json: wrong"),
        (DataError("b.png: wrong"), 2, "b.png: wrong"),
        (CheckpointError("c.pth: wrong"), 2, "c.pth: wrong"),
        (RunError("the loss is NaN"), 1, "the loss is NaN"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (OSError(errno.EACCES, "Permission denied", "d.txt"), 1, "d.txt cannot be read or written"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "left on device: free some space"),
        (OSError(errno.ENOSPC, "No space left on device", "e.pth"), 1, "e.pth cannot be written"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory: lower --batch-size"),
        (OSError("[Errno 24] Too many open files"), 1, "ulimit -n 65536"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), 1, "--shm-size"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1, "--shm-size"),
        (MemoryError(f"Caught MemoryError {IN_WORKER}"), 1, "loading process is out of memory"),
        (ImageError("f.png: out of memory"), 1, "f.png: out of memory"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "--shm-size"),
    ],
)
def test_known_errors_have_no_traceback(capsys, error, exit_code, message):
    assert end_with(error) == exit_code
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: error: ")
    assert message in errors
    assert "Traceback" not in errors


def test_unknown_errors_have_traceback(capsys):
    assert end_with(OverflowError("too much")) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith("train.py: error: OverflowError: too much\n")


@pytest.mark.parametrize("kind", [KeyError, EOFError, ConnectionResetError, ValueError])
def test_exception_in_worker_is_not_a_killed_worker(capsys, kind):
    """PyTorch raises an exception of the same type, with the traceback as its message."""
    assert end_with(kind(f"Caught {kind.__name__} {IN_WORKER}")) == 1
    errors = capsys.readouterr().err
    assert "was killed" not in errors
    assert kind.__name__ in errors


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("bbox"), UnexpectedImageError, "a.png (id 5) cannot be loaded: KeyError: 'bbox'"),
        (EOFError("x"), UnexpectedImageError, "a.png (id 5) cannot be loaded: EOFError: x"),
        (MemoryError(), ImageError, "a.png (id 5): out of memory: lower --workers"),
        (RuntimeError("cannot allocate memory"), ImageError, "a.png (id 5): out of memory"),
        (OSError(errno.EMFILE, "Too many open files"), ImageError, "ulimit -n 65536"),
        (UserError("wrong"), DataError, "a.png (id 5): wrong"),
    ],
)
def test_errors_of_loading_name_the_image(error, kind, message):
    named = failures.image_error("a.png (id 5)", error)
    assert type(named) is kind
    assert message in str(named)
    assert not failures.is_out_of_memory(named)  # of the device, with the sizes of a batch


def test_stop_request_exit_code(capsys):
    assert end_with(StopRequested()) == 75
    captured = capsys.readouterr()
    assert "run the same command with --resume auto" in captured.out
    assert captured.err == ""


def test_launcher_gets_first_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv(preemption.LAUNCH_FOLDER_VARIABLE, str(tmp_path))
    assert end_with(UserError("wrong")) == 2
    assert end_with(RunError("peer is gone")) == 1
    assert (tmp_path / "exit").read_text() == "2"
    (tmp_path / "exit").unlink()
    assert end_with(StopRequested()) == 0  # otherwise torchrun would restart the process
    assert (tmp_path / "exit").read_text() == "75"


def test_exit_if_already_finished(tmp_path, monkeypatch):
    failures.exit_if_already_finished()
    monkeypatch.setenv(preemption.LAUNCH_FOLDER_VARIABLE, str(tmp_path))
    failures.exit_if_already_finished()
    for exit_code in (2, 75):
        (tmp_path / "exit").write_text(str(exit_code))
        with pytest.raises(SystemExit) as caught:
            failures.exit_if_already_finished()
        assert caught.value.code == exit_code
    (tmp_path / "exit").write_text("1")  # a failure, after which a restart is allowed
    failures.exit_if_already_finished()
    assert os.listdir(tmp_path) == []


def test_lost_connection():
    for text in (
        "[/a/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer",
        "Application timeout caused pair closure",
        "Timed out waiting 6000ms for send operation to complete",
    ):
        assert failures.is_connection_lost(RuntimeError(text))
    assert not failures.is_connection_lost(
        RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    )
    assert not failures.is_connection_lost(ValueError("timed out"))
