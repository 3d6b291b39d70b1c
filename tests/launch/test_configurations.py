"""The accelerate configurations: launcher facts only, and the demo's one really starts one CPU process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = sorted(LAUNCH.glob("*.yaml"))
# Trivium builds these from the recipe; accelerate refuses a run in which its file sets them too.
OF_THE_RECIPE = {"deepspeed_config", "mixed_precision", "fsdp_config", "dynamo_config", "megatron_lm_config"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launcher_facts_only(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    facts = yaml.safe_load(path.read_text())
    assert not OF_THE_RECIPE & set(facts)
    assert facts["use_cpu"] == (path.name == "cpu.yaml")
    assert isinstance(ClusterConfig.from_yaml_file(str(path)), ClusterConfig)  # ValueError for a key it does not know
    assert f"accelerate launch --config_file launch/{path.name} " in path.read_text(), "says how it is used"


def test_one_process_on_the_cpu(tmp_path: Path) -> None:
    tmp_path.joinpath("probe_launch.py").write_text(
        "import os, sys\n"
        "from accelerate import PartialState\n"
        "state = PartialState()\n"
        "print('probe', state.num_processes, state.device, os.environ['OMP_NUM_THREADS'], *sys.argv[1:])\n"
    )
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", LAUNCH / "cpu.yaml"]
    command += ["--num_cpu_threads_per_process", "2", "--quiet", "-m", "probe_launch", "demo", "objective=gram", "--x"]
    clean = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("probe")]
    assert lines == ["probe 1 cpu 2 demo objective=gram --x"]
