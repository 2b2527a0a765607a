#!/usr/bin/env python3
"""How long data takes: annotation file to first batch, memory, and one image to its target.

    python benchmarks/data.py

Makes a data set of COCO train2017's size (118,287 images, 860,001 annotations with polygons) and
twice and four times that, and runs this project and the plain way by turns, each in a process of
its own. The plain way is torchvision's documented `CocoDetection` with
`wrap_dataset_for_transforms_v2`; an image as torchvision's references read it has its polygons
turned into masks. At four times the size, where it would take 16 GB of memory, the plain way is
left out. Needs 6 GB of disk.
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


def resident() -> float | None:
    """What this process holds after giving back what it can, in MiB."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return common.status("VmRSS")


# -------------------------------------------------------------------------------- the two ways


def load(arm: str, split) -> object:
    """The data set as one would train on it, from nothing but its files."""
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


def loader_of(arm: str, dataset, batch_size: int = 2):
    import torch

    import coco_utils
    import samplers
    from internals import preemption

    # As train.py does; the patch of `without_decoding` would not reach others either.
    preemption.use_forked_workers()
    if arm == "plain":
        order = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
        order["collate_fn"] = lists
    else:
        widths, heights = dataset.index.sizes[dataset.images].T
        groups = samplers.aspect_ratio_groups(widths, heights, 3)
        order = {"batch_sampler": samplers.TrainingPlan(groups, batch_size)}
        order["collate_fn"] = coco_utils.collate
    return torch.utils.data.DataLoader(dataset, num_workers=WORKERS, **order)


def lists(batch: list) -> tuple:
    """The references' collate function."""
    return tuple(zip(*batch, strict=True))


def measure_loading(arm: str, work: Path) -> dict:
    """Seconds from the annotation file to the first batch, and memory in MiB beyond the imports."""
    import torchvision.datasets  # noqa: F401
    from pycocotools.coco import COCO  # noqa: F401

    import coco_utils  # noqa: F401
    from internals import data_checks  # noqa: F401

    split = synthetic.Split(work / "instances.json", work / "images")
    with split.annotations.open("rb") as file:  # from now on no way has to wait for the disk
        while file.read(2**24):
            pass
    before = resident()
    begin = time.perf_counter()
    dataset = load(arm, split)
    loaded = time.perf_counter() - begin
    batches = iter(loader_of(arm, dataset))
    next(batches)
    seconds = time.perf_counter() - begin
    peak = common.status("VmHWM")
    del batches
    after = resident()
    memory = {"resident_mib": after - before, "peak_mib": peak - before} if before else {}
    return {"seconds": seconds, "index_seconds": loaded, **memory, "whole_peak_mib": peak}


def without_decoding(arm: str, dataset):
    """The data set with a constant for every image, to run through an epoch of targets."""
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
    """Memory of the loading processes that no other process shares, as an epoch goes by, in MiB."""
    split = synthetic.Split(work / "instances.json", work / "images")
    loader = loader_of(arm, without_decoding(arm, load(arm, split)), batch_size=16)
    batches = iter(loader)
    figures, steps = [], len(loader)
    begin = time.perf_counter()
    for step, _ in enumerate(batches, start=1):
        if step in (1 + steps // 20, steps // 2, steps - 5):
            workers = [str(worker.pid) for worker in batches._workers]
            figures.append(
                sum(common.status("Private_Dirty", pid) or 0 for pid in workers) / WORKERS
            )
    early, middle, late = figures
    return {
        "worker_mib_early": early,
        "worker_mib_half": middle,
        "worker_mib_end": late,
        "growth_mib": late - early,
        "seconds": time.perf_counter() - begin,
    }


# --------------------------------------------------------------------------------- one image


class AsTheReferences:
    """An image and its target as torchvision's detection references make them, masks included."""

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


def v2_wrapper(split):
    """torchvision's v2 data set with boxes and without masks, to uint8 tensors as ours."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    dataset = CocoDetection(split.images, split.annotations, transforms=v2.ToImage())
    return wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))


def measure_images(arm: str, work: Path) -> dict:
    """Milliseconds from a file name to image and target, on one core: medians over the images.

    The ways take turns after 50 images each: one after the other as in a loading process, as a way
    that follows another finds the caches full of what that one left there.
    """
    import torch

    torch.set_num_threads(1)
    split = synthetic.Split(work / "instances.json", work / "images")
    ours = load("ours", split)
    ours.augmentation = None
    references, wrapper = AsTheReferences(split), v2_wrapper(split)
    files = [split.images / ours.index.file_name(int(i)) for i in ours.images]
    ways = {
        "references": lambda i: references[int(ours.images[i])],
        "v2_wrapper": lambda i: wrapper[int(ours.images[i])],
        "ours": ours.__getitem__,
        "decoding": lambda i: decode_alone(files[i]),
    }
    times = {name: [] for name in ways}
    for first in range(0, len(ours), 50):
        for name, way in ways.items():
            for i in range(first, min(first + 50, len(ours))):
                begin = time.perf_counter()
                way(i)
                times[name].append(time.perf_counter() - begin)
    return {f"{name}_ms": 1000 * float(np.median(taken)) for name, taken in times.items()}


def decode_alone(file: Path) -> None:
    """What no way can do without: Pillow's decoding."""
    from PIL import Image

    with Image.open(file) as image:
        image.load()


# ---------------------------------------------------------------------------------- the report


def arm(kind: str, work: Path, pause: float = 0):
    """A measurement in a process of its own, to be called as often as needed.

    It begins after `pause` seconds: memory that the process before has just given up is quick to
    get until the host of a virtual machine has taken it back, which favours what needs little.
    """

    def measure() -> dict:
        time.sleep(pause)
        return common.in_process(__file__, kind, work, ours="ours" in kind)

    return measure


def run_loading(folder: Path, args) -> tuple[dict, dict]:
    """Figures of `measure_loading` by size and way, and of `measure_workers` by way.

    All sizes take turns, too, so that a machine that becomes slower does not look like growth.
    """
    images, annotations = (400, 3000) if args.quick else synthetic.TRAIN
    sizes, pause = ([1], 0) if args.quick else (args.sizes, 5)
    for size in sizes:
        work = folder / f"{size}x"
        synthetic.make_coco(work, size * images, size * annotations)
        megabytes = (work / "instances.json").stat().st_size / 1e6
        print(f"{size}x: {size * images:,} images, {size * annotations:,} annotations, "
              f"{megabytes:.0f} MB of JSON", flush=True)  # fmt: skip
    arms = {
        (size, way): arm(f"loading:{way}", folder / f"{size}x", pause)
        for way in ARMS
        for size in sizes
        if way == "ours" or size < 4
    }
    loading = common.by_size(common.by_turns(arms, 1 if args.quick else args.repeats))
    work = folder / f"{sizes[0]}x"
    workers = common.by_turns({way: arm(f"workers:{way}", work) for way in ARMS}, 1)
    return loading, workers


def run_images(folder: Path, args) -> dict:
    """Figures of `measure_images` by kind of image."""
    figures = {}
    for kind, grain in (("smooth", 0.0), ("grainy", 12.0)):
        work, count = folder / kind, 40 if args.quick else 600
        split = synthetic.make_coco(work, count, round(count * 7.27), grain)
        kilobytes = np.mean([file.stat().st_size for file in split.images.iterdir()]) / 1000
        one = {f"{kind}, {kilobytes:.0f} kB": arm("images:", work)}
        figures.update(common.by_turns(one, 1 if args.quick else args.repeats))
    return figures


def report_loading(figures: dict[int, dict]) -> None:
    rows = []
    for size, arms in figures.items():
        for key, name in (
            ("seconds", "annotation file to first batch, s"),
            ("resident_mib", "memory kept per process, MiB"),
            ("peak_mib", "memory at the peak, MiB"),
            ("whole_peak_mib", "the same with the imports, MiB"),
        ):
            plain, ours = (common.median(arms.get(arm, []), key) for arm in ARMS)
            ratio = plain / ours if plain and ours else None
            rows.append([f"{name}, {size}x", plain, ours, ratio])
    common.table(["quantity", *ARMS, "plain / ours"], rows)


def report_workers(figures: dict[str, list[dict]]) -> None:
    rows = [[key, *(figures[way][0][key] for way in ARMS)] for key in figures["ours"][0]]
    common.table(["loading process over an epoch, MiB of its own", *ARMS], rows)


def report_images(figures: dict[str, list[dict]]) -> None:
    keys = ("references_ms", "v2_wrapper_ms", "ours_ms", "decoding_ms")
    rows = []
    for kind, turns in figures.items():
        values = [common.median(turns, key) for key in keys]
        rows.append([kind, *values, values[0] / values[2], values[1] / values[2]])
    common.table(["640 x 480 JPEG", *keys, "references / ours", "v2 / ours"], rows)


def main() -> None:
    parser = common.parser(__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], metavar="N",
                        help="multiples of COCO train2017 (default: 1 2 4)")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        kind, _, arm = args.arm.partition(":")
        measure = {"loading": measure_loading, "workers": measure_workers}.get(kind)
        print(json.dumps((measure or measure_images)(arm, args.work)))
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
    common.save(args.json, loading=loading, workers=workers, images=images)


if __name__ == "__main__":
    main()
