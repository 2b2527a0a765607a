import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import split_of

import coco_utils
import samplers
from internals import batch_size
from internals.batches import BatchTargets


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 1000])
def test_largest_batch_search(limit):
    batch_sizes = []

    def fits(images: int) -> bool:
        batch_sizes.append(images)
        return images <= limit

    assert batch_size.search_largest(fits, most=300) == min(limit, 300)
    assert len(batch_sizes) <= 17
    assert max(batch_sizes) <= 300
    assert len(set(batch_sizes)) == len(batch_sizes)


def test_batch_size_is_extrapolated_from_memory():
    """A model of 1,000 and images of 500 each: 17 images fit in 95 % of 10,000."""
    assert batch_size.extrapolate_largest([1500, 2000, 2500], 10_000, most=99) == 17
    assert batch_size.extrapolate_largest([1500, 2000, 2500], 10_000, most=8) == 8
    assert batch_size.extrapolate_largest([1500, 2000, 2500], 1_500, most=99) == 0
    assert (
        batch_size.extrapolate_largest([1500, 1500], 10_000, most=99) == 99
    )  # an image adds less than is measurable


def test_hardest_images_maximize_padding():
    """The padded batch has the largest width and the largest height of its resized images.

    The shortest side is resized to 100 pixels, the longest to at most 150.
    """
    sizes = np.array([(50, 70), (240, 200), (400, 100), (100, 100), (100, 110)])
    together = batch_size.find_hardest_images(sizes, np.zeros(5), 100, 150)
    assert {tuple(sizes[i]) for i in together} == {(50, 70), (400, 100)}  # 150 x 140
    groups = np.array([0, 1, 2, 1, 0])
    apart = batch_size.find_hardest_images(sizes, groups, 100, 150)
    assert {tuple(sizes[i]) for i in apart} == {(50, 70)}  # 100 x 140


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_free_memory_includes_this_process():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (held,) = re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert 1024 * int(held) < batch_size.available_memory() <= total


@pytest.mark.parametrize(
    ("room", "fit", "augmentation"), [(4, 4, "hflip"), (99, 8, "hflip"), (99, 8, "aerial")]
)
def test_find_tries_hardest_images(tiny, capsys, monkeypatch, room, fit, augmentation):
    """On a CPU the batch size is estimated from the memory of 1, 2 and 3 images."""
    index = coco_utils.CocoIndex(split_of(tiny))
    images = np.arange(8)
    dataset = coco_utils.CocoDetection(index, index.categories, images)
    plan = samplers.TrainingPlan(np.tile([0, 1], 4), 2)  # landscape and portrait
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=plan, collate_fn=coco_utils.collate)
    sizes, found = [], set()

    def measure(state, images: list, targets: BatchTargets) -> int:
        sizes.append(len(images))
        found.update(tuple(image.shape[-2:]) for image in images)
        assert targets.box_counts == [2] * len(images)  # the most an image has
        return 100 * len(images)

    monkeypatch.setattr(batch_size, "measure_peak_memory", measure)
    monkeypatch.setattr(batch_size, "available_memory", lambda: int(room * 100 / 0.95 + 1) << 20)
    monkeypatch.setattr(batch_size.preemption, "restore_signal_handlers", lambda: None)
    flags = {"min_size": 64, "max_size": 128, "data_augmentation": augmentation}
    state = argparse.Namespace(device=torch.device("cpu"))
    batch_size.find_largest_batch(state, loader, argparse.Namespace(**flags))
    assert sizes == [1, 1, 2, 3]
    # The padded batch is larger if some images are turned.
    assert found == ({(64, 48), (48, 64)} if augmentation == "aerial" else {(64, 48)})
    output = capsys.readouterr().out
    assert "pixels, before resizing, with 2 boxes each" in output
    assert f"--batch-size {fit} is the largest that fits, estimated" in output
