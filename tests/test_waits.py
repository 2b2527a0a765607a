"""The host does not wait for a GPU in a training step, and once per batch of an evaluation.

On simulated CUDA tensors: this fails when somebody adds an `.item()`, also without a GPU. Likewise,
what an Apple GPU cannot do is found on simulated ones.
"""

import json

import pytest
from helpers import ROOT, run_script

SIZES = (2, 4, 16)
# Per image of a batch: it is normalized, resized, and copied to the batch; the rest are views.
OPERATORS_PER_IMAGE = 13

MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def run_simulation(name: str, *arguments) -> dict:
    result = run_script(ROOT / f"tests/{name}.py", *arguments)
    assert not result.returncode, result.stderr
    return json.loads(result.stdout)


def count_waits(way: str, *sizes: int) -> dict:
    return run_simulation("simulated_cuda", MODEL, way, *sizes)


@pytest.mark.slow
def test_step_does_not_wait_and_evaluation_waits_once():
    counts = count_waits("fixed", *SIZES)
    for size in map(str, SIZES):
        assert counts[size]["step"]["waits"] == {}
        (read,) = counts[size]["log step"]["waits"]
        assert "monitoring.py" in read
        (read,) = counts[size]["evaluation"]["waits"]
        assert "event" in read
        for kind in ("log step", "evaluation"):
            assert sum(counts[size][kind]["waits"].values()) == 1
    for kind in ("step", "evaluation"):
        small, medium, large = (counts[str(size)][kind]["operators"] for size in SIZES)
        assert medium - small <= 2 * OPERATORS_PER_IMAGE
        assert (large - medium) / 12 == (medium - small) / 2


@pytest.mark.slow
def test_trained_affine_does_not_wait():
    counts = count_waits("affine", 2)["2"]
    assert counts["step"]["waits"] == {}
    assert sum(counts["evaluation"]["waits"].values()) == 1
    # Scale and bias are computed in each step.
    assert counts["step"]["operators"] > count_waits("fixed", 2)["2"]["step"]["operators"]


@pytest.mark.slow
def test_waits_are_found():
    """The counter itself: torchvision's parts wait more often for more images."""
    counts = count_waits("parts", 2, 4)
    two, four = (sum(counts[size]["step"]["waits"].values()) for size in ("2", "4"))
    assert 10 < two < four - 10


@pytest.mark.slow
def test_nothing_is_done_that_apple_gpus_cannot_do():
    """On simulated tensors: losses as on a CPU, no float64, no copy that does not block, ..."""
    pytest.importorskip("yaml")
    pytest.importorskip("torchgen")
    names = ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")
    problems = run_simulation("simulated_mps", *names)
    assert {name: problems[name] for name in names} == {name: [] for name in names}
    found = {line.partition(" at ")[0] for line in problems["careless"]}
    assert found == {"float64", "channels last"}
