"""Save, verify, find, load and resume checkpoints; a crash never leaves an incomplete one.

`checkpoint_00001200.pth` holds the state after 1,200 steps. `checkpoint.pth` is a hard link to the
newest checkpoint, `model_best.pth` to the best one, which is never pruned. A file of torch.save is
a zip archive with a CRC-32 of each tensor; `torch.load` ignores these, `load` verifies them.
"""

import os
import re
import shutil
from pathlib import Path

import torch

import utils
from coco_utils import CocoIndex
from internals.custom_augmentation import code_version
from internals.errors import CheckpointError, RunError, UserError
from internals.train_state import TrainState
from internals.weights import load_weights_file, search_state_dict
from samplers import TrainingPlan

FORMAT = 1
NEWEST, BEST = "checkpoint.pth", "model_best.pth"

# What must not change for a resumed run to give the weights of an uninterrupted one: arguments, and
# what `add_resume_facts` adds. What defines the model is in settings.MODEL_ARGS.
RESUME_INVARIANTS = (
    "seed",
    "global_batch",
    "keep_empty",
    "aspect_ratio_group_factor",
    "precision",
    "opt",
    "lr",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "bias_weight_decay",
    "clip_grad_norm",
    "sync_bn",
    "epochs",
    "lr_scheduler",
    "lr_steps",
    "lr_gamma",
    "warmup_steps",
    "ema",
    "freeze_backbone",
    "train_norm_affine",
