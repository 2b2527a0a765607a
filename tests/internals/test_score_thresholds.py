import numpy as np
import pytest

from internals.score_thresholds import Matches, best_point, best_points, f1_curve, overall_curve


def brute_force(scores, correct, boxes, threshold) -> tuple[float, float, float]:
    """Return precision, recall and F1 by counting the detections above a threshold in a loop."""
    kept = [good for score, good in zip(scores, correct, strict=True) if score >= threshold]
    found, missed = sum(kept), boxes - sum(kept)
    false = len(kept) - found
    return found / len(kept), found / boxes, 2 * found / (2 * found + false + missed)


@pytest.mark.parametrize("seed", range(20))
def test_every_threshold_reproduces_its_f1(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(60).round(int(rng.integers(1, 17)))
    correct = rng.random(60) < scores
    boxes = int(correct.sum() + rng.integers(1, 20))
    curve = f1_curve(scores, correct, boxes)
    assert len(curve.thresholds) == len(np.unique(scores))
    assert (np.diff(curve.thresholds) < 0).all()
    for threshold, *expected in zip(*curve, strict=True):
        assert brute_force(scores, correct, boxes, threshold) == pytest.approx(expected)
    best = best_point(curve)
    every = [brute_force(scores, correct, boxes, score)[2] for score in np.unique(scores)]
    assert best["F1"] == max(every) == brute_force(scores, correct, boxes, best["threshold"])[2]


def test_thresholds_are_midway_between_scores():
    curve = f1_curve(np.array([0.5, 0.8, 0.5, 0.1]), np.array([True, True, False, False]), 2)
    assert curve.thresholds.tolist() == pytest.approx([0.65, 0.3, 0.05])
    assert curve.F1.tolist() == pytest.approx([2 / 3, 4 / 5, 4 / 6])


def test_threshold_between_scores_that_have_no_number_between_them():
    low = 0.7
    high = np.nextafter(low, 1)
    curve = f1_curve(np.array([low, high]), np.array([False, True]), 1)
    assert low < best_point(curve)["threshold"] <= high
    assert f1_curve(np.array([0.0]), np.array([True]), 1).thresholds.tolist() == [0]


def test_of_equal_f1_the_highest_threshold_is_the_best():
    curve = f1_curve(np.array([0.9, 0.6, 0.5]), np.array([True, False, True]), 3)
    assert curve.F1.tolist() == pytest.approx([1 / 2, 2 / 5, 2 / 3])
    curve = f1_curve(np.array([0.9, 0.6, 0.5, 0.4]), np.array([True, False, False, True]), 2)
    assert curve.F1[0] == curve.F1[3]
    assert best_point(curve)["threshold"] == 0.75


def test_categories_are_chosen_apart_and_together():
    matches = Matches(
        scores=np.array([0.2, 0.9, 0.8, 0.5, 0.4]),
        correct=np.array([True, True, False, False, False]),
        categories=np.array([0, 1, 1, 2, 3]),
        boxes=np.array([1, 1, 4, 0, 2]),
    )
    overall, apart = best_points(matches)
    assert apart[0] == {"threshold": 0.1, "F1": 1, "precision": 1, "recall": 1}
    assert apart[1]["threshold"] == pytest.approx(0.85)
    assert apart[2:] == [None, None, None]  # never found, without boxes, without detections
    assert overall == best_point(overall_curve(matches))
    assert overall["F1"] == pytest.approx(4 / 13)  # below 0.9 alone it is 2/9
    nothing = Matches(*(column[:0] for column in matches[:3]), matches.boxes)
    assert best_points(nothing) == (None, [None] * 5)
