#!/usr/bin/env python3
"""Cut the images of a COCO annotation file into overlapping tiles, to train on large images.

    python datasets/tile.py train.json train_images my_tiles --split train --tile 640
    python datasets/tile.py val.json val_images my_tiles --split val --tile 640
    python train.py --data-path my_tiles

Split a data set before it is cut (datasets/split.py): tiles of one image must not be in both
splits. Images of more than 89 million pixels are read row by row, for which rasterio is needed.

A tile is OUTPUT/train2017/NAME_X_Y, with X, Y of its upper left corner in the image NAME: a JPEG
of quality 95 if the image is a JPEG, a PNG of the same pixels otherwise. In the annotation file
`x`, `y`, `source_image_id`, `source_file_name` and `source_annotation_id` say where it is from.

Boxes are clipped to the tile. One of which less than --min-visible of its area is in the tile
becomes a crowd (`iscrowd`) there: it does not train, and detections of what is visible of the
object count neither way. Crowds stay crowds. `area` is that of the annotation, by the share that
is visible. Other fields, such as segmentations, are not written.
"""

import argparse
import posixpath
import random
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import coco_layout as layout
import numpy as np
from PIL import Image

import utils
from coco_utils import CocoIndex, Split
from internals import data_checks, image_rows, images
from internals.bit_depth import BIT_DEPTHS
from internals.command_line import ArgumentParser, positive_int, share, share_below_1, share_or_0
from internals.errors import DataError, UserError
from internals.failures import run_command
from internals.image_notes import NOTE_REMEDIES, ImageNote
from internals.images import ImageRules
from internals.tiles import Tile, cut_tiles

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
JPEG_OPTIONS = {"quality": 95}
# Of photos, files as small as by default, and written in a fifth of the time.
PNG_OPTIONS = {"compress_type": zlib.Z_RLE}


def load_index(args: argparse.Namespace, notes: list[str]) -> CocoIndex:
    """Read the annotation file; raise DataError for what a training would refuse, but for size."""
    index = CocoIndex(Split(args.annotations, args.images))
    issues = data_checks.find_issues(index, trust_boxes=args.trust_boxes)
    issues = [issue for issue in issues if issue.kind != data_checks.TOO_LARGE]
    data_checks.raise_if_fatal(index, issues)
    notes += [str(issue) for issue in issues if not issue.fatal]
    names = Counter(tile_name(index, i, 0, 0).casefold() for i in range(len(index)))
    for i in range(len(index)):
        if names[tile_name(index, i, 0, 0).casefold()] > 1:
            raise UserError(
                f"{args.annotations}: {index.file_name(i)} (id {index.image_ids[i]}) has the name "
                "of another image, but for suffix or letter case, and so would its tiles: rename it"
            )
    return index


def set_image_rules(index: CocoIndex, args: argparse.Namespace, notes: list[str]) -> None:
    """Set how images are read, as `train.py` does; of large ones the bit depth is not measured."""
    if args.bit_depth is None:
        is_large = index.sizes.astype(np.int64).prod(axis=1) > images.MAX_PIXELS
        files = [index.path(i) for i in np.flatnonzero(~is_large)]
        files = [file for file in files if file.suffix.lower() in images.DEEP_SUFFIXES]
        if found := images.measure_bit_depth(files):
            args.bit_depth, text = found
            notes.append(text)
    index.rules = ImageRules(args.bit_depth, args.truncated_images == "use")


def tile_name(index: CocoIndex, image: int, x: int, y: int) -> str:
    """Return the file name of a tile, in the subfolder that the image is in."""
    path = PurePosixPath(posixpath.normpath(index.file_name(image)))
    suffix = ".jpg" if path.suffix.lower() in JPEG_SUFFIXES else ".png"
    return path.with_name(f"{path.stem}_{x}_{y}{suffix}").as_posix()


class TiledSet:
    """The tiles of a data set: writes their images, and collects their annotations.

    Attributes:
        content: The content of the annotation file.
        counts: How many boxes became crowds ("parts"), and how many tiles were not kept ("left
            out").
        is_kept: Which boxes of the index are a box of a tile, bool `[M]`.
        notes: What is to be known about the images.
    """

    def __init__(self, index: CocoIndex, folder: Path, args: argparse.Namespace):
        self.index, self.folder, self.args = index, folder, args
        categories = [{"id": i, "name": n} for i, n in index.categories.id_to_name.items()]
        self.content = {"images": [], "annotations": [], "categories": categories}
        self.counts = Counter()
        self.is_kept = np.zeros(len(index.boxes), dtype=bool)
        self.notes: list[ImageNote] = []
        boxes = index.clipped_boxes()
        self.areas = np.where(np.isfinite(index.areas), index.areas, boxes[:, 2] * boxes[:, 3])
        self.corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        self.box_areas = boxes[:, 2] * boxes[:, 3]

    def add_image(self, image: int) -> None:
        """Cut the image at a position of the index."""
        size, notes = tuple(self.index.sizes[image].tolist()), []
        try:
            with image_rows.open_rows(
                self.index.path(image), self.index.rules, notes, size
            ) as rows:
                for tile in cut_tiles(rows, self.args.tile, self.args.tile_overlap):
                    self.add_tile(image, tile)
        except DataError as error:
            row = f"image {self.index.image_ids[image]} of {self.index.annotation_file}"
            raise DataError(f"{row}: {error}") from None
        self.notes += notes

    def add_tile(self, image: int, tile: Tile) -> None:
        """Write a tile and collect its annotations, unless it has no box and is not drawn."""
        name = tile_name(self.index, image, tile.x, tile.y)
        height, width = tile.pixels.shape[:2]
        tile_id = len(self.content["images"]) + 1
        annotations = self.find_annotations(image, (tile.x, tile.y, width, height), tile_id)
        if all(row["iscrowd"] for row in annotations):
            draw = random.Random(f"{self.args.seed} {name}").random()
            if draw >= self.args.keep_empty_tiles:
                self.counts["left out"] += 1
                return
        self.content["images"].append(
            {
                "id": tile_id,
                "file_name": name,
                "width": width,
                "height": height,
                "x": tile.x,
                "y": tile.y,
                "source_image_id": int(self.index.image_ids[image]),
                "source_file_name": self.index.file_name(image),
            }
        )
        self.content["annotations"] += annotations
        self.save(tile.pixels, self.folder / name)

    def find_annotations(
        self, image: int, tile: tuple[int, int, int, int], tile_id: int
    ) -> list[dict]:
        """Return the annotations of a tile at x, y, width, height, and note the boxes it has."""
        x, y, width, height = tile
        box_range = self.index.box_range(image)
        rows = np.arange(box_range.start, box_range.stop)
        x1, y1, x2, y2 = self.corners[rows].T
        x1, x2 = np.clip([x1 - x, x2 - x], 0, width)
        y1, y2 = np.clip([y1 - y, y2 - y], 0, height)
        boxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
        visible = boxes[:, 2] * boxes[:, 3] / np.maximum(self.box_areas[rows], 1e-9)
        iscrowd = self.index.iscrowd[rows]
        in_tile = (self.index.usable[rows] | iscrowd) & (visible > 0)
        # A whole box may have slightly less than 1, as its corners are rounded.
        is_box = in_tile & ~iscrowd & (visible >= self.args.min_visible - 1e-6)
        self.is_kept[rows[is_box]] = True
        self.counts["parts"] += int(np.count_nonzero(in_tile & ~iscrowd & ~is_box))
        first_id = len(self.content["annotations"]) + 1
        return [
            {
                "id": first_id + n,
                "image_id": tile_id,
                "category_id": int(self.index.category_ids[rows[i]]),
                "bbox": boxes[i].round(4).tolist(),
                "area": round(float(self.areas[rows[i]] * visible[i]), 4),
                "iscrowd": int(not is_box[i]),
                "source_annotation_id": self.annotation_id(rows[i]),
            }
            for n, i in enumerate(np.flatnonzero(in_tile))
        ]

    def annotation_id(self, row: int) -> int | None:
        """Return the id of a row of the index; None if the file has none."""
        number = int(self.index.annotation_ids[row])
        return number if number >= 0 else None

    @staticmethod
    def save(pixels: np.ndarray, file: Path) -> None:
        """Write the image of a tile."""
        file.parent.mkdir(parents=True, exist_ok=True)
        options = JPEG_OPTIONS if file.suffix == ".jpg" else PNG_OPTIONS
        Image.fromarray(pixels).save(file, **options)

    def describe(self) -> list[str]:
        """Return notes on boxes, tiles and images."""
        notes, args = [], self.args
        if count := self.counts["parts"]:
            notes.append(
                f"{count:,} parts of boxes, less than {args.min_visible} of them in the tile, are "
                "crowds there: they do not train, and detections of them count neither way"
            )
        lost = np.flatnonzero(self.index.usable & ~self.is_kept)
        if len(lost):
            largest = lost[self.box_areas[lost].argmax()]
            width, height = self.index.boxes[largest, 2:]
            notes.append(
                f"{len(lost):,} boxes are in no tile, as less than {args.min_visible} of them is "
                f"in any, the largest {width:.0f} x {height:.0f} pixels (annotation "
                f"{self.annotation_id(largest)}): raise --tile, or lower --min-visible"
            )
        if count := self.counts["left out"]:
            notes.append(f"{count:,} tiles without a box are left out (--keep-empty-tiles)")
        kinds = {}
        for kind, text in self.notes:
            kinds.setdefault(kind, []).append(text)
        for kind, texts in kinds.items():
            more = ", ..." if len(texts) > 3 else ""
            listed = ", ".join(texts[:3])
            notes.append(f"{len(texts):,} {kind}: {listed}{more}. {NOTE_REMEDIES[kind]}")
        return notes


def next_command(args: argparse.Namespace) -> str:
    """Return the command that cuts the other split, or the check of both."""
    other = "val" if args.split == "train" else "train"
    if layout.annotation_file(args.output, other).exists():
        return layout.command_line("train.py", "--data-path", args.output, "--check-data")
    inputs = f"{other.upper()}_ANNOTATIONS", f"{other.upper()}_IMAGES", args.output
    flags = ["--split", other, "--tile", args.tile, "--tile-overlap", args.tile_overlap]
    flags += ["--min-visible", args.min_visible]
    flags += ["--bit-depth", args.bit_depth] if args.bit_depth else []
    return layout.command_line("datasets/tile.py", *inputs, *flags)


def build_parser() -> ArgumentParser:
    """Build the parser of this script."""
    parser = layout.build_parser(
        __doc__, annotations="annotation file of one split", images="folder of its images"
    )
    add = parser.add_argument
    add("--split", choices=("train", "val"), default="train",
        help="split to write; the other one may exist (default: %(default)s)")  # fmt: skip
    add("--tile", type=positive_int, required=True, metavar="SIZE",
        help="height and width of the tiles in pixels; a smaller image is one tile")  # fmt: skip
    add("--tile-overlap", type=share_below_1, default=0.2, metavar="SHARE",
        help="neighbors overlap by at least this share of their size: objects of up to this size "
        "are whole in a tile (default: %(default)s)")  # fmt: skip
    add("--min-visible", type=share, default=0.3, metavar="SHARE",
        help="keep a box if at least this share of its area is in the tile, otherwise it is a "
        "crowd there (default: %(default)s)")  # fmt: skip
    add("--keep-empty-tiles", type=share_or_0, default=1.0, metavar="SHARE",
        help="keep this share of the tiles without a box, drawn by --seed; for val keep all, or "
        "false detections in them will not count (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    add("--bit-depth", type=int, choices=BIT_DEPTHS, metavar="BITS",
        help="the bits that 16-bit gray images hold: 8, 10, 12, 14 or 16 (default: those of the "
        "largest value in a sample of the images)")  # fmt: skip
    add("--truncated-images", choices=("refuse", "use"), default="refuse",
        help="what to do with a JPEG whose end is missing: refuse it, or use it if three quarters "
        "of its rows can be decoded; the rest is gray (default: %(default)s)")  # fmt: skip
    add("--trust-boxes", action="store_true",
        help="cut although the boxes look like shares of the image, or corners instead of sizes "
        "(default: refuse)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Cut the images of one split."""
    args = build_parser().parse_args(argv)
    layout.check_split_output(args.output, args.split)
    notes = []
    index = load_index(args, notes)
    set_image_rules(index, args, notes)
    layout.create_folders(args.output)
    tiled = TiledSet(index, args.output / f"{args.split}2017", args)
    for image in utils.Progress(range(len(index)), len(index), 0, "cutting images"):
        tiled.add_image(image)
    count = len(tiled.content["images"])
    if not count:
        raise UserError(f"{args.annotations}: no tile has a box: raise --keep-empty-tiles")
    # Written last, so that the output of an interrupted run does not look complete.
    layout.write_annotations(args.output, args.split, tiled.content)
    written = f"{count:,} tiles of {len(index):,} images"
    notes += tiled.describe()
    layout.print_summary(
        args.output, {args.split: tiled.content}, notes, written, next_command(args)
    )


if __name__ == "__main__":
    run_command(main)
