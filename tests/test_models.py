"""Detectors compared with torchvision's: structure, weights, losses and detections."""

import argparse
import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import BatchNorm2d
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

import models
from coco_utils import COCO_CATEGORY_IDS, Categories
from internals.errors import UserError
from internals.fast.frozen_norms import FoldedConv2d

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
RESNET = "fasterrcnn_resnet50_fpn"
CLASSIFIERS = {
    "ResNet50_Weights": "resnet50",
    "MobileNet_V3_Large_Weights": "mobilenet_v3_large",
    "VGG16_Weights": "vgg16",
}


def slow(*values) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def build_on_meta(build, *args, **kwargs) -> torch.nn.Module:
    """Build a model on the meta device, which takes no memory and no time."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def constant_state(name: str, num_classes: int, number: float) -> dict[str, torch.Tensor]:
    """Return a state_dict with one number in every tensor, which takes no memory."""
    model = build_on_meta(models.build_model, name, num_classes, pretrained="detector")
    return {
        key: torch.tensor(number, dtype=value.dtype).expand(value.shape)
        for key, value in model.state_dict().items()
    }


def constant_model(name: str, num_classes: int, number: float) -> torch.nn.Module:
    """Return a model with one number in every tensor."""
    model = build_on_meta(models.build_model, name, num_classes, pretrained="detector")
    model.to_empty(device="cpu").load_state_dict(constant_state(name, num_classes, number))
    return model


def batch() -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 45, 60, generator=generator).double() for _ in range(2)]
    boxes = [torch.tensor([[5.0, 6, 30, 35], [25, 2, 55, 40]]).double(), torch.empty(0, 4)]
    targets = [
        {"boxes": b, "labels": torch.arange(1, len(b) + 1), "seed": n} for n, b in enumerate(boxes)
    ]
    return images, targets


# ---------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", models.MODELS)
def test_state_dict_matches_torchvision(name):
    stock = build_on_meta(get_model, name, weights=None, weights_backbone=None, num_classes=4)
    ours = build_on_meta(models.build_model, name, 4, pretrained=None)
    ours.backbone.compile()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("layers", [None, 0, 5])
def test_pretrained_structure_matches_torchvision(name, layers, monkeypatch):
    """The weights that torchvision's builder downloads are replaced by meta tensors."""
    weights = models.ARCHITECTURES[name].backbone
    state = build_on_meta(get_model, CLASSIFIERS[type(weights).__name__], weights=None).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(type(weights), "get_state_dict", lambda *a, **k: state)
        flags = {"weights_backbone": weights, "trainable_backbone_layers": layers}
        stock = build_on_meta(get_model, name, weights=None, num_classes=3, **flags)
    options = {"pretrained": "backbone", "trainable_backbone_layers": layers}
    for backbone_state in (state, None):
        ours = build_on_meta(models.build_model, name, 3, backbone_state=backbone_state, **options)
        trains, norms = [], []
        for model in (stock, ours):
            trains.append({n: p.requires_grad for n, p in model.named_parameters()})
            kinds = [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
            norms.append(kinds)
        assert trains[0] == trains[1]
        assert norms[0] == norms[1]
        assert stock.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize("name", [SMALL, "ssdlite320_mobilenet_v3_large", *slow(RESNET)])
def test_backbone_weights_match_torchvision(name, monkeypatch):
    weights = models.ARCHITECTURES[name].backbone
    state = get_model(CLASSIFIERS[type(weights).__name__], weights=None).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *a, **k: state)
    stock = get_model(name, weights=None, weights_backbone=weights, num_classes=3)
    loaded = models.backbone_weights(name, weights.name)
    monkeypatch.undo()
    ours = models.build_model(name, 3, pretrained="backbone", backbone_state=loaded).state_dict()
    without = models.build_model(name, 3, pretrained="backbone").state_dict()
    body = [k for k in ours if k.startswith("backbone.") and ".fpn." not in k]
    expected = stock.state_dict()
    same = [key for key in body if torch.equal(expected[key], ours[key])]
    # The extra layers of SSD are random in both.
    assert len(same) >= (len(body) // 2 if "ssd" in name else len(body))
    assert not all(torch.equal(expected[key], without[key]) for key in body)


@pytest.mark.parametrize(
    ("pretrained", "backbone", "count"),
    [
        *((None, None, 0), ("backbone", None, 53), ("detector", None, 53)),
        *((None, "resnet18", 0), ("backbone", "resnet18", 20), ("detector", "resnet34", 36)),
        ("backbone", "resnext101_32x8d", 104),
    ],
)
def test_frozen_norms_are_folded(pretrained, backbone, count):
    options = {"pretrained": pretrained, "backbone": backbone}
    model = build_on_meta(models.build_model, RESNET, 4, **options)
    assert sum(isinstance(m, FoldedConv2d) for m in model.modules()) == count


@pytest.mark.parametrize(("name", "most"), [(RESNET, 5), (SMALL, 6), ("ssd300_vgg16", 5)])
def test_too_many_trainable_layers_are_rejected(name, most):
    flags = {"pretrained": "backbone", "trainable_backbone_layers": most + 1}
    with pytest.raises(UserError, match=rf"--trainable-backbone-layers.*range \[0,{most}\]"):
        build_on_meta(models.build_model, name, 3, **flags)


def test_mismatched_backbone_is_rejected():
    state = build_on_meta(get_model, "resnet18", weights=None).state_dict()
    flags = {"pretrained": "backbone", "backbone_state": state}
    with pytest.raises(
        UserError,
        match=r"--weights-backbone does not fit this model: .*tensors of the model are missing",
    ):
        build_on_meta(models.build_model, RESNET, 3, **flags)


@pytest.mark.parametrize("name", models.MODELS)
def test_max_detections_limits_detections_and_candidates(name):
    def limits(**options) -> list[int]:
        model = build_on_meta(models.build_model, name, 3, pretrained=None, **options)
        head = getattr(model, "roi_heads", model)
        if head is model:
            return [head.detections_per_img, model.topk_candidates]
        model.eval()
        return [head.detections_per_img, model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()]

    plain = limits()
    stock = build_on_meta(get_model, name, weights=None, weights_backbone=None)
    assert plain[0] == getattr(stock, "roi_heads", stock).detections_per_img
    assert limits(max_detections=5) == [5, *plain[1:]]
    assert limits(max_detections=1500) == [1500] * len(plain)


def test_more_detections_than_the_default_are_returned():
    """Of a model that considers 150 candidates by default."""
    torch.manual_seed(0)
    model = models.build_model("fasterrcnn_mobilenet_v3_large_320_fpn", 3, pretrained=None).eval()
    image = torch.rand(3, 320, 320)

    @torch.inference_mode()
    def detect(limit: int) -> dict:
        models.limit_detections(model, limit)
        return model([image])[0]

    best, more = detect(100), detect(400)
    assert len(best["scores"]) == 100
    assert len(more["scores"]) > 150
    assert len(detect(7)["scores"]) == 7


def test_fixed_size_is_height_and_width():
    model = build_on_meta(models.build_model, SMALL, 4, pretrained=None, fixed_size=(96, 160))
    images, _ = model.transform([torch.rand(3, 50, 40), torch.rand(3, 300, 200)])
    assert images.tensors.shape == (2, 3, 96, 160)
    assert images.image_sizes == [(96, 160)] * 2


def test_norm_weight_decay():
    model = build_on_meta(models.build_model, SMALL, 3, pretrained=None)
    groups = models.parameter_groups(model, 0.1, 0.0)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() == 1 for p in groups[1]["params"])
    (everything,) = models.parameter_groups(model, 0.1, None)
    total = sum(len(group["params"]) for group in groups)
    assert total == len(everything["params"]) == len(list(model.parameters()))


def test_parameter_groups_by_hand():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(1, 2, 1), torch.nn.GroupNorm(1, 2)
            self.frozen, self.affine = FrozenBatchNorm2d(2), FrozenBatchNorm2d(2)
            for name in ("weight", "bias"):
                delattr(self.affine, name)
                setattr(self.affine, name, torch.nn.Parameter(torch.ones(2)))
            self.fixed = torch.nn.Linear(1, 1).requires_grad_(False)

    model = Net()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def groups(*decays) -> list[tuple]:
        rows = models.parameter_groups(model, *decays)
        return [(row["weight_decay"], [names[p] for p in row["params"]]) for row in rows]

    conv, bias = "conv.weight", "conv.bias"
    norms = ["norm.weight", "norm.bias", "affine.weight", "affine.bias"]
    assert groups(0.1, None) == groups(0.1, None, None) == [(0.1, [conv, bias, *norms])]
    assert groups(0.1, 0.2) == [(0.1, [conv, bias]), (0.2, norms)]
    assert groups(0.1, None, 0.0) == [(0.1, [conv, *norms]), (0.0, [bias])]
    assert groups(0.1, 0.2, 0.0) == [(0.1, [conv]), (0.2, norms), (0.0, [bias])]


def test_weight_decay_of_adamw_is_decoupled():
    """Without gradients a step multiplies weights by 1 - lr x weight decay, as in the source."""
    model = torch.nn.Linear(2, 2)
    before = copy.deepcopy(model)
    groups = models.parameter_groups(model, 0.1, None, 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, before.weight * (1 - 1e-5), rtol=2e-7, atol=0)
    assert model.bias.equal(before.bias)


def test_affine_of_frozen_norms_trains_in_layers_that_train():
    kind = {"pretrained": "backbone", "train_norm_affine": True}
    model = build_on_meta(models.build_model, RESNET, 4, **kind)
    plain = build_on_meta(models.build_model, RESNET, 4, pretrained="backbone", stock=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    added = {n for n, p in model.named_parameters() if p.requires_grad}
    added -= {n for n, p in plain.named_parameters() if p.requires_grad}
    norms = [n for n, m in plain.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    trained = [n for n in norms if re.match(r"backbone\.body\.layer[234]\.", n)]
    assert len(trained) == 42  # of 53: 1 in the stem, 10 in layer1
    assert added == {f"{n}.{name}" for n in trained for name in ("weight", "bias")}
    for name, flags in (
        (RESNET, {**kind, "pretrained": None}),
        (RESNET, {**kind, "freeze_backbone": True}),
        ("fasterrcnn_resnet50_fpn_v2", kind),
        ("ssd300_vgg16", kind),
    ):
        with pytest.raises(UserError, match="--train-norm-affine has no effect"):
            build_on_meta(models.build_model, name, 4, **flags)


# ------------------------------------------------------------------------ losses and detections


def set_norms(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Give trainable norms random scales and the statistics of these images.

    The activations of a random network would otherwise double with every block of frozen norms.
    """
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.momentum = 1.0  # keeps the statistics of the next batch only
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    with torch.no_grad():
        model.train().backbone(images)


# One detector of each family, as the others have the same parts.
OTHERS = (
    *(RESNET, "fasterrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
    "ssdlite320_mobilenet_v3_large",
)
# Basic blocks instead of bottlenecks, and another number of anchors per location.
RESNET18 = {
    "backbone": "resnet18",
    "anchor_sizes": [[8, 12], [16, 24], [32, 48], [64, 96], [128, 192]],
    "anchor_ratios": [0.33, 0.5, 1.0, 2.0, 3.0],
}
GROUPS = {"backbone": "resnext50_32x4d"}
CASES = [
    *((SMALL, None, {}), (SMALL, "detector", {})),
    *((RESNET, "backbone", RESNET18), ("retinanet_resnet50_fpn", "detector", RESNET18)),
    *slow((RESNET, None, RESNET18), (RESNET, "detector", GROUPS)),
    *slow(*((name, "detector", {}) for name in OTHERS)),
]


def case_name(case: tuple) -> str:
    return "-".join(map(str, (*case[:2], *case[2].get("backbone", "").split())))


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def stock_and_ours(request) -> tuple:
    """Build torchvision's model and ours with the same weights, which tests do not change.

    In float64, as a model with random weights has proposals of almost equal score: other rounding
    by another memory layout or CPU would select other proposals.
    """
    name, pretrained, options = request.param
    torch.manual_seed(0)
    sizes = {"min_sizes": (64,), "max_size": 100, **options}
    stock, ours = (
        models.build_model(name, 4, pretrained=pretrained, **sizes, stock=plain).double()
        for plain in (True, False)
    )
    trainable = models.build_model(name, 4, pretrained=None, **options, stock=True).double()
    set_norms(trainable, stock.transform(batch()[0])[0].tensors)
    frozen = stock.backbone.state_dict()
    weights = trainable.backbone.state_dict()
    stock.backbone.load_state_dict({key: weights[key] for key in frozen})
    assert not any(type(m).__module__.startswith("internals") for m in stock.modules())
    if isinstance(stock, FasterRCNN):  # less work for the box head
        for model in (stock, ours):
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 64
            model.rpn._post_nms_top_n = {"training": 200, "testing": 100}
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_losses_and_gradients_equal_stock_model(stock_and_ours, fixed_shapes):
    """Faster R-CNN on a CPU, and with the tensors of fixed shape that it has on CUDA."""
    stock, ours = stock_and_ours
    if isinstance(ours, FasterRCNN):
        ours.fixed_shapes = fixed_shapes
        with_keys = copy.deepcopy(ours).train()
        with_keys.fixed_shapes = False
        with_keys(*batch())
        stock.rpn.fg_bg_sampler = with_keys.rpn.fg_bg_sampler
        stock.roi_heads.fg_bg_sampler = with_keys.roi_heads.fg_bg_sampler
    elif fixed_shapes:
        pytest.skip("all devices have the same way")
    losses, gradients = [], []
    for model in stock_and_ours:
        model.train().zero_grad()
        losses.append(model(*batch()))
        sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    # torchvision computes one of the losses with labels in float32.
    tolerance = 1e-7 if fixed_shapes else 1e-9
    assert losses[0].keys() == losses[1].keys()
    for part, value in losses[0].items():
        assert losses[1][part].item() == pytest.approx(value.item(), rel=tolerance)
    assert gradients[0].keys() == gradients[1].keys()
    for key, a in gradients[0].items():
        assert (a - gradients[1][key]).norm() <= tolerance * a.norm() + 1e-12


def test_detections_equal_stock_model(stock_and_ours):
    stock, ours = (model.eval() for model in stock_and_ours)
    for model in (stock, ours):
        model.score_thresh = 0.0  # the random scores of one-stage models are low
    with torch.inference_mode():
        expected, actual = stock(batch()[0]), ours(batch()[0])
    for a, b in zip(expected, actual, strict=True):
        assert len(a["boxes"]) > 0
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-7, rtol=0)
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [SMALL, *slow("fasterrcnn_resnet50_fpn_v2")])
def test_frozen_backbone_does_not_change(name):
    """Including the norms that torchvision keeps trainable in a pretrained model."""
    model = models.build_model(
        name, 4, pretrained="backbone", freeze_backbone=True, min_sizes=(64,), max_size=100
    ).train()
    images, targets = batch()
    images = [image.float() for image in images]
    targets = [{"boxes": t["boxes"].float(), "labels": t["labels"]} for t in targets]
    set_norms(model, model.transform(images)[0].tensors)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sum(model(images, targets).values()).backward()
    optimizer.step()
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(fixed) > 20
    assert any(models.CLASS_HEAD_PATTERN.match(key) for key in changed)
    assert not changed & fixed
    prefixes = {key.rpartition(".")[0] for key in fixed}
    assert not {k for k in changed if "running" in k and k.rpartition(".")[0] in prefixes}


def test_ssdlite_backbone_cannot_be_frozen():
    flags = {"pretrained": "detector", "freeze_backbone": True}
    with pytest.raises(UserError, match="cannot be frozen"):
        build_on_meta(models.build_model, "ssdlite320_mobilenet_v3_large", 4, **flags)


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", models.MODELS)
def test_new_head_keeps_other_loaded_weights(name):
    donor, model = constant_state(name, 91, 1.0), constant_model(name, 4, 2.0)
    assert not models.same_classes(model, donor)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    models.load_detector(model, donor, False, "test")
    kept = {key for key, value in model.state_dict().items() if (value == 2).all()}
    loaded = {key for key, value in model.state_dict().items() if (value == 1).all()}
    assert loaded | kept == set(donor)
    assert kept == {key for key in donor if models.CLASS_HEAD_PATTERN.match(key)}
    assert kept >= {key for key, value in donor.items() if value.shape != shapes[key]}
    assert models.same_classes(model, model.state_dict())
    with pytest.raises(UserError, match=r"test does not fit this model: .* have another shape"):
        models.load_detector(model, donor, True, "test")


COCO = Categories.from_names({i: str(i) for i in COCO_CATEGORY_IDS})
OTHER = Categories.from_names({1: "cell", 7: "dust"})
HEAD, BODY = "roi_heads.box_predictor.cls_score.bias", "backbone.body.0.0.weight"


def test_coco_weights_keep_head_for_coco_only(monkeypatch, capsys):
    donor = constant_state(SMALL, 91, 1.0)
    monkeypatch.setattr(models, "download", lambda *_: donor)

    def load(categories: Categories, head_required: bool = False) -> dict:
        model = constant_model(SMALL, categories.num_classes, 2.0)
        models.load_pretrained_detector(model, SMALL, "COCO_V1", categories, head_required)
        return model.state_dict()

    assert torch.equal(load(COCO)[HEAD], donor[HEAD])
    assert "with its head" in capsys.readouterr().out
    other = load(OTHER)
    assert other[HEAD].tolist() == [2.0] * 3
    assert torch.equal(other[BODY], donor[BODY])
    assert "with a new head for 2 categories" in capsys.readouterr().out
    with pytest.raises(UserError, match="trained on other categories"):
        load(OTHER, head_required=True)


def test_weights_file_keeps_head_for_same_categories(tmp_path):
    donor, names = constant_state(SMALL, 3, 1.0), {1: "cell", 9: "hair"}

    def load(content: dict) -> list[float]:
        torch.save(content, tmp_path / "weights.pth")
        model = constant_model(SMALL, 3, 2.0)
        flags = (SMALL, str(tmp_path / "weights.pth"), OTHER)
        models.load_pretrained_detector(model, *flags, head_required=False)
        return model.state_dict()[HEAD].tolist()

    assert load({"model": donor, "categories": OTHER.to_list()}) == [1.0] * 3
    other = Categories.from_names(names).to_list()
    assert load({"model": donor, "categories": other}) == [2.0] * 3
    assert load(donor) == [1.0] * 3  # a state_dict without category names


def wrap_lightning(state: dict) -> dict:
    inside = {**{f"model.{key}": value for key, value in state.items()}, "loss.w": torch.ones(2)}
    return {"state_dict": inside, "pytorch-lightning_version": "2", "loops": {"a": {"x": 1}}}


def wrap_average(state: dict) -> dict:
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    average = {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in state.items()}}
    return {"model": zeros, "model_ema": average, "epoch": 3}


REFERENCE_ARGS = argparse.Namespace(model=SMALL, device="cuda", lr=0.02, path=Path("out"))
OTHER_LOOPS = {
    "DDP": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "compiled parts": lambda state: {
        key.replace("body.", "body._orig_mod."): value for key, value in state.items()
    },
    "tutorial": lambda state: {"epoch": 3, "model_state_dict": state, "loss": 0.3},
    "Lightning": wrap_lightning,
    "average": wrap_average,
    "nested average": lambda state: {
        "ema": {"decay": 0.9, "updates": torch.tensor(3), "module": state}
    },
    "empty average": lambda state: {"ema": None, "model": state},
    "average of parameters": lambda state: {"ema": {"shadow": [torch.ones(2)]}, "model": state},
    "torchvision": lambda state: {
        "model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3,
        "lr_scheduler": {"last_epoch": 3}, "args": REFERENCE_ARGS,
    },
    "flags of the same name": lambda state: {"model": state, "args": {"anchor_sizes": "32,64"}},
    "NumPy": lambda state: {"model": state, "best": np.float64(0.3), "ids": np.arange(3)},
}  # fmt: skip


@pytest.mark.parametrize("loop", OTHER_LOOPS)
def test_weights_of_other_loops_are_taken(loop, tmp_path, capsys):
    donor = constant_state(SMALL, 3, 1.0)
    torch.save(OTHER_LOOPS[loop](donor), tmp_path / "weights.pth")
    model = constant_model(SMALL, 3, 2.0)
    flags = (SMALL, str(tmp_path / "weights.pth"), OTHER)
    models.load_pretrained_detector(model, *flags, head_required=False)
    assert all((value == 1).all() for value in model.state_dict().values())
    output = " ".join(capsys.readouterr().out.split())
    assert "with its head" in output
    assert ("'model_ema' without n_averaged, not of the model, with" in output) == (
        loop == "average"
    )
    assert ("'ema' 'module', with" in output) == (loop == "nested average")


def test_weights_of_other_loops_get_a_new_head_for_other_categories(tmp_path, capsys):
    donor = OTHER_LOOPS["DDP"](constant_state(SMALL, 7, 1.0))
    torch.save({"model": donor, "categories": ["a", "b"]}, tmp_path / "weights.pth")
    model = constant_model(SMALL, 3, 2.0)
    flags = (SMALL, str(tmp_path / "weights.pth"), OTHER)
    models.load_pretrained_detector(model, *flags, head_required=False)
    assert model.state_dict()[HEAD].tolist() == [2.0] * 3
    assert (model.state_dict()[BODY] == 1).all()
    assert "with a new head for 2 categories" in capsys.readouterr().out


def test_safetensors_are_taken_with_their_categories(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    donor = {k: v.contiguous() for k, v in constant_state(SMALL, 3, 1.0).items()}
    file = tmp_path / "weights.safetensors"
    flags = (SMALL, str(file), OTHER)
    other = Categories.from_names({1: "cell", 9: "hair"})
    for rows, head in ((None, 1.0), (OTHER.to_list(), 1.0), (other.to_list(), 2.0)):
        safetensors.save_file(donor, file, {"categories": json.dumps(rows)} if rows else None)
        model = constant_model(SMALL, 3, 2.0)
        models.load_pretrained_detector(model, *flags, head_required=False)
        assert model.state_dict()[HEAD].tolist() == [head] * 3
        assert (model.state_dict()[BODY] == 1).all()


def test_backbone_of_other_loops_is_taken(tmp_path):
    state = {k: torch.ones_like(v) for k, v in get_model("mobilenet_v3_large").state_dict().items()}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save({**wrapped, "args": REFERENCE_ARGS}, tmp_path / "x.pth.tar")
    loaded = models.backbone_weights(SMALL, str(tmp_path / "x.pth.tar"))
    assert loaded.keys() == state.keys()


def weights_error(content, folder: Path, name: str = SMALL) -> str:
    """Return the error about a file with this content, which must name the file."""
    file = folder / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    model = constant_model(name, 3, 2.0)
    with pytest.raises(UserError) as caught:
        models.load_pretrained_detector(model, name, str(file), OTHER, False)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class RunsCode:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder / "run"),))


def test_files_without_weights_of_a_detector_are_named(tmp_path):
    state = constant_state(SMALL, 3, 1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    parts = {key: value for key, value in state.items() if "rpn" not in key}
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    classifier = build_on_meta(get_model, "mobilenet_v3_large").to_empty(device="cpu").state_dict()
    for content, message in (
        (b"not weights", "it is not a file of torch.save"),
        (b"", "the file is empty"),
        ([torch.ones(2)], "holds a list, not a dict"),
        (torch.ones(2), "holds a Tensor, not a dict"),
        ({}, "but nothing: save model.state_dict() alone"),
        ({"weights_of": state}, "but 'weights_of': save model.state_dict() alone"),
        (optimizer.state_dict(), "holds the state of an optimizer"),
        (torch.nn.Linear(1, 1), "save model.state_dict() instead"),
        ({"model": RunsCode(tmp_path)}, "which is rejected because loading it could run code"),
        (parts, "tensors of the model are missing (such as rpn.head.conv.0.0.weight)"),
        (
            {**state, "mask.w": torch.ones(2)},
            "1 are not of the model (such as mask.w)",
        ),
        (backbone, "These are the weights of a backbone alone"),
        (classifier, "give them as --weights-backbone FILE"),
    ):
        assert message in weights_error(content, tmp_path), message
    assert not (tmp_path / "run").exists()
    assert "set --model fasterrcnn_mobilenet_v3_large_" in weights_error(
        state, tmp_path, "retinanet_resnet50_fpn"
    )


def test_weights_of_other_shapes_are_named(tmp_path):
    state = constant_state(SMALL, 3, 1.0)
    state[BODY] = torch.ones(16, 4, 3, 3)
    error = weights_error(state, tmp_path)
    assert f"1 have another shape (such as {BODY} [16, 4, 3, 3] instead of [16, 3, 3, 3])" in error


def test_download_error_names_alternatives(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="start from random weights with --weights-backbone none"):
        models.backbone_weights(RESNET, "IMAGENET1K_V1")
    model = build_on_meta(models.build_model, RESNET, 3, pretrained="detector")
    with pytest.raises(UserError, match="or use --weights-backbone none instead"):
        models.load_pretrained_detector(model, RESNET, "COCO_V1", OTHER, False)
