"""Form the batches of training and evaluation, and distribute them over processes."""

from collections.abc import Iterator

import numpy as np

from internals.errors import DataError, UserError


def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray, factor: int) -> np.ndarray:
    """Group images by aspect ratio, so that a batch of one group needs little padding.

    Args:
        widths: `[I]`, in pixels.
        heights: `[I]`, in pixels.
        factor: The bounds are 2 ** linspace(-1, 1, 2 * factor + 1) in width / height, as in
            torchvision's references; 0 separates only portrait from landscape, and a negative
            factor makes a single group.

    Returns:
        The group of each image, int64 `[I]`.
    """
    if factor < 0:
        return np.zeros(len(widths), dtype=np.int64)
    bounds = 2.0 ** np.linspace(-1, 1, 2 * factor + 1) if factor else np.ones(1)
    return np.searchsorted(bounds, widths / heights, side="right")


def select_train_images(index, keep_empty: bool, batch_size: int, world_size: int) -> np.ndarray:
    """Select the images to train on.

    Args:
        index: A `coco_utils.CocoIndex`, of the train split.
        keep_empty: Whether to include images without a usable box.
        batch_size: Images per step and process.
        world_size: The number of processes.

    Returns:
        Positions in the index, int64 `[N]`.

    Raises:
        DataError: The split has no usable box.
        UserError: The images do not fill one global batch.
    """
    images = index.images_with_boxes()
    if not len(images):
        raise DataError(
            f"{index.annotation_file} has no usable box (crowds and boxes without a size are not): "
            "annotate some images"
        )
    if keep_empty:
        images = np.arange(len(index))
    if len(images) < batch_size * world_size:
        raise UserError(
            f"{index.annotation_file} has {len(images)} usable images, fewer than one global batch "
            f"of {batch_size * world_size} ({batch_size} images on each of {world_size} processes):"
            " lower --batch-size or the number of processes"
        )
    return images


class TrainingPlan:
    """The batches of an epoch as a function of (seed, epoch): a `batch_sampler` for a DataLoader.

    A global batch is `world_size * batch_size` images of one aspect-ratio group; rank r takes the
    r-th share. The remainders of the groups form mixed batches at the end of the epoch. Images that
    do not fill a last global batch are skipped, different ones each epoch in rotation, so that all
    images are used equally often. Nothing depends on the number of workers, and only the shares
    depend on the number of processes.

    Iterating yields lists of `(image, seed)`: the position of an image and the seed of its
    augmentation, f(seed, epoch, image). `start(epoch, step)` sets the start of the next iteration.
    """

    def __init__(
        self, groups: np.ndarray, batch_size: int, world_size: int = 1, rank: int = 0, seed: int = 0
    ):
        self.groups = groups
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.global_batch = batch_size * world_size
        self.epoch = self.first_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Set the epoch and the step, both from 0, at which the next iteration starts."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return len(self.groups) // self.global_batch

    def batches(self, epoch: int) -> np.ndarray:
        """Plan a whole epoch: positions of images, int64 `[steps, global_batch]`."""
        rng = np.random.default_rng((self.seed, epoch))
        images = rng.permutation(np.delete(np.arange(len(self.groups)), self._skipped(epoch)))
        groups, full, rest = self.groups[images], [], []
        for group in np.unique(self.groups):
            members = images[groups == group]
            cut = len(members) - len(members) % self.global_batch
            full.append(members[:cut])
            rest.append(members[cut:])
        full = np.concatenate(full).reshape(-1, self.global_batch)
        mixed = rng.permutation(np.concatenate(rest)).reshape(-1, self.global_batch)
        return np.concatenate([rng.permutation(full), mixed])

    def _skipped(self, epoch: int) -> np.ndarray:
        """Return the images that an epoch skips: the next few of one fixed permutation."""
        count = len(self.groups) % self.global_batch
        permutation = np.random.default_rng(self.seed).permutation(len(self.groups))
        return permutation[(epoch * count + np.arange(count)) % len(self.groups)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = self.epoch, self.rank * self.batch_size
        share = slice(first, first + self.batch_size)
        for batch in self.batches(epoch)[self.first_step :, share]:
            yield [(image, image_seed(self.seed, epoch, image)) for image in batch.tolist()]


def image_seed(seed: int, epoch: int, image: int) -> int:
    """Hash the seed of a run, an epoch and an image to the 64-bit seed of its augmentation."""
    return int(np.random.SeedSequence((seed, epoch, image)).generate_state(1, np.uint64)[0])


def evaluation_batches(
    sizes: np.ndarray, batch_size: int, world_size: int = 1, rank: int = 0
) -> list[list[int]]:
    """Divide the images to evaluate into batches; no image is repeated to even out the shares.

    The images of a batch have the same size: padding would change the detections near borders. So
    the batch size affects only speed and memory.

    Args:
        sizes: `[I, 2]`, width and height of each image.
        batch_size: The maximum number of images per batch.
        world_size: The number of processes.
        rank: The process whose share is returned.

    Returns:
        The positions of the images of each batch.
    """
    _, group = np.unique(sizes, axis=0, return_inverse=True)
    batches = []
    for members in np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]):
        batches += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    # Full ones first, so that the shares of the processes differ by one batch at most.
    batches.sort(key=len, reverse=True)
    return [batch.tolist() for batch in batches[rank::world_size]]
