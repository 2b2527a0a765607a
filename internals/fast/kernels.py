"""Choose the kernels for matching and NMS: Triton's where they run and are right."""

from functools import cache
from types import ModuleType

import torch
from torchvision.models.detection._utils import Matcher

import utils
from internals.fast import plain_kernels


@cache
def kernels_for(device: torch.device) -> ModuleType:
    """Return the module with `match` and `nms` for a device.

    On CUDA these are Triton kernels, unless they do not run or give other results; the reason is
    logged, once per process.
    """
    if device.type != "cuda":
        return plain_kernels
    try:
        from internals.fast import triton_kernels

        problem = find_difference(triton_kernels, device)
    except Exception as error:  # no Triton, no C compiler, an old GPU, ...
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if problem is None:
        return triton_kernels
    utils.log(f"matching and NMS are slower, as Triton kernels cannot be used ({problem})")
    return plain_kernels


def find_difference(kernels: ModuleType, device: torch.device) -> str | None:
    """Compare the kernels on a device with plain PyTorch on the CPU.

    The boxes have integer coordinates, so that no sum or product is rounded.

    Returns:
        What differs, None if the results are equal.
    """
    generator = torch.Generator().manual_seed(0)

    def random_boxes(rows: int, count: int) -> torch.Tensor:
        corners = torch.randint(0, 200, (rows, count, 2), generator=generator)
        sides = torch.randint(1, 100, (rows, count, 2), generator=generator)
        return torch.cat([corners, corners + sides], dim=2).float()

    boxes = random_boxes(3, 700)
    labels = torch.randint(1, 4, boxes.shape[:2], generator=generator)
    valid = torch.rand(boxes.shape[:2], generator=generator) < 0.9
    valid[2] = False
    for options in ((0.7,), (0.5, labels), (0.5, labels, 20)):
        found = kernels.nms(*_to(device, boxes, valid, *options))
        if not torch.equal(found.cpu(), plain_kernels.nms(boxes, valid, *options)):
            return "NMS differs from PyTorch's"
    gt_boxes, counts = random_boxes(3, 16), torch.tensor([16, 0, 5])
    for matcher, candidates in ((Matcher(0.7, 0.3, True), boxes[:1]), (Matcher(0.5, 0.5), boxes)):
        found = kernels.match(*_to(device, gt_boxes, counts, candidates), matcher)
        expected = plain_kernels.match(gt_boxes, counts, candidates, matcher)
        with_boxes = (counts > 0)[:, None]
        for a, b in zip(found, expected, strict=True):
            if not torch.equal(a.cpu() * with_boxes, b * with_boxes):
                return "matching differs from PyTorch's"
    return None


def _to(device: torch.device, *values) -> list:
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]
