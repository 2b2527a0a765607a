"""Fixtures that several test files use."""

from pathlib import Path

import pytest
from helpers import make_tiny


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Return the root of a data set of eight training and three validation images."""
    return make_tiny(tmp_path / "tiny")
