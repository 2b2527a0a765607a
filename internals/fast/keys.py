"""Random numbers as a function of what they are for, the same on every device.

The key of an anchor or a proposal is a hash of (seed of the image, stream, id). The rows with the
largest keys are a uniform sample, which does not depend on the device, the other images of the
batch or the padding.
"""

import torch

ANCHORS, PROPOSALS = range(2)  # the streams
FIRST_GT_ID = 2**32  # ground-truth boxes are proposals, too


def _signed(number: int) -> int:
    """Return the signed 64-bit integer with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


# The constants of SplitMix64 (https://prng.di.unimi.it/splitmix64.c).
INCREMENT = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def random_keys(seeds: torch.Tensor, ids: torch.Tensor, stream: int) -> torch.Tensor:
    """Hash seeds and ids to keys.

    Args:
        seeds: int64 `[B]`, of the images.
        ids: int64 `[N]`, of the rows of each image.
        stream: What the keys are for. It is mixed in before the ids: added to them it would give
            the same keys in another order.

    Returns:
        int64 `[B, N]`, not negative.
    """
    start = _mix(seeds + _signed(INCREMENT * (stream + 1)))
    return _mix(start[:, None] + ids * INCREMENT) & (2**63 - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # an int64 is filled with copies of its sign
