"""From detections to COCO's twelve numbers for boxes, computed by pycocotools.

What the numbers mean: https://cocodataset.org/#detection-eval
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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


def detection_rows(output: dict, image_id: int, category_ids: np.ndarray) -> np.ndarray:
    """One image's output of a torchvision detector as float64 `[N, 7]`.

    The columns are image_id, x, y, width, height, score, category_id. `category_ids` holds the
    category id of each label, -1 for labels that the data set does not have: their rows are left
    out.
    """
    boxes = output["boxes"].double().cpu().numpy()
    rows = np.empty((len(boxes), 7))
    rows[:, 0] = image_id
    rows[:, 1:3], rows[:, 3:5] = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    rows[:, 5] = output["scores"].double().cpu().numpy()
    rows[:, 6] = category_ids[output["labels"].cpu().numpy()]
    return rows[rows[:, 6] >= 0]


def score(index, detections: np.ndarray) -> dict:
    """The twelve numbers by name (see `METRICS`), and `per_category`: AP by category name.

    `index` is the ground truth, a `coco_utils.CocoIndex`; `detections` are rows of
    `detection_rows`, none or any number. A number that nothing was there to measure, such as APl
    where no box is large, is None.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_ground_truth(index), _results(index, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = dict(zip(METRICS, map(_known, evaluation.stats), strict=True))
    # precision: [IoU thresholds, recall thresholds, categories, area ranges, detection limits]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_category = {}
    for k, name in enumerate(index.categories.names):
        measured = precision[:, :, k][precision[:, :, k] > -1]
        per_category[name] = float(measured.mean()) if measured.size else None
    return {**numbers, "per_category": per_category}


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _coco(index, annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in index.image_ids.tolist()],
        "categories": [{"id": category_id} for category_id in index.categories.ids],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _ground_truth(index) -> COCO:
    image_ids = index.image_ids[index.image_of_rows()]
    columns = (image_ids, index.category_ids, index.boxes, index.areas, index.iscrowd.astype(int))
    # pycocotools takes id 0 for "not matched", so ids of our own from 1.
    return _coco(
        index,
        [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": crowd}
            for n, (i, c, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ],
    )


def _results(index, detections: np.ndarray) -> COCO:
    return _coco(
        index,
        [
            {**row, "id": n, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for n, row in enumerate(coco_results(detections), start=1)
        ],
    )


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
