"""Fixtures that several test files use."""

from pathlib import Path

import pytest
from helpers import write_part


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Eight training and three validation pictures of two shapes with one or two boxes each."""
    root = tmp_path / "tiny"
    sizes = [(64, 48), (48, 64)] * 4
    boxes = [[[2, 4, 4, 30, 20]], [[5, 10, 8, 20, 30], [2, 0, 0, 12, 16]]] * 4
    write_part(root, "train", sizes, boxes)
    write_part(root, "val", sizes[:3], boxes[:3])
    return root
