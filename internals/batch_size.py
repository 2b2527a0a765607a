"""How many images fit into memory at once: the largest batch, found by trying."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import utils
from internals import preemption
from internals.errors import UserError
from internals.mixed_precision import autocast
from internals.train_state import TrainState

SHARE = 0.95  # of the memory may be used: allocators leave gaps


def find(
    state: TrainState, loader, args: argparse.Namespace, to_device: Callable[..., tuple]
) -> None:
    """Log the largest batch of the hardest images that fits into memory in a training step.

    Args:
        state: its weights are changed.
        loader: of a `coco_utils.CocoDetection`, with a `samplers.TrainingPlan`.
        args: of them `min_size, max_size, data_augmentation`.
        to_device: `engine.to_device`.

    Raises:
        UserError: not even one image fits.
    """
    preemption.restore_signal_handlers()  # there is nothing to save
    dataset, squares = loader.dataset, args.data_augmentation == "lsj"
    stored = dataset.index.sizes[dataset.images]
    pair = hardest_images(stored, loader.batch_sampler.groups, args.min_size, args.max_size)
    boxes = int(np.bincount(dataset.index.image_of_rows()[dataset.index.usable]).max(initial=1))
    shapes = " and ".join(f"{w} x {h}" for w, h in {tuple(stored[i].tolist()) for i in pair})
    utils.log(f"trying images of {shapes} pixels, before resizing, with {boxes} boxes each")

    def peak(images: int) -> int | None:
        # An augmentation that makes squares is applied, as it decides the size.
        keys = [(pair[n % 2], 0) if squares else pair[n % 2] for n in range(images)]
        batch = loader.collate_fn([hard_sample(*dataset[key], boxes) for key in keys])
        memory = measure_peak_memory(state, *to_device(*batch, state.device))
        utils.log(f"  batch of {images}: {'too many' if memory is None else f'{memory:,} MiB'}")
        return memory

    if state.device.type == "cuda":
        fit, how = largest(lambda images: peak(images) is not None, len(stored)), "by trying"
    else:  # where memory runs out on a CPU the system kills somebody, so it is not tried
        peaks = [peak(n) for n in (1, 1, 2, 3)][1:]  # the first step makes the optimizer's state
        limit = free_memory()
        fit = extrapolated(peaks, limit >> 20, len(stored))
        how = f"estimated for the {limit / 2**30:.1f} GiB that are free or its own now"
    if not fit:
        raise UserError("not even one image fits: lower --min-size, or choose a smaller --model")
    utils.log(f"--batch-size {fit} is the largest that fits, {how}")


def measure_peak_memory(
    state: TrainState, images: list[torch.Tensor], targets: list[dict]
) -> int | None:
    """The most memory in MiB that training has taken, after a step with this batch.

    None if the batch does not fit. Changes the weights.
    """
    state.model.train()
    try:
        with autocast(state.device, state.amp_dtype):
            losses = state.model(images, targets)
        state.scaler.scale(sum(losses.values())).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return utils.peak_memory(state.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        state.optimizer.zero_grad()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()


def hard_sample(image: torch.Tensor, target: dict, boxes: int) -> tuple[torch.Tensor, dict]:
    """A sample of `CocoDetection`, but with so many boxes."""
    height, width = image.shape[-2:]
    corners = torch.rand(boxes, 2, generator=torch.Generator().manual_seed(boxes)) / 2
    xyxy = torch.cat([corners, corners + 0.3], dim=1) * torch.tensor([width, height] * 2)
    return image, {**target, "boxes": xyxy, "labels": torch.ones(boxes, dtype=torch.int64)}


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `fits` is true; 0 if it is not even for 1.

    Doubles the number until it is too large, then halves the distance.
    """
    good, size = 0, 1
    while size <= most and fits(size):
        good, size = size, 2 * size
    bad = min(size, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def extrapolated(peaks: Sequence[int], limit: int, most: int) -> int:
    """The same from the memory that 1, 2, ... images took at most, where it must not run out.

    `peaks` ascend, in the unit of `limit`, two of them or more.
    """
    per_image = max(1, (peaks[-1] - peaks[0]) / (len(peaks) - 1))
    return int(min(most, max(0, 1 + (SHARE * limit - peaks[0]) // per_image)))


def hardest_images(
    sizes: np.ndarray, groups: np.ndarray, min_size: int, max_size: int
) -> tuple[int, int]:
    """The positions of two images that make the largest padded batch which one group can.

    `sizes` `[I, 2]` as width, height of the stored images, `groups` `[I]` those that batches are
    filled from; images are resized to a shortest side of `min_size` and a longest of at most
    `max_size`.
    """
    sizes = sizes.astype(np.float64)
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))
    resized = sizes * scale[:, None]
    found = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        wide, high = members[resized[members].argmax(axis=0)]
        found.append((resized[wide, 0] * resized[high, 1], int(wide), int(high)))
    return max(found)[1:]


def free_memory() -> int:
    """The bytes of memory that this process has or could get; 16 GiB if the system does not tell.

    On Linux what is free now counts, elsewhere on POSIX all that the machine has.
    """
    limits = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        file = Path("/sys/fs/cgroup") / name
        if file.exists() and file.read_text().strip().isdigit():
            limits.append(int(file.read_text()))
    information = Path("/proc/meminfo")
    if information.exists():
        free = re.search(r"MemAvailable:\s*(\d+)", information.read_text())
        mine = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())
        limits.append(1024 * (int(free[1]) + int(mine[1])))
    elif sys.platform != "win32":
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=2**34)
