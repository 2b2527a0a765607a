"""Detectors with other ResNets: torchvision's rules, its weights, and clear errors."""

import pytest
import torch
from torch.nn import BatchNorm2d
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import models
from coco_utils import Categories
from internals import backbones
from internals.errors import UserError

FASTER_RCNN, RETINANET = "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"
CATEGORIES = Categories.from_names({1: "cell", 7: "dust"})


def on_meta(build, *args, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def structure(model: torch.nn.Module) -> tuple:
    """Return what is in a model, what of it trains, and which norms are frozen."""
    return (
        {key: value.shape for key, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.eps for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)},
        [name for name, m in model.named_modules() if isinstance(m, BatchNorm2d)],
    )


def by_hand(name: str, backbone: str, norm: type, layers: int) -> torch.nn.Module:
    options = {"backbone_name": backbone, "weights": None}
    if name == RETINANET:
        options |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(norm_layer=norm, trainable_layers=layers, **options)
    return (RetinaNet if name == RETINANET else FasterRCNN)(body, 4)


@pytest.mark.parametrize("name", backbones.DETECTORS)
@pytest.mark.parametrize("backbone", ["resnet18", "resnet101", "resnext50_32x4d"])
def test_structure_is_torchvisions(name, backbone):
    for pretrained, norm, layers in (
        (None, BatchNorm2d, 5),
        ("backbone", FrozenBatchNorm2d, 3),
        ("detector", FrozenBatchNorm2d, 3),
    ):
        options = {"pretrained": pretrained, "backbone": backbone, "stock": True}
        ours = on_meta(models.build_model, name, 4, **options)
        assert structure(ours) == structure(on_meta(by_hand, name, backbone, norm, layers))
    options |= {"trainable_backbone_layers": 1}
    ours = on_meta(models.build_model, name, 4, **options)
    assert structure(ours) == structure(on_meta(by_hand, name, backbone, FrozenBatchNorm2d, 1))


@pytest.mark.parametrize("name", backbones.DETECTORS)
@pytest.mark.parametrize("layers", [None, 0, 5])
def test_rules_equal_those_of_torchvisions_builder(name, layers, monkeypatch):
    """The builder for other ResNets, applied to the ResNet-50 that torchvision builds."""
    weights = models.ARCHITECTURES[name].backbone
    state = on_meta(get_model, "resnet50", weights=None).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *a, **k: state)
    for pretrained in (weights, None) if layers is None else (weights,):
        options = {"weights_backbone": pretrained, "num_classes": 4}
        options["trainable_backbone_layers"] = layers
        stock = on_meta(get_model, name, weights=None, **options)
        assert structure(on_meta(backbones._build, name, "resnet50", **options)) == structure(stock)


def test_own_backbone_by_name_is_torchvisions_builder():
    for backbone in (None, "resnet50"):
        builder = backbones.detector_builder(
            FASTER_RCNN, models.ARCHITECTURES[FASTER_RCNN].backbone, backbone
        )
        assert builder.func is get_model


def test_weights_of_the_backbone_are_loaded(tmp_path):
    state = {key: torch.ones_like(v) for key, v in get_model("resnet18").state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    loaded = models.backbone_weights(FASTER_RCNN, str(tmp_path / "x.pth"), "resnet18")
    options = {"pretrained": "backbone", "backbone": "resnet18"}
    model = models.build_model(FASTER_RCNN, 3, backbone_state=loaded, **options)
    assert all((value == 1).all() for value in model.backbone.body.state_dict().values())
    options["backbone"] = "resnet34"
    with pytest.raises(UserError, match=r"--weights-backbone does not fit this model.*missing"):
        on_meta(models.build_model, FASTER_RCNN, 3, backbone_state=loaded, **options)


def test_weights_are_those_of_the_backbone(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "download", lambda weights, hint: asked.append(str(weights)))
    models.backbone_weights(FASTER_RCNN, "IMAGENET1K_V2", "resnet101")
    models.backbone_weights(RETINANET, "IMAGENET1K_V1", "wide_resnet50_2")
    models.backbone_weights(RETINANET, "IMAGENET1K_V2", None)
    assert asked == [
        "ResNet101_Weights.IMAGENET1K_V2",
        "Wide_ResNet50_2_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.IMAGENET1K_V2",
    ]
    with pytest.raises(UserError, match="unknown weights 'IMAGENET1K_V2': choose from IMAGENET1K_"):
        models.backbone_weights(FASTER_RCNN, "IMAGENET1K_V2", "resnet18")


@pytest.mark.parametrize("name", backbones.RESNETS)
def test_backbone_of_a_state_dict_is_found(name):
    options = {"pretrained": "detector", "backbone": name}
    model = on_meta(models.build_model, RETINANET, 3, **options)
    assert backbones.find_backbone(model.state_dict()) == name


def test_weights_with_another_backbone_are_named(tmp_path):
    """Also if the names of all tensors are the same."""
    for ours, theirs in (("resnet34", "resnet18"), ("resnet50", "resnext50_32x4d")):
        donor = on_meta(
            models.build_model, FASTER_RCNN, 3, pretrained="detector", backbone=theirs
        ).state_dict()
        donor = {key: torch.zeros(()).expand(value.shape) for key, value in donor.items()}
        torch.save(donor, tmp_path / "weights.pth")
        options = {"pretrained": "detector", "backbone": ours}
        model = on_meta(models.build_model, FASTER_RCNN, 3, **options).to_empty(device="cpu")
        with pytest.raises(UserError, match=rf"set --backbone {theirs} with the"):
            models.load_pretrained_detector(
                model, FASTER_RCNN, str(tmp_path / "weights.pth"), CATEGORIES, False
            )
