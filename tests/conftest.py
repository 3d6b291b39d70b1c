"""Fixtures of all tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# by path: with tests/ on sys.path, tests/datasets would answer to `import datasets`
_spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_ranks)

_POOL = pytest.StashKey()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the helper of `ranks` early: it imports its libraries while the first tests run."""
    wanted = any("ranks" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[_POOL] = _ranks.Ranks()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _POOL in config.stash:
        config.stash[_POOL].close()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest):
    """`ranks(world, function, *args, env=None, timeout=120)`: the function's result on each of `world` processes."""
    return request.config.stash[_POOL]
