"""Whole trainings on small data, most of them in this process."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import (
    ROOT,
    SMALL_FLAGS,
    main_in_process,
    make_tiny,
    read_losses,
    read_metrics,
    rewrite,
    run_two_processes,
    split_of,
    train,
    train_in_process,
    weights_hash,
)
from PIL import Image

import checkpoint
import coco_utils
import engine
import export
import models
import predict
import report
from internals.errors import DataError, UserError
from internals.images import ImageRules
from reporting.analysis import load_evaluated_index, read_history

BCCD = ROOT.parent / "shared/data/bccd"
FROM_WEIGHTS = [flag for flag in SMALL_FLAGS if flag not in ("--weights-backbone", "none")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train for two epochs; return the folder of `data` and `out`, which tests only read."""
    root = tmp_path_factory.mktemp("trained")
    make_tiny(root / "data")
    flags = ("--data-path", root / "data", "--output-dir", root / "out", "--epochs", "2")
    small = [flag for flag in SMALL_FLAGS if flag != "--no-report"]
    (root / "printed").write_text(main_in_process(*small, *flags))
    return root


def load_state(file: Path) -> dict:
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------- output


def test_training_output(trained):
    out, printed = trained / "out", (trained / "printed").read_text()
    assert f"report: {out / 'report.html'}" in printed
    assert {path.name for path in out.iterdir()} == {
        *("checkpoint.pth", "model_best.pth", "metrics.jsonl", "detections.json"),
        *("checkpoint_00000004.pth", "checkpoint_00000008.pth", "report.html"),
        "suspects.json",
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epoch = ["train"] * 4 + ["eval"]
    assert [line["kind"] for line in lines] == ["start", *epoch, *epoch, "end"]
    assert lines[1].keys() == {
        *("kind", "epoch", "step", "lr", "loss", "loss_classifier", "loss_box_reg"),
        *("loss_objectness", "loss_rpn_box_reg", "images_per_second", "data_seconds"),
        *("peak_memory_mib", "skipped_steps"),
    }
    saved = load_state(out / "checkpoint.pth")
    assert saved.keys() == {
        *("model", "optimizer", "scaler", "epoch", "step", "best_AP", "categories", "args"),
        *("format", "evaluated_step", "evaluations_since_best", "score_thresholds"),
    }
    assert (saved["epoch"], saved["step"]) == (2, 8)
    assert "images/s" in printed
    assert "IoU 0.50:0.95" in printed
    assert "0.0025 = 0.02 x 2 / 16" in printed
    assert "val_loss" not in read_metrics(out, "eval")[0]


def test_checkpoints_have_the_score_thresholds_of_their_own_weights(tiny, tmp_path, monkeypatch):
    """Those saved before their weights are evaluated have none; also with --max-detections."""
    index = coco_utils.CocoIndex(split_of(tiny, "val"))
    image_ids = index.image_ids[index.image_of_rows()]
    scores = np.where(index.category_ids == 2, 0.8, 0.6)
    found = np.column_stack([image_ids, index.boxes, scores, index.category_ids])
    before = []

    def detect(*args):
        before.append(load_state(tmp_path / "checkpoint.pth"))
        return found, 1.0

    monkeypatch.setattr(engine, "detect", detect)
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--checkpoint-every", 3)
    printed = train_in_process(*flags, "--keep-checkpoints", 9, "--max-detections", 300)
    assert "best F1 1.000 at score 0.300: precision 1.000, recall 1.000" in printed
    assert "AR300 1.000" in printed
    assert load_state(tmp_path / "checkpoint_00000003.pth")["score_thresholds"] is None
    assert [(state["step"], state["score_thresholds"]) for state in before] == [(4, None)]
    expected = {"overall": 0.3, "per_category": {2: 0.4, 5: 0.3}}
    for name in ("checkpoint.pth", "model_best.pth", "checkpoint_00000004.pth"):
        assert load_state(tmp_path / name)["score_thresholds"] == expected
    (line,) = read_metrics(tmp_path, "eval")
    points = {"threshold": 0.3, "F1": 1, "precision": 1, "recall": 1}
    assert line["score_threshold"] == points
    assert line["per_category"]["2"]["score_threshold"] == {**points, "threshold": 0.4}
    assert line["AR300"] == pytest.approx(1)
    assert "AR100" not in line
    with pytest.raises(UserError, match=r"--max-detections 200 differs from 300"):
        train_in_process(*flags, "--resume", "auto", "--max-detections", 200)


def test_finished_training_is_not_repeated_or_overwritten(trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained / "out", out, ignore=shutil.ignore_patterns("*_0*4.pth", "*best*"))
    flags = ("--data-path", trained / "data", "--output-dir", out, "--epochs", "2")
    output = train_in_process(*flags, "--resume", "auto")
    assert "2 epochs, all done. To train longer, start from" in output
    assert len(read_losses(out)) == 8
    (_, resumed) = read_metrics(out, "start")
    assert resumed["parameters"] > 1_000_000
    assert resumed["command"]
    with pytest.raises(UserError, match="--resume auto"):
        train_in_process(*flags)
    with pytest.raises(UserError, match=r"--lr 0\.0025 \(now 0\.1\)"):
        train_in_process(*flags, "--resume", "auto", "--lr", "0.1")
    assert len(read_metrics(out, "start")) == 2  # rejected runs write nothing


def test_finished_part_of_a_training_is_not_evaluated_again(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--resume", "auto")
    assert "until step 2\n" in train_in_process(*flags, "--max-steps", "2")
    for stop in (2, 1):
        output = train_in_process(*flags, "--max-steps", stop)
        assert f"until step {stop}, all done" in output
        assert len(read_metrics(tmp_path / "out", "eval")) == 1
    assert "all done" not in train_in_process(*flags, "--max-steps", "3")
    assert [row["step"] for row in read_metrics(tmp_path / "out", "eval")] == [2, 3]


def test_model_loads_into_stock_torchvision(trained):
    state = load_state(trained / "out/checkpoint.pth")["model"]
    stock = torchvision.models.get_model(
        SMALL_FLAGS[1],
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=64,
        max_size=128,  # 640 / 320 x --min-size 64
    )
    stock.load_state_dict(state, strict=True)
    assert_same_detections(stock, trained / "out", trained / "data")


def assert_same_detections(stock: torch.nn.Module, out: Path, data: Path) -> None:
    """Check that a model's detections on the validation images are those of `detections.json`."""
    index = coco_utils.CocoIndex(split_of(data, "val"))
    detections = json.loads((out / "detections.json").read_text())
    assert detections
    category_ids = [0, *index.categories.ids]
    for image, target in coco_utils.CocoDetection(index, index.categories):
        with torch.inference_mode():
            (expected,) = stock.eval()([image / 255])
        rows = [row for row in detections if row["image_id"] == target["image_id"]]
        scores = expected["scores"].tolist()
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)
        labels = [category_ids[label] for label in expected["labels"].tolist()]
        assert [row["category_id"] for row in rows] == labels
        for row, box in zip(rows, expected["boxes"].tolist(), strict=True):
            x, y, w, h = row["bbox"]
            assert [x, y, x + w, y + h] == pytest.approx(box, abs=0.01)


@pytest.mark.parametrize(
    "model",
    [
        "ssdlite320_mobilenet_v3_large",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ssd300_vgg16", "retinanet_resnet50_fpn")
        ),
    ],
)
def test_other_detectors_train(tiny, tmp_path, model):
    flags = ["--data-path", tiny, "--model", model, "--max-steps", "1", "--output-dir", tmp_path]
    size_flags = [] if "ssd" in model else SMALL_FLAGS[4:6]
    main_in_process(*SMALL_FLAGS[2:4], *size_flags, *SMALL_FLAGS[6:], *flags)
    saved = load_state(tmp_path / "checkpoint.pth")
    sizes = {"min_size": 64, "max_size": 107} if "retina" in model else {}
    stock = torchvision.models.get_model(
        model, weights=None, weights_backbone=None, num_classes=3, **sizes
    )
    stock.load_state_dict(saved["model"], strict=True)
    detections = json.loads((tmp_path / "detections.json").read_text())
    index = coco_utils.CocoIndex(split_of(tiny, "val"))
    image, target = coco_utils.CocoDetection(index, index.categories)[0]
    with torch.inference_mode():
        expected = stock.eval()([image / 255])[0]["scores"].tolist()
    scores = [row["score"] for row in detections if row["image_id"] == target["image_id"]]
    assert scores == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------- reproducibility


@pytest.mark.slow
def test_losses_depend_on_seed_not_on_workers(trained, tmp_path):
    flags = ("--data-path", trained / "data", "--epochs", "2")
    done = train(*flags, "--output-dir", tmp_path / "a", "-j", "2", "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    assert read_losses(tmp_path / "a") == read_losses(trained / "out")[:3]
    train_in_process(*flags, "--output-dir", tmp_path / "b", "--seed", "1", "--max-steps", "1")
    assert read_losses(tmp_path / "b") != read_losses(trained / "out")[:1]


def test_resume_is_bit_exact(trained, tmp_path):
    """In the middle of an epoch and between two epochs."""
    flags = ("--data-path", trained / "data", "--epochs", "2", "--resume", "auto")
    for stop in (3, 4, 8):
        train_in_process(*flags, "--output-dir", tmp_path, "--max-steps", stop)
    assert read_losses(tmp_path) == read_losses(trained / "out")
    expected = weights_hash(trained / "out/checkpoint.pth")
    assert weights_hash(tmp_path / "checkpoint.pth") == expected


@pytest.mark.slow
def test_ema_is_resumed_and_evaluated(trained, tmp_path):
    flags = ("--data-path", trained / "data", "--ema", "0.75")
    reference, resumed = tmp_path / "reference", tmp_path / "resumed"
    train_in_process(*flags, "--output-dir", reference, "--max-steps", "3")
    for stop in (1, 3):
        resume = ("--resume", "auto", "--max-steps", stop)
        train_in_process(*flags, "--output-dir", resumed, *resume)
    states = [load_state(folder / "checkpoint.pth") for folder in (reference, resumed)]
    for name in ("model", "raw_model"):
        assert all(torch.equal(states[1][name][k], v) for k, v in states[0][name].items())
    head = "roi_heads.box_predictor.cls_score.bias"
    assert not torch.equal(states[0]["model"][head], states[0]["raw_model"][head])
    assert_same_evaluation(resumed, trained / "data", tmp_path / "test")


def assert_same_evaluation(run: Path, data: Path, output_dir: Path) -> None:
    """Check that --test-only of the newest checkpoint repeats the last evaluation of a run."""
    flags = ("--data-path", data, "--test-only", "--resume", run / "checkpoint.pth", "-j", "0")
    main_in_process(*flags, "--output-dir", output_dir, "--no-report")
    (metrics,) = read_metrics(output_dir, "eval")
    assert metrics == read_metrics(run, "eval")[-1]


def test_test_only_reproduces_ap(trained, tmp_path):
    """The checkpoint has the flags of the model."""
    assert_same_evaluation(trained / "out", trained / "data", tmp_path)
    best = load_state(trained / "out/model_best.pth")["best_AP"]
    assert best == max(line["AP"] for line in read_metrics(trained / "out", "eval"))
    assert best > 0


def test_eval_batch_size_and_evaluator_do_not_change_results(trained, tmp_path):
    def evaluate(evaluator: str, batch_size: str) -> tuple[dict, list[dict]]:
        out, split = tmp_path / evaluator, split_of(trained / "data")
        flags = ("--val-annotations", split.annotations, "--val-images", split.images)
        output = train_in_process(
            *("--data-path", trained / "data", "--test-only", *flags, "--output-dir", out),
            *("--resume", trained / "out/checkpoint.pth"),
            *("--evaluator", evaluator, "--eval-batch-size", batch_size),
        )
        assert f"scored by {evaluator} " in output
        return read_metrics(out, "eval")[0], json.loads((out / "detections.json").read_text())

    metrics, detections = evaluate("pycocotools", "1")
    assert len(detections) > 8
    other_metrics, other_detections = evaluate("hotcoco", "4")
    for a, b in zip(detections, other_detections, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=1e-3)
    assert metrics["AP"] == pytest.approx(other_metrics["AP"], abs=1e-6)


# ------------------------------------------------------------------------------------- flags


def fine_tune(trained: Path, *flags) -> str:
    """Train from the weights of `trained`."""
    weights = trained / "out/checkpoint.pth"
    return main_in_process(*FROM_WEIGHTS, "--weights", weights, *flags)


@pytest.mark.slow
def test_fine_tuning_replaces_head_for_other_categories(trained, tiny, tmp_path):
    flags = ("--data-path", tiny, "--max-steps", "1")
    output = fine_tune(trained, *flags, "--output-dir", tmp_path / "same")
    assert "with its head" in output
    assert "trained with --min-size" not in output
    for name in ("train", "val"):
        rewrite(split_of(tiny, name), lambda d: d["categories"].append({"id": 6, "name": "cow"}))
    out = ("--output-dir", tmp_path / "other", "--min-size", 72)
    output = fine_tune(trained, *flags, *out)
    assert "with a new head for 3 categories" in output
    assert "trained with --min-size 64, not 72: objects will have other sizes" in output
    with pytest.raises(UserError, match=r"other categories than .*: to fine-tune"):
        fine_tune(trained, *flags, "--output-dir", tmp_path / "same", "--resume", "auto")


@pytest.mark.slow
def test_accumulation_and_two_processes_equal_larger_batch(trained, tmp_path):
    """With frozen norms, as other statistics depend on the batch."""
    flags = ("--data-path", trained / "data", "--max-steps", "3")
    plain = fine_tune(trained, *flags, "-b", "2", "--output-dir", tmp_path / "plain")
    accumulate = (
        *flags,
        "-b",
        "1",
        "--accumulate-steps",
        "2",
        "--output-dir",
        tmp_path / "accumulated",
    )
    accumulated = fine_tune(trained, *accumulate)
    weights = ("--weights", trained / "out/checkpoint.pth", "--output-dir", tmp_path / "two")
    two, _ = run_two_processes(*FROM_WEIGHTS, *flags, *weights, "-b", "1")
    assert "2 images per step (2 per device)" in plain
    assert "2 images per step (1 per device x 2 accumulated)" in accumulated
    assert "2 images per step (1 per device x 2 processes)" in two.stdout
    assert all("4 steps each, of 8 images" in text for text in (plain, accumulated, two.stdout))
    assert all("0.0025 = 0.02 x 2 / 16" in text for text in (plain, accumulated, two.stdout))
    expected = read_losses(tmp_path / "plain")
    assert len(expected) == 3
    assert read_losses(tmp_path / "accumulated") == pytest.approx(expected, rel=1e-4)
    assert read_losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_frozen_backbone_does_not_change(trained, tmp_path):
    flags = ("--data-path", trained / "data", "--max-steps", "2", "--output-dir", tmp_path)
    fine_tune(trained, *flags, "--freeze-backbone")
    before, after = (
        load_state(file)["model"]
        for file in (trained / "out/checkpoint.pth", tmp_path / "checkpoint.pth")
    )
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert not {key for key in changed if key.startswith("backbone.body.")}
    assert {key for key in changed if key.startswith("backbone.fpn.")}
    assert {key for key in changed if key.startswith("roi_heads.")}


@pytest.mark.slow
def test_trained_affine_of_frozen_norms(trained, tmp_path):
    """Only scale and bias change, in layers that train; resuming, EMA and --test-only work."""
    flags = ("--data-path", trained / "data", "--train-norm-affine", "--opt", "adamw", "--lr", 1e-3)
    flags = (*flags, "--norm-weight-decay", 0, "--bias-weight-decay", 0, "--ema", "0.5")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    output = fine_tune(trained, *flags, "--max-steps", 3, "--output-dir", whole)
    assert "statistics frozen, scale and bias trained" in output
    assert "weight decay 0.0001 (norms 0, biases 0), no gradient clipping" in output
    for stop in (2, 3):
        resume = ("--resume", "auto", "--max-steps", stop, "--output-dir", resumed)
        fine_tune(trained, *flags, *resume)
    before, after = (load_state(f / "checkpoint.pth") for f in (trained / "out", whole))
    again = load_state(resumed / "checkpoint.pth")
    for name in ("model", "raw_model"):
        assert list(after[name]) == [k for k in before["model"] if "num_batches" not in k]
        assert all(torch.equal(again[name][k], v) for k, v in after[name].items())
    changed = {k for k, v in after["raw_model"].items() if not torch.equal(v, before["model"][k])}
    assert not {key for key in changed if "running_" in key}
    body, first, last = "backbone.body.", "backbone.body.0.1.", "backbone.body.16.1."
    assert {f"{last}weight", f"{last}bias"} <= changed
    assert not {key for key in changed if key.startswith((first, f"{body}2."))}
    assert_same_evaluation(whole, trained / "data", tmp_path / "test")
    with pytest.raises(UserError, match=r"--train-norm-affine True \(now False\)"):
        fine_tune(trained, *flags, "--no-train-norm-affine", *resume)


@pytest.mark.slow
def test_early_stopping_is_resumed(trained, tmp_path):
    """The learning rate is too small to change AP, so the first evaluation stays the best."""
    flags = ("--data-path", trained / "data", "--output-dir", tmp_path, "--overfit", "2")
    flags = (*flags, "--epochs", "9", "--lr", "1e-30", "--weight-decay", "0")
    output = fine_tune(trained, *flags, "--early-stop-patience", "1")
    assert "no better AP in 1 evaluations" in output
    assert len(read_metrics(tmp_path, "eval")) == 2
    resumed = fine_tune(trained, *flags, "--early-stop-patience", "1", "--resume", "auto")
    assert "no better AP in 1 evaluations" in resumed
    assert len(read_metrics(tmp_path, "eval")) == 2
    continued = fine_tune(trained, *flags, "--early-stop-patience", "2", "--resume", "auto")
    assert "no better AP in 2 evaluations" in continued
    assert len(read_metrics(tmp_path, "eval")) == 3


def test_overfit_uses_first_images(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--overfit", "3", "-b", "1")
    train_in_process(*flags, "--max-steps", "3")
    (start,) = read_metrics(tmp_path, "start")
    assert (start["train_images"], start["val_images"]) == (3, 3)
    assert start["args"]["data_augmentation"] == "none"
    detections = json.loads((tmp_path / "detections.json").read_text())
    image_ids = {row["image_id"] for row in detections}
    assert image_ids <= {100, 101, 102}
    assert image_ids


@pytest.mark.slow
def test_validation_loss_and_tensorboard_do_not_change_training(trained, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--data-path", trained / "data", "--epochs", "2", "--output-dir", tmp_path)
    flags = (*flags, "--tensorboard", "--val-loss", "--resume", "auto")
    for steps in ("2", "4"):
        train_in_process(*flags, "--max-steps", steps)
    assert read_losses(tmp_path) == read_losses(trained / "out")[:4]
    val_losses = [line["val_loss"] for line in read_metrics(tmp_path, "eval")]
    assert 0 < val_losses[0]["loss"] != val_losses[1]["loss"]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(read_losses(tmp_path))
    logged = [event.value for event in events.Scalars("eval/val_loss/loss")]
    assert logged == pytest.approx([loss["loss"] for loss in val_losses])
    images = events.Tags()["images"]
    assert len(images) == 3
    assert [event.step for event in events.Images(images[0])] == [2, 4]


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")],
)
def test_missing_package_of_a_tracker_is_reported(name, package, tiny, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, f"reporting.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--tracker {name} needs a package: pip install {name}"):
        train_in_process("--data-path", tiny, "--output-dir", tmp_path, "--tracker", name)
    assert not list(tmp_path.glob("*.pth"))


def test_find_batch_size(tiny, tmp_path):
    done = train("--data-path", tiny, "--find-batch-size", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"trying images of (48 x 64|64 x 48)( and .*)? pixels, before resizing, with 2 boxes",
        done.stdout,
    )
    assert "--batch-size 8 is the largest that fits" in done.stdout  # the number of images
    assert not (tmp_path / "metrics.jsonl").exists()


# -------------------------------------------------------------------------------- user errors


def corrupt_both_splits(tiny: Path) -> None:
    """Add an unknown category to the training annotations and truncate a validation image."""
    rewrite(split_of(tiny), lambda data: data["annotations"][2].update(category_id=77))
    file = split_of(tiny, "val").images / "1.png"
    file.write_bytes(file.read_bytes()[:200])


def test_user_error_exit_code_and_message(tiny, tmp_path):
    (tiny / "train2017/3.png").write_bytes(b"no image")
    done = train("--data-path", tiny, "--output-dir", tmp_path, "-j", "1")  # detected by a worker
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("train.py: error:") == 1
    assert "3.png cannot be read" in done.stderr


def test_missing_files_are_reported(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out")

    def assert_rejected(message: str, *flags) -> None:
        with pytest.raises(UserError, match=message):
            train_in_process(*flags)

    assert_rejected("nowhere", "--data-path", tmp_path / "nowhere", "--output-dir", tmp_path)
    assert_rejected(r"missing\.pth: no such file", *flags, "--resume", tmp_path / "missing.pth")
    assert_rejected("fewer than the 9 of a step", *flags, "-b", "9")
    assert_rejected("IMAGENET1K_V1", *flags, "--weights-backbone", "IMAGE9")
    (tiny / "train2017/3.png").unlink()
    assert_rejected(r"3\.png", *flags)
    (tiny / "annotations/instances_val2017.json").unlink()
    assert_rejected(r"instances_val2017\.json \(missing\)", *flags)


def test_unwritable_output_folder_is_rejected(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        train_in_process("--data-path", tiny, "--output-dir", tmp_path / "file/x")


def test_invalid_annotations_are_rejected(tiny, tmp_path):
    corrupt_both_splits(tiny)
    with pytest.raises(UserError, match=r"instances_train2017\.json[^$]*1001 of image 101"):
        train_in_process("--data-path", tiny, "--output-dir", tmp_path)


def test_check_data_lists_all_errors(tiny, tmp_path):
    flags = ("--data-path", tiny, "--check-data", "--output-dir", tmp_path / "out")
    output = train_in_process(*flags)
    assert "8 images, 12 boxes in 2 categories" in output
    assert "data check passed" in output
    corrupt_both_splits(tiny)
    done = train(*flags)
    assert done.returncode == 2
    assert "kinds of errors to correct, listed above: 2" in done.stderr
    output = done.stdout
    assert "error: annotations with an undefined category_id (1)" in output
    assert "1001 of image 101" in output
    assert re.search(r"error: image files that cannot be read \(1\): .*val2017.1\.png", output)
    with pytest.raises(UserError, match="kinds of errors to correct, listed above: 1"):
        train_in_process(*flags, "--max-bad-images", "1")
    assert not (tmp_path / "out").exists()


def test_data_without_boxes_is_rejected(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--check-data")
    rewrite(split_of(tiny), lambda data: data.update(annotations=[]))
    message = r"instances_train2017\.json has no usable box"
    for rejected in (flags, flags[:4]):
        with pytest.raises(UserError, match=message):
            train_in_process(*rejected)
    assert "data check passed" in train_in_process(*flags, "--test-only")


def test_validation_without_boxes_is_said_and_keeps_the_newest_as_the_best(tiny, tmp_path):
    rewrite(split_of(tiny, "val"), lambda data: data.update(annotations=[]))
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out")
    assert "has no box to find: AP cannot be measured" in train_in_process(*flags, "--check-data")
    text = train_in_process(*flags, "--epochs", "3", "--early-stop-patience", "1")
    assert text.index("has no box to find") < text.index("epoch 0")
    assert "epoch 2  no AP, as there is no box to find: the newest is the best" in text
    newest, best = (tmp_path / "out" / name for name in ("checkpoint.pth", "model_best.pth"))
    assert newest.samefile(best)


def test_split_without_usable_images_is_rejected(tiny, tmp_path):
    for file in split_of(tiny, "val").images.iterdir():
        file.write_bytes(b"")
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--max-bad-images", "9")
    with pytest.raises(DataError, match=r"val2017\.json: none of its images can be used"):
        train_in_process(*flags)


def test_empty_images_train_unless_told_otherwise(tiny, tmp_path):
    rewrite(split_of(tiny), lambda data: data.update(annotations=data["annotations"][:6]))
    flags = ("--data-path", tiny, "--max-steps", "1")
    # With repeats: 4 without boxes, 2 x sqrt(8 / 4) and 2 x sqrt(8 / 2), that is 10.8.
    repeats = ("--repeat-factor-threshold", "1")
    for count, extra in ((8, ()), (4, ("--no-keep-empty",)), (10, repeats)):
        text = train_in_process(*flags, *extra, "--output-dir", tmp_path / f"out{count}")
        assert f"{count // 2} steps each, of {count} images" in text
        assert (f"8 images become {count} an epoch" in text) == (extra == repeats)


def test_too_narrow_images_are_rejected_before_the_first_step(tiny, tmp_path):
    image = split_of(tiny).images / "0.png"
    Image.new("RGB", (1200, 1)).save(image)
    rewrite(split_of(tiny), lambda data: data["images"][0].update(width=1200, height=1))
    rewrite(split_of(tiny), lambda data: data["annotations"][0].update(bbox=[5, 0, 90, 1], area=90))
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out")
    message = r"too narrow: with --min-size 64.*0\.png \(id 100, 1200 x 1\).*Crop"
    for extra in ((), ("--check-data",)):
        with pytest.raises(DataError, match=message):
            train_in_process(*flags, *extra)
    assert "epoch 0" in train_in_process(*flags, "--max-size", "1200", "--max-steps", "1")


def test_train_and_val_from_one_file_are_noticed(tiny):
    split = split_of(tiny)
    flags = ("--train-annotations", split.annotations, "--train-images", split.images)
    flags += ("--val-annotations", split.annotations, "--val-images", split.images)
    assert "train and val are the same file" in train_in_process(*flags, "--check-data")
    other = split.annotations.with_name("other.json")
    content = json.loads(split.annotations.read_text())
    content["images"] = content["images"][:2]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] < 102]
    other.write_text(json.dumps(content))
    text = train_in_process(*flags, "--val-annotations", other, "--check-data")
    assert "2 of 2 validation images are training images, too, such as /" in text


def test_max_bad_images_skips_unreadable_images(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--max-steps", "1")
    (split_of(tiny).images / "3.png").write_bytes(b"no image")
    (split_of(tiny, "val").images / "2.png").unlink()
    with pytest.raises(UserError) as caught:
        train_in_process(*flags, "--max-bad-images", "1")
    assert "train2017/3.png cannot be read" in str(caught.value)
    assert f"image 102: 2.png is missing in {tiny}/val2017" in str(caught.value)
    check_output = train_in_process(*flags, "--max-bad-images", "2", "--check-data")
    assert "--max-bad-images 2: a training skips 2 bad images" in check_output
    output = train_in_process(*flags, "--max-bad-images", "2")
    assert re.search(r"train: skipped: .*3\.png cannot be read", output)
    assert re.search(r"val: skipped: .*2\.png is missing in", output)
    (start,) = read_metrics(tmp_path / "out", "start")
    assert (start["train_images"], start["val_images"]) == (7, 2)
    assert start["val_images_left_out"] == [102]


@pytest.mark.slow
@pytest.mark.skipif(not BCCD.exists(), reason="the BCCD images are not beside the project")
def test_training_on_real_images(tmp_path):
    val = json.loads((BCCD / "annotations/instances_train2017.json").read_text())
    val["images"] = val["images"][:8]
    kept = {row["id"] for row in val["images"]}
    val["annotations"] = [row for row in val["annotations"] if row["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(val))
    output = train_in_process(
        *("--data-path", BCCD, "--output-dir", tmp_path / "out", "--max-steps", "2", "--amp"),
        *("--val-annotations", tmp_path / "val.json", "--val-images", BCCD / "train2017"),
    )
    assert "292 images, 3,943 boxes in 3 categories, boxes without a size: 2" in output
    assert len(read_losses(tmp_path / "out")) == 2


# ------------------------------------------------------------------------------- odd image files


def make_deep(root: Path, bits: int) -> Path:
    """Turn the images of `make_tiny` into 16-bit gray of `bits` bits."""
    for file in make_tiny(root).glob("*/*.png"):
        gray = np.asarray(Image.open(file).convert("L")).astype(np.uint16)
        Image.fromarray(gray << (bits - 8)).save(file)
    return root


def test_bit_depth_is_one_rule_for_the_run(tmp_path):
    """The pixels are those of 8-bit images, also when resumed, evaluated and drawn."""
    results = {}
    for bits in (8, 12):
        data, out = make_deep(tmp_path / f"{bits}", bits), tmp_path / f"out{bits}"
        flags = ("--data-path", data, "--output-dir", out, "--epochs", "2")
        printed = train_in_process(*flags, "--max-steps", "4")
        assert f"16-bit gray images hold {bits} bits" in printed
        train_in_process(*flags, "--resume", "auto")
        results[bits] = weights_hash(out / "checkpoint.pth")
        assert load_state(out / "checkpoint.pth")["args"]["bit_depth"] == bits
        index = load_evaluated_index(read_metrics(out, "start")[-1])
        assert index.rules == ImageRules(bits)
    assert results[8] == results[12]
    with pytest.raises(UserError, match="--bit-depth 16 differs from 12, with which"):
        train_in_process(*flags, "--resume", "auto", "--bit-depth", "16")


def test_resumed_run_of_an_older_version_keeps_16_bits(tmp_path):
    data, out = make_deep(tmp_path / "data", 12), tmp_path / "out"
    flags = ("--data-path", data, "--output-dir", out, "--epochs", "2")
    train_in_process(*flags, "--max-steps", "4", "--bit-depth", "16")
    file = out / "checkpoint.pth"
    state = load_state(file)
    del state["args"]["bit_depth"]
    for path in out.glob("*.pth"):
        torch.save(state, path)
    train_in_process(*flags, "--resume", "auto")
    assert load_state(file)["args"]["bit_depth"] == 16


def truncate(file: Path, share: float) -> None:
    """Turn an image into a JPEG, under the same name, of which only the start is there."""
    Image.open(file).save(file, "JPEG", quality=95)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def test_truncated_images_are_refused_or_used(tiny, tmp_path):
    for n in (1, 2):
        truncate(tiny / f"train2017/{n}.png", 0.97)
    with pytest.raises(UserError, match=r"(?s)is truncated: .*--truncated-images use.*1 more"):
        train_in_process("--data-path", tiny, "--output-dir", tmp_path / "refused")
    hashes = set()
    for workers in (2, 0):
        out = tmp_path / f"used{workers}"
        flags = ("--data-path", tiny, "--output-dir", out, "--truncated-images", "use")
        printed = train_in_process(*flags, "--epochs", "2", "-j", workers)
        lines = [line for line in printed.splitlines() if "truncated image files" in line]
        assert len(lines) == (2 if workers else 0)  # once in this process, which is the same
        hashes.add(weights_hash(out / "checkpoint.pth"))
    assert len(hashes) == 1
    checked = main_in_process("--data-path", tiny, "--check-data", "--truncated-images", "use")
    assert "note: truncated image files that are used (2):" in checked


def test_more_than_the_end_must_not_be_missing(tiny, tmp_path):
    truncate(tiny / "train2017/1.png", 0.5)
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--truncated-images", "use")
    with pytest.raises(UserError, match=r"1\.png is truncated: .*too little of it"):
        train_in_process(*flags)


# ----------------------------------------------------------------- other backbones and anchors

SMALL_ANCHORS = ("--anchor-sizes", "8,12", "16,24", "32,48", "64,96", "128,192")
OTHER_MODELS = {
    "fasterrcnn_resnet50_fpn": (*SMALL_ANCHORS, "--anchor-ratios", "0.33", "0.5", "1", "2", "3"),
    "retinanet_resnet50_fpn": SMALL_ANCHORS,
}


def run_documented_example(folder: Path) -> dict:
    """Run the lines of the documentation that load a checkpoint into plain torchvision."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/output-formats.md").read_text("utf-8"), flags=re.S
    )
    (example,) = [block for block in blocks if "output/model_best.pth" in block]
    example = example.replace("output/model_best.pth", (folder / "model_best.pth").as_posix())
    variables = {}
    exec(example, variables)
    return variables


def compare_with_documented_example(folder: Path) -> None:
    stock = run_documented_example(folder)["model"]
    assert not any(type(m).__module__.startswith(("internals", "models")) for m in stock.modules())
    ours = models.from_checkpoint(checkpoint.load(folder / "model_best.pth"), stock=True)
    image = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)).double()
    for model in (stock, ours):  # in float64, as frozen norms round in another way
        getattr(model.double(), "roi_heads", model).score_thresh = 0.0
    with torch.inference_mode():
        expected, actual = ours([image])[0], stock([image])[0]
    assert len(expected["boxes"]) > 10
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_backbone_and_anchors_in_every_command(name, tiny, tmp_path):
    """Trained, resumed, predicted with, exported, reported, and loaded by plain torchvision."""
    common = ("--data-path", tiny, "--model", name, "--weights-backbone", "none", "-j", "0",
              "--min-size", "64", "--epochs", "1", "--no-report")  # fmt: skip
    own = ("--backbone", "resnet18", *OTHER_MODELS[name])
    whole, out = tmp_path / "whole", tmp_path / "out"
    main_in_process(*common, *own, "--output-dir", whole)
    output = main_in_process(*common, *own, "--output-dir", out, "--max-steps", "2")
    assert f"{name}, backbone resnet18" in output
    assert "anchors    sizes 8,12 16,24 32,48 64,96 128,192, height / width 0." in output
    resume = (*common, "--output-dir", out, "--resume", "auto")
    for flags, message in (
        (("--backbone", "resnet34"), "--backbone resnet34 differs from resnet18"),
        (("--anchor-sizes", *"23456"), "--anchor-sizes 2 3 4 5 6 differs from 8,12 16,24"),
    ):
        with pytest.raises(UserError, match=message):
            main_in_process(*resume, *flags)
    assert "2 steps done" in main_in_process(*resume, "--backbone", "resnet18")
    assert weights_hash(out / "checkpoint.pth") == weights_hash(whole / "checkpoint.pth")
    compare_with_documented_example(out)
    test_only = ("--test-only", "--resume", out / "checkpoint.pth", "--no-report", "-j", "0")
    main_in_process("--data-path", tiny, "--output-dir", tmp_path / "test", *test_only)
    assert read_metrics(tmp_path / "test", "eval")[0]["AP"] == pytest.approx(
        read_metrics(out, "eval")[-1]["AP"], abs=1e-9
    )

    best = str(out / "model_best.pth")
    predict.main([best, str(tiny / "val2017"), "--output-dir", str(tmp_path / "found")])
    facts = dict(report.setup_facts(read_history(out / "metrics.jsonl")))
    assert facts["Backbone"] == "resnet18"
    assert facts["Anchors"].startswith("sizes 8,12 16,24 32,48 64,96 128,192, height / width 0.")
    safetensors = pytest.importorskip("safetensors")
    export.main([best, "--output", str(tmp_path / "x.safetensors")])
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["backbone"]) == (name, "resnet18")
    assert json.loads(metadata["anchor_sizes"])[1] == [16, 24]
    # Its weights start another training, with other anchors.
    weights = ("--weights", tmp_path / "x.safetensors", "--backbone", "resnet18")
    output = main_in_process("--data-path", tiny, "--model", name, *weights, "--min-size", "64",
                             "--max-steps", "1", "-j", "0", "--no-report", "--output-dir",
                             tmp_path / "next")  # fmt: skip
    assert "the layers of their outputs start anew" in output


@pytest.mark.slow
def test_other_backbone_and_anchors_are_exported_to_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    args = {
        "model": "fasterrcnn_resnet50_fpn", "weights": None, "weights_backbone": "IMAGENET1K_V1",
        "backbone": "resnet18", "anchor_sizes": [[8, 12], [16, 24], [32, 48], [64, 96], [128, 192]],
        "anchor_ratios": [0.33, 1.0, 3.0], "min_size": 96, "max_size": 160, "fixed_size": None,
        "rpn_score_thresh": None, "val_annotations": None, "val_images": None,
        "data_path": str(tmp_path / "none"),
    }  # fmt: skip
    categories = coco_utils.Categories.from_names({1: "cat", 4: "dog"})
    model = models.build_model(args["model"], 3, **models.structure_of(args), stock=True)
    with torch.no_grad():  # detections with various scores
        model.roi_heads.box_predictor.cls_score.weight.mul_(60)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(20)
    content = {"model": model.state_dict(), "optimizer": {}, "epoch": 0, "step": 1, "format": 1}
    torch.save(
        {**content, "categories": categories.to_list(), "args": args}, tmp_path / "model_best.pth"
    )
    compare_with_documented_example(tmp_path)
    export.main([str(tmp_path / "model_best.pth"), "--output", str(tmp_path / "x.onnx")])
    properties = {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert properties["backbone"] == "resnet18"
    assert json.loads(properties["anchor_ratios"]) == [0.33, 1.0, 3.0]


@pytest.mark.parametrize("weights_backbone", ["none", "IMAGENET1K_V1"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {}),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", None),  # of an earlier version
        ("retinanet_resnet50_fpn", {"backbone": "resnet18"}),
    ],
)
def test_documented_example_loads_checkpoints(name, options, weights_backbone, tmp_path):
    args = {
        "model": name, "weights": None, "weights_backbone": weights_backbone, "min_size": 64,
        "max_size": 100, "fixed_size": None, "rpn_score_thresh": None,
    }  # fmt: skip
    own = {"anchor_sizes": None, "anchor_ratios": None, "backbone": "mobilenet_v3_large"}
    args |= {} if options is None else {**own, **options}
    model = models.build_model(name, 3, **models.structure_of(args), min_sizes=(64,))
    content = {"model": model.state_dict(), "optimizer": {}, "epoch": 0, "step": 1, "format": 1}
    categories = coco_utils.Categories.from_names({1: "cat", 4: "dog"}).to_list()
    file = tmp_path / "model_best.pth"
    torch.save({**content, "categories": categories, "args": args}, file)
    stock = run_documented_example(tmp_path)["model"]
    assert type(stock).__module__.startswith("torchvision.")
    loaded = stock.state_dict()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # which frozen norms lack
            assert torch.equal(loaded[key], value)
