from itertools import chain

import pytest
import torch

import models
from internals import mixed_precision
from internals.mixed_precision import initialize_momentum, resolve_precision


def test_autocast_dtype_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision(cpu, False, None) == (None, "float32")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert resolve_precision(cuda, False, None) == (None, "float32, TF32 in convolutions")
    assert resolve_precision(cuda, True, None)[0] is torch.float16
    assert resolve_precision(cuda, True, "bfloat16")[0] is torch.bfloat16
    for instruction in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, instruction, lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert resolve_precision(cpu, True, None)[0] is torch.bfloat16
    for instruction in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, instruction, lambda: False)
    dtype, reason = resolve_precision(cpu, True, None)
    assert dtype is None
    assert "no bfloat16 instructions" in reason
    assert resolve_precision(cpu, True, "bfloat16")[0] is torch.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "retinanet_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_boxes_stay_float32_under_bfloat16(name):
    model = models.build_model(name, 4, pretrained=None, min_sizes=(64,), max_size=96).eval()
    images = [torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(0))]
    outputs = {}
    generator, head = (
        next(module for module in model.modules() if isinstance(module, kinds))
        for kinds in (mixed_precision.ANCHOR_GENERATORS, mixed_precision.HEADS)
    )
    generator.register_forward_hook(lambda m, a, out: outputs.update(anchors=out))
    head.register_forward_hook(lambda m, a, out: outputs.update(head=out))
    model.backbone.register_forward_hook(lambda m, a, out: outputs.update(features=out))
    anchors = []
    with torch.inference_mode():
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = model(images)
            anchors.append(outputs["anchors"])
    assert outputs["features"].popitem()[1].dtype == torch.bfloat16  # autocast was active
    parts = (
        outputs["head"].values() if isinstance(outputs["head"], dict) else chain(*outputs["head"])
    )
    assert {tensor.dtype for tensor in parts} == {torch.float32}
    assert output[0]["boxes"].dtype == output[0]["scores"].dtype == torch.float32
    for plain, mixed in zip(*anchors, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(plain, mixed)


def test_skipped_first_step_leaves_momentum_zero(monkeypatch):
    """With memory that is not zero by chance: the steps are those of an unfused SGD."""
    nan_like = lambda tensor, **_: torch.full_like(tensor, float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", nan_like)
    results = []
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused)
        if fused:
            initialize_momentum(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for gradient in (float("inf"), 4.0, 8.0):
            scaler.scale(weight.sum())  # initializes the scale
            weight.grad = torch.full((3,), gradient)
            scaler.step(optimizer)
            scaler.update()
        results.append(weight.detach())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], torch.ones(3))
