"""Faster R-CNN with tensors of fixed shape compared with torchvision's parts, on a CPU."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import run_forked, stable_batched_nms
from torch import nn
from torchvision.ops import MultiScaleRoIAlign, boxes

import models
import utils
from internals.fast import FastFasterRCNN, roi_heads
from internals.fast.roi_align import FastRoIAlign
from internals.mixed_precision import autocast

CPU = torch.device("cpu")
SIZE = 96
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
CASES = ("several boxes", "an empty image", "only empty images", "one box", "500 boxes")


def build(name: str) -> nn.Module:
    """Build a detector with random weights, whose frozen norms have the statistics of an image."""
    sizes = {"min_sizes": (SIZE,), "max_size": 2 * SIZE}
    torch.manual_seed(0)
    trainable = models.build_model(name, 7, pretrained=None, stock=True, **sizes).train()
    for module in trainable.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        trainable.backbone(torch.randn(2, 3, SIZE, SIZE))
        # Fewer equal scores, and boxes away from the anchors.
        trainable.get_parameter("rpn.head.cls_logits.weight").mul_(3)
        trainable.get_parameter("rpn.head.bbox_pred.weight").mul_(3)
        trainable.roi_heads.box_predictor.cls_score.weight.mul_(3)
    model = models.build_model(name, 7, pretrained="detector", **sizes)
    model.load_state_dict(trainable.state_dict(), strict=False)  # there are no batch counts
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # of heads, which are never frozen
            module.momentum, module.eps = 0.1, 1.0
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 32  # for speed
    return model


def make_batch(case: str) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(5)
    counts = {
        "an empty image": (0, 5),
        "only empty images": (0, 0),
        "one box": (1, 1),
        "500 boxes": (500, 2),
    }.get(case, (4, 9))
    images, targets = [], []
    for n, (count, height) in enumerate(zip(counts, (SIZE, SIZE + 20), strict=True)):
        images.append(torch.rand(3, height, SIZE + 30, generator=generator))
        corners = torch.rand(count, 2, generator=generator) * SIZE / 2
        sides = 4 + torch.rand(count, 2, generator=generator) * (SIZE / 2 - 4)
        labels = torch.randint(1, 7, (count,), generator=generator)
        target = {"boxes": torch.cat([corners, corners + sides], dim=1), "labels": labels}
        targets.append({**target, "seed": 2**64 - 1 - n})
    return images, targets


@pytest.fixture
def stock_selection(monkeypatch):
    """Let torchvision's parts break ties as ours, and pool with torchvision's kernel."""
    monkeypatch.setattr(boxes, "batched_nms", stable_batched_nms)
    monkeypatch.setattr(FastRoIAlign, "forward", MultiScaleRoIAlign.forward)


def with_stock_parts(model: nn.Module) -> nn.Module:
    """Return a copy that runs torchvision's parts, with the samples of ours."""
    model = copy.deepcopy(model)
    model.fixed_shapes = False
    return model


def losses_and_gradients(model: nn.Module, images, targets, dtype) -> tuple[dict, dict]:
    """Return losses and gradients under autocast to a dtype, or in float64.

    In float32 a rounded number moves a box by 0.001 pixels, which may change the sign of a unit.
    """
    model.train()
    if dtype is torch.float64:
        model, images = model.double(), [image.double() for image in images]
    with autocast(CPU, dtype if dtype is torch.bfloat16 else None):
        losses = model(images, targets)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def assert_same_gradients(ours: dict, expected: dict, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (ours[name] - gradient).norm() / (gradient.norm() + 1e-6)
        assert difference < tolerance, name


@pytest.mark.usefixtures("stock_selection")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_and_gradients_equal_torchvisions_parts(case, dtype):
    model = build(SMALL)
    batch = make_batch(case)
    expected, gradients = losses_and_gradients(with_stock_parts(model), *batch, dtype)
    model.fixed_shapes = True
    ours, our_gradients = losses_and_gradients(model, *batch, dtype)
    exact = dtype is torch.float64
    assert ours == pytest.approx(expected, rel=1e-5 if exact else 1e-3)
    assert_same_gradients(our_gradients, gradients, 1e-5 if exact else 0.1)


@pytest.mark.usefixtures("stock_selection")
def test_losses_without_valid_proposals():
    """All samples of the box head are then ground-truth boxes; without those its losses are 0."""
    model = build(SMALL)
    model.rpn.score_thresh = 2.0
    batch = make_batch("several boxes")
    expected, gradients = losses_and_gradients(with_stock_parts(model), *batch, torch.float64)
    model.fixed_shapes = True
    ours, our_gradients = losses_and_gradients(copy.deepcopy(model), *batch, torch.float64)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(our_gradients, gradients, 1e-5)
    losses, gradients = losses_and_gradients(model, *make_batch("only empty images"), torch.float64)
    assert losses["loss_classifier"] == losses["loss_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.usefixtures("stock_selection")
@pytest.mark.parametrize("name", [SMALL, "fasterrcnn_resnet50_fpn"])
def test_detections_equal_torchvisions_parts(name):
    model = build(name).eval()
    images, _ = make_batch("several boxes")
    assert_same_detections(*detections_of_both(model, images))


def detections_of_both(model: nn.Module, images: list) -> tuple[list, list]:
    """Return the detections with fixed shapes and those of torchvision's parts."""
    stock = with_stock_parts(model)
    model.fixed_shapes = True
    with torch.inference_mode():
        return list(model(images)), stock(images)


def assert_same_detections(found: list[dict], expected: list[dict]) -> None:
    for ours, stock in zip(found, expected, strict=True):
        assert ours.keys() == stock.keys()
        assert len(stock["scores"]) > 5
        torch.testing.assert_close(ours["scores"], stock["scores"], rtol=1e-5, atol=1e-6)
        assert ours["labels"].tolist() == stock["labels"].tolist()
        torch.testing.assert_close(ours["boxes"], stock["boxes"], rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("stock_selection")
def test_more_candidates_are_tried_if_too_few_detections_are_left(monkeypatch):
    model = build(SMALL).eval()
    model.roi_heads.score_thresh = 0.0
    images, _ = make_batch("several boxes")
    monkeypatch.setattr(roi_heads.detect, "__defaults__", (100,))
    assert_same_detections(*detections_of_both(model, images))
    model.roi_heads.detections_per_img, model.roi_heads.nms_thresh = 150, 1.0  # none is suppressed
    found, expected = detections_of_both(model, images)
    assert [len(each["scores"]) for each in found] == [150, 150]
    assert_same_detections(found, expected)


def test_no_detections():
    model = build(SMALL).eval()
    model.fixed_shapes, model.roi_heads.score_thresh = True, 2.0
    images, _ = make_batch("several boxes")
    with torch.inference_mode():
        outputs = model(images)
    assert [len(output["boxes"]) for output in outputs] == [0, 0]


# ------------------------------------------------------------------- division of a step


def sampled(model: FastFasterRCNN, images, targets, monkeypatch) -> list[tuple]:
    """Return the boxes and labels of the samples of each image."""
    found, select = [], roi_heads.select_samples

    def record(*args):
        samples = select(*args)
        found.extend(zip(samples.boxes, samples.labels, samples.is_sample, strict=True))
        return samples

    monkeypatch.setattr(roi_heads, "select_samples", record)
    model.train()(images, targets)
    monkeypatch.undo()
    return [(boxes[chosen], labels[chosen]) for boxes, labels, chosen in found]


def test_samples_depend_on_the_image_only(monkeypatch):
    model = build(SMALL)
    model.fixed_shapes = True
    images, targets = make_batch("several boxes")
    images = [image[:, :SIZE] for image in images]
    together = sampled(model, images, targets, monkeypatch)
    for n, (expected, labels) in enumerate(together):
        ((alone, labels_alone),) = sampled(model, [images[n]], [targets[n]], monkeypatch)
        torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-2)
        assert torch.equal(labels_alone, labels)
    (moved, _), _ = sampled(model, images, [{**targets[0], "seed": 1}, targets[1]], monkeypatch)
    assert not torch.equal(moved, together[0][0])


def save_gradients(kind: str, file: Path) -> None:
    """Save the gradients of a step of two images, of which this process has one or both."""
    torch.set_num_threads(1)
    rank = utils.rank()
    utils.init_distributed(CPU)
    model = build(SMALL).train().double()
    model.fixed_shapes = True
    images, targets = make_batch("several boxes")
    images = [image[:, :96].double() for image in images]
    for part in (model.rpn, model.roi_heads):  # each image has as many samples
        part.fg_bg_sampler.batch_size_per_image = 16
    ddp = utils.wrap_ddp(model, sync_buffers=False) or model
    micro_batches = {"one": [[0, 1]], "accumulated": [[0], [1]]}.get(kind, [[rank]])
    for rows in micro_batches:
        losses = ddp([images[row] for row in rows], [targets[row] for row in rows])
        (sum(losses.values()) / len(micro_batches)).backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, file)
    utils.cleanup_distributed()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_gradients_do_not_depend_on_the_division_of_a_step(tmp_path):
    """Two images at once, one after the other, and in two processes."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}

    def run(kind: str, rank: int, **environment) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{kind}{rank}.pth"
        done = run_forked(save_gradients, kind, file, RANK=str(rank), **environment)
        assert done.returncode == 0, done.stderr
        return torch.load(file)

    gradients = [run("one", 0), run("accumulated", 0)]
    with ThreadPoolExecutor(2) as pool:
        gradients += pool.map(lambda rank: run("apart", rank, **shared), range(2))
    for others in gradients[1:]:
        assert_same_gradients(others, gradients[0], 1e-4)
