"""Check a data set in COCO format, and report its errors by kind.

`check_annotations` runs before every training; it needs only the annotation file and a listing of
the image folder. `check_all` (--check-data) and `drop_bad_images` (--max-bad-images) open every
image, which takes minutes for a large data set. A bad image that first shows during a training
ends it (`coco_utils.CocoDetection`). `index` is a `coco_utils.CocoIndex` throughout.
"""

import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import utils
from internals import file_names
from internals.annotations import MAX_EXAMPLES, MAX_SHORT_EXAMPLES, DataIssue
from internals.box_checks import find_box_issues, is_repeated
from internals.errors import DataError
from internals.image_notes import NOTE_REMEDIES
from internals.images import DEEP_SUFFIXES, MAX_PIXELS, ImageRules, measure_bit_depth

TOO_LARGE = f"images of more than {MAX_PIXELS:,} pixels"  # a kind of issue
MAX_DETECTIONS = 100  # of an image and category, that COCO's metrics count


def raise_if_fatal(index, issues: Iterable[DataIssue]) -> None:
    """Raise one DataError with all fatal issues, if there are any."""
    fatal = [str(issue) for issue in issues if issue.fatal]
    if fatal:
        separator = "\n  " if len(fatal) > 1 else " "
        raise DataError(f"{index.annotation_file}:{separator}{separator.join(fatal)}")


# ------------------------------------------------------------ the check without opening images


def find_issues(index, missing: bool = True, trust_boxes: bool = False) -> list[DataIssue]:
    """Find all issues that can be found without opening an image.

    An issue is fatal unless dropping or clipping boxes resolves it.

    Args:
        index: The data set.
        missing: Whether to include file names without a file.
        trust_boxes: Whether boxes may look like shares of the image or corners (--trust-boxes).
    """
    issues = [*index.issues, *_category_issues(index), *_image_issues(index), *_file_issues(index)]
    issues += find_box_issues(index, trust_boxes)
    return [
        issue for issue in issues if issue.count and (missing or issue.kind not in file_names.KINDS)
    ]


def _category_issues(index) -> Iterator[DataIssue]:
    counts = Counter(name.casefold().strip() for name in index.categories.names)
    repeated = [
        f"{name!r} (id {i})"
        for i, name in index.categories.id_to_name.items()
        if counts[name.casefold().strip()] > 1
    ]
    yield DataIssue(
        "categories with the name of another one, but for letter case",
        repeated[:MAX_EXAMPLES],
        len(repeated),
        "They are kept apart by their id: merge them, if they mean the same",
        fatal=False,
    )


def _image_issues(index) -> Iterator[DataIssue]:
    yield _image_issue(index, "images with a repeated id", is_repeated(index.image_ids))
    sizes = index.sizes.astype(np.int64)
    yield _image_issue(index, "images without a positive size", (sizes <= 0).any(axis=1))
    yield _image_issue(
        index,
        TOO_LARGE,
        sizes.prod(axis=1) > MAX_PIXELS,
        remedy="Downscale the images and their boxes, or cut them into tiles: python "
        "datasets/tile.py",
    )


def find_crowded_images(index, max_detections: int | None) -> DataIssue | None:
    """Find the images with more boxes than detections (--max-detections), if any."""
    limit = max_detections or MAX_DETECTIONS
    boxes = np.bincount(index.image_of_rows()[index.usable], minlength=len(index))
    enough = -(-boxes.max(initial=0) * 12 // 1000) * 100  # a fifth more, as some are false
    issue = _image_issue(
        index,
        f"images with more than {limit} boxes, up to {boxes.max(initial=0):,}",
        boxes > limit,
        remedy=f"At most {limit} detections of an image count: the other boxes are missed. Use "
        f"--max-detections {enough}, or cut such images into tiles",
        fatal=False,
    )
    return issue if issue.count else None


def _file_issues(index) -> Iterator[DataIssue]:
    yield from file_names.find_issues(
        index.file_names, index.file_problems, index.image_ids, index.image_dir
    )
    yield _image_issue(
        index,
        "images with a repeated file name",
        is_repeated(index.file_names),
        remedy="All of them are used",
        fatal=False,
    )


def _image_issue(index, kind: str, affected: np.ndarray, **details) -> DataIssue:
    images = np.flatnonzero(affected)
    examples = [f"{index.file_name(i)} (id {index.image_ids[i]})" for i in images[:MAX_EXAMPLES]]
    return DataIssue(kind, examples, len(images), **details)


def check_annotations(index, split: str, ignore_missing: bool, trust_boxes: bool) -> None:
    """Log the contents of a split and its issues, without opening an image.

    Args:
        index: The data set.
        split: Its name for the log.
        ignore_missing: Whether to ignore file names without a file.
        trust_boxes: See `find_issues`.

    Raises:
        DataError: There are fatal issues.
    """
    issues = find_issues(index, not ignore_missing, trust_boxes)
    raise_if_fatal(index, issues)
    utils.log_field(split, index.annotation_file)
    for line in [*textwrap.wrap(summarize(index), 68), *issues]:
        utils.log_field("", line)


def describe_too_narrow(index, too_narrow: np.ndarray, settings: str) -> str | None:
    """Describe the images that are too narrow for the model or an augmentation; None without any.

    Args:
        index: The data set.
        too_narrow: Of `transforms.find_too_narrow`.
        settings: The flags that decide it.
    """
    images = np.flatnonzero(too_narrow)
    if not len(images):
        return None
    examples = [
        f"{index.file_name(i)} (id {index.image_ids[i]}, {index.sizes[i, 0]} x {index.sizes[i, 1]})"
        for i in images[:MAX_EXAMPLES]
    ]
    kind = f"images that are too narrow: with {settings} no pixel of their shorter side is left"
    remedy = "Crop them, cut them into tiles, or remove them from the annotation file"
    return f"{index.annotation_file}: {DataIssue(kind, examples, len(images), remedy)}"


def _categories_without_boxes(val, train) -> list[str]:
    """Return the names of the categories that have usable boxes in train, but none in val."""
    ids = np.setdiff1d(train.category_ids[train.usable], val.category_ids[val.usable])
    names = dict(zip(train.categories.ids, train.categories.display_names, strict=True))
    return [names[i] for i in ids.tolist() if i in names]


def compare_splits(indexes: dict) -> list[str]:
    """Return what makes the evaluation of a training meaningless, as sentences.

    Args:
        indexes: A `CocoIndex` for each split, by name; "train" may be missing.
    """
    train, val, found = indexes.get("train"), indexes["val"], []
    if not val.usable.any():
        found.append(
            f"{val.annotation_file} has no box to find: AP cannot be measured. In a training the "
            "newest weights then count as the best, and --early-stop-patience has no effect"
        )
    if train is None or train is val:
        return found
    if val.usable.any() and (unseen := _categories_without_boxes(val, train)):
        names = ", ".join(unseen[:MAX_SHORT_EXAMPLES]) + ", ..." * (
            len(unseen) > MAX_SHORT_EXAMPLES
        )
        found.append(
            f"categories that have boxes in train, but none in val ({len(unseen):,}): {names}. "
            "Their AP cannot be measured"
        )
    if os.path.realpath(train.annotation_file) == os.path.realpath(val.annotation_file):
        found.append(
            f"train and val are the same file, {val.annotation_file}: AP is that of known images, "
            "and says little about new ones. To split it: python datasets/split.py"
        )
        return found
    folders = [Path(os.path.realpath(index.image_dir)) for index in (train, val)]
    if any(a.is_relative_to(b) for a, b in (folders, folders[::-1])):  # one contains the other
        files = [
            {os.path.normpath(f"{folder}/{name.decode()}") for name in index.file_names.tolist()}
            for folder, index in zip(folders, (train, val), strict=True)
        ]
        shared = sorted(files[0] & files[1])
        if shared:
            examples = ", ".join(shared[:3])
            found.append(
                f"{len(shared):,} of {len(val):,} validation images are training images, too, such "
                f"as {examples}: AP is too good by what they add. Remove them from one of the files"
            )
    return found


# -------------------------------------------------------------------------------- opening images


Finding = tuple[int, str, str]  # position, kind and message of an error or note of an image


class _ImageCheck(Dataset):
    """`dataset[i]` is the error of image i, if any, and what is to be known about it."""

    def __init__(self, index):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[list[Finding], list[Finding]]:
        name, notes = f"image {self.index.image_ids[i]}", []
        try:
            self.index.read_image(i, notes)
        except DataError as error:
            return [(i, error.kind, f"{name}: {error}")], []
        return [], [(i, note.kind, f"{name}: {note.text}") for note in notes]


def open_images(index, workers: int) -> tuple[list[Finding], list[Finding]]:
    """Open every image of the index, distributed over the processes.

    Returns:
        The errors of images that cannot be used, and the notes on others, in the order of images,
        the same on every process.
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
    errors, notes = [], []
    for batch in utils.Progress(loader, len(loader), 0, "opening images"):
        for image_errors, image_notes in batch:
            errors += image_errors
            notes += image_notes
    errors, notes = zip(*utils.gather_objects((errors, notes)), strict=True)
    return sorted(chain.from_iterable(errors)), sorted(chain.from_iterable(notes))


def find_unreadable_images(index, workers: int) -> list[Finding]:
    """Return the errors of `open_images`."""
    return open_images(index, workers)[0]


def find_more_bad_images(index, image: int, count: int = 500, seconds: float = 10) -> tuple:
    """Open the images behind a bad one, so that its error message can list more than one.

    Args:
        index: The data set.
        image: The position of the bad image.
        count: Open so many images at most.
        seconds: Stop after this time.

    Returns:
        How many of them are bad, and a text that lists them, which may be empty.
    """
    check, deadline, bad, opened = _ImageCheck(index), time.monotonic() + seconds, [], 0
    for i in islice(chain(range(image + 1, len(index)), range(image)), count):
        if time.monotonic() > deadline or len(bad) == MAX_EXAMPLES:
            break
        bad += [message for _, _, message in check[i][0]]
        opened += 1
    listed = "".join(f"\n    {message}" for message in bad)
    return len(bad), f".\nOf the next {opened:,} images {len(bad)} more:{listed}" if bad else ""


def group_by_kind(findings: Sequence[Finding]) -> list[DataIssue]:
    """Group errors or notes of `open_images` by kind."""
    kinds = {}
    for _, kind, message in findings:
        kinds.setdefault(kind, []).append(message)
    repair = "Repair them, or remove them from the annotation file"
    return [
        DataIssue(
            kind,
            messages[:MAX_EXAMPLES],
            len(messages),
            NOTE_REMEDIES.get(kind, repair),
            fatal=kind not in NOTE_REMEDIES,
        )
        for kind, messages in kinds.items()
    ]


def set_image_rules(indexes: dict, bit_depth: int | None, use_truncated: bool) -> int | None:
    """Set how all processes read 16-bit images and truncated ones.

    Args:
        indexes: A `CocoIndex` for each split, by name.
        bit_depth: That of 16-bit gray images; None to measure it.
        use_truncated: Whether to use truncated JPEGs.

    Returns:
        The bit depth; None without any 16-bit gray image in a sample.
    """
    if bit_depth is None:
        found = utils.run_on_rank_0(partial(find_bit_depth, list(indexes.values())))
        if found:
            bit_depth, text = found
            utils.log_field("bit depth", text)
    for index in indexes.values():
        index.rules = ImageRules(bit_depth, use_truncated)
    return bit_depth


def find_bit_depth(indexes: Iterable) -> tuple[int, str] | None:
    """Find how many bits the 16-bit gray images of a data set hold, of all its splits together.

    Returns:
        Of `internals.images.measure_bit_depth`.
    """
    suffixes = tuple(suffix.encode() for suffix in DEEP_SUFFIXES)
    return measure_bit_depth(
        [
            index.path(i)
            for index in indexes
            for i, name in enumerate(index.file_names.tolist())
            if name.lower().endswith(suffixes) and not index.file_problems[i]
        ]
    )


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
    if empty := [index.annotation_file for index in kept.values() if not len(index)]:
        raise DataError(f"{empty[0]}: none of its images can be used, see above")
    return kept, skipped_ids


# ---------------------------------------------------------------------------------- --check-data


def examine(
    index,
    split: str,
    workers: int,
    trust_boxes: bool = False,
    max_detections: int | None = None,
) -> tuple[list[DataIssue], list[tuple[int, str, str]]]:
    """Log the contents of a split and all its issues; open every image.

    Returns:
        The fatal issues of `find_issues`, without those of file names, and the result of
        `find_unreadable_images`.
    """
    utils.log(f"{split}: {index.annotation_file}\n{describe(index)}")
    issues, start = find_issues(index, trust_boxes=trust_boxes), time.perf_counter()
    unreadable, notes = open_images(index, workers)
    utils.log(f"  opened {len(index):,} images in {time.perf_counter() - start:.1f} s")
    # `issues` has those without a file already.
    opened = [finding for finding in unreadable if not index.file_problems[finding[0]]]
    crowded = filter(None, [find_crowded_images(index, max_detections)])
    for issue in (*issues, *crowded, *group_by_kind(opened), *group_by_kind(notes)):
        utils.log(f"  {'error' if issue.fatal else 'note'}: {issue}")
    return [x for x in issues if x.fatal and x.kind not in file_names.KINDS], unreadable


def check_all(
    indexes: dict,
    workers: int,
    allowed: int,
    trust_boxes: bool,
    max_detections: int | None = None,
) -> list[str]:
    """Examine all splits; up to `allowed` images may be bad (see also `find_issues`).

    Returns:
        Messages on errors to correct before a training.
    """
    fatal, bad = [], []
    for split, index in indexes.items():
        issues, unreadable = examine(index, split, workers, trust_boxes, max_detections)
        fatal += issues
        bad += unreadable
    for text in compare_splits(indexes):
        utils.log(f"note: {text}")
    known, val = next(iter(indexes.values())).categories, indexes["val"]
    errors = []
    try:
        known.check_contains(val.categories, val.annotation_file)
    except DataError as error:
        errors.append(str(error))
    if len(bad) > allowed:
        fatal += group_by_kind(bad)
    elif bad:
        utils.log(f"--max-bad-images {allowed}: a training skips {len(bad)} bad images")
    if fatal:
        errors.insert(0, f"kinds of errors to correct, listed above: {len(fatal)}")
    return errors


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
    names, image_of_rows = index.categories.display_names, index.image_of_rows()
    width = max(map(len, names))
    for category_id, name in zip(index.categories.ids, names, strict=True):
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
