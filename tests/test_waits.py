"""The host does not wait for a GPU in a training step, and once per batch of an evaluation.

On simulated CUDA tensors: this fails when somebody adds an `.item()`, also without a GPU.
"""

import json
import sys

import pytest
from helpers import ROOT, run

SIZES = (2, 4, 16)
# Per image of a batch: it is normalized, resized, and copied to the batch; the rest are views.
OPERATORS_PER_IMAGE = 13


MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.mark.slow
def test_waits_for_the_device():
    script = ROOT / "tests/simulated_cuda.py"
    result = run(sys.executable, script, MODEL, *SIZES, PYTHONPATH=str(ROOT))
    assert not result.returncode, result.stderr
    counts = json.loads(result.stdout)
    for size in map(str, SIZES):
        assert counts[size]["step"]["waits"] == {}
        (read,) = counts[size]["log step"]["waits"]
        assert "monitoring.py" in read
        (read,) = counts[size]["evaluation"]["waits"]
        assert "event" in read
        assert sum(counts[size]["evaluation"]["waits"].values()) == 1
    for kind in ("step", "evaluation"):
        small, medium, large = (counts[str(size)][kind]["operators"] for size in SIZES)
        assert medium - small <= 2 * OPERATORS_PER_IMAGE
        assert (large - medium) / 12 == (medium - small) / 2


@pytest.mark.slow
def test_a_wait_is_found():
    """The counter itself: on torchvision's parts it finds waits that grow with the batch."""
    code = """
import simulated_cuda as s
from internals.fast import FastFasterRCNN
s.simulate_cuda()
FastFasterRCNN.fixed_shapes = False
counts = [s.count_waits("fasterrcnn_mobilenet_v3_large_320_fpn", n) for n in (2, 4)]
print(*(sum(c["step"]["waits"].values()) for c in counts))
"""
    path = f"{ROOT}:{ROOT / 'tests'}"
    result = run(sys.executable, "-c", code, PYTHONPATH=path)
    assert not result.returncode, result.stderr
    two, four = map(int, result.stdout.split())
    assert 10 < two < four - 10
