"""What is in a COCO-format data set, and everything that is wrong with it, by kind.

`faults` needs the annotation file and a listing of the image folder, so it runs before every
training; `unreadable_images` opens every picture, which takes minutes for a large data set.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import utils
from coco_utils import MAX_PIXELS, CocoIndex, Fault, read_image
from internals.errors import DataError

EXAMPLES = 20
MISSING = "image files that are missing"


def refuse(index: CocoIndex, found: Iterable[Fault]) -> None:
    """Raise one DataError that names every fatal fault, if there is any."""
    fatal = [str(fault) for fault in found if fault.fatal]
    if fatal:
        gap = "\n  " if len(fatal) > 1 else " "
        raise DataError(f"{index.annotation_file}:{gap}{gap.join(fatal)}")


# ------------------------------------------------------------------------------ the quick check


def faults(index: CocoIndex, missing: bool = True) -> list[Fault]:
    """Everything wrong that shows without opening an image; `missing`: missing images, too.

    Fatal is what dropping a box cannot repair. The others say what training does about them.
    """
    found = [*index.faults, *_image_faults(index), *_file_faults(index), *_annotation_faults(index)]
    return [fault for fault in found if fault.count and (missing or fault.kind != MISSING)]


def _image_faults(index: CocoIndex) -> Iterable[Fault]:
    yield _of_images(index, "images whose id another image has", _repeated(index.image_ids))
    sizes = index.sizes.astype(np.int64)
    yield _of_images(index, "images without a positive size", (sizes <= 0).any(axis=1))
    yield _of_images(
        index,
        f"images of more than {MAX_PIXELS:,} pixels",
        sizes.prod(axis=1) > MAX_PIXELS,
        remedy="Store smaller ones",
    )


def _file_faults(index: CocoIndex) -> Iterable[Fault]:
    missing, outside = _look_for(index)
    folder = index.image_dir
    yield _of_images(
        index,
        f"file names that lead out of {folder}",
        outside,
        remedy="Store the pictures in that folder (it may be a link itself)",
    )
    remedy = f"Put them into {folder}, take them out of the file, or go on by --max-bad-images N"
    yield _of_images(index, MISSING, missing, remedy=remedy)
    yield _of_images(
        index,
        "images whose file another image has",
        _repeated(index.file_names),
        remedy="Each of them counts",
        fatal=False,
    )


def _look_for(index: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """Which files are missing, and which lead out of the image folder, also by links: bool `[I]`.

    One listing of each folder costs less than asking for every file. Names and paths are bytes in
    UTF-8 here, as the index has them.
    """
    root = os.fsencode(os.path.realpath(index.image_dir))
    missing, outside = np.zeros((2, len(index)), dtype=bool)
    names, listings = index.file_names.tolist(), {}
    rest = set(names)
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        rest.difference_update(entry.name for entry in entries if not entry.is_symlink())
    for i, name in enumerate(names if rest else ()):
        if name not in rest:
            continue
        if _leads_out(name):
            outside[i] = True
            continue
        folder, _, base = name.rpartition(b"/")
        if folder not in listings:
            listings[folder] = _listing(os.path.join(root, folder), root)
        inside, suspect = listings[folder]
        if base in suspect:
            outside[i] = not _inside(os.path.join(root, name), root)
        elif base not in inside:
            missing[i] = True
    return missing, outside


def _leads_out(name: bytes) -> bool:
    path = os.path.normpath(name)
    return os.path.isabs(path) or path == b".." or path.startswith(b".." + os.fsencode(os.sep))


def _listing(folder: bytes, root: bytes) -> tuple[set[bytes], set[bytes]]:
    """The names in a folder: those that are surely inside `root`, and the others."""
    inside, suspect = set(), set()
    out = not _inside(folder, root)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (suspect if out or entry.is_symlink() else inside).add(entry.name)
    except OSError:
        pass
    return inside, suspect


def _inside(path: bytes, root: bytes) -> bool:
    path = os.path.realpath(path)
    return path == root or path.startswith(os.path.join(root, b""))


def _annotation_faults(index: CocoIndex) -> Iterable[Fault]:
    named = index.annotation_ids >= 0
    repeated = named & _repeated(np.where(named, index.annotation_ids, -1))
    unknown = ~np.isin(index.category_ids, index.categories.ids)
    for kind, wrong in (
        ("annotations whose id another annotation has", repeated),
        ("annotations whose category_id the file does not define", unknown),
    ):
        yield _of_rows(index, kind, np.flatnonzero(wrong))
    rows = _not_inside(index)
    x, y, width, height = index.boxes[rows].T
    broken = ~np.isfinite(index.boxes[rows]).all(axis=1)
    yield _of_rows(index, "annotations with NaN or infinity in their bbox", rows[broken])
    sides = index.sizes[_images_of(index, rows)].T
    beyond = (x >= sides[0]) | (y >= sides[1]) | (x + width <= 0) | (y + height <= 0)
    outside = beyond & index.usable[rows]
    yield _of_rows(index, "boxes wholly outside their image", rows[outside & ~broken])
    dropped = {"remedy": "They do not train", "fatal": False}
    negative = ((width < 0) | (height < 0)) & ~broken
    flat = ~negative & ((width == 0) | (height == 0)) & ~broken
    yield _of_rows(index, "boxes of negative width or height", rows[negative], **dropped)
    yield _of_rows(index, "boxes of zero width or height", rows[flat], **dropped)
    # Less than this is rounding in the tool that wrote the file.
    slack = 0.01
    over = (np.minimum(x, y) < -slack) | (x + width > sides[0] + slack)
    over |= y + height > sides[1] + slack
    yield _of_rows(
        index,
        "boxes partly outside their image",
        rows[over & ~outside & ~broken & ~negative & ~flat],
        remedy="They are cut off at its border",
        fatal=False,
    )


def _not_inside(index: CocoIndex) -> np.ndarray:
    """The rows whose box has no size or is not inside its image: the few to look at closer."""
    x, y, width, height = index.boxes.T
    sides = np.repeat(index.sizes, np.diff(index.offsets), axis=0)
    inside = (x >= 0) & (y >= 0) & (width > 0) & (height > 0)
    inside &= (x + width <= sides[:, 0]) & (y + height <= sides[:, 1])
    return np.flatnonzero(~inside)


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which of the values, bool, stand there more than once."""
    ordered = np.sort(values)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.isin(values, repeated) if len(repeated) else np.zeros(len(values), dtype=bool)


def _of_images(index: CocoIndex, kind: str, wrong: np.ndarray, **rest) -> Fault:
    images = np.flatnonzero(wrong)
    found = [f"{index.file_name(i)} (id {index.image_ids[i]})" for i in images[:EXAMPLES]]
    return Fault(kind, found, len(images), **rest)


def _of_rows(index: CocoIndex, kind: str, rows: np.ndarray, **rest) -> Fault:
    images = index.image_ids[_images_of(index, rows[:EXAMPLES])]
    ids = index.annotation_ids[rows[:EXAMPLES]]
    found = [f"{i} of image {image}" for i, image in zip(ids, images, strict=True)]
    return Fault(kind, found, len(rows), **rest)


def _images_of(index: CocoIndex, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.offsets, rows, side="right") - 1


# ------------------------------------------------------------------------------ opening images


class _Opening(Dataset):
    """`dataset[i]` is None, or what is wrong with image i as (i, kind, message)."""

    def __init__(self, index: CocoIndex):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[int, str, str] | None:
        width, height = self.index.sizes[i].tolist()
        try:
            read_image(self.index.image_dir / self.index.file_name(i), width, height)
        except DataError as error:
            return i, error.kind, f"image {self.index.image_ids[i]}: {error}"
        return None


def unreadable_images(index: CocoIndex, workers: int) -> list[tuple[int, str, str]]:
    """Open every image of the index, each process a share, with a progress bar.

    Returns (position, kind, message) of those that cannot be used, on every process the same list.
    Files outside the image folder, which `faults` names, are not opened.
    """
    _, outside = _look_for(index)
    share = np.flatnonzero(~outside)[utils.rank() :: utils.world_size()].tolist()
    loader = DataLoader(
        _Opening(index),
        batch_size=16,
        sampler=share,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    found = []
    for batch in utils.Progress(loader, len(loader), 0, "opening images"):
        found += [wrong for wrong in batch if wrong is not None]
    return sorted(chain.from_iterable(utils.gather_objects(found)))


def image_faults(unreadable: Sequence[tuple[int, str, str]]) -> list[Fault]:
    """What `unreadable_images` returns, by kind."""
    kinds = {}
    for _, kind, message in unreadable:
        kinds.setdefault(kind, []).append(message)
    remedy = "Mend them, or take them out of the file"
    return [
        Fault(kind, messages[:EXAMPLES], len(messages), remedy) for kind, messages in kinds.items()
    ]


# ------------------------------------------------------------------------------------ the report


def examine(index: CocoIndex, part: str, workers: int) -> tuple[list[Fault], list]:
    """Log what is in a data set and everything wrong with it; return what is fatal, but for the
    images that cannot be used, and these as from `unreadable_images`.
    """
    utils.log(f"{part}: {index.annotation_file}\n{report(index)}")
    found, begin = faults(index, missing=False), time.perf_counter()
    unreadable = unreadable_images(index, workers)
    utils.log(f"  opened {len(index):,} images in {time.perf_counter() - begin:.1f} s")
    for fault in (*found, *image_faults(unreadable)):
        utils.log(f"  {'wrong' if fault.fatal else 'note'}: {fault}")
    return [fault for fault in found if fault.fatal], unreadable


def summary(index: CocoIndex) -> str:
    """One line for the log: what there is, and what of it does not train."""
    sizeless = ~index.usable & ~index.iscrowd
    rest = {
        "images without a usable box": len(index) - len(index.images_with_boxes()),
        "crowd boxes": np.count_nonzero(index.iscrowd),
        "boxes without a size": np.count_nonzero(sizeless),
    }
    categories = f"{len(index.boxes):,} boxes in {len(index.categories.ids)} categories"
    notable = [f"{name}: {count:,}" for name, count in rest.items() if count]
    return ", ".join([f"{len(index):,} images", categories, *notable])


def report(index: CocoIndex) -> str:
    """What is in the data set, as lines for the console."""
    areas = index.areas[~index.iscrowd]
    small, large = (np.count_nonzero(x) for x in (areas < 32**2, areas > 96**2))
    lines = [
        f"  {summary(index)}",
        f"  image sizes: {_image_sizes(index.sizes)}",
        f"  box sizes: {small:,} small (area under 32 x 32), {len(areas) - small - large:,} "
        f"medium, {large:,} large (over 96 x 96)",
        "  boxes that are no crowds, and images with them, by category:",
    ]
    names, images = index.categories.names, index.image_of_rows()
    width = max(map(len, names))
    for category_id, name in zip(index.categories.ids, names, strict=True):
        rows = (index.category_ids == category_id) & ~index.iscrowd
        boxes, with_them = np.count_nonzero(rows), len(np.unique(images[rows]))
        lines.append(f"    {name:<{width}} {boxes:9,} {with_them:9,}")
    return "\n".join(lines)


def _image_sizes(sizes: np.ndarray) -> str:
    """The most frequent sizes with their numbers, and how many others there are."""
    values, counts = np.unique(sizes, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = [f"{values[i, 0]} x {values[i, 1]} ({counts[i]:,})" for i in order[:5]]
    (low_w, low_h), (high_w, high_h) = sizes.min(axis=0), sizes.max(axis=0)
    more = (
        f" and {len(values) - 5:,} other sizes from {low_w} to {high_w} wide and {low_h} to "
        f"{high_h} high"
        if len(values) > 5
        else ""
    )
    return ", ".join(shown) + more
