#!/usr/bin/env python3
"""Measure how many planted annotation errors are among the first suspects of the report.

    python benchmarks/suspects.py output/best

OUTPUT_DIR has the evaluation of a detector, as by train.py --test-only. In the annotations that it
was evaluated against, in memory, boxes are removed, moved and renamed at random, for several seeds.
`here` is the order of suspects.json, `hotcoco` that of the label errors in
`COCOeval.image_diagnostics`. The data set has errors of its own, which compete with the planted
ones.
"""

import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import common
import hotcoco
import numpy as np
from hotcoco.primitives import bbox_iou

from coco_utils import CocoIndex, Split
from reporting.analysis import DetectionResults, read_history, read_results
from reporting.suspects import find_suspects, to_coco

KINDS = ("removed", "moved", "renamed")


class Claim(NamedTuple):
    """A suspect: the id of its image, that of its annotation (None without one), and its boxes."""

    image_id: int
    annotation_id: int | None
    boxes: list


def plant_errors(index: CocoIndex, seed: int, count: int) -> tuple[CocoIndex, np.ndarray]:
    """Plant `count` errors of each of `KINDS`.

    Returns:
        A copy of the index with the errors, and the rows of the index that they concern, int64
        `[3, count]`. Moved boxes are shifted by 20 to 40 % of their width and height (IoU 0.22 to
        0.47), renamed ones get any other category.
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(np.flatnonzero(index.usable), (3, count), replace=False)
    removed, moved, renamed = rows
    boxes, category_ids = index.boxes.copy(), index.category_ids.copy()
    sides, limits = boxes[moved, 2:], index.sizes[index.image_of_rows()[moved]]
    shifts = sides * rng.uniform(0.2, 0.4, (count, 2)) * rng.choice([-1, 1], (count, 2))
    corners = boxes[moved, :2] + shifts
    outside = (corners < 0) | (corners + sides > limits)
    boxes[moved, :2] = np.where(outside, boxes[moved, :2] - shifts, corners)
    ids = np.array(index.categories.ids)
    others = np.searchsorted(ids, category_ids[renamed]) + rng.integers(1, len(ids), count)
    category_ids[renamed] = ids[others % len(ids)]

    kept = np.setdiff1d(np.arange(len(boxes)), removed)
    planted = copy.copy(index)
    planted.offsets = np.searchsorted(index.image_of_rows()[kept], np.arange(len(index) + 1))
    planted.boxes, planted.category_ids = boxes[kept], category_ids[kept]
    for name in ("annotation_ids", "iscrowd", "areas", "usable"):
        setattr(planted, name, getattr(index, name)[kept])
    return planted, rows


def claims_here(index: CocoIndex, detections: np.ndarray) -> list[Claim]:
    """Return the suspects of the report, worst first."""
    results = DetectionResults(index, detections, curves=None, matches=None)
    rows = to_coco(results, find_suspects(results))["annotations"]
    return [
        Claim(
            row["image_id"],
            row["annotation_id"],
            [box for box in (row["bbox"], row["annotation_bbox"]) if box],
        )
        for row in rows
    ]


def claims_of_hotcoco(index: CocoIndex, detections: np.ndarray) -> list[Claim]:
    """Return the label errors of hotcoco in its own order; the ids must not be negative."""
    truth = index.ground_truth()
    image_ids = index.image_ids[index.image_of_rows()[truth.rows]]
    columns = (image_ids, index.category_ids[truth.rows], truth.boxes)
    images = [{"id": i} for i in index.image_ids.tolist()]
    categories = [{"id": i, "name": name} for i, name in index.categories.id_to_name.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = hotcoco.COCO.from_arrays(
            images,
            categories,
            *columns,
            area=truth.areas,
            iscrowd=index.iscrowd[truth.rows].astype(np.int64),
        )
        evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(detections), "bbox")
        evaluation.evaluate()
    claims = []
    for error in evaluation.image_diagnostics(iou_thr=0.5, score_thr=0.5)["label_errors"]:
        boxes, annotation_id = [detections[error["dt_id"] - 1, 1:5]], None  # ids from 1
        if error["gt_id"] is not None:
            boxes.append(truth.boxes[error["gt_id"] - 1])
            annotation_id = int(index.annotation_ids[truth.rows[error["gt_id"] - 1]])
        claims.append(Claim(error["image_id"], annotation_id, boxes))
    return claims


ARMS = {"here": claims_here, "hotcoco": claims_of_hotcoco}


def count_found(index: CocoIndex, rows: np.ndarray, claims: Iterable[Claim]) -> dict[str, int]:
    """Count the planted errors that a claim names or points at (IoU 0.5), by kind.

    Args:
        index: Without the errors.
        rows: Of `plant_errors`.
        claims: Those that a person looks at.
    """
    images, found = index.image_ids[index.image_of_rows()], dict.fromkeys(KINDS, 0)
    for kind, of_kind in zip(KINDS, rows.tolist(), strict=True):
        for row in of_kind:
            here = [claim for claim in claims if claim.image_id == images[row]]
            named = any(claim.annotation_id == index.annotation_ids[row] for claim in here)
            boxes = np.array([box for claim in here for box in claim.boxes]).reshape(-1, 4)
            overlap = bbox_iou(boxes, index.boxes[[row]], np.zeros(1, bool)).max(initial=0)
            found[kind] += named or bool(overlap >= 0.5)
    return found


def measure(index: CocoIndex, detections: np.ndarray, args) -> dict[str, list[dict]]:
    """Plant errors for each seed; return what each arm finds of them."""
    found = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        planted, rows = plant_errors(index, seed, args.count)
        for arm, claim in ARMS.items():
            first = claim(planted, detections)[: args.first]
            found[arm].append(count_found(index, rows, first))
    return found


def make_up_detections(index: CocoIndex, seed: int = 0) -> np.ndarray:
    """Make up the detections of a good detector: nine of ten boxes, and a third as many others.

    Returns:
        Rows of `coco_eval.detection_rows`.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(index.usable)
    rows = rows[rng.random(len(rows)) < 0.9]
    boxes = index.boxes[rows] + np.tile(index.boxes[rows, 2:], 2) * rng.normal(
        0, 0.03, (len(rows), 4)
    )
    right = [index.image_ids[index.image_of_rows()[rows]], boxes, rng.beta(8, 1, len(rows))]
    n = len(rows) // 3
    corner, side = rng.uniform(0, 90, (n, 2)), rng.uniform(20, 60, (n, 2))
    wrong = [rng.choice(index.image_ids, n), corner, side, rng.beta(1, 6, n)]
    return np.concatenate(
        [
            np.column_stack([*right, index.category_ids[rows]]),
            np.column_stack([*wrong, rng.choice(index.categories.ids, n)]),
        ]
    )


def built_in_data(folder: Path) -> tuple[CocoIndex, np.ndarray]:
    """Make the built-in data set; return its validation annotations and made-up detections."""
    sys.path.append(str(common.ROOT / "datasets"))
    import shapes

    shapes.make_split(folder, "val")
    index = CocoIndex(Split(folder / "annotations/instances_val2017.json", folder / "val2017"))
    return index, make_up_detections(index)


def report(found: dict[str, list[dict]], args) -> None:
    """Print the mean counts over the seeds."""
    rows = []
    for arm, counts in found.items():
        means = [float(np.mean([count[kind] for count in counts])) for kind in KINDS]
        rows.append([arm, *means, sum(means)])
    print(
        f"planted errors among the first {args.first} suspects, mean over {len(args.seeds)} seeds:"
    )
    header = [f"{kind}, of {args.count}" for kind in KINDS]
    common.print_table(["order", *header, f"all, of {3 * args.count}"], rows)


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0], repeats=False)
    parser.add_argument("output_dir", type=Path, nargs="?", metavar="OUTPUT_DIR",
                        help="folder of an evaluation; not with --quick")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10, 15), metavar="SEED",
                        help="(default: 10 to 14)")  # fmt: skip
    parser.add_argument("--count", type=int, default=20, metavar="N",
                        help="errors of each kind (default: 20)")  # fmt: skip
    parser.add_argument("--first", type=int, default=100, metavar="N",
                        help="suspects that a person looks at (default: 100)")  # fmt: skip
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            found = measure(*built_in_data(Path(folder)), args)
    elif args.output_dir is None:
        parser.error("give OUTPUT_DIR, a folder of train.py --test-only, or --quick")
    else:
        results = read_results(args.output_dir, read_history(args.output_dir / "metrics.jsonl"))
        found = measure(results.index, results.detections, args)
    report(found, args)
    common.save_results(args.json, found=found)


if __name__ == "__main__":
    main()
