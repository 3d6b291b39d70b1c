"""A run directory, read back: whatever is there, however far the run got."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..datasets.registry import InputError
from .embeddings import EmbeddingSet
from .results import read_embeddings, read_lines, read_results


@dataclass(frozen=True)
class Row:
    """One line of a retrieval table: a query, a gallery, a score.

    Attributes:
        name: `text->video/cosine`.
        metrics: `R@1` and the like, of this row.
        chance: the chance level of each R@k.
        counts: n_query, n_gallery, n_missing.
    """

    name: str
    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, int]

    @property
    def query(self) -> str:
        return self.name.split("/")[0].split("->")[0]

    @property
    def gallery(self) -> str:
        return self.name.split("/")[0].split("->")[1]

    @property
    def score(self) -> str:
        return self.name.split("/")[1]


@dataclass(frozen=True)
class Record:
    """What a run wrote; empty or None where it has not (yet).

    Attributes:
        config, environment, ending: config.yaml, environment.json, exit.json.
        metrics: the logged steps in order, each once.
        history: the periodic evaluations in order, each (step, split, task) once.
        skipped: the samples that could not be read, in training or in an evaluation, each once.
        split: the name of the final evaluation's split.
        card, embeddings: what the final evaluation wrote.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    ending: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    history: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    split: str | None
    card: dict[str, Any] | None
    embeddings: EmbeddingSet | None

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    @property
    def objective(self) -> str:
        objective = self.config.get("objective")
        return str(objective.get("name") if isinstance(objective, Mapping) else objective or "unknown objective")

    def curve(self, key: str) -> tuple[list[float], list[float | None]]:
        """Steps and values of one logged quantity."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def keys(self, prefix: str) -> list[str]:
        """The logged quantities whose name starts so, in order of appearance."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(prefix)))

    def median(self, key: str) -> float | None:
        values = [value for value in self.curve(key)[1] if isinstance(value, int | float)]
        return statistics.median(values) if values else None

    def training_seconds(self) -> float | None:
        """Time spent in steps: each logged line's seconds a step, times the steps since the line before."""
        steps, seconds = self.curve("step_seconds")
        if not steps:
            return None
        gaps = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
        return sum(gap * (value or 0.0) for gap, value in zip(gaps, seconds, strict=True))

    def task(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """A task of the final evaluation, else of the last periodic one; and where it is from."""
        for task in (self.card or {}).get("tasks", []):
            if task["task"] == name:
                return task, f"{self.split} split, final evaluation"
        for line in reversed(self.history):
            if line["task"] == name:
                return line, f"{line['split']} split at step {line['step']}"
        return None, "not evaluated yet"


def read_run(run: Path) -> Record:
    """Read a run directory. InputError when there is no such folder, or when it is none of ours."""
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"no run directory {str(run)!r}; give the folder that a training run wrote")
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "evals.jsonl", "exit.json", "evals")):
        raise InputError(f"{str(run)!r} is no run directory: it has no config.yaml; give the folder that a run wrote")
    split = final_split(run)
    folder = run / "evals" / split if split else None
    steps = {line["step"]: line for line in read_lines(run / "metrics.jsonl") if "step" in line}
    evaluations = {
        (line["step"], line["split"], line["task"]): line
        for line in read_lines(run / "evals.jsonl")
        if {"step", "split", "task"} <= line.keys()
    }
    return Record(
        path=run,
        config=read_config(run),
        environment=_json(run / "environment.json") or {},
        ending=_json(run / "exit.json"),
        metrics=[steps[step] for step in sorted(steps)],
        history=sorted(evaluations.values(), key=lambda line: line["step"]),
        skipped=_skipped(run),
        split=split,
        card=read_results(folder) if folder else None,
        embeddings=read_embeddings(folder) if folder else None,
    )


def _skipped(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's skipped.jsonl and of its final evaluations', each sample of a split once."""
    paths = [run / "skipped.jsonl", *sorted((run / "evals").glob("*/skipped.jsonl"))]
    lines = [line for path in paths for line in read_lines(path)]
    return list({(line.get("split"), line.get("position"), line.get("key")): line for line in lines}.values())


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml as plain data; {} when the run has none."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}; restore the file") from None
    return config if isinstance(config, dict) else {}


def final_split(run: Path) -> str | None:
    """The split of the final evaluation to show: test when it was evaluated, else the first other one."""
    done = sorted(path.parent.name for path in (Path(run) / "evals").glob("*/results.json"))
    return "test" if "test" in done else done[0] if done else None


def rows(task: Mapping[str, Any] | None) -> list[Row]:
    """A retrieval result's table; [] when there is none or it failed."""
    if task is None or task.get("error"):
        return []
    out = []
    for name, row in task["protocol"].get("rows", {}).items():
        metrics = {key.rsplit("/", 1)[1]: value for key, value in task["metrics"].items() if key.startswith(f"{name}/")}
        counts = {key: row[key] for key in ("n_query", "n_gallery", "n_missing")}
        out.append(Row(name, metrics, row["chance"], counts))
    return out


def headline(task: dict[str, Any] | None) -> list[Row]:
    """The rows that a reader looks at first: from and to the anchor modality, by cosine and by volume."""
    if task is None:
        return []
    anchor = task["protocol"].get("anchor")
    return [row for row in rows(task) if anchor in (row.query, row.gallery)][:8]


def pretty(name: str, score: bool = True) -> str:
    """`text->video+audio/volume` as a reader's words."""
    pair, _, how = name.partition("/")
    pair = pair.replace("->", " → ").replace("+", " + ")
    return f"{pair}, {how}" if score and how else pair


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {"unreadable": f"{path.name} is not JSON"}
    return value if isinstance(value, dict) else {"value": value}
