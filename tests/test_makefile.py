"""The Makefile, dry: which commands it would run, from a folder with a space in its name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a check out"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    return folder


def make(folder: Path, *words: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("OBJECTIVE", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", *words], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_the_targets(folder: Path) -> None:
    listed = [line.split()[1] for line in make(folder).splitlines()]
    assert {"demo", "demo-objectives", "test", "test-slow", "lint"} <= set(listed)


@pytest.mark.parametrize(("words", "objective"), [([], "unialign"), (["OBJECTIVE=gram"], "gram")])
def test_demo_prepares_trains_evaluates_reports(folder: Path, words: list[str], objective: str) -> None:
    setup, prepare, train, evaluate, report = make(folder, "-n", "demo", *words).splitlines()
    run = f"runs/demo-{objective}"
    assert setup == "bash launch/venv.sh"
    assert prepare == ".venv/bin/trivium prepare moving-digits --out data/moving-digits"
    assert train.startswith(".venv/bin/accelerate launch --config_file launch/cpu.yaml ")
    assert train.endswith(f" -m trivium.pretrain demo objective={objective} run={run}")
    assert evaluate.endswith(f" -m trivium.evals --model {run} --split test --if-needed")
    assert report == f".venv/bin/trivium report {run}"


def test_demo_objectives_compares_all_three(folder: Path) -> None:
    lines = make(folder, "-n", "demo-objectives").splitlines()
    runs = [f"runs/demo-{objective}" for objective in ("infonce", "gram", "unialign")]
    assert [line.split()[-1] for line in lines if "trivium report" in line] == runs
    assert lines[-1] == f".venv/bin/trivium compare {' '.join(runs)}"


def test_continuous_integration_runs_the_two_test_commands(folder: Path) -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line.startswith("make")] == ["make test", "make test-slow"]
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert make(folder, "-n", "test").splitlines()[-1].endswith('.venv/bin/python -m pytest -m "not slow"')
    assert make(folder, "-n", "test-slow").splitlines()[-1].endswith(".venv/bin/python -m pytest -m slow")
