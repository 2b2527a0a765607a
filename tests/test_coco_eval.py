import contextlib
import io
import json

import numpy as np
import pytest
import torch
from helpers import rewrite, split_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco_eval
from coco_utils import CocoIndex, Split
from internals.errors import UserError


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
    numbers = coco_eval.evaluate_detections(index, detections, evaluator)
    assert expected[0] > 0
    for name, value in zip(coco_eval.METRICS, expected, strict=True):
        assert numbers[name] == (None if value < 0 else value)
    known = [ap for ap in numbers["per_category"].values() if ap is not None]
    assert numbers["per_category"]["unseen"] is None
    assert np.mean(known) == pytest.approx(numbers["AP"])


@pytest.mark.parametrize("evaluator", coco_eval.EVALUATORS)
def test_no_detections_score_zero_and_absent_sizes_are_none(tiny, evaluator):
    pytest.importorskip(evaluator.replace("-", "_"))
    numbers = coco_eval.evaluate_detections(CocoIndex(split_of(tiny)), np.empty((0, 7)), evaluator)
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
    expected = coco_eval.evaluate_detections(index, detections, "pycocotools")
    assert 0 < expected["AP"] < 1
    assert coco_eval.evaluate_detections(index, detections, "faster-coco-eval") == expected
    monkeypatch.setattr(coco_eval, "WORTH_PROCESSES", 1)
    assert coco_eval.evaluate_detections(index, detections, "faster-coco-eval") == expected
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


@pytest.mark.parametrize("evaluator", coco_eval.EVALUATORS)
def test_the_curves_are_those_whose_mean_is_ap(tiny, evaluator):
    pytest.importorskip(evaluator.replace("-", "_"))
    rng = np.random.default_rng(0)
    index = random_truth(tiny, rng)
    numbers, curves = coco_eval.evaluate_with_curves(
        index, random_detections(index, rng), evaluator
    )
    assert numbers["AP"] > 0
    assert curves.shape == (10, 101, 3)
    assert np.isnan(curves[:, :, 2]).all()  # the category "unseen"
    assert np.nanmean(curves) == pytest.approx(numbers["AP"])
    assert np.nanmean(curves[5]) == pytest.approx(numbers["AP75"])
    assert (np.diff(curves[:, :, :2], axis=1) <= 0).all()


def test_results_are_read_as_they_were_written(tiny, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    detections = random_detections(random_truth(tiny, rng), rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    assert (coco_eval.read_results(tmp_path / "detections.json") == detections).all()
    (tmp_path / "detections.json").write_text("[]")
    assert coco_eval.read_results(tmp_path / "detections.json").shape == (0, 7)


GOOD = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"image_id": 1', "not valid JSON"),
        ("{}", "holds no list"),
        ([GOOD, {**GOOD, "bbox": [1, 2, 3]}], "row 1 is no COCO result"),
        ([GOOD, GOOD, {**GOOD, "score": None}], "row 2 is no COCO result"),
        ([{**GOOD, "score": float("nan")}], "not valid JSON|row 0 is no"),
        ([{**GOOD, "image_id": "seven"}], "row 0 is no"),
        ([{**GOOD, "image_id": 10**400}], "row 0 is no|not valid"),
        ([GOOD, "x"], "row 1 is no"),
        ([GOOD, {"image_id": 1}], 'row 1 is no .*: {"image_id": 1}'),
    ],
)
def test_what_are_no_results_is_said(tmp_path, content, said):
    file = tmp_path / "detections.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"detections\.json.*({said})"):
        coco_eval.read_results(file)


def test_a_missing_file_of_results_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        coco_eval.read_results(tmp_path / "detections.json")


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def plain_match(index, detections, same_category: bool) -> list[int]:
    """The true box of each detection, -1 for none, by the definition; without crowds."""
    partner, taken = [-1] * len(detections), set()
    for d in np.argsort(-detections[:, 5], kind="stable").tolist():
        image = index.image_ids.tolist().index(int(detections[d, 0]))
        rows = range(*index.box_range(image).indices(len(index.boxes)))
        free = [
            (plain_iou(detections[d, 1:5].tolist(), index.boxes[t].tolist()), t)
            for t in rows
            if t not in taken and (not same_category or index.category_ids[t] == detections[d, 6])
        ]
        iou, t = max(free, default=(0, -1))
        if iou >= 0.5:
            partner[d] = t
            taken.add(t)
    return partner


@pytest.mark.parametrize("same_category", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_matches_are_those_of_the_definition(tiny, seed, same_category):
    index = CocoIndex(split_of(tiny))
    rng = np.random.default_rng(seed)
    detections = random_detections(index, rng, each=20)
    truth_of, found_by = coco_eval.match(index, detections, 0.5, same_category)
    assert truth_of.tolist() == plain_match(index, detections, same_category)
    assert 0 < np.count_nonzero(truth_of >= 0) < len(detections)
    for t, d in enumerate(found_by.tolist()):
        assert d == -1 or truth_of[d] == t
    assert np.count_nonzero(found_by >= 0) == np.count_nonzero(truth_of >= 0)


def test_a_crowd_takes_any_number_of_detections_of_its_category(tiny):
    def change(data):
        data["annotations"][0]["iscrowd"] = 1  # category 2, the whole of image 100 but its border
        data["annotations"][1]["bbox"] = [10, 8, 0, 30]  # nothing can find a box without a size

    rewrite(split_of(tiny), change)
    index = CocoIndex(split_of(tiny))
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
    truth_of, found_by = coco_eval.match(index, detections, 0.5, False)
    assert truth_of.tolist() == [-2, -2, -1, -1, -1]
    assert found_by[:2].tolist() == [-2, -2]
    assert (found_by[2:] == -1).all()


def test_nothing_matches_where_nothing_is(tiny):
    index = CocoIndex(split_of(tiny))
    truth_of, found_by = coco_eval.match(index, np.empty((0, 7)), 0.5, True)
    assert truth_of.shape == (0,)
    assert (found_by == -1).all()
    rewrite(split_of(tiny), lambda data: data.update(annotations=[]))
    empty = CocoIndex(split_of(tiny))
    truth_of, found_by = coco_eval.match(empty, np.array([[100, 1, 1, 9, 9, 0.5, 2]]), 0.5, True)
    assert truth_of.tolist() == [-1]
    assert found_by.shape == (0,)
