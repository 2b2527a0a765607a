"""Choose the example images of the report, draw their boxes and list their errors."""

import base64
import io
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from internals.errors import DataError
from reporting import drawing, fonts
from reporting.analysis import IGNORED, DetectionResults, shorten
from reporting.suspects import Suspect

MAX_IMAGES = {"worst": 6, "best": 4, "random": 4}
LONGEST_SIDE = 640  # pixels: for a page of two or three megabytes
LONGEST_SIDE_OF_SUSPECTS = 480
MARGIN = 0.5  # around the box of a suspect, as a share of its longer side
CORRECT, WRONG, WRONG_CATEGORY, CROWD = (0, 114, 178), (213, 94, 0), (240, 228, 66), (150, 150, 150)


def build_galleries(results: DetectionResults) -> dict[str, list[dict]]:
    """Build the cards of the example images, by kind: "worst", "best" and "random"."""
    examples = choose_images(results).items()
    return {kind: [build_card(results, i) for i in images] for kind, images in examples}


def choose_images(results: DetectionResults) -> dict[str, list[int]]:
    """Choose the images with the fewest and the most errors, and random others, by position.

    Errors are missed boxes, false positives and wrong categories. No image is chosen twice.
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


def build_card(results: DetectionResults, i: int) -> dict:
    """Draw image i of the index, and list its errors.

    If the image cannot be read, `problem` is the error message and `images` is empty.
    """
    index = results.index
    ground_truth, missed = label_ground_truth(results, i)
    detections, texts_by_kind = label_detections(results, i)
    summary = [f"{len(texts_by_kind.pop('correct'))} correct"]
    for kind, texts in {"missed": missed, **texts_by_kind}.items():
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
    """Return the ground-truth boxes of image i as (box, text, color), and the missed names."""
    index, boxes, missed = results.index, [], []
    drawn = fonts.readable_names(index.categories)
    rows = index.box_range(i)
    for row in range(rows.start, rows.stop):
        category = results.gt_category[row]
        name = drawn[category]
        if index.iscrowd[row]:
            boxes.append((index.boxes[row], f"{name}, crowd", CROWD))
        elif results.missed[row]:
            boxes.append((index.boxes[row], f"{name}, missed", WRONG))
            missed.append(index.categories.display_names[category])
        elif (detection := results.matched_detection[row]) != IGNORED:  # ignored: without a size
            color = CORRECT if results.correct[detection] else WRONG_CATEGORY
            boxes.append((index.boxes[row], name, color))
    return boxes, missed


def label_detections(results: DetectionResults, i: int) -> tuple[list[tuple], dict]:
    """Return the detections of image i as (box, text, color), and their texts by kind."""
    categories, boxes = results.index.categories, []
    names, drawn = categories.display_names, fonts.readable_names(categories)
    texts_by_kind = {"correct": [], "false positive": [], "wrong category": []}
    for row in np.flatnonzero(results.confident[:, 0] == results.index.image_ids[i]):
        match, box = results.matched_gt[row], results.confident[row, 1:5]
        category, score = results.detection_category[row], f"{results.confident[row, 5]:.2f}"
        text, label = f"{names[category]} {score}", f"{drawn[category]} {score}"
        if match == IGNORED:
            boxes.append((box, f"{label}, in a crowd", CROWD))
        elif results.correct[row]:
            boxes.append((box, label, CORRECT))
            texts_by_kind["correct"].append(text)
        elif results.false_positive[row]:
            boxes.append((box, f"{label}, false positive", WRONG))
            texts_by_kind["false positive"].append(text)
        else:
            truth = results.gt_category[match]
            boxes.append((box, f"{label}, is {drawn[truth]}", WRONG_CATEGORY))
            texts_by_kind["wrong category"].append(f"{names[truth]} detected as {text}")
    return boxes, texts_by_kind


def build_suspect_cards(results: DetectionResults, suspects: list[Suspect]) -> list[dict]:
    """Draw the region of each suspect, with the annotated box and the detection.

    If the image cannot be read, `problem` is the error message and `image` is missing.
    """
    return [build_suspect_card(results, suspect) for suspect in suspects]


def build_suspect_card(results: DetectionResults, suspect: Suspect) -> dict:
    """Build the card of a suspect as `build_suspect_cards` does."""
    index, names = results.index, fonts.readable_names(results.index.categories)
    d, t, boxes, parts = suspect.detection, suspect.box, [], []
    if t >= 0:
        i = int(np.searchsorted(index.offsets, t, side="right")) - 1
        boxes.append((index.true_boxes()[t], names[results.gt_category[t]], CORRECT))
        parts.append(f"annotated as {boxes[-1][1]}")
    if d >= 0:
        _, *box, score, _ = results.confident[d]
        i = int(index.positions_of(results.confident[d, :1].astype(np.int64))[0])
        text = f"{names[results.detection_category[d]]} {score:.2f}"
        boxes.append((np.array(box), text, WRONG))
        parts.append(f"detected as {text}")
    card = {"kind": suspect.kind, "suspicion": suspect.suspicion, "id": int(index.image_ids[i])}
    card |= {"file": index.file_name(i), "annotation": None, "problem": None}
    card["text"] = ", ".join(parts)
    if t >= 0 and index.annotation_ids[t] >= 0:
        card["annotation"] = int(index.annotation_ids[t])
    try:
        image = index.read_image(i)
    except DataError as error:
        return {**card, "problem": str(error)}
    image, corner = crop_around(image, np.array([box for box, *_ in boxes]))
    factor = min(1, LONGEST_SIDE_OF_SUSPECTS / max(image.shape[-2:]))
    image = resize(image, [max(1, round(side * factor)) for side in image.shape[-2:]])
    moved = [(box - [*corner, 0, 0], *others) for box, *others in boxes]
    return {**card, "image": to_jpeg(image, factor, moved)}


def crop_around(image: torch.Tensor, boxes: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
    """Crop an image to the region around boxes `[N, 4]`; return it and its corner x, y."""
    low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    margin = max(MARGIN * (high - low).max(), 16)
    limits = image.shape[:0:-1]  # width, height
    x1, y1 = (low - margin).clip(0, np.subtract(limits, 1)).astype(int).tolist()
    x2, y2 = np.ceil(high + margin).clip((x1 + 1, y1 + 1), limits).astype(int).tolist()
    return image[:, y1:y2, x1:x2], (x1, y1)


def to_jpeg(image: torch.Tensor, factor: float, boxes: list[tuple]) -> dict:
    """Draw boxes, in pixels before a resize by `factor`, errors on top; return a data URI."""
    boxes = sorted(boxes, key=lambda item: item[2] == WRONG)
    xyxy = drawing.xywh_to_xyxy(np.array([box for box, *_ in boxes]) * factor)
    texts = [shorten(text, 40) for _, text, _ in boxes]
    drawn = drawing.draw_boxes(image, xyxy, texts, [color for *_, color in boxes])
    file = io.BytesIO()
    Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=78)
    height, width = drawn.shape[-2:]
    data = base64.b64encode(file.getvalue()).decode()
    return {"uri": f"data:image/jpeg;base64,{data}", "width": width, "height": height}


def list_some(texts: list[str], limit: int) -> str:
    """Join up to `limit` texts, and append the number of the others."""
    more = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
