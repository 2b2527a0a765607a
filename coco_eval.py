"""From detections to COCO's twelve numbers for boxes, and to what was found, box by box.

What the numbers mean: https://cocodataset.org/#detection-eval. They are computed by pycocotools, or
by faster-coco-eval, in a fraction of the time and here to the same bits.
"""

import contextlib
import gc
import io
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from internals.errors import UserError

try:
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster
except ImportError:
    FasterCOCO = None

LIBRARIES = {"pycocotools": (COCO, COCOeval)}
if FasterCOCO is not None:
    LIBRARIES["faster-coco-eval"] = (FasterCOCO, COCOeval_faster)
EVALUATORS = ("faster-coco-eval", "pycocotools")
WORTH_PROCESSES = 50_000  # detections: with fewer, the copies of this process take longer

METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
MEANING = {
    "AP": "AP at IoU 0.50:0.95",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    "APs": "AP, small boxes (area under 32 x 32)",
    "APm": "AP, medium boxes",
    "APl": "AP, large boxes (area over 96 x 96)",
    "AR1": "AR, 1 detection an image",
    "AR10": "AR, 10 detections an image",
    "AR100": "AR, 100 detections an image",
    "ARs": "AR, small boxes",
    "ARm": "AR, medium boxes",
    "ARl": "AR, large boxes",
}


def default_evaluator() -> str:
    """The fastest one that is installed."""
    return next(name for name in EVALUATORS if name in LIBRARIES)


def detection_rows(
    outputs: list[dict], image_ids: list[int], category_ids: np.ndarray
) -> np.ndarray:
    """A batch of a torchvision detector's outputs as float64 `[N, 7]`.

    The columns are image_id, x, y, width, height, score, category_id. `category_ids` holds the
    category id of each label, -1 for labels that the data set does not have: their rows are left
    out.
    """
    found = torch.cat(
        [
            torch.cat([o["boxes"], o["scores"][:, None], o["labels"][:, None].float()], dim=1)
            for o in outputs
        ]
    )
    found[:, 2:4] -= found[:, :2]  # in float32, as everybody's results are
    found = found.double().cpu().numpy()  # one copy from the device
    images = np.repeat(np.array(image_ids, dtype=np.float64), [len(o["labels"]) for o in outputs])
    categories = category_ids[found[:, 5].astype(np.int64)]
    rows = np.column_stack([images, found[:, :5], categories])
    return rows[categories >= 0]


def evaluate_detections(index, detections: np.ndarray, evaluator: str) -> dict:
    """The twelve numbers by name (see `METRICS`), and `per_category`: AP by category name.

    `index` is the ground truth, a `coco_utils.CocoIndex`; `detections` are rows of
    `detection_rows`, none or any number; `evaluator` is one of `LIBRARIES`. A number that nothing
    was there to measure, such as APl where no box is large, is None.
    """
    return evaluate_with_curves(index, detections, evaluator)[0]


def evaluate_with_curves(index, detections: np.ndarray, evaluator: str) -> tuple[dict, np.ndarray]:
    """What `score` gives, and the precisions whose mean is AP, float64 `[10, 101, K]`.

    They are those at IoU 0.50, 0.55, ..., 0.95, at recalls 0, 0.01, ..., 1, and of each category in
    the order of `index.categories`: NaN where a category has no true box.
    """
    collecting = gc.isenabled()
    gc.disable()  # which would look through a million new objects, none of them garbage
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = _ground_truth(index), _found(index, detections)
            if evaluator == "pycocotools":
                evaluation = _evaluation(evaluator, index.categories.ids, truth, found)
                evaluation.evaluate()
                evaluation.accumulate()
            else:
                evaluation = _by_category(evaluator, index.categories.ids, truth, found)
            evaluation.summarize()
    finally:
        if collecting:
            gc.enable()
    numbers = dict(zip(METRICS, map(_known, evaluation.stats[:12]), strict=True))
    # precision: [IoU thresholds, recall thresholds, categories, area ranges, detection limits]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_category = {}
    for k, name in enumerate(index.categories.names):
        measured = precision[:, :, k][precision[:, :, k] > -1]
        per_category[name] = float(measured.mean()) if measured.size else None
    curves = np.where(precision > -1, precision, np.nan)
    return {**numbers, "per_category": per_category}, curves


def _by_category(evaluator: str, category_ids: list[int], truth: dict, found: dict):
    """An evaluation of all categories, done one after the other, large ones on several cores.

    That they do not depend on each other is COCO's definition. Apart, they need the memory of one,
    which stays in the processor's cache, and no look at images that have nothing of a category.
    """
    parts = zip(_split(truth, category_ids), _split(found, category_ids), strict=True)
    work = [(evaluator, i, *part) for i, part in zip(category_ids, parts, strict=True)]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if min(cores, len(work)) > 1 and len(found["score"]) >= WORTH_PROCESSES:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(cores, 8), mp_context=fork) as pool:
            results = list(pool.map(_score_category, work))
    else:
        results = list(map(_score_category, work))
    evaluation = LIBRARIES[evaluator][1](iouType="bbox")
    evaluation.eval = {
        "precision": np.concatenate([precision for precision, _ in results], axis=2),
        "recall": np.concatenate([recall for _, recall in results], axis=1),
    }
    return evaluation


def _score_category(work: tuple) -> tuple[np.ndarray, np.ndarray]:
    evaluator, category_id, truth, found = work
    evaluation = _evaluation(evaluator, [category_id], truth, found)
    _evaluate_to_the_same_bits(evaluation, truth)
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _evaluate_to_the_same_bits(evaluation, truth: dict[str, np.ndarray]) -> None:
    """Run faster-coco-eval on one category, then give its precisions the rounding of pycocotools.

    pycocotools divides the hits by the number of detections + 2.2e-16. From two detections on that
    rounds to the number itself, but a first hit has precision 0.9999999999999998 with it and 1
    without. Such a 1 survives in the curves whose second hit has less, so their precision at the
    recall of the second hit is asked for, too.
    """
    params, plain, areas = evaluation.params, evaluation.params.recThrs, truth["area"]
    truths = np.array(
        [
            np.count_nonzero((areas >= low) & (areas <= high) & (truth["iscrowd"] == 0))
            for low, high in params.areaRng
        ]
    )
    between = 1.5 / truths.clip(min=1)  # more recall than one hit has, less than two
    params.recThrs = np.unique(np.concatenate([plain, between]))
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]  # [IoU, recall, 1, area ranges, limits]
    at_second = np.searchsorted(params.recThrs, between)[None, None, None, :, None]
    second = np.take_along_axis(precision, at_second, axis=1)
    precision = precision[:, np.searchsorted(params.recThrs, plain)]
    first_alone = (precision == 1) & (second < 1)
    evaluation.eval["precision"] = np.where(first_alone, 1 / (1 + np.spacing(1)), precision)
    params.recThrs = plain


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _evaluation(evaluator: str, category_ids: list[int], truth: dict, found: dict):
    """The library's own evaluation of arrays, without a file. Images with nothing are left out."""
    numbers = np.union1d(truth["image_id"], found["image_id"]).tolist()
    images = [{"id": number} for number in numbers or [0]]
    make_coco, make_evaluation = LIBRARIES[evaluator]
    objects = []
    for columns in (truth, found):
        names = (*columns, "id")
        values = [column.tolist() for column in columns.values()]
        # Numbered from 1: the libraries take id 0 for "not matched".
        values.append(range(1, 1 + len(columns["image_id"])))
        coco = make_coco()
        coco.dataset = {
            "images": images,
            "categories": [{"id": category_id} for category_id in category_ids],
            "annotations": [dict(zip(names, r, strict=True)) for r in zip(*values, strict=True)],
        }
        coco.createIndex()
        objects.append(coco)
    return make_evaluation(*objects, "bbox")


def _split(columns: dict[str, np.ndarray], category_ids: list[int]) -> list[dict[str, np.ndarray]]:
    """The rows of each category, in the order that they had."""
    order = np.argsort(columns["category_id"], kind="stable")
    sorted_ids = columns["category_id"][order]
    parts = [
        order[np.searchsorted(sorted_ids, i) : np.searchsorted(sorted_ids, i, side="right")]
        for i in category_ids
    ]
    return [{name: column[rows] for name, column in columns.items()} for rows in parts]


def _number_of(index, image_ids: np.ndarray) -> np.ndarray:
    """Images are numbered in the order of their ids, which decides between equal scores."""
    return np.searchsorted(np.sort(index.image_ids), image_ids)


def _ground_truth(index) -> dict[str, np.ndarray]:
    """COCO's fields of the true boxes, as columns."""
    return {
        "image_id": _number_of(index, index.image_ids[index.image_of_rows()]),
        "category_id": index.category_ids,
        "bbox": index.boxes,
        "area": index.areas,
        "iscrowd": index.iscrowd.astype(np.int64),
    }


def _found(index, detections: np.ndarray) -> dict[str, np.ndarray]:
    """COCO's fields of detections, as columns."""
    return {
        "image_id": _number_of(index, detections[:, 0].astype(np.int64)),
        "category_id": detections[:, 6].astype(np.int64),
        "bbox": detections[:, 1:5],
        "area": detections[:, 3] * detections[:, 4],
        "score": detections[:, 5],
        "iscrowd": np.zeros(len(detections), dtype=np.int64),
    }


def coco_results(detections: np.ndarray) -> list[dict]:
    """Rows of `detection_rows` in COCO's results format."""
    return [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": s}
        for i, *box, s, c in detections.tolist()
    ]


def write_results(detections: np.ndarray, file: Path) -> None:
    """Write COCO results JSON: what COCO's server and every evaluator of the field reads."""
    file.write_text(json.dumps(coco_results(detections)), encoding="utf-8")


def read_results(file: Path) -> np.ndarray:
    """Rows of `detection_rows` from COCO results JSON, float64 `[N, 7]`.

    Raises UserError for what is not a list of objects with `image_id`, `category_id`, `bbox` and
    `score`, all of them finite numbers.
    """
    try:
        results = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also of UTF-8
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(results, list):
        raise UserError(f"{file} holds no list: is it COCO results?")
    try:
        flat = [(r["image_id"], *r["bbox"], r["score"], r["category_id"]) for r in results]
        rows = np.array(flat, dtype=np.float64).reshape(len(results), 7)
        if np.isfinite(rows).all():
            return rows
    except (TypeError, KeyError, ValueError, OverflowError):
        pass
    number = next(n for n, row in enumerate(results) if not _is_result(row))
    raise UserError(
        f"{file}: row {number} is no COCO result with image_id, category_id, bbox and score: "
        f"{json.dumps(results[number])[:200]}"
    )


def _is_result(row: object) -> bool:
    try:
        numbers = [row["image_id"], *row["bbox"], row["score"], row["category_id"]]
        return len(numbers) == 7 and all(math.isfinite(number) for number in numbers)
    except (TypeError, KeyError, OverflowError):
        return False


def match(
    index, detections: np.ndarray, least_iou: float, same_category: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which detection found which true box, where each may have one partner.

    In the order of their scores, each detection takes the true box of its image with the highest
    IoU from `least_iou` on that is left, of its category or, without `same_category`, of any.
    Returns, for each detection, the row of its true box in the index, int64 `[N]`: -1 if there is
    none, -2 if at least that share of it is in a crowd of its category, which says nothing for or
    against it; and, for each row of the index, that of its detection, int64 `[M]`: -1 if it was
    missed, -2 for what nothing can find: crowds, and boxes without a size.
    """
    truth_of = np.full(len(detections), -1)
    found_by = np.where(index.usable, -1, -2)
    by_score = np.argsort(-detections[:, 5], kind="stable")
    images = index.positions_of(detections[by_score, 0].astype(np.int64))
    order = np.argsort(images, kind="stable")  # by image, and by score within each
    begins = np.searchsorted(images[order], np.arange(len(index) + 1))
    pairs = [np.empty((3, 0))]
    for i in np.flatnonzero((np.diff(begins) > 0) & (np.diff(index.offsets) > 0)).tolist():
        ranks, true = order[begins[i] : begins[i + 1]], index.box_range(i)
        rows = by_score[ranks]
        overlap, inside = overlaps(detections[rows, 1:5], index.boxes[true])
        same = detections[rows, 6][:, None] == index.category_ids[true]
        in_crowd = (inside >= least_iou) & same & index.iscrowd[true]
        truth_of[rows[in_crowd.any(axis=1)]] = -2
        fits = (overlap >= least_iou) & index.usable[true] & (same | (not same_category))
        d, t = np.nonzero(fits)
        pairs.append(np.stack([ranks[d], -overlap[d, t], true.start + t]))
    ranks, less, true = np.concatenate(pairs, axis=1)
    best_first = np.lexsort((less, ranks))
    rows = by_score[ranks[best_first].astype(np.int64)].tolist()
    for row, t in zip(rows, true[best_first].astype(np.int64).tolist(), strict=True):
        if truth_of[row] < 0 and found_by[t] == -1:
            truth_of[row], found_by[t] = t, row
    return truth_of, found_by


def overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU `[N, M]` of boxes `[N, 4]` with others `[M, 4]`, both as x, y, width, height; and the
    share of each box that is inside each of the others, `[N, M]`.
    """
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[:, :2] + others[:, 2:])
    common = (high - low).clip(min=0).prod(axis=2)
    area, other = boxes[:, 2:].prod(axis=1)[:, None], others[:, 2:].prod(axis=1)
    tiny = np.finfo(np.float64).tiny  # two boxes without a size have nothing in common
    return common / (area + other - common).clip(min=tiny), common / area.clip(min=tiny)


def table(numbers: dict) -> str:
    """The twelve numbers and the AP of each category as lines for the console."""
    rows = [(key, MEANING[key], numbers[key]) for key in METRICS]
    lines = [f"  {key:<6} {meaning:<38} {_digits(value)}" for key, meaning, value in rows]
    width = max(map(len, numbers["per_category"]))
    lines.append("  AP of each category:")
    lines += [f"    {name:<{width}}  {_digits(ap)}" for name, ap in numbers["per_category"].items()]
    return "\n".join(lines)


def _digits(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"
