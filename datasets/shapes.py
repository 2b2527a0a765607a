#!/usr/bin/env python3
"""Make the small built-in data set: seeded images of shapes, in the layout of COCO 2017.

    python datasets/shapes.py FOLDER

Colored circles, squares and triangles of 24 to 64 pixels, some of them overlapping, on a mottled
background. Like real data, it has gaps in the category ids, images without objects, and crowds.
The images depend only on the seed in this file.
"""

import argparse
import json
from pathlib import Path

import coco_layout as layout
import numpy as np
from PIL import Image, ImageDraw

from internals.failures import run_command

CATEGORIES = {1: "circle", 3: "square", 6: "triangle"}
SIDE = 128  # pixels
IMAGES = {"train": 400, "val": 50}
SEED = 2017


def shape_corners(category_id: int, x: float, y: float, w: float, h: float) -> np.ndarray:
    """Return the corners `[N, 2]` of a shape that fills the box x, y, w, h."""
    if category_id == 1:
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        unit = 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif category_id == 3:
        unit = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    else:
        unit = np.array([(0.5, 0), (1, 1), (0, 1)])
    return unit * (w, h) + (x, y)


def overlap(a: list[float], b: list[float]) -> float:
    """Return the intersection over the smaller area of two boxes x, y, w, h."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def make_background(rng: np.random.Generator) -> Image.Image:
    """Make a mottled background of medium brightness."""
    coarse = rng.uniform(60, 150, 3) + rng.normal(0, 22, (8, 8, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE))
    noisy = np.asarray(image) + rng.normal(0, 6, (SIDE, SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_shape(image: Image.Image, category_id: int, box: list[float], rng) -> None:
    """Draw a shape in a random color, with one channel unlike those of the background."""
    color = rng.integers(0, 256, 3)
    color[rng.integers(3)] = rng.choice([10, 245])
    corners = [tuple(corner) for corner in shape_corners(category_id, *box)]
    ImageDraw.Draw(image).polygon(corners, fill=tuple(map(int, color)))


def draw_crowd(image: Image.Image, category_id: int, rng) -> list[float]:
    """Draw 25 small shapes in the upper left corner; return their common box."""
    for _ in range(25):
        x, y = rng.uniform(0, 32, 2)
        draw_shape(image, category_id, [x, y, 8, 8], rng)
    return [0, 0, 40, 40]


def make_image(rng: np.random.Generator, empty: bool, crowd: bool) -> tuple[Image.Image, list]:
    """Make an image and its annotations as (category_id, box, iscrowd)."""
    image, objects = make_background(rng), []
    if crowd:
        category_id = int(rng.choice(list(CATEGORIES)))
        objects.append((category_id, draw_crowd(image, category_id, rng), 1))
    for _ in range(0 if empty else rng.integers(2, 10)):
        w = rng.uniform(24, 64)
        h = np.clip(w * rng.uniform(0.7, 1.4), 24, 64)
        x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
        box = [round(float(value), 1) for value in (x, y, w, h)]
        if max((overlap(box, other) for _, other, _ in objects), default=0) < 0.35:
            category_id = int(rng.choice(list(CATEGORIES)))
            draw_shape(image, category_id, box, rng)
            objects.append((category_id, box, 0))
    return image, objects


def make_split(root: Path, split: str) -> None:
    """Write `annotations/instances_{split}2017.json` and the images in `{split}2017/`."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(IMAGES[split]):
        rng = np.random.default_rng((SEED, split == "val", n))
        image, objects = make_image(rng, empty=n % 40 == 7, crowd=n % 40 == 3)
        image_id, file_name = 10 + 3 * n, f"{n:04}.png"
        image.save(folder / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": SIDE, "height": SIDE})
        for category_id, box, iscrowd in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": iscrowd,
                }
            )
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = root / "annotations" / f"instances_{split}2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder")
    folder = parser.parse_args().folder
    layout.check_output(folder)
    for split in IMAGES:
        make_split(folder, split)
    print(f"{folder}: {sum(IMAGES.values())} images of shapes")


if __name__ == "__main__":
    run_command(main)
