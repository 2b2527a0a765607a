"""Synthetic data sets of COCO's size: annotation files with polygons, and JPEG images."""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from coco_utils import COCO_CATEGORY_IDS, Split

TRAIN = (118_287, 860_001)  # images and annotations of COCO train2017
VAL = (5_000, 36_781)
SIZE = (640, 480)  # width, height


def make_annotation(rng: np.random.Generator) -> str:
    """Make an annotation without ids, in JSON; the average in train2017 has 713 bytes."""
    sides = np.exp(rng.uniform(np.log(12), np.log(400), 2)).clip(max=np.array(SIZE) - 2)
    x, y = rng.uniform(0, np.array(SIZE) - sides)
    width, height = sides
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(15, 66))))
    radius = 0.5 * rng.uniform(0.6, 1, len(angles))
    points = np.stack(
        [x + width * (0.5 + radius * np.cos(angles)), y + height * (0.5 + radius * np.sin(angles))]
    )
    polygon = json.dumps(points.T.ravel().round(2).tolist())
    box = json.dumps([round(float(v), 2) for v in (x, y, width, height)])
    crowd = int(rng.random() < 0.012)
    shape = f"[{polygon}]"
    if crowd:
        width, height = SIZE
        shape = json.dumps({"counts": [1000, 500, width * height - 1500], "size": [height, width]})
    area = round(float(0.6 * sides[0] * sides[1]), 4)
    return f'"segmentation": {shape}, "area": {area}, "iscrowd": {crowd}, "bbox": {box}'


def make_annotations(file: Path, images: int, annotations: int, seed: int = 0) -> list[str]:
    """Write an annotation file with about as many bytes as COCO's; return the image file names."""
    rng = np.random.default_rng(seed)
    bodies = [make_annotation(rng) for _ in range(4000)]
    image_ids = np.sort(rng.choice(5 * images, images, replace=False)) + 1
    columns = (
        rng.integers(0, len(bodies), annotations),
        rng.choice(image_ids, annotations),
        rng.choice(COCO_CATEGORY_IDS, annotations),
    )
    width, height = SIZE
    names = [f"{i:012}.jpg" for i in image_ids.tolist()]
    with file.open("w") as out:
        out.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        out.write(
            ", ".join(
                f'{{"license": 3, "file_name": "{name}", "coco_url": "http://images.cocodataset.org/'
                f'train2017/{name}", "height": {height}, "width": {width}, '
                f'"date_captured": "2013-11-14 11:18:45", "id": {int(name[:12])}}}'
                for name in names
            )
        )
        out.write('], "annotations": [')
        for n, (body, image, category) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            ids = f'"image_id": {image}, "category_id": {category}, "id": {900_100 + n}'
            out.write(f"{', ' if n else ''}{{{bodies[body]}, {ids}}}")
        categories = [{"supercategory": "x", "id": i, "name": f"c{i}"} for i in COCO_CATEGORY_IDS]
        out.write(f'], "categories": {json.dumps(categories)}}}')
    return names


def make_jpeg(rng: np.random.Generator, noise: float) -> bytes:
    """Encode a 640 x 480 JPEG; the deviation of the noise sets its size (COCO: 160,000 bytes)."""
    coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC))
    pixels = pixels + rng.normal(0, noise, pixels.shape)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_images(folder: Path, names: list[str], noise: float, distinct: int = 256) -> None:
    """Write a JPEG for each name: `distinct` files, and hard links to them for the other names."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for n, name in enumerate(names):
        if n < distinct:
            (folder / name).write_bytes(make_jpeg(rng, noise))
        else:
            os.link(folder / names[n % distinct], folder / name)


def make_coco(root: Path, images: int, annotations: int, noise: float = 12.0) -> Split:
    """Make a split in `root`, unless it exists."""
    split = Split(root / "instances.json", root / "images")
    if not split.images.exists():
        root.mkdir(parents=True)
        names = make_annotations(split.annotations, images, annotations)
        make_images(split.images, names, noise)
    return split


def make_small_coco(root: Path, images: int) -> Path:
    """Make a data set in COCO 2017's layout: noise images of 64 x 48 with one or two boxes."""
    rng = np.random.default_rng(2)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", images), ("val", 2)):
        folder = root / f"{split}2017"
        folder.mkdir()
        rows, boxes = [], []
        for i in range(1, count + 1):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            rows.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
            for _ in range(1 + i % 2):
                box = [*rng.integers(0, 20, 2).tolist(), *rng.integers(8, 28, 2).tolist()]
                boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": 1, "bbox": box})
        content = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root
