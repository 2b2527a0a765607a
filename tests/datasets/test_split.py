"""Splitting an annotation file into train and val."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import split
from helpers import read_labels, rewrite, run_train, split_of, write_split

from internals.errors import UserError


def main(*argv) -> None:
    split.main(list(map(str, argv)))


def write_many(folder: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """Write annotations of a common, a rare and two paired categories, and empty image files."""
    rng = random.Random(seed)
    annotations = []
    for image_id in range(count):
        category_ids = (
            [1] * rng.randint(0, 5) + [2] * (rng.random() < 0.1) + [5, 9] * (rng.random() < 0.3)
        )
        annotations += [{"image_id": image_id, "category_id": each} for each in category_ids]
        (folder / f"{image_id}.png").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(count)],
        "annotations": annotations,
        "categories": [{"id": i} for i in (1, 2, 5, 9)],
    }
    file = folder / "all.json"
    file.write_text(json.dumps(content))
    return file, folder


def count_images_by_category(content: dict) -> Counter:
    pairs = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    return Counter(category for category, _ in pairs)


def read(root: Path, name: str) -> dict:
    return json.loads(split_of(root, name).annotations.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("share", "seed"), [(0.1, 0), (0.2, 1), (0.5, 2), (0.75, 3)])
def test_split_is_stratified_by_category(tmp_path, out, share, seed):
    file, folder = write_many(tmp_path, 600, seed)
    main(file, folder, out, "--val-share", share, "--seed", seed)
    assert abs(len(read(out, "val")["images"]) - 600 * share) <= 2
    totals = count_images_by_category(json.loads(file.read_text()))
    val = count_images_by_category(read(out, "val"))
    assert len(totals) == 4
    for category, count in totals.items():
        assert abs(val[category] - count * share) <= 2, category


def test_split_depends_on_seed_only(tmp_path, out):
    inputs = write_many(tmp_path, 200)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(*inputs, out / name, "--seed", seed)
    assert read(out / "a", "val") == read(out / "b", "val")
    assert read(out / "a", "val") != read(out / "c", "val")


def test_single_image_of_category_stays_in_train(tmp_path, out):
    write_split(
        tmp_path, "train", [(8, 8)] * 10, [[[2, 1, 1, 3, 3]] if n == 4 else [] for n in range(10)]
    )
    for seed in range(10):
        main(*split_of(tmp_path), out / str(seed), "--seed", seed)
        assert len(read(out / str(seed), "val")["images"]) == 2
        assert read(out / str(seed), "val")["annotations"] == []


def test_splits_are_disjoint_and_keep_other_fields(coco, out):
    def change(data):
        data.update(info={"year": 2024}, licenses=[{"id": 1}], mine=[1.5, None, "ä"])
        data["annotations"][0].update(segmentation=[[4.0, 4, 34, 4, 34, 24]], note="kept")
        data["images"][0]["file_name"] = "below/0.png"

    rewrite(split_of(coco), change)
    (coco / "train2017/below").mkdir()
    (coco / "train2017/0.png").rename(coco / "train2017/below/0.png")
    whole = read(coco, "train")
    main(*split_of(coco), out, "--val-share", "0.5")
    contents = [read(out, name) for name in ("train", "val")]
    for content in contents:
        assert list(content) == list(whole)
        ids = {row["id"] for row in content["images"]}
        for key, rows in whole.items():
            if key in ("images", "annotations"):
                rows = [row for row in rows if row["id" if key == "images" else "image_id"] in ids]
            assert content[key] == rows
    assert sorted(r["id"] for c in contents for r in c["images"]) == [100, 101, 102, 103]
    assert [len(content["images"]) for content in contents] == [2, 2]
    assert len(list(out.rglob("*.png"))) == 4
    done = run_train("--data-path", out, "--check-data", "-j", "0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].update(id=100), "two images have the id 100: keep one"),
        (lambda d: d["images"][1].update(file_name="0.png"), "two images have the file_name '0.p"),
        (
            lambda d: d["annotations"][0].update(image_id=7),
            "annotation 0 refers to unknown image 7",
        ),
        (
            lambda d: d["images"][0].update(file_name="missing.png"),
            "image files that are missing (1): missing.png (id 100). Add them to",
        ),
        (lambda d: d["images"][0].update(file_name="../x.png"), "by '..' (1): ../x.png (id 100)"),
        (lambda d: d["images"][0].update(file_name="/x.png"), "absolute paths outside of the imag"),
        (lambda d: d["images"][1].pop("id"), "images[1] has no 'id' that is an integer"),
        (
            lambda d: d["images"][1].update(file_name="\ud800"),
            "has no 'file_name' that is a string",
        ),
        (lambda d: d["images"][1].update(file_name=3), "images[1] has no 'file_name' that is a st"),
        (lambda d: d.pop("annotations"), "has no list 'annotations': is it a COCO annotation file"),
        (lambda d: d.update(images=d["images"][:1], annotations=[]), "1 images, too few to split"),
    ],
)
def test_invalid_annotation_file_is_rejected(coco, out, change, message):
    rewrite(split_of(coco), change)
    with pytest.raises(UserError) as caught:
        main(*split_of(coco), out)
    assert message in str(caught.value)
    assert "instances_train2017.json" in str(caught.value)
    assert not out.exists()


def test_what_train_accepts_is_split(coco, out, capsys):
    expected = {name: read_labels(coco, name) for name in ("train",)}["train"]

    def change(data):
        for row in data["images"]:
            row.update(id=str(row["id"]), file_name=f"C:\\set\\{row['file_name']}")
        for row in data["annotations"]:
            row.update(id=f"a{row['id']}", image_id=float(row["image_id"]))
            row["category_id"] = str(row["category_id"])

    rewrite(split_of(coco), change)
    file = split_of(coco).annotations
    file.write_bytes(file.read_text().encode("utf-16"))
    assert run_train("--data-path", coco, "--check-data", "-j", "0").returncode == 0
    main(*split_of(coco), out, "--val-share", "0.5")
    printed = capsys.readouterr().out
    assert f"note: image file names resolved to files below {coco}/train2017 (4): C:\\" in printed
    assert "note: annotations have ids that are no integers ('a0'): numbered anew" in printed
    assert {**read_labels(out, "train"), **read_labels(out, "val")} == expected
    ids = [row["id"] for name in ("train", "val") for row in read(out, name)["annotations"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    done = run_train("--data-path", out, "--check-data", "-j", "0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_non_coco_file_is_rejected(tmp_path, out, text):
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(UserError, match=r"all\.json (is not valid JSON|has no list 'images')"):
        main(tmp_path / "all.json", tmp_path, out)


@pytest.mark.parametrize("share", ["0", "1", "20"])
def test_val_share_is_between_0_and_1(out, share):
    with pytest.raises(UserError, match=f"{share} is not between 0 and 1"):
        main("a.json", "a", out, "--val-share", share)


def image_ids_of(root: Path, name: str) -> set[int]:
    return {row["id"] for row in read(root, name)["images"]}


@pytest.mark.parametrize(("count", "folds", "seed"), [(200, 5, 0), (37, 10, 1), (20, 20, 2)])
def test_folds_are_disjoint_complete_and_stratified(tmp_path, out, count, folds, seed):
    file, folder = write_many(tmp_path, count, seed)
    main(file, folder, out, "--folds", folds, "--seed", seed)
    roots = [out / f"fold{number}" for number in range(folds)]
    assert sorted(out.iterdir()) == sorted(roots)
    vals = [image_ids_of(root, "val") for root in roots]
    assert sum(map(len, vals)) == count
    assert set().union(*vals) == set(range(count))
    for root, val in zip(roots, vals, strict=True):
        assert image_ids_of(root, "train") == set(range(count)) - val
        assert {int(path.stem) for path in (root / "val2017").iterdir()} == val
    assert max(map(len, vals)) - min(map(len, vals)) <= 1
    counts = [count_images_by_category(read(root, "val")) for root in roots]
    for category in (1, 2, 5, 9):
        values = [by_category[category] for by_category in counts]
        assert max(values) - min(values) <= 1, category


def test_images_without_boxes_are_spread_over_folds(tmp_path, out):
    boxes = [[[2, 1, 1, 3, 3]] if n % 2 else [] for n in range(12)]
    write_split(tmp_path, "train", [(8, 8)] * 12, boxes)
    main(*split_of(tmp_path), out, "--folds", "3")
    for number in range(3):
        val = read(out / f"fold{number}", "val")
        assert (len(val["images"]), len(val["annotations"])) == (4, 2)


def test_folds_depend_on_seed_only(tmp_path, out):
    inputs = write_many(tmp_path, 60)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(*inputs, out / name, "--folds", 4, "--seed", seed)
    folds = {
        name: [image_ids_of(out / name / f"fold{n}", "val") for n in range(4)] for name in "abc"
    }
    assert folds["a"] == folds["b"] != folds["c"]


def test_folds_are_read_by_train(coco, out, capsys):
    main(*split_of(coco), out, "--folds", "2")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["fold0", "fold1"]
    assert "8 images as hard links" in printed
    assert printed.rstrip().endswith(f"train.py --data-path {out / 'fold0'} --check-data")
    for number in range(2):
        done = run_train("--data-path", out / f"fold{number}", "--check-data", "-j", "0")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--folds", "1"), "1 is below 2"),
        (
            ("--folds", "5"),
            r"instances_train2017\.json has 4 images, too few to split with --folds",
        ),
        (("--folds", "2", "--val-share", "0.2"), "--val-share: not allowed with argument --folds"),
    ],
)
def test_impossible_folds_are_rejected(coco, out, flags, message):
    with pytest.raises(UserError, match=message):
        main(*split_of(coco), out, *flags)
    assert not out.exists()
