"""Build a torchvision detector and load its weights.

`build_model` calls torchvision's builder of the same name, without its downloads. Classes,
parameter names, state_dict and what is frozen are therefore torchvision's.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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

import utils
from coco_utils import Categories
from internals import anchors, backbones
from internals.errors import UserError
from internals.fast import use_fast_modules
from internals.fast.frozen_norms import train_affine
from internals.mixed_precision import keep_boxes_float32
from internals.torchvision_builders import without_download
from internals.weights import (
    advise_misfit,
    classifier_state,
    describe_misfit,
    download,
    find_state_dict,
    find_weights,
    is_file,
    load_weights_file,
)


class Architecture(NamedTuple):
    """What differs between torchvision's detectors."""

    backbone: WeightsEnum  # the default of --weights-backbone
    sizes: tuple[int, int] = (800, 1333)  # shorter side, bound of the longer side, in pixels
    resizable: bool = True  # False: every image is stretched to a square
    lr: float = 0.02  # of SGD for 16 images per step, as in torchvision's references
    reduced_tail: bool = False  # without pretrained weights the last stage has half the channels


# To add a torchvision detector: a row here, its class-dependent layers in CLASS_HEAD_PATTERN, and
# its head in internals.mixed_precision.HEADS.
RESNET, MOBILENET = ResNet50_Weights.IMAGENET1K_V1, MobileNet_V3_Large_Weights.IMAGENET1K_V1
ARCHITECTURES = {
    "fasterrcnn_resnet50_fpn": Architecture(RESNET),
    "fasterrcnn_resnet50_fpn_v2": Architecture(RESNET),
    "fasterrcnn_mobilenet_v3_large_fpn": Architecture(MOBILENET),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Architecture(MOBILENET, (320, 640)),
    "retinanet_resnet50_fpn": Architecture(RESNET, lr=0.01),
    "retinanet_resnet50_fpn_v2": Architecture(RESNET, lr=0.01),
    "fcos_resnet50_fpn": Architecture(RESNET, lr=0.01),
    "ssd300_vgg16": Architecture(
        VGG16_Weights.IMAGENET1K_FEATURES, (300, 300), resizable=False, lr=0.001
    ),
    "ssdlite320_mobilenet_v3_large": Architecture(
        MOBILENET, (320, 320), resizable=False, lr=0.0125, reduced_tail=True
    ),
}
MODELS = tuple(ARCHITECTURES)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, FrozenBatchNorm2d, nn.GroupNorm)
# The layers whose shape depends on the number of classes, and those that come with them.
CLASS_HEAD_PATTERN = re.compile(
    r"roi_heads\.box_predictor\.|head\.classification_head\.(cls_logits|module_list)\."
)


def build_model(  # noqa: PLR0913 (the options of torchvision's builders)
    name: str,
    num_classes: int,
    *,
    pretrained: str | None,
    backbone_state: dict[str, torch.Tensor] | None = None,
    trainable_backbone_layers: int | None = None,
    freeze_backbone: bool = False,
    train_norm_affine: bool = False,
    backbone: str | None = None,
    anchor_sizes: list[list[float]] | None = None,
    anchor_ratios: list[float] | None = None,
    min_sizes: tuple[int, ...] | None = None,
    max_size: int | None = None,
    fixed_size: tuple[int, int] | None = None,
    rpn_score_thresh: float | None = None,
    max_detections: int | None = None,
    stock: bool = False,
) -> nn.Module:
    """Build a torchvision detector with random weights, except for its backbone.

    Args:
        name: One of `MODELS`.
        num_classes: Includes the background.
        pretrained: The weights that the structure is for: of a "backbone", of a whole "detector",
            or None. With either, torchvision freezes norms and some backbone layers.
        backbone_state: The state_dict of the backbone as a classifier, to be loaded now.
        trainable_backbone_layers: The number of last backbone layers to train; None for
            torchvision's default, 3 of 5 in a ResNet.
        freeze_backbone: Train no backbone layer, and update no statistics of its norms.
        train_norm_affine: Train scale and bias of the frozen norms in backbone layers that train.
        backbone: One of `backbones.RESNETS`; None for the detector's own.
        anchor_sizes: In pixels, by feature level; None for torchvision's anchors.
        anchor_ratios: Height / width of the anchors of each size; None with `anchor_sizes`.
        min_sizes: Shorter sides in pixels: training draws one per image, evaluation uses the last;
            None for torchvision's default.
        max_size: The upper bound of the longer side in pixels; None for torchvision's default.
        fixed_size: Height and width to stretch every image to instead.
        rpn_score_thresh: Proposals below this objectness are dropped; None for 0.
        max_detections: See `limit_detections`; None for torchvision's default, 100 to 300.
        stock: Use only torchvision's classes, without the faster modules of `internals.fast`.

    Raises:
        UserError: The backbone has fewer layers, `backbone_state` does not fit, or there are no
            norms for `train_norm_affine`.
    """
    architecture = ARCHITECTURES[name]
    frozen = pretrained == "backbone" or (
        pretrained == "detector" and not architecture.reduced_tail
    )
    if freeze_backbone:
        trainable_backbone_layers = 0
    if not frozen and trainable_backbone_layers is not None:
        raise UserError(f"the backbone of this {name} cannot be frozen: all of its layers train")
    options = {"min_size": min_sizes, "max_size": max_size} if architecture.resizable else {}
    options["rpn_score_thresh"] = rpn_score_thresh
    options["fixed_size"] = (fixed_size[1], fixed_size[0]) if fixed_size else None  # width, height
    options["trainable_backbone_layers"] = trainable_backbone_layers
    options = {key: value for key, value in options.items() if value is not None}
    model = _build_torchvision(name, backbone, frozen, backbone_state, num_classes, **options)
    if anchor_sizes:
        anchors.set_anchors(model, anchor_sizes, anchor_ratios)
    if freeze_backbone:
        freeze_norms(model.backbone)
    if max_detections is not None:
        limit_detections(model, max_detections)
    if stock:
        return model
    keep_boxes_float32(model)
    use_fast_modules(model)
    if train_norm_affine and not train_affine(model.backbone):
        raise UserError(
            f"--train-norm-affine has no effect: the layers of this {name} that train have no "
            "frozen norms; remove it"
        )
    # The layout that bfloat16 convolutions on CPUs and tensor cores prefer; saves 0.4 GiB.
    return model.to(memory_format=torch.channels_last)


def _build_torchvision(
    name: str,
    backbone: str | None,
    frozen: bool,
    backbone_state: dict[str, torch.Tensor] | None,
    num_classes: int,
    **options,
) -> nn.Module:
    """Call torchvision's builder; `frozen` is for a pretrained backbone."""
    own = ARCHITECTURES[name].backbone
    weights = backbones.default_weights(own, backbone)
    build = backbones.detector_builder(name, own, backbone)
    try:
        with without_download(weights, backbone_state):
            return build(
                weights_backbone=weights if frozen else None, num_classes=num_classes, **options
            )
    except ValueError as error:  # torchvision raises it for a number of layers out of range only
        raise UserError(f"--trainable-backbone-layers: {str(error).strip()}") from error
    except RuntimeError as error:
        expected = classifier_state(weights)
        raise UserError(
            "--weights-backbone does not fit this model: "
            f"{describe_misfit(expected, backbone_state or {}) or error}. It takes the weights of "
            "torchvision's classifier, with its head; those of a detector are for --weights"
        ) from error


def from_checkpoint(saved: dict, stock: bool = False) -> nn.Module:
    """Build the detector of a checkpoint (`checkpoint.load`) with its weights, on the CPU.

    `stock` is that of `build_model`. The model is in evaluation mode.
    """
    args = saved["args"]
    num_classes = Categories.from_list(saved["categories"]).num_classes
    structure = structure_of(args)
    model = build_model(
        args["model"], num_classes, **structure, min_sizes=(args["min_size"],), stock=stock
    )
    load_detector(model, saved["model"], keep_head=True, source="the checkpoint")
    return model.eval()


def structure_of(args: dict) -> dict:
    """Return the options of `build_model` that a checkpoint needs, too.

    Args:
        args: The flags of a run, or those in a checkpoint, also of an earlier version.
    """
    return {
        "pretrained": pretrained_kind(args["weights"], args["weights_backbone"]),
        "freeze_backbone": args.get("freeze_backbone", False),
        **{key: args.get(key) for key in ("backbone", "anchor_sizes", "anchor_ratios")},
        "max_size": args["max_size"],
        "fixed_size": args["fixed_size"],
        "rpn_score_thresh": args["rpn_score_thresh"],
        "max_detections": args.get("max_detections"),
    }


def pretrained_kind(weights: str | None, weights_backbone: str | None) -> str | None:
    """Return `pretrained` of `build_model` for the values of --weights and --weights-backbone."""
    if weights:
        return "detector"
    return None if weights_backbone == "none" else "backbone"


def torchvision_detector(name: str, weights: str) -> tuple[nn.Module, Categories]:
    """Build a detector with torchvision's weights, such as COCO_V1, and return its categories, too.

    The model is in evaluation mode.

    Raises:
        UserError: There are no such weights, or they cannot be downloaded.
    """
    member = find_weights(torchvision.models.get_model_weights(name), weights)
    names = member.meta["categories"]
    model = build_model(name, len(names), pretrained="detector")
    state = download(member, "or use a checkpoint of your own, without --model")
    load_detector(model, state, keep_head=True, source=weights)
    id_to_name = {i: text for i, text in enumerate(names) if text not in ("__background__", "N/A")}
    ids = tuple(id_to_name)
    return model.eval(), Categories(ids=ids, names=tuple(id_to_name.values()), labels=ids)


def limit_detections(model: nn.Module, max_detections: int) -> None:
    """Make a detector return up to `max_detections` objects of an image, of as many candidates."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.detections_per_img = max_detections
        for top_n in (model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n):
            top_n["testing"] = max(top_n["testing"], max_detections)
    else:
        model.detections_per_img = max_detections
        model.topk_candidates = max(model.topk_candidates, max_detections)


def nms_threshold(model: nn.Module) -> float:
    """Return the IoU above which a detector drops the box with the lower score."""
    return _final_stage(model).nms_thresh


def set_nms_threshold(model: nn.Module, threshold: float) -> None:
    """Make a detector drop boxes of a category that overlap more than this IoU."""
    _final_stage(model).nms_thresh = threshold


def _final_stage(model: nn.Module) -> nn.Module:
    return getattr(model, "roi_heads", model)


def freeze_norms(module: nn.Module) -> None:
    """Replace each BatchNorm2d in `module` whose parameters are frozen by a FrozenBatchNorm2d."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not child.weight.requires_grad:
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def has_trainable_norms(model: nn.Module) -> bool:
    """Check whether any BatchNorm of the model updates its statistics in training."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    norm_weight_decay: float | None,
    bias_weight_decay: float | None = None,
) -> list[dict]:
    """Return parameter groups for an optimizer.

    Norms are a group of their own if they have a weight decay of their own, and so are the biases
    of all other layers.
    """
    decays = {"other": weight_decay, "norm": norm_weight_decay, "bias": bias_weight_decay}
    groups = {k: {"params": [], "weight_decay": w} for k, w in decays.items() if w is not None}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "norm" if isinstance(module, NORMS) else name
            if parameter.requires_grad:
                groups.get(kind, groups["other"])["params"].append(parameter)
    return [group for kind, group in groups.items() if group["params"] or kind == "other"]


# ----------------------------------------------------------------------------------- weights


def backbone_weights(
    model_name: str, weights: str, backbone: str | None = None
) -> dict[str, torch.Tensor]:
    """Load the state_dict of a classifier from a file, or download torchvision's of that name."""
    default = backbones.default_weights(ARCHITECTURES[model_name].backbone, backbone)
    if is_file(weights):
        content = load_weights_file(Path(weights), foreign=True)
        expected = classifier_state(default)
        return find_state_dict(content, expected, Path(weights))[0]
    hint = "or start from random weights with --weights-backbone none"
    return download(find_weights(type(default), weights), hint)


def load_pretrained_detector(
    model: nn.Module,
    name: str,
    weights: str,
    categories: Categories,
    head_required: bool,
    anchors_given: bool = True,
) -> None:
    """Load the weights of a whole detector; its class head only if the categories are the same.

    Args:
        model: A detector of `build_model`.
        name: Its name, one of `MODELS`.
        weights: The value of --weights: a file, or the name of torchvision's weights.
        categories: Those of the data.
        head_required: Whether other categories, or other anchors, are an error.
        anchors_given: Whether the user has chosen the anchors of the model.

    Raises:
        UserError: The weights cannot be read or downloaded, do not fit the model, or are for other
            categories although `head_required`.
    """
    if is_file(weights):
        content = load_weights_file(Path(weights), foreign=True)
        state, where = find_state_dict(content, model.state_dict(), Path(weights))
        rows = content.get("categories")
        same = rows == categories.to_list() if rows else same_classes(model, state)
        trained = content.get("args") if "format" in content else None  # of this project only
    else:
        choices = torchvision.models.get_model_weights(name)
        hint = "or use --weights-backbone none instead"
        state, same = download(find_weights(choices, weights), hint), categories.is_coco
        where, trained = weights, {"model": name, "anchor_sizes": None, "anchor_ratios": None}
    if head_required and not same:
        raise UserError(
            f"--weights {weights} was trained on other categories than the data's: fine-tune it "
            "first, without --test-only"
        )
    new_layers, difference = anchors.compare(model, state, trained)
    if difference and not anchors_given:
        anchors.raise_if_forgotten(weights, trained)
    if head_required and difference:
        raise UserError(f"--weights {weights} has other anchors than this model: {difference}. Use "
                        "the --anchor-sizes and --anchor-ratios of its training")  # fmt: skip
    load_detector(model, state, same, f"--weights {weights}", new_layers)
    new_head = f"with a new head for {len(categories.ids)} categories"
    utils.log_field("weights", f"{where}, {'with its head' if same else new_head}")
    before, now = (trained or {}).get("min_size"), model.transform.min_size[-1]
    if before and model.transform.fixed_size is None and before != now:
        size_note = f"trained with --min-size {before}, not {now}: objects will have other sizes"
        utils.log_field("", size_note)
    if difference:
        start = "the layers of their outputs start anew" if new_layers else "all layers are kept"
        utils.log_field("", f"other anchors, {start}: {difference}")


def same_classes(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Check whether a detector's state_dict has as many classes as `model`."""
    return all(
        name in state and state[name].shape == tensor.shape
        for name, tensor in model.state_dict().items()
        if CLASS_HEAD_PATTERN.match(name)
    )


def load_detector(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    keep_head: bool,
    source: str,
    new_layers: Sequence[str] = (),
) -> None:
    """Load a detector's state_dict, except `new_layers`, and the class head if not `keep_head`.

    Raises:
        UserError: The state_dict, from `source`, does not fit the model.
    """
    expected, with_head = model.state_dict(), state
    if not keep_head:
        ours = {key: value for key, value in expected.items() if CLASS_HEAD_PATTERN.match(key)}
        with_head = {k: v for k, v in state.items() if not CLASS_HEAD_PATTERN.match(k)} | ours
    with_head = with_head | {key: expected[key] for key in new_layers}
    try:
        model.load_state_dict(with_head)
    except RuntimeError as error:
        differences = describe_misfit(expected, with_head) or error
        classifiers = [architecture.backbone for architecture in ARCHITECTURES.values()]
        advice = backbones.advise_backbone(expected, state) or advise_misfit(
            expected, state, MODELS, classifiers
        )
        raise UserError(f"{source} does not fit this model: {differences}. {advice}") from error
