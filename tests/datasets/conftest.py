"""One small data set in the formats of COCO, VOC and YOLO, to convert and to split."""

import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from helpers import ROOT, rewrite, split_of, write_split

sys.path.append(str(ROOT / "datasets"))  # for tests to import the scripts

# Boxes as in real data: with decimals, of zero size, and up to the border of the image.
BOXES = [
    [[2, 4, 4, 30, 20], [5, 0, 0, 64, 48], [2, 10, 11, 0, 0]],
    [[5, 10.25, 8.1, 20.3, 30.07], [2, 0.01, 0.99, 12.34, 16.33]],
    [],
    [[2, 63, 47, 1, 1], [2, 33.3, 0, 30.7, 48]],
]
SIZES = [(64, 48), (48, 64), (64, 48), (64, 48)]


@pytest.fixture
def coco(tmp_path) -> Path:
    """Write four training images, one of them without boxes, and two validation images."""
    root = tmp_path / "coco"
    write_split(root, "train", SIZES, BOXES)
    write_split(root, "val", SIZES[:2], BOXES[:2])
    return root


@pytest.fixture
def crowd(coco) -> None:
    """Make the first training annotation of `coco` a crowd."""
    rewrite(split_of(coco), lambda data: data["annotations"][0].update(iscrowd=1))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def coco_categories(coco) -> list[str]:
    """Return the flag that keeps the category ids of `coco`."""
    return ["--categories", str(split_of(coco).annotations)]


def objects_of(coco: Path, split: str):
    """Yield (image file, size, [(category name, bbox, iscrowd)]) of each image."""
    content = json.loads(split_of(coco, split).annotations.read_text())
    names = {row["id"]: row["name"] for row in content["categories"]}
    for image in content["images"]:
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        objects = [(names[row["category_id"]], row["bbox"], row["iscrowd"]) for row in rows]
        yield coco / f"{split}2017" / image["file_name"], (image["width"], image["height"]), objects


@pytest.fixture
def make_voc(coco, tmp_path):
    """Return a function that writes `coco` as a VOC folder with symbolic links to the images."""

    def make(one_based: bool = False) -> Path:
        root = tmp_path / "voc"
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / folder).mkdir(parents=True)
        for split in ("train", "val"):
            lines = []
            for file, size, objects in objects_of(coco, split):
                stem = f"{split}_{file.stem}"
                lines.append(f"{stem}\n")
                (root / f"JPEGImages/{stem}{file.suffix}").symlink_to(file)
                xml = voc_xml(size, objects, one_based)
                (root / f"Annotations/{stem}.xml").write_text(xml, encoding="utf-8")
            (root / f"ImageSets/Main/{split}.txt").write_text("".join(lines))
        return root

    return make


def voc_xml(size: tuple[int, int], objects: list, one_based: bool) -> str:
    lines = ["<annotation>", "<filename>ignored.jpg</filename>"]
    lines.append("<size><width>{}</width><height>{}</height></size>".format(*size))
    for name, (x, y, w, h), difficult in objects:
        corners = (x + 1, y + 1, x + w, y + h) if one_based else (x, y, x + w, y + h)
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        bndbox = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        lines.append(
            f"<object><name>{escape(name)}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{bndbox}</bndbox><part><name>head</name><bndbox/></part></object>"
        )
    return "\n".join([*lines, "</annotation>"])


@pytest.fixture
def voc(make_voc) -> Path:
    return make_voc()


@pytest.fixture
def make_yolo(coco, tmp_path):
    """Return a function that writes `coco` as a YOLO folder with symbolic links to the images."""

    def make(number: str = "{:.6f}", names=("cat", "dog")) -> Path:
        root = tmp_path / "yolo"
        for split in ("train", "val"):
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)
            for file, (width, height), objects in objects_of(coco, split):
                (root / "images" / split / file.name).symlink_to(file)
                lines = []
                for name, (x, y, w, h), _ in objects:
                    box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                    lines.append(" ".join([str(names.index(name)), *map(number.format, box)]))
                if lines:
                    label = root / "labels" / split / f"{file.stem}.txt"
                    label.write_text("\n".join(lines) + "\n")
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        return root

    return make


@pytest.fixture
def yolo(make_yolo) -> Path:
    return make_yolo()
