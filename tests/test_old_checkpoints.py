"""Compatibility with the output of an earlier version.

`data/old_run` is the output folder of a training of `tiny` that was stopped after 6 of 12 steps.
Its checkpoint has one number for each tensor, which is expanded to the shape of the tensor.
"""

import gzip
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL_FLAGS

import checkpoint
import export
import predict
import report
import train

OLD_RUN = ROOT / "tests/data/old_run"
FLAGS = (
    *SMALL_FLAGS[:6],
    *("--batch-size", "2", "--epochs", "3", "--lr", "0.0005", "--clip-grad-norm", "10"),
    *("--checkpoint-every", "3", "--print-freq", "1", "-j", "0", "--no-report"),
)


@pytest.fixture(scope="module")
def old_state() -> dict:
    """Load the checkpoint of the old run; replace constant weights, which would not train."""
    content = gzip.decompress((OLD_RUN / "checkpoint.ckpt.gz").read_bytes())
    state = torch.load(io.BytesIO(content), weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in state["model"].items():
        value = value.contiguous().clone()
        if value.dim() > 1:
            value = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        state["model"][key] = value
    for moments in state["optimizer"]["state"].values():
        moments.update({k: v.contiguous().clone() for k, v in moments.items() if v is not None})
    return state


@pytest.fixture
def old_run(old_state, tmp_path) -> Path:
    """Return an output folder of the old version."""
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(old_state, folder / "checkpoint_00000006.pth")
    shutil.copy(folder / "checkpoint_00000006.pth", folder / "checkpoint.pth")
    for name in ("metrics.jsonl", "detections.json"):
        shutil.copy(OLD_RUN / name, folder)
    return folder


def test_old_run_is_resumed(tiny, old_run, capsys):
    flags = ("--data-path", str(tiny), "--output-dir", str(old_run), "--resume", "auto")
    train.main([*FLAGS, *flags])
    output = capsys.readouterr().out
    assert f"{old_run}/checkpoint_00000006.pth, 6 steps done" in output
    lines = list(map(json.loads, (old_run / "metrics.jsonl").read_text().splitlines()))
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    evaluated = [line["epoch"] for line in lines if line["kind"] == "eval"]
    assert evaluated == [0, 1, 2]
    saved = checkpoint.load_newest(old_run)[1]
    assert (saved["epoch"], saved["step"]) == (3, 12)


def test_changed_flags_of_old_run_are_rejected(tiny, old_run):
    flags = ("--data-path", str(tiny), "--output-dir", str(old_run), "--resume", "auto")
    with pytest.raises(train.UserError, match=r"--lr 0.0005 \(now 0.25\)"):
        train.main([*FLAGS, *flags, "--lr", "0.25"])


def test_old_checkpoint_predicts(tiny, old_run, tmp_path):
    out = tmp_path / "predictions"
    images = str(tiny / "val2017")
    flags = ("--output-dir", str(out), "--score-threshold", "0")
    predict.main([str(old_run / "checkpoint.pth"), images, *flags])
    detections = json.loads((out / "detections.json").read_text())
    assert {row["category_id"] for row in detections} == {2, 5}
    flags = ("--output-dir", str(out / "best"), "--score-threshold", "best")
    with pytest.raises(predict.UserError, match=r"has no threshold. .* by an earlier version"):
        predict.main([str(old_run / "checkpoint.pth"), images, *flags])


def test_old_checkpoint_is_exported_to_safetensors(old_state, old_run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    export.main([str(old_run / "checkpoint.pth"), "--output", str(file)])
    weights = safetensors.load_file(file)
    assert weights.keys() == old_state["model"].keys()
    assert all(torch.equal(weights[key], value) for key, value in old_state["model"].items())


@pytest.mark.slow
def test_old_checkpoint_is_exported_to_onnx(tiny, old_run, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    flags = ("--output", str(file), "--check-images", str(tiny / "val2017"))
    export.main([str(old_run / "checkpoint.pth"), *flags])  # also compares the detections
    assert file.is_file()


def test_old_run_is_reported(old_run):
    report.main([str(old_run)])
    page = (old_run / "report.html").read_text(encoding="utf-8")
    assert "cat" in page
    assert "0.0005" in page
