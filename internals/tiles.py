"""Cut an image into overlapping tiles while its rows are read once, from top to bottom."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image


class Rows(Protocol):
    """The pixels of an image, to be read in order (see `internals.image_rows`)."""

    width: int
    height: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the rows from `start` to before `stop`, uint8 `[stop - start, width, 3]`.

        The first call starts at 0, and each other one where the last one stopped.
        """


class Tile(NamedTuple):
    """A part of an image, or the whole image reduced.

    Attributes:
        x: The column of its upper left corner in the image, in pixels.
        y: The row of its upper left corner in the image, in pixels.
        pixels: uint8 `[h, w, 3]`, a copy.
        factor: The image was reduced by this in both directions; 1 for parts.
    """

    x: int
    y: int
    pixels: np.ndarray
    factor: int


def tile_starts(length: int, size: int, overlap: float) -> list[int]:
    """Return the positions of the tiles along a side of an image, as few as possible.

    The first is 0 and the last ends with the image; the others are spread evenly, in whole pixels.

    Args:
        length: Of the side, in pixels.
        size: Of the tiles, in pixels.
        overlap: Neighbors overlap by at least this share of `size`, from 0 to below 1, but are
            always a pixel apart.

    Returns:
        Ascending positions in pixels; `[0]` if one tile is enough.
    """
    if length <= size:
        return [0]
    # The product may be slightly above a whole number: 0.07 * 100 is 7.000000000000001.
    longest_step = max(1, size - math.ceil(size * overlap - 1e-9))
    last = length - size
    steps = -(-last // longest_step)
    return [last * i // steps for i in range(steps + 1)]


def core_bounds(starts: list[int], size: int) -> dict[int, tuple[float, float]]:
    """Return the core of each tile along a side: what is nearer to its middle than to others'.

    An object whose middle is there and that is not longer than the overlap is whole in the tile.

    Args:
        starts: Of `tile_starts`.
        size: The side of the tiles in pixels.

    Returns:
        The first and last pixel of the core by the start of the tile. At the borders of the image
        it has no bound.
    """
    bounds = [(before + size + after) / 2 for before, after in pairwise(starts)]
    return dict(zip(starts, pairwise([-math.inf, *bounds, math.inf]), strict=True))


def cut_tiles(rows: Rows, size: int, overlap: float, factor: int | None = None) -> Iterator[Tile]:
    """Yield the tiles of an image, from top to bottom and from left to right.

    Each row is read once. Only a band of `size` rows is in memory, beside the rows that are just
    read, and the tiles that the caller keeps.

    Args:
        rows: The image.
        size: Height and width of the tiles in pixels; where a side of the image is shorter, tiles
            are so, too.
        overlap: See `tile_starts`.
        factor: At last, yield the whole image reduced by this number, as `PIL.Image.reduce` does.
            None: do not. An image that is a single tile is never reduced.
    """
    height, width = min(size, rows.height), min(size, rows.width)
    lefts = tile_starts(rows.width, size, overlap)
    tops = tile_starts(rows.height, size, overlap)
    is_reduced = factor is not None and len(lefts) * len(tops) > 1
    reducer = _Reducer(factor) if is_reduced else None
    band = np.empty((height, rows.width, 3), dtype=np.uint8)
    stop = 0  # the rows before this have been read
    for top in tops:
        kept = stop - top
        band[:kept] = band[height - kept :]
        band[kept:] = rows.read(stop, top + height)
        if reducer:
            reducer.add(band[kept:])
        stop = top + height
        for left in lefts:
            yield Tile(left, top, band[:, left : left + width].copy(), 1)
    if reducer:
        yield Tile(0, 0, reducer.finish(), factor)


class _Reducer:
    """Reduces an image whose rows come in order."""

    def __init__(self, factor: int):
        self.factor, self.parts, self.remainder = factor, [], None

    def add(self, rows: np.ndarray) -> None:
        """Reduce the rows `[n, W, 3]`, but for those that are not a multiple of the factor."""
        if self.remainder is not None:
            rows = np.concatenate([self.remainder, rows])
        complete = len(rows) // self.factor * self.factor
        self.reduce(rows[:complete])
        self.remainder = rows[complete:].copy()

    def reduce(self, rows: np.ndarray) -> None:
        if len(rows):
            self.parts.append(np.asarray(Image.fromarray(rows).reduce(self.factor)))

    def finish(self) -> np.ndarray:
        """Return the reduced image, uint8 `[h, w, 3]`."""
        self.reduce(self.remainder)
        return np.concatenate(self.parts)
