"""The matcher compared with torchvision's."""

import pytest
import torch
from helpers import coarse_boxes
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from internals.fast.matching import FastMatcher


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
