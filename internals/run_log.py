"""What a run logs: its setup, its steps and epochs, its end."""

import argparse
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torchvision

import utils
from internals import anchors
from internals.train_state import TrainState


def run_metadata(
    model: torch.nn.Module,
    device: torch.device,
    precision: str,
    train_loader,
    val_loader,
    categories,
) -> dict:
    """Return the command, code, hardware and data of a run, for its "start" line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": shlex.join(sys.argv),
        "commit": find_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "world_size": utils.world_size(),
        "precision": precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(train_loader.dataset) if train_loader else None,
        "val_images": len(val_loader.dataset),
        "categories": categories.to_list(),
    }


def find_commit() -> str | None:
    """Return the project's Git commit, with "-dirty" if files are changed; None without Git."""
    command = ("git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12")
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def log_model(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Log the model and the size of its images."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters) / 1e6
    trainable = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    backbone = "" if args.backbone in args.model else f", backbone {args.backbone}"
    text = f"{args.model}{backbone}, {total:.1f} M parameters, {trainable:.1f} M trainable"
    if not args.test_only:
        utils.log_field("recipe", args.recipe)
    utils.log_field("model", text)
    if not args.test_only:
        utils.log_field("", f"norms of the backbone: {describe_norms(args, model)}")
    if args.anchor_sizes:
        utils.log_field("anchors", anchors.describe(args.anchor_sizes, args.anchor_ratios))
    size = "x".join(map(str, args.fixed_size or ())) or f"{args.min_size} to {args.max_size}"
    augmentation = "" if args.test_only else f", augmentation {args.data_augmentation}"
    utils.log_field("images", f"resized to {size} pixels{augmentation}")


def log_test_checkpoint(
    args: argparse.Namespace, saved: dict | None, dtype: torch.dtype | None
) -> None:
    """Log the checkpoint that is evaluated, if any, and whether its precision was another one."""
    if not saved:
        return
    trained = saved["args"].get("precision", "float32")
    utils.log_field("checkpoint", f"{args.resume}, {saved['step']:,} steps")
    if trained != str(dtype or torch.float32).removeprefix("torch."):
        flag = "remove" if trained == "float32" else "add"
        utils.log_field("", f"trained in {trained}: for the same AP {flag} --amp")


def log_schedule(args: argparse.Namespace, base_lr: float, plan, state: TrainState) -> None:
    """Log how long and at which learning rate a model is trained, before the first step.

    Args:
        args: After `settings.resolve_defaults`.
        base_lr: The default learning rate for 16 images per step.
        plan: A `samplers.TrainingPlan`.
        state: With the epoch and step to start from.
    """
    if state.step:
        utils.log_field("resume", f"{args.resume or '--start-epoch'}, {state.step:,} steps done")
    if state.epoch >= args.epochs:
        best = args.output_dir / "model_best.pth"
        utils.log_field("schedule", f"{args.epochs} epochs, all done. To train longer, start from")
        utils.log_field("", f"its weights: --weights {best} --output-dir ANOTHER_FOLDER")
        return
    factors = [f"{args.batch_size} per device"]
    if utils.world_size() > 1:
        factors.append(f"{utils.world_size()} processes")
    if args.accumulate_steps > 1:
        factors.append(f"{args.accumulate_steps} accumulated")
    limit = f", until step {args.max_steps:,}" if args.max_steps else ""
    limit += ", all done" if limit and state.is_done(args.max_steps) else ""
    utils.log_field("batch", f"{plan.global_batch} images per step ({' x '.join(factors)})")
    utils.log_field(
        "schedule",
        f"epochs {state.epoch} to {args.epochs - 1}, {len(plan):,} steps each, of "
        f"{plan.images:,} images{limit}",
    )
    drops = "then cosine to 0"
    if args.lr_scheduler == "multisteplr":
        epochs = [epoch for epoch in args.lr_steps if epoch < args.epochs]
        drops = f"then x {args.lr_gamma} after {' and '.join(map(str, epochs))} epochs"
        drops = drops if epochs else "then constant"
    scaled = args.lr == base_lr * plan.global_batch / 16
    rule = f" = {base_lr} x {plan.global_batch} / 16" if scaled else ""
    utils.log_field("optimizer", f"{args.opt}, lr {args.lr:g}{rule}")
    utils.log_field("", describe_decay(args))
    utils.log_field("", f"warm-up over {args.warmup_steps} steps, {drops}")


def describe_decay(args: argparse.Namespace) -> str:
    """Describe momentum, weight decay, gradient clipping and the average of weights."""
    decays = {"norms": args.norm_weight_decay, "biases": args.bias_weight_decay}
    others = ", ".join(f"{name} {decay:g}" for name, decay in decays.items() if decay is not None)
    clip = args.clip_grad_norm
    return ", ".join(
        [
            *([] if args.momentum is None else [f"momentum {args.momentum:g}"]),
            f"weight decay {args.weight_decay:g}" + (f" ({others})" if others else ""),
            "no gradient clipping" if clip is None else f"gradients clipped to norm {clip:g}",
            *([f"average of weights with decay {args.ema:g}"] if args.ema else []),
        ]
    )


def describe_norms(args: argparse.Namespace, model: torch.nn.Module) -> str:
    """Describe what of the backbone's norms is trained."""
    if args.train_norm_affine:
        return "statistics frozen, scale and bias trained"
    modules = model.backbone.modules()
    trained = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in modules)
    return "trained" if trained else "frozen"


class StepLog:
    """Logs the steps and epochs of a training, on the console and in `metrics.jsonl`.

    `images_per_step` counts those of all processes.
    """

    def __init__(self, metrics: utils.MetricsFile, images_per_step: int):
        self.metrics = metrics
        self.images_per_step = images_per_step
        self._sums: dict[str, float] = {}

    def __call__(
        self,
        state: TrainState,
        progress: utils.Progress,
        losses: dict[str, float],
        skipped_steps: int,
        rate: float,
    ) -> None:
        """Log the steps since the last call, and after the last step of an epoch the epoch.

        Args:
            state: After the current step.
            progress: Of the epoch.
            losses: Averages over the steps since the last call, "loss" first.
            skipped_steps: The number of these steps that the GradScaler skipped.
            rate: The learning rate of the current step.
        """
        steps, seconds, waited = progress.lap()
        if progress.steps == steps:
            self._sums = {}
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value * steps
        speed = steps * self.images_per_step / seconds
        text = f"loss {losses['loss']:7.4f}  lr {rate:.2e}  {speed:6.2f} images/s"
        if skipped_steps:
            text += f"  {skipped_steps} steps skipped (infinite float16 gradients)"
        progress.show(text)
        self.metrics.write(
            "train",
            epoch=state.epoch,
            step=state.step,
            lr=rate,
            **losses,
            skipped_steps=skipped_steps,
            images_per_second=speed,
            data_seconds=waited,
            peak_memory_mib=utils.peak_memory(state.device),
        )
        if progress.done == progress.total:
            self._log_epoch(progress, progress.steps * self.images_per_step)

    def _log_epoch(self, progress: utils.Progress, images: int) -> None:
        seconds = progress.seconds
        utils.log(
            f"{progress.label}  {images:,} images in {timedelta(seconds=round(seconds))}, "
            f"{images / seconds:.2f} images/s, {progress.waited / seconds:.0%} waiting for data"
        )
        loss, *terms = [
            f"{name.removeprefix('loss_')} {total / progress.steps:.3f}"
            for name, total in self._sums.items()
        ]
        utils.log(textwrap.fill(f"  {loss}: {', '.join(terms)}", 80, subsequent_indent="    "))


def record_evaluation(  # noqa: PLR0913 (the first four are bound by the caller)
    metrics: utils.MetricsFile,
    trackers,
    epoch: int | None,
    step: int | None,
    index,
    scores: dict,
    detections: np.ndarray,
) -> None:
    """Write an evaluation to `metrics.jsonl`, and the first images to the trackers."""
    metrics.write("eval", epoch=epoch, step=step, **scores)
    trackers.write_images(index, detections, step or 0)


def log_best(state: TrainState, AP: float | None, is_best: bool) -> None:
    """Log the AP of an epoch and the best one so far."""
    if AP is None:
        utils.log(f"epoch {state.epoch}  no AP, as there is no box to find: the newest is the best")
        return
    best = "the best so far" if is_best else f"the best is {state.best_AP:.3f}"
    utils.log(f"epoch {state.epoch}  AP {AP:.3f}, {best}")


def log_time_left(steps: int, seconds_per_step: float) -> None:
    """Log how long the steps still to train will take.

    Args:
        steps: The number of steps left in the whole training.
        seconds_per_step: Of the last epoch, with its evaluation.
    """
    if steps > 0:
        left = timedelta(seconds=round(steps * seconds_per_step))
        utils.log(f"{steps:,} steps left, about {left} with evaluation\n")


def log_end(
    metrics: utils.MetricsFile,
    output_dir: Path,
    best_AP: float | None,
    start: float,
    saving_seconds: float,
) -> None:
    """Log the result and duration of a run.

    Args:
        metrics: Gets an "end" line.
        output_dir: Where the results are.
        best_AP: The AP of the best evaluation, if there was any ground truth.
        start: `time.perf_counter()` at the start of the run.
        saving_seconds: The time of it spent on saving checkpoints.
    """
    seconds = time.perf_counter() - start
    metrics.write("end", best_AP=best_AP, seconds=seconds, saving_seconds=saving_seconds)
    best = "" if best_AP is None else f"best AP {best_AP:.3f}, "
    duration = timedelta(seconds=round(seconds))
    utils.log(f"done: {best}{duration}, {saving_seconds / seconds:.1%} of it saving checkpoints")
    utils.log(f"output: {output_dir}")
