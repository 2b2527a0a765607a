"""Finding annotation files and images in the layouts of other tools."""

import pytest
from helpers import split_of

from internals.errors import DataError
from internals.layouts import Split, find_split


def write(root, *files):
    """Write empty files, and folders: those that end with a slash."""
    for file in files:
        path = root / file
        (path if file.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            path.touch()


def find(root, split, **paths):
    return find_split(root, split, paths.get("annotations"), paths.get("images"))


@pytest.mark.parametrize(
    ("files", "split", "annotations", "images"),
    [
        (["train2017/"], "train", "annotations/instances_train2017.json", "train2017"),
        (["images/val2017/", "labels/val2017/"], "val", "annotations/instances_val2017.json",
         "images/val2017"),
        ([], "train", "train/_annotations.coco.json", "train"),
        (["test/_annotations.coco.json"], "val", "valid/_annotations.coco.json", "valid"),
        ([], "val", "val/_annotations.coco.json", "val"),
        (["images/"], "train", "annotations/instances_train.json", "images"),
        (["images/val/", "val/"], "val", "annotations/instances_val.json", "images/val"),
        (["images/Validation/"], "val", "annotations/instances_Validation.json",
         "images/Validation"),
        (["images/"], "train", "annotations/instances_default.json", "images"),
        (["images/default/"], "train", "annotations/instances_default.json", "images/default"),
        (["images/"], "train", "result.json", "images"),
        (["JPEGImages/"], "train", "annotations.json", "JPEGImages"),
        (["data/"], "train", "labels.json", "data"),
        (["val/", "images/"], "val", "annotations/val.json", "val"),
        ([], "train", "_annotations.coco.json", ""),
        # Several files for all images beside a division into splits
        (["images/train/", "annotations/instances_default.json", "result.json"], "train",
         "annotations/instances_train.json", "images/train"),
    ],
)  # fmt: skip
def test_layouts_are_found(tmp_path, files, split, annotations, images):
    write(tmp_path, annotations, *files)
    assert find(tmp_path, split) == Split(tmp_path / annotations, tmp_path / images)


def test_explicit_paths_are_taken(tiny, tmp_path):
    explicit = split_of(tiny, "train")
    assert find_split(tmp_path / "nowhere", "val", *explicit) == explicit
    with pytest.raises(DataError, match="belong together"):
        find(tmp_path, "val", annotations=tmp_path / "a.json")
    with pytest.raises(DataError, match=r"(?s)b\.json \(missing\) with images in .*b/ \(missing\)"):
        find(tiny, "val", annotations=tmp_path / "b.json", images=tmp_path / "b")


def test_error_lists_paths(tmp_path):
    with pytest.raises(DataError) as caught:
        find(tmp_path, "val")
    message = str(caught.value)
    for text in ("instances_val2017.json (missing)", "valid", "download_coco.sh", "quickstart.sh"):
        assert text in message
    write(tmp_path, "annotations/instances_val2017.json")
    with pytest.raises(DataError) as caught:
        find(tmp_path, "val")
    assert "val2017.json (found) with images in" in str(caught.value)
    assert "_annotations.coco.json" not in str(caught.value)


def test_half_of_a_split_is_named(tmp_path):
    write(tmp_path, "train/_annotations.coco.json", "valid/0.jpg")
    with pytest.raises(DataError) as caught:
        find(tmp_path, "val")
    assert "valid/_annotations.coco.json (missing) with images in" in str(caught.value)
    assert "split.py" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        ["valid/_annotations.coco.json", "val/_annotations.coco.json"],
        ["annotations/instances_val2017.json", "val2017/", "val/_annotations.coco.json"],
    ],
)
def test_several_candidates_are_an_error(tmp_path, files):
    write(tmp_path, *files)
    with pytest.raises(DataError) as caught:
        find(tmp_path, "val")
    assert "has several validation splits" in str(caught.value)
    assert all(str(tmp_path / file) in str(caught.value) for file in files if "json" in file)
    assert "--val-annotations" in str(caught.value)


def test_test_images_are_not_for_validation(tmp_path):
    write(tmp_path, "train/_annotations.coco.json", "test/_annotations.coco.json")
    with pytest.raises(DataError, match=r"its test images are for testing only:\n  python .*split"):
        find(tmp_path, "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["data.yaml"], "yolo_to_coco.py"),
        (["train/labels/0.txt"], "yolo_to_coco.py"),
        (["Annotations/0.xml", "JPEGImages/0.jpg"], "voc_to_coco.py"),
        (["train/0.xml", "train/0.jpg"], "voc_to_coco.py"),
        (["0.xml", "0.jpg"], "voc_to_coco.py"),
        (["annotations.xml"], "export the task as 'COCO 1.0'"),
        (["set/train/_annotations.coco.json"], "use --data-path {root}/set"),
    ],
)
def test_hint_for_other_folders(tmp_path, files, message):
    write(tmp_path, *files)
    with pytest.raises(DataError) as caught:
        find(tmp_path, "train")
    assert message.format(root=tmp_path) in str(caught.value)


def test_file_instead_of_folder(tmp_path):
    write(tmp_path, "all.json")
    with pytest.raises(DataError, match="it is a file: use the folder"):
        find(tmp_path / "all.json", "train")
