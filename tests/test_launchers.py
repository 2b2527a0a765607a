"""The shell scripts as processes, and two real processes with Gloo."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
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


def test_the_shapes_are_a_small_coco(tmp_path):
    script = ROOT / "datasets/shapes.py"
    done = run(sys.executable, script, tmp_path / "shapes")
    assert done.returncode == 0, done.stderr
    for part in ("train", "val"):
        index = coco_utils.CocoIndex(split_of(tmp_path / "shapes", part))
        assert index.categories.ids == (1, 3, 6)
        assert index.iscrowd.any()
        assert len(index.images_with_boxes()) < len(index)
        x, y, w, h = index.boxes.T
        assert (x >= 0).all()
        assert (y >= 0).all()
        assert (x + w <= 128.1).all()
        assert (y + h <= 128.1).all()
    again = run(sys.executable, script, tmp_path / "again")
    assert again.returncode == 0
    for file in (tmp_path / "shapes").rglob("*.*"):
        other = tmp_path / "again" / file.relative_to(tmp_path / "shapes")
        assert file.read_bytes() == other.read_bytes()
    assert run(sys.executable, script).returncode == 1


def make_archives(tmp_path: Path, member: str = "{}/0.txt") -> tuple[Path, Path]:
    """Three small archives under a mirror's paths, and a script that expects just these."""
    root = tmp_path / "project"
    for name in ("start_scripts", "datasets"):
        (root / name).mkdir(parents=True)
    (root / "start_scripts/common.sh").write_text((SCRIPTS / "common.sh").read_text())
    text = (ROOT / "datasets/download_coco.sh").read_text()
    mirror = tmp_path / "mirror"
    for line in [line for line in text.splitlines() if line.startswith("get ")]:
        _, name, path, size, md5 = line.split()
        (mirror / path).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(mirror / path, "w") as archive:
            archive.writestr(member.format(name), name * 1000)
        content = (mirror / path).read_bytes()
        text = text.replace(size, str(len(content)))
        text = text.replace(md5, hashlib.md5(content).hexdigest())
    script = root / "datasets/download_coco.sh"
    script.write_text(text)
    return script, mirror


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_coco_downloads_go_on_are_checked_and_are_not_repeated(tmp_path):
    script, mirror = make_archives(tmp_path)
    coco = tmp_path / "my coco"

    def download():
        return run("bash", script, coco, COCO_URL=f"file://{mirror}", VIRTUAL_ENV=sys.prefix)

    val = mirror / "zips/val2017.zip"
    content = val.read_bytes()
    val.unlink()
    cut = download()
    assert cut.returncode == 2
    assert "run the same command again" in cut.stderr
    assert (coco / "annotations/0.txt").exists()
    val.write_bytes(content[:-1] + b"x")
    tampered = download()
    assert tampered.returncode == 2
    assert "was not what COCO published" in tampered.stderr
    assert not (coco / "val2017").exists()
    val.write_bytes(content)
    (coco / "val2017.zip").write_bytes(content[:50])  # what a cut download leaves
    done = download()
    assert done.returncode == 0, done.stderr
    assert (coco / "val2017/0.txt").read_text() == "val2017" * 1000
    assert not list(coco.glob("*.zip"))
    again = download()
    assert again.stdout.count(": complete") == 3
    assert "downloading" not in again.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path):
    script, mirror = make_archives(tmp_path, member="../{}.txt")
    coco = tmp_path / "coco"
    done = run("bash", script, coco, COCO_URL=f"file://{mirror}", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 2
    assert "../annotations.txt would be written outside" in done.stderr
    assert not (tmp_path / "annotations.txt").exists()
