"""Matching and NMS: by Triton kernels where they run and are right, else in plain PyTorch."""

from functools import cache
from types import ModuleType

import torch
from torchvision.models.detection._utils import Matcher

import utils
from internals.fast.matching import match_plain
from internals.fast.nms import nms_plain


def match(
    gt_boxes: torch.Tensor, counts: torch.Tensor, boxes: torch.Tensor, matcher: Matcher
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the boxes of a batch; see `matching.match_plain`."""
    kernels = usable_kernels(boxes.device)
    return (kernels.match if kernels else match_plain)(gt_boxes, counts, boxes, matcher)


def nms(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    threshold: float,
    labels: torch.Tensor | None = None,
    limit: int | None = None,
) -> torch.Tensor:
    """Suppress overlapping boxes of a batch; see `nms.nms_plain`."""
    kernels = usable_kernels(boxes.device)
    return (kernels.nms if kernels else nms_plain)(boxes, valid, threshold, labels, limit)


@cache
def usable_kernels(device: torch.device) -> ModuleType | None:
    """Return `triton_kernels`, or None if they do not run on the device or give other results.

    The reason is logged, once per process.
    """
    if device.type != "cuda":
        return None
    try:
        from internals.fast import triton_kernels

        problem = find_difference(triton_kernels, device)
    except Exception as error:  # no Triton, no C compiler, an old GPU, ...
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if problem is None:
        return triton_kernels
    utils.log(f"matching and NMS are slower, as Triton kernels cannot be used ({problem})")
    return None


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
        if not torch.equal(found.cpu(), nms_plain(boxes, valid, *options)):
            return "NMS differs from PyTorch's"
    gt_boxes, counts = random_boxes(3, 16), torch.tensor([16, 0, 5])
    for matcher, candidates in ((Matcher(0.7, 0.3, True), boxes[:1]), (Matcher(0.5, 0.5), boxes)):
        found = kernels.match(*_to(device, gt_boxes, counts, candidates), matcher)
        expected = match_plain(gt_boxes, counts, candidates, matcher)
        with_boxes = (counts > 0)[:, None]
        for a, b in zip(found, expected, strict=True):
            if not torch.equal(a.cpu() * with_boxes, b * with_boxes):
                return "matching differs from PyTorch's"
    return None


def _to(device: torch.device, *values) -> list:
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]
