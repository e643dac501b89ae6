"""Shared fixtures."""

import os

# Tiny models gain nothing from threads, and lose much to them when several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from helpers import TinyData, make_tiny_data  # noqa: E402

# Tests never assert a time, and a busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """A tiny tokenised data set, made once. Tests that damage it must copy it first (`copy_data`)."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny_data") / "data")
