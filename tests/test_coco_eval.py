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
from coco_utils import NO_CATEGORY, CocoIndex, Split
from internals.errors import RunError, UserError

BOTH = ("hotcoco", "pycocotools")


def direct(annotations, results: list[dict]) -> np.ndarray:
    """The twelve metrics as pycocotools gives them for the two files themselves."""
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


@pytest.mark.parametrize("evaluator", BOTH)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_pycocotools_on_the_files(tiny, seed, evaluator, tmp_path):
    rng = np.random.default_rng(seed)
    index = random_truth(tiny, rng)
    detections = random_detections(index, rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    results = json.loads((tmp_path / "detections.json").read_text())
    expected = direct(index.annotation_file, results)
    metrics = coco_eval.evaluate_detections(index, detections, evaluator)
    assert expected[0] > 0
    for name, value in zip(coco_eval.METRICS, expected, strict=True):
        assert metrics[name] == (None if value < 0 else value)
    known = [ap for ap in metrics["per_category"].values() if ap is not None]
    assert metrics["per_category"]["unseen"] is None
    assert np.mean(known) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize("evaluator", BOTH)
def test_no_detections_give_zero_and_absent_sizes_give_none(tiny, evaluator):
    metrics = coco_eval.evaluate_detections(CocoIndex(split_of(tiny)), np.empty((0, 7)), evaluator)
    assert metrics["AP"] == 0
    assert metrics["APl"] is None
    assert json.dumps(metrics, allow_nan=False)
    table = coco_eval.table(metrics)
    assert "0.000" in table
    assert "cat" in table


def random_index(file, rng) -> CocoIndex:
    """Images in any order, with and without boxes; crowds, boxes without a size, odd category ids.

    Sometimes there is no ground truth at all.
    """
    ids = rng.choice([-7, -1, 0, 1, 2, 5, 90, 2**40], int(rng.integers(1, 8)), replace=False)
    image_ids = rng.choice(1000, int(rng.integers(1, 25)), replace=False) - 100
    images = [{"id": i, "file_name": "x", "width": 640, "height": 480} for i in image_ids.tolist()]
    annotations, no_ground_truth = [], rng.random() < 0.1
    for image in images:
        for _ in range(0 if no_ground_truth else rng.integers(0, 12)):
            x, y, w, h = rng.uniform(0, 300), rng.uniform(0, 200), *np.exp(rng.uniform(1, 5.5, 2))
            w = 0.0 if rng.random() < 0.05 else w
            row = {"id": len(annotations) + 1, "image_id": image["id"], "bbox": [x, y, w, h]}
            row["iscrowd"] = int(rng.random() < 0.15)
            row["area"] = w * h * rng.uniform(0.4, 1)
            # The last category has no ground truth, if there are several.
            row["category_id"] = int(rng.choice(ids[:-1] if len(ids) > 1 else ids))
            annotations.append(row)
    categories = [{"id": i, "name": f"c{i}"} for i in ids.tolist()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return CocoIndex(Split(file, file.parent))


def random_results(index: CocoIndex, rng) -> np.ndarray:
    """Rows with ties among the scores, in any order; often more than 100 of an image."""
    rows, decimals = [], int(rng.integers(1, 4))
    for i, image_id in enumerate(index.image_ids.tolist()):
        true = index.boxes[index.box_range(i)]
        one_category = rng.random() < 0.2  # and then up to 150 detections of it
        for _ in range(int(rng.choice([0, 1, 30, 150]))):
            near = len(true) and rng.random() < 0.7
            box = true[rng.integers(len(true))] if near else rng.uniform(1, 200, 4)
            box = np.abs(np.asarray(box) * rng.normal(1, 0.1, 4))
            box[2] *= rng.random() > 0.02
            category_id = (
                index.categories.ids[0] if one_category else rng.choice(index.categories.ids)
            )
            rows.append([image_id, *box, round(rng.random(), decimals), category_id])
    return rng.permutation(np.array(rows, dtype=np.float64).reshape(-1, 7))


@pytest.mark.parametrize("seed", range(60))
def test_hotcoco_equals_pycocotools_to_the_last_bit(tmp_path, seed):
    rng = np.random.default_rng(seed)
    index = random_index(tmp_path / "random.json", rng)
    detections = random_results(index, rng) if seed % 10 else np.empty((0, 7))
    expected, expected_curves = coco_eval.evaluate_with_curves(index, detections, "pycocotools")
    metrics, curves = coco_eval.evaluate_with_curves(index, detections, "hotcoco")
    assert metrics == expected
    assert np.array_equal(curves, expected_curves, equal_nan=True)
    if len(detections):
        stats = direct(index.annotation_file, coco_eval.coco_results(detections))
        assert [metrics[name] for name in coco_eval.METRICS] == [
            None if value < 0 else value for value in stats
        ]


def test_detections_of_unknown_categories_and_images_do_not_count(tiny):
    index = CocoIndex(split_of(tiny))
    detections = random_detections(index, np.random.default_rng(0), each=20)
    detections = detections[detections[:, 6] != 9]
    others = detections.copy()
    others[::2, 6], others[1::2, 0], others[:, 5] = 77, 5, 1
    for evaluator in BOTH:
        expected = coco_eval.evaluate_detections(index, detections, evaluator)
        more = coco_eval.evaluate_detections(index, np.concatenate([others, detections]), evaluator)
        assert more == expected
        assert expected["AP"] > 0


def test_both_evaluators_must_agree(tiny, monkeypatch):
    index = CocoIndex(split_of(tiny))
    detections = random_detections(index, np.random.default_rng(0), each=20)
    both = coco_eval.evaluate_detections(index, detections, "both")
    assert both == coco_eval.evaluate_detections(index, detections, "hotcoco")

    def without_the_first(*columns):
        columns[-1]["score"][:5] = 0
        return coco_eval._with_pycocotools(*columns)

    monkeypatch.setattr(coco_eval, "_with_hotcoco", without_the_first)
    with pytest.raises(RunError, match=r"different numbers: AP: 0\.\d+ and 0\.\d+.*AP of 'cat': 0"):
        coco_eval.evaluate_detections(index, detections, "both")


def test_detection_rows_have_the_ids_of_the_data_set():
    output = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([2, 1]),
    }
    none = {key: value[:0] for key, value in output.items()}
    rows = coco_eval.detection_rows(
        [none, output], [7, 2**40], np.array([NO_CATEGORY, NO_CATEGORY, -1])
    )
    assert rows.tolist() == [[2**40, 1, 2, 3, 6, 0.5, -1]]
    assert coco_eval.detection_rows([none], [7], np.array([NO_CATEGORY])).shape == (0, 7)


@pytest.mark.parametrize("evaluator", BOTH)
def test_mean_of_the_curves_is_ap(tiny, evaluator):
    rng = np.random.default_rng(0)
    index = random_truth(tiny, rng)
    metrics, curves = coco_eval.evaluate_with_curves(
        index, random_detections(index, rng), evaluator
    )
    assert metrics["AP"] > 0
    assert curves.shape == (10, 101, 3)
    assert np.isnan(curves[:, :, 2]).all()  # the category "unseen"
    assert np.nanmean(curves) == pytest.approx(metrics["AP"])
    assert np.nanmean(curves[5]) == pytest.approx(metrics["AP75"])
    assert (np.diff(curves[:, :, :2], axis=1) <= 0).all()


def test_results_are_read_as_they_were_written(tiny, tmp_path):
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
        ("[" * 100_000, "not valid JSON"),
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
def test_invalid_results_are_refused_with_their_row(tmp_path, content, said):
    file = tmp_path / "detections.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"detections\.json.*({said})"):
        coco_eval.read_results(file)


def test_missing_results_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        coco_eval.read_results(tmp_path / "detections.json")
