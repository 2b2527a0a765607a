#!/usr/bin/env python3
"""Detect objects in a mosaic of 12,000 x 9,000 pixels: as well with tiles as in its parts alone?

    python benchmarks/tiles.py CHECKPOINT --data-path my_data --tile 480

The mosaic is made of the validation images of a data set, repeated until it is full, and has their
boxes; gaps between them have the color with which the model pads images. The arms are: each image
alone; the mosaic in tiles, read from its file in parts (needs rasterio); the whole mosaic at once,
decoded before; and, if it is installed, in the slices of `supervision.InferenceSlicer` of the same
size and overlap, decoded before. AP is that of all detections of the mosaic, by hotcoco, whose bits
are those of pycocotools, which would take hours for one image with so many boxes. Detections in an
image alone end at its border, so those in the mosaic are cut there, too; the second AP is without
this. Without CHECKPOINT, as with --quick, a detector is trained for two steps on the built-in data
set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import common
import numpy as np
from PIL import Image

import coco_eval
from coco_utils import CocoIndex, Split
from internals.layouts import find_split
from predict import Detector

ARMS = ("single images", "tiles", "whole mosaic", "supervision")
FILES = {"truth": "truth.json", "mosaic": "mosaic.png", "places": "places.json"}
LIMIT = 1_000_000  # detections that count
GAP, PADDING = 20, (124, 116, 104)  # pixels between images; the mean that models subtract


def make_mosaic(args: argparse.Namespace, folder: Path) -> None:
    """Write the mosaic, its annotation file, and where each of its images comes from."""
    index = CocoIndex(find_split(args.data_path, "val", None, None))
    cell_width, cell_height = (index.sizes.max(axis=0) + GAP).tolist()
    width, height = args.size
    canvas = np.full((height, width, 3), PADDING, dtype=np.uint8)
    columns, boxes = width // cell_width, index.true_boxes()
    annotations, places = [], []
    for cell in range(columns * (height // cell_height)):
        i, (row, column) = cell % len(index), divmod(cell, columns)
        x, y = column * cell_width, row * cell_height
        with Image.open(index.path(i)) as image:
            pixels = np.asarray(image.convert("RGB"))
        canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        places.append((str(index.path(i)), x, y, x + pixels.shape[1], y + pixels.shape[0]))
        rows = index.box_range(i)
        for box in np.flatnonzero(index.usable[rows]) + rows.start:
            left, top, *sides = boxes[box].tolist()
            ids = {"id": len(annotations) + 1, "image_id": 1}
            category = {"category_id": int(index.category_ids[box])}
            annotations.append({**ids, **category, "bbox": [left + x, top + y, *sides]})
    names = [{"id": i, "name": name} for i, name in index.categories.id_to_name.items()]
    images = [{"id": 1, "file_name": FILES["mosaic"], "width": width, "height": height}]
    truth = {"images": images, "annotations": annotations, "categories": names}
    (folder / FILES["truth"]).write_text(json.dumps(truth))
    (folder / FILES["places"]).write_text(json.dumps(places))
    Image.fromarray(canvas).save(folder / FILES["mosaic"], compress_level=1)


# ---------------------------------------------------------------------------------------- arms


def detect_single(detector: Detector, folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Detect in each image alone; return rows in the mosaic."""
    places = json.loads((folder / FILES["places"]).read_text())
    found = {file: detector(file).to_rows(1) for file in {file for file, *_ in places}}
    shifted = [found[file] + np.array([0, x, y, 0, 0, 0, 0]) for file, x, y, *_ in places]
    return np.concatenate(shifted)


def detect_file(detector: Detector, folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Detect in the file of the mosaic."""
    return detector(folder / FILES["mosaic"]).to_rows(1)


def detect_decoded(detector: Detector, folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Detect in the decoded mosaic."""
    return detector(Image.open(folder / FILES["mosaic"])).to_rows(1)


def detect_slices(detector: Detector, folder: Path, args: argparse.Namespace) -> np.ndarray:
    """Detect in slices of supervision."""
    import supervision

    def detect(tile: np.ndarray) -> supervision.Detections:
        return supervision.Detections(**detector(tile).to_arrays())

    overlap = round(args.tile * args.tile_overlap)
    slicer = supervision.InferenceSlicer(detect, slice_wh=args.tile, overlap_wh=overlap)
    found = slicer(np.asarray(Image.open(folder / FILES["mosaic"])))
    sides = found.xyxy[:, 2:] - found.xyxy[:, :2]
    columns = [found.xyxy[:, :2], sides, found.confidence, found.class_id]
    return np.column_stack([np.ones(len(found)), *columns]).astype(np.float64)


def measure(args: argparse.Namespace) -> dict:
    """Run the arm of --arm; return AP, seconds and peak memory."""
    function = dict(
        zip(ARMS, (detect_single, detect_file, detect_decoded, detect_slices), strict=True)
    )[args.arm]
    tile = args.tile if args.arm == "tiles" else None
    detector = Detector.load(
        args.checkpoint, score_threshold=0.05, amp=args.amp, tile=tile,
        tile_overlap=args.tile_overlap,
    )  # fmt: skip
    idle, start = common.process_memory("VmRSS"), time.perf_counter()
    try:
        rows = function(detector, args.work, args)
    except MemoryError as error:  # supervision compares all pairs of boxes
        return {"error": str(error)}
    seconds, peak = time.perf_counter() - start, common.process_memory("VmHWM")
    index = CocoIndex(Split(args.work / FILES["truth"], args.work))
    metrics, uncut = (
        coco_eval.evaluate_detections(index, boxes, "hotcoco", LIMIT)
        for boxes in (cut_at_borders(rows, args.work), rows)
    )
    numbers = {name: metrics[name] for name in ("AP", "AP50", "AP75")}
    numbers |= {"AP uncut": uncut["AP"], "boxes": len(rows), "seconds": seconds}
    return {**numbers, "idle_mib": idle, "peak_mib": peak}


def cut_at_borders(rows: np.ndarray, folder: Path) -> np.ndarray:
    """Cut boxes at the borders of the image in which their middle is."""
    places = json.loads((folder / FILES["places"]).read_text())
    rows, cells = rows.copy(), np.array([place[1:] for place in places])
    middles = rows[:, 1:3] + rows[:, 3:5] / 2
    # The last image that begins before the middle: gaps belong to the image before.
    before = (cells[None, :, :2] <= middles[:, None]).all(axis=2)
    cell = cells[before.shape[1] - 1 - before[:, ::-1].argmax(axis=1)]
    low, high = rows[:, 1:3].copy(), rows[:, 1:3] + rows[:, 3:5]
    rows[:, 1:3] = low.clip(cell[:, :2], cell[:, 2:])
    rows[:, 3:5] = high.clip(cell[:, :2], cell[:, 2:]) - rows[:, 1:3]
    return rows


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Make what is missing: data and a checkpoint."""
    if args.data_path is None:
        args.data_path = folder / "shapes"
        run_script("datasets/shapes.py", args.data_path)
    if args.checkpoint is None:
        model = ("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none")
        flags = ("--min-size", "128", "--max-steps", "2", "--batch-size", "4", "--no-report")
        out = ("--output-dir", folder / "out")
        run_script("train.py", "--data-path", args.data_path, *model, *flags, *out)
        args.checkpoint = folder / "out/model_best.pth"


def run_script(name: str, *argv: object) -> None:
    """Run a script of this project, without its output."""
    command = [sys.executable, common.ROOT / name, *argv]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Compare the arms, or measure one."""
    parser = common.build_parser(__doc__.partition("\n")[0], repeats=False)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data-path", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, nargs=2, default=(12_000, 9_000), metavar=("W", "H"))
    parser.add_argument("--tile", type=int, default=480, metavar="SIZE")
    parser.add_argument("--tile-overlap", type=float, default=0.5, metavar="SHARE")
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    args.size = (250, 200) if args.quick else args.size
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        make_mosaic(args, Path(folder))
        flags = [str(args.checkpoint), "--tile", str(args.tile)]
        flags += ["--tile-overlap", str(args.tile_overlap), *(["--amp"] if args.amp else [])]
        names = [name for name in ARMS if name != "supervision" or find_spec("supervision")]
        found = {}
        for name in names:
            arm = common.Arm(__file__, name, Path(folder), threads=None, flags=flags)
            found[name] = arm.run()
            print(f"{name}: {found[name]}", flush=True)
    keys = found[ARMS[0]].keys()
    rows = [[name, *(row.get(key) for key in keys)] for name, row in found.items()]
    common.print_table(["", *keys], rows)
    common.save_results(args.json, found=found, tile=args.tile, size=args.size)


if __name__ == "__main__":
    main()
