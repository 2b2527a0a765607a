#!/usr/bin/env python3
"""Train and evaluate Faster R-CNN (https://arxiv.org/abs/1506.01497) on COCO-format data.

COCO 2017 on 8 GPUs of one machine, to box AP 37.0 with a ResNet-50-FPN (torchvision's result):

    torchrun --nproc-per-node 8 train.py --data-path datasets/coco --amp

Your own pictures on one GPU, from COCO weights:

    python train.py --data-path my_pictures --weights COCO_V1 --epochs 12 --amp
"""

import argparse
import contextlib
import inspect
import os
import platform
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import coco_check
import coco_eval
import coco_utils
import engine
import models
import samplers
import transforms
import utils

ROOT = Path(__file__).resolve().parent


class UsageError(ValueError):
    """Flags that contradict each other or what is there."""


# --------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


def at_least(kind: type, least: float):
    """An argparse type: a number that is not below `least`."""

    def convert(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    return convert


count, natural, several = at_least(int, 1), at_least(int, 0), at_least(int, 2)
positive = at_least(float, 0.0)


# fmt: off

def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", type=Path, default=ROOT / "datasets/coco", metavar="FOLDER",
        help="COCO 2017's layout, or train/ and valid/ (or val/) with _annotations.coco.json "
        "beside the images (default: datasets/coco)")
    add("--dataset", choices=["coco"], default="coco", help="format of the data; there is only one")
    for part in ("train", "val"):
        add(f"--{part}-annotations", type=Path, metavar="FILE",
            help="annotation file elsewhere")
        add(f"--{part}-images", type=Path, metavar="FOLDER", help="its images")
    add("--keep-empty", action="store_true", help="train on images without a usable box, too")
    add("--data-augmentation", choices=transforms.PRESETS,
        help="hflip: mirror every second image; multiscale: and draw the size from 0.6 to 1 x "
        "--min-size; lsj: large-scale jitter in squares of --min-size (then 1024); ssd and "
        "ssdlite: crops, with colours and zoom-out in ssd (default: hflip)")
    add("--aspect-ratio-group-factor", type=int, default=3, metavar="K",
        help="fill batches with images of similar shape, out of 2K+2 groups of width / height; "
        "0: upright or wide, -1: any (default: %(default)s)")
    add("-b", "--batch-size", type=count, default=2, metavar="N",
        help="images in a step on each device (default: %(default)s)")
    add("-j", "--workers", type=natural, metavar="N",
        help="loading processes for each device (default: 4, or the number of cores for each)")
    add("--check-data", action="store_true",
        help="open every image, report what is in the data and all that is wrong with it, and end")
    add("--max-bad-images", type=natural, default=0, metavar="N",
        help="open every image first and go on without those that cannot be used, if they are not "
        "more than N (default: do not look; the first bad one ends the run)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=models.MODELS, help=f"(default: {models.MODELS[0]})", metavar="NAME")
    add("--weights", metavar="NAME|FILE",
        help="start from a whole detector: COCO_V1, or a .pth file; its head is replaced where the "
        "categories differ")
    add("--weights-backbone", metavar="NAME|FILE|none",
        help="start from an ImageNet backbone; none: from random weights, training all layers and "
        "norms (default: IMAGENET1K_V1)")
    add("--trainable-backbone-layers", type=natural, metavar="N",
        help="train the last N layers of a pretrained backbone, of 5 in a ResNet and 6 in a "
        "MobileNet (default: 3)")
    add("--min-size", type=count, metavar="PIXELS",
        help="shortest side that images are resized to (default: 800, or 320 for the 320 model)")
    add("--max-size", type=count, metavar="PIXELS",
        help="bound of the longest side (default: 1333 at 800, in proportion at others)")
    add("--fixed-size", type=count, nargs=2, metavar=("H", "W"),
        help="stretch every image to this size, so that all steps are alike: for benchmarks")
    add("--rpn-score-thresh", type=positive, metavar="SCORE",
        help="drop proposals below this objectness, 0 to 1 (default: the model's own)")
    add("--sync-bn", action="store_true",
        help="share trainable norms' statistics between devices")


def add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=count, default=26, metavar="N", help="(default: %(default)s)")
    add("--opt", choices=["sgd", "adamw"], default="sgd", help="(default: %(default)s)")
    add("--lr", type=positive, metavar="RATE",
        help="learning rate, taken literally (default: 0.02 for sgd and 0.0001 for adamw, times "
        "the images in a step on all devices / 16)")
    add("--momentum", type=positive, metavar="M", help="of sgd (default: 0.9)")
    add("--weight-decay", "--wd", type=positive, default=1e-4, metavar="W",
        help="(default: %(default)s)")
    add("--norm-weight-decay", type=positive, metavar="W",
        help="for the parameters of norms (default: as the others)")
    add("--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], default="multisteplr",
        help="(default: %(default)s)")
    add("--lr-steps", type=count, nargs="+", metavar="EPOCH",
        help="multiply the rate by --lr-gamma after these epochs (default: 16 22 of 26, in "
        "proportion for other --epochs)")
    add("--lr-gamma", type=positive, metavar="FACTOR", help="(default: 0.1)")
    add("--warmup-steps", type=natural, metavar="N",
        help="steps of linear warm-up (default: 1000, or the first epoch if that is shorter)")
    add("--clip-grad-norm", type=positive, metavar="NORM",
        help="scale larger gradients down to this norm (default: do not)")
    add("--max-steps", type=count, metavar="N",
        help="for trials: stop after N steps in all, evaluate and save")
    add("--start-epoch", "--start_epoch", type=natural, metavar="E",
        help="count epochs from E on, without a checkpoint to resume (default: 0)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device and precision")
    add = group.add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU that is made for it")
    add("--amp-dtype", choices=["float16", "bfloat16"], help="overrule that choice of --amp")
    add("--seed", type=natural, default=0, metavar="N",
        help="of everything random (default: %(default)s)")
    add("--use-deterministic-algorithms", action="store_true",
        help="the same bits every time also on CUDA, slower")
    add("--world-size", type=count, metavar="N",
        help="checked against torchrun's number of processes")
    add("--dist-url", metavar="URL", help="where the processes of torchrun meet (default: env://)")
    add("--timeout-minutes", type=positive, default=10, metavar="M",
        help="give up on a process that does not answer the others for so long (default: "
        "%(default)s)")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", type=Path, default=ROOT / "output", metavar="FOLDER",
        help="checkpoints, metrics.jsonl, detections.json (default: output)")
    add("--print-freq", type=count, default=20, metavar="N",
        help="steps from one report of losses to the next (default: %(default)s)")
    add("--checkpoint-every", type=count, metavar="N",
        help="save every N steps, besides after each epoch (default: by the clock alone)")
    add("--checkpoint-minutes", type=positive, default=10, metavar="M",
        help="save when the last checkpoint is so old (default: %(default)s)")
    add("--keep-checkpoints", type=several, default=2, metavar="N",
        help="keep the newest N, 2 or more, besides the best (default: %(default)s)")
    add("--resume", metavar="FILE|auto",
        help="continue from a checkpoint; auto: from the newest in --output-dir that is whole, if "
        "there is any")
    add("--resume-anyway", action="store_true",
        help="continue with other data, batches or rates than before, which is refused else")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--test-only", action="store_true",
        help="evaluate --resume or --weights; the flags of training have no effect then")
    add("--eval-batch-size", type=count, metavar="N",
        help="images of one size evaluated together; changes nothing but speed and memory "
        "(default: 8 on CUDA, 1 on a CPU)")
    add("--evaluator", choices=coco_eval.EVALUATORS,
        help="what computes COCO's numbers; both give the same (default: the first if installed)")


# fmt: on


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="Train and evaluate Faster R-CNN on COCO-format data.",
        epilog="Exit codes: 0 done; 1 failed; 2 the flags, the data or a checkpoint are wrong; 75 "
        "stopped by a signal, everything saved: go on with --resume auto.",
        allow_abbrev=False,
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


# The flags that shape the model: left out, they are taken from the checkpoint of --resume.
SHAPE = (
    *("model", "weights", "weights_backbone", "trainable_backbone_layers"),
    *("data_augmentation", "min_size", "max_size", "fixed_size", "rpn_score_thresh"),
)


def default_workers() -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // processes))


def settle(args: argparse.Namespace, saved: dict | None, device: torch.device) -> None:
    """Fill in what was left out, by a checkpoint's arguments or by default; refuse what clashes."""
    for name in SHAPE if saved else ():
        given, before = getattr(args, name), saved.get(name)
        if given is None:
            setattr(args, name, before)
        elif given != before and not args.test_only and not args.resume_anyway:
            raise UsageError(
                f"--{name.replace('_', '-')} {given} differs from {before}, with which "
                f"{args.resume} was trained: leave it out, say --resume-anyway, or start anew in "
                "another --output-dir"
            )
    args.model = args.model or models.MODELS[0]
    if args.weights is None and args.weights_backbone is None:
        args.weights_backbone = "IMAGENET1K_V1"
    args.data_augmentation = args.data_augmentation or "hflip"
    min_size, max_size = models.sizes(args.model)
    if args.data_augmentation == "lsj":
        min_size = max_size = 1024
    args.max_size = args.max_size or round(max_size * (args.min_size or min_size) / min_size)
    args.min_size = args.min_size or min_size
    if args.opt == "sgd" and args.momentum is None:
        args.momentum = 0.9
    if args.lr is None:
        base = {"sgd": 0.02, "adamw": 1e-4}[args.opt]
        args.lr = base * args.batch_size * utils.world_size() / 16
    if args.lr_scheduler == "multisteplr":
        args.lr_steps = args.lr_steps or [round(args.epochs * e / 26) for e in (16, 22)]
        args.lr_gamma = 0.1 if args.lr_gamma is None else args.lr_gamma
    if args.workers is None:
        args.workers = default_workers()
    args.eval_batch_size = args.eval_batch_size or (8 if device.type == "cuda" else 1)
    args.evaluator = args.evaluator or coco_eval.default_evaluator()


def refuse_what_cannot_apply(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UsageError for a flag that would have no effect, or not the one it promises."""
    from_scratch = args.weights is None and args.weights_backbone in (None, "none")
    square = args.data_augmentation == "lsj"
    train = not args.test_only
    for wrong, reason in (
        (args.opt != "sgd" and args.momentum is not None, "--momentum is for --opt sgd"),
        (
            args.lr_scheduler != "multisteplr" and (args.lr_steps or args.lr_gamma is not None),
            "--lr-steps and --lr-gamma are for --lr-scheduler multisteplr",
        ),
        (args.amp_dtype and not args.amp, "--amp-dtype needs --amp"),
        (
            args.weights and args.weights_backbone,
            "--weights brings its own backbone: leave out --weights-backbone",
        ),
        (
            from_scratch and args.trainable_backbone_layers is not None,
            "--trainable-backbone-layers needs pretrained weights: all layers of random ones train",
        ),
        (
            args.fixed_size and args.data_augmentation in ("multiscale", "lsj"),
            f"--fixed-size leaves nothing of --data-augmentation {args.data_augmentation}",
        ),
        (
            args.fixed_size and (args.min_size, args.max_size) != models.sizes(args.model),
            "--fixed-size takes the place of --min-size and --max-size: leave them out",
        ),
        (square and args.max_size != args.min_size, "lsj makes squares: leave out --max-size"),
        (
            args.sync_bn and train and (device.type != "cuda" or utils.world_size() == 1),
            "--sync-bn needs torchrun with several CUDA devices",
        ),
        (
            args.sync_bn and not from_scratch and args.model != "fasterrcnn_resnet50_fpn_v2",
            "--sync-bn has nothing to share: the norms of a pretrained model are frozen",
        ),
        (args.start_epoch and args.resume, "--resume knows its epoch: leave out --start-epoch"),
        (
            args.start_epoch is not None and args.start_epoch >= args.epochs,
            f"--start-epoch {args.start_epoch} leaves nothing of {args.epochs} epochs",
        ),
        (
            args.test_only and not args.resume and not args.weights,
            "--test-only needs a model to test: --resume FILE or --weights NAME|FILE",
        ),
        (
            args.world_size not in (None, utils.world_size()),
            f"--world-size {args.world_size}, but {utils.world_size()} were started: use torchrun "
            "--nproc-per-node N, or start_scripts/train_fasterrcnn_resnet50_amp_dist_torch.sh",
        ),
        (args.dist_url and "RANK" not in os.environ, "--dist-url needs torchrun"),
        (
            args.evaluator not in coco_eval.LIBRARIES,
            f"--evaluator {args.evaluator} is not installed: pip install {args.evaluator}",
        ),
    ):
        if wrong:
            raise UsageError(reason)


def choose_device(name: str | None) -> torch.device:
    """The device of this process; with several processes on a machine each has its own."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device {name}: this recipe runs on cuda and cpu only")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", utils.local_rank())
        elif utils.world_size() > 1:
            raise UsageError(
                f"--device {name}: under torchrun say cuda, each process takes its own"
            )
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"{device}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
    return device


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
        worker_init_fn=utils.let_parent_stop,
        pin_memory=pinned,
    )
    if args.test_only:
        categories = known or val_index.categories
        plan = train_loader = None
    else:
        index = indexes["train"]
        categories = index.categories
        if known and known != categories:
            raise UsageError(
                f"{index.annotation_file} has other categories than {args.resume} was trained on: "
                "to start from its weights use --weights instead of --resume"
            )
        images = training_images(args, index)
        augmentation = transforms.training_preset(args.data_augmentation, args.min_size)
        dataset = coco_utils.CocoDetection(index, categories, images, augmentation)
        widths, heights = index.sizes[dataset.images].T
        groups = samplers.aspect_ratio_groups(widths, heights, args.aspect_ratio_group_factor)
        plan = samplers.TrainingPlan(
            groups, args.batch_size, utils.world_size(), utils.rank(), args.seed
        )
        train_loader = make_loader(dataset, batch_sampler=plan, generator=torch.Generator())
    categories.check_contains(val_index.categories, val_index.annotation_file)
    share = samplers.evaluation_batches(
        val_index.sizes, args.eval_batch_size, utils.world_size(), utils.rank()
    )
    val_set = coco_utils.CocoDetection(val_index, categories)
    val_loader = make_loader(val_set, batch_sampler=share, generator=torch.Generator())
    return Data(categories, val_loader, plan, train_loader)


def training_images(args: argparse.Namespace, index: coco_utils.CocoIndex) -> np.ndarray:
    """The positions of the images to train on; raises PlanError if they fill no batch."""
    images = np.arange(len(index)) if args.keep_empty else index.images_with_boxes()
    samplers.check_enough(len(images), args.batch_size, utils.world_size())
    return images


def read_indexes(args: argparse.Namespace) -> dict[str, coco_utils.CocoIndex]:
    """The annotation files by part, "val" and "train", after the quick check."""
    indexes = {}
    for part in ("val",) if args.test_only else ("val", "train"):
        index = indexes[part] = read_index(args, part)
        found = coco_check.faults(index, missing=not args.max_bad_images)
        coco_check.refuse(index, found)
        utils.log(f"{part}: {index.annotation_file}: {coco_check.summary(index)}")
        for fault in found:
            utils.log(f"{part}: {fault}")
        if part == "train":
            training_images(args, index)
    return indexes


def read_index(args: argparse.Namespace, part: str) -> coco_utils.CocoIndex:
    paths = (getattr(args, f"{part}_annotations"), getattr(args, f"{part}_images"))
    return coco_utils.CocoIndex(coco_utils.find_split(args.data_path, part, *paths))


def drop_bad_images(args: argparse.Namespace, indexes: dict) -> dict[str, coco_utils.CocoIndex]:
    """The indexes without the images that cannot be used, of which there may be a few."""
    bad = {part: coco_check.unreadable_images(x, args.workers) for part, x in indexes.items()}
    total = sum(map(len, bad.values()))
    if total > args.max_bad_images:
        found = "; ".join(
            str(f) for images in bad.values() for f in coco_check.image_faults(images)
        )
        raise coco_utils.DataError(f"--max-bad-images {args.max_bad_images}, but {found}")
    for part, images in bad.items():
        for _, _, message in images:
            utils.log(f"{part}: left out: {message}")
    return {part: x.without([i for i, *_ in bad[part]]) for part, x in indexes.items()}


def check_data(args: argparse.Namespace) -> None:
    """Report on the data, every image opened; raise DataError if it cannot be trained on."""
    if utils.rank() != 0:
        return
    workers = default_workers() if args.workers is None else args.workers
    parts = ("val",) if args.test_only else ("train", "val")
    indexes = {part: read_index(args, part) for part in parts}
    wrong = sum(coco_check.examine(index, part, workers) for part, index in indexes.items())
    known, val = indexes[parts[0]].categories, indexes["val"]
    known.check_contains(val.categories, val.annotation_file)
    if wrong:
        raise coco_utils.DataError(f"{wrong} kinds of faults, listed above, have to be mended")
    utils.log("nothing here stands in the way of a training")


# -------------------------------------------------------------------------------------- model


def build_model(
    args: argparse.Namespace, categories: coco_utils.Categories, saved: dict | None
) -> nn.Module:
    """The detector with the weights it starts from: a checkpoint's, --weights, or a backbone's."""
    torch.manual_seed(args.seed)
    model = models.build_model(
        args.model,
        categories.num_classes,
        pretrained=args.weights is not None or args.weights_backbone != "none",
        trainable_backbone_layers=args.trainable_backbone_layers,
        min_sizes=transforms.training_sizes(args.data_augmentation, args.min_size),
        max_size=args.max_size,
        fixed_size=args.fixed_size,
        rpn_score_thresh=args.rpn_score_thresh,
    )
    with utils.first_on_each_machine():
        if saved:
            models.load_detector(model, saved["model"], True, str(args.resume))
        elif args.weights:
            load_weights(model, args, categories)
        elif args.weights_backbone != "none":
            load_backbone(model, args)
    if args.sync_bn and not args.test_only:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def load_weights(
    model: nn.Module, args: argparse.Namespace, categories: coco_utils.Categories
) -> None:
    """Start from a whole detector, with its head if it was made for the same categories."""
    if models.is_file(args.weights):
        state = checkpoint.load_weights_file(Path(args.weights))
        rows, state = state.get("categories"), state.get("model", state)
        same = (
            rows == categories.to_list()
            if rows
            else models.outputs(state) == categories.num_classes
        )
    else:
        state, same = models.detector_weights(args.model, args.weights), categories.is_coco
    if not same and args.test_only:
        raise UsageError(
            f"--weights {args.weights} was trained on other categories than these: fine-tune it "
            "first, without --test-only"
        )
    models.load_detector(model, state, same, f"--weights {args.weights}")
    head = "its head included" if same else f"with a new head for {len(categories.ids)} categories"
    utils.log(f"weights: {args.weights}, {head}")


def load_backbone(model: nn.Module, args: argparse.Namespace) -> None:
    if models.is_file(args.weights_backbone):
        state = checkpoint.load_weights_file(Path(args.weights_backbone))
    else:
        state = models.backbone_weights(args.model, args.weights_backbone)
    models.load_backbone(model, state, f"--weights-backbone {args.weights_backbone}")
    utils.log(f"weights: backbone {args.weights_backbone}, the rest random (seed {args.seed})")


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
    *("epochs", "lr_scheduler", "lr_steps", "lr_gamma", "warmup_steps"),
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

    def __post_init__(self):
        every, minutes = self.args.checkpoint_every, self.args.checkpoint_minutes
        self.keeper = utils.Keeper(every, minutes, self.save_within_epoch)

    def restore(self, saved: dict | None) -> tuple[int, int]:
        """Take over a checkpoint's state; return the epoch to go on in and the steps done."""
        steps = len(self.data.plan)
        if not saved:
            epoch = self.args.start_epoch or 0
            return epoch, epoch * steps
        changed = changes(saved["args"], {**plain(self.args), **self.facts})
        if changed and not self.args.resume_anyway:
            raise UsageError(
                f"{self.args.resume} was trained with {describe(changed)}. Use what it was trained "
                "with, say --resume-anyway to go on regardless, or choose another --output-dir for "
                "a new training"
            )
        if changed:
            utils.log(f"--resume-anyway: trained with {describe(changed)}")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.best_AP = saved["best_AP"]
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

        Raises checkpoint.NotSavedError in every process.
        """
        utils.from_rank_0(partial(self._write, epoch, step))
        self.keeper.note_save()

    def save_within_epoch(self, step: int) -> None:
        self.save(step // len(self.data.plan), step)

    def _write(self, epoch: int, step: int, best: bool = False) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "best_AP": self.best_AP,
            "categories": self.data.categories.to_list(),
            "args": {**plain(self.args), **self.facts},
        }
        path = checkpoint.save(self.args.output_dir, state, self.args.keep_checkpoints)
        if best:
            checkpoint.save_best(path)

    def save_evaluated(self, epoch: int, step: int, numbers: dict | None) -> None:
        """Write the checkpoint again, as the best one too if no AP so far was as high.

        `numbers` are those of rank 0; the other processes have None and do not know `best_AP`.
        """
        value = numbers and numbers["AP"]
        best = value is not None and (self.best_AP is None or value > self.best_AP)
        if best:
            self.best_AP = value
        utils.from_rank_0(partial(self._write, epoch, step, best))
        self.keeper.note_save()


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
    """The arguments as plain types, for a checkpoint or JSON."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}


def read_resumed(args: argparse.Namespace) -> dict | None:
    """The checkpoint to resume, if any; refuses to write over one that nobody resumes.

    Rank 0 alone reads it, so that nodes without its file, and nodes that see it late, agree.
    """
    args.resume, saved = utils.from_rank_0(partial(find_resumed, args))
    return saved


def find_resumed(args: argparse.Namespace) -> tuple[str | None, dict | None]:
    if args.resume_anyway and not args.resume:
        raise UsageError("--resume-anyway needs --resume FILE or --resume auto")
    present = checkpoint.present(args.output_dir)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, by itself
    if args.resume == "auto" or (restarted and present and not args.test_only):
        found = checkpoint.newest(args.output_dir)
        if found is None:
            utils.log(f"--resume auto: no checkpoint in {args.output_dir} yet, a new training")
            return None, None
        path, saved, passed_over = found
        for message in passed_over:
            utils.log(f"passed over: {message}")
        return str(path), saved
    if args.resume:
        saved = checkpoint.load(Path(args.resume))
        later = [p for p in checkpoint.numbered(args.output_dir) if later_than(p, saved)]
        if later and not args.test_only:
            raise UsageError(
                f"{args.resume} has {saved['step']} steps, but {later[0]} has more, which going on "
                "from here would push out: use --resume auto, or choose another --output-dir"
            )
        return args.resume, saved
    if present and not args.test_only:
        raise UsageError(
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
        raise UsageError(f"--output-dir {folder} cannot be written: {error.strerror}") from error


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
    shares = (
        f"{args.batch_size} on each of {processes} processes" if processes > 1 else args.batch_size
    )
    utils.log(
        f"training: {len(plan.groups):,} images, {shares} a step, {len(plan)} steps an epoch, "
        f"epochs {epoch} to {args.epochs - 1}"
    )
    if args.lr_scheduler == "multisteplr":
        drops = f"x {args.lr_gamma} after epochs {' '.join(map(str, args.lr_steps))}"
    else:
        drops = "then a cosine down to 0"
    base = {"sgd": 0.02, "adamw": 1e-4}[args.opt]
    rule = (
        f" = {base} x {plan.global_batch} / 16" if args.lr == base * plan.global_batch / 16 else ""
    )
    utils.log(f"learning rate: {args.lr:g}{rule}, warm-up over {args.warmup_steps} steps, {drops}")
    if step:
        utils.log(f"resumed: {args.resume or '--start-epoch'}, {step} steps done")


def say_numbers(
    numbers: dict | None, metrics: utils.MetricsFile, epoch: int | None, step: int | None
) -> None:
    if numbers is not None:
        metrics.write("eval", epoch=epoch, step=step, **numbers)
        utils.log(coco_eval.table(numbers))


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
                print_freq=args.print_freq,
                metrics=metrics,
                keeper=run.keeper,
            )
            run.save(epoch, step)
        numbers = evaluate(run.model)
        say_numbers(numbers, metrics, epoch, step)
        run.save_evaluated(step // len(plan), step, numbers)
        if step >= end:
            break


def main(argv: list[str] | None = None) -> None:
    begin = time.perf_counter()
    args = parse_arguments(argv)
    if args.check_data:
        check_data(args)
        return
    device = choose_device(args.device)
    prepare_output(args.output_dir)
    indexes = read_indexes(args)
    utils.start_processes(device, args.dist_url or "env://", args.timeout_minutes)
    saved = read_resumed(args)
    settle(args, saved and saved["args"], device)
    refuse_what_cannot_apply(args, device)
    amp_dtype, precision = engine.precision(device, args.amp, args.amp_dtype)
    no_gpu = "" if torch.cuda.is_available() or args.device else ": no CUDA device was found"
    utils.log(f"device: {device.type}{no_gpu}, precision: {precision}")
    if args.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    if args.max_bad_images:
        indexes = drop_bad_images(args, indexes)
    data = load_data(args, indexes, device.type == "cuda", saved)
    model = build_model(args, data.categories, saved).to(device)
    metrics = utils.MetricsFile(args.output_dir)
    metrics.write("start", args=plain(args), **facts(device, precision, data))
    evaluate = partial(
        engine.evaluate,
        loader=data.val_loader,
        categories=data.categories,
        device=device,
        amp_dtype=amp_dtype,
        output_dir=args.output_dir,
        evaluator=args.evaluator,
    )
    if args.test_only:
        step = saved and saved["step"]
        epoch = saved and max(0, step - 1) // saved["args"]["steps_per_epoch"]
        say_numbers(evaluate(model), metrics, epoch, step)
        return

    run = start_run(args, indexes, data, model, device, amp_dtype)
    train(run, saved, device, evaluate, amp_dtype, metrics)
    metrics.write("end", best_AP=run.best_AP, seconds=time.perf_counter() - begin)
    best = "" if run.best_AP is None else f"best AP {run.best_AP:.3f}, "
    utils.log(f"done: {best}results in {args.output_dir}")


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


# ---------------------------------------------------------------------------------- ways to end

STOPPED = 75  # BSD's EX_TEMPFAIL: nothing is wrong, try again


@record
def run_and_exit() -> None:
    """Run `main`; say in one message, and once, why it ended before its time."""
    end_if_told_before()
    utils.listen_for_stop()
    try:
        main()
    except utils.StopRequested:
        utils.log("stopped as asked; everything is saved, go on with --resume auto")
        leave(STOPPED)
    except (
        UsageError,
        coco_utils.DataError,
        samplers.PlanError,
        models.WeightsError,
        checkpoint.CheckpointError,
    ) as error:
        give_up(str(error), 2)
    except (engine.TrainingError, checkpoint.NotSavedError) as error:
        give_up(str(error), 1)
    except Exception as error:
        if remedy := remedy_for(error):
            give_up(f"{error}. {remedy}", 1)
        if utils.lost_contact(error):
            give_up(f"ended because of {utils.who_failed()}\n({error})", 1)
        give_up(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
    finally:
        utils.end_loading()
        utils.stop_processes()


def remedy_for(error: Exception) -> str | None:
    """What to do about errors of the system that people meet in long runs."""
    text = str(error)
    if "DataLoader worker" in text:
        return (
            "A loading process was killed, most often because memory or shared memory (/dev/shm) "
            "ran out: lower --workers or --batch-size, or start a container with --ipc=host or a "
            "larger --shm-size. Go on with --resume auto"
        )
    if "Too many open files" in text:
        return "Raise the limit with ulimit -n 65536, or lower --workers; then --resume auto"
    return None


def give_up(message: str, exit_code: int, details: str = "") -> None:
    """End this process with the one message of all processes, unless another one has given it."""
    utils.die_of_signals()
    together = torch.distributed.is_initialized()
    if utils.tell_failure(message) and (together or utils.rank() == 0):
        where = f" of rank {utils.rank()}" if details and together else ""
        print(f"{details}train.py: error{where}: {message}", file=sys.stderr, flush=True)
    if together:
        time.sleep(1)  # torchrun ends all when one ends, so the message has to be out before
    elif utils.rank() != 0:
        time.sleep(20)  # before they have met, rank 0 most likely has the same to say
    leave(exit_code)


def leave(exit_code: int) -> None:
    """End with an exit code that the launcher hands on, though torchrun would make it 1."""
    told = utils.launch_file("exit")
    if told:
        with contextlib.suppress(FileExistsError), told.open("x") as file:
            file.write(str(exit_code))
        if exit_code == STOPPED:
            sys.exit(0)  # which torchrun does not take for a reason to start again
    sys.exit(exit_code)


def end_if_told_before() -> None:
    """When torchrun starts again what had ended for good, end at once."""
    told = utils.launch_file("exit")
    try:
        exit_code = int(told.read_text() or 1) if told else None
    except FileNotFoundError:  # never written, or taken away by the first process just now
        return
    if exit_code not in (None, 1):
        sys.exit(exit_code)
    if told and utils.local_rank() == 0:
        told.unlink(missing_ok=True)


if __name__ == "__main__":
    run_and_exit()
