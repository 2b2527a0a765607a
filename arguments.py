"""The command line of train.py: flags, defaults that depend on other flags, validation."""

import argparse
from pathlib import Path

import coco_eval
import models
import transforms
from internals.anchors import sizes_of_level
from internals.backbones import RESNETS
from internals.bit_depth import BIT_DEPTHS
from internals.command_line import (
    ArgumentParser,
    evaluator_name,
    fraction,
    int_at_least_2,
    int_at_least_11,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    share,
)
from internals.recipes import RECIPES, STRONG_MODELS

ROOT = Path(__file__).resolve().parent

DESCRIPTION = """\
Train and evaluate Faster R-CNN (or RetinaNet, FCOS, SSD) on COCO-format data.

Fine-tune on your own images, on one GPU or a CPU:
  python train.py --data-path my_images --weights COCO_V1 --epochs 20 --amp
Reproduce COCO on 8 GPUs:
  torchrun --nproc-per-node 8 train.py --data-path datasets/coco --amp
Benchmark 100 steps of one image size, without pretrained weights:
  python train.py --weights-backbone none --fixed-size 800 1344 --max-steps 100
"""
EPILOG = (
    "Exit codes: 0 done; 1 failed; 2 a flag, the data or a checkpoint is wrong; 75 stopped by a "
    "signal after saving a checkpoint: continue with --resume auto."
)


# fmt: off

def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that most trainings set."""
    add = parser.add_argument_group("most used").add_argument
    add("--data-path", type=Path, default=ROOT / "datasets/coco", metavar="FOLDER",
        help="COCO 2017's layout, or train/ and valid/ (or val/) with _annotations.coco.json "
        "beside the images (default: datasets/coco)")
    add("--output-dir", type=Path, default=ROOT / "output", metavar="FOLDER",
        help="folder of checkpoints, metrics.jsonl, detections.json and report.html "
        "(default: output)")
    add("--model", choices=models.MODELS, metavar="NAME",
        help=f"one of {', '.join(models.MODELS)} (default: {models.MODELS[0]})")
    add("--recipe", choices=RECIPES,
        help="named set of defaults, which other flags override: reference, torchvision's; "
        f"strong, a better backbone, AdamW and 12 epochs, for {' and '.join(STRONG_MODELS)} "
        "(default: reference)")
    add("--weights", metavar="NAME|FILE",
        help="fine-tune a whole detector: COCO_V1, or a file of this or another training loop; "
        "its head is replaced if the categories differ (default: none, see --weights-backbone)")
    add("--epochs", type=positive_int, metavar="N",
        help="passes over the training images (default: 26; strong: 12)")
    add("-b", "--batch-size", type=positive_int, default=2, metavar="N",
        help="images per device that go through the model together (default: %(default)s)")
    add("--lr", type=non_negative_float, metavar="RATE",
        help="learning rate, used as given (default: 0.02 for sgd, 0.01 or less for one-stage "
        "models, 0.0001 for adamw, each times the images per step on all devices / 16)")
    add("--min-size", type=positive_int, metavar="PIXELS",
        help="resize the shorter side of images to this (default: the model's own, mostly 800)")
    add("--amp", action="store_true",
        help="mixed precision: float16 on CUDA, bfloat16 on a CPU with instructions for it "
        "(default: float32)")
    add("-j", "--workers", type=non_negative_int, metavar="N",
        help="data loading processes per device (default: 4, or fewer if there are fewer cores)")
    add("--resume", metavar="FILE|auto",
        help="continue from a checkpoint; auto: from the newest intact one in --output-dir, or "
        "start a new training if there is none (default: start a new training)")
    add("--check-data", action="store_true",
        help="open every image, report the content and all errors of the data, and exit")
    add("--test-only", action="store_true",
        help="evaluate --resume or --weights and exit; flags of training have no effect")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data and its augmentation."""
    add = parser.add_argument_group("data").add_argument
    for split in ("train", "val"):
        add(f"--{split}-annotations", type=Path, metavar="FILE",
            help=f"annotation file of the {split} split (default: found in --data-path)")
        add(f"--{split}-images", type=Path, metavar="FOLDER",
            help=f"images of the {split} split (default: found in --data-path)")
    add("--data-augmentation", type=transforms.preset_name, metavar="NAME|FILE.py:FUNCTION",
        help="hflip: mirror images with probability 0.5; multiscale: hflip, and a shorter side "
        "drawn from 0.6 to 1 x --min-size; lsj: large-scale jitter in squares of --min-size (then "
        "1024 by default); ssd, ssdlite: crops, for ssd also colors and zoom-out; aerial: flips "
        "and quarter turns; photometric: hflip, brightness and colors; none; or a function of your "
        "own that returns a transform, see docs/augmentations.md (default: hflip; none with "
        "--overfit)")
    add("--keep-empty", action=argparse.BooleanOptionalAction,
        help="train on images without usable boxes, too, which reduces false detections; "
        "--no-keep-empty skips them, as torchvision's references do (default: keep them)")
    add("--repeat-factor-threshold", type=share, metavar="T",
        help="repeat the images of rare categories: one that is in a share f of the images, below "
        "T, is seen sqrt(T / f) times as often, such as 0.1 (default: off)")
    add("--trust-boxes", action="store_true",
        help="train although the boxes look like shares of the image, or corners instead of sizes "
        "(default: refuse)")
    add("--max-bad-images", type=non_negative_int, default=0, metavar="N",
        help="open every image first, and skip up to N that are missing, cannot be read, or have "
        "another size than annotated (default: 0, do not open them; the first such one ends the "
        "run)")
    add("--truncated-images", choices=("refuse", "use"), default="refuse",
        help="what to do with a JPEG whose end is missing: refuse it as a bad image, or use it if "
        "three quarters of its rows can be decoded; the rest is gray (default: %(default)s)")
    add("--bit-depth", type=int, choices=BIT_DEPTHS, metavar="BITS",
        help="the bits that 16-bit gray images hold: 8, 10, 12, 14 or 16 (default: those of the "
        "largest value in a sample of the images)")
    add("--overfit", type=positive_int, metavar="N",
        help="train and evaluate on the first N training images with boxes, as a test: AP near 1 "
        "shows that data and code work (default: off)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of pretrained weights and image sizes."""
    add = parser.add_argument_group("model").add_argument
    add("--weights-backbone", metavar="NAME|FILE|none",
        help="start from an ImageNet backbone; none: from random weights, with all layers and "
        "norms trained (default: IMAGENET1K_V1; IMAGENET1K_FEATURES for ssd300_vgg16; strong: "
        "IMAGENET1K_V2)")
    add("--backbone", choices=RESNETS, metavar="NAME",
        help=f"one of {', '.join(RESNETS)}; for fasterrcnn_resnet50_fpn and retinanet_resnet50_fpn "
        "(default: the model's own)")
    add("--trainable-backbone-layers", type=non_negative_int, metavar="N",
        help="train the last N layers of a pretrained backbone, of 5 in a ResNet or VGG and 6 in a "
        "MobileNet (default: 3; ssd300_vgg16: 4; ssdlite: all)")
    add("--freeze-backbone", action="store_true",
        help="train only the layers behind the pretrained backbone and its feature pyramid "
        "(default: off)")
    add("--train-norm-affine", action=argparse.BooleanOptionalAction,
        help="train scale and bias of the frozen norms in the backbone layers that train; their "
        "statistics stay frozen (default: off; strong: on)")
    add("--anchor-sizes", type=sizes_of_level, nargs="+", metavar="PIXELS",
        help="the sizes of anchors in the resized image, for each feature level, the finest first; "
        "several of a level with commas: 16,24 32,48 ... (default: 32 64 128 256 512 for Faster "
        "R-CNN with a ResNet, torchvision's for others)")
    add("--anchor-ratios", type=positive_float, nargs="+", metavar="RATIO",
        help="height / width of the anchors of each size (default: 0.5 1 2)")
    add("--max-size", type=positive_int, metavar="PIXELS",
        help="upper bound of the longer side (default: 1333 for --min-size 800, and in proportion)")
    add("--fixed-size", type=positive_int, nargs=2, metavar=("H", "W"),
        help="stretch every image to this size, so that all steps are alike, for benchmarks "
        "(default: off)")


def add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the optimizer, its schedule, and the length of the training."""
    add = parser.add_argument_group("optimization").add_argument
    add("--opt", choices=["sgd", "adamw"], help="optimizer (default: sgd; strong: adamw)")
    add("--momentum", type=non_negative_float, metavar="M", help="momentum of sgd (default: 0.9)")
    add("--weight-decay", "--wd", type=non_negative_float, metavar="W",
        help="L2 penalty of the weights; decoupled from the gradient in adamw (default: 0.0001; "
        "strong: 0.1)")
    add("--bias-weight-decay", type=non_negative_float, metavar="W",
        help="weight decay of the biases of layers other than norms (default: --weight-decay; "
        "strong: 0)")
    add("--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], default="multisteplr",
        help="schedule of the rate after the warm-up (default: %(default)s)")
    add("--lr-steps", type=positive_int, nargs="+", metavar="EPOCH",
        help="multiply the rate by --lr-gamma after these epochs (default: 16 22 for 26 epochs; "
        "strong: 8 11 for 12; and in proportion)")
    add("--lr-gamma", type=non_negative_float, metavar="FACTOR",
        help="see --lr-steps (default: 0.1)")
    add("--warmup-steps", type=non_negative_int, metavar="N",
        help="steps of linear warm-up (default: 1000, or one epoch if that is shorter)")
    add("--clip-grad-norm", type=positive_float, metavar="NORM",
        help="clip the norm of all gradients to this (default: no clipping)")
    add("--accumulate-steps", type=positive_int, default=1, metavar="N",
        help="accumulate the gradients of N batches per step (default: %(default)s)")
    add("--ema", type=fraction, metavar="DECAY",
        help="evaluate and save an exponential moving average of the weights, with a decay such as "
        "0.999 (default: off)")
    add("--early-stop-patience", type=positive_int, metavar="N",
        help="stop after N evaluations without a better AP (default: off)")
    add("--max-steps", type=positive_int, metavar="N",
        help="stop after N steps in total, evaluate and save (default: off)")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of evaluation."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-batch-size", type=positive_int, metavar="N",
        help="images of one size evaluated together; affects speed and memory only "
        "(default: 8 on CUDA, else 1)")
    add("--val-loss", action="store_true",
        help="compute the losses on the validation set, too (default: off)")
    add("--evaluate-as-annotated", action="store_true",
        help="score against all boxes and areas as they are in the file, for comparison with other "
        "tools (default: against what training is shown: boxes clipped to their image, those "
        "without a size dropped, impossible areas replaced by width x height)")
    add("--evaluator", type=evaluator_name, choices=coco_eval.EVALUATORS, default="hotcoco",
        help="library that computes COCO's metrics; both: fail if hotcoco and pycocotools differ "
        "(default: %(default)s)")
    add("--max-detections", type=int_at_least_11, metavar="N",
        help="objects of an image that the model returns and the metrics count, above the 10 of "
        "AR10; the name of AR100 says another N (default: the metrics count 100, the model "
        "returns 100, SSD 200, RetinaNet and SSDlite 300)")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of checkpoints and logs."""
    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpoint-every", type=positive_int, metavar="N",
        help="save every N steps, in addition to each epoch (default: off)")
    add("--checkpoint-minutes", type=non_negative_float, default=10, metavar="M",
        help="save when the newest checkpoint is this old (default: %(default)s)")
    add("--keep-checkpoints", type=int_at_least_2, default=2, metavar="N",
        help="keep the newest N, at least 2, in addition to the best one (default: %(default)s)")
    add("--resume-anyway", action="store_true",
        help="resume although data, batch size, rate or other settings differ (default: reject)")
    add("--print-freq", type=positive_int, default=20, metavar="N",
        help="log the losses every N steps (default: %(default)s)")
    add("--tracker", action="extend", nargs="+", choices=["tensorboard", "mlflow", "wandb"],
        default=[],
        help="send losses, AP and some images to one or several trackers, see docs/trackers.md "
        "(default: none)")
    add("--tensorboard", action="append_const", dest="tracker", const="tensorboard",
        help="short for --tracker tensorboard (default: off)")
    add("--no-report", action="store_true", help="do not write report.html (default: write it)")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of devices, precision and reproducibility."""
    add = parser.add_argument_group("device").add_argument
    add("--device",
        help="cuda, cuda:1, mps (Apple GPUs, float32 only) or cpu (default: cuda if available)")
    add("--amp-dtype", choices=["float16", "bfloat16"],
        help="data type of --amp (default: float16 on CUDA, bfloat16 on a CPU)")
    add("--cuda-graphs", action="store_true",
        help="launch a training step as CUDA graphs: faster for a --batch-size of 1 to 8, takes "
        "more memory (default: off)")
    add("--seed", type=non_negative_int, default=0, metavar="N",
        help="seed of everything random (default: %(default)s)")
    add("--find-batch-size", action="store_true",
        help="find the largest --batch-size that fits into memory, and exit")
    add("--timeout-minutes", type=non_negative_float, default=10, metavar="M",
        help="consider a process dead after this time without an answer (default: %(default)s)")


def add_reference_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that exist for parity with torchvision's references."""
    add = parser.add_argument_group("as in torchvision's references, rarely needed").add_argument
    add("--dataset", choices=["coco"], default="coco", help="format of the data (default: coco)")
    add("--aspect-ratio-group-factor", type=int, default=3, metavar="K",
        help="form batches within 2K+2 groups of width / height; 0: portrait and landscape only, "
        "-1: no groups (default: %(default)s)")
    add("--norm-weight-decay", type=non_negative_float, metavar="W",
        help="weight decay of norms (default: --weight-decay; strong: 0)")
    add("--rpn-score-thresh", type=non_negative_float, metavar="SCORE",
        help="drop proposals with an objectness below this, 0 to 1 (default: 0)")
    add("--sync-bn", action="store_true",
        help="compute the statistics of trainable norms over all devices (default: off)")
    add("--start-epoch", "--start_epoch", type=non_negative_int, metavar="E",
        help="start at epoch E without a checkpoint to resume (default: 0)")
    add("--use-deterministic-algorithms", action="store_true",
        help="bitwise reproducible on CUDA, too, but slower (default: off)")
    add("--world-size", type=positive_int, metavar="N",
        help="fail unless torchrun started N processes (default: any number)")
    add("--dist-url", metavar="URL", help="rendezvous of the processes (default: env://)")

# fmt: on


def build_parser() -> ArgumentParser:
    """Build the parser of train.py."""
    parser = ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="python train.py [FLAGS]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_flags(parser)
    add_data_flags(parser)
    add_model_flags(parser)
    add_optimization_flags(parser)
    add_evaluation_flags(parser)
    add_output_flags(parser)
    add_device_flags(parser)
    add_reference_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags without a value are None until `resolve_defaults`.

    Raises:
        UserError: A flag is unknown or has a value that is not allowed.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.tracker = list(dict.fromkeys(args.tracker))  # each once
    if args.resume_anyway and not args.resume:
        parser.error("--resume-anyway needs --resume FILE or --resume auto")
    return args
