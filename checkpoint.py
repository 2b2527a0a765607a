"""What survives a crash: checkpoints of plain types, written whole or not at all.

`checkpoint_00001200.pth` holds the state after 1,200 steps. `checkpoint.pth` is a second name of
the newest and `model_best.pth` of the best one, which no number of later ones prunes. A file of
torch.save is a zip archive with a CRC-32 of each tensor; `torch.load` does not look at them, `load`
does.
"""

import os
import re
import shutil
from pathlib import Path

import torch

import utils
from coco_utils import CocoIndex
from internals.errors import CheckpointError, RunError, UserError
from internals.train_state import TrainState
from internals.weights import load_weights_file
from samplers import TrainingPlan

FORMAT = 1
NEWEST, BEST = "checkpoint.pth", "model_best.pth"

# What has to be as it was for a resumed run to end as an undisturbed one: arguments, and facts that
# `add_resume_facts` adds. What shapes the model is in arguments.MODEL_ARGS.
RESUME_INVARIANTS = (
    "seed",
    "global_batch",
    "keep_empty",
    "aspect_ratio_group_factor",
    "precision",
    "opt",
    "lr",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "clip_grad_norm",
    "sync_bn",
    "epochs",
    "lr_scheduler",
    "lr_steps",
    "lr_gamma",
    "warmup_steps",
    "ema",
    "freeze_backbone",
    "train_data",
    "val_data",
)
# Those of them that decide which images an epoch has, and in which order.
SAMPLER_INVARIANTS = {
    "seed",
    "global_batch",
    "keep_empty",
    "aspect_ratio_group_factor",
    "train_data",
}


# ------------------------------------------------------------------------------------ writing


def save(folder: Path, state: dict, keep: int = 2, best: bool = False) -> Path:
    """Write `state` (plain types and tensors) as the newest checkpoint of `folder`.

    When this returns, the file has reached the disk, and of the numbered ones only the newest
    `keep` are left; whenever it is interrupted, those before are untouched.

    Args:
        folder: where to.
        state: of `TrainState.state_dict`, with `categories` and `args`; `format` is added here.
        keep: how many numbered checkpoints to keep.
        best: whether to give it the name of the best one, too.

    Raises:
        RunError: the disk is full, for example.
    """
    path = folder / f"checkpoint_{state['step']:08}.pth"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        # Before the checkpoint counts as evaluated: a run that resumes it would not name it again.
        if best:
            _hard_link(partial, BEST)
        os.replace(partial, path)
        _flush_folder(folder)
        _hard_link(path, NEWEST)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        while error.__context__:  # torch.save turns an OSError into a RuntimeError
            error = error.__context__
        if not isinstance(error, OSError):
            raise error from None
        raise RunError(
            f"checkpoint not saved: {path}: {error.strerror}. The ones before are intact: make "
            "room, then go on with --resume auto"
        ) from error
    # One with more steps is left from before --resume-anyway restarted an epoch: it would be taken
    # for the newest.
    paths = list_numbered(folder)
    kept = paths[paths.index(path) :][:keep]
    leftover = [*folder.glob("checkpoint*.partial"), *folder.glob(f"{BEST}.partial")]
    for old in [*(set(paths) - set(kept)), *leftover]:
        old.unlink(missing_ok=True)
    return path


def _hard_link(path: Path, name: str) -> None:
    """Give the file at `path` a second name in its folder, in place of what has that name."""
    partial = path.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, partial)
    os.replace(partial, path.with_name(name))


def _flush_folder(folder: Path) -> None:
    """Bring a change of names to the disk; Windows has no such call."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ------------------------------------------------------------------------------------ reading


def list_numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, the one with the most steps first."""
    found = [(re.fullmatch(r"checkpoint_(\d+)\.pth", p.name), p) for p in folder.glob("*.pth")]
    return [path for _, path in sorted([(int(m[1]), p) for m, p in found if m], reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint that a run may go on from, the best to try first."""
    paths, newest = list_numbered(folder), folder / NEWEST
    if newest.is_file() and not any(newest.samefile(path) for path in paths):
        paths.append(newest)
    return paths


def load_newest(folder: Path) -> tuple[Path, dict, list[str]] | None:
    """The newest checkpoint of `folder` that is whole: its path, its state, and what is said of
    newer ones that are not; None where there is none at all.

    Newer ones that are not whole get ".damaged" added to their names. Raises CheckpointError if
    there are checkpoints but not one is whole, which is never the same as having none.
    """
    passed_over = []
    for path in list_checkpoints(folder):
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
            "of one with --resume FILE, or start a new training in another --output-dir"
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


# ----------------------------------------------------------------------------------- resuming


def resolve_resume(
    output_dir: Path, resume: str | None, test_only: bool
) -> tuple[str | None, dict | None]:
    """Decide which checkpoint a run goes on from; refuse to overwrite another run's.

    Args:
        output_dir: where the run writes.
        resume: --resume: None, "auto" or a path.
        test_only: whether the run only evaluates.

    Returns:
        The path and the content of the checkpoint, or None and None for a new training.

    Raises:
        UserError: `output_dir` holds a run that this one would overwrite, or there is nothing to
            evaluate.
        CheckpointError: no checkpoint can be read.
    """
    existing = list_checkpoints(output_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, by itself
    if resume == "auto" or (restarted and existing and not test_only):
        return _resume_newest(output_dir, test_only)
    own = resume and Path(resume).resolve().parent == output_dir.resolve()
    if existing and test_only and not own:
        raise UserError(
            f"{existing[0]} is there from another training, whose detections and report this "
            "evaluation would overwrite: choose another --output-dir"
        )
    if existing and not test_only and not resume:
        raise UserError(
            f"{existing[0]} is there from another training, which this one would overwrite: go on "
            "with --resume auto, or choose another --output-dir"
        )
    if not resume:
        return None, None
    try:
        saved = load(Path(resume))
    except CheckpointError as error:
        raise CheckpointError(f"--resume {error}") from None
    later = [p for p in list_numbered(output_dir) if int(p.stem.split("_")[1]) > saved["step"]]
    if later and not test_only:
        raise UserError(
            f"{resume} has {saved['step']} steps, but {later[0]} has more, which going on "
            "from here would prune: use --resume auto, or choose another --output-dir"
        )
    return resume, saved


def _resume_newest(output_dir: Path, test_only: bool) -> tuple[str | None, dict | None]:
    found = load_newest(output_dir)
    if found is None and test_only:
        raise UserError(f"--resume auto: no checkpoint in {output_dir} to evaluate")
    if found is None:
        utils.log(f"--resume auto: no checkpoint in {output_dir} yet, a new training")
        return None, None
    path, saved, skipped = found
    for message in skipped:
        utils.log(f"passed over: {message}")
    return str(path), saved


def add_resume_facts(
    args: dict, plan: TrainingPlan, amp_dtype: torch.dtype | None, indexes: dict[str, CocoIndex]
) -> dict:
    """The arguments (plain types), and what else is compared when a run is resumed."""
    return {
        **args,
        "steps_per_epoch": len(plan),
        "global_batch": plan.global_batch,
        "world_size": utils.world_size(),
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."),
        **{f"{split}_data": index.fingerprint() for split, index in indexes.items()},
    }


def restore(state: TrainState, saved: dict, run_args: dict, path: str, resume_anyway: bool) -> None:
    """Go on from a checkpoint: bring `state` to where `saved` left off.

    Args:
        state: of a training before its first step, whose model has the weights already.
        saved: the content of the checkpoint.
        run_args: from `add_resume_facts`, for this run.
        path: of the checkpoint, for messages.
        resume_anyway: whether to go on although something else than before is asked for.

    Raises:
        UserError: a resume invariant has changed.
    """
    before = saved["args"]
    changed = [k for k in RESUME_INVARIANTS if k in before and before[k] != run_args[k]]
    described = ", ".join(_describe_change(k, before[k], run_args[k]) for k in changed)
    if changed and not resume_anyway:
        raise UserError(
            f"{path} was trained with {described}. Use what it was trained with, say "
            "--resume-anyway to go on regardless, or choose another --output-dir for a new training"
        )
    if changed:
        utils.log(f"--resume-anyway: trained with {described}")
    state.load_state_dict(saved)
    if SAMPLER_INVARIANTS & set(changed):
        utils.log(f"epoch {state.epoch} restarts, because its plan is another one")
        state.step = state.epoch * run_args["steps_per_epoch"]
    elif before["world_size"] != utils.world_size():
        utils.log(
            f"{utils.world_size()} processes instead of {before['world_size']}: every planned "
            "image is seen once, as before, but the weights are not bitwise the same"
        )


def _describe_change(name: str, before: object, now: object) -> str:
    """A changed invariant in words: "--lr 0.1 (now 0.2)", "other training data"."""
    if name in ("train_data", "val_data"):
        return "other training data" if name == "train_data" else "other validation data"
    if name in ("global_batch", "precision"):
        return f"{name.replace('_', ' ')} {before} (now {now})"
    return f"--{name.replace('_', '-')} {before} (now {now})"
