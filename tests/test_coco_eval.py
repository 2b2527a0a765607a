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
from coco_utils import NO_CATEGORY, CocoDetection, CocoIndex, Split
from internals.errors import RunError, UserError

BOTH = ("hotcoco", "pycocotools")


def pycocotools_metrics(
    annotations, results: list[dict], max_detections: int = 100
) -> np.ndarray | list:
    """Return the twelve metrics of pycocotools for an annotation file and results.

    Its `summarize` has the limit 100 in its first line: other limits are summed up from its arrays.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        if max_detections == 100:
            evaluation.summarize()
            return evaluation.stats
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    columns = [precision[:, :, :, 0, 2], precision[0, :, :, 0, 2], precision[5, :, :, 0, 2]]
    columns += [precision[:, :, :, area, 2] for area in (1, 2, 3)]
    columns += [recall[:, :, 0, 0], recall[:, :, 0, 1], recall[:, :, 0, 2]]
    columns += [recall[:, :, area, 2] for area in (1, 2, 3)]
    return [np.mean(x[x > -1]) if (x > -1).any() else -1 for x in columns]


def random_truth(tiny, rng) -> CocoIndex:
    """Return `tiny` with a crowd, an image without boxes, and an id beyond float32."""
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
    """Return boxes near the ground truth and others, over 100 per image, with tied scores."""
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
def test_metrics_equal_pycocotools(tiny, seed, evaluator, tmp_path):
    rng = np.random.default_rng(seed)
    index = random_truth(tiny, rng)
    detections = random_detections(index, rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    results = json.loads((tmp_path / "detections.json").read_text())
    expected = pycocotools_metrics(index.annotation_file, results)
    index.as_annotated = True
    metrics = coco_eval.evaluate_detections(index, detections, evaluator)
    assert expected[0] > 0
    for name, value in zip(coco_eval.METRICS, expected, strict=True):
        assert metrics[name] == (None if value < 0 else value)
    averages = [row["AP"] for row in metrics["per_category"].values() if row["AP"] is not None]
    unseen = {"name": "unseen", "AP": None, "score_threshold": None}
    assert metrics["per_category"][9] == unseen
    assert np.mean(averages) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize("evaluator", BOTH)
def test_metrics_without_detections(tiny, evaluator):
    metrics = coco_eval.evaluate_detections(CocoIndex(split_of(tiny)), np.empty((0, 7)), evaluator)
    assert metrics["AP"] == 0
    assert metrics["APl"] is None
    assert json.dumps(metrics, allow_nan=False)
    table = coco_eval.table(metrics)
    assert "0.000" in table
    assert "cat" in table


def random_index(file, rng, sound: bool) -> CocoIndex:
    """Return a random index: unordered images, crowds, odd category ids.

    Some images have no boxes; one index in ten has no ground truth at all. Boxes reach out of
    their image by less than half a pixel, or, if not `sound`, by any length, or have no size.
    """
    ids = rng.choice([-7, -1, 0, 1, 2, 5, 90, 2**40], int(rng.integers(1, 8)), replace=False)
    image_ids = rng.choice(1000, int(rng.integers(1, 25)), replace=False) - 100
    images = [{"id": i, "file_name": "x", "width": 640, "height": 480} for i in image_ids.tolist()]
    annotations, no_ground_truth = [], rng.random() < 0.1
    for image in images:
        for _ in range(0 if no_ground_truth else rng.integers(0, 12)):
            x, y, w, h = rng.uniform(0, 300), rng.uniform(0, 200), *np.exp(rng.uniform(1, 5.5, 2))
            if not sound:
                x, w = x + 200, 0.0 if rng.random() < 0.05 else w
            elif rng.random() < 0.1:
                x, y, h = -rng.uniform(0, 0.49), 480.49 - h, h
            row = {"id": len(annotations) + 1, "image_id": image["id"], "bbox": [x, y, w, h]}
            row["iscrowd"] = int(rng.random() < 0.15)
            row["area"] = w * h * rng.uniform(0.4, 1)
            # Of several categories the last has no ground truth.
            row["category_id"] = int(rng.choice(ids[:-1] if len(ids) > 1 else ids))
            annotations.append(row)
    categories = [{"id": i, "name": f"c{i}"} for i in ids.tolist()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return CocoIndex(Split(file, file.parent))


def random_results(index: CocoIndex, rng) -> np.ndarray:
    """Return unordered detections with tied scores, often more than 100 per image."""
    rows, decimals = [], int(rng.integers(1, 4))
    for i, image_id in enumerate(index.image_ids.tolist()):
        true = index.boxes[index.box_range(i)]
        one_category = rng.random() < 0.2  # up to 150 detections of it
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
def test_hotcoco_equals_pycocotools(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sound = seed % 2 == 0
    index = random_index(tmp_path / "random.json", rng, sound)
    index.as_annotated = not sound
    detections = random_results(index, rng) if seed % 10 else np.empty((0, 7))
    for limit in (100, 11 if seed % 3 else 140):
        expected = coco_eval.evaluate_with_curves(index, detections, "pycocotools", limit)
        result = coco_eval.evaluate_with_curves(index, detections, "hotcoco", limit)
        assert result.metrics == expected.metrics
        assert np.array_equal(result.curves, expected.curves, equal_nan=True)
        assert sorted_rows(result.matches) == sorted_rows(expected.matches)
        assert (result.matches.boxes == expected.matches.boxes).all()
        if len(detections):
            results = coco_eval.coco_results(detections)
            stats = pycocotools_metrics(index.annotation_file, results, limit)
            names = coco_eval.metric_meanings(limit)
            assert [result.metrics[name] for name in names] == [
                None if value < 0 else value for value in stats
            ]


def sorted_rows(matches) -> list:
    return sorted(zip(*(column.tolist() for column in matches[:3]), strict=True))


def dense_index(file, count: int) -> CocoIndex:
    """Return an index of one image with so many boxes in a row, of one category."""
    boxes = [[12.0 * n, 4.0, 8.0, 8.0] for n in range(count)]
    row = {"image_id": 1, "category_id": 3, "area": 64.0, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "x", "width": 12 * count, "height": 20}],
        "annotations": [{"id": n, "bbox": box, **row} for n, box in enumerate(boxes, start=1)],
        "categories": [{"id": 3, "name": "egg"}],
    }
    file.write_text(json.dumps(content))
    return CocoIndex(Split(file, file.parent))


@pytest.mark.parametrize("evaluator", BOTH)
def test_more_than_100_detections_of_an_image(tmp_path, evaluator):
    index = dense_index(tmp_path / "dense.json", 250)
    detections = perfect_detections(index)
    metrics = coco_eval.evaluate_detections(index, detections, evaluator)
    assert metrics["AR100"] == pytest.approx(0.4)
    metrics = coco_eval.evaluate_detections(index, detections, evaluator, 300)
    assert metrics["AP"] == metrics["AR300"] == metrics["ARs"] == pytest.approx(1)
    assert metrics["AR1"] == pytest.approx(1 / 250)
    assert metrics["AR10"] == pytest.approx(10 / 250)
    assert "AR100" not in metrics
    assert coco_eval.limit_of(metrics) == 300
    table = coco_eval.table(metrics)
    assert "AR1   0.004  AR10  0.040  AR300 1.000  1, 10, 300 detections" in table
    assert max(map(len, table.splitlines())) <= 80


def test_metrics_of_the_default_limit_keep_their_names():
    assert coco_eval.metric_meanings(100) == coco_eval.MEANING
    meanings = coco_eval.metric_meanings(300)
    assert meanings["AR300"] == "AR, 300 detections an image"
    assert [*meanings][:8] == [*coco_eval.METRICS][:8]


@pytest.mark.parametrize("evaluator", BOTH)
def test_score_threshold_by_hand(tiny, evaluator):
    """Boxes of cats and a dog; a crowd of cats; the detections have two equal scores."""

    def change(data):
        crowd = {"id": 77, "image_id": 102, "category_id": 2, "bbox": [40, 20, 20, 20], "area": 400}
        data["annotations"].append({**crowd, "iscrowd": 1})

    rewrite(split_of(tiny, "val"), change)
    index = CocoIndex(split_of(tiny, "val"))
    detections = [
        [100, 4, 4, 30, 20, 0.9, 2],  # a cat
        [102, 42, 22, 10, 10, 0.85, 2],  # in the crowd: ignored
        [101, 30, 40, 10, 10, 0.8, 2],  # background
        [102, 4, 4, 30, 20, 0.6, 2],  # a cat
        [102, 5, 4, 30, 20, 0.6, 2],  # the same cat again, with the same score
        [101, 10, 8, 20, 30, 0.4, 5],  # the dog
        [100, 4, 4, 30, 20, 0.2, 5],  # a cat, as a dog
    ]
    metrics = coco_eval.evaluate_detections(index, np.array(detections, float), evaluator)
    # Cats, 3 boxes: F1 is 2/4 at 0.9, 2/5 at 0.8, and 4/7 at 0.6.
    expected = {"threshold": 0.3, "F1": 4 / 7, "precision": 2 / 4, "recall": 2 / 3}
    assert metrics["per_category"][2]["score_threshold"] == pytest.approx(expected)
    expected = {"threshold": 0.3, "F1": 1, "precision": 1, "recall": 1}
    assert metrics["per_category"][5]["score_threshold"] == pytest.approx(expected)
    # All, 4 boxes: 2/5, 2/6, 4/8, and with the dog 6/9.
    expected = {"threshold": 0.3, "F1": 6 / 9, "precision": 3 / 5, "recall": 3 / 4}
    assert metrics["score_threshold"] == pytest.approx(expected)
    assert "best F1 0.667 at score 0.300: precision 0.600, recall 0.750" in coco_eval.table(metrics)
    chosen = coco_eval.chosen_thresholds(metrics)
    assert chosen["overall"] == pytest.approx(0.3)
    assert chosen["per_category"] == pytest.approx({2: 0.3, 5: 0.3})


def test_no_score_threshold_where_nothing_is_found(tiny):
    index = CocoIndex(split_of(tiny, "val"))
    detections = np.array([[100, 40, 30, 5, 5, 0.9, 2.0], [101, 10, 8, 20, 30, 0.4, 5]])
    metrics = coco_eval.evaluate_detections(index, detections, "both")
    assert metrics["per_category"][2]["score_threshold"] is None
    assert coco_eval.chosen_thresholds(metrics)["per_category"].keys() == {5}
    metrics = coco_eval.evaluate_detections(index, detections[:1], "both")
    assert metrics["score_threshold"] is None
    assert coco_eval.chosen_thresholds(metrics) is None
    assert "best F1" not in coco_eval.table(metrics)


def perfect_detections(index: CocoIndex) -> np.ndarray:
    """Return what training is shown as detections."""
    shown, rows = CocoDetection(index, index.categories), []
    for i in range(len(index)):
        target = shown.target(i)
        boxes = target["boxes"].numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        ids = index.categories.ids_of_labels()[target["labels"].numpy()]
        rows += [[target["image_id"], *box, 0.9, i] for box, i in zip(boxes, ids, strict=True)]
    return np.array(rows)


@pytest.mark.parametrize("evaluator", BOTH)
@pytest.mark.parametrize(
    ("bbox", "area"),
    [
        ([50.0, 30.0, 90.0, 18.0], 1620),  # beyond the right border of 64 pixels
        ([-40.0, -9.0, 60.0, 29.0], 1740),
        ([10.0, 8.0, 0.0, 20.0], 0),
        ([10.0, 8.0, 20.0, -20.0], 400),
        ([10.0, 8.0, 1e-4, 20.0], 0.002),
        ([10.0, 8.0, 20.0, 20.0], -400),
        ([10.0, 8.0, 20.0, 20.0], 1e11),
        ([-0.4, 8.0, 20.0, 20.4], 400),
    ],
)
def test_a_perfect_detector_has_an_ap_of_1(tiny, bbox, area, evaluator):
    split = split_of(tiny)
    assert CocoIndex(split).ground_truth().changed == 0
    rewrite(split, lambda data: data["annotations"][0].update(bbox=bbox, area=area))
    index = CocoIndex(split)
    metrics = coco_eval.evaluate_detections(index, perfect_detections(index), evaluator)
    assert metrics["AP"] == metrics["AR100"] == pytest.approx(1)
    truth = index.ground_truth()
    repaired = truth.changed + len(index.boxes) - len(truth.rows)
    assert repaired == (bbox[0] != -0.4)
    if bbox[0] in (50, -40) or bbox[2] == 0:
        index.as_annotated = True
        metrics = coco_eval.evaluate_detections(index, perfect_detections(index), evaluator)
        assert metrics["AP"] < 0.95


def test_size_of_clipped_boxes_and_impossible_areas(tiny):
    """Of 40 x 20 pixels inside, small; areas in shares of the image are replaced."""

    def change(data):
        data["annotations"][0].update(bbox=[24, 20, 500, 20], area=10_000)
        data["annotations"][1].update(bbox=[0, 0, 40, 40], area=0)

    rewrite(split_of(tiny), change)
    assert CocoIndex(split_of(tiny)).ground_truth().areas[:2].tolist() == [800, 1600]
    rewrite(split_of(tiny), lambda d: [x.update(area=x["area"] / 1e6) for x in d["annotations"]])
    index = CocoIndex(split_of(tiny))
    truth = index.ground_truth()
    assert truth.areas.tolist() == truth.boxes[:, 2:].prod(axis=1).tolist()


def test_categories_of_one_name_are_kept_apart(tiny):
    rewrite(split_of(tiny), lambda d: d["categories"].append({"id": 7, "name": "cat"}))
    rewrite(split_of(tiny), lambda d: [x.update(category_id=7) for x in d["annotations"][::3]])
    index = CocoIndex(split_of(tiny))
    detections = perfect_detections(index)
    detections[detections[:, 6] == 7, 1] += 300
    metrics = coco_eval.evaluate_detections(index, detections, "hotcoco")
    assert [metrics["per_category"][i]["name"] for i in (2, 5, 7)] == ["cat", "dog", "cat"]
    assert metrics["per_category"][2]["AP"] == pytest.approx(1)
    assert metrics["per_category"][7]["AP"] == 0
    assert "cat (id 2) 1.000, dog 1.000, cat (id 7) 0.000" in coco_eval.table(metrics)
    read = json.loads(json.dumps(metrics))
    assert coco_eval.ap_by_category(read) == coco_eval.ap_by_category(metrics)
    assert coco_eval.ap_by_category({"per_category": {"cat": 0.5}}) == {"cat": 0.5}


def test_unknown_categories_and_images_are_ignored(tiny):
    index = CocoIndex(split_of(tiny))
    detections = random_detections(index, np.random.default_rng(0), each=20)
    detections = detections[detections[:, 6] != 9]
    others = detections.copy()
    others[::2, 6], others[1::2, 0], others[:, 5] = 77, 5, 1
    for evaluator in BOTH:
        expected = coco_eval.evaluate_detections(index, detections, evaluator)
        everything = np.concatenate([others, detections])
        assert coco_eval.evaluate_detections(index, everything, evaluator) == expected
        assert expected["AP"] > 0


def test_both_evaluators_must_agree(tiny, monkeypatch):
    index = CocoIndex(split_of(tiny))
    detections = random_detections(index, np.random.default_rng(0), each=20)
    both = coco_eval.evaluate_detections(index, detections, "both")
    assert both == coco_eval.evaluate_detections(index, detections, "hotcoco")

    make_evaluation = coco_eval._with_hotcoco

    def score_with_error(*columns):
        columns[-1]["score"][:5] = 0
        return make_evaluation(*columns)

    monkeypatch.setattr(coco_eval, "_with_hotcoco", score_with_error)
    with pytest.raises(
        RunError, match=r"pycocotools differ: AP: 0\.\d+ and 0\.\d+.*AP of category 2: 0"
    ):
        coco_eval.evaluate_detections(index, detections, "both")


def test_detection_rows_have_dataset_ids():
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
def test_mean_of_curves_is_ap(tiny, evaluator):
    rng = np.random.default_rng(0)
    index = random_truth(tiny, rng)
    metrics, curves, _ = coco_eval.evaluate_with_curves(
        index, random_detections(index, rng), evaluator
    )
    assert metrics["AP"] > 0
    assert curves.shape == (10, 101, 3)
    assert np.isnan(curves[:, :, 2]).all()  # the category "unseen"
    assert np.nanmean(curves) == pytest.approx(metrics["AP"])
    assert np.nanmean(curves[5]) == pytest.approx(metrics["AP75"])
    assert (np.diff(curves[:, :, :2], axis=1) <= 0).all()


def test_results_round_trip(tiny, tmp_path):
    rng = np.random.default_rng(0)
    detections = random_detections(random_truth(tiny, rng), rng)
    coco_eval.write_results(detections, tmp_path / "detections.json")
    assert (coco_eval.read_results(tmp_path / "detections.json") == detections).all()
    (tmp_path / "detections.json").write_text("[]")
    assert coco_eval.read_results(tmp_path / "detections.json").shape == (0, 7)


VALID_ROW = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 1', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "is not a list"),
        ([VALID_ROW, {**VALID_ROW, "bbox": [1, 2, 3]}], "row 1 is not a COCO result"),
        ([VALID_ROW, VALID_ROW, {**VALID_ROW, "score": None}], "row 2 is not a COCO result"),
        ([{**VALID_ROW, "score": float("nan")}], "not valid JSON|row 0 is no"),
        ([{**VALID_ROW, "image_id": "seven"}], "row 0 is no"),
        ([{**VALID_ROW, "image_id": 10**400}], "row 0 is no|not valid"),
        ([VALID_ROW, "x"], "row 1 is no"),
        ([VALID_ROW, {"image_id": 1}], 'row 1 is not .*: {"image_id": 1}'),
    ],
)
def test_invalid_results_are_rejected(tmp_path, content, message):
    file = tmp_path / "detections.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"detections\.json.*({message})"):
        coco_eval.read_results(file)


def test_missing_results_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        coco_eval.read_results(tmp_path / "detections.json")
