import numpy as np
import pytest

from internals import batch_size


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 1000])
def test_the_largest_is_found_in_few_tries_whatever_it_is(limit):
    tried = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= limit

    assert batch_size.largest(fits, most=300) == min(limit, 300)
    assert len(tried) <= 17
    assert max(tried) <= 300
    assert len(set(tried)) == len(tried)


def test_memory_that_must_not_run_out_is_extrapolated():
    """1,000 for the model and 500 for each image: 95 % of 10,000 hold 17 images."""
    assert batch_size.extrapolated([1500, 2000, 2500], 10_000, most=99) == 17
    assert batch_size.extrapolated([1500, 2000, 2500], 10_000, most=8) == 8
    assert batch_size.extrapolated([1500, 2000, 2500], 1_500, most=99) == 0
    assert batch_size.extrapolated([1500, 1500], 10_000, most=99) == 99  # too small to be seen


def test_the_hardest_images_pad_each_other():
    """Resized to a shortest side of 100: 100 x 140 and 120 x 100 make 120 x 140, but not in one
    group; 400 x 100 is bounded to 150 pixels.
    """
    sizes = np.array([(50, 70), (240, 200), (400, 100), (100, 100), (100, 110)])
    together = batch_size.hardest_images(sizes, np.zeros(5), 100, 150)
    assert {tuple(sizes[i]) for i in together} == {(50, 70), (400, 100)}  # 150 x 140
    groups = np.array([0, 1, 2, 1, 0])
    apart = batch_size.hardest_images(sizes, groups, 100, 150)
    assert {tuple(sizes[i]) for i in apart} == {(50, 70)}  # 100 x 140


def test_a_machine_has_memory():
    assert 2**28 < batch_size.free_memory() < 2**50
