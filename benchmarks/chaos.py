#!/usr/bin/env python3
"""Whether a run can be lost: a training that is killed, stopped and broken at random, on and on.

    python benchmarks/chaos.py --kills 100

A small training of two processes is killed by SIGKILL (one of its processes, its launcher, or all
of them; at any time, half of the times while a checkpoint is being written) and continued by the
same command, until it ends. Its weights must be those of an undisturbed run, bit for bit, and no
kill may cost more steps than lie between two checkpoints. Then `--stops` trainings are asked to
stop, and in `--faults` trainings one process raises, dies or hangs; `--each-step` kills one process
alone, and one of two, after each of 12 steps in turn. Linux only: processes are found by /proc.
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

EVERY, EPOCH = 3, 8  # steps between two checkpoints, and in an epoch
LAUNCHERS = {
    1: common.ROOT / "start_scripts/train_fasterrcnn_resnet50_torch.sh",
    2: common.ROOT / "start_scripts/train_fasterrcnn_resnet50_dist_torch.sh",
}
SMALL = (
    *("--model", "fasterrcnn_mobilenet_v3_large_320_fpn", "--weights-backbone", "none"),
    *("--min-size", "64", "--workers", "1", "--print-freq", "1"),
    *("--lr", "0.0005", "--clip-grad-norm", "10", "--no-report"),
)


class Training:
    """A launched training that writes to `out`; `said` is what it has printed when it has ended."""

    def __init__(
        self, data: Path, out: Path, epochs: int, *flags: str, fault: str = "", processes: int = 2
    ):
        self.out, self.log = out, out.with_suffix(".log")
        command = ["bash", LAUNCHERS[processes], "--data-path", data, "--output-dir", out, *SMALL]
        command += ["--epochs", epochs, "--batch-size", 2 // processes, "--resume", "auto"]
        command += ["--checkpoint-every", EVERY, *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"VIRTUAL_ENV": sys.prefix, "FAULT": fault}
        if fault:
            environment["PYTHONPATH"] = str(common.ROOT / "tests/fault_injection")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=environment
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """What runs of it now: "launcher", "rank 0", "rank 1" or "loading", by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                if str(self.out).encode() + b"\0" not in command:
                    continue
                environment = (folder / "environ").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # it has just ended
                continue
            ranks = [v[5:].decode() for v in environment if v.startswith(b"RANK=")]
            found[int(folder.name)] = (f"rank {ranks[0]}" if ranks else "launcher", int(parent))
        return {
            number: "loading" if found.get(parent, ("",))[0] == name else name
            for number, (name, parent) in found.items()
        }

    def wait(self, seconds: float = 600) -> tuple[int, float]:
        """The exit code, and for how long something of it was still running after that."""
        exit_code, begin = self.process.wait(seconds), time.monotonic()
        while self.processes() and time.monotonic() - begin < 60:
            time.sleep(0.05)
        return exit_code, time.monotonic() - begin


def steps(out: Path) -> list[int]:
    """The steps that `metrics.jsonl` has, in the order in which they were taken."""
    if not (out / "metrics.jsonl").exists():
        return []
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if row["kind"] == "train"]


def weights_hash(out: Path) -> str:
    model = checkpoint.load(out / checkpoint.NEWEST)["model"]
    digest = hashlib.sha256()
    for name, value in model.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def wait_until(training: Training, condition, seconds: float = 120) -> bool:
    """Whether the condition came true before the training or the time ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and training.process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def random_moment(training: Training, dice: random.Random) -> str | None:
    """Wait for it; says which it is, or None where the training ended before."""
    done, kind = len(steps(training.out)), dice.random()
    if kind < 0.1:
        time.sleep(dice.uniform(0, 6))
        return "at the start" if training.process.poll() is None else None
    if not wait_until(training, lambda: len(steps(training.out)) > done):
        return None
    time.sleep(dice.uniform(0, 2))
    if kind > 0.5:
        if not wait_until(training, lambda: any(training.out.glob("*.partial"))):
            return None
        time.sleep(dice.uniform(0, 0.08))
        return "in a save"
    return "in a step" if training.process.poll() is None else None


def kill(training: Training, dice: random.Random) -> str:
    """SIGKILL for one of the processes or all; says for which."""
    there = training.processes()
    victim = dice.choice(["rank 0", "rank 1", "launcher", "all"])
    numbers = [number for number, name in there.items() if victim in (name, "all")]
    for number in numbers or there:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return victim if numbers else "all"


def run_kills(data: Path, work: Path, count: int, dice: random.Random) -> dict:
    epochs = max(2, count * 10 // EPOCH)
    whole = Training(data, work / "undisturbed", epochs)
    if whole.wait(3600)[0]:
        sys.exit(whole.said)
    expected, length = weights_hash(whole.out), epochs * EPOCH
    print(f"undisturbed: {length} steps, weights {expected[:16]}", flush=True)
    kills, trainings, lost, refused, left, same = 0, 0, [], 0, [], True
    while kills < count:
        out, ended = work / f"killed{trainings}", False
        trainings += 1
        while not ended:
            training = Training(data, out, epochs)
            moment = random_moment(training, dice) if kills < count else None
            victim = kill(training, dice) if moment else None
            exit_code, over = training.wait(3600)
            refused += training.said.count("passed over") + training.said.count("none of the")
            ended = exit_code == 0
            if not victim:
                if not ended:
                    sys.exit(f"a continuation failed:\n{training.said}")
                continue
            kills += 1
            reached, saved = max(steps(out), default=0), saved_step(out)
            lost.append(reached - saved)
            left.append(over)
            print(f"  {kills:4}  {victim:<8} {moment:<12} at step {reached:5}, resumes from "
                  f"{saved:5}, {lost[-1]} lost; all gone in {over:.1f} s", flush=True)  # fmt: skip
        same &= weights_hash(out) == expected and sorted(set(steps(out))) == steps(whole.out)
        print(f"ended: weights {weights_hash(out)[:16]}", flush=True)
    return {
        "kills": kills,
        "trainings": trainings,
        "same_weights": same,
        "checkpoints_refused": refused,
        "most_steps_lost": max(lost),
        "checkpoint_every": EVERY,
        "last_process_gone_after_s": max(left),
    }


def run_each_step(data: Path, work: Path, _: bool, dice: random.Random) -> dict:
    """Killed after each of 12 steps in turn, every one of which is saved."""
    same = {}
    for processes in (1, 2):
        flags = ("--max-steps", "12", "--checkpoint-every", "1")
        whole = Training(data, work / f"whole{processes}", 2, *flags, processes=processes)
        out = work / f"each{processes}"
        if whole.wait()[0]:
            sys.exit(whole.said)
        for step in range(1, 12):
            fault = f"kill@step:{dice.randrange(processes)}:{step}"
            training = Training(data, out, 2, *flags, fault=fault, processes=processes)
            if training.wait()[0] == 0 or saved_step(out) != step:
                sys.exit(f"not killed after step {step}:\n{training.said}")
        last = Training(data, out, 2, *flags, processes=processes)
        same[processes] = last.wait()[0] == 0 and weights_hash(out) == weights_hash(whole.out)
        same[processes] &= steps(out) == steps(whole.out)
        print(f"  {processes} processes, killed after each of 11 steps: same {same[processes]}")
    return {"same_after_each_step": same}


def saved_step(out: Path) -> int:
    """The step that the next run will go on from."""
    for path in checkpoint.list_numbered(out):
        try:
            return checkpoint.load(path)["step"]
        except CheckpointError:
            continue
    return 0


def run_stops(data: Path, work: Path, count: int, dice: random.Random) -> dict:
    """Signals to the launcher or to a process, in the middle of a training."""
    seconds, beyond, fine = [], [], 0
    for number in range(count):
        training = Training(data, work / f"stopped{number}", 1000, "--checkpoint-every", "100000")
        wait_until(training, lambda t=training: len(steps(t.out)) > 2)
        time.sleep(dice.uniform(0, 0.5))
        target = dice.choice(["launcher", "rank 0", "rank 1"])
        processes = [p for p, name in training.processes().items() if name == target]
        name = dice.choice(["SIGTERM", "SIGUSR1", "SIGINT"])
        at, begin = max(steps(training.out)), time.time()
        os.kill(min(processes), getattr(signal, name))
        exit_code, _ = training.wait()
        path = next(iter(checkpoint.list_numbered(training.out)), None)
        durable = path.stat().st_mtime - begin if path else float("inf")
        after = saved_step(training.out) - at
        seconds.append(durable)
        beyond.append(after)
        fine += exit_code == 75 and not training.processes() and 0 <= after <= 2
        print(f"  {number + 1:4}  {name:<8} to {target:<9} exit {exit_code}, saved after "
              f"{durable:.2f} s and {after} steps", flush=True)  # fmt: skip
    return {"stops": count, "as_asked": fine, "seconds": seconds, "steps": beyond}


def run_faults(data: Path, work: Path, count: int, dice: random.Random) -> dict:
    """One process raises, dies or hangs; how long until all are gone, and who is blamed."""
    timeout, named, seconds = 6, 0, []
    for number in range(count):
        kind, rank, step = ("raise", "kill", "hang")[number % 3], dice.randrange(2), 4
        out = work / f"failed{number}"
        fault = f"{kind}@step:{rank}:{step}"
        training = Training(data, out, 2, "--timeout-minutes", str(timeout / 60), fault=fault)
        wait_until(training, lambda o=out, s=step: s in steps(o))
        begin = time.monotonic()
        exit_code, _ = training.wait()
        gone = time.monotonic() - begin - (timeout if kind == "hang" else 0)
        wrong = f"rank {1 - rank}"
        right = f"rank {rank}" in training.said and wrong not in training.said
        named += right and exit_code == 1
        seconds.append(gone)
        print(f"  {number + 1:4}  rank {rank}: {kind:<6} exit {exit_code}, "
              f"{'named' if right else 'NOT NAMED'}, all gone {gone:.1f} s after "
              f"{'the timeout' if kind == 'hang' else 'it'}", flush=True)  # fmt: skip
        if not right:
            print(training.said)
    return {"faults": count, "right_rank_named": named, "seconds_to_the_end": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument("--stops", type=int, default=0, metavar="N")
    parser.add_argument("--faults", type=int, default=0, metavar="N")
    parser.add_argument("--each-step", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    args = parser.parse_args()
    dice, summary = random.Random(args.seed), {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        work = Path(folder)
        data = synthetic.make_small(work / "data", images=2 * EPOCH)
        for name, run in (
            *(("each_step", run_each_step), ("kills", run_kills)),
            *(("stops", run_stops), ("faults", run_faults)),
        ):
            if count := getattr(args, name):
                summary |= run(data, work, count, dice)
    for name, value in summary.items():
        shown = f"at most {max(value):.2f}" if isinstance(value, list) else value
        print(f"{name}: {shown}")
    common.save(args.json, **summary)


if __name__ == "__main__":
    main()
