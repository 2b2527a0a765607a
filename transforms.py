"""Augmentation presets for a training image and its boxes.

Presets are built from `torchvision.transforms.v2` and work on uint8 images, which keeps the copy to
the device small. The model itself resizes to `--min-size`, normalizes and pads on the device
(torchvision's `GeneralizedRCNNTransform`).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from internals.custom_augmentation import CustomAugmentation, is_custom
from internals.images import is_too_narrow

PRESETS = ("hflip", "multiscale", "lsj", "ssd", "ssdlite", "aerial", "photometric", "none")

# The fill of borders: ImageNet's mean color times 255, which normalization turns into about 0.
FILL = {tv_tensors.Image: (123, 117, 104), "others": 0}


def preset_name(text: str) -> str:
    """Parse a value of --data-augmentation, an argparse type; paths become absolute."""
    if text in PRESETS:
        return text
    if not is_custom(text):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(PRESETS)}, or FILE.py:FUNCTION for "
            "an augmentation of your own)"
        )
    file, _, function = text.rpartition(":")
    return f"{Path(file).absolute()}:{function}"


def training_sizes(preset: str, min_size: int) -> tuple[int, ...]:
    """Return the shorter sides in pixels of which the model draws one per training image.

    Evaluation uses the last one. `multiscale` has the eleven sizes from 480 to 800 of Detectron2
    and torchvision, in proportion to `min_size`; other presets have one.
    """
    if preset != "multiscale":
        return (min_size,)
    return tuple(round(min_size * side / 800) for side in range(480, 801, 32))


def find_too_narrow(
    sizes: np.ndarray, preset: str, min_size: int, max_size: int, fixed_size: bool
) -> np.ndarray:
    """Find the images of which an augmentation or the model's resizing may leave no pixel.

    Args:
        sizes: int `[I, 2]`, width and height.
        preset: One of `PRESETS`; "none" for evaluation.
        min_size: See `training_sizes`.
        max_size: The upper bound of the longer side in pixels.
        fixed_size: Whether the model resizes all images to one size.

    Returns:
        bool `[I]`.
    """
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    if preset == "lsj":  # scaled, then padded to a square
        return np.floor(shorter * 0.1 * (min_size / longer)) < 1
    smallest = min(training_sizes(preset, min_size))
    if preset in ("ssd", "ssdlite"):  # may zoom out, or cut to 0.3 of a side, and round down
        too_narrow = shorter < 4
        shorter = np.maximum(shorter - 1, 1)
    else:
        too_narrow = np.zeros(len(sizes), dtype=bool)
    return too_narrow | (is_too_narrow(shorter, longer, smallest, max_size) & (not fixed_size))


class RandomQuarterTurn(v2.Transform):
    """Turn by 0, 90, 180 or 270 degrees, with equal probability; a box keeps its size exactly."""

    def make_params(self, flat_inputs: list) -> dict:
        """Draw the number of counterclockwise quarter turns."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt, params: dict):
        """Turn an image or its boxes (x1, y1, x2, y2)."""
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)
        height, width = inpt.canvas_size
        boxes = inpt.as_subclass(torch.Tensor)
        for _ in range(params["turns"]):
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
            height, width = width, height
        return tv_tensors.wrap(boxes, like=inpt, canvas_size=(height, width))


def training_preset(
    name: str, min_size: int, max_size: int | None = None
) -> v2.Transform | CustomAugmentation:
    """Build an augmentation; lsj, ssd and ssdlite are those of torchvision's references.

    Args:
        name: Of `preset_name`.
        min_size: The side in pixels of the square that `lsj` (large-scale jitter, arXiv 2012.07177,
            scales 0.1 to 2) crops and pads to; not used by other presets.
        max_size: The upper bound of the longer side that the model resizes to, for the check of
            a `CustomAugmentation`; None without a bound.
    """
    flip = v2.RandomHorizontalFlip(0.5)
    if name in ("hflip", "multiscale"):
        return flip
    if name == "lsj":
        square = (min_size, min_size)
        return v2.Compose(
            [
                v2.ScaleJitter(target_size=square, scale_range=(0.1, 2.0), antialias=True),
                v2.RandomCrop(square, pad_if_needed=True, fill=FILL),
                flip,
            ]
        )
    if name == "ssd":
        distort, zoom_out = v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=FILL)
        return v2.Compose([distort, zoom_out, v2.RandomIoUCrop(), flip])
    if name == "ssdlite":
        return v2.Compose([v2.RandomIoUCrop(), flip])
    if name == "aerial":  # a vertical flip is a horizontal one and half a turn
        return v2.Compose([flip, RandomQuarterTurn()])
    if name == "photometric":
        return v2.Compose([v2.RandomPhotometricDistort(), flip])
    if name == "none":
        return v2.Identity()
    if is_custom(name):
        return CustomAugmentation(name, max_size)
    raise ValueError(f"unknown augmentation {name!r}, choose from {', '.join(PRESETS)}")


def augment(
    transform: v2.Transform | CustomAugmentation, image: torch.Tensor, target: dict, seed: int
) -> tuple[torch.Tensor, dict]:
    """Apply `transform` to an image and the boxes of its target.

    What is drawn depends on `seed` alone; the global generator is not changed. Boxes that a crop
    removes are dropped with their `labels`, `iscrowd` and `area`; the `area` of the others is not
    changed, except that a `CustomAugmentation` gets the area of its boxes.

    Args:
        transform: For example of `training_preset`.
        image: uint8 `[3, H, W]`.
        target: Of `coco_utils.CocoDetection`.
        seed: Of this image in this epoch.

    Returns:
        The new image and target, which may have no boxes.
    """
    boxes = tv_tensors.BoundingBoxes(
        target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:])
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = tv_tensors.Image(image)
        if isinstance(transform, CustomAugmentation):
            image, boxes, labels = transform(image, boxes, target["labels"])
            target = {**target, "labels": labels, "iscrowd": torch.zeros_like(labels)}
            target["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        else:
            image, boxes = transform(image, boxes)
    # torchvision's crops give removed boxes a size of 0.
    boxes = v2.functional.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    per_box = {key: target[key][keep] for key in ("labels", "iscrowd", "area")}
    return image.as_subclass(torch.Tensor), {**target, **per_box, "boxes": boxes[keep]}
