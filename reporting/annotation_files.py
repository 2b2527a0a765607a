"""Write detections in the formats of annotation tools and evaluators."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

import coco_eval
from coco_utils import Categories
from internals.detections import ImageItem
from internals.video import Frame
from reporting import fonts


@dataclass(kw_only=True)
class NamedImage(ImageItem):
    """An image, or a frame of a video, with its names in the results.

    Attributes:
        file_name: Relative to the common folder of all images, or as annotated if that is a path;
            of a frame the video's, or that of the frame if it is saved.
        stem: The name of its output files without suffix, unique.
        image_id: Its id.
        row: Its position in the annotation file, if it is annotated.
        frame: The number of the frame in the video, from 0; None for an image file.
        time: Of the frame in seconds.
        video_frame: The frame itself, until it is written.
    """

    file_name: str
    stem: str
    image_id: int
    row: int | None = None
    frame: int | None = None
    time: float | None = None
    video_frame: Frame | None = None

    def to_dict(self) -> dict:
        """Return its entry in an annotation file."""
        of_frame = {} if self.frame is None else {"frame": self.frame, "time": self.time}
        size = {"width": self.size[0], "height": self.size[1]}
        return {"id": self.image_id, "file_name": self.file_name, **size, **of_frame}

    def rows(self) -> np.ndarray:
        """Return its detections as rows of `coco_eval.detection_rows`."""
        return self.detections.to_rows(self.image_id)


def write_coco(folder: Path, images: Sequence[NamedImage], categories: Categories) -> Path:
    """Write `detections.json` in COCO's results format, and `images.json`.

    `images.json` is an annotation file without annotations, with the file of each `image_id`, for
    `COCO("images.json").loadRes("detections.json")`.
    """
    file = folder / "detections.json"
    rows = np.concatenate([np.empty((0, 7)), *(image.rows() for image in images)])
    coco_eval.write_results(rows, file)
    content = annotation_file([image.to_dict() for image in images], [], categories)
    (folder / "images.json").write_text(json.dumps(content), encoding="utf-8")
    return file


def write_coco_dataset(folder: Path, images: Sequence[NamedImage], categories: Categories) -> Path:
    """Write `annotations.json`, an annotation file with the detections as annotations."""
    file = folder / "annotations.json"
    results = [row for image in images for row in coco_eval.coco_results(image.rows())]
    content = annotation_file([image.to_dict() for image in images], results, categories)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def annotation_file(images: list[dict], results: list[dict], categories: Categories) -> dict:
    """Return the content of a COCO annotation file.

    Args:
        images: Entries of the images.
        results: Rows of `coco_eval.coco_results`, which become annotations with the same keys and
            those that other tools require. Their own keys are kept.
        categories: All categories.
    """
    annotations = [
        {
            "id": number,
            **row,
            "area": row["bbox"][2] * row["bbox"][3],
            "iscrowd": 0,
            "segmentation": [],
        }
        for number, row in enumerate(results, start=1)
    ]
    names = [{"id": i, "name": name} for i, name in categories.id_to_name.items()]
    return {"images": images, "annotations": annotations, "categories": names}


def write_voc(folder: Path, images: Sequence[NamedImage], categories: Categories) -> Path:
    """Write `Annotations/`, an XML file in the format of PASCAL VOC for each image.

    Coordinates are pixels from 0, rounded, as labelImg writes them.
    """
    names = dict(zip(categories.ids, map(fonts.one_line, categories.display_names), strict=True))
    for image in images:
        name = PurePosixPath(fonts.one_line(image.file_name))
        root = ElementTree.Element("annotation")
        _add(root, folder=name.parent.name, filename=name.name)
        size = ElementTree.SubElement(root, "size")
        _add(size, width=image.size[0], height=image.size[1], depth=3)
        found = image.detections
        boxes = found.boxes.round().astype(int).tolist()
        for box, score, category in zip(boxes, found.scores, found.category_ids, strict=True):
            entry = ElementTree.SubElement(root, "object")
            text = names[category] or f"category {category}"
            _add(entry, name=text, pose="Unspecified", truncated=0, difficult=0, score=score)
            corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            _add(ElementTree.SubElement(entry, "bndbox"), **corners)
        file = folder / "Annotations" / f"{image.stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.indent(root)
        ElementTree.ElementTree(root).write(file, encoding="utf-8")
    return folder / "Annotations"


def _add(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def write_csv(folder: Path, images: Sequence[NamedImage], categories: Categories) -> Path:
    """Write `detections.csv`: one line per box, x and y of its upper left corner, in pixels.

    With frames of videos there are two more columns, their number and time in seconds.
    """
    file = folder / "detections.csv"
    names = {i: fonts.one_line(name) for i, name in categories.id_to_name.items()}
    has_frames = any(image.frame is not None for image in images)
    # File names on Linux need not be UTF-8: their bytes are written unchanged.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened)
        of_frame = ("frame", "time") if has_frames else ()
        box = ("x", "y", "width", "height")
        writer.writerow(("file_name", "category_id", "category", "score", *box, *of_frame))
        for image in images:
            of_frame = (image.frame, image.time) if has_frames else ()
            for _, *numbers, category in image.rows():
                # The model computes in float32: more digits have no information.
                *xywh, score = np.float32(numbers)
                row = (image.file_name, int(category), names[int(category)], score)
                writer.writerow((*row, *xywh, *of_frame))
    return file


def write_yolo(folder: Path, images: Sequence[NamedImage], categories: Categories) -> Path:
    """Write `labels/`, a text file for each image, and `classes.txt`, the names of class 0, 1, ...

    Each line is `class cx cy w h score`, relative to the width and height of the image.
    """
    for image in images:
        file = folder / "labels" / f"{image.stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for _, x, y, w, h, score, i in image.rows().tolist():
            relative = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(image.size, 2)
            numbers = " ".join(f"{number:.6f}" for number in (*relative, score))
            lines.append(f"{categories.ids.index(i)} {numbers}\n")
        file.write_text("".join(lines), encoding="utf-8")
    names = "".join(
        f"{fonts.one_line(name) or f'category {i}'}\n" for i, name in categories.id_to_name.items()
    )
    (folder / "classes.txt").write_text(names, encoding="utf-8")
    return folder / "labels"


WRITERS = {
    "coco": write_coco,
    "coco-dataset": write_coco_dataset,
    "voc": write_voc,
    "csv": write_csv,
    "yolo": write_yolo,
}
FOR_ANNOTATION = ("coco-dataset", "voc", "yolo")  # for these the frames of videos are saved, too
