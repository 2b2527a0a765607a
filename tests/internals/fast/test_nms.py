"""NMS of a batch compared with torchvision's operator."""

import pytest
import torch
from torchvision.ops import batched_nms, nms

from internals.fast.nms import nms_plain


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
    keep = nms_plain(boxes, valid, 0.5, labels if with_labels else None, limit)
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
