"""Learning rate, training loop and evaluation, in this process."""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from helpers import rewrite, split_of
from torch import nn

import coco_utils
import engine
import utils
from internals.errors import RunError, StopRequested
from internals.train_state import MovingAverage

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------ learning rate

RATE = partial(
    engine.learning_rate_factor,
    steps_per_epoch=10,
    epochs=26,
    warmup_steps=5,
    milestones=[16, 22],
    gamma=0.1,
)


def test_learning_rate_warmup_and_milestones():
    assert RATE(0) == pytest.approx(0.001)
    assert RATE(4) == pytest.approx(0.001 + 0.999 * 0.8)
    assert RATE(5) == RATE(159) == 1
    assert RATE(160) == pytest.approx(0.1)
    assert RATE(219) == pytest.approx(0.1)
    assert RATE(220) == RATE(10_000) == pytest.approx(0.01)


def test_cosine_schedule():
    cosine = partial(RATE, milestones=None, warmup_steps=0)
    assert cosine(0) == 1
    assert cosine(130) == pytest.approx(0.5)
    assert cosine(260) == pytest.approx(0)
    assert cosine(65) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_one_batch_epoch_reaches_base_rate():
    one = partial(RATE, steps_per_epoch=1, warmup_steps=1)
    assert [one(step) for step in (0, 1, 15)] == [0.001, 1, 1]


# ----------------------------------------------------------------------------------- training


class TinyDetector(nn.Module):
    """A detector with two weights and the interface of torchvision's detectors.

    The losses of an image are quadratic in the weights.

    Attributes:
        outputs: The detections to return, image by image.
        seeds: The seeds of the images that it was trained on.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.norm = nn.BatchNorm2d(3)
        self.outputs, self.seeds = [], []

    def forward(self, images: list[torch.Tensor], targets: list[dict] | None = None):
        if not self.training:
            return [self.outputs.pop(0) for _ in images]
        for image in images:
            self.norm(image[None])  # updates the statistics only
        self.seeds += [target["seed"] for target in targets]
        brightness = torch.stack([image.mean() for image in images])
        boxes = torch.tensor([float(len(target["boxes"])) for target in targets])
        return {
            "loss_box_reg": (self.weight[0] * brightness - boxes).square().mean(),
            "classification": (self.weight[1] + brightness).square().mean(),
        }


class Loader(list):
    """A list of batches with the `batch_sampler` of an epoch of `steps_per_epoch` steps."""

    def __init__(self, batches: list, steps_per_epoch: int):
        super().__init__(batches)
        self.batch_sampler = range(steps_per_epoch)


def batches(count: int, size: int = 2) -> list:
    """Return batches of random images; image n has `image_id` n and n % 3 boxes."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for n in range(count * size):
        image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8, generator=generator)
        boxes = torch.ones(n % 3, 4)
        labels = torch.ones(n % 3, dtype=torch.int64)
        samples.append((image, {"boxes": boxes, "labels": labels, "image_id": n}))
    return [coco_utils.collate(samples[i : i + size]) for i in range(0, len(samples), size)]


def tiny_state(**kwargs) -> engine.TrainState:
    model = TinyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
    return engine.TrainState(model, optimizer, lambda step: 0.01 * (step + 1), **kwargs)


def ignore(*_) -> None:
    pass


def train(
    state: engine.TrainState,
    data: list,
    last_step: int | None = None,
    log_step: Callable = ignore,
    on_step_end: Callable = ignore,
    **changes,
) -> list[float]:
    """Train for one epoch on the batches in `data`; return the weights."""
    args = {"seed": 3, "accumulate_steps": 1, "clip_grad_norm": None, "print_freq": 1, **changes}
    engine.train_one_epoch(
        state,
        Loader(data, state.step + len(data)),
        argparse.Namespace(**args),
        last_step=last_step or len(data),
        log_step=log_step,
        on_step_end=on_step_end,
    )
    return state.model.weight.tolist()


def plain_loop(data: list, clip: float = math.inf) -> list[list[float]]:
    """Return the weights after each step of a minimal training loop."""
    model = TinyDetector().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
    weights = []
    for step, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        model.zero_grad()
        sum(model(*batch.to(CPU)).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        weights.append(model.weight.tolist())
    return weights


def test_training_equals_plain_loop():
    """Gradients are reset and the learning rate is set at each step."""
    data = batches(4)
    rates = []
    state = tiny_state()
    weights = train(state, data, log_step=lambda s, p, losses, skipped, rate: rates.append(rate))
    assert weights == pytest.approx(plain_loop(data)[-1])
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert state.step == 4
    assert state.model.training


def test_gradients_are_clipped():
    data = batches(4)
    clipped = plain_loop(data, clip=0.5)[-1]
    assert clipped != pytest.approx(plain_loop(data)[-1], rel=1e-3)
    assert train(tiny_state(), data, clip_grad_norm=0.5) == pytest.approx(clipped)
    assert train(tiny_state(), data, clip_grad_norm=1e9) == pytest.approx(plain_loop(data)[-1])


def test_accumulated_gradients_equal_larger_batch():
    expected = plain_loop(batches(3, size=4))[-1]
    assert train(tiny_state(), batches(3, size=4), accumulate_steps=2) == pytest.approx(expected)
    assert train(tiny_state(), batches(3, size=4), accumulate_steps=4) == pytest.approx(expected)


def test_step_order():
    state, order = tiny_state(), []
    state.model.register_forward_hook(lambda *_: order.append("forward"))
    state.optimizer.register_step_post_hook(lambda *_: order.append("update"))
    train(
        state,
        batches(4, size=2),
        accumulate_steps=2,
        print_freq=2,
        last_step=3,
        log_step=lambda state, *_: order.append(f"log {state.step}"),
        on_step_end=lambda step, check: order.append(f"end {step}"),
    )
    step = ["forward", "forward", "update"]
    assert order == [*step, "end 1", *step, "log 2", "end 2", *step, "log 3"]
    assert state.step == 3


def test_losses_are_averaged_between_logs():
    each, logged, positions = [], [], []

    def log(state, progress, averages, skipped_steps, rate):
        logged.append(averages)
        positions.append((progress.done, progress.total, skipped_steps))

    train(tiny_state(), batches(5), log_step=lambda s, p, losses, *_: each.append(losses))
    train(tiny_state(), batches(5), log_step=log, print_freq=2)
    assert positions == [(2, 5, 0), (4, 5, 0), (5, 5, 0)]
    for averages, steps in zip(logged, (each[:2], each[2:4], each[4:]), strict=True):
        for name in ("loss", "loss_box_reg", "loss_classification"):
            assert averages[name] == pytest.approx(sum(step[name] for step in steps) / len(steps))
        total = averages["loss_box_reg"] + averages["loss_classification"]
        assert averages["loss"] == pytest.approx(total)


def test_ema_averages_weights():
    data, average = batches(3), None
    for weights in map(np.array, plain_loop(data)):
        average = weights if average is None else 0.75 * average + 0.25 * weights
    state = tiny_state()
    state.ema = MovingAverage(state.model, decay=0.75)
    raw = train(state, data)
    assert state.eval_model.weight.tolist() == pytest.approx(average.tolist())
    assert raw == pytest.approx(plain_loop(data)[-1])
    assert state.state_dict()["model"]["weight"].tolist() == pytest.approx(average.tolist())
    assert state.state_dict()["raw_model"]["weight"].tolist() == raw


def test_resume_within_epoch_is_bit_exact():
    data = batches(6)
    reference, first, second = tiny_state(), tiny_state(), tiny_state()
    train(reference, data)

    def stop(step, check):
        check()
        if step == 2:
            raise StopRequested

    with pytest.raises(StopRequested):
        train(first, data, on_step_end=stop)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.step == 2
    train(second, data[2:], last_step=6)
    assert torch.equal(second.model.weight, reference.model.weight)
    assert second.model.seeds == reference.model.seeds[4:]


def test_image_seeds_depend_on_step_and_position():
    state = tiny_state()
    train(state, batches(2, size=4), accumulate_steps=2)
    expected = [utils.draw_seed(3, step, image) for step in range(2) for image in range(4)]
    assert state.model.seeds == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_ends_training_before_update(bad):
    state = tiny_state()

    def spoil(model, args, losses):
        if state.step == 2:
            losses["classification"] = losses["classification"] * bad
        return losses

    state.model.register_forward_hook(spoil)
    with pytest.raises(RunError, match=r"the loss of step 3 .*images \[4, 5\] on rank 0.*--lr"):
        train(state, batches(4), print_freq=100)
    assert state.model.weight.tolist() == pytest.approx(plain_loop(batches(2))[-1])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("you tried to allocate memory")],
)
def test_out_of_memory_is_explained(error):
    state = tiny_state()

    def fail(*_):
        if state.step == 2:
            raise error

    state.model.register_forward_pre_hook(fail)
    expected = r"epoch 0, step 3 of 4, with 2 images, .*6 x 4 with 1 boxes, 6 x 4 with 2 boxes"
    with pytest.raises(RunError, match=expected + ": lower --batch-size"):
        train(state, batches(4))


def test_other_model_errors_are_unchanged():
    state = tiny_state()
    state.model.register_forward_pre_hook(lambda *_: [].pop())
    with pytest.raises(IndexError, match="pop from empty list"):
        train(state, batches(2))


# ------------------------------------------------------------------------------ training state


def test_best_ap_and_early_stopping():
    state = tiny_state()
    assert state.update_best(None)  # without ground truth the newest is the best
    assert state.update_best(None)
    assert not state.should_stop_early(1)
    assert [state.update_best(AP) for AP in (0.1, 0.3, 0.3, 0.2)] == [True, True, False, False]
    assert state.best_AP == 0.3
    assert not state.should_stop_early(None)
    assert not state.should_stop_early(3)
    assert state.should_stop_early(2)
    assert state.update_best(0.4)
    assert not state.should_stop_early(1)


def test_training_state_is_restored():
    state, other = tiny_state(), tiny_state()
    train(state, batches(3))
    state.epoch, state.best_AP, state.evaluations_since_best = 1, 0.5, 2
    other.load_state_dict(state.state_dict())
    assert (other.epoch, other.step, other.best_AP) == (1, 3, 0.5)
    assert other.evaluations_since_best == 2
    momentum = [s.optimizer.state_dict()["state"][0]["momentum_buffer"] for s in (state, other)]
    assert torch.equal(*momentum)


def test_float16_scaler_is_restored():
    assert not tiny_state(amp_dtype=torch.bfloat16).scaler.is_enabled()
    state, other = (tiny_state(amp_dtype=torch.float16) for _ in range(2))
    train(state, batches(1))
    state.scaler.update(128.0)
    other.load_state_dict(state.state_dict())
    assert other.scaler.get_scale() == 128


# --------------------------------------------------------------------------------- evaluation


class ValidationLoader(Loader):
    """The validation images of `tiny`; `truth` is their ground truth as detections."""

    def __init__(self, root):
        index = coco_utils.CocoIndex(split_of(root, "val"))
        self.dataset = coco_utils.CocoDetection(index, index.categories)
        samples = [self.dataset[i] for i in range(len(self.dataset))]
        super().__init__([coco_utils.collate(samples[:2]), coco_utils.collate(samples[2:])], 2)
        self.truth = [
            {
                "boxes": torch.as_tensor(target["boxes"]),
                "labels": torch.as_tensor(target["labels"]),
                "scores": torch.full((len(target["boxes"]),), 0.9),
            }
            for _, target in samples
        ]


def evaluate(model: nn.Module, loader: ValidationLoader, output_dir, **kwargs) -> float | None:
    flags = {"evaluator": "hotcoco", "val_loss": False, "max_detections": None, **kwargs}
    flags["output_dir"] = output_dir
    metrics = utils.MetricsFile(output_dir)
    return engine.evaluate(
        model,
        loader,
        loader.dataset.index.categories,
        argparse.Namespace(**flags),
        amp_dtype=None,
        on_result=lambda index, scores, detections: metrics.write(
            "eval", epoch=1, step=8, **scores
        ),
    )["AP"]


def eval_line(output_dir) -> dict:
    (line,) = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return line


def test_evaluation_of_ground_truth(tiny, tmp_path, capsys):
    loader, model = ValidationLoader(tiny), TinyDetector()
    model.outputs = list(loader.truth)
    assert evaluate(model, loader, tmp_path) == pytest.approx(1)
    assert not model.training
    line = eval_line(tmp_path)
    assert (line["kind"], line["epoch"], line["step"]) == ("eval", 1, 8)
    assert line["AP"] == pytest.approx(1)
    assert {i: row["name"] for i, row in line["per_category"].items()} == {"2": "cat", "5": "dog"}
    assert [row["AP"] for row in line["per_category"].values()] == pytest.approx([1, 1])
    assert "val_loss" not in line
    rows = json.loads((tmp_path / "detections.json").read_text())
    first = {"image_id": 100, "category_id": 2, "bbox": [4, 4, 30, 20], "score": 0.9}
    assert rows[0]["bbox"] == pytest.approx(first.pop("bbox"))
    assert {key: pytest.approx(rows[0][key]) for key in first} == first
    assert [row["image_id"] for row in rows] == [100, 101, 101, 102]
    output = capsys.readouterr().out
    assert "evaluation  3 images" in output
    assert "4 detections, scored by hotcoco" in output
    assert "  AP    1.000  AP50  1.000  AP75  1.000" in output


def test_evaluation_of_wrong_and_missing_detections(tiny, tmp_path):
    loader, model = ValidationLoader(tiny), TinyDetector()
    no_detections = {"boxes": torch.empty(0, 4), "labels": torch.empty(0), "scores": torch.empty(0)}
    model.outputs = [loader.truth[0], no_detections, no_detections]
    AP = evaluate(model, loader, tmp_path)
    assert AP == eval_line(tmp_path)["AP"] < 0.5
    (tmp_path / "none").mkdir()
    model.outputs = [no_detections] * 3
    assert evaluate(model, loader, tmp_path / "none") == 0
    assert json.loads((tmp_path / "none/detections.json").read_text()) == []


def test_evaluation_without_ground_truth_has_no_ap(tiny, tmp_path):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    loader, model = ValidationLoader(tiny), TinyDetector()
    model.outputs = list(loader.truth)
    assert evaluate(model, loader, tmp_path) is None
    assert eval_line(tmp_path)["AP"] is None


def test_out_of_memory_in_evaluation_is_explained(tiny, tmp_path):
    model = TinyDetector()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail)
    expected = "evaluation, step 1 of 2, with 2 images.*lower --eval-batch-size"
    with pytest.raises(RunError, match=expected):
        evaluate(model, ValidationLoader(tiny), tmp_path)


def test_validation_loss_weights_images_equally(tiny, tmp_path, capsys):
    loader, model = ValidationLoader(tiny), TinyDetector()  # batches of two and of one image
    before = {key: value.clone() for key, value in model.state_dict().items()}
    averages = engine.validation_loss(model, loader, amp_dtype=None)
    terms = []
    model.train()
    for image, target in (loader.dataset[i] for i in range(3)):
        losses = model([image / 255], [{**target, "seed": 0}])
        terms.append([loss.item() for loss in losses.values()])
    model.load_state_dict(before)
    expected = np.mean(terms, axis=0)
    assert list(averages) == ["loss", "loss_box_reg", "loss_classification"]
    assert list(averages.values()) == pytest.approx([expected.sum(), *expected])
    engine.validation_loss(model, loader, amp_dtype=None)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])  # including the statistics of norms
    assert model.weight.grad is None
    model.outputs = list(loader.truth)
    evaluate(model, loader, tmp_path, val_loss=True)
    assert eval_line(tmp_path)["val_loss"] == pytest.approx(averages)
    assert "validation loss" in capsys.readouterr().out


def test_validation_seeds_depend_on_image_only(tiny):
    loader, model = ValidationLoader(tiny), TinyDetector()
    engine.validation_loss(model, loader, amp_dtype=None)
    seeds = model.seeds
    assert len(set(seeds)) == 3
    model.seeds = []
    loader[:] = [coco_utils.collate([loader.dataset[i] for i in (2, 0, 1)])]
    engine.validation_loss(model, loader, amp_dtype=None)
    assert model.seeds == [seeds[2], seeds[0], seeds[1]]
