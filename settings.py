"""Defaults of flags that depend on other flags, and flags that contradict each other."""

import argparse
import os
from pathlib import Path, PureWindowsPath

import torch

import models
import utils
from internals import anchors, backbones
from internals.bit_depth import EARLIER_DEPTH
from internals.custom_augmentation import is_custom
from internals.errors import UserError
from internals.fast.cuda_graphs import LARGEST_BATCH
from internals.recipes import apply_recipe

# The flags that define the model and its input (an augmentation may set its sizes), and the recipe.
# Without a value they come from the checkpoint to resume. What else must not change:
# checkpoint.RESUME_INVARIANTS.
MODEL_ARGS = (
    "model",
    "weights",
    "weights_backbone",
    "backbone",
    "anchor_sizes",
    "anchor_ratios",
    "trainable_backbone_layers",
    "data_augmentation",
    "min_size",
    "max_size",
    "fixed_size",
    "rpn_score_thresh",
    "bit_depth",
    "recipe",
    "max_detections",
)


# Those for which the weights were trained: with others the detections would be meaningless.
FIXED_ARGS = ("model", "backbone", "anchor_sizes", "anchor_ratios")
# The values of MODEL_ARGS that checkpoints of earlier versions lack.
BEFORE = {"bit_depth": EARLIER_DEPTH, "recipe": "reference"}


def default_workers() -> int:
    """Return the number of data loading processes per device: at most 4, and one per core."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // processes))


def resolve_defaults(args: argparse.Namespace, saved: dict | None, device: torch.device) -> None:
    """Replace None by the default, in place.

    Args:
        args: Of `parse_arguments`.
        saved: The arguments in the checkpoint of --resume; those in `MODEL_ARGS` take precedence
            over other defaults.
        device: The device of this process.

    Raises:
        UserError: A flag contradicts the checkpoint's model, or --recipe is not for this model.
    """
    if saved:
        _take_model_args(args, saved)
    args.model = args.model or models.MODELS[0]
    architecture = models.ARCHITECTURES[args.model]
    apply_recipe(args)
    args.backbone = args.backbone or backbones.name_of(architecture.backbone)
    anchors.resolve(args)
    if args.weights is None and args.weights_backbone is None:
        args.weights_backbone = architecture.backbone.name
    args.data_augmentation = args.data_augmentation or ("none" if args.overfit else "hflip")
    min_size, max_size = architecture.sizes
    if args.data_augmentation == "lsj" and architecture.resizable:
        min_size = max_size = 1024
    args.max_size = args.max_size or round(max_size * (args.min_size or min_size) / min_size)
    args.min_size = args.min_size or min_size
    if args.opt == "sgd" and args.momentum is None:
        args.momentum = 0.9
    if args.lr is None:
        images_per_step = args.batch_size * args.accumulate_steps * utils.world_size()
        args.lr = base_learning_rate(args) * images_per_step / 16
    if args.lr_scheduler == "multisteplr":
        args.lr_gamma = 0.1 if args.lr_gamma is None else args.lr_gamma
    if args.workers is None:
        args.workers = default_workers()
    args.eval_batch_size = args.eval_batch_size or (8 if device.type == "cuda" else 1)
    if args.keep_empty is None:
        args.keep_empty = saved["keep_empty"] if saved else True


def _take_model_args(args: argparse.Namespace, saved: dict) -> None:
    resized = args.min_size not in (None, saved.get("min_size"))
    before = {
        **BEFORE,
        "backbone": backbones.name_of(models.ARCHITECTURES[saved["model"]].backbone),
    }
    for name in MODEL_ARGS:
        given, trained_with = getattr(args, name), saved.get(name, before.get(name))
        differs = _without_folder(given) != _without_folder(trained_with)
        if given is None and name == "max_size" and resized:
            continue  # the default follows --min-size
        if given is None:
            setattr(args, name, trained_with)
        elif differs:
            if name == "anchor_sizes":
                given, trained_with = map(anchors.describe_sizes, (given, trained_with))
            change = f"--{name.replace('_', '-')} {given} differs from {trained_with}"
            if name not in FIXED_ARGS and (args.test_only or args.resume_anyway):
                utils.log_field("resume", f"note: {change}, with which it was trained")
                continue
            anyway = "" if name in FIXED_ARGS else " add --resume-anyway,"
            raise UserError(
                f"{change}, with which {args.resume} was trained: remove the flag,{anyway} or "
                "start a new training in another --output-dir"
            )


def _without_folder(value: object) -> object:
    """Return FILE.py:FUNCTION of a path to a custom augmentation: the file may have been moved."""
    return PureWindowsPath(value).name if isinstance(value, str) and is_custom(value) else value


def base_learning_rate(args: argparse.Namespace) -> float:
    """Return the default learning rate for 16 images per step."""
    return models.ARCHITECTURES[args.model].lr if args.opt == "sgd" else 1e-4


def validate_args(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError for flags that contradict each other or would have no effect."""
    _validate_training_args(args)
    _validate_model_args(args)
    _validate_size_args(args)
    _validate_process_args(args, device)


def _validate_training_args(args: argparse.Namespace) -> None:
    if args.opt != "sgd" and args.momentum is not None:
        raise UserError(f"--momentum has no effect with --opt {args.opt}: remove it")
    if args.lr_scheduler != "multisteplr" and (args.lr_steps or args.lr_gamma is not None):
        raise UserError(
            f"--lr-steps and --lr-gamma have no effect with --lr-scheduler {args.lr_scheduler}: "
            "remove them"
        )
    if args.amp_dtype and not args.amp:
        raise UserError("--amp-dtype has no effect without --amp: add --amp")
    if args.start_epoch and args.resume:
        raise UserError("--start-epoch has no effect with --resume: remove it")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(
            f"--start-epoch {args.start_epoch} is not below --epochs {args.epochs}: raise --epochs"
        )
    if args.test_only and not args.resume and not args.weights:
        raise UserError("--test-only needs a model: add --resume FILE or --weights NAME|FILE")
    if args.overfit and (args.val_annotations or args.val_images or args.max_bad_images):
        raise UserError(
            "--overfit uses training images only and none may be skipped: remove "
            "--val-annotations, --val-images and --max-bad-images"
        )


def _validate_model_args(args: argparse.Namespace) -> None:
    own = models.ARCHITECTURES[args.model].backbone
    backbones.validate(args.model, args.backbone, own, args.weights)
    from_scratch = args.weights is None and args.weights_backbone in (None, "none")
    if args.weights and args.weights_backbone:
        raise UserError("--weights includes a backbone: remove --weights-backbone")
    if from_scratch and args.trainable_backbone_layers is not None:
        raise UserError(
            "--trainable-backbone-layers needs pretrained weights: without them all layers train"
        )
    if from_scratch and args.freeze_backbone:
        raise UserError("--freeze-backbone needs pretrained weights: random ones detect nothing")
    if args.freeze_backbone and args.trainable_backbone_layers is not None:
        raise UserError("--freeze-backbone trains no backbone layers: remove one of the flags "
                        "--freeze-backbone and --trainable-backbone-layers")  # fmt: skip
    if from_scratch and args.train_norm_affine:
        raise UserError(
            "--train-norm-affine needs pretrained weights: without them all norms are trained"
        )
    frozen = args.freeze_backbone or args.trainable_backbone_layers == 0
    if frozen and args.train_norm_affine:
        raise UserError(
            "--train-norm-affine has no effect with --freeze-backbone or "
            "--trainable-backbone-layers 0: remove it"
        )
    if args.rpn_score_thresh is not None and not args.model.startswith("fasterrcnn"):
        raise UserError(f"--rpn-score-thresh has no effect: {args.model} has no proposals")


def _validate_size_args(args: argparse.Namespace) -> None:
    architecture, augmentation = models.ARCHITECTURES[args.model], args.data_augmentation
    default_sizes = (args.min_size, args.max_size) == architecture.sizes
    if args.max_size < args.min_size:
        raise UserError(f"--max-size {args.max_size} is below --min-size {args.min_size}")
    side = architecture.sizes[0]
    if not architecture.resizable and (args.fixed_size or not default_sizes):
        raise UserError(
            f"{args.model} always resizes to {side} x {side} pixels: remove --min-size, --max-size "
            "and --fixed-size"
        )
    if not architecture.resizable and augmentation == "multiscale":
        raise UserError(
            f"{args.model} has a fixed size: --data-augmentation multiscale has no effect"
        )
    if args.fixed_size and augmentation in ("multiscale", "lsj"):
        raise UserError(f"--fixed-size contradicts --data-augmentation {augmentation}: remove one")
    if args.fixed_size and not default_sizes:
        raise UserError("--fixed-size replaces --min-size and --max-size: remove them")
    if augmentation == "lsj" and args.max_size != args.min_size:
        raise UserError("--data-augmentation lsj makes square images: remove --max-size")


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
    if args.cuda_graphs:
        _validate_cuda_graphs(args, device)
    if args.find_batch_size and device.type == "mps":
        raise UserError("--find-batch-size cannot measure the memory of Apple GPUs: remove it")
    if args.find_batch_size and (processes > 1 or args.test_only):
        raise UserError("--find-batch-size needs a single training process: remove torchrun and "
                        "--test-only")  # fmt: skip


def _validate_cuda_graphs(args: argparse.Namespace, device: torch.device) -> None:
    if device.type != "cuda" or args.test_only:
        raise UserError("--cuda-graphs is for training on a CUDA device: remove it")
    if not args.model.startswith("fasterrcnn"):
        raise UserError(f"--cuda-graphs is for Faster R-CNN, not {args.model}: remove it")
    if args.batch_size > LARGEST_BATCH:
        raise UserError(f"--cuda-graphs has no effect with more than {LARGEST_BATCH} images: "
                        "remove it, or lower --batch-size")  # fmt: skip
    if args.find_batch_size:
        raise UserError("--find-batch-size measures steps without graphs: remove --cuda-graphs")
    if args.accumulate_steps > 1:
        raise UserError("--cuda-graphs cannot accumulate gradients: remove --accumulate-steps")


def to_plain_dict(args: argparse.Namespace) -> dict:
    """Convert to plain types, for a checkpoint or JSON; paths become absolute."""
    return {key: str(v.absolute()) if isinstance(v, Path) else v for key, v in vars(args).items()}
