"""Matching compared with torchvision's, and its Triton kernels with plain PyTorch."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from internals.fast.matching import FastMatcher, match_plain


def coarse_boxes(count: int, seed: int) -> torch.Tensor:
    """Return boxes on a coarse grid, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 8, (count, 2), generator=generator).float()
    sides = torch.randint(1, 5, (count, 2), generator=generator).float()
    return torch.cat([corners, corners + sides], dim=1)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_matcher_equals_torchvision(seed, low_quality):
    anchors = coarse_boxes(500, seed)
    quality = box_iou(anchors[:7] + 0.1, anchors)
    arguments = (0.7, 0.3, low_quality)
    expected = Matcher(*arguments)(quality)
    assert (expected >= 0).any()
    assert (expected < 0).any()
    assert torch.equal(FastMatcher(*arguments)(quality.clone()), expected)


@pytest.mark.parametrize("matcher", [Matcher(0.7, 0.3, True), Matcher(0.5, 0.5, False)])
@pytest.mark.parametrize("shared", [True, False])
def test_batch_of_matches_equals_torchvision(matcher, shared):
    """With padding, an image without boxes, and a box that overlaps no anchor."""
    counts = [7, 0, 1]
    anchors = torch.stack([coarse_boxes(500, seed) for seed in range(1 if shared else 3)])
    gt_boxes = torch.stack([coarse_boxes(16, 9 + n) + 0.1 for n in range(3)])
    gt_boxes[2, 0] += 100
    matches, kinds = match_plain(gt_boxes, torch.tensor(counts), anchors, matcher)
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
