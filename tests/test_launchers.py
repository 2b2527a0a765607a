"""The shell scripts, and trainings in two processes."""

import importlib.util
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


# ------------------------------------------------------------------------------- environment

TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first.machine"}


@pytest.fixture
def launch_py(monkeypatch, capsys):
    """Return a function that runs launch.py in an environment, with a stand-in for torchrun.

    It returns the exit code, the flags that torchrun got, and what was printed to stderr.
    """
    spec = importlib.util.spec_from_file_location("launch", SCRIPTS / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []
    monkeypatch.setattr(module, "install_signal_handlers", lambda folder: None)
    monkeypatch.setattr(module, "torchrun", calls.append)
    monkeypatch.setattr(sys, "argv", ["launch.py"])

    def launch_py(devices: int = 0, **environment) -> tuple[int, list[str], str]:
        calls.clear()
        names = ("NPROC_PER_NODE", "MAX_RESTARTS", "NNODES", "NODE_RANK", "MASTER_ADDR")
        with monkeypatch.context() as patch:
            for name in (*names, "MASTER_PORT", "SLURM_JOB_ID"):
                patch.delenv(name, raising=False)
            for name in ("OMP_NUM_THREADS", preemption.LAUNCH_FOLDER_VARIABLE):
                patch.setenv(name, "1")  # restored afterwards
            patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            patch.setattr(torch.cuda, "device_count", lambda: devices)
            patch.setattr(torch.cuda, "is_available", lambda: devices > 0)
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as caught:
                module.main()
        return caught.value.code, calls[0] if calls else [], capsys.readouterr().err

    return launch_py


@pytest.mark.parametrize(
    ("value", "devices", "expected"),
    [
        *(("gpu", 3, 3), ("3", 0, 3), (" 1 ", 0, 1), ("", 0, 2), ("", 4, 4), ("2", 4, 2)),
        *(("cpu", 0, os.cpu_count()), ("auto", 0, os.cpu_count())),
    ],
)
def test_number_of_processes(launch_py, value, devices, expected):
    code, flags, errors = launch_py(devices, NPROC_PER_NODE=value)
    assert (code, errors) == (0, "")
    assert f"--nproc-per-node={expected}" in flags
    assert {"--standalone", "--max-restarts=0"} < set(flags)


def test_flags_for_several_machines(launch_py):
    for environment, endpoint in (
        ({}, "first.machine:29400"),
        ({"MASTER_PORT": "1234"}, "first.machine:1234"),
        ({"MASTER_ADDR": "[fe80::1%eth0]"}, "[fe80::1%eth0]:29400"),
    ):
        code, flags, errors = launch_py(**{**TWO_NODES, "MAX_RESTARTS": "3", **environment})
        assert (code, errors) == (0, "")
        assert f"--rdzv-endpoint={endpoint}" in flags
        assert {"--nnodes=2", "--node-rank=1", "--max-restarts=3"} < set(flags)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is '0': set it to a whole number from 1"),
        ({"NPROC_PER_NODE": "-1"}, "NPROC_PER_NODE is '-1'"),
        ({"NPROC_PER_NODE": "2.0"}, "or to gpu, cpu or auto"),
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE is 'all'"),
        ({"NPROC_PER_NODE": "9" * 30}, "NPROC_PER_NODE is '999"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE is 'gpu', but no CUDA device was found"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS is '-1'"),
        ({"NNODES": "0"}, "NNODES is '0'"),
        ({"NNODES": "1:2"}, "NNODES is '1:2'"),
        ({"NNODES": "2"}, "NNODES is 2: set NODE_RANK and MASTER_ADDR, too"),
        (
            {"MASTER_PORT": "http"},
            "MASTER_PORT is 'http': set it to a whole number from 1 to 65535",
        ),
        ({"NODE_RANK": "first"}, "NODE_RANK is 'first'"),
        ({**TWO_NODES, "NODE_RANK": "2"}, "NODE_RANK is '2': set it to a whole number from 0 to 1"),
        ({**TWO_NODES, "NODE_RANK": "a"}, "NODE_RANK is 'a'"),
        ({**TWO_NODES, "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({**TWO_NODES, "MASTER_ADDR": "a:29400"}, "MASTER_ADDR is 'a:29400': set it to the name"),
        ({**TWO_NODES, "MASTER_ADDR": "tcp://a"}, "MASTER_ADDR is 'tcp://a'"),
    ],
)
def test_nonsense_in_the_environment_is_one_sentence(launch_py, environment, message):
    code, flags, errors = launch_py(**environment)
    assert (code, flags) == (2, [])
    assert errors.startswith(f"launch.py: error: {message}") or message in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_launcher_exits_with_2_for_nonsense_in_the_environment():
    done = launch(DISTRIBUTED_LAUNCHER, NPROC_PER_NODE="none")
    assert done.returncode == 2
    assert done.stderr.startswith("launch.py: error: NPROC_PER_NODE is 'none'")
    assert done.stderr.count("\n") == 1


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
    expected = "fewer than the 10 of a step" if case == "batch" else "3.png cannot be read"
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
