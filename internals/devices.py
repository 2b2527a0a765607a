"""Choose the device of a process."""

import torch

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
        raise UserError(f"--device {name}: use cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name} is not supported: use cuda or cpu")
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
