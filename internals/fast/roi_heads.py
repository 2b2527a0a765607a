"""The box head with tensors of fixed shape: selection of proposals, losses and detections."""

from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection.roi_heads import RoIHeads

from internals.fast import plain_kernels
from internals.fast.boxes import (
    GroundTruth,
    Proposals,
    clip,
    decode,
    encode,
    large_enough,
    take_rows,
)
from internals.fast.kernels import kernels_for
from internals.fast.keys import FIRST_GT_ID, PROPOSALS, random_keys
from internals.fast.rpn import L1_BETA
from internals.fast.sampling import IGNORED, sample

MIN_SIDE = 1e-2  # of a detection in pixels, as in torchvision
CANDIDATES = 2048  # detections before NMS; more are needed for a few images only


class Samples(NamedTuple):
    """The proposals of a batch to train on, S for each image.

    Attributes:
        boxes: float32 `[B, S, 4]`.
        labels: int64 `[B, S]`, 0 for background.
        deltas: float32 `[B, S, 4]`, from the boxes to their ground-truth boxes.
        is_positive: bool `[B, S]`, whether a box has a ground-truth box.
        is_sample: bool `[B, S]`; the other rows do not count.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    deltas: torch.Tensor
    is_positive: torch.Tensor
    is_sample: torch.Tensor


@torch.no_grad()
def select_samples(heads: RoIHeads, proposals: Proposals, gt: GroundTruth) -> Samples:
    """Sample from proposals and ground-truth boxes as torchvision does, with its thresholds."""
    sampler = heads.fg_bg_sampler
    size = sampler.batch_size_per_image
    ranks, gt_rows = (
        torch.arange(x.shape[1], device=x.device) for x in (proposals.boxes, gt.boxes)
    )
    boxes = torch.cat([proposals.boxes, gt.boxes], dim=1)
    valid = torch.cat([proposals.valid, gt_rows < gt.counts[:, None]], dim=1)
    kernels = kernels_for(boxes.device)
    matches, kinds = kernels.match(gt.boxes, gt.counts, boxes, heads.proposal_matcher)
    positives, is_positive, negatives, is_negative = sample(
        kinds.masked_fill(~valid, IGNORED),
        random_keys(gt.seeds, torch.cat([ranks, FIRST_GT_ID + gt_rows]), PROPOSALS),
        size,
        sampler.positive_fraction,
    )
    # Of the rows for positives and for negatives `size` are samples at most: these first.
    rows = torch.cat([positives, negatives], dim=1)
    is_sample = torch.cat([is_positive, is_negative], dim=1)
    is_positive = torch.cat([is_positive, torch.zeros_like(is_negative)], dim=1)
    order = is_sample.byte().argsort(dim=1, descending=True, stable=True)[:, :size]
    rows, is_sample, is_positive = (x.gather(1, order) for x in (rows, is_sample, is_positive))
    matches = matches.gather(1, rows)
    boxes = take_rows(boxes, rows)
    deltas = encode(take_rows(gt.boxes, matches), boxes, heads.box_coder.weights)
    return Samples(
        boxes.masked_fill(~is_sample[..., None], 0.0),
        gt.labels.gather(1, matches).masked_fill(~is_positive, 0),
        # Elsewhere they may be infinite, and 0 times infinity is NaN.
        deltas.masked_fill(~is_positive[..., None], 0.0),
        is_positive,
        is_sample,
    )


def head_losses(
    logits: torch.Tensor, deltas: torch.Tensor, samples: Samples
) -> dict[str, torch.Tensor]:
    """Compute torchvision's losses of the box head.

    Args:
        logits: float32 `[B * S, C]`, of the samples.
        deltas: float32 `[B * S, 4 * C]`, for each class.
        samples: Of `select_samples`.
    """
    labels, is_positive = samples.labels.flatten(), samples.is_positive.flatten()
    weights = samples.is_sample.flatten().to(logits.dtype)
    count = weights.sum().clamp(min=1)
    classification = (cross_entropy(logits, labels, reduction="none") * weights).sum()
    of_label = labels[:, None, None].expand(-1, 1, 4)
    predicted = deltas.view(len(deltas), -1, 4).gather(1, of_label)[:, 0]
    predicted = predicted.masked_fill(~is_positive[:, None], 0.0)
    targets = samples.deltas.flatten(0, 1)
    regression = smooth_l1_loss(predicted, targets, beta=L1_BETA, reduction="sum")
    return {"loss_classifier": classification / count, "loss_box_reg": regression / count}


def detect(
    heads: RoIHeads,
    logits: torch.Tensor,
    deltas: torch.Tensor,
    proposals: Proposals,
    sizes: torch.Tensor,
    candidates: int | None = CANDIDATES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select torchvision's detections.

    Args:
        heads: With the thresholds.
        logits: float32 `[B * P, C]`, of the proposals.
        deltas: float32 `[B * P, 4 * C]`, for each class.
        proposals: P of each image.
        sizes: float32 `[B, 2]`, height and width of the images without padding.
        candidates: The number of best-scored boxes that NMS starts from; None for all.

    Returns:
        float32 `[B, D, 6]`: x1, y1, x2, y2, score, label, the best first; score -1 where there is
        no detection. And whether `candidates` were too few for an image, bool `[B]`.
    """
    images, classes = len(sizes), logits.shape[-1]
    scores = logits.softmax(-1).view(images, -1, classes)[..., 1:]
    above = proposals.valid[..., None] & (scores > heads.score_thresh)
    scores, rows = (
        scores.masked_fill(~above, -1.0).flatten(1).sort(dim=1, descending=True, stable=True)
    )
    scores, rows = scores[:, :candidates], rows[:, :candidates]
    row, label = rows // (classes - 1), rows % (classes - 1) + 1
    codes = take_rows(deltas.view(images, -1, 4), row * classes + label)
    found = clip(decode(codes, take_rows(proposals.boxes, row), heads.box_coder.weights), sizes)
    usable = (scores >= 0) & large_enough(found, MIN_SIDE)
    # The Triton kernel holds a whole list in registers, which is too much for all of them.
    kernels = kernels_for(found.device) if candidates else plain_kernels
    limit = heads.detections_per_img
    keep = kernels.nms(found, usable, heads.nms_thresh, label, limit)
    scores, order = scores.masked_fill(~keep, -1.0).sort(dim=1, descending=True, stable=True)
    order = order[:, :limit]
    rows = torch.cat([take_rows(found, order), scores[:, :limit, None]], dim=2)
    rows = torch.cat([rows, label.gather(1, order)[..., None].to(rows.dtype)], dim=2)
    too_few = above.flatten(1).sum(1) > scores.shape[1]
    if rows.shape[1] == limit:  # else not even all candidates are enough
        too_few &= rows[:, -1, 4] < 0
    return rows, too_few
