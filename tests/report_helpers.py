"""Helpers of the report's tests: output folders like those of a training of `tiny`."""

import json
from pathlib import Path

import numpy as np
from helpers import split_of

import coco_eval
from coco_utils import CocoIndex
from reporting import analysis

# The validation images of `tiny` are 100 (a cat), 101 (a dog and a cat) and 102 (a cat).
DETECTIONS = (
    (100, 5, [4, 4, 30, 20], 0.9),  # the cat with a wrong category
    (100, 2, [4, 4, 30, 20], 0.3),  # the same cat with its category and a low score
    (101, 5, [10, 8, 20, 30], 0.8),  # correct
    (101, 2, [30, 40, 10, 10], 0.7),  # background; the cat is missed
    (102, 2, [4, 4, 30, 20], 0.95),  # correct
    (102, 2, [5, 4, 30, 20], 0.6),  # a duplicate
)


def rows_of(detections) -> np.ndarray:
    rows = [(i, *box, score, c) for i, c, box, score in detections]
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def start_line(tiny: Path, **changes) -> dict:
    args = {"data_path": str(tiny), "model": "fasterrcnn_resnet50_fpn", "epochs": 2, "lr": 0.02}
    args |= {"batch_size": 2, "opt": "sgd", "lr_scheduler": "multisteplr", "lr_steps": [1, 2]}
    args |= {"lr_gamma": 0.1}
    return {
        "kind": "start",
        "args": args | changes,
        "versions": {"torch": "2.11.0"},
        "device": "cpu (x86_64)",
        "world_size": 1,
        "precision": "float32",
        "train_images": 8,
        "val_images": 3,
        "categories": [{"id": 2, "name": "cat", "label": 1}, {"id": 5, "name": "dog", "label": 2}],
    }


def train_line(step: int, **values) -> dict:
    losses = {"loss": 1 / step, "loss_classifier": 0.6 / step, "loss_box_reg": 0.4 / step}
    line = {"kind": "train", "epoch": (step - 1) // 4, "step": step, "lr": 0.02, **losses}
    return {**line, "images_per_second": 5.0, "peak_memory_mib": 1000, **values}


def eval_line(tiny: Path, epoch: int, detections=DETECTIONS, **values) -> dict:
    index = CocoIndex(split_of(tiny, "val"))
    metrics = coco_eval.evaluate_detections(index, rows_of(detections), "pycocotools")
    return {"kind": "eval", "epoch": epoch, "step": 4 * (epoch + 1), **metrics, **values}


def two_epochs(tiny: Path) -> list[dict]:
    """Return the lines of a training of two epochs with a better second epoch."""
    steps = [train_line(step) for step in range(1, 9)]
    evals = [eval_line(tiny, 0, AP=0.1), eval_line(tiny, 1)]
    end = {"kind": "end", "best_AP": evals[1]["AP"], "seconds": 3725.0}
    return [start_line(tiny), *steps[:4], evals[0], *steps[4:], evals[1], end]


def write_output(folder: Path, lines: list[dict], detections=DETECTIONS) -> Path:
    """Write an output folder with these lines and, unless None, these detections."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if detections is not None:
        coco_eval.write_results(rows_of(detections), folder / "detections.json")
    return folder


def results_in(folder: Path) -> analysis.DetectionResults:
    return analysis.read_results(folder, analysis.read_history(folder / "metrics.jsonl"))
