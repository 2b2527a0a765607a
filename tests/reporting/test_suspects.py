import json
import sys

import numpy as np
import pytest
from helpers import ROOT, main_in_process, rewrite, split_of, write_split
from pycocotools.coco import COCO
from report_helpers import rows_of

from coco_utils import CocoIndex
from reporting.analysis import DetectionResults, overlapping_pairs
from reporting.suspects import find_suspects, local_share, to_coco

sys.path.append(str(ROOT / "benchmarks"))
import suspects as benchmark

CAT, DOG = 2, 5
BOX = [10, 10, 20, 20]


def suspects_of(tmp_path, boxes, detections, crowd=False) -> list[dict]:
    """Return the annotations of suspects.json for one image (id 100) of 64 x 64 pixels."""
    write_split(tmp_path / "data", "val", [(64, 64)], [boxes])
    split = split_of(tmp_path / "data", "val")
    rewrite(split, lambda data: [row.update(iscrowd=int(crowd)) for row in data["annotations"]])
    detections = rows_of([(100, *detection) for detection in detections])
    results = DetectionResults(CocoIndex(split), detections, None, None)
    return to_coco(results, find_suspects(results))["annotations"]


@pytest.mark.parametrize(
    ("boxes", "detections", "kind", "annotation", "proposal"),
    [
        ([], [(CAT, BOX, 0.9)], "not annotated", None, (CAT, BOX, 0.9)),
        ([[CAT, *BOX]], [], "not found", 0, (CAT, BOX, 0.0)),
        ([[CAT, *BOX]], [(DOG, BOX, 0.9)], "wrong category", 0, (DOG, BOX, 0.9)),
        # Also if its own category has a low score.
        ([[CAT, *BOX]], [(DOG, BOX, 0.9), (CAT, BOX, 0.1)], "wrong category", 0, (DOG, BOX, 0.9)),
        # IoU 1/3
        (
            [[CAT, *BOX]],
            [(CAT, [20, 10, 20, 20], 0.9)],
            "inexact box",
            0,
            (CAT, [20, 10, 20, 20], 0.9),
        ),
    ],
)
def test_kinds(tmp_path, boxes, detections, kind, annotation, proposal):
    (row,) = suspects_of(tmp_path, boxes, detections)
    assert (row["suspect"], row["annotation_id"]) == (kind, annotation)
    assert (row["category_id"], row["bbox"], row["score"]) == proposal
    assert row["annotation_bbox"] == (None if annotation is None else BOX)
    assert row["annotation_category_id"] == (None if annotation is None else CAT)
    assert 0 < row["suspicion"] < 1
    assert row["area"] == 400


@pytest.mark.parametrize(
    ("boxes", "detections"),
    [
        ([[CAT, *BOX]], [(CAT, BOX, 0.9)]),
        ([[CAT, *BOX]], [(CAT, BOX, 0.2)]),  # found, if not confidently
        ([[CAT, *BOX]], [(CAT, BOX, 0.9), (CAT, [12, 10, 20, 20], 0.8)]),  # a duplicate
        ([[CAT, *BOX]], [(CAT, BOX, 0.9), (DOG, BOX, 0.8)]),  # less likely than what is annotated
        ([], [(CAT, BOX, 0.4)]),  # not confident
        ([[CAT, 70, 70, 5, 5]], []),  # outside of the image, so that evaluation ignores it
        ([], []),
    ],
)
def test_no_suspects(tmp_path, boxes, detections):
    assert suspects_of(tmp_path, boxes, detections) == []


def test_crowds_and_detections_in_them_are_no_suspects(tmp_path):
    detections = [(CAT, [20, 20, 10, 10], 0.9)]
    assert suspects_of(tmp_path, [[CAT, 0, 0, 60, 60]], detections, crowd=True) == []


def test_objects_that_touch_are_two_suspects(tmp_path):
    """Below the overlap of an inexact box, which is one suspect."""
    rows = suspects_of(tmp_path, [[CAT, *BOX]], [(CAT, [25, 10, 20, 20], 0.9)])  # IoU 1/7
    assert {row["suspect"] for row in rows} == {"not annotated", "not found"}


def test_each_detection_and_box_is_in_one_suspect(tmp_path):
    boxes = [[CAT, *BOX], [CAT, 30, 10, 20, 20]]
    rows = suspects_of(tmp_path, boxes, [(CAT, [20, 10, 20, 20], 0.9)])  # overlaps both alike
    assert sorted(row["suspect"] for row in rows) == ["inexact box", "not found"]
    assert sorted(row["annotation_id"] for row in rows) == [0, 1]


def many_images(tmp_path, missed: dict[int, int]) -> list[dict]:
    """Return the suspects of 20 images with a cat and a dog each; `missed` are not found, by id.

    The last images have a detection that no box explains.
    """
    boxes = [[[CAT, *BOX], [DOG, 40, 40, 20, 20]]] * 20
    write_split(tmp_path / "data", "val", [(64, 64)] * 20, boxes)
    index = CocoIndex(split_of(tmp_path / "data", "val"))
    found = [(100 + i, CAT, BOX, 0.95) for i in range(missed[CAT], 20)]
    found += [(100 + i, DOG, [40, 40, 20, 20], 0.95) for i in range(missed[DOG], 20)]
    results = DetectionResults(index, rows_of(found), None, None)
    return to_coco(results, find_suspects(results))["annotations"]


def test_boxes_that_are_nearly_always_found_come_first(tmp_path):
    rows = many_images(tmp_path, {CAT: 12, DOG: 1})
    assert [row["category_id"] for row in rows] == [DOG] + [CAT] * 12
    suspicions = [row["suspicion"] for row in rows]
    assert suspicions == sorted(suspicions, reverse=True)
    assert suspicions[0] > 2 * suspicions[1]
    assert [row["id"] for row in rows] == list(range(1, 14))


def test_local_share_follows_the_values_of_a_category():
    values = np.tile(np.linspace(0, 1, 400), 2)
    outcomes = np.concatenate([np.linspace(0, 1, 400) > 0.5, np.ones(400, bool)])
    shares = local_share(values, outcomes, np.repeat([0, 3], 400))
    assert shares[0] < 0.1
    assert shares[200] == pytest.approx(0.5, abs=0.05)
    assert shares[399] > 0.9
    assert (shares[400:] > 0.97).all()
    assert (shares < 1).all()


def test_local_share_of_few_is_near_that_of_all():
    outcomes = np.append(np.ones(1000, bool), False)
    shares = local_share(np.zeros(1001), outcomes, np.repeat([0, 1], [1000, 1]))
    assert 0.8 < shares[-1] < shares[0]
    assert local_share(np.empty(0), np.empty(0, bool), np.empty(0, int)).shape == (0,)


def test_overlapping_pairs_without_detections(tiny):
    index = CocoIndex(split_of(tiny, "val"))
    assert [len(column) for column in overlapping_pairs(index, rows_of([]), 0.2)] == [0, 0, 0]


def test_file_is_read_by_pycocotools_and_passes_the_data_checks(tiny, tmp_path):
    index = CocoIndex(split_of(tiny, "val"))
    detections = rows_of([(101, DOG, [10, 8, 20, 30], 0.9), (102, CAT, [0, 30, 9, 9], 0.8)])
    results = DetectionResults(index, detections, None, None)
    content = to_coco(results, find_suspects(results))
    file = tmp_path / "suspects.json"
    file.write_text(json.dumps(content))
    coco = COCO(file)
    worst = coco.anns[1]
    assert sorted(coco.getImgIds()) == [100, 101, 102]
    assert worst["image_id"] == content["images"][0]["id"]  # images in the order of the suspects
    assert coco.getCatIds() == [CAT, DOG]
    flags = ("--check-data", "--data-path", tiny, "--val-annotations", file)
    printed = main_in_process(*flags, "--val-images", tiny / "val2017")
    assert printed.endswith("data check passed\n")


def test_annotations_without_ids(tiny):
    rewrite(split_of(tiny, "val"), lambda data: [row.pop("id") for row in data["annotations"]])
    index = CocoIndex(split_of(tiny, "val"))
    results = DetectionResults(index, rows_of([]), None, None)
    rows = to_coco(results, find_suspects(results))["annotations"]
    assert [row["annotation_id"] for row in rows] == [None] * 4
    assert sorted(row["id"] for row in rows) == [1, 2, 3, 4]


def test_planted_errors_come_first(tmp_path):
    """Of the removed boxes, the detector itself misses one in ten."""
    index, detections = benchmark.built_in_data(tmp_path)
    planted, rows = benchmark.plant_errors(index, seed=0, count=10)
    claims = benchmark.claims_here(planted, detections)
    found = benchmark.count_found(index, rows, claims[:40])
    assert min(found["moved"], found["renamed"]) >= 9
    assert found["removed"] >= 7
    hits = [any(benchmark.count_found(index, rows, [claim]).values()) for claim in claims]
    assert sum(hits[:20]) >= 18
