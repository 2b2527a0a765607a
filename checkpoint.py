"""What survives a crash: checkpoints of plain types, written whole or not at all.

`checkpoint_00001200.pth` holds the state after 1,200 steps. `checkpoint.pth` is a second name of
the newest and `model_best.pth` of the best one, which no number of later ones pushes out. A file of
torch.save is a zip archive with a CRC-32 of each tensor; `torch.load` does not look at them, `load`
does.
"""

import os
import pickle
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import utils
from internals.errors import CheckpointError, RunError

FORMAT = 1
NEWEST, BEST = "checkpoint.pth", "model_best.pth"


# ------------------------------------------------------------------------------------ writing


def file_name(step: int) -> str:
    return f"checkpoint_{step:08}.pth"


def save(folder: Path, state: dict, keep: int = 2) -> Path:
    """Write `state` (plain types and tensors) as the newest checkpoint of `folder`.

    The keys are `model, optimizer, scaler, epoch, step, best_AP, categories, args`; `format` is
    added here. When this returns, the file has reached the disk, and of the numbered ones only the
    newest `keep` are left; whenever it is interrupted, those before are untouched. Raises
    RunError.
    """
    path = folder / file_name(state["step"])
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        utils.fault("flushed")
        os.replace(partial, path)
        _flush_folder(folder)
        utils.fault("renamed")
        _name_too(path, NEWEST)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        while error.__context__:  # torch.save turns what hinders it into a RuntimeError
            error = error.__context__
        if not isinstance(error, OSError):
            raise error from None
        raise RunError(
            f"checkpoint not saved: {path}: {error.strerror}. The ones before are intact: make "
            "room, then go on with --resume auto"
        ) from error
    # One with more steps is of a plan that was given up (--resume-anyway): it would push out
    # the new ones and be taken for the newest.
    paths = numbered(folder)
    kept = paths[paths.index(path) :][:keep]
    for old in [*(set(paths) - set(kept)), *folder.glob("checkpoint_*.partial")]:
        old.unlink(missing_ok=True)
    return path


class Writer:
    """Writes the checkpoints of a training to `folder`, of which the newest `keep` stay.

    What is written beside the training has reached the disk when `finish` returns. `waited` is how
    long the training has waited for all this, in seconds.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep, self.waited = folder, keep, 0.0
        self._path, self._thread, self._pending = None, ThreadPoolExecutor(1), None

    def begin(self, state: dict) -> None:
        """`save` in another thread, while nothing changes the tensors of `state`."""
        self._submit(save, self.folder, state, self.keep)
        self._path = self.folder / file_name(state["step"])

    def amend(self, changes: dict, best: bool) -> None:
        """Write the last checkpoint again with some entries changed, as the best one too if so.

        In another thread, from the file, so that the weights may change meanwhile.
        """
        self._submit(_amend, self._path, changes, self.keep, best)

    def finish(self) -> None:
        """Wait until all has reached the disk. Raises RunError."""
        begin, pending, self._pending = time.perf_counter(), self._pending, None
        if pending:
            pending.result()
        self.waited += time.perf_counter() - begin

    def _submit(self, *work) -> None:
        self.finish()
        self._pending = self._thread.submit(*work)


def _amend(path: Path, changes: dict, keep: int, best: bool) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    save(path.parent, {**state, **changes}, keep)
    if best:
        save_best(path)


def save_best(path: Path) -> None:
    """Make the checkpoint at `path` the best one too, without writing its bytes again."""
    _name_too(path, BEST)


def _name_too(path: Path, name: str) -> None:
    """Give the file at `path` a second name in its folder, in place of what has that name."""
    partial = path.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, partial)
    os.replace(partial, path.with_name(name))


def _flush_folder(folder: Path) -> None:
    """Bring a change of names to the disk, on systems where that is a thing to do."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ------------------------------------------------------------------------------------ reading


def numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, the one with the most steps first."""
    found = [(re.fullmatch(r"checkpoint_(\d+)\.pth", p.name), p) for p in folder.glob("*.pth")]
    return [path for _, path in sorted([(int(m[1]), p) for m, p in found if m], reverse=True)]


def present(folder: Path) -> list[Path]:
    """Every checkpoint that a run may go on from, the best to try first."""
    paths, newest = numbered(folder), folder / NEWEST
    if newest.is_file() and not any(newest.samefile(path) for path in paths):
        paths.append(newest)
    return paths


def newest(folder: Path) -> tuple[Path, dict, list[str]] | None:
    """The newest checkpoint of `folder` that is whole: its path, its state, and what is said of
    newer ones that are not; None where there is none at all.

    Newer ones that are not whole get ".damaged" added to their names. Raises CheckpointError if
    there are checkpoints but not one is whole, which is never the same as having none.
    """
    passed_over = []
    for path in present(folder):
        try:
            state = load(path)
        except CheckpointError as error:
            passed_over.append((path, str(error)))
            continue
        for damaged, _ in passed_over:
            damaged.rename(damaged.with_name(damaged.name + ".damaged"))
        return path, state, [message for _, message in passed_over]
    if passed_over:
        tried = "\n".join(f"  {message}" for _, message in passed_over)
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be read; tried\n{tried}\nGo on from a copy "
            "of one with --resume FILE, or start anew in another --output-dir"
        )
    return None


def load(path: Path) -> dict:
    """Read a checkpoint written by `save`, to the CPU; raises CheckpointError."""
    state = load_weights_file(path)
    missing = {"format", "model", "optimizer", "epoch", "step", "categories", "args"} - state.keys()
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint of this recipe (it lacks {', '.join(sorted(missing))}): "
            "to start from its weights use --weights instead of --resume"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, this version reads format {FORMAT}: "
            "continue with the version that wrote it"
        )
    return state


def load_weights_file(path: Path) -> dict:
    """Read any file of `torch.save` that holds a dict of plain types; raises CheckpointError.

    Nothing in the file is executed: it is read with `weights_only=True`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to execute the file
        raise CheckpointError(
            f"{path} cannot be read: it is not a file of torch.save, or it holds more than tensors "
            "and plain types, which is refused because loading it could run code"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damage can make a zip archive fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it is damaged: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def _verify(path: Path) -> None:
    """Compare every part of a zip archive with its checksum; older formats of torch have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")
