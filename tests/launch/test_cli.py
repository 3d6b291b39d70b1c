"""The console script: what it answers, with which exit code, and that it starts without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trivium.datasets.registry import SOURCES, InputError
from trivium.launch.cli import main

HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "numpy", "trivium.pretrain"}
Answer = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Answer]


@pytest.fixture
def trivium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `trivium WORDS...` in this process."""

    def run(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["trivium", *words])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Pebbles:
    """Clips of pebbles.

    Args:
        count: how many.
    """

    def __init__(self, *, count: int = 3, label: str = "stone", sizes: list[int] | None = None, wet: bool = False):
        self.card = {"count": count, "label": label, "sizes": sizes, "wet": wet}

    def prepare(self, out: Path) -> dict[str, object]:
        return {"folder": str(out), "splits": {"train": {"clips": 2}, "val": {"clips": 1}}, **self.card}


@pytest.fixture
def pebbles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source called `pebbles`, for one test."""
    SOURCES.names()
    monkeypatch.setitem(SOURCES._classes, "pebbles", Pebbles)


@pytest.mark.parametrize("words", [["--help"], ["prepare", "--help"], ["check", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = f"""
import sys
from trivium.launch.cli import main
sys.argv = ["trivium", *{words!r}]
try:
    main()
except SystemExit as exit:
    assert not exit.code
print("heavy:", *sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_help_names_every_command_with_an_example(trivium: Run) -> None:
    overview = trivium("--help")[1]
    for command in ("prepare", "check", "recipes", "objectives", "towers", "tasks", "sources", "report", "compare"):
        assert f"\n  {command} " in overview
        assert f"\n      trivium {command} " in trivium(command, "--help")[1]


def test_version(trivium: Run) -> None:
    from importlib.metadata import version

    expected = (0, f"trivium {version('trivium')}\n", "")
    assert trivium("version") == trivium("--version") == expected


def test_an_unknown_command_answers_with_the_nearest(trivium: Run) -> None:
    code, _, error = trivium("reprot")
    assert code == 2
    assert "report" in error


@pytest.mark.parametrize(
    ("command", "entry", "misspelt"),
    [
        ("objectives", "unialign", "unialgin"),
        ("towers", "bert", "bart"),
        ("tasks", "retrieval", "retreival"),
        ("sources", "moving-digits", "moving-digit"),
        ("recipes", "demo", "dem"),
    ],
)
def test_lists(trivium: Run, command: str, entry: str, misspelt: str) -> None:
    code, text, _ = trivium(command)
    assert code == 0
    line = next(line for line in text.splitlines() if line.split()[0] == entry)
    assert len(line.split()) > 3, "every entry says in a line what it is"
    code, text, _ = trivium(command, entry)
    assert code == 0
    assert len(text.splitlines()) > 3
    code, text, error = trivium(command, misspelt)
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert f"did you mean '{entry}'" in error
    assert error.count("\n") == 1


def test_a_recipe_is_printed_as_it_is(trivium: Run) -> None:
    from trivium.pretrain.config import recipes

    assert trivium("recipes", "demo")[1] == recipes()["demo"].read_text()


def test_the_page_of_an_entry(trivium: Run, pebbles: None) -> None:
    code, text, _ = trivium("sources", "pebbles")
    assert code == 0
    assert [line.split() for line in text.splitlines()[3:7]] == [
        ["count", "int", "=", "3"],
        ["label", "str", "=", "'stone'"],
        ["sizes", "list[int]", "|", "None", "=", "None"],
        ["wet", "bool", "=", "False"],
    ]
    assert "Clips of pebbles." in text
    assert text == trivium("prepare", "pebbles", "--help")[1]


def test_prepare_passes_the_options_on(trivium: Run, pebbles: None, tmp_path: Path) -> None:
    code, text, _ = trivium("prepare", "pebbles", "--out", str(tmp_path), "--count", "7", "label=007", "--wet")
    assert code == 0
    assert yaml.safe_load(text) == {
        "folder": str(tmp_path),
        "splits": {"train": {"clips": 2}, "val": {"clips": 1}},
        "count": 7,
        "label": "007",
        "sizes": None,
        "wet": True,
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["prepare"], "needs the name of a source"),
        (["prepare", "pebbles"], "add --out"),
        (["prepare", "pebble", "--out", "x"], "did you mean 'pebbles'"),
        (["prepare", "pebbles", "--out", "x", "--cuont", "3"], "did you mean 'count'"),
        (["prepare", "pebbles", "--out", "x", "--count", "many"], "count='many'"),
        (["prepare", "pebbles", "--out", "x", "3"], "'3' belongs to no option"),
    ],
)
def test_prepare_answers_a_mistake(trivium: Run, pebbles: None, words: list[str], reason: str) -> None:
    code, text, error = trivium(*words)
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error


def test_check(trivium: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from trivium.pretrain import preflight

    def accept(recipe: str, overrides: list[str]) -> dict[str, dict[str, int]]:
        assert (recipe, overrides) == ("demo", ["objective=gram", "train.lr=-1"])
        return {"train": {"clips": 6000}}

    monkeypatch.setattr(preflight, "check", accept)
    expected = "ok: demo objective=gram train.lr=-1\ntrain: {clips: 6000}\n"
    assert trivium("check", "demo", "objective=gram", "train.lr=-1") == (0, expected, "")

    def refuse(recipe: str, overrides: list[str]) -> None:
        raise InputError(f"no recipe is called {recipe!r}")

    monkeypatch.setattr(preflight, "check", refuse)
    assert trivium("check", "demmo") == (2, "", "error: no recipe is called 'demmo'\n")


def test_report_and_compare(trivium: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from trivium.evals import report

    asked = []
    monkeypatch.setattr(report, "write_report", lambda run: run / "report.html")
    monkeypatch.setattr(report, "write_comparison", lambda runs, out: asked.append((runs, out)) or "the table")
    assert trivium("report", "runs/a") == (0, "runs/a/report.html\n", "")
    assert trivium("compare", "runs/a", "runs/b") == (0, "the table\n\nwritten to runs/comparison.html\n", "")
    assert trivium("compare", "runs/a", "--out", "x.html")[0] == 0
    runs = [Path("runs/a"), Path("runs/b")]
    assert asked == [(runs, Path("runs/comparison.html")), (runs[:1], Path("x.html"))]


def test_eval_becomes_the_evaluation_program() -> None:
    script = "import sys; sys.argv = ['trivium', 'eval', '--help']; from trivium.launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
