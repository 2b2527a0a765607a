"""Fault tolerance of whole trainings: see docs/fault_tolerance.md."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DISTRIBUTED_LAUNCHER,
    ROOT,
    SCRIPTS,
    SINGLE_LAUNCHER,
    SMALL_FLAGS,
    find_processes,
    launch,
    read_metrics,
    rewrite,
    run_forked,
    split_of,
    start,
    train,
    train_in_process,
    train_two_processes,
    wait_for,
    weights_hash,
    write_split,
)
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import checkpoint
from internals.errors import UserError
from internals.fast import use_fast_modules

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# Twelve steps: three epochs of eight images in batches of two; a checkpoint after each step.
TWELVE_STEPS = ("--epochs", "3", "--checkpoint-every", "1", "--resume", "auto")


def last_losses(output_dir: Path) -> dict[int, float]:
    """Return the loss of each step, the last one where a step was repeated."""
    return {line["step"]: line["loss"] for line in read_metrics(output_dir, "train")}


def saved_step(output_dir: Path) -> int:
    return checkpoint.load_newest(output_dir)[1]["step"]


def assert_same_training(resumed: Path, reference: Path) -> None:
    assert last_losses(resumed) == last_losses(reference)
    assert list(last_losses(resumed)) == sorted(last_losses(reference))
    assert weights_hash(resumed / checkpoint.NEWEST) == weights_hash(reference / checkpoint.NEWEST)


def assert_no_processes(mark: Path, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while find_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not find_processes(mark)


# ----------------------------------------------------------------------------------- killed


def test_resume_after_kill_is_bit_exact(tiny, tmp_path):
    reference, resumed = tmp_path / "reference", tmp_path / "resumed"
    # 4 x 1 and 4 x sqrt(2) images: still 4 steps an epoch
    data = ("--data-path", tiny, "--repeat-factor-threshold", "1")
    train_in_process(*data, "--output-dir", reference, "--epochs", "3")
    flags = (*data, "--output-dir", resumed, *TWELVE_STEPS)
    for fault, workers, step in (
        ("kill@step:0:2", 0, 2),
        ("kill@step:0:3", 2, 3),
        ("kill@evaluation:0:0", 0, 4),
        ("kill@flushed:0:0", 0, 4),
        ("kill@renamed:0:0", 2, 4),
        ("kill@step:0:9", 0, 9),
    ):
        killed = train(*flags, "-j", workers, FAULT=fault)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert saved_step(resumed) == step
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    assert f"{resumed}/checkpoint_00000009.pth, 9 steps done" in done.stdout
    assert_same_training(resumed, reference)
    assert [p.name for p in checkpoint.list_numbered(resumed)] == [
        "checkpoint_00000012.pth",
        "checkpoint_00000011.pth",
    ]


def test_torchrun_restart_is_bit_exact(tiny, tmp_path):
    """The restarted processes have the same command, so no `--resume`."""
    reference, resumed = tmp_path / "reference", tmp_path / "resumed"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "2", "--checkpoint-every", "1")
    for done in train_two_processes(*flags, "--output-dir", reference):
        assert done.returncode == 0, done.stderr
    done = launch(
        *(DISTRIBUTED_LAUNCHER, *flags, "--output-dir", resumed),
        MAX_RESTARTS="1",
        FAULT="kill@step:1:6",
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint_00000006.pth, 6 steps done" in done.stdout
    assert_same_training(resumed, reference)


def test_resume_with_fewer_processes(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path, *TWELVE_STEPS, "--epochs", "2")
    killed, other = train_two_processes(*flags, "-b", "1", FAULT="kill@step:0:6")
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode == 1
    assert "another process failed: rank 0: exited" in other.stderr
    output = train_in_process(*flags, "-b", "2")
    assert "1 processes instead of 2: same batches" in output
    assert "the weights will differ, as norms see the images" in output
    assert list(last_losses(tmp_path)) == list(range(1, 9))


def test_changed_data_are_rejected_or_restart_epoch(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE_STEPS)
    train_in_process(*flags, "--max-steps", "1")
    rewrite(split_of(tiny), lambda d: d["annotations"][0].update(bbox=[5, 5, 9, 9]))
    with pytest.raises(UserError, match=r"global batch 2 \(now 1\), .*other training data"):
        train_in_process(*flags, "-b", "1")
    output = train_in_process(*flags, "-b", "1", "--resume-anyway", "--max-steps", "1")
    assert "epoch 0 restarts" in output
    assert [line["step"] for line in read_metrics(tmp_path / "out", "train")] == [1, 1]


# ------------------------------------------------------------------------------ stop requests


@pytest.mark.parametrize(
    ("target", "name"),
    [("launcher", "SIGTERM"), ("rank 1", "SIGUSR1"), ("single", "SIGINT"), ("all", "SIGTERM")],
)
def test_signal_saves_and_exits_with_75(tiny, tmp_path, target, name):
    out, number = tmp_path / "out", getattr(signal, name)
    script, batch = (SINGLE_LAUNCHER, 2) if target == "single" else (DISTRIBUTED_LAUNCHER, 1)
    flags = ("--data-path", tiny, "-b", batch, "--epochs", "50", "-j", "1", "--output-dir", out)
    process = start("bash", script, *SMALL_FLAGS, *flags, VIRTUAL_ENV=sys.prefix)
    wait_for(process, "epoch 0  3/")
    start_time = time.monotonic()
    if target == "all":  # as Slurm does, including the loading workers
        for process_id in find_processes(out):
            os.kill(process_id, number)
    elif target == "rank 1":
        ranks = [p for p in find_processes(out) if p != process.pid and is_rank(p, "1")]
        os.kill(ranks[0], number)
    else:
        process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(60) == 75, output
    assert "run the same command with --resume auto" in output
    assert "Traceback" not in output
    assert time.monotonic() - start_time < 20
    assert_no_processes(out, 5)
    steps = [line["step"] for line in read_metrics(out, "train")]
    assert saved_step(out) == steps[-1]
    assert steps == list(range(1, steps[-1] + 1))


def is_rank(process: int, rank: str) -> bool:
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    children = Path(f"/proc/{process}/task/{process}/children").read_text()
    return f"RANK={rank}".encode() in environment and bool(children)


def test_signal_to_torchrun_saves(tiny, tmp_path):
    """The exit code of torchrun is 1, whatever those of its processes are."""
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "50", "--output-dir", out)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    process = start(*torchrun, "--nproc-per-node=2", ROOT / "train.py", *SMALL_FLAGS, *flags)
    wait_for(process, "epoch 0  3/")
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait(60) == 1
    assert "run the same command with --resume auto" in output
    assert_no_processes(out, 5)
    assert saved_step(out) == list(last_losses(out))[-1]


def test_signal_during_save_saves_once(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE_STEPS)
    stopped = train(*flags, FAULT="term@flushed:0:0")
    assert stopped.returncode == 75, stopped.stderr
    assert [p.name for p in checkpoint.list_numbered(tmp_path / "out")] == [
        "checkpoint_00000001.pth"
    ]
    assert list(last_losses(tmp_path / "out")) == [1]


def test_stop_during_evaluation_resumes_evaluation(tiny, tmp_path):
    """One of two processes gets the signal; a single process resumes."""
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE_STEPS)
    for stopped in train_two_processes(*flags, "-b", "1", FAULT="term@evaluation:1:0"):
        assert stopped.returncode == 75, stopped.stderr
        assert "IoU 0.50" not in stopped.stdout
    assert saved_step(tmp_path / "out") == 4
    output = train_in_process(*flags, "--max-steps", "5")
    assert output.count("IoU 0.50:0.95") == 2
    assert [line["step"] for line in read_metrics(tmp_path / "out", "eval")] == [4, 5]
    assert [line["step"] for line in read_metrics(tmp_path / "out", "train")] == [1, 2, 3, 4, 5]


# -------------------------------------------------------------------- losses and processes


def train_with_fault(fault: str, tiny: Path, out: Path, *flags) -> str:
    """Train in two processes with an injected fault that ends both; return their stderr."""
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "3", "--output-dir", out, *flags)
    start_time = time.monotonic()
    results = train_two_processes(*flags, FAULT=fault)
    assert time.monotonic() - start_time < 60
    assert [done.returncode for done in results] == [1, 1], results
    errors = "".join(done.stderr for done in results)
    assert errors.count("train.py: error") == 1
    return errors


def test_nan_loss_ends_both_processes(tiny, tmp_path):
    errors = train_with_fault("nan@loss:1:2", tiny, tmp_path, "--checkpoint-every", "1")
    assert "the loss of step 3 is not finite: images [10" in errors
    assert "on rank 1" in errors
    assert "rank 0" not in errors
    assert "Traceback" not in errors
    assert saved_step(tmp_path) == 2


def test_infinite_float16_gradients_are_skipped(tiny, tmp_path):
    flags = ("--amp", "--amp-dtype", "float16", "--max-steps", "2")
    flags = ("--data-path", tiny, "-b", "1", "--output-dir", tmp_path, *flags)
    first, second = train_two_processes(*flags, FAULT="huge@loss:1:1", timeout=300)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    skipped = [line["skipped_steps"] for line in read_metrics(tmp_path, "train")]
    assert len(skipped) == 2
    assert skipped[1] == 1
    assert "1 steps skipped" in first.stdout


def test_raising_process_is_reported(tiny, tmp_path):
    errors = train_with_fault("raise@step:1:2", tiny, tmp_path)
    assert "train.py: error of rank 1: OverflowError: injected fault" in errors
    assert errors.count("Traceback") == 1


def test_full_disk_ends_both_processes(tiny, tmp_path):
    train_in_process(
        "--data-path", tiny, "--output-dir", tmp_path, *TWELVE_STEPS, "--max-steps", "2"
    )
    errors = train_with_fault("full@writing:0:0", tiny, tmp_path, *TWELVE_STEPS)
    assert f"{tmp_path}/checkpoint_00000003.pth: checkpoint not saved: No space left" in errors
    assert "Traceback" not in errors
    assert saved_step(tmp_path) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_hanging_process_is_reported_and_ended(tiny, tmp_path):
    out = tmp_path / "out"
    start_time = time.monotonic()
    flags = ("--data-path", tiny, "-b", "1", "--output-dir", out, "--timeout-minutes", "0.1")
    done = launch(DISTRIBUTED_LAUNCHER, *flags, FAULT="hang@step:1:2", timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_no_processes(out)
    assert "another process failed: rank 1: exited or did not respond in time" in done.stderr
    assert time.monotonic() - start_time < 60


def test_killed_worker_is_explained(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "--output-dir", out, "--epochs", "50", "-j", "1")
    process = start(sys.executable, ROOT / "train.py", *SMALL_FLAGS, *flags)
    wait_for(process, "epoch 0  3/")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait(30) == 1
    assert "lower --workers or --batch-size" in output
    assert "--shm-size" in output
    assert "Traceback" not in output
    assert_no_processes(out)


# ------------------------------------------------------------------------- memory and files


class TinyBackbone(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=8)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"0": self.convolution(images)}


def tiny_faster_rcnn(*args, **kwargs) -> FasterRCNN:
    """Return a Faster R-CNN of one convolution, so that steps take milliseconds."""
    model = FasterRCNN(
        TinyBackbone(),
        min_size=64,
        max_size=128,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_head=TwoMLPHead(8 * 49, 16),
        box_predictor=FastRCNNPredictor(16, 3),
    )
    use_fast_modules(model)
    return model


def train_and_monitor(argv: list[str], log: Path) -> None:
    """Train; at every tenth step log the step, resident memory (KiB) and open files."""
    import ctypes

    import models
    import train
    import utils

    seed_step = utils.seed_step

    def log_and_seed_step(seed: int, step: int, images: int) -> list[int]:
        if step % 10 == 0:
            ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps freed memory otherwise
            rows = Path("/proc/self/status").read_text().splitlines()
            resident = next(row.split()[1] for row in rows if row.startswith("VmRSS"))
            with log.open("a") as file:
                print(step, resident, len(os.listdir("/proc/self/fd")), file=file)
        return seed_step(seed, step, images)

    utils.seed_step = log_and_seed_step
    models.build_model = tiny_faster_rcnn
    sys.argv = argv
    train.run_and_exit()


def test_memory_and_open_files_do_not_grow(tiny, tmp_path):
    shutil.rmtree(tiny / "train2017")
    write_split(tiny, "train", [(64, 48), (48, 64)] * 50, [[[2, 4, 4, 30, 20]]] * 100)
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--epochs", "5", "-j", "1")
    flags = (*flags, "--checkpoint-every", "10", "--print-freq", "10", "--lr", "1e-6", "-b", "1")
    argv = ["train.py", *SMALL_FLAGS, *map(str, flags)]
    done = run_forked(train_and_monitor, argv, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    steps, resident, files = np.loadtxt(tmp_path / "log", dtype=int).T
    assert steps.tolist() == list(range(0, 500, 10))
    early, late = slice(10, 20), slice(40, 50)
    assert resident[late].min() - resident[early].min() < 10_000  # KiB
    assert files[late].min() - files[early].min() <= 2


# --------------------------------------------------------------------------- several machines


def find_free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_lost_machine_rejoins(tiny, tmp_path):
    """Two agents of torchrun on this machine, with one process each."""
    script = SCRIPTS / "train_fasterrcnn_resnet50_amp_multinode_torch.sh"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "4", "--checkpoint-every", "1")
    flags = (*flags, "--lr", "1e-4")
    port, out, reference = find_free_port(), tmp_path / "out", tmp_path / "reference"

    def start_machine(rank: int) -> subprocess.Popen:
        return start(
            *("bash", script, *SMALL_FLAGS, *flags, "--output-dir", out),
            **{"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"NPROC_PER_NODE": 1, "VIRTUAL_ENV": sys.prefix, "TORCH_DISTRIBUTED_DEBUG": "OFF"},
        )

    first, second = start_machine(0), start_machine(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "checkpoint_00000004.pth").exists():
        time.sleep(0.05)
    second.kill()  # the agent only; the training process that it started runs on
    time.sleep(2)
    restarted = start_machine(1)
    output = first.stdout.read()
    assert first.wait(200) == 0, output
    assert restarted.wait(60) == 0, restarted.stdout.read()
    assert second.wait(5) != 0
    assert_no_processes(out)
    amp = ["--amp"] if "mixed" in output else []
    for done in train_two_processes(*flags, "--output-dir", reference, *amp):
        assert done.returncode == 0, done.stderr
    assert_same_training(out, reference)
