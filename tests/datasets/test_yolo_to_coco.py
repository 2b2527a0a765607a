"""Conversion of YOLO to COCO."""

import json
import random
import shutil

import pytest
import yolo_to_coco
from helpers import read_labels, run_train, split_of
from PIL import Image

from internals.errors import UserError


def main(*argv) -> None:
    yolo_to_coco.main(list(map(str, argv)))


@pytest.mark.parametrize("number", ["{:.6f}", "{!r}", "{:.8g}"])
def test_boxes_round_trip(coco, make_yolo, out, coco_categories, number, capsys):
    main(make_yolo(number), out, *coco_categories)
    for split in ("train", "val"):
        assert read_labels(out, split) == read_labels(coco, split)
    note = "note: 1 images of train have no label file, so no objects"
    assert note in capsys.readouterr().out


def test_check_data_accepts_output(yolo, out):
    main(yolo, out)
    done = run_train("--data-path", out, "--check-data", "-j", "0")
    assert done.returncode == 0, done.stderr


def test_six_decimals_restore_hundredths_of_pixels(tmp_path):
    rng = random.Random(0)
    for folder in ("images", "labels"):
        (tmp_path / "yolo" / folder).mkdir(parents=True)
    expected = []
    for n in range(20):
        width, height = rng.randint(1, 6500), rng.randint(1, 6500)
        Image.new("1", (width, height)).save(tmp_path / f"yolo/images/{n:02}.png")
        lines = []
        for _ in range(200):
            scale = rng.choice([1, 10, 100])
            x, w = sorted(rng.randint(0, width * scale) / scale for _ in range(2))
            y, h = sorted(rng.randint(0, height * scale) / scale for _ in range(2))
            w, h = round(w - x, 2), round(h - y, 2)
            expected.append([x, y, w, h])
            box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            lines.append("0 {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*box))
        (tmp_path / f"yolo/labels/{n:02}.txt").write_text("".join(lines))
    (tmp_path / "yolo/classes.txt").write_text("thing\n")
    main(tmp_path / "yolo", tmp_path / "out")
    content = json.loads(split_of(tmp_path / "out").annotations.read_text())
    assert [row["bbox"] for row in content["annotations"]] == expected


def test_class_0_becomes_category_1(make_yolo, out):
    main(make_yolo(names=("dog", "bird", "cat")), out)
    content = json.loads(split_of(out).annotations.read_text())
    names = ((1, "dog"), (2, "bird"), (3, "cat"))
    assert content["categories"] == [{"id": i, "name": name} for i, name in names]
    first = content["annotations"][0]
    assert (first["category_id"], first["bbox"]) == (3, [4, 4, 30, 20])


@pytest.mark.parametrize("val", ["val", "valid"])
def test_split_folders_and_ignored_test_folder(coco, yolo, out, coco_categories, val, capsys):
    other = yolo.with_name("other")
    for split, name in (("train", "train"), ("val", val), ("val", "test")):
        for kind in ("images", "labels"):
            (other / name / kind).mkdir(parents=True)
            for file in (yolo / kind / split).iterdir():
                shutil.copy(file, other / name / kind / file.name)
    (other / "data.yaml").write_text("names: [cat, dog]\n")
    main(other, out, *coco_categories)
    assert read_labels(out, "val") == read_labels(coco, "val")
    assert f"note: {other}/test/images is ignored" in capsys.readouterr().out


def test_folders_without_splits_become_train(coco, yolo, out, coco_categories, capsys):
    flat = yolo.with_name("flat")
    flat.mkdir()
    for kind in ("images", "labels"):
        (flat / kind).symlink_to(yolo / kind / "train")
    (flat / "labels/classes.txt").write_text("cat\ndog\n")  # as labelImg does
    (flat / "classes.txt").write_text("cat\ndog\n")
    main(flat, out, *coco_categories)
    assert read_labels(out, "train") == read_labels(coco, "train")
    assert "split.py" in capsys.readouterr().out


def test_subfolders_are_kept(coco, yolo, out, coco_categories):
    for kind in ("images", "labels"):
        folder = yolo / kind / "train"
        (folder / "below").mkdir()
        for file in folder.glob("0.*"):
            file.rename(folder / "below" / file.name)
    main(yolo, out, *coco_categories)
    assert read_labels(out, "train")["below/0.png"] == read_labels(coco, "train")["0.png"]
    assert (out / "train2017/below/0.png").is_file()


def test_exif_rotated_image_has_upright_size(yolo, out):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(yolo / "images/val/rotated.jpg", exif=exif)
    main(yolo, out)
    assert read_labels(out, "val")["rotated.jpg"] == ((48, 64), [])


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, 'the dog', \"a, b\"]",
        "names:\n- cat\n- the dog # and its tail\n- 'a, b'\nnc: 3",
        "names:\n\n  - cat\n  - the dog\n  - a, b\n# end\nnc: 3",
        "# classes\nnames:\n  0: cat\n  1: the dog\n  2: a, b\npath: x",
        "path: x\nnames: {1: the dog, 0: cat, 2: 'a, b'}\n",
        "names: [\r\n  'cat',  # one\r\n  'the dog',\r\n  'a, b',\r\n]\r\nnc: 3\r\n",
    ],
)
def test_class_names_from_data_yaml(yolo, out, text):
    (yolo / "classes.txt").unlink()
    (yolo / "data.yaml").write_bytes(text.encode())
    main(yolo, out)
    categories = json.loads(split_of(out).annotations.read_text())["categories"]
    assert [row["name"] for row in categories] == ["cat", "the dog", "a, b"]


def test_yaml_class_names_stay_strings(yolo, out):
    (yolo / "classes.txt").unlink()
    (yolo / "data.yaml").write_text("names: [no, 007, 1.0, ~, 'it''s', C#, on]")
    main(yolo, out)
    categories = json.loads(split_of(out).annotations.read_text())["categories"]
    names = ["no", "007", "1.0", "~", "it's", "C#", "on"]
    assert [row["name"] for row in categories] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nc: 3", "data.yaml has no list 'names' of strings: correct it, or write the names to"),
        ("", "data.yaml has no list 'names'"),
        ("names: cat", "data.yaml has no list 'names'"),
        ("names: [cat, [dog]]", "data.yaml has no list 'names'"),
        ("names:\n  - a: b", "data.yaml has no list 'names'"),
        ("names:\n  0: cat\n  2: dog", "data.yaml: 'names' has no class 1: "),
        ("names:\n  - cat\n  dog", "data.yaml:3 is not valid YAML ("),
        ("x: 1\nnames: [a man's, 'a dog]", "data.yaml:2 is not valid YAML ("),
        ("names: [cat, \x07]", "data.yaml is not valid YAML ("),
        ("names: [cat, '']", "data.yaml has a class without a name"),
    ],
)
def test_invalid_data_yaml_is_rejected(yolo, out, text, message):
    (yolo / "classes.txt").unlink()
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        main(yolo, out)
    assert str(caught.value).startswith(str(yolo))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "4 columns instead of 5 (class, x, y, width, height)"),
        ("0 0.5 0.5 0.1 0.1 0.9", "--min-score 0.5 uses those with at least this score"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 has no name"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "a rotated box: export upright boxes"),
        ("2 0.5 0.5 0.1 0.1", "class 2 has no name: the classes are 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 has no name"),
        ("cat 0.5 0.5 0.1 0.1", "class cat has no name"),
        ("0 0.5 0,5 0.1 0.1", "'0,5'"),
        ("0 0.5 nan 0.1 0.1", "nan is not between 0 and 1"),
        ("0 0.5 0.5 1.001 0.1", "1.001 is not between 0 and 1"),
        ("0 32 24 12 12", "32 is not between 0 and 1"),
        ("0 0.5 0.5 -0.1 0.1", "-0.1 is not between 0 and 1"),
    ],
)
def test_invalid_label_is_rejected(yolo, out, line, message):
    file = yolo / "labels/train/0.txt"
    file.write_text(f"0 0.5 0.5 1.000001 1\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        main(yolo, out)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert message in str(caught.value)
    assert not out.exists()


def remove(name: str):
    return lambda root: (root / name).rename(root / "elsewhere")


def write_file(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("classes.txt"), "{root}/classes.txt and {root}/data.yaml are missing"),
        (write_file("classes.txt", b"cat\ncat\n"), "{root}/classes.txt has two classes with the"),
        (write_file("classes.txt", b"cat\n\ndog\n"), "{root}/classes.txt has a class without"),
        (write_file("classes.txt", b""), "{root}/classes.txt has a class without"),
        (write_file("classes.txt", b"cat\nd\xf6g\n"), "{root}/classes.txt is not UTF-8 (byte 5)"),
        (write_file("classes.txt", b"cat\nfrog\n"), "--categories has no category 'frog': add it"),
        (remove("images/train"), "add the folder {root}/images/train or {root}/train/images"),
        (remove("labels/val"), "{root}/labels/val is missing"),
        (lambda root: (root / "images/valid").mkdir(), "{root}/images/valid both exist"),
        (write_file("images/train/0.jpg", b""), "differ only in their suffix"),
    ],
)
def test_invalid_folder_is_rejected(yolo, out, coco_categories, change, message):
    change(yolo)
    with pytest.raises(UserError) as caught:
        main(yolo, out, *coco_categories)
    assert message.format(root=yolo) in str(caught.value)
    assert not out.exists()


def test_split_without_images_is_rejected(yolo, out):
    for file in (*(yolo / "images/val").iterdir(), *(yolo / "labels/val").iterdir()):
        file.unlink()
    with pytest.raises(UserError, match="the split 'val' has no images"):
        main(yolo, out)


# -------------------------------------------------------------------------------- stated splits


@pytest.fixture
def pool(yolo):
    """Return a YOLO folder with six images in one folder, and without lists."""
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            for file in (yolo / kind / split).iterdir():
                file.rename(yolo / kind / f"{split}{file.name}")
            (yolo / kind / split).rmdir()
    return yolo


def names_of(out) -> dict[str, list[str]]:
    return {
        split: sorted(read_labels(out, split))
        for split in ("train", "val")
        if split_of(out, split).annotations.exists()
    }


TRAIN = ["train0.png", "train1.png", "train2.png"]


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (None, "./images/"),
        ("path: .\ntrain: train.txt\nval: val.txt\n", "./images/"),
        ("path: /content/set\ntrain: train.txt\nval: ./val.txt\ntest: test.txt\n", "images/"),
        ("path: ../yolo\ntrain: yolo/train.txt\nval: [val.txt]\n", "/content/yolo/images/"),
        ("train: train.txt\nval: val.txt\n", "C:\\set\\images\\"),
    ],
)
def test_lists_define_the_splits(pool, out, config, prefix, capsys):
    if config:
        (pool / "data.yaml").write_text(config)
    lists = {"train": TRAIN, "val": ["val0.png"], "test": ["val1.png"]}
    for split, names in lists.items():
        lines = "".join(f"{prefix}{name}\r\n" for name in [*names, names[0]]) + "\r\n"
        (pool / f"{split}.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    main(pool, out)
    assert names_of(out) == {"train": TRAIN, "val": ["val0.png"]}
    assert len(read_labels(out, "val")["val0.png"][1]) == 3
    printed = capsys.readouterr().out
    left_out = [f"{pool}/images/train3.png"]
    if config is None or "test" in config:
        assert f"note: {pool}/test.txt is ignored: only train and val are converted" in printed
    else:
        left_out.append(f"{pool}/images/val1.png")
    assert f"{len(left_out)} images are in no split, and left out: {', '.join(left_out)}" in printed
    assert "1 repetitions of images in" in printed


@pytest.mark.parametrize(
    "val",
    ["validation/images", "../validation/images", "validation", "/kaggle/x/validation/images"],
)
def test_folders_of_data_yaml_define_the_splits(yolo, out, val, capsys):
    other = yolo.with_name("other")
    for split, name in (("train", "train"), ("val", "validation"), ("val", "test")):
        for kind in ("images", "labels"):
            shutil.copytree(yolo / kind / split, other / name / kind)
    (other / "data.yaml").write_text(
        f"train: ../train/images\nval: {val}\ntest: ../test/images\nnames: [cat, dog]\n"
    )
    main(other / "data.yaml", out)
    assert {name: len(files) for name, files in names_of(out).items()} == {"train": 4, "val": 2}
    assert f"{other}/test/images is ignored" in capsys.readouterr().out


def test_yaml_file_of_another_name(yolo, out):
    (yolo / "hyp.yaml").write_text("lr: [")
    (yolo / "args.yml").write_text("lr: 1")
    (yolo / "coco8.yaml").write_text("train: images/val\nnames: {0: cat, 1: dog}")
    main(yolo, out / "a")
    assert names_of(out / "a") == {"train": ["0.png", "1.png"]}
    (yolo / "other.yaml").write_text("train: images/train\nnames: [cat, dog]")
    with pytest.raises(UserError, match=r"coco8.yaml and .*other.yaml both have class names"):
        main(yolo, out / "b")
    main(yolo / "other.yaml", out / "b")
    assert len(names_of(out / "b")["train"]) == 4
    with pytest.raises(UserError, match="nowhere is missing"):
        main(yolo / "nowhere", out / "c")


def test_list_of_folders_keeps_names_apart(yolo, out):
    (yolo / "data.yaml").write_text("train:\n- images/train\n- images/val\n")
    main(yolo, out)
    assert sorted(read_labels(out, "train")) == [
        *(f"train/{n}.png" for n in range(4)), *(f"val/{n}.png" for n in range(2))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"data.yaml": "train: images/train\nval: images/nowhere"},
            "'val' is 'images/nowhere', whi",
        ),
        (
            {"data.yaml": "train: images/train\nval: images/train"},
            "train and val are the same imag",
        ),
        (
            {"data.yaml": "val: images/val"},
            "{root}/images/val is for val, and nothing is for train",
        ),
        ({"val.txt": "images/val/0.png"}, "{root}/val.txt is for val, and nothing is for train"),
        (
            {"train.txt": "images/train/0.png\nimages/train/9.png"},
            "train.txt:2: images/train/9.png i",
        ),
        (
            {"train.txt": "images/train/0.png", "val.txt": "images/train/0.png\nimages/val/0.png"},
            "{root}/images/train/0.png is in both train and val: keep it",
        ),
        (
            {"train.txt": "images/train/0.png", "test.txt": "images/train/0.png"},
            "{root}/images/train/0.png is in both test and train: keep it",
        ),
    ],
)
def test_invalid_split_is_rejected(yolo, out, files, message):
    for name, text in files.items():
        (yolo / name).write_text(text)
    with pytest.raises(UserError) as caught:
        main(yolo, out)
    assert message.format(root=yolo) in str(caught.value)
    assert not out.exists()


def test_labels_beside_images(yolo, out):
    folder = yolo.with_name("beside")
    for split, name in (("train", "train"), ("val", "valid"), ("val", "test")):
        shutil.copytree(yolo / "images" / split, folder / name)
        shutil.copytree(yolo / "labels" / split, folder / name, dirs_exist_ok=True)
    shutil.copy(yolo / "classes.txt", folder / "classes.txt")
    shutil.copy(yolo / "classes.txt", folder / "train/classes.txt")
    (folder / "train/0.png").rename(folder / "train/0.PNG")
    main(folder, out)
    assert names_of(out)["train"] == ["0.PNG", "1.png", "2.png", "3.png"]
    assert len(read_labels(out, "train")["1.png"][1]) == 2


def test_darknet_folder(pool, out):
    shutil.copytree(pool / "images", pool / "obj_train_data")
    shutil.copytree(pool / "labels", pool / "obj_train_data", dirs_exist_ok=True)
    for folder in ("images", "labels"):
        shutil.rmtree(pool / folder)
    (pool / "classes.txt").rename(pool / "obj.names")
    (pool / "train.txt").write_text("".join(f"data/obj_train_data/{name}\n" for name in TRAIN))
    main(pool, out)
    assert names_of(out) == {"train": TRAIN}
    assert len(read_labels(out, "train")["train1.png"][1]) == 2


def test_link_to_folder_above_is_not_followed(yolo, out):
    (yolo / "images/train/loop").symlink_to(yolo / "images")
    (yolo / "labels/train/loop").symlink_to(yolo)
    main(yolo, out)
    assert "3.png" in names_of(out)["train"]


# ------------------------------------------------------------------------ classes and scores


def test_class_files_that_differ_need_a_decision(yolo, out):
    (yolo / "data.yaml").write_text("names: [bolt, nut]")
    with pytest.raises(UserError, match=r"classes.txt \(cat, dog\) and .*data.yaml \(bolt, nut\)"):
        main(yolo, out)
    for name, expected in (("data.yaml", ["bolt", "nut"]), ("classes.txt", ["cat", "dog"])):
        main(yolo, out / name, "--names", yolo / name)
        content = json.loads(split_of(out / name).annotations.read_text())
        assert [row["name"] for row in content["categories"]] == expected
    (yolo / "data.yaml").write_text("names: [cat, dog]")
    main(yolo, out / "same")


@pytest.mark.parametrize("label", ["1.000000", "1.", "01"])
def test_class_as_float(yolo, out, label):
    (yolo / "labels/train/0.txt").write_text(f"{label} 0.5 0.5 0.5 0.5\n")
    main(yolo, out)
    assert read_labels(out, "train")["0.png"][1][0][0] == 2


def test_scores_are_compared_with_the_minimum(yolo, out):
    file = yolo / "labels/train/0.txt"
    file.write_text("0 0.5 0.5 0.5 0.5 0.49\n1 0.5 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n")
    main(yolo, out / "a", "--min-score", "0.5")
    assert [box[0] for box in read_labels(out / "a", "train")["0.png"][1]] == [2, 2]
    main(yolo, out / "b", "--min-score", "0")
    assert len(read_labels(out / "b", "train")["0.png"][1]) == 3
    file.write_text("0 0.5 0.5 0.5 0.5 high\n")
    with pytest.raises(UserError, match=r"0.txt:1: .*'high'"):
        main(yolo, out / "c", "--min-score", "0.5")
