"""Which device a process runs on."""

import torch

import utils
from internals.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of this process; with several processes on a machine each has its own."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: this recipe runs on cuda and cpu only")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", utils.local_rank())
        elif utils.world_size() > 1:
            raise UserError(f"--device {name}: under torchrun say cuda, each process takes its own")
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{device}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
    return device
