"""Write a run to Weights & Biases, or with WANDB_MODE=offline to `wandb/` of the output folder."""

import os
from pathlib import Path

import numpy as np
import wandb

import utils
from internals.errors import UserError
from reporting.trackers import PROJECT

FINISH_TIMEOUT = 20  # seconds to upload at the end: torchrun and Slurm kill 30 s after a SIGTERM


class WandbWriter:
    """A `trackers.Writer` for W&B, whose own process sends the data: no call waits for a server."""

    def __init__(self, output_dir: Path, step: int | None, run_id: str | None):
        """Continue the run of this id, or start one with the name of the output folder."""
        output_dir = output_dir.absolute()
        settings = wandb.Settings(
            silent=True,  # else its summaries would fill the screen
            console="off",  # it would replace sys.stdout
            finish_timeout=FINISH_TIMEOUT,
            reinit="create_new",
        )
        wandb.setup(settings=settings)  # silent from here on: init never asks for a login
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or output_dir.name,
                dir=output_dir,
                id=run_id,
                resume="allow" if run_id else None,
                settings=settings,
            )
        except wandb.errors.Error as error:  # no key, a wrong one, no network
            raise UserError(
                f"--tracker wandb cannot be opened: {error} (run wandb login once or set "
                "WANDB_API_KEY; or set WANDB_MODE=offline, and run wandb sync later)"
            ) from error
        self.run_id = self.run.id
        where = Path(self.run.dir).parent if self.run.offline else self.run.url
        utils.log_field("W&B", f"run {self.run_id} in {where}")
        # W&B drops a step below one that it has, as those of a training resumed from an earlier
        # step: its own count goes on, and the step is a column of its own.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def write_config(self, config: dict) -> None:
        """Write the config; a resumed run changes it."""
        self.run.config.update(config, allow_val_change=True)

    def write_metrics(self, numbers: dict[str, float], step: int) -> None:
        """Write numbers; of several values for a step, the last one counts."""
        self.run.log({"step": step, **numbers})

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Write images."""
        shown = {tag: wandb.Image(image) for tag, image in images.items()}
        self.run.log({"step": step, **shown})

    def close(self, status: str) -> None:
        """End the run; W&B shows one that was stopped as preempted."""
        if status == "stopped":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if status == "finished" else 1)
        wandb.teardown()  # ends its process, which has then written all
