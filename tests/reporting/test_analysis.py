import re

import numpy as np
import pytest
from helpers import rewrite, split_of
from report_helpers import (
    DETECTIONS,
    eval_line,
    results_in,
    start_line,
    train_line,
    two_epochs,
    write_output,
)

from coco_utils import CocoIndex
from internals.errors import UserError
from reporting import analysis
from reporting.analysis import IGNORED, UNMATCHED, match_detections

# ------------------------------------------------------------------------------------- metrics


def history_of(folder, lines: list[dict]) -> analysis.RunHistory:
    return analysis.read_history(write_output(folder, lines, None) / "metrics.jsonl")


def test_repeated_steps_of_resumed_run_count_once(tiny, tmp_path):
    resumed = start_line(tiny, resume="output/checkpoint.pth")
    lines = [start_line(tiny), train_line(1), train_line(2), train_line(3), resumed]
    lines += [train_line(2, loss=9), train_line(3, loss=9), eval_line(tiny, 0), resumed]
    lines += [train_line(4, loss=9), eval_line(tiny, 0, AP=0.7)]
    history = history_of(tmp_path / "out", lines)
    assert [(line["step"], line["loss"]) for line in history.train] == [
        *((1, 1), (2, 9), (3, 9), (4, 9))
    ]
    assert [line["AP"] for line in history.evals] == [0.7]
    assert history.resumed == 2


def test_new_training_replaces_previous_history(tiny, tmp_path):
    history = history_of(tmp_path / "out", [*two_epochs(tiny), start_line(tiny), train_line(3)])
    assert [line["step"] for line in history.train] == [3]
    assert history.evals == []
    assert history.end is None


def test_test_only_is_separate_from_training_evaluations(tiny, tmp_path):
    test_only = start_line(tiny, test_only=True, resume="model_best.pth")
    lines = [*two_epochs(tiny), test_only, eval_line(tiny, 0)]
    history = history_of(tmp_path / "out", lines)
    assert [line["epoch"] for line in history.evals] == [0, 1]
    assert history.last["epoch"] == 0
    assert history.best["epoch"] == 1
    assert history.start == lines[0]
    assert history.eval_start == test_only


def test_truncated_last_line_is_noted(tiny, tmp_path):
    file = write_output(tmp_path / "out", two_epochs(tiny)) / "metrics.jsonl"
    with file.open("a") as opened:
        opened.write('{"kind": "tr')
    history = analysis.read_history(file)
    assert len(history.train) == 8
    assert history.notes == [
        f"{file}: the last line is incomplete, as after a crash, and is skipped"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl cannot be read \(No such file"),
        (b"\n", r"metrics\.jsonl is empty"),
        (
            b'{"kind": "start"}\nnonsense\n{"kind": "end"}\n',
            r"metrics\.jsonl:2 is not a valid line",
        ),
        (b'{"kind": "start"}\n[1]\n', r"metrics\.jsonl:2 is not a valid line of train.py"),
        (b'{"kind": "train"}\n{"kind": "end"}\n', r"metrics\.jsonl:1 is not a valid line"),
        (b"[" * 100_000 + b"\n\n", r"metrics\.jsonl:1 is not a valid line"),
        (b"\xff\xfe\n", r"metrics\.jsonl:1 is not"),
    ],
)
def test_invalid_metrics_file_is_rejected(tmp_path, content, message):
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/") + message):
        analysis.read_history(file)


# ------------------------------------------------------------------------------------- matching


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def reference_match(index: CocoIndex, detections: np.ndarray, same_category: bool) -> list[int]:
    """Return the matched ground-truth row of each detection; without crowds."""
    matches, taken = [UNMATCHED] * len(detections), set()
    for d in np.argsort(-detections[:, 5], kind="stable").tolist():
        rows = index.box_range(index.image_ids.tolist().index(int(detections[d, 0])))
        free = [
            (plain_iou(detections[d, 1:5].tolist(), index.boxes[t].tolist()), t)
            for t in range(rows.start, rows.stop)
            if t not in taken and (not same_category or index.category_ids[t] == detections[d, 6])
        ]
        iou, t = max(free, default=(0, -1))
        if iou >= 0.5:
            matches[d] = t
            taken.add(t)
    return matches


@pytest.mark.parametrize("same_category", [True, False])
def test_matching_equals_reference(tiny, same_category):
    index, rng = CocoIndex(split_of(tiny)), np.random.default_rng(0)
    rows = rng.integers(len(index.boxes), size=160)
    boxes = np.abs(index.boxes[rows] + rng.normal(0, 3, (160, 4))) + 0.1
    scores = rng.random(160).round(2)  # with ties
    images = index.image_ids[index.image_of_rows()[rows]]
    detections = np.column_stack([images, boxes, scores, rng.choice([2, 5], 160)])
    matched_gt, matched_detection = match_detections(index, detections, same_category)
    assert matched_gt.tolist() == reference_match(index, detections, same_category)
    matched = np.flatnonzero(matched_gt != UNMATCHED)
    assert 5 < len(matched) < 160
    assert (matched_detection[matched_gt[matched]] == matched).all()
    assert np.count_nonzero(matched_detection != UNMATCHED) == len(matched)


def test_crowd_matches_many_detections(tiny):
    def change(data):
        data["annotations"][0]["iscrowd"] = 1  # category 2, most of image 100
        data["annotations"][1]["bbox"] = [10, 8, 0, 30]  # without a size

    rewrite(split_of(tiny), change)
    inside, across = [5, 5, 4, 4], [30, 4, 10, 10]  # 4 of 10 pixels are inside
    detections = np.array(
        [
            [100, *inside, 0.9, 2],
            [100, *inside, 0.8, 2],
            [100, *inside, 0.7, 5],
            [100, *across, 0.6, 2],
            [101, 10, 8, 0, 30, 0.5, 5],
        ]
    )
    matched_gt, matched_detection = match_detections(CocoIndex(split_of(tiny)), detections)
    assert matched_gt.tolist() == [IGNORED, IGNORED, UNMATCHED, UNMATCHED, UNMATCHED]
    assert matched_detection[:2].tolist() == [IGNORED, IGNORED]
    assert (matched_detection[2:] == UNMATCHED).all()


def test_no_detections_and_no_ground_truth(tiny):
    index = CocoIndex(split_of(tiny))
    matched_gt, matched_detection = match_detections(index, np.empty((0, 7)))
    assert matched_gt.shape == (0,)
    assert (matched_detection == UNMATCHED).all()
    rewrite(split_of(tiny), lambda data: data.update(annotations=[]))
    detections = np.array([[100, 1, 1, 9, 9, 0.5, 2]])
    matched_gt, matched_detection = match_detections(CocoIndex(split_of(tiny)), detections)
    assert matched_gt.tolist() == [UNMATCHED]
    assert matched_detection.shape == (0,)


# ------------------------------------------------------------------------------------- results


def test_confusion_matrix_and_counts(tiny, tmp_path):
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    # Rows: cat, dog, background; columns: cat, dog, missed.
    assert results.confusion_matrix().tolist() == [[1, 1, 1], [0, 1, 0], [2, 0, 0]]
    assert results.counts() == {
        **{"images": 3, "ground_truth": 4, "detections": 5, "crowds": 0},
        **{"correct": 2, "wrong_category": 1, "false_positive": 2, "missed": 1},
    }


def test_detections_in_crowd_are_ignored(tiny, tmp_path):
    def change(data):
        data["annotations"][0]["iscrowd"] = 1  # the cat of image 100

    rewrite(split_of(tiny, "val"), change)
    detections = (*DETECTIONS, (100, 2, [6, 6, 9, 9], 0.99))
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny), detections))
    assert results.confusion_matrix().tolist() == [[1, 0, 1], [0, 1, 0], [2, 1, 0]]
    assert results.counts()["crowds"] == 1
    assert results.counts()["detections"] == 5


def test_recall_by_size(tiny, tmp_path):
    results = results_in(write_output(tmp_path / "out", two_epochs(tiny)))
    assert results.matched_score.tolist()[:2] == [0.3, 0.8]
    assert np.isnan(results.matched_score[2])
    sides = np.sqrt(results.index.boxes[:, 2:].prod(axis=1))  # three of 24.5 and one of 13.9
    edges, total, found_confident, found = analysis.recall_by_size(sides, results.matched_score)
    assert edges == pytest.approx([2**3.5, 16, 2**4.5, 32])
    assert total.tolist() == [1, 0, 3]
    assert found_confident.tolist() == [0, 0, 2]
    assert found.tolist() == [0, 0, 3]


def test_recall_by_size_has_an_edge_at_32():
    edges, total, *_ = analysis.recall_by_size(np.array([31.9, 32.0]), np.full(2, np.nan))
    assert dict(zip(edges.tolist(), total.tolist(), strict=False))[32.0] == 1


def test_most_confused_categories_and_pairs():
    matrix = np.array([[9, 0, 0, 50], [0, 9, 2, 0], [1, 0, 9, 0], [70, 0, 0, 0]])
    assert analysis.most_confused_categories(matrix, 2).tolist() == [1, 2]
    assert analysis.most_confused_pairs(matrix, 5) == [(1, 2), (2, 0)]
    assert analysis.most_confused_pairs(matrix, 1) == [(1, 2)]


def test_overfit_uses_first_training_images(tiny, tmp_path):
    lines = two_epochs(tiny)
    lines[0] = start_line(tiny, overfit=2)
    index = results_in(write_output(tmp_path / "out", lines, DETECTIONS[:3])).index
    assert index.annotation_file == tiny / "annotations/instances_train2017.json"
    assert index.image_ids.tolist() == [100, 101]


@pytest.mark.parametrize(("skipped", "images"), [([101], 2), ([], 3)])
def test_skipped_images_do_not_count(tiny, tmp_path, skipped, images):
    lines = two_epochs(tiny)
    lines[0]["val_images_left_out"] = skipped
    results = results_in(write_output(tmp_path / "out", lines, DETECTIONS[:3]))
    assert results.counts()["images"] == images
