"""Compute COCO's twelve metrics for boxes; write and read COCO results files.

The metrics (https://cocodataset.org/#detection-eval, all from 0 to 1) are computed by hotcoco,
which gives the same bits as pycocotools in a fraction of the time, or by pycocotools.
"""

import contextlib
import io
import json
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import hotcoco
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import torch
from torchvision.ops import box_convert

from coco_utils import NO_CATEGORY, Categories, CocoIndex
from internals.data_checks import MAX_DETECTIONS
from internals.errors import RunError, UserError
from internals.score_thresholds import Matches, best_points

EVALUATORS = ("hotcoco", "pycocotools", "both")

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
METRICS = tuple(MEANING)
MAX_CATEGORIES = 10  # in `table`; metrics.jsonl and the report have them all


def detection_rows(
    outputs: list[dict], image_ids: list[int], category_ids: np.ndarray
) -> np.ndarray:
    """Convert the outputs of a torchvision detector for a batch to rows with the data set's ids.

    Args:
        outputs: `boxes` (x1, y1, x2, y2), `scores` and `labels` of each image.
        image_ids: The id of each image.
        category_ids: The category id of each label, of `Categories.ids_of_labels`. Detections of
            unused labels are dropped.

    Returns:
        float64 `[N, 7]`: image_id, x, y, width, height, score, category_id.
    """
    boxes = torch.cat([output["boxes"] for output in outputs])
    scores = torch.cat([output["scores"] for output in outputs])
    labels = torch.cat([output["labels"] for output in outputs])
    # In float32, as in other evaluations, and with a single copy from the device.
    columns = [box_convert(boxes, "xyxy", "xywh"), scores[:, None], labels[:, None].float()]
    detections = torch.cat(columns, dim=1).cpu().double().numpy()
    images = np.repeat(
        np.array(image_ids, dtype=np.float64), [len(output["labels"]) for output in outputs]
    )
    categories = category_ids[detections[:, 5].astype(np.int64)]
    rows = np.column_stack([images, detections[:, :5], categories])
    return rows[categories != NO_CATEGORY]


# --------------------------------------------------------------------------------------- scoring


class Evaluation(NamedTuple):
    """The result of `evaluate_with_curves`.

    Attributes:
        metrics: Of `evaluate_detections`.
        curves: The precisions whose mean is AP, float64 `[10, 101, K]`: at IoU 0.50, 0.55, ...,
            0.95, at recall 0, 0.01, ..., 1, and for each category of `index.categories`; NaN for
            categories without ground truth.
        matches: The matches at IoU 0.50, for curves of F1.
    """

    metrics: dict
    curves: np.ndarray
    matches: Matches


def metric_meanings(max_detections: int) -> dict[str, str]:
    """Return the meaning of the twelve metrics by name; the name of the last AR says the limit."""
    return {
        name.replace("100", f"{max_detections}"): text.replace("100", f"{max_detections}")
        for name, text in MEANING.items()
    }


def evaluate_detections(
    index: CocoIndex,
    detections: np.ndarray,
    evaluator: str,
    max_detections: int = MAX_DETECTIONS,
) -> dict:
    """Compute COCO's metrics, and the score thresholds with the highest F1.

    Args:
        index: The ground truth.
        detections: float64 `[N, 7]`, rows of `detection_rows`; N may be 0.
        evaluator: One of `EVALUATORS`.
        max_detections: Of each category the highest scores of an image, so many, count; above 10.

    Returns:
        The twelve metrics by name (see `metric_meanings`); `score_threshold`, of all categories
        together at IoU 0.50: `threshold`, `F1`, `precision` and `recall`; and `per_category`:
        `name`, `AP` and `score_threshold` by category id. What has no ground truth, such as APl if
        no box is large, is None, as is a threshold if nothing is found.

    Raises:
        RunError: The evaluator is "both", and the two differ.
    """
    return evaluate_with_curves(index, detections, evaluator, max_detections).metrics


def evaluate_with_curves(
    index: CocoIndex,
    detections: np.ndarray,
    evaluator: str,
    max_detections: int = MAX_DETECTIONS,
) -> Evaluation:
    """Compute the metrics of `evaluate_detections`, and what curves are drawn from."""
    if evaluator == "both":
        result = evaluate_with_curves(index, detections, "hotcoco", max_detections)
        expected = evaluate_detections(index, detections, "pycocotools", max_detections)
        _check_equal(result.metrics, expected)
        return result
    make_evaluation, find_matches = {
        "hotcoco": (_with_hotcoco, _hotcoco_matches),
        "pycocotools": (_with_pycocotools, _pycocotools_matches),
    }[evaluator]
    truth, found = _ground_truth_columns(index), _detection_columns(index, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = make_evaluation(
            [{"id": number} for number in range(1, 1 + len(index))],
            [{"id": k, "name": name} for k, name in enumerate(index.categories.names, start=1)],
            truth,
            found,
        )
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    metrics = _summarize(evaluation.eval["precision"], evaluation.eval["recall"], max_detections)
    matches = find_matches(evaluation, truth, found, len(index.categories.ids))
    metrics["score_threshold"], thresholds = best_points(matches)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    metrics["per_category"] = {
        category_id: {
            "name": index.categories.names[k],
            "AP": _mean(precision[:, :, k]),
            "score_threshold": thresholds[k],
        }
        for k, category_id in enumerate(index.categories.ids)
    }
    return Evaluation(metrics, np.where(precision > -1, precision, np.nan), matches)


def _summarize(precision: np.ndarray, recall: np.ndarray, max_detections: int) -> dict:
    """Compute the twelve metrics; pycocotools' own `summarize` knows the limit 100 alone.

    Args:
        precision: `[IoU thresholds, recall thresholds, categories, area ranges, limits]`, -1
            without ground truth. The area ranges are all, small, medium, large.
        recall: The same without recall thresholds.
        max_detections: The last limit, for its name.
    """
    arrays = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    arrays += [precision[..., area, -1] for area in (1, 2, 3)]
    arrays += [recall[..., 0, limit] for limit in range(3)]
    arrays += [recall[..., area, -1] for area in (1, 2, 3)]
    return dict(zip(metric_meanings(max_detections), map(_mean, arrays), strict=True))


def _mean(values: np.ndarray) -> float | None:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _with_hotcoco(images: list, categories: list, truth: dict, found: dict) -> hotcoco.COCOeval:
    columns = [truth[name] for name in ("image_id", "category_id", "bbox")]
    ground_truth = hotcoco.COCO.from_arrays(
        images, categories, *columns, area=truth["area"], iscrowd=truth["iscrowd"]
    )
    columns = [found[name] for name in ("image_id", "bbox", "score", "category_id")]
    results = ground_truth.load_res(np.column_stack(columns))
    return hotcoco.COCOeval(ground_truth, results, "bbox")


def _with_pycocotools(images: list, categories: list, truth: dict, found: dict):
    objects = []
    for columns in (truth, found):
        # Numbered from 1: pycocotools takes id 0 for "not matched".
        columns = {"id": np.arange(1, 1 + len(columns["image_id"])), **columns}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        annotations = [dict(zip(columns, row, strict=True)) for row in rows]
        coco = pycocotools.coco.COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        objects.append(coco)
    return pycocotools.cocoeval.COCOeval(*objects, "bbox")


def _hotcoco_matches(evaluation, truth: dict, found: dict, num_categories: int) -> Matches:
    # Its `evalImgs` take minutes for COCO. Without the annotations that may be wrong, which are
    # searched for among higher scores, this takes as long as `evaluate`.
    status = evaluation.image_diagnostics(iou_thr=0.5, score_thr=2)
    # By ids, which hotcoco counts from 1; ignored ones are missing.
    boxes, detections = (
        np.fromiter(status[name], np.int64, len(status[name])) - 1
        for name in ("gt_status", "dt_status")
    )
    correct = (text == "tp" for text in status["dt_status"].values())
    return Matches(
        scores=found["score"][detections],
        correct=np.fromiter(correct, bool, len(detections)),
        categories=found["category_id"][detections] - 1,
        boxes=np.bincount(truth["category_id"][boxes] - 1, minlength=num_categories),
    )


def _pycocotools_matches(evaluation, truth: dict, found: dict, num_categories: int) -> Matches:
    all_areas = evaluation.params.areaRng[0]
    parts = [part for part in evaluation.evalImgs if part and part["aRng"] == all_areas]
    boxes = np.zeros(num_categories, dtype=np.int64)
    columns = [(np.empty(0), np.empty(0, bool), np.empty(0, np.int64))]
    for part in parts:
        k, counted = part["category_id"] - 1, part["dtIgnore"][0] == 0
        boxes[k] += np.count_nonzero(np.asarray(part["gtIgnore"]) == 0)
        scores, correct = np.array(part["dtScores"])[counted], part["dtMatches"][0][counted] > 0
        columns.append((scores, correct, np.full(len(scores), k)))
    return Matches(*map(np.concatenate, zip(*columns, strict=True)), boxes)


def _ground_truth_columns(index: CocoIndex) -> dict[str, np.ndarray]:
    truth = index.ground_truth()
    columns = {
        "image_id": index.image_ids[index.image_of_rows()[truth.rows]],
        "category_id": index.category_ids[truth.rows],
        "bbox": truth.boxes,
        "area": truth.areas,
        "iscrowd": index.iscrowd[truth.rows].astype(np.int64),
    }
    return _renumber(index, columns)


def _detection_columns(index: CocoIndex, detections: np.ndarray) -> dict[str, np.ndarray]:
    columns = {
        "image_id": detections[:, 0].astype(np.int64),
        "category_id": detections[:, 6].astype(np.int64),
        "bbox": detections[:, 1:5],
        "area": detections[:, 3] * detections[:, 4],
        "score": detections[:, 5],
        "iscrowd": np.zeros(len(detections), dtype=np.int64),
    }
    return _renumber(index, columns)


def _renumber(index: CocoIndex, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renumber images and categories from 1, and drop the rows of unknown ones.

    hotcoco rejects negative ids. The numbers have the order of the ids: that of images decides
    between equal scores, and that of categories is the order of the index.
    """
    for name, ids in (("image_id", index.image_ids), ("category_id", index.categories.ids)):
        ids = np.sort(ids)
        numbers = np.searchsorted(ids, columns[name]).clip(max=len(ids) - 1)
        known = ids[numbers] == columns[name]
        columns = {**columns, name: numbers + 1}
        if not known.all():
            columns = {key: column[known] for key, column in columns.items()}
    return columns


def _check_equal(ours: dict, reference: dict) -> None:
    """Raise RunError unless the metrics of hotcoco and pycocotools have the same bits."""
    values, expected = (
        {name: value for name, value in metrics.items() if name != "per_category"}
        | {
            f"{name} of category {i}": row[name]
            for i, row in metrics["per_category"].items()
            for name in ("AP", "score_threshold")
        }
        for metrics in (ours, reference)
    )
    different = [
        f"{name}: {values[name]!r} and {expected[name]!r}"
        for name in values
        if values[name] != expected[name]
    ]
    if different:
        raise RunError(
            f"hotcoco and pycocotools differ: {'; '.join(different)}. Use --evaluator pycocotools, "
            "and report this to the authors of hotcoco"
        )


# --------------------------------------------------------------------------------- results files


def coco_results(detections: np.ndarray) -> list[dict]:
    """Convert rows of `detection_rows` to COCO's results format (plain types)."""
    return [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": s}
        for i, *box, s, c in detections.tolist()
    ]


def write_results(detections: np.ndarray, file: Path) -> None:
    """Write COCO results JSON, which COCO's server and other evaluators read."""
    file.write_text(json.dumps(coco_results(detections)), encoding="utf-8")


def read_results(file: Path) -> np.ndarray:
    """Read COCO results JSON into rows of `detection_rows`, float64 `[N, 7]`.

    Raises:
        UserError: The file is not a list of objects with `image_id`, `category_id`, `bbox` and
            `score`, all of them finite numbers.
    """
    try:
        results = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of UTF-8
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(results, list):
        raise UserError(f"{file} is not a list: is it a COCO results file?")
    rows = []
    for number, result in enumerate(results):
        try:
            row = [result["image_id"], *result["bbox"], result["score"], result["category_id"]]
            valid = len(row) == 7 and all(map(math.isfinite, row))
        except (TypeError, KeyError, OverflowError):
            valid = False
        if not valid:
            raise UserError(
                f"{file}: row {number} is not a COCO result with image_id, category_id, bbox and "
                f"score: {json.dumps(result)[:200]}"
            )
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def ap_by_category(metrics: dict) -> dict[str, float | None]:
    """Return the AP of each category by its name; where several have one name, with the id.

    Args:
        metrics: Of `evaluate_detections`, or read from `metrics.jsonl`, in which earlier versions
            of this project had the AP by name.
    """
    per_category = metrics.get("per_category") or {}
    if not all(isinstance(row, dict) for row in per_category.values()):
        return per_category
    return _by_category(per_category, "AP")


def points_by_category(metrics: dict) -> dict[str, dict | None]:
    """Return `score_threshold` of each category by its name, as `ap_by_category` does AP.

    It is None for all categories in `metrics.jsonl` of earlier versions.
    """
    per_category = metrics.get("per_category") or {}
    if not all(isinstance(row, dict) for row in per_category.values()):
        return {}
    return _by_category(per_category, "score_threshold")


def _by_category(per_category: dict, key: str) -> dict:
    names = Categories.from_names({int(i): row["name"] for i, row in per_category.items()})
    values = {int(i): row.get(key) for i, row in per_category.items()}
    return {name: values[i] for i, name in zip(names.ids, names.display_names, strict=True)}


def table(metrics: dict) -> str:
    """Format the twelve metrics and the AP of categories as lines of at most 80 columns."""
    lines, names = [], list(metric_meanings(limit_of(metrics)))
    for n, meaning in enumerate(
        (
            "IoU 0.50:0.95, 0.50, 0.75",
            "small, medium, large",
            f"1, 10, {limit_of(metrics)} detections",
            "small, medium, large",
        )
    ):
        width = max(6, 1 + max(map(len, names)))
        cells = [f"{name:<{width}}{_format(metrics[name])}" for name in names[3 * n : 3 * n + 3]]
        lines.append(f"  {'  '.join(cells)}  {meaning}")
    chosen = per_category = ap_by_category(metrics)
    heading = "AP by category:"
    if len(per_category) > MAX_CATEGORIES:
        measured = [name for name, ap in per_category.items() if ap is not None]
        chosen = sorted(measured, key=per_category.get)[:MAX_CATEGORIES]
        heading = f"AP of the {len(chosen)} lowest of {len(measured)} categories:"
    texts = [f"{name} {_format(per_category[name]).strip()}" for name in chosen]
    lines += textwrap.wrap(
        f"{heading} {', '.join(texts)}", 80, initial_indent="  ", subsequent_indent="    "
    )
    if best := metrics.get("score_threshold"):
        lines.append(
            f"  best F1 {best['F1']:.3f} at score {best['threshold']:.3f}: precision "
            f"{best['precision']:.3f}, recall {best['recall']:.3f}"
        )
    return "\n".join(lines)


def limit_of(metrics: dict) -> int:
    """Return the limit of detections that the names of metrics say: of AR1, AR10, AR100 the last.

    Args:
        metrics: Of `evaluate_detections`, or an "eval" line of `metrics.jsonl`.
    """
    limits = [int(name[2:]) for name in metrics if re.fullmatch(r"AR\d+", name)]
    return max(limits, default=MAX_DETECTIONS)


def chosen_thresholds(metrics: dict) -> dict | None:
    """Return the score thresholds that go into a checkpoint; None if nothing was found.

    Returns:
        `overall`, the threshold with the best F1 of all categories together, and `per_category`,
        those of each category by id, without the categories that have none.
    """
    if not metrics["score_threshold"]:
        return None
    rows = {i: row["score_threshold"] for i, row in metrics["per_category"].items()}
    return {
        "overall": metrics["score_threshold"]["threshold"],
        "per_category": {i: row["threshold"] for i, row in rows.items() if row},
    }


def _format(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"
