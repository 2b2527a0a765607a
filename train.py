#!/usr/bin/env python3
"""Train and evaluate Faster R-CNN (https://arxiv.org/abs/1506.01497) on COCO-format data.

COCO 2017 on 8 GPUs of one machine, to box AP 37.0 with a ResNet-50-FPN (torchvision's result):

    torchrun --nproc-per-node 8 train.py --data-path datasets/coco --amp

Your own pictures on one GPU, from COCO weights:

    python train.py --data-path my_pictures --weights COCO_V1 --epochs 12 --amp
"""

import argparse
import inspect
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import checkpoint
import coco_eval
import coco_utils
import engine
import models
import report
import samplers
import transforms
import utils
from arguments import (
    base_rate,
    choose_device,
    default_workers,
    parse_arguments,
    refuse_what_cannot_apply,
    settle,
)
from internals import batch_size, data_checks, failures, preemption
from internals.errors import CheckpointError, DataError, StopRequested, UserError
from internals.mixed_precision import resolve_precision
from reporting import tensorboard as board

# --------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """What the epochs draw on; `plan` and `train_loader` are None for --test-only."""

    categories: coco_utils.Categories
    val_loader: DataLoader
    plan: samplers.TrainingPlan | None = None
    train_loader: DataLoader | None = None


def load_data(args: argparse.Namespace, indexes: dict, pinned: bool, saved: dict | None) -> Data:
    """What the epochs draw on, from `indexes` by part; `saved` is the checkpoint to resume."""
    val_index = indexes["val"]
    known = coco_utils.Categories.from_list(saved["categories"]) if saved else None
    make_loader = partial(
        DataLoader,
        collate_fn=coco_utils.collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        worker_init_fn=preemption.ignore_signals_in_worker,
        pin_memory=pinned,
    )
    if args.test_only:
        categories = known or val_index.categories
        plan = train_loader = None
    else:
        index = indexes["train"]
        categories = index.categories
        if known and known != categories:
            raise UserError(
                f"{index.annotation_file} has other categories than {args.resume} was trained on: "
                "to start from its weights use --weights instead of --resume"
            )
        images = training_images(args, index)
        augmentation = transforms.training_preset(args.data_augmentation, args.min_size)
        dataset = coco_utils.CocoDetection(index, categories, images, augmentation)
        widths, heights = index.sizes[dataset.images].T
        groups = samplers.aspect_ratio_groups(widths, heights, args.aspect_ratio_group_factor)
        share = args.batch_size * args.accumulate_steps
        plan = samplers.TrainingPlan(groups, share, utils.world_size(), utils.rank(), args.seed)
        train_loader = make_loader(dataset, batch_sampler=plan, generator=torch.Generator())
    categories.check_contains(val_index.categories, val_index.annotation_file)
    share = samplers.evaluation_batches(
        val_index.sizes, args.eval_batch_size, utils.world_size(), utils.rank()
    )
    val_set = coco_utils.CocoDetection(val_index, categories)
    val_loader = make_loader(val_set, batch_sampler=share, generator=torch.Generator())
    return Data(categories, val_loader, plan, train_loader)


def training_images(args: argparse.Namespace, index: coco_utils.CocoIndex) -> np.ndarray:
    """The positions of the images to train on; raises DataError where no box is usable, PlanError
    if they fill no batch.
    """
    images = np.arange(len(index)) if args.keep_empty else index.images_with_boxes()
    if not len(images):
        raise DataError(
            f"{index.annotation_file} has no box that can be trained on (crowds and boxes without "
            "a size cannot): export it again, with its annotations"
        )
    share = args.batch_size * args.accumulate_steps
    samplers.check_enough(len(images), share, utils.world_size())
    return images


def read_indexes(args: argparse.Namespace) -> dict[str, coco_utils.CocoIndex]:
    """The annotation files by part, "val" and "train", after the quick check.

    With --overfit both are the first few training images.
    """
    indexes = {}
    parts = ("train",) if args.overfit else ("val",) if args.test_only else ("val", "train")
    for part in parts:
        index = indexes[part] = read_index(args, part)
        if args.overfit:
            indexes["train"] = indexes["val"] = index = index.first_with_boxes(args.overfit)
        found = data_checks.faults(index, missing=not args.max_bad_images)
        data_checks.refuse(index, found)
        utils.log(f"{part}: {index.annotation_file}: {data_checks.summary(index)}")
        for fault in found:
            utils.log(f"{part}: {fault}")
        if part == "train":
            training_images(args, index)
    return indexes


def read_index(args: argparse.Namespace, part: str) -> coco_utils.CocoIndex:
    paths = (getattr(args, f"{part}_annotations"), getattr(args, f"{part}_images"))
    return coco_utils.CocoIndex(coco_utils.find_split(args.data_path, part, *paths))


def drop_bad_images(
    args: argparse.Namespace, indexes: dict
) -> tuple[dict[str, coco_utils.CocoIndex], list[int]]:
    """The indexes without the images that cannot be used, of which there may be a few, and the ids
    of those that the validation set loses.
    """
    if not args.max_bad_images:
        return indexes, []
    bad = {part: data_checks.unreadable_images(x, args.workers) for part, x in indexes.items()}
    total = sum(map(len, bad.values()))
    if total > args.max_bad_images:
        found = "; ".join(
            str(f) for images in bad.values() for f in data_checks.image_faults(images)
        )
        raise DataError(f"--max-bad-images {args.max_bad_images}, but {found}")
    for part, images in bad.items():
        for _, _, message in images:
            utils.log(f"{part}: left out: {message}")
    left_out = indexes["val"].image_ids[[i for i, *_ in bad["val"]]].tolist()
    return {part: x.without([i for i, *_ in bad[part]]) for part, x in indexes.items()}, left_out


def check_data(args: argparse.Namespace) -> None:
    """Report on the data, every image opened; raise DataError or PlanError if it cannot be trained
    on.
    """
    if utils.rank() != 0:
        return
    workers = default_workers() if args.workers is None else args.workers
    parts = ("val",) if args.test_only else ("train", "val")
    indexes = {part: read_index(args, part) for part in parts}
    wrong, bad = [], []
    for part, index in indexes.items():
        faults, images = data_checks.examine(index, part, workers)
        wrong, bad = wrong + faults, bad + images
    known, val = indexes[parts[0]].categories, indexes["val"]
    known.check_contains(val.categories, val.annotation_file)
    if len(bad) > args.max_bad_images:
        wrong += data_checks.image_faults(bad)
    elif bad:
        utils.log(f"a training with --max-bad-images {args.max_bad_images} leaves out {len(bad)}")
    if wrong:
        raise DataError(f"kinds of faults to mend, listed above: {len(wrong)}")
    if not args.test_only:
        training_images(args, indexes["train"])
    utils.log("nothing here stands in the way of a training")


# -------------------------------------------------------------------------------------- model


def build_model(
    args: argparse.Namespace, categories: coco_utils.Categories, saved: dict | None
) -> nn.Module:
    """The detector with the weights it starts from: a checkpoint's, --weights, or a backbone's."""
    pretrained = models.start_of(args.weights, args.weights_backbone)
    backbone = None
    if pretrained == "backbone" and not saved:
        with utils.first_on_each_machine():
            backbone = backbone_state(args)
    torch.manual_seed(args.seed)
    model = models.build_model(
        args.model,
        categories.num_classes,
        pretrained=pretrained,
        backbone_state=backbone,
        trainable_backbone_layers=args.trainable_backbone_layers,
        freeze_backbone=args.freeze_backbone,
        min_sizes=transforms.training_sizes(args.data_augmentation, args.min_size),
        max_size=args.max_size,
        fixed_size=args.fixed_size,
        rpn_score_thresh=args.rpn_score_thresh,
    )
    if saved:
        weights = saved["model"] if args.test_only else saved.get("raw_model", saved["model"])
        models.load_detector(model, weights, True, str(args.resume))
    elif args.weights:
        with utils.first_on_each_machine():
            load_weights(model, args, categories)
    if args.sync_bn and not args.test_only:
        if not models.has_trainable_norms(model):
            raise UserError("--sync-bn has nothing to share: the norms of this model are frozen")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def load_weights(
    model: nn.Module, args: argparse.Namespace, categories: coco_utils.Categories
) -> None:
    """Start from a whole detector, with its head if it was made for the same categories."""
    if models.is_file(args.weights):
        state = checkpoint.load_weights_file(Path(args.weights))
        rows, state = state.get("categories"), state.get("model", state)
        same = rows == categories.to_list() if rows else models.same_classes(model, state)
    else:
        state, same = models.detector_weights(args.model, args.weights), categories.is_coco
    if not same and args.test_only:
        raise UserError(
            f"--weights {args.weights} was trained on other categories than these: fine-tune it "
            "first, without --test-only"
        )
    models.load_detector(model, state, same, f"--weights {args.weights}")
    head = "its head included" if same else f"with a new head for {len(categories.ids)} categories"
    utils.log(f"weights: {args.weights}, {head}")


def backbone_state(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The classifier that --weights-backbone names, whose layers the backbone takes over."""
    utils.log(f"weights: backbone {args.weights_backbone}, the rest random (seed {args.seed})")
    if models.is_file(args.weights_backbone):
        return checkpoint.load_weights_file(Path(args.weights_backbone))
    return models.backbone_weights(args.model, args.weights_backbone)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = models.parameter_groups(model, args.weight_decay, args.norm_weight_decay)
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model for training: wrapped for DDP if there are other processes."""
    if utils.world_size() == 1:
        return model
    # Frozen norms never change, so only trainable ones are worth sending in every step. The option
    # has another name since torch 2.13.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{name: models.has_trainable_norms(model)},
    )


# ------------------------------------------------------------------------------------ the run


# What has to be as it was for a resumed run to end as an undisturbed one: arguments, and facts that
# `Run.facts` adds.
COMPARED = (
    *("seed", "global_batch", "keep_empty", "aspect_ratio_group_factor", "precision"),
    *("opt", "lr", "momentum", "weight_decay", "norm_weight_decay", "clip_grad_norm", "sync_bn"),
    *("epochs", "lr_scheduler", "lr_steps", "lr_gamma", "warmup_steps", "ema", "freeze_backbone"),
    *("train_data", "val_data"),
)
PLANNED = ("seed", "global_batch", "keep_empty", "aspect_ratio_group_factor", "train_data")


@dataclass
class Run:
    """A training in progress: what a checkpoint is made of."""

    args: argparse.Namespace
    data: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    facts: dict  # what a checkpoint keeps besides the arguments
    best_AP: float | None = None
    evaluations_since_best: int = 0
    saved_step: int | None = None  # of the last checkpoint that this run has written

    def __post_init__(self):
        self.writer = checkpoint.Writer(self.args.output_dir, self.args.keep_checkpoints)
        self.average = self.average_weights() if self.args.ema else None
        every, minutes = self.args.checkpoint_every, self.args.checkpoint_minutes
        self.keeper = preemption.CheckpointTimer(every, minutes, self.save_within_epoch)

    def average_weights(self) -> AveragedModel:
        """The moving average of weights and of norms' statistics, kept up after every step."""
        average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(self.args.ema), use_buffers=True
        )
        self.optimizer.register_step_post_hook(lambda *_: average.update_parameters(self.model))
        return average

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate, and to load elsewhere."""
        return self.average.module if self.average else self.model

    def restore(self, saved: dict | None) -> tuple[int, int]:
        """Take over a checkpoint's state; return the epoch to go on in and the steps done."""
        steps = len(self.data.plan)
        if not saved:
            epoch = self.args.start_epoch or 0
            return epoch, epoch * steps
        changed = changes(saved["args"], {**plain(self.args), **self.facts})
        if changed and not self.args.resume_anyway:
            raise UserError(
                f"{self.args.resume} was trained with {describe(changed)}. Use what it was trained "
                "with, say --resume-anyway to go on regardless, or choose another --output-dir for "
                "a new training"
            )
        if changed:
            utils.log(f"--resume-anyway: trained with {describe(changed)}")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.best_AP = saved["best_AP"]
        self.evaluations_since_best = saved.get("evaluations_since_best", 0)
        if self.average and "raw_model" in saved:
            self.average.module.load_state_dict(saved["model"])
            self.average.n_averaged.fill_(saved["step"])
        epoch, step, before = saved["epoch"], saved["step"], saved["args"]
        if changed.keys() & set(PLANNED):
            utils.log(f"epoch {epoch} begins anew, because its plan is another one")
            step = epoch * steps
        elif before["world_size"] != utils.world_size():
            utils.log(
                f"{utils.world_size()} processes instead of {before['world_size']}: every planned "
                "image is seen once, as before, but the weights are not bitwise the same"
            )
        return epoch, step

    def save(self, epoch: int, step: int) -> None:
        """Write a checkpoint: `step` steps are done, a resumed run goes on in `epoch`.

        Raises RunError in every process.
        """
        self.begin_save(epoch, step)
        self.finish()

    def begin_save(self, epoch: int, step: int) -> None:
        """The same beside what changes no weights, until `finish` is called."""
        utils.run_on_rank_0(lambda: self.writer.begin(self._state(epoch, step)))
        self.saved_step = step
        self.keeper.note_save()

    def save_within_epoch(self, step: int) -> None:
        self.save(step // len(self.data.plan), step)

    def save_during(self, evaluation: Callable[[], dict | None], epoch: int, step: int):
        """Write a checkpoint while the model is evaluated; return what `evaluation` returns."""
        self.begin_save(epoch, step)
        try:
            result = evaluation()
        except StopRequested:  # in every process
            self.finish()
            raise
        self.finish()
        return result

    def _state(self, epoch: int, step: int) -> dict:
        state = {
            "model": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "best_AP": self.best_AP,
            "evaluations_since_best": self.evaluations_since_best,
            "categories": self.data.categories.to_list(),
            "args": {**plain(self.args), **self.facts},
        }
        if self.average:
            state["raw_model"] = self.model.state_dict()
        return state

    def save_evaluated(self, epoch: int, step: int, numbers: dict | None) -> None:
        """Add to the checkpoint of `step` that it was evaluated; it is the best one too if no AP so
        far was as high.

        `numbers` are those of rank 0; the other processes have None and do not know `best_AP`.
        """
        value = numbers and numbers["AP"]
        best = value is not None and (self.best_AP is None or value > self.best_AP)
        if best:
            self.best_AP = value
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        if self.saved_step != step:  # resumed to evaluate, perhaps from another folder
            self.save(epoch, step)
        if utils.rank() == 0:
            names = ("best_AP", "evaluations_since_best")
            self.writer.amend({"epoch": epoch, **{n: getattr(self, n) for n in names}}, best)

    def finish(self) -> None:
        """Wait until all is on the disk; raises RunError in every process."""
        utils.run_on_rank_0(self.writer.finish)

    def is_over(self) -> bool:
        """Whether AP has not risen for --early-stop-patience evaluations, on every process."""
        waited = utils.run_on_rank_0(lambda: self.evaluations_since_best)
        patience = self.args.early_stop_patience
        if not patience or waited < patience:
            return False
        utils.log(f"no better AP in {waited} evaluations (--early-stop-patience {patience}): done")
        return True


def changes(before: dict, now: dict) -> dict[str, tuple]:
    """What `COMPARED` names and is not as it was: (before, now) by name."""
    names = [name for name in COMPARED if name in before and before[name] != now[name]]
    return {name: (before[name], now[name]) for name in names}


def describe(changed: dict[str, tuple]) -> str:
    """The changes in words: "--lr 0.1 (now 0.2), other training data"."""
    words = []
    for name, (before, now) in changed.items():
        if name in ("train_data", "val_data"):
            words.append("other training data" if name == "train_data" else "other validation data")
        elif name in ("global_batch", "precision"):
            words.append(f"{name.replace('_', ' ')} {before} (now {now})")
        else:
            words.append(f"--{name.replace('_', '-')} {before} (now {now})")
    return ", ".join(words)


def plain(args: argparse.Namespace) -> dict:
    """The arguments as plain types, for a checkpoint or JSON; paths so that they hold anywhere."""
    return {key: str(v.absolute()) if isinstance(v, Path) else v for key, v in vars(args).items()}


def read_resumed(args: argparse.Namespace) -> dict | None:
    """The checkpoint to resume, if any; refuses to write over one that nobody resumes.

    Rank 0 alone reads it, so that nodes without its file, and nodes that see it late, agree.
    """
    args.resume, saved = utils.run_on_rank_0(partial(find_resumed, args))
    return saved


def find_resumed(args: argparse.Namespace) -> tuple[str | None, dict | None]:
    if args.resume_anyway and not args.resume:
        raise UserError("--resume-anyway needs --resume FILE or --resume auto")
    if args.find_batch_size:
        return None, None
    present = checkpoint.present(args.output_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, by itself
    if args.resume == "auto" or (restarted and present and not args.test_only):
        found = checkpoint.newest(args.output_dir)
        if found is None and args.test_only:
            raise UserError(f"--resume auto: no checkpoint in {args.output_dir} to evaluate")
        if found is None:
            utils.log(f"--resume auto: no checkpoint in {args.output_dir} yet, a new training")
            return None, None
        path, saved, passed_over = found
        for message in passed_over:
            utils.log(f"passed over: {message}")
        return str(path), saved
    own = args.resume and Path(args.resume).resolve().parent == args.output_dir.resolve()
    if present and args.test_only and not own:
        raise UserError(
            f"{present[0]} is there from another training, whose detections and report this "
            "evaluation would write over: choose another --output-dir"
        )
    if args.resume:
        try:
            saved = checkpoint.load(Path(args.resume))
        except CheckpointError as error:
            raise CheckpointError(f"--resume {error}") from None
        later = [p for p in checkpoint.numbered(args.output_dir) if later_than(p, saved)]
        if later and not args.test_only:
            raise UserError(
                f"{args.resume} has {saved['step']} steps, but {later[0]} has more, which going on "
                "from here would push out: use --resume auto, or choose another --output-dir"
            )
        return args.resume, saved
    if present and not args.test_only:
        raise UserError(
            f"{present[0]} is there from another training, which this one would write over: go on "
            "with --resume auto, or choose another --output-dir"
        )
    return None, None


def later_than(path: Path, saved: dict) -> bool:
    return int(path.stem.rpartition("_")[2]) > saved["step"]


def prepare_output(folder: Path) -> None:
    """Make the output folder; one that cannot be written fails now, not at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from error


def facts(device: torch.device, precision: str, data: Data) -> dict:
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
        "train_images": len(data.train_loader.dataset) if data.train_loader else None,
        "val_images": len(data.val_loader.dataset),
        "categories": data.categories.to_list(),
    }


def say_training(run: Run, epoch: int, step: int) -> None:
    """The lines before the first step: what is about to happen, with the arithmetic."""
    args, plan, processes = run.args, run.data.plan, utils.world_size()
    if epoch >= args.epochs:
        utils.log(f"nothing is left to train of {args.epochs} epochs: raise --epochs to go on")
        return
    shares = f"{args.batch_size}"
    shares += f" on each of {processes} processes" if processes > 1 else ""
    shares += f" {args.accumulate_steps} times" if args.accumulate_steps > 1 else ""
    utils.log(
        f"training: {len(plan.groups):,} images, {shares} a step, {len(plan)} steps an epoch, "
        f"epochs {epoch} to {args.epochs - 1}"
        + (f", until {args.max_steps} steps are done" if args.max_steps else "")
    )
    size = "x".join(map(str, args.fixed_size or ())) or f"{args.min_size} to {args.max_size}"
    utils.log(f"images: resized to {size} pixels, augmentation: {args.data_augmentation}")
    if args.lr_scheduler == "multisteplr":
        drops = f"x {args.lr_gamma} after epochs {' '.join(map(str, args.lr_steps))}"
    else:
        drops = "then a cosine down to 0"
    base = base_rate(args)
    rule = (
        f" = {base} x {plan.global_batch} / 16" if args.lr == base * plan.global_batch / 16 else ""
    )
    utils.log(f"learning rate: {args.lr:g}{rule}, warm-up over {args.warmup_steps} steps, {drops}")
    if step:
        utils.log(f"resumed: {args.resume or '--start-epoch'}, {step} steps done")


def evaluate(
    model: nn.Module,
    epoch: int | None,
    step: int | None,
    *,
    args: argparse.Namespace,
    data: Data,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    metrics: utils.MetricsFile,
    tensorboard: board.Board | None,
) -> dict | None:
    """COCO's numbers after `step`, written down and said; None in all processes but rank 0."""
    numbers = engine.evaluate(
        model,
        data.val_loader,
        data.categories,
        device=device,
        amp_dtype=amp_dtype,
        output_dir=args.output_dir,
        evaluator=args.evaluator,
        show=tensorboard and partial(tensorboard.show, step=step or 0),
    )
    losses = {}
    if args.val_loss:
        losses["val_loss"] = engine.validation_loss(
            model, data.val_loader, device=device, amp_dtype=amp_dtype
        )
        parts = [f"{k.removeprefix('loss_')} {v:.4f}" for k, v in losses["val_loss"].items()]
        utils.log(f"validation {parts[0]}  ({', '.join(parts[1:])})")
    if numbers is not None:
        metrics.write("eval", epoch=epoch, step=step, **numbers, **losses)
        utils.log(coco_eval.table(numbers))
    return numbers


def train(run: Run, saved: dict | None, device: torch.device, evaluate, amp_dtype, metrics) -> None:
    """All epochs from where `saved` left off, each followed by an evaluation and a checkpoint."""
    args, plan = run.args, run.data.plan
    first_epoch, step = run.restore(saved)
    say_training(run, first_epoch, step)
    factor = partial(
        engine.learning_rate_factor,
        steps_per_epoch=len(plan),
        epochs=args.epochs,
        warmup_steps=args.warmup_steps,
        milestones=args.lr_steps,
        gamma=args.lr_gamma,
    )
    model = distribute(run.model, device)
    end = min(args.epochs * len(plan), args.max_steps or sys.maxsize)
    if run.is_over():
        return
    for epoch in range(first_epoch, args.epochs):
        last_step = min((epoch + 1) * len(plan), end)
        if step < last_step:
            plan.start(epoch, step - epoch * len(plan))
            step = engine.train_one_epoch(
                model,
                run.data.train_loader,
                run.optimizer,
                run.scaler,
                engine.Schedule(args.lr, factor),
                device=device,
                amp_dtype=amp_dtype,
                epoch=epoch,
                step=step,
                last_step=last_step,
                seed=args.seed,
                clip_grad_norm=args.clip_grad_norm,
                accumulate_steps=args.accumulate_steps,
                print_freq=args.print_freq,
                metrics=metrics,
                keeper=run.keeper,
            )
            numbers = run.save_during(partial(evaluate, run.evaluated, epoch, step), epoch, step)
        else:  # resumed at the end of an epoch, whose checkpoint is there
            numbers = evaluate(run.evaluated, epoch, step)
        run.save_evaluated(step // len(plan), step, numbers)
        if step >= end or run.is_over():
            break
    run.finish()


def main(argv: list[str] | None = None) -> None:
    begin = time.perf_counter()
    args = parse_arguments(argv)
    if args.check_data:
        check_data(args)
        return
    device = choose_device(args.device)
    prepare_output(args.output_dir)
    indexes = read_indexes(args)
    utils.init_distributed(device, args.dist_url or "env://", args.timeout_minutes)
    saved = read_resumed(args)
    settle(args, saved and saved["args"], device)
    refuse_what_cannot_apply(args, device)
    amp_dtype, precision = choose_precision(args, device)

    indexes, left_out = drop_bad_images(args, indexes)
    data = load_data(args, indexes, device.type == "cuda", saved)
    model = build_model(args, data.categories, saved).to(device)
    if args.find_batch_size:
        run = start_run(args, indexes, data, model, device, amp_dtype)
        find_batch_size(run, device, amp_dtype)
        return
    tensorboard = open_tensorboard(args, saved)
    metrics = utils.MetricsFile(args.output_dir, tensorboard and tensorboard.write)
    about = {**facts(device, precision, data), "val_images_left_out": left_out}
    metrics.write("start", args=plain(args), **about)
    evaluate_here = partial(
        evaluate,
        **{"args": args, "data": data, "device": device, "amp_dtype": amp_dtype},
        **{"metrics": metrics, "tensorboard": tensorboard},
    )
    if args.test_only:
        step = saved and saved["step"]
        epoch = saved and max(0, step - 1) // saved["args"]["steps_per_epoch"]
        evaluate_here(model, epoch, step)
    else:
        run = start_run(args, indexes, data, model, device, amp_dtype)
        train(run, saved, device, evaluate_here, amp_dtype, metrics)
        seconds, saving = time.perf_counter() - begin, run.writer.waited
        metrics.write("end", best_AP=run.best_AP, seconds=seconds, saving_seconds=saving)
        best = "" if run.best_AP is None else f"best AP {run.best_AP:.3f}, "
        share = f"{saving / seconds:.1%} of the time went into checkpoints"
        utils.log(f"done: {best}results in {args.output_dir}; {share}")
    if not args.no_report:
        utils.run_on_rank_0(partial(write_report, args.output_dir))


def choose_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.dtype | None, str]:
    """The type of autocast and its description; says what the run computes on and with."""
    amp_dtype, precision = resolve_precision(device, args.amp, args.amp_dtype)
    no_gpu = "" if torch.cuda.is_available() or args.device else ": no CUDA device was found"
    utils.log(f"device: {device.type}{no_gpu}, precision: {precision}")
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return amp_dtype, precision


def open_tensorboard(args: argparse.Namespace, saved: dict | None) -> board.Board | None:
    if not args.tensorboard or utils.rank() != 0:
        return None
    try:
        return board.Board(args.output_dir / "tensorboard", saved["step"] if saved else 0)
    except UserError as error:
        raise UserError(str(error)) from None


def write_report(output_dir: Path) -> None:
    """The report of a run that is over, whose results are safe whatever happens to it."""
    try:
        utils.log(f"report: {report.write(output_dir)}")
    except Exception as error:  # whatever it is, the training is done and saved
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        utils.log(f"no report was written: {kind}{error}")


def find_batch_size(run: Run, device: torch.device, amp_dtype: torch.dtype | None) -> None:
    """Say how many of the hardest images fit into memory in a training step."""
    preemption.restore_signal_handlers()  # there is nothing to save
    args, dataset = run.args, run.data.train_loader.dataset
    step = partial(
        engine.peak_of_a_step,
        **{"model": run.model, "optimizer": run.optimizer, "scaler": run.scaler},
        **{"device": device, "amp_dtype": amp_dtype},
    )
    squares = args.data_augmentation == "lsj"
    sizes = (args.min_size, args.max_size)
    fit, how = batch_size.find(dataset, run.data.plan.groups, sizes, squares, step, device)
    if not fit:
        raise UserError("not even one image fits: lower --min-size, or choose a smaller --model")
    utils.log(f"--batch-size {fit} is the largest that fits, {how}")


def start_run(
    args: argparse.Namespace,
    indexes: dict,
    data: Data,
    model: nn.Module,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Run:
    """A training before its first step, with the facts that its checkpoints keep."""
    if args.warmup_steps is None:
        args.warmup_steps = min(1000, len(data.plan))
    kept = {
        "steps_per_epoch": len(data.plan),
        "global_batch": data.plan.global_batch,
        "world_size": utils.world_size(),
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."),
        **{f"{part}_data": index.fingerprint() for part, index in indexes.items()},
    }
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    return Run(args, data, model, build_optimizer(args, model), scaler, kept)


@record
def run_and_exit() -> None:
    """Run `main` as the one process that it is, or as one of many."""
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
