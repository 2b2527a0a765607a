import csv
import json
import shutil
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import ROOT, run, run_script, train, train_in_process, write_split, write_video
from PIL import Image
from pycocotools.coco import COCO

import coco_eval
import detector
import models
import predict
from coco_utils import Categories
from internals import images, mixed_precision
from internals.errors import RunError, UserError
from internals.failures import run_command
from internals.video import VideoReader


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train shortly; return the folder of `data` and `out`."""
    root = tmp_path_factory.mktemp("trained")
    sizes = [(64, 48), (48, 64)] * 4
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30], [2, 0, 0, 12, 16]]] * 4
    write_split(root / "data", "train", sizes, boxes)
    write_split(root / "data", "val", sizes[:3], boxes[:3])
    done = train("--data-path", root / "data", "--output-dir", root / "out", "--no-report")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def model(trained) -> Path:
    return trained / "out/model_best.pth"


@pytest.fixture
def val(trained) -> Path:
    return trained / "data/val2017"


@pytest.fixture
def annotations(trained) -> Path:
    return trained / "data/annotations/instances_val2017.json"


def detect(*arguments) -> None:
    predict.main([str(part) for part in arguments])


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the script and returns its exit code, output and errors."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_command(predict.main)
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return command


def read(file: Path):
    return json.loads(file.read_text())


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def write_image(file: Path, width: int = 64, height: int = 48, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


# -------------------------------------------------------------------------------- detections


@pytest.mark.parametrize("batch_size", [1, 3])
def test_detections_equal_evaluation_in_training(
    trained, model, val, annotations, tmp_path, batch_size
):
    def ranked(rows: list[dict]) -> dict[tuple, tuple]:
        counts, ranks = {}, {}
        for row in sorted(rows, key=lambda row: -row["score"]):
            key = (row["image_id"], row["category_id"])
            counts[key] = counts.get(key, 0) + 1
            ranks[(*key, counts[key])] = (*row["bbox"], row["score"])
        return ranks

    detect(model, val, "--output-dir", tmp_path / "x", "--score-threshold", 0,
           "--show-truth", annotations, "--batch-size", batch_size)  # fmt: skip
    expected = ranked(read(trained / "out/detections.json"))
    actual = ranked(read(tmp_path / "x/detections.json"))
    assert len(expected) > 100
    assert expected.keys() == actual.keys()
    for key, values in expected.items():
        assert actual[key] == pytest.approx(values, abs=1e-3 if batch_size > 1 else 0)


def test_score_threshold(model, val, tmp_path, capsys):
    detect(model, val, "--output-dir", tmp_path / "all", "--score-threshold", 0)
    all_rows = read(tmp_path / "all/detections.json")
    median = float(np.median([row["score"] for row in all_rows]))
    detect(model, val, "--output-dir", tmp_path / "some", "--score-threshold", median)
    rows = read(tmp_path / "some/detections.json")
    assert rows == [row for row in all_rows if row["score"] >= median]
    assert 0 < len(rows) < len(all_rows)
    assert f"images: 3; detections: {len(rows)} (" in capsys.readouterr().out


def with_thresholds(model: Path, folder: Path, thresholds) -> Path:
    state = torch.load(model, weights_only=True)
    file = folder / "thresholds.pth"
    torch.save({**state, "score_thresholds": thresholds}, file)
    return file


def test_score_thresholds_of_the_checkpoint(model, val, tmp_path, capsys):
    detect(model, val, "--output-dir", tmp_path / "all", "--score-threshold", 0)
    all_rows = read(tmp_path / "all/detections.json")
    low, high = np.quantile([row["score"] for row in all_rows], [0.3, 0.8]).tolist()
    file = with_thresholds(model, tmp_path, {"overall": low, "per_category": {5: high}})
    for name, by_category in (("best", {2: low, 5: low}), ("best-per-category", {2: low, 5: high})):
        detect(file, val, "--output-dir", tmp_path / name, "--score-threshold", name)
        rows = read(tmp_path / name / "detections.json")
        kept = [row for row in all_rows if row["score"] >= by_category[row["category_id"]]]
        assert rows == kept
        assert 0 < len(rows) < len(all_rows)
    printed = capsys.readouterr().out
    assert f"score threshold: {low:.3f}, with the best F1 on the validation images" in printed
    assert f"validation images: dog {high:.3f}; others {low:.3f}" in printed


def test_checkpoint_without_score_thresholds_is_an_error(model, val, tmp_path):
    out = ("--output-dir", tmp_path / "out")
    with pytest.raises(UserError, match=r"thresholds.pth has no threshold. .* give a number"):
        detect(with_thresholds(model, tmp_path, None), val, *out, "--score-threshold", "best")
    assert not (tmp_path / "out").exists()


def test_max_detections(model, val, tmp_path):
    flags = ("--score-threshold", 0)
    detect(model, val, "--output-dir", tmp_path / "all", *flags)
    detect(model, val, "--output-dir", tmp_path / "some", *flags, "--max-detections", 3)
    rows = read(tmp_path / "all/detections.json")
    best = [r for i in (1, 2, 3) for r in [row for row in rows if row["image_id"] == i][:3]]
    assert read(tmp_path / "some/detections.json") == best


def test_formats_agree(model, val, tmp_path):
    for name in ("coco", "csv", "yolo"):
        detect(model, val, "--output-dir", tmp_path / name, "--score-threshold", 0,
               "--format", name)  # fmt: skip
    coco = COCO(tmp_path / "coco/images.json")
    assert {i: (image["file_name"], image["width"]) for i, image in coco.imgs.items()} == {
        1: ("0.png", 64), 2: ("1.png", 48), 3: ("2.png", 64),
    }  # fmt: skip
    results = coco.loadRes(str(tmp_path / "coco/detections.json"))
    names = {row["id"]: row["name"] for row in results.cats.values()}
    assert names == {2: "cat", 5: "dog"}
    rows = read(tmp_path / "coco/detections.json")
    assert {row["category_id"] for row in rows} == {2, 5}

    with (tmp_path / "csv/detections.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        assert line["file_name"] == coco.imgs[row["image_id"]]["file_name"]
        assert (int(line["category_id"]), line["category"]) == (
            row["category_id"],
            names[row["category_id"]],
        )
        numbers = [float(line[key]) for key in ("x", "y", "width", "height", "score")]
        assert numbers == pytest.approx([*row["bbox"], row["score"]], rel=1e-6)

    assert (tmp_path / "yolo/classes.txt").read_text() == "cat\ndog\n"
    for i, image in coco.imgs.items():
        text = (tmp_path / f"yolo/labels/{Path(image['file_name']).stem}.txt").read_text()
        expected = [row for row in rows if row["image_id"] == i]
        assert text.count("\n") == len(expected) > 0
        for line, row in zip(text.splitlines(), expected, strict=True):
            x, y, w, h = row["bbox"]
            width, height = image["width"], image["height"]
            box = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            label = {2: 0, 5: 1}[row["category_id"]]
            numbers = [float(number) for number in line.split()]
            assert numbers == pytest.approx([label, *box, row["score"]], abs=1e-6)


@pytest.fixture
def annotated(model, val, tmp_path) -> Path:
    """Detect with --format coco-dataset; return the annotation file."""
    detect(model, val, "--output-dir", tmp_path / "found", "--score-threshold", 0.05,
           "--format", "coco-dataset")  # fmt: skip
    return tmp_path / "found/annotations.json"


def test_coco_dataset_has_the_detections_as_annotations(model, val, annotated, tmp_path):
    detect(model, val, "--output-dir", tmp_path / "coco", "--score-threshold", 0.05)
    coco, rows = COCO(annotated), read(tmp_path / "coco/detections.json")
    assert len(rows) == len(coco.anns) > 20
    for row, annotation in zip(rows, coco.anns.values(), strict=True):
        assert {key: annotation[key] for key in row} == row
        assert annotation["area"] == row["bbox"][2] * row["bbox"][3]
        assert (annotation["iscrowd"], annotation["segmentation"]) == (0, [])
    assert list(coco.anns) == list(range(1, 1 + len(rows)))
    assert {i: row["name"] for i, row in coco.cats.items()} == {2: "cat", 5: "dog"}
    assert [row["file_name"] for row in coco.imgs.values()] == ["0.png", "1.png", "2.png"]


def test_coco_dataset_trains(annotated, val, tmp_path):
    """Predict, correct, split, retrain: the loop of docs/fine-tuning.md."""
    paths = (annotated, val, tmp_path / "corrected")
    done = run_script(ROOT / "datasets/split.py", *paths, "--val-share", 0.4)
    assert done.returncode == 0, done.stderr
    assert "data check passed" in train_in_process(
        "--data-path", tmp_path / "corrected", "--check-data"
    )
    flags = ("--data-path", tmp_path / "corrected", "--output-dir", tmp_path / "again")
    assert "AP" in train_in_process(*flags, "--batch-size", 1)


def test_coco_dataset_reads_in_datumaro(annotated, val, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    folder = tmp_path / "datumaro"
    (folder / "annotations").mkdir(parents=True)
    shutil.copy(annotated, folder / "annotations/instances_train.json")
    shutil.copytree(val, folder / "images/train")
    items = list(datumaro.Dataset.import_from(str(folder), "coco_instances"))
    boxes = [box for item in items for box in item.annotations]
    assert len(items) == 3
    assert len(boxes) == len(read(annotated)["annotations"])


def test_voc_is_read_back(model, val, annotated, tmp_path):
    out = tmp_path / "voc"
    detect(model, val, "--output-dir", out, "--score-threshold", 0.05, "--format", "voc")
    assert files_in(out / "Annotations") == ["0.xml", "1.xml", "2.xml"]
    shutil.copytree(val, out / "JPEGImages")
    done = run_script(ROOT / "datasets/voc_to_coco.py", out, tmp_path / "back")
    assert done.returncode == 0, done.stderr
    back = COCO(tmp_path / "back/annotations/instances_train2017.json")
    expected = COCO(annotated)
    names = {row["id"]: row["name"] for row in back.cats.values()}
    assert [names[row["category_id"]] for row in back.anns.values()] == [
        {2: "cat", 5: "dog"}[row["category_id"]] for row in expected.anns.values()
    ]
    for row, before in zip(back.anns.values(), expected.anns.values(), strict=True):
        np.testing.assert_allclose(row["bbox"], before["bbox"], atol=1.01)


def test_names_are_one_line_in_every_format(trained, model, val, tmp_path, capsys):
    """Annotation files for programs keep the names as they are."""
    saved = torch.load(model, weights_only=True)
    for row, name in zip(saved["categories"], ("斑\n马", "d\u2028ög"), strict=True):
        row["name"] = name
    torch.save(saved, tmp_path / "names.pth")
    for name in predict.WRITERS:
        detect(tmp_path / "names.pth", val / "1.png", "--output-dir", tmp_path / name,
               "--score-threshold", 0, "--format", name)  # fmt: skip
        assert capsys.readouterr().out.count("\n") == 3
    classes = (tmp_path / "yolo/classes.txt").read_text(encoding="utf-8")
    assert classes == "斑 马\nd ög\n"
    lines = (tmp_path / "csv/detections.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(read(tmp_path / "coco/detections.json"))
    assert {line.split(",")[2] for line in lines[1:]} == {"斑 马", "d ög"}
    for file in ("coco/images.json", "coco-dataset/annotations.json"):
        names = [row["name"] for row in read(tmp_path / file)["categories"]]
        assert names == ["斑\n马", "d\u2028ög"]
    root = ElementTree.parse(tmp_path / "voc/Annotations/1.xml")
    assert {element.text for element in root.iter("name")} == {"斑 马", "d ög"}


def test_huge_category_ids_in_csv(model, val, tmp_path):
    saved = torch.load(model, weights_only=True)
    ids = (33_554_433, 2**53 - 1)
    for row, number in zip(saved["categories"], ids, strict=True):
        row["id"] = number
    torch.save(saved, tmp_path / "ids.pth")
    flags = ("--score-threshold", 0, "--format", "csv", "--no-pictures", "--tile", 40)
    detect(tmp_path / "ids.pth", val / "1.png", "--output-dir", tmp_path / "x", *flags)
    with (tmp_path / "x/detections.csv").open(newline="") as file:
        found = {(int(line["category_id"]), line["category"]) for line in csv.DictReader(file)}
    assert found == {(ids[0], "cat"), (ids[1], "dog")}


def test_no_detections_give_empty_files(model, val, tmp_path, capsys):
    for name in predict.WRITERS:
        detect(model, val / "0.png", "--output-dir", tmp_path / name, "--score-threshold", 1,
               "--format", name)  # fmt: skip
        assert "images: 1; detections: 0; " in capsys.readouterr().out
    assert read(tmp_path / "coco/detections.json") == []
    assert (tmp_path / "yolo/labels/0.txt").read_text() == ""
    assert read(tmp_path / "coco-dataset/annotations.json")["annotations"] == []
    assert not list(ElementTree.parse(tmp_path / "voc/Annotations/0.xml").iter("object"))


def test_amp_precision_is_logged(model, val, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixed_precision, "_cpu_has_bfloat16", lambda: True)
    used, autocast = [], detector.autocast
    monkeypatch.setattr(detector, "autocast", lambda *a: used.append(a[1]) or autocast(*a))
    detect(model, val / "0.png", "--output-dir", tmp_path / "x", "--amp")
    assert used == [torch.bfloat16]
    assert "mixed, bfloat16" in capsys.readouterr().out


def test_command_finds_what_the_api_finds(model, val, tmp_path):
    settings = {"score_threshold": 0.06, "nms_threshold": 0.3, "class_agnostic_nms": True,
                "tile": 40, "tile_overlap": 0.3, "max_detections": 7}  # fmt: skip
    flags = ("--score-threshold", 0.06, "--nms-threshold", 0.3, "--class-agnostic-nms",
             "--tile", 40, "--tile-overlap", 0.3, "--max-detections", 7)  # fmt: skip
    detect(model, val, "--output-dir", tmp_path / "x", *flags)
    found = predict.Detector.load(model, **settings)(sorted(val.glob("*.png")))
    rows = np.concatenate([each.to_rows(i) for i, each in enumerate(found, start=1)])
    assert read(tmp_path / "x/detections.json") == coco_eval.coco_results(rows)
    assert len(rows) == 21
    detect(model, val, "--output-dir", tmp_path / "whole", *flags[:5])
    assert read(tmp_path / "whole/detections.json") != read(tmp_path / "x/detections.json")


def test_images_of_several_sizes_are_in_the_order_given(model, tmp_path):
    """With batches, images of one size overtake others."""
    names = [f"{n}.png" for n in range(9)]
    for n, name in enumerate(names):
        write_image(tmp_path / "in" / name, *((64, 48), (48, 64), (56, 56))[n % 3])
    for size in (1, 4):
        detect(model, tmp_path / "in", "--output-dir", tmp_path / f"{size}", "--batch-size", size)
        images = read(tmp_path / f"{size}/images.json")["images"]
        assert [(row["id"], row["file_name"]) for row in images] == list(enumerate(names, 1))
        assert [row["width"] for row in images] == [64, 48, 56] * 3


def test_no_pictures(model, val, tmp_path, capsys):
    detect(model, val, "--output-dir", tmp_path / "x", "--no-pictures")
    assert files_in(tmp_path / "x") == ["detections.json", "images.json"]
    output = capsys.readouterr().out
    assert output.endswith(f"output: {tmp_path / 'x/detections.json'}\n")


def test_benchmark_writes_nothing(model, val, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detect(model, val, "--benchmark", "--batch-size", 2)
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].split() == ["median", "95", "%", "images/s"]
    for line, name in zip(lines[1:4], ("reading", "model, batch of 2", "drawing"), strict=True):
        median, _, high, _, rate = line.removeprefix(name).split()
        assert 0 < float(median) <= float(high)
        assert float(rate) > 0
    assert lines[4].startswith("all, overlapping ")
    assert list(tmp_path.iterdir()) == []


def test_benchmark_refuses_images_that_cannot_be_read(command, model, val, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    code, _, errors = command(model, val, tmp_path / "bad.png", "--benchmark")
    assert code == 2
    assert "bad.png cannot be read as an image: the file is empty. Remove it: --ben" in errors


def test_torchvision_weights_by_name(val, tmp_path, monkeypatch):
    calls = []
    labels = range(1, 91)
    ids = tuple(100 + label for label in labels)

    def torchvision_detector(name, weights):
        calls.append((name, weights))
        torch.manual_seed(0)
        model = models.build_model(name, 91, pretrained=None, min_sizes=(64,), max_size=107)
        model.roi_heads.score_thresh = 0.0  # the scores of random weights are low
        return model.eval(), Categories(ids, tuple(map(str, ids)), tuple(labels))

    monkeypatch.setattr(models, "torchvision_detector", torchvision_detector)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    detect("COCO_V1", val / "0.png", "--model", name, "--score-threshold", 0,
           "--output-dir", tmp_path / "x")  # fmt: skip
    assert calls == [(name, "COCO_V1")]
    category_ids = {row["category_id"] for row in read(tmp_path / "x/detections.json")}
    assert category_ids
    assert category_ids <= set(ids)


# ------------------------------------------------------------------------------ output files


def test_equal_file_names_do_not_collide(model, tmp_path):
    for n, name in enumerate(("day1/a.png", "day2/a.png", "day2/a.bmp", "day2/deep/A.png")):
        write_image(tmp_path / name, 64 + 8 * n)
    detect(model, tmp_path / "day1", tmp_path / "day2", "--output-dir", tmp_path / "x y/[out]")
    images = read(tmp_path / "x y/[out]/images.json")["images"]
    assert [image["file_name"] for image in images] == [
        "day1/a.png", "day2/a.bmp", "day2/a.png", "day2/deep/A.png",
    ]  # fmt: skip
    drawn = {
        name: Image.open(tmp_path / "x y/[out]/pictures" / name).width
        for name in files_in(tmp_path / "x y/[out]/pictures")
    }
    assert drawn == {  # small images are enlarged
        "day1/a.jpg": 64 * 8, "day2/a.jpg": 80 * 6, "day2/a-2.jpg": 72 * 7,
        "day2/deep/A.jpg": 88 * 6,
    }  # fmt: skip


def test_names_of_outputs_are_no_folders_and_not_too_long(model, tmp_path):
    names = ["x.png", "x.jpg/y.png", f"{'l' * 251}.png", f"{'l' * 251}.bmp"]
    files = [write_image(tmp_path / "in" / name) for name in names]
    for form in ("coco", "voc"):
        detect(model, *files, "--output-dir", tmp_path / form, "--format", form)
        drawn = files_in(tmp_path / form / "pictures")
        cut = "l" * 230
        assert drawn == [f"{cut}-2.jpg", f"{cut}.jpg", "x-2.jpg", "x.jpg/y.jpg"]
    assert len(files_in(tmp_path / "voc/Annotations")) == 4


def test_large_image_has_a_reduced_picture(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rasterio")
    monkeypatch.setattr(images, "MAX_PIXELS", 50 * 1000)
    monkeypatch.setattr(detector, "PICTURE_SIDE", 300)
    wide, narrow = (write_image(tmp_path / f"{n}.png", n, 60000 // n) for n in (600, 10_000))
    detect(model, wide, narrow, "--tile", 100, "--output-dir", tmp_path / "x")
    assert Image.open(tmp_path / "x/pictures/600.jpg").size == (600, 100)  # 300 x 50, enlarged
    assert files_in(tmp_path / "x/pictures") == ["600.jpg"]
    sizes = [(row["width"], row["height"]) for row in read(tmp_path / "x/images.json")["images"]]
    assert sizes == [(600, 100), (10_000, 6)]
    assert f"no picture of {narrow}: the whole image is too narrow" in capsys.readouterr().out


def test_boxes_are_drawn(model, val, tmp_path):
    for name, threshold in (("none", 1), ("all", 0)):
        detect(model, val / "0.png", "--output-dir", tmp_path / name,
               "--score-threshold", threshold)  # fmt: skip
    plain, boxes = (
        np.asarray(Image.open(tmp_path / name / "pictures/0.jpg")).astype(int)
        for name in ("none", "all")
    )
    assert plain.shape == boxes.shape == (8 * 48, 8 * 64, 3)
    assert (np.abs(plain - boxes).max(axis=2) > 60).mean() > 0.05


def test_existing_files_are_not_overwritten(command, model, tmp_path):
    source = write_image(tmp_path / "in/a.png")
    before = source.read_bytes()
    for folder in ("in", "."):
        code, _, errors = command(model, source, "--output-dir", tmp_path / folder)
        assert code == 2
        assert "is not empty, and files are never overwritten" in errors
    assert source.read_bytes() == before
    assert files_in(tmp_path) == ["in/a.png"]


def test_exif_orientation_is_applied(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    detect(model, write_image(tmp_path / "a.jpg", 64, 48, exif=exif),
           "--output-dir", tmp_path / "x")  # fmt: skip
    image = read(tmp_path / "x/images.json")["images"][0]
    assert (image["width"], image["height"]) == (48, 64)


def test_unusable_images_are_skipped(command, model, tmp_path):
    write_image(tmp_path / "in/good.png")
    write_image(tmp_path / "in/narrow.png", 2000, 2)
    write_image(tmp_path / "in/pixel.png", 1, 1)
    (tmp_path / "in/broken.jpg").write_bytes(b"no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "in/huge.png")
    code, output, errors = command(model, tmp_path / "in", "--output-dir", tmp_path / "x")
    assert code == 2
    for line, words in zip(
        errors.splitlines(),
        ("broken.jpg cannot be read", "huge.png: 10000 x 10000 pixels", "narrow.png: 2000 x 2",
         "error: 3 of 5 images could not be used"),
        strict=True,
    ):  # fmt: skip
        assert words in line
    assert "images: 2; " in output
    images = read(tmp_path / "x/images.json")["images"]
    assert [image["file_name"] for image in images] == ["good.png", "pixel.png"]
    assert files_in(tmp_path / "x/pictures") == ["good.jpg", "pixel.jpg"]


def test_results_without_usable_images(command, model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    code, _, errors = command(model, tmp_path / "a.png", "--output-dir", tmp_path / "x")
    assert code == 2
    assert "1 of 1 images could not be used" in errors
    assert read(tmp_path / "x/detections.json") == []


@pytest.mark.parametrize("source", ["KeyboardInterrupt", "SIGTERM"])
def test_interrupted_run_writes_what_was_found(model, val, tmp_path, monkeypatch, source):
    start, calls = predict.Detector._start, []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            if source == "SIGTERM":
                signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt
        return start(self, batch)

    monkeypatch.setattr(predict.Detector, "_start", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match=r"interrupted after \d of 3 images"):
        detect(model, val, "--output-dir", tmp_path / "x")
    drawn = [f"{row['id'] - 1}.jpg" for row in read(tmp_path / "x/images.json")["images"]]
    assert drawn == files_in(tmp_path / "x/pictures")
    assert signal.getsignal(signal.SIGTERM) is before


def test_failed_run_writes_what_was_found(command, model, val, tmp_path, monkeypatch):
    start, calls = predict.Detector._start, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate\ndetails")
        return start(self, batch)

    monkeypatch.setattr(predict.Detector, "_start", failing)
    code, output, errors = command(model, val, "--output-dir", tmp_path / "x")
    assert code == 1
    assert "output: " in output
    count = len(read(tmp_path / "x/images.json")["images"])
    assert f"out of memory after {count} of 3 images: lower --batch-size, or use --tile" in errors


# -------------------------------------------------------------------------------------- videos


@pytest.fixture
def film(model, val, tmp_path) -> tuple[Path, list[np.ndarray]]:
    """Write a lossless video of ten frames, 64 x 48, four a second."""
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    blurred = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(10)]
    frames = [np.asarray(Image.fromarray(pixels).resize((64, 48))) for pixels in blurred]
    return write_video(tmp_path / "film.mkv", frames, rate=4), frames


def test_video_has_the_detections_of_its_frames(model, film, tmp_path, capsys):
    file, frames = film
    for n, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{n}.png")
    images = [tmp_path / f"{n}.png" for n in range(10)]
    flags = ("--score-threshold", 0.05, "--output-dir")
    detect(model, *images, *flags, tmp_path / "images")
    capsys.readouterr()
    detect(model, file, *flags, tmp_path / "video")
    printed = capsys.readouterr().out
    rows = read(tmp_path / "video/detections.json")
    assert rows == read(tmp_path / "images/detections.json")
    assert f"frames: 10; detections: {len(rows)} (" in printed
    assert f"{tmp_path / 'video/detections.json'} and {tmp_path / 'video/videos'}/" in printed
    entries = read(tmp_path / "video/images.json")["images"]
    assert [(row["file_name"], row["frame"]) for row in entries] == [
        ("film.mkv", n) for n in range(10)
    ]
    np.testing.assert_allclose([row["time"] for row in entries], np.arange(10) / 4, atol=1e-3)


def test_written_video_has_the_frames_and_the_rate_of_the_input(model, film, tmp_path):
    file, _ = film
    detect(model, file, "--output-dir", tmp_path / "x", "--score-threshold", 1)
    with (
        VideoReader(str(file)) as before,
        VideoReader(str(tmp_path / "x/videos/film.mp4")) as after,
    ):
        assert (after.rate, after.width, after.height) == (before.rate, 512, 384)  # enlarged
        written, read_back = list(after), list(before)
    assert len(written) == len(read_back) == 10
    for there, here in zip(written, read_back, strict=True):
        assert there.time == pytest.approx(here.time, abs=1e-3)
        enlarged = np.asarray(Image.fromarray(here.pixels).resize((512, 384))).astype(int)
        assert np.abs(there.pixels - enlarged).mean() < 5  # lossy, and nothing drawn


def test_stream_is_read_to_its_end(model, film, tmp_path):
    """What has the form of an address is no file; FFmpeg reads addresses of files, too."""
    file, _ = film
    stream = f"file://{file}"
    detect(model, stream, "--every", 5, "--output-dir", tmp_path / "x")
    rows = read(tmp_path / "x/images.json")["images"]
    assert [(row["file_name"], row["frame"]) for row in rows] == [(stream, 0), (stream, 5)]
    with VideoReader(str(tmp_path / "x/videos/stream-1.mp4")) as written:
        assert len(list(written)) == 2


def test_videos_in_a_folder_are_noted(model, film, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    detect(model, tmp_path, "--output-dir", tmp_path / "x")
    expected = f"note: 1 videos in {tmp_path} are not used, name them one by one"
    assert expected in capsys.readouterr().out


def test_huge_step_through_a_video(model, film, tmp_path):
    file, _ = film
    detect(model, file, "--every", 10**9, "--output-dir", tmp_path / "x")
    with VideoReader(str(tmp_path / "x/videos/film.mp4")) as written:
        assert len(list(written)) == 1


def test_part_of_a_video(model, film, tmp_path):
    file, _ = film
    flags = ("--score-threshold", 0.05, "--every", 3, "--start", 0.6, "--end", "0:01.9")
    detect(model, file, *flags, "--output-dir", tmp_path / "x", "--format", "csv", "--no-pictures")
    assert files_in(tmp_path / "x") == ["detections.csv"]
    with (tmp_path / "x/detections.csv").open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    times = {(line["file_name"], int(line["frame"]), round(float(line["time"]), 2))
             for line in lines}  # fmt: skip
    assert times == {("film.mkv", 3, 0.75), ("film.mkv", 6, 1.5)}


def test_frames_for_annotation_are_saved(model, film, tmp_path):
    file, frames = film
    flags = ("--score-threshold", 0.05, "--every", 4, "--format", "coco-dataset", "--no-pictures")
    detect(model, file, *flags, "--output-dir", tmp_path / "x")
    content = read(tmp_path / "x/annotations.json")
    names = [f"film/00000{n}.jpg" for n in (0, 4, 8)]
    assert [row["file_name"] for row in content["images"]] == names
    assert [row["id"] for row in content["images"]] == [1, 2, 3]
    for name, n in zip(names, (0, 4, 8), strict=True):
        saved = np.asarray(Image.open(tmp_path / "x/frames" / name)).astype(int)
        assert np.abs(saved - frames[n]).mean() < 8


def test_cut_video_ends_with_what_there_was(command, model, film, tmp_path):
    file, _ = film
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "no.mp4").write_text("text")
    code, _, errors = command(model, tmp_path / "no.mp4", file, "--output-dir", tmp_path / "x")
    assert code == 2
    assert "skipped: " in errors
    assert "no.mp4 cannot be read as a video" in errors
    assert f"skipped: the rest of {file}: " in errors
    assert "2 of 2 inputs could not be used, or not to their end" in errors
    count = len(read(tmp_path / "x/images.json")["images"])
    assert 2 <= count <= 8
    with VideoReader(str(tmp_path / "x/videos/film.mp4")) as written:
        assert len(list(written)) == count


def test_interrupted_video_can_be_played(model, film, tmp_path, monkeypatch):
    file, _ = film
    start, calls = predict.Detector._start, []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return start(self, batch)

    monkeypatch.setattr(predict.Detector, "_start", interrupted)
    monkeypatch.setattr(predict, "THREADS", 1)
    with pytest.raises(RunError, match=r"interrupted after 3 images and frames"):
        detect(model, file, "--output-dir", tmp_path / "x")
    with VideoReader(str(tmp_path / "x/videos/film.mp4")) as written:
        assert len(list(written)) == 3


def test_images_and_videos_are_numbered_together(model, film, tmp_path):
    file, _ = film
    image = write_image(tmp_path / "a.png")
    detect(model, file, image, "--every", 4, "--output-dir", tmp_path / "x")
    rows = read(tmp_path / "x/images.json")["images"]
    found = [(row["id"], row["file_name"], row.get("frame")) for row in rows]
    assert found == [(1, "a.png", None), *((2 + n, "film.mkv", 4 * n) for n in range(3))]
    assert files_in(tmp_path / "x/pictures") == ["a.jpg"]


def test_flags_for_images_refuse_videos(command, model, film, annotations, tmp_path):
    file, _ = film
    out = ("--output-dir", tmp_path / "x")
    image = write_image(tmp_path / "a.png")
    code, _, errors = command(model, file, image, *out, "--format", "voc")
    assert code == 2
    assert "--format voc is for images or videos: run them separately" in errors
    for flags in (("--benchmark",), ("--show-truth", annotations, "--output-dir", tmp_path / "x")):
        code, _, errors = command(model, file, *flags)
        assert code == 2
        assert f"{flags[0]} is for images: remove {file}" in errors


# ------------------------------------------------------------------------------ ground truth


def test_ground_truth_is_drawn(command, model, val, annotations, tmp_path):
    code, output, errors = command(
        model, val, write_image(tmp_path / "stray.png"), "--show-truth", annotations,
        "--output-dir", tmp_path / "x", "--score-threshold", 1,
    )  # fmt: skip
    assert code == 0, errors
    assert f"not in {annotations}, no ground truth drawn: " in output
    assert "try a lower --score-threshold" in output
    drawn = {p.name: p for p in (tmp_path / "x/pictures").rglob("*.jpg")}
    assert Image.open(drawn["stray.jpg"]).width == 512
    both = np.asarray(Image.open(drawn["0.jpg"])).astype(int)
    assert both.shape[1] > 2 * 512
    assert both.shape[0] > 384  # the captions
    left, right = both[-384:, :512], both[-384:, -512:]
    differ = np.abs(left - right).max(axis=2) > 60
    assert differ[4 * 8 + 1, 4 * 8 : 34 * 8].mean() > 0.9  # the upper side of the true box
    assert differ[24 * 8 + 20 :].mean() == 0  # no box is below it
    images = read(tmp_path / "x/images.json")["images"]
    assert {image["id"] for image in images} == {100, 101, 102, 103}


def test_invalid_ground_truth_is_reported(command, model, val, annotations, tmp_path):
    content = read(annotations)
    content["annotations"].append({"id": 77, "image_id": 100, "category_id": 1, "bbox": "wide"})
    (tmp_path / "truth.json").write_text(json.dumps(content))
    code, output, errors = command(
        model, val, "--show-truth", tmp_path / "truth.json", "--output-dir", tmp_path / "x"
    )
    assert code == 0, errors
    assert "not drawn: annotations whose 'bbox' is not four numbers (1): id 77" in output


def test_annotations_are_matched_in_other_spellings(model, val, annotations, tmp_path):
    content = read(annotations)
    names = ("C:\\set\\0.png", "http://localhost:8080/data/upload/3/1a2b3c-1.png", "2.PNG")
    for name, row in zip(names, content["images"], strict=True):
        row["file_name"] = name
    (tmp_path / "truth.json").write_text(json.dumps(content))
    detect(model, val, "--show-truth", tmp_path / "truth.json", "--output-dir", tmp_path / "x")
    images = read(tmp_path / "x/images.json")["images"]
    assert {image["file_name"]: image["id"] for image in images} == {
        "0.png": 100, "1.png": 101, "2.png": 102,
    }  # fmt: skip


def test_annotations_are_matched_by_path_suffix(command, model, annotations, tmp_path):
    content = read(annotations)
    for name, row in zip(("day1/0.png", "0.png", "./sub/2.png"), content["images"], strict=True):
        row["file_name"] = name
        write_image(tmp_path / "in" / name, row["width"], row["height"])
    (tmp_path / "truth.json").write_text(json.dumps(content))
    options = ("--show-truth", tmp_path / "truth.json", "--output-dir", tmp_path / "x")
    detect(model, tmp_path / "in", *options)
    images = read(tmp_path / "x/images.json")["images"]
    assert {image["file_name"]: image["id"] for image in images} == {
        "day1/0.png": 100, "0.png": 101, "./sub/2.png": 102,
    }  # fmt: skip
    write_image(tmp_path / "in/day3/0.png")
    code, _, errors = command(model, tmp_path / "in", *options)
    assert code == 2
    assert "lists 0.png once (id 101), but it may be " in errors
    code, _, errors = command(model, write_image(tmp_path / "else.png"), *options)
    assert code == 2
    assert "lists none of the images" in errors


def test_image_of_wrong_size_is_skipped(command, model, val, annotations, tmp_path):
    content = read(annotations)
    content["images"][0]["width"] = 65
    (tmp_path / "truth.json").write_text(json.dumps(content))
    code, _, errors = command(
        model, val, "--show-truth", tmp_path / "truth.json", "--output-dir", tmp_path / "x"
    )
    assert code == 2
    assert "0.png is 64 x 48 pixels, but annotated as 65 x 48" in errors


# ------------------------------------------------------------------------------ command line


def test_invalid_arguments_are_rejected(command, model, trained, annotations, tmp_path):
    image = trained / "data/val2017/0.png"
    truth = tmp_path / "truth.json"
    content = read(annotations)
    content["categories"][0]["name"] = "horse"
    truth.write_text(json.dumps(content))
    out = ("--output-dir", tmp_path / "x")
    for arguments, message in (
        ((model, image), "required: --output-dir"),
        ((model, tmp_path / "no.png", *out), "no.png: no such file or folder"),
        ((tmp_path / "no.pth", image, *out), "no.pth: no such file. For torchvision's weights"),
        ((trained / "out", image, *out), "is a folder: use a checkpoint in it"),
        ((image, image, *out), "0.png cannot be read: it is not a file of torch.save"),
        ((model, image, *out, "--model", models.MODELS[0]), "--model is for torchvision's weights"),
        (("X", image, *out, "--model", models.MODELS[0]), "unknown weights 'X': choose from"),
        ((model, image, *out, "--score-threshold", 2), "2 is not from 0 to 1"),
        ((model, image, *out, "--score-threshold", "worst"), "invalid score value: 'worst'"),
        ((model, image, *out, "--max-detections", 0), "0 is below 1"),
        ((model, image, *out, "--batch-size", 0), "0 is below 1"),
        ((model, image, *out, "--device", "gpu"), "--device gpu: use cuda, cuda:N, mps or cpu"),
        ((model, image, *out, "--device", "cuda"), "there are 0 CUDA devices"),
        ((model, image, *out, "--show-truth", truth), "category 2 ('horse') does not fit"),
        ((model, image, *out, "--format", "xml"), "invalid choice: 'xml'"),
        ((model, image, *out, "--tile", 31), "31 is below 32"),
        ((model, image, *out, "--tile", 64, "--tile-overlap", 0.95), "use a number from 0 to 0.9"),
        ((model, image, *out, "--nms-threshold", "x"), "invalid float value: 'x'"),
        ((model, image, *out, "--every", 0), "0 is below 1"),
        ((model, image, *out, "--every", 2), "--every is for videos, but none is given"),
        ((model, image, *out, "--start", 2, "--end", "0:01"), "--start must be before --end"),
        ((model, image, *out, "--tile-overlap", 0.5), "--tile-overlap has no effect without"),
        ((model, image, *out, "--font", truth), "truth.json cannot be read as a font"),
    ):
        code, _, errors = command(*arguments)
        assert code == 2
        assert errors.startswith("predict.py: error: ")
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_script_runs_from_any_folder(tmp_path):
    script = ROOT / "predict.py"
    done = run(sys.executable, script, "x.pth", "no.png", "--output-dir", "y", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "predict.py: error: no.png: no such file or folder\n"


def test_help_lists_flags_files_and_exit_codes(command):
    code, output, _ = command("--help")
    assert code == 0
    for words in ("CHECKPOINT", "--show-truth FILE", "images.json", "Exit codes"):
        assert words in output


# ------------------------------------------------------------------------------- odd image files


def write_deep(file: Path, largest: int) -> Path:
    ramp = np.linspace(0, largest, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(ramp).save(file)
    return file


def drawn_brightness(file: Path) -> float:
    return np.asarray(Image.open(file)).mean()


def test_16_bit_images_are_read_as_in_training(model, tmp_path, capsys):
    """A checkpoint without a rule: the images given decide, together."""
    files = [write_deep(tmp_path / f"{n}.png", n) for n in (255, 4095)]
    flags = ("--score-threshold", "1")
    detect(model, *files, "--output-dir", tmp_path / "out", *flags)
    assert "16-bit gray images hold 12 bits: divided by 16" in capsys.readouterr().out
    pictures = tmp_path / "out/pictures"
    assert abs(drawn_brightness(pictures / "4095.jpg") - 127) < 2
    assert abs(drawn_brightness(pictures / "255.jpg") - 127 / 16) < 2
    saved = torch.load(model, weights_only=True)
    saved["args"]["bit_depth"] = 16
    torch.save(saved, tmp_path / "m.pth")
    detect(tmp_path / "m.pth", *files, "--output-dir", tmp_path / "trained", *flags)
    assert "16-bit gray images" not in capsys.readouterr().out
    assert abs(drawn_brightness(tmp_path / "trained/pictures/4095.jpg") - 127 / 16) < 2
    flags = (*flags, "--bit-depth", "12")
    detect(tmp_path / "m.pth", *files, "--output-dir", tmp_path / "given", *flags)
    assert abs(drawn_brightness(tmp_path / "given/pictures/4095.jpg") - 127) < 2


def test_truncated_images_are_skipped_or_used(model, tmp_path, command):
    file = write_image(tmp_path / "x.jpg")
    file.write_bytes(file.read_bytes()[:-20])
    code, _, errors = command(model, file, "--output-dir", tmp_path / "out")
    assert code == 2
    assert "x.jpg is truncated" in errors
    flags = ("--output-dir", tmp_path / "used", "--truncated-images", "use")
    code, output, _ = command(model, file, *flags)
    assert code == 0
    assert "note: truncated image files that are used" in output
    assert f"{file}, 100 % of its rows" in output


def test_warnings_of_the_decoder_name_the_file(model, tmp_path, command):
    bad_exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x09\0\0\0\x01\0\x06"
    files = [write_image(tmp_path / f"{n}.jpg", exif=bad_exif) for n in range(3)]
    code, output, errors = command(model, *files, "--output-dir", tmp_path / "out")
    assert (code, "Warning" in errors) == (0, False)
    for file in files:
        assert output.count(f"{file}: Corrupt EXIF data") == 1
