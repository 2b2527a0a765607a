"""What the benchmarks share: arms run by turns in processes of their own, medians, tables."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parser(description: str, repeats: bool = True) -> argparse.ArgumentParser:
    """With the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a smoke test in seconds, no figures")
    if repeats:
        made.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: 3)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every single figure there")
    made.add_argument("--arm", help=argparse.SUPPRESS)  # what a process of its own has to do
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return made


def in_process(
    script: str,
    arm: str,
    work: Path,
    processes: int = 1,
    ours: bool = False,
    threads: int | None = 1,
    flags: Sequence[str] = (),
) -> dict:
    """The figures that one arm prints, run in one or more fresh processes of their own.

    `ours`: in the environment that the launchers of this project make. `threads`: for each process,
    None for as many as it likes.
    """
    command = [sys.executable, script, "--arm", arm, "--work", str(work), *flags]
    if ours:
        launcher = str(ROOT / "start_scripts/common.sh")
        command = ["bash", "-c", 'source "$0"; exec "$@"', launcher, *command]
    env = {**os.environ, "BENCHMARK_BEGIN": str(time.time())}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    if processes > 1:
        env.update(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**env, "RANK": str(rank)})
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"the arm {arm!r} failed, see above")
    return json.loads(outputs[0].splitlines()[-1])


def by_turns(arms: dict, repeats: int) -> dict[str, list[dict]]:
    """Call every arm once, then every arm again: what disturbs the machine disturbs them all."""
    figures = {name: [] for name in arms}
    for turn in range(repeats):
        for name, arm in arms.items():
            figures[name].append(arm())
            shown = ", ".join(f"{k} {_short(v)}" for k, v in figures[name][-1].items())
            told = name if isinstance(name, str) else f"{name[0]}x, {name[1]}"
            print(f"  {turn + 1}/{repeats}  {told}: {shown}", flush=True)
    return figures


def by_size(figures: dict[tuple[int, str], list[dict]]) -> dict[int, dict[str, list[dict]]]:
    """The figures of arms that are named (size, way), by size and then by way."""
    sorted_out = {}
    for (size, way), turns in figures.items():
        sorted_out.setdefault(size, {})[way] = turns
    return dict(sorted(sorted_out.items()))


def median(figures: list[dict], key: str) -> float | None:
    values = [row[key] for row in figures if row.get(key) is not None]
    return statistics.median(values) if values else None


def _short(value) -> str:
    if isinstance(value, dict):  # the first figure stands for all
        key, first = next(iter(value.items()))
        return f"[{key} {_short(first)} and {len(value) - 1} more]"
    if isinstance(value, list):
        return f"[{len(value)} figures]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(header: list[str], rows: list[list]) -> None:
    """Print rows as a Markdown table."""
    cells = [header, *[["-" if v is None else _short(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)) + " |")


def status(field: str, process: str = "self") -> float | None:
    """MiB of a field of /proc/PID/status or smaps_rollup; None where there is no /proc."""
    for name in ("status", "smaps_rollup"):
        file = Path(f"/proc/{process}/{name}")
        if not file.exists():
            return None
        for line in file.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return None


def machine() -> dict:
    """What a figure depends on."""
    names = ("torch", "torchvision", "numpy", "pillow", "msgspec", "hotcoco", "pycocotools")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), **versions}


def save(file: Path | None, **content) -> None:
    if file:
        file.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
        print(f"\nevery figure: {file}")
