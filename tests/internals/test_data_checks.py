import os
import re

import numpy as np
import pytest
from helpers import rewrite, split_of, write_split
from PIL import Image

from coco_utils import CocoIndex, Split
from internals import box_checks, data_checks
from internals.errors import DataError


def kinds_of(index: CocoIndex) -> dict[str, list[str]]:
    return {issue.kind: issue.examples for issue in data_checks.find_issues(index)}


def change_annotation(**values):
    return lambda data: data["annotations"][2].update(values)


def change_image(**values):
    return lambda data: data["images"][0].update(values)


FATAL = [
    (
        change_annotation(bbox=[1.0, float("nan"), 5, 5]),
        "NaN or infinity",
        "annotation 1001 of image 101",
    ),
    (
        change_annotation(bbox=[1.0, 2.0, float("inf"), 5]),
        "NaN or infinity",
        "annotation 1001 of image 101",
    ),
    (change_annotation(bbox=[1.0, 2.0]), "annotations whose 'bbox' is not four num", "id 1001"),
    (change_annotation(bbox="1234"), "annotations whose 'bbox' is not four num", "id 1001"),
    (change_annotation(bbox=5), "annotations whose 'bbox' is not four num", "id 1001"),
    (change_annotation(category_id=77), "undefined category_id", "annotation 1001 of image 101"),
    (
        change_annotation(image_id=77),
        "images that the file does not list",
        "annotation 1001 of image 77",
    ),
    (change_annotation(id=0), "annotations with a repeated id", "annotation 0 of image 100"),
    (change_annotation(bbox=[900, 2, 5, 5]), "wholly outside", "annotation 1001 of image 101"),
    (change_image(id=101), "images with a repeated id", "0.png (id 101)"),
    (change_image(id=2**60), "images whose 'id' is not a whole number up to 2**53", f"id {2**60}"),
    (change_image(file_name="../../x.png"), "lead out of the image folder", "../../x.png (id 100)"),
    (change_image(file_name="/x.png"), "absolute paths outside of", "/x.png (id 100)"),
    (change_image(file_name="http://a/x.png"), "addresses on a server", "http://a/x.png (id 100)"),
    (change_image(file_name="missing.png"), "files that are missing", "missing.png (id 100)"),
    (change_image(file_name="no/9.png"), "files that are missing", "no/9.png (id 100)"),
    (change_image(file_name=7), "images whose 'file_name' is not a string", "id 100"),
    (change_image(width=None), "images without 'width'", "id 100"),
    (change_image(height=-3), "images without a positive size", "0.png (id 100)"),
    (change_image(width=10_000, height=10_000), "images of more than 89,", "0.png (id 100)"),
]


@pytest.mark.parametrize(("change", "kind", "example"), FATAL)
def test_fatal_issue_is_raised_with_file_and_id(tiny, change, kind, example):
    split = split_of(tiny)
    rewrite(split, change)
    index = CocoIndex(split)
    issues = data_checks.find_issues(index)
    assert any(x.fatal and kind in x.kind and example in x.examples for x in issues), issues
    with pytest.raises(DataError) as caught:
        data_checks.raise_if_fatal(index, issues)
    for part in (str(split.annotations), kind, example):
        assert part in str(caught.value)


def test_valid_data_has_no_issues(tiny):
    assert data_checks.find_issues(CocoIndex(split_of(tiny))) == []


def test_all_fatal_issues_are_raised_together(tiny):
    split = split_of(tiny)
    rewrite(split, change_annotation(category_id=77))
    rewrite(split, change_image(file_name="missing.png"))
    index = CocoIndex(split)
    with pytest.raises(DataError, match=r"(?s)missing\.png.*\n.*annotation 1001 of image 101"):
        data_checks.raise_if_fatal(index, data_checks.find_issues(index))


def test_dropped_and_clipped_boxes_are_counted_by_kind(tiny):
    split = split_of(tiny)

    def change(data):
        for row, box in zip(
            data["annotations"],
            ([1, 1, 0, 5], [1, 1, 5, -2], [-3, 0, 10, 10], [56, 20, 8.4, 20], [47.95, 20, 30, 20]),
            strict=False,
        ):
            row.update(bbox=box, area=20)

    rewrite(split, change)
    index = CocoIndex(split)
    issues = data_checks.find_issues(index)
    assert not any(issue.fatal for issue in issues)
    data_checks.raise_if_fatal(index, issues)
    assert kinds_of(index) == {
        "boxes of zero width or height": ["annotation 0 of image 100"],
        "boxes of negative width or height": ["annotation 1000 of image 101"],
        "boxes partly outside their image": ["annotation 1001 of image 101"],
        "boxes thinner than 0.1 pixels within their image": ["annotation 3000 of image 103"],
    }
    assert index.usable[:5].tolist() == [False, False, True, True, False]
    assert "boxes without a size: 3" in data_checks.summarize(index)


def test_categories_without_boxes_in_val_are_noted(tiny):
    indexes = {split: CocoIndex(split_of(tiny, split)) for split in ("train", "val")}
    assert data_checks.compare_splits(indexes) == []
    rewrite(split_of(tiny, "val"), lambda d: [x.update(category_id=2) for x in d["annotations"]])
    indexes["val"] = CocoIndex(split_of(tiny, "val"))
    (text,) = data_checks.compare_splits(indexes)
    assert text.startswith("categories that have boxes in train, but none in val (1): dog.")


def test_categories_of_one_name_are_noted(tiny):
    rewrite(split_of(tiny), lambda data: data["categories"].append({"id": 7, "name": "cat"}))
    index = CocoIndex(split_of(tiny))
    name = "categories with the name of another one, but for letter case"
    assert kinds_of(index) == {name: ["'cat' (id 2)", "'cat' (id 7)"]}
    assert "cat (id 7)         0         0" in data_checks.describe(index)


def change_all(change):
    return lambda data: [change(row) for row in data["annotations"]]


def as_corners(row: dict) -> None:
    x, y, width, height = row["bbox"]
    row["bbox"] = [x, y, x + width, y + height]


def as_shares(row: dict) -> None:
    row["bbox"] = [value / 64 for value in row["bbox"]]
    row["area"] = row["bbox"][2] * row["bbox"][3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_shares, "boxes from 0 to 1, as shares of the image, 100% of all"),
        (as_corners, "boxes that reach out of their image, 25% of all, but would not as x1, y1"),
    ],
)
def test_boxes_in_other_units_are_rejected_once(tiny, change, message):
    rewrite(split_of(tiny), lambda data: data["annotations"][0].update(bbox=[30, 20, 20, 20]))
    rewrite(split_of(tiny), lambda data: data["annotations"][3].update(bbox=[10, 20, 20, 20]))
    rewrite(split_of(tiny), lambda data: data["annotations"][4].update(bbox=[25, 30, 20, 20]))
    assert not any(issue.fatal for issue in data_checks.find_issues(CocoIndex(split_of(tiny))))
    rewrite(split_of(tiny), change_all(change))
    index = CocoIndex(split_of(tiny))
    (issue,) = data_checks.find_issues(index)
    assert issue.fatal
    assert issue.kind.startswith(message)
    assert not any(issue.fatal for issue in data_checks.find_issues(index, trust_boxes=True))


def test_boxes_in_percent_are_rejected(tmp_path):
    boxes = [[[2, 1, n, 50, 50]] for n in range(10)] + [
        [[2, 60, 30 - n, 40, 69]] for n in range(10)
    ]
    split = Split(write_split(tmp_path, "train", [(640, 480)] * 20, boxes), tmp_path / "train2017")
    (issue,) = data_checks.find_issues(CocoIndex(split))
    assert issue.kind == "boxes from 0 to 100, as percentages of the image, 100% of all"
    assert "image / 100" in issue.remedy
    for box in boxes[10:]:  # objects in a corner of large images
        box[0][3] = 20
    split = Split(write_split(tmp_path / "b", "train", [(640, 480)] * 20, boxes), tmp_path / "b")
    issues = box_checks.find_box_issues(CocoIndex(split), False)
    assert not any(issue.fatal for issue in issues if issue.count)


def test_centers_instead_of_corners_are_rejected(tmp_path):
    boxes = [[[2, 565, 150 + n, 130, 100]] for n in range(4)] + [[[2, 150, 150, 90, 90]]] * 10
    split = Split(write_split(tmp_path, "train", [(640, 480)] * 14, boxes), tmp_path / "train2017")
    (issue,) = data_checks.find_issues(CocoIndex(split))
    assert issue.fatal
    assert issue.kind == (
        "boxes that reach out of their image, 29% of all, but would not as center x, center y, "
        "width, height"
    )


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 0, 0]] * 3,  # placeholders
        [[50, 30, 500, 400]] * 10 + [[100, 30, 580, 400]],  # one reaches out
        [[5, 5, 90, 90]] * 2,
    ],
)
def test_few_odd_boxes_are_not_taken_for_other_units(tmp_path, boxes):
    sizes, boxes = [(640, 480)] * len(boxes), [[[2, *box]] for box in boxes]
    split = Split(write_split(tmp_path, "val", sizes, boxes), tmp_path / "val2017")
    assert not any(issue.fatal for issue in data_checks.find_issues(CocoIndex(split)))


def test_large_boxes_with_rounding_errors_are_no_corners(tmp_path):
    boxes = [[[2, 1, 2, 640, 478]], [[2, 5, 7, 630, 470]]]
    split = Split(write_split(tmp_path, "train", [(640, 480)] * 2, boxes), tmp_path / "train2017")
    (issue,) = data_checks.find_issues(CocoIndex(split))
    assert not issue.fatal
    assert issue.kind == "boxes partly outside their image"


@pytest.mark.parametrize("area", [-600, 0, 1e6, float("nan")])
def test_impossible_areas_are_named(tiny, area):
    split = split_of(tiny)
    rewrite(split, change_annotation(area=area))
    kinds = kinds_of(CocoIndex(split))
    if not np.isnan(area):  # NaN stands for a missing area
        assert list(kinds.values()) == [["annotation 1001 of image 101"]]
        assert next(iter(kinds)).startswith("areas that are not positive")


def test_repeated_boxes_are_counted(tiny):
    def double(data):
        copies = [{**row, "id": row["id"] + 9000} for row in data["annotations"][:3]]
        copies[0]["category_id"] = 9 - copies[0]["category_id"] - 2  # another category, no copy
        data["annotations"] += copies

    rewrite(split_of(tiny), double)
    kinds = kinds_of(CocoIndex(split_of(tiny)))
    name = "boxes that repeat one of the same image and category"
    assert kinds == {name: ["annotation 10000 of image 101", "annotation 10001 of image 101"]}


def test_images_with_more_boxes_than_detections_are_counted(tiny):
    def change(data):
        row = data["annotations"][0]
        boxes = [[x, y, 3, 3] for x in range(0, 60, 4) for y in range(0, 40, 4)]
        for n, box in enumerate(boxes):
            data["annotations"].append({**row, "id": 10000 + n, "bbox": box, "area": 9})

    rewrite(split_of(tiny), change)
    index = CocoIndex(split_of(tiny))
    issue = data_checks.find_crowded_images(index, None)
    assert issue.kind == "images with more than 100 boxes, up to 151"
    assert issue.examples == ["0.png (id 100)"]
    assert "Use --max-detections 200, or cut" in str(issue)
    assert "more than 150 boxes" in str(data_checks.find_crowded_images(index, 150))
    assert data_checks.find_crowded_images(index, 151) is None


def test_images_with_same_file_are_reported(tiny):
    split = split_of(tiny)
    rewrite(split, change_image(file_name="2.png"))
    kinds = kinds_of(CocoIndex(split))
    assert kinds == {"images with a repeated file name": ["2.png (id 100)", "2.png (id 102)"]}


def test_examples_are_limited_to_20(tmp_path):
    boxes = [[[2, 1, 1, 5, 5]]] * 30
    split = Split(write_split(tmp_path, "train", [(20, 20)] * 30, boxes), tmp_path / "train2017")
    rewrite(split, lambda data: [a.update(category_id=9) for a in data["annotations"]])
    index = CocoIndex(split)
    (issue,) = data_checks.find_issues(index)
    assert issue.count == 30
    assert len(issue.examples) == 20
    assert re.search(
        r"^annotations .* \(30\): (annotation \d+ of image \d+,? ?){5} and 25 more\.", str(issue)
    )


def test_links_in_image_folder_are_followed(tiny, tmp_path):
    folder = split_of(tiny).images
    outside = tmp_path / "outside.png"
    outside.write_bytes((folder / "0.png").read_bytes())
    (folder / "a.png").symlink_to(folder / "0.png")
    (folder / "b.png").symlink_to(outside)
    (folder / "sub").symlink_to(tmp_path)
    for name in ("a.png", "b.png", "sub/outside.png"):
        rewrite(split_of(tiny), change_image(file_name=name))
        index = CocoIndex(split_of(tiny))
        assert data_checks.find_issues(index) == [], name
        assert index.read_image(0).shape == (3, 48, 64)
    linked = tmp_path / "linked"
    linked.symlink_to(tiny)
    rewrite(split_of(tiny), change_image(file_name="a.png"))
    assert data_checks.find_issues(CocoIndex(split_of(linked))) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_by_kind(tiny, workers):
    split = split_of(tiny)
    good = (split.images / "3.png").read_bytes()
    (split.images / "0.png").write_bytes(b"")
    (split.images / "1.png").write_bytes(good[: len(good) // 2])
    Image.new("RGB", (9, 9)).save(split.images / "2.png")
    Image.new("1", (10_000, 10_000)).save(split.images / "4.png")
    os.remove(split.images / "5.png")
    index = CocoIndex(split)
    bad = data_checks.find_unreadable_images(index, workers)
    assert [i for i, *_ in bad] == [0, 1, 2, 4, 5]
    issues = {issue.kind: issue for issue in data_checks.group_by_kind(bad)}
    assert {kind: issue.count for kind, issue in issues.items()} == {
        "image files that are missing": 1,
        "image files that cannot be read": 2,
        "image files of another size than annotated": 1,
        "image files that are too large": 1,
    }
    unreadable = str(issues["image files that cannot be read"])
    assert all(f"\n    image {100 + n}: {split.images / str(n)}.png" in unreadable for n in (0, 1))
    assert unreadable.endswith("\n    Repair them, or remove them from the annotation file")


def test_files_outside_image_folder_are_not_opened(tiny, tmp_path):
    folder = split_of(tiny).images
    (folder / "0.png").rename(tmp_path / "x.png")
    for name, kind in (("../../x.png", "lead out"), (f"{tmp_path}/x.png", "absolute paths")):
        rewrite(split_of(tiny), change_image(file_name=name))
        (bad,) = data_checks.find_unreadable_images(CocoIndex(split_of(tiny)), 0)
        assert kind in bad[1]


def test_examination_reports_each_missing_file_once(tiny, capsys):
    os.remove(split_of(tiny).images / "1.png")
    (split_of(tiny).images / "2.png").write_bytes(b"")
    fatal, bad = data_checks.examine(CocoIndex(split_of(tiny)), "train", 0)
    printed = capsys.readouterr().out
    assert fatal == []
    assert [i for i, *_ in bad] == [1, 2]
    assert printed.count("1.png") == printed.count("2.png") == 1
    assert "image files that are missing (1): 1.png (id 101). Add them to" in printed


def test_wrong_image_folder_is_recognized(tiny, tmp_path):
    issues = data_checks.find_issues(CocoIndex(Split(split_of(tiny).annotations, tmp_path / "no")))
    assert "None of them is in" in str(issues[0])
    assert "--train-images" in str(issues[0])


def test_report_counts_images_and_boxes(tiny):
    split = split_of(tiny)

    def change(data):
        data["annotations"][0]["iscrowd"] = 1
        data["annotations"][1]["area"] = 96**2 + 1
        data["categories"].append({"id": 9, "name": "unseen"})

    rewrite(split, change)
    report = data_checks.describe(CocoIndex(split))
    for line in (
        "8 images, 12 boxes in 3 categories, images without a usable box: 1, crowd boxes: 1",
        "image sizes: 48 x 64 (4), 64 x 48 (4)",
        "box sizes: 10 small (area under 32 x 32), 0 medium, 1 large",
    ):
        assert line in report
    rows = [line.split() for line in report.splitlines()]
    assert ["cat", "7", "7"] in rows
    assert ["dog", "4", "4"] in rows
    assert ["unseen", "0", "0"] in rows


def test_report_lists_most_frequent_image_sizes(tiny):
    index = CocoIndex(split_of(tiny))
    index.sizes = np.array([(10 + n, 20) for n in range(8) for _ in range(n + 1)], dtype=np.int32)
    line = data_checks.describe(index).splitlines()[1]
    assert line.startswith("  image sizes: 17 x 20 (8), 16 x 20 (7)")
    assert line.endswith("and 3 other sizes from 10 to 17 wide and 20 to 20 high")


def test_valid_annotation_variants_have_no_issues(tiny):
    split = split_of(tiny)

    def change(data):
        data["annotations"][0].update(segmentation={"size": [48, 64], "counts": "abc"}, iscrowd=1)
        data["annotations"][1]["segmentation"] = []
        del data["annotations"][2]["area"]
        data["annotations"] = data["annotations"][:6]

    rewrite(split, change)
    assert data_checks.find_issues(CocoIndex(split)) == []
    rewrite(split, lambda data: data.update(annotations=[]))
    index = CocoIndex(split)
    assert data_checks.find_issues(index) == []
    assert "0 boxes" in data_checks.describe(index)


# ------------------------------------------------------------------- notes on images that are used


def save_turned(file) -> None:
    """Store the image with an EXIF rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif)


def test_unapplied_rotations_are_counted_in_the_report(tiny, capsys):
    folder = split_of(tiny).images
    for n in range(4):
        save_turned(folder / f"{n}.png")
    fatal, bad = data_checks.examine(CocoIndex(split_of(tiny)), "train", 0, False)
    assert (fatal, bad) == ([], [])
    printed = capsys.readouterr().out
    assert "note: images used without their EXIF rotation (4):" in printed
    assert f"image 100: {folder}/0.png" in printed
    assert "look at a few with predict.py --show-truth" in printed


def test_bit_depth_is_that_of_all_splits_together(tiny):
    indexes = [CocoIndex(split_of(tiny, split)) for split in ("train", "val")]
    assert data_checks.find_bit_depth(indexes) is None
    for split, largest in (("train", 255), ("val", 4095)):
        file = split_of(tiny, split).images / "0.png"
        Image.fromarray(np.full((48, 64), largest, dtype=np.uint16)).save(file)
    depth, text = data_checks.find_bit_depth(indexes)
    assert depth == 12
    assert "of 2 files is 4,095" in text
    assert data_checks.find_bit_depth(indexes[:1])[0] == 8


def test_search_for_more_bad_images_is_bounded(tiny):
    for n in range(8):
        (split_of(tiny).images / f"{n}.png").write_bytes(b"no image")
    index = CocoIndex(split_of(tiny))
    assert data_checks.find_more_bad_images(index, 6)[0] == 7
    assert data_checks.find_more_bad_images(index, 6, count=3)[0] == 3
    assert data_checks.find_more_bad_images(index, 6, seconds=-1) == (0, "")


def test_images_shared_by_nested_folders_are_noted(tiny):
    """Folders on other drives, which have no common path on Windows, share none."""
    train, val = (CocoIndex(split_of(tiny, split)) for split in ("train", "val"))
    assert data_checks.compare_splits({"train": train, "val": val}) == []
    val.image_dir = train.image_dir.parent
    val.file_names = np.array([b"train2017/0.png", b"val2017/1.png", b"val2017/2.png"])
    (text,) = data_checks.compare_splits({"train": train, "val": val})
    assert text.startswith("1 of 3 validation images are training images, too, such as /")
    assert "train2017/0.png" in text
