"""What survives a crash: checkpoints of plain types, written whole or not at all."""

import os
import pickle
from pathlib import Path

import torch

FORMAT = 1
NEWEST, BEST = "checkpoint.pth", "model_best.pth"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names it and the way on."""


def save(path: Path, state: dict) -> None:
    """Write `state` (plain types and tensors) to `path`; a crash leaves the old file or the new.

    The keys are `model, optimizer, scaler, epoch, step, best_AP, categories, args`; `format` is
    added here. Raises OSError where the disk is full or not writable.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_best(output_dir: Path) -> None:
    """Make the newest checkpoint the best one too, without writing its bytes again."""
    partial = output_dir / (BEST + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(output_dir / NEWEST, partial)
    except OSError:  # a file system without hard links
        partial.write_bytes((output_dir / NEWEST).read_bytes())
    os.replace(partial, output_dir / BEST)


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to execute the file
        raise CheckpointError(
            f"{path} cannot be read: it is not a file of torch.save, or it holds more than tensors "
            "and plain types, which is refused because loading it could run code"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read, it is damaged: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state
