"""Which images form which batch, in which order, and which process gets which batch."""

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
    """The positions of the images of a `coco_utils.CocoIndex` to train on, int64 `[N]`.

    Args:
        index: the training split.
        keep_empty: whether images without a usable box train, too.
        batch_size: images in a step of one process.
        world_size: the number of processes.

    Raises:
        DataError: no box can be trained on.
        UserError: the images do not fill one step of all processes.
    """
    images = np.arange(len(index)) if keep_empty else index.images_with_boxes()
    if not len(images):
        raise DataError(
            f"{index.annotation_file} has no box that can be trained on (crowds and boxes without "
            "a size cannot): export it again, with its annotations"
        )
    if len(images) < batch_size * world_size:
        raise UserError(
            f"the training set has {len(images)} usable images, fewer than one global batch of "
            f"{batch_size * world_size} ({batch_size} images on each of {world_size} processes): "
            "lower --batch-size or the number of processes"
        )
    return images


class TrainingPlan:
    """The batches of an epoch as a function of (seed, epoch): a `batch_sampler` for a DataLoader.

    A global batch is `world_size * batch_size` images of one aspect-ratio group, of which rank r
    takes the r-th share. What remains of each group goes into mixed batches at the end of the
    epoch. The images that do not fill a last global batch are left out: other ones each epoch, in
    rotation, so that over the epochs every image is seen equally often. Nothing depends on the
    number of loader workers, and only the division into shares depends on the number of processes.

    Iterating yields lists of `(image, seed)`: the position of an image, and the seed of its
    augmentation, which is f(seed, epoch, image). `start(epoch, step)` sets where the next
    iteration begins.
    """

    def __init__(
        self, groups: np.ndarray, batch_size: int, world_size: int = 1, rank: int = 0, seed: int = 0
    ):
        self.groups, self.batch_size, self.rank, self.seed = groups, batch_size, rank, seed
        self.global_batch = batch_size * world_size
        self.epoch = self.first_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Set the epoch and the step, both from 0, at which the next iteration begins."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        """The number of steps of a whole epoch."""
        return len(self.groups) // self.global_batch

    def batches(self, epoch: int) -> np.ndarray:
        """Plan a whole epoch: positions of images, int64 `[steps, global_batch]`."""
        rng = np.random.default_rng((self.seed, epoch))
        images = rng.permutation(np.delete(np.arange(len(self.groups)), self._left_out(epoch)))
        groups, full, rest = self.groups[images], [], []
        for group in np.unique(self.groups):
            members = images[groups == group]
            cut = len(members) - len(members) % self.global_batch
            full.append(members[:cut])
            rest.append(members[cut:])
        full = np.concatenate(full).reshape(-1, self.global_batch)
        mixed = rng.permutation(np.concatenate(rest)).reshape(-1, self.global_batch)
        return np.concatenate([rng.permutation(full), mixed])

    def _left_out(self, epoch: int) -> np.ndarray:
        """The images that an epoch leaves out: the next few of one fixed permutation."""
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
    """Divide the images to evaluate into batches, without padding any share: no image comes twice.

    A batch holds images of one size only. The model pads those of different sizes, which would
    change what it sees near their borders; so the batch size changes the speed alone.

    Args:
        sizes: `[I, 2]`, width and height of each image.
        batch_size: The most images of a batch.
        world_size: The number of processes.
        rank: The process whose share is returned.

    Returns:
        Lists of positions of images, one for each batch.
    """
    _, group = np.unique(sizes, axis=0, return_inverse=True)
    batches = []
    for members in np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]):
        batches += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    # Full ones first, so that the shares of the processes differ by one batch at most.
    batches.sort(key=len, reverse=True)
    return [batch.tolist() for batch in batches[rank::world_size]]
