"""Cutting an image into overlapping tiles, and reducing it on the way."""

import numpy as np
import pytest
from PIL import Image

from internals.tiles import core_bounds, cut_tiles, tile_starts


class RecordedRows:
    """Rows of an array; records what is read."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.ranges = pixels, []
        self.height, self.width = pixels.shape[:2]

    def read(self, start: int, stop: int) -> np.ndarray:
        self.ranges.append((start, stop))
        return self.pixels[start:stop]


def make_rows(width: int, height: int) -> RecordedRows:
    rng = np.random.default_rng(0)
    return RecordedRows(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (5, 10, 0.2, [0]),
        (10, 10, 0.2, [0]),
        (11, 10, 0.2, [0, 1]),
        (18, 10, 0.2, [0, 8]),
        (19, 10, 0.2, [0, 4, 9]),
        (26, 10, 0.2, [0, 8, 16]),
        (30, 10, 0, [0, 10, 20]),
        (31, 10, 0, [0, 7, 14, 21]),
        (25, 10, 0.25, [0, 5, 10, 15]),  # 2.5 pixels are 3: steps of at most 7
        (293, 100, 0.07, [0, 64, 128, 193]),
        (286, 100, 0.07, [0, 93, 186]),
        (13, 10, 0.99, [0, 1, 2, 3]),
    ],
)
def test_positions_of_tiles(length, size, overlap, expected):
    assert tile_starts(length, size, overlap) == expected


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_tiles_overlap_enough_and_are_as_few_as_possible(overlap):
    for size in (7, 10, 64):
        longest_step = max(1, int(size - size * overlap + 1e-9))
        for length in range(size + 1, 5 * size):
            starts = tile_starts(length, size, overlap)
            steps = np.diff(starts)
            assert (starts[0], starts[-1]) == (0, length - size)
            assert steps.max() <= longest_step
            assert steps.max() - steps.min() <= 1
            assert (len(starts) - 2) * longest_step < length - size


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (20, 90), (90, 7), (40, 40)])
@pytest.mark.parametrize("overlap", [0, 0.3, 0.8])
@pytest.mark.parametrize("factor", [2, 3, 7, 25])
def test_tiles_are_slices_and_rows_are_read_once(size, overlap, factor):
    rows = make_rows(*size)
    *tiles, whole = cut_tiles(rows, 20, overlap, factor)
    corners = [
        (x, y)
        for y in tile_starts(rows.height, 20, overlap)
        for x in tile_starts(rows.width, 20, overlap)
    ]
    assert [(tile.x, tile.y) for tile in tiles] == corners
    for tile in tiles:
        expected = rows.pixels[tile.y : tile.y + 20, tile.x : tile.x + 20]
        np.testing.assert_array_equal(tile.pixels, expected)
        assert tile.pixels.flags.c_contiguous
        assert tile.factor == 1
    starts, stops = zip(*rows.ranges, strict=True)
    assert starts == (0, *stops[:-1])
    assert stops[-1] == rows.height
    assert whole[:2] == (0, 0)
    assert whole.factor == factor
    np.testing.assert_array_equal(whole.pixels, Image.fromarray(rows.pixels).reduce(factor))


def test_tiles_outlive_their_band():
    rows = make_rows(30, 60)
    iterator = cut_tiles(rows, 20, 0.5)
    first = next(iterator)
    list(iterator)
    np.testing.assert_array_equal(first.pixels, rows.pixels[:20, :20])


@pytest.mark.parametrize("size", [(20, 20), (20, 3), (1, 1)])
def test_image_that_fits_is_one_tile(size):
    rows = make_rows(*size)
    (tile,) = cut_tiles(rows, 20, 0.5, factor=2)
    assert (tile.x, tile.y, tile.factor) == (0, 0, 1)
    np.testing.assert_array_equal(tile.pixels, rows.pixels)


def test_without_factor_there_are_tiles_only():
    assert [tile[:2] for tile in cut_tiles(make_rows(30, 20), 20, 0.5)] == [(0, 0), (10, 0)]


def test_cores_divide_a_side_at_the_middle_of_each_overlap():
    assert core_bounds([0, 8, 16], 10) == {0: (-np.inf, 9), 8: (9, 17), 16: (17, np.inf)}
    assert core_bounds([0], 10) == {0: (-np.inf, np.inf)}
    bounds = core_bounds(tile_starts(1000, 100, 0.3), 100)
    for start, (low, high) in bounds.items():
        # What is not longer than the overlap, and has its middle in the core, is in the tile.
        assert max(low, 15) - 15 >= start
        assert min(high, 985) + 15 <= start + 100
