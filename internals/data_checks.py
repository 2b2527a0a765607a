"""Check a data set in COCO format, and report its errors by kind.

`check_annotations` runs before every training; it needs only the annotation file and a listing of
the image folder. `check_all` (--check-data) and `drop_bad_images` (--max-bad-images) open every
image, which takes minutes for a large data set. A bad image that first shows during a training
ends it (`coco_utils.CocoDetection`). `index` is a `coco_utils.CocoIndex` throughout.
"""

import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import utils
from internals import file_names
from internals.annotations import MAX_EXAMPLES, DataIssue
from internals.errors import DataError
from internals.images import MAX_PIXELS

# In pixels: smaller excesses are rounding errors of the annotation tool.
BORDER_TOLERANCE = 0.01


def raise_if_fatal(index, issues: Iterable[DataIssue]) -> None:
    """Raise one DataError with all fatal issues, if there are any."""
    fatal = [str(issue) for issue in issues if issue.fatal]
    if fatal:
        separator = "\n  " if len(fatal) > 1 else " "
        raise DataError(f"{index.annotation_file}:{separator}{separator.join(fatal)}")


# ------------------------------------------------------------ the check without opening images


def find_issues(index, missing: bool = True) -> list[DataIssue]:
    """Find all issues that can be found without opening an image.

    An issue is fatal unless dropping or clipping boxes resolves it.

    Args:
        index: The data set.
        missing: Whether to include file names without a file.
    """
    issues = [*index.issues, *_image_issues(index), *_file_issues(index), *_box_issues(index)]
    return [
        issue for issue in issues if issue.count and (missing or issue.kind not in file_names.KINDS)
    ]


def _image_issues(index) -> Iterator[DataIssue]:
    yield _image_issue(index, "images with a repeated id", _is_repeated(index.image_ids))
    sizes = index.sizes.astype(np.int64)
    yield _image_issue(index, "images without a positive size", (sizes <= 0).any(axis=1))
    yield _image_issue(
        index,
        f"images of more than {MAX_PIXELS:,} pixels",
        sizes.prod(axis=1) > MAX_PIXELS,
        remedy="Downscale the images and their boxes",
    )


def _file_issues(index) -> Iterator[DataIssue]:
    yield from file_names.find_issues(
        index.file_names, index.file_problems, index.image_ids, index.image_dir
    )
    yield _image_issue(
        index,
        "images with a repeated file name",
        _is_repeated(index.file_names),
        remedy="All of them are used",
        fatal=False,
    )


def _box_issues(index) -> Iterator[DataIssue]:
    has_id = index.annotation_ids >= 0
    repeated = has_id & _is_repeated(np.where(has_id, index.annotation_ids, -1))
    unknown = ~np.isin(index.category_ids, index.categories.ids)
    yield _row_issue(index, "annotations with a repeated id", np.flatnonzero(repeated))
    yield _row_issue(index, "annotations with an undefined category_id", np.flatnonzero(unknown))
    rows = _rows_not_inside(index)
    x, y, width, height = index.boxes[rows].T
    image_width, image_height = index.sizes[_images_of_rows(index, rows)].T
    broken = ~np.isfinite(index.boxes[rows]).all(axis=1)
    negative = ((width < 0) | (height < 0)) & ~broken
    empty = ((width == 0) | (height == 0)) & ~broken & ~negative
    beyond = (x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0)
    outside = beyond & index.usable[rows] & ~broken
    across = np.minimum(x, y) < -BORDER_TOLERANCE
    across |= x + width > image_width + BORDER_TOLERANCE
    across |= y + height > image_height + BORDER_TOLERANCE
    across &= ~(broken | negative | empty | outside)
    yield _row_issue(index, "annotations with NaN or infinity in their bbox", rows[broken])
    yield _row_issue(index, "boxes wholly outside their image", rows[outside])
    dropped = {"remedy": "They are dropped", "fatal": False}
    yield _row_issue(index, "boxes of negative width or height", rows[negative], **dropped)
    yield _row_issue(index, "boxes of zero width or height", rows[empty], **dropped)
    clipped = {"remedy": "They are clipped to it", "fatal": False}
    yield _row_issue(index, "boxes partly outside their image", rows[across], **clipped)


def _rows_not_inside(index) -> np.ndarray:
    """Find the few rows to check in detail: boxes without a size, or not inside their image."""
    x, y, width, height = index.boxes.T
    image_width, image_height = index.sizes[index.image_of_rows()].T
    inside = (x >= 0) & (y >= 0) & (width > 0) & (height > 0)
    inside &= (x + width <= image_width) & (y + height <= image_height)
    return np.flatnonzero(~inside)


def _is_repeated(values: np.ndarray) -> np.ndarray:
    """Return for each value whether it occurs more than once, bool."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _image_issue(index, kind: str, affected: np.ndarray, **details) -> DataIssue:
    images = np.flatnonzero(affected)
    examples = [f"{index.file_name(i)} (id {index.image_ids[i]})" for i in images[:MAX_EXAMPLES]]
    return DataIssue(kind, examples, len(images), **details)


def _row_issue(index, kind: str, rows: np.ndarray, **details) -> DataIssue:
    image_ids = index.image_ids[_images_of_rows(index, rows[:MAX_EXAMPLES])]
    ids = index.annotation_ids[rows[:MAX_EXAMPLES]]
    examples = [f"{i} of image {image_id}" for i, image_id in zip(ids, image_ids, strict=True)]
    return DataIssue(kind, examples, len(rows), **details)


def _images_of_rows(index, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.offsets, rows, side="right") - 1


def check_annotations(index, split: str, ignore_missing: bool) -> None:
    """Log the contents of a split and its issues, without opening an image.

    Args:
        index: The data set.
        split: Its name for the log.
        ignore_missing: Whether to ignore file names without a file.

    Raises:
        DataError: There are fatal issues.
    """
    issues = find_issues(index, missing=not ignore_missing)
    raise_if_fatal(index, issues)
    utils.log_field(split, index.annotation_file)
    for line in [*textwrap.wrap(summarize(index), 68), *issues]:
        utils.log_field("", line)


# -------------------------------------------------------------------------------- opening images


class _ImageCheck(Dataset):
    """`dataset[i]` is None, or the error of image i as (i, kind, message)."""

    def __init__(self, index):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[int, str, str] | None:
        try:
            self.index.read_image(i)
        except DataError as error:
            return i, error.kind, f"image {self.index.image_ids[i]}: {error}"
        return None


def find_unreadable_images(index, workers: int) -> list[tuple[int, str, str]]:
    """Open every image of the index, distributed over the processes.

    Returns:
        (position, kind, message) of the images that cannot be used, the same on every process.
    """
    share = range(utils.rank(), len(index), utils.world_size())
    loader = DataLoader(
        _ImageCheck(index),
        batch_size=16,
        sampler=share,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # or the loader would draw from the global generator
    )
    errors = []
    for batch in utils.Progress(loader, len(loader), 0, "opening images"):
        errors += [result for result in batch if result is not None]
    return sorted(chain.from_iterable(utils.gather_objects(errors)))


def group_by_kind(unreadable: Sequence[tuple[int, str, str]]) -> list[DataIssue]:
    """Group the result of `find_unreadable_images` by kind."""
    kinds = {}
    for _, kind, message in unreadable:
        kinds.setdefault(kind, []).append(message)
    remedy = "Repair them, or remove them from the annotation file"
    return [
        DataIssue(kind, messages[:MAX_EXAMPLES], len(messages), remedy)
        for kind, messages in kinds.items()
    ]


def drop_bad_images(indexes: dict, workers: int, allowed: int) -> tuple[dict, list[int]]:
    """Open every image, and skip those that cannot be used.

    Args:
        indexes: A `CocoIndex` for each split, by name.
        workers: Number of loading processes.
        allowed: Number of images that may be bad (--max-bad-images); with 0 none is opened.

    Returns:
        The indexes without bad images, and the ids of those skipped in the split "val".

    Raises:
        DataError: More than `allowed` images are bad.
    """
    if not allowed:
        return indexes, []
    bad = {split: find_unreadable_images(index, workers) for split, index in indexes.items()}
    count = sum(map(len, bad.values()))
    if count > allowed:
        issues = [str(issue) for images in bad.values() for issue in group_by_kind(images)]
        raise DataError(f"{count} bad images, --max-bad-images {allowed}: {'; '.join(issues)}")
    for split, images in bad.items():
        for _, _, message in images:
            utils.log(f"{split}: skipped: {message}")
    positions = {split: [i for i, *_ in images] for split, images in bad.items()}
    skipped_ids = indexes["val"].image_ids[positions["val"]].tolist()
    kept = {split: index.without(positions[split]) for split, index in indexes.items()}
    return kept, skipped_ids


# ---------------------------------------------------------------------------------- --check-data


def examine(index, split: str, workers: int) -> tuple[list[DataIssue], list[tuple[int, str, str]]]:
    """Log the contents of a split and all its issues; open every image.

    Returns:
        The fatal issues of `find_issues`, without those of file names, and the result of
        `find_unreadable_images`.
    """
    utils.log(f"{split}: {index.annotation_file}\n{describe(index)}")
    issues, start = find_issues(index), time.perf_counter()
    unreadable = find_unreadable_images(index, workers)
    utils.log(f"  opened {len(index):,} images in {time.perf_counter() - start:.1f} s")
    # `issues` has those without a file already.
    opened = [result for result in unreadable if not index.file_problems[result[0]]]
    for issue in (*issues, *group_by_kind(opened)):
        utils.log(f"  {'error' if issue.fatal else 'note'}: {issue}")
    return [x for x in issues if x.fatal and x.kind not in file_names.KINDS], unreadable


def check_all(indexes: dict, workers: int, allowed: int) -> None:
    """Examine all splits; up to `allowed` images may be bad.

    Raises:
        DataError: There are errors to correct before a training.
    """
    fatal, bad = [], []
    for split, index in indexes.items():
        issues, unreadable = examine(index, split, workers)
        fatal += issues
        bad += unreadable
    known, val = next(iter(indexes.values())).categories, indexes["val"]
    known.check_contains(val.categories, val.annotation_file)  # raises: log the issues first
    if len(bad) > allowed:
        fatal += group_by_kind(bad)
    elif bad:
        utils.log(f"--max-bad-images {allowed}: a training skips {len(bad)} bad images")
    if fatal:
        raise DataError(f"kinds of errors to correct, listed above: {len(fatal)}")


def summarize(index) -> str:
    """Return the numbers of images and boxes, and of those not used in training, as one line."""
    counts = {
        "images without a usable box": len(index) - len(index.images_with_boxes()),
        "crowd boxes": np.count_nonzero(index.iscrowd),
        "boxes without a size": np.count_nonzero(~index.usable & ~index.iscrowd),
    }
    boxes = f"{len(index.boxes):,} boxes in {len(index.categories.ids)} categories"
    notable = [f"{name}: {count:,}" for name, count in counts.items() if count]
    return ", ".join([f"{len(index):,} images", boxes, *notable])


def describe(index) -> str:
    """Return the numbers and sizes of images and boxes, and of boxes by category, as lines."""
    areas = index.areas[~index.iscrowd]
    small, large = np.count_nonzero(areas < 32**2), np.count_nonzero(areas > 96**2)
    lines = [
        f"  {summarize(index)}",
        f"  image sizes: {_image_sizes(index.sizes)}",
        f"  box sizes: {small:,} small (area under 32 x 32), {len(areas) - small - large:,} "
        f"medium, {large:,} large (over 96 x 96)",
        "  boxes (without crowds) and images with such boxes, by category:",
    ]
    width, image_of_rows = max(map(len, index.categories.names)), index.image_of_rows()
    for category_id, name in index.categories.id_to_name.items():
        rows = (index.category_ids == category_id) & ~index.iscrowd
        boxes, images = np.count_nonzero(rows), len(np.unique(image_of_rows[rows]))
        lines.append(f"    {name:<{width}} {boxes:9,} {images:9,}")
    return "\n".join(lines)


def _image_sizes(sizes: np.ndarray) -> str:
    """Return the most frequent image sizes with their counts, and the number of other sizes."""
    values, counts = np.unique(sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    listed = ", ".join(f"{values[i, 0]} x {values[i, 1]} ({counts[i]:,})" for i in order[:5])
    if len(values) <= 5:
        return listed
    (low_w, low_h), (high_w, high_h) = sizes.min(axis=0), sizes.max(axis=0)
    return (
        f"{listed} and {len(values) - 5:,} other sizes from {low_w} to {high_w} wide and {low_h} "
        f"to {high_h} high"
    )
