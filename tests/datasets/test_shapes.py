"""The built-in data set."""

import json

import pytest
import shapes
from helpers import ROOT, run_script, split_of

SCRIPT = ROOT / "datasets/shapes.py"


@pytest.mark.slow
def test_shapes_are_valid_and_reproducible(tmp_path):
    done = run_script(SCRIPT, tmp_path / "shapes")
    assert done.returncode == 0, done.stderr
    for split in ("train", "val"):
        content = json.loads(split_of(tmp_path / "shapes", split).annotations.read_text())
        assert [row["id"] for row in content["categories"]] == [1, 3, 6]
        assert any(row["iscrowd"] for row in content["annotations"])
        with_boxes = {row["image_id"] for row in content["annotations"]}
        assert 0 < len(with_boxes) < len(content["images"])
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= 128.1
    for split in shapes.IMAGES:
        shapes.make_split(tmp_path / "again", split)
    for file in (tmp_path / "shapes").rglob("*.*"):
        other = tmp_path / "again" / file.relative_to(tmp_path / "shapes")
        assert file.read_bytes() == other.read_bytes()


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.png").touch()
    done = run_script(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} exists: remove it" in done.stderr


def test_missing_folder_argument_is_rejected():
    assert run_script(SCRIPT).returncode == 2
