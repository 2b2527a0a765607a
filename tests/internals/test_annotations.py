"""Reading annotation files through CocoIndex."""

import json

import msgspec
import numpy as np
import pytest
from helpers import rewrite, split_of

from coco_utils import CocoIndex
from internals import annotations
from internals.errors import DataError


def fast_path_only(monkeypatch):
    def fail(content, file):
        raise AssertionError("msgspec did not accept the file")

    monkeypatch.setattr(annotations, "_decode_leniently", fail)


def slow_path_only(monkeypatch):
    def reject(content, type):
        raise msgspec.ValidationError

    monkeypatch.setattr(annotations.msgspec.json, "decode", reject)


@pytest.mark.parametrize("path", [fast_path_only, slow_path_only])
def test_fast_and_lenient_decoding_agree(tiny, path, monkeypatch):
    split = split_of(tiny)

    def change(data):
        data["annotations"][0].update(area=None, iscrowd=1, segmentation=[[1, 2, 3]])
        data["categories"][0]["name"] = None
        data["images"][0]["id"] = data["annotations"][0]["image_id"] = 2**53

    rewrite(split, change)
    path(monkeypatch)
    index = CocoIndex(split)
    assert index.image_ids[:2].tolist() == [2**53, 101]
    assert index.image_ids.dtype == index.category_ids.dtype == np.int64
    assert index.boxes.dtype == index.areas.dtype == np.float64
    assert index.boxes[:2].tolist() == [[4, 4, 30, 20], [10, 8, 20, 30]]
    assert index.areas[:2].tolist() == [600, 600]
    assert index.iscrowd[:2].tolist() == [True, False]
    assert index.categories.names == ("category 2", "dog")
    assert index.issues == []


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "order", ["images annotations categories licenses", "licenses categories annotations images"]
)
def test_lists_in_any_order(tiny, order, indent, monkeypatch):
    split = split_of(tiny)
    expected = CocoIndex(split)
    data = json.loads(split.annotations.read_text())
    data["images"][0]["note"] = 'ends like this: }], "annotations": [{'
    data["images"] = [{"annotations": [], **row} for row in data["images"]]
    data["annotations"][3]["segmentation"] = [{"x": [1]}, {"x": [2]}]
    data["categories"][0]["skeleton"] = [[1, 2], [3]]
    data["licenses"] = [{"id": 1}, {"id": 2, "annotations": []}]
    split.annotations.write_text(json.dumps({k: data[k] for k in order.split()}, indent=indent))
    fast_path_only(monkeypatch)
    assert CocoIndex(split).fingerprint() == expected.fingerprint()


def test_optional_fields_may_be_missing(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        for row in data["annotations"]:
            del row["area"], row["iscrowd"], row["id"]
            row["segmentation"] = {"counts": "abc", "size": [1, 1]}
        data["info"] = {"anything": [1, None]}

    rewrite(split, change)
    after = CocoIndex(split)
    assert after.fingerprint() == before.fingerprint()
    assert (after.annotation_ids == -1).all()


def test_numbers_of_other_types_are_converted(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)

    def change(data):
        for row in data["annotations"]:
            row.update(image_id=str(row["image_id"]), bbox=[str(x) for x in row["bbox"]])
            row.update(iscrowd=None, category_id=float(row["category_id"]), area=str(row["area"]))
        data["annotations"][0]["iscrowd"] = False

    rewrite(split, change)
    assert CocoIndex(split).fingerprint() == before.fingerprint()


def test_byte_order_mark_is_skipped(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)
    split.annotations.write_text(split.annotations.read_text(), encoding="utf-8-sig")
    assert CocoIndex(split).fingerprint() == before.fingerprint()


def test_nan_area_is_replaced_by_box_area(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)
    rewrite(split, lambda data: data["annotations"][1].update(area=float("nan")))
    assert CocoIndex(split).areas.tolist() == before.areas.tolist()


@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("images", {"height": None}, "images without 'height'"),
        ("images", {"file_name": 7}, "images whose 'file_name' is not a string"),
        ("images", {"height": 2**53 + 1}, "images whose 'height' is not a whole number up to"),
        ("images", {"width": 2**53 + 2}, "images whose 'width' is not a whole number up to 2**53"),
        ("annotations", {"category_id": 1.5}, "annotations whose 'category_id' is not a whole num"),
        ("annotations", {"bbox": [1, 2, 3]}, "annotations whose 'bbox' is not four numbers"),
        ("annotations", {"bbox": "1234"}, "annotations whose 'bbox' is not four numbers"),
        ("annotations", {"area": "large"}, "annotations whose 'area' is not a number"),
        ("categories", {"name": 7}, "categories whose 'name' is not a string"),
    ],
)
def test_invalid_row_is_reported_with_id(tiny, key, values, kind):
    split = split_of(tiny)
    rewrite(split, lambda data: data[key][1].update(id=77, **values))
    (issue, *_) = CocoIndex(split).issues
    assert issue.kind.startswith(kind)
    assert issue.examples == ["id 77"]
    assert issue.fatal


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_unicode_encodings_are_read(tiny, encoding):
    split = split_of(tiny)
    before = CocoIndex(split)
    split.annotations.write_bytes(split.annotations.read_text().encode(encoding))
    assert CocoIndex(split).fingerprint() == before.fingerprint()


def test_annotation_ids_of_other_types_are_unused(tiny):
    split = split_of(tiny)
    before = CocoIndex(split)
    rewrite(split, lambda data: data["annotations"][1].update(id="7c9e6679-7425"))
    index = CocoIndex(split)
    assert index.issues == []
    assert index.annotation_ids[1] == -1
    assert index.fingerprint() == before.fingerprint()


def test_invalid_row_without_id_is_reported_with_index(tiny):
    split = split_of(tiny)

    def change(data):
        data["annotations"][3] = "x"
        data["annotations"][5] = [1]

    rewrite(split, change)
    (issue,) = CocoIndex(split).issues
    assert issue.kind == "annotations that are not objects"
    assert issue.examples == ["annotations[3]", "annotations[5]"]
    assert issue.count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(categories=[]), "has no usable categories"),
        (lambda data: data.pop("categories"), "has no list 'categories'"),
        (lambda data: data.update(images=[], annotations=[]), "lists no usable images"),
        (
            lambda data: [row.pop("width") for row in data["images"]],
            r"images without 'width' \(8\)",
        ),
        (
            lambda data: [row.update(file_name="\ud800") for row in data["images"]],
            r"images whose 'file_name' is not a string of at most 1,024 characters \(8\)",
        ),
        (lambda data: data["categories"].append({"id": 2}), "two categories with the same id"),
    ],
)
def test_file_without_required_fields_is_rejected(tiny, change, message):
    split = split_of(tiny)
    rewrite(split, change)
    with pytest.raises(DataError, match=message) as caught:
        CocoIndex(split)
    assert str(split.annotations) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "not valid JSON"),
        (b'{"images": ' + b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (b"[]", "holds a list at its top level"),
        (b'{"images": "\xff"}', "not UTF-8 text"),
        (b"", "is empty"),
    ],
)
def test_invalid_annotation_file_is_rejected(tiny, content, message):
    split = split_of(tiny)
    split.annotations.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        CocoIndex(split)
    assert str(split.annotations) in str(caught.value)


def test_missing_annotation_file_is_reported(tiny):
    split = split_of(tiny)
    split.annotations.unlink()
    with pytest.raises(DataError, match=r"train2017\.json cannot be read: No such file"):
        CocoIndex(split)


def test_issue_lists_long_examples_on_separate_lines():
    short = annotations.DataIssue("images of a kind", ["a", "b"], 5, "Repair them")
    assert str(short) == "images of a kind (5): a, b and 3 more. Repair them"
    long = annotations.DataIssue("images of a kind", ["x" * 80, "y"], 2, "Repair them")
    assert str(long) == f"images of a kind (2):\n    {'x' * 80}\n    y\n    Repair them"
