"""Non-maximum suppression of a batch, with an output of fixed shape."""

import torch
from torchvision.ops import batched_nms


def nms_plain(
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
