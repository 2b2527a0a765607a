#!/usr/bin/env python3
"""How long scoring takes: from the detector's outputs to COCO's twelve numbers.

    python benchmarks/evaluation.py

Makes 5,000 images of 100 detections and the 36,781 boxes of COCO val2017, and twice and four times
that, and scores them by turns in several ways, each in processes of its own. `per image` is what
torchvision's references do: pycocotools for each batch, here of one image, then once over all;
`at once` is pycocotools for all detections together. `ours` includes what this project does in a
distributed evaluation: outputs to rows, and a gather from two processes. Larger sizes show the
growth, and leave the slow ways out.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import synthetic
import torch

EACH = 100  # detections an image
WAYS = ("per image", "at once", "ours, pycocotools", "ours, hotcoco")


def make_outputs(index, rng: np.random.Generator) -> list[dict]:
    """What a detector might say to each image: half of the boxes near true ones."""
    outputs = []
    for i in range(len(index)):
        rows = index.box_range(i)
        boxes = rng.uniform((0, 0, 5, 5), (400, 300, 240, 180), (EACH, 4))
        labels = rng.choice(index.categories.labels, EACH)
        if rows.stop > rows.start:
            near = rng.integers(rows.start, rows.stop, EACH // 2)
            moved = index.boxes[near] * rng.normal(1, 0.08, (EACH // 2, 4))
            boxes[: EACH // 2] = moved.clip(min=1)
            labels[: EACH // 2] = index.category_ids[near]
        boxes[:, 2:] += boxes[:, :2]
        scores = np.sort(rng.beta(0.5, 2, EACH))[::-1].copy()
        outputs.append(
            {
                "boxes": torch.from_numpy(boxes).float(),
                "scores": torch.from_numpy(scores).float(),
                "labels": torch.from_numpy(labels),
            }
        )
    return outputs


def coco_dicts(image_id: int, output: dict, category_ids: np.ndarray) -> list[dict]:
    """An output in COCO's results format, as the references write it."""
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


def score_per_image(index, outputs: list[dict]) -> list[float]:
    """pycocotools for each image as it comes, then accumulated."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(index.annotation_file)
    category_ids, image_ids = index.categories.ids_of_labels(), index.image_ids.tolist()
    yield
    evaluation, found = COCOeval(truth, iouType="bbox"), []
    for image_id, output in zip(image_ids, outputs, strict=True):
        evaluation.cocoDt = truth.loadRes(coco_dicts(image_id, output, category_ids))
        evaluation.params.imgIds = [image_id]
        evaluation.evaluate()
        shape = (len(evaluation.params.catIds), len(evaluation.params.areaRng), 1)
        found.append(np.asarray(evaluation.evalImgs).reshape(shape))
    order = np.argsort(image_ids)
    evaluation.evalImgs = list(np.concatenate([found[i] for i in order], axis=2).flatten())
    evaluation.params.imgIds = sorted(image_ids)
    evaluation._paramsEval = evaluation.params
    evaluation.accumulate()
    evaluation.summarize()
    yield evaluation.stats.tolist()


def score_at_once(index, outputs: list[dict]) -> list[float]:
    """pycocotools for all images together."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(index.annotation_file)
    category_ids, image_ids = index.categories.ids_of_labels(), index.image_ids.tolist()
    yield
    results = []
    for image_id, output in zip(image_ids, outputs, strict=True):
        results += coco_dicts(image_id, output, category_ids)
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    yield evaluation.stats.tolist()


def score_ours(index, outputs: list[dict], evaluator: str) -> list[float] | None:
    """Rows, one gather, and one scoring on rank 0, as `engine.evaluate` does it."""
    import coco_eval
    import utils

    utils.init_distributed(torch.device("cpu"))
    category_ids = index.categories.ids_of_labels()
    share = range(utils.rank(), len(index), utils.world_size())
    utils.barrier()
    yield
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


def measure(way: str, file: Path) -> dict:
    """Seconds from the outputs to the twelve numbers, these, and what memory that took, in MiB."""
    import coco_utils

    index = coco_utils.CocoIndex(coco_utils.Split(file, file.parent))
    outputs = make_outputs(index, np.random.default_rng(0))
    with contextlib.redirect_stdout(io.StringIO()):
        if way == "per image":
            steps = score_per_image(index, outputs)
        elif way == "at once":
            steps = score_at_once(index, outputs)
        else:
            steps = score_ours(index, outputs, way.removeprefix("ours, "))
        next(steps)  # what is not measured: reading the truth, meeting the other process
        held, begin = common.status("VmRSS"), time.perf_counter()
        numbers = next(steps)
        seconds, peak = time.perf_counter() - begin, common.status("VmHWM")
        next(steps, None)
    return {"seconds": seconds, "peak_mib": peak and peak - held, "numbers": numbers}


def main() -> None:
    parser = common.parser(__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], metavar="N",
                        help="multiples of 5,000 images (default: 1 2 4)")  # fmt: skip
    args = parser.parse_args()
    if args.arm:
        figures = measure(args.arm, args.work)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found = run_ways(Path(folder), args)
    print()
    report(found)
    common.save(args.json, found=found)


def run_ways(folder: Path, args) -> dict[int, dict]:
    """Figures of `measure` by size and way. All sizes take turns, as all ways do."""
    images, boxes = (50, 400) if args.quick else synthetic.VAL
    arms = {}
    for size in [1] if args.quick else args.sizes:
        print(f"{size}x: {size * images:,} images, {size * images * EACH:,} detections", flush=True)
        file = folder / f"{size}.json"
        synthetic.make_annotations(file, size * images, size * boxes)
        for way in WAYS if size == 1 else WAYS[3:]:
            arms[size, way] = lambda way=way, file=file: common.in_process(
                __file__, way, file, processes=2 if way in WAYS[2:] else 1, ours=way in WAYS[2:]
            )
    return common.by_size(common.by_turns(arms, 1 if args.quick else args.repeats))


def report(found: dict[int, dict]) -> None:
    rows = []
    for size, turns in found.items():
        seconds = [common.median(turns.get(way, []), "seconds") for way in WAYS]
        ratios = [slow and slow / seconds[3] for slow in seconds[:2]]
        memory = [common.median(turns.get(way, []), "peak_mib") for way in WAYS[1::2]]
        numbers = [turn["numbers"] for figures in turns.values() for turn in figures]
        same = "yes" if all(each == numbers[0] for each in numbers) else "NO"
        rows.append([f"{size}x", *seconds, *ratios, *memory, same if len(turns) > 1 else None])
    header = ["size", *(f"{way}, s" for way in WAYS), "per image / hotcoco", "at once / hotcoco"]
    header += [f"{way}, MiB at the peak" for way in WAYS[1::2]]
    common.table([*header, "twelve numbers identical"], rows)


if __name__ == "__main__":
    main()
