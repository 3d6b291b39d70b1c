"""Another package brings an objective through the entry-point group `trivium.objectives`, without an edit of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = '''
"""Pulls every modality towards the first."""
from trivium.objectives import Loss, Objective


class Pull(Objective):
    """Mean squared distance from the first modality.

    Args:
        weight: factor of the loss.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, z) -> Loss:
        first, *others = z.names
        there = z.valid[first]
        terms = {n: self.weight * z.mean((z.z[first] - z.z[n]).square().sum(-1), there & z.valid[n]) for n in others}
        return Loss(sum(terms.values()), terms, {})
'''
BUILD = """
import json, torch
from trivium.datasets.registry import InputError
from trivium.objectives import OBJECTIVES, Embeddings
objective = OBJECTIVES.build("stub-pull", weight="0.5")
try:
    OBJECTIVES.build("stub-pull", wieght=1)
except InputError as error:
    message = str(error)
z = Embeddings({"a": torch.eye(4), "b": -torch.eye(4)})
print(json.dumps([type(objective).__module__, objective.weight, objective(z).total.item(), message]))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder like site-packages, with the distribution `stub` installed in it."""
    folder = tmp_path / "site with a space"
    info = folder / "stub-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "stub_objectives.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trivium.objectives]\nstub-pull = stub_objectives:Pull\n")
    return folder


def python(command: str, *arguments: str, site: Path | None = None) -> str:
    """stdout of a fresh process, with `site` among its packages."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run([sys.executable, "-c", command, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_packages_objective_is_listed_described_and_built(site: Path) -> None:
    trivium = "import sys; from trivium.launch.cli import main; sys.argv[0] = 'trivium'; main()"
    assert "stub-pull" in python(trivium, "objectives", site=site)
    assert "stub-pull" not in python(trivium, "objectives")
    page = python(trivium, "objectives", "stub-pull", site=site)
    assert "Mean squared distance from the first modality." in page and "weight" in page
    module, weight, total, message = json.loads(python(BUILD, site=site))
    assert (module, weight, total) == ("stub_objectives", 0.5, 2.0)
    assert "'stub-pull' has no option 'wieght'; did you mean 'weight'?" in message


def test_a_name_that_is_ours_is_refused(site: Path) -> None:
    (site / "stub-1.0.dist-info" / "entry_points.txt").write_text("[trivium.objectives]\ngram = stub_objectives:Pull\n")
    command = "from trivium.objectives import names\ntry:\n    names()\nexcept ValueError as error:\n    print(error)"
    message = python(command, site=site)
    assert "'gram' is registered twice: trivium.objectives.gram.Gram and stub_objectives.Pull" in message
