"""Shared by the benchmarks: run arms in separate processes, print tables, save results.

An arm is one of the variants that a benchmark compares.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build_parser(description: str, repeats: bool = True) -> argparse.ArgumentParser:
    """Build a parser with the flags that the benchmarks share; `repeats` adds --repeats."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="smoke test in seconds, too small for measurements"
    )
    if repeats:
        parser.add_argument(
            "--repeats", type=int, default=3, metavar="N", help="runs of each arm (default: 3)"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    # Flags of the processes that `Arm.run` starts.
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


@dataclass(frozen=True)
class Arm:
    """A variant to measure, in fresh processes.

    Attributes:
        script: Benchmark that measures one arm if called with --arm, and prints the result as JSON.
        name: Value of --arm.
        work: Value of --work, the folder or file with the inputs.
        processes: Number of processes; more than one get the variables of torch.distributed.
        use_launcher_environment: Whether to set the variables of start_scripts/common.sh.
        threads: OMP_NUM_THREADS of each process, None for the default.
        flags: Further flags of the script.
        pause: Seconds to wait before the start.
    """

    script: str
    name: str
    work: Path
    processes: int = 1
    use_launcher_environment: bool = False
    threads: int | None = 1
    flags: Sequence[str] = ()
    pause: float = 0

    def run(self) -> dict:
        """Run the processes to their end; return the result that rank 0 printed."""
        time.sleep(self.pause)
        command = [sys.executable, self.script, "--arm", self.name, "--work", str(self.work)]
        command += self.flags
        if self.use_launcher_environment:
            launcher = str(ROOT / "start_scripts/common.sh")
            command = ["bash", "-c", 'source "$0"; exec "$@"', launcher, *command]
        env = {**os.environ, "BENCHMARK_BEGIN": str(time.time())}
        if self.threads:
            env["OMP_NUM_THREADS"] = str(self.threads)
        if self.processes > 1:
            env["WORLD_SIZE"] = str(self.processes)
            env["MASTER_ADDR"] = "127.0.0.1"
            env["MASTER_PORT"] = "29533"
        started = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**env, "RANK": str(rank)}
            )
            for rank in range(self.processes)
        ]
        outputs = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            sys.exit(f"arm {self.name!r} failed: see its error above")
        return json.loads(outputs[0].splitlines()[-1])


def run_interleaved(arms: dict, repeats: int) -> dict:
    """Run all arms in turn, `repeats` times, so that background load affects all of them alike.

    Args:
        arms: An Arm for each key, a name or a tuple (size, name).
        repeats: Number of runs of each arm.

    Returns:
        The list of results for each key.
    """
    results = {key: [] for key in arms}
    for repeat in range(repeats):
        for key, arm in arms.items():
            result = arm.run()
            results[key].append(result)
            label = key if isinstance(key, str) else f"{key[0]}x, {key[1]}"
            values = ", ".join(f"{name} {_format(value)}" for name, value in result.items())
            print(f"  {label}, run {repeat + 1}/{repeats}: {values}", flush=True)
    return results


def group_by_size(results: dict[tuple[int, str], list[dict]]) -> dict[int, dict[str, list[dict]]]:
    """Group results with keys (size, name) by size, in ascending order."""
    groups = {}
    for (size, name), runs in results.items():
        groups.setdefault(size, {})[name] = runs
    return dict(sorted(groups.items()))


def median(results: list[dict], key: str) -> float | None:
    """Return the median of `key` over the results that have it, None if none has."""
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None


def _format(value) -> str:
    if isinstance(value, dict):
        key, first = next(iter(value.items()))
        return f"[{key} {_format(first)} and {len(value) - 1} more]"
    if isinstance(value, list):
        return f"[{len(value)} values]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(header: list[str], rows: list[list]) -> None:
    """Print rows as a Markdown table."""
    cells = [header, *[["-" if v is None else _format(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)) + " |")


def process_memory(field: str, process: str = "self") -> float | None:
    """Read a field of /proc/PID/status or smaps_rollup in MiB; None without /proc."""
    for name in ("status", "smaps_rollup"):
        file = Path(f"/proc/{process}/{name}")
        if not file.exists():
            return None
        for line in file.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return None


def describe_machine() -> dict:
    """Return the hardware and versions that a measurement depends on."""
    names = ("torch", "torchvision", "numpy", "pillow", "msgspec", "hotcoco", "pycocotools")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), **versions}


def save_results(file: Path | None, **content) -> None:
    """Write the results and a description of the machine as JSON, if a file is given."""
    if file:
        file.write_text(json.dumps({"machine": describe_machine(), **content}, indent=1) + "\n")
        print(f"\nall results: {file}")
