"""Find the largest batch size that fits into memory (--find-batch-size)."""

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
from internals.batches import BatchTargets
from internals.custom_augmentation import is_custom
from internals.errors import UserError
from internals.mixed_precision import autocast
from internals.train_state import TrainState

USABLE_SHARE = 0.95  # of the free memory: allocators fragment it


def find_largest_batch(state: TrainState, loader, args: argparse.Namespace) -> None:
    """Log the largest batch of the hardest images that fits into memory in a training step.

    Args:
        state: The training; its weights are changed.
        loader: Loads a `coco_utils.CocoDetection` with a `samplers.TrainingPlan`.
        args: `min_size`, `max_size` and `data_augmentation` are used.

    Raises:
        UserError: One image does not fit.
    """
    preemption.restore_signal_handlers()  # nothing to save
    dataset, name = loader.dataset, args.data_augmentation
    sizes, groups = dataset.index.sizes[dataset.images], loader.batch_sampler.groups
    count = len(sizes)
    if name == "aerial":  # a batch may have turned images beside others: those from `count` on
        sizes, groups = np.concatenate([sizes, sizes[:, ::-1]]), np.tile(groups, 2)
    pair = find_hardest_images(sizes, groups, args.min_size, args.max_size)
    boxes = int(np.bincount(dataset.index.image_of_rows()[dataset.index.usable]).max(initial=1))
    shapes = " and ".join(f"{w} x {h}" for w, h in sorted({tuple(sizes[i].tolist()) for i in pair}))
    utils.log(f"trying images of {shapes} pixels, before resizing, with {boxes} boxes each")
    augmented = name == "lsj" or is_custom(name)  # these determine the size, with one seed for all

    def load(i: int) -> tuple[torch.Tensor, dict]:
        image, target = dataset[(i % count, 0) if augmented else i % count]
        return make_hard_sample(image if i < count else image.transpose(1, 2), target, boxes)

    def measure(images: int) -> int | None:
        batch = loader.collate_fn([load(pair[n % 2]) for n in range(images)])
        memory = measure_peak_memory(state, *batch.to(state.device))
        result = "does not fit" if memory is None else f"{memory:,} MiB"
        utils.log(f"  batch of {images}: {result}")
        return memory

    if state.device.type == "cuda":
        size = search_largest(lambda images: measure(images) is not None, count)
        source = "measured"
    else:  # out of memory on a CPU, the system kills processes: extrapolate instead
        peaks = [measure(n) for n in (1, 1, 2, 3)][1:]  # the first creates the optimizer state
        limit = available_memory()
        size = extrapolate_largest(peaks, limit >> 20, count)
        source = f"estimated for {limit / 2**30:.1f} GiB of available memory"
    if not size:
        raise UserError("one image does not fit: lower --min-size or use a smaller --model")
    utils.log(f"--batch-size {size} is the largest that fits, {source}")


def measure_peak_memory(
    state: TrainState, images: list[torch.Tensor], targets: BatchTargets
) -> int | None:
    """Train one step on a batch, and return the peak memory of this process so far.

    Returns:
        MiB; None if the batch does not fit.
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


def make_hard_sample(image: torch.Tensor, target: dict, boxes: int) -> tuple[torch.Tensor, dict]:
    """Return a sample of `CocoDetection` with its boxes replaced by this number of boxes."""
    height, width = image.shape[-2:]
    corners = torch.rand(boxes, 2, generator=torch.Generator().manual_seed(boxes)) / 2
    xyxy = torch.cat([corners, corners + 0.3], dim=1) * torch.tensor([width, height] * 2)
    return image, {**target, "boxes": xyxy, "labels": torch.ones(boxes, dtype=torch.int64)}


def search_largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` for which `fits` is true, 0 if there is none.

    Doubles the number until it does not fit, then bisects.
    """
    good, size = 0, 1
    while size <= most and fits(size):
        good, size = size, 2 * size
    bad = min(size, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def extrapolate_largest(peaks: Sequence[int], limit: int, most: int) -> int:
    """Estimate the largest batch up to `most` from the peak memory of smaller ones.

    Args:
        peaks: The peak memory with 1, 2, ... images, ascending, at least two of them.
        limit: The available memory, in the same unit.
        most: An upper bound of the result.
    """
    per_image = max(1, (peaks[-1] - peaks[0]) / (len(peaks) - 1))
    return int(min(most, max(0, 1 + (USABLE_SHARE * limit - peaks[0]) // per_image)))


def find_hardest_images(
    sizes: np.ndarray, groups: np.ndarray, min_size: int, max_size: int
) -> tuple[int, int]:
    """Find the two images of one group whose padded batch is the largest.

    Args:
        sizes: `[I, 2]`, width and height of the stored images.
        groups: `[I]`, the group of each image; a batch has images of one group.
        min_size: Images are resized to this shortest side,
        max_size: but to at most this longest side.

    Returns:
        The positions of the images; they may be equal.
    """
    sizes = sizes.astype(np.float64)
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))
    resized = sizes * scale[:, None]
    candidates = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        wide, high = members[resized[members].argmax(axis=0)]
        candidates.append((resized[wide, 0] * resized[high, 1], int(wide), int(high)))
    return max(candidates)[1:]


def available_memory() -> int:
    """Return the bytes of memory that this process uses or can still allocate.

    On Linux this is the memory in use by the process plus the free memory, on other POSIX systems
    the memory of the machine, elsewhere 16 GiB.
    """
    limits = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # limits of a container
        file = Path("/sys/fs/cgroup") / name
        if file.exists() and file.read_text().strip().isdigit():
            limits.append(int(file.read_text()))
    information = Path("/proc/meminfo")
    if information.exists():
        free = re.search(r"MemAvailable:\s*(\d+)", information.read_text())
        used = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())
        limits.append(1024 * (int(free[1]) + int(used[1])))
    elif sys.platform != "win32":
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=2**34)
