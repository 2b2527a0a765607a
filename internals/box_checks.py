"""Check the boxes and areas of a data set in COCO format."""

from collections.abc import Iterator

import numpy as np

from internals.annotations import (
    BORDER_TOLERANCE,
    MAX_EXAMPLES,
    MIN_BOX_SIDE,
    DataIssue,
    implausible_areas,
)

# The shares of boxes from which on they are taken for something else than COCO's.
MOST, SOME, FEW = 0.98, 0.15, 20


def find_box_issues(index, trust_boxes: bool) -> Iterator[DataIssue]:
    """Find the issues of annotations; those that clipping or dropping resolves are not fatal.

    Args:
        index: A `coco_utils.CocoIndex`.
        trust_boxes: Whether boxes may look like shares of the image or corners (--trust-boxes).
    """
    has_id = index.annotation_ids >= 0
    repeated = has_id & is_repeated(np.where(has_id, index.annotation_ids, -1))
    unknown = ~np.isin(index.category_ids, index.categories.ids)
    yield _row_issue(index, "annotations with a repeated id", np.flatnonzero(repeated))
    yield _row_issue(index, "annotations with an undefined category_id", np.flatnonzero(unknown))
    in_other_units = [] if trust_boxes else list(_unit_issues(index))
    yield from in_other_units or _position_issues(index)
    if in_other_units:
        return
    yield _row_issue(
        index,
        "areas that are not positive, larger than twice their box, or in other units",
        np.flatnonzero(implausible_areas(index.boxes, index.areas) & index.usable),
        remedy="Width x height is used instead, for the AP of small, medium and large objects",
        fatal=False,
    )
    yield _row_issue(
        index,
        "boxes that repeat one of the same image and category",
        _repeated_boxes(index),
        remedy="They train and count twice: remove them, if the file was imported twice",
        fatal=False,
    )


def _position_issues(index) -> Iterator[DataIssue]:
    """Find boxes without a size, and those not in their image."""
    rows = np.flatnonzero(~_is_inside_image(index))
    x, y, width, height = index.boxes[rows].T
    image_width, image_height = index.sizes[_images_of_rows(index, rows)].T
    broken = ~np.isfinite(index.boxes[rows]).all(axis=1)
    negative = ((width < 0) | (height < 0)) & ~broken
    empty = ((width == 0) | (height == 0)) & ~broken & ~negative
    beyond = (x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0)
    outside = beyond & ~index.iscrowd[rows] & ~broken & ~negative & ~empty
    thin = ~index.usable[rows] & ~index.iscrowd[rows] & ~(broken | negative | empty | outside)
    across = np.minimum(x, y) <= -BORDER_TOLERANCE
    across |= x + width >= image_width + BORDER_TOLERANCE
    across |= y + height >= image_height + BORDER_TOLERANCE
    across &= ~(broken | negative | empty | outside | thin)
    yield _row_issue(index, "annotations with NaN or infinity in their bbox", rows[broken])
    yield _row_issue(index, "boxes wholly outside their image", rows[outside])
    dropped = {"remedy": "They neither train nor count", "fatal": False}
    yield _row_issue(index, "boxes of negative width or height", rows[negative], **dropped)
    yield _row_issue(index, "boxes of zero width or height", rows[empty], **dropped)
    name = f"boxes thinner than {MIN_BOX_SIDE} pixels within their image"
    yield _row_issue(index, name, rows[thin], **dropped)
    clipped = {"remedy": "They are clipped to it", "fatal": False}
    yield _row_issue(index, "boxes partly outside their image", rows[across], **clipped)


def _is_inside_image(index) -> np.ndarray:
    """Return for each box whether it has a size and is wholly inside its image, bool `[M]`."""
    x, y, width, height = index.boxes.T
    image_width, image_height = index.sizes[index.image_of_rows()].T
    inside = (x >= 0) & (y >= 0) & (width >= MIN_BOX_SIDE) & (height >= MIN_BOX_SIDE)
    return inside & (x + width <= image_width) & (y + height <= image_height)


def _unit_issues(index) -> Iterator[DataIssue]:
    """Find out whether boxes are in other units than pixels, or corners or centers."""
    rows = np.flatnonzero((index.boxes[:, 2:] > 0).all(axis=1) & ~index.iscrowd)
    if not len(rows):
        return
    boxes = index.boxes[rows]
    x, y, width, height = boxes.T
    image_width, image_height = index.sizes[index.image_of_rows()[rows]].T
    shortest = np.minimum(image_width, image_height)
    in_unit = ((boxes >= 0) & (boxes <= 1)).all(axis=1) & (shortest > 2)
    in_percent = (np.maximum(x + width, y + height) <= 100.5) & (shortest >= 300)
    in_percent &= min((x + width).max(), (y + height).max()) > 90 and len(rows) >= FEW
    for small, unit in ((in_unit, "1, as shares"), (in_percent, "100, as percentages")):
        if small.mean() > MOST:
            kind = f"boxes from 0 to {unit} of the image, {small.mean():.0%} of all"
            remedy = "multiply them by the size of the image" + " / 100" * (small is in_percent)
            yield _other_unit(index, kind, rows[small], remedy)
            return
    # By more than the rounding of a tool, which is a pixel or two.
    beyond = (x + width > 1.05 * image_width) | (y + height > 1.05 * image_height)
    corners = (width > x) & (height > y) & (width <= image_width) & (height <= image_height)
    centers = (np.minimum(x - width / 2, y - height / 2) >= -1) & (x + width / 2 < image_width + 1)
    centers &= y + height / 2 < image_height + 1
    for inside, unit, remedy in (
        (corners, "x1, y1, x2, y2", "subtract x1 and y1 from the last two"),
        (centers, "center x, center y, width, height", "subtract half of the size from the center"),
    ):
        if inside.mean() > MOST and beyond.mean() > SOME and beyond.sum() >= 3:
            kind = f"boxes that reach out of their image, {beyond.mean():.0%} of all, but would not"
            yield _other_unit(index, f"{kind} as {unit}", rows[beyond], remedy)
            return


def _other_unit(index, kind: str, rows: np.ndarray, remedy: str) -> DataIssue:
    remedy = f"COCO's are x, y, width, height in pixels: {remedy}, or add --trust-boxes if they are"
    return _row_issue(index, kind, rows, remedy=remedy)


def _repeated_boxes(index) -> np.ndarray:
    """Return the rows that repeat a box of the same image and category, except for the first."""
    rows = np.flatnonzero(index.usable)
    keys = np.column_stack([index.image_of_rows(), index.category_ids, index.boxes])[rows]
    # A sum for each row, as sorting by all columns would take a second for COCO.
    sums = (keys * np.random.default_rng(0).random(keys.shape[1])).sum(axis=1)
    candidates = np.flatnonzero(is_repeated(sums))
    _, first = np.unique(keys[candidates], axis=0, return_index=True)
    return rows[np.setdiff1d(candidates, candidates[first])]


def is_repeated(values: np.ndarray) -> np.ndarray:
    """Return for each value whether it occurs more than once, bool."""
    ordered = np.sort(values)
    return np.isin(values, ordered[1:][ordered[1:] == ordered[:-1]])


def _row_issue(index, kind: str, rows: np.ndarray, **details) -> DataIssue:
    image_ids = index.image_ids[_images_of_rows(index, rows[:MAX_EXAMPLES])]
    ids = index.annotation_ids[rows[:MAX_EXAMPLES]]
    examples = [
        f"annotation {i} of image {image_id}" for i, image_id in zip(ids, image_ids, strict=True)
    ]
    return DataIssue(kind, examples, len(rows), **details)


def _images_of_rows(index, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.offsets, rows, side="right") - 1
