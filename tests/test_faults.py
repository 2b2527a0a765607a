"""Whole trainings that are killed, stopped, starved or broken; see FAULTS.md for the list."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    ONE,
    ROOT,
    SCRIPTS,
    SMALL,
    launch,
    processes_of,
    rewrite,
    run,
    split_of,
    start,
    train,
    wait_for,
    weights_hash,
    write_part,
)

import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc")

# Twelve steps: three epochs of eight pictures by twos, saved after each.
TWELVE = ("--epochs", "3", "--checkpoint-every", "1", "--resume", "auto")
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def last_losses(output_dir: Path) -> dict[int, float]:
    """The loss of each step; of a step that was taken twice, the last one's."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


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


def test_killed_anywhere_one_process_ends_with_the_same_weights(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train("--data-path", tiny, "--output-dir", whole, *TWELVE).returncode == 0
    flags = ("--data-path", tiny, "--output-dir", cut, *TWELVE)
    for fault, workers, step in (
        ("kill@step:0:2", 0, 2),
        ("kill@step:0:3", 2, 3),
        ("late@evaluation:0:0", 0, 4),  # the epoch's end is saved beside its first second
        ("kill@flushed:0:0", 0, 4),
        ("kill@renamed:0:0", 2, 4),
        ("kill@step:0:9", 0, 9),
    ):
        died = train(*flags, "-j", workers, FAULT=fault)
        assert died.returncode in KILLED, died.stderr
        assert checkpoint.load_newest(cut)[1]["step"] == step
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    assert f"resumed: {cut}/checkpoint_00000009.pth, 9 steps done" in done.stdout
    assert_same_training(cut, whole)
    assert [p.name for p in checkpoint.list_numbered(cut)] == [
        "checkpoint_00000012.pth",
        "checkpoint_00000011.pth",
    ]


def test_a_killed_process_of_two_is_started_again_and_nothing_changes(tiny, tmp_path):
    """Without a flag to resume: torchrun starts all processes again by the command it has."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "2", "--checkpoint-every", "1")
    assert launch(ALL, *flags, "--output-dir", whole).returncode == 0
    done = launch(
        *(ALL, *flags, "--output-dir", cut), MAX_RESTARTS="1", FAULT="kill@step:1:6", timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint_00000006.pth, 6 steps done" in done.stdout
    assert_same_training(cut, whole)


def test_with_fewer_processes_every_planned_image_is_still_seen_once(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    died = launch(ALL, *flags, "-b", "1", FAULT="kill@step:0:6", timeout=200)
    assert died.returncode == 1
    assert "ended because of rank 0: gone" in died.stderr
    done = launch(ONE, *flags, "-b", "2")
    assert done.returncode == 0, done.stderr
    assert "1 processes instead of 2: every planned image is seen once" in done.stdout
    assert "not bitwise" in done.stdout
    assert list(last_losses(tmp_path / "out")) == list(range(1, 13))


def test_what_changed_is_refused_by_name(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    assert train(*flags, "--max-steps", "2").returncode == 0
    rate, batch = (train(*flags, *more) for more in (("--lr", "0.1"), ("-b", "1")))
    assert (rate.returncode, batch.returncode) == (2, 2)
    assert "--lr 0.0025 (now 0.1)" in rate.stderr
    assert "global batch 2 (now 1)" in batch.stderr
    assert "--resume-anyway" in batch.stderr
    going_on = train(*flags, "--lr", "0.1", "--resume-anyway", "--max-steps", "3")
    assert going_on.returncode == 0, going_on.stderr
    assert "2 steps done" in going_on.stdout
    file = tmp_path / "out/checkpoint_00000002.pth"
    older = train(*flags, "--resume", file, "--lr", "0.1")
    assert older.returncode == 2
    assert "checkpoint_00000003.pth has more" in older.stderr
    rewrite(split_of(tiny), lambda d: d["annotations"][0].update(bbox=[5, 5, 9, 9]))
    data = train(*flags, "--lr", "0.1")
    assert data.returncode == 2
    assert "other training data" in data.stderr
    anew = train(*flags, "--lr", "0.1", "--resume-anyway")
    assert anew.returncode == 0, anew.stderr
    assert "epoch 0 restarts" in anew.stdout


def test_of_damaged_checkpoints_the_first_whole_one_is_taken(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "--output-dir", out, *TWELVE)
    assert train(*flags, "--max-steps", "3").returncode == 0
    newest = out / "checkpoint_00000003.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = train(*flags, "--max-steps", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed over: ") == 1
    assert f"passed over: {newest} cannot be read" in done.stdout
    assert "2 steps done" in done.stdout
    for path in out.glob("checkpoint*.pth"):
        path.write_bytes(b"")
    lost = train(*flags)
    assert lost.returncode == 2
    assert "none of the checkpoints in" in lost.stderr
    assert "checkpoint_00000004.pth" in lost.stderr


# ------------------------------------------------------------------------------ asked to stop


@pytest.mark.parametrize(
    ("to", "name"),
    [("launcher", "SIGTERM"), ("worker", "SIGUSR1"), ("one", "SIGINT"), ("everybody", "SIGTERM")],
)
def test_asked_to_stop_all_save_once_and_end_with_75(tiny, tmp_path, to, name):
    out, number = tmp_path / "out", getattr(signal, name)
    script, batch = (ONE, 2) if to == "one" else (ALL, 1)
    flags = ("--data-path", tiny, "-b", batch, *TWELVE, "--epochs", "50", "-j", "1")
    flags = (*flags, "--checkpoint-every", "1000")
    command = ("bash", script, *SMALL, *flags, "--output-dir", out)
    process = start(*command, VIRTUAL_ENV=sys.prefix)
    wait_for(process, "epoch 1 [3")
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
    assert "everything is saved, go on with --resume auto" in said
    assert "Traceback" not in said
    assert time.monotonic() - begin < 20
    assert_nothing_runs(out, 5)
    steps = list(last_losses(out))
    state = checkpoint.load_newest(out)[1]
    assert state["step"] == steps[-1]
    again = run("bash", *command[1:], "--max-steps", steps[-1] + 2, VIRTUAL_ENV=sys.prefix)
    assert again.returncode == 0, again.stderr
    assert list(last_losses(out)) == list(range(1, steps[-1] + 3))


def is_rank(process: int, rank: str) -> bool:
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    children = Path(f"/proc/{process}/task/{process}/children").read_text()
    return f"RANK={rank}".encode() in environment and bool(children)


def test_torchrun_itself_may_be_asked_to_stop(tiny, tmp_path):
    """Its own exit code is 1 then, whatever its processes say."""
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "50", "--output-dir", out)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    process = start(*torchrun, "--nproc-per-node=2", ROOT / "train.py", *SMALL, *flags)
    wait_for(process, "epoch 1 [3")
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(60) == 1
    assert "everything is saved, go on with --resume auto" in said
    assert_nothing_runs(out, 5)
    assert checkpoint.load_newest(out)[1]["step"] == list(last_losses(out))[-1]


def test_asked_during_a_save_that_save_is_the_only_one(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    stopped = train(*flags, FAULT="term@flushed:0:0")
    assert stopped.returncode == 75, stopped.stderr
    assert [p.name for p in checkpoint.list_numbered(tmp_path / "out")] == [
        "checkpoint_00000001.pth"
    ]
    assert list(last_losses(tmp_path / "out")) == [1]


def test_asked_during_an_evaluation_the_next_run_begins_with_it(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", *TWELVE)
    stopped = train(*flags, FAULT="term@evaluation:0:0")
    assert stopped.returncode == 75, stopped.stderr
    assert "AP at IoU" not in stopped.stdout
    done = train(*flags, "--max-steps", "4")
    assert done.returncode == 0, done.stderr
    assert "AP at IoU" in done.stdout
    assert list(last_losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_one_of_two_asked_during_an_evaluation_stops_both(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "-b", "1", *TWELVE, "--output-dir", out)
    done = launch(ALL, *flags, FAULT="term@evaluation:1:0", timeout=200)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "AP at IoU" not in done.stdout
    assert checkpoint.load_newest(out)[1]["step"] == 4


# --------------------------------------------------------------------------- numbers and ranks


def failing(tiny, tmp_path, fault, *flags):
    """Two processes with a fault: what they said, and that none is left 15 seconds later."""
    out, begin = tmp_path / "out", time.monotonic()
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "3", "--output-dir", out, *flags)
    done = launch(ALL, *flags, FAULT=fault, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_nothing_runs(out)
    return done, time.monotonic() - begin


def test_a_loss_of_one_process_that_is_not_finite_ends_both(tiny, tmp_path):
    done, _ = failing(tiny, tmp_path, "nan@loss:1:5", "--checkpoint-every", "1")
    assert "the loss of step 5 is not finite: images [10" in done.stderr
    assert "on rank 1" in done.stderr
    assert "rank 0" not in done.stderr
    assert done.stderr.count("train.py: error:") == 1
    assert checkpoint.load_newest(tmp_path / "out")[1]["step"] == 5


def test_infinite_float16_gradients_are_skipped_counted_and_not_for_ever(tiny, tmp_path):
    flags = ("--amp", "--amp-dtype", "float16", "--max-steps", "2")
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "-b", "1", "--output-dir", out, *flags)
    done = launch(ALL, *flags, FAULT="huge@loss:1:1", timeout=300)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    skipped = [line["skipped_steps"] for line in lines if line["kind"] == "train"]
    assert len(skipped) == 2
    assert skipped[1] == 1
    assert "1 steps skipped" in done.stdout


def test_a_process_that_raises_is_the_one_that_is_named(tiny, tmp_path):
    done, _ = failing(tiny, tmp_path, "raise@step:1:3")
    assert "train.py: error of rank 1: OverflowError: a fault on purpose" in done.stderr
    assert done.stderr.count("train.py: error") == 1
    assert done.stderr.count("Traceback") == 1


def test_a_process_that_hangs_is_named_and_ended(tiny, tmp_path):
    done, seconds = failing(tiny, tmp_path, "hang@step:1:3", "--timeout-minutes", "0.1")
    assert "ended because of rank 1: gone, or did not answer in time" in done.stderr
    assert seconds < 60


def test_a_loading_process_that_is_killed_is_explained(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "--output-dir", out, *TWELVE, "--epochs", "50", "-j", "1")
    process = start(sys.executable, ROOT / "train.py", *SMALL, *flags)
    wait_for(process, "epoch 1 [3")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.stdout.read()
    assert process.wait(30) == 1
    assert "lower --workers or --batch-size" in said
    assert "--shm-size" in said
    assert "Traceback" not in said
    assert_nothing_runs(out)


# ---------------------------------------------------------------------------------- around it


def test_a_full_disk_ends_all_processes_and_keeps_what_is_there(tiny, tmp_path):
    out = tmp_path / "out"
    flags = ("--data-path", tiny, "--output-dir", out, *TWELVE, "-b", "1")
    assert launch(ALL, *flags, "--max-steps", "2").returncode == 0
    size = (out / checkpoint.NEWEST).stat().st_size
    limit = f"ulimit -f {size // 2048}; " + 'exec bash "$@"'
    done = run("bash", "-c", limit, "bash", ALL, *SMALL, *flags, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("checkpoint not saved: ") == 1
    assert "Traceback" not in done.stderr
    assert checkpoint.load_newest(out)[1]["step"] == 2


def test_a_cut_last_line_of_the_metrics_is_mended(tiny, tmp_path):
    flags = ("--data-path", tiny, "--output-dir", tmp_path, *TWELVE)
    assert train(*flags, "--max-steps", "1").returncode == 0
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "train", "lo')
    done = train(*flags, "--max-steps", "2")
    assert done.returncode == 0, done.stderr
    assert "the last line was cut" in done.stdout
    assert file.read_text().startswith(whole)
    assert list(last_losses(tmp_path)) == [1, 2]


# Runs train.py and writes down, at the same moment of every tenth step, what the process holds:
# after a trim, the allocator keeps nothing of what was freed.
WATCHED = """
import ctypes, os, sys
from pathlib import Path
import train, utils

log = open(sys.argv.pop(1), "w")

def look(point, step=None):
    if point == "step" and step % 10 == 0:
        ctypes.CDLL(None).malloc_trim(0)
        rows = Path("/proc/self/status").read_text().splitlines()
        held = next(row.split()[1] for row in rows if row.startswith("VmRSS"))
        print(step, held, len(os.listdir("/proc/self/fd")), file=log, flush=True)

utils.fault = look
train.run_and_exit()
"""


def test_in_500_steps_neither_memory_nor_open_files_grow(tiny, tmp_path):
    shutil.rmtree(tiny / "train2017")
    write_part(tiny, "train", [(64, 48), (48, 64)] * 50, [[[2, 4, 4, 30, 20]]] * 100)
    flags = ("--data-path", tiny, "--output-dir", tmp_path / "out", "--epochs", "5", "-j", "1")
    flags = (*flags, "--checkpoint-every", "10", "--print-freq", "10", "--lr", "1e-6", "-b", "1")
    command = (sys.executable, "-c", WATCHED, tmp_path / "log", *SMALL, *flags)
    done = run(*command, PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    steps, held, files = np.loadtxt(tmp_path / "log", dtype=int).T
    assert steps.tolist() == list(range(0, 500, 10))
    early, late = slice(10, 20), slice(40, 50)
    # A checkpoint that is being written is held a second time, so the least counts.
    assert held[late].min() - held[early].min() < 10_000  # KiB
    assert files[late].min() - files[early].min() <= 2


# ------------------------------------------------------------------------------ more machines


def free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_two_machines_train_and_one_may_be_killed_and_come_back(tiny, tmp_path):
    """Two agents of torchrun on this machine, with one process each."""
    script = SCRIPTS / "train_fasterrcnn_resnet50_amp_multinode_torch.sh"
    flags = ("--data-path", tiny, "-b", "1", "--epochs", "6", "--checkpoint-every", "1")
    port, out, whole = free_port(), tmp_path / "out", tmp_path / "whole"

    def machine(rank, *more):
        return start(
            *("bash", script, *SMALL, *flags, "--output-dir", out, "--lr", "1e-4", *more),
            **{"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"NPROC_PER_NODE": 1, "VIRTUAL_ENV": sys.prefix, "TORCH_DISTRIBUTED_DEBUG": "OFF"},
        )

    first, second = machine(0), machine(1)
    speaker, other = (first, second)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "checkpoint_00000009.pth").exists():
        time.sleep(0.05)
    assert (out / checkpoint.NEWEST).exists(), first.stdout.read()
    second.kill()  # its agent; the process that it started finds itself alone
    time.sleep(2)
    again = machine(1)
    said = speaker.stdout.read()
    assert first.wait(200) == 0, said
    assert again.wait(60) == 0, again.stdout.read()
    assert other.wait(5) != 0
    assert_nothing_runs(out)
    alone = launch(ALL, *flags, "--output-dir", whole, "--lr", "1e-4")
    assert alone.returncode == 0, alone.stderr
    assert_same_training(out, whole)


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
def test_slurm_gets_what_it_needs_and_queues_a_stopped_job_again(tmp_path, case, code):
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
    if case == "stopped":  # Slurm warns the batch script, which sbatch has become here
        process = subprocess.Popen(["bash", script, first, "$(touch x)"], env=env, cwd=tmp_path)
        end = time.monotonic() + 10
        while time.monotonic() < end and not (log.exists() and "node [" in log.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75
    else:
        env["SBATCH_FLAGS"] = ""
        assert subprocess.run(["bash", script, first, "$(touch x)"], env=env).returncode == code
    said = log.read_text()
    assert f"sbatch [{script}] [{first}] [$(touch x)]" in said
    assert "scontrol [show] [hostnames] [node[7-8]]" in said
    assert f"node [1 of 2 at node7:24242] {first} $(touch x)" in said
    assert ("scontrol [requeue] [4242]" in said) == (case == "stopped")
    assert ("srun got USR1" in said) == (case == "stopped")
    assert not (tmp_path / "x").exists()
