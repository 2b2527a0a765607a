"""Write metrics and some images for TensorBoard, in `tensorboard/` of the output folder."""

from pathlib import Path

import numpy as np

import coco_eval
from coco_utils import CocoIndex
from internals.errors import UserError
from reporting import drawing

NUM_IMAGES = 4
SCORE_THRESHOLD = 0.5


class TensorBoardWriter:
    """Writes scalars and images; `write_metrics` is a listener of `utils.MetricsFile`."""

    def __init__(self, folder: Path, step: int):
        """Continue after `step`, and hide later steps of an interrupted run."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        self.writer = SummaryWriter(folder, purge_step=step + 1, flush_secs=10)

    def write_metrics(self, kind: str, values: dict) -> None:
        """Write all numbers of a "train" or "eval" line; those of a dict under its name."""
        if kind not in ("train", "eval"):
            return
        for name, value in values.items():
            numbers = value if isinstance(value, dict) else {"": value}
            if name == "per_category":
                numbers = coco_eval.ap_by_category(values)
            for key, number in numbers.items():
                if number is not None and name not in ("step", "epoch"):
                    tag = f"{kind}/{name}/{key}".rstrip("/")
                    self.writer.add_scalar(tag, number, values["step"] or 0)
        self.writer.flush()

    def write_images(self, index: CocoIndex, detections: np.ndarray, step: int) -> None:
        """Draw the first validation images that have boxes, ground truth beside detections.

        Args:
            index: The ground truth.
            detections: float64 `[N, 7]`, rows of `coco_eval.detection_rows`; those with a score of
                at least 0.5 are drawn.
            step: The training step of the detections.
        """
        for i in index.images_with_boxes()[:NUM_IMAGES]:
            of_image = detections[:, 0] == index.image_ids[i]
            confident = detections[of_image & (detections[:, 5] >= SCORE_THRESHOLD)]
            confident = confident[np.argsort(-confident[:, 5], kind="stable")]
            image = index.read_image(i)
            drawn = drawing.draw_comparison(image, index, i, confident, index.categories)
            self.writer.add_image(f"validation/{index.image_ids[i]}", drawn, step)
        self.writer.flush()
