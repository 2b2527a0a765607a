"""Matching and NMS of a batch compared with torchvision's, image by image."""

import pytest
import torch
from helpers import coarse_boxes
from torchvision.models.detection._utils import Matcher
from torchvision.ops import batched_nms, box_iou, nms

from internals.fast import plain_kernels


@pytest.mark.parametrize("matcher", [Matcher(0.7, 0.3, True), Matcher(0.5, 0.5, False)])
@pytest.mark.parametrize("shared", [True, False])
def test_batch_of_matches_equals_torchvision(matcher, shared):
    """With padding, an image without boxes, and a box that overlaps no anchor."""
    counts = [7, 0, 1]
    anchors = torch.stack([coarse_boxes(500, seed) for seed in range(1 if shared else 3)])
    gt_boxes = torch.stack([coarse_boxes(16, 9 + n) + 0.1 for n in range(3)])
    gt_boxes[2, 0] += 100
    matches, kinds = plain_kernels.match(gt_boxes, torch.tensor(counts), anchors, matcher)
    assert matches.dtype == torch.int64
    for n, count in enumerate(counts):
        if not count:
            assert (kinds[n] == 0).all()
            continue
        expected = matcher(box_iou(gt_boxes[n, :count], anchors[n % len(anchors)]))
        kind = {matcher.BELOW_LOW_THRESHOLD: 0, matcher.BETWEEN_THRESHOLDS: -1}
        assert kinds[n].tolist() == [kind.get(value, 1) for value in expected.tolist()]
        assert torch.equal(matches[n][expected >= 0], expected[expected >= 0])
    if matcher.allow_low_quality_matches:
        assert (kinds[2] == 1).all()  # torchvision: the best IoU is 0, which all anchors have


def sorted_boxes(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return boxes, whether they are valid, and labels."""
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(rows, count, 2, generator=generator) * 100
    sides = torch.rand(rows, count, 2, generator=generator) * 60 + 1
    valid = torch.rand(rows, count, generator=generator) < 0.8
    labels = torch.randint(1, 4, (rows, count), generator=generator)
    return torch.cat([corners, corners + sides], dim=2), valid, labels


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("with_labels", [False, True])
def test_nms_equals_torchvision(with_labels, limit):
    boxes, valid, labels = sorted_boxes(3, 150)
    valid[1] = False
    keep = plain_kernels.nms(boxes, valid, 0.5, labels if with_labels else None, limit)
    assert not keep[1].any()
    for row in (0, 2):
        rows = valid[row].nonzero()[:, 0]
        scores = torch.linspace(1, 0, len(rows))
        if with_labels:
            expected = batched_nms(boxes[row, rows], scores, labels[row, rows], 0.5)
        else:
            expected = nms(boxes[row, rows], scores, 0.5)
        assert 10 < len(expected) < len(rows)
        assert keep[row].nonzero()[:, 0].tolist() == rows[expected[:limit]].sort()[0].tolist()
