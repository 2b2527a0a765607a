"""Each class of `internals/fast` compared with the class that it replaces."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import (
    BalancedPositiveNegativeSampler,
    Matcher,
    overwrite_eps,
)
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou

from internals.fast.frozen_norms import FoldedConv2d, FoldedNorm, fold_frozen_norms
from internals.fast.roi_align import CpuRoIAlign
from internals.fast.sampling import FastMatcher, SeededSampler
from internals.fast.transform import FastTransform

# ------------------------------------------------------------------------------ frozen norms


def stock_and_folded(trains: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a convolution followed by a frozen norm, as in torchvision and folded."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), FrozenBatchNorm2d(5), nn.ReLU())
    for buffer in stock.buffers():
        buffer.uniform_(0.5, 2)
    stock.requires_grad_(trains)
    ours = copy.deepcopy(stock)
    fold_frozen_norms(ours)
    assert [type(module) for module in ours] == [FoldedConv2d, FoldedNorm, nn.ReLU]
    return stock, ours


def assert_same(stock: nn.Module, ours: nn.Module) -> None:
    """Compare outputs, with and without gradients, and gradients of weights and input."""
    results = []
    for model in (stock, ours):
        x = torch.linspace(-1, 1, 2 * 3 * 6 * 7, dtype=stock[0].weight.dtype).view(2, 3, 6, 7)
        with torch.inference_mode():
            inference = model(x)
        x.requires_grad_()
        out = model(x)
        out.square().sum().backward()
        weight = model[0].weight.grad if model[0].weight.requires_grad else torch.zeros(())
        model.zero_grad()
        results.append((inference.clone(), out.detach(), x.grad, weight))
    assert results[0][0].abs().sum() > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [True, False])
def test_folded_norm_equals_norm_after_changes(trains):
    stock, ours = stock_and_folded(trains)
    assert stock.state_dict().keys() == ours.state_dict().keys()
    assert_same(stock, ours)
    state = {key: torch.rand_like(value) + 0.5 for key, value in stock.state_dict().items()}

    def change_weight(model):
        with torch.no_grad():
            model[0].weight.mul_(1.5)

    for change in (
        lambda model: model.load_state_dict(state),
        lambda model: overwrite_eps(model, 0.3),
        change_weight,
        lambda model: model.load_state_dict({k: v + 1 for k, v in state.items()}, assign=True),
        lambda model: model.double(),
        lambda model: model[1].running_var.fill_(4.0),
    ):
        outputs = []
        for model in (stock, ours):
            change(model)
            model.requires_grad_(trains)
            outputs.append(model)
        assert_same(*outputs)


def test_copy_of_folded_model_has_separate_norms():
    stock, ours = stock_and_folded(False)
    assert_same(stock, ours)
    copied = copy.deepcopy(ours)
    copied[1].running_mean.add_(0.1)
    assert_same(stock, ours)
    stock[1].running_mean.add_(0.1)
    assert_same(stock, copied)


def test_folded_norm_compiles_to_one_graph():
    stock, ours = stock_and_folded(True)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(compiled(x), stock(x))


def test_trainable_norms_are_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1), nn.ReLU())
    before = [type(module) for module in model]
    fold_frozen_norms(model)
    assert [type(module) for module in model] == before


# ----------------------------------------------------- without synchronizing with the device


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


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_matcher_equals_torchvision(seed, low_quality):
    """On a coarse grid, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 8, (500, 2), generator=generator).float()
    sides = torch.randint(1, 5, (500, 2), generator=generator).float()
    anchors = torch.cat([corners, corners + sides], dim=1)
    quality = box_iou(anchors[:7] + 0.1, anchors)
    arguments = (0.7, 0.3, low_quality)
    expected = Matcher(*arguments)(quality)
    assert (expected >= 0).any()
    assert (expected < 0).any()
    assert torch.equal(FastMatcher(*arguments)(quality.clone()), expected)


def random_labels(seed: int) -> torch.Tensor:
    """Return labels of anchors of an image: background 0, positive 1 and ignored -1."""
    return torch.randint(-1, 2, (400,), generator=torch.Generator().manual_seed(seed))


def sample(labels: list[torch.Tensor], seeds: list[int]) -> list[tuple]:
    """Return the masks of sampled positives and negatives of each image."""
    sampler = SeededSampler(64, 0.5)
    sampler.seeds = seeds
    return list(zip(*sampler(labels), strict=True))


def test_sampler_depends_on_image_seed_only():
    labels = [random_labels(0), random_labels(1)]
    together = sample(labels, [7, 8])
    torch.rand(5)  # earlier draws must not matter
    separate = [sample([labels[n]], [seed])[0] for n, seed in enumerate((7, 8))]
    for a, b in zip(together, separate, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = sample(labels, [7, 9])
    assert torch.equal(other[0][0], together[0][0])
    assert not torch.equal(other[1][0], together[1][0])


@pytest.mark.parametrize("seeds", [[], [3]])
def test_sampler_equals_torchvision(seeds):
    results = []
    for kind in (BalancedPositiveNegativeSampler, SeededSampler):
        sampler = kind(64, 0.5)
        sampler.seeds = seeds
        torch.manual_seed(3)
        results.append(sampler([random_labels(0)]))
    for (a,), (b,) in zip(*results, strict=True):
        assert a.sum() == 32
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------- RoIAlign


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
    for pool in (MultiScaleRoIAlign, CpuRoIAlign):
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
    pool = CpuRoIAlign(["0", "1", "2", "3"], 7, 2)
    features = pyramid(torch.bfloat16)
    output = pool(features, [random_boxes(4), random_boxes(3)], [(128, 192)] * 2)
    output.sum().backward()
    assert output.dtype == features["0"].grad.dtype == torch.bfloat16
