"""A user's mistakes: each one line with value, rule and remedy, by `trivium check` and by the run itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from trivium.pretrain.cli import main


def answers(recipe: str, overrides: list[str]) -> dict[str, tuple[int, str]]:
    """Exit code and last line on stderr of `trivium check` and of the run."""
    from trivium.launch.cli import main as trivium

    found = {}
    for name, start in (("check", trivium), ("run", lambda: sys.exit(main([recipe, *overrides])))):
        sys.argv = ["trivium", "check", recipe, *overrides]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                start()
                code = 0
            except SystemExit as ending:
                code = ending.code or 0
        found[name] = (code, said.getvalue().strip().splitlines()[-1] if said.getvalue().strip() else "")
    return found


def assert_refused(ranks, recipe: Path, overrides: list[str], words: list[str]) -> None:
    for name, (code, line) in ranks(1, answers, str(recipe), overrides)[0].items():
        assert code == 2, (name, code, line)
        assert line.startswith("error: ") and all(word in line for word in words), (name, line)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.train=nowhere/train-*.tar"], ["nowhere/train-*.tar"]),
        (["train.batch_size=65"], ["batch_size=65", "64", "use at most"]),
        (["objective=unialing"], ["unialing", "'unialign'"]),
        (["objective.temprature=0.1"], ["temprature", "'temperature'"]),
        (["objective.temperature=hot"], ["temperature", "hot"]),
        (["objective.anchor=tekst"], ["tekst", "text"]),
        (["modalities.video.tower.name=eva_klip"], ["modalities.video.tower", "eva_klip", "'eva_clip'"]),
        (["modalities.video.tower.patches=8"], ["patches", "'patch'"]),
        (["train.stepps=3"], ["train.stepps", "'steps'"]),
        (["evals.tasks={retrival: {}}"], ["retrival", "'retrieval'"]),
        (["data.decoder=ffmpeg"], ["ffmpeg", "pyav"]),
        (["init_from=nowhere.safetensors"], ["nowhere.safetensors", "does not exist"]),
        (["run=/proc/trivium"], ["/proc", "not", "run="]),
        (["train.batch_size=1"], ["train.batch_size=1", "greater than 1"]),
        (["train.groups=[{match: 'a('}]"], ["train.groups.0.match='a('", "no regular expression"]),
        (["train.groups=[{match: nothing.like.it}]"], ["nothing.like.it", "names look like"]),
        (["evals.best=retrieval/text->vidio/cosine/R@1"], ["text->vidio", "'retrieval/text->video/cosine/R@1'"]),
    ],
)
def test_a_mistake_is_one_line(ranks, recipe, overrides, words):
    assert_refused(ranks, recipe, overrides, words)


def without(part: str, source: Path, folder: Path) -> None:
    """Copy a shard set, leaving one kind of part out."""
    folder.mkdir()
    for shard in source.glob("*.tar"):
        with tarfile.open(shard) as old, tarfile.open(folder / shard.name, "w") as new:
            for member in old:
                if not member.name.endswith(part):
                    new.addfile(member, old.extractfile(member))


def test_a_source_without_a_wanted_modality(ranks, recipe, digits, tmp_path):
    without(".mp4", digits, tmp_path / "mute")
    assert_refused(ranks, recipe, [f"data.train={tmp_path / 'mute'}/train-*.tar"], ["no sample of", "data.fields"])


def test_a_run_directory_of_another_model(ranks, recipe):
    code, _ = ranks(1, answers, str(recipe), ["train.steps=1"], timeout=240)[0]["run"]
    assert code == 0
    assert_refused(ranks, recipe, ["train.steps=1", "dim=16"], ["dim=8", "16", "run="])
    assert_refused(ranks, recipe, ["train.steps=1", "objective=gram"], ["objective.name='infonce'", "'gram'"])


@pytest.mark.parametrize(
    "override, word",
    [("train.batch_size=100", "100"), ("train.stepps=3", "stepps"), ("objective=unialing", "unialing")],
)
def test_a_refused_run_says_so_in_its_directory(ranks, recipe, tmp_path, override, word):
    assert_refused(ranks, recipe, [override], [word])
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["outcome"] == "failed" and ending["exit_code"] == 2 and word in ending["error"]
    assert (tmp_path / "run" / "log.txt").read_text().strip().splitlines()[-1] == f"error: {ending['error']}"


@pytest.mark.two_process
def test_below_a_launcher_the_directory_keeps_our_line_and_exit_code(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "trivium.pretrain", str(recipe), "objective=unialing"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("error: no objective is called 'unialing'") == 1
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["exit_code"] == 2 and "did you mean 'unialign'" in ending["error"]
    assert (tmp_path / "run" / "log.txt").read_text() == f"error: {ending['error']}\n"


def test_a_refused_start_leaves_the_records_of_a_finished_run(ranks, recipe, tmp_path):
    assert ranks(1, answers, str(recipe), ["train.steps=1"], timeout=240)[0]["run"][0] == 0
    before = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.suffix in (".json", ".txt")}
    assert_refused(ranks, recipe, ["train.steps=1", "dim=16"], ["dim=8"])
    assert_refused(ranks, recipe, ["train.steps=1", "data.decoder=ffmpeg"], ["ffmpeg"])
    after = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.suffix in (".json", ".txt")}
    assert after == before and json.loads(after["exit.json"])["outcome"] == "finished"


def test_a_run_does_not_go_on_with_other_data(ranks, recipe, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    settings = [f"data.train={tmp_path}/data/train-*.tar"]
    assert ranks(1, answers, str(recipe), [*settings, "train.steps=2"])[0]["run"][0] == 0
    shutil.copy(next((tmp_path / "data").glob("val-*.tar")), tmp_path / "data" / "train-999999.tar")
    assert_refused(ranks, recipe, [*settings, "train.steps=2"], ["step 2", "other data", "init_from="])


def spoil(source: Path, folder: Path, clips: int, share: tuple[float, float] = (0, 1)) -> list[str]:
    """Copy a shard set with zeros in a share of the first mp4s, by default in all of them; their keys."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz"))
    shard = sorted(folder.glob("train-*.tar"))[0]
    with tarfile.open(shard) as tar:
        victims = [member for member in tar if member.name.endswith(".mp4")][:clips]
    with shard.open("r+b") as file:
        for member in victims:
            start, stop = (int(edge * member.size) for edge in share)
            file.seek(member.offset_data + start)
            file.write(b"\x00" * (stop - start))
    return [Path(member.name).stem for member in victims]


def test_a_corrupt_clip_is_replaced_and_named(ranks, recipe, digits, tmp_path):
    keys = spoil(digits, tmp_path / "data", 1)
    code, _ = ranks(1, answers, str(recipe), [f"data.train={tmp_path}/data/train-*.tar", "data.corrupt_share=0.5"])[0][
        "run"
    ]
    assert code == 0
    seen = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {skip["key"] for skip in seen} == set(keys) and all(skip["reason"] and skip["shard"] for skip in seen)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == len(seen) == len({skip["position"] for skip in seen})


def test_too_many_corrupt_clips_stop_the_run(ranks, recipe, digits, tmp_path):
    spoil(digits, tmp_path / "data", 8)
    settings = [f"data.train={tmp_path}/data/train-*.tar"]
    assert_refused(ranks, recipe, settings, ["8 of the 64 samples", "cannot be read", "corrupt_share=0.01"])


def test_too_many_clips_that_only_decoding_finds_corrupt_stop_the_run(ranks, recipe, digits, tmp_path):
    spoil(digits, tmp_path / "data", 8, share=(0.2, 0.5))  # pictures and sound, not the index of the film
    found = ranks(1, answers, str(recipe), [f"data.train={tmp_path}/data/train-*.tar", "log.every=100"])[0]
    assert found["check"][0] == 0, "the headers are whole"
    code, line = found["run"]
    assert code == 2 and "corrupt_share=0.01" in line and "skipped.jsonl" in line, line
    seen = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(seen) >= 2 and all(skip["split"] == "train" for skip in seen)
