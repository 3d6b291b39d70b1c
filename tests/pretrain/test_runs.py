"""Whole runs as a user starts them: killed and resumed, stopped, refused, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from trivium.datasets.media import CorruptSample
from trivium.datasets.stream import Source
from trivium.modalities.model import MultimodalModel
from trivium.pretrain import state as checkpoints
from trivium.pretrain.cli import main
from trivium.pretrain.engine import Engine

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONDONTWRITEBYTECODE": "",
}


def command(world: int, recipe: Path, *overrides: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    return [sys.executable, *launcher, "-m", "trivium.pretrain", str(recipe), *overrides]


def run(world: int, recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(world, recipe, *overrides), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def start_and_kill(world: int, recipe: Path, folder: Path, step: int, *overrides: str) -> None:
    """Start a run and `kill -9` its whole process group once it has logged `step`."""
    process = subprocess.Popen(
        command(world, recipe, *overrides), env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in records(folder)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:  # ranks live in sessions of their own
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return {
        f"{name}/{key}": value
        for name in ("model", "objective", "optimizer")
        for key, value in load_file(latest / f"{name}.safetensors").items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)  # to the last bit: JSON keeps every digit of a float
    mine, theirs = weights(one), weights(other)
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "world, overrides",
    [
        (1, ["data.workers=2", "train.chunk=6"]),
        pytest.param(2, ["data.workers=2", "distributed.zero=2"], marks=pytest.mark.two_process),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bit(world, overrides, recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(world, recipe, f"run={whole}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    start_and_kill(world, recipe, killed, 3, f"run={killed}", *overrides)
    assert not (killed / "exit.json").exists()
    done = run(world, recipe, f"run={killed}", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step-" in (killed / "log.txt").read_text()
    assert_same_run(whole, killed)


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_every_engine_resumes_to_the_same_bit(zero, step, recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [f"distributed.zero={zero}", "distributed.persist_below=0", "data.workers=1"]
    assert run(2, recipe, f"run={whole}", *settings).returncode == 0
    start_and_kill(2, recipe, killed, step, f"run={killed}", *settings)
    assert run(2, recipe, f"run={killed}", *settings).returncode == 0
    assert_same_run(whole, killed)


def train(recipe: Path, *overrides: str) -> int:
    return main([str(recipe), *overrides])


def die_while_saving(moment: str, step: int, recipe: Path) -> None:
    """Train, and `kill -9` oneself while the checkpoint of `step` is being written."""
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    reached = lambda path: checkpoints.folder_name(step) in str(path)  # noqa: E731
    if moment == "files":
        flush = checkpoints._flush
        checkpoints._flush = lambda path: kill() if reached(path) else flush(path)
    elif moment == "rename":
        point = checkpoints.point
        checkpoints.point = lambda folder: kill() if reached(folder) else point(folder)
    elif moment == "latest":
        _point = checkpoints._point

        def after_latest(path: Path, name: str) -> None:
            _point(path, name)
            if path.name == "latest" and reached(name):
                kill()

        checkpoints._point = after_latest
    elif moment == "pointers":
        prune = checkpoints._prune
        checkpoints._prune = lambda root, newest, *rest: kill() if reached(newest) else prune(root, newest, *rest)
    main([str(recipe)])


@pytest.mark.parametrize("moment", ["files", "rename", "latest", "pointers"])
@pytest.mark.parametrize("step", [3, 6])  # the first of the best ones; and the last
def test_a_kill_inside_a_checkpoint_loses_nothing(moment, step, ranks, recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "run"
    assert in_process(ranks, recipe, f"run={whole}") == 0
    with pytest.raises(Exception, match="status 9"):
        ranks(1, die_while_saving, moment, step, recipe, timeout=240)
    assert in_process(ranks, recipe) == 0
    assert_same_run(whole, killed)
    for pointer in ("latest", "best"):
        names = {(folder / "checkpoints" / pointer).read_text() for folder in (whole, killed)}
        assert len(names) == 1 and (killed / "checkpoints" / names.pop().strip()).is_dir()
    assert not list((killed / "checkpoints").glob(".step-*"))


def test_a_gradient_that_is_not_finite_stops_before_the_weights(ranks, recipe, tmp_path):
    assert in_process(ranks, recipe, "train.steps=2") == 0
    before = weights(tmp_path / "run")
    with pytest.raises(Exception, match="the gradient of step 3 is not finite"):
        ranks(1, spoil_a_gradient, recipe, tmp_path, timeout=240)
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["step"] == 2
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def spoil_a_gradient(recipe: Path, tmp_path: Path) -> None:
    """Go on for a third step, whose gradient, but not its loss, is not a number."""
    (tmp_path / "run" / "config.yaml").unlink()  # the run was to have two steps
    backward = Engine.backward

    def spoilt(engine: Engine, loss: torch.Tensor) -> None:
        backward(engine, loss)
        next(iter(engine.names.values())).grad.fill_(float("nan"))

    Engine.backward = spoilt
    main([str(recipe), "train.steps=3"])


def in_process(ranks, recipe: Path, *overrides: str) -> int:
    """The command's exit code, on one forked process that has the libraries imported already."""
    return ranks(1, train, recipe, *overrides, timeout=240)[0]


def test_evaluation_while_training_changes_nothing(ranks, recipe, tmp_path):
    often, never = tmp_path / "often", tmp_path / "never"
    assert in_process(ranks, recipe, f"run={often}", "evals.every=1") == 0
    assert in_process(ranks, recipe, f"run={never}", "evals.every=null", "data.val=null") == 0
    assert_same_run(often, never)
    steps = [json.loads(line)["step"] for line in (often / "evals.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6] and not (never / "evals.jsonl").exists()


def test_a_finished_run_is_not_redone_and_its_configuration_starts_the_same_run(ranks, recipe, tmp_path):
    first, second = tmp_path / "run", tmp_path / "second"
    assert in_process(ranks, recipe) == 0
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    assert in_process(ranks, recipe) == 0
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((first / "exit.json").read_text()) == {"outcome": "finished", "error": None, "exit_code": 0}
    assert in_process(ranks, first / "config.yaml", f"run={second}") == 0
    assert_same_run(first, second)
    assert len(list((first / "checkpoints").glob("step-*"))) <= 3  # keep 2, and the best


@pytest.mark.parametrize(
    "launcher, to_the_group",
    [
        pytest.param([], True, id="one process, signal to the group"),
        pytest.param(["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"], False, id="the launcher"),
        pytest.param(
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            False,
            id="two ranks",
            marks=pytest.mark.two_process,
        ),
    ],
)
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(launcher, to_the_group, recipe, tmp_path):
    stopped = tmp_path / "run"
    settings = ["train.steps=400", "checkpoint.every=null", "evals.every=null", "data.workers=1"]
    command = [sys.executable, *launcher, "-m", "trivium.pretrain", str(recipe), *settings]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=said, start_new_session=True)
    deadline = time.monotonic() + 240
    while not records(stopped):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM) if to_the_group else process.terminate()
    process.wait(timeout=120)
    while not (stopped / "exit.json").exists():  # a launcher may end before what it started
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.02)
    assert json.loads((stopped / "exit.json").read_text())["outcome"] == "stopped"
    last = records(stopped)[-1]["step"]
    assert (stopped / "checkpoints" / "latest").read_text().strip() == f"step-{last:08d}" and last < 400


@pytest.mark.two_process
def test_what_one_rank_cannot_do_ends_all_with_its_message(ranks, digits, recipe, tmp_path):
    """The second rank's half of the first batch is corrupt, and so is whatever is drawn in its place."""
    with pytest.raises(Exception, match="exit code 2"):
        ranks(2, train_with_a_bad_rank, recipe, timeout=240)
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["exit_code"] == 2 and "are all corrupt" in ending["error"]
    assert (tmp_path / "run" / "log.txt").read_text().rstrip().endswith(f"error: {ending['error']}")


def train_with_a_bad_rank(recipe: Path) -> None:
    if os.environ["RANK"] == "1":

        def broken(*_) -> None:
            raise CorruptSample("made up")

        Source.clip = broken
    code = main([str(recipe), "distributed.zero=0", "data.workers=0"])
    assert code == 0, f"exit code {code}"


def test_a_damaged_checkpoint_is_passed_over(ranks, recipe, tmp_path):
    folder = tmp_path / "run"
    assert in_process(ranks, recipe) == 0
    whole = losses(folder)
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    assert in_process(ranks, recipe) == 0
    assert f"{newest.name} is passed over: optimizer.safetensors was changed" in (folder / "log.txt").read_text()
    assert losses(folder) == whole


def test_init_from_starts_at_another_run_s_weights(ranks, recipe, tmp_path):
    first = [f"run={tmp_path / 'first'}", "data.val=null", "evals.every=null"]  # so that the best is the latest
    assert in_process(ranks, recipe, *first) == 0
    settings = [f"run={tmp_path / 'next'}", f"init_from={tmp_path / 'first'}", "train.steps=1", "train.lr=1e-12"]
    assert in_process(ranks, recipe, *settings, "objective=gram") == 0
    first, after = weights(tmp_path / "first"), weights(tmp_path / "next")
    names = [name for name in first if name.startswith("model/")]
    assert names and all(torch.allclose(first[name], after[name], atol=1e-9) for name in names)


def test_a_loss_that_is_not_finite_names_step_parts_and_samples(ranks, recipe, tmp_path):
    with pytest.raises(Exception, match="loss of step 1 is not finite"):
        in_process(ranks, recipe, "objective.temperature_range=[1e-42, 1.0]", "objective.temperature=1e-42")
    seen = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert seen["step"] == 0 and len(seen["ranks"][0]["keys"]) == 16 and seen["ranks"][0]["parts"]
    assert seen["ranks"][0]["vectors"] == {}
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["outcome"] == "failed"
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_vector_that_is_not_finite_is_named_by_modality_and_sample(ranks, recipe, tmp_path):
    with pytest.raises(Exception, match=r"not finite \(loss=nan, audio-text=nan, .*the vectors: audio of '"):
        ranks(1, train_with_a_broken_vector, recipe, timeout=240)
    (rank,) = json.loads((tmp_path / "run" / "nonfinite.json").read_text())["ranks"]
    assert rank["vectors"] == {"audio": [rank["keys"][3]]}


def train_with_a_broken_vector(recipe: Path) -> None:
    encode = MultimodalModel.encode

    def broken(model, name, inputs):
        z, features = encode(model, name, inputs)
        row = torch.arange(len(z))[:, None] == 3
        return (z.masked_fill(row, float("nan")) if name == "audio" else z), features

    MultimodalModel.encode = broken
    main([str(recipe)])


def test_conflicts_of_the_terms_are_measured_now_and_then(ranks, recipe, tmp_path):
    settings = ["train.steps=50", "log.conflicts=50", "log.every=20", "evals.every=null", "train.chunk=8"]
    assert in_process(ranks, recipe, *settings) == 0
    found = {record["step"]: {key for key in record if "conflict" in key} for record in records(tmp_path / "run")}
    pairs = ("audio-text:audio-video", "audio-text:text-video", "audio-video:text-video")
    assert found == {20: set(), 40: set(), 50: {f"conflict/{pair}" for pair in pairs}}


def test_wandb_writes_offline(ranks, recipe, tmp_path):
    assert in_process(ranks, recipe, "log.wandb=true", "train.steps=2") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_bf16_trains_and_keeps_float32_weights(ranks, recipe, tmp_path):
    assert in_process(ranks, recipe, "train.precision=bf16") == 0
    assert all(0 < loss < 10 for _, loss, _ in losses(tmp_path / "run"))
    assert {x.dtype for name, x in weights(tmp_path / "run").items() if name.startswith("model/")} == {torch.float32}


def test_the_saved_recipe_is_plain_data(ranks, recipe, tmp_path):
    assert in_process(ranks, recipe, "train.steps=1") == 0
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert tree["train"]["steps"] == 1 and tree["objective"] == {"name": "infonce"}
