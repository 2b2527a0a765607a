import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run, train, write_part
from PIL import Image
from pycocotools.coco import COCO

import models
import predict
from internals import mixed_precision
from internals.errors import UserError
from reporting import drawing


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `data` as `tiny` and the `out` of a short training on it."""
    root = tmp_path_factory.mktemp("trained")
    sizes = [(64, 48), (48, 64)] * 4
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30], [2, 0, 0, 12, 16]]] * 4
    write_part(root / "data", "train", sizes, boxes)
    write_part(root / "data", "val", sizes[:3], boxes[:3])
    done = train("--data-path", root / "data", "--output-dir", root / "out", "--no-report")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def model(trained) -> str:
    return str(trained / "out/model_best.pth")


def detect(*arguments) -> None:
    predict.main([str(part) for part in arguments])


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script as from a command line, in this process: its exit code, output, errors."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            predict.run_and_exit()
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return command


def detections(folder: Path) -> dict[tuple, tuple]:
    """Box and score by image, category and rank."""
    rows, seen, found = json.loads((folder / "detections.json").read_text()), {}, {}
    for row in sorted(rows, key=lambda row: -row["score"]):
        key = (row["image_id"], row["category_id"])
        seen[key] = seen.get(key, 0) + 1
        found[(*key, seen[key])] = (*row["bbox"], row["score"])
    return found


def pictures_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def picture(file: Path, width: int = 64, height: int = 48, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


# ------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("size", [1, 3])
def test_boxes_are_those_of_the_training_s_own_evaluation(trained, model, tmp_path, size):
    data = trained / "data"
    truth = data / "annotations/instances_val2017.json"
    detect(model, data / "val2017", "--output-dir", tmp_path / "x", "--score-threshold", 0,
           "--show-truth", truth, "--batch-size", size)  # fmt: skip
    expected, found = detections(trained / "out"), detections(tmp_path / "x")
    assert len(expected) > 100
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-3 if size > 1 else 0)


def test_the_threshold_leaves_out_lower_scores_and_nothing_else(trained, model, tmp_path, capsys):
    detect(model, trained / "data/val2017", "--output-dir", tmp_path / "all",
           "--score-threshold", 0)  # fmt: skip
    every = json.loads((tmp_path / "all/detections.json").read_text())
    middle = float(np.median([row["score"] for row in every]))
    detect(model, trained / "data/val2017", "--output-dir", tmp_path / "some",
           "--score-threshold", middle)  # fmt: skip
    some = json.loads((tmp_path / "some/detections.json").read_text())
    assert some == [row for row in every if row["score"] >= middle]
    assert 0 < len(some) < len(every)
    assert f"3 pictures, {len(some)} boxes (" in capsys.readouterr().out


def test_pictures_are_numbered_and_images_json_says_which_is_which(trained, model, tmp_path):
    detect(model, trained / "data/val2017", "--output-dir", tmp_path / "x",
           "--score-threshold", 0)  # fmt: skip
    truth = COCO(tmp_path / "x/images.json")
    assert {i: image["file_name"] for i, image in truth.imgs.items()} == {
        1: "0.png", 2: "1.png", 3: "2.png",
    }  # fmt: skip
    assert (truth.imgs[2]["width"], truth.imgs[2]["height"]) == (48, 64)
    results = truth.loadRes(str(tmp_path / "x/detections.json"))
    assert set(results.getCatIds()) == {2, 5}
    assert {row["category_id"] for row in results.anns.values()} <= {2, 5}


def test_csv_has_a_line_for_each_box(trained, model, tmp_path):
    for form in ("coco", "csv"):
        detect(model, trained / "data/val2017", "--output-dir", tmp_path / form,
               "--score-threshold", 0, "--format", form)  # fmt: skip
    with (tmp_path / "csv/detections.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = json.loads((tmp_path / "coco/detections.json").read_text())
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["file_name"] == f"{row['image_id'] - 1}.png"
        assert int(line["category_id"]) == row["category_id"]
        assert line["category"] == {2: "cat", 5: "dog"}[row["category_id"]]
        box = [float(line[key]) for key in ("x", "y", "width", "height")]
        assert box == pytest.approx(row["bbox"], rel=1e-6)
        assert float(line["score"]) == pytest.approx(row["score"], rel=1e-6)


def test_yolo_has_a_file_for_each_picture_with_shares_of_its_size(trained, model, tmp_path):
    for form in ("coco", "yolo"):
        detect(model, trained / "data/val2017", "--output-dir", tmp_path / form,
               "--score-threshold", 0, "--format", form)  # fmt: skip
    assert (tmp_path / "yolo/classes.txt").read_text() == "cat\ndog\n"
    rows = json.loads((tmp_path / "coco/detections.json").read_text())
    for n, (width, height) in enumerate([(64, 48), (48, 64), (64, 48)]):
        lines = (tmp_path / f"yolo/labels/{n}.txt").read_text().splitlines()
        expected = [row for row in rows if row["image_id"] == n + 1]
        assert len(lines) == len(expected) > 0
        for line, row in zip(lines, expected, strict=True):
            x, y, w, h = row["bbox"]
            numbers = [float(number) for number in line.split()]
            assert numbers == pytest.approx(
                [
                    {2: 0, 5: 1}[row["category_id"]],
                    *((x + w / 2) / width, (y + h / 2) / height, w / width, h / height),
                    row["score"],
                ],
                abs=1e-6,
            )


def test_a_picture_without_boxes_has_an_empty_file(model, tmp_path, capsys):
    picture(tmp_path / "in/a.png")
    detect(model, tmp_path / "in", "--output-dir", tmp_path / "x", "--score-threshold", 1,
           "--format", "yolo")  # fmt: skip
    assert (tmp_path / "x/labels/a.txt").read_text() == ""
    assert "1 picture, 0 boxes: " in capsys.readouterr().out
    detect(model, tmp_path / "in", "--output-dir", tmp_path / "y", "--score-threshold", 1)
    assert json.loads((tmp_path / "y/detections.json").read_text()) == []


def test_amp_runs_in_the_precision_that_it_names(trained, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixed_precision, "_cpu_has_bfloat16", lambda: True)
    seen = []
    autocast = predict.autocast
    monkeypatch.setattr(predict, "autocast", lambda *a: seen.append(a[1]) or autocast(*a))
    detect(model, trained / "data/val2017/0.png", "--output-dir", tmp_path / "x", "--amp")
    assert seen == [torch.bfloat16]
    assert "mixed, bfloat16" in capsys.readouterr().out


def test_torchvision_s_own_weights_by_name(trained, tmp_path, monkeypatch):
    asked = []

    def pretrained(name, weights):
        asked.append((name, weights))
        torch.manual_seed(0)
        made = models.build_model(name, 91, pretrained=None, min_sizes=(64,), max_size=107)
        return made.eval(), [{"id": 17, "name": "cat", "label": 17}]

    monkeypatch.setattr(models, "pretrained", pretrained)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    detect("COCO_V1", trained / "data/val2017/0.png", "--model", name, "--score-threshold", 0,
           "--output-dir", tmp_path / "x")  # fmt: skip
    assert asked == [(name, "COCO_V1")]
    rows = json.loads((tmp_path / "x/detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {17}


# --------------------------------------------------------------------------- files and names


def test_equal_names_in_two_folders_stay_apart(model, tmp_path):
    for n, name in enumerate(("day1/a.png", "day2/a.png", "day2/a.bmp", "day2/deep/A.png")):
        picture(tmp_path / name, 64 + 8 * n)
    detect(model, tmp_path / "day1", tmp_path / "day2", "--output-dir", tmp_path / "x")
    images = json.loads((tmp_path / "x/images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [
        "day1/a.png", "day2/a.bmp", "day2/a.png", "day2/deep/A.png",
    ]  # fmt: skip
    drawn = ["day1/a.jpg", "day2/a-2.jpg", "day2/a.jpg", "day2/deep/A.jpg"]
    assert pictures_of(tmp_path / "x/pictures") == drawn
    widths = {name: Image.open(tmp_path / "x/pictures" / name).width for name in drawn}
    assert widths == {
        "day1/a.jpg": 64 * 8, "day2/a.jpg": 80 * 6, "day2/a-2.jpg": 72 * 7,
        "day2/deep/A.jpg": 88 * 6,
    }  # fmt: skip


def test_names_that_differ_in_capitals_alone_stay_apart():
    taken = set()
    stems = [predict.unused(stem, taken) for stem in ("a", "A", "a-2", "b", "a")]
    assert stems == ["a", "A-2", "a-2-2", "b", "a-3"]


def test_files_folders_and_patterns_each_picture_once(model, tmp_path, monkeypatch):
    for name in ("in/b [1].png", "in/a b.jpg", "in/c1.png", "in/c2.png", "in/deep/d.gif"):
        picture(tmp_path / name)
    (tmp_path / "in/notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)

    def names(*arguments):
        return [(p.file_name, p.image_id) for p in predict.find_pictures(list(arguments))]

    assert names("in/b [1].png") == [("b [1].png", 1)]  # a file, not a pattern
    assert names("in/c?.png", "in/c1.png") == [("c1.png", 1), ("c2.png", 2)]
    assert names("in/[ab]*") == [("a b.jpg", 1), ("b [1].png", 2)]
    assert names("in/**/*.gif") == [("d.gif", 1)]
    everything = ["a b.jpg", "b [1].png", "c1.png", "c2.png", "deep/d.gif"]
    assert [name for name, _ in names("in", "in/c2.png")] == everything
    detect(model, "in", "--output-dir", "x y/[out]")
    assert len(pictures_of(tmp_path / "x y/[out]/pictures")) == 5


def test_drawn_pictures_show_the_boxes(model, trained, tmp_path):
    source = trained / "data/val2017/0.png"
    for name, threshold in (("none", 1), ("all", 0)):
        detect(model, source, "--output-dir", tmp_path / name, "--score-threshold", threshold)
    plain, boxes = (
        np.asarray(Image.open(tmp_path / name / "pictures/0.jpg")).astype(int)
        for name in ("none", "all")
    )
    assert plain.shape == boxes.shape == (8 * 48, 8 * 64, 3)
    assert (np.abs(plain - boxes).max(axis=2) > 60).mean() > 0.05


def test_nothing_is_written_over(command, model, tmp_path):
    source = picture(tmp_path / "in/a.png")
    before = source.read_bytes()
    for folder in ("in", "."):
        code, _, errors = command(model, source, "--output-dir", tmp_path / folder)
        assert code == 2
        assert "is not empty, and nothing is written over" in errors
    assert source.read_bytes() == before
    assert pictures_of(tmp_path) == ["in/a.png"]


def test_a_phone_s_picture_is_seen_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", 64, 48, exif=exif)
    detect(model, tmp_path / "a.jpg", "--output-dir", tmp_path / "x")
    image = json.loads((tmp_path / "x/images.json").read_text())["images"][0]
    assert (image["width"], image["height"]) == (48, 64)


def test_bad_pictures_are_named_and_the_rest_goes_on(command, model, tmp_path):
    picture(tmp_path / "in/good.png")
    picture(tmp_path / "in/narrow.png", 2000, 2)
    (tmp_path / "in/broken.jpg").write_bytes(b"no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "in/huge.png")
    code, output, errors = command(model, tmp_path / "in", "--output-dir", tmp_path / "x")
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 4
    for line, words in zip(
        lines,
        ("broken.jpg cannot be read", "huge.png: 10000 x 10000 pixels", "narrow.png: 2000 x 2",
         "error: 3 of 4 pictures could not be used"),
        strict=True,
    ):  # fmt: skip
        assert words in line
    assert "1 picture, " in output
    images = json.loads((tmp_path / "x/images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["good.png"]
    assert pictures_of(tmp_path / "x/pictures") == ["good.jpg"]


def test_nothing_but_bad_pictures_leaves_empty_results(command, model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    code, _, errors = command(model, tmp_path / "a.png", "--output-dir", tmp_path / "x")
    assert code == 2
    assert "1 of 1 pictures could not be used" in errors
    assert json.loads((tmp_path / "x/detections.json").read_text()) == []


# ------------------------------------------------------------------------------------- truth


def test_truth_is_drawn_on_the_left_and_the_unlisted_are_named(command, trained, model, tmp_path):
    data = trained / "data"
    stray = picture(tmp_path / "stray.png")
    truth = data / "annotations/instances_val2017.json"
    code, output, errors = command(
        model, data / "val2017", stray, "--show-truth", truth,
        "--output-dir", tmp_path / "x", "--score-threshold", 1,
    )  # fmt: skip
    assert code == 0, errors
    assert f"drawn without truth, as {truth} does not list them: " in output
    drawn = {p.name: p for p in (tmp_path / "x/pictures").rglob("*.jpg")}
    assert Image.open(drawn["stray.jpg"]).width == 512
    both = np.asarray(Image.open(drawn["0.jpg"])).astype(int)
    assert both.shape[1] > 2 * 512
    assert both.shape[0] > 384  # the captions
    left, right = both[-384:, :512], both[-384:, -512:]
    differ = np.abs(left - right).max(axis=2) > 60
    assert differ[4 * 8 + 1, 4 * 8 : 34 * 8].mean() > 0.9  # the upper side of the true box
    assert differ[24 * 8 + 20 :].mean() == 0  # nothing is below it
    images = json.loads((tmp_path / "x/images.json").read_text())["images"]
    assert {image["id"] for image in images} == {100, 101, 102, 103}


def test_truth_is_found_by_the_end_of_the_path(trained, tmp_path):
    data = trained / "data"
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    for name, row in zip(("day1/0.png", "0.png", "./sub/2.png"), content["images"], strict=True):
        row["file_name"] = name
        picture(tmp_path / "in" / name, row["width"], row["height"])
    (tmp_path / "truth.json").write_text(json.dumps(content))
    index = predict.coco_utils.CocoIndex(
        predict.coco_utils.Split(tmp_path / "truth.json", tmp_path)
    )
    found = predict.find_pictures([str(tmp_path / "in")])
    predict.find_truth(found, index)
    assert {p.path.relative_to(tmp_path / "in").as_posix(): p.image_id for p in found} == {
        "day1/0.png": 100, "0.png": 101, "sub/2.png": 102,
    }  # fmt: skip
    picture(tmp_path / "in/day3/0.png")
    with pytest.raises(UserError, match=r"lists 0.png once \(id 101\)"):
        predict.find_truth(predict.find_pictures([str(tmp_path / "in")]), index)
    others = predict.find_pictures([str(picture(tmp_path / "else.png"))])
    with pytest.raises(UserError, match="lists none of the pictures"):
        predict.find_truth(others, index)


def test_the_annotation_file_s_size_decides(command, trained, model, tmp_path):
    content = json.loads((trained / "data/annotations/instances_val2017.json").read_text())
    content["images"][0]["width"] = 65
    (tmp_path / "truth.json").write_text(json.dumps(content))
    code, _, errors = command(
        model, trained / "data/val2017", "--show-truth", tmp_path / "truth.json",
        "--output-dir", tmp_path / "x",
    )  # fmt: skip
    assert code == 2
    assert "0.png is 64 x 48 pixels, its annotation file says 65 x 48" in errors


# ------------------------------------------------------------------------------ what is wrong


def test_mistakes_end_with_one_message_before_anything_is_written(
    command, model, trained, tmp_path
):
    image = trained / "data/val2017/0.png"
    truth = tmp_path / "truth.json"
    content = json.loads((trained / "data/annotations/instances_val2017.json").read_text())
    content["categories"][0]["name"] = "horse"
    truth.write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    out = ("--output-dir", tmp_path / "x")
    for arguments, message in (
        ((model, image), "required: --output-dir"),
        ((model, tmp_path / "no.png", *out), "no.png: no such file or folder"),
        ((model, tmp_path / "*.gif", *out), "*.gif: no file has a name like this"),
        ((model, tmp_path / "empty", *out), "there is no picture in the folder"),
        ((tmp_path / "no.pth", image, *out), "no.pth: no such file. For torchvision's own"),
        ((trained / "out", image, *out), "is a folder: give a checkpoint in it"),
        ((image, image, *out), "0.png cannot be read: it is not a file of torch.save"),
        ((model, image, *out, "--model", models.MODELS[0]), "--model is for torchvision's weights"),
        (("X", image, *out, "--model", models.MODELS[0]), "unknown weights 'X': choose from"),
        ((model, image, *out, "--score-threshold", 2), "2 is not between 0 and 1"),
        ((model, image, *out, "--batch-size", 0), "0 is below 1"),
        ((model, image, *out, "--device", "gpu"), "--device gpu: use cuda, cuda:N or cpu"),
        ((model, image, *out, "--device", "cuda"), "there are 0 CUDA devices"),
        ((model, image, *out, "--show-truth", truth), "category 2 ('horse') does not fit"),
        ((model, image, *out, "--format", "xml"), "invalid choice: 'xml'"),
    ):
        code, _, errors = command(*arguments)
        assert code == 2
        assert errors.startswith("predict.py: error: ")
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "x").exists()


def test_the_script_runs_from_any_folder_and_ends_with_its_own_code(tmp_path):
    script = ROOT / "predict.py"
    done = run(sys.executable, script, "x.pth", "no.png", "--output-dir", "y", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "predict.py: error: no.png: no such file or folder\n"


def test_help_is_complete(command):
    code, output, _ = command("--help")
    assert code == 0
    for words in ("CHECKPOINT", "--show-truth FILE", "images.json", "Exit codes"):
        assert words in output


def test_an_interrupted_run_keeps_what_it_has(model, trained, tmp_path, monkeypatch):
    detector = predict.Detector.__call__
    calls = []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return detector(self, batch)

    monkeypatch.setattr(predict.Detector, "__call__", interrupted)
    monkeypatch.setattr(predict.os, "cpu_count", lambda: 0)
    with pytest.raises(predict.Interrupted, match=r"interrupted after \d of 3 pictures"):
        detect(model, trained / "data/val2017", "--output-dir", tmp_path / "x")
    assert (tmp_path / "x/detections.json").exists()


# ----------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(("width", "height"), [(100, 80), (1, 1), (3000, 30), (640, 480)])
def test_any_size_can_be_drawn_on(width, height):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[-5.0, -5, width + 9, height + 9], [0, 0, 0.2, 0.2], [0, 0, 0, 0]])
    drawn = drawing.draw_boxes(image, boxes, ["a box", "", "g"], [drawing.colour(0)] * 3)
    factor = max(1, -(-480 // max(width, height)))
    assert drawn.shape == (3, factor * height, factor * width)
    assert drawn.dtype == torch.uint8
    assert not image.any()
    assert drawn.any()
    assert drawing.draw_boxes(image, boxes[:0], [], []).shape == drawn.shape


def test_touching_boxes_of_one_colour_have_a_dark_line_between_them():
    image = torch.full((3, 480, 480), 128, dtype=torch.uint8)
    boxes = torch.tensor([[100.0, 100, 200, 200], [200, 100, 300, 200]])
    drawn = drawing.draw_boxes(image, boxes, ["", ""], [(250, 0, 0)] * 2)
    across = drawn[0, 150, 190:210].tolist()
    assert across.count(250) >= 3
    begin, end = across.index(250), len(across) - across[::-1].index(250)
    assert min(across[begin:end]) < 30


def test_texts_do_not_hide_each_other_where_there_is_room():
    image = torch.zeros(3, 480, 480, dtype=torch.uint8)
    boxes = torch.tensor([[50.0, 50, 300, 300], [52, 50, 300, 300]])
    shades = [(250, 0, 0), (0, 0, 250)]
    both = drawing.draw_boxes(image, boxes, ["some text"] * 2, shades)
    for n, channel in ((0, 0), (1, 2)):
        one = slice(n, n + 1)
        alone = drawing.draw_boxes(image, boxes[one], ["some text"], shades[one])
        # The ground of the text, above the boxes, where their frames do not count.
        grounds = [(d[channel, :46] == 250) & (d[2 - channel, :46] == 0) for d in (both, alone)]
        assert grounds[0].sum() == grounds[1].sum() > 300


def test_neighbouring_colours_differ():
    shades = np.array([drawing.colour(n) for n in range(30)])
    assert np.abs(np.diff(shades, axis=0)).sum(axis=1).min() > 150
    assert len({tuple(shade) for shade in shades}) == 30
