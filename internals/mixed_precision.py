"""Mixed precision: the dtype of autocast, boxes in float32 under it, skipped steps."""

import platform

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from internals.errors import UserError

ANCHOR_GENERATORS = (AnchorGenerator, DefaultBoxGenerator)
HEADS = (RPNHead, FastRCNNPredictor, RetinaNetHead, FCOSHead, SSDHead, SSDLiteHead)


def resolve_precision(
    device: torch.device, amp: bool, dtype_name: str | None = None
) -> tuple[torch.dtype | None, str]:
    """Choose the dtype of autocast.

    Args:
        device: Where the model runs.
        amp: Whether to use mixed precision.
        dtype_name: "float16" or "bfloat16"; None for float16 on CUDA, bfloat16 on a CPU with
            bfloat16 instructions, and float32 on any other CPU.

    Returns:
        The dtype, None for plain float32, and a description for the log.

    Raises:
        UserError: The device has no mixed precision.
    """
    if amp and device.type == "mps":  # torchvision registers autocast for CPU, CUDA and XPU only
        raise UserError(
            "--amp is not for Apple GPUs, where torchvision's RoIAlign has no mixed precision: "
            "remove it, or use start_scripts/train_fasterrcnn_resnet50_torch.sh"
        )
    if not amp:
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32  # PyTorch's default
        return None, "float32, TF32 in convolutions" if tf32 else "float32"
    if dtype_name is not None:
        return getattr(torch, dtype_name), f"mixed, {dtype_name} (--amp-dtype)"
    if device.type == "cuda":
        return torch.float16, "mixed, float16 with loss scaling"
    if _cpu_has_bfloat16():
        return torch.bfloat16, "mixed, bfloat16"
    return None, "float32: this CPU has no bfloat16 instructions, so --amp would only slow it down"


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast context for a dtype of `resolve_precision`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def initialize_momentum(optimizer: torch.optim.SGD) -> None:
    """Set the momentum of every parameter to 0, before the first step.

    A fused SGD creates it in its first step as memory that the step fills. If the GradScaler skips
    that step, which float16 often makes it do, the next one would use whatever is in this memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _cpu_has_bfloat16() -> bool:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_boxes_float32(model: nn.Module) -> None:
    """Keep anchors, box decoding, NMS and losses in float32 under autocast.

    torchvision computes anchors in the dtype of the feature maps and decodes boxes in the dtype of
    the predicted offsets. bfloat16 has a resolution of 4 pixels above 512, so boxes would be off by
    as much. Features and heads keep the fast dtype; only the output of the heads is converted.
    """
    for module in model.modules():
        if isinstance(module, ANCHOR_GENERATORS):
            module.register_forward_pre_hook(_float32_feature_maps)
        elif isinstance(module, HEADS):
            module.register_forward_hook(_float32_output)


def _float32_feature_maps(module: nn.Module, args: tuple) -> tuple:
    image_list, feature_maps = args
    # The generator reads only shape, dtype and device: expanding one number costs no memory.
    placeholders = [_to_float32(f.new_zeros(())).expand(f.shape) for f in feature_maps]
    return image_list, placeholders


def _float32_output(module: nn.Module, args: tuple, output):
    if isinstance(output, dict):
        return {name: _to_float32(tensor) for name, tensor in output.items()}
    if isinstance(output, tuple | list):
        return type(output)(_float32_output(module, args, part) for part in output)
    return _to_float32(output)


def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor
