"""`python -m trivium.evals` on a tiny real model and real shards, on one and on two processes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from trivium.evals import cli
from trivium.evals.results import read_embeddings, read_lines, read_results

TOWER = {"name": "eva_clip", "frames": 2, "size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
PARTS = {"early": {"tower": TOWER}, "late": {"tower": TOWER | {"frames": 3}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    """A run with two checkpoints and nothing evaluated."""
    from trivium.modalities.model import MultimodalModel
    from trivium.modalities.weights import save_model

    run = tmp_path_factory.mktemp("trained") / "a run"
    for seed, name in ((0, "step-00000010"), (1, "step-00000020")):
        torch.manual_seed(seed)
        model = MultimodalModel(PARTS, 8)
        save_model(run / "checkpoints" / name, model.state_dict(), model.description())
    (run / "checkpoints" / "latest").write_text("step-00000020\n")
    (run / "checkpoints" / "best").write_text("step-00000010")
    data = {"train": "train-*.tar", "test": shards, "workers": 0, "fields": None, "decoder": "pyav"}
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "tiny", "data": data, "evals": {"batch_size": 4}}))
    return run


def evaluate(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["trivium.evals", *map(str, arguments)]
    code = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ending:
        code = ending.code
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "a run")


def test_it_evaluates_the_best_checkpoint_on_the_test_split(run):
    code, out, err = evaluate("--model", run)
    assert (code, err) == (0, "")
    assert "early->late/cosine" in out and "R@1 ↑" in out and "MedR ↓" in out and "chance R@1" in out
    card = read_results(run / "evals" / "test")
    assert (card["checkpoint"], card["split"], card["n"], card["n_unreadable"]) == ("step-00000010", "test", 13, 1)
    assert card["trained_on"] == "train-*.tar" and card["kinds"] == {"early": "frames", "late": "frames"}
    assert [task["task"] for task in card["tasks"]] == ["retrieval", "geometry"]
    row = card["tasks"][0]["protocol"]["rows"]["early->late/cosine"]
    assert (row["n_query"], row["n_gallery"], row["n_missing"]) == (13, 12, 1)
    (skip,) = read_embeddings(run / "evals" / "test").skipped
    assert (skip.position, skip.key) == (5, "clip5") and skip.reason
    assert read_lines(run / "evals" / "test" / "skipped.jsonl") == [{"split": "test", **vars(skip)}]
    assert "unreadable items, counted as missing: 1; see skipped.jsonl" in out


def test_choices(run, tmp_path):
    out = tmp_path / "elsewhere"
    assert evaluate("--model", run, "--checkpoint", "latest", "--tasks", "retrieval", "--out", out)[0] == 0
    card = read_results(out)
    assert card["checkpoint"] == "step-00000020" and [task["task"] for task in card["tasks"]] == ["retrieval"]
    folder = run / "checkpoints" / "step-00000020"
    assert evaluate("--model", folder, "--tasks", "retrieval", "--batch-size", "5")[0] == 0
    again = read_results(run / "evals" / "test")
    assert again["tasks"][0]["metrics"] == card["tasks"][0]["metrics"] and again["batch_size"] == 5


def test_results_are_kept_while_they_are_valid(run):
    def written() -> int:
        return (run / "evals" / "test" / "results.json").stat().st_ino

    evaluate("--model", run, "--tasks", "retrieval", "--if-needed")
    first = written()
    code, out, _ = evaluate("--model", run, "--tasks", "retrieval", "--if-needed")
    assert code == 0 and written() == first and "early->late/cosine" in out
    evaluate("--model", run, "--tasks", "retrieval", "--if-needed", "--checkpoint", "latest")
    second = written()
    assert second != first
    evaluate("--model", run, "--tasks", "retrieval", "--checkpoint", "latest")
    assert written() != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--split", "val"], "no shards for the split 'val': the recipe has train, test; give --shards PATTERN"),
     (["--checkpoint", "step-9"], "no checkpoint 'step-9'"), (["--shards", "/nowhere/*.tar"], "no shards match"),
     (["--tasks", "retreival"], "did you mean 'retrieval'")],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = evaluate("--model", run, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_that_is_no_run_or_has_none_to_write_to(run, tmp_path):
    assert "neither a run directory nor a checkpoint" in evaluate("--model", tmp_path)[2]
    alone = shutil.copytree(run / "checkpoints" / "step-00000010", tmp_path / "alone")
    assert "give --shards PATTERN" in evaluate("--model", alone)[2]
    assert "--out DIR" in evaluate("--model", alone, "--shards", "x.tar")[2]
    assert "checkpoint already" in evaluate("--model", alone, "--checkpoint", "best")[2]


def evaluate_on_ranks(run: str) -> tuple[int, str, str]:
    return evaluate("--model", run, "--batch-size", "3")


@pytest.mark.two_process
def test_two_processes_write_what_one_writes(run, ranks, tmp_path):
    other = shutil.copytree(run, tmp_path / "on two")
    evaluate("--model", run)
    (code, out, err), (second_code, second_out, second_err) = ranks(2, evaluate_on_ranks, str(other), timeout=120)
    assert (code, second_code, err, second_err) == (0, 0, "", "")
    assert "early->late/cosine" in out and second_out == ""  # the first rank alone speaks
    one, two = (read_embeddings(folder / "evals" / "test") for folder in (run, other))
    assert one.keys == two.keys and one.skipped == two.skipped
    for name in PARTS:
        torch.testing.assert_close(one.z[name], two.z[name], rtol=0, atol=1e-6)
    cards = [json.loads((folder / "evals/test/results.json").read_text()) for folder in (run, other)]
    assert cards[0]["tasks"][0]["protocol"] == cards[1]["tasks"][0]["protocol"]
