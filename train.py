#!/usr/bin/env python3
"""Train and evaluate Faster R-CNN (https://arxiv.org/abs/1506.01497) on COCO-format data.

COCO 2017 on 8 GPUs of one machine, to box AP 37.0 with a ResNet-50-FPN (torchvision's result):

    torchrun --nproc-per-node 8 train.py --data-path datasets/coco --amp

Your own images on one GPU, from COCO weights:

    python train.py --data-path my_images --weights COCO_V1 --epochs 12 --amp
"""

import argparse
import os
import sys
import time
from functools import partial

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

import checkpoint
import coco_eval
import coco_utils
import engine
import loading
import models
import transforms
import utils
from arguments import parse_arguments
from internals import batch_size as batch_size_search
from internals import failures, preemption, run_log
from internals.command_line import prepare_output_dir
from internals.devices import choose_device, move_model, no_gpu_note
from internals.errors import UserError
from internals.fast import use_cuda_graphs
from internals.mixed_precision import initialize_momentum, resolve_precision
from internals.train_state import MovingAverage, TrainState
from settings import base_learning_rate, resolve_defaults, to_plain_dict, validate_args


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate; `argv` is the command line."""
    start = time.perf_counter()
    args = parse_arguments(argv)
    if args.check_data:
        preemption.restore_signal_handlers()  # nothing to save
        return loading.check_data(args)
    device = choose_device(args.device)
    prepare_output_dir(args.output_dir)
    indexes = loading.load_indexes(args)
    utils.init_distributed(device, args.dist_url or "env://", args.timeout_minutes)
    saved = load_resume_checkpoint(args)
    resolve_defaults(args, saved["args"] if saved else None, device)
    validate_args(args, device)
    loading.check_images(args, indexes)
    amp_dtype, precision = choose_precision(args, device)

    # Data
    indexes, left_out = loading.choose_images(args, indexes)
    categories = loading.resolve_categories(args, indexes, saved)
    train_loader, val_loader = loading.build_loaders(args, indexes, categories, device)

    # Model
    model = move_model(build_model(args, categories, saved), device)

    # Optimizer
    state = None if args.test_only else build_state(args, model, train_loader, amp_dtype)
    if args.cuda_graphs:
        use_cuda_graphs(model)
    if args.find_batch_size:
        return batch_size_search.find_largest_batch(state, train_loader, args)

    # Resume
    run_log.log_model(args, model)
    if not args.test_only:
        plan = train_loader.batch_sampler
        run_args = checkpoint.add_resume_facts(to_plain_dict(args), plan, amp_dtype, indexes)
        if saved:
            checkpoint.restore(state, saved, run_args, args.resume, args.resume_anyway)
        run_log.log_schedule(args, base_learning_rate(args), plan, state)

    # Outputs
    trackers = open_trackers(args, saved)
    metrics = utils.MetricsFile(args.output_dir, trackers.write_metrics)
    about = run_log.run_metadata(model, device, precision, train_loader, val_loader, categories)
    metrics.write("start", args=to_plain_dict(args), **about, val_images_left_out=left_out)

    def evaluate(model: nn.Module, epoch: int | None, step: int | None) -> dict:
        record = partial(run_log.record_evaluation, metrics, trackers, epoch, step)
        return engine.evaluate(
            model, val_loader, categories, args, amp_dtype=amp_dtype, on_result=record
        )

    if args.test_only:
        run_log.log_test_checkpoint(args, saved, amp_dtype)
        with trackers:
            evaluate(model, *trained_epoch_and_step(saved))
        return write_report(args)

    # Epochs
    def save(best: bool = False, score_thresholds: dict | None = None) -> None:
        content = {**state.state_dict(), "categories": categories.to_list(), "args": run_args}
        content["score_thresholds"] = score_thresholds  # of these very weights, else None
        write = partial(checkpoint.save, args.output_dir, content, args.keep_checkpoints, best)
        utils.run_on_rank_0(write)

    timer = preemption.CheckpointTimer(args.checkpoint_every, args.checkpoint_minutes, save)
    log_step = run_log.StepLog(metrics, plan.global_batch)
    with trackers:
        train(args, state, train_loader, timer, evaluate, log_step)
    run_log.log_end(metrics, args.output_dir, state.best_AP, start, timer.seconds_saving)
    return write_report(args)


def train(args, state: TrainState, loader: DataLoader, timer, evaluate, log_step) -> None:
    """Train all epochs from `state.epoch` on, each followed by an evaluation and a checkpoint."""
    plan = loader.batch_sampler
    steps_per_epoch = len(plan)
    end = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    while state.epoch < args.epochs and not state.is_done(end):
        if state.should_stop_early(args.early_stop_patience):
            utils.log(f"early stopping: no better AP in {state.evaluations_since_best} evaluations")
            break
        start, first_step = time.perf_counter(), state.step - state.epoch * steps_per_epoch
        last_step = min((state.epoch + 1) * steps_per_epoch, end)
        if state.step < last_step:  # else resumed between an epoch and its evaluation
            plan.start(state.epoch, first_step)
            engine.train_one_epoch(
                state,
                loader,
                args,
                last_step=last_step,
                log_step=log_step,
                on_step_end=timer.after_step,
            )
            timer.save()  # a run interrupted in the evaluation then repeats no step
        metrics = evaluate(state.eval_model, state.epoch, state.step)
        best = state.update_best(metrics["AP"])
        run_log.log_best(state, metrics["AP"], best)
        state.epoch = state.step // steps_per_epoch
        timer.save(best=best, score_thresholds=coco_eval.chosen_thresholds(metrics))
        if first_step == 0:
            seconds_per_step = (time.perf_counter() - start) / steps_per_epoch
            run_log.log_time_left(end - state.step, seconds_per_step)


# -------------------------------------------------------------------------------------- model


def build_model(
    args: argparse.Namespace, categories: coco_utils.Categories, saved: dict | None
) -> nn.Module:
    """Build the detector and load its weights: of a checkpoint, --weights, or a backbone."""
    pretrained = models.pretrained_kind(args.weights, args.weights_backbone)
    backbone_state = None
    if pretrained is None and not saved:
        utils.log_field("weights", f"random (seed {args.seed})")
    if pretrained == "backbone" and not saved:
        utils.log_field("weights", f"backbone {args.weights_backbone}, the rest random")
        with utils.first_on_each_machine():
            backbone_state = models.backbone_weights(
                args.model, args.weights_backbone, args.backbone
            )
    torch.manual_seed(args.seed)
    model = models.build_model(
        args.model,
        categories.num_classes,
        backbone_state=backbone_state,
        trainable_backbone_layers=args.trainable_backbone_layers,
        train_norm_affine=args.train_norm_affine,
        min_sizes=transforms.training_sizes(args.data_augmentation, args.min_size),
        **models.structure_of(vars(args)),
    )
    if saved:
        state = saved["model"] if args.test_only else saved.get("raw_model", saved["model"])
        models.load_detector(model, state, keep_head=True, source=args.resume)
    elif args.weights:
        with utils.first_on_each_machine():
            models.load_pretrained_detector(
                model,
                args.model,
                args.weights,
                categories,
                head_required=args.test_only,
                anchors_given=args.anchor_sizes is not None,
            )
    if args.sync_bn and not args.test_only:
        if not models.has_trainable_norms(model):
            raise UserError(
                "--sync-bn has no effect: the norms of this model are frozen; remove it"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# ---------------------------------------------------------------------- optimizer and its state


def build_state(
    args: argparse.Namespace, model: nn.Module, loader: DataLoader, amp_dtype: torch.dtype | None
) -> TrainState:
    """Build optimizer, schedule and moving average: the state of a training at its first step."""
    steps_per_epoch, epoch = len(loader.batch_sampler), args.start_epoch or 0
    if args.warmup_steps is None:  # needs the length of an epoch
        args.warmup_steps = min(1000, steps_per_epoch)
    factor = partial(
        engine.learning_rate_factor,
        steps_per_epoch=steps_per_epoch,
        epochs=args.epochs,
        warmup_steps=args.warmup_steps,
        milestones=args.lr_steps if args.lr_scheduler == "multisteplr" else None,
        gamma=args.lr_gamma,
    )
    return TrainState(
        model=model,
        optimizer=build_optimizer(args, model),
        learning_rate=lambda step: args.lr * factor(step),
        amp_dtype=amp_dtype,
        ema=MovingAverage(model, args.ema) if args.ema else None,
        epoch=epoch,
        step=epoch * steps_per_epoch,
        # Frozen norms never change: only trainable ones need their buffers sent in every step.
        ddp_model=utils.wrap_ddp(model, models.has_trainable_norms(model)),
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of --opt for the trainable parameters."""
    decays = (args.weight_decay, args.norm_weight_decay, args.bias_weight_decay)
    groups = models.parameter_groups(model, *decays)
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
    initialize_momentum(optimizer)
    return optimizer


def choose_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.dtype | None, str]:
    """Return the data type of autocast and its description, and log device and precision."""
    amp_dtype, precision = resolve_precision(device, args.amp, args.amp_dtype)
    no_gpu = "" if torch.cuda.is_available() or args.device else no_gpu_note()
    processes = f", {utils.world_size()} processes" if utils.world_size() > 1 else ""
    utils.log_field("device", f"{device.type}{no_gpu}{processes}, {precision}")
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return amp_dtype, precision


# ------------------------------------------------------------------------- resuming and outputs


def load_resume_checkpoint(args: argparse.Namespace) -> dict | None:
    """Return the content of the checkpoint to resume, if any, and set `args.resume` to its path.

    Only rank 0 reads it: other machines may not have the file, or see it later.
    """
    if args.find_batch_size:
        return None
    find = partial(checkpoint.resolve_resume, args.output_dir, args.resume, args.test_only)
    args.resume, saved = utils.run_on_rank_0(find)
    return saved


def trained_epoch_and_step(saved: dict | None) -> tuple[int | None, int | None]:
    """Return the last epoch and the number of steps that a checkpoint was trained for."""
    if not saved:
        return None, None
    return max(0, saved["step"] - 1) // saved["args"]["steps_per_epoch"], saved["step"]


def open_trackers(args: argparse.Namespace, saved: dict | None):
    """Return the `Trackers` of --tracker, open on rank 0; on the others they do nothing."""
    from reporting.trackers import Trackers

    trackers, step = Trackers(), saved["step"] if saved else None
    utils.run_on_rank_0(partial(trackers.open, args.tracker, args.output_dir, step))
    return trackers


def write_report(args: argparse.Namespace) -> None:
    """Write the report of a finished run; a failure is only logged, as all results are saved."""
    if args.no_report or utils.rank() != 0:
        return
    try:
        import report

        utils.log(f"report: {report.write(args.output_dir)}")
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        utils.log(f"no report was written: {kind}{error}")


@record
def run_and_exit() -> None:
    """Run `main` with signal handlers, exit codes and cleanup, in every process of torchrun."""
    failures.exit_if_already_finished()
    preemption.install_signal_handlers()
    preemption.use_forked_workers()
    try:
        failures.run_command(main)
    finally:
        preemption.kill_workers()
        utils.cleanup_distributed()


if __name__ == "__main__":
    run_and_exit()
