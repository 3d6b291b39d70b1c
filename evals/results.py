"""What a task returns, and its two homes: a line of a run's evals.jsonl, and the folder of a final evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..datasets.batch import Skip
from ..datasets.registry import InputError
from .embeddings import EmbeddingSet

SCHEMA = 1
LIBRARIES = ("trivium", "torch", "numpy", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Result:
    """One task's answer for one set of embeddings.

    Attributes:
        task: registered name.
        metrics: numbers by name (`text->video/cosine/R@1`).
        figures: plain data to draw, by figure.
        protocol: what reproduces the numbers: relevance, score, counts, split digest.
        error: what went wrong; then there are no metrics.
    """

    task: str
    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Results(list[Result]):
    """The answers of some tasks for one set of embeddings, in order.

    Attributes:
        skipped: the samples of the split that could not be read, and why; the same on every rank.
    """

    def __init__(self, results: Iterable[Result] = (), skipped: Iterable[Skip] = ()) -> None:
        super().__init__(results)
        self.skipped = tuple(skipped)


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is the better one: ranks and distances, in place of recalls."""
    return metric.rsplit("/", 1)[-1] in ("MedR", "MeanR")


def append_history(run: Path, step: int, split: str, results: Iterable[Result]) -> None:
    """Add one line per task to RUN/evals.jsonl. Main process only."""
    path = Path(run) / "evals.jsonl"
    lines = "".join(f"{_dumps({'step': step, 'split': split, **_line(result)})}\n" for result in results)
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:  # a run killed while writing leaves half a line: close it first
        file.write("\n" * cut + lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none when it is absent. A line cut short by a kill is passed over."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def write_results(
    folder: Path, results: list[Result], embeddings: EmbeddingSet, about: Mapping[str, Any] | None = None
) -> None:
    """Write results.json, results.md, embeddings.safetensors, embeddings.json, skipped.jsonl. Main process only.

    Args:
        folder: made when it is not there; each file is replaced whole (skipped.jsonl is empty when all could be read).
        about: where the numbers come from: model, checkpoint, step, split, command.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "schema": SCHEMA,
        **(about or {}),
        "n": len(embeddings),
        "n_unreadable": len(embeddings.skipped),
        "split_sha256": embeddings.digest(),
        "versions": _versions(),
        "tasks": [_line(result) | {"figures": result.figures} for result in results],
    }
    tensors = {name: x.contiguous() for name, x in embeddings.z.items()}
    tensors |= {f"valid/{name}": x.to(torch.uint8) for name, x in embeddings.valid.items()}
    items = {
        "names": embeddings.names,
        "keys": embeddings.keys,
        "captions": embeddings.captions,
        "bucket": None if embeddings.bucket is None else embeddings.bucket.tolist(),
        "skipped": [vars(skip) for skip in embeddings.skipped],
    }
    write_atomically(folder / "embeddings.safetensors", save(tensors))
    write_atomically(folder / "embeddings.json", _dumps(items).encode())
    write_atomically(folder / "skipped.jsonl", skip_lines(embeddings.skipped, card.get("split")).encode())
    write_atomically(folder / "results.md", _markdown(card).encode())
    write_atomically(folder / "results.json", _dumps(card, indent=1).encode())


def skip_lines(skipped: Iterable[Skip], split: str | None = None) -> str:
    """Unreadable samples as the lines of a skipped.jsonl, with the fields of the one that training writes."""
    return "".join(f"{_dumps({'split': split, **vars(skip)})}\n" for skip in skipped)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The card that `write_results` wrote, or None. InputError when the file is not one."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); delete it and evaluate again") from None
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise InputError(f"{path} has another schema than {SCHEMA}; evaluate again with this version")
    return card


def read_embeddings(folder: Path) -> EmbeddingSet | None:
    """The embeddings that `write_results` wrote, or None."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "embeddings.json").is_file() or not (folder / "embeddings.safetensors").is_file():
        return None
    items = json.loads((folder / "embeddings.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "embeddings.safetensors")
    return EmbeddingSet(
        z={name: tensors[name] for name in items["names"]},
        valid={name: tensors[f"valid/{name}"].bool() for name in items["names"]},
        keys=tuple(items["keys"]),
        captions=tuple(tuple(captions) for captions in items["captions"]),
        bucket=None if items["bucket"] is None else torch.tensor(items["bucket"], dtype=torch.int64),
        skipped=tuple(Skip(**skip) for skip in items["skipped"]),
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file whole: a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def table(task: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one task's metrics as text, for results.md, the terminal and the report.

    Metrics called `<row>/<column>` make one line per row, with its chance level and counts where the protocol has
    them; arrows say which way is better.
    """
    metrics, rows = task["metrics"], task["protocol"].get("rows", {})
    if not rows:
        return ["metric", "value"], [[key, _number(value)] for key, value in metrics.items()]
    columns = list(dict.fromkeys(key.rsplit("/", 1)[1] for key in metrics))
    header = ["query->gallery/score", *(f"{column} {'↓' if lower_is_better(column) else '↑'}" for column in columns)]
    header += ["chance R@1", "queries", "gallery", "missing"]
    lines = []
    for name, row in rows.items():
        numbers = [_number(metrics.get(f"{name}/{column}"), column) for column in columns]
        counts = [str(row[key]) for key in ("n_query", "n_gallery", "n_missing")]
        lines.append([name, *numbers, _number(row["chance"].get("R@1"), "R@1"), *counts])
    return header, lines


def _number(value: float | None, column: str = "") -> str:
    if value is None:
        return "n/a"
    one_digit = abs(value) >= 10 or column.startswith("R@") or lower_is_better(column)
    return f"{value:.1f}" if one_digit else f"{value:.3g}"


def _line(result: Result) -> dict[str, Any]:
    line = {"task": result.task, "metrics": result.metrics, "protocol": result.protocol}
    return line if result.error is None else line | {"error": result.error}


def _markdown(card: Mapping[str, Any]) -> str:
    about = ", ".join(
        f"{key} {card[key]}" for key in ("model", "checkpoint", "step", "split") if card.get(key) is not None
    )
    text = [f"# Evaluation: {about or 'one set of embeddings'}", ""]
    text.append(f"{card['n']} items, {card['n_unreadable']} unreadable, split sha256 {card['split_sha256'][:16]}.")
    for task in card["tasks"]:
        text += ["", f"## {task['task']}", ""]
        if task.get("error"):
            text.append(f"Failed: {task['error']}")
            continue
        protocol = {key: value for key, value in task["protocol"].items() if key not in ("rows", "split_sha256")}
        header, lines = table(task)
        text += ["; ".join(f"{key}: {value}" for key, value in protocol.items()), ""] if protocol else []
        text += [f"| {' | '.join(header)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(header) - 1))}|"]
        text += [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join(text) + "\n"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
