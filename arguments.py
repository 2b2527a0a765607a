"""The command line of train.py: its flags, defaults that depend on others, what is refused."""

import argparse
import os
from pathlib import Path

import torch

import coco_eval
import models
import transforms
import utils
from internals.command_line import (
    ArgumentParser,
    evaluator_name,
    fraction,
    int_at_least_2,
    non_negative_float,
    non_negative_int,
    positive_int,
)
from internals.errors import UserError

ROOT = Path(__file__).resolve().parent


# fmt: off

def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", type=Path, default=ROOT / "datasets/coco", metavar="FOLDER",
        help="COCO 2017's layout, or train/ and valid/ (or val/) with _annotations.coco.json "
        "beside the images (default: datasets/coco)")
    add("--dataset", choices=["coco"], default="coco", help="format of the data; there is only one")
    for split in ("train", "val"):
        add(f"--{split}-annotations", type=Path, metavar="FILE",
            help="annotation file elsewhere")
        add(f"--{split}-images", type=Path, metavar="FOLDER", help="its images")
    add("--overfit", type=positive_int, metavar="N",
        help="train and evaluate on the first N training images with boxes: what cannot learn "
        "these by heart has a fault")
    add("--keep-empty", action="store_true", help="train on images without a usable box, too")
    add("--data-augmentation", choices=transforms.PRESETS,
        help="hflip: mirror images with probability 0.5; multiscale: and draw the size from 0.6 to "
        "1 x --min-size; lsj: large-scale jitter in squares of --min-size (then 1024); ssd and "
        "ssdlite: crops, with colours and zoom-out in ssd; none (default: hflip; none with "
        "--overfit)")
    add("--aspect-ratio-group-factor", type=int, default=3, metavar="K",
        help="fill batches with images of similar shape, out of 2K+2 groups of width / height; "
        "0: upright or wide, -1: any (default: %(default)s)")
    add("-b", "--batch-size", type=positive_int, default=2, metavar="N",
        help="images that go through the model at once on each device: a step, but for "
        "--accumulate-steps (default: %(default)s)")
    add("-j", "--workers", type=non_negative_int, metavar="N",
        help="loading processes for each device (default: 4, or the number of cores for each)")
    add("--check-data", action="store_true",
        help="open every image, report what is in the data and all that is wrong with it, and end")
    add("--max-bad-images", type=non_negative_int, default=0, metavar="N",
        help="open every image first and go on without those that cannot be used, if they are not "
        "more than N (default: do not look; the first bad one ends the run)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", choices=models.MODELS, metavar="NAME",
        help=f"one of {', '.join(models.MODELS)} (default: the first)")
    add("--weights", metavar="NAME|FILE",
        help="start from a whole detector: COCO_V1, or a .pth file; its head is replaced where the "
        "categories differ")
    add("--weights-backbone", metavar="NAME|FILE|none",
        help="start from an ImageNet backbone; none: from random weights, training all layers and "
        "norms (default: IMAGENET1K_V1, or IMAGENET1K_FEATURES for ssd300_vgg16)")
    add("--trainable-backbone-layers", type=non_negative_int, metavar="N",
        help="train the last N layers of a pretrained backbone, of 5 in a ResNet or VGG and 6 in a "
        "MobileNet (default: 3; of ssd300_vgg16 4, of the ssdlite all)")
    add("--freeze-backbone", action="store_true",
        help="train only what comes after the pretrained backbone, its feature pyramid included")
    add("--min-size", type=positive_int, metavar="PIXELS",
        help="shortest side that images are resized to (default: the model's own, most often 800)")
    add("--max-size", type=positive_int, metavar="PIXELS",
        help="bound of the longest side (default: 1333 at 800, in proportion at others)")
    add("--fixed-size", type=positive_int, nargs=2, metavar=("H", "W"),
        help="stretch every image to this size, so that all steps are alike: for benchmarks")
    add("--rpn-score-thresh", type=non_negative_float, metavar="SCORE",
        help="drop proposals below this objectness, 0 to 1 (default: the model's own)")
    add("--sync-bn", action="store_true",
        help="share trainable norms' statistics between devices")


def add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--epochs", type=positive_int, default=26, metavar="N", help="(default: %(default)s)")
    add("--opt", choices=["sgd", "adamw"], default="sgd", help="(default: %(default)s)")
    add("--lr", type=non_negative_float, metavar="RATE",
        help="learning rate, taken literally (default: 0.02 for sgd, 0.01 or less for one-stage "
        "models, 0.0001 for adamw, times the images in a step on all devices / 16)")
    add("--momentum", type=non_negative_float, metavar="M", help="of sgd (default: 0.9)")
    add("--weight-decay", "--wd", type=non_negative_float, default=1e-4, metavar="W",
        help="(default: %(default)s)")
    add("--norm-weight-decay", type=non_negative_float, metavar="W",
        help="for the parameters of norms (default: as the others)")
    add("--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], default="multisteplr",
        help="(default: %(default)s)")
    add("--lr-steps", type=positive_int, nargs="+", metavar="EPOCH",
        help="multiply the rate by --lr-gamma after these epochs (default: 16 22 of 26, in "
        "proportion for other --epochs)")
    add("--lr-gamma", type=non_negative_float, metavar="FACTOR", help="(default: 0.1)")
    add("--warmup-steps", type=non_negative_int, metavar="N",
        help="steps of linear warm-up (default: 1000, or the first epoch if that is shorter)")
    add("--clip-grad-norm", type=non_negative_float, metavar="NORM",
        help="scale larger gradients down to this norm (default: do not)")
    add("--accumulate-steps", type=positive_int, default=1, metavar="N",
        help="add up the gradients of N batches for each step, which then counts N times the "
        "images: for large steps in little memory (default: %(default)s)")
    add("--ema", type=fraction, metavar="DECAY",
        help="evaluate and save an exponential moving average of the weights, such as 0.999")
    add("--early-stop-patience", type=positive_int, metavar="N",
        help="end after N evaluations without a better AP")
    add("--max-steps", type=positive_int, metavar="N",
        help="for trials: stop after N steps in all, evaluate and save")
    add("--start-epoch", "--start_epoch", type=non_negative_int, metavar="E",
        help="count epochs from E on, without a checkpoint to resume (default: 0)")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device and precision")
    add = group.add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU that is made for it")
    add("--amp-dtype", choices=["float16", "bfloat16"], help="overrule that choice of --amp")
    add("--seed", type=non_negative_int, default=0, metavar="N",
        help="of everything random (default: %(default)s)")
    add("--use-deterministic-algorithms", action="store_true",
        help="the same bits every time also on CUDA, slower")
    add("--world-size", type=positive_int, metavar="N",
        help="checked against torchrun's number of processes")
    add("--dist-url", metavar="URL", help="where the processes of torchrun meet (default: env://)")
    add("--timeout-minutes", type=non_negative_float, default=10, metavar="M",
        help="give up on a process that does not answer the others for so long (default: "
        "%(default)s)")
    add("--find-batch-size", action="store_true",
        help="say how many of the largest images with the most boxes fit into memory, and end")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", type=Path, default=ROOT / "output", metavar="FOLDER",
        help="checkpoints, metrics.jsonl, detections.json, report.html (default: output)")
    add("--print-freq", type=positive_int, default=20, metavar="N",
        help="steps from one report of losses to the next (default: %(default)s)")
    add("--tensorboard", action="store_true",
        help="losses, AP and some images for TensorBoard, too, in tensorboard/")
    add("--no-report", action="store_true", help="write no report.html at the end")
    add("--checkpoint-every", type=positive_int, metavar="N",
        help="save every N steps, besides after each epoch (default: by the clock alone)")
    add("--checkpoint-minutes", type=non_negative_float, default=10, metavar="M",
        help="save when the last checkpoint is so old (default: %(default)s)")
    add("--keep-checkpoints", type=int_at_least_2, default=2, metavar="N",
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
    add("--eval-batch-size", type=positive_int, metavar="N",
        help="images of one size evaluated together; changes nothing but speed and memory "
        "(default: 8 on CUDA, 1 on a CPU)")
    add("--val-loss", action="store_true", help="compute the losses on the validation set, too")
    add("--evaluator", type=evaluator_name, choices=coco_eval.EVALUATORS, default="hotcoco",
        help="what computes COCO's numbers; both: with hotcoco and pycocotools, and fail if a "
        "number differs (default: %(default)s)")


# fmt: on


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as they were given, None for those left out. Raises UserError."""
    parser = ArgumentParser(
        description="Train and evaluate Faster R-CNN on COCO-format data.",
        epilog="Exit codes: 0 done; 1 failed; 2 the flags, the data or a checkpoint are wrong; 75 "
        "stopped by a signal, everything saved: go on with --resume auto.",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.resume_anyway and not args.resume:
        parser.error("--resume-anyway needs --resume FILE or --resume auto")
    return args


# The flags that shape the model: left out, they are taken from the checkpoint of --resume. What
# else must not change is in checkpoint.RESUME_INVARIANTS.
MODEL_ARGS = (
    "model",
    "weights",
    "weights_backbone",
    "trainable_backbone_layers",
    "data_augmentation",
    "min_size",
    "max_size",
    "fixed_size",
    "rpn_score_thresh",
)


def default_workers() -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // processes))


def resolve_defaults(args: argparse.Namespace, saved: dict | None, device: torch.device) -> None:
    """Fill in the flags left out, in place: from a checkpoint's arguments `saved`, or by default.

    Raises:
        UserError: a flag that shapes the model contradicts the checkpoint.
    """
    for name in MODEL_ARGS if saved else ():
        given, before = getattr(args, name), saved.get(name)
        if given is None:
            setattr(args, name, before)
        elif given != before and not args.test_only and not args.resume_anyway:
            raise UserError(
                f"--{name.replace('_', '-')} {given} differs from {before}, with which "
                f"{args.resume} was trained: leave it out, say --resume-anyway, or start a new "
                "training in another --output-dir"
            )
    args.model = args.model or models.MODELS[0]
    recipe = models.RECIPES[args.model]
    if args.weights is None and args.weights_backbone is None:
        args.weights_backbone = recipe.backbone.name
    args.data_augmentation = args.data_augmentation or ("none" if args.overfit else "hflip")
    min_size, max_size = recipe.sizes
    if args.data_augmentation == "lsj" and recipe.resizable:
        min_size = max_size = 1024
    args.max_size = args.max_size or round(max_size * (args.min_size or min_size) / min_size)
    args.min_size = args.min_size or min_size
    if args.opt == "sgd" and args.momentum is None:
        args.momentum = 0.9
    if args.lr is None:
        images_in_step = args.batch_size * args.accumulate_steps * utils.world_size()
        args.lr = base_learning_rate(args) * images_in_step / 16
    if args.lr_scheduler == "multisteplr":
        args.lr_steps = args.lr_steps or [round(args.epochs * e / 26) for e in (16, 22)]
        args.lr_gamma = 0.1 if args.lr_gamma is None else args.lr_gamma
    if args.workers is None:
        args.workers = default_workers()
    args.eval_batch_size = args.eval_batch_size or (8 if device.type == "cuda" else 1)


def base_learning_rate(args: argparse.Namespace) -> float:
    """The learning rate for 16 images in a step."""
    return models.RECIPES[args.model].lr if args.opt == "sgd" else 1e-4


def validate_args(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError for a flag that would have no effect, or not the one it promises."""
    _validate_training_args(args)
    _validate_model_args(args)
    _validate_size_args(args)
    _validate_process_args(args, device)


def _validate_training_args(args: argparse.Namespace) -> None:
    if args.opt != "sgd" and args.momentum is not None:
        raise UserError("--momentum is for --opt sgd")
    if args.lr_scheduler != "multisteplr" and (args.lr_steps or args.lr_gamma is not None):
        raise UserError("--lr-steps and --lr-gamma are for --lr-scheduler multisteplr")
    if args.amp_dtype and not args.amp:
        raise UserError("--amp-dtype needs --amp")
    if args.start_epoch and args.resume:
        raise UserError("--resume knows its epoch: leave out --start-epoch")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing of {args.epochs} epochs")
    if args.test_only and not args.resume and not args.weights:
        raise UserError("--test-only needs a model to test: --resume FILE or --weights NAME|FILE")
    if args.overfit and (args.val_annotations or args.val_images or args.max_bad_images):
        raise UserError("--overfit evaluates on training images, of which it needs every one")


def _validate_model_args(args: argparse.Namespace) -> None:
    from_scratch = args.weights is None and args.weights_backbone in (None, "none")
    if args.weights and args.weights_backbone:
        raise UserError("--weights brings its own backbone: leave out --weights-backbone")
    if from_scratch and args.trainable_backbone_layers is not None:
        raise UserError(
            "--trainable-backbone-layers needs pretrained weights: all layers of random ones train"
        )
    if from_scratch and args.freeze_backbone:
        raise UserError(
            "--freeze-backbone needs pretrained weights: random ones would find nothing"
        )
    if args.freeze_backbone and args.trainable_backbone_layers is not None:
        raise UserError("--freeze-backbone leaves nothing of --trainable-backbone-layers")
    if args.rpn_score_thresh is not None and not args.model.startswith("fasterrcnn"):
        raise UserError(f"--rpn-score-thresh: {args.model} has no proposals")


def _validate_size_args(args: argparse.Namespace) -> None:
    recipe, augmentation = models.RECIPES[args.model], args.data_augmentation
    own_sizes = (args.min_size, args.max_size) == recipe.sizes
    if args.max_size < args.min_size:
        raise UserError(
            f"--max-size {args.max_size} is below the shortest side, --min-size {args.min_size}"
        )
    if not recipe.resizable and (args.fixed_size or not own_sizes):
        raise UserError(
            f"{args.model} resizes to {recipe.sizes[0]} pixels square: leave out the sizes"
        )
    if not recipe.resizable and augmentation == "multiscale":
        raise UserError(
            f"{args.model} has one size, which leaves nothing of --data-augmentation multiscale"
        )
    if args.fixed_size and augmentation in ("multiscale", "lsj"):
        raise UserError(f"--fixed-size leaves nothing of --data-augmentation {augmentation}")
    if args.fixed_size and not own_sizes:
        raise UserError("--fixed-size takes the place of --min-size and --max-size: leave them out")
    if augmentation == "lsj" and args.max_size != args.min_size:
        raise UserError("lsj makes squares: leave out --max-size")


def _validate_process_args(args: argparse.Namespace, device: torch.device) -> None:
    processes = utils.world_size()
    if args.sync_bn and not args.test_only and (device.type != "cuda" or processes == 1):
        raise UserError("--sync-bn needs torchrun with several CUDA devices")
    if args.world_size not in (None, processes):
        raise UserError(
            f"--world-size {args.world_size}, but {processes} were started: use torchrun "
            "--nproc-per-node N, or start_scripts/train_fasterrcnn_resnet50_amp_dist_torch.sh"
        )
    if args.dist_url and "RANK" not in os.environ:
        raise UserError("--dist-url needs torchrun")
    if args.find_batch_size and (processes > 1 or args.test_only):
        raise UserError(
            "--find-batch-size is for one training process: leave out torchrun and --test-only"
        )


def to_plain_dict(args: argparse.Namespace) -> dict:
    """The arguments as plain types, for a checkpoint or JSON; paths so that they hold anywhere."""
    return {key: str(v.absolute()) if isinstance(v, Path) else v for key, v in vars(args).items()}
