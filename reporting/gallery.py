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
    best = np.lexsort((-correct, errors))
    best = best[correct[best] > 0][: min(MAX_IMAGES["best"], -(-len(index) // 3))]
    worst = np.argsort(-errors, kind="stable")
    worst = worst[(errors[worst] > 0) & ~np.isin(worst, best)][: MAX_IMAGES["worst"]]
    others = np.setdiff1d(np.arange(len(index)), np.concatenate([best, worst]))
    size = min(MAX_IMAGES["random"], len(others))
    random = np.random.default_rng(0).choice(others, size, replace=False)
    return {"best": best.tolist(), "worst": worst.tolist(), "random": sorted(random.tolist())}


def image_card(results: DetectionResults, i: int) -> dict:
    """Image i of the index with its boxes, and its errors in words.

    Where the image cannot be read, `problem` says why, and `images` is empty.
    """
    index = results.index
    card = {"file": index.file_name(i), "id": int(index.image_ids[i]), "images": []}
    ground_truth, detections, card["summary"] = label_boxes(results, i)
    try:
        image = index.read_image(i)
    except DataError as error:
        return {**card, "problem": str(error)}
    factor = min(1, LONGEST_SIDE / max(image.shape[-2:]))
    image = resize(image, [max(1, round(side * factor)) for side in image.shape[-2:]])
    for label, boxes in (("ground truth", ground_truth), ("detections", detections)):
        card["images"].append({"label": label, **to_jpeg(image, factor, boxes)})
    return {**card, "problem": None}


def label_boxes(results: DetectionResults, i: int) -> tuple[list[tuple], list[tuple], list[str]]:
    """What to draw on image i, as (box, text, colour), of both kinds, and its errors in words."""
    index, names = results.index, results.index.categories.names
    ground_truth, detections = [], []
    correct, missed, false, wrong_category = 0, [], [], []
    rows = index.box_range(i)
    for row in range(rows.start, rows.stop):
        name, detection = names[results.gt_category[row]], results.matched_detection[row]
        text, colour = name, CORRECT
        if index.iscrowd[row]:
            text, colour = f"{name}, crowd", CROWD
        elif detection == IGNORED:  # a box without a size
            continue
        elif results.missed[row]:
            text, colour = f"{name}, missed", WRONG
            missed.append(name)
        elif not results.correct[detection]:
            colour = WRONG_CATEGORY
        ground_truth.append((index.boxes[row], text, colour))
    for row in np.flatnonzero(results.confident[:, 0] == index.image_ids[i]):
        name, match = names[results.detection_category[row]], results.matched_gt[row]
        text, colour = f"{name} {results.confident[row, 5]:.2f}", CORRECT
        if match == IGNORED:
            text, colour = f"{text}, in a crowd", CROWD
        elif results.correct[row]:
            correct += 1
        elif results.false_positive[row]:
            false.append(text)
            text, colour = f"{text}, false", WRONG
        else:
            true_name = names[results.gt_category[match]]
            wrong_category.append(f"{true_name} detected as {text}")
            text, colour = f"{text}, is {true_name}", WRONG_CATEGORY
        detections.append((results.confident[row, 1:5], text, colour))
    summary = [f"{correct} correct"]
    for errors, what in (
        (missed, "missed"),
        (false, "false positive"),
        (wrong_category, "of a wrong category"),
    ):
        if errors:
            summary.append(f"{len(errors)} {what} ({list_some(errors, 5)})")
    return ground_truth, detections, summary


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
