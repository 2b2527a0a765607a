"""Send a run's metrics and some images to experiment trackers: TensorBoard, MLflow, W&B.

Each tracker is a small class with the methods of `Writer`, in a file of its own, which imports its
package; what they all get is decided here.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

import coco_eval
import utils
from coco_utils import CocoIndex
from internals.errors import StopRequested, UserError

PROJECT = "faster-rcnn"  # the default name of MLflow's experiment and of W&B's project
RUN_IDS = "trackers.json"  # in the output folder: where a resumed run continues
NUM_IMAGES = 4
SCORE_THRESHOLD = 0.5


class Writer(Protocol):
    """Writes to one tracker; opened with the output folder, the step and the id to continue from.

    Attributes:
        run_id: The tracker's id of the run; None if it needs none.
    """

    run_id: str | None

    def write_config(self, config: dict) -> None:
        """Write the run's flags and facts, once at each start."""

    def write_metrics(self, numbers: dict[str, float], step: int) -> None:
        """Write numbers by tag, such as "train/loss"."""

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Write images, uint8 `[H, W, 3]`, by tag, such as "validation/42"."""

    def close(self, status: str) -> None:
        """End the run as "finished", "stopped" (to be resumed) or "failed"."""


def open_writer(name: str, output_dir: Path, step: int | None, run_id: str | None) -> Writer:
    """Open one tracker.

    Args:
        name: "tensorboard", "mlflow" or "wandb".
        output_dir: Where to write, unless the tracker's environment variables name a server.
        step: The step that a resumed run starts from; None for a new run.
        run_id: The tracker's id of the run to continue; None for a new one.

    Raises:
        UserError: The package is missing, or the tracker cannot be reached.
    """
    try:
        if name == "tensorboard":
            from reporting.tensorboard import TensorBoardWriter as Opened
        elif name == "mlflow":
            from reporting.mlflow import MlflowWriter as Opened
        else:
            from reporting.wandb import WandbWriter as Opened
        return Opened(output_dir, step, run_id)
    except UserError:
        raise
    except ImportError as error:
        message = f"--tracker {name} needs a package: pip install {name} ({error})"
        raise UserError(message) from error
    except Exception as error:
        message = f"--tracker {name} cannot be opened: {error or type(error).__name__}"
        raise UserError(message) from error


class Trackers:
    """The open trackers of this process, none at first; as a context, closes them at its end.

    What fails after the start is logged, and never raised: a tracker must not end a training. Its
    numbers are kept, and written with those of the next evaluation.
    """

    def __init__(self):
        self.writers: dict[str, Writer] = {}
        self._pending: dict[str, list[Callable]] = {}

    def open(self, names: list[str], output_dir: Path, step: int | None) -> None:
        """Open trackers; one of a run that is resumed continues in the tracker's run.

        Args:
            names: Of the trackers.
            output_dir: The output folder, which keeps the ids of the trackers' runs.
            step: The step that a resumed run starts from; None for a new run.

        Raises:
            UserError: A package is missing, or a tracker cannot be reached.
        """
        file = output_dir / RUN_IDS
        run_ids = _read_run_ids(file) if step is not None else {}
        try:
            for name in names:
                writer = open_writer(name, output_dir, step, run_ids.get(name))
                self.writers[name], self._pending[name] = writer, []
                if writer.run_id:
                    run_ids[name] = writer.run_id
                    file.write_text(json.dumps(run_ids, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            self._close("failed")
            raise

    def write_metrics(self, kind: str, values: dict) -> None:
        """Write a line of `metrics.jsonl`, as a listener of `utils.MetricsFile`."""
        step = values.get("step") or 0
        for name, writer in self.writers.items():
            pending = self._pending[name]
            if kind == "start":
                pending.append(partial(writer.write_config, run_config(values)))
            elif kind in ("train", "eval"):
                numbers = dict(tagged_numbers(kind, values))
                pending.append(partial(writer.write_metrics, numbers, step))
            if kind == "eval" or len(pending) == 1:  # more: the last attempt has failed
                self._try(name, self._write_pending, name)

    def _write_pending(self, name: str) -> None:
        pending = self._pending[name]
        while pending:
            pending[0]()
            del pending[0]

    def write_images(self, index: CocoIndex, detections: np.ndarray, step: int) -> None:
        """Draw the first validation images that have boxes, ground truth beside detections.

        Args:
            index: The ground truth.
            detections: float64 `[N, 7]`, rows of `coco_eval.detection_rows`; those with a score of
                at least 0.5 are drawn.
            step: The training step of the detections.
        """
        for name, writer in self.writers.items():
            if not self._pending[name]:  # it works
                self._try(name, lambda w=writer: w.write_images(draw(index, detections), step))

    def _try(self, name: str, function: Callable, *args) -> None:
        try:
            function(*args)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            utils.log(f"--tracker {name} failed, the training goes on: {reason}")

    def _close(self, status: str) -> None:
        for name in self.writers:
            self._try(name, self._close_writer, name, status)
            if missing := len(self._pending[name]):
                utils.log(f"--tracker {name} lacks {missing} lines that metrics.jsonl has")
        self.writers = {}

    def _close_writer(self, name: str, status: str) -> None:
        try:
            self._write_pending(name)
        finally:
            self.writers[name].close(status)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        stopped = kind is not None and issubclass(kind, StopRequested)
        self._close("finished" if kind is None else "stopped" if stopped else "failed")


def _read_run_ids(file: Path) -> dict[str, str]:
    try:
        run_ids = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(run_ids, dict) or not all(
            isinstance(run_id, str) and run_id for run_id in run_ids.values()
        ):
            raise ValueError("it is no dict of ids")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}): delete it, and the trackers start new runs"
        ) from None
    return run_ids


# ------------------------------------------------------------------------------ what they get


def run_config(start: dict) -> dict:
    """Return the flags of a "start" line, and what else in it is one value, such as run/commit."""
    facts = {k: v for k, v in start.items() if isinstance(v, str | int | float)}
    return {**start["args"], **{f"run/{name}": value for name, value in facts.items()}}


def tagged_numbers(kind: str, values: dict) -> Iterator[tuple[str, float]]:
    """Yield all numbers of a "train" or "eval" line by tag; those of a dict under its name."""
    for name, value in values.items():
        numbers = value if isinstance(value, dict) else {"": value}
        if name == "per_category":
            numbers = coco_eval.ap_by_category(values)
        for key, number in numbers.items():
            if isinstance(number, int | float) and name not in ("step", "epoch"):
                yield f"{kind}/{name}/{key}" if key else f"{kind}/{name}", number


def draw(index: CocoIndex, detections: np.ndarray) -> dict[str, np.ndarray]:
    """Return drawings of `drawing.draw_comparison` by tag; see `Trackers.write_images`."""
    from reporting import drawing  # imports matplotlib, which most trainings need at their end only

    images = {}
    for i in index.images_with_boxes()[:NUM_IMAGES]:
        of_image = detections[:, 0] == index.image_ids[i]
        confident = detections[of_image & (detections[:, 5] >= SCORE_THRESHOLD)]
        confident = confident[np.argsort(-confident[:, 5], kind="stable")]
        image = index.read_image(i)
        drawn = drawing.draw_comparison(image, index, i, confident, index.categories)
        images[f"validation/{index.image_ids[i]}"] = drawn.permute(1, 2, 0).numpy()
    return images
