"""Triton kernels for matching and NMS on CUDA; `kernels.py` decides whether they are used.

IoUs have the bits of PyTorch's operators: divisions round correctly, and products and sums are not
fused. So comparisons with thresholds and between IoUs give the same results.
"""

import torch
import triton
import triton.language as tl
from torchvision.models.detection._utils import Matcher

EXACT = {"enable_fp_fusion": False}


@triton.jit
def load_boxes(boxes, rows, exists):
    """Load the boxes at `rows`: their four coordinates and areas."""
    x1 = tl.load(boxes + rows * 4 + 0, mask=exists, other=0.0)
    y1 = tl.load(boxes + rows * 4 + 1, mask=exists, other=0.0)
    x2 = tl.load(boxes + rows * 4 + 2, mask=exists, other=0.0)
    y2 = tl.load(boxes + rows * 4 + 3, mask=exists, other=0.0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def iou_with_box(box, x1, y1, x2, y2, area):
    """Compute the IoU of the box at the pointer `box` with many others."""
    left, top, right, bottom = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    width = tl.maximum(tl.minimum(x2, right) - tl.maximum(x1, left), 0.0)
    height = tl.maximum(tl.minimum(y2, bottom) - tl.maximum(y1, top), 0.0)
    overlap = width * height
    return tl.div_rn(overlap, ((right - left) * (bottom - top) + area) - overlap)


# -------------------------------------------------------------------------------------- matching


@triton.jit
def match_kernel(
    gt_boxes,
    counts,
    boxes,
    image_stride,
    highest,
    matches,
    best_of_gt,
    count,
    padded,
    block: tl.constexpr,
):
    """Find the best ground-truth box of each box, and the highest IoU of each ground-truth box."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    exists = rows < count
    x1, y1, x2, y2, area = load_boxes(boxes + image * image_stride, rows, exists)
    best = tl.full([block], -1.0, tl.float32)
    match = tl.zeros([block], tl.int32)
    for g in range(tl.load(counts + image).to(tl.int32)):
        iou = iou_with_box(gt_boxes + (image * padded + g) * 4, x1, y1, x2, y2, area)
        match = tl.where(iou > best, g, match)
        best = tl.maximum(best, iou)
        # IoUs are not negative, so their bits compare as integers.
        of_block = tl.max(tl.where(exists, iou, 0.0), axis=0)
        tl.atomic_max(best_of_gt + image * padded + g, of_block.to(tl.int32, bitcast=True))
    tl.store(highest + image * count + rows, best, mask=exists)
    tl.store(matches + image * count + rows, match.to(tl.int64), mask=exists)


@triton.jit
def kind_kernel(
    gt_boxes,
    counts,
    boxes,
    image_stride,
    highest,
    best_of_gt,
    kinds,
    low,
    high,
    count,
    padded,
    low_quality: tl.constexpr,
    block: tl.constexpr,
):
    """Determine the kind of each box: 1 positive, 0 negative, -1 ignored."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    exists = rows < count
    best = tl.load(highest + image * count + rows, mask=exists, other=-1.0)
    positive = best >= high
    if low_quality:
        x1, y1, x2, y2, area = load_boxes(boxes + image * image_stride, rows, exists)
        for g in range(tl.load(counts + image).to(tl.int32)):
            iou = iou_with_box(gt_boxes + (image * padded + g) * 4, x1, y1, x2, y2, area)
            of_gt = tl.load(best_of_gt + image * padded + g).to(tl.float32, bitcast=True)
            positive = positive | (iou == of_gt)
    kind = tl.where(positive, 1, tl.where(best >= low, -1, 0))
    tl.store(kinds + image * count + rows, kind.to(tl.int8), mask=exists)


def match(
    gt_boxes: torch.Tensor,
    counts: torch.Tensor,
    boxes: torch.Tensor,
    matcher: Matcher,
    block: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match as `plain_kernels.match`, without a matrix of IoUs; `block` boxes per program."""
    gt_boxes, counts, boxes = gt_boxes.contiguous(), counts.contiguous(), boxes.contiguous()
    images, padded, _ = gt_boxes.shape
    count = boxes.shape[1]
    highest = boxes.new_empty(images, count)
    matches = counts.new_empty(images, count)
    kinds = torch.empty(images, count, dtype=torch.int8, device=boxes.device)
    best_of_gt = torch.zeros(images, padded, dtype=torch.int32, device=boxes.device)
    image_stride = 0 if len(boxes) == 1 else 4 * count
    grid = (triton.cdiv(count, block), images)
    inputs = (gt_boxes, counts, boxes, image_stride, highest)
    match_kernel[grid](*inputs, matches, best_of_gt, count, padded, block=block, **EXACT)
    thresholds = (matcher.low_threshold, matcher.high_threshold)
    kind_kernel[grid](
        *(*inputs, best_of_gt, kinds, *thresholds, count, padded),
        low_quality=matcher.allow_low_quality_matches,
        block=block,
        **EXACT,
    )
    return matches, kinds


# ------------------------------------------------------------------------------------------- NMS


@triton.jit
def nms_kernel(
    boxes,
    labels,
    valid,
    keep,
    count,
    threshold,
    limit,
    has_labels: tl.constexpr,
    block: tl.constexpr,
):
    """Suppress the boxes of one row, one after the other; `block` is at least count."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, block)
    exists = rank < count
    boxes += row * count * 4
    labels += row * count
    x1, y1, x2, y2, area = load_boxes(boxes, rank, exists)
    alive = tl.load(valid + row * count + rank, mask=exists, other=0).to(tl.int32)
    if has_labels:
        label = tl.load(labels + rank, mask=exists, other=-1)
    last = tl.max(tl.where(alive > 0, rank, -1), axis=0)
    kept = 0
    i = 0
    while (i <= last) & (kept < limit):
        if tl.sum(tl.where(rank == i, alive, 0), axis=0) > 0:
            kept += 1
            iou = iou_with_box(boxes + i * 4, x1, y1, x2, y2, area)
            suppressed = (iou > threshold) & (rank > i)
            if has_labels:
                suppressed = suppressed & (label == tl.load(labels + i))
            alive = tl.where(suppressed, 0, alive)
        i += 1
    tl.store(keep + row * count + rank, tl.where(rank < i, alive, 0).to(tl.int8), mask=exists)


def nms(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    threshold: float,
    labels: torch.Tensor | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Suppress as `plain_kernels.nms`, with one program per row, without waiting."""
    rows, count, _ = boxes.shape
    keep = torch.empty(rows, count, dtype=torch.int8, device=boxes.device)
    block = triton.next_power_of_2(count)
    valid = valid.to(torch.int8)
    nms_kernel[(rows,)](
        boxes.contiguous(),
        valid if labels is None else labels.contiguous(),
        valid,
        keep,
        count,
        threshold,
        count if limit is None else limit,
        has_labels=labels is not None,
        block=block,
        num_warps=max(1, min(16, block // 256)),
        **EXACT,
    )
    return keep.bool()
