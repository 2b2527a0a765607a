"""The data of a run."""

import argparse

import numpy as np
from helpers import rewrite, split_of

import loading
from coco_utils import CocoIndex


def test_repeats_are_logged(tiny, capsys):
    """Cats are in all of the eight images, dogs in four."""

    def choose(threshold: float | None) -> tuple[np.ndarray | None, str]:
        args = argparse.Namespace(repeat_factor_threshold=threshold)
        factors = loading.choose_repeat_factors(args, CocoIndex(split_of(tiny)), np.arange(8))
        return factors, capsys.readouterr().out

    assert choose(None) == (None, "")
    message = "repeats    none: no category is rarer than 0.5\n"
    assert choose(0.5) == (None, message)
    factors, text = choose(1)
    assert factors.sum() == 4 + 4 * 2**0.5
    assert text.splitlines() == [
        "repeats    8 images become 9 an epoch; rarer than 1: 1 of 2 categories,",
        "           with factors up to 1.41 (dog)",
    ]
    rewrite(split_of(tiny), lambda data: data["categories"].append({"id": 7, "name": "cow"}))
    assert choose(0.5) == (None, message)  # a category without boxes cannot be repeated
