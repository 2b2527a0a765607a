"""Fixtures that several test files use."""

from pathlib import Path

import pytest
from helpers import make_tiny


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Eight training and three validation images of two shapes with one or two boxes each."""
    return make_tiny(tmp_path / "tiny")
