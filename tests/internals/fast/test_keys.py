"""Keys, and samples by keys."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from internals.fast.keys import random_keys
from internals.fast.sampling import KeyedSampler, sample


def split_mix(state: int) -> int:
    """Return the number of SplitMix64 for a state, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_keys_are_those_of_splitmix64():
    assert split_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first number
    seeds, ids = [0, 5, 2**63 + 11], [0, 1, 2**32, 2**50]
    signed = [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]
    keys = random_keys(torch.tensor(signed), torch.tensor(ids), stream=1)
    for row, seed in enumerate(seeds):
        start = split_mix((seed + 2 * 0x9E3779B97F4A7C15) % 2**64)
        expected = [split_mix((start + i * 0x9E3779B97F4A7C15) % 2**64) % 2**63 for i in ids]
        assert keys[row].tolist() == expected


def test_keys_of_streams_and_seeds_differ():
    ids = torch.arange(1000)
    seeds = torch.tensor([1, 2])
    keys = torch.cat([random_keys(seeds, ids, stream) for stream in range(2)])
    assert len(keys.unique()) == keys.numel()


def random_kinds(rows: int) -> torch.Tensor:
    return torch.randint(-1, 2, (1, rows), generator=torch.Generator().manual_seed(rows)).to(
        torch.int8
    )


@pytest.mark.parametrize("kinds", [random_kinds(400), random_kinds(90), torch.zeros(1, 70).char()])
def test_samples_are_as_many_as_torchvisions(kinds):
    keys = random_keys(torch.tensor([3]), torch.arange(kinds.shape[1]), 0)
    positives, is_positive, negatives, is_negative = sample(kinds, keys, 64, 0.5)
    stock = BalancedPositiveNegativeSampler(64, 0.5)(list(kinds.float()))
    for rows, chosen, kind, (mask,) in (
        (positives, is_positive, 1, stock[0]),
        (negatives, is_negative, 0, stock[1]),
    ):
        rows = rows[chosen]
        assert len(rows.unique()) == len(rows) == mask.sum()
        assert (kinds[0, rows] == kind).all()


def chi_square_deviation(hits: torch.Tensor, draws: int, chosen: int) -> float:
    """Return how many standard deviations chi-square is from its expectation.

    Args:
        hits: How often each of N rows was in a sample.
        draws: The number of samples.
        chosen: The size of a sample, without replacement.
    """
    rows = len(hits)
    share = chosen / rows
    chi_square = ((hits - draws * share) ** 2).sum().item() / (draws * share * (1 - share))
    chi_square *= (rows - 1) / rows
    return (chi_square - (rows - 1)) / math.sqrt(2 * (rows - 1))


def test_samples_are_uniform():
    """Each of 300 positives and 3,200 negatives is in as many of 2,000 samples."""
    kinds = torch.zeros(1, 4000, dtype=torch.int8)
    kinds[0, :300], kinds[0, 3500:] = 1, -1
    hits = torch.zeros(2, 4000)
    seeds = torch.randint(-(2**62), 2**62, (2000,), generator=torch.Generator().manual_seed(0))
    for part in seeds.split(200):
        keys = random_keys(part, torch.arange(4000), 0)
        found = sample(kinds.expand(200, -1), keys, 256, 0.5)
        for row, (rows, chosen) in enumerate((found[:2], found[2:])):
            hits[row] += rows[chosen].bincount(minlength=4000)
    assert abs(chi_square_deviation(hits[0, :300], 2000, 128)) < 4
    assert abs(chi_square_deviation(hits[1, 300:3500], 2000, 128)) < 4
    assert hits[0, 300:].sum() == hits[1, :300].sum() == hits[1, 3500:].sum() == 0


def masks_of(labels: list[torch.Tensor], seeds: list[int], gt_counts: list[int]) -> list[tuple]:
    """Return the masks of positives and negatives of each image."""
    sampler = KeyedSampler(64, 0.5)
    keys = random_keys(torch.tensor(seeds), torch.arange(400), 0)
    sampler.set_keys(keys, random_keys(torch.tensor(seeds), torch.arange(9), 1), gt_counts)
    return list(zip(*sampler(labels), strict=True))


def test_masks_depend_on_the_image_only():
    labels = [random_kinds(400)[0].float(), random_kinds(300)[0].long() * 7]
    together = masks_of(labels, [7, 8], [0, 5])
    torch.rand(5)
    for n, (seed, count) in enumerate(((7, 0), (8, 5))):
        (alone,) = masks_of([labels[n]], [seed], [count])
        assert all(torch.equal(a, b) for a, b in zip(alone, together[n], strict=True))
        assert alone[0].sum() == 32
        assert (labels[n][alone[0].bool()] >= 1).all()
        assert (labels[n][alone[1].bool()] == 0).all()
    other = masks_of(labels, [7, 9], [0, 5])
    assert torch.equal(other[0][0], together[0][0])
    assert not torch.equal(other[1][0], together[1][0])
