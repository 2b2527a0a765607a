"""Choose the device of a process, and what it cannot do.

Apple GPUs ("mps") have no float64, and known errors that this recipe avoids: copies that are not
blocking may copy what is no longer there (pytorch issues 139550 and 189690), BatchNorm has wrong
gradients for channels-last feature maps (175189), and torchvision before 0.29 had wrong gradients
in RoIAlign (vision 9510).
"""

import re

import torch
import torchvision
from torch import nn

import utils
from internals.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Choose the device of this process; each process of a machine gets its own GPU.

    Raises:
        UserError: The device does not exist or is not supported.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cuda, cuda:N, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name} is not supported: use cuda, mps or cpu")
    if device.type == "mps":
        _check_mps(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", utils.local_rank())
        elif utils.world_size() > 1:
            raise UserError(
                f"--device {name} is for one process: with several use --device cuda, as each "
                "process takes its own GPU"
            )
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"{device} does not exist, there are {torch.cuda.device_count()} CUDA devices: "
                "choose another --device, or start fewer processes"
            )
        torch.cuda.set_device(device)
    return device


def _check_mps(name: str) -> None:
    if not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch finds no Apple GPU here: use cuda or cpu")
    version = tuple(map(int, re.findall(r"\d+", torchvision.__version__)[:2]))
    if version < (0, 29):
        raise UserError(
            f"--device {name} needs torchvision 0.29 or newer, but {torchvision.__version__} is "
            "installed, whose RoIAlign has wrong gradients on Apple GPUs: update torch and "
            "torchvision, or use --device cpu"
        )
    if utils.world_size() > 1:
        raise UserError(f"--device {name} is for one process: start it without torchrun")


def no_gpu_note() -> str:
    """Return what to log with a default of "cpu"."""
    other = "; --device mps uses the Apple GPU" if torch.backends.mps.is_available() else ""
    return f" (no CUDA device found{other})"


def move_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, in the memory layout that is right there."""
    if device.type == "mps":
        use_contiguous_format(model)
    return model.to(device)


def use_contiguous_format(model: nn.Module) -> None:
    """Undo channels-last for all parameters, in place, so that no feature map gets it."""
    for parameter in model.parameters():
        # A clone: 1 x 1 kernels count as contiguous already, but convolutions read their strides.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def precise_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of losses: float64, or float32 where there is no other."""
    return torch.float32 if device.type == "mps" else torch.float64
