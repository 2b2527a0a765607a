"""Backbones of Faster R-CNN and RetinaNet other than the ResNet-50 of torchvision's builders."""

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from internals.errors import UserError
from internals.weights import classifier_state, is_file

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
# The detectors that take them. Those of the _v2 builders have sizes of a ResNet-50 written in, and
# norms in their heads.
DETECTORS = {"fasterrcnn_resnet50_fpn": FasterRCNN, "retinanet_resnet50_fpn": RetinaNet}
CHANNELS = 256  # of the feature pyramid


def name_of(weights: WeightsEnum) -> str:
    """Return the network that weights are for, such as "resnet50"."""
    return type(weights).__name__.removesuffix("_Weights").lower()


def default_weights(own: WeightsEnum, backbone: str | None) -> WeightsEnum:
    """Return the default of --weights-backbone.

    Args:
        own: That of the detector with its own backbone.
        backbone: The value of --backbone; None for the detector's own.
    """
    if backbone in (None, name_of(own)):
        return own
    return torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]


def detector_builder(name: str, own: WeightsEnum, backbone: str | None) -> Callable[..., nn.Module]:
    """Return torchvision's builder of a detector, or one with the same arguments for `backbone`."""
    if backbone in (None, name_of(own)):
        return partial(torchvision.models.get_model, name, weights=None)
    return partial(_build, name, backbone)


def _build(
    name: str,
    backbone: str,
    *,
    weights_backbone: WeightsEnum | None,
    num_classes: int,
    trainable_backbone_layers: int | None = None,
    **options,
) -> nn.Module:
    """Build a detector with the rules of torchvision's builder for norms, frozen layers and levels.

    With pretrained weights norms are frozen and 3 of 5 layers train by default, else all train.
    """
    pretrained = weights_backbone is not None
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 3 if pretrained else 5
    levels = {}
    if DETECTORS[name] is RetinaNet:
        levels["returned_layers"] = [2, 3, 4]
        levels["extra_blocks"] = LastLevelP6P7(CHANNELS, CHANNELS)
    body = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=weights_backbone,
        norm_layer=FrozenBatchNorm2d if pretrained else nn.BatchNorm2d,
        trainable_layers=trainable_backbone_layers,
        **levels,
    )
    return DETECTORS[name](body, num_classes, **options)


def validate(name: str, backbone: str, own: WeightsEnum, weights: str | None) -> None:
    """Check --backbone.

    Args:
        name: The value of --model.
        backbone: That of --backbone, or the default.
        own: The weights of the model's own backbone.
        weights: The value of --weights.

    Raises:
        UserError: The model has no other backbones, or torchvision has no weights of a detector
            with this one.
    """
    if backbone == name_of(own):
        return
    if name not in DETECTORS:
        raise UserError(
            f"--backbone {backbone} is for {' and '.join(DETECTORS)}: {name} has its own backbone, "
            "remove the flag"
        )
    if weights and not is_file(weights):
        raise UserError(
            f"--weights {weights} has the backbone {name_of(own)}, not {backbone}: start from a "
            "pretrained backbone without --weights, or give the file of such a detector"
        )


def advise_backbone(expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> str:
    """Return what to do if a state_dict is of a detector with another ResNet; else ""."""
    ours, theirs = find_backbone(expected), find_backbone(state)
    if theirs in (None, ours) or ours is None:
        return ""
    return (
        f"These are the weights of a detector with the backbone {theirs}: set --backbone {theirs} "
        "with the --model that they are of"
    )


def find_backbone(state: dict[str, torch.Tensor]) -> str | None:
    """Return which of `RESNETS` a detector's state_dict has."""
    body = _shapes({k.removeprefix("backbone.body."): v for k, v in state.items() if ".body." in k})
    for name in RESNETS if body else ():
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        classifier = _shapes(classifier_state(weights))
        if body == {k: shape for k, shape in classifier.items() if not k.startswith("fc.")}:
            return name
    return None


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of all tensors but counters of batches, which frozen norms lack."""
    return {k: v.shape for k, v in state.items() if not k.endswith(".num_batches_tracked")}
