"""The loop: train one epoch, evaluate, and the learning rate as a function of the step."""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import coco_eval
import utils


class TrainingError(RuntimeError):
    """A training that cannot go on, such as one with infinite losses."""


# --------------------------------------------------------------------------------- precision


def precision(device: torch.device, amp: bool, name: str | None) -> tuple[torch.dtype | None, str]:
    """The type of autocast, None for plain float32, and a line for the log that says why.

    `name` is "float16" or "bfloat16" to overrule the choice: float16 on CUDA, bfloat16 on a CPU
    that has instructions for it, float32 on any other.
    """
    if not amp:
        return None, "float32"
    if name is not None:
        return getattr(torch, name), f"mixed, {name} (as asked)"
    if device.type == "cuda":
        return torch.float16, "mixed, float16 with loss scaling"
    if _cpu_has_bfloat16():
        return torch.bfloat16, "mixed, bfloat16"
    return None, "float32: this CPU has no bfloat16 instructions, so --amp would only slow it down"


def _cpu_has_bfloat16() -> bool:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ------------------------------------------------------------------------------ learning rate


def learning_rate_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int,
    milestones: list[int] | None,
    gamma: float,
) -> float:
    """What the base rate is multiplied by in step `step`, counted from 0 over the whole training.

    Linear from 1/1000 to 1 over `warmup_steps`, times `gamma` for each of the `milestones`
    (epochs) that has begun, or a cosine down to 0 over `epochs` where milestones is None.
    """
    warmup = min(1.0, 0.001 + 0.999 * step / warmup_steps) if warmup_steps else 1.0
    if milestones is None:
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * epochs))))
    return warmup * gamma ** sum(step >= epoch * steps_per_epoch for epoch in milestones)


@dataclass(frozen=True)
class Schedule:
    """Sets the learning rate of every parameter group: `lr * factor(step)`."""

    lr: float
    factor: Callable[[int], float]

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        rate = self.lr * self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


# ----------------------------------------------------------------------------------- training


class FiniteWatch:
    """Remembers on the device the first step whose loss was NaN or infinite on any process."""

    NEVER = 2**62

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((), self.NEVER, dtype=torch.int64, device=device)
        self.seen = {}

    def note(self, step: int, loss: torch.Tensor, image_ids: list[int]) -> None:
        """Look at a loss without waiting for it."""
        bad = torch.where(torch.isfinite(loss), self.NEVER, step)
        self.first_bad = torch.minimum(self.first_bad, bad)
        self.seen[step] = image_ids

    def check(self) -> None:
        """Raise TrainingError on every process if one noted a bad loss; waits for the device."""
        mine = int(self.first_bad)
        first = int(utils.all_reduce(self.first_bad, "min"))
        if first < self.NEVER:
            mine = f"images {self.seen[first]}" if mine == first else None
            where = [f"{at} on rank {r}" for r, at in enumerate(utils.gather_objects(mine)) if at]
            raise TrainingError(
                f"the loss of step {first} is not finite: {', '.join(where)}. Nothing was saved "
                "since the last checkpoint. Look at these images and their boxes, lower --lr, "
                "lengthen --warmup-steps, or use --clip-grad-norm"
            )
        self.seen.clear()


class SkippedSteps:
    """Counts on the device the steps that the GradScaler skips for infinite float16 gradients.

    Now and then one is skipped while the scale is searched for; many in a row learn nothing.
    """

    TOO_MANY = 10

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.total, self.in_a_row, self.most = torch.zeros(3, device=device).unbind()
        self._hook = optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # The GradScaler leaves it there for fused optimizers, which skip on the device.
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self.total += found
            self.in_a_row.add_(1).mul_(found)
            torch.maximum(self.most, self.in_a_row, out=self.most)

    def check(self, step: int) -> int:
        """The number skipped since the last check; waits for the device.

        Raises TrainingError when too many came one after the other.
        """
        total, most = int(self.total), int(self.most)
        if most >= self.TOO_MANY:
            raise TrainingError(
                f"the gradients of {most} steps in a row, up to step {step}, were infinite in "
                "float16: lower --lr, or use --amp-dtype bfloat16, or leave out --amp"
            )
        self.total.zero_()
        return total

    def stop(self) -> None:
        self._hook.remove()


class LossMeter:
    """Averages the parts of the loss over steps and processes; waits for the device when read."""

    def __init__(self):
        self.total, self.steps = 0, 0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        self.names = list(losses)
        self.total = self.total + torch.stack([loss.detach().float() for loss in losses.values()])
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The averages since the last read: "loss", their sum, first."""
        mean = utils.all_reduce(self.total) / (self.steps * utils.world_size())
        parts = dict(zip(self.names, mean.tolist(), strict=True))
        self.total, self.steps = 0, 0
        return {"loss": sum(parts.values()), **parts}


def to_device(
    pixels: torch.Tensor, targets: list[dict], device: torch.device
) -> tuple[list[torch.Tensor], list[dict]]:
    """A batch of `coco_utils.collate` on the device, as torchvision's detectors take it.

    All images go in one copy, as uint8, a quarter of the bytes, and become float in [0, 1] there.
    """
    pixels = pixels.to(device, non_blocking=True)
    sizes = [target["size"] for target in targets]
    images = [
        part.view(height, width, 3).permute(2, 0, 1).float().div_(255)
        for part, (height, width) in zip(
            pixels.split([3 * height * width for height, width in sizes]), sizes, strict=True
        )
    ]
    boxes = [
        {
            key: torch.from_numpy(target[key]).to(device, non_blocking=True)
            for key in ("boxes", "labels")
        }
        for target in targets
    ]
    return images, boxes


def train_one_epoch(
    model: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    epoch: int,
    step: int,
    last_step: int,
    seed: int,
    clip_grad_norm: float | None,
    print_freq: int,
    metrics: utils.MetricsFile,
    keeper: utils.Keeper,
) -> int:
    """Train from step `step` (counted over the whole training) to `last_step`; return `last_step`.

    `loader` begins with the batch of `step`; `keeper` saves between steps. Raises TrainingError
    when a loss is not finite, and utils.StopRequested.
    """
    model.train()
    rate = schedule(optimizer, step)
    meter, watch, skipped = LossMeter(), FiniteWatch(device), SkippedSteps(optimizer, device)
    begin = epoch * len(loader.batch_sampler)
    position = step - begin
    progress = utils.Progress(loader, last_step - begin, position, f"epoch {epoch}")
    for pixels, targets in progress:
        utils.fault("step", step)
        utils.seed_step(seed, step)
        image_ids = [target["image_id"] for target in targets]
        images, targets = to_device(pixels, targets, device)
        # Reading a number makes the host wait for the device, so it is done in these steps only (a
        # CPU has nothing to wait for, and a bad loss is found there before it does harm).
        log_now = (step + 1) % print_freq == 0 or step + 1 == last_step

        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            losses = model(images, targets)
        loss = sum(losses.values())
        if kind := utils.fault("loss", step):
            loss = loss * {"nan": math.nan, "huge": 1e37}[kind]
        watch.note(step, loss, image_ids)
        if log_now or device.type == "cpu":
            watch.check()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        meter.add(losses)
        step += 1
        if log_now:
            numbers = {**meter.read(), "skipped_steps": skipped.check(step)}
            report_step(progress, numbers, epoch, step, rate, len(images), device, metrics)
        rate = schedule(optimizer, step)
        if step == last_step:
            break
        keeper.after_step(step, watch.check)
    skipped.stop()
    report_epoch(progress, epoch, (progress.done - position) * len(images))
    return step


def report_epoch(progress: utils.Progress, epoch: int, images: int) -> None:
    """Say how fast the epoch was; `images` is the number that this process has trained on."""
    seconds, images = progress.seconds, images * utils.world_size()
    utils.log(
        f"epoch {epoch}: {images:,} images in {seconds:.1f} s, {images / seconds:.2f} images/s, "
        f"{100 * progress.waited / seconds:.0f} % of the time waiting for data"
    )


def report_step(
    progress: utils.Progress,
    numbers: dict[str, float],
    epoch: int,
    step: int,
    rate: float,
    batch_size: int,
    device: torch.device,
    metrics: utils.MetricsFile,
) -> None:
    """Say how the steps since the last report went, on the console and in `metrics.jsonl`."""
    steps, seconds, waited = progress.lap()
    speed = steps * batch_size * utils.world_size() / seconds
    memory = utils.peak_memory(device)
    losses = {name: x for name, x in numbers.items() if name.startswith("loss")}
    loss, *parts = [f"{name.removeprefix('loss_')} {x:.4f}" for name, x in losses.items()]
    if numbers["skipped_steps"]:
        parts.append(f"{numbers['skipped_steps']} steps skipped: infinite float16 gradients")
    progress.show(f"{loss}  lr {rate:.6f}  {speed:.2f} images/s", ", ".join(parts))
    metrics.write(
        "train",
        epoch=epoch,
        step=step,
        lr=rate,
        **numbers,
        images_per_second=speed,
        data_seconds=waited,
        peak_memory_mib=memory,
    )


# --------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader,
    categories,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    output_dir: Path,
    evaluator: str,
) -> dict | None:
    """COCO's numbers of `model` on the data set of `loader`, as `coco_eval.score` returns them.

    Each process runs its share of the images; rank 0 gathers, writes `detections.json` and scores
    by `evaluator`, the others return None. `model` is the bare detector, not its DDP wrapper.
    Raises utils.StopRequested where a process was asked to stop.
    """
    model.eval()
    utils.share_buffers(model)
    category_ids = categories.ids_of_labels()
    rows = [np.empty((0, 7))]
    progress = utils.Progress(loader, len(loader), 0, "evaluation")
    for pixels, targets in progress:
        if utils.stop_asked():
            break
        utils.fault("evaluation")
        image_ids = [target["image_id"] for target in targets]
        images, _ = to_device(pixels, targets, device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            outputs = model(images)
        rows.append(coco_eval.detection_rows(outputs, image_ids, category_ids))
    utils.stop_if_asked()
    seconds = progress.seconds
    detections = utils.gather_rows(np.concatenate(rows))
    if detections is None:
        return None
    # In the order of image ids, whatever the number of processes was.
    detections = detections[np.argsort(detections[:, 0], kind="stable")]
    coco_eval.write_results(detections, output_dir / "detections.json")
    index = loader.dataset.index
    begin = time.perf_counter()
    numbers = coco_eval.score(index, detections, evaluator)
    utils.log(
        f"evaluation: {len(index):,} images in {seconds:.1f} s, "
        f"{len(index) / seconds:.2f} images/s; {len(detections):,} detections, scored by "
        f"{evaluator} in {time.perf_counter() - begin:.1f} s"
    )
    return numbers
