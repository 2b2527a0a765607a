"""Whole runs of train.py on small data, as processes."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import (
    ROOT,
    SMALL,
    evaluations,
    losses,
    rewrite,
    run,
    run_train,
    split_of,
    train,
    weights_hash,
    write_part,
)

import checkpoint
import coco_utils
import models
import train as train_module
from internals.errors import UserError

BCCD = ROOT.parent / "shared/data/bccd"


def test_a_run_leaves_what_the_readme_says(tiny, tmp_path):
    out = tmp_path / "out"
    flags = [flag for flag in SMALL if flag != "--no-report"]
    done = run_train(*flags, "--data-path", tiny, "--output-dir", out, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert f"report: {out / 'report.html'}" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        *("checkpoint.pth", "model_best.pth", "metrics.jsonl", "detections.json"),
        *("checkpoint_00000004.pth", "checkpoint_00000008.pth", "report.html"),
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epoch = ["train"] * 4 + ["eval"]
    assert [line["kind"] for line in lines] == ["start", *epoch, *epoch, "end"]
    assert lines[1].keys() == {
        *("kind", "epoch", "step", "lr", "loss", "loss_classifier", "loss_box_reg"),
        *("loss_objectness", "loss_rpn_box_reg", "images_per_second", "data_seconds"),
        *("peak_memory_mib", "skipped_steps"),
    }
    saved = torch.load(out / "checkpoint.pth", weights_only=True)
    assert saved.keys() == {
        *("model", "optimizer", "scaler", "epoch", "step", "best_AP", "categories", "args"),
        *("format", "evaluations_since_best"),
    }
    assert (saved["epoch"], saved["step"]) == (2, 8)
    assert "images/s" in done.stdout
    assert "AP at IoU 0.50:0.95" in done.stdout
    assert "0.0025 = 0.02 x 2 / 16" in done.stdout
    finished = train("--data-path", tiny, "--output-dir", out, "--epochs", "2", "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    assert "nothing is left to train of 2 epochs" in finished.stdout
    # a second training does not write over the first
    again = train("--data-path", tiny, "--output-dir", out)
    assert again.returncode == 2
    assert "--resume auto" in again.stderr


def test_the_model_loads_into_stock_torchvision_and_detects_the_same(tiny, tmp_path):
    done = train("--data-path", tiny, "--output-dir", tmp_path, "--keep-empty")
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    # max_size: 640 / 320 of --min-size 64
    stock = torchvision.models.get_model(
        SMALL[1], weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=128
    )
    stock.load_state_dict(state, strict=True)
    stock.eval()
    dataset = coco_utils.CocoDetection(
        index := coco_utils.CocoIndex(split_of(tiny, "val")), index.categories
    )
    found = json.loads((tmp_path / "detections.json").read_text())
    assert found
    for image, target in dataset:
        output = stock([image / 255])[0]
        ours = [row for row in found if row["image_id"] == target["image_id"]]
        assert len(ours) == len(output["scores"])
        for row, box, score, label in zip(ours, *output.values(), strict=True) if ours else ():
            x, y, w, h = row["bbox"]
            values = dict(zip(("boxes", "labels", "scores"), (box, score, label), strict=True))
            assert [x, y, x + w, y + h] == pytest.approx(values["boxes"].tolist(), abs=0.01)


def test_losses_repeat_and_workers_do_not_matter(tiny, tmp_path):
    runs = {}
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        done = train("--data-path", tiny, "--output-dir", tmp_path / name, "-j", workers)
        assert done.returncode == 0, done.stderr
        runs[name] = losses(tmp_path / name)
    assert len(runs["a"]) == 4
    assert runs["a"] == runs["b"] == runs["c"]
    done = train("--data-path", tiny, "--output-dir", tmp_path / "d", "--seed", "1")
    assert done.returncode == 0
    assert losses(tmp_path / "d") != runs["a"]


@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((3, 4, 8), ()),
        ((1, 2), ("--amp", "--amp-dtype", "float16", "--epochs", "1")),  # crawls on a CPU
    ],
)
def test_a_run_stopped_and_resumed_ends_with_the_same_weights(tiny, tmp_path, stops, flags):
    flags = ("--data-path", tiny, "--epochs", "2", *flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(*flags, "--output-dir", whole, "--max-steps", stops[-1]).returncode == 0
    for stop in stops:
        done = train(*flags, "--output-dir", cut, "--resume", "auto", "--max-steps", stop)
        assert done.returncode == 0, done.stderr
    assert losses(cut) == losses(whole)
    assert weights_hash(cut / "checkpoint.pth") == weights_hash(whole / "checkpoint.pth")
    scalers = [torch.load(d / "checkpoint.pth", weights_only=True)["scaler"] for d in (whole, cut)]
    assert scalers[0] == scalers[1]
    assert bool(scalers[0]) == ("float16" in flags)


def test_testing_a_checkpoint_gives_its_ap_again(tiny, tmp_path):
    out = tmp_path / "out"
    done = train("--data-path", tiny, "--output-dir", out, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    best = torch.load(out / "model_best.pth", weights_only=True)["best_AP"]
    # no flag of the model is needed: the checkpoint knows
    tested = run_train(
        *("--data-path", tiny, "--test-only", "-j", "0", "--no-report"),
        *("--resume", out / "model_best.pth", "--output-dir", tmp_path / "test"),
    )
    assert tested.returncode == 0, tested.stderr
    (numbers,) = evaluations(tmp_path / "test")
    assert numbers == max(evaluations(out), key=lambda line: line["AP"])
    assert numbers["AP"] == best


def test_how_many_images_are_evaluated_together_changes_nothing(tiny, tmp_path):
    """Nor does what scores them: detections and numbers stay the same."""
    done = train("--data-path", tiny, "--output-dir", tmp_path, "--epochs", "2")
    assert done.returncode == 0, done.stderr

    def test(name, *flags):
        out = tmp_path / name
        tested = run_train(
            *("--data-path", tiny, "--test-only", "-j", "0", "--no-report"),
            *("--resume", tmp_path / "checkpoint.pth", "--output-dir", out, *flags),
        )
        assert tested.returncode == 0, tested.stderr
        for evaluator in ("hotcoco", "pycocotools"):
            assert (f"scored by {evaluator} " in tested.stdout) == (evaluator in flags)
        detections = json.loads((out / "detections.json").read_text())
        return evaluations(out), detections

    common = ("--val-annotations", split_of(tiny).annotations, "--val-images", tiny / "train2017")
    numbers, found = test("one", *common, "--evaluator", "pycocotools")
    assert len(found) > 8
    other = "hotcoco"
    same_numbers, same = test("four", *common, "--evaluator", other, "--eval-batch-size", "4")
    for a, b in zip(found, same, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=1e-3)
    assert numbers[0]["AP"] == pytest.approx(same_numbers[0]["AP"], abs=1e-6)


def test_fine_tuning_from_a_file_replaces_the_head_for_other_categories(tiny, tmp_path):
    assert train("--data-path", tiny, "--output-dir", tmp_path / "a").returncode == 0
    flags = [flag for flag in SMALL if flag not in ("--weights-backbone", "none")]

    def tune(name):
        return run_train(
            *(*flags, "--data-path", tiny, "--max-steps", "1"),
            *("--weights", tmp_path / "a/checkpoint.pth", "--output-dir", tmp_path / name),
        )

    same = tune("b")
    assert same.returncode == 0, same.stderr
    assert "its head included" in same.stdout
    for part in ("train", "val"):
        rewrite(split_of(tiny, part), lambda d: d["categories"].append({"id": 6, "name": "cow"}))
    other = tune("c")
    assert other.returncode == 0, other.stderr
    assert "with a new head for 3 categories" in other.stdout
    resumed = train("--data-path", tiny, "--output-dir", tmp_path / "a", "--resume", "auto")
    assert resumed.returncode == 2
    assert "other categories" in resumed.stderr


def test_coco_weights_keep_their_head_for_coco_alone(monkeypatch):
    donor = models.build_model(SMALL[1], 91, pretrained="detector").state_dict()
    monkeypatch.setattr(models, "download", lambda *a: donor)
    coco = coco_utils.Categories.from_names({i: str(i) for i in coco_utils.COCO_CATEGORY_IDS})
    own = coco_utils.Categories.from_names({1: "cell", 7: "dust"})
    head = "roi_heads.box_predictor.cls_score.bias"
    args = settled("--model", SMALL[1], "--weights", "COCO_V1")
    kept = train_module.build_model(args, coco, None).state_dict()
    assert torch.equal(kept[head], donor[head])
    new = train_module.build_model(args, own, None).state_dict()
    assert len(new[head]) == 3
    body = "backbone.body.0.0.weight"
    assert torch.equal(new[body], donor[body])
    args.test_only = True
    with pytest.raises(UserError, match="trained on other categories"):
        train_module.build_model(args, own, None)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    done = train("--data-path", tiny, "--output-dir", tmp_path, "--lr", "1e30", "--epochs", "2")
    assert done.returncode == 1
    assert "is not finite: images [10" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoint.pth").exists()


# ------------------------------------------------------------------- what people expect beside it


@pytest.fixture(scope="module")
def start_weights(tmp_path_factory) -> Path:
    """A checkpoint of the small model, for trainings that begin with frozen norms."""
    root = tmp_path_factory.mktemp("start")
    write_part(root, "train", [(64, 48)] * 2, [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30]]])
    write_part(root, "val", [(64, 48)], [[[2, 4, 4, 30, 20]]])
    made = train("--data-path", root, "--output-dir", root / "out")
    assert made.returncode == 0, made.stderr
    return root / "out/checkpoint.pth"


def pretrained_flags(tiny, start_weights) -> list:
    flags = [flag for flag in SMALL if flag not in ("--weights-backbone", "none")]
    return [*flags, "--weights", start_weights, "--data-path", tiny]


def said_by(*flags) -> str:
    """What a run that must not fail has printed."""
    done = run_train(*flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gradients_of_several_batches_make_the_step_of_a_larger_one(tiny, tmp_path, start_weights):
    flags = pretrained_flags(tiny, start_weights)
    plain = said_by(*flags, "-b", "2", "--output-dir", tmp_path / "plain")
    added = said_by(*flags, "-b", "1", "--accumulate-steps", "2", "--output-dir", tmp_path / "a")
    assert "8 images, 2 a step, 4 steps" in plain
    assert "8 images, 1 2 times a step, 4 steps" in added
    assert all("0.0025 = 0.02 x 2 / 16" in text for text in (plain, added))
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "a")
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-4)
    single = losses_of(tmp_path / "one", *flags, "-b", "1", "--max-steps", "4")
    assert single != pytest.approx(expected, rel=1e-2)


def losses_of(out, *flags) -> list[float]:
    said_by(*flags, "--output-dir", out)
    return losses(out)


def test_the_average_of_the_weights_is_evaluated_and_saved_beside_them(tiny, tmp_path):
    """By hand: the first step's weights, then 0.75 of the average and 0.25 of the weights."""
    flags = ("--data-path", tiny, "--checkpoint-every", "1", "--keep-checkpoints", "9")
    done = train(*flags, "--output-dir", tmp_path / "raw", "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    raw = [
        torch.load(tmp_path / f"raw/checkpoint_{steps:08}.pth", weights_only=True)["model"]
        for steps in (1, 2, 3)
    ]
    out, ema = tmp_path / "ema", ("--ema", "0.75")
    for steps in (2, 3):  # resumed in between
        done = train(*flags, *ema, "--output-dir", out, "--resume", "auto", "--max-steps", steps)
        assert done.returncode == 0, done.stderr
    saved = torch.load(out / "checkpoint.pth", weights_only=True)
    for key, first in raw[0].items():
        assert torch.equal(saved["raw_model"][key], raw[2][key])
        if first.is_floating_point():
            expected = 0.75 * (0.75 * first + 0.25 * raw[1][key]) + 0.25 * raw[2][key]
            torch.testing.assert_close(saved["model"][key], expected, rtol=1e-5, atol=1e-7)
    head = "roi_heads.box_predictor.cls_score.bias"
    assert not torch.equal(saved["model"][head], saved["raw_model"][head])
    tested = train("--data-path", tiny, "--test-only", "--resume", out / "checkpoint.pth",
                   "--output-dir", tmp_path / "test")  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    assert evaluations(tmp_path / "test")[0]["AP"] == evaluations(out)[-1]["AP"]
    other = train(*flags, "--output-dir", out, "--resume", "auto")
    assert other.returncode == 2
    assert "--ema 0.75 (now None)" in other.stderr


def test_a_training_without_better_ap_ends_early_and_stays_ended(tiny, tmp_path, start_weights):
    """A rate of nearly nothing changes no detection, so the first evaluation stays the best."""
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--epochs", "9", "--lr", "1e-30")
    flags = (*flags, "--early-stop-patience", "2", "--weight-decay", "0", "--print-freq", "99")
    model = pretrained_flags(tiny, start_weights)
    done = said_by(*model, *flags)
    assert len(evaluations(tmp_path)) == 3
    assert "no better AP in 2 evaluations" in done
    again = said_by(*model, *flags, "--resume", "auto")
    assert "no better AP in 2 evaluations" in again
    assert len(evaluations(tmp_path)) == 3
    more = said_by(*model, *flags, "--resume", "auto", "--early-stop-patience", "4")
    assert "no better AP in 4 evaluations" in more
    assert len(evaluations(tmp_path)) == 5


def test_the_loss_on_validation_pictures_leaves_training_as_it_is(tiny, tmp_path):
    common = ("--data-path", tiny, "--epochs", "2")
    plain, with_loss = tmp_path / "plain", tmp_path / "loss"
    assert train(*common, "--output-dir", plain).returncode == 0
    done = train(*common, "--output-dir", with_loss, "--val-loss", "--eval-batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert weights_hash(plain / "checkpoint.pth") == weights_hash(with_loss / "checkpoint.pth")
    assert "val_loss" not in evaluations(plain)[0]
    first, second = (line["val_loss"] for line in evaluations(with_loss))
    assert first["loss"] == pytest.approx(sum(v for k, v in first.items() if k != "loss"))
    assert 0 < second["loss"] != first["loss"]
    # What a picture contributes depends on nothing but the picture and the weights.
    tested = train(*common, "--test-only", "--resume", with_loss / "checkpoint.pth", "--val-loss",
                   "--output-dir", tmp_path / "test")  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    again = evaluations(tmp_path / "test")[0]["val_loss"]
    assert again == pytest.approx(second, rel=1e-3)


def test_the_first_pictures_can_be_learnt_by_heart(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--overfit", "3", "-b", "1")
    done = train(*flags, "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["train_images"], start["val_images"]) == (3, 3)
    assert start["args"]["data_augmentation"] == "none"
    found = {row["image_id"] for row in json.loads((tmp_path / "detections.json").read_text())}
    assert found <= {100, 101, 102}
    assert found


def test_a_frozen_backbone_stays_as_it_was(tiny, tmp_path, start_weights):
    flags = pretrained_flags(tiny, start_weights)
    said_by(*flags, "--freeze-backbone", "--output-dir", tmp_path / "frozen")
    before, after = (
        torch.load(file, weights_only=True)["model"]
        for file in (start_weights, tmp_path / "frozen/checkpoint.pth")
    )
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert not {key for key in changed if key.startswith("backbone.body.")}
    assert {key for key in changed if key.startswith("backbone.fpn.")}
    assert {key for key in changed if key.startswith("roi_heads.")}


def test_the_largest_batch_is_found_before_training(tiny, tmp_path):
    done = train("--data-path", tiny, "--find-batch-size", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"trying images of (48 x 64|64 x 48)( and .*)? pixels, before resizing, with 2 boxes",
        done.stdout,
    )
    assert "--batch-size 8 is the largest that fits" in done.stdout  # there are no more images
    assert not (tmp_path / "metrics.jsonl").exists()


def test_running_out_of_memory_says_what_was_too_much(tiny, tmp_path):
    done = train("--data-path", tiny, "--output-dir", tmp_path, FAULT="memory@step:0:2")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(
        r"out of memory in epoch 0, step 3 of 4, with 2 images, .*(48 x 64|64 x 48) with \d boxes",
        done.stderr,
    )
    assert "lower --batch-size" in done.stderr


def test_tensorboard_gets_scalars_and_pictures(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "--tensorboard", "--val-loss")
    for steps in ("2", "4"):
        done = train(*flags, "--max-steps", steps, "--resume", "auto")
        assert done.returncode == 0, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "eval/AP50", "eval/val_loss/loss"} <= set(tags["scalars"])
    assert "eval/per_category/cat" in tags["scalars"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        losses(tmp_path)
    )
    assert len(tags["images"]) == 3
    assert [event.step for event in events.Images(tags["images"][0])] == [2, 4]


def test_without_tensorboard_the_flag_says_what_to_install(tiny, tmp_path):
    hidden = "import sys; sys.modules['tensorboard'] = None; "
    done = run(
        *(
            sys.executable,
            "-c",
            f"{hidden}import runpy; runpy.run_path('train.py')['run_and_exit']()",
        ),
        *(*SMALL, "--data-path", tiny, "--output-dir", tmp_path, "--tensorboard"),
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "pip install tensorboard" in done.stderr


@pytest.mark.parametrize(
    "model", ["ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "retinanet_resnet50_fpn"]
)
def test_other_detectors_train_through_the_same_files(tiny, tmp_path, model):
    flags = ["--data-path", tiny, "--model", model, "--max-steps", "2", "--output-dir", tmp_path]
    flags += [*SMALL[2:4], *SMALL[6:]] if "ssd" in model else SMALL[2:]
    done = said_by(*flags)
    assert "done: best AP" in done
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    # torchvision's own builder, which knows nothing of this project
    sizes = {"min_size": 64, "max_size": 107} if "retina" in model else {}
    stock = torchvision.models.get_model(
        model, weights=None, weights_backbone=None, num_classes=3, **sizes
    )
    stock.load_state_dict(saved["model"], strict=True)
    detections = json.loads((tmp_path / "detections.json").read_text())
    index = coco_utils.CocoIndex(split_of(tiny, "val"))
    image, target = coco_utils.CocoDetection(index, index.categories)[0]
    expected = stock.eval()([image / 255])[0]["scores"].tolist()
    found = [row["score"] for row in detections if row["image_id"] == target["image_id"]]
    assert found == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------- refusals


def refused(*flags, **environment):
    """Exit code 2, one message on stderr, no traceback; returns the message."""
    done = train(*flags, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("train.py: error:") == 1
    return done.stderr


def break_both_parts(tiny) -> None:
    """An unknown category among the training annotations, and a validation image cut short."""
    rewrite(split_of(tiny), lambda data: data["annotations"][2].update(category_id=77))
    file = split_of(tiny, "val").images / "1.png"
    file.write_bytes(file.read_bytes()[:200])


def test_bad_annotations_end_with_2_and_name_the_file(tiny, tmp_path):
    break_both_parts(tiny)
    message = refused("--data-path", tiny, "--output-dir", tmp_path)
    assert "instances_train2017.json" in message
    assert "1001 of image 101" in message


def test_checking_data_names_everything_wrong_and_ends_with_2(tiny, tmp_path):
    flags = ("--data-path", tiny, "--check-data", "--output-dir", tmp_path / "out")
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    assert "8 images, 12 boxes in 2 categories" in done.stdout
    assert "data check passed" in done.stdout
    break_both_parts(tiny)
    done = train(*flags)
    assert done.returncode == 2
    assert "wrong: annotations whose category_id the file does not define (1)" in done.stdout
    assert "1001 of image 101" in done.stdout
    assert re.search(r"wrong: image files that cannot be read \(1\): .*val2017.1\.png", done.stdout)
    assert "2 kinds of errors to correct, listed above" in done.stderr
    done = train(*flags, "--max-bad-images", "1")
    assert done.returncode == 2
    assert "1 kinds of errors to correct, listed above" in done.stderr
    assert not (tmp_path / "out").exists()


def test_checking_data_without_boxes_to_train_on_ends_with_2(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--check-data")
    rewrite(split_of(tiny), lambda data: data.update(annotations=[]))
    for message in (refused(*flags), refused(*flags[:4])):
        assert "instances_train2017.json has no box that can be trained on" in message
    assert train(*flags, "--keep-empty").returncode == 0
    assert train(*flags, "--test-only").returncode == 0


def test_a_few_bad_images_may_be_left_out(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out")
    (split_of(tiny).images / "3.png").write_bytes(b"no picture")
    (split_of(tiny, "val").images / "2.png").unlink()
    message = refused(*flags, "--max-bad-images", "1")
    assert all(f"{name}.png cannot be read" in message for name in ("train2017/3", "val2017/2"))
    checked = train(*flags, "--max-bad-images", "2", "--check-data")
    assert checked.returncode == 0, checked.stderr
    assert "a training with --max-bad-images 2 leaves out 2" in checked.stdout
    done = train(*flags, "--max-bad-images", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"train: left out: .*3\.png cannot be read", done.stdout)
    assert re.search(r"val: left out: .*2\.png cannot be read", done.stdout)
    start = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[0])
    assert (start["train_images"], start["val_images"]) == (7, 2)
    assert start["val_images_left_out"] == [102]


def test_missing_things_end_with_2_and_are_named(tiny, tmp_path):
    common = ("--data-path", tiny, "--output-dir", tmp_path / "out")
    assert "nowhere" in refused("--data-path", tmp_path / "nowhere", "--output-dir", tmp_path)
    assert "gone.pth: no such file" in refused(*common, "--resume", tmp_path / "gone.pth")
    assert "fewer than one global batch of 9" in refused(*common, "-b", "9")
    (tiny / "train2017/3.png").write_bytes(b"no picture")
    assert "3.png cannot be read" in refused(*common, "-j", "1")
    (tiny / "train2017/3.png").unlink()
    assert "3.png" in refused(*common)
    (tiny / "annotations/instances_val2017.json").unlink()
    assert "instances_val2017.json (missing)" in refused(*common)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("--data-path", tiny, "--output-dir", tmp_path / "file/x")


def settled(*flags) -> argparse.Namespace:
    """What `main` does with flags before it looks at data."""
    args = train_module.parse_arguments([str(flag) for flag in flags])
    device = train_module.choose_device(args.device)
    train_module.resolve_defaults(args, None, device)
    train_module.validate_args(args, device)
    return args


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--opt adamw --momentum 0.9", "--momentum is for --opt sgd"),
        ("--lr-scheduler cosineannealinglr --lr-steps 3", "are for --lr-scheduler multisteplr"),
        ("--amp-dtype float16", "--amp-dtype needs --amp"),
        ("--weights COCO_V1 --weights-backbone IMAGENET1K_V1", "brings its own backbone"),
        ("--weights-backbone none --trainable-backbone-layers 3", "needs pretrained weights"),
        ("--data-augmentation lsj --min-size 512 --max-size 700", "lsj makes squares"),
        ("--fixed-size 64 96 --data-augmentation multiscale", "leaves nothing of --data-augm"),
        ("--fixed-size 64 96 --min-size 512", "--fixed-size takes the place of --min-size"),
        ("--fixed-size 64", "expected 2 arguments"),
        ("--sync-bn", "--sync-bn needs torchrun"),
        ("--ema 1", "1 is not between 0 and 1"),
        ("--weights-backbone none --freeze-backbone", "--freeze-backbone needs pretrained"),
        ("--freeze-backbone --trainable-backbone-layers 2", "leaves nothing of --trainable"),
        ("--min-size 800 --max-size 400", "--max-size 400 is below the shortest side"),
        ("--model ssd300_vgg16 --min-size 512", "resizes to 300 pixels square"),
        ("--model ssd300_vgg16 --data-augmentation multiscale", "has one size"),
        ("--model fcos_resnet50_fpn --rpn-score-thresh 0.1", "has no proposals"),
        ("--overfit 4 --val-images x --val-annotations y", "--overfit evaluates on training"),
        ("--find-batch-size --test-only --weights COCO_V1", "is for one training process"),
        ("--start-epoch 26", "leaves nothing of 26 epochs"),
        ("--resume x.pth --start-epoch 2", "--resume knows its epoch"),
        ("--test-only", "needs a model to test"),
        ("--world-size 4", "--world-size 4, but 1 were started"),
        ("--dist-url tcp://localhost:1", "--dist-url needs torchrun"),
        ("--device tpu", "use cuda, cuda:N or cpu"),
        ("--device mps", "runs on cuda and cpu only"),
        ("--dataset coco_kp", "invalid choice"),
        ("--batch-size 0", "0 is below 1"),
        ("--batch-size two", "invalid int value: .two."),
        ("--lr nan", "nan is below 0"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_flags_that_cannot_apply_are_refused_with_a_reason(flags, message):
    with pytest.raises(UserError, match=message):
        settled(*flags.split())


def test_an_evaluation_writes_over_no_other_training(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        state = {key: {} for key in ("args", "categories", "epoch", "optimizer", "model")}
        checkpoint.save(tmp_path / name, {**state, "step": 3})

    def find(resume: object = None, output_dir: str = "a") -> str | None:
        resume = resume and str(resume)
        return checkpoint.resolve_resume(tmp_path / output_dir, resume, test_only=True)[0]

    own = tmp_path / "a/checkpoint.pth"
    assert find(own) == str(own)
    assert find("auto").startswith(str(tmp_path / "a"))
    elsewhere = tmp_path / "b/checkpoint.pth"
    assert find(elsewhere, "c") == str(elsewhere)
    for resume in (elsewhere, None):
        with pytest.raises(UserError, match=r"a/checkpoint_00000003.pth is there"):
            find(resume)
    with pytest.raises(UserError, match=r"no checkpoint in .*c to evaluate"):
        find("auto", "c")


def test_unknown_weights_end_with_2(tiny, tmp_path):
    message = refused("--data-path", tiny, "--output-dir", tmp_path, "--weights-backbone", "IMAGE9")
    assert "IMAGENET1K_V1" in message


def test_left_out_flags_are_the_coco_recipe():
    args = settled()
    assert (args.epochs, args.lr_steps, args.lr_gamma, args.batch_size) == (26, [16, 22], 0.1, 2)
    assert (args.lr, args.momentum, args.weight_decay) == (0.02 * 2 / 16, 0.9, 1e-4)
    assert (args.model, args.weights_backbone) == ("fasterrcnn_resnet50_fpn", "IMAGENET1K_V1")
    assert (args.min_size, args.max_size, args.data_augmentation) == (800, 1333, "hflip")
    assert args.aspect_ratio_group_factor == 3
    assert settled("--epochs", 13).lr_steps == [8, 11]
    assert settled("--min-size", 400).max_size == 666
    assert settled("--weights", "COCO_V1").weights_backbone is None
    assert settled("--data-augmentation", "lsj").min_size == 1024


def test_help_fits_a_person():
    done = run(sys.executable, ROOT / "train.py", "--help")
    assert done.returncode == 0
    for part in ("data:", "model:", "optimization:", "device and precision:", "output:", "Exit"):
        assert part in done.stdout


def test_every_flag_of_the_reference_is_there():
    known = train_module.parse_arguments([])
    names = """data_path dataset model device batch_size epochs workers lr momentum weight_decay
    norm_weight_decay opt lr_scheduler lr_steps lr_gamma print_freq output_dir resume start_epoch
    aspect_ratio_group_factor rpn_score_thresh trainable_backbone_layers data_augmentation sync_bn
    test_only use_deterministic_algorithms weights weights_backbone amp seed world_size dist_url"""
    assert set(names.split()) <= vars(known).keys()
    assert train_module.parse_arguments(["--start_epoch", "3", "--wd", "0.1", "-b", "4"])


@pytest.mark.skipif(not BCCD.exists(), reason="the BCCD pictures are not beside the project")
def test_real_pictures_train_from_the_first_step(tmp_path):
    done = train(
        *("--data-path", BCCD, "--output-dir", tmp_path, "--max-steps", "2", "--amp"),
        *("--val-annotations", BCCD / "annotations/instances_train2017.json"),
        *("--val-images", BCCD / "train2017", "-j", os.cpu_count() or 1),
    )
    assert done.returncode == 0, done.stderr
    assert "292 images, 3,943 boxes in 3 categories, boxes without a size: 2" in done.stdout
    assert len(losses(tmp_path)) == 2
