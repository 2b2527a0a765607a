"""Matching and NMS of a batch in plain PyTorch, with outputs of fixed shape, on any device."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import batched_nms, box_iou

from internals.fast.sampling import IGNORED, NEGATIVE, POSITIVE


def match(
    gt_boxes: torch.Tensor, counts: torch.Tensor, boxes: torch.Tensor, matcher: Matcher
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the boxes of a batch as `matcher` does, image by image, without waiting.

    Args:
        gt_boxes: float32 `[B, G, 4]`.
        counts: int64 `[B]`, the number of ground-truth boxes; the rest is padding.
        boxes: float32 `[B, N, 4]`, or `[1, N, 4]` for the same anchors in all images.
        matcher: With the thresholds.

    Returns:
        The row of the ground-truth box with the highest IoU, int64 `[B, N]` (any number without
        boxes), and kinds, int8 `[B, N]`: POSITIVE, NEGATIVE or IGNORED.
    """
    rows = torch.arange(gt_boxes.shape[1], device=gt_boxes.device)
    matches, kinds = [], []
    for image, (gt, count) in enumerate(zip(gt_boxes, counts, strict=True)):
        padding = (rows >= count)[:, None]
        iou = box_iou(gt, boxes[image % len(boxes)]).masked_fill(padding, -1.0)
        highest, match = iou.max(dim=0)
        kind = torch.full_like(highest, NEGATIVE, dtype=torch.int8)
        kind = kind.masked_fill(highest >= matcher.low_threshold, IGNORED)
        kind = kind.masked_fill(highest >= matcher.high_threshold, POSITIVE)
        if matcher.allow_low_quality_matches:
            # As torchvision: if the highest IoU of a box is 0, all anchors with 0 are positive.
            is_best = (iou == iou.amax(dim=1, keepdim=True)).logical_and(~padding).any(dim=0)
            kind = kind.masked_fill(is_best, POSITIVE)
        matches.append(match)
        kinds.append(kind)
    return torch.stack(matches), torch.stack(kinds)


def nms(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    threshold: float,
    labels: torch.Tensor | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Suppress the boxes of each row that overlap a better one, with torchvision's operator.

    It waits for a CUDA device once or more per row.

    Args:
        boxes: float32 `[R, K, 4]`, the best box of a row first.
        valid: bool `[R, K]`; other boxes are ignored.
        threshold: Boxes with a higher IoU are suppressed.
        labels: int64 `[R, K]`: only boxes with the same label suppress each other.
        limit: Keep at most this many boxes of a row.

    Returns:
        bool `[R, K]`, whether a box is kept.
    """
    keep = torch.zeros_like(valid)
    for row, candidates in enumerate(valid):
        index = candidates.nonzero()[:, 0]
        order = torch.arange(len(index), 0, -1, dtype=boxes.dtype, device=boxes.device)
        group = torch.zeros_like(index) if labels is None else labels[row, index]
        kept = batched_nms(boxes[row, index], order, group, threshold)
        keep[row, index[kept[:limit]]] = True
    return keep
