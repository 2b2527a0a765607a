"""Conversion of PASCAL VOC to COCO."""

import json
import shutil

import pytest
import voc_to_coco
from helpers import read_labels, run_train, split_of

from internals.errors import UserError


def main(*argv) -> None:
    voc_to_coco.main(list(map(str, argv)))


@pytest.mark.parametrize("flags", [[], ["--one-based"]])
@pytest.mark.usefixtures("crowd")
def test_boxes_and_categories_round_trip(coco, make_voc, out, coco_categories, flags):
    main(make_voc(one_based=bool(flags)), out, *coco_categories, *flags)
    for split in ("train", "val"):
        expected = {f"{split}_{name}": rest for name, rest in read_labels(coco, split).items()}
        assert read_labels(out, split) == expected
        contents = [
            json.loads(split_of(root, split).annotations.read_text()) for root in (coco, out)
        ]
        assert contents[0]["categories"] == contents[1]["categories"]


def test_check_data_accepts_output(voc, out):
    main(voc, out)
    done = run_train("--data-path", out, "--check-data", "-j", "0")
    assert done.returncode == 0, done.stderr


def test_categories_are_numbered_by_name(voc, out):
    main(voc, out)
    content = json.loads(split_of(out, "val").annotations.read_text())
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def test_images_without_lists_become_train(voc, out):
    for file in (voc / "ImageSets/Main").iterdir():
        file.unlink()
    main(voc, out)
    assert len(read_labels(out, "train")) == 6
    assert not (out / "val2017").exists()


def test_skipped_files_are_reported(voc, out, capsys):
    (voc / "ImageSets/Main/val.txt").write_text("val_0\n\n")
    (voc / "Annotations/train_3.xml").rename(voc / "Annotations/readme.md")
    (voc / "Annotations/.hidden.xml").touch()
    (voc / "ImageSets/Main/train.txt").write_text("train_1\n")
    main(voc, out)
    printed = capsys.readouterr().out
    assert f"3 annotation files are in no list: {voc}/Annotations/train_0.xml, " in printed
    assert (
        f"1 images have no annotation file and are left out: {voc}/JPEGImages/train_3.png"
        in printed
    )
    assert f"1 other files in {voc}/Annotations are ignored (.md)" in printed
    assert list(read_labels(out, "val")) == ["val_0.png"]


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
def test_missing_size_is_read_from_image(voc, out, size):
    file = voc / "Annotations/train_1.xml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], size, *lines[3:]]))
    main(voc, out)
    assert read_labels(out, "train")["train_1.png"][0] == (48, 64)


def test_one_based_warns_of_boxes_before_pixel_1(voc, out, capsys):
    main(voc, out, "--one-based")
    assert "note: 5 boxes start before pixel 1: is --one-based right" in capsys.readouterr().out


def voc_object(**changes) -> str:
    values = {"name": "cat", "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4, **changes}
    sides = "".join(f"<{k}>{values[k]}</{k}>" for k in ("xmin", "ymin", "xmax", "ymax"))
    difficult = f"<difficult>{values.get('difficult', 0)}</difficult>"
    return f"<object><name>{values['name']}</name>{difficult}<bndbox>{sides}</bndbox></object>"


def annotation(*objects: str, size=(64, 48)) -> str:
    sides = "<size><width>{}</width><height>{}</height></size>".format(*size)
    return f"<annotation>{sides}{''.join(objects)}</annotation>"


NESTED_ENTITIES = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (annotation(voc_object(), voc_object(xmin="one")), "object 2 (cat): <xmin> is 'one', whi"),
        (annotation(voc_object(ymax="")), "object 1 (cat): <ymax> is '', which is not a number"),
        (annotation(voc_object(ymax="inf")), "object 1 (cat): <ymax> is 'inf', which is not a n"),
        (annotation(voc_object(xmax=0)), "object 1 (cat): xmin, ymin, xmax, ymax are 1, 2, 0, 4:"),
        (annotation(voc_object(name=" ")), "object 1 (no name): <name> is missing"),
        (annotation(voc_object(difficult="yes")), "object 1 (cat): <difficult> is 'yes' and neit"),
        (annotation("<object><name>cat</name></object>"), "object 1 (cat): <bndbox> is missing"),
        (annotation(size=(640, 480)), "<size> is 640 x 480, but "),
        (annotation(size=("wide", 480)), "<width> is 'wide', which is not a number"),
        ("<annotation>", "cannot be read as XML: no element found: line 1"),
        ("", "cannot be read as XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "save it as UTF-8"),
        ("<svg/>", "the root is <svg> and not <annotation>"),
        (
            f'<!DOCTYPE x [<!ENTITY l0 "ha">{NESTED_ENTITIES}]><annotation>&l11;</annotation>',
            "a DOCTYPE",
        ),
        ('<!DOCTYPE x [<!ENTITY e SYSTEM "a.txt">]><annotation>&e;</annotation>', "a DOCTYPE"),
    ],
)
def test_invalid_annotation_file_is_rejected(voc, out, text, message):
    file = voc / "Annotations/train_0.xml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        main(voc, out)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert not out.exists()


def test_invalid_lists_are_rejected(voc, out):
    lists = voc / "ImageSets/Main"
    (lists / "val.txt").write_text("val_0\nmissing\ntrain_0\n")
    with pytest.raises(UserError) as caught:
        main(voc, out)
    assert str(caught.value).splitlines() == [
        "2 errors:",
        f"  {lists}/val.txt:2: {voc}/Annotations/missing.xml is missing",
        f"  {lists}/val.txt:3: train_0 is also at {lists}/train.txt:1: keep one of them",
    ]


def test_missing_image_or_train_list_is_rejected(voc, out):
    (voc / "JPEGImages/val_0.png").unlink()
    with pytest.raises(UserError, match=r"val_0.xml: its image .*val_0.jpg is missing"):
        main(voc, out)
    (voc / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(UserError, match=r"val.txt exists and .*train.txt does not"):
        main(voc, out)


def test_dataset_without_objects_needs_categories(voc, out):
    for file in (voc / "Annotations").iterdir():
        file.write_text("<annotation/>")
    with pytest.raises(UserError, match="no objects, so no categories"):
        main(voc, out)


# -------------------------------------------------------------------------------- layouts


def names_of(out) -> dict[str, list[str]]:
    return {
        split: sorted(read_labels(out, split))
        for split in ("train", "val")
        if split_of(out, split).annotations.exists()
    }


TRAIN, VAL = [f"train_{n}.png" for n in range(4)], ["val_0.png", "val_1.png"]


@pytest.mark.parametrize("valid", ["valid", "val", "validation"])
@pytest.mark.parametrize("below", ["", "annotations", "Annotations"])
def test_folders_of_splits(voc, out, valid, below, capsys):
    root = voc.with_name("export")
    images = {"": "", "annotations": "images", "Annotations": "JPEGImages"}[below]
    for name, prefix in (("train", "train"), (valid, "val"), ("test", "val")):
        shutil.copytree(voc / "Annotations", root / name / below, dirs_exist_ok=True)
        shutil.copytree(voc / "JPEGImages", root / name / images, dirs_exist_ok=True)
        for file in (root / name).rglob("*_*.*"):
            if not file.name.startswith(prefix):
                file.unlink()
    (root / "stray.xml").touch()
    main(root, out)
    assert names_of(out) == {"train": TRAIN, "val": VAL}
    printed = capsys.readouterr().out
    assert f"note: {root}/test is ignored: only train and val are converted" in printed
    assert f"1 annotation files are in no folder of a split, and left out: {root}/stray" in printed
    assert "other files" not in printed


def test_annotations_beside_images(voc, out):
    for file in (voc / "Annotations").iterdir():
        file.rename(voc / file.name)
    for file in (voc / "JPEGImages").iterdir():
        file.rename(voc / file.name)
    (voc / "train_0.png").rename(voc / "train_0.PNG")
    for name in ("Annotations", "JPEGImages", "ImageSets"):
        shutil.rmtree(voc / name)
    main(voc, out)
    assert names_of(out) == {"train": ["train_0.PNG", *TRAIN[1:], *VAL]}


def test_subfolders_named_as_splits(voc, out, capsys):
    shutil.rmtree(voc / "ImageSets")
    for folder in ("Annotations", "JPEGImages"):
        for number, name in ((0, "train"), (1, "val"), (2, "test")):
            (voc / folder / name).mkdir()
            for file in (voc / folder).glob(f"*_{number}.*"):
                file.rename(voc / folder / name / file.name)
    main(voc, out)
    assert names_of(out) == {
        "train": ["train/train_0.png", "train/val_0.png"],
        "val": ["val/train_1.png", "val/val_1.png"],
    }
    printed = capsys.readouterr().out
    assert f"1 annotation files are for testing, and left out: {voc}/Annotations/test" in printed
    assert f"1 annotation files are in no list: {voc}/Annotations/train_3.xml" in printed


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"trainval": [*TRAIN, *VAL]}, {"train": [*TRAIN, *VAL]}),
        ({"trainval": [*TRAIN, *VAL], "val": VAL}, {"train": TRAIN, "val": VAL}),
        ({"trainval": TRAIN, "test": [*VAL, "absent.png"]}, {"train": TRAIN}),
        ({"trainval": [*TRAIN, *VAL], "train": TRAIN, "val": VAL}, {"train": TRAIN, "val": VAL}),
        ({"test": VAL}, {"train": TRAIN}),
    ],
)
@pytest.mark.parametrize(
    "style",
    [
        ("ImageSets/Main", "{}", "utf-8"),
        ("ImageSets", "{}.jpg", "utf-8-sig"),
        (".", "./JPEGImages/{0}.png Annotations/{0}.xml", "utf-8"),
        (".", "C:\\voc\\Annotations\\{}.xml", "utf-8"),
    ],
)
def test_lists_define_the_splits(voc, out, lists, expected, style):
    folder, form, encoding = style
    shutil.rmtree(voc / "ImageSets")
    (voc / folder).mkdir(exist_ok=True, parents=True)
    for name, files in lists.items():
        lines = "".join(form.format(file.removesuffix(".png")) + "\r\n" for file in files)
        (voc / folder / f"{name}.txt").write_bytes(lines.encode(encoding))
    main(voc, out)
    assert names_of(out) == expected


def test_test_images_in_train_are_rejected(voc, out):
    (voc / "ImageSets/Main/test.txt").write_text("train_1\n")
    with pytest.raises(UserError, match=r"train.txt:2: train_1 is also at .*test.txt:1: keep one"):
        main(voc, out)


# ------------------------------------------------------------------------- images and encodings


def set_filename(voc, key, name):
    file = voc / f"Annotations/{key}.xml"
    file.write_text(file.read_text().replace("ignored.jpg", name))


@pytest.mark.parametrize("name", ["DSC 7.png", "C:\\me\\DSC 7.JPG", "DSC 7"])
def test_image_of_another_name_is_found_by_filename(voc, out, name, capsys):
    (voc / "JPEGImages/train_0.png").rename(voc / "JPEGImages/DSC 7.png")
    set_filename(voc, "train_0", name)
    main(voc, out)
    assert names_of(out)["train"] == ["DSC 7.png", *TRAIN[1:]]
    assert "no annotation file" not in capsys.readouterr().out


def test_two_possible_images_need_a_decision(voc, out):
    shutil.copy(voc / "JPEGImages/train_2.png", voc / "JPEGImages/DSC.7.png")
    set_filename(voc, "train_0", "DSC.7.png")
    with pytest.raises(UserError, match=r"train_0.xml: its image may be train_0.png, .* or DSC.7"):
        main(voc, out)
    main(voc, out / "stem", "--match", "stem")
    assert names_of(out / "stem")["train"] == TRAIN
    main(voc, out / "filename", "--match", "filename")
    assert names_of(out / "filename")["train"] == ["DSC.7.png", *TRAIN[1:]]


def test_filename_of_another_annotation_file_is_noted(voc, out, capsys):
    set_filename(voc, "train_0", "train_2.png")
    main(voc, out)
    assert names_of(out)["train"] == TRAIN
    assert "note: 1 annotation files have a <filename> of another image" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train_2.xml: its image .* is also that of .*train_0.xml"):
        main(voc, out / "x", "--match", "filename")


@pytest.mark.parametrize("encoding", ["gb2312", "gbk", "GB18030", "big5", "shift_jis", "euc-kr"])
def test_encodings_that_expat_lacks(voc, out, encoding):
    name = {"big5": "斑馬", "shift_jis": "縞馬", "euc-kr": "얼룩말"}.get(encoding, "斑马")
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    text = head + annotation(voc_object(name=name))
    (voc / "Annotations/val_0.xml").write_bytes(text.encode(encoding))
    main(voc, out)
    categories = json.loads(split_of(out).annotations.read_text())["categories"]
    assert [row["name"] for row in categories] == ["cat", "dog", name]


def test_undeclared_encoding_is_named(voc, out):
    (voc / "Annotations/val_0.xml").write_bytes(annotation(voc_object(name="斑马")).encode("gbk"))
    with pytest.raises(UserError, match=r'It is not UTF-8: .*encoding="gbk"'):
        main(voc, out)


def test_white_space_in_names_is_one_blank(voc, out):
    names = ("traffic light", "traffic\n   light", "  traffic \t light ")
    text = annotation(*(voc_object(name=name) for name in names))
    (voc / "Annotations/val_0.xml").write_text(text)
    main(voc, out)
    categories = json.loads(split_of(out).annotations.read_text())["categories"]
    assert [row["name"] for row in categories] == ["cat", "dog", "traffic light"]


@pytest.mark.parametrize(
    ("text", "iscrowd"),
    [("Unspecified", 0), ("false", 0), ("", 0), (" 0 ", 0), ("1", 1), ("True", 1)],
)
def test_difficult_in_other_words(voc, out, text, iscrowd):
    (voc / "Annotations/val_0.xml").write_text(annotation(voc_object(difficult=text)))
    main(voc, out)
    assert read_labels(out, "val")["val_0.png"][1][0][3] == iscrowd
