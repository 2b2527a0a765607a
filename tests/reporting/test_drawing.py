import numpy as np
import pytest
import torch
from helpers import rewrite, split_of

from coco_utils import CocoIndex
from reporting import drawing


@pytest.mark.parametrize(("width", "height"), [(100, 80), (1, 1), (3000, 30), (640, 480)])
def test_draw_boxes_on_any_image_size(width, height):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[-5.0, -5, width + 9, height + 9], [0, 0, 0.2, 0.2], [0, 0, 0, 0]])
    drawn = drawing.draw_boxes(image, boxes, ["a box", "", "g"], [drawing.category_color(0)] * 3)
    factor = max(1, -(-480 // max(width, height)))
    assert drawn.shape == (3, factor * height, factor * width)
    assert drawn.dtype == torch.uint8
    assert not image.any()
    assert drawn.any()
    assert drawing.draw_boxes(image, boxes[:0], [], []).shape == drawn.shape


def test_touching_boxes_have_a_dark_border():
    image = torch.full((3, 480, 480), 128, dtype=torch.uint8)
    boxes = torch.tensor([[100.0, 100, 200, 200], [200, 100, 300, 200]])
    drawn = drawing.draw_boxes(image, boxes, ["", ""], [(250, 0, 0)] * 2)
    across = drawn[0, 150, 190:210].tolist()
    assert across.count(250) >= 3
    start, end = across.index(250), len(across) - across[::-1].index(250)
    assert min(across[start:end]) < 30


def test_box_texts_do_not_overlap():
    image = torch.zeros(3, 480, 480, dtype=torch.uint8)
    boxes = torch.tensor([[50.0, 50, 300, 300], [52, 50, 300, 300]])
    shades = [(250, 0, 0), (0, 0, 250)]
    both = drawing.draw_boxes(image, boxes, ["some text"] * 2, shades)
    for n, channel in ((0, 0), (1, 2)):
        one = slice(n, n + 1)
        single = drawing.draw_boxes(image, boxes[one], ["some text"], shades[one])
        # The background of the text above the boxes, without their outlines.
        backgrounds = [
            (d[channel, :46] == 250) & (d[2 - channel, :46] == 0) for d in (both, single)
        ]
        assert backgrounds[0].sum() == backgrounds[1].sum() > 300


def test_colours_of_neighbouring_categories_differ():
    shades = np.array([drawing.category_color(n) for n in range(30)])
    assert np.abs(np.diff(shades, axis=0)).sum(axis=1).min() > 150
    assert len({tuple(shade) for shade in shades}) == 30


def has_colour(image: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return bool((image == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(dim=0).any())


def test_comparison_of_ground_truth_and_detections(tiny):
    def change(data):
        data["annotations"][0]["bbox"] = [10, 10, 0, 20]  # the cat of image 100: too narrow to draw

    rewrite(split_of(tiny, "val"), change)
    index = CocoIndex(split_of(tiny, "val"))
    cat, dog = drawing.category_color(0), drawing.category_color(1)
    for i, truth_colours in ((0, set()), (1, {cat, dog})):
        image = torch.zeros_like(index.read_image(i))
        detections = np.array([[index.image_ids[i], 4, 4, 30, 20, 0.9, 5]])
        drawn = drawing.draw_comparison(image, index, i, detections, index.categories)
        left, right = drawn.tensor_split(2, dim=2)
        assert {colour for colour in (cat, dog) if has_colour(left, colour)} == truth_colours
        assert has_colour(right, dog)
        assert not has_colour(right, cat)
        empty = drawing.draw_comparison(image, index, i, detections[:0], index.categories)
        assert empty.shape == drawn.shape
        assert not has_colour(empty.tensor_split(2, dim=2)[1], dog)
