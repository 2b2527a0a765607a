"""What a run says of itself: its setup with the arithmetic, its steps, its end."""

import argparse
import platform
import time
from pathlib import Path

import torch
import torchvision

import utils
from internals.train_state import TrainState


def run_metadata(
    device: torch.device, precision: str, train_loader, val_loader, categories
) -> dict:
    """What a figure from this run depends on, for `metrics.jsonl`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "world_size": utils.world_size(),
        "precision": precision,
        "train_images": len(train_loader.dataset) if train_loader else None,
        "val_images": len(val_loader.dataset),
        "categories": categories.to_list(),
    }


def log_training_setup(args: argparse.Namespace, base_lr: float, plan, state: TrainState) -> None:
    """Say what is about to happen before the first step, with the arithmetic.

    `base_lr` is the learning rate for 16 images in a step, `plan` a `samplers.TrainingPlan`.
    """
    if state.epoch >= args.epochs:
        utils.log(f"nothing is left to train of {args.epochs} epochs: raise --epochs to go on")
        return
    processes = utils.world_size()
    shares = f"{args.batch_size}"
    shares += f" on each of {processes} processes" if processes > 1 else ""
    shares += f" {args.accumulate_steps} times" if args.accumulate_steps > 1 else ""
    utils.log(
        f"training: {len(plan.groups):,} images, {shares} a step, {len(plan)} steps an epoch, "
        f"epochs {state.epoch} to {args.epochs - 1}"
        + (f", until {args.max_steps} steps are done" if args.max_steps else "")
    )
    size = "x".join(map(str, args.fixed_size or ())) or f"{args.min_size} to {args.max_size}"
    utils.log(f"images: resized to {size} pixels, augmentation: {args.data_augmentation}")
    drops = "then a cosine down to 0"
    if args.lr_scheduler == "multisteplr":
        drops = f"x {args.lr_gamma} after epochs {' '.join(map(str, args.lr_steps))}"
    scaled = args.lr == base_lr * plan.global_batch / 16
    rule = f" = {base_lr} x {plan.global_batch} / 16" if scaled else ""
    utils.log(f"learning rate: {args.lr:g}{rule}, warm-up over {args.warmup_steps} steps, {drops}")
    if state.step:
        utils.log(f"resumed: {args.resume or '--start-epoch'}, {state.step} steps done")


def log_step(
    metrics: utils.MetricsFile,
    state: TrainState,
    progress: utils.Progress,
    averages: dict[str, float],
    rate: float,
    batch_size: int,
) -> None:
    """Say how the steps since the last report went, on the console and in `metrics.jsonl`."""
    steps, seconds, waited = progress.lap()
    speed = steps * batch_size * utils.world_size() / seconds
    losses = {name: x for name, x in averages.items() if name.startswith("loss")}
    loss, *details = [f"{name.removeprefix('loss_')} {x:.4f}" for name, x in losses.items()]
    if averages["skipped_steps"]:
        details.append(f"{averages['skipped_steps']} steps skipped: infinite float16 gradients")
    progress.show(f"{loss}  lr {rate:.6f}  {speed:.2f} images/s", ", ".join(details))
    metrics.write(
        "train",
        epoch=state.epoch,
        step=state.step,
        lr=rate,
        **averages,
        images_per_second=speed,
        data_seconds=waited,
        peak_memory_mib=utils.peak_memory(state.device),
    )
    if progress.done == progress.total:
        images, total = progress.steps * batch_size * utils.world_size(), progress.seconds
        utils.log(
            f"{progress.label}: {images:,} images in {total:.1f} s, {images / total:.2f} images/s, "
            f"{100 * progress.waited / total:.0f} % of the time waiting for data"
        )


def log_end(
    metrics: utils.MetricsFile, output_dir: Path, best_AP: float | None, begin: float, saving: float
) -> None:
    """Say how it went since `begin` (`time.perf_counter()`), `saving` seconds of it for saving."""
    seconds = time.perf_counter() - begin
    metrics.write("end", best_AP=best_AP, seconds=seconds, saving_seconds=saving)
    best = "" if best_AP is None else f"best AP {best_AP:.3f}, "
    share = f"{saving / seconds:.1%} of the time went into checkpoints"
    utils.log(f"done: {best}results in {output_dir}; {share}")
