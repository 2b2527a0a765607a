"""How well anchors cover the training boxes: the best IoU that a box has with any anchor.

A box whose best IoU is below the matcher's upper threshold (0.7 in an RPN, 0.5 in RetinaNet) trains
with its best anchors only; the less they overlap, the more the model has to correct. `index` is a
`coco_utils.CocoIndex` throughout.
"""

import argparse
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product

import numpy as np
import torch
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator

from internals.anchors import DETECTORS, default_anchors, describe, describe_sizes

POOR_IOU = 0.5  # without an anchor of this IoU a box is badly covered
MAX_POOR = 1 / 3  # a larger share of such boxes gets a suggestion
GAIN = 2 / 3  # a suggestion leaves at most this part of them
MAX_SAMPLE = 30_000  # boxes on which suggestions are compared
DIVISOR = 32  # torchvision pads images to multiples of it
LONGER_RATIOS = ([0.25, 0.5, 1, 2, 4], [0.125, 0.25, 0.5, 1, 2, 4, 8])


def report(index, args: argparse.Namespace) -> list[str]:
    """Return lines on how well the anchors of a run cover its training boxes.

    Args:
        index: The training split.
        args: After `settings.resolve_defaults`.

    Returns:
        The lines, with a suggestion if the boxes are badly covered; none for models without anchors
        of this kind, or without a box.
    """
    if not args.model.startswith(DETECTORS) or not index.usable.any():
        return []
    sizes, ratios = default_anchors(args.model)
    sizes, ratios = args.anchor_sizes or sizes, args.anchor_ratios or ratios
    strides, thresholds = levels_of(args.model)
    boxes, images = resize(index, args.min_size, args.max_size, args.fixed_size)
    overlaps = best_overlaps(boxes, images, strides, cell_shapes(sizes, ratios))
    lines = [f"anchors: {describe(sizes, ratios)}; best IoU of a training box, after resizing"]
    areas = index.areas[index.usable]
    groups = np.digitize(areas, [32**2, 96**2])
    groups[areas == 96**2] = 1  # as in `data_checks.describe`
    for group, name in enumerate(("small", "medium", "large")):
        if len(found := overlaps[groups == group]):
            shares = ", ".join(f"{t:g}: {np.mean(found < t):.0%}" for t in thresholds)
            median = np.median(found)
            lines.append(f"  {name:<6} {len(found):9,} boxes, median {median:.2f}; below {shares}")
    poor = np.mean(overlaps < POOR_IOU)
    if poor > MAX_POOR:
        step = -(-len(boxes) // MAX_SAMPLE)
        side = np.median(np.sqrt(boxes[:, 2] * boxes[:, 3]))
        long = np.mean(np.maximum(boxes[:, 2] / boxes[:, 3], boxes[:, 3] / boxes[:, 2]) > 3)
        advice = suggest(boxes[::step], images[::step], strides, sizes, ratios)
        lines.append(
            f"note: {poor:.0%} of the boxes have no anchor with an IoU of {POOR_IOU}. Their median "
            f"side is {side:.0f} pixels after resizing, {long:.0%} are longer than 3:1. {advice}"
        )
    return lines


@cache
def levels_of(name: str) -> tuple[list[int], list[float]]:
    """Return the strides of a detector's feature levels, and the IoUs to compare with, falling.

    These are the thresholds of its matcher, between which an anchor is ignored, and `POOR_IOU`.
    """
    with torch.device("meta"):  # no memory, and no computation
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
        features = model.backbone(torch.empty(1, 3, 1024, 1024))
    matcher = getattr(model, "rpn", model).proposal_matcher
    thresholds = {matcher.high_threshold, POOR_IOU, matcher.low_threshold}
    return [1024 // x.shape[-1] for x in features.values()], sorted(thresholds, reverse=True)


def cell_shapes(sizes: Iterable[list], ratios: list[float]) -> list[np.ndarray]:
    """Return the width and height of torchvision's anchors at a location, `[A, 2]` by level."""
    make = AnchorGenerator().generate_anchors
    corners = [make(level, ratios).numpy() for level in sizes]
    return [level[:, 2:] - level[:, :2] for level in corners]


def resize(
    index, min_size: int, max_size: int, fixed_size: list[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Resize the usable boxes as the model does in evaluation.

    Returns:
        The boxes, float32 `[M, 4]` of x, y, width, height, and the sizes of their padded images,
        `[M, 2]` of width, height.
    """
    sizes = index.sizes.astype(np.float64)
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))[:, None]
    resized = np.maximum(np.floor(sizes * scale), 1)
    if fixed_size:
        resized = np.broadcast_to(np.array(fixed_size[::-1], dtype=np.float64), sizes.shape)
    rows = index.image_of_rows()[index.usable]
    boxes = index.clipped_boxes()[index.usable] * np.tile(resized / sizes, 2)[rows]
    padded = np.ceil(resized / DIVISOR) * DIVISOR
    return boxes.astype(np.float32), padded.astype(np.float32)[rows]


def best_overlaps(
    boxes: np.ndarray, images: np.ndarray, strides: list[int], shapes: list[np.ndarray]
) -> np.ndarray:
    """Compute the best IoU of each box with any anchor, for each image in a batch of its own.

    Of the anchors of one shape, that with the nearest center in each direction overlaps most.

    Args:
        boxes: `[M, 4]`, x, y, width, height in the resized image.
        images: `[M, 2]`, width and height of the padded images.
        strides: Of the feature levels.
        shapes: Of `cell_shapes`.

    Returns:
        float32 `[M]`.
    """
    best, sides = np.zeros(len(boxes), dtype=np.float32), boxes[:, 2:]
    centers, areas = boxes[:, :2] + sides / 2, sides[:, 0] * sides[:, 1]
    for stride, level in zip(strides, shapes, strict=True):
        cells = np.ceil(images / stride)
        steps = images // cells  # as in torchvision's generator
        nearest = np.clip(np.rint(centers / steps), 0, cells - 1)
        distances = np.abs(centers - nearest * steps)
        for shape in level:
            common = np.minimum(np.minimum(sides, shape), (sides + shape) / 2 - distances)
            common = np.maximum(common, 0)
            shared = common[:, 0] * common[:, 1]
            np.maximum(best, shared / (areas + shape[0] * shape[1] - shared), out=best)
    return best


def suggest(
    boxes: np.ndarray,
    images: np.ndarray,
    strides: list[int],
    sizes: list[list],
    ratios: list[float],
) -> str:
    """Return the flags that cover badly covered boxes better, with what they leave.

    Args:
        boxes: Of `resize`.
        images: Of `resize`.
        strides: Of the feature levels.
        sizes: The present sizes of anchors, by level.
        ratios: The present ratios.
    """

    def poor_share(shapes: list[np.ndarray], scale: int = 1) -> float:
        overlaps = best_overlaps(boxes * scale, images * scale, strides, shapes)
        return np.mean(overlaps < POOR_IOU)

    def best(flags: Iterable[tuple]) -> Iterator[str]:
        """Yield the flags that leave few such boxes with few anchors, if they are of use."""
        found = []
        for new_sizes, new_ratios in flags:
            share = poor_share(cell_shapes(new_sizes or sizes, new_ratios or ratios))
            text = " ".join(_flags(new_sizes, new_ratios))
            found.append((share > MAX_POOR / 2, len(new_ratios or ratios), share, text))
        *_, share, text = min(found)
        if share <= GAIN * now:
            yield f"{text} leaves {share:.0%}"

    now = poor_share(cell_shapes(sizes, ratios))
    scaled = [_scale(sizes, factor) for factor in (1 / 8, 1 / 4, 1 / 2, 2)]
    advice = [*best((s, None) for s in scaled), *best((None, r) for r in LONGER_RATIOS)]
    if (share := poor_share(cell_shapes(sizes, ratios), scale=2)) <= GAIN * now:
        advice.append(f"twice the --min-size leaves {share:.0%}")
    advice = advice or list(best(product(scaled, LONGER_RATIOS)))
    return ", or ".join(advice) or "Cut images into tiles if their boxes are small"


def _flags(sizes: list[list] | None, ratios: list[float] | None) -> Iterator[str]:
    if sizes:
        yield f"--anchor-sizes {describe_sizes(sizes)}"
    if ratios:
        yield f"--anchor-ratios {' '.join(f'{ratio:g}' for ratio in ratios)}"


def _scale(sizes: list[list], factor: float) -> list[list]:
    return [[max(2, round(size * factor)) for size in level] for level in sizes]
