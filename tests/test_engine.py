import math
from functools import partial

import pytest
import torch

import coco_utils
import engine
from internals import mixed_precision
from internals.errors import RunError
from internals.mixed_precision import resolve_precision

RATE = partial(
    engine.learning_rate_factor,
    steps_per_epoch=10,
    epochs=26,
    warmup_steps=5,
    milestones=[16, 22],
    gamma=0.1,
)


def test_the_rate_warms_up_then_drops_at_the_milestones():
    assert RATE(0) == pytest.approx(0.001)
    assert RATE(4) == pytest.approx(0.001 + 0.999 * 0.8)
    assert RATE(5) == RATE(159) == 1
    assert RATE(160) == pytest.approx(0.1)
    assert RATE(219) == pytest.approx(0.1)
    assert RATE(220) == RATE(10_000) == pytest.approx(0.01)


def test_the_cosine_ends_at_zero():
    cosine = partial(RATE, milestones=None, warmup_steps=0)
    assert cosine(0) == 1
    assert cosine(130) == pytest.approx(0.5)
    assert cosine(260) == pytest.approx(0)
    assert cosine(65) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_an_epoch_of_one_batch_reaches_the_base_rate():
    one = partial(RATE, steps_per_epoch=1, warmup_steps=1)
    assert [one(step) for step in (0, 1, 15)] == [0.001, 1, 1]


def test_the_schedule_sets_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    assert engine.Schedule(0.02, RATE)(optimizer, 160) == pytest.approx(0.002)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.002] * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_is_reported_with_its_own_step_and_images(bad):
    watch = engine.FiniteWatch(torch.device("cpu"))
    for step, loss in ((7, 1.0), (8, bad), (9, bad)):
        watch.note(step, torch.tensor(loss), [100 + step, 200 + step])
    with pytest.raises(RunError, match=r"step 8 .*images \[108, 208\] on rank 0"):
        watch.check()


def test_good_losses_pass_and_are_forgotten():
    watch = engine.FiniteWatch(torch.device("cpu"))
    for step in range(5):
        watch.note(step, torch.tensor(1e30), [step])
    watch.check()
    assert not watch.seen


def test_the_meter_averages_over_steps_since_the_last_read():
    meter = engine.LossMeter()
    for value in (1.0, 3.0):
        meter.add({"loss_a": torch.tensor(value), "b": torch.tensor(10 * value)})
    assert meter.read() == {"loss": 22.0, "loss_a": 2.0, "loss_b": 20.0}
    meter.add({"loss_a": torch.tensor(5.0), "b": torch.tensor(1.0)})
    assert meter.read() == {"loss": 6.0, "loss_a": 5.0, "loss_b": 1.0}


def test_a_batch_arrives_on_the_device_as_it_was_loaded():
    images = [
        torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8),
        torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8).permute(2, 0, 1),
    ]
    targets = [
        {"boxes": torch.rand(n, 4), "labels": torch.arange(n), "image_id": n} for n in (2, 0)
    ]
    batch = coco_utils.collate(list(zip(images, targets, strict=True)))
    assert not any(isinstance(v, torch.Tensor) for t in batch[1] for v in t.values())
    assert [target["image_id"] for target in batch[1]] == [2, 0]
    floats, arrived = engine.to_device(*batch, torch.device("cpu"))
    for image, value in zip(images, floats, strict=True):
        assert torch.equal(image.float() / 255, value)
    for target, value in zip(targets, arrived, strict=True):
        assert value.keys() == {"boxes", "labels"}
        assert all(torch.equal(target[key], value[key]) for key in value)


def test_the_type_of_autocast_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision(cpu, False, None)[0] is None
    assert resolve_precision(cuda, True, None)[0] is torch.float16
    assert resolve_precision(cuda, True, "bfloat16")[0] is torch.bfloat16
    monkeypatch.setattr(mixed_precision, "_cpu_has_bfloat16", lambda: True)
    assert resolve_precision(cpu, True, None)[0] is torch.bfloat16
    monkeypatch.setattr(mixed_precision, "_cpu_has_bfloat16", lambda: False)
    dtype, why = resolve_precision(cpu, True, None)
    assert dtype is None
    assert "no bfloat16 instructions" in why


def scaled_steps(gradients: list[float], optimizer_class) -> engine.SkippedSteps:
    """Steps of a GradScaler with these gradients on a fused optimizer."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = engine.SkippedSteps(optimizer, torch.device("cpu"))
    for gradient in gradients:
        scaler.scale(weight.sum())  # sets the scale up
        weight.grad = torch.full((3,), gradient)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight) == math.isinf(gradient)
    skipped.stop()
    return skipped


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_skipped_steps_are_counted_until_there_are_too_many(optimizer_class):
    inf = math.inf
    skipped = scaled_steps([1.0, inf, 1.0, inf, inf, 1.0], optimizer_class)
    assert skipped.check(6) == 3
    assert skipped.check(6) == 0
    assert scaled_steps([inf] * 9 + [1.0] + [inf] * 9, optimizer_class).check(19) == 18
    with pytest.raises(RunError, match="10 steps in a row, up to step 12"):
        scaled_steps([1.0, *[inf] * 10, 1.0], optimizer_class).check(12)
