"""Recipes: their values, flags that override them, and the commands in docs/recipes.md."""

import argparse
import re
import shlex

import pytest
import torch
from helpers import ROOT

import arguments
import settings
from internals.recipes import RECIPES

GPU = torch.device("cuda")
DOCS = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


def resolve(line: str) -> argparse.Namespace:
    """Parse, resolve and validate a command line as train.py does on a GPU."""
    args = arguments.parse_arguments(shlex.split(line))
    settings.resolve_defaults(args, None, GPU)
    settings.validate_args(args, GPU)
    return args


def values(line: str, *names) -> tuple:
    args = resolve(line)
    return tuple(getattr(args, name) for name in names)


def test_values_of_strong(monkeypatch):
    """Those of MMDetection's faster-rcnn_r50-tnr-pre_fpn_1x_coco, and none on biases."""
    args = resolve("--recipe strong")
    assert (args.weights_backbone, args.train_norm_affine) == ("IMAGENET1K_V2", True)
    assert (args.epochs, args.lr_steps, args.lr_gamma) == (12, [8, 11], 0.1)
    assert (args.opt, args.momentum, args.clip_grad_norm) == ("adamw", None, None)
    assert (args.weight_decay, args.norm_weight_decay, args.bias_weight_decay) == (0.1, 0, 0)
    assert args.lr == pytest.approx(1e-4 * 2 / 16)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resolve("--recipe strong").lr == pytest.approx(1e-4)


def test_reference_is_the_default():
    assert vars(resolve("")) == vars(resolve("--recipe reference"))
    assert values("", "recipe", "opt", "weight_decay") == ("reference", "sgd", 1e-4)
    decays = ("norm_weight_decay", "bias_weight_decay", "train_norm_affine")
    assert values("", *decays) == (None, None, False)


@pytest.mark.parametrize(
    ("flags", "names", "expected"),
    [
        ("--epochs 36", "epochs lr_steps", (36, [24, 33])),
        ("--epochs 36 --lr-steps 30", "lr_steps", ([30],)),
        ("--lr-scheduler cosineannealinglr", "lr_steps lr_gamma", (None, None)),
        ("--opt sgd --weight-decay 1e-4", "opt momentum lr", ("sgd", 0.9, 0.0025)),
        ("--weight-decay 0.05", "weight_decay bias_weight_decay", (0.05, 0.0)),
        ("--bias-weight-decay 0.1", "norm_weight_decay bias_weight_decay", (0.0, 0.1)),
        ("--no-train-norm-affine", "train_norm_affine", (False,)),
        ("--weights COCO_V1", "weights_backbone train_norm_affine", (None, True)),
        ("--weights-backbone x.pth", "weights_backbone train_norm_affine", ("x.pth", True)),
        # Without frozen norms in layers that train, there is nothing to train in them.
        ("--weights-backbone none", "train_norm_affine", (False,)),
        ("--freeze-backbone", "train_norm_affine", (False,)),
        ("--trainable-backbone-layers 0", "train_norm_affine", (False,)),
        ("--trainable-backbone-layers 1", "train_norm_affine", (True,)),
        ("--model retinanet_resnet50_fpn", "weights_backbone opt", ("IMAGENET1K_V2", "adamw")),
    ],
)
def test_flags_override_the_recipe(flags, names, expected):
    assert values(f"--recipe strong {flags}", *names.split()) == expected


def test_help_has_the_values_of_each_recipe():
    texts = {a.dest: a.help for a in arguments.build_parser()._actions}
    assert all(name in texts["recipe"] for name in RECIPES)
    for name, value in RECIPES["strong"].items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = {"True": "on", "0.0": "0"}.get(shown, shown)
        assert re.search(rf"strong: {shown}\b", texts[name])
    for name, value in RECIPES["reference"].items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert re.search(rf"default: {shown}\b", texts[name])


# ---------------------------------------------------------------------------- docs/recipes.md


def documented_commands() -> list[str]:
    """Return the flags of each command, and of each row of the tables that starts with --model."""
    lines = re.findall(
        r"^    (?:python train\.py|bash start_scripts/train_\S+\.sh)(.*)$", DOCS, re.M
    )
    return lines + re.findall(r"^\| `(--model [^`]+)` \|", DOCS, re.M)


def test_documented_commands_are_found():
    commands = documented_commands()
    assert sum(line.startswith("--model") for line in commands) == 8
    assert len(commands) == 8 + 3
    assert DOCS.count("--model ") == 8


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_are_valid(line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = resolve(line)
    assert args.recipe == ("strong" if "strong" in line else "reference")


@pytest.mark.parametrize("launcher", sorted(set(re.findall(r"start_scripts/\w+\.sh", DOCS))))
def test_documented_launchers_exist(launcher):
    assert (ROOT / launcher).is_file()


@pytest.mark.parametrize(
    ("model", "rate"),
    [  # of the references, on 8 GPUs
        ("fasterrcnn_mobilenet_v3_large_fpn", 0.02),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 0.02),
        ("retinanet_resnet50_fpn", 0.01),
        ("fcos_resnet50_fpn", 0.01),
        ("ssd300_vgg16", 0.002),
        ("ssdlite320_mobilenet_v3_large", 0.15),
        ("retinanet_resnet50_fpn_v2", 0.0001),
        ("fasterrcnn_resnet50_fpn_v2", 0.1),
    ],
)
def test_documented_trainings_have_torchvisions_rates(model, rate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    (line,) = (line for line in documented_commands() if line.startswith(f"--model {model} "))
    assert resolve(line).lr == pytest.approx(rate)


def test_documented_values_of_the_recipes():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.splitlines()]
    table = {row[0]: row[1:3] for row in rows if len(row) == 4}
    for column, (name, recipe) in enumerate(RECIPES.items()):
        args = resolve(f"--recipe {name}")
        assert f"`{args.weights_backbone}`" == table["backbone's weights"][column]
        assert table["epochs"][column] == str(args.epochs)
        assert table["rate x 0.1 after"][column] == " and ".join(map(str, recipe["lr_steps"]))
        assert table["optimizer"][column].lower().startswith(args.opt)
        assert table["weight decay"][column].startswith(f"{args.weight_decay}")
        assert float(table["learning rate for 16 images"][column]) == pytest.approx(args.lr * 8)
