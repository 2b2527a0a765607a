"""Merge the detections in overlapping tiles of an image, and in the whole image.

The same object may be found in several tiles. Where it is whole, NMS keeps the box with the highest
score. A box at the border of a tile may be of a part of an object: it is compared with the boxes of
other tiles where both tiles see the image, and joined with those that agree there.
"""

from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import batched_nms

BORDER = 0.005  # of a tile's sides: boxes that come closer to its border may be cut
AGREEMENT = 0.5  # IoU within the common region of two views


class Found(NamedTuple):
    """The N boxes that were found in all views of an image.

    Attributes:
        boxes: float32 `[N, 4]`, x1, y1, x2, y2 in pixels of the image.
        scores: float32 `[N]`.
        groups: int64 `[N]`; boxes of different groups are different objects.
        views: float32 `[N, 4]`, x1, y1, x2, y2 of the view in which each box was found.
    """

    boxes: np.ndarray
    scores: np.ndarray
    groups: np.ndarray
    views: np.ndarray

    def take(self, rows: np.ndarray) -> "Found":
        """Return some of the boxes."""
        return Found(*(column[rows] for column in self))


def merge_views(
    found: Found, size: tuple[int, int], nms_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the boxes of all views.

    Args:
        found: The boxes.
        size: Width and height of the image.
        nms_threshold: Of two boxes of a group with a higher IoU, that with the lower score goes.

    Returns:
        The boxes, float32 `[M, 4]`, and the row in `found` that each has its score and group from,
        int64 `[M]`; the highest score first.
    """
    cut = is_cut(found, size)
    order = np.argsort(-found.scores, kind="stable")
    whole = order[~cut[order]]
    # It moves boxes apart by their group: exact for few groups and in double precision only.
    _, groups = np.unique(found.groups, return_inverse=True)
    columns = (found.boxes.astype(np.float64), found.scores.astype(np.float64), groups)
    tensors = (torch.from_numpy(column[whole]) for column in columns)
    whole = whole[batched_nms(*tensors, nms_threshold).numpy()]
    boxes, rows = _add_cut(found, whole, order[cut[order]])
    order = np.argsort(-found.scores[rows], kind="stable")
    return boxes[order], rows[order]


def is_cut(found: Found, size: tuple[int, int]) -> np.ndarray:
    """Return which boxes come close to a border of their view that is not one of the image."""
    width, height = size
    margin = BORDER * np.tile(found.views[:, 2:] - found.views[:, :2], 2)
    inside = found.views != np.array([0, 0, width, height])
    return (inside & (np.abs(found.boxes - found.views) < margin)).any(axis=1)


def _add_cut(found: Found, whole: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add the boxes in the rows `cut` to those in the rows `whole`, unless they are of the same.

    Args:
        found: The boxes.
        whole: Rows of boxes to keep as they are.
        cut: Rows of boxes that may be parts of others, the highest score first.

    Returns:
        As `merge_views`.
    """
    rows = np.concatenate([whole, cut])
    boxes, views = found.boxes[rows], found.views[rows]
    groups = found.groups[rows]
    kept = np.arange(len(rows)) < len(whole)
    _, view_ids = np.unique(views, axis=0, return_inverse=True)
    for view_id in np.unique(view_ids[len(whole) :]):
        members = np.flatnonzero(view_ids == view_id)
        # Few boxes are in views that this one overlaps with, also after they were joined.
        own = views[members[0]]
        near = np.flatnonzero((views[:, :2] < own[2:]).all(1) & (views[:, 2:] > own[:2]).all(1))
        for row in members[members >= len(whole)]:
            others = near[kept[near] & (groups[near] == groups[row])]
            same = others[_agree(boxes[row], own, boxes[others], views[others])]
            if (same < len(whole)).any():
                continue
            joined = np.append(same, row)
            boxes[row], views[row] = _hull(boxes[joined]), _hull(views[joined])
            kept[same], kept[row] = False, True
            rows[row] = rows[joined[found.scores[rows[joined]].argmax()]]
    return boxes[kept], rows[kept]


def _agree(box: np.ndarray, view: np.ndarray, boxes: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Return which of `boxes` agree with `box` where its view and theirs overlap."""
    low, high = np.maximum(view[:2], views[:, :2]), np.minimum(view[2:], views[:, 2:])
    first = box[:2].clip(low, high), box[2:].clip(low, high)
    second = boxes[:, :2].clip(low, high), boxes[:, 2:].clip(low, high)
    sides = np.minimum(first[1], second[1]) - np.maximum(first[0], second[0])
    common = sides.clip(0).prod(axis=1)
    areas = [(corners[1] - corners[0]).prod(axis=1) for corners in (first, second)]
    return (common > 0) & (common >= AGREEMENT * (areas[0] + areas[1] - common))


def _hull(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
