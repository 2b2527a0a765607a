"""Choose score thresholds by F1, from detections that are matched with the ground truth.

A detector returns many boxes with low scores; a threshold decides which of them count. F1, the
harmonic mean of precision and recall, is highest where false and missed boxes balance.
"""

from typing import NamedTuple

import numpy as np


class Matches(NamedTuple):
    """Detections matched with the ground truth within each category, at one IoU threshold.

    A match does not depend on detections with lower scores, so that these are the matches at every
    score threshold. Detections that match ignored ground truth, such as crowds, are left out.

    Attributes:
        scores: float64 `[N]`.
        correct: bool `[N]`, whether a detection matches a box.
        categories: int64 `[N]`, positions of the categories, 0 to K - 1.
        boxes: int64 `[K]`, the number of ground-truth boxes of each category, without ignored ones.
    """

    scores: np.ndarray
    correct: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray


class F1Curve(NamedTuple):
    """What a detector reaches with each score threshold that makes a difference, float64 `[T]`.

    The thresholds descend. Each is midway between two scores, so that rounding a score does not
    matter: the detections with `score >= threshold` have this precision, recall and F1.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    F1: np.ndarray


def f1_curve(scores: np.ndarray, correct: np.ndarray, boxes: int) -> F1Curve:
    """Compute precision, recall and F1 for all score thresholds; no detections give no threshold.

    Args:
        scores: float64 `[N]`, from 0 to 1, in any order.
        correct: bool `[N]`.
        boxes: The number of ground-truth boxes.
    """
    order = np.argsort(-scores)
    scores, found = scores[order], np.cumsum(correct[order])
    # Equal scores are above a threshold together: only the last of them counts.
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    scores, found, detections = scores[last], found[last], last + 1
    below = np.append(scores[1:], 0.0)[: len(scores)]
    middle = (scores + below) / 2
    return F1Curve(
        thresholds=np.where(middle > below, middle, scores),  # no number may be between the two
        precision=found / detections,
        recall=found / max(boxes, 1),
        F1=2 * found / (detections + boxes),
    )


def overall_curve(matches: Matches) -> F1Curve:
    """Compute the curve of all categories together, with one threshold for all."""
    return f1_curve(matches.scores, matches.correct, int(matches.boxes.sum()))


def best_point(curve: F1Curve) -> dict[str, float] | None:
    """Return `threshold`, `F1`, `precision` and `recall` where F1 is highest.

    Of equal ones that with the highest threshold; None if nothing is found with any.
    """
    if not curve.F1.any():
        return None
    best = int(np.argmax(curve.F1))
    names = ("threshold", "F1", "precision", "recall")
    columns = (curve.thresholds, curve.F1, curve.precision, curve.recall)
    return {name: float(column[best]) for name, column in zip(names, columns, strict=True)}


def best_points(matches: Matches) -> tuple[dict | None, list[dict | None]]:
    """Return the `best_point` of all categories together, and that of each category."""
    order = np.argsort(matches.categories, kind="stable")
    bounds = np.searchsorted(matches.categories[order], np.arange(len(matches.boxes) + 1))
    of_categories = []
    for k, boxes in enumerate(matches.boxes.tolist()):
        rows = order[bounds[k] : bounds[k + 1]]
        curve = f1_curve(matches.scores[rows], matches.correct[rows], boxes)
        of_categories.append(best_point(curve))
    return best_point(overall_curve(matches)), of_categories
