#!/usr/bin/env python3
"""Run train.py with torchrun on all devices of one or more machines.

Adds what torchrun lacks in the oldest supported torch: after a signal, processes have unlimited
time to finish their step and save (--shutdown-timeout is newer), and the exit code is train.py's.

Environment variables: NPROC_PER_NODE, the processes on this machine; MAX_RESTARTS, the restarts by
torchrun after failures; on several machines also NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from internals import preemption  # noqa: E402


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


def rendezvous_flags(environment: dict) -> list[str]:
    """Return torchrun's flags for the rendezvous, at a port of the machine with NODE_RANK 0."""
    nodes = int(environment.get("NNODES") or 1)
    if nodes == 1:
        return ["--standalone"]
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if not environment.get(name)]
    if missing:
        sys.exit(f"NNODES is {nodes}: set {' and '.join(missing)}, too")
    node = int(environment["NODE_RANK"])
    # Each restart gets a new store, without the addresses of the previous start.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    address = f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT') or 29400}"
    return [
        *(f"--nnodes={nodes}", f"--node-rank={node}", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={address}", f"--rdzv-conf=is_host={int(node == 0)}"),
        f"--rdzv-id={environment.get('SLURM_JOB_ID') or 'faster-rcnn'}",
    ]


def run(folder: Path) -> int:
    """Run torchrun to its end; return the exit code of train.py."""
    devices = torch.cuda.device_count()
    processes = int(os.environ.get("NPROC_PER_NODE") or devices or 2)
    if not devices:
        print(f"no CUDA device was found: {processes} processes share the CPU", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[preemption.LAUNCH_FOLDER_VARIABLE] = str(folder)
    flags = [
        *(*rendezvous_flags(os.environ), f"--nproc-per-node={processes}"),
        f"--max-restarts={os.environ.get('MAX_RESTARTS') or 0}",
    ]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun([*flags, str(PROJECT / "train.py"), *sys.argv[1:]])
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
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
