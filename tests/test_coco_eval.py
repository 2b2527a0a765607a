import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_utils import rewrite, split_of

import coco_eval
from coco_utils import CocoIndex


def direct(annotations, results: list[dict]) -> np.ndarray:
    """The twelve numbers as pycocotools gives them for the two files themselves."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def random_truth(tiny, rng) -> CocoIndex:
    """The small data with a crowd, an image without boxes, and an id far beyond float32."""
    split = split_of(tiny)

    def change(data):
        data["images"][0]["id"] = 2**40 + 1
        for row in data["annotations"]:
            row["id"] += 1  # pycocotools mistakes an annotation of id 0 for "not matched"
            row["image_id"] = 2**40 + 1 if row["image_id"] == 100 else row["image_id"]
            row["area"] = float(rng.uniform(50, 20000))
        data["annotations"][3]["iscrowd"] = 1
        data["annotations"] = [row for row in data["annotations"] if row["image_id"] != 102]
        data["categories"].append({"id": 9, "name": "unseen"})

    rewrite(split, change)
    return CocoIndex(split)


def random_detections(index: CocoIndex, rng, each: int = 150) -> np.ndarray:
    """Boxes near the true ones and others, more than 100 an image, with ties among the scores."""
    rows = []
    for i, image_id in enumerate(index.image_ids.tolist()):
        true = index.boxes[index.box_range(i)]
        for _ in range(each):
            near = len(true) and rng.random() < 0.5
            box = true[rng.integers(len(true))] if near else rng.uniform(1, 40, 4)
            box = np.abs(np.asarray(box) + rng.normal(0, 2, 4)) + 0.1
            score, category_id = round(rng.random(), 2), rng.choice([2, 5, 9])
            rows.append([image_id, *box, score, category_id])
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_pycocotools_on_the_files(tiny, seed, tmp_path):
    rng = np.random.default_rng(seed)
    index = random_truth(tiny, rng)
    detections = random_detections(index, rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    results = json.loads((tmp_path / "detections.json").read_text())
    expected = direct(index.annotation_file, results)
    numbers = coco_eval.score(index, detections)
    assert expected[0] > 0
    for name, value in zip(coco_eval.METRICS, expected, strict=True):
        assert numbers[name] == (None if value < 0 else value)
    known = [ap for ap in numbers["per_category"].values() if ap is not None]
    assert numbers["per_category"]["unseen"] is None
    assert np.mean(known) == pytest.approx(numbers["AP"])


def test_no_detections_score_zero_and_absent_sizes_are_none(tiny):
    numbers = coco_eval.score(CocoIndex(split_of(tiny)), np.empty((0, 7)))
    assert numbers["AP"] == 0
    assert numbers["APl"] is None
    assert json.dumps(numbers, allow_nan=False)
    table = coco_eval.table(numbers)
    assert "0.000" in table
    assert "cat" in table


def test_outputs_become_rows_in_the_data_sets_own_ids():
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([2, 1]),
    }
    rows = coco_eval.detection_rows(output, 2**40, np.array([-1, -1, 17]))
    assert rows.tolist() == [[2**40, 1, 2, 3, 6, 0.5, 17]]
