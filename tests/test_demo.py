"""The demo as a user runs it, with each objective: it learns what the README says it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = {  # R@1 in percent on the held-out clips; chance is 5
    "infonce": {"text->video/cosine": 85, "video->text/cosine": 65, "text->audio/cosine": 95},
    "unialign": {"text->video/cosine": 85, "video->text/cosine": 65, "text->audio/cosine": 95},
    "gram": {"text->video+audio/volume": 85},  # the volume does not see a sign, so cosines may say nothing
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the demo's 7,000 clips, where the recipe looks for them."""
    folder = tmp_path_factory.mktemp("demo")
    start(folder, "trivium.launch.cli", "prepare", "moving-digits", "--out", "data/moving-digits")
    return folder


def start(folder: Path, module: str, *words: str) -> None:
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml"), "--quiet", "-m", module]
    command = ["-c", f"from {module} import main; main()"] if module.endswith("cli") else ["-m", *launch]
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("objective", TARGETS)
def test_the_demo_reaches_its_targets(objective, folder):
    start(folder, "trivium.pretrain", "demo", f"objective={objective}", f"run=runs/{objective}")
    start(folder, "trivium.evals", "--model", f"runs/{objective}", "--split", "test")
    results = json.loads((folder / "runs" / objective / "evals" / "test" / "results.json").read_text())
    (retrieval,) = [task for task in results["tasks"] if task["task"] == "retrieval"]
    for row, target in TARGETS[objective].items():
        assert retrieval["metrics"][f"{row}/R@1"] >= target, row
    assert retrieval["protocol"]["n_items"] == 500 and retrieval["protocol"]["n_unreadable"] == 0
