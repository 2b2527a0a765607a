"""Save, verify, find, load and resume checkpoints; a crash never leaves an incomplete one.

`checkpoint_00001200.pth` holds the state after 1,200 steps. `checkpoint.pth` is a hard link to the
newest checkpoint, `model_best.pth` to the best one, which is never pruned. A file of torch.save is
a zip archive with a CRC-32 of each tensor; `torch.load` ignores these, `load` verifies them.
"""

import os
import re
import shutil
from pathlib import Path

import torch

import utils
from coco_utils import CocoIndex
from internals.custom_augmentation import code_version
from internals.errors import CheckpointError, RunError, UserError
from internals.train_state import TrainState
from internals.weights import load_weights_file, search_state_dict
from models import has_trainable_norms
from samplers import TrainingPlan

FORMAT = 1
NEWEST, BEST = "checkpoint.pth", "model_best.pth"

# What must not change for a resumed run to give the weights of an uninterrupted one: arguments, and
# what `add_resume_facts` adds. What defines the model is in settings.MODEL_ARGS.
RESUME_INVARIANTS = (
    "seed",
    "global_batch",
    "keep_empty",
    "repeat_factor_threshold",
    "aspect_ratio_group_factor",
    "precision",
    "opt",
    "lr",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "bias_weight_decay",
    "clip_grad_norm",
    "sync_bn",
    "epochs",
    "lr_scheduler",
    "lr_steps",
    "lr_gamma",
    "warmup_steps",
    "ema",
    "freeze_backbone",
    "train_norm_affine",
    "augmentation_code",
    "train_data",
    "val_data",
)
# Those that determine which images an epoch has, and in which order.
SAMPLER_INVARIANTS = {
    "seed",
    "global_batch",
    "keep_empty",
    "repeat_factor_threshold",
    "aspect_ratio_group_factor",
    "train_data",
}
# The values of resume invariants that checkpoints of earlier versions lack, to compare them, too.
BEFORE = {
    "bias_weight_decay": None,
    "train_norm_affine": False,
    "repeat_factor_threshold": None,
    "augmentation_code": None,
}


# ------------------------------------------------------------------------------------- saving


def save(folder: Path, state: dict, keep: int = 2, best: bool = False) -> Path:
    """Write `state` (plain types and tensors) as the newest checkpoint of `folder`.

    On return the file has reached the disk, and only the newest `keep` numbered checkpoints are
    left. An interruption at any point leaves the checkpoints before intact.

    Args:
        folder: The output folder.
        state: Of `TrainState.state_dict`, with `categories` and `args`; `format` is added here.
        keep: The number of numbered checkpoints to keep.
        best: Whether to link it as the best one, too.

    Returns:
        The path of the checkpoint.

    Raises:
        RunError: The checkpoint cannot be written, for example because the disk is full.
    """
    path = folder / f"checkpoint_{state['step']:08}.pth"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        # Before the rename, as a run that resumes the checkpoint would not link it again.
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
        remedy = "Correct this, then continue with --resume auto"
        if list_numbered(folder):
            remedy = f"The checkpoints before are intact. {remedy}"
        raise RunError(f"{path}: checkpoint not saved: {error.strerror}. {remedy}") from error
    # One with more steps is left from before --resume-anyway restarted an epoch: without deletion
    # it would count as the newest.
    paths = list_numbered(folder)
    kept = paths[paths.index(path) :][:keep]
    leftover = [*folder.glob("checkpoint*.partial"), *folder.glob(f"{BEST}.partial")]
    for old in [*(set(paths) - set(kept)), *leftover]:
        old.unlink(missing_ok=True)
    return path


def _hard_link(path: Path, name: str) -> None:
    """Link `path` as `name` in its folder, replacing an existing file."""
    partial = path.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, partial)
    os.replace(partial, path.with_name(name))


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; Windows has no such call."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# ------------------------------------------------------------------------------------ loading


def list_numbered(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, the one with the most steps first."""
    found = [(re.fullmatch(r"checkpoint_(\d+)\.pth", p.name), p) for p in folder.glob("*.pth")]
    return [path for _, path in sorted([(int(m[1]), p) for m, p in found if m], reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return every checkpoint that a run may resume from, in the order in which to try them."""
    paths, newest = list_numbered(folder), folder / NEWEST
    if newest.is_file() and not any(newest.samefile(path) for path in paths):
        paths.append(newest)
    return paths


def load_newest(folder: Path) -> tuple[Path, dict, list[str]] | None:
    """Load the newest intact checkpoint of a folder.

    Damaged ones that are newer get ".damaged" appended to their names.

    Returns:
        Its path, its content, and a message for each damaged one; None if the folder has no
        checkpoints at all.

    Raises:
        CheckpointError: There are checkpoints, but none is intact.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            state = load(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        for bad_path, _ in damaged:
            bad_path.rename(bad_path.with_name(bad_path.name + ".damaged"))
        return path, state, [message for _, message in damaged]
    if damaged:
        tried = "\n".join(f"  {message}" for _, message in damaged)
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be read:\n{tried}\nResume from {BEST} or a "
            "copy of one with --resume FILE, or start a new training in another --output-dir"
        )
    return None


def load(path: Path) -> dict:
    """Load a checkpoint of `save` to the CPU.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or is not a checkpoint.
    """
    required = {"format", "model", "optimizer", "epoch", "step", "categories", "args"}
    try:
        state = load_weights_file(path)
    except CheckpointError:
        state = load_weights_file(path, foreign=True)
        if required <= state.keys() or not search_state_dict(state):
            raise
    if missing := required - state.keys():
        remedy = "use a file that train.py saved in --output-dir"
        if search_state_dict(state):
            remedy = f"to fine-tune its weights use train.py --weights {path}, without --resume"
        raise CheckpointError(
            f"{path} is not a checkpoint of this recipe (it has no {', '.join(sorted(missing))}): "
            f"{remedy}"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, but this version reads format {FORMAT}: use "
            "the version that wrote it"
        )
    return state


# ----------------------------------------------------------------------------------- resuming


def resolve_resume(
    output_dir: Path, resume: str | None, test_only: bool
) -> tuple[str | None, dict | None]:
    """Load the checkpoint to resume, and make sure that no other run is overwritten.

    Args:
        output_dir: The output folder of the run.
        resume: The value of --resume: None, "auto" or a path.
        test_only: Whether the run only evaluates.

    Returns:
        The path and the content of the checkpoint, or None and None for a new training.

    Raises:
        UserError: `output_dir` has checkpoints of a run that this one would overwrite, or there is
            nothing to evaluate.
        CheckpointError: No checkpoint can be read.
    """
    existing = list_checkpoints(output_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
    if resume == "auto" or (restarted and existing and not test_only):
        return _resume_newest(output_dir, test_only)
    if resume and Path(resume).is_dir():
        raise CheckpointError(f"--resume {resume} is a folder: use {Path(resume) / NEWEST}")
    own = bool(resume) and Path(resume).resolve().parent == output_dir.resolve()
    if existing and test_only and not own:
        raise UserError(
            f"{existing[0]} belongs to another training, whose detections and report this "
            "evaluation would overwrite: choose another --output-dir"
        )
    if existing and not own:
        raise UserError(
            f"{existing[0]} belongs to another training, which this one would overwrite: continue "
            "it with --resume auto, or choose another --output-dir"
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
            f"{resume} has {saved['step']} steps, and resuming from it would prune {later[0]}, "
            "which has more: use --resume auto, or choose another --output-dir"
        )
    return resume, saved


def _resume_newest(output_dir: Path, test_only: bool) -> tuple[str | None, dict | None]:
    found = load_newest(output_dir)
    if found is None and test_only:
        raise UserError(f"--resume auto: no checkpoint in {output_dir} to evaluate")
    if found is None:
        utils.log_field("resume", f"no checkpoint in {output_dir} yet, new training")
        return None, None
    path, saved, skipped = found
    for message in skipped:
        utils.log_field("resume", f"skipped a damaged checkpoint: {message}")
    return str(path), saved


def add_resume_facts(
    args: dict, plan: TrainingPlan, amp_dtype: torch.dtype | None, indexes: dict[str, CocoIndex]
) -> dict:
    """Return the arguments (plain types) and what else is compared when a run is resumed."""
    return {
        **args,
        "steps_per_epoch": len(plan),
        "global_batch": plan.global_batch,
        "world_size": utils.world_size(),
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."),
        "augmentation_code": code_version(args["data_augmentation"]),
        **{f"{split}_data": index.fingerprint() for split, index in indexes.items()},
    }


def restore(state: TrainState, saved: dict, run_args: dict, path: str, resume_anyway: bool) -> None:
    """Restore optimizer, scaler, epoch, step and best AP from a checkpoint.

    Args:
        state: At the first step of a training; its model has the weights already.
        saved: The content of the checkpoint.
        run_args: Of `add_resume_facts`, for this run.
        path: The path of the checkpoint, for messages.
        resume_anyway: Whether to resume although a resume invariant has changed.

    Raises:
        UserError: A resume invariant has changed, or the optimizer's state is for other parameters.
    """
    before = {**BEFORE, **saved["args"]}
    changed = [k for k in RESUME_INVARIANTS if k in before and before[k] != run_args[k]]
    described = ", ".join(_describe_change(k, before[k], run_args[k]) for k in changed)
    if changed and not resume_anyway:
        raise UserError(
            f"{path} was trained with {described}: use the same settings, add --resume-anyway to "
            "resume nevertheless, or choose another --output-dir for a new training"
        )
    if changed:
        utils.log_field("resume", f"--resume-anyway: so far trained with {described}")
    try:
        state.load_state_dict(saved)
    except ValueError as error:  # the optimizer has other groups, or groups of other sizes
        raise UserError(
            f"{path} cannot be resumed with other trained or separately decayed parameters, not "
            f"even with --resume-anyway: start from its weights, --weights {path}, in another "
            "--output-dir"
        ) from error
    if SAMPLER_INVARIANTS & set(changed):
        utils.log_field("resume", f"epoch {state.epoch} restarts, as its batches have changed")
        state.step = state.epoch * run_args["steps_per_epoch"]
    elif before["world_size"] != utils.world_size():
        norms = has_trainable_norms(state.model)
        why = "as norms see the images of a process only" if norms else "by rounding"
        utils.log_field(
            "resume",
            f"{utils.world_size()} processes instead of {before['world_size']}: same batches, but "
            f"the weights will differ, {why}",
        )


def _describe_change(name: str, before: object, now: object) -> str:
    """Describe a changed invariant, such as "--lr 0.1 (now 0.2)" or "other training data"."""
    if name in ("train_data", "val_data"):
        return "other training data" if name == "train_data" else "other validation data"
    if name in ("global_batch", "precision", "augmentation_code"):
        return f"{name.replace('_', ' ')} {before} (now {now})"
    before, now = ("not set" if value is None else value for value in (before, now))
    return f"--{name.replace('_', '-')} {before} (now {now})"
