import itertools

import numpy as np
import pytest
from helpers import rewrite, split_of

import samplers
from coco_utils import CocoIndex
from internals.errors import DataError, UserError
from samplers import TrainingPlan


def groups_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [10, 37, 60])
def test_epoch_has_each_image_once_except_remainder(world_size, count):
    groups = groups_of(count)
    shares = [TrainingPlan(groups, 2, world_size, rank) for rank in range(world_size)]
    for epoch in range(3):
        seen = []
        for plan in shares:
            plan.start(epoch)
            seen += [image for batch in plan for image, _ in batch]
        assert len(seen) == len(set(seen)) == count - count % (2 * world_size)


def test_remainders_differ_by_epoch():
    plan = TrainingPlan(groups_of(37), 8)
    left_out = [set(range(37)) - set(plan.batches(epoch).flat) for epoch in range(8)]
    assert all(len(images) == 5 for images in left_out)
    assert set().union(*left_out) == set(range(37))
    assert all(not a & b for a, b in itertools.pairwise(left_out))


def test_only_last_batches_mix_aspect_ratio_groups():
    groups = groups_of(200)
    kinds = [len(set(groups[batch])) for batch in TrainingPlan(groups, 4, 2).batches(0)]
    pure = kinds.count(1)
    assert kinds == sorted(kinds, key=lambda kind: kind > 1)
    assert pure >= sum((groups == g).sum() // 8 for g in range(3)) - 1


def test_global_batches_do_not_depend_on_world_size():
    groups = groups_of(21)
    single = TrainingPlan(groups, 2, seed=3)
    halves = [TrainingPlan(groups, 1, 2, rank, seed=3) for rank in range(2)]
    for plan in (single, *halves):
        plan.start(4)
    assert [a + b for a, b in zip(*halves, strict=True)] == list(single)


def test_plan_depends_on_seed_and_epoch():
    groups = groups_of(40)
    plan = TrainingPlan(groups, 4, seed=1)
    first = plan.batches(0)
    assert np.array_equal(first, TrainingPlan(groups, 4, seed=1).batches(0))
    assert not np.array_equal(first, plan.batches(1))
    assert not np.array_equal(first, TrainingPlan(groups, 4, seed=2).batches(0))


def test_start_in_the_middle_of_an_epoch():
    plan = TrainingPlan(groups_of(40), 4)
    plan.start(2)
    batches = list(plan)
    plan.start(2, 3)
    assert list(plan) == batches[3:]
    assert len(plan) == len(batches) == 10


def test_image_seeds_are_distinct():
    seeds = {samplers.image_seed(s, e, i) for s in range(3) for e in range(3) for i in range(3)}
    assert len(seeds) == 27


def test_keep_empty_selects_images_without_boxes(tiny):
    rewrite(split_of(tiny), lambda data: data.update(annotations=data["annotations"][:3]))
    index = CocoIndex(split_of(tiny))
    assert samplers.select_train_images(index, False, 1, 2).tolist() == [0, 1]
    assert samplers.select_train_images(index, True, 4, 2).tolist() == list(range(8))
    with pytest.raises(UserError, match=r"2 usable images.*8 .4 images on each of 2"):
        samplers.select_train_images(index, False, 4, 2)


def test_split_without_boxes_is_rejected(tiny):
    rewrite(split_of(tiny), lambda data: data.update(annotations=[]))
    with pytest.raises(DataError, match=r"instances_train2017.json has no usable box"):
        samplers.select_train_images(CocoIndex(split_of(tiny)), False, 1, 1)


def test_aspect_ratio_groups():
    widths, heights = np.array([640, 480, 500, 1000]), np.array([480, 640, 500, 200])
    assert len(set(samplers.aspect_ratio_groups(widths, heights, 3))) == 4
    assert samplers.aspect_ratio_groups(widths, heights, 0).tolist() == [1, 0, 1, 1]
    assert set(samplers.aspect_ratio_groups(widths, heights, -1)) == {0}


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (1, 3), (4, 1), (4, 2), (8, 3)])
def test_evaluation_batches_have_each_image_once(batch_size, world_size):
    sizes = np.array([(64, 48)] * 11 + [(48, 64)] * 6 + [(50, 50)])
    sizes = np.random.default_rng(0).permutation(sizes)
    shares = [
        samplers.evaluation_batches(sizes, batch_size, world_size, rank)
        for rank in range(world_size)
    ]
    batches = [batch for share in shares for batch in share]
    assert sorted(image for batch in batches for image in batch) == list(range(18))
    assert all(len(set(map(tuple, sizes[batch]))) == 1 for batch in batches)
    assert max(map(len, batches)) == min(batch_size, 11)
    images = [sum(map(len, share)) for share in shares]
    assert max(images) - min(images) <= batch_size
