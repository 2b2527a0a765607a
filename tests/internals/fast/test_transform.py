"""The transform compared with torchvision's."""

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from internals.fast.transform import FastTransform


@pytest.mark.parametrize("fixed", [None, (96, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_transform_equals_torchvision(training, fixed):
    generator = torch.Generator().manual_seed(0)
    sizes = [(53, 71), (64, 40), (37, 90)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    targets = [
        {"boxes": 40 * torch.rand(n, 4, generator=generator), "labels": torch.arange(n)}
        for n in (3, 0, 1)
    ]
    results = []
    for kind in (GeneralizedRCNNTransform, FastTransform):
        mean_std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        transform = kind([60, 80, 100], 140, *mean_std, fixed_size=fixed).train(training)
        torch.manual_seed(3)
        batch, moved = transform(images, targets)
        back = [{"boxes": target["boxes"].clone()} for target in moved]
        if not training:
            back = transform.postprocess(back, batch.image_sizes, sizes)
        results.append((batch.tensors, batch.image_sizes, moved, back))
    (tensors, shapes, moved, back), ours = results
    assert torch.equal(tensors, ours[0])
    assert shapes == ours[1]
    for expected, actual in zip([*moved, *back], [*ours[2], *ours[3]], strict=True):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert not torch.equal(moved[0]["boxes"], targets[0]["boxes"])
