"""Build a torchvision detector, give it weights, and keep its numbers right under autocast.

The class, the parameter names and the state_dict are torchvision's own. `build_model` makes the
same model as torchvision's builder of that name, except that it needs no download to know its
structure: a model that starts from pretrained weights has its norms frozen and its first layers
fixed, one that starts from nothing trains everything.
"""

from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision
from torch import nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights
from torchvision.ops import FrozenBatchNorm2d

from fast import make_fast

BACKBONE_WEIGHTS = {
    "fasterrcnn_resnet50_fpn": ResNet50_Weights,
    "fasterrcnn_resnet50_fpn_v2": ResNet50_Weights,
    "fasterrcnn_mobilenet_v3_large_fpn": MobileNet_V3_Large_Weights,
    "fasterrcnn_mobilenet_v3_large_320_fpn": MobileNet_V3_Large_Weights,
}
MODELS = tuple(BACKBONE_WEIGHTS)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
SIZES = {"fasterrcnn_mobilenet_v3_large_320_fpn": (320, 640)}
HEAD = "roi_heads.box_predictor."


class WeightsError(ValueError):
    """Weights that are unknown, cannot be had or do not fit; the message says what to do."""


def sizes(model_name: str) -> tuple[int, int]:
    """torchvision's own sizes for a model: shortest side and bound of the longest, in pixels."""
    return SIZES.get(model_name, (800, 1333))


def build_model(
    name: str,
    num_classes: int,
    *,
    pretrained: bool,
    trainable_backbone_layers: int | None = None,
    min_sizes: tuple[int, ...] | None = None,
    max_size: int | None = None,
    fixed_size: tuple[int, int] | None = None,
    rpn_score_thresh: float | None = None,
) -> nn.Module:
    """A torchvision detector with random weights, ready for those that `pretrained` promises.

    `num_classes` counts the background. `pretrained` says that weights will be loaded, so that the
    structure is the one torchvision gives a pretrained model: frozen norms (but for v2) and the
    last `trainable_backbone_layers` (3 if None, of 5 in a ResNet and 6 in a MobileNet) trainable.
    `min_sizes` are the shortest sides in pixels of which training draws one and evaluation takes
    the last, `max_size` bounds the longest side; None stands for torchvision's own value.
    `fixed_size` (height, width) stretches every image to this size instead.
    """
    options = {"min_size": min_sizes, "max_size": max_size, "rpn_score_thresh": rpn_score_thresh}
    options["fixed_size"] = fixed_size and (fixed_size[1], fixed_size[0])
    model = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        **{key: value for key, value in options.items() if value is not None},
    )
    body = model.backbone.body
    if pretrained:
        if name != "fasterrcnn_resnet50_fpn_v2":  # which trains its norms, pretrained or not
            freeze_norms(body)
        freeze_layers(body, 3 if trainable_backbone_layers is None else trainable_backbone_layers)
    keep_boxes_float32(model)
    make_fast(model)
    # In this layout convolutions run faster on a CPU and on tensor cores; the numbers stay.
    return model.to(memory_format=torch.channels_last)


def freeze_norms(module: nn.Module) -> None:
    """Replace each BatchNorm2d below `module` by a FrozenBatchNorm2d of the same statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def freeze_layers(body: nn.Module, trainable: int) -> None:
    """Let only the last `trainable` layers of a backbone train, counted as torchvision does.

    For a ResNet: layer4, layer3, layer2, layer1, then conv1 with its norm; for a MobileNet the
    blocks from each stride to the next. Raises WeightsError for a number the backbone lacks.
    """
    names = [name for name, _ in body.named_children()]
    if "layer4" in names:
        starts = [0, *(names.index(f"layer{n}") for n in (1, 2, 3, 4))]
    else:
        strided = [i for i, block in enumerate(body.children()) if getattr(block, "_is_cn", False)]
        starts = [0, *strided, len(names) - 1]
    if not 0 <= trainable <= len(starts):
        raise WeightsError(
            f"--trainable-backbone-layers {trainable}: this backbone has 0 to {len(starts)}"
        )
    first = len(names) if trainable == 0 else starts[len(starts) - trainable]
    for name in names[:first]:
        body.get_submodule(name).requires_grad_(False)


def has_trainable_norms(model: nn.Module) -> bool:
    """Whether a BatchNorm keeps statistics of the training images in this model."""
    return any(isinstance(module, NORMS) for module in model.modules())


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


# ----------------------------------------------------------------------------- precise boxes


def keep_boxes_float32(model: nn.Module) -> None:
    """Keep anchors, box decoding, NMS and losses in float32 under autocast.

    torchvision gives its anchors the type of the feature maps and decodes boxes in the type of the
    predicted offsets. bfloat16 counts in steps of 4 pixels above 512, so boxes would be wrong by as
    much. Features and heads stay in the fast type; only what the heads say is widened.
    """
    model.rpn.anchor_generator.register_forward_pre_hook(_float32_feature_maps)
    model.rpn.head.register_forward_hook(_float32_output)
    model.roi_heads.box_predictor.register_forward_hook(_float32_output)


def _float32_feature_maps(module: nn.Module, args: tuple) -> tuple:
    image_list, feature_maps = args
    # The generator reads only shape, type and device: one number, expanded, has all three.
    stand_ins = [_widen(f.new_zeros(())).expand(f.shape) for f in feature_maps]
    return image_list, stand_ins


def _float32_output(module: nn.Module, args: tuple, output: tuple) -> tuple:
    return tuple(
        [_widen(tensor) for tensor in part] if isinstance(part, list) else _widen(part)
        for part in output
    )


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor


# ----------------------------------------------------------------------------------- weights


def is_file(weights: str) -> bool:
    """Whether a value of --weights or --weights-backbone is a path rather than a name."""
    return Path(weights).suffix in (".pth", ".pt") or Path(weights).exists()


def backbone_weights(model_name: str, weights: str) -> dict[str, torch.Tensor]:
    """The state_dict of the classifier that torchvision has as backbone weights of that name."""
    hint = "or start from random weights with --weights-backbone none"
    return _download(_member(BACKBONE_WEIGHTS[model_name], weights), hint)


def detector_weights(model_name: str, weights: str) -> dict[str, torch.Tensor]:
    """The state_dict of torchvision's whole detector of that name, with COCO's 91 outputs."""
    choices = torchvision.models.get_model_weights(model_name)
    state = _download(_member(choices, weights), "or leave out --weights")
    if model_name == "fasterrcnn_resnet50_fpn":
        _absorb_epsilon(state)
    return state


def _member(choices: type, name: str) -> torchvision.models.WeightsEnum:
    try:
        return choices[name.removeprefix(f"{choices.__name__}.")]
    except KeyError:
        raise WeightsError(
            f"unknown weights {name!r}: choose from {', '.join(choices.__members__)}, "
            "or give the path of a .pth file"
        ) from None


def _download(weights: torchvision.models.WeightsEnum, hint: str) -> dict[str, torch.Tensor]:
    """From torchvision's cache, or over TLS with the hash in the file's name checked."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{weights} cannot be loaded: {error}\n"
            f"Without network, place the file {weights.url}\nat {file}, {hint}"
        ) from error


def _absorb_epsilon(state: dict[str, torch.Tensor]) -> None:
    """Write COCO_V1's norms for an epsilon of 1e-5, the one that a stock model divides with.

    These weights were trained with an epsilon of 0, which torchvision's builder sets again after
    loading. Absorbed in the (frozen) scales, they and all that is trained from them give the same
    detections in any stock model, with no need to know where they came from.
    """
    for key in [key for key in state if key.endswith("running_var")]:
        scale, variance = key.replace("running_var", "weight"), state[key].double()
        state[scale] = (state[scale] * ((variance + 1e-5) / variance).sqrt()).to(state[scale].dtype)


def outputs(state: dict[str, torch.Tensor]) -> int | None:
    """The number of classes, background included, that a detector's state_dict predicts."""
    scores = state.get(f"{HEAD}cls_score.bias")
    return None if scores is None else len(scores)


def load_backbone(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a classifier's state_dict into the detector's backbone, leaving its classifier out."""
    # A MobileNet classifier keeps its blocks in `features`, the detector has them directly.
    names = {key: key.removeprefix("features.") for key in state}
    _load(
        model.backbone.body,
        {name: state[k] for k, name in names.items() if not k.startswith(("fc.", "classifier."))},
        source,
    )


def load_detector(
    model: nn.Module, state: dict[str, torch.Tensor], keep_head: bool, source: str
) -> None:
    """Load a detector's state_dict; without `keep_head` the box predictor stays as it is."""
    if not keep_head:
        ours = {key: value for key, value in model.state_dict().items() if key.startswith(HEAD)}
        state = {**{k: v for k, v in state.items() if not k.startswith(HEAD)}, **ours}
    _load(model, state, source)


def _load(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise WeightsError(
            f"{source} does not fit this model: {reasons[0][:300]}{more}. "
            "Choose the --model that the weights were made for"
        ) from error
