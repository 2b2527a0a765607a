"""Form the batches of training and evaluation, and distribute them over processes."""

import math
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
            f"{index.annotation_file} has {len(images)} usable images, fewer than the "
            f"{batch_size * world_size} of a step ({batch_size} on each of {world_size} "
            "processes): lower --batch-size, --accumulate-steps or the number of processes"
        )
    return images


def repeat_factors(index, images: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute how often an epoch has each image, so that rare categories are seen more often.

    A category in a share f of the images has the factor max(1, sqrt(threshold / f)), and an image
    the largest factor of its categories (LVIS, https://arxiv.org/abs/1908.03195).

    Args:
        index: A `coco_utils.CocoIndex`; its usable boxes count.
        images: Of `select_train_images`.
        threshold: The share of images, above 0 and at most 1, below which a category is rare.

    Returns:
        The factor of each of `images`, float64 `[N]`, and of each category, `[K]`, in the order of
        `index.categories.ids`; 1 without a box.
    """
    ids = np.asarray(index.categories.ids)
    category_of_box = np.searchsorted(ids, index.category_ids[index.usable])
    pairs = np.sort(index.image_of_rows()[index.usable] * len(ids) + category_of_box)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique of NumPy 2.4 takes 50 times as long
    image, category = np.divmod(pairs, len(ids))
    share = np.bincount(category, minlength=len(ids)) / len(images)
    of_category = np.sqrt(threshold / np.where(share > 0, share, 1)).clip(min=1)
    of_image = np.ones(len(index))
    np.maximum.at(of_image, image, of_category[category])
    return of_image[images], of_category


class TrainingPlan:
    """The batches of an epoch as a function of (seed, epoch): a `batch_sampler` for a DataLoader.

    A global batch is `world_size * batch_size` images of one aspect-ratio group; rank r takes the
    r-th share. The remainders of the groups form mixed batches at the end of the epoch. Images that
    do not fill a last global batch are skipped, different ones each epoch in rotation, so that all
    images are used equally often. Nothing depends on the number of workers, and only the shares
    depend on the number of processes.

    With `factors`, of `repeat_factors`, an epoch has `images`, their sum, in place of one of each.
    What does not fill a last global batch is skipped at random, so that an image is used in
    proportion to its factor. All epochs have the same number of steps.

    Iterating yields lists of `(image, seed)`: the position of an image and the seed of its
    augmentation, f(seed, epoch, image), another one for each copy of an image. `start(epoch, step)`
    sets the start of the next iteration.
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        factors: np.ndarray | None = None,
    ):
        self.groups = groups
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.factors = factors
        # fsum: the same on every machine, or their epochs would differ in length.
        self.images = len(groups) if factors is None else int(math.fsum(factors))
        self.global_batch = batch_size * world_size
        self.epoch = self.first_step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Set the epoch and the step, both from 0, at which the next iteration starts."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return self.images // self.global_batch

    def batches(self, epoch: int) -> np.ndarray:
        """Plan a whole epoch: positions of images, int64 `[steps, global_batch]`."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.factors is None:
            images = np.delete(np.arange(len(self.groups)), self._skipped(epoch))
        else:
            images = self._draw(rng)
        images = rng.permutation(images)
        groups, full, rest = self.groups[images], [], []
        for group in np.unique(self.groups):
            members = images[groups == group]
            cut = len(members) - len(members) % self.global_batch
            full.append(members[:cut])
            rest.append(members[cut:])
        full = np.concatenate(full).reshape(-1, self.global_batch)
        mixed = rng.permutation(np.concatenate(rest)).reshape(-1, self.global_batch)
        return np.concatenate([rng.permutation(full), mixed])

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the images of an epoch in proportion to their factors, by systematic sampling.

        Points at a distance of 1 fall on the images, lined up in random order with their factors
        as lengths. So the number of images is the same in every epoch, and that of the copies of
        an image differs by 1 at most.
        """
        order, count = rng.permutation(len(self.groups)), len(self) * self.global_batch
        ends = np.cumsum(self.factors[order])
        points = np.arange(count) + rng.random()
        # Without the last end, which rounding may place before the last point.
        return order[np.searchsorted(ends[:-1] * (count / ends[-1]), points, side="right")]

    def _skipped(self, epoch: int) -> np.ndarray:
        """Return the images that an epoch skips: the next few of one fixed permutation."""
        count = len(self.groups) % self.global_batch
        permutation = np.random.default_rng(self.seed).permutation(len(self.groups))
        return permutation[(epoch * count + np.arange(count)) % len(self.groups)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = self.epoch, self.rank * self.batch_size
        share = slice(first, first + self.batch_size)
        batches = self.batches(epoch)
        pairs = np.stack([batches, count_before(batches)], axis=-1)
        for batch in pairs[self.first_step :, share].tolist():
            yield [(image, image_seed(self.seed, epoch, image, copy)) for image, copy in batch]


def count_before(images: np.ndarray) -> np.ndarray:
    """Count how often each image occurred before it in the array, row by row; of its shape."""
    order = np.argsort(images, axis=None, kind="stable")
    ordered = images.ravel()[order]
    counts = np.empty_like(ordered)
    counts[order] = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    return counts.reshape(images.shape)


def image_seed(seed: int, epoch: int, image: int, copy: int = 0) -> int:
    """Hash a run's seed, an epoch, an image and its copy to the 64-bit seed of its augmentation."""
    # Copy 0 is left out: so the seeds of images without copies are those of earlier versions.
    values = (seed, epoch, image, copy) if copy else (seed, epoch, image)
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0])


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
