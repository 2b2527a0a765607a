"""Write a run to `tensorboard/` of the output folder, for TensorBoard."""

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """A `trackers.Writer` for TensorBoard."""

    run_id = None  # the folder is the run

    def __init__(self, output_dir: Path, step: int | None, run_id: str | None):
        """Continue after `step`, and hide later steps of an interrupted run."""
        folder = output_dir / "tensorboard"
        self.writer = SummaryWriter(folder, purge_step=(step or 0) + 1, flush_secs=10)

    def write_config(self, config: dict) -> None:
        """Write nothing: metrics.jsonl has it."""

    def write_metrics(self, numbers: dict[str, float], step: int) -> None:
        """Write scalars."""
        for tag, number in numbers.items():
            self.writer.add_scalar(tag, number, step)
        self.writer.flush()

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Write images."""
        for tag, image in images.items():
            self.writer.add_image(tag, image, step, dataformats="HWC")
        self.writer.flush()

    def close(self, status: str) -> None:
        """Write what is left."""
        self.writer.close()
