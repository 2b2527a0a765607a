"""Find the annotation file and the images of a split in the layouts that other tools write."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from internals.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
# Names of the splits' folders and files; CVAT's begin with a capital letter. A folder "test" is
# never taken for validation: it would then no longer be unseen.
SPLIT_NAMES = {
    "train": ("train", "Train"),
    "val": ("valid", "val", "validation", "Val", "Validation"),
}
FULL_NAMES = {"train": "training", "val": "validation"}


class Split(NamedTuple):
    """The annotation file of a split, train or val, and the folder of its images."""

    annotations: Path
    images: Path

    def exists(self) -> bool:
        """Return whether both exist."""
        return self.annotations.is_file() and self.images.is_dir()

    def is_begun(self) -> bool:
        """Return whether either exists; a folder `images` may be that of another split."""
        is_found = self.images.name != "images" and self.images.is_dir()
        return is_found or self.annotations.is_file()


def find_split(data_path: Path, split: str, annotations: Path | None, images: Path | None) -> Split:
    """Find the files of a split in one of the common layouts.

    A single annotation file for all images is taken for training, if there is no other; it then
    needs explicit validation data.

    Args:
        data_path: The folder to search.
        split: "train" or "val".
        annotations: The annotation file, if given by the user; requires `images`.
        images: The folder of the images, if given by the user; requires `annotations`.

    Raises:
        DataError: Nothing was found, or more than one candidate; the message has what to do.
    """
    if annotations and images:
        candidates = [Split(annotations, images)]
        found = [candidate for candidate in candidates if candidate.exists()]
    elif annotations or images:
        raise DataError(
            f"--{split}-annotations and --{split}-images belong together: give both, or neither to "
            f"look in {data_path}"
        )
    else:
        candidates = list(_candidates(data_path, split))
        found = _find(data_path, split)
    if len(found) > 1:
        raise DataError(
            f"{data_path} has several {FULL_NAMES[split]} splits: "
            f"{' and '.join(str(each.annotations) for each in found)}. Give the one to use by "
            f"--{split}-annotations and --{split}-images"
        )
    if found:
        return found[0]
    if hint := None if annotations else _hint(data_path, split):
        raise DataError(f"no {FULL_NAMES[split]} data found in {data_path}: {hint}")
    raise DataError(_list_tried(candidates, split, None if annotations else data_path))


def _candidates(folder: Path, split: str) -> Iterator[Split]:
    """Yield the places of a split; for one annotation file the likelier image folders first."""
    annotations = folder / "annotations"
    # COCO, and as YOLO's tools arrange it
    for images in (f"{split}2017", f"images/{split}2017"):
        yield Split(annotations / f"instances_{split}2017.json", folder / images)
    for name in SPLIT_NAMES[split]:
        # Roboflow
        yield Split(folder / name / "_annotations.coco.json", folder / name)
        # CVAT, and the same without its prefix
        for file in (f"instances_{name}.json", f"{name}.json"):
            for images in (f"images/{name}", name, "images"):
                yield Split(annotations / file, folder / images)


def _undivided(folder: Path) -> Iterator[Split]:
    """Yield the places of single annotation files for all images."""
    # CVAT
    yield Split(folder / "annotations/instances_default.json", folder / "images/default")
    yield Split(folder / "annotations/instances_default.json", folder / "images")
    yield Split(folder / "result.json", folder / "images")  # Label Studio
    yield Split(folder / "labels.json", folder / "data")  # FiftyOne
    yield Split(folder / "annotations.json", folder / "JPEGImages")  # labelme's labelme2coco.py
    yield Split(folder / "_annotations.coco.json", folder)  # a folder of Roboflow's


def _find(folder: Path, split: str) -> list[Split]:
    """Return the existing candidates, one for each annotation file."""
    for candidates in (_candidates(folder, split), _undivided(folder) if split == "train" else ()):
        found = {}
        for each in candidates:
            if each.exists():
                status = each.annotations.stat()  # file systems may ignore letter case
                found.setdefault((status.st_dev, status.st_ino), each)
        if found:
            return list(found.values())
    return []


# ------------------------------------------------------------------------------------ messages


def _hint(folder: Path, split: str) -> str:
    """Return what to do with a folder without a split, "" if it tells nothing."""
    if folder.is_file():
        return (
            "it is a file: use the folder, or --{train,val}-annotations with --{train,val}-images"
        )
    train = _find(folder, "train") if split == "val" else []
    if len(train) == 1 and not any(each.is_begun() for each in _candidates(folder, split)):
        unused = "; its test images are for testing only" if (folder / "test").is_dir() else ""
        command = _command("datasets/split.py", *train[0], f"{folder.resolve()}_split")
        return f"to split {train[0].annotations} into train and val{unused}:\n  {command}"
    if script := _converter(folder):
        kind, script = script
        return f"it is a {kind}, to be converted:\n  " + _command(
            script, folder, f"{folder.resolve()}_coco"
        )
    if (folder / "annotations.xml").is_file():
        return "annotations.xml is in CVAT's own format: export the task as 'COCO 1.0'"
    below = [path for path in folder.glob("[!.]*/") if path.is_dir() and _find(path, split)]
    return f"use --data-path {shlex.quote(str(below[0]))}" if len(below) == 1 else ""


def _converter(folder: Path) -> tuple[str, str] | None:
    """Return the format of a folder, and the script that converts it."""
    files = ("data.yaml", "data.yml", "classes.txt", "obj.names")
    folders = ("labels", "train/labels", "valid/labels")
    if any((folder / name).is_file() for name in files) or any(
        (folder / name).is_dir() for name in folders
    ):
        return "YOLO folder", "datasets/yolo_to_coco.py"
    if any(any(folder.glob(f"{name}/*.xml")) for name in ("[Aa]nnotations", "train", "valid")):
        return "PASCAL VOC folder", "datasets/voc_to_coco.py"
    if any(file.name != "annotations.xml" for file in folder.glob("*.xml")):
        return "PASCAL VOC folder", "datasets/voc_to_coco.py"
    return None


def _command(script: str, *arguments: object) -> str:
    return shlex.join(["python", os.path.relpath(ROOT / script), *map(str, arguments)])


def _list_tried(candidates: list[Split], split: str, folder: Path | None) -> str:
    begun = [each for each in candidates if each.is_begun()]
    # One line for each annotation file, in lower case.
    unique = {
        each.annotations.as_posix().casefold(): each for each in reversed(begun or candidates)
    }
    listed = reversed(unique.values())
    tried = "\n".join(
        f"  {each.annotations} ({_presence(each.annotations.is_file())})"
        f" with images in {each.images}{os.sep} ({_presence(each.images.is_dir())})"
        for each in listed
    )
    found = f"no {FULL_NAMES[split]} data found; looked for\n{tried}"
    if folder and not folder.exists():
        found = f"{folder} does not exist: there is no {FULL_NAMES[split]} data"
    return (
        f"{found}\n"
        "To get COCO 2017: bash datasets/download_coco.sh. To try the recipe without it: "
        "bash start_scripts/quickstart.sh. Your own data in COCO format: --data-path FOLDER, or "
        f"--{split}-annotations FILE --{split}-images FOLDER. Converters and a tool to split one "
        "file into train and val are in datasets/"
    )


def _presence(found: bool) -> str:
    return "found" if found else "missing"
