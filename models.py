"""Build a torchvision detector, give it weights, and keep its numbers right under autocast.

The class, the parameter names and the state_dict are torchvision's own: `build_model` calls
torchvision's builder of that name, which decides what is frozen, but needs no download for it.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch
from urllib.parse import urlparse

import torch
import torchvision
from torch import nn
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    ResNet50_Weights,
    VGG16_Weights,
    WeightsEnum,
)
from torchvision.ops import FrozenBatchNorm2d

from internals.errors import UserError
from internals.fast import use_fast_modules
from internals.mixed_precision import keep_boxes_float32


class Recipe(NamedTuple):
    """What differs between torchvision's detectors."""

    backbone: WeightsEnum  # that training starts from
    sizes: tuple[int, int] = (800, 1333)  # shortest side, bound of the longest, in pixels
    resizable: bool = True  # or every image is stretched to a square
    lr: float = 0.02  # of SGD for 16 images in a step, as in torchvision's references
    thin_tail: bool = False  # without a backbone's weights the last stage has half the channels


RESNET, MOBILENET = ResNet50_Weights.IMAGENET1K_V1, MobileNet_V3_Large_Weights.IMAGENET1K_V1
RECIPES = {
    "fasterrcnn_resnet50_fpn": Recipe(RESNET),
    "fasterrcnn_resnet50_fpn_v2": Recipe(RESNET),
    "fasterrcnn_mobilenet_v3_large_fpn": Recipe(MOBILENET),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Recipe(MOBILENET, (320, 640)),
    "retinanet_resnet50_fpn": Recipe(RESNET, lr=0.01),
    "retinanet_resnet50_fpn_v2": Recipe(RESNET, lr=0.01),
    "fcos_resnet50_fpn": Recipe(RESNET, lr=0.01),
    "ssd300_vgg16": Recipe(VGG16_Weights.IMAGENET1K_FEATURES, (300, 300), False, lr=0.001),
    "ssdlite320_mobilenet_v3_large": Recipe(MOBILENET, (320, 320), False, 0.0125, True),
}
MODELS = tuple(RECIPES)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm)
# The layers of a detector whose shape depends on the number of classes, or that belong to them.
OF_CLASSES = re.compile(
    r"roi_heads\.box_predictor\.|head\.classification_head\.(cls_logits|module_list)\."
)


def build_model(
    name: str,
    num_classes: int,
    *,
    pretrained: str | None,
    backbone_state: dict[str, torch.Tensor] | None = None,
    trainable_backbone_layers: int | None = None,
    freeze_backbone: bool = False,
    min_sizes: tuple[int, ...] | None = None,
    max_size: int | None = None,
    fixed_size: tuple[int, int] | None = None,
    rpn_score_thresh: float | None = None,
    stock: bool = False,
) -> nn.Module:
    """A torchvision detector, made fast unless `stock`, with random weights but for its backbone.

    `num_classes` counts the background. `pretrained` says which weights the structure is for: those
    of a "backbone", of a whole "detector", or None. With either, torchvision freezes norms and
    trains the last `trainable_backbone_layers` (by default 3 of 5 in a ResNet; see its builders).
    `freeze_backbone` trains none of them, nor the statistics of norms that others leave trainable.
    `backbone_state` is the state_dict of the backbone as a classifier, if it is to be loaded now.
    `min_sizes` are the shortest sides in pixels of which training draws one and evaluation takes
    the last, `max_size` bounds the longest side; None stands for torchvision's own value.
    `fixed_size` (height, width) stretches every image to this size instead. Raises UserError
    for a number of layers that the backbone lacks.
    """
    recipe = RECIPES[name]
    frozen = pretrained == "backbone" or (pretrained == "detector" and not recipe.thin_tail)
    if freeze_backbone:
        trainable_backbone_layers = 0
    if not frozen and trainable_backbone_layers is not None:
        raise UserError(f"the backbone of this {name} cannot be frozen: all of its layers train")
    options = {"min_size": min_sizes, "max_size": max_size} if recipe.resizable else {}
    options["rpn_score_thresh"] = rpn_score_thresh
    options["fixed_size"] = fixed_size and (fixed_size[1], fixed_size[0])
    with _without_downloads(backbone_state):
        try:
            model = torchvision.models.get_model(
                name,
                weights=None,
                weights_backbone=recipe.backbone if frozen else None,
                num_classes=num_classes,
                trainable_backbone_layers=trainable_backbone_layers,
                **{key: value for key, value in options.items() if value is not None},
            )
        except ValueError as error:  # this number is all that it checks
            raise UserError(f"--trainable-backbone-layers: {str(error).strip()}") from error
        except RuntimeError as error:
            raise UserError(_misfit("--weights-backbone", error)) from error
    if freeze_backbone:
        freeze_norms(model.backbone)
    if stock:
        return model
    keep_boxes_float32(model)
    use_fast_modules(model)
    # In this layout convolutions run faster on a CPU and on tensor cores; the numbers stay.
    return model.to(memory_format=torch.channels_last)


@contextmanager
def _without_downloads(state: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """torchvision's builders load `state` as a backbone's weights, or leave them random."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(WeightsEnum, "get_state_dict", lambda *_, **__: state))
        if state is None:
            patches.enter_context(patch.object(nn.Module, "load_state_dict"))
        yield


def from_checkpoint(saved: dict, stock: bool = False) -> nn.Module:
    """The detector of a checkpoint (`checkpoint.load`), on the CPU and ready to detect.

    `stock`: in torchvision's own classes, as anybody has them.
    """
    args = saved["args"]
    model = build_model(
        args["model"],
        1 + max(row["label"] for row in saved["categories"]),
        pretrained=start_of(args["weights"], args["weights_backbone"]),
        freeze_backbone=args.get("freeze_backbone", False),
        min_sizes=(args["min_size"],),
        max_size=args["max_size"],
        fixed_size=args["fixed_size"],
        rpn_score_thresh=args["rpn_score_thresh"],
        stock=stock,
    )
    _load(model, saved["model"], "the checkpoint")
    return model.eval()


def start_of(weights: str | None, weights_backbone: str | None) -> str | None:
    """`pretrained` of `build_model` for the flags --weights and --weights-backbone."""
    return "detector" if weights else None if weights_backbone == "none" else "backbone"


def pretrained(name: str, weights: str) -> tuple[nn.Module, list[dict]]:
    """torchvision's detector of that name with its own weights, such as COCO_V1, ready to detect,
    and its categories as rows of `id, name, label`. Raises UserError.
    """
    state = detector_weights(name, weights, "or use a checkpoint of your own, without --model")
    names = _member(torchvision.models.get_model_weights(name), weights).meta["categories"]
    model = build_model(name, len(names), pretrained="detector")
    load_detector(model, state, True, weights)
    real = [(i, text) for i, text in enumerate(names) if text not in ("__background__", "N/A")]
    return model.eval(), [{"id": i, "name": text, "label": i} for i, text in real]


def freeze_norms(module: nn.Module) -> None:
    """Replace each BatchNorm2d below `module` whose parameters do not train by a frozen norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not child.weight.requires_grad:
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def has_trainable_norms(model: nn.Module) -> bool:
    """Whether a BatchNorm keeps statistics of the training images in this model."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def parameter_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float | None
) -> list[dict]:
    """The trainable parameters for an optimizer, norms apart if they have their own decay."""
    norm, other = [], []
    for module in model.modules():
        special = norm_weight_decay is not None and isinstance(module, NORMS)
        mine = [p for p in module.parameters(recurse=False) if p.requires_grad]
        (norm if special else other).extend(mine)
    groups = [{"params": other, "weight_decay": weight_decay}]
    return groups + ([{"params": norm, "weight_decay": norm_weight_decay}] if norm else [])


# ----------------------------------------------------------------------------------- weights


def is_file(weights: str) -> bool:
    """Whether a value of --weights or --weights-backbone is a path rather than a name."""
    return Path(weights).suffix in (".pth", ".pt") or Path(weights).exists()


def backbone_weights(model_name: str, weights: str) -> dict[str, torch.Tensor]:
    """The state_dict of the classifier that torchvision has as backbone weights of that name."""
    hint = "or start from random weights with --weights-backbone none"
    return _download(_member(type(RECIPES[model_name].backbone), weights), hint)


def detector_weights(
    model_name: str,
    weights: str,
    otherwise: str = "or use --weights-backbone none instead",
) -> dict[str, torch.Tensor]:
    """The state_dict of torchvision's whole detector of that name, with COCO's 91 outputs."""
    choices = torchvision.models.get_model_weights(model_name)
    member = _member(choices, weights)
    state = _download(member, otherwise)
    if member in TRAINED_WITH_EPSILON_0:
        _absorb_epsilon(state)
    return state


TRAINED_WITH_EPSILON_0 = (
    torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)


def _member(choices: type, name: str) -> torchvision.models.WeightsEnum:
    try:
        return choices[name.removeprefix(f"{choices.__name__}.")]
    except KeyError:
        raise UserError(
            f"unknown weights {name!r}: choose from {', '.join(choices.__members__)}, "
            "or give the path of a .pth file"
        ) from None


def _download(weights: torchvision.models.WeightsEnum, hint: str) -> dict[str, torch.Tensor]:
    """From torchvision's cache, or over TLS with the hash in the file's name checked."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{weights} cannot be loaded: {error}\n"
            f"Without network, place the file {weights.url}\nat {file}, {hint}"
        ) from error


def _absorb_epsilon(state: dict[str, torch.Tensor]) -> None:
    """Write frozen norms for an epsilon of 1e-5, the one that a stock model divides with.

    Some of COCO's weights were trained with an epsilon of 0, which torchvision's builder sets again
    after loading. Absorbed in the (frozen) scales, they and all that is trained from them give the
    same detections in any stock model, with no need to know where they came from.
    """
    for key in [key for key in state if key.endswith("running_var")]:
        scale, variance = key.replace("running_var", "weight"), state[key].double()
        state[scale] = (state[scale] * ((variance + 1e-5) / variance).sqrt()).to(state[scale].dtype)


def same_classes(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether a detector's state_dict predicts as many classes as `model` does."""
    return all(
        name in state and state[name].shape == tensor.shape
        for name, tensor in model.state_dict().items()
        if OF_CLASSES.match(name)
    )


def load_detector(
    model: nn.Module, state: dict[str, torch.Tensor], keep_head: bool, source: str
) -> None:
    """Load a detector's state_dict; without `keep_head` what predicts classes stays as it is."""
    if not keep_head:
        ours = {key: value for key, value in model.state_dict().items() if OF_CLASSES.match(key)}
        state = {**{k: v for k, v in state.items() if not OF_CLASSES.match(k)}, **ours}
    _load(model, state, source)


def _load(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(_misfit(source, error)) from error


def _misfit(source: str, error: RuntimeError) -> str:
    reasons = [line.strip() for line in str(error).splitlines()[1:]]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return (
        f"{source} does not fit this model: {reasons[0][:300]}{more}. "
        "Choose the --model that the weights were made for"
    )
