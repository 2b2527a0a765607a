"""The region proposal network with tensors of fixed shape.

Shapes depend on the batch, the padded size of its images and the padded number of boxes only, so
that the host never waits for the device.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad, smooth_l1_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from internals.fast.anchors import Anchors, find_anchors
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
from internals.fast.keys import ANCHORS, random_keys
from internals.fast.sampling import sample

BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the RPN's BoxCoder
L1_BETA = 1 / 9  # where torchvision's box losses change from quadratic to linear


class Predictions(NamedTuple):
    """The output of the RPN's head, and the anchors it is for.

    Attributes:
        objectness: float32 `[B, A]`, logits.
        deltas: float32 `[B, A, 4]`.
        anchors: A of them, the same for all images.
        level_lengths: The number of anchors of each level.
    """

    objectness: torch.Tensor
    deltas: torch.Tensor
    anchors: Anchors
    level_lengths: list[int]


def predict(
    rpn: RegionProposalNetwork, images: torch.Tensor, features: list[torch.Tensor]
) -> Predictions:
    """Apply the RPN's head to the feature maps of padded images `[B, 3, H, W]`."""
    objectness, deltas = rpn.head(features)
    level_lengths = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    anchors = find_anchors(rpn.anchor_generator, images, features)
    shape = (len(images), len(anchors.ids))
    return Predictions(objectness.view(shape), deltas.view(*shape, 4), anchors, level_lengths)


def rpn_losses(
    rpn: RegionProposalNetwork, predictions: Predictions, gt: GroundTruth
) -> dict[str, torch.Tensor]:
    """Compute torchvision's losses of the RPN, which has the thresholds, from its predictions."""
    objectness, deltas, (anchors, ids), _ = predictions
    sampler = rpn.fg_bg_sampler
    with torch.no_grad():
        kernels = kernels_for(anchors.device)
        matches, kinds = kernels.match(gt.boxes, gt.counts, anchors[None], rpn.proposal_matcher)
        positives, is_positive, negatives, is_negative = sample(
            kinds,
            random_keys(gt.seeds, ids, ANCHORS),
            sampler.batch_size_per_image,
            sampler.positive_fraction,
        )
        weights = torch.cat([is_positive, is_negative], dim=1).to(objectness.dtype)
        samples = weights.sum().clamp(min=1)
        labels = torch.cat([is_positive, torch.zeros_like(is_negative)], dim=1).to(weights.dtype)
        matched = take_rows(gt.boxes, matches.gather(1, positives))
        # Rows without a sample may have infinite targets, and 0 times infinity is NaN.
        targets = encode(matched, anchors[positives], BOX_WEIGHTS)
        targets = targets.masked_fill(~is_positive[..., None], 0.0)
    logits = objectness.gather(1, torch.cat([positives, negatives], dim=1))
    classification = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    predicted = take_rows(deltas, positives).masked_fill(~is_positive[..., None], 0.0)
    regression = smooth_l1_loss(predicted, targets, beta=L1_BETA, reduction="sum")
    return {
        "loss_objectness": classification / samples,
        "loss_rpn_box_reg": regression / samples,
    }


@torch.no_grad()
def select_proposals(
    rpn: RegionProposalNetwork, predictions: Predictions, sizes: torch.Tensor
) -> Proposals:
    """Select torchvision's proposals.

    Args:
        rpn: With the thresholds; in training mode it selects more.
        predictions: Of its head.
        sizes: float32 `[B, 2]`, height and width of the images without padding.
    """
    objectness, deltas, (anchors, _), level_lengths = predictions
    levels, first = [], 0
    for length in level_lengths:
        logits, rows = objectness.narrow(1, first, length).topk(
            min(rpn.pre_nms_top_n(), length), dim=1
        )
        rows = rows + first
        boxes = clip(decode(take_rows(deltas, rows), anchors[rows], BOX_WEIGHTS), sizes)
        scores = logits.sigmoid()
        valid = large_enough(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        levels.append((boxes, scores, valid))
        first += length
    keep = _nms_by_level(rpn, levels)
    boxes, scores, _ = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    scores = scores.masked_fill(~keep, -1.0)
    # Stable, as in torchvision's NMS: of equal scores the first comes first.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    order = order[:, : rpn.post_nms_top_n()]
    return Proposals(take_rows(boxes, order), scores[:, : order.shape[1]] >= 0)


def _nms_by_level(rpn: RegionProposalNetwork, levels: list[tuple]) -> torch.Tensor:
    """Suppress overlapping boxes of each level; return which of all levels' boxes are kept."""
    lengths = [boxes.shape[1] for boxes, *_ in levels]
    most = max(lengths)
    boxes, valid = (
        torch.stack([pad(x, (0, 0) * (x.dim() - 2) + (0, most - x.shape[1])) for x in parts])
        for parts in (
            [boxes for boxes, *_ in levels],
            [valid for *_, valid in levels],
        )
    )
    kernels = kernels_for(boxes.device)
    keep = kernels.nms(boxes.flatten(0, 1), valid.flatten(0, 1), rpn.nms_thresh)
    keep = keep.view(valid.shape)
    return torch.cat([kept[:, :n] for kept, n in zip(keep, lengths, strict=True)], dim=1)
