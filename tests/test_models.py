from itertools import chain

import pytest
import torch
from torch.nn import BatchNorm2d
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

import models
from internals import mixed_precision
from internals.errors import UserError
from internals.fast.frozen_norms import FoldedConv2d

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
RESNET = "fasterrcnn_resnet50_fpn"


def batch(count: int = 2) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 90, 120, generator=generator).double() for _ in range(count)]
    boxes = [torch.tensor([[10.0, 12, 60, 70], [50, 5, 110, 80]]).double(), torch.empty(0, 4)]
    targets = [{"boxes": b, "labels": torch.arange(1, len(b) + 1)} for b in boxes]
    return images, targets[:count]


def settle_norms(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Give trainable norms random scales and the statistics of these images.

    A random network would otherwise double its numbers in every block once its norms are frozen.
    """
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.momentum = 1.0  # remembers the statistics of the next batch
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    with torch.no_grad():
        model.train().backbone(images)


# One of each family, as the others are made of the same parts.
CASES = [
    (RESNET, None),
    *((RESNET, "detector"), (SMALL, "detector"), ("retinanet_resnet50_fpn", "detector")),
    *(("fcos_resnet50_fpn", "detector"), ("ssd300_vgg16", "detector")),
    ("ssdlite320_mobilenet_v3_large", "detector"),
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(map(str, case)) for case in CASES])
def stock_and_ours(request) -> tuple:
    """The same weights in torchvision's own model and in ours; tests do not change them.

    In float64, since a model with random weights has proposals of almost equal score: what rounds
    otherwise, as another memory layout or another CPU does, would choose others of them.
    """
    name, pretrained = request.param
    torch.manual_seed(0)
    sizes = {"min_sizes": (128,), "max_size": 200}
    stock, ours = (
        models.build_model(name, 4, pretrained=pretrained, **sizes, stock=plain).double()
        for plain in (True, False)
    )
    settled = models.build_model(name, 4, pretrained=None, stock=True).double()
    if settled.backbone.state_dict().keys() >= stock.backbone.state_dict().keys():
        settle_norms(settled, stock.transform(batch()[0])[0].tensors)
        stock.backbone.load_state_dict(settled.backbone.state_dict())
    assert not any(type(module).__module__ == "fast" for module in stock.modules())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_a_pretrained_resnet_has_all_its_norms_folded():
    for pretrained, count in ((None, 0), ("backbone", 53), ("detector", 53)):
        model = models.build_model(RESNET, 4, pretrained=pretrained)
        assert sum(isinstance(m, FoldedConv2d) for m in model.modules()) == count


def test_losses_and_gradients_equal_those_of_the_stock_model(stock_and_ours):
    losses, gradients = [], []
    for model in stock_and_ours:
        torch.manual_seed(1)
        model.train().zero_grad()
        losses.append(model(*batch()))
        sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0].keys() == losses[1].keys()
    for part, value in losses[0].items():
        assert losses[1][part].item() == pytest.approx(value.item(), rel=1e-9)
    assert gradients[0].keys() == gradients[1].keys()
    for key, a in gradients[0].items():
        assert (a - gradients[1][key]).norm() <= 1e-9 * a.norm() + 1e-12


def test_detections_equal_those_of_the_stock_model(stock_and_ours):
    stock, ours = (model.eval() for model in stock_and_ours)
    for model in (stock, ours):
        model.score_thresh = 0.0  # of one-stage models, whose random scores are low
    with torch.inference_mode():
        expected, found = stock(batch()[0]), ours(batch()[0])
    for a, b in zip(expected, found, strict=True):
        assert len(a["boxes"]) > 0
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-7, rtol=0)
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", models.MODELS)
def test_our_state_dict_is_the_stock_models(name):
    stock = get_model(name, weights=None, weights_backbone=None, num_classes=4)
    ours = models.build_model(name, 4, pretrained=None)
    ours.backbone.compile()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }


CLASSIFIERS = {
    "ResNet50_Weights": "resnet50",
    "MobileNet_V3_Large_Weights": "mobilenet_v3_large",
    "VGG16_Weights": "vgg16",
}


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("layers", [None, 0, 3, 5])
def test_pretrained_structure_is_torchvisions(name, layers, monkeypatch):
    """Against torchvision's builder with its download replaced by random weights."""
    weights = models.RECIPES[name].backbone
    state = get_model(CLASSIFIERS[type(weights).__name__], weights=None).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *a, **k: state)
    stock = get_model(
        name,
        weights=None,
        weights_backbone=weights,
        num_classes=3,
        trainable_backbone_layers=layers,
    )
    loaded = models.backbone_weights(name, weights.name)
    monkeypatch.undo()
    options = {"pretrained": "backbone", "trainable_backbone_layers": layers}
    ours = models.build_model(name, 3, backbone_state=loaded, **options)
    without = models.build_model(name, 3, **options)
    for model in (ours, without):
        trains = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (stock, model)]
        assert trains[0] == trains[1]
        assert stock.state_dict().keys() == model.state_dict().keys()
        norms = [
            [n for n, m in each.named_modules() if isinstance(m, FrozenBatchNorm2d)]
            for each in (stock, model)
        ]
        assert norms[0] == norms[1]
    body = [key for key in stock.backbone.state_dict() if not key.startswith("fpn.")]
    same, random = (
        [torch.equal(stock.backbone.state_dict()[k], m.backbone.state_dict()[k]) for k in body]
        for m in (ours, without)
    )
    # What SSD puts behind its backbone is random in both, and its weights are not the others'.
    assert sum(same) >= (len(same) if "ssd" not in name else len(same) // 2)
    assert not all(random)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_frozen_backbone_neither_trains_nor_keeps_statistics(name):
    """Not even the norms that torchvision leaves trainable in a pretrained model."""
    if models.RECIPES[name].reduced_tail:
        with pytest.raises(UserError, match="cannot be frozen"):
            models.build_model(name, 4, pretrained="detector", freeze_backbone=True)
    model = models.build_model(
        name, 4, pretrained="backbone", freeze_backbone=True, min_sizes=(128,), max_size=200
    ).train()
    settle_norms(model, model.transform([i.float() for i in batch()[0]])[0].tensors)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, targets = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    targets = [{"boxes": t["boxes"].float(), "labels": t["labels"]} for t in targets]
    sum(model([image.float() for image in images], targets).values()).backward()
    optimizer.step()
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(fixed) > 20
    assert any(models.CLASS_HEAD_PATTERN.match(key) for key in changed)
    assert not changed & fixed
    prefixes = {key.rpartition(".")[0] for key in fixed}
    assert not {k for k in changed if "running" in k and k.rpartition(".")[0] in prefixes}


@pytest.mark.parametrize(("name", "most"), [(RESNET, 5), (SMALL, 6), ("ssd300_vgg16", 5)])
def test_more_layers_than_there_are_are_refused(name, most):
    with pytest.raises(UserError, match=rf"range \[0,{most}\]"):
        models.build_model(name, 3, pretrained="backbone", trainable_backbone_layers=most + 1)


def test_a_backbone_that_does_not_fit_is_refused():
    state = get_model("resnet18", weights=None).state_dict()
    with pytest.raises(UserError, match="--weights-backbone does not fit this model"):
        models.build_model(RESNET, 3, pretrained="backbone", backbone_state=state)


def test_a_fixed_size_is_height_and_width_of_every_image():
    model = models.build_model(SMALL, 4, pretrained=None, fixed_size=(96, 160))
    images, _ = model.transform([torch.rand(3, 50, 40), torch.rand(3, 300, 200)])
    assert images.tensors.shape == (2, 3, 96, 160)
    assert images.image_sizes == [(96, 160)] * 2


@pytest.mark.parametrize("name", [RESNET, "retinanet_resnet50_fpn", "ssd300_vgg16"])
def test_boxes_stay_float32_under_bfloat16(name):
    ours = models.build_model(name, 4, pretrained=None, min_sizes=(128,), max_size=200).eval()
    seen = {}
    generator, head = (
        next(module for module in ours.modules() if isinstance(module, kinds))
        for kinds in (mixed_precision.ANCHOR_GENERATORS, mixed_precision.HEADS)
    )
    hooks = [
        generator.register_forward_hook(lambda m, a, out: seen.update(anchors=out)),
        head.register_forward_hook(lambda m, a, out: seen.update(head=out)),
        ours.backbone.register_forward_hook(lambda m, a, out: seen.update(features=out)),
    ]
    anchors = []
    with torch.inference_mode():
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = ours([image.float() for image in batch()[0]])
            anchors.append(seen["anchors"])
    for hook in hooks:
        hook.remove()
    assert seen["features"].popitem()[1].dtype == torch.bfloat16  # autocast was really on
    parts = seen["head"].values() if isinstance(seen["head"], dict) else chain(*seen["head"])
    assert {tensor.dtype for tensor in parts} == {torch.float32}
    assert output[0]["boxes"].dtype == output[0]["scores"].dtype == torch.float32
    for plain, mixed in zip(*anchors, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(plain, mixed)


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", models.MODELS)
def test_a_new_head_leaves_the_rest_as_loaded(name):
    donor, model = (models.build_model(name, n, pretrained="detector") for n in (91, 4))
    assert not models.same_classes(model, donor.state_dict())
    before, given = model.state_dict(), donor.state_dict()
    own = {
        key: value.clone() for key, value in before.items() if models.CLASS_HEAD_PATTERN.match(key)
    }
    models.load_detector(model, given, False, "test")
    assert any(value.shape != given[key].shape for key, value in own.items())
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key in own else given[key])
    assert models.same_classes(model, model.state_dict())
    with pytest.raises(UserError, match="test does not fit this model: size mismatch"):
        models.load_detector(model, donor.state_dict(), True, "test")


def test_norms_get_their_own_weight_decay():
    model = models.build_model(SMALL, 3, pretrained=None)
    groups = models.parameter_groups(model, 0.1, 0.0)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() == 1 for p in groups[1]["params"])
    everything = models.parameter_groups(model, 0.1, None)
    assert len(everything) == 1
    total = sum(len(group["params"]) for group in groups)
    assert total == len(everything[0]["params"]) == len(list(model.parameters()))
