"""The scripts of datasets/ that bring other people's data into COCO's layout, and divide it."""

import importlib
import json
import os
import random
import shlex
import sys
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from helpers import ROOT, rewrite, run, split_of, write_part
from PIL import Image

import coco_utils
from coco_utils import CocoIndex
from internals import data_checks

sys.path.append(str(ROOT / "datasets"))
coco_layout, voc_to_coco, yolo_to_coco, split = map(
    importlib.import_module, ("coco_layout", "voc_to_coco", "yolo_to_coco", "split")
)
SCRIPTS = ("voc_to_coco", "yolo_to_coco", "split")
BCCD = ROOT.parent / "shared/data/bccd"

# Boxes of the kinds that data in the wild has: decimals, zero size, up to and over the border.
BOXES = [
    [[2, 4, 4, 30, 20], [5, 0, 0, 64, 48], [2, 10, 11, 0, 0]],
    [[5, 10.25, 8.1, 20.3, 30.07], [2, 0.01, 0.99, 12.34, 16.33]],
    [],
    [[2, 63, 47, 1, 1], [2, 33.3, 0, 30.7, 48]],
]
SIZES = [(64, 48), (48, 64), (64, 48), (64, 48)]


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    write_part(root, "train", SIZES, BOXES)
    write_part(root, "val", SIZES[:2], BOXES[:2])
    return root


def content_of(root: Path, part: str) -> dict:
    return json.loads(split_of(root, part).annotations.read_text(encoding="utf-8"))


def pictures_of(root: Path, part: str):
    """(file, image row, [(category name, annotation row)]) of all images of a part."""
    content = content_of(root, part)
    names = {row["id"]: row["name"] for row in content["categories"]}
    for image in content["images"]:
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        file = split_of(root, part).images / image["file_name"]
        yield file, image, [(names[row["category_id"]], row) for row in rows]


def essence(root: Path, part: str) -> dict:
    """What has to survive: by file name, the size and the annotations in their order."""
    return {
        image["file_name"]: (
            (image["width"], image["height"]),
            [
                (row["category_id"], row["bbox"], pytest.approx(row["area"]), row["iscrowd"])
                for _, row in objects
            ],
        )
        for _, image, objects in pictures_of(root, part)
    }


def assert_trains(root: Path, *parts: str) -> None:
    """What training reads it and has nothing against it, and no picture leads out."""
    for part in parts:
        index = CocoIndex(coco_utils.find_split(root, part, None, None))
        assert [fault for fault in data_checks.faults(index) if fault.fatal] == []
        assert data_checks.unreadable_images(index, 0) == []


# ------------------------------------------------------------------- the other formats, written


def write_voc(root: Path, coco: Path, one_based: bool = False, prefix: str = "") -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for part in ("train", "val"):
        keys = []
        for file, image, objects in pictures_of(coco, part):
            key = prefix.format(part) + file.stem
            keys.append(key)
            (root / "JPEGImages" / f"{key}{file.suffix}").symlink_to(file)
            boxes = [(name, row["bbox"], row["iscrowd"]) for name, row in objects]
            write_xml(root / f"Annotations/{key}.xml", image, boxes, one_based)
        (root / f"ImageSets/Main/{part}.txt").write_text("".join(f"{key}\n" for key in keys))
    return root


def write_xml(file: Path, image: dict, boxes: list, one_based: bool = False) -> None:
    text = "<annotation>\n  <filename>of another name.jpg</filename>\n"
    text += "  <size><width>{width}</width><height>{height}</height></size>\n".format(**image)
    for name, (x, y, w, h), difficult in boxes:
        ends = (x + 1, y + 1, x + w, y + h) if one_based else (x, y, x + w, y + h)
        sides = zip(("xmin", "ymin", "xmax", "ymax"), ends, strict=True)
        bndbox = "".join(f"<{side}>{end}</{side}>" for side, end in sides)
        text += (
            f"  <object><name>{escape(name)}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{bndbox}</bndbox><part><name>head</name><bndbox/></part></object>\n"
        )
    file.write_text(text + "</annotation>\n", encoding="utf-8")


def write_yolo(root: Path, coco: Path, number="{:.6f}", names=("cat", "dog")) -> Path:
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for file, image, objects in pictures_of(coco, part):
            (root / "images" / part / file.name).symlink_to(file)
            lines = []
            for name, row in objects:
                (x, y, w, h), width, height = row["bbox"], image["width"], image["height"]
                shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                lines.append(" ".join([str(names.index(name)), *map(number.format, shares)]))
            if lines:
                (root / "labels" / part / f"{file.stem}.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def original_ids(coco: Path) -> list:
    return ["--categories", split_of(coco, "train").annotations]


# ---------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("one_based", [False, True])
def test_voc_gives_back_the_coco_data_that_it_was_made_of(coco, tmp_path, one_based):
    rewrite(split_of(coco), lambda data: data["annotations"][0].update(iscrowd=1))
    voc = write_voc(tmp_path / "voc", coco, one_based, prefix="{}_")
    command = (ROOT / "datasets/voc_to_coco.py", voc, tmp_path / "out", *original_ids(coco))
    done = run(sys.executable, *command, *(["--one-based"] if one_based else []))
    assert done.returncode == 0, done.stderr
    for part in ("train", "val"):
        expected = {f"{part}_{name}": rest for name, rest in essence(coco, part).items()}
        assert essence(tmp_path / "out", part) == expected
        categories = content_of(coco, part)["categories"]
        assert content_of(tmp_path / "out", part)["categories"] == categories
    assert_trains(tmp_path / "out", "train", "val")


@pytest.mark.parametrize("number", ["{:.6f}", "{!r}", "{:.8g}"])
def test_yolo_gives_back_the_coco_data_that_it_was_made_of(coco, tmp_path, number):
    yolo = write_yolo(tmp_path / "yolo", coco, number)
    command = (ROOT / "datasets/yolo_to_coco.py", yolo, tmp_path / "out", *original_ids(coco))
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stderr
    for part in ("train", "val"):
        assert essence(tmp_path / "out", part) == essence(coco, part)
    assert "note: 1 pictures of train have no label file, so no objects" in done.stdout
    assert_trains(tmp_path / "out", "train", "val")


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs the BCCD pictures")
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_a_real_data_set_comes_back_with_its_two_boxes_of_zero_size(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "voc":
        main, folder = voc_to_coco.main, write_voc(tmp_path / "voc", BCCD)
    else:
        names = ("RBC", "WBC", "Platelets")
        main, folder = yolo_to_coco.main, write_yolo(tmp_path / "yolo", BCCD, names=names)
    main([str(folder), str(out), *map(str, original_ids(BCCD))])
    boxes = 0
    for part in ("train", "val"):
        assert essence(out, part) == essence(BCCD, part)
        boxes += len(content_of(out, part)["annotations"])
        assert_trains(out, part)
    assert boxes == 4888
    flat = [row for row in content_of(out, "train")["annotations"] if 0 in row["bbox"][2:]]
    assert len(flat) == 2


def test_six_decimals_give_back_whole_pixels_and_hundredths():
    rng = random.Random(0)
    for _ in range(5000):
        width, height = rng.randint(1, 6500), rng.randint(1, 6500)
        scale = rng.choice([1, 10, 100])
        x, w = sorted(rng.randint(0, width * scale) / scale for _ in range(2))
        y, h = sorted(rng.randint(0, height * scale) / scale for _ in range(2))
        w, h = round(w - x, 2), round(h - y, 2)
        shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
        written = [float(f"{share:.6f}") for share in shares]
        assert yolo_to_coco.pixels(written, (width, height)) == [x, y, w, h]


# ------------------------------------------------------------------------ what is where, and ids


def test_categories_are_numbered_by_name_or_by_class(coco, tmp_path):
    voc_to_coco.main([str(write_voc(tmp_path / "voc", coco, prefix="{}_")), str(tmp_path / "a")])
    yolo = write_yolo(tmp_path / "yolo", coco, names=("dog", "bird", "cat"))
    yolo_to_coco.main([str(yolo), str(tmp_path / "b")])
    found = [content_of(tmp_path / name, "val")["categories"] for name in "ab"]
    assert found[0] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert found[1] == [{"id": i, "name": n} for i, n in ((1, "dog"), (2, "bird"), (3, "cat"))]
    first = content_of(tmp_path / "b", "train")["annotations"][0]
    assert (first["category_id"], first["bbox"]) == (3, [4, 4, 30, 20])


def test_pictures_are_links_to_the_same_file_or_copies(coco, tmp_path, monkeypatch, capsys):
    yolo = str(write_yolo(tmp_path / "yolo", coco))
    yolo_to_coco.main([yolo, str(tmp_path / "linked")])
    assert "6 pictures as hard links" in capsys.readouterr().out
    original, linked = coco / "train2017/0.png", tmp_path / "linked/train2017/0.png"
    assert linked.samefile(original)
    assert not linked.is_symlink()

    def no_link(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_link)
    yolo_to_coco.main([yolo, str(tmp_path / "copied")])
    assert "6 pictures as copies" in capsys.readouterr().out
    copied = tmp_path / "copied/train2017/0.png"
    assert copied.read_bytes() == original.read_bytes()
    assert not copied.samefile(original)


def test_the_table_and_the_next_command(coco, tmp_path):
    rewrite(split_of(coco), lambda data: data["annotations"][0].update(iscrowd=1))
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    done = run(sys.executable, ROOT / "datasets/voc_to_coco.py", voc, "my pictures", cwd=tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[:7]] == [
        ["train", "val", "in", "val"],
        ["pictures", "4", "2", "33.3%"],
        ["without", "a", "box", "1", "0", "0.0%"],
        ["boxes", "7", "5", "41.7%"],
        ["of", "crowds", "1", "0", "0.0%"],
        ["cat", "5", "3", "37.5%"],
        ["dog", "2", "2", "50.0%"],
    ]
    train = shlex.quote(os.path.relpath(ROOT / "train.py", tmp_path))
    assert lines[-1] == f"  python {train} --data-path 'my pictures' --check-data"


def test_one_part_without_lists_is_for_the_split(coco, tmp_path, capsys):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    for file in (voc / "ImageSets/Main").iterdir():
        file.unlink()
    voc_to_coco.main([str(voc), str(tmp_path / "out")])
    assert len(essence(tmp_path / "out", "train")) == 6
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[1].endswith("split.py")
    split.main([*command[2:], "--val-share", "0.5"])
    assert len(essence(tmp_path / "out_split", "val")) == 3
    assert_trains(tmp_path / "out_split", "train", "val")


def test_what_is_in_no_list_or_lacks_its_other_half_is_said(coco, tmp_path, capsys):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    (voc / "ImageSets/Main/val.txt").write_text("val_0\n\n")
    (voc / "Annotations/train_3.xml").rename(voc / "Annotations/readme.md")
    (voc / "ImageSets/Main/train.txt").write_text("train_1\n")
    voc_to_coco.main([str(voc), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"3 annotation files are in no list: {voc}/Annotations/train_0.xml, " in printed
    assert f"1 pictures have no annotation file: {voc}/JPEGImages/train_3.png" in printed
    assert f"1 other files in {voc}/Annotations are left alone (.md)" in printed
    assert list(essence(tmp_path / "out", "val")) == ["val_0.png"]


@pytest.mark.parametrize("valid", ["val", "valid"])
def test_yolo_folders_the_other_way_around(coco, tmp_path, valid, capsys):
    yolo = write_yolo(tmp_path / "yolo", coco)
    for part, name in (("train", "train"), ("val", valid), ("val", "test")):
        for kind in ("images", "labels"):
            target = tmp_path / "other" / name / kind
            target.mkdir(parents=True)
            for file in (yolo / kind / part).iterdir():
                (target / file.name).symlink_to(file.resolve())
    (tmp_path / "other/data.yaml").write_text("names: [cat, dog]\n")
    yolo_to_coco.main(
        [str(tmp_path / "other"), str(tmp_path / "out"), *map(str, original_ids(coco))]
    )
    assert essence(tmp_path / "out", "val") == essence(coco, "val")
    assert f"note: {tmp_path}/other/test/images is left out" in capsys.readouterr().out


def test_yolo_in_one_folder_and_in_folders_below(coco, tmp_path, capsys):
    yolo = write_yolo(tmp_path / "yolo", coco)
    flat = tmp_path / "flat"
    flat.mkdir()
    for kind in ("images", "labels"):
        (flat / kind).symlink_to(yolo / kind / "train")
    (flat / "labels/classes.txt").write_text("cat\ndog\n")
    (flat / "classes.txt").write_text("cat\ndog\n")
    yolo_to_coco.main([str(flat), str(tmp_path / "a"), *map(str, original_ids(coco))])
    assert essence(tmp_path / "a", "train") == essence(coco, "train")
    assert "split.py" in capsys.readouterr().out
    (flat / "labels/classes.txt").unlink()
    for kind in ("images", "labels"):
        folder = yolo / kind / "train"
        (folder / "below").mkdir()
        for file in folder.glob("0.*"):
            file.rename(folder / "below" / file.name)
    yolo_to_coco.main([str(yolo), str(tmp_path / "b"), *map(str, original_ids(coco))])
    assert essence(tmp_path / "b", "train")["below/0.png"] == essence(coco, "train")["0.png"]
    assert_trains(tmp_path / "b", "train", "val")


def test_a_turned_picture_has_the_size_that_tools_show(tmp_path, coco):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = tmp_path / "turned.jpg"
    Image.new("RGB", (64, 48)).save(picture, exif=exif)
    yolo = write_yolo(tmp_path / "yolo", coco)
    (yolo / "images/val/turned.jpg").symlink_to(picture)
    yolo_to_coco.main([str(yolo), str(tmp_path / "out")])
    assert essence(tmp_path / "out", "val")["turned.jpg"] == ((48, 64), [])
    assert_trains(tmp_path / "out", "val")


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
def test_a_voc_file_without_a_size_takes_the_picture_s(coco, tmp_path, size):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    file = voc / "Annotations/train_1.xml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], size, *lines[3:]]))
    voc_to_coco.main([str(voc), str(tmp_path / "out")])
    assert essence(tmp_path / "out", "train")["train_1.png"][0] == (48, 64)


def test_boxes_that_one_based_pixels_cannot_have_are_said(coco, tmp_path, capsys):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    voc_to_coco.main([str(voc), str(tmp_path / "out"), "--one-based"])
    assert "note: 5 boxes begin before pixel 1: is --one-based right" in capsys.readouterr().out


YAMLS = [
    "names: [cat, 'the dog', \"a, b\"]",
    "names:\n- cat\n- the dog # and its tail\n- 'a, b'\nnc: 3",
    "names:\n\n  - cat\n  - the dog\n  - a, b\n# end\nnc: 3",
    "# classes\nnames:\n  0: cat\n  1: the dog\n  2: a, b\npath: x",
    "path: x\nnames: {0: cat, 1: the dog, 2: 'a, b'}\n",
    "names: [\n  'cat',  # one\n  'the dog',\n  'a, b',\n]\nnc: 3\n",
]


@pytest.mark.parametrize("text", YAMLS)
def test_yaml_names_as_tools_write_them(text):
    file = Path("data.yaml")
    assert yolo_to_coco.yaml_names(text, file) == ["cat", "the dog", "a, b"]
    assert yolo_to_coco.yaml_names(text.replace("\n", "\r\n"), file) == ["cat", "the dog", "a, b"]
    assert yolo_to_coco.yaml_names("names: ['it''s', C#]", file) == ["it's", "C#"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("nc: 3", "data.yaml has no 'names:'"),
        ("names:\n  - cat\n  - &dog dog", "data.yaml:3: '&dog dog' is YAML that is not und"),
        ("names:\n  - cat\n  dog", "data.yaml:2: '- cat' is not the name of class 0"),
        ("names:\n  0: cat\n  2: dog", "data.yaml:3: '2: dog' is not the name of class 1"),
        ("x: 1\nnames: [cat, [dog]]", "data.yaml:2: '[dog]' is YAML"),
        ("names: [cat,, dog]", "data.yaml:1: not understood. Write the names"),
        ("names: [a man's, a dog]", "data.yaml:1: not understood. Write the names"),
        ("names: cat", "data.yaml:1: 'cat' is not"),
        ('names: ["c\\u0061t"]', "data.yaml:1: "),
        ("names:\n  - 'C #'", "data.yaml:2: "),
        ("names:\n  - a: b", "data.yaml:2: 'a: b' is YAML"),
    ],
)
def test_yaml_that_is_not_understood_is_refused_with_its_line(text, place):
    with pytest.raises(coco_layout.UsageError) as caught:
        yolo_to_coco.yaml_names(text, Path("data.yaml"))
    assert place in str(caught.value)


# ---------------------------------------------------------------------------------------- errors


def voc_object(**changes) -> str:
    values = {"name": "cat", "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4, **changes}
    sides = "".join(f"<{k}>{values[k]}</{k}>" for k in ("xmin", "ymin", "xmax", "ymax"))
    difficult = f"<difficult>{values.get('difficult', 0)}</difficult>"
    return f"<object><name>{values['name']}</name>{difficult}<bndbox>{sides}</bndbox></object>"


def annotation(*objects: str, size=(64, 48)) -> str:
    sides = "<size><width>{}</width><height>{}</height></size>".format(*size)
    return f"<annotation>{sides}{''.join(objects)}</annotation>"


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
BAD_XML = [
    (annotation(voc_object(), voc_object(xmin="one")), "object 2 (cat): <xmin> is 'one', which is"),
    (annotation(voc_object(ymax="")), "object 1 (cat): <ymax> is '', which is not a number"),
    (annotation(voc_object(ymax="inf")), "object 1 (cat): <ymax> is 'inf', which is not a number"),
    (annotation(voc_object(xmax=0)), "object 1 (cat): xmin, ymin, xmax, ymax are 1, 2, 0, 4, so"),
    (annotation(voc_object(name=" ")), "object 1 (no name): there is no <name>"),
    (annotation(voc_object(difficult="yes")), "object 1 (cat): <difficult> is 'yes' and neither"),
    (annotation("<object><name>cat</name></object>"), "object 1 (cat): there is no <bndbox>"),
    (annotation(size=(640, 480)), "<size> is 640 x 480, but "),
    (annotation(size=("wide", 480)), "<width> is 'wide', which is not a number"),
    ("<annotation>", "not valid XML: no element found: line 1"),
    ("", "not valid XML"),
    ("<svg/>", "the file holds <svg> and not <annotation>"),
    (f'<!DOCTYPE x [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l11;</annotation>', "a DOCTYPE"),
    ('<!DOCTYPE x [<!ENTITY e SYSTEM "a.txt">]><annotation>&e;</annotation>', "a DOCTYPE"),
]


@pytest.mark.parametrize(("text", "message"), BAD_XML)
def test_a_wrong_voc_file_is_named_and_nothing_is_written(coco, tmp_path, text, message):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    file = voc / "Annotations/train_0.xml"
    file.write_text(text)
    with pytest.raises(coco_layout.UsageError) as caught:
        voc_to_coco.main([str(voc), str(tmp_path / "out")])
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_voc_lists_name_what_there_is_once(coco, tmp_path):
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    (voc / "ImageSets/Main/val.txt").write_text("val_0\ngone\ntrain_0\n")
    (voc / "JPEGImages/val_0.png").unlink()
    with pytest.raises(coco_layout.UsageError) as caught:
        voc_to_coco.main([str(voc), str(tmp_path / "out")])
    lists = voc / "ImageSets/Main"
    assert str(caught.value).splitlines() == [
        "2 things are wrong:",
        f"  {lists}/val.txt:2: {voc}/Annotations/gone.xml is missing",
        f"  {lists}/val.txt:3: train_0 is at {lists}/train.txt:1, too: keep one of them",
    ]
    (lists / "val.txt").write_text("val_0\n")
    with pytest.raises(coco_layout.UsageError, match=r"val_0.xml: its picture .*val_0.jpg is miss"):
        voc_to_coco.main([str(voc), str(tmp_path / "out")])
    (lists / "train.txt").unlink()
    with pytest.raises(coco_layout.UsageError, match=r"val.txt is there and .*train.txt is not"):
        voc_to_coco.main([str(voc), str(tmp_path / "out")])


BAD_LABELS = [
    ("0 0.5 0.5 0.1", "4 columns instead of 5 (class, x, y, width, height)"),
    ("0 0.5 0.5 0.1 0.1 0.9", "6 columns instead of 5"),
    ("0 0.1 0.1 0.2 0.1 0.2 0.2", "7 columns instead of 5"),
    ("2 0.5 0.5 0.1 0.1", "class 2 has no name: there are 0 to 1"),
    ("-1 0.5 0.5 0.1 0.1", "class -1 has no name"),
    ("cat 0.5 0.5 0.1 0.1", "class cat has no name"),
    ("0 0.5 0,5 0.1 0.1", "'0,5' is not a number"),
    ("0 0.5 nan 0.1 0.1", "nan is not between 0 and 1"),
    ("0 0.5 0.5 1.001 0.1", "1.001 is not between 0 and 1"),
    ("0 32 24 12 12", "32 is not between 0 and 1"),
    ("0 0.5 0.5 -0.1 0.1", "-0.1 is not between 0 and 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LABELS)
def test_a_wrong_label_is_named_with_file_and_line(coco, tmp_path, line, message):
    yolo = write_yolo(tmp_path / "yolo", coco)
    file = yolo / "labels/train/0.txt"
    file.write_text(f"0 0.5 0.5 1.000001 1\n\n{line}\n")
    with pytest.raises(coco_layout.UsageError) as caught:
        yolo_to_coco.main([str(yolo), str(tmp_path / "out")])
    assert str(caught.value).startswith(f"{file}:3: ")
    assert message in str(caught.value)
    assert ("polygon" in message or "export upright boxes" in str(caught.value)) == (
        len(line.split()) > 6
    )
    assert not (tmp_path / "out").exists()


def test_the_first_twenty_of_many_errors_are_in_one_message(coco, tmp_path):
    yolo = write_yolo(tmp_path / "yolo", coco)
    (yolo / "labels/train/0.txt").write_text("0 1\n" * 30)
    (yolo / "labels/train/gone.txt").write_text("")
    (yolo / "images/val/1.png").unlink()
    (yolo / "images/val/1.png").write_bytes(b"no picture")
    done = run(sys.executable, ROOT / "datasets/yolo_to_coco.py", yolo, tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "yolo_to_coco.py: error: 32 things are wrong:"
    assert (
        lines[1]
        == f"  {yolo}/labels/train/gone.txt: its picture {yolo}/images/train/gone.jpg is missing"
    )
    assert lines[20].startswith(f"  {yolo}/labels/train/0.txt:19: 2 columns")
    assert lines[21:] == ["  and 12 more"]


def remove(*names: str):
    def change(root: Path) -> None:
        for name in names:
            (root / name).rename(root / "elsewhere")

    return change


def write_file(name: str, text: str):
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("classes.txt"), "classes.txt is missing, and so is {root}/data.yaml"),
        (write_file("classes.txt", "cat\ncat\n"), "{root}/classes.txt has two classes of the name"),
        (write_file("classes.txt", "cat\n\ndog\n"), "{root}/classes.txt has a class without"),
        (write_file("classes.txt", ""), "{root}/classes.txt has a class without"),
        (write_file("classes.txt", "cat\nfrog\n"), "--categories does not know 'frog'"),
        (remove("images/train"), "looked for the folders {root}/images/train, {root}/train/images"),
        (remove("labels/val"), "{root}/labels/val is missing"),
        (lambda root: (root / "images/valid").mkdir(), "{root}/images/valid are both there"),
        (lambda root: (root / "images/train/0.jpg").touch(), "differ in nothing but the end"),
    ],
)
def test_a_yolo_folder_that_lacks_something(coco, tmp_path, change, message):
    yolo = write_yolo(tmp_path / "yolo", coco)
    change(yolo)
    command = [yolo, tmp_path / "out", *original_ids(coco)]
    with pytest.raises(coco_layout.UsageError) as caught:
        yolo_to_coco.main([str(part) for part in command])
    assert message.format(root=yolo) in str(caught.value)


def test_names_that_are_not_utf_8(coco, tmp_path):
    yolo = write_yolo(tmp_path / "yolo", coco)
    (yolo / "classes.txt").write_bytes(b"cat\nd\xf6g\n")
    with pytest.raises(coco_layout.UsageError, match=r"classes.txt is not UTF-8 \(byte 5\)"):
        yolo_to_coco.main([str(yolo), str(tmp_path / "out")])


def test_a_part_or_a_data_set_with_nothing_in_it(coco, tmp_path):
    yolo = write_yolo(tmp_path / "yolo", coco)
    for file in (*(yolo / "images/val").iterdir(), *(yolo / "labels/val").iterdir()):
        file.unlink()
    with pytest.raises(coco_layout.UsageError, match="no pictures for the part 'val'"):
        yolo_to_coco.main([str(yolo), str(tmp_path / "out")])
    voc = write_voc(tmp_path / "voc", coco, prefix="{}_")
    for file in (voc / "Annotations").iterdir():
        file.write_text("<annotation/>")
    with pytest.raises(coco_layout.UsageError, match="no file has an object"):
        voc_to_coco.main([str(voc), str(tmp_path / "out")])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags(script):
    done = run(sys.executable, ROOT / f"datasets/{script}.py", "--help")
    assert done.returncode == 0
    assert f"python datasets/{script}.py" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    done = run(sys.executable, ROOT / f"datasets/{script}.py", "--no-such-flag")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}.py: error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_written_over(coco, tmp_path, script):
    inputs = {
        "voc_to_coco": [write_voc(tmp_path / "voc", coco, prefix="{}_")],
        "yolo_to_coco": [write_yolo(tmp_path / "yolo", coco)],
        "split": list(split_of(coco)),
    }[script]
    out = tmp_path / "out"
    (out / "train2017").mkdir(parents=True)
    command = (sys.executable, ROOT / f"datasets/{script}.py", *inputs)
    done = run(*command, out)
    assert done.returncode == 2
    assert done.stderr == (
        f"{script}.py: error: {out} is there already: remove it, or name another folder\n"
    )
    (out / "train2017").rmdir()
    assert run(*command, out).returncode == 0  # an empty folder will do
    done = run(*command, out / "annotations/instances_train2017.json/below")
    assert done.returncode == 2
    assert "below cannot be made: Not a directory" in done.stderr


def test_pictures_of_the_same_formats_as_in_training():
    assert coco_layout.FORMATS == coco_utils.IMAGE_FORMATS
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".gif"} <= coco_layout.SUFFIXES
    assert not {".txt", ".xml", ".pdf"} & coco_layout.SUFFIXES


# ----------------------------------------------------------------------------------------- split


def many(pictures: int, seed: int = 0) -> dict:
    """Annotations alone: a common category, a rare one, and one that always comes with another."""
    rng = random.Random(seed)
    annotations = []
    for image_id in range(pictures):
        here = [1] * rng.randint(0, 5) + [2] * (rng.random() < 0.1) + [5, 9] * (rng.random() < 0.3)
        annotations += [{"image_id": image_id, "category_id": category} for category in here]
    images = [{"id": image_id} for image_id in range(pictures)]
    return {"images": images, "annotations": annotations}


@pytest.mark.parametrize("val_share", [0.1, 0.2, 0.5, 0.75])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_category_is_shared(val_share, seed):
    content = many(600, seed)
    val = split.choose(content, val_share, seed)
    assert abs(len(val) - 600 * val_share) <= 2
    having = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    everywhere, there = Counter(c for c, _ in having), Counter(c for c, i in having if i in val)
    assert len(everywhere) == 4
    for category, pictures in everywhere.items():
        assert abs(there[category] - pictures * val_share) <= 2, category


def test_the_seed_decides_alone():
    content = many(200)
    first = split.choose(content, 0.2, 0)
    assert first == split.choose(content, 0.2, 0)
    assert first != split.choose(content, 0.2, 1)


def test_a_picture_of_a_category_with_one_picture_trains():
    content = {
        "images": [{"id": i} for i in range(10)],
        "annotations": [{"image_id": 4, "category_id": 7}],
    }
    for seed in range(10):
        val = split.choose(content, 0.2, seed)
        assert len(val) == 2
        assert 4 not in val


def test_each_image_is_in_one_part_and_the_rest_of_the_file_in_both(coco, tmp_path):
    def change(data):
        data.update(info={"year": 2024}, licenses=[{"id": 1}], mine=[1.5, None, "ä"])
        data["annotations"][0].update(segmentation=[[4.0, 4, 34, 4, 34, 24]], note="kept")
        data["images"][0]["file_name"] = "below/0.png"

    rewrite(split_of(coco), change)
    (coco / "train2017/below").mkdir()
    (coco / "train2017/0.png").rename(coco / "train2017/below/0.png")
    whole = content_of(coco, "train")
    command = (ROOT / "datasets/split.py", *split_of(coco), tmp_path / "out", "--val-share", "0.5")
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stderr
    parts = [content_of(tmp_path / "out", part) for part in ("train", "val")]
    for part in parts:
        assert list(part) == list(whole)
        ids = {row["id"] for row in part["images"]}
        for key in whole:
            rows = {"images": "id", "annotations": "image_id"}
            kept = (
                [row for row in whole[key] if row[rows[key]] in ids] if key in rows else whole[key]
            )
            assert part[key] == kept
    assert sorted(row["id"] for part in parts for row in part["images"]) == [100, 101, 102, 103]
    assert [len(part["images"]) for part in parts] == [2, 2]
    assert_trains(tmp_path / "out", "train", "val")
    assert sum(len(list((tmp_path / "out").rglob(f"{n}.png"))) for n in range(4)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["images"][1].update(id=100), "two images have the id 100: keep one"),
        (lambda d: d["images"][1].update(file_name="0.png"), "two images have the file_name '0.p"),
        (lambda d: d["annotations"][0].update(image_id=7), "annotation 0 of image 7, which is not"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "gone.png (image 100) is missing"),
        (lambda d: d["images"][0].update(file_name="../x.png"), "../x.png (image 100) leads out"),
        (lambda d: d["images"][0].update(file_name="/x.png"), "/x.png (image 100) leads out"),
        (lambda d: d["images"][1].pop("id"), "images[1] has no 'id' that is a whole number"),
        (lambda d: d["images"][1].update(file_name=3), "images[1] has no 'file_name' that is a te"),
        (lambda d: d.pop("annotations"), "has no list 'annotations': is it a COCO annotation file"),
        (lambda d: d.update(images=d["images"][:1], annotations=[]), "1 images, too few for two"),
    ],
)
def test_what_cannot_be_divided_is_refused(coco, tmp_path, change, message):
    rewrite(split_of(coco), change)
    with pytest.raises(coco_layout.UsageError) as caught:
        split.main([*map(str, split_of(coco)), str(tmp_path / "out")])
    assert message in str(caught.value)
    assert "instances_train2017.json" in str(caught.value) or "gone.png" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("val_share", ["0", "1", "20"])
def test_a_share_is_between_nothing_and_all(val_share):
    with pytest.raises(coco_layout.UsageError, match=f"{val_share} is not between 0 and 1"):
        split.main(["a.json", "a", "out", "--val-share", val_share])
