"""The benchmarks run and write their figures; the figures themselves are not tested."""

import json
import sys

import pytest
from helpers import ROOT, run, train_in_process

pytestmark = pytest.mark.slow


def quick(name: str, tmp_path, *arguments) -> tuple[str, dict]:
    file, script = tmp_path / "figures.json", ROOT / f"benchmarks/{name}.py"
    done = run(sys.executable, script, *arguments, "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert {"cpu", "cores", "torch", "pillow"} <= figures["machine"].keys()
    return done.stdout, figures


def test_data(tmp_path):
    printed, figures = quick("data", tmp_path)
    assert "annotation file to first batch, s, 1x" in printed
    for arm in ("plain", "ours"):
        assert figures["loading"]["1"][arm][0]["seconds"] > 0
        assert figures["workers"][arm][0]["seconds"] > 0
    ((turn,),) = figures["images"].values()
    assert set(turn) == {"references_ms", "v2_wrapper_ms", "ours_ms", "decoding_ms"}
    assert min(turn.values()) > 0


def test_evaluation(tmp_path):
    printed, figures = quick("evaluation", tmp_path)
    turns = figures["found"]["1"]
    assert set(turns) == {"per image", "at once", "ours, pycocotools", "ours, hotcoco"}
    numbers = [turn["numbers"] for way in turns.values() for turn in way]
    assert 0 < numbers[0][0] < 1
    assert all(each == numbers[0] for each in numbers)
    if sys.platform == "linux":
        assert all(turn["peak_mib"] > 0 for way in turns.values() for turn in way)
    assert printed.splitlines()[-3].rstrip(" |").endswith("yes")


def test_step(tmp_path):
    printed, figures = quick("step", tmp_path)
    stock, ours = (figures["found"]["1"][arm][0] for arm in ("stock, float32", "ours, amp"))
    for arm in (stock, ours):
        assert arm["step_ms"] > arm["forward_ms"] > 0
        assert arm["evaluation_images_per_second"] > 0
        assert arm["end_to_end_images_per_second"] > 0
    # These two are counted, not timed.
    assert ours["operators"] < stock["operators"]
    assert ours["host_reads"] < stock["host_reads"]
    assert "x stock, float32" in printed


def test_accuracy(tmp_path):
    printed, figures = quick("accuracy", tmp_path)
    stock, recipe = (figures["found"][f"{arm}, seed 0"][0] for arm in ("stock", "recipe"))
    assert stock["weights"] == recipe["weights"]
    assert 0 <= recipe["AP50"] <= 1
    assert stock["AP"] != recipe["AP"]
    assert "recipe - stock: " in printed


def test_suspects(tmp_path):
    printed, figures = quick("suspects", tmp_path)
    assert len(figures["found"]["hotcoco"]) == len(figures["found"]["here"]) == 5
    assert all(sum(found.values()) > 50 for found in figures["found"]["here"])
    assert "| hotcoco |" in printed


def test_tiles(tiny, tmp_path):
    train_in_process("--data-path", tiny, "--output-dir", tmp_path / "out")
    work = (tmp_path / "out/model_best.pth", "--data-path", tiny, "--tile", 64)
    printed, figures = quick("tiles", tmp_path, *work)
    arms = [figures["found"][name] for name in ("single images", "tiles", "whole mosaic")]
    assert all(arm["boxes"] > 0 and arm["seconds"] > 0 for arm in arms)
    assert "| whole mosaic  |" in printed


def test_gpu_rehearsal(tmp_path):
    """On a CPU; the other phases are rehearsed by hand, as they take two minutes."""
    flags = ("--rehearse", "--out", tmp_path, "--phases", "machine", "waits", "evaluation")
    done = run(sys.executable, ROOT / "benchmarks/gpu.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all phases are complete" in done.stdout
    found = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert list(found) == ["machine", "waits", "evaluation"]
    arms = {name.partition(",")[0]: values for name, values in found["evaluation"].items()}
    assert arms.keys() == {"stock", "parts", "fixed"}
    assert all(values["detections_per_image"] > 0 for values in arms.values())
    assert "| fixed, batch 1 |" in (tmp_path / "gpu_cpu.md").read_text()


def test_gpu_phase_that_fails_is_named(tmp_path):
    work = ("--data-path", tmp_path / "missing")
    flags = ("--rehearse", "--out", tmp_path, "--phases", "machine", "commands", *work)
    done = run(sys.executable, ROOT / "benchmarks/gpu.py", *flags)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "incomplete: commands"
