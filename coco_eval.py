"""From detections to COCO's twelve numbers for boxes.

What the numbers mean: https://cocodataset.org/#detection-eval. They are computed by pycocotools, or
by faster-coco-eval, in a fraction of the time and here to the same bits.
"""

import contextlib
import gc
import io
import json
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster
except ImportError:
    FasterCOCO = None

LIBRARIES = {"pycocotools": (COCO, COCOeval)}
if FasterCOCO is not None:
    LIBRARIES["faster-coco-eval"] = (FasterCOCO, COCOeval_faster)
EVALUATORS = ("faster-coco-eval", "pycocotools")

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


def score(index, detections: np.ndarray, evaluator: str) -> dict:
    """The twelve numbers by name (see `METRICS`), and `per_category`: AP by category name.

    `index` is the ground truth, a `coco_utils.CocoIndex`; `detections` are rows of
    `detection_rows`, none or any number; `evaluator` is one of `LIBRARIES`. A number that nothing
    was there to measure, such as APl where no box is large, is None.
    """
    collecting = gc.isenabled()
    gc.disable()  # which would look through a million new objects, none of them garbage
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            truth, results = _ground_truth(index, evaluator), _results(index, detections, evaluator)
            evaluation = LIBRARIES[evaluator][1](truth, results, "bbox")
            if evaluator == "pycocotools":
                evaluation.evaluate()
                evaluation.accumulate()
            else:
                _evaluate_to_the_same_bits(evaluation, index)
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
    return {**numbers, "per_category": per_category}


def _evaluate_to_the_same_bits(evaluation, index) -> None:
    """Run faster-coco-eval, then give its precisions the rounding of pycocotools.

    pycocotools divides the hits by the number of detections + 2.2e-16. From two detections on that
    rounds to the number itself, but a first hit has precision 0.9999999999999998 with it and 1
    without. Such a 1 survives in the curves whose second hit has less, so their precision at the
    recall of the second hit is asked for, too.
    """
    params, plain = evaluation.params, evaluation.params.recThrs
    counted = np.stack(
        [
            (index.areas >= low) & (index.areas <= high) & ~index.iscrowd
            for low, high in params.areaRng
        ]
    )
    each_category = index.category_ids == np.array(params.catIds)[:, None]
    truths = (each_category[:, None] & counted).sum(axis=2)  # [categories, area ranges]
    between = 1.5 / truths.clip(min=1)  # more recall than one hit has, less than two
    params.recThrs = np.unique(np.concatenate([plain, between.ravel()]))
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]  # [IoU, recall, categories, area ranges, limits]
    at_second = np.searchsorted(params.recThrs, between)[None, None, :, :, None]
    second = np.take_along_axis(precision, at_second, axis=1)
    precision = precision[:, np.searchsorted(params.recThrs, plain)]
    first_alone = (precision == 1) & (second < 1)
    evaluation.eval["precision"] = np.where(first_alone, 1 / (1 + np.spacing(1)), precision)
    params.recThrs = plain


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _coco(index, evaluator: str, columns: dict[str, np.ndarray]) -> COCO:
    """The library's own object, made of arrays, without a file.

    Images are numbered in the order of their ids, which decides between equal scores. Annotations
    are numbered from 1: id 0 means "not matched" to the libraries.
    """
    coco = LIBRARIES[evaluator][0]()
    columns["image_id"] = np.searchsorted(np.sort(index.image_ids), columns["image_id"])
    names = (*columns, "id")
    values = [column.tolist() for column in columns.values()]
    values.append(range(1, 1 + len(columns["image_id"])))
    coco.dataset = {
        "images": [{"id": number} for number in range(len(index))],
        "categories": [{"id": category_id} for category_id in index.categories.ids],
        "annotations": [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)],
    }
    coco.createIndex()
    return coco


def _ground_truth(index, evaluator: str) -> COCO:
    columns = {
        "image_id": index.image_ids[index.image_of_rows()],
        "category_id": index.category_ids,
        "bbox": index.boxes,
        "area": index.areas,
        "iscrowd": index.iscrowd.astype(np.int64),
    }
    return _coco(index, evaluator, columns)


def _results(index, detections: np.ndarray, evaluator: str) -> COCO:
    columns = {
        "image_id": detections[:, 0].astype(np.int64),
        "category_id": detections[:, 6].astype(np.int64),
        "bbox": detections[:, 1:5],
        "area": detections[:, 3] * detections[:, 4],
        "score": detections[:, 5],
        "iscrowd": np.zeros(len(detections), dtype=np.int64),
    }
    return _coco(index, evaluator, columns)


def coco_results(detections: np.ndarray) -> list[dict]:
    """Rows of `detection_rows` in COCO's results format."""
    return [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": s}
        for i, *box, s, c in detections.tolist()
    ]


def write_results(detections: np.ndarray, file: Path) -> None:
    """Write COCO results JSON: what COCO's server and every evaluator of the field reads."""
    file.write_text(json.dumps(coco_results(detections)), encoding="utf-8")


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
