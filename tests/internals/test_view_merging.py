import numpy as np
import pytest

from internals.view_merging import Found, is_cut, merge_views

SIZE = (260, 100)
A, B, C = [0, 0, 100, 100], [80, 0, 180, 100], [160, 0, 260, 100]  # tiles that overlap by 20
WHOLE = [0, 0, 260, 100]


def merge(*rows, nms_threshold: float = 0.5) -> list[tuple]:
    """Merge (box, view, score, group); return (box, score, group) of each result."""
    boxes, views, scores, groups = zip(*rows, strict=True)
    found = Found(
        np.array(boxes, np.float32),
        np.array(scores, np.float32),
        np.array(groups),
        np.array(views, np.float32),
    )
    merged, kept = merge_views(found, SIZE, nms_threshold)
    return [
        (tuple(box), scores[row], groups[row])
        for box, row in zip(merged.tolist(), kept.tolist(), strict=True)
    ]


def test_object_that_is_whole_in_two_tiles_is_found_once():
    row = (85, 20, 95, 30)
    assert merge((row, A, 0.8, 1), ((84, 20, 95, 31), B, 0.9, 1)) == [((84, 20, 95, 31), 0.9, 1)]


def test_part_of_an_object_goes_though_its_score_is_higher():
    part, whole = (85, 20, 100, 40), (85, 20, 130, 40)
    assert merge((part, A, 0.9, 1), (whole, B, 0.6, 1)) == [(whole, 0.6, 1)]


def test_parts_of_an_object_that_is_whole_in_no_tile_are_joined():
    rows = [((60, 20, 100, 40), A, 0.7, 1), ((80, 20, 125, 41), B, 0.9, 1)]
    for order in (rows, rows[::-1]):
        assert merge(*order) == [((60, 20, 125, 41), 0.9, 1)]


@pytest.mark.parametrize("middle", [0.5, 0.95])
def test_parts_in_three_tiles_are_joined(middle):
    rows = [
        ((50, 20, 100, 40), A, 0.9, 1),
        ((160, 20, 200, 40), C, 0.8, 1),
        ((80, 20, 180, 40), B, middle, 1),
    ]
    for order in (rows, rows[::-1], [rows[2], rows[0], rows[1]]):
        assert merge(*order) == [((50, 20, 200, 40), max(0.9, middle), 1)]


def test_parts_of_a_large_object_go_if_the_whole_image_shows_it():
    large = (10, 10, 250, 90)
    parts = [((10, 10, 100, 90), A, 0.9, 1), ((80, 10, 180, 90), B, 0.9, 1)]
    assert merge(*parts, (large, WHOLE, 0.6, 1)) == [(large, 0.6, 1)]


def test_part_that_no_other_tile_explains_is_kept():
    part, other = (60, 20, 100, 40), (90, 60, 130, 80)
    assert merge((part, A, 0.7, 1), (other, B, 0.9, 1)) == [(other, 0.9, 1), (part, 0.7, 1)]


def test_objects_outside_of_what_two_tiles_have_in_common_are_not_compared():
    rows = [((60, 20, 100, 40), A, 0.9, 1), ((160, 60, 180, 70), B, 0.8, 1)]
    assert len(merge(*rows, ((80, 80, 90, 95), B, 0.7, 1))) == 3


def test_other_groups_are_other_objects():
    part, whole = (85, 20, 100, 40), (85, 20, 130, 40)
    kept = merge((part, A, 0.9, 1), (whole, B, 0.6, 2), (whole, B, 0.5, 1))
    assert kept == [(whole, 0.6, 2), (whole, 0.5, 1)]


@pytest.mark.parametrize("group", [0, 90, 100_001, 2**25 + 1, 2**53 - 1])
def test_groups_may_be_any_integers(group):
    """Torchvision moves boxes apart by their group, in the precision of the boxes."""
    rows = [((20, 20, 40, 40), A, 0.9, group), ((22, 20, 42, 40), A, 0.8, group)]
    rows += [((20, 20, 40, 40), A, 0.7, group - 1), ((50, 50, 60, 60), A, 0.6, group)]
    assert [score for _, score, _ in merge(*rows)] == pytest.approx([0.9, 0.7, 0.6])


def test_nms_threshold():
    rows = [((20, 20, 40, 40), A, 0.8, 1), ((22, 20, 42, 40), A, 0.9, 1)]  # IoU 0.82
    assert len(merge(*rows, nms_threshold=0.8)) == 1
    assert len(merge(*rows, nms_threshold=0.85)) == 2


def test_borders_of_the_image_cut_nothing():
    boxes = [(0, 0, 20, 20), (70, 0, 100, 20), (80, 50, 95, 100), (240, 80, 260, 100)]
    views = [A, A, B, C]
    found = Found(np.array(boxes, np.float32), np.ones(4), np.ones(4), np.array(views, np.float32))
    assert is_cut(found, SIZE).tolist() == [False, True, True, False]


def test_nothing_found():
    empty = np.empty((0, 4), np.float32)
    boxes, rows = merge_views(Found(empty, empty[:, 0], np.empty(0, int), empty), SIZE, 0.5)
    assert (boxes.shape, rows.shape) == ((0, 4), (0,))
