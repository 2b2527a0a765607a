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


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 1000])
def test_largest_batch_is_found_in_few_tries(limit):
    tried = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= limit

    assert batch_size.largest(fits, most=300) == min(limit, 300)
    assert len(tried) <= 17
    assert max(tried) <= 300
    assert len(set(tried)) == len(tried)


def test_memory_that_must_not_run_out_is_extrapolated():
    """1,000 for the model and 500 for each image: 95 % of 10,000 hold 17 images."""
    assert batch_size.extrapolated([1500, 2000, 2500], 10_000, most=99) == 17
    assert batch_size.extrapolated([1500, 2000, 2500], 10_000, most=8) == 8
    assert batch_size.extrapolated([1500, 2000, 2500], 1_500, most=99) == 0
    assert batch_size.extrapolated([1500, 1500], 10_000, most=99) == 99  # too small to be seen


def test_hardest_images_pad_each_other():
    """Resized to a shortest side of 100: 100 x 140 and 120 x 100 make 120 x 140, but not in one
    group; 400 x 100 is bounded to 150 pixels.
    """
    sizes = np.array([(50, 70), (240, 200), (400, 100), (100, 100), (100, 110)])
    together = batch_size.hardest_images(sizes, np.zeros(5), 100, 150)
    assert {tuple(sizes[i]) for i in together} == {(50, 70), (400, 100)}  # 150 x 140
    groups = np.array([0, 1, 2, 1, 0])
    apart = batch_size.hardest_images(sizes, groups, 100, 150)
    assert {tuple(sizes[i]) for i in apart} == {(50, 70)}  # 100 x 140


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_free_memory_counts_what_this_process_holds():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (held,) = re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert 1024 * int(held) < batch_size.free_memory() <= total


@pytest.mark.parametrize(("room", "fit"), [(4, 4), (99, 8)])
def test_batch_of_the_hardest_images_is_tried(tiny, capsys, monkeypatch, room, fit):
    """On a CPU it is estimated from the memory that 1, 2 and 3 images take."""
    index = coco_utils.CocoIndex(split_of(tiny))
    images = np.arange(8)
    dataset = coco_utils.CocoDetection(index, index.categories, images)
    plan = samplers.TrainingPlan(np.zeros(8, dtype=np.int64), 2)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=plan, collate_fn=coco_utils.collate)
    sizes = []

    def measure(state, images: list, targets: list) -> int:
        sizes.append(len(images))
        assert all(len(target["boxes"]) == 2 for target in targets)  # the most an image has
        return 100 * len(images)

    monkeypatch.setattr(batch_size, "measure_peak_memory", measure)
    monkeypatch.setattr(batch_size, "free_memory", lambda: int(room * 100 / 0.95 + 1) << 20)
    monkeypatch.setattr(batch_size.preemption, "restore_signal_handlers", lambda: None)
    flags = {"min_size": 64, "max_size": 128, "data_augmentation": "hflip"}
    state = argparse.Namespace(device=torch.device("cpu"))

    def to_device(images, targets, device) -> tuple[list, list]:
        return images.to(device), targets

    batch_size.find(state, loader, argparse.Namespace(**flags), to_device)
    assert sizes == [1, 1, 2, 3]
    said = capsys.readouterr().out
    assert "pixels, before resizing, with 2 boxes each" in said
    assert f"--batch-size {fit} is the largest that fits, estimated" in said
