"""Fixtures of all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

# by path: with tests/ on sys.path, tests/datasets would answer to `import datasets`
_spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_ranks)


@pytest.fixture(scope="session")
def ranks() -> Iterator:
    """`ranks(world, function, *args, env=None, timeout=120)`: the function's result on each of `world` processes."""
    pool = _ranks.Ranks()
    yield pool
    pool.close()
