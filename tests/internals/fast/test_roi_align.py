"""RoIAlign compared with torchvision's."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from internals.fast.roi_align import FastRoIAlign


def pyramid(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"0": (32, 48), "1": (16, 24), "2": (8, 12), "3": (4, 6)}
    return {
        name: torch.rand(2, 5, *size, generator=generator).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }


def random_boxes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([190.0, 120])
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 150], dim=1)


@pytest.mark.parametrize("counts", [(40, 60), (0, 5), (0, 0)])
def test_roi_align_equals_torchvision(counts):
    boxes = [random_boxes(count) for count in counts]
    if counts[0]:
        boxes[0][:3] = torch.tensor([[-20.0, -30, 300, 200], [5, 5, 5, 5], [191, 127, 192, 128]])
    results = []
    for pool in (MultiScaleRoIAlign, FastRoIAlign):
        features = pyramid()
        output = pool(["0", "1", "2", "3"], 7, 2)(features, boxes, [(128, 192)] * 2)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        results.append((output.detach(), {name: f.grad for name, f in features.items()}))
    (expected, gradients), (actual, our_gradients) = results
    assert actual.shape == expected.shape == (sum(counts), 5, 7, 7)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients.items():
        ours = our_gradients[name]
        torch.testing.assert_close(ours, gradient, atol=1e-3, rtol=1e-3)


def test_roi_align_keeps_dtype():
    pool = FastRoIAlign(["0", "1", "2", "3"], 7, 2)
    features = pyramid(torch.bfloat16)
    output = pool(features, [random_boxes(4), random_boxes(3)], [(128, 192)] * 2)
    output.sum().backward()
    assert output.dtype == features["0"].grad.dtype == torch.bfloat16
