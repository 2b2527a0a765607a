import math

import pytest
import torch

from internals.errors import RunError
from internals.monitoring import LossMeter, SkippedSteps

CPU = torch.device("cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_is_reported(bad):
    meter = LossMeter(CPU)
    meter.add({"a": torch.tensor(1e30), "b": torch.tensor(1.0)}, 7, [107, 207])
    with pytest.raises(RunError, match=r"step 9 .*images \[108, 208\] on rank 0.*--lr"):
        meter.add({"a": torch.tensor(1.0), "b": torch.tensor(bad)}, 8, [108, 208])


def test_losses_are_averaged_since_last_read():
    meter = LossMeter(CPU)
    for value in (1.0, 3.0):
        meter.add({"loss_a": torch.tensor(value), "b": torch.tensor(10 * value)}, 0, [])
    assert meter.read() == {"loss": 22.0, "loss_a": 2.0, "loss_b": 20.0}
    meter.add({"loss_a": torch.tensor(5.0), "b": torch.tensor(1.0)}, 1, [])
    assert meter.read() == {"loss": 6.0, "loss_a": 5.0, "loss_b": 1.0}


def take_steps(gradients: list[float], optimizer_class: type) -> SkippedSteps:
    """Take steps of a GradScaler with these gradients on a fused optimizer."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with SkippedSteps(optimizer, CPU) as skipped:
        for gradient in gradients:
            scaler.scale(weight.sum())  # initializes the scale
            weight.grad = torch.full((3,), gradient)
            before = weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, weight) == math.isinf(gradient)
    return skipped


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_skipped_steps_are_counted_and_limited(optimizer_class):
    inf = math.inf
    skipped = take_steps([1.0, inf, 1.0, inf, inf, 1.0], optimizer_class)
    assert skipped.read(6) == 3
    assert skipped.read(6) == 0
    assert take_steps([inf] * 9 + [1.0] + [inf] * 9, optimizer_class).read(19) == 18
    with pytest.raises(RunError, match="10 steps in a row, up to step 12"):
        take_steps([1.0, *[inf] * 10, 1.0], optimizer_class).read(12)
