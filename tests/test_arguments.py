"""The command line of train.py: defaults and rejected flags."""

import argparse
import json
from pathlib import Path

import pytest
import torch

import arguments
import settings
from checkpoint import RESUME_INVARIANTS
from internals.errors import UserError

CPU = torch.device("cpu")


def resolve(*flags, saved: dict | None = None) -> argparse.Namespace:
    """Parse, resolve and validate flags as train.py does."""
    args = arguments.parse_arguments([str(flag) for flag in flags])
    settings.resolve_defaults(args, saved, CPU)
    settings.validate_args(args, CPU)
    return args


def test_defaults_are_coco_recipe():
    args = resolve()
    assert (args.epochs, args.lr_steps, args.lr_gamma, args.batch_size) == (26, [16, 22], 0.1, 2)
    assert (args.lr, args.momentum, args.weight_decay) == (0.02 * 2 / 16, 0.9, 1e-4)
    assert (args.model, args.weights_backbone) == ("fasterrcnn_resnet50_fpn", "IMAGENET1K_V1")
    assert (args.min_size, args.max_size, args.data_augmentation) == (800, 1333, "hflip")
    assert args.aspect_ratio_group_factor == 3


def test_defaults_depend_on_other_flags(monkeypatch):
    assert resolve("--epochs", 13).lr_steps == [8, 11]
    assert resolve("--min-size", 400).max_size == 666
    assert resolve("--weights", "COCO_V1").weights_backbone is None
    assert resolve("--data-augmentation", "lsj").min_size == 1024
    assert resolve("--overfit", 2).data_augmentation == "none"
    assert resolve("--opt", "adamw").lr == pytest.approx(1e-4 * 2 / 16)
    assert resolve("-b", 4, "--accumulate-steps", 2).lr == pytest.approx(0.02 * 8 / 16)
    assert resolve("-b", 4, "--lr", 0.3).lr == 0.3
    assert resolve("--model", "retinanet_resnet50_fpn").lr == pytest.approx(0.01 * 2 / 16)
    cosine = resolve("--lr-scheduler", "cosineannealinglr")
    assert (cosine.lr_steps, cosine.lr_gamma) == (None, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve("-b", 4).lr == 0.02


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--opt adamw --momentum 0.9", "--momentum has no effect with --opt adamw"),
        (
            "--lr-scheduler cosineannealinglr --lr-steps 3",
            "have no effect with --lr-scheduler",
        ),
        ("--amp-dtype float16", "--amp-dtype has no effect without --amp"),
        ("--weights COCO_V1 --weights-backbone IMAGENET1K_V1", "includes a backbone"),
        ("--weights-backbone none --trainable-backbone-layers 3", "needs pretrained weights"),
        ("--data-augmentation lsj --min-size 512 --max-size 700", "lsj makes square images"),
        (
            "--fixed-size 64 96 --data-augmentation multiscale",
            "contradicts --data-augmentation",
        ),
        ("--fixed-size 64 96 --min-size 512", "--fixed-size replaces --min-size"),
        ("--fixed-size 64", "expected 2 arguments"),
        ("--sync-bn", "--sync-bn needs torchrun"),
        ("--model fcos_resnet50_fpn --backbone resnet18", "fcos_resnet50_fpn has its own backbone"),
        ("--model fasterrcnn_resnet50_fpn_v2 --backbone resnet101", "has its own backbone, remove"),
        (
            "--backbone resnet18 --weights COCO_V1",
            "has the backbone resnet50, not resnet18",
        ),
        ("--backbone vgg16", "invalid choice"),
        ("--model fcos_resnet50_fpn --anchor-ratios 1", "are for Faster R-CNN and RetinaNet"),
        ("--anchor-sizes 16 32", "has 5: give 5 sizes"),
        ("--cuda-graphs", "is for training on a CUDA device"),
        ("--ema 1", "1 is not between 0 and 1"),
        ("--weights-backbone none --freeze-backbone", "--freeze-backbone needs pretrained"),
        ("--freeze-backbone --trainable-backbone-layers 2", "trains no backbone layers"),
        ("--min-size 800 --max-size 400", "--max-size 400 is below --min-size 800"),
        ("--model ssd300_vgg16 --min-size 512", "always resizes to 300 x 300 pixels"),
        ("--model ssd300_vgg16 --data-augmentation multiscale", "has a fixed size"),
        ("--model fcos_resnet50_fpn --rpn-score-thresh 0.1", "has no proposals"),
        ("--recipe fast", "invalid choice"),
        ("--recipe strong --model fcos_resnet50_fpn", "--recipe strong is for .*, not fcos_resnet"),
        ("--recipe strong --model ssd300_vgg16", "choose another --model, or remove --recipe"),
        ("--recipe strong --opt sgd", "too large for sgd: add --weight-decay"),
        ("--recipe strong --momentum 0.9", "--momentum has no effect with --opt adamw"),
        ("--train-norm-affine --weights-backbone none", "--train-norm-affine needs pretrained"),
        ("--train-norm-affine --freeze-backbone", "--train-norm-affine has no effect with"),
        (
            "--train-norm-affine --trainable-backbone-layers 0",
            "has no effect with --freeze-backbone or --trainable-backbone-layers 0: remove it",
        ),
        ("--bias-weight-decay -1", "-1 is below 0"),
        ("--overfit 4 --val-images x --val-annotations y", "--overfit uses training images only"),
        ("--find-batch-size --test-only --weights COCO_V1", "needs a single training process"),
        ("--start-epoch 26", "is not below --epochs 26"),
        ("--resume x.pth --start-epoch 2", "--start-epoch has no effect with --resume"),
        ("--resume-anyway", "--resume-anyway needs --resume"),
        ("--test-only", "needs a model: add --resume"),
        ("--world-size 4", "--world-size 4, but 1 were started"),
        ("--dist-url tcp://localhost:1", "--dist-url needs torchrun"),
        ("--dataset coco_kp", "invalid choice"),
        ("--data-augmentation mosaic", "invalid choice: 'mosaic' .choose from hflip, .*FILE.py:FU"),
        ("--data-augmentation mine.py", "invalid choice: 'mine.py'"),
        ("--batch-size 0", "0 is below 1"),
        ("--max-detections 10", "10 is below 11"),
        ("--clip-grad-norm 0", "0 is not a number above 0"),
        ("--lr inf", "inf is too large"),
        ("--seed 9223372036854775808", "is too large"),
        ("--batch-size two", "invalid int value: .two."),
        ("--lr nan", "nan is below 0"),
        ("--repeat-factor-threshold 0", "0 is not above 0 and at most 1"),
        ("--repeat-factor-threshold 1.5", "1.5 is not above 0 and at most 1"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--batch 4", "unrecognized arguments: --batch"),
        ("--epoch 4", "unrecognized arguments: --epoch 4, did you mean --epochs?"),
    ],
)
def test_inapplicable_flags_are_rejected(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(*flags.split())


def test_model_flags_come_from_checkpoint(capsys):
    saved = vars(resolve("--model", "fcos_resnet50_fpn", "--min-size", "320", "--epochs", "3"))
    args = resolve("--resume", "x.pth", saved=saved)
    assert (args.model, args.min_size, args.max_size) == ("fcos_resnet50_fpn", 320, 533)
    assert args.epochs == 26
    with pytest.raises(UserError, match=r"--min-size 480 differs from 320, with which x.pth was"):
        resolve("--resume", "x.pth", "--min-size", "480", saved=saved)
    for flag in ("--test-only", "--resume-anyway"):
        flags = ("--resume", "x.pth", "--min-size", "480", "--max-size", "640", flag)
        assert resolve(*flags, saved=saved).min_size == 480
        output = capsys.readouterr().out
        assert "note: --min-size 480 differs from 320, with which it was trained" in output
    strong = vars(resolve("--recipe", "strong", "--epochs", "3"))
    args = resolve("--resume", "x.pth", saved=strong)
    assert (args.recipe, args.opt, args.epochs) == ("strong", "adamw", 12)
    with pytest.raises(UserError, match=r"--recipe reference differs from strong, with which x"):
        resolve("--resume", "x.pth", "--recipe", "reference", saved=strong)
    older = {k: v for k, v in vars(resolve()).items() if k != "recipe"}
    assert resolve("--resume", "x.pth", saved=older).recipe == "reference"
    with pytest.raises(UserError, match=r"--recipe strong differs from reference"):
        resolve("--resume", "x.pth", "--recipe", "strong", saved=older)
    args = resolve("--resume", "x.pth", "--min-size", "800", "--test-only", saved=saved)
    assert (args.min_size, args.max_size) == (800, 1333)


def test_backbone_and_anchors_come_from_checkpoint():
    sizes = ("--anchor-sizes", "8", "16", "32", "64", "128")
    saved = settings.to_plain_dict(resolve("--backbone", "resnet18", *sizes))
    assert (saved["backbone"], saved["weights_backbone"]) == ("resnet18", "IMAGENET1K_V1")
    for flags in ((), ("--backbone", "resnet18"), sizes, ("--anchor-ratios", "0.5", "1", "2")):
        args = resolve("--resume", "x.pth", *flags, saved=saved)
        assert args.backbone == "resnet18"
        assert args.anchor_sizes == [[8], [16], [32], [64], [128]]
        assert args.anchor_ratios == [0.5, 1.0, 2.0]
    for flags, message in (
        (("--backbone", "resnet50"), "--backbone resnet50 differs from resnet18"),
        (("--anchor-sizes", *"23456"), "--anchor-sizes 2 3 4 5 6 differs from 8 16 32 64 128"),
        (("--anchor-ratios", "1"), r"--anchor-ratios \[1.0\] differs from \[0.5, 1.0, 2.0\]"),
    ):
        for anyway in ((), ("--test-only",), ("--resume-anyway",)):
            with pytest.raises(UserError, match=message):
                resolve("--resume", "x.pth", *flags, *anyway, saved=saved)


def test_checkpoint_of_an_earlier_version_has_the_own_backbone_and_anchors():
    for model, own in (("retinanet_resnet50_fpn", "resnet50"), ("ssd300_vgg16", "vgg16")):
        saved = vars(resolve("--model", model))
        for name in ("backbone", "anchor_sizes", "anchor_ratios"):
            del saved[name]
        args = resolve("--resume", "x.pth", saved=saved)
        assert (args.backbone, args.anchor_sizes, args.anchor_ratios) == (own, None, None)
    saved = {**vars(resolve()), "backbone": "resnet50"}
    assert resolve("--resume", "x.pth", "--backbone", "resnet50", saved=saved).epochs == 26
    with pytest.raises(UserError, match=r"--anchor-sizes 2 3 4 5 6 differs from torchvision's, w"):
        resolve("--resume", "x.pth", "--anchor-sizes", *"23456", saved=saved)


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ("", []),
        ("--tensorboard", ["tensorboard"]),
        ("--tracker wandb mlflow", ["wandb", "mlflow"]),
        ("--tracker mlflow --tensorboard --tracker wandb", ["mlflow", "tensorboard", "wandb"]),
        ("--tensorboard --tracker tensorboard", ["tensorboard"]),
    ],
)
def test_trackers_of_all_flags_are_used_once(flags, trackers):
    assert resolve(*flags.split()).tracker == trackers


def test_to_plain_dict():
    args = resolve("--output-dir", "runs/1", "--lr-steps", "3", "4")
    plain = settings.to_plain_dict(args)
    assert plain["output_dir"] == str(Path.cwd() / "runs/1")
    assert json.loads(json.dumps(plain)) == plain


def test_help_lists_groups_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        arguments.parse_arguments(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    groups = [
        "most used:",
        "data:",
        "model:",
        "optimization:",
        "evaluation:",
        "checkpoints and logs:",
    ]
    positions = [output.index(f"\n{group}\n") for group in [*groups, "device:"]]
    assert positions == sorted(positions)
    assert "Exit codes" in output


def test_help_shows_every_default():
    parser = arguments.build_parser()
    undocumented = [
        action.dest
        for action in parser._actions
        if "default" not in action.help and action.dest not in ("help", "check_data", "test_only")
    ]
    assert undocumented == ["find_batch_size"]


def test_torchvision_reference_flags_exist():
    args = arguments.parse_arguments([])
    names = """data_path dataset model device batch_size epochs workers lr momentum weight_decay
    norm_weight_decay opt lr_scheduler lr_steps lr_gamma print_freq output_dir resume start_epoch
    aspect_ratio_group_factor rpn_score_thresh trainable_backbone_layers data_augmentation sync_bn
    test_only use_deterministic_algorithms weights weights_backbone amp seed world_size dist_url"""
    assert set(names.split()) <= vars(args).keys()
    assert arguments.parse_arguments(["--start_epoch", "3", "--wd", "0.1", "-b", "4"])


# The flags that may differ when a run is resumed, for these reasons.
MAY_CHANGE = {
    *("data_path", "train_annotations", "train_images", "val_annotations", "val_images"),  # content
    *("batch_size", "accumulate_steps"),  # `global_batch` is an invariant
    *("amp", "amp_dtype", "device"),  # `precision` is an invariant
    *("cuda_graphs", "use_deterministic_algorithms"),
    *("output_dir", "resume", "resume_anyway", "check_data", "test_only", "find_batch_size"),
    *("workers", "world_size", "dist_url", "timeout_minutes"),
    *("eval_batch_size", "val_loss", "evaluator"),
    *("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "print_freq"),
    *("tracker", "no_report", "early_stop_patience", "max_steps"),
    *("dataset", "start_epoch"),
    *("trust_boxes", "evaluate_as_annotated"),
    *("max_bad_images", "overfit"),  # the content of the data is an invariant
    "truncated_images",  # it changes no pixel of an image that both settings use
}


def test_every_flag_is_decided_for_resuming():
    flags = set(vars(arguments.parse_arguments([])))
    assert flags == MAY_CHANGE | {*settings.MODEL_ARGS, *RESUME_INVARIANTS} & flags
    assert not MAY_CHANGE & {*settings.MODEL_ARGS, *RESUME_INVARIANTS}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 9", "no effect with more than 8 images"),
        ("--accumulate-steps 2", "cannot accumulate gradients"),
        ("--find-batch-size", "measures steps without graphs"),
        ("--model fcos_resnet50_fpn", "is for Faster R-CNN"),
        ("--test-only --weights COCO_V1", "is for training"),
    ],
)
def test_cuda_graphs_need_small_batches_of_faster_rcnn(flags, message):
    def validate(line: str) -> None:
        args = arguments.parse_arguments(line.split())
        settings.resolve_defaults(args, None, torch.device("cuda"))
        settings.validate_args(args, torch.device("cuda"))

    validate("--cuda-graphs")
    with pytest.raises(UserError, match=message):
        validate(f"--cuda-graphs {flags}")
