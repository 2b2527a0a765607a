"""Train for one epoch, evaluate, and compute the learning rate of a step."""

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

import coco_eval
import utils
from coco_utils import Categories, CocoIndex
from internals import preemption
from internals.batches import BatchTargets
from internals.devices import precise_dtype
from internals.image_notes import log_notes
from internals.mixed_precision import autocast
from internals.monitoring import StepMonitor, explain_oom, loss_name
from internals.train_state import TrainState

# ------------------------------------------------------------------------------ learning rate


def learning_rate_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int,
    milestones: list[int] | None,
    gamma: float | None,
) -> float:
    """Return the factor of the base learning rate in a step.

    Args:
        step: Counted from 0 over the whole training.
        steps_per_epoch: The length of an epoch.
        epochs: The length of the training, for the cosine.
        warmup_steps: The steps in which the factor rises linearly from 1/1000 to 1.
        milestones: The epochs from which on the factor is multiplied by `gamma`; None for a cosine
            from 1 to 0 over `epochs`.
        gamma: See `milestones`.
    """
    warmup = min(1.0, 0.001 + 0.999 * step / warmup_steps) if warmup_steps else 1.0
    if milestones is None:
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * epochs))))
    return warmup * gamma ** sum(step >= epoch * steps_per_epoch for epoch in milestones)


# ----------------------------------------------------------------------------------- training


def split_micro_batches(
    images: list[torch.Tensor], targets: BatchTargets, count: int
) -> Iterator[tuple]:
    """Yield `count` equal micro-batches, each with whether it is the last one."""
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
        state: Model, optimizer and step; updated.
        loader: Starts with the batch of `state.step`; its `batch_sampler` has the epoch's length.
        args: Of these `seed`, `accumulate_steps`, `clip_grad_norm` and `print_freq`.
        last_step: The step to stop after, within the epoch or at its end.
        log_step: Called every `print_freq` steps with `(state, progress, losses, skipped_steps,
            rate)`, as `internals.run_log.StepLog`.
        on_step_end: Called with the step and a function that checks the losses so far; may save a
            checkpoint, or raise StopRequested.

    Raises:
        RunError: A loss is not finite, or memory is exhausted.
    """
    model, optimizer, scaler = state.ddp_model or state.model, state.optimizer, state.scaler
    model.train()
    first_step = state.epoch * len(loader.batch_sampler)
    progress = utils.Progress(
        loader, last_step - first_step, state.step - first_step, f"epoch {state.epoch}"
    )
    with explain_oom(progress, "--batch-size"), StepMonitor(optimizer, state.device) as monitor:
        for batch in progress:
            log_notes(batch.notes)
            seeds = utils.seed_step(args.seed, state.step, len(batch))
            images, targets = batch.to(state.device, seeds)
            rate = state.set_learning_rate()

            optimizer.zero_grad()
            micro_batches = split_micro_batches(images, targets, args.accumulate_steps)
            for micro_images, micro_targets, is_last in micro_batches:
                with utils.ddp_sync(model, enabled=is_last):
                    with autocast(state.device, state.amp_dtype):
                        losses = model(micro_images, micro_targets)
                    monitor.add(losses, state.step, batch.image_ids)
                    scaler.scale(sum(losses.values()) / args.accumulate_steps).backward()
            if args.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if state.ema:
                state.ema.update_parameters(state.model)
            state.step += 1
            # Reading waits for the device: no other line of the loop may read its values.
            if state.step % args.print_freq == 0 or state.step == last_step:
                log_step(state, progress, *monitor.read(state.step), rate)
            if state.step == last_step:
                break
            on_step_end(state.step, monitor.check)


# --------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module,
    loader,
    categories: Categories,
    args,
    *,
    amp_dtype: torch.dtype | None,
    on_result: Callable[[CocoIndex, dict, np.ndarray], None],
) -> dict:
    """Evaluate `model`, log the metrics, and write `detections.json`.

    Args:
        model: The detector itself, not its DDP wrapper.
        loader: Of a `coco_utils.CocoDetection`, with batches of `coco_utils.collate`.
        categories: Those that the model was trained on.
        args: Of these `output_dir`, `evaluator`, `max_detections` and `val_loss`.
        amp_dtype: The data type of autocast; None for float32.
        on_result: Called on rank 0 with the ground truth, the metrics of
            `coco_eval.evaluate_detections` (with `val_loss`, if computed), and the detections.

    Returns:
        The metrics, on every process.

    Raises:
        StopRequested: A process received a signal to stop.
        RunError: Memory is exhausted, or the two evaluators of "both" differ.
    """
    detections, seconds = detect(model, loader, categories, amp_dtype)
    val_loss = validation_loss(model, loader, amp_dtype=amp_dtype) if args.val_loss else None

    def score() -> dict:
        index, start = loader.dataset.index, time.perf_counter()
        coco_eval.write_results(detections, args.output_dir / "detections.json")
        limit = args.max_detections or coco_eval.MAX_DETECTIONS
        metrics = coco_eval.evaluate_detections(index, detections, args.evaluator, limit)
        utils.log(
            f"evaluation  {len(index):,} images in {seconds:.1f} s, "
            f"{len(index) / seconds:.2f} images/s\n  {len(detections):,} detections, scored by "
            f"{args.evaluator} in {time.perf_counter() - start:.1f} s"
        )
        truth = index.ground_truth()
        dropped = len(index.boxes) - len(truth.rows)
        if truth.changed or dropped:
            utils.log(
                f"  against {len(truth.rows):,} boxes, of which {truth.changed:,} were corrected; "
                f"{dropped:,} others were dropped, as in training (see --check-data)"
            )
        utils.log(coco_eval.table(metrics))
        if val_loss:
            terms = [f"{name.removeprefix('loss_')} {x:.4f}" for name, x in val_loss.items()]
            utils.log(f"  validation {terms[0]} = {' + '.join(terms[1:])}")
            metrics["val_loss"] = val_loss
        on_result(index, metrics, detections)
        return metrics

    return utils.run_on_rank_0(score)


@torch.inference_mode()
def detect(
    model: nn.Module, loader, categories: Categories, amp_dtype: torch.dtype | None
) -> tuple[np.ndarray | None, float]:
    """Run `model` on the images of `loader`, of which each process has a share.

    Returns:
        Rows of `coco_eval.detection_rows` in the order of image ids on rank 0, None on the others;
        and the duration in seconds.
    """
    model.eval()
    utils.broadcast_buffers(model)
    device = next(model.parameters()).device
    category_ids = categories.ids_of_labels()
    rows = [np.empty((0, 7))]  # a process may have no images
    pending = []
    progress = utils.Progress(loader, len(loader), 0, "evaluation")
    with explain_oom(progress, "--eval-batch-size"):
        for batch in progress:
            if preemption.stop_requested():
                break
            log_notes(batch.notes)
            images, _ = batch.to(device)
            with autocast(device, amp_dtype):
                pending.append((model(images), batch.image_ids))
            if len(pending) > 1:  # a GPU computes this batch, while the one before is read
                rows.append(coco_eval.detection_rows(*pending.pop(0), category_ids))
        rows += [coco_eval.detection_rows(*last, category_ids) for last in pending]
    preemption.raise_if_stop_requested()
    seconds = progress.seconds
    detections = utils.gather_rows(np.concatenate(rows))
    if detections is not None:
        detections = detections[np.argsort(detections[:, 0], kind="stable")]
    return detections, seconds


@torch.no_grad()
def validation_loss(model: nn.Module, loader, *, amp_dtype: torch.dtype | None) -> dict[str, float]:
    """Compute the loss and its terms, averaged over the images of `loader`, on every process.

    As in training, but norms use their running statistics and do not update them, and what the
    model draws for an image depends on its id alone. The state of the training does not change.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    device = next(model.parameters()).device
    sums, images_seen = {}, 0
    progress = utils.Progress(loader, len(loader), 0, "validation loss")
    with explain_oom(progress, "--eval-batch-size"):
        for batch in progress:
            if preemption.stop_requested():
                break
            seeds = [utils.draw_seed(0, 0, image_id % 2**62) for image_id in batch.image_ids]
            images, targets = batch.to(device, seeds)
            with autocast(device, amp_dtype):
                losses = model(images, targets)
            images_seen += len(images)
            for name, loss in losses.items():
                name = loss_name(name)
                sums[name] = sums.get(name, 0) + loss.to(precise_dtype(device)) * len(images)
    preemption.raise_if_stop_requested()
    shares = utils.gather_objects(({k: float(v) for k, v in sums.items()}, images_seen))
    total = sum(count for _, count in shares)
    names = next(sums for sums, count in shares if count)  # a process may have no images
    terms = {name: sum(share.get(name, 0) for share, _ in shares) / total for name in names}
    return {"loss": sum(terms.values()), **terms}
