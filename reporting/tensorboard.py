"""`metrics.jsonl` and some pictures as TensorBoard shows them, in `tensorboard/` of the output."""

from pathlib import Path

import numpy as np
import torch

from coco_utils import CocoIndex, read_image
from internals.errors import UserError
from reporting import drawing

PICTURES = 4
LEAST_SCORE = 0.5


class Board:
    """Writes scalars and pictures; `write` takes what `utils.MetricsFile` tells its listener."""

    def __init__(self, folder: Path, step: int):
        """Go on after `step`: what an earlier, interrupted run wrote of later ones is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        self.writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=10)
        self.step = step

    def write(self, kind: str, values: dict) -> None:
        """Every number of a "train" or "eval" line, the parts of a dict under its name."""
        if kind not in ("train", "eval"):
            return
        self.step = values["step"] or 0
        for name, value in values.items():
            parts = value.items() if isinstance(value, dict) else [(None, value)]
            for part, number in parts:
                if isinstance(number, int | float) and name not in ("step", "epoch"):
                    tag = "/".join(filter(None, (kind, name, part)))
                    self.writer.add_scalar(tag, number, self.step)
        self.writer.flush()

    def show(self, index: CocoIndex, detections: np.ndarray, step: int) -> None:
        """The first few validation pictures that have boxes: truth on the left, found on the right.

        `detections` are rows of `coco_eval.detection_rows`, of which those from 0.5 on are drawn.
        """
        names = dict(zip(index.categories.ids, index.categories.names, strict=True))
        colours = {c: drawing.colour(k) for k, c in enumerate(index.categories.ids)}
        for i in index.images_with_boxes()[:PICTURES]:
            width, height = index.sizes[i].tolist()
            image = read_image(index.image_dir / index.file_name(i), width, height)
            rows = index.box_range(i)
            found = detections[
                (detections[:, 0] == index.image_ids[i]) & (detections[:, 5] >= LEAST_SCORE)
            ]
            halves = []
            for boxes, ids, scores in (
                (index.boxes[rows], index.category_ids[rows], None),
                (found[:, 1:5], found[:, 6].astype(np.int64), found[:, 5]),
            ):
                texts = [names[c] for c in ids.tolist()]
                if scores is not None:
                    texts = [f"{t} {s:.2f}" for t, s in zip(texts, scores, strict=True)]
                xyxy = torch.from_numpy(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]))
                shades = [colours[c] for c in ids.tolist()]
                halves.append(drawing.draw_boxes(image, xyxy.float(), texts, shades))
            picture = drawing.side_by_side(halves, ["truth", "found"])
            self.writer.add_image(f"validation/{index.image_ids[i]}", picture, step)
        self.writer.flush()
