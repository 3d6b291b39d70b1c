"""Each benchmark runs as a script at its smallest setting and prints a ratio against its peer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "objectives": "--batch-size 16 --dim 8 --repeats 1 --growth 8,16",
    "loader": "--workers 1 --batches 1 --repeats 1 train.batch_size=4",
    "step": "--repeats 2 train.batch_size=4",
}


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, subprocess.Popen]]:
    """All scripts, started together: each of them mostly imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, f"benchmarks/{name}.py", *options.split()],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, options in SMALLEST.items()
    }  # fmt: skip
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def rows(process: subprocess.Popen) -> list[dict[str, str]]:
    """The (first) table that a script prints."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    tables = [block for block in out.split("\n\n") if "|" in block]
    heads, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in tables[0].splitlines()]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def assert_ratio(row: dict[str, str], peer: str) -> None:
    """The ratio printed is that of the times printed, each rounded to 0.1 ms and the ratio to 0.01."""
    ours, theirs, ratio = (float(row[name]) for name in ("trivium ms", peer, "time ratio"))
    assert (ours - 0.05) / (theirs + 0.05) - 0.005 <= ratio <= (ours + 0.05) / max(theirs - 0.05, 1e-9) + 0.005


def test_objectives(started: dict[str, subprocess.Popen]) -> None:
    found = rows(started["objectives"])
    assert [row["case"] for row in found] == ["infonce", "siglip", "gram-3", "gram-4", "unialign"]
    for row in found:
        assert_ratio(row, "peer ms")
        assert float(row["peer MiB"]) >= 0 and float(row["difference"]) < 1e-4


def test_loader(started: dict[str, subprocess.Popen]) -> None:
    (row,) = rows(started["loader"])
    assert row["workers"] == row["bare loops"] == "1"
    assert float(row["share"].removesuffix(" %")) > 0 and float(row["loader CPU ms/clip"]) >= 0


def test_step(started: dict[str, subprocess.Popen]) -> None:
    (row,) = rows(started["step"])
    assert_ratio(row, "bare ms")
    assert float(row["loss difference"]) == 0, "the bare step is not the same step"
