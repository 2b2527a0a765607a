#!/usr/bin/env python3
"""Measure data loading: time to the first batch, memory, and the time for one image and target.

    python benchmarks/data.py

Makes a data set of COCO train2017's size (118,287 images, 860,001 annotations with polygons) and
of twice and four times that size, and runs two arms in separate processes: `ours` is this project,
`plain` is torchvision's documented `CocoDetection` with `wrap_dataset_for_transforms_v2`. Single
images are also read as in torchvision's references, which convert polygons to masks. `plain` is
skipped at four times the size, where it would need 16 GB of memory. Needs 6 GB of disk space.
"""

import ctypes
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import synthetic

try:
    import resource
except ImportError:  # Windows
    resource = None

ARMS = ("plain", "ours")
WORKERS = 2


def resident_memory() -> float | None:
    """Release unused memory to the system; return the resident memory in MiB."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return common.process_memory("VmRSS")


# ------------------------------------------------------------------------------- the two arms


def load_dataset(arm: str, split):
    """Load the data set for training from its files."""
    if arm == "plain":
        from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
        from torchvision.transforms import v2

        return wrap_dataset_for_transforms_v2(
            CocoDetection(split.images, split.annotations, transforms=v2.ToImage())
        )
    import coco_utils
    import transforms
    from internals import data_checks

    index = coco_utils.CocoIndex(split)
    data_checks.raise_if_fatal(index, data_checks.find_issues(index))
    images = index.images_with_boxes()
    flip = transforms.training_preset("hflip", 800)
    return coco_utils.CocoDetection(index, index.categories, images, flip)


def build_loader(arm: str, dataset, batch_size: int = 2):
    """Build a loader of shuffled batches."""
    import torch

    import coco_utils
    import samplers
    from internals import preemption

    # As in train.py; the patch of `disable_decoding` reaches forked workers only.
    preemption.use_forked_workers()
    if arm == "plain":
        options = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
        options["collate_fn"] = collate
    else:
        widths, heights = dataset.index.sizes[dataset.images].T
        groups = samplers.aspect_ratio_groups(widths, heights, 3)
        options = {"batch_sampler": samplers.TrainingPlan(groups, batch_size)}
        options["collate_fn"] = coco_utils.collate
    return torch.utils.data.DataLoader(dataset, num_workers=WORKERS, **options)


def collate(batch: list) -> tuple:
    """Collate as torchvision's references do."""
    return tuple(zip(*batch, strict=True))


def measure_loading(arm: str, work: Path) -> dict:
    """Return seconds from annotation file to first batch, and memory in MiB beyond the imports."""
    import torchvision.datasets  # noqa: F401
    from pycocotools.coco import COCO  # noqa: F401

    import coco_utils  # noqa: F401
    from internals import data_checks  # noqa: F401

    split = synthetic.Split(work / "instances.json", work / "images")
    with split.annotations.open("rb") as file:  # into the page cache, for all arms alike
        while file.read(2**24):
            pass
    before = resident_memory()
    start = time.perf_counter()
    dataset = load_dataset(arm, split)
    index_seconds = time.perf_counter() - start
    batches = iter(build_loader(arm, dataset))
    next(batches)
    seconds = time.perf_counter() - start
    peak = common.process_memory("VmHWM")
    del batches
    after = resident_memory()
    memory = {"resident_mib": after - before, "peak_mib": peak - before} if before else {}
    return {"seconds": seconds, "index_seconds": index_seconds, **memory, "whole_peak_mib": peak}


def disable_decoding(arm: str, dataset):
    """Replace every image by a constant, so that an epoch loads targets only."""
    import torch
    from PIL import Image

    import coco_utils

    if arm == "plain":
        small = Image.new("RGB", (64, 48))
        type(dataset._dataset)._load_image = lambda *_: small
    else:
        small = torch.zeros(3, 480, 640, dtype=torch.uint8)
        coco_utils.CocoIndex.read_image = lambda *_: small[:, :48, :64].clone()
        dataset.augmentation = None
    return dataset


def measure_workers(arm: str, work: Path) -> dict:
    """Return the mean private memory of a worker in MiB, at three steps of an epoch."""
    split = synthetic.Split(work / "instances.json", work / "images")
    dataset = disable_decoding(arm, load_dataset(arm, split))
    loader = build_loader(arm, dataset, batch_size=16)
    batches = iter(loader)
    memory, steps = [], len(loader)
    start = time.perf_counter()
    for step, _ in enumerate(batches, start=1):
        if step in (1 + steps // 20, steps // 2, steps - 5):
            pids = [str(worker.pid) for worker in batches._workers]
            private = [common.process_memory("Private_Dirty", pid) or 0 for pid in pids]
            memory.append(sum(private) / WORKERS)
    early, middle, late = memory
    return {
        "worker_mib_early": early,
        "worker_mib_half": middle,
        "worker_mib_end": late,
        "growth_mib": late - early,
        "seconds": time.perf_counter() - start,
    }


# ------------------------------------------------------------------------------ single images


class ReferenceDataset:
    """Images and targets of torchvision's detection references, masks included."""

    def __init__(self, split):
        from torchvision.datasets import CocoDetection

        self.dataset = CocoDetection(split.images, split.annotations)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        import torch
        from pycocotools import mask as masks
        from torchvision.transforms import functional

        image, rows = self.dataset[i]
        width, height = image.size
        rows = [row for row in rows if row["iscrowd"] == 0]
        boxes = torch.as_tensor([row["bbox"] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        layers = [
            torch.as_tensor(masks.decode(masks.frPyObjects(row["segmentation"], height, width)))
            .any(dim=2)
            .to(torch.uint8)
            for row in rows
        ]
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        target = {
            "boxes": boxes[keep],
            "labels": torch.tensor([row["category_id"] for row in rows])[keep],
            "masks": torch.stack(layers)[keep] if layers else torch.zeros(0, height, width),
            "image_id": self.dataset.ids[i],
            "area": torch.tensor([row["area"] for row in rows]),
            "iscrowd": torch.tensor([row["iscrowd"] for row in rows]),
        }
        return functional.pil_to_tensor(image).to(torch.float32) / 255, target


def build_v2_dataset(split):
    """Build torchvision's v2 data set, with boxes, without masks, and with uint8 images."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    dataset = CocoDetection(split.images, split.annotations, transforms=v2.ToImage())
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))


def measure_images(arm: str, work: Path) -> dict:
    """Return the median milliseconds from file to image and target, on one core.

    The ways to read are interleaved in blocks of 50 images, because the first images after a change
    are slower: the previous way has filled the CPU's caches.
    """
    import torch

    torch.set_num_threads(1)
    split = synthetic.Split(work / "instances.json", work / "images")
    ours = load_dataset("ours", split)
    ours.augmentation = None
    references, wrapper = ReferenceDataset(split), build_v2_dataset(split)
    files = [split.images / ours.index.file_name(int(i)) for i in ours.images]
    readers = {
        "references": lambda i: references[int(ours.images[i])],
        "v2_wrapper": lambda i: wrapper[int(ours.images[i])],
        "ours": ours.__getitem__,
        "decoding": lambda i: decode(files[i]),
    }
    seconds = {name: [] for name in readers}
    for first in range(0, len(ours), 50):
        for name, read in readers.items():
            for i in range(first, min(first + 50, len(ours))):
                start = time.perf_counter()
                read(i)
                seconds[name].append(time.perf_counter() - start)
    return {f"{name}_ms": 1000 * float(np.median(values)) for name, values in seconds.items()}


def decode(file: Path) -> None:
    """Decode an image with Pillow, the lower bound of all readers."""
    from PIL import Image

    with Image.open(file) as image:
        image.load()


# --------------------------------------------------------------------------------- the results


def make_arm(kind: str, work: Path, pause: float = 0) -> common.Arm:
    """Make an arm; `kind` is a key of `MEASUREMENTS`, a colon, and "plain", "ours" or nothing."""
    return common.Arm(__file__, kind, work, use_launcher_environment="ours" in kind, pause=pause)


def run_loading(folder: Path, args) -> tuple[dict, dict]:
    """Return results of `measure_loading` by size and arm, and of `measure_workers` by arm.

    All sizes are interleaved, too: otherwise a machine that slows down would look like growth.
    """
    images, annotations = (400, 3000) if args.quick else synthetic.TRAIN
    # In the pause, the host of a virtual machine reclaims the memory of the previous process.
    # Allocating it again would be faster, which favors the arm that needs less.
    sizes, pause = ([1], 0) if args.quick else (args.sizes, 5)
    for size in sizes:
        work = folder / f"{size}x"
        synthetic.make_coco(work, size * images, size * annotations)
        megabytes = (work / "instances.json").stat().st_size / 1e6
        print(f"{size}x: {size * images:,} images, {size * annotations:,} annotations, "
              f"{megabytes:.0f} MB of JSON", flush=True)  # fmt: skip
    arms = {
        (size, arm): make_arm(f"loading:{arm}", folder / f"{size}x", pause)
        for arm in ARMS
        for size in sizes
        if arm == "ours" or size < 4
    }
    results = common.run_interleaved(arms, 1 if args.quick else args.repeats)
    work = folder / f"{sizes[0]}x"
    worker_arms = {arm: make_arm(f"workers:{arm}", work) for arm in ARMS}
    return common.group_by_size(results), common.run_interleaved(worker_arms, 1)


def run_images(folder: Path, args) -> dict:
    """Return results of `measure_images` by kind of image."""
    results = {}
    for kind, noise in (("smooth", 0.0), ("grainy", 12.0))[: 1 if args.quick else 2]:
        work, count = folder / kind, 40 if args.quick else 600
        split = synthetic.make_coco(work, count, round(count * 7.27), noise)
        kilobytes = np.mean([file.stat().st_size for file in split.images.iterdir()]) / 1000
        arms = {f"{kind}, {kilobytes:.0f} kB": make_arm("images:", work)}
        results |= common.run_interleaved(arms, 1 if args.quick else args.repeats)
    return results


def report_loading(results: dict[int, dict]) -> None:
    """Print medians of `measure_loading` by size."""
    rows = []
    for size, arms in results.items():
        for key, name in (
            ("seconds", "annotation file to first batch, s"),
            ("resident_mib", "resident memory per process, MiB"),
            ("peak_mib", "peak memory, MiB"),
            ("whole_peak_mib", "peak memory with the imports, MiB"),
        ):
            plain, ours = (common.median(arms.get(arm, []), key) for arm in ARMS)
            ratio = plain / ours if plain and ours else None
            rows.append([f"{name}, {size}x", plain, ours, ratio])
    common.print_table(["quantity", *ARMS, "plain / ours"], rows)


def report_workers(results: dict[str, list[dict]]) -> None:
    """Print the results of `measure_workers`."""
    rows = [[key, *(results[arm][0][key] for arm in ARMS)] for key in results["ours"][0]]
    common.print_table(["private memory of a worker over an epoch", *ARMS], rows)


def report_images(results: dict[str, list[dict]]) -> None:
    """Print medians of `measure_images` by kind of image."""
    keys = ("references_ms", "v2_wrapper_ms", "ours_ms", "decoding_ms")
    rows = []
    for kind, runs in results.items():
        values = [common.median(runs, key) for key in keys]
        rows.append([kind, *values, values[0] / values[2], values[1] / values[2]])
    common.print_table(["640 x 480 JPEG", *keys, "references / ours", "v2 / ours"], rows)


MEASUREMENTS = {"loading": measure_loading, "workers": measure_workers, "images": measure_images}


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], metavar="N",
                        help="multiples of COCO train2017 (default: 1 2 4)")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        kind, _, arm = args.arm.partition(":")
        print(json.dumps(MEASUREMENTS[kind](arm, args.work)))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        loading, workers = run_loading(Path(folder), args)
        images = run_images(Path(folder), args)
    print()
    report_loading(loading)
    print()
    report_workers(workers)
    print()
    report_images(images)
    common.save_results(args.json, loading=loading, workers=workers, images=images)


if __name__ == "__main__":
    main()
