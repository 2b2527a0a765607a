"""The shell scripts, and trainings in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    DISTRIBUTED_LAUNCHER,
    ROOT,
    SCRIPTS,
    launch,
    read_losses,
    read_metrics,
    run,
    train_in_process,
    train_two_processes,
)

from internals import preemption

LAUNCHERS = sorted(SCRIPTS.glob("train_*.sh"))


def copy_scripts(tmp_path: Path) -> tuple[Path, dict]:
    """Copy the scripts; return the folder and an environment whose Python prints its arguments."""
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
def test_launchers_pass_flags_literally(tmp_path, script):
    folder, environment = copy_scripts(tmp_path)
    flags = ["--data-path", "my images", "$(touch x)", "a'b\"c", "*"]
    for cwd in (tmp_path, folder):
        done = subprocess.run(
            ["bash", folder / script, *flags],
            cwd=cwd,
            env={**os.environ, **environment, "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        target = "train.py" if script.endswith(("50_torch.sh", "50_amp_torch.sh")) else "launch.py"
        assert lines[0].endswith(f"{target}]")
        added = ["[--amp]"] * ("amp" in script) + ["[--resume]", "[auto]"] * ("multinode" in script)
        assert lines[1:] == added + [f"[{flag}]" for flag in flags]
        assert not (cwd / "x").exists()


def test_scripts_are_valid_bash():
    for script in SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        if script.name != "common.sh":
            assert "set -euo pipefail" in script.read_text()
            assert os.access(script, os.X_OK)


# -------------------------------------------------------------------------------- installing


@pytest.mark.slow
def test_reinstalling_changes_nothing():
    done = run("bash", SCRIPTS / "init_torch.sh", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ready: torch {torch.__version__}")
    assert "installing" not in done.stdout


@pytest.mark.slow
def test_existing_pytorch_is_reused(tmp_path):
    """As in a vendor's container, whose Python already has PyTorch."""
    root = tmp_path / "my project"
    (root / "start_scripts").mkdir(parents=True)
    for name in ("start_scripts/common.sh", "start_scripts/init_torch.sh", "requirements.txt"):
        (root / name).write_text((ROOT / name).read_text())
    done = run(
        *("bash", root / "start_scripts/init_torch.sh", "--no-index"),
        PYTHONPATH=os.pathsep.join(path for path in sys.path if "site-packages" in path),
        PYTHON_FOR_VENV=getattr(sys, "_base_executable", sys.executable),
        VIRTUAL_ENV="",
        CONDA_PREFIX="",
    )
    assert done.returncode == 0, done.stderr
    assert "using the PyTorch of" in done.stdout
    assert f"ready: torch {torch.__version__}" in done.stdout
    assert "include-system-site-packages = true" in (root / ".venv/pyvenv.cfg").read_text()
    assert not list((root / ".venv").glob("lib*/**/site-packages/torch"))


@pytest.mark.slow
def test_test_script_runs_from_any_folder(tmp_path):
    (tmp_path / "test_stray.py").write_text("raise SystemExit('not ours')")
    flags = ("--fast", "--collect-only", "--numprocesses", "0", "-k", "launchers")
    done = run("bash", SCRIPTS / "test.sh", *flags, cwd=tmp_path, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_launchers.py::test_scripts_are_valid_bash" in done.stdout
    assert "test_reinstalling" not in done.stdout  # it is slow
    assert "tests/test_samplers.py" not in done.stdout
    assert "stray" not in done.stdout + done.stderr


# ----------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_evaluate_like_one(tiny, tmp_path):
    out = tmp_path / "two"
    done = launch(
        DISTRIBUTED_LAUNCHER, "--data-path", tiny, "--output-dir", out, "-b", "1", timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no CUDA device was found: 2 processes share the CPU") == 1
    assert done.stdout.count("IoU 0.50:0.95") == 1
    assert "Warning" not in done.stdout + done.stderr
    assert len(read_losses(out)) == 4
    saved = torch.load(out / "checkpoint.pth", weights_only=True)
    assert saved["args"]["global_batch"] == 2
    # three images on two processes: each is scored once, as by a single process
    train_in_process(
        *("--data-path", tiny, "--test-only", "--resume", out / "checkpoint.pth"),
        *("--output-dir", tmp_path / "one"),
    )
    assert read_metrics(tmp_path / "one", "eval")[0]["AP"] == read_metrics(out, "eval")[0]["AP"]
    detections = (out / "detections.json").read_text()
    assert json.loads((tmp_path / "one/detections.json").read_text()) == json.loads(detections)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["batch", "image"])
def test_user_error_ends_launcher_with_2(tiny, tmp_path, case):
    """An error before and an error after the processes are connected."""
    (tiny / "train2017/3.png").write_bytes(b"no image")
    batch_size = "5" if case == "batch" else "1"
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "-b", batch_size)
    done = launch(DISTRIBUTED_LAUNCHER, *flags, timeout=120)
    assert done.returncode == 2, done.stderr
    expected = "fewer than one global batch of 10" if case == "batch" else "3.png cannot be read"
    assert expected in done.stderr
    assert done.stderr.count("train.py: error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["resume", "weights"])
def test_error_of_rank_0_ends_both_processes(tiny, tmp_path, case):
    flags = ("--resume", "missing.pth") if case == "resume" else ("--weights-backbone", "IMAGE9")
    environment = {preemption.LAUNCH_FOLDER_VARIABLE: str(tmp_path)}
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *flags)
    results = train_two_processes(*flags, **environment)
    assert all(done.returncode != 0 for done in results)
    assert (tmp_path / "exit").read_text() == "2"  # the exit code of the launcher
    errors = "".join(done.stderr for done in results)
    assert errors.count("train.py: error:") == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_skip_same_bad_images(tiny, tmp_path):
    """Each process opens half of the images, so each detects one of the two."""
    for name in ("2", "5"):
        (tiny / f"train2017/{name}.png").write_bytes(b"no image")
    flags = ("--data-path", tiny, "--output-dir", tmp_path, "-b", "1", "--max-bad-images", "2")
    first, second = train_two_processes(*flags)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("skipped:") == 2
    assert len(read_losses(tmp_path)) == 3  # six images in batches of two


# --------------------------------------------------------------------------------------- Slurm

STUB = """#!/usr/bin/env bash
printf '%s' "$(basename "$0")" >> "$LOG"
printf ' [%s]' "$@" >> "$LOG"
echo >> "$LOG"
case "$(basename "$0") $1" in
    "scontrol show") printf 'node7\\nnode8\\n' ;;
    sbatch*)
        export SLURM_JOB_ID=4242 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST='node[7-8]'
        exec bash "$@" ;;
    srun*)
        while [[ $1 == --* ]]; do shift; done
        trap 'echo srun got USR1 >> "$LOG"; kill -USR1 $child' USR1
        SLURM_NODEID=1 "$@" &
        child=$!
        code=0
        wait $child || code=$?
        [ $code -lt 128 ] || { code=0; wait $child || code=$?; }
        exit $code ;;
esac
"""
NODE = """#!/usr/bin/env bash
echo "node [$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT]" "$@" >> "$LOG"
trap 'exit 75' USR1
[ "$1" = "$(printf 'stop me')" ] && while true; do sleep 0.1; done
exit "${CODE:-0}"
"""


@pytest.mark.parametrize(("case", "code"), [("done", 0), ("failed", 3), ("stopped", 75)])
def test_slurm_job_starts_nodes_and_requeues(tmp_path, case, code):
    folder = tmp_path / "start scripts"
    folder.mkdir()
    script = shutil.copy(SCRIPTS / "train_fasterrcnn_resnet50_amp_slurm.sh", folder)
    (folder / "train_fasterrcnn_resnet50_amp_multinode_torch.sh").write_text(NODE)
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    first = "stop me" if case == "stopped" else "--epochs"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    for name in ("SLURM_JOB_ID", "START_SCRIPTS"):
        env.pop(name, None)
    env |= {"CODE": str(code), "SBATCH_FLAGS": "--nodes=2"} if case != "stopped" else {}
    if case == "stopped":  # the batch script gets the signal; sbatch has replaced itself by it
        process = subprocess.Popen(["bash", script, first, "$(touch x)"], env=env, cwd=tmp_path)
        end = time.monotonic() + 10
        while time.monotonic() < end and not (log.exists() and "node [" in log.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75
    else:
        env["SBATCH_FLAGS"] = ""
        assert subprocess.run(["bash", script, first, "$(touch x)"], env=env).returncode == code
    calls = log.read_text()
    assert f"sbatch [{script}] [{first}] [$(touch x)]" in calls
    assert "scontrol [show] [hostnames] [node[7-8]]" in calls
    assert f"node [1 of 2 at node7:24242] {first} $(touch x)" in calls
    assert ("scontrol [requeue] [4242]" in calls) == (case == "stopped")
    assert ("srun got USR1" in calls) == (case == "stopped")
    assert not (tmp_path / "x").exists()
