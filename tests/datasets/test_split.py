"""One annotation file split into train and val."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import split
from helpers import rewrite, run_train, split_of, write_part

from internals.errors import UserError


def main(*argv) -> None:
    split.main(list(map(str, argv)))


def write_many(folder: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """A common category, a rare one, and one that always comes with another; empty image files."""
    rng = random.Random(seed)
    annotations = []
    for image_id in range(count):
        here = [1] * rng.randint(0, 5) + [2] * (rng.random() < 0.1) + [5, 9] * (rng.random() < 0.3)
        annotations += [{"image_id": image_id, "category_id": category} for category in here]
        (folder / f"{image_id}.png").touch()
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(count)],
        "annotations": annotations,
        "categories": [{"id": i} for i in (1, 2, 5, 9)],
    }
    file = folder / "all.json"
    file.write_text(json.dumps(content))
    return file, folder


def images_by_category(content: dict) -> Counter:
    pairs = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    return Counter(category for category, _ in pairs)


def read(root: Path, name: str) -> dict:
    return json.loads(split_of(root, name).annotations.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("share", "seed"), [(0.1, 0), (0.2, 1), (0.5, 2), (0.75, 3)])
def test_each_category_is_split_by_the_share(tmp_path, out, share, seed):
    file, folder = write_many(tmp_path, 600, seed)
    main(file, folder, out, "--val-share", share, "--seed", seed)
    assert abs(len(read(out, "val")["images"]) - 600 * share) <= 2
    everywhere = images_by_category(json.loads(file.read_text()))
    val = images_by_category(read(out, "val"))
    assert len(everywhere) == 4
    for category, count in everywhere.items():
        assert abs(val[category] - count * share) <= 2, category


def test_the_seed_alone_decides(tmp_path, out):
    inputs = write_many(tmp_path, 200)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(*inputs, out / name, "--seed", seed)
    assert read(out / "a", "val") == read(out / "b", "val")
    assert read(out / "a", "val") != read(out / "c", "val")


def test_the_only_image_of_a_category_is_for_training(tmp_path, out):
    write_part(
        tmp_path, "train", [(8, 8)] * 10, [[[2, 1, 1, 3, 3]] if n == 4 else [] for n in range(10)]
    )
    for seed in range(10):
        main(*split_of(tmp_path), out / str(seed), "--seed", seed)
        assert len(read(out / str(seed), "val")["images"]) == 2
        assert read(out / str(seed), "val")["annotations"] == []


def test_each_image_is_in_one_split_and_the_rest_of_the_file_in_both(coco, out):
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
        (lambda d: d["annotations"][0].update(image_id=7), "annotation 0 of image 7, which is not"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "gone.png (image 100) is missing"),
        (lambda d: d["images"][0].update(file_name="../x.png"), "../x.png (image 100) is outside"),
        (lambda d: d["images"][0].update(file_name="/x.png"), "/x.png (image 100) is outside"),
        (lambda d: d["images"][1].pop("id"), "images[1] has no 'id' that is an integer"),
        (lambda d: d["images"][1].update(file_name=3), "images[1] has no 'file_name' that is a st"),
        (lambda d: d.pop("annotations"), "has no list 'annotations': is it a COCO annotation file"),
        (lambda d: d.update(images=d["images"][:1], annotations=[]), "1 images, too few to split"),
    ],
)
def test_a_bad_annotation_file_is_refused(coco, out, change, message):
    rewrite(split_of(coco), change)
    with pytest.raises(UserError) as caught:
        main(*split_of(coco), out)
    assert message in str(caught.value)
    assert "instances_train2017.json" in str(caught.value) or "gone.png" in message
    assert not out.exists()


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_file_that_is_not_coco_is_named(tmp_path, out, text):
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(UserError, match=r"all\.json (is not valid JSON|has no list 'images')"):
        main(tmp_path / "all.json", tmp_path, out)


@pytest.mark.parametrize("share", ["0", "1", "20"])
def test_val_share_is_between_0_and_1(out, share):
    with pytest.raises(UserError, match=f"{share} is not between 0 and 1"):
        main("a.json", "a", out, "--val-share", share)
