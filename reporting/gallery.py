"""Which images the report shows, with their boxes drawn and their errors in words."""

import base64
import io
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from internals.errors import DataError
from reporting import drawing
from reporting.analysis import IGNORED, DetectionResults, shorten

MAX_IMAGES = {"worst": 6, "best": 4, "random": 4}
LONGEST_SIDE = 640  # pixels: so the page has two or three megabytes
CORRECT, WRONG, WRONG_CATEGORY, CROWD = (0, 114, 178), (213, 94, 0), (240, 228, 66), (150, 150, 150)


def build_galleries(results: DetectionResults) -> dict[str, list[dict]]:
    """The cards of the images to show, by what they are examples of."""
    chosen = choose_images(results).items()
    return {kind: [image_card(results, i) for i in images] for kind, images in chosen}


def choose_images(results: DetectionResults) -> dict[str, list[int]]:
    """Choose the images with the fewest and the most errors, and random others, by position.

    Errors are boxes that were missed, false positives and wrong categories. No image is in two
    galleries.
    """
    index = results.index
    count = partial(np.bincount, minlength=len(index))
    image = index.positions_of(results.confident[:, 0].astype(np.int64))
    correct = count(image[results.correct])
    errors = count(image[results.wrong_category | results.false_positive])
    errors += count(index.image_of_rows()[results.missed])
    order = np.lexsort((-correct, errors)).tolist()
    limit = min(MAX_IMAGES["best"], -(-len(index) // 3))
    best = [i for i in order if correct[i]][:limit]
    worst = [i for i in reversed(order) if errors[i] and i not in best][: MAX_IMAGES["worst"]]
    others = np.setdiff1d(order, [*best, *worst])
    size = min(MAX_IMAGES["random"], len(others))
    random = np.sort(np.random.default_rng(0).choice(others, size, replace=False))
    return {"worst": worst, "best": best, "random": random.tolist()}


def image_card(results: DetectionResults, i: int) -> dict:
    """Image i of the index with its boxes, and its errors in words.

    Where the image cannot be read, `problem` says why, and `images` is empty.
    """
    index = results.index
    ground_truth, missed = label_ground_truth(results, i)
    detections, found = label_detections(results, i)
    summary = [f"{len(found.pop('correct'))} correct"]
    for kind, texts in {"missed": missed, **found}.items():
        if texts:
            summary.append(f"{len(texts)} {kind} ({list_some(texts, 5)})")
    card = {"file": index.file_name(i), "id": int(index.image_ids[i]), "summary": summary}
    try:
        image = index.read_image(i)
    except DataError as error:
        return {**card, "images": [], "problem": str(error)}
    factor = min(1, LONGEST_SIDE / max(image.shape[-2:]))
    image = resize(image, [max(1, round(side * factor)) for side in image.shape[-2:]])
    drawn = [
        {"label": label, **to_jpeg(image, factor, boxes)}
        for label, boxes in (("ground truth", ground_truth), ("detections", detections))
    ]
    return {**card, "images": drawn, "problem": None}


def label_ground_truth(results: DetectionResults, i: int) -> tuple[list[tuple], list[str]]:
    """The ground-truth boxes of image i as (box, text, colour), and the names of missed ones."""
    index, boxes, missed = results.index, [], []
    rows = index.box_range(i)
    for row in range(rows.start, rows.stop):
        name = index.categories.names[results.gt_category[row]]
        if index.iscrowd[row]:
            boxes.append((index.boxes[row], f"{name}, crowd", CROWD))
        elif results.missed[row]:
            boxes.append((index.boxes[row], f"{name}, missed", WRONG))
            missed.append(name)
        elif (detection := results.matched_detection[row]) != IGNORED:  # which has no size
            colour = CORRECT if results.correct[detection] else WRONG_CATEGORY
            boxes.append((index.boxes[row], name, colour))
    return boxes, missed


def label_detections(results: DetectionResults, i: int) -> tuple[list[tuple], dict]:
    """The detections of image i as (box, text, colour), and lists of texts by what they are."""
    names, boxes = results.index.categories.names, []
    found = {"correct": [], "false positive": [], "of a wrong category": []}
    for row in np.flatnonzero(results.confident[:, 0] == results.index.image_ids[i]):
        match, box = results.matched_gt[row], results.confident[row, 1:5]
        text = f"{names[results.detection_category[row]]} {results.confident[row, 5]:.2f}"
        if match == IGNORED:
            boxes.append((box, f"{text}, in a crowd", CROWD))
        elif results.correct[row]:
            boxes.append((box, text, CORRECT))
            found["correct"].append(text)
        elif results.false_positive[row]:
            boxes.append((box, f"{text}, false", WRONG))
            found["false positive"].append(text)
        else:
            true_name = names[results.gt_category[match]]
            boxes.append((box, f"{text}, is {true_name}", WRONG_CATEGORY))
            found["of a wrong category"].append(f"{true_name} detected as {text}")
    return boxes, found


def to_jpeg(image: torch.Tensor, factor: float, boxes: list[tuple]) -> dict:
    """Draw the boxes, which are those before the image was resized by `factor`, errors on top."""
    boxes = sorted(boxes, key=lambda item: item[2] == WRONG)
    xyxy = drawing.xywh_to_xyxy(np.array([box for box, *_ in boxes]) * factor)
    texts = [shorten(text, 40) for _, text, _ in boxes]
    drawn = drawing.draw_boxes(image, xyxy, texts, [colour for *_, colour in boxes])
    out = io.BytesIO()
    Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=78)
    height, width = drawn.shape[-2:]
    data = base64.b64encode(out.getvalue()).decode()
    return {"uri": f"data:image/jpeg;base64,{data}", "width": width, "height": height}


def list_some(texts: list[str], limit: int) -> str:
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
