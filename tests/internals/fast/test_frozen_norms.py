"""Folded norms compared with a convolution and a norm of torchvision."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from internals.fast.frozen_norms import FoldedConv2d, FoldedNorm, fold_frozen_norms


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


def test_weights_of_a_fused_optimizer_are_noticed_by_the_next_evaluation():
    """It changes weights in place without a new version; a CUDA graph runs no forward pass."""
    stock, ours = stock_and_folded(True)
    x = torch.randn(1, 3, 5, 5)
    for model in (stock, ours):
        with torch.no_grad():
            model.eval()(x)
        model.train()
        optimizer = torch.optim.SGD([model[0].weight], lr=0.1, fused=True)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
