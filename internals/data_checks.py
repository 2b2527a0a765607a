"""What is in a COCO-format data set, and everything that is wrong with it, by kind.

Three occasions: `check_annotations`, before every training, needs the annotation file and a listing
of the image folder; `check_all` (--check-data) and `drop_bad_images` (--max-bad-images) open every
image, which takes minutes for a large data set. An image that turns out bad during a training ends
it (`coco_utils.CocoDetection`). `index` is a `coco_utils.CocoIndex` throughout.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import utils
from internals.annotations import MAX_EXAMPLES, DataIssue
from internals.errors import DataError
from internals.images import MAX_PIXELS

MISSING = "image files that are missing"
# Less than this, in pixels, is rounding in the tool that wrote the file.
BORDER_TOLERANCE = 0.01


def raise_if_fatal(index, issues: Iterable[DataIssue]) -> None:
    """Raise one DataError that names every fatal issue, if there is any."""
    fatal = [str(issue) for issue in issues if issue.fatal]
    if fatal:
        separator = "\n  " if len(fatal) > 1 else " "
        raise DataError(f"{index.annotation_file}:{separator}{separator.join(fatal)}")


# ------------------------------------------------------------------------------- the quick check


def find_issues(index, missing: bool = True) -> list[DataIssue]:
    """Find everything wrong that shows without opening an image.

    Fatal is what dropping a box cannot repair. The others say what training does about them.

    Args:
        index: The data set.
        missing: Whether to report missing image files, too.
    """
    issues = [*index.issues, *_image_issues(index), *_file_issues(index), *_box_issues(index)]
    return [issue for issue in issues if issue.count and (missing or issue.kind != MISSING)]


def _image_issues(index) -> Iterator[DataIssue]:
    yield _of_images(index, "images whose id another image has", _repeated(index.image_ids))
    sizes = index.sizes.astype(np.int64)
    yield _of_images(index, "images without a positive size", (sizes <= 0).any(axis=1))
    yield _of_images(
        index,
        f"images of more than {MAX_PIXELS:,} pixels",
        sizes.prod(axis=1) > MAX_PIXELS,
        remedy="Store smaller ones",
    )


def _file_issues(index) -> Iterator[DataIssue]:
    missing, outside = _check_files(index)
    folder = index.image_dir
    yield _of_images(
        index,
        f"file names that lead out of {folder}",
        outside,
        remedy="Store the images in that folder (it may be a link itself)",
    )
    yield _of_images(
        index,
        MISSING,
        missing,
        remedy=f"Put them into {folder}, take them out of the file, or go on by --max-bad-images N",
    )
    yield _of_images(
        index,
        "images whose file another image has",
        _repeated(index.file_names),
        remedy="Each of them counts",
        fatal=False,
    )


def _check_files(index) -> tuple[np.ndarray, np.ndarray]:
    """Which image files are missing, and which are outside the image folder: bool `[I]` each.

    A name that leads out, also by a link, could show any file of the machine to whoever sees the
    report. Listing each folder once is much faster than asking for every file. Names and paths are
    bytes in UTF-8, as in the index.
    """
    root = os.fsencode(os.path.realpath(index.image_dir))
    missing, outside = np.zeros((2, len(index)), dtype=bool)
    plain, links = _list_folder(root, root)
    listings = {b"": (plain, links)}
    for i, name in enumerate(index.file_names.tolist()):
        if name in plain:  # nearly always
            continue
        path = os.path.normpath(name)
        if os.path.isabs(path) or path.split(os.fsencode(os.sep))[0] == b"..":
            outside[i] = True
            continue
        folder, _, base = name.rpartition(b"/")
        if folder not in listings:
            listings[folder] = _list_folder(os.path.join(root, folder), root)
        inside, uncertain = listings[folder]
        if base in uncertain:
            outside[i] = not _is_inside(os.path.join(root, name), root)
        elif base not in inside:
            missing[i] = True
    return missing, outside


def _list_folder(folder: bytes, root: bytes) -> tuple[set[bytes], set[bytes]]:
    """The names in a folder: those that are certainly inside `root`, and the others."""
    inside, uncertain = set(), set()
    folder_is_inside = _is_inside(folder, root)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            certain = folder_is_inside and not entry.is_symlink()
            (inside if certain else uncertain).add(entry.name)
    return inside, uncertain


def _is_inside(path: bytes, root: bytes) -> bool:
    path = os.path.realpath(path)
    return path == root or path.startswith(os.path.join(root, b""))


def _box_issues(index) -> Iterator[DataIssue]:
    named = index.annotation_ids >= 0
    repeated = named & _repeated(np.where(named, index.annotation_ids, -1))
    unknown = ~np.isin(index.category_ids, index.categories.ids)
    yield _of_rows(index, "annotations whose id another annotation has", np.flatnonzero(repeated))
    yield _of_rows(
        index,
        "annotations whose category_id the file does not define",
        np.flatnonzero(unknown),
    )
    rows = _rows_not_inside(index)
    x, y, width, height = index.boxes[rows].T
    image_width, image_height = index.sizes[_images_of(index, rows)].T
    broken = ~np.isfinite(index.boxes[rows]).all(axis=1)
    negative = ((width < 0) | (height < 0)) & ~broken
    empty = ((width == 0) | (height == 0)) & ~broken & ~negative
    beyond = (x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0)
    outside = beyond & index.usable[rows] & ~broken
    across = np.minimum(x, y) < -BORDER_TOLERANCE
    across |= x + width > image_width + BORDER_TOLERANCE
    across |= y + height > image_height + BORDER_TOLERANCE
    across &= ~(broken | negative | empty | outside)
    yield _of_rows(index, "annotations with NaN or infinity in their bbox", rows[broken])
    yield _of_rows(index, "boxes wholly outside their image", rows[outside])
    dropped = {"remedy": "They do not train", "fatal": False}
    yield _of_rows(index, "boxes of negative width or height", rows[negative], **dropped)
    yield _of_rows(index, "boxes of zero width or height", rows[empty], **dropped)
    clipped = {"remedy": "They are cut off at its border", "fatal": False}
    yield _of_rows(index, "boxes partly outside their image", rows[across], **clipped)


def _rows_not_inside(index) -> np.ndarray:
    """The few rows to check in detail: their box has no size, or is not inside its image."""
    x, y, width, height = index.boxes.T
    image_width, image_height = index.sizes[index.image_of_rows()].T
    inside = (x >= 0) & (y >= 0) & (width > 0) & (height > 0)
    inside &= (x + width <= image_width) & (y + height <= image_height)
    return np.flatnonzero(~inside)


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which of the values occur more than once, bool."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _of_images(index, kind: str, wrong: np.ndarray, **details) -> DataIssue:
    images = np.flatnonzero(wrong)
    examples = [f"{index.file_name(i)} (id {index.image_ids[i]})" for i in images[:MAX_EXAMPLES]]
    return DataIssue(kind, examples, len(images), **details)


def _of_rows(index, kind: str, rows: np.ndarray, **details) -> DataIssue:
    image_ids = index.image_ids[_images_of(index, rows[:MAX_EXAMPLES])]
    ids = index.annotation_ids[rows[:MAX_EXAMPLES]]
    examples = [f"{i} of image {image_id}" for i, image_id in zip(ids, image_ids, strict=True)]
    return DataIssue(kind, examples, len(rows), **details)


def _images_of(index, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.offsets, rows, side="right") - 1


def check_annotations(index, split: str, ignore_missing: bool) -> None:
    """Log what is in a split and what of it does not train, without opening an image.

    Raises:
        DataError: Something is wrong that dropping a box cannot repair. Missing files are left for
            later where `ignore_missing`.
    """
    issues = find_issues(index, missing=not ignore_missing)
    raise_if_fatal(index, issues)
    utils.log(f"{split}: {index.annotation_file}: {summary(index)}")
    for issue in issues:
        utils.log(f"{split}: {issue}")


# -------------------------------------------------------------------------------- opening images


class _ImageCheck(Dataset):
    """`dataset[i]` is None, or what is wrong with image i as (i, kind, message)."""

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


def unreadable_images(index, workers: int) -> list[tuple[int, str, str]]:
    """Open every image of the index, each process a share, with a progress bar.

    Files outside the image folder, which `find_issues` names, are not opened.

    Returns:
        (position, kind, message) of the images that cannot be used, the same on every process.
    """
    _, outside = _check_files(index)
    share = np.flatnonzero(~outside)[utils.rank() :: utils.world_size()].tolist()
    loader = DataLoader(
        _ImageCheck(index),
        batch_size=16,
        sampler=share,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # a loader without one draws from the global generator
    )
    found = []
    for batch in utils.Progress(loader, len(loader), 0, "opening images"):
        found += [result for result in batch if result is not None]
    return sorted(chain.from_iterable(utils.gather_objects(found)))


def image_issues(unreadable: Sequence[tuple[int, str, str]]) -> list[DataIssue]:
    """Group what `unreadable_images` returns by kind."""
    kinds = {}
    for _, kind, message in unreadable:
        kinds.setdefault(kind, []).append(message)
    remedy = "Mend them, or take them out of the file"
    return [
        DataIssue(kind, messages[:MAX_EXAMPLES], len(messages), remedy)
        for kind, messages in kinds.items()
    ]


def drop_bad_images(indexes: dict, workers: int, allowed: int) -> tuple[dict, list[int]]:
    """Open every image, and go on without those that cannot be used.

    Args:
        indexes: By split.
        workers: Loading processes.
        allowed: How many images may be bad (--max-bad-images); 0 opens none.

    Returns:
        The indexes without these images, and the ids of those that the split "val" loses.

    Raises:
        DataError: There are more.
    """
    if not allowed:
        return indexes, []
    bad = {split: unreadable_images(index, workers) for split, index in indexes.items()}
    if sum(map(len, bad.values())) > allowed:
        issues = [str(issue) for images in bad.values() for issue in image_issues(images)]
        raise DataError(f"--max-bad-images {allowed}, but {'; '.join(issues)}")
    for split, images in bad.items():
        for _, _, message in images:
            utils.log(f"{split}: left out: {message}")
    positions = {split: [i for i, *_ in images] for split, images in bad.items()}
    left_out = indexes["val"].image_ids[positions["val"]].tolist()
    return {split: x.without(positions[split]) for split, x in indexes.items()}, left_out


# ------------------------------------------------------------------------------------ the report


def examine(index, split: str, workers: int) -> tuple[list[DataIssue], list[tuple[int, str, str]]]:
    """Log what is in a split and everything that is wrong with it.

    Returns:
        The fatal issues of `find_issues`, without missing files, and `unreadable_images`.
    """
    utils.log(f"{split}: {index.annotation_file}\n{report(index)}")
    issues, start = find_issues(index, missing=False), time.perf_counter()
    unreadable = unreadable_images(index, workers)
    utils.log(f"  opened {len(index):,} images in {time.perf_counter() - start:.1f} s")
    for issue in (*issues, *image_issues(unreadable)):
        utils.log(f"  {'wrong' if issue.fatal else 'note'}: {issue}")
    return [issue for issue in issues if issue.fatal], unreadable


def check_all(indexes: dict, workers: int, allowed: int) -> None:
    """Examine all splits, of which `allowed` images may be bad.

    Raises:
        DataError: Something has to be corrected before a training.
    """
    fatal, bad = [], []
    for split, index in indexes.items():
        issues, unreadable = examine(index, split, workers)
        fatal, bad = fatal + issues, bad + unreadable
    known, val = next(iter(indexes.values())).categories, indexes["val"]
    known.check_contains(val.categories, val.annotation_file)  # after all else is listed
    if len(bad) > allowed:
        fatal += image_issues(bad)
    elif bad:
        utils.log(f"a training with --max-bad-images {allowed} leaves out {len(bad)}")
    if fatal:
        raise DataError(f"{len(fatal)} kinds of errors to correct, listed above")


def summary(index) -> str:
    """One line for the log: what is there, and what of it does not train."""
    counts = {
        "images without a usable box": len(index) - len(index.images_with_boxes()),
        "crowd boxes": np.count_nonzero(index.iscrowd),
        "boxes without a size": np.count_nonzero(~index.usable & ~index.iscrowd),
    }
    boxes = f"{len(index.boxes):,} boxes in {len(index.categories.ids)} categories"
    notable = [f"{name}: {count:,}" for name, count in counts.items() if count]
    return ", ".join([f"{len(index):,} images", boxes, *notable])


def report(index) -> str:
    """What is in the data set, as lines for the console."""
    areas = index.areas[~index.iscrowd]
    small, large = np.count_nonzero(areas < 32**2), np.count_nonzero(areas > 96**2)
    lines = [
        f"  {summary(index)}",
        f"  image sizes: {_image_sizes(index.sizes)}",
        f"  box sizes: {small:,} small (area under 32 x 32), {len(areas) - small - large:,} "
        f"medium, {large:,} large (over 96 x 96)",
        "  boxes that are no crowds, and images with them, by category:",
    ]
    width, image_of_rows = max(map(len, index.categories.names)), index.image_of_rows()
    for category_id, name in index.categories.id_to_name.items():
        rows = (index.category_ids == category_id) & ~index.iscrowd
        boxes, images = np.count_nonzero(rows), len(np.unique(image_of_rows[rows]))
        lines.append(f"    {name:<{width}} {boxes:9,} {images:9,}")
    return "\n".join(lines)


def _image_sizes(sizes: np.ndarray) -> str:
    """The most frequent image sizes with their counts, and how many others there are."""
    values, counts = np.unique(sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{values[i, 0]} x {values[i, 1]} ({counts[i]:,})" for i in order[:5])
    if len(values) <= 5:
        return shown
    (low_w, low_h), (high_w, high_h) = sizes.min(axis=0), sizes.max(axis=0)
    return (
        f"{shown} and {len(values) - 5:,} other sizes from {low_w} to {high_w} wide and {low_h} "
        f"to {high_h} high"
    )
