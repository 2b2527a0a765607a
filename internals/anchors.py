"""Anchors of other sizes and shapes than those of torchvision's builders (--anchor-sizes, ...)."""

import argparse
from functools import cache

import torch
import torchvision
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead

from internals.errors import UserError

DETECTORS = ("fasterrcnn", "retinanet")  # FCOS has points instead, and SSD boxes of its own
MAX_SIZE = 100_000
MAX_PER_LOCATION = 255  # internals.fast.anchors numbers them with 8 bits
BOX_LAYERS = ("rpn.head.bbox_pred.weight", "head.regression_head.bbox_reg.weight")
LAYERS = (  # their shapes depend on the number of anchors per location
    *("rpn.head.cls_logits.", "rpn.head.bbox_pred."),
    *("head.classification_head.cls_logits.", "head.regression_head.bbox_reg."),
)


def sizes_of_level(text: str) -> list[int | float]:
    """Parse the sizes of a feature level such as "16" or "16,24"; an argparse type."""
    sizes = [float(part) for part in text.split(",")]
    if not all(1 <= size <= MAX_SIZE for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: a size is from 1 to {MAX_SIZE:,} pixels")
    return [int(size) if size.is_integer() else size for size in sizes]


sizes_of_level.__name__ = "anchor size"  # for "invalid anchor size value"


@cache
def default_anchors(name: str) -> tuple[list[list], list[float]]:
    """Return the sizes by level, and the ratios, of torchvision's detector of this name."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    generator = find_generator(model)
    return [list(sizes) for sizes in generator.sizes], list(generator.aspect_ratios[0])


def find_generator(model: nn.Module) -> AnchorGenerator:
    """Return the anchor generator of a Faster R-CNN or RetinaNet."""
    return getattr(model, "rpn", model).anchor_generator


def resolve(args: argparse.Namespace) -> None:
    """Check --anchor-sizes and --anchor-ratios; if one is given, set the other, in place.

    Without either both stay None: torchvision's generator is used as it is.

    Raises:
        UserError: The model cannot have such anchors.
    """
    if args.anchor_sizes is None and args.anchor_ratios is None:
        return
    if not args.model.startswith(DETECTORS):
        raise UserError(
            "--anchor-sizes and --anchor-ratios are for Faster R-CNN and RetinaNet, not "
            f"{args.model}: remove them"
        )
    sizes, ratios = default_anchors(args.model)
    args.anchor_sizes, args.anchor_ratios = args.anchor_sizes or sizes, args.anchor_ratios or ratios
    given = describe_sizes(args.anchor_sizes)
    if len(args.anchor_sizes) != len(sizes):
        raise UserError(
            f"--anchor-sizes {given} is for {len(args.anchor_sizes)} feature levels, but "
            f"{args.model} has {len(sizes)}: give {len(sizes)} sizes, the first for the level of "
            "the highest resolution, with commas between several sizes of a level (default: "
            f"{describe_sizes(sizes)})"
        )
    counts = {len(level) for level in args.anchor_sizes}
    if len(counts) > 1:
        raise UserError(
            f"--anchor-sizes {given}: the levels share one head, give all of them as many sizes"
        )
    make = AnchorGenerator().generate_anchors
    for size in sorted({size for level in args.anchor_sizes for size in level}):
        for ratio, (x1, y1, x2, y2) in zip(
            args.anchor_ratios, make([size], args.anchor_ratios).tolist(), strict=True
        ):
            if x1 == x2 or y1 == y2:
                raise UserError(
                    f"--anchor-sizes {size} with --anchor-ratios {ratio} makes an anchor without "
                    "a pixel, as torchvision rounds its sides: use a larger size, or another ratio"
                )
    if (count := counts.pop() * len(args.anchor_ratios)) > MAX_PER_LOCATION:
        raise UserError(
            f"--anchor-sizes and --anchor-ratios make {count} anchors per location, more than "
            f"{MAX_PER_LOCATION}: give fewer"
        )


def describe_sizes(sizes: list[list] | None) -> str:
    """Return sizes by level as --anchor-sizes takes them, such as "16,24 32,48"."""
    if sizes is None:
        return "torchvision's"
    return " ".join(",".join(map(str, level)) for level in sizes)


def describe(sizes: list[list], ratios: list[float]) -> str:
    """Describe anchors in a line."""
    return f"sizes {describe_sizes(sizes)}, height / width {' '.join(f'{r:g}' for r in ratios)}"


def set_anchors(model: nn.Module, sizes: list[list], ratios: list[float]) -> None:
    """Give a Faster R-CNN or RetinaNet other anchors, in place.

    If their number per location changes, the layers of the head that depend on it are replaced by
    new ones with torchvision's initial weights.

    Args:
        model: Of a builder of torchvision.
        sizes: The sizes of each level in pixels: the square roots of the areas of the anchors.
        ratios: Height / width of the anchors of each size.
    """
    owner = getattr(model, "rpn", model)
    before = owner.anchor_generator.num_anchors_per_location()[0]
    owner.anchor_generator = AnchorGenerator(
        tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes)
    )
    count = owner.anchor_generator.num_anchors_per_location()[0]
    if count == before:
        return
    channels = model.backbone.out_channels
    if owner is not model:
        new = RPNHead(channels, count)
        owner.head.cls_logits, owner.head.bbox_pred = new.cls_logits, new.bbox_pred
        return
    classes, boxes = owner.head.classification_head, owner.head.regression_head
    new = RetinaNetHead(channels, count, classes.num_classes)
    classes.cls_logits, classes.num_anchors = new.classification_head.cls_logits, count
    boxes.bbox_reg = new.regression_head.bbox_reg


def raise_if_forgotten(weights: str, trained: object) -> None:
    """Raise UserError if a detector was trained with anchors of its own, and none are given now.

    Args:
        weights: The value of --weights.
        trained: The flags of its training, if known.
    """
    if isinstance(trained, dict) and (sizes := trained.get("anchor_sizes")):
        ratios = " ".join(f"{ratio:g}" for ratio in trained["anchor_ratios"])
        raise UserError(
            f"--weights {weights} was trained with other anchors: add --backbone "
            f"{trained['backbone']} --anchor-sizes {describe_sizes(sizes)} --anchor-ratios "
            f"{ratios}, or that backbone with anchors of your choice"
        )


def per_location(state: dict[str, torch.Tensor]) -> int | None:
    """Return the number of anchors per location of a detector's state_dict, if it has any."""
    layers = [state[name] for name in BOX_LAYERS if name in state]
    return len(layers[0]) // 4 if layers else None


def compare(
    model: nn.Module, state: dict[str, torch.Tensor], trained: object
) -> tuple[list[str], str]:
    """Compare the anchors of weights to load with those of a detector.

    Args:
        model: Any detector.
        state: The state_dict to load.
        trained: The flags of its training, if known: a dict with model and anchors.

    Returns:
        The layers that have another shape as the number of anchors per location differs, as names
        of tensors; and a description of the difference. Both are empty if there is none.
    """
    ours, theirs = per_location(model.state_dict()), per_location(state)
    if None in (ours, theirs) or (ours, theirs) == (1, 1):  # FCOS has one point per location
        return [], ""
    if ours != theirs:
        names = [name for name in model.state_dict() if name.startswith(LAYERS)]
        return names, f"{ours} per location instead of {theirs}"
    if not isinstance(trained, dict) or "anchor_sizes" not in trained:
        return [], ""
    sizes, ratios = trained["anchor_sizes"], trained["anchor_ratios"]
    if sizes is None:
        sizes, ratios = default_anchors(trained["model"])
    generator = find_generator(model)
    now = [list(level) for level in generator.sizes], list(generator.aspect_ratios[0])
    if now == (sizes, ratios):
        return [], ""
    return [], f"{describe(*now)}; trained with {describe(sizes, ratios)}"
