"""What only a GPU can show: kernels, the step without waiting, CUDA graphs, resuming, memory.

    python -m pytest -m cuda

Skipped without a GPU. TEST_DEVICE=cpu rehearses the tests that a CPU can run.
"""

import argparse
import copy
import gc
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from helpers import (
    SMALL_FLAGS,
    main_in_process,
    read_losses,
    read_metrics,
    stable_batched_nms,
)
from torch import nn
from torchvision.models.detection._utils import Matcher

import engine
import models
import utils
from coco_utils import Categories
from detector import Detector, LoadedModel
from internals.batches import Batch
from internals.detections import Settings
from internals.errors import RunError
from internals.fast import plain_kernels, use_cuda_graphs
from internals.fast.kernels import kernels_for
from internals.mixed_precision import autocast, initialize_momentum

# Read once per process, at the first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not IS_CUDA, reason="cannot be rehearsed")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="no GPU"),
]
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(autouse=True)
def _comparable(monkeypatch):
    """Compare in float32, not TF32, and with torchvision's NMS that breaks ties as ours."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", stable_batched_nms)
    yield
    gc.collect()
    if IS_CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def build(name: str = "fasterrcnn_resnet50_fpn", size: int = 128, **options) -> nn.Module:
    """Build a detector with frozen norms that keep the activations of random weights bounded."""
    torch.manual_seed(0)
    sizes = {"min_sizes": (size,), "max_size": 2 * size}
    model = models.build_model(name, 7, pretrained="detector", **sizes, **options)
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.fill_(4.0)
    model.fixed_shapes = True  # on a CPU, too
    return model.to(DEVICE)


def make_batch(images: int = 2, height: int = 128, width: int = 160, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels, targets = [], []
    for n in range(images):
        pixels.append(
            torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        )
        corners = torch.rand(3 * n, 2, generator=generator) * height / 2
        sides = 8 + torch.rand(3 * n, 2, generator=generator) * height / 3
        labels = torch.randint(1, 7, (3 * n,), generator=generator)
        boxes = torch.cat([corners, corners + sides], dim=1)
        targets.append({"boxes": boxes, "labels": labels, "image_id": n})
    return Batch(pixels, targets)


def random_boxes(rows: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(rows, count, 2, generator=generator) * 1000
    sides = 4 + torch.rand(rows, count, 2, generator=generator) * 300
    return torch.cat([corners, corners + sides], dim=2)


# --------------------------------------------------------------------------------- kernels


@needs_gpu
def test_kernels_are_used():
    assert kernels_for(DEVICE) is not plain_kernels


@pytest.mark.parametrize("labels", [False, True])
def test_nms_at_full_size_equals_torchvision(labels):
    """The lists of the RPN for 16 images, and detections with labels."""
    boxes = random_boxes(16, 2048) if labels else random_boxes(80, 2000)
    valid = torch.rand(boxes.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.95
    label = (boxes[..., 0] % 7).long() if labels else None
    limit = 100 if labels else None
    on_device = [None if x is None else x.to(DEVICE) for x in (boxes, valid)]
    found = kernels_for(DEVICE).nms(
        *on_device, 0.7, None if label is None else label.to(DEVICE), limit
    )
    expected = plain_kernels.nms(boxes, valid, 0.7, label, limit)
    # Each processor may round an IoU that equals the threshold otherwise.
    assert (found.cpu() != expected).sum() <= 4


@pytest.mark.parametrize("matcher", [Matcher(0.7, 0.3, True), Matcher(0.5, 0.5)])
def test_matching_at_full_size_equals_pytorch(matcher):
    """The anchors of an image of 800 x 1333 pixels, and up to 96 boxes."""
    anchors = random_boxes(1, 268_569).to(DEVICE)
    gt_boxes, counts = random_boxes(4, 96).to(DEVICE), torch.tensor([96, 0, 1, 40]).to(DEVICE)
    matches, kinds = kernels_for(DEVICE).match(gt_boxes, counts, anchors, matcher)
    expected_matches, expected_kinds = plain_kernels.match(gt_boxes, counts, anchors, matcher)
    assert torch.equal(kinds, expected_kinds)
    assert torch.equal(matches[counts > 0], expected_matches[counts > 0])


# ------------------------------------------------------------------------------------ step


def losses_and_gradients(model: nn.Module, batch: Batch, device, dtype=None) -> tuple[dict, dict]:
    model.train().zero_grad()
    images, targets = batch.to(device, range(len(batch)))
    with autocast(device, dtype):
        losses = model(images, targets)
    sum(losses.values()).backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def assert_same(found: tuple[dict, dict], expected: tuple[dict, dict], tolerance: float) -> None:
    """Compare losses, and gradients by their norms."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        difference = (found[1][name] - gradient).norm() / (gradient.norm() + 1e-6)
        assert difference < 30 * tolerance, name


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", SMALL])
def test_losses_and_gradients_equal_the_cpus(name):
    """The CPU runs torchvision's parts; both sample the same rows."""
    model, batch = build(name), make_batch(3)
    cpu = copy.deepcopy(model).cpu()
    cpu.fixed_shapes = False
    expected = losses_and_gradients(cpu, batch, torch.device("cpu"))
    assert_same(losses_and_gradients(model, batch, DEVICE), expected, 2e-3)


@pytest.mark.parametrize(
    "dtype", [None, pytest.param(torch.float16, marks=needs_gpu), torch.bfloat16]
)
def test_losses_and_gradients_equal_torchvisions_parts(dtype):
    model, batch = build(), make_batch(3)
    stock = copy.deepcopy(model)
    stock.fixed_shapes = False
    expected = losses_and_gradients(stock, batch, DEVICE, dtype)
    tolerance = {None: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same(losses_and_gradients(model, batch, DEVICE, dtype), expected, tolerance)


def test_detections_equal_torchvisions_parts():
    model = build().eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(300)
    images, _ = make_batch(3).to(DEVICE)
    with torch.inference_mode():
        found = list(model(images))
        model.fixed_shapes = False
        expected = model(images)
    assert sum(len(output["scores"]) for output in expected) > 100
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["scores"], stock["scores"].cpu(), rtol=1e-3, atol=1e-4)


@needs_gpu
def test_detector_finds_what_the_cpu_finds():
    """Batches on a GPU, one behind, against single images on the CPU; in tiles, too."""
    ids = tuple(range(1, 7))
    categories = Categories(ids=ids, names=tuple(map(str, ids)), labels=ids)
    generator = np.random.default_rng(0)
    shapes = [(128, 160, 3), (160, 128, 3), (128, 160, 3), (300, 400, 3), (160, 128, 3)]
    images = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    found = {}
    for device, batch_size in (("cpu", 1), ("cuda", 3)):
        model = build().eval().cpu()
        model.fixed_shapes = None
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight.mul_(300)
        settings = Settings(device=device, batch_size=batch_size, tile=200)
        detector = Detector(LoadedModel(model, categories), settings, dict.fromkeys(ids, 0.05))
        found[device] = detector(images)
    for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert len(cpu) > 30
        np.testing.assert_allclose(gpu.scores[:30], cpu.scores[:30], rtol=1e-3, atol=1e-3)


class Loader(list):
    """Batches with the length of an epoch."""

    def __init__(self, batches: list[Batch], epoch: int):
        super().__init__(batches)
        self.batch_sampler = range(epoch)


def make_state(model: nn.Module, dtype=torch.float16, lr: float = 1e-4) -> engine.TrainState:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
    initialize_momentum(optimizer)
    return engine.TrainState(model, optimizer, lambda step: lr, dtype)


def train(state: engine.TrainState, batches: list[Batch], **changes) -> list[tuple]:
    """Train on the batches; return the losses and the number of skipped steps of each log line."""
    args = {"seed": 0, "accumulate_steps": 1, "clip_grad_norm": None, "print_freq": 1, **changes}
    logged = []
    engine.train_one_epoch(
        state,
        Loader(batches, state.step + len(batches)),
        argparse.Namespace(**args),
        last_step=state.step + len(batches),
        log_step=lambda state, progress, losses, skipped, rate: logged.append((losses, skipped)),
        on_step_end=lambda step, check: None,
    )
    return logged


def test_infinite_float16_gradients_are_skipped():
    state = make_state(build(SMALL, 64), lr=1e-8)
    before = {key: value.clone() for key, value in state.model.state_dict().items()}
    state.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**60, growth_interval=10**6)
    ((_, skipped),) = train(state, [make_batch()] * 3, print_freq=3)
    assert skipped == 3
    for key, value in state.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    state.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**7)
    assert all(skipped == 0 for _, skipped in train(state, [make_batch()] * 2))
    assert any(not torch.equal(v, before[k]) for k, v in state.model.state_dict().items())
    state.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**120, backoff_factor=0.99)
    with pytest.raises(RunError, match="10 steps in a row"):
        train(state, [make_batch()] * 10, print_freq=10)


@needs_gpu
@pytest.mark.parametrize("affine", [False, True])
def test_step_does_not_wait(affine):
    state = make_state(build(train_norm_affine=affine))
    batches = [make_batch(seed=seed).pin_memory() for seed in range(4)]
    train(state, batches, print_freq=1000)
    seen = []

    def check_step(step, check) -> None:
        seen.append(step)
        torch.cuda.set_sync_debug_mode("error" if len(seen) < 5 else "default")

    try:  # the first step makes the constants of this shape
        args = argparse.Namespace(seed=0, accumulate_steps=1, clip_grad_norm=1.0, print_freq=1000)
        engine.train_one_epoch(
            state,
            Loader(batches + batches, state.step + 8),
            args,
            last_step=state.step + 8,
            log_step=lambda *_: None,
            on_step_end=check_step,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 7


# ----------------------------------------------------------------------------- CUDA graphs


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "affine"), [(None, False), (torch.float16, False), (torch.float16, True)]
)
def test_graphs_equal_eager_steps(dtype, affine):
    """Two shapes alternate; the third batch has more boxes than the graphs were made for."""
    shapes = [(128, 160), (160, 128)] * 4
    batches = [make_batch(2, *shape, seed=n) for n, shape in enumerate(shapes)]
    results, weights = [], []
    for with_graphs in (False, True):
        model = build(train_norm_affine=affine)
        if with_graphs:
            use_cuda_graphs(model)
        state = make_state(model, dtype)
        results.append([losses for losses, _ in train(state, batches)])
        weights.append({key: value.cpu() for key, value in model.state_dict().items()})
    assert model.graphs.enabled
    assert len(model.graphs.graphs) == 2
    for eager, graph in zip(*results, strict=True):
        assert graph == pytest.approx(eager, rel=2e-2, abs=1e-3)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-4)
    buffer = next(buffer for buffer in model.buffers() if buffer.dim())
    buffer.add_(0.5)  # a constant of the graphs
    with_new_constant = losses_and_gradients(model, batches[0], DEVICE, dtype)
    assert not model.graphs.graphs
    model.graphs = None
    expected = losses_and_gradients(model, batches[0], DEVICE, dtype)
    assert_same(with_new_constant, expected, 1e-2)


# ------------------------------------------------------------------------- whole trainings


def flags(tiny, folder, *more) -> list:
    return ["--device", DEVICE.type, "--data-path", tiny, "--output-dir", folder, "-b", "2", *more]


@pytest.mark.parametrize("graphs", [(), pytest.param(("--cuda-graphs",), marks=needs_gpu)])
def test_resumed_training_continues(tiny, tmp_path, graphs):
    """With frozen norms, as graphs need them."""
    backbone = torchvision.models.mobilenet_v3_large(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    common = [*SMALL_FLAGS, *flags(tiny, tmp_path / "whole", "--amp", "--no-report")]
    common += ["--weights-backbone", tmp_path / "backbone.pth", "--epochs", "2"]
    main_in_process(*common, *graphs)
    common[common.index(tmp_path / "whole")] = tmp_path / "parts"
    main_in_process(*common, *graphs, "--max-steps", "6")
    main_in_process(*common, *graphs, "--resume", "auto")
    whole, parts = (read_losses(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == 8
    assert parts == pytest.approx(whole, rel=2e-2)
    scores = [read_metrics(tmp_path / name, "eval")[-1]["AP"] for name in ("whole", "parts")]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


@needs_gpu
def test_out_of_memory_is_explained():
    state = make_state(build("fasterrcnn_resnet50_fpn", 800))
    batch = make_batch(8, 800, 1333)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        with pytest.raises(RunError, match=r"out of memory in epoch 0, step 1 .* 8 images.*lower"):
            train(state, [batch])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
def test_batch_size_is_found(tiny, tmp_path):
    output = main_in_process(*SMALL_FLAGS, *flags(tiny, tmp_path, "--amp", "--find-batch-size"))
    assert "--batch-size 8 is the largest that fits, measured" in output


@needs_gpu
def test_evaluation_between_replays_uses_the_current_weights():
    model, batches = build(), [make_batch(2, seed=n) for n in range(4)]
    use_cuda_graphs(model)
    state = make_state(model, lr=1e-2)
    train(state, batches)
    assert len(model.graphs.graphs) == 1
    for _ in range(2):
        images = torch.stack(batches[0].to(DEVICE)[0])
        fresh = build()
        fresh.load_state_dict(model.state_dict())
        with torch.inference_mode():
            expected, found = (m.eval().backbone(images)["0"] for m in (fresh, model))
        torch.testing.assert_close(found, expected)
        train(state, batches)  # replays only


@needs_gpu
def test_one_process_with_nccl(monkeypatch):
    """DDP with and without graphs, and the agreements between processes."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        assert utils.start_max(3)() == 3
        assert utils.gather_numbers(torch.tensor([1.0, 2.0], device=DEVICE)) == [[1.0, 2.0]]
        model, batches = build(), [make_batch(2, seed=n) for n in range(4)]
        alone = [losses for losses, _ in train(make_state(copy.deepcopy(model)), batches)]
        use_cuda_graphs(model)
        state = make_state(model)
        with monkeypatch.context() as patch:
            patch.setattr(utils, "world_size", lambda: 2)
            state.ddp_model = utils.wrap_ddp(model, sync_buffers=False)
        together = [losses for losses, _ in train(state, batches)]
        assert len(model.graphs.graphs) == 1
        utils.broadcast_buffers(model)  # as before an evaluation
        train(state, batches[:1])
        assert len(model.graphs.graphs) == 1
        for a, b in zip(together, alone, strict=True):
            assert a == pytest.approx(b, rel=2e-2, abs=1e-3)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------ last, as they may leave the process damaged


@needs_gpu
def test_deterministic_algorithms_repeat_a_step():
    """And have the losses of torchvision's parts in this mode, which it compiles for a minute."""
    model, batch = build(), make_batch(2)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (losses_and_gradients(model, batch, DEVICE) for _ in range(2))
        model.fixed_shapes = False
        expected = losses_and_gradients(model, batch, DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == second[0]
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())
    assert_same(first, expected, 1e-3)


@needs_gpu
def test_failed_capture_is_reported_in_one_line(capsys):
    model = build()
    use_cuda_graphs(model)

    def wait(module, args) -> None:
        args[0].sum().item()

    model.roi_heads.box_head.register_forward_pre_hook(wait)
    losses = train(make_state(model), [make_batch()] * 4)
    assert len(losses) == 4
    assert not model.graphs.enabled
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("--cuda-graphs")]
    assert len(lines) == 1
