"""Read the output folder of a run: metrics, and detections matched with the ground truth."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hotcoco.primitives import bbox_iou

import coco_eval
from coco_utils import CocoIndex
from internals.bit_depth import EARLIER_DEPTH
from internals.data_checks import MAX_DETECTIONS
from internals.errors import UserError
from internals.images import ImageRules
from internals.layouts import find_split
from internals.score_thresholds import Matches

SCORE_THRESHOLD = 0.5  # of all figures but the curves and the dashed recall by size
IOU_THRESHOLD = 0.5
EVALUATOR = coco_eval.EVALUATORS[0]
UNMATCHED, IGNORED = -1, -2  # instead of the row of the match
# Keys of `metrics.jsonl` that a line must have, by kind; others may be missing.
REQUIRED_KEYS = {"train": {"step", "epoch"}, "end": {"seconds"}}


# ------------------------------------------------------------------------------------- metrics


@dataclass
class RunHistory:
    """The lines of `metrics.jsonl` that belong to the last training, or to evaluations alone.

    Attributes:
        start: The "start" line of the training, `{}` without one.
        eval_start: The "start" line of the run with the last evaluation.
        train: The "train" lines, with ascending steps.
        evals: The "eval" lines of the training, with ascending steps.
        last: The last "eval" line; its detections are in `detections.json`.
        end: The "end" line; None if the run did not finish.
        resumed: How often the training was resumed.
        notes: Warnings for the reader of the report.
    """

    start: dict = field(default_factory=dict)
    eval_start: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    last: dict | None = None
    end: dict | None = None
    resumed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> dict | None:
        """The evaluation with the highest AP; the first of equal ones, as `model_best.pth`."""
        evals = self.evals or [self.last or {}]
        known = [line for line in evals if line.get("AP") is not None]
        return max(known, key=lambda line: line["AP"], default=None)


def flags_of(start: dict) -> dict:
    """Return the flags of a run from its "start" line."""
    return start.get("args") or {}


def read_history(file: Path) -> RunHistory:
    """Read `metrics.jsonl`; of steps that a resumed run repeated, the last lines are used.

    Raises:
        UserError: The file cannot be read, is empty, or has an invalid line. An incomplete last
            line, as after a crash, is only noted.
    """
    history, start, train, evals = RunHistory(), {}, {}, {}
    for line in _read_lines(file, history.notes):
        kind, step = line["kind"], line.get("step") or 0
        test_only = flags_of(start).get("test_only")
        if kind == "start":
            start = line
            if not flags_of(line).get("test_only"):
                history.start, history.end = line, None
                history.resumed += 1
                if not flags_of(line).get("resume"):  # a new training in the same folder
                    train, evals, history.resumed = {}, {}, 0
        elif kind == "train":
            _drop_from(step, train)
            _drop_from(step, evals)
            train[step] = line
        elif kind == "eval":
            history.last, history.eval_start = line, start
            if not test_only:
                _drop_from(step, evals)
                evals[step] = line
        elif kind == "end":
            history.end = line
    history.start = history.start or start
    history.train, history.evals = list(train.values()), list(evals.values())
    return history


def _read_lines(file: Path, notes: list[str]) -> list[dict]:
    try:
        rows = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): use the folder that was --output-dir of "
            "train.py"
        ) from None
    lines = []
    for n, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            valid = REQUIRED_KEYS.get(str(line["kind"]), set()) <= line.keys()
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if valid:
            lines.append(line)
        elif n < len(rows):
            raise UserError(f"{file}:{n} is not a valid line of train.py: correct or remove it")
        else:
            notes.append(f"{file}: the last line is incomplete, as after a crash, and is skipped")
    if not lines:
        raise UserError(f"{file} is empty: wait for the first step of the training")
    return lines


def _drop_from(step: int, lines: dict[int, dict]) -> None:
    """Remove the lines of `step` and later steps, in place; the keys ascend."""
    while lines and next(reversed(lines)) >= step:
        lines.popitem()


# ------------------------------------------------------------------ detections and ground truth


class DetectionResults:
    """The detections of the last evaluation, matched with the ground truth.

    Attributes:
        index: The ground truth, M boxes in K categories.
        curves, matches: From `coco_eval.evaluate_with_curves`.
        detections: float64 `[D, 7]`, rows of `coco_eval.detection_rows`.
        confident: float64 `[N, 7]`, those of them with a score of at least 0.5. The following
            attributes are about these alone.
        matched_gt, matched_detection: int64 `[N]` and `[M]`, from `match_detections` across
            categories.
        gt_category, detection_category: int64 `[M]` and `[N]`, positions in `index.categories`.
        correct, wrong_category, false_positive: bool `[N]`.
        missed: bool `[M]`.
        matched_gt_of_category: int64 `[N]`, from `match_detections` of all detections within their
            categories.
        matched_score: float64 `[M]`, the score of the detection that matches each box in the same
            way; NaN without a match.
    """

    def __init__(
        self, index: CocoIndex, detections: np.ndarray, curves: np.ndarray, matches: Matches
    ):
        self.index = index
        self.curves, self.matches = curves, matches
        self.detections = detections
        self.confident = detections[detections[:, 5] >= SCORE_THRESHOLD]
        self.matched_gt, self.matched_detection = match_detections(index, self.confident)
        self.gt_category = np.searchsorted(index.categories.ids, index.category_ids)
        self.detection_category = np.searchsorted(index.categories.ids, self.confident[:, 6])
        # The two appended elements are those of UNMATCHED and IGNORED.
        category_of_match = np.append(self.gt_category, [-1, -1])[self.matched_gt]
        self.correct = category_of_match == self.detection_category
        self.wrong_category = (self.matched_gt >= 0) & ~self.correct
        self.false_positive = self.matched_gt == UNMATCHED
        self.missed = self.matched_detection == UNMATCHED
        box, detection = match_detections(index, detections, same_category=True)
        self.matched_gt_of_category = box[detections[:, 5] >= SCORE_THRESHOLD]
        self.matched_score = np.append(detections[:, 5], np.nan)[detection.clip(min=-1)]

    def counts(self) -> dict[str, int]:
        """Count the boxes of each kind, at a score of at least 0.5."""
        return {
            "images": len(self.index),
            "ground_truth": int(self.index.usable.sum()),
            "detections": int((self.matched_gt != IGNORED).sum()),
            "correct": int(self.correct.sum()),
            "wrong_category": int(self.wrong_category.sum()),
            "false_positive": int(self.false_positive.sum()),
            "missed": int(self.missed.sum()),
            "crowds": int(self.index.iscrowd.sum()),
        }

    def confusion_matrix(self) -> np.ndarray:
        """Return the confusion matrix, int64 `[K + 1, K + 1]`.

        Rows are categories of the ground truth, columns of the detections. The last row counts
        false positives, the last column missed boxes.
        """
        background = len(self.index.categories.ids)
        matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
        matched = self.matched_gt >= 0
        gt_category = self.gt_category[self.matched_gt[matched]]
        np.add.at(matrix, (gt_category, self.detection_category[matched]), 1)
        np.add.at(matrix, (background, self.detection_category[self.false_positive]), 1)
        np.add.at(matrix, (self.gt_category[self.missed], background), 1)
        return matrix


def read_results(output_dir: Path, history: RunHistory) -> DetectionResults:
    """Read `detections.json` and the ground truth that it was evaluated against.

    Raises:
        UserError: There was no evaluation, or one of the files is missing or invalid.
    """
    if history.last is None:
        raise UserError("no evaluation yet: train.py evaluates after each epoch")
    file = output_dir / "detections.json"
    if not file.exists():
        raise UserError(
            f"{file} is missing: write it again with train.py --test-only --resume "
            f"{output_dir / 'model_best.pth'}"
        )
    detections = coco_eval.read_results(file)
    index = load_evaluated_index(history.eval_start)
    known = index.positions_of(detections[:, 0].astype(np.int64)) >= 0
    known &= np.isin(detections[:, 6], index.categories.ids)
    if not known.all():
        history.notes.append(
            f"{np.count_nonzero(~known):,} detections have images or categories that are not in "
            f"{index.annotation_file}, and are skipped"
        )
    limit = flags_of(history.eval_start).get("max_detections") or MAX_DETECTIONS
    metrics, curves, matches = coco_eval.evaluate_with_curves(
        index, detections[known], EVALUATOR, limit
    )
    logged, computed = history.last.get("AP"), metrics["AP"]
    if abs((logged or 0) - (computed or 0)) > 1e-6:
        history.notes.append(
            f"{file} has AP {computed} on {index.annotation_file}, but metrics.jsonl has {logged}: "
            "one of the files has changed since. The tables and the curve of AP are from "
            "metrics.jsonl, everything else is from detections.json"
        )
    return DetectionResults(index, detections[known], curves, matches)


def load_evaluated_index(start: dict) -> CocoIndex:
    """Load the ground truth of the run with this "start" line, without the images it skipped.

    Raises:
        DataError: The data cannot be read.
    """
    flags = flags_of(start)
    split = "train" if flags.get("overfit") else "val"
    annotations, images = (
        Path(flags[key]) if flags.get(key) else None
        for key in (f"{split}_annotations", f"{split}_images")
    )
    data_path = Path(flags.get("data_path") or ".")
    index = CocoIndex(find_split(data_path, split, annotations, images))
    index.rules = ImageRules(
        flags.get("bit_depth", EARLIER_DEPTH), flags.get("truncated_images") == "use"
    )
    # Runs of earlier versions without this flag evaluated so.
    index.as_annotated = flags.get("evaluate_as_annotated", True)
    if flags.get("overfit"):
        return index.first_with_boxes(flags["overfit"])
    left_out = np.array(start.get("val_images_left_out") or [], dtype=np.int64)
    return index.without(index.positions_of(left_out))


def match_detections(
    index: CocoIndex, detections: np.ndarray, same_category: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with ground-truth boxes one to one, in the order of their scores.

    Each detection is matched with the unmatched ground-truth box of its image with the highest IoU,
    if that is at least 0.5.

    Args:
        index: The ground truth, M boxes.
        detections: float64 `[N, 7]`, rows of `coco_eval.detection_rows` with images of the index.
        same_category: Whether to match boxes of the same category only.

    Returns:
        matched_gt: int64 `[N]`, the ground-truth row of each detection, `UNMATCHED`, or `IGNORED`
            if at least half of the box is in a crowd of its category, by the rule of COCO.
        matched_detection: int64 `[M]`, the detection of each ground-truth box, `UNMATCHED` if it
            was missed, or `IGNORED` for crowds and boxes without a size.
    """
    matched_gt = np.full(len(detections), UNMATCHED)
    matched_detection = np.where(index.usable, UNMATCHED, IGNORED)
    gt_boxes = index.true_boxes()
    by_score = np.argsort(-detections[:, 5], kind="stable")
    images = index.positions_of(detections[by_score, 0].astype(np.int64))
    by_image = by_score[np.argsort(images, kind="stable")]  # within an image by score
    bounds = np.cumsum(np.bincount(images, minlength=len(index)))[:-1]
    for i, rows in enumerate(np.split(by_image, bounds)):
        gt = index.box_range(i)
        if not len(rows) or gt.start == gt.stop:
            continue
        iscrowd = index.iscrowd[gt]
        # For crowds: the share of the detection inside.
        iou = bbox_iou(detections[rows, 1:5], gt_boxes[gt], iscrowd)
        same = detections[rows, 6][:, None] == index.category_ids[gt]
        in_crowd = (iscrowd & same & (iou >= IOU_THRESHOLD)).any(axis=1)
        matched_gt[rows[in_crowd]] = IGNORED
        d, t = np.nonzero((iou >= IOU_THRESHOLD) & index.usable[gt] & (same | (not same_category)))
        best_first = np.lexsort((-iou[d, t], d))
        pairs = zip(rows[d[best_first]].tolist(), (gt.start + t[best_first]).tolist(), strict=True)
        for detection, box in pairs:
            if matched_gt[detection] < 0 and matched_detection[box] == UNMATCHED:
                matched_gt[detection], matched_detection[box] = box, detection
    return matched_gt, matched_detection


def overlapping_pairs(
    index: CocoIndex, detections: np.ndarray, min_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the detections and usable ground-truth boxes of an image that overlap.

    Args:
        index: The ground truth.
        detections: float64 `[N, 7]`, rows of `coco_eval.detection_rows` with images of the index.
        min_iou: The lowest IoU of a pair, above 0.

    Returns:
        Of each of the P pairs, the row of the detection and that of the box, int64 `[P]`, and the
        IoU, float64 `[P]`.
    """
    images = index.positions_of(detections[:, 0].astype(np.int64))
    by_image = np.argsort(images, kind="stable")
    bounds = np.searchsorted(images[by_image], np.arange(len(index) + 1))
    gt_boxes, pairs = index.true_boxes(), [(np.empty(0, int), np.empty(0, int), np.empty(0))]
    for i in np.unique(images).tolist():
        rows, gt = by_image[bounds[i] : bounds[i + 1]], index.box_range(i)
        if gt.start < gt.stop:
            iou = bbox_iou(detections[rows, 1:5], gt_boxes[gt], np.zeros(gt.stop - gt.start, bool))
            d, t = np.nonzero((iou >= min_iou) & index.usable[gt])
            pairs.append((rows[d], gt.start + t, iou[d, t]))
    return tuple(map(np.concatenate, zip(*pairs, strict=True)))


# ------------------------------------------------------------------------------------- summaries


def most_confused_pairs(matrix: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Return the most confused pairs of categories as (ground truth, detection), worst first."""
    confused = _confused(matrix)
    worst = np.argsort(-confused, axis=None, kind="stable")[:limit]
    pairs = np.stack(np.unravel_index(worst, confused.shape), axis=1)
    return [(t, d) for t, d in pairs.tolist() if confused[t, d]]


def most_confused_categories(matrix: np.ndarray, limit: int) -> np.ndarray:
    """Return the categories that are most often confused with others, in ascending order."""
    confused = _confused(matrix)
    total = confused.sum(axis=0) + confused.sum(axis=1)
    return np.sort(np.argsort(-total, kind="stable")[:limit])


def _confused(matrix: np.ndarray) -> np.ndarray:
    categories = matrix[:-1, :-1]
    return categories - np.diag(np.diag(categories))


def recall_by_size(
    sides: np.ndarray, matched_score: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count ground-truth boxes by the square root of their area.

    The bins are half octaves, so that 32, the lower bound of COCO's medium boxes, is an edge.

    Args:
        sides: float64 `[M]`, at least one, all positive.
        matched_score: `DetectionResults.matched_score` of the same boxes.

    Returns:
        The edges `[B + 1]` and three counts `[B]`: of all boxes, of those detected with a score of
        at least 0.5, and of those detected with any score.
    """
    low, high = np.log2([sides.min(), sides.max()])
    edges = 2.0 ** (np.arange(math.floor(2 * low), math.floor(2 * high) + 2) / 2)
    selections = (
        np.ones(len(sides), dtype=bool),
        matched_score >= SCORE_THRESHOLD,
        np.isfinite(matched_score),
    )
    return edges, *(np.histogram(sides[selected], edges)[0] for selected in selections)


def shorten(text: str, limit: int = 18) -> str:
    """Return a text of at most `limit` characters, with an ellipsis where it was cut."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
