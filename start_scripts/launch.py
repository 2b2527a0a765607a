#!/usr/bin/env python3
"""Run train.py on every device of this machine through torchrun, and end as the processes ended.

torchrun itself ends with 1 and a traceback whatever the reason was; here an exit code that train.py
chose, and explained on the way out, is handed on.
"""

import logging
import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

EXPLAINED = (2, 75)


def main() -> None:
    devices = torch.cuda.device_count()
    processes = int(os.environ.get("NPROC_PER_NODE") or devices or 2)
    if not devices:
        print(f"no CUDA device was found: {processes} processes share the CPU", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    train = Path(__file__).resolve().parent.parent / "train.py"
    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", str(train), *sys.argv[1:]])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in EXPLAINED:
            if code in codes:
                sys.exit(code)
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
