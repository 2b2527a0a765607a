import math

import pytest
import torch

from internals.errors import RunError
from internals.monitoring import StepMonitor

CPU = torch.device("cpu")


def make_monitor() -> StepMonitor:
    return StepMonitor(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), CPU)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
@pytest.mark.parametrize("step", [8, 2**24])  # float32 has no 2**24 + 1
def test_non_finite_loss_is_reported(bad, step):
    """Losses are float32: a larger sum is not finite, either."""
    monitor = make_monitor()
    monitor.add({"a": torch.tensor(1e30), "b": torch.tensor(1.0)}, step, [107, 207])
    expected = rf"step {step + 2} .*images \[108, 208\] on rank 0.*--lr"
    with pytest.raises(RunError, match=expected):
        monitor.add({"a": torch.tensor(1.0), "b": torch.tensor(bad)}, step + 1, [108, 208])


def test_losses_are_averaged_since_last_read():
    monitor = make_monitor()
    for value in (1.0, 3.0):
        monitor.add({"loss_a": torch.tensor(value), "b": torch.tensor(10 * value)}, 0, [])
    assert monitor.read(1) == ({"loss": 22.0, "loss_a": 2.0, "loss_b": 20.0}, 0)
    monitor.add({"loss_a": torch.tensor(5.0), "b": torch.tensor(1.0)}, 1, [])
    assert monitor.read(2) == ({"loss": 6.0, "loss_a": 5.0, "loss_b": 1.0}, 0)


def take_steps(gradients: list[float], optimizer_class: type) -> StepMonitor:
    """Take steps of a GradScaler with these gradients on a fused optimizer."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with StepMonitor(optimizer, CPU) as monitor:
        for gradient in gradients:
            scaler.scale(weight.sum())  # initializes the scale
            weight.grad = torch.full((3,), gradient)
            before = weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            monitor.add({"a": torch.tensor(1.0)}, 0, [])
            assert torch.equal(before, weight) == math.isinf(gradient)
    return monitor


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_skipped_steps_are_counted_and_limited(optimizer_class):
    inf = math.inf
    monitor = take_steps([1.0, inf, 1.0, inf, inf, 1.0], optimizer_class)
    assert monitor.read(6)[1] == 3
    monitor.add({"a": torch.tensor(1.0)}, 0, [])
    assert monitor.read(7)[1] == 0
    assert take_steps([inf] * 9 + [1.0] + [inf] * 9, optimizer_class).read(19)[1] == 18
    with pytest.raises(RunError, match="10 steps in a row, up to step 12"):
        take_steps([1.0, *[inf] * 10, 1.0], optimizer_class).read(12)
