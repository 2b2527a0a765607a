import itertools

import numpy as np
import pytest
from helpers import rewrite, split_of, write_split

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


def test_plan_without_repeats_is_that_of_earlier_versions():
    """The numbers were printed before there were repeats."""
    groups = np.random.default_rng(0).integers(0, 3, 11)
    plan = TrainingPlan(groups, 2, 2, 1, seed=5)
    assert plan.batches(0).tolist() == [[5, 3, 4, 6], [8, 0, 9, 2]]
    assert plan.batches(7).tolist() == [[5, 3, 4, 6], [1, 9, 0, 2]]
    plan.start(7, 1)
    assert list(plan) == [[(0, 8636840434875530895), (2, 12151908989600622437)]]
    plan = TrainingPlan(groups, 4, seed=2**40)  # a seed of two words
    plan.start(3, 1)
    assert next(iter(plan))[:2] == [(10, 2840299632063209070), (0, 11306437165137261978)]


def test_image_seeds_are_distinct():
    triples = itertools.product(range(3), repeat=3)
    seeds = {samplers.image_seed(*triple, copy) for triple in triples for copy in range(3)}
    assert len(seeds) == 81


def index_of(root, categories_of_images: list[list[int]]) -> CocoIndex:
    """Write images with a box for each of the given category ids, 2 or 5."""
    boxes = [[[i, 1, 1, 9, 9] for i in ids] for ids in categories_of_images]
    write_split(root, "train", [(20, 20)] * len(boxes), boxes)
    return CocoIndex(split_of(root))


def test_repeat_factors(tmp_path):
    """Category 2 is in 4 of 8 images, once twice; category 5 in one, beside a 2; one is empty."""
    index = index_of(tmp_path, [[2, 2], [2, 5], [2], [2], [], [], [], []])
    every = np.arange(8)
    of_image, of_category = samplers.repeat_factors(index, every, 0.5)
    assert of_category.tolist() == [1, 2]  # sqrt(0.5 / 0.5), sqrt(0.5 / 0.125)
    assert of_image.tolist() == [1, 2, 1, 1, 1, 1, 1, 1]
    of_image, of_category = samplers.repeat_factors(index, every, 1)
    assert of_category == pytest.approx([2**0.5, 8**0.5])
    assert of_image == pytest.approx([2**0.5, 8**0.5, 2**0.5, 2**0.5, 1, 1, 1, 1])
    # without the empty images the shares are 1 and 1/4
    of_image, of_category = samplers.repeat_factors(index, index.images_with_boxes(), 1)
    assert (of_image.tolist(), of_category.tolist()) == ([1, 2, 1, 1], [1, 2])


def test_crowds_and_categories_without_boxes_do_not_count_as_rare(tmp_path):
    index = index_of(tmp_path, [[2], [5], [2], [2]])
    rewrite(split_of(tmp_path), lambda data: data["annotations"][1].update(iscrowd=1))
    index = CocoIndex(split_of(tmp_path))
    of_image, of_category = samplers.repeat_factors(index, np.arange(4), 0.5)
    assert (of_image.tolist(), of_category.tolist()) == ([1, 1, 1, 1], [1, 1])


def factors_of(count: int) -> np.ndarray:
    """Return factors from 1 to 3.5, half of them 1."""
    return np.random.default_rng(1).uniform(-1.5, 3.5, count).clip(min=1)


@pytest.mark.parametrize("global_batch", [1, 4, 7])
def test_images_are_repeated_in_proportion_to_their_factors(global_batch):
    factors, epochs = factors_of(60), 400
    plan = TrainingPlan(groups_of(60), global_batch, factors=factors)
    assert plan.images == int(factors.sum()) > 60
    assert len(plan) == plan.images // global_batch
    counts = np.zeros((epochs, 60), dtype=int)
    for epoch in range(epochs):
        batches = plan.batches(epoch)
        assert batches.shape == (len(plan), global_batch)  # the same in all epochs
        counts[epoch] = np.bincount(batches.flat, minlength=60)
    expected = factors * (len(plan) * global_batch / factors.sum())
    assert (np.abs(counts - expected) < 1).all()  # rounded down or up
    # The mean of 400 draws of the rest, each 0 or 1, has a standard deviation of 0.025 at most.
    assert counts.mean(axis=0) == pytest.approx(expected, abs=0.1)


def test_repeats_do_not_depend_on_world_size_and_resume_at_any_step():
    groups, factors = groups_of(30), factors_of(30)
    single = TrainingPlan(groups, 4, seed=3, factors=factors)
    single.start(2)
    batches = list(single)
    for world_size in (2, 4):
        for first in (0, 5):
            shares = [
                TrainingPlan(groups, 4 // world_size, world_size, rank, 3, factors)
                for rank in range(world_size)
            ]
            for plan in shares:
                plan.start(2, first)
            assert [
                list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)
            ] == batches[first:]


def test_copies_of_an_image_have_different_seeds():
    plan = TrainingPlan(groups_of(30), 4, seed=3, factors=factors_of(30))
    plan.start(1)
    pairs = [pair for batch in plan for pair in batch]
    copies = {image: [seed for i, seed in pairs if i == image] for image, _ in pairs}
    assert max(map(len, copies.values())) == 4
    assert len({seed for _, seed in pairs}) == len(pairs)
    for image, seeds in copies.items():
        assert seeds == [samplers.image_seed(3, 1, image, copy) for copy in range(len(seeds))]


def test_only_last_batches_mix_groups_with_repeats():
    groups = groups_of(200)
    plan = TrainingPlan(groups, 8, factors=factors_of(200))
    kinds = [len(set(groups[batch])) for batch in plan.batches(0)]
    assert kinds == sorted(kinds, key=lambda kind: kind > 1)
    assert kinds.count(1) >= len(kinds) - 3


def test_keep_empty_selects_images_without_boxes(tiny):
    rewrite(split_of(tiny), lambda data: data.update(annotations=data["annotations"][:3]))
    index = CocoIndex(split_of(tiny))
    assert samplers.select_train_images(index, False, 1, 2).tolist() == [0, 1]
    assert samplers.select_train_images(index, True, 4, 2).tolist() == list(range(8))
    with pytest.raises(UserError, match=r"2 usable images.*8 of a step .4 on each of 2"):
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
