"""Cutting an annotated data set into tiles."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tile
from helpers import ROOT, main_in_process, rewrite, run, split_of, write_split
from PIL import Image

from internals import images
from internals.errors import DataError, UserError

# Tiles of 40 pixels at 0, 30, 60 from left, and at 0, 20 from top.
SIZE, FLAGS = (100, 60), ("--tile", 40, "--tile-overlap", 0.25)
BOXES = [[2, 5, 5, 10, 10], [5, 35, 10, 20, 20], [2, 90, 50, 10, 10]]


def main(*argv) -> None:
    tile.main(list(map(str, argv)))


@pytest.fixture
def large(tmp_path) -> Path:
    """Write a training image with two boxes and a crowd, and a validation image."""
    root = tmp_path / "large"
    write_split(root, "train", [SIZE], [BOXES])
    write_split(root, "val", [(50, 40)], [[[5, 1, 2, 3, 4]]])

    def change(data):
        data["annotations"][1]["area"] = 200  # of a box of 400
        data["annotations"][2]["iscrowd"] = 1

    rewrite(split_of(root), change)
    return root


def read(out: Path, split: str = "train") -> dict:
    return json.loads(split_of(out, split).annotations.read_text(encoding="utf-8"))


def read_tiles(out: Path) -> dict:
    """Return the annotations of each tile as (source id, bbox, area, iscrowd), by its corner."""
    content = read(out)
    tiles = {(row["x"], row["y"]): [] for row in content["images"]}
    corners = {row["id"]: (row["x"], row["y"]) for row in content["images"]}
    for row in content["annotations"]:
        fields = (row["source_annotation_id"], row["bbox"], row["area"], row["iscrowd"])
        tiles[corners[row["image_id"]]].append(fields)
    return tiles


def test_boxes_are_clipped_and_slivers_are_crowds(large, out, capsys):
    main(*split_of(large), out, *FLAGS)
    assert read_tiles(out) == {
        (0, 0): [(0, [5, 5, 10, 10], 100, 0), (1, [35, 10, 5, 20], 50, 1)],  # a quarter visible
        (30, 0): [(1, [5, 10, 20, 20], 200, 0)],
        (60, 0): [],
        (0, 20): [(1, [35, 0, 5, 10], 25, 1)],  # an eighth
        (30, 20): [(1, [5, 0, 20, 10], 100, 0)],  # half
        (60, 20): [(2, [30, 30, 10, 10], 100, 1)],
    }
    printed = capsys.readouterr().out
    assert "2 parts of boxes, less than 0.3 of them in the tile, are crowds" in printed
    assert f"{out}: 6 tiles of 1 images" in printed
    assert "in no tile" not in printed
    categories = [row["category_id"] for row in read(out)["annotations"]]
    assert categories == [2, 5, 5, 5, 5, 2]
    assert read(out)["categories"] == [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}]


@pytest.mark.parametrize(("share", "crowds"), [(0.1, 0), (0.25, 1), (0.26, 2), (0.5, 2), (1, 3)])
def test_min_visible(large, out, share, crowds):
    main(*split_of(large), out, *FLAGS, "--min-visible", share)
    rows = [row for row in read(out)["annotations"] if row["source_annotation_id"] == 1]
    assert len(rows) == 4
    assert sum(row["iscrowd"] for row in rows) == crowds


def test_box_larger_than_tile_counts_by_its_share(tmp_path, out, capsys):
    # 1,600 of 2,400 pixels are visible at most, and 1,600 of 6,000.
    write_split(tmp_path, "train", [SIZE], [[[2, 0, 0, 60, 40], [5, 0, 0, 100, 60]]])
    main(*split_of(tmp_path), out, *FLAGS)
    tiles = read_tiles(out)
    assert tiles[0, 0] == [(0, [0, 0, 40, 40], 1600, 0), (1, [0, 0, 40, 40], 1600, 1)]
    assert all(tile[-1][3] for tile in tiles.values())
    note = r"1 boxes are in no tile, .* the largest 100 x 60 pixels \(annotation 1\): raise --tile"
    assert re.search(note, capsys.readouterr().out)


def test_tiles_are_the_pixels_of_the_source(large, out):
    main(*split_of(large), out, *FLAGS)
    source = np.asarray(Image.open(large / "train2017/0.png"))
    rows = read(out)["images"]
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        x, y = row["x"], row["y"]
        assert row["file_name"] == f"0_{x}_{y}.png"
        assert (row["width"], row["height"]) == (40, 40)
        assert (row["source_image_id"], row["source_file_name"]) == (100, "0.png")
        pixels = np.asarray(Image.open(out / "train2017" / row["file_name"]))
        np.testing.assert_array_equal(pixels, source[y : y + 40, x : x + 40])
    names = {path.name for path in (out / "train2017").iterdir()}
    assert names == {row["file_name"] for row in rows}


def test_boxes_lead_back_into_those_of_the_source(tmp_path, out):
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(-0.9, 95, (200, 2)), rng.uniform(1, 60, (200, 2))
    boxes = np.hstack([corners, sides]).clip(None, [95, 55, 99, 99])
    write_split(tmp_path, "train", [SIZE], [[[2, *box] for box in boxes.tolist()]])
    main(*split_of(tmp_path), out, *FLAGS)
    content = read(out)
    tiles = {row["id"]: row for row in content["images"]}
    assert len(content["annotations"]) > 300
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        image = tiles[row["image_id"]]
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 40.001
        left, top, full_width, full_height = boxes[row["source_annotation_id"]]
        x, y = x + image["x"], y + image["y"]
        assert x >= left - 0.001
        assert y >= top - 0.001
        assert x + width <= left + full_width + 0.001
        assert y + height <= top + full_height + 0.001
    kept = {row["source_annotation_id"] for row in content["annotations"] if not row["iscrowd"]}
    assert len(kept) > 190


def test_both_splits_in_one_folder_pass_the_check(large, out, capsys):
    main(*split_of(large), out, *FLAGS)
    assert "VAL_ANNOTATIONS VAL_IMAGES" in capsys.readouterr().out
    main(*split_of(large, "val"), out, *FLAGS, "--split", "val")
    assert f"train.py --data-path {out} --check-data" in capsys.readouterr().out
    assert len(read(out, "val")["images"]) == 2
    assert "data check passed" in main_in_process("--data-path", out, "--check-data", "-j", "0")
    with pytest.raises(UserError, match=r"instances_val2017.json exists: remove it"):
        main(*split_of(large, "val"), out, *FLAGS, "--split", "val")


@pytest.mark.parametrize("content", ["file", "folder"])
def test_other_output_is_not_touched(large, out, content):
    (out / "notes.txt").parent.mkdir()
    (out / "notes.txt").touch()
    output = out / "notes.txt" if content == "file" else out
    with pytest.raises(UserError, match="exists, and is no data set of this script"):
        main(*split_of(large), output, *FLAGS)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_share_of_empty_tiles(tmp_path, out, capsys):
    write_split(tmp_path, "train", [(200, 200)], [[[2, 5, 5, 10, 10]]])
    kept = {}
    for name, flags in {"all": (), "half": (0.5,), "same": (0.5,), "none": (0,)}.items():
        flags = ("--keep-empty-tiles", *flags) if flags else ()
        main(*split_of(tmp_path), out / name, "--tile", 20, "--tile-overlap", 0, *flags)
        kept[name] = {row["file_name"] for row in read(out / name)["images"]}
        assert {path.name for path in (out / name / "train2017").iterdir()} == kept[name]
    assert len(kept["all"]) == 100
    assert 35 < len(kept["half"]) < 65
    assert kept["same"] == kept["half"]
    assert kept["none"] == {"0_0_0.png"}
    assert "99 tiles without a box are left out" in capsys.readouterr().out
    flags = ("--tile", 20, "--tile-overlap", 0, "--keep-empty-tiles", 0.5, "--seed", 1)
    main(*split_of(tmp_path), out / "other", *flags)
    assert {row["file_name"] for row in read(out / "other")["images"]} != kept["half"]


def test_only_empty_tiles(tmp_path, out):
    write_split(tmp_path, "train", [SIZE], [[]])
    with pytest.raises(UserError, match="no tile has a box: raise --keep-empty-tiles"):
        main(*split_of(tmp_path), out, *FLAGS, "--keep-empty-tiles", 0)


def test_jpegs_stay_jpegs_and_subfolders_are_kept(large, out):
    (large / "train2017/a").mkdir()
    y, x = np.mgrid[:60, :100]
    smooth = Image.fromarray(np.stack([2 * x, 4 * y, x + y], axis=2).astype(np.uint8))
    smooth.save(large / "train2017/a/b.c.JPG", quality=95)
    rewrite(split_of(large), lambda data: data["images"][0].update(file_name="a/b.c.JPG"))
    main(*split_of(large), out, *FLAGS)
    assert len(list((out / "train2017/a").iterdir())) == 6
    with Image.open(out / "train2017/a/b.c_60_20.jpg") as image:
        assert image.format == "JPEG"
        found = np.asarray(image).astype(int)
    assert np.abs(found - np.asarray(smooth)[20:60, 60:100]).max() < 12


def test_large_image_is_cut_by_rows(large, out, monkeypatch):
    pytest.importorskip("rasterio")
    main(*split_of(large), out / "whole", *FLAGS)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    main(*split_of(large), out / "rows", *FLAGS)
    assert read(out / "rows") == read(out / "whole")
    for file in (out / "whole/train2017").iterdir():
        assert (out / "rows/train2017" / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match="pip install rasterio"):
        main(*split_of(large), out / "none", *FLAGS)


def test_annotated_size_above_limit_is_no_error(large, out):
    def change(data):
        data["images"][0].update(width=10_000, height=10_000)

    rewrite(split_of(large), change)
    with pytest.raises(DataError, match=r"image 100 of .*100 x 60 pixels, but annotated as 10000"):
        main(*split_of(large), out, *FLAGS)


def save_deep(large: Path, top: int) -> None:
    values = np.mgrid[:60, :100][1] * top // 99
    Image.fromarray(values.astype(np.uint16)).save(large / "train2017/0.png")


def test_bit_depth_is_measured_or_given(large, out, capsys):
    save_deep(large, 4095)
    main(*split_of(large), out / "a", *FLAGS)
    printed = capsys.readouterr().out
    assert "16-bit gray images hold 12 bits" in printed
    assert "--bit-depth 12" in printed  # in the command for the other split
    assert np.asarray(Image.open(out / "a/train2017/0_60_0.png")).max() == 255
    main(*split_of(large), out / "b", *FLAGS, "--bit-depth", 14)
    assert np.asarray(Image.open(out / "b/train2017/0_60_0.png")).max() == 63
    main(*split_of(large), out / "c", *FLAGS, "--bit-depth", 10)
    assert "1 16-bit images with values that need more bits" in capsys.readouterr().out


def test_truncated_jpeg(large, out):
    file = large / "train2017/0.jpg"
    Image.open(large / "train2017/0.png").save(file)
    file.write_bytes(file.read_bytes()[:-300])
    rewrite(split_of(large), lambda data: data["images"][0].update(file_name="0.jpg"))
    with pytest.raises(DataError, match=r"image 100 of .*0.jpg is truncated"):
        main(*split_of(large), out / "a", *FLAGS)
    main(*split_of(large), out / "b", *FLAGS, "--truncated-images", "use")
    assert len(read(out / "b")["images"]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["images"][0].update(file_name="x.png"), r"missing .*x.png \(id 100\)"),
        (lambda data: data["images"].append({**data["images"][0], "file_name": "1.png"}), "repea"),
        (lambda data: data["annotations"][0].update(bbox=[200, 5, 9, 9]), "wholly outside"),
        (lambda data: data["annotations"][0].update(category_id=9), "undefined category_id"),
        (
            lambda data: data["images"].append({**data["images"][0], "id": 3}),
            r"0.png \(id 100\) has the name of another image",
        ),
    ],
)
def test_errors_of_the_annotation_file(large, out, change, message):
    Image.open(large / "train2017/0.png").save(large / "train2017/1.png")
    rewrite(split_of(large), change)
    with pytest.raises(UserError, match=message):
        main(*split_of(large), out, *FLAGS)
    assert not out.exists()


def test_boxes_without_size_are_left_out_with_a_note(large, out, capsys):
    rewrite(split_of(large), lambda data: data["annotations"][0].update(bbox=[5, 5, 0, 9]))
    main(*split_of(large), out, *FLAGS)
    assert 0 not in {row["source_annotation_id"] for row in read(out)["annotations"]}
    assert "boxes of zero width or height (1): annotation 0" in capsys.readouterr().out


def test_annotations_without_id(large, out):
    def change(data):
        for row in data["annotations"]:
            del row["id"]

    rewrite(split_of(large), change)
    main(*split_of(large), out, *FLAGS)
    rows = read(out)["annotations"]
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["source_annotation_id"] for row in rows} == {None}


@pytest.mark.parametrize(
    "flags",
    [("--tile", 0), ("--tile-overlap", 1), ("--min-visible", 0), ("--keep-empty-tiles", 1.1)],
)
def test_flags_out_of_range(large, out, flags):
    with pytest.raises(UserError, match=f"argument {flags[0]}"):
        main(*split_of(large), out, *FLAGS, *flags)


def test_error_in_writing_is_raised(large, out, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        main(*split_of(large), out, *FLAGS)
    assert not split_of(out).annotations.exists()


@pytest.mark.slow
def test_command_line(large, out, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    assert (
        "python datasets/tile.py val.json val_images my_tiles --split val"
        in capsys.readouterr().out
    )
    done = run(
        sys.executable, ROOT / "datasets/tile.py", *split_of(large), out, *FLAGS, cwd=tmp_path
    )
    assert done.returncode == 0
    assert len(read(out)["images"]) == 6
    done = run(
        sys.executable, ROOT / "datasets/tile.py", *split_of(large), out, *FLAGS, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tile.py: error: ")
