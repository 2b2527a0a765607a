"""Packing of batches, and padded targets."""

import pickle

import pytest
import torch

from internals.batches import Batch, BatchTargets

CPU = torch.device("cpu")


def make_samples(counts: tuple[int, ...]) -> tuple[list, list]:
    """Return images of different sizes and memory layouts, and targets with these box counts."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for n, count in enumerate(counts):
        image = torch.randint(0, 256, (5 + n, 7, 3), dtype=torch.uint8, generator=generator)
        image = image.permute(2, 0, 1)
        images.append(image.contiguous() if n % 2 else image)
        boxes = torch.rand(count, 4, generator=generator)
        targets.append({"boxes": boxes, "labels": 1 + torch.arange(count), "image_id": 10 * n})
    return images, targets


@pytest.mark.parametrize("counts", [(2, 0), (0,), (1, 40, 17)])
def test_batch_keeps_values(counts):
    images, targets = make_samples(counts)
    batch = pickle.loads(pickle.dumps(Batch(images, targets)))  # as from a loading process
    assert batch.image_ids == [target["image_id"] for target in targets]
    assert batch.box_counts == list(counts)
    assert batch.most_boxes % 16 == 0
    seeds = [2**64 - 1 - n for n in range(len(images))]
    on_device, moved = batch.to(CPU, seeds)
    for image, value in zip(images, on_device, strict=True):
        assert torch.equal(image.float() / 255, value)
    for target, value, seed in zip(targets, moved, seeds, strict=True):
        assert value.keys() == {"boxes", "labels", "seed"}
        assert torch.equal(value["boxes"], target["boxes"])
        assert torch.equal(value["labels"], target["labels"])
        assert value["seed"] == seed
    assert moved.counts.tolist() == list(counts)
    assert moved.seeds.tolist() == [-1 - n for n in range(len(images))]  # the same bits
    assert moved.boxes[0, counts[0] :].abs().sum() == 0


def test_batch_without_targets():
    images, _ = make_samples((0, 0))
    on_device, targets = Batch(images).to(CPU)
    assert [len(target["boxes"]) for target in targets] == [0, 0]
    assert torch.equal(on_device[1], images[1] / 255)


def test_slices_and_lists_of_targets():
    images, targets = make_samples((3, 0, 20))
    _, packed = Batch(images, targets).to(CPU, [5, 6, 7])
    part = packed[1:]
    assert len(part) == 2
    assert part.counts.tolist() == part.box_counts == [0, 20]
    assert torch.equal(part[1]["boxes"], targets[2]["boxes"])
    padded = BatchTargets.from_list(list(packed))
    for name in ("boxes", "labels", "counts", "seeds"):
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name


def test_missing_seeds_are_drawn():
    targets = [{"boxes": torch.zeros(1, 4), "labels": torch.ones(1, dtype=torch.int64)}] * 2
    torch.manual_seed(0)
    first, second = (BatchTargets.from_list(targets).image_seeds for _ in range(2))
    assert len({*first, *second}) == 4
    torch.manual_seed(0)
    assert BatchTargets.from_list(targets).image_seeds == first
