"""The data of a run: annotation files, checked; loaders of training and evaluation."""

import argparse
import math
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

import coco_utils
import models
import samplers
import transforms
import utils
from internals import anchor_coverage, data_checks, preemption
from internals.errors import DataError, UserError
from internals.layouts import find_split
from settings import resolve_defaults


def load_index(args: argparse.Namespace, split: str) -> coco_utils.CocoIndex:
    """Read the annotation file of a split, "train" or "val"."""
    paths = (getattr(args, f"{split}_annotations"), getattr(args, f"{split}_images"))
    index = coco_utils.CocoIndex(find_split(args.data_path, split, *paths))
    index.as_annotated = args.evaluate_as_annotated
    return index


def load_indexes(args: argparse.Namespace) -> dict[str, coco_utils.CocoIndex]:
    """Read and check the annotation files, by split; no image is opened.

    With --overfit both splits are the first few training images.

    Raises:
        UserError: The data cannot be used for training.
    """
    if args.overfit:
        index = load_index(args, "train").first_with_boxes(args.overfit)
        indexes = {"train": index, "val": index}
    else:
        splits = ("val",) if args.test_only else ("val", "train")
        indexes = {split: load_index(args, split) for split in splits}
    for split, index in indexes.items():
        ignore_missing = args.max_bad_images > 0
        data_checks.check_annotations(index, split, ignore_missing, args.trust_boxes)
    for text in data_checks.compare_splits(indexes):
        utils.log_field("", f"note: {text}")
    if not args.test_only:
        select_images(args, indexes["train"])  # for its errors, before the processes connect
    return indexes


def select_images(args: argparse.Namespace, index: coco_utils.CocoIndex) -> np.ndarray:
    """Return the positions of the images to train on; raise UserError if there are too few."""
    batch_size = args.batch_size * args.accumulate_steps
    keep_empty = args.keep_empty is not False  # None: the default is not set yet
    return samplers.select_train_images(index, keep_empty, batch_size, utils.world_size())


def resizes_to_fixed(args: argparse.Namespace) -> bool:
    """Return whether the model stretches every image to one size."""
    return bool(args.fixed_size) or not models.ARCHITECTURES[args.model].resizable


def build_augmentation(args: argparse.Namespace):
    """Return the transform of --data-augmentation."""
    max_size = None if resizes_to_fixed(args) else args.max_size
    return transforms.training_preset(args.data_augmentation, args.min_size, max_size)


def find_too_narrow(args: argparse.Namespace, indexes: dict) -> list[str]:
    """Describe the images of which an augmentation or the model would leave no pixel, by split."""
    sizes, found = (args.min_size, args.max_size, resizes_to_fixed(args)), []
    for split, index in indexes.items():
        preset = "none" if split == "val" else args.data_augmentation
        too_narrow = transforms.find_too_narrow(index.sizes, preset, *sizes)
        settings = f"--min-size {args.min_size}, --max-size {args.max_size}"
        settings += "" if preset == "none" else f" and --data-augmentation {preset}"
        found.append(data_checks.describe_too_narrow(index, too_narrow, settings))
    return list(filter(None, found))


def check_images(args: argparse.Namespace, indexes: dict) -> None:
    """Check the images against the settings of the model; none is opened.

    Raises:
        DataError: Of some images no pixel would be left.
    """
    if errors := find_too_narrow(args, indexes):
        raise DataError("\n".join(errors))
    for split, index in indexes.items():
        if issue := data_checks.find_crowded_images(index, args.max_detections):
            utils.log_field("", f"note: {split}: {issue}")


def choose_images(args: argparse.Namespace, indexes: dict) -> tuple[dict, list[int]]:
    """Set `args.bit_depth` and how images are read, and leave out bad ones (--max-bad-images).

    Returns:
        The indexes of the images that are left, and the ids of validation images left out.
    """
    use_truncated = args.truncated_images == "use"
    args.bit_depth = data_checks.set_image_rules(indexes, args.bit_depth, use_truncated)
    return data_checks.drop_bad_images(indexes, args.workers, args.max_bad_images)


def check_data(args: argparse.Namespace) -> None:
    """Open every image and report on the data (--check-data).

    Raises:
        UserError: The data cannot be used for training.
    """
    if utils.rank() != 0:
        return
    resolve_defaults(args, None, torch.device("cpu"))
    splits = ("val",) if args.test_only else ("train", "val")
    indexes = {split: load_index(args, split) for split in splits}
    data_checks.set_image_rules(indexes, args.bit_depth, args.truncated_images == "use")
    errors = data_checks.check_all(
        indexes, args.workers, args.max_bad_images, args.trust_boxes, args.max_detections
    )
    errors += find_too_narrow(args, indexes)
    if errors:
        raise DataError("\n".join(errors))
    if not args.test_only:
        build_augmentation(args)  # for its errors
        select_images(args, indexes["train"])
        for line in anchor_coverage.report(indexes["train"], args):
            utils.log(line)
    utils.log("data check passed")


def resolve_categories(
    args: argparse.Namespace, indexes: dict, saved: dict | None
) -> coco_utils.Categories:
    """Return the categories of the model: those of the checkpoint, or else of the data."""
    index, val = indexes["val" if args.test_only else "train"], indexes["val"]
    known = index.categories
    if saved:
        known = coco_utils.Categories.from_list(saved["categories"])
    if not args.test_only and known != index.categories:
        raise UserError(
            f"{index.annotation_file} has other categories than {args.resume}: to fine-tune its "
            "weights use --weights instead of --resume"
        )
    known.check_contains(val.categories, val.annotation_file)
    return known


def choose_repeat_factors(
    args: argparse.Namespace, index: coco_utils.CocoIndex, images: np.ndarray
) -> np.ndarray | None:
    """Return how often an epoch has each image, and log it; None: --repeat-factor-threshold is off.

    None, too, if no category is rare.
    """
    threshold = args.repeat_factor_threshold
    if threshold is None:
        return None
    of_image, of_category = samplers.repeat_factors(index, images, threshold)
    rare, rarest = np.count_nonzero(of_category > 1), of_category.argmax()
    if not rare:
        utils.log_field("repeats", f"none: no category is rarer than {threshold:g}")
        return None
    total = int(math.fsum(of_image))  # as in TrainingPlan
    text = f"{len(images):,} images become {total:,} an epoch; rarer than {threshold:g}: {rare:,} "
    utils.log_field("repeats", f"{text}of {len(of_category):,} categories,")
    name, factor = index.categories.display_names[rarest], of_category[rarest]
    utils.log_field("", f"with factors up to {factor:.2f} ({name})")
    return of_image


def build_loaders(
    args: argparse.Namespace,
    indexes: dict[str, coco_utils.CocoIndex],
    categories: coco_utils.Categories,
    device: torch.device,
) -> tuple[DataLoader | None, DataLoader]:
    """Build the loaders of this process for training (None for --test-only) and evaluation.

    The `batch_sampler` of the training loader is a `samplers.TrainingPlan`.
    """
    make_loader = partial(
        DataLoader,
        collate_fn=coco_utils.collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        worker_init_fn=preemption.ignore_signals_in_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    world_size, rank = utils.world_size(), utils.rank()
    val = indexes["val"]
    batches = samplers.evaluation_batches(val.sizes, args.eval_batch_size, world_size, rank)
    val_loader = make_loader(coco_utils.CocoDetection(val, categories), batch_sampler=batches)
    if args.test_only:
        return None, val_loader
    images = select_images(args, indexes["train"])
    dataset = coco_utils.CocoDetection(
        indexes["train"], categories, images, build_augmentation(args)
    )
    widths, heights = indexes["train"].sizes[images].T
    groups = samplers.aspect_ratio_groups(widths, heights, args.aspect_ratio_group_factor)
    batch_size = args.batch_size * args.accumulate_steps
    factors = choose_repeat_factors(args, indexes["train"], images)
    plan = samplers.TrainingPlan(groups, batch_size, world_size, rank, args.seed, factors)
    return make_loader(dataset, batch_sampler=plan), val_loader
