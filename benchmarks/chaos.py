#!/usr/bin/env python3
"""Test fault tolerance by trainings that are killed, stopped and broken at random.

    python benchmarks/chaos.py --kills 100

A small training of two processes is killed with SIGKILL (one process, the launcher, or all; at
random times, half of them during a save) and continued by the same command, until it ends. The
final weights must equal those of an undisturbed run bit for bit, and a kill must not cost more
steps than the checkpoint interval. `--stops` trainings get a signal to stop; in `--faults`
trainings one process raises, dies or hangs; `--each-step` kills trainings of one and of two
processes after each step. Linux only, as processes are found in /proc.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import synthetic
import torch

import checkpoint
from internals.errors import CheckpointError

CHECKPOINT_EVERY = 3  # steps
STEPS_PER_EPOCH = 8
LAUNCHERS = {
    1: common.ROOT / "start_scripts/train_fasterrcnn_resnet50_torch.sh",
    2: common.ROOT / "start_scripts/train_fasterrcnn_resnet50_dist_torch.sh",
}
FLAGS = (
    *("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none"),
    *("--min-size", "64", "--workers", "1", "--print-freq", "1"),
    *("--lr", "0.0005", "--clip-grad-norm", "10", "--no-report"),
)


class Training:
    """A launched training that writes to `output_dir`, and its log to a file beside it."""

    def __init__(
        self,
        data: Path,
        output_dir: Path,
        epochs: int,
        *flags: str,
        fault: str = "",
        processes: int = 2,
    ):
        self.output_dir = output_dir
        self.log = output_dir.with_suffix(".log")
        command = ["bash", LAUNCHERS[processes], "--data-path", data, "--output-dir", output_dir]
        command += [*FLAGS, "--epochs", epochs, "--batch-size", 2 // processes, "--resume", "auto"]
        command += ["--checkpoint-every", CHECKPOINT_EVERY, *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"VIRTUAL_ENV": sys.prefix, "FAULT": fault}
        if fault:
            environment["PYTHONPATH"] = str(common.ROOT / "tests/fault_injection")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=environment
            )

    @property
    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def running_processes(self) -> dict[int, str]:
        """Return "launcher", "rank 0", "rank 1" or "worker" for each running process id."""
        roles = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                if str(self.output_dir).encode() + b"\0" not in command:
                    continue
                environment = (folder / "environ").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # the process has just ended
                continue
            ranks = [v[5:].decode() for v in environment if v.startswith(b"RANK=")]
            roles[int(folder.name)] = (f"rank {ranks[0]}" if ranks else "launcher", int(parent))
        return {
            pid: "worker" if roles.get(parent, ("",))[0] == role else role
            for pid, (role, parent) in roles.items()
        }

    def wait(self, timeout: float = 600) -> tuple[int, float]:
        """Return the exit code, and the seconds until the last process ended after that."""
        exit_code = self.process.wait(timeout)
        start = time.monotonic()
        while self.running_processes() and time.monotonic() - start < 60:
            time.sleep(0.05)
        return exit_code, time.monotonic() - start


def logged_steps(output_dir: Path) -> list[int]:
    """Read the steps in `metrics.jsonl`, in the order of training."""
    if not (output_dir / "metrics.jsonl").exists():
        return []
    lines = (output_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if row["kind"] == "train"]


def hash_weights(output_dir: Path) -> str:
    """Return the SHA-256 of the newest checkpoint's weights."""
    model = checkpoint.load(output_dir / checkpoint.NEWEST)["model"]
    digest = hashlib.sha256()
    for name, value in model.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_saved_step(output_dir: Path) -> tuple[int, int]:
    """Return the step to resume from, and the number of newer checkpoints that are damaged."""
    damaged = 0
    for path in checkpoint.list_numbered(output_dir):
        try:
            return checkpoint.load(path)["step"], damaged
        except CheckpointError:
            damaged += 1
    return 0, damaged


def wait_until(training: Training, condition, timeout: float = 120) -> bool:
    """Return whether the condition became true before the training ended or the time was up."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and training.process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def wait_for_random_moment(training: Training, rng: random.Random) -> str | None:
    """Wait for a random moment; return its description, or None if the training has ended."""
    steps_before, kind = len(logged_steps(training.output_dir)), rng.random()
    if kind < 0.1:
        time.sleep(rng.uniform(0, 6))
        return "at the start" if training.process.poll() is None else None
    if not wait_until(training, lambda: len(logged_steps(training.output_dir)) > steps_before):
        return None
    time.sleep(rng.uniform(0, 2))
    if kind > 0.5:
        if not wait_until(training, lambda: any(training.output_dir.glob("*.partial"))):
            return None
        time.sleep(rng.uniform(0, 0.08))
        return "in a save"
    return "in a step" if training.process.poll() is None else None


def kill_random_process(training: Training, rng: random.Random) -> str:
    """Send SIGKILL to a random process, or to all; return its role, or "all"."""
    processes = training.running_processes()
    target = rng.choice(["rank 0", "rank 1", "launcher", "all"])
    pids = [pid for pid, role in processes.items() if target in (role, "all")]
    for pid in pids or processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return target if pids else "all"


def run_kills(data: Path, work: Path, count: int, rng: random.Random) -> dict:
    """Kill trainings at `count` random moments, and continue each until its end."""
    epochs = max(2, count * 10 // STEPS_PER_EPOCH)
    undisturbed = Training(data, work / "undisturbed", epochs)
    if undisturbed.wait(3600)[0]:
        sys.exit(undisturbed.output)
    expected = hash_weights(undisturbed.output_dir)
    expected_steps = logged_steps(undisturbed.output_dir)
    print(f"undisturbed: {epochs * STEPS_PER_EPOCH} steps, weights {expected[:16]}", flush=True)
    kills, trainings, damaged, same_weights = 0, 0, 0, True
    lost_steps, seconds_to_end = [], []
    while kills < count:
        output_dir, completed = work / f"killed{trainings}", False
        trainings += 1
        while not completed:
            training = Training(data, output_dir, epochs)
            moment = wait_for_random_moment(training, rng) if kills < count else None
            target = kill_random_process(training, rng) if moment else None
            exit_code, seconds = training.wait(3600)
            completed = exit_code == 0
            if not target:
                if not completed:
                    sys.exit(f"continued training failed:\n{training.output}")
                continue
            kills += 1
            last_step = max(logged_steps(output_dir), default=0)
            saved_step, newer_damaged = find_saved_step(output_dir)
            damaged += newer_damaged
            lost_steps.append(last_step - saved_step)
            seconds_to_end.append(seconds)
            print(f"  kill {kills:4}: {target:<8} {moment:<12} at step {last_step:5}, resumes from "
                  f"step {saved_step:5}, {lost_steps[-1]} steps lost, all processes ended after "
                  f"{seconds:.1f} s", flush=True)  # fmt: skip
        weights = hash_weights(output_dir)
        same_weights &= weights == expected
        same_weights &= sorted(set(logged_steps(output_dir))) == expected_steps
        print(f"completed: weights {weights[:16]}", flush=True)
    return {
        "kills": kills,
        "trainings": trainings,
        "same_weights": same_weights,
        "checkpoints_refused": damaged,
        "most_steps_lost": max(lost_steps),
        "checkpoint_every": CHECKPOINT_EVERY,
        "last_process_gone_after_s": max(seconds_to_end),
    }


def run_each_step(data: Path, work: Path, _: bool, rng: random.Random) -> dict:
    """Kill one process after each of 11 steps, with a checkpoint after each step."""
    same = {}
    for processes in (1, 2):
        flags = ("--max-steps", "12", "--checkpoint-every", "1")
        undisturbed = Training(data, work / f"whole{processes}", 2, *flags, processes=processes)
        output_dir = work / f"each{processes}"
        if undisturbed.wait()[0]:
            sys.exit(undisturbed.output)
        for step in range(1, 12):
            fault = f"kill@step:{rng.randrange(processes)}:{step}"
            training = Training(data, output_dir, 2, *flags, fault=fault, processes=processes)
            if training.wait()[0] == 0 or find_saved_step(output_dir)[0] != step:
                sys.exit(f"training was not killed after step {step}:\n{training.output}")
        last = Training(data, output_dir, 2, *flags, processes=processes)
        same[processes] = (
            last.wait()[0] == 0
            and hash_weights(output_dir) == hash_weights(undisturbed.output_dir)
            and logged_steps(output_dir) == logged_steps(undisturbed.output_dir)
        )
        print(f"  {processes} processes, killed after each of 11 steps: same {same[processes]}")
    return {"same_after_each_step": same}


def run_stops(data: Path, work: Path, count: int, rng: random.Random) -> dict:
    """Send a signal to the launcher or to a process, in the middle of `count` trainings."""
    seconds, steps, correct = [], [], 0
    for number in range(count):
        flags = ("--checkpoint-every", "100000")
        training = Training(data, work / f"stopped{number}", 1000, *flags)
        wait_until(training, lambda t=training: len(logged_steps(t.output_dir)) > 2)
        time.sleep(rng.uniform(0, 0.5))
        target = rng.choice(["launcher", "rank 0", "rank 1"])
        pids = [pid for pid, role in training.running_processes().items() if role == target]
        name = rng.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
        step_before, start = max(logged_steps(training.output_dir)), time.time()
        os.kill(min(pids), getattr(signal, name))
        exit_code, _ = training.wait()
        path = next(iter(checkpoint.list_numbered(training.output_dir)), None)
        seconds_to_save = path.stat().st_mtime - start if path else float("inf")
        steps_to_save = find_saved_step(training.output_dir)[0] - step_before
        seconds.append(seconds_to_save)
        steps.append(steps_to_save)
        correct += exit_code == 75 and not training.running_processes() and 0 <= steps_to_save <= 2
        print(f"  stop {number + 1:4}: {name:<8} to {target:<9} exit code {exit_code}, saved after "
              f"{seconds_to_save:.2f} s and {steps_to_save} steps", flush=True)  # fmt: skip
    return {"stops": count, "as_asked": correct, "seconds": seconds, "steps": steps}


def run_faults(data: Path, work: Path, count: int, rng: random.Random) -> dict:
    """Let one process raise, die or hang; check the reported rank, and time the end of all."""
    timeout, step = 6, 4
    named, seconds_to_end = 0, []
    for number in range(count):
        kind, rank = ("raise", "kill", "hang")[number % 3], rng.randrange(2)
        output_dir = work / f"failed{number}"
        flags = ("--timeout-minutes", str(timeout / 60))
        training = Training(data, output_dir, 2, *flags, fault=f"{kind}@step:{rank}:{step}")
        wait_until(training, lambda folder=output_dir: step in logged_steps(folder))
        start = time.monotonic()
        exit_code, _ = training.wait()
        seconds = time.monotonic() - start - (timeout if kind == "hang" else 0)
        output = training.output
        is_named = f"rank {rank}" in output and f"rank {1 - rank}" not in output
        named += is_named and exit_code == 1
        seconds_to_end.append(seconds)
        print(f"  fault {number + 1:4}: {kind:<6} in rank {rank}, exit code {exit_code}, "
              f"{'rank named' if is_named else 'RANK NOT NAMED'}, all processes ended "
              f"{seconds:.1f} s after {'the timeout' if kind == 'hang' else 'the fault'}",
              flush=True)  # fmt: skip
        if not is_named:
            print(output)
    return {"faults": count, "right_rank_named": named, "seconds_to_the_end": seconds_to_end}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--kills", type=int, default=0, metavar="N", help="number of SIGKILLs (default: 0)")
    add("--stops", type=int, default=0, metavar="N", help="number of stop signals (default: 0)")
    add("--faults", type=int, default=0, metavar="N", help="number of faults (default: 0)")
    add("--each-step", action="store_true", help="kill trainings after each step")
    add("--seed", type=int, default=0, help="seed of moments and targets (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the summary to FILE")
    args = parser.parse_args()
    rng, summary = random.Random(args.seed), {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        work = Path(folder)
        data = synthetic.make_small_coco(work / "data", images=2 * STEPS_PER_EPOCH)
        for name, run in (
            *(("each_step", run_each_step), ("kills", run_kills)),
            *(("stops", run_stops), ("faults", run_faults)),
        ):
            if count := getattr(args, name):
                summary |= run(data, work, count, rng)
    for name, value in summary.items():
        text = f"at most {max(value):.2f}" if isinstance(value, list) else value
        print(f"{name}: {text}")
    common.save_results(args.json, **summary)


if __name__ == "__main__":
    main()
