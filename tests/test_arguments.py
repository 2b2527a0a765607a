"""The command line of train.py: defaults, and flags that are refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch

import arguments
from internals.errors import UserError

CPU = torch.device("cpu")


def resolve(*flags, saved: dict | None = None) -> argparse.Namespace:
    """What train.py makes of these flags before it looks at data."""
    args = arguments.parse_arguments([str(flag) for flag in flags])
    arguments.resolve_defaults(args, saved, CPU)
    arguments.validate_args(args, CPU)
    return args


def test_defaults_are_the_coco_recipe():
    args = resolve()
    assert (args.epochs, args.lr_steps, args.lr_gamma, args.batch_size) == (26, [16, 22], 0.1, 2)
    assert (args.lr, args.momentum, args.weight_decay) == (0.02 * 2 / 16, 0.9, 1e-4)
    assert (args.model, args.weights_backbone) == ("fasterrcnn_resnet50_fpn", "IMAGENET1K_V1")
    assert (args.min_size, args.max_size, args.data_augmentation) == (800, 1333, "hflip")
    assert args.aspect_ratio_group_factor == 3


def test_defaults_follow_other_flags(monkeypatch):
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
        ("--opt adamw --momentum 0.9", "--momentum is for --opt sgd"),
        ("--lr-scheduler cosineannealinglr --lr-steps 3", "are for --lr-scheduler multisteplr"),
        ("--amp-dtype float16", "--amp-dtype needs --amp"),
        ("--weights COCO_V1 --weights-backbone IMAGENET1K_V1", "brings its own backbone"),
        ("--weights-backbone none --trainable-backbone-layers 3", "needs pretrained weights"),
        ("--data-augmentation lsj --min-size 512 --max-size 700", "lsj makes squares"),
        ("--fixed-size 64 96 --data-augmentation multiscale", "leaves nothing of --data-augm"),
        ("--fixed-size 64 96 --min-size 512", "--fixed-size takes the place of --min-size"),
        ("--fixed-size 64", "expected 2 arguments"),
        ("--sync-bn", "--sync-bn needs torchrun"),
        ("--ema 1", "1 is not between 0 and 1"),
        ("--weights-backbone none --freeze-backbone", "--freeze-backbone needs pretrained"),
        ("--freeze-backbone --trainable-backbone-layers 2", "leaves nothing of --trainable"),
        ("--min-size 800 --max-size 400", "--max-size 400 is below the shortest side"),
        ("--model ssd300_vgg16 --min-size 512", "resizes to 300 pixels square"),
        ("--model ssd300_vgg16 --data-augmentation multiscale", "has one size"),
        ("--model fcos_resnet50_fpn --rpn-score-thresh 0.1", "has no proposals"),
        ("--overfit 4 --val-images x --val-annotations y", "--overfit evaluates on training"),
        ("--find-batch-size --test-only --weights COCO_V1", "is for one training process"),
        ("--start-epoch 26", "leaves nothing of 26 epochs"),
        ("--resume x.pth --start-epoch 2", "--resume knows its epoch"),
        ("--resume-anyway", "--resume-anyway needs --resume"),
        ("--test-only", "needs a model to test"),
        ("--world-size 4", "--world-size 4, but 1 were started"),
        ("--dist-url tcp://localhost:1", "--dist-url needs torchrun"),
        ("--dataset coco_kp", "invalid choice"),
        ("--batch-size 0", "0 is below 1"),
        ("--batch-size two", "invalid int value: .two."),
        ("--lr nan", "nan is below 0"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--batch 4", "unrecognized arguments: --batch"),
    ],
)
def test_flags_that_cannot_apply_are_refused_with_a_reason(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(*flags.split())


def test_model_flags_are_taken_from_the_checkpoint():
    saved = vars(resolve("--model", "fcos_resnet50_fpn", "--min-size", "320", "--epochs", "3"))
    args = resolve("--resume", "x.pth", saved=saved)
    assert (args.model, args.min_size, args.max_size) == ("fcos_resnet50_fpn", 320, 533)
    assert args.epochs == 26
    with pytest.raises(UserError, match=r"--min-size 480 differs from 320, with which x.pth was"):
        resolve("--resume", "x.pth", "--min-size", "480", saved=saved)
    for flag in ("--test-only", "--resume-anyway"):
        flags = ("--resume", "x.pth", "--min-size", "480", "--max-size", "640", flag)
        assert resolve(*flags, saved=saved).min_size == 480


def test_arguments_become_plain_types():
    args = resolve("--output-dir", "runs/1", "--lr-steps", "3", "4")
    plain = arguments.to_plain_dict(args)
    assert plain["output_dir"] == str(Path.cwd() / "runs/1")
    assert json.loads(json.dumps(plain)) == plain


def test_help_has_the_groups_of_flags_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        arguments.parse_arguments(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for part in ("data:", "model:", "optimization:", "device and precision:", "output:", "Exit"):
        assert part in said


def test_flags_of_torchvisions_reference_are_there():
    known = arguments.parse_arguments([])
    names = """data_path dataset model device batch_size epochs workers lr momentum weight_decay
    norm_weight_decay opt lr_scheduler lr_steps lr_gamma print_freq output_dir resume start_epoch
    aspect_ratio_group_factor rpn_score_thresh trainable_backbone_layers data_augmentation sync_bn
    test_only use_deterministic_algorithms weights weights_backbone amp seed world_size dist_url"""
    assert set(names.split()) <= vars(known).keys()
    assert arguments.parse_arguments(["--start_epoch", "3", "--wd", "0.1", "-b", "4"])
