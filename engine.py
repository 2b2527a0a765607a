"""The loop: train for one epoch, evaluate, and the learning rate as a function of the step."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import coco_eval
import utils
from coco_utils import Categories
from internals import preemption
from internals.mixed_precision import autocast
from internals.monitoring import LossMeter, SkippedSteps, explain_oom, loss_name
from internals.packed_images import PackedImages

# ------------------------------------------------------------------------------ learning rate


def learning_rate_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int,
    milestones: list[int] | None,
    gamma: float | None,
) -> float:
    """What the base rate is multiplied by in step `step`, counted from 0 over the whole training.

    Linear from 1/1000 to 1 over `warmup_steps`, times `gamma` for each of the `milestones`
    (epochs) that has begun, or a cosine down to 0 over `epochs` where milestones is None.
    """
    warmup = min(1.0, 0.001 + 0.999 * step / warmup_steps) if warmup_steps else 1.0
    if milestones is None:
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * epochs))))
    return warmup * gamma ** sum(step >= epoch * steps_per_epoch for epoch in milestones)


# ----------------------------------------------------------------------------------- training


@dataclass
class TrainState:
    """What a training changes as it goes, and what a checkpoint holds of it.

    `learning_rate(step)` is the rate of a step; `amp_dtype` is the type of autocast, None for
    float32; `epoch` and `step` are those to go on with, counted from 0.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    amp_dtype: torch.dtype | None = None
    ema: AveragedModel | None = None
    epoch: int = 0
    step: int = 0
    best_AP: float | None = None
    evaluations_since_best: int = 0
    ddp_model: nn.Module | None = None  # what a step calls where there are several processes
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        enabled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate, and to load elsewhere: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def set_learning_rate(self) -> float:
        """Give the rate of the step to come to every parameter group; return it."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update_best(self, AP: float | None) -> bool:
        """Note what an evaluation found; return whether no AP so far was as high."""
        best = AP is not None and (self.best_AP is None or self.best_AP < AP)
        if best:
            self.best_AP = AP
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        return best

    def should_stop_early(self, patience: int | None) -> bool:
        """Whether AP has not risen for `patience` evaluations (--early-stop-patience)."""
        waited = self.evaluations_since_best
        if not patience or waited < patience:
            return False
        utils.log(f"no better AP in {waited} evaluations (--early-stop-patience {patience}): done")
        return True

    def state_dict(self) -> dict:
        names = ("epoch", "step", "best_AP", "evaluations_since_best")
        state = {
            "model": self.eval_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in names},
        }
        if self.ema:
            state["raw_model"] = self.model.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave, but for the weights, which the model has already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best_AP = state["epoch"], state["step"], state["best_AP"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
        if self.ema and "raw_model" in state:
            self.ema.module.load_state_dict(state["model"])
            self.ema.n_averaged.fill_(self.step)


def to_device(
    images: PackedImages,
    targets: list[dict],
    device: torch.device,
    seeds: list[int] | None = None,
) -> tuple[list[torch.Tensor], list[dict]]:
    """A batch of `coco_utils.collate` on the device, as torchvision's detectors take it.

    `seeds` has one for each image, of what the model draws for it in training.
    """
    keys = ("boxes", "labels")
    on_device = [
        {key: torch.from_numpy(target[key]).to(device, non_blocking=True) for key in keys}
        for target in targets
    ]
    for target, seed in zip(on_device, seeds or (), strict=bool(seeds)):
        target["seed"] = seed
    return images.to(device), on_device


def split_micro_batches(images: list, targets: list, count: int) -> Iterator[tuple]:
    """The images of a step in `count` equal parts, each with whether it is the last."""
    size = len(images) // count
    for start in range(0, len(images), size):
        stop = start + size
        yield images[start:stop], targets[start:stop], stop == len(images)


def train_one_epoch(
    state: TrainState,
    loader,
    args,
    *,
    last_step: int,
    log_step: Callable[..., None],
    on_step_end: Callable[[int, Callable[[], None]], None],
) -> None:
    """Train from `state.step`, counted over the whole training, to `last_step`.

    Args:
        state: is brought forward.
        loader: begins with the batch of `state.step`; its `batch_sampler` has the epoch's length.
        args: of them `seed, accumulate_steps, clip_grad_norm, print_freq`.
        last_step: where to end, inside or at the end of the epoch.
        log_step: called every `print_freq` steps with `(state, progress, losses, rate, images)`.
        on_step_end: called with the step and a check of all losses so far, to save and to stop.

    Raises:
        RunError: a loss is not finite, or memory runs out.
        StopRequested: from `on_step_end`.
    """
    model, optimizer, scaler = state.ddp_model or state.model, state.optimizer, state.scaler
    model.train()
    meter, skipped = LossMeter(state.device), SkippedSteps(optimizer, state.device)
    first_step = state.epoch * len(loader.batch_sampler)
    progress = utils.Progress(
        loader, last_step - first_step, state.step - first_step, f"epoch {state.epoch}"
    )
    with explain_oom(progress, "--batch-size"), skipped:
        for images, targets in progress:
            image_ids = [target["image_id"] for target in targets]
            seeds = utils.seed_step(args.seed, state.step, len(images))
            images, targets = to_device(images, targets, state.device, seeds)
            rate = state.set_learning_rate()

            optimizer.zero_grad()
            for *batch, is_last in split_micro_batches(images, targets, args.accumulate_steps):
                with utils.ddp_sync(model, enabled=is_last):
                    with autocast(state.device, state.amp_dtype):
                        losses = model(*batch)
                    meter.add(losses, state.step, image_ids)
                    scaler.scale(sum(losses.values()) / args.accumulate_steps).backward()
            if args.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if state.ema:
                state.ema.update_parameters(state.model)
            state.step += 1

            # The one place where the host waits for the device.
            if state.step % args.print_freq == 0 or state.step == last_step:
                averages = {**meter.read(), "skipped_steps": skipped.read(state.step)}
                log_step(state, progress, averages, rate, len(images))
            if state.step == last_step:
                break
            on_step_end(state.step, meter.check)


# --------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module,
    loader,
    categories: Categories,
    args,
    *,
    amp_dtype: torch.dtype | None,
    metrics: utils.MetricsFile,
    tensorboard=None,
    epoch: int | None = None,
    step: int | None = None,
) -> float | None:
    """Score `model` on the data of `loader`, log it, and write `detections.json`.

    Args:
        model: the detector itself, not its DDP wrapper.
        loader: of a `coco_utils.CocoDetection`, in batches of `coco_utils.collate`.
        categories: those that the model was trained on.
        args: of them `output_dir, evaluator, val_loss`.
        amp_dtype: the type of autocast, None for float32.
        metrics: gets an "eval" line.
        tensorboard: a `reporting.tensorboard.TensorBoardWriter` for the first images, or None.
        epoch: for the log, as `step`: the number of steps that the model was trained for.
        step: see `epoch`.

    Returns:
        AP, on every process; None where there is no ground truth.

    Raises:
        StopRequested: a process was asked to stop.
        RunError: memory runs out, or two evaluators differ.
    """
    detections, seconds = detect(model, loader, categories, amp_dtype)
    losses = {}
    if args.val_loss:
        losses["val_loss"] = validation_loss(model, loader, amp_dtype=amp_dtype)

    def score() -> float | None:
        index, begin = loader.dataset.index, time.perf_counter()
        coco_eval.write_results(detections, args.output_dir / "detections.json")
        scores = coco_eval.evaluate_detections(index, detections, args.evaluator)
        metrics.write("eval", epoch=epoch, step=step, **scores, **losses)
        utils.log(
            f"evaluation: {len(index):,} images in {seconds:.1f} s, "
            f"{len(index) / seconds:.2f} images/s; {len(detections):,} detections, scored by "
            f"{args.evaluator} in {time.perf_counter() - begin:.1f} s"
        )
        for loss in losses.values():
            terms = [f"{name.removeprefix('loss_')} {x:.4f}" for name, x in loss.items()]
            utils.log(f"validation {terms[0]}  ({', '.join(terms[1:])})")
        utils.log(coco_eval.table(scores))
        if tensorboard:
            tensorboard.write_images(index, detections, step or 0)
        return scores["AP"]

    return utils.run_on_rank_0(score)


@torch.inference_mode()
def detect(
    model: nn.Module, loader, categories: Categories, amp_dtype: torch.dtype | None
) -> tuple[np.ndarray | None, float]:
    """Run `model` on the images of `loader`, of which each process has a share.

    Returns:
        Rows of `coco_eval.detection_rows` in the order of image ids, on rank 0 (None elsewhere),
        and the seconds that it took.
    """
    model.eval()
    utils.broadcast_buffers(model)
    device = next(model.parameters()).device
    category_ids, rows = categories.ids_of_labels(), [np.empty((0, 7))]
    progress = utils.Progress(loader, len(loader), 0, "evaluation")
    with explain_oom(progress, "--eval-batch-size"):
        for images, targets in progress:
            if preemption.stop_requested():
                break
            with autocast(device, amp_dtype):
                outputs = model(images.to(device))
            image_ids = [target["image_id"] for target in targets]
            rows.append(coco_eval.detection_rows(outputs, image_ids, category_ids))
    preemption.raise_if_stop_requested()
    seconds = progress.seconds
    detections = utils.gather_rows(np.concatenate(rows))
    if detections is not None:
        detections = detections[np.argsort(detections[:, 0], kind="stable")]
    return detections, seconds


@torch.no_grad()
def validation_loss(model: nn.Module, loader, *, amp_dtype: torch.dtype | None) -> dict[str, float]:
    """The loss and its terms on the images of `loader`, averaged over them, on every process.

    Computed as in training, but that norms use and keep the statistics that they have. What the
    model draws depends on the image alone. Training is not touched by it.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    device = next(model.parameters()).device
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
    terms = {name: sum(share.get(name, 0) for share, _ in shares) / total for name in names}
    return {"loss": sum(terms.values()), **terms}
