"""Whole trainings that are killed, stopped, starved or broken: see docs/fault_tolerance.md."""

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
    ALL,
    ONE,
    ROOT,
    SCRIPTS,
    SMALL,
    launch,
    metrics,
    processes_of,
    rewrite,
    run_forked,
    split_of,
    start,
    train,
    train_in_process,
    train_two,
    wait_for,
    weights_hash,
    write_part,
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
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc"),
]

# Twelve steps: three epochs of eight images by twos, saved after each.
TWELVE = ("--epochs", "3", "--checkpoint-every", "1", "--resume", "auto")


def last_losses(output_dir: Path) -> dict[int, float]:
    """The loss of each step; of a step that was taken twice, the last one's."""
    return {line["step"]: line["loss"] for line in metrics(output_dir, "train")}


def saved_step(output_dir: Path) -> int:
    return checkpoint.load_newest(output_dir)[1]["step"]


def assert_same_training(cut: Path, whole: Path) -> None:
    assert last_losses(cut) == last_losses(whole)
    assert list(last_losses(cut)) == sorted(last_losses(whole))
    assert weights_hash(cut / checkpoint.NEWEST) == weights_hash(whole / checkpoint.NEWEST)


def assert_nothing_runs(mark: Path, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while processes_of(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(mark)


# ----------------------------------------------------------------------------------- killed


def test_killed_process_resumes_to_the_same_weights(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_in_process("--data-path", tiny, "--output-dir", whole, "--epochs", "3")
    flags = ("--data-path", tiny, "--output-dir", cut, *TWELVE)
    for fault, workers, step in (
        ("kill@step:0:2", 0, 2),
        ("kill@step:0:3", 2, 3),
        ("kill@evaluation:0:0", 0, 4),
        ("kill@flushed:0:0", 0, 4),
        ("kill@renamed:0:0", 2, 4),
        ("kill@step:0:9", 0, 9),
    ):
        died = train(*flags, "-j", workers, FAULT=fault)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert saved_step(cut) == step
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    assert f"resumed: {cut}/checkpoint_00000009.pth, 9 steps done" in done.stdout
    assert_same_training(cut, whole)
    assert [p.name for p in checkpoint.list_numbered(cut)] == [
        "checkpoint_00000012.pth",
        "checkpoint_00000011.pth",
    ]


def test_killed_process_of_two_is_restarted_to_the_same_weights(tiny, tmp_path):
    """Without a flag to resume: torchrun starts all processes again by the command it has."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "2", "--checkpoint-every", "1")
    for done in train_two(*flags, "--output-dir", whole):
        assert done.returncode == 0, done.stderr
    done = launch(
        *(ALL, *flags, "--output-dir", cut), MAX_RESTARTS="1", FAULT="kill@step:1:6", timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint_00000006.pth, 6 steps done" in done.stdout
    assert_same_training(cut, whole)


def test_resume_with_fewer_processes_sees_every_planned_image_once(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path, *TWELVE, "--epochs", "2")
    died, left = train_two(*flags, "-b", "1", FAULT="kill@step:0:6")
    assert died.returncode == -signal.SIGKILL
    assert left.returncode == 1
    assert "ended because of rank 0: gone" in left.stderr
    said = train_in_process(*flags, "-b", "2")
    assert "1 processes instead of 2: every planned image is seen once" in said
    assert "not bitwise" in said
    assert list(last_losses(tmp_path)) == list(range(1, 9))


def test_changed_data_are_refused_or_restart_the_epoch(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    train_in_process(*flags, "--max-steps", "1")
    rewrite(split_of(tiny), lambda d: d["annotations"][0].update(bbox=[5, 5, 9, 9]))
    with pytest.raises(UserError, match=r"global batch 2 \(now 1\), .*other training data"):
        train_in_process(*flags, "-b", "1")
    said = train_in_process(*flags, "-b", "1", "--resume-anyway", "--max-steps", "1")
    assert "epoch 0 restarts" in said
    assert [line["step"] for line in metrics(tmp_path / "out", "train")] == [1, 1]


# ------------------------------------------------------------------------------ asked to stop


@pytest.mark.parametrize(
    ("to", "name"),
    [("launcher", "SIGTERM"), ("worker", "SIGUSR1"), ("one", "SIGINT"), ("everybody", "SIGTERM")],
)
def test_signal_saves_once_and_ends_all_processes_with_75(tiny, tmp_path, to, name):
    out, number = tmp_path / "out", getattr(signal, name)
    script, batch = (ONE, 2) if to == "one" else (ALL, 1)
    flags = ("--data-path", tiny, "-b", batch, "--epochs", "50", "-j", "1", "--output-dir", out)
    process = start("bash", script, *SMALL, *flags, VIRTUAL_ENV=sys.prefix)
    wait_for(process, "epoch 0 [3")
    begin = time.monotonic()
    if to == "everybody":  # as Slurm does: loading processes, too
        for each in processes_of(out):
            os.kill(each, number)
    elif to == "worker":
        workers = [p for p in processes_of(out) if p != process.pid and is_rank(p, "1")]
        os.kill(workers[0], number)
    else:
        process.send_signal(number)
    said = process.stdout.read()
    assert process.wait(60) == 75, said
    assert "every step of a training is saved, go on with --resume auto" in said
    assert "Traceback" not in said
    assert time.monotonic() - begin < 20
    assert_nothing_runs(out, 5)
    steps = [line["step"] for line in metrics(out, "train")]
    assert saved_step(out) == steps[-1]
    assert steps == list(range(1, steps[-1] + 1))


def is_rank(process: int, rank: str) -> bool:
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    children = Path(f"/proc/{process}/task/{process}/children").read_text()
    return f"RANK={rank}".encode() in environment and bool(children)


def test_signal_to_torchrun_itself_saves(tiny, tmp_path):
    """Its own exit code is 1 then, whatever its processes say."""
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "50", "--output-dir", out)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    process = start(*torchrun, "--nproc-per-node=2", ROOT / "train.py", *SMALL, *flags)
    wait_for(process, "epoch 0 [3")
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(60) == 1
    assert "every step of a training is saved, go on with --resume auto" in said
    assert_nothing_runs(out, 5)
    assert saved_step(out) == list(last_losses(out))[-1]


def test_signal_during_a_save_causes_no_second_one(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    stopped = train(*flags, FAULT="term@flushed:0:0")
    assert stopped.returncode == 75, stopped.stderr
    assert [p.name for p in checkpoint.list_numbered(tmp_path / "out")] == [
        "checkpoint_00000001.pth"
    ]
    assert list(last_losses(tmp_path / "out")) == [1]


def test_stop_during_an_evaluation_resumes_with_it(tiny, tmp_path):
    """Two processes, of which one is asked to stop; then one, which evaluates and goes on."""
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    for stopped in train_two(*flags, "-b", "1", FAULT="term@evaluation:1:0"):
        assert stopped.returncode == 75, stopped.stderr
        assert "AP at IoU" not in stopped.stdout
    assert saved_step(tmp_path / "out") == 4
    said = train_in_process(*flags, "--max-steps", "5")
    assert said.count("AP at IoU 0.50:0.95") == 2
    assert [line["step"] for line in metrics(tmp_path / "out", "eval")] == [4, 5]
    assert [line["step"] for line in metrics(tmp_path / "out", "train")] == [1, 2, 3, 4, 5]


# --------------------------------------------------------------------------- numbers and ranks


def train_two_with(fault: str, tiny: Path, out: Path, *flags) -> str:
    """Train in two processes that both have to fail; return what they said on stderr."""
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "3", "--output-dir", out, *flags)
    begin = time.monotonic()
    results = train_two(*flags, FAULT=fault)
    assert time.monotonic() - begin < 60
    assert [done.returncode for done in results] == [1, 1], results
    said = "".join(done.stderr for done in results)
    assert said.count("train.py: error") == 1
    return said


def test_nan_loss_of_one_process_ends_both(tiny, tmp_path):
    said = train_two_with("nan@loss:1:2", tiny, tmp_path, "--checkpoint-every", "1")
    assert "the loss of step 2 is not finite: images [10" in said
    assert "on rank 1" in said
    assert "rank 0" not in said
    assert "Traceback" not in said
    assert saved_step(tmp_path) == 2


def test_infinite_float16_gradients_are_skipped_on_both_processes(tiny, tmp_path):
    flags = ("--amp", "--amp-dtype", "float16", "--max-steps", "2")
    flags = ("--data-path", tiny, "-b", "1", "--output-dir", tmp_path, *flags)
    first, second = train_two(*flags, FAULT="huge@loss:1:1", timeout=300)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    skipped = [line["skipped_steps"] for line in metrics(tmp_path, "train")]
    assert len(skipped) == 2
    assert skipped[1] == 1
    assert "1 steps skipped" in first.stdout


def test_process_that_raises_is_named(tiny, tmp_path):
    said = train_two_with("raise@step:1:2", tiny, tmp_path)
    assert "train.py: error of rank 1: OverflowError: a fault on purpose" in said
    assert said.count("Traceback") == 1


def test_full_disk_ends_both_processes_and_leaves_the_checkpoints_before(tiny, tmp_path):
    train_in_process("--data-path", tiny, "--output-dir", tmp_path, *TWELVE, "--max-steps", "2")
    said = train_two_with("full@writing:0:0", tiny, tmp_path, *TWELVE)
    assert f"checkpoint not saved: {tmp_path}/checkpoint_00000003.pth: No space left" in said
    assert "Traceback" not in said
    assert saved_step(tmp_path) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_process_that_hangs_is_named_and_ended(tiny, tmp_path):
    out, begin = tmp_path / "out", time.monotonic()
    flags = ("--data-path", tiny, "-b", "1", "--output-dir", out, "--timeout-minutes", "0.1")
    done = launch(ALL, *flags, FAULT="hang@step:1:2", timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nothing_runs(out)
    assert "ended because of rank 1: gone, or did not answer in time" in done.stderr
    assert time.monotonic() - begin < 60


def test_killed_loading_process_is_explained(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "--output-dir", out, "--epochs", "50", "-j", "1")
    process = start(sys.executable, ROOT / "train.py", *SMALL, *flags)
    wait_for(process, "epoch 0 [3")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.stdout.read()
    assert process.wait(30) == 1
    assert "lower --workers or --batch-size" in said
    assert "--shm-size" in said
    assert "Traceback" not in said
    assert_nothing_runs(out)


# ---------------------------------------------------------------------------------- around it


class TinyBackbone(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=8)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"0": self.convolution(images)}


def tiny_faster_rcnn(*args, **kwargs) -> FasterRCNN:
    """A Faster R-CNN of one convolution, whose steps take milliseconds."""
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


def train_and_watch(argv: list[str], log: Path) -> None:
    """Train; write down, at the same moment of every tenth step, what the process holds."""
    import ctypes

    import models
    import train
    import utils

    seed_step = utils.seed_step

    def note(seed: int, step: int, images: int) -> list[int]:
        if step % 10 == 0:
            ctypes.CDLL(None).malloc_trim(0)  # else the allocator keeps some of what was freed
            rows = Path("/proc/self/status").read_text().splitlines()
            held = next(row.split()[1] for row in rows if row.startswith("VmRSS"))
            with log.open("a") as file:
                print(step, held, len(os.listdir("/proc/self/fd")), file=file)
        return seed_step(seed, step, images)

    utils.seed_step, models.build_model = note, tiny_faster_rcnn
    sys.argv = argv
    train.run_and_exit()


def test_memory_and_open_files_do_not_grow_in_500_steps(tiny, tmp_path):
    shutil.rmtree(tiny / "train2017")
    write_part(tiny, "train", [(64, 48), (48, 64)] * 50, [[[2, 4, 4, 30, 20]]] * 100)
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--epochs", "5", "-j", "1")
    flags = (*flags, "--checkpoint-every", "10", "--print-freq", "10", "--lr", "1e-6", "-b", "1")
    argv = ["train.py", *SMALL, *map(str, flags)]
    done = run_forked(train_and_watch, argv, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    steps, held, files = np.loadtxt(tmp_path / "log", dtype=int).T
    assert steps.tolist() == list(range(0, 500, 10))
    early, late = slice(10, 20), slice(40, 50)
    assert held[late].min() - held[early].min() < 10_000  # KiB
    assert files[late].min() - files[early].min() <= 2


# ------------------------------------------------------------------------------ more machines


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_machine_that_is_lost_and_comes_back(tiny, tmp_path):
    """Two agents of torchrun on this machine, with one process each."""
    script = SCRIPTS / "train_fasterrcnn_resnet50_amp_multinode_torch.sh"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "4", "--checkpoint-every", "1")
    flags = (*flags, "--lr", "1e-4")
    port, out, whole = free_port(), tmp_path / "out", tmp_path / "whole"

    def machine(rank: int) -> subprocess.Popen:
        return start(
            *("bash", script, *SMALL, *flags, "--output-dir", out),
            **{"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"NPROC_PER_NODE": 1, "VIRTUAL_ENV": sys.prefix, "TORCH_DISTRIBUTED_DEBUG": "OFF"},
        )

    first, second = machine(0), machine(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "checkpoint_00000004.pth").exists():
        time.sleep(0.05)
    second.kill()  # its agent; the process that it started finds itself alone
    time.sleep(2)
    again = machine(1)
    said = first.stdout.read()
    assert first.wait(200) == 0, said
    assert again.wait(60) == 0, again.stdout.read()
    assert second.wait(5) != 0
    assert_nothing_runs(out)
    amp = ["--amp"] if "mixed" in said else []
    for alone in train_two(*flags, "--output-dir", whole, *amp):
        assert alone.returncode == 0, alone.stderr
    assert_same_training(out, whole)
