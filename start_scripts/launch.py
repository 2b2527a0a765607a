#!/usr/bin/env python3
"""Run train.py with torchrun on all devices of one or more machines.

Adds what torchrun lacks in the oldest supported torch: after a signal, processes have unlimited
time to finish their step and save (--shutdown-timeout is newer), and the exit code is train.py's.

Environment variables: NPROC_PER_NODE, the processes on this machine, a number or as for torchrun
gpu, cpu or auto; MAX_RESTARTS, the restarts by torchrun after failures; on several machines also
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import determine_local_world_size
from torch.distributed.run import main as torchrun

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from internals import preemption  # noqa: E402
from internals.errors import UserError  # noqa: E402
from internals.failures import WRONG_USE  # noqa: E402

# Larger numbers are errors in writing: each process takes about a gigabyte.
MAX_PROCESSES, MAX_NODES, MAX_RESTARTS = 1024, 100_000, 1_000_000


def install_signal_handlers(folder: Path) -> None:
    """Pass the first signal on as a file; at the second, torchrun ends the processes in 30 s."""

    def note_signal(number: int, frame: object) -> None:
        name, file = signal.Signals(number).name, folder / "stop"
        if file.exists():
            raise SignalException(f"{name} again", signal.SIGTERM)
        file.write_text(name)

    for name in preemption.STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note_signal)
    # Otherwise torchrun replaces the handlers of these signals.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"


def read_number(environment: Mapping, name: str, default: int, minimum: int, maximum: int) -> int:
    """Read an environment variable; `default` if it is unset or empty.

    Raises:
        UserError: It is not a whole number from `minimum` to `maximum`.
    """
    text = environment.get(name) or str(default)
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not minimum <= number <= maximum:
        raise UserError(f"{name} is {text!r}: set it to a whole number from {minimum} to {maximum}")
    return number


def rendezvous_flags(environment: Mapping) -> list[str]:
    """Return torchrun's flags for the rendezvous, at a port of the machine with NODE_RANK 0."""
    nodes = read_number(environment, "NNODES", 1, 1, MAX_NODES)
    port = read_number(environment, "MASTER_PORT", 29400, 1, 65535)
    node = read_number(environment, "NODE_RANK", 0, 0, nodes - 1 if nodes > 1 else MAX_NODES)
    if nodes == 1:
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        raise UserError(f"NNODES is {nodes}: set {' and '.join(missing)}, too")
    address = environment["MASTER_ADDR"]
    if not re.fullmatch(r"[\w.:%\[\]-]+", address) or re.search(r"^[^:\[]+:\d*$", address):
        raise UserError(
            f"MASTER_ADDR is {address!r}: set it to the name or address of the machine with "
            "NODE_RANK 0 alone, and its port, if not 29400, as MASTER_PORT"
        )
    # Each restart gets a new store, without the addresses of the previous start.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return [
        *(f"--nnodes={nodes}", f"--node-rank={node}", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={address}:{port}", f"--rdzv-conf=is_host={int(node == 0)}"),
        f"--rdzv-id={environment.get('SLURM_JOB_ID') or 'faster-rcnn'}",
    ]


def count_processes(environment: Mapping, devices: int) -> int:
    """Return NPROC_PER_NODE, a number or one of torchrun's words; by default one per device."""
    text = environment.get("NPROC_PER_NODE")
    if text not in ("gpu", "auto", "cpu"):
        try:
            return read_number(environment, "NPROC_PER_NODE", devices or 2, 1, MAX_PROCESSES)
        except UserError as error:
            raise UserError(f"{error}, or to gpu, cpu or auto") from None
    if text == "gpu" and not devices:
        raise UserError("NPROC_PER_NODE is 'gpu', but no CUDA device was found: set it to a number")
    return determine_local_world_size(text)


def run(folder: Path) -> int:
    """Run torchrun to its end; return the exit code of train.py."""
    devices = torch.cuda.device_count()
    processes = count_processes(os.environ, devices)
    restarts = read_number(os.environ, "MAX_RESTARTS", 0, 0, MAX_RESTARTS)
    flags = [*rendezvous_flags(os.environ), f"--nproc-per-node={processes}"]
    if not devices:
        print(f"no CUDA device was found: {processes} processes share the CPU", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[preemption.LAUNCH_FOLDER_VARIABLE] = str(folder)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun([*flags, f"--max-restarts={restarts}", str(PROJECT / "train.py"), *sys.argv[1:]])
        failure = None
    except (ChildFailedError, SignalException) as error:
        failure = error
    file = folder / "exit"
    if file.exists():
        return int(file.read_text() or 1)
    if failure:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


def main() -> None:
    """Run the training, and exit with its exit code."""
    folder = Path(tempfile.mkdtemp(prefix="faster-rcnn-"))
    install_signal_handlers(folder)
    try:
        exit_code = run(folder)
    except UserError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        exit_code = WRONG_USE
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
