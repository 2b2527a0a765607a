"""The shell scripts as processes, and two real processes with Gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL,
    ONE,
    ROOT,
    SCRIPTS,
    evaluations,
    launch,
    losses,
    rewrite,
    run,
    split_of,
    train,
    weights_hash,
)

import coco_utils
import samplers

LAUNCHERS = sorted(SCRIPTS.glob("train_*.sh"))


def environment_of(tmp_path: Path) -> tuple[Path, dict]:
    """A copy of the scripts whose Python only prints what it was called with."""
    folder = tmp_path / "a project" / "start_scripts"
    folder.mkdir(parents=True)
    for script in SCRIPTS.glob("*.*"):
        (folder / script.name).write_bytes(script.read_bytes())
    python = tmp_path / "an env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nprintf "[%s]\\n" "$@"\n')
    python.chmod(0o755)
    return folder, {"VIRTUAL_ENV": str(python.parent.parent)}


@pytest.mark.parametrize("script", [p.name for p in LAUNCHERS if "slurm" not in p.name])
def test_launchers_hand_on_what_the_user_says_literally(tmp_path, script):
    folder, environment = environment_of(tmp_path)
    flags = ["--data-path", "my pictures", "$(touch x)", "a'b\"c", "*"]
    for where in (tmp_path, folder):
        done = subprocess.run(
            ["bash", folder / script, *flags],
            cwd=where,
            env={**os.environ, **environment, "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        target = "train.py" if script.endswith(("50_torch.sh", "50_amp_torch.sh")) else "launch.py"
        assert lines[0].endswith(f"{target}]")
        own = ["[--amp]"] * ("amp" in script) + ["[--resume]", "[auto]"] * ("multinode" in script)
        assert lines[1:] == own + [f"[{flag}]" for flag in flags]
        assert not (where / "x").exists()


def test_the_scripts_are_bash_without_faults():
    for script in SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        if script.name != "common.sh":
            assert "set -euo pipefail" in script.read_text()
            assert os.access(script, os.X_OK)


def test_installing_again_is_quick_and_says_what_there_is():
    first = run("bash", SCRIPTS / "init_torch.sh", VIRTUAL_ENV=sys.prefix)
    assert first.returncode == 0, first.stderr
    begin = time.monotonic()
    done = run("bash", SCRIPTS / "init_torch.sh", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ready: torch {torch.__version__}")
    assert "installing" not in done.stdout
    assert time.monotonic() - begin < 60


def test_a_pytorch_that_is_there_is_used_and_not_replaced(tmp_path):
    """As in a vendor's container: the Python that .venv is made with has one.

    What is optional and cannot be installed is done without.
    """
    root = tmp_path / "my project"
    (root / "start_scripts").mkdir(parents=True)
    for name in ("start_scripts/common.sh", "start_scripts/init_torch.sh", "requirements.txt"):
        (root / name).write_text((ROOT / name).read_text())
    with (root / "requirements.txt").open("a") as file:
        file.write("no-wheel-of-this>=1\n")
    done = run(
        *("bash", root / "start_scripts/init_torch.sh", "--no-index"),
        PYTHONPATH=os.pathsep.join(path for path in sys.path if "site-packages" in path),
        PYTHON_FOR_VENV=getattr(sys, "_base_executable", sys.executable),
        VIRTUAL_ENV="",
        CONDA_PREFIX="",
    )
    assert done.returncode == 0, done.stderr
    assert "using the PyTorch of" in done.stdout
    assert done.stdout.count("going on without") == 1
    assert "going on without no-wheel-of-this: README.md says" in done.stdout
    assert f"ready: torch {torch.__version__}" in done.stdout
    assert "include-system-site-packages = true" in (root / ".venv/pyvenv.cfg").read_text()
    assert not list((root / ".venv").glob("lib*/**/site-packages/torch"))


def test_the_tests_are_the_projects_own_wherever_they_are_called(tmp_path):
    (tmp_path / "test_stray.py").write_text("raise SystemExit('not ours')")
    flags = (
        "--collect-only",
        "--quiet",
        "--numprocesses",
        "0",
        "--deselect",
        "tests/test_train.py",
    )
    done = run(*("bash", SCRIPTS / "test.sh", *flags), cwd=tmp_path, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_samplers.py" in done.stdout
    assert "stray" not in done.stdout + done.stderr


def test_one_process_trains_through_the_launcher(tiny, tmp_path):
    done = launch(ONE, "--data-path", tiny, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "device: cpu: no CUDA device was found, precision: " in done.stdout
    assert len(losses(tmp_path / "out")) == 4


def test_two_processes_train_and_score_as_one_does(tiny, tmp_path):
    out = tmp_path / "two"
    done = launch(ALL, "--data-path", tiny, "--output-dir", out, "-b", "1", timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no CUDA device was found: 2 processes share the CPU") == 1
    assert done.stdout.count("AP at IoU 0.50:0.95") == 1
    assert "Warning" not in done.stdout + done.stderr
    assert len(losses(out)) == 4
    saved = torch.load(out / "checkpoint.pth", weights_only=True)
    assert saved["args"]["global_batch"] == 2
    # three pictures on two processes: each is scored once, and alike by one process alone
    amp = ["--amp"] if "mixed" in done.stdout else []
    tested = train(
        *("--data-path", tiny, "--test-only", "--resume", out / "checkpoint.pth", *amp),
        *("--output-dir", tmp_path / "one"),
    )
    assert tested.returncode == 0, tested.stderr
    assert evaluations(tmp_path / "one")[0]["AP"] == evaluations(out)[0]["AP"]
    found = [json.loads((d / "detections.json").read_text()) for d in (out, tmp_path / "one")]
    assert found[0] == found[1]


def test_two_processes_resume_to_the_same_weights(tiny, tmp_path):
    flags = ("--data-path", tiny, "-b", "1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(ALL, *flags, "--output-dir", whole).returncode == 0
    for stop in ("2", "4"):
        done = launch(ALL, *flags, "--output-dir", cut, "--max-steps", stop, "--resume", "auto")
        assert done.returncode == 0, done.stderr
    assert losses(cut) == losses(whole)
    assert weights_hash(cut / "checkpoint.pth") == weights_hash(whole / "checkpoint.pth")


def test_two_processes_of_one_see_the_images_of_one_of_two(tiny):
    index = coco_utils.CocoIndex(split_of(tiny))
    groups = samplers.aspect_ratio_groups(*index.sizes.T, 3)
    whole = samplers.TrainingPlan(groups, 2)
    halves = [samplers.TrainingPlan(groups, 1, 2, rank) for rank in range(2)]
    assert list(whole) == [a + b for a, b in zip(*halves, strict=True)]


@pytest.mark.parametrize(
    "case", ["nan", "missing", "flag", "resume", "batch", "picture", "weights"]
)
def test_what_is_wrong_ends_all_processes_with_2_and_one_message(tiny, tmp_path, case):
    flags = {
        "missing": ("--data-path", tmp_path / "nowhere"),
        "flag": ("--data-path", tiny, "--momentum", "x"),
        "resume": ("--data-path", tiny, "--resume", tmp_path / "gone.pth"),
        "batch": ("--data-path", tiny, "-b", "5"),
        "weights": ("--data-path", tiny, "--weights-backbone", "IMAGE9"),
    }.get(case, ("--data-path", tiny))
    if case == "nan":
        box = [1.0, float("nan"), 5, 5]
        rewrite(split_of(tiny), lambda data: data["annotations"][2].update(bbox=box))
    if case == "picture":
        (tiny / "train2017/3.png").write_bytes(b"no picture")
    done = launch(ALL, *flags, "--output-dir", tmp_path / "out", timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("train.py: error:") == 1
    assert "Traceback" not in done.stderr


def test_both_processes_leave_out_the_same_bad_images(tiny, tmp_path):
    """One process would find the first, the other the second: each opens half of the images."""
    for name in ("2", "5"):
        (tiny / f"train2017/{name}.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    done = launch(
        *(ALL, "--data-path", tiny, "--output-dir", out, "-b", "1", "--max-bad-images", "2"),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out:") == 2
    assert len(losses(out)) == 3  # six images by twos


def test_a_loss_that_is_not_finite_stops_both_processes(tiny, tmp_path):
    flags = ("--data-path", tiny, "-b", "1", "--lr", "1e30", "--epochs", "2")
    done = launch(ALL, *flags, "--output-dir", tmp_path / "out", timeout=200)
    assert done.returncode == 1
    assert "is not finite: images [10" in done.stderr
    assert not (tmp_path / "out/checkpoint.pth").exists()
