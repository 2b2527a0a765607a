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
from coco_utils import CocoIndex, Split


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


@pytest.mark.parametrize("evaluator", coco_eval.EVALUATORS)
@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_pycocotools_on_the_files(tiny, seed, evaluator, tmp_path):
    pytest.importorskip(evaluator.replace("-", "_"))
    rng = np.random.default_rng(seed)
    index = random_truth(tiny, rng)
    detections = random_detections(index, rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    results = json.loads((tmp_path / "detections.json").read_text())
    expected = direct(index.annotation_file, results)
    numbers = coco_eval.score(index, detections, evaluator)
    assert expected[0] > 0
    for name, value in zip(coco_eval.METRICS, expected, strict=True):
        assert numbers[name] == (None if value < 0 else value)
    known = [ap for ap in numbers["per_category"].values() if ap is not None]
    assert numbers["per_category"]["unseen"] is None
    assert np.mean(known) == pytest.approx(numbers["AP"])


@pytest.mark.parametrize("evaluator", coco_eval.EVALUATORS)
def test_no_detections_score_zero_and_absent_sizes_are_none(tiny, evaluator):
    pytest.importorskip(evaluator.replace("-", "_"))
    numbers = coco_eval.score(CocoIndex(split_of(tiny)), np.empty((0, 7)), evaluator)
    assert numbers["AP"] == 0
    assert numbers["APl"] is None
    assert json.dumps(numbers, allow_nan=False)
    table = coco_eval.table(numbers)
    assert "0.000" in table
    assert "cat" in table


def many_images(tmp_path, rng) -> CocoIndex:
    """Forty images of COCO's sizes: some without boxes, a fifth of the boxes crowds."""
    images = [
        {"id": int(i), "file_name": "x", "width": 640, "height": 480} for i in range(90, 50, -1)
    ]
    annotations = []
    for image in images:
        for _ in range(rng.integers(0, 12)):
            x, y, w, h = rng.uniform(0, 300), rng.uniform(0, 200), *np.exp(rng.uniform(1, 5.5, 2))
            row = {"id": len(annotations) + 1, "image_id": image["id"], "bbox": [x, y, w, h]}
            row.update(category_id=int(rng.integers(1, 5)), iscrowd=int(rng.random() < 0.2))
            annotations.append({**row, "area": w * h * rng.uniform(0.4, 1)})
    categories = [{"id": i, "name": str(i)} for i in range(1, 7)]
    file = tmp_path / "many.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return CocoIndex(Split(file, tmp_path))


@pytest.mark.parametrize("seed", range(5))
def test_both_evaluators_give_the_same_bits(tmp_path, seed, monkeypatch):
    """Crowds, empty images, absent categories, ties, more than 100 detections of one category."""
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(seed)
    index = many_images(tmp_path, rng)
    rows = []
    for i, image_id in enumerate(index.image_ids.tolist()):
        true = index.boxes[index.box_range(i)]
        one_category = rng.random() < 0.2  # and then more than 100 detections of it
        for _ in range(int(rng.choice([0, 30, 150]))):
            near = len(true) and rng.random() < 0.7
            box = true[rng.integers(len(true))] if near else rng.uniform(1, 200, 4)
            box = np.abs(np.asarray(box) * rng.normal(1, 0.1, 4)) + 0.1
            category_id = 2 if one_category else rng.integers(1, 6)
            rows.append([image_id, *box, round(rng.random(), 1), category_id])
    detections = np.array(rows, dtype=np.float64)
    expected = coco_eval.score(index, detections, "pycocotools")
    assert 0 < expected["AP"] < 1
    assert coco_eval.score(index, detections, "faster-coco-eval") == expected
    monkeypatch.setattr(coco_eval, "WORTH_PROCESSES", 1)
    assert coco_eval.score(index, detections, "faster-coco-eval") == expected
    results = coco_eval.coco_results(detections)
    plain = direct(index.annotation_file, results)
    assert [expected[name] for name in coco_eval.METRICS] == [None if x < 0 else x for x in plain]


def test_the_fastest_installed_evaluator_is_the_default(monkeypatch):
    monkeypatch.setattr(coco_eval, "LIBRARIES", {"pycocotools": None, "faster-coco-eval": None})
    assert coco_eval.default_evaluator() == "faster-coco-eval"
    monkeypatch.setattr(coco_eval, "LIBRARIES", {"pycocotools": None})
    assert coco_eval.default_evaluator() == "pycocotools"


def test_outputs_become_rows_in_the_data_sets_own_ids():
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([2, 1]),
    }
    none = {key: value[:0] for key, value in output.items()}
    rows = coco_eval.detection_rows([none, output], [7, 2**40], np.array([-1, -1, 17]))
    assert rows.tolist() == [[2**40, 1, 2, 3, 6, 0.5, 17]]
    assert coco_eval.detection_rows([none], [7], np.array([-1])).shape == (0, 7)
