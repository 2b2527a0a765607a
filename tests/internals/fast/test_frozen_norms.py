"""Folded norms compared with a convolution and a norm of torchvision."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from internals.fast.frozen_norms import (
    FoldedConv2d,
    FoldedNorm,
    fold_frozen_norms,
    train_affine,
)


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


# ------------------------------------------------------------------------ scale and bias trained


class PlainNorm(nn.Module):
    """A norm with frozen statistics and trained scale and bias, as in its definition."""

    def __init__(self, norm: FrozenBatchNorm2d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(norm.weight.clone()), nn.Parameter(norm.bias.clone())
        self.mean, self.var, self.eps = norm.running_mean, norm.running_var, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = (x - self.mean.view(-1, 1, 1)) / (self.var.view(-1, 1, 1) + self.eps).sqrt()
        return normed * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def plain_and_trained() -> tuple[nn.Sequential, nn.Sequential]:
    """Return a convolution and a norm whose affine part trains, unfolded and folded."""
    stock, ours = stock_and_folded(True)
    assert train_affine(ours)
    return nn.Sequential(stock[0], PlainNorm(stock[1]), nn.ReLU()), ours


def results(model: nn.Sequential, **autocast) -> list[torch.Tensor]:
    """Return output and gradients of input, weights, scale and bias."""
    x = torch.linspace(-1, 1, 2 * 3 * 6 * 7).view(2, 3, 6, 7).requires_grad_()
    with torch.autocast("cpu", **autocast):
        out = model(x)
    parameters = (x, model[0].weight, model[1].weight, model[1].bias)
    return [out.float(), *torch.autograd.grad(out.float().square().sum(), parameters)]


def test_trained_scale_and_bias_equal_plain_norm():
    plain, ours = plain_and_trained()
    expected, actual = results(plain, enabled=False), results(ours, enabled=False)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(compiled(x), plain(x))


def test_trained_scale_and_bias_under_autocast():
    plain, ours = plain_and_trained()
    expected = results(plain, enabled=False)
    for a, b in zip(expected, results(ours, dtype=torch.bfloat16), strict=True):
        assert b.dtype is torch.float32
        assert (b - a).norm() < 0.02 * a.norm()


def test_scale_and_bias_get_gradients_by_functional_call():
    """A CUDA graph is captured with copies of the parameters, called by their names."""
    plain, ours = plain_and_trained()
    grads, x = [], torch.randn(1, 3, 5, 5)
    for model in (plain, ours):
        leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        out = torch.func.functional_call(model, leaves, x)
        grads.append(torch.autograd.grad(out.sum(), [leaves["1.weight"], leaves["1.bias"]]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_state_dict_of_trained_affine_is_that_of_frozen_norms():
    stock, ours = stock_and_folded(True)
    train_affine(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours[1].named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in ours[1].named_buffers()] == ["running_mean", "running_var"]
    with torch.no_grad():
        ours[1].weight.mul_(2), ours[1].bias.add_(1)
    stock.load_state_dict(ours.state_dict())
    assert_same(stock, ours)
    old = nn.BatchNorm2d(5).state_dict()  # with num_batches_tracked
    ours[1].load_state_dict(old)
    assert ours[1].weight.requires_grad
    assert ours[1].weight.eq(1).all()


def test_norms_of_frozen_convolutions_stay_frozen():
    _, ours = stock_and_folded(False)
    assert not train_affine(ours)
    assert not list(ours[1].parameters())


def test_scale_and_bias_of_a_fused_optimizer_are_noticed():
    """It changes them in place without a new version, between evaluations and in training."""
    plain, ours = plain_and_trained()
    x = torch.randn(1, 3, 5, 5)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (plain, ours)]
    for _ in range(2):
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            with torch.no_grad():
                model.eval()(x)
            optimizer.zero_grad()
            model.train()(x).square().sum().backward()
            optimizer.step()
            model.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(ours)  # as the moving average of the weights does
    with torch.no_grad():
        copied[1].weight.zero_()
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not copied.eval()(x).equal(ours(x))
