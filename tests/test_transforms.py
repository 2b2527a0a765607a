import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

import transforms


def sample(boxes: list[list[float]]) -> tuple[torch.Tensor, dict]:
    count = len(boxes)
    target = {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.arange(1, count + 1),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "area": torch.arange(count, dtype=torch.float32),
        "image_id": 7,
    }
    return torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8), target


BOXES = [[0.0, 0.0, 20.0, 30.0], [30.0, 10.0, 79.0, 59.0], [5.0, 5.0, 5.5, 50.0]]


@pytest.mark.parametrize("name", transforms.PRESETS)
def test_preset_depends_on_seed_only(name):
    transform = transforms.training_preset(name, 64)
    image, target = sample(BOXES)
    state = torch.get_rng_state()
    results = [transforms.augment(transform, image, target, seed) for seed in (5, 5, *range(6, 12))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])
    changed = [r for r in results if r[0].shape != image.shape or not torch.equal(r[0], image)]
    assert bool(changed) == (name != "none")


@pytest.mark.parametrize("name", transforms.PRESETS)
@pytest.mark.parametrize("boxes", [BOXES, []])
def test_preset_filters_boxes_and_labels_together(name, boxes):
    transform = transforms.training_preset(name, 64)
    image, target = sample(boxes)
    for seed in range(20):
        new, result = transforms.augment(transform, image, target, seed)
        assert new.dtype == torch.uint8
        assert type(new) is torch.Tensor
        assert type(result["boxes"]) is torch.Tensor
        height, width = new.shape[1:]
        limits = torch.tensor([width, height, width, height])
        assert ((result["boxes"] >= 0) & (result["boxes"] <= limits)).all()
        assert (result["boxes"][:, 2:] > result["boxes"][:, :2]).all()
        # labels were 1.. and areas 0.. by row, so the remaining rows must still match
        assert torch.equal(result["labels"] - 1, result["area"].long())
        assert len(result["labels"]) == len(result["boxes"]) == len(result["iscrowd"])
        assert result["image_id"] == 7


def test_hflip_mirrors_boxes():
    image, target = sample(BOXES)
    transform = transforms.training_preset("hflip", 64)
    flipped = 0
    for seed in range(10):
        new, result = transforms.augment(transform, image, target, seed)
        if torch.equal(new, image.flip(2)):
            flipped += 1
            assert result["boxes"][0].tolist() == [60, 0, 80, 30]
        else:
            assert torch.equal(result["boxes"], target["boxes"])
        assert len(result["boxes"]) == 3
    assert 0 < flipped < 10


def test_lsj_returns_square_images():
    transform = transforms.training_preset("lsj", 64)
    shapes = {transforms.augment(transform, *sample(BOXES), seed)[0].shape for seed in range(5)}
    assert shapes == {(3, 64, 64)}


def test_multiscale_training_sizes():
    sizes = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert transforms.training_sizes("multiscale", 800) == sizes
    assert transforms.training_sizes("hflip", 800) == (800,)


@pytest.mark.parametrize("name", transforms.PRESETS)
@pytest.mark.parametrize("fixed_size", [False, True])
def test_too_narrow_images_are_those_that_fail(name, fixed_size):
    """For each preset the narrowest image that is accepted passes, and a narrower one may not."""
    sides = np.arange(1, 600)
    sizes = np.stack([np.full_like(sides, 3000), sides], axis=1)
    narrow = transforms.find_too_narrow(sizes, name, 60, 100, fixed_size)
    first = int(sides[~narrow][0])
    assert narrow[: first - 1].all()
    assert not narrow[first - 1 :].any()
    assert fixed_size or first > 1
    preset = transforms.training_preset(name, 60)
    resize = GeneralizedRCNNTransform(
        transforms.training_sizes(name, 60),
        100,
        [0] * 3,
        [1] * 3,
        fixed_size=(64, 64) if fixed_size else None,
    )
    target = {"boxes": torch.tensor([[5.0, 0, 900, first]]), "labels": torch.ones(1).long()}
    target |= {"iscrowd": torch.zeros(1).long(), "area": torch.ones(1)}
    for seed in range(60):
        image = torch.zeros(3, first, 3000, dtype=torch.uint8)
        image, _ = transforms.augment(preset, image, target, seed)
        resize([image.float()])


def test_unknown_preset_is_rejected():
    with pytest.raises(ValueError, match="unknown augmentation 'mosaic'"):
        transforms.training_preset("mosaic", 800)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (0, [[0, 0, 20, 30], [30, 10, 79, 59]]),
        (1, [[0, 60, 30, 80], [10, 1, 59, 50]]),
        (2, [[60, 30, 80, 60], [1, 1, 50, 50]]),
        (3, [[30, 0, 60, 20], [1, 30, 50, 79]]),
    ],
)
def test_quarter_turns_of_boxes(turns, expected):
    image = tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.tensor(BOXES[:2]), format="XYXY", canvas_size=(60, 80))
    turn = transforms.RandomQuarterTurn()
    new, result = (turn.transform(x, {"turns": turns}) for x in (image, boxes))
    assert result.tolist() == expected
    assert new.shape[-2:] == result.canvas_size == ((60, 80) if turns % 2 == 0 else (80, 60))


def test_aerial_turns_pixels_with_their_boxes_in_eight_ways():
    """Each box is filled with its own value; afterwards it is exactly where these pixels are."""
    image, target = sample([[3, 5, 20, 31], [40, 7, 80, 9], [50, 50, 51, 60]])
    image.fill_(0)
    for value, (x1, y1, x2, y2) in enumerate(target["boxes"].int().tolist(), 1):
        image[:, y1:y2, x1:x2] = value
    image[0, 0, 0] = 99  # the corner tells the orientation
    image[0, 0, 1] = 98
    transform, orientations = transforms.training_preset("aerial", 64), Counter()
    for seed in range(400):
        new, result = transforms.augment(transform, image, target, seed)
        for value, box in enumerate(result["boxes"].tolist(), 1):
            y, x = torch.where(new[1] == value)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert len(x) == (box[2] - box[0]) * (box[3] - box[1])
        places = [tuple(torch.nonzero(new[0] == mark)[0].tolist()) for mark in (99, 98)]
        orientations[tuple(places)] += 1
        assert result["area"].tolist() == [0, 1, 2]
    assert len(orientations) == 8
    assert min(orientations.values()) > 25  # 50 expected; four standard deviations are 26


def test_photometric_keeps_boxes_and_changes_colors():
    image, target = sample(BOXES)
    transform = transforms.training_preset("photometric", 64)
    for seed in range(20):
        new, result = transforms.augment(transform, image, target, seed)
        assert new.dtype == torch.uint8
        mirrored = transforms.augment(v2.RandomHorizontalFlip(1), image, target, 0)[1]["boxes"]
        assert any(torch.equal(result["boxes"], boxes) for boxes in (target["boxes"], mirrored))
        assert not torch.equal(new, image)
        assert not torch.equal(new, image.flip(2))


def test_preset_names():
    assert transforms.preset_name("aerial") == "aerial"
    expected = f"{Path.cwd() / 'a' / 'b.py'}:build"
    assert transforms.preset_name("a/b.py:build") == expected == transforms.preset_name(expected)
    for text in ("mosaic", "b.py", "b.txt:build", ":build"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"invalid choice.*photometric, none, o"
        ):
            transforms.preset_name(text)
