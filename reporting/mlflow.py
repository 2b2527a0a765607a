"""Write a run to MLflow: a SQLite file in the output folder, or where MLFLOW_TRACKING_URI says."""

import hashlib
import os
import re
import time
from pathlib import Path

import numpy as np

import utils
from reporting.trackers import PROJECT

# MLflow reads these when it is imported. A server that does not answer may delay a training by half
# a minute, not by the hour of MLflow's own limits.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# It logs each change to a SQLite file, and the traceback of an error before it raises it.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# MLflow's limits: the characters of a name and of a param, and what a request may have.
MAX_NAME, MAX_PARAM, MAX_PARAMS, MAX_METRICS = 250, 6000, 100, 1000


class MlflowWriter:
    """A `trackers.Writer` for MLflow.

    The client has no state of the process, such as an active run, and writes before it returns.
    """

    def __init__(self, output_dir: Path, step: int | None, run_id: str | None):
        """Continue the run of this id, or start one with the name of the output folder."""
        output_dir = output_dir.absolute()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None if uri else (output_dir / "mlflow_artifacts").as_uri()
        self.client = MlflowClient(uri or f"sqlite:///{(output_dir / 'mlflow.db').as_posix()}")
        if not run_id or not self._reopen(run_id):
            run_id = self._start(output_dir, artifacts)
        self.run_id = run_id
        # Not the URI itself, which may contain a password.
        where = "MLFLOW_TRACKING_URI" if uri else output_dir / "mlflow.db"
        utils.log_field("MLflow", f"run {self.run_id} in {where}")

    def _start(self, output_dir: Path, artifacts: str | None) -> str:
        """Start a run; return its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(name, artifact_location=artifacts)
        )
        run = self.client.create_run(
            experiment_id,
            run_name=output_dir.name,
            tags={"output_dir": str(output_dir), "mlflow.source.name": "train.py"},
        )
        return run.info.run_id

    def _reopen(self, run_id: str) -> bool:
        """Continue a run; return False if there is none, such as in another database."""
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            utils.log(f"MLflow has no run {run_id} any more, and starts a new one")
            return False
        return True

    def write_config(self, config: dict) -> None:
        """Write params; those of a run that is resumed stay, as MLflow never changes a param."""
        params = self.client.get_run(self.run_id).data.params
        new = [Param(k, str(v)[:MAX_PARAM]) for k, v in config.items() if k not in params]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS])
        if commit := config.get("run/commit"):
            self.client.set_tag(self.run_id, "mlflow.source.git.commit", commit)

    def write_metrics(self, numbers: dict[str, float], step: int) -> None:
        """Write metrics; of several values for a step, MLflow shows the newest as the latest."""
        now = int(1000 * time.time())
        rows = [Metric(safe_name(tag), number, now, step) for tag, number in numbers.items()]
        for start in range(0, len(rows), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=rows[start : start + MAX_METRICS])

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Write images, which MLflow shows with a slider over the steps."""
        for tag, image in images.items():
            self.client.log_image(self.run_id, image, key=tag, step=step)

    def close(self, status: str) -> None:
        """End the run with MLflow's name of the status."""
        self.client.set_terminated(self.run_id, STATUS[status])


def safe_name(tag: str) -> str:
    """Return a name that MLflow accepts: letters of any script, digits, `_`, `-`, `.`, ` `, `/`.

    A name that has to be changed gets a hash of the original: names that differ stay apart.
    """
    parts = re.sub(r"[^\w./ -]", "_", tag).split("/")
    safe = "/".join(part if part.strip(".") else "_" for part in parts)[: MAX_NAME - 7]
    if safe == tag:
        return tag
    return f"{safe}-{hashlib.sha256(tag.encode()).hexdigest()[:6]}"
