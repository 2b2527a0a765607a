"""Recipes: named sets of defaults (--recipe). docs/recipes.md has their sources and results."""

import argparse

from internals.errors import UserError

# Flags and their defaults. `lr_steps` is for `epochs`, and in proportion for any other number.
# Those that a recipe leaves out have the same default in every recipe: clipping, for one, is off.
RECIPES = {
    "reference": {  # torchvision's references
        "epochs": 26,
        "lr_steps": (16, 22),
        "opt": "sgd",
        "weight_decay": 1e-4,
    },
    "strong": {  # MMDetection's faster-rcnn_r50-tnr-pre_fpn_1x_coco, which decays biases, too
        "weights_backbone": "IMAGENET1K_V2",
        "train_norm_affine": True,
        "epochs": 12,
        "lr_steps": (8, 11),
        "opt": "adamw",
        "weight_decay": 0.1,
        "norm_weight_decay": 0.0,
        "bias_weight_decay": 0.0,
    },
}
# With a ResNet-50, frozen norms, and a published result with such values: see docs/recipes.md.
STRONG_MODELS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


def apply_recipe(args: argparse.Namespace) -> None:
    """Set the flags that have no value to those of `args.recipe`, in place.

    Args:
        args: With `model` resolved, and `recipe`, None for "reference".

    Raises:
        UserError: The recipe is not for this model or optimizer.
    """
    args.recipe = args.recipe or "reference"
    defaults = dict(RECIPES[args.recipe])
    if args.recipe == "strong" and args.model not in STRONG_MODELS:
        raise UserError(
            f"--recipe strong is for {' and '.join(STRONG_MODELS)}, not {args.model}: choose "
            "another --model, or remove --recipe"
        )
    if args.recipe == "strong" and args.opt == "sgd" and args.weight_decay is None:
        raise UserError(
            f"--recipe strong has a weight decay of {defaults['weight_decay']}, which is for adamw "
            "and too large for sgd: add --weight-decay, or remove --opt sgd"
        )
    given = args.weights or args.weights_backbone
    if args.recipe == "strong" and args.backbone in ("resnet18", "resnet34") and not given:
        raise UserError(
            f"--recipe strong starts from IMAGENET1K_V2 weights, which {args.backbone} does not "
            "have: add --weights-backbone IMAGENET1K_V1, or choose another --backbone"
        )
    if given:
        defaults.pop("weights_backbone", None)
    # Without weights all norms are trained, and their statistics, too.
    nothing_frozen = args.weights is None and args.weights_backbone == "none"
    if nothing_frozen or args.freeze_backbone or args.trainable_backbone_layers == 0:
        defaults.pop("train_norm_affine", None)
    steps, epochs = defaults.pop("lr_steps"), defaults["epochs"]
    for name, value in {"train_norm_affine": False, **defaults}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr_scheduler == "multisteplr" and not args.lr_steps:
        args.lr_steps = [round(args.epochs * step / epochs) for step in steps]
