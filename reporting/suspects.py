"""Find annotations that may be wrong, from detections that contradict the ground truth.

A contradiction is an error of the detector or one of the annotation. It is the more suspicious the
less often the detector is wrong in such a case: this is measured on the same images.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from coco_utils import CocoIndex
from reporting.analysis import (
    IOU_THRESHOLD,
    SCORE_THRESHOLD,
    UNMATCHED,
    DetectionResults,
    overlapping_pairs,
)
from reporting.annotation_files import annotation_file

NOT_ANNOTATED, NOT_FOUND = "not annotated", "not found"
WRONG_CATEGORY, INEXACT_BOX = "wrong category", "inexact box"
PARTIAL_IOU = 0.2  # lowest overlap with a detection for which a box is inexact, not another object
NEIGHBOURS = 100  # detections or boxes that a share is measured on; at most half of the category
PRIOR_WEIGHT = 10  # a share of few is drawn to that of its category, as if by so many more
# Annotators forget an object much more often than they draw a box where nothing is.
FALSE_BOX_ODDS = 0.1


class Suspect(NamedTuple):
    """An annotation that may be wrong, or a detection that may have to be annotated.

    Attributes:
        kind: NOT_ANNOTATED, a confident detection that no box explains; NOT_FOUND, a box that no
            detection finds; WRONG_CATEGORY, a box where a confident detection has another category;
            INEXACT_BOX, one that a confident detection overlaps only in part.
        suspicion: From 0 to 1, comparable between the kinds.
        detection: The row in `DetectionResults.confident`, -1 for NOT_FOUND.
        box: The row in the index, -1 for NOT_ANNOTATED.
        iou: Of the two, 0 if there is one only.
    """

    kind: str
    suspicion: float
    detection: int
    box: int
    iou: float


def find_suspects(results: DetectionResults) -> list[Suspect]:
    """Find suspect annotations, worst first.

    Crowds, boxes that evaluation ignores, detections in crowds and duplicates on an object that is
    explained are no suspects. A detection and a box are in one suspect at most.
    """
    index, scores = results.index, results.confident[:, 5]
    pairs = overlapping_pairs(index, results.confident, PARTIAL_IOU)
    unexplained = find_unexplained(results, pairs)
    explained = results.matched_gt_of_category >= 0
    found = np.isfinite(results.matched_score)

    counted = explained | unexplained
    precision, recall = np.zeros(len(scores)), np.zeros(len(found))
    precision[counted] = local_share(
        scores[counted], explained[counted], results.detection_category[counted]
    )
    usable, area = index.usable, index.true_boxes()[:, 2:].prod(axis=1)
    recall[usable] = local_share(area[usable], found[usable], results.gt_category[usable])
    recall[found] = 0  # no evidence against these
    odds = FALSE_BOX_ODDS * recall / (1 - recall)
    false_box = odds / (1 + odds)

    suspects = []
    for kind, d, t, iou in explain_by_pairs(results, pairs, unexplained):
        # Both are evidence. Two objects in one detection are no independent evidence, however.
        missed = recall[t] if kind == WRONG_CATEGORY else false_box[t]
        suspects.append(Suspect(kind, 1 - (1 - precision[d]) * (1 - missed), d, t, iou))
        unexplained[d], found[t] = False, True
    for d in np.flatnonzero(unexplained).tolist():
        suspects.append(Suspect(NOT_ANNOTATED, precision[d], d, -1, 0.0))
    for t in np.flatnonzero(usable & ~found).tolist():
        suspects.append(Suspect(NOT_FOUND, false_box[t], -1, t, 0.0))
    return sorted(suspects, key=lambda suspect: -suspect.suspicion)


def find_unexplained(results: DetectionResults, pairs: tuple) -> np.ndarray:
    """Find the confident detections, bool `[N]`, without duplicates and those in crowds."""
    detection, box, iou = pairs
    same = results.detection_category[detection] == results.gt_category[box]
    score, found_score = results.confident[detection, 5], results.matched_score[box]
    # What is found with a higher score is explained, whatever else the detector takes it for.
    explained = np.where(same, np.isfinite(found_score), found_score >= score)
    unexplained = results.matched_gt_of_category == UNMATCHED
    unexplained[detection[explained & (iou >= IOU_THRESHOLD)]] = False
    return unexplained


def explain_by_pairs(
    results: DetectionResults, pairs: tuple, unexplained: np.ndarray
) -> Iterable[tuple[str, int, int, float]]:
    """Yield the unexplained detections and the boxes beneath them, as (kind, detection, box, IoU).

    Each is paired once: a wrong category first, and the highest score first.
    """
    detection, box, iou = pairs
    same = results.detection_category[detection] == results.gt_category[box]
    score = results.confident[detection, 5]
    # Not confidently found; false for NaN, too.
    doubtful = unexplained[detection] & ~(results.matched_score[box] >= SCORE_THRESHOLD)
    taken = set()
    for kind, of_kind in (
        (WRONG_CATEGORY, ~same & (iou >= IOU_THRESHOLD)),
        (INEXACT_BOX, same & (iou < IOU_THRESHOLD)),
    ):
        rows = np.flatnonzero(doubtful & of_kind)
        rows = rows[np.lexsort((-iou[rows], -score[rows]))]
        columns = (detection[rows], box[rows], iou[rows])
        for d, t, overlap in zip(*(column.tolist() for column in columns), strict=True):
            if ("detection", d) not in taken and ("box", t) not in taken:
                taken |= {("detection", d), ("box", t)}
                yield kind, d, t, overlap


def local_share(values: np.ndarray, outcomes: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Estimate the share of true outcomes at each value, from those of the category around it.

    Args:
        values: float64 `[N]`, such as scores; neighbours are the next ones in their order.
        outcomes: bool `[N]`.
        categories: int64 `[N]`, not negative.

    Returns:
        float64 `[N]`, above 0 and below 1. Where there are few, it is near the share of the
        category, or of all.
    """
    shares = np.empty(len(values))
    overall = (outcomes.sum() + 1) / (len(outcomes) + 2)
    by_value = np.lexsort((values, categories))
    bounds = np.cumsum(np.bincount(categories))[:-1]
    for rows in np.split(by_value, bounds):
        sums, n = np.append(0, np.cumsum(outcomes[rows])), np.arange(len(rows))
        prior = (sums[-1] + PRIOR_WEIGHT * overall) / (len(rows) + PRIOR_WEIGHT)
        reach = min(NEIGHBOURS, len(rows) // 2) // 2
        first, end = (n - reach).clip(0), (n + reach + 1).clip(max=len(rows))
        local = sums[end] - sums[first] + PRIOR_WEIGHT * prior
        shares[rows] = local / (end - first + PRIOR_WEIGHT)
    return shares


# ---------------------------------------------------------------------------------------- the file


def to_coco(results: DetectionResults, suspects: list[Suspect]) -> dict:
    """Convert suspects to an annotation file of COCO (plain types), with the images they are in.

    The box and category of a suspect are those of the detection, if there is one: what it should
    be according to the detector. `annotation_*` is what the annotation file has.
    """
    index = results.index
    boxes, image_of_rows = index.true_boxes(), index.image_of_rows()
    positions = index.positions_of(results.confident[:, 0].astype(np.int64))
    images, rows = {}, []
    for suspect in suspects:
        d, t = suspect.detection, suspect.box
        i = int(image_of_rows[t] if d < 0 else positions[d])
        if i not in images:
            images[i] = image_row(index, i)
        if d >= 0:
            _, *box, score, category = results.confident[d].tolist()
        else:
            box, score, category = boxes[t].tolist(), 0.0, index.category_ids[t]
        rows.append(
            {
                "image_id": images[i]["id"],
                "category_id": int(category),
                "bbox": [round(side, 2) for side in box],
                "score": score,
                "suspect": suspect.kind,
                "suspicion": round(float(suspect.suspicion), 4),
                "iou": round(suspect.iou, 4),
                **annotation_fields(index, t),
            }
        )
    return annotation_file(list(images.values()), rows, index.categories)


def image_row(index: CocoIndex, i: int) -> dict:
    """Return the entry of image i of the index."""
    width, height = index.sizes[i].tolist()
    name = index.file_name(i)
    return {"id": int(index.image_ids[i]), "file_name": name, "width": width, "height": height}


def annotation_fields(index: CocoIndex, row: int) -> dict:
    """Return what the annotation file has in this row of the index, None without a row."""
    if row < 0:
        return dict.fromkeys(("annotation_id", "annotation_category_id", "annotation_bbox"))
    number = int(index.annotation_ids[row])
    return {
        "annotation_id": None if number < 0 else number,
        "annotation_category_id": int(index.category_ids[row]),
        "annotation_bbox": index.boxes[row].tolist(),
    }


def summarize(suspects: list[Suspect]) -> str:
    """Count suspects by kind, the most frequent first: "5 not annotated, 2 not found"."""
    counts = Counter(suspect.kind for suspect in suspects).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)
