"""The loop: train one epoch, evaluate, and the learning rate as a function of the step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import coco_eval
import utils
from coco_utils import PackedImages
from internals import preemption
from internals.errors import RunError
from internals.mixed_precision import autocast

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
        """Raise RunError on every process if one noted a bad loss; waits for the device."""
        mine = int(self.first_bad)
        first = int(utils.all_reduce(self.first_bad, "min"))
        if first < self.NEVER:
            mine = f"images {self.seen[first]}" if mine == first else None
            where = [f"{at} on rank {r}" for r, at in enumerate(utils.gather_objects(mine)) if at]
            raise RunError(
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

        Raises RunError when too many came one after the other.
        """
        total, most = int(self.total), int(self.most)
        if most >= self.TOO_MANY:
            raise RunError(
                f"the gradients of {most} steps in a row, up to step {step}, were infinite in "
                "float16: lower --lr, or use --amp-dtype bfloat16, or leave out --amp"
            )
        self.total.zero_()
        return total

    def stop(self) -> None:
        self._hook.remove()


def loss_name(name: str) -> str:
    """Faster R-CNN's names of the parts of its loss begin with "loss_", others' do not."""
    return f"loss_{name.removeprefix('loss_')}"


class LossMeter:
    """Averages the parts of the loss over steps and processes; waits for the device when read."""

    def __init__(self):
        self.total, self.steps = 0, 0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        self.names = [loss_name(name) for name in losses]
        self.total = self.total + torch.stack([loss.detach().float() for loss in losses.values()])
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The averages since the last read: "loss", their sum, first."""
        mean = utils.all_reduce(self.total) / (self.steps * utils.world_size())
        parts = dict(zip(self.names, mean.tolist(), strict=True))
        self.total, self.steps = 0, 0
        return {"loss": sum(parts.values()), **parts}


def to_device(
    images: PackedImages,
    targets: list[dict],
    device: torch.device,
    seeds: list[int] | None = None,
) -> tuple[list[torch.Tensor], list[dict]]:
    """A batch of `coco_utils.collate` on the device, as torchvision's detectors take it.

    `seeds` has one for each image, of what the model draws for it in training.
    """
    boxes = [
        {
            key: torch.from_numpy(target[key]).to(device, non_blocking=True)
            for key in ("boxes", "labels")
        }
        for target in targets
    ]
    for part, seed in zip(boxes, seeds or (), strict=bool(seeds)):
        part["seed"] = seed
    return images.to(device), boxes


@contextmanager
def memory_explained(
    images: list[torch.Tensor], targets: list[dict], where: str, batch_flag: str
) -> Iterator[None]:
    """Turn an out-of-memory error into a RunError that says of what there was too much."""
    try:
        yield
    except RuntimeError as error:  # a CPU's allocator has no error class of its own
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        shapes = ", ".join(
            f"{image.shape[2]} x {image.shape[1]} with {len(target['boxes'])} boxes"
            for image, target in zip(images, targets, strict=True)
        )
        raise RunError(
            f"out of memory in {where}, with {len(images)} images at once, before resizing {shapes}"
            f": lower {batch_flag}, or --min-size ({str(error).splitlines()[0][:200]})"
        ) from error


def peak_of_a_step(
    model: nn.Module,
    batch: tuple[torch.Tensor, list[dict]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> int | None:
    """The most memory in MiB that training has taken after a step with a batch of
    `coco_utils.collate`; None if that batch does not fit. Changes the weights.
    """
    model.train()
    try:
        images, targets = to_device(*batch, device)
        with autocast(device, amp_dtype):
            losses = model(images, targets)
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        return utils.peak_memory(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def in_parts(images: int, parts: int) -> list[slice]:
    """The images of a step in as many parts, which go through the model one after the other."""
    size = images // parts
    return [slice(first, first + size) for first in range(0, images, size)]


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
    accumulate_steps: int,
    print_freq: int,
    metrics: utils.MetricsFile,
    keeper: preemption.CheckpointTimer,
) -> int:
    """Train from step `step` (counted over the whole training) to `last_step`; return `last_step`.

    `loader` begins with the batch of `step`, whose images go through the model in
    `accumulate_steps` parts; `keeper` saves between steps. Raises RunError when a loss is not
    finite or memory runs out, and StopRequested.
    """
    model.train()
    rate = schedule(optimizer, step)
    meter, watch, skipped = LossMeter(), FiniteWatch(device), SkippedSteps(optimizer, device)
    begin = epoch * len(loader.batch_sampler)
    position = step - begin
    progress = utils.Progress(loader, last_step - begin, position, f"epoch {epoch}")
    for images, targets in progress:
        image_ids = [target["image_id"] for target in targets]
        seeds = utils.seed_step(seed, step, len(targets))
        images, targets = to_device(images, targets, device, seeds)
        # Reading a number makes the host wait for the device, so it is done in these steps only (a
        # CPU has nothing to wait for, and a bad loss is found there before it does harm).
        log_now = (step + 1) % print_freq == 0 or step + 1 == last_step

        optimizer.zero_grad()
        for part in in_parts(len(images), accumulate_steps):
            with (
                utils.ddp_sync(model, now=part.stop == len(images)),
                memory_explained(images[part], targets[part], f"step {step}", "--batch-size"),
            ):
                utils.fault("step", step)
                with autocast(device, amp_dtype):
                    losses = model(images[part], targets[part])
                loss = sum(losses.values()) / accumulate_steps
                if kind := utils.fault("loss", step):
                    loss = loss * {"nan": math.nan, "huge": 1e37}[kind]
                watch.note(step, loss, image_ids)
                if log_now or device.type == "cpu":
                    watch.check()
                scaler.scale(loss).backward()
            meter.add(losses)
        if clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
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
    show: Callable | None = None,
) -> dict | None:
    """COCO's numbers of `model` on the data of `loader`, as `coco_eval.evaluate_detections` does.

    Each process runs its share of the images; rank 0 gathers, writes `detections.json` and scores
    by `evaluator`, the others return None. `model` is the bare detector, not its DDP wrapper.
    `show(index, detections)` is called there with what was found. Raises StopRequested where
    a process was asked to stop, and RunError when memory runs out.
    """
    model.eval()
    utils.broadcast_buffers(model)
    category_ids = categories.ids_of_labels()
    rows = [np.empty((0, 7))]
    progress = utils.Progress(loader, len(loader), 0, "evaluation")
    for images, targets in progress:
        if preemption.stop_requested():
            break
        utils.fault("evaluation", progress.done - 1)
        image_ids = [target["image_id"] for target in targets]
        images, targets = to_device(images, targets, device)
        with (
            memory_explained(images, targets, "the evaluation", "--eval-batch-size"),
            autocast(device, amp_dtype),
        ):
            outputs = model(images)
        rows.append(coco_eval.detection_rows(outputs, image_ids, category_ids))
    preemption.raise_if_stop_requested()
    seconds = progress.seconds
    detections = utils.gather_rows(np.concatenate(rows))
    if detections is None:
        return None
    # In the order of image ids, whatever the number of processes was.
    detections = detections[np.argsort(detections[:, 0], kind="stable")]
    coco_eval.write_results(detections, output_dir / "detections.json")
    index = loader.dataset.index
    if show:
        show(index, detections)
    begin = time.perf_counter()
    numbers = coco_eval.evaluate_detections(index, detections, evaluator)
    utils.log(
        f"evaluation: {len(index):,} images in {seconds:.1f} s, "
        f"{len(index) / seconds:.2f} images/s; {len(detections):,} detections, scored by "
        f"{evaluator} in {time.perf_counter() - begin:.1f} s"
    )
    return numbers


@torch.no_grad()
def validation_loss(
    model: nn.Module, loader, *, device: torch.device, amp_dtype: torch.dtype | None
) -> dict[str, float]:
    """The loss and its parts on the images of `loader`, averaged over them, on every process.

    Computed as in training, but that norms use and keep the statistics that they have. What the
    model draws depends on the image alone. Training is not touched by it.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    sums, images_seen = {}, 0
    for images, targets in utils.Progress(loader, len(loader), 0, "validation loss"):
        seeds = [utils.draw_seed(0, 0, target["image_id"] % 2**62) for target in targets]
        images, targets = to_device(images, targets, device, seeds)
        with autocast(device, amp_dtype):
            losses = model(images, targets)
        images_seen += len(images)
        for name, loss in losses.items():
            name = loss_name(name)
            sums[name] = sums.get(name, 0) + loss.double() * len(images)
    shares = utils.gather_objects(({k: float(v) for k, v in sums.items()}, images_seen))
    total = sum(count for _, count in shares)
    names = next(names for names, count in shares if count)
    parts = {name: sum(share.get(name, 0) for share, _ in shares) / total for name in names}
    return {"loss": sum(parts.values()), **parts}
