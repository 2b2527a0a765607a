"""Boxes of a batch, with torchvision's arithmetic and no constants to copy to the device."""

import math
from typing import NamedTuple

import torch

MAX_LOG_SCALE = math.log(1000 / 16)  # torchvision's bound of a predicted change of size


class GroundTruth(NamedTuple):
    """The ground truth of a batch on the device.

    Attributes:
        boxes: float32 `[B, G, 4]` in pixels of the resized images, padded.
        labels: int64 `[B, G]`.
        counts: int64 `[B]`, the number of boxes of each image.
        seeds: int64 `[B]`, of what is drawn for each image.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    seeds: torch.Tensor


class Proposals(NamedTuple):
    """The proposals of a batch, the best first.

    Attributes:
        boxes: float32 `[B, P, 4]`.
        valid: bool `[B, P]`, which of them are any; these come first.
    """

    boxes: torch.Tensor
    valid: torch.Tensor


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take the rows `index` `[B, K]` of each image from `x` `[B, N, C]`: `[B, K, C]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def encode(gt_boxes: torch.Tensor, boxes: torch.Tensor, weights: tuple) -> torch.Tensor:
    """Compute the deltas from `boxes` to `gt_boxes`, both float32 `[..., 4]`, as BoxCoder does."""
    x, y, width, height = _centers_and_sizes(boxes)
    gt_x, gt_y, gt_width, gt_height = _centers_and_sizes(gt_boxes)
    deltas = (
        weights[0] * (gt_x - x) / width,
        weights[1] * (gt_y - y) / height,
        weights[2] * torch.log(gt_width / width),
        weights[3] * torch.log(gt_height / height),
    )
    return torch.stack(deltas, dim=-1)


def decode(deltas: torch.Tensor, boxes: torch.Tensor, weights: tuple) -> torch.Tensor:
    """Apply predicted deltas to `boxes`, both float32 `[..., 4]`, as BoxCoder does."""
    x, y, width, height = _centers_and_sizes(boxes)
    dx, dy, dw, dh = (
        delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)
    )
    x, y = dx * width + x, dy * height + y
    half_width = 0.5 * (torch.exp(dw.clamp(max=MAX_LOG_SCALE)) * width)
    half_height = 0.5 * (torch.exp(dh.clamp(max=MAX_LOG_SCALE)) * height)
    corners = (x - half_width, y - half_height, x + half_width, y + half_height)
    return torch.stack(corners, dim=-1)


def _centers_and_sizes(boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height, width, height


def clip(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Clip boxes `[B, N, 4]` to images of these heights and widths, float32 `[B, 2]`."""
    return torch.minimum(boxes.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])


def large_enough(boxes: torch.Tensor, min_size: float) -> torch.Tensor:
    """Return whether both sides of each box `[..., 4]` have at least `min_size` pixels."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_size).all(dim=-1)
