"""Match anchors and proposals with ground-truth boxes."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from internals.fast.sampling import IGNORED, NEGATIVE, POSITIVE


class FastMatcher(Matcher):
    """torchvision's matcher of anchors and ground-truth boxes, without data-dependent shapes."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
        """Restore the matches of anchors with the highest IoU of a ground-truth box."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


def match_plain(
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
