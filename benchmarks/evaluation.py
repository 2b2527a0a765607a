#!/usr/bin/env python3
"""Measure the time of scoring: from the detector's outputs to COCO's twelve numbers.

    python benchmarks/evaluation.py

Makes 5,000 images with 100 detections each and the 36,781 boxes of COCO val2017, and multiples of
that, and scores them in several ways, in separate processes. `per image` is what torchvision's
references do: pycocotools for each batch, here of one image, then once over all images; `at once`
is pycocotools for all detections together. `ours` includes the steps of a distributed evaluation:
outputs to rows, and a gather from two processes. Multiples are only scored by `ours, hotcoco`.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
import synthetic
import torch

DETECTIONS = 100  # per image
ARMS = ("per image", "at once", "ours, pycocotools", "ours, hotcoco")
PYCOCOTOOLS, OURS = ARMS[:2], ARMS[2:]


def make_outputs(index, rng: np.random.Generator) -> list[dict]:
    """Make detector outputs for each image: half of the boxes near ground truth, half random."""
    outputs = []
    for i in range(len(index)):
        rows = index.box_range(i)
        boxes = rng.uniform((0, 0, 5, 5), (400, 300, 240, 180), (DETECTIONS, 4))
        labels = rng.choice(index.categories.labels, DETECTIONS)
        if rows.stop > rows.start:
            near = rng.integers(rows.start, rows.stop, DETECTIONS // 2)
            moved = index.boxes[near] * rng.normal(1, 0.08, (DETECTIONS // 2, 4))
            boxes[: DETECTIONS // 2] = moved.clip(min=1)
            labels[: DETECTIONS // 2] = index.category_ids[near]
        boxes[:, 2:] += boxes[:, :2]
        scores = np.sort(rng.beta(0.5, 2, DETECTIONS))[::-1].copy()
        outputs.append(
            {
                "boxes": torch.from_numpy(boxes).float(),
                "scores": torch.from_numpy(scores).float(),
                "labels": torch.from_numpy(labels),
            }
        )
    return outputs


def coco_dicts(image_id: int, output: dict, category_ids: np.ndarray) -> list[dict]:
    """Convert an output to COCO's results format, as the references do."""
    x1, y1, x2, y2 = output["boxes"].unbind(1)
    boxes = torch.stack((x1, y1, x2 - x1, y2 - y1), dim=1).tolist()
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[labels[k]]),
            "bbox": box,
            "score": scores[k],
        }
        for k, box in enumerate(boxes)
    ]


# The `score_*` functions yield twice: None after the setup, which is not timed, then the numbers.


def score_per_image(index, outputs: list[dict]) -> Iterator[list[float] | None]:
    """Score with pycocotools, each image on its own, then accumulate."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(index.annotation_file)
    category_ids, image_ids = index.categories.ids_of_labels(), index.image_ids.tolist()
    yield None
    evaluation, results = COCOeval(truth, iouType="bbox"), []
    for image_id, output in zip(image_ids, outputs, strict=True):
        evaluation.cocoDt = truth.loadRes(coco_dicts(image_id, output, category_ids))
        evaluation.params.imgIds = [image_id]
        evaluation.evaluate()
        shape = (len(evaluation.params.catIds), len(evaluation.params.areaRng), 1)
        results.append(np.asarray(evaluation.evalImgs).reshape(shape))
    order = np.argsort(image_ids)
    evaluation.evalImgs = list(np.concatenate([results[i] for i in order], axis=2).flatten())
    evaluation.params.imgIds = sorted(image_ids)
    evaluation._paramsEval = evaluation.params
    evaluation.accumulate()
    evaluation.summarize()
    yield evaluation.stats.tolist()


def score_at_once(index, outputs: list[dict]) -> Iterator[list[float] | None]:
    """Score with pycocotools, all images together."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(index.annotation_file)
    category_ids, image_ids = index.categories.ids_of_labels(), index.image_ids.tolist()
    yield None
    results = []
    for image_id, output in zip(image_ids, outputs, strict=True):
        results += coco_dicts(image_id, output, category_ids)
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    yield evaluation.stats.tolist()


def score_ours(index, outputs: list[dict], evaluator: str) -> Iterator[list[float] | None]:
    """Score as `engine.evaluate` does: rows on each rank, one gather, and scoring on rank 0."""
    import coco_eval
    import utils

    utils.init_distributed(torch.device("cpu"))
    category_ids = index.categories.ids_of_labels()
    share = range(utils.rank(), len(index), utils.world_size())
    utils.barrier()
    yield None
    rows = [np.empty((0, 7))]
    for i in share:
        rows.append(coco_eval.detection_rows([outputs[i]], [index.image_ids[i]], category_ids))
    detections = utils.gather_rows(np.concatenate(rows))
    numbers = None
    if detections is not None:
        detections = detections[np.argsort(detections[:, 0], kind="stable")]
        scored = coco_eval.evaluate_detections(index, detections, evaluator)
        numbers = [-1.0 if scored[name] is None else scored[name] for name in coco_eval.METRICS]
    yield numbers
    utils.cleanup_distributed()


def measure(arm: str, file: Path) -> dict:
    """Return the seconds of scoring, its peak memory in MiB, and the twelve numbers."""
    import coco_utils

    index = coco_utils.CocoIndex(coco_utils.Split(file, file.parent))
    outputs = make_outputs(index, np.random.default_rng(0))
    with contextlib.redirect_stdout(io.StringIO()):
        if arm == "per image":
            scoring = score_per_image(index, outputs)
        elif arm == "at once":
            scoring = score_at_once(index, outputs)
        else:
            scoring = score_ours(index, outputs, arm.removeprefix("ours, "))
        next(scoring)
        memory_before = common.process_memory("VmRSS")
        start = time.perf_counter()
        numbers = next(scoring)
        seconds = time.perf_counter() - start
        peak = common.process_memory("VmHWM")
        next(scoring, None)
    peak_mib = None if peak is None else peak - memory_before
    return {"seconds": seconds, "peak_mib": peak_mib, "numbers": numbers}


def run_arms(folder: Path, args) -> dict[int, dict]:
    """Run all arms at all sizes, interleaved; return the results of `measure` by size and arm."""
    images, boxes = (50, 400) if args.quick else synthetic.VAL
    arms = {}
    for size in [1] if args.quick else args.sizes:
        detections = size * images * DETECTIONS
        print(f"{size}x: {size * images:,} images, {detections:,} detections", flush=True)
        file = folder / f"{size}.json"
        synthetic.make_annotations(file, size * images, size * boxes)
        for arm in ARMS if size == 1 else ["ours, hotcoco"]:
            arms[size, arm] = common.Arm(
                __file__,
                arm,
                file,
                processes=2 if arm in OURS else 1,
                use_launcher_environment=arm in OURS,
            )
    results = common.run_interleaved(arms, 1 if args.quick else args.repeats)
    return common.group_by_size(results)


def report(results: dict[int, dict]) -> None:
    """Print medians, their ratios, and whether all arms computed the same numbers."""
    rows = []
    memory_arms = ("at once", "ours, hotcoco")
    for size, runs in results.items():
        seconds = {arm: common.median(runs.get(arm, []), "seconds") for arm in ARMS}
        ratios = [
            seconds[arm] / seconds["ours, hotcoco"] if seconds[arm] else None for arm in PYCOCOTOOLS
        ]
        memory = [common.median(runs.get(arm, []), "peak_mib") for arm in memory_arms]
        numbers = [run["numbers"] for arm_runs in runs.values() for run in arm_runs]
        identical = None
        if len(runs) > 1:
            identical = "yes" if all(each == numbers[0] for each in numbers) else "NO"
        rows.append([f"{size}x", *seconds.values(), *ratios, *memory, identical])
    header = ["size", *(f"{arm}, s" for arm in ARMS), "per image / hotcoco", "at once / hotcoco"]
    header += [f"{arm}, peak MiB" for arm in memory_arms]
    common.print_table([*header, "twelve numbers identical"], rows)


def main() -> None:
    """Run the benchmark."""
    parser = common.build_parser(__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], metavar="N",
                        help="multiples of 5,000 images (default: 1 2 4)")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        result = measure(args.arm, args.work)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        results = run_arms(Path(folder), args)
    print()
    report(results)
    common.save_results(args.json, found=results)


if __name__ == "__main__":
    main()
