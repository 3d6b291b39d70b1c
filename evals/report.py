"""A run -> report.html: one self-contained file. Several runs -> one comparison.

What a run has not written is named in the report, never invented: it can be written at any moment of a run.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..objectives.geometry import geometry
from . import diagnostics
from .charts import categorical, scatter
from .curves import evaluation_charts, learning_curves, recall_chart
from .embeddings import EmbeddingSet
from .gallery import gallery
from .record import Record, Row, headline, pretty, read_run, rows
from .results import table, write_atomically

LEGEND = 24  # classes named beside a t-SNE
TAU = inspect.signature(geometry).parameters["tau"].default  # of the geometry that training logs


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run directory holds, and return its path.

    One file with styles, charts and frames inside; it loads nothing and runs no script. InputError when `run` is no run
    directory.
    """
    record = read_run(run)
    task, source = record.task("retrieval")
    page = {
        "record": record,
        "status": status(record),
        "facts": _facts(record),
        "source": source,
        "task": task,
        "protocol": _protocol(task),
        "cards": [_card(row) for row in headline(task)],
        "table": table(task) if rows(task) else None,
        "recall": [chart for chart in [recall_chart(task), *evaluation_charts(record)] if chart],
        "gallery": gallery(record, task),
        "curves": learning_curves(record),
        "space": _space(record.embeddings),
        "geometry": _geometry(record),
        "curves_note": _tau_note(TAU) if record.keys("geometry/") else "",
        "skip_keys": list(dict.fromkeys(key for line in record.skipped for key in line)),
        "throughput": _throughput(record),
        "failed": [line for line in record.history + _tasks(record) if line.get("error")],
    }
    path = record.path / "report.html"
    write_atomically(path, _render("report.html", **page).encode())
    return path


def status(record: Record) -> tuple[str, str]:
    """How the run ended: a kind ("good", "bad", "open") and words."""
    ending = record.ending
    if ending is None:
        return "open", "running, or killed before it could say why"
    outcome, error, code = (ending.get(key) for key in ("outcome", "error", "exit_code"))
    if outcome == "finished":
        return "good", "finished"
    if error or code:
        return "bad", f"failed{f' with exit code {code}' if code else ''}{f': {error}' if error else ''}"
    return "open", str(outcome or "ended without saying how")


def wilson(percent: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share in percent measured on n independent trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 100.0
    p, square = percent / 100, z * z / n
    middle = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def _facts(record: Record) -> list[tuple[str, str]]:
    """The line under the title: what was trained, for how long, on what."""
    config, facts = record.config, [("objective", record.objective)]
    if config.get("modalities"):
        facts.append(("modalities", ", ".join(config["modalities"])))
    steps = (config.get("train") or {}).get("steps")
    done = record.metrics[-1]["step"] if record.metrics else 0
    facts.append(("steps", f"{done:,} of {steps:,}" if steps else f"{done:,}"))
    if record.metrics and record.metrics[-1].get("samples"):
        facts.append(("clips seen", f"{record.metrics[-1]['samples']:,}"))
    if (seconds := record.training_seconds()) is not None:
        facts.append(("training time", duration(seconds)))
    if "seed" in config:
        facts.append(("seed", str(config["seed"])))
    return facts


def _card(row: Row) -> dict[str, Any]:
    value, low_chance = row.metrics.get("R@1", 0.0), row.chance.get("R@1", 0.0)
    low, high = wilson(value, row.counts["n_query"])
    others = [(key, number) for key, number in row.metrics.items() if key != "R@1"]
    return {"row": row, "value": value, "chance": low_chance, "low": low, "high": high, "others": others}


def _protocol(task: dict[str, Any] | None) -> str:
    if task is None or task.get("error"):
        return ""
    skip = ("rows", "split_sha256", "anchor", "n_items", "n_unreadable")
    words = [
        f"{task['protocol'][f'n_{what}']} {what}" for what in ("items", "unreadable") if f"n_{what}" in task["protocol"]
    ]
    words += [f"{key}: {value}" for key, value in task["protocol"].items() if key not in skip]
    return "; ".join([*words, f"split sha256 {task['protocol'].get('split_sha256', '')[:12]}"])


def _space(embeddings: EmbeddingSet | None) -> list[dict[str, Any]]:
    """The t-SNE of the evaluated split, coloured by modality and by class."""
    projection = diagnostics.tsne(embeddings) if embeddings is not None and len(embeddings) else None
    if projection is None:
        return []
    points = [tuple(point) for point in projection.xy.tolist()]
    names = list(dict.fromkeys(projection.modality))
    colours = [categorical(names.index(name), len(names)) for name in projection.modality]
    legend = [(name, categorical(i, len(names))) for i, name in enumerate(names)]
    pictures = [{"title": "by modality", "svg": scatter(points, colours, label="t-SNE by modality"), "legend": legend}]
    if embeddings.bucket is None:
        return pictures
    bucket = embeddings.bucket[projection.item].tolist()
    classes = sorted(set(bucket))
    hues = {label: categorical(i, len(classes)) for i, label in enumerate(classes)}
    legend = [(class_name(embeddings, label), hues[label]) for label in classes] if len(classes) <= LEGEND else []
    svg = scatter(points, [hues[label] for label in bucket], label="t-SNE by class")
    return [*pictures, {"title": f"by class ({len(classes)} buckets)", "svg": svg, "legend": legend}]


def class_name(embeddings: EmbeddingSet, bucket: int) -> str:
    """A bucket in words: its commonest caption, the shortest one when several are."""
    members = (embeddings.bucket == bucket).nonzero().flatten().tolist()
    counts = Counter(caption for i in members for caption in embeddings.captions[i])
    if bucket < 0 or not counts:
        return "no bucket" if bucket < 0 else f"bucket {bucket}"
    return min(counts, key=lambda caption: (-counts[caption], len(caption), caption))


def _geometry(record: Record) -> tuple[list[tuple[str, str]], str]:
    """The numbers, those of one measure together; and what they were measured on and how."""
    task, source = record.task("geometry")
    if task is None or task.get("error"):
        return [], ""
    metrics, protocol = {key: task["metrics"][key] for key in _grouped(task["metrics"])}, task["protocol"]
    about = [f"{protocol['n']:,} items"]
    if "n_missing" in protocol:
        missing = ", ".join(f"{count} {name}" for name, count in protocol["n_missing"].items() if count)
        about.append(f"{missing or 'none'} missing")
    about = f"{', '.join([*about, source])}. {_tau_note(protocol['tau'])}"
    return [(key, "n/a" if value is None else f"{value:.4g}") for key, value in metrics.items()], about


def _grouped(keys: Iterable[str]) -> list[str]:
    """The keys in order, but those of one measure (`gap/text-video`, `gap/text-audio`) together."""
    keys = list(keys)
    measures = list(dict.fromkeys(key.split("/")[0] for key in keys))
    return sorted(keys, key=lambda key: measures.index(key.split("/")[0]))


def _tau_note(tau: float) -> str:
    return f"zeta, chi and Hölder divergence are taken at tau = {tau:g}, whatever temperature the objective has."


def _throughput(record: Record) -> list[tuple[str, str]]:
    out = []
    for key, words, digits in (
        ("clips_per_second", "clips per second, median", 1),
        ("step_seconds", "seconds per step, median", 3),
    ):
        if (value := record.median(key)) is not None:
            out.append((words, f"{value:,.{digits}f}"))
    wait, step = record.median("data_wait_seconds"), record.median("step_seconds")
    if wait is not None and step:
        out.append(("share of a step spent waiting for data", f"{100 * wait / step:.1f} %"))
    if (seconds := record.training_seconds()) is not None:
        out.append(("time in training steps", duration(seconds)))
    return out


def _tasks(record: Record) -> list[dict[str, Any]]:
    return [{**task, "split": record.split, "step": None} for task in (record.card or {}).get("tasks", [])]


def duration(seconds: float) -> str:
    """Seconds as 1 h 02 min, 2 min 05 s, or 8.1 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def write_comparison(runs: Sequence[Path], out: Path) -> str:
    """Write an HTML page with the runs side by side, and return the same table as text for the terminal.

    R@1 of every retrieval row by cosine and by volume beside its chance level and counts, what it was measured on,
    training time, throughput, geometry.
    """
    records = [read_run(run) for run in runs]
    titles = [record.name for record in records]
    if len(set(titles)) < len(titles):
        titles = [record.path.name for record in records]
    sections = [
        Section("R@1, percent", _compared_recall(records), ("chance", "queries / gallery / missing")),
        Section("Evaluation", _compared_evaluations(records)),
        Section("Run", _compared_runs(records)),
        Section("Geometry", _compared_geometry(records)),
    ]
    sections = [section for section in sections if section.lines]
    page = {"titles": titles, "sections": sections, "sources": [r.task("retrieval")[1] for r in records]}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _render("comparison.html", **page).encode())
    return _as_text(titles, sections)


class Line(NamedTuple):
    """A line of a comparison: what, a cell per run, the numbers of the best runs, cells that hold for all runs."""

    what: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    common: tuple[str, ...] = ()


class Section(NamedTuple):
    """Lines under a title; `common` names the columns that hold for all runs."""

    title: str
    lines: list[Line]
    common: tuple[str, ...] = ()


def _compared_recall(records: Sequence[Record]) -> list[Line]:
    found = [{row.name: row for row in rows(record.task("retrieval")[0])} for record in records]
    lines: list[Line] = []
    for name in dict.fromkeys(name for row in found for name in row):
        values = [row[name].metrics.get("R@1") if name in row else None for row in found]
        cells = [_cell(value, ".1f") for value in values]
        top = _cell(max((value for value in values if value is not None), default=None), ".1f")
        best = frozenset(i for i, cell in enumerate(cells) if cell == top) if len(set(cells)) > 1 else frozenset()
        measured = [row[name] for row in found if name in row]
        levels = [_cell(row.chance.get("R@1", 0.0), ".1f") for row in measured]
        counts = [" / ".join(str(count) for count in row.counts.values()) for row in measured]
        lines.append(Line(pretty(name), cells, best, (_agreed(levels), _agreed(counts))))
    return lines


def _agreed(cells: Sequence[str]) -> str:
    """What all runs have in common; where they differ, each run's."""
    return cells[0] if len(set(cells)) == 1 else "; ".join(cells)


def _compared_evaluations(records: Sequence[Record]) -> list[Line]:
    """What tells whether the numbers may be compared: the same split, the same idea of a hit."""
    protocols = [(record.task("retrieval")[0] or {}).get("protocol", {}) for record in records]
    lines = [
        Line("measured on", [record.task("retrieval")[1].split(",")[0] for record in records]),
        Line("items, unreadable", [_pair(protocol, "n_items", "n_unreadable") for protocol in protocols]),
        Line("a hit is the same", [str(protocol.get("relevance", "n/a")) for protocol in protocols]),
        Line("split sha256", [protocol.get("split_sha256", "n/a")[:12] for protocol in protocols]),
    ]
    return lines if any(protocols) else []


def _pair(protocol: dict[str, Any], *keys: str) -> str:
    return ", ".join(_cell(protocol.get(key), ",") for key in keys)


def _compared_runs(records: Sequence[Record]) -> list[Line]:
    seconds = [record.training_seconds() for record in records]
    lines = [
        ("objective", [record.objective for record in records]),
        ("steps", [_cell(record.metrics[-1]["step"] if record.metrics else None, ",") for record in records]),
        ("training time", ["n/a" if value is None else duration(value) for value in seconds]),
        ("clips per second, median", [_cell(record.median("clips_per_second"), ".1f") for record in records]),
        ("state", [status(record)[1].partition(":")[0] for record in records]),
    ]
    return [Line(what, cells) for what, cells in lines]


def _compared_geometry(records: Sequence[Record]) -> list[Line]:
    tasks = [record.task("geometry")[0] or {} for record in records]
    found = [task.get("metrics", {}) for task in tasks]
    keys = _grouped(dict.fromkeys(key for metrics in found for key in metrics))
    if not keys:
        return []
    taus = [_cell(task.get("protocol", {}).get("tau"), "g") for task in tasks]
    lines = [Line(key, [_cell(metrics.get(key), ".3g") for metrics in found]) for key in keys]
    return [*lines, Line("tau of zeta, chi, Hölder divergence", taus)]


def _cell(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _as_text(titles: Sequence[str], sections: Sequence[Section]) -> str:
    """Columns aligned by spaces; a star marks the best runs of a line."""
    blocks = []
    most = max((len(section.common) for section in sections), default=0)
    for section in sections:
        block = [[section.title, *titles, *section.common]]
        for line in section.lines:
            cells = [f"{cell}{'*' if i in line.best else ' '}" for i, cell in enumerate(line.cells)]
            block.append([line.what, *cells, *line.common])
        blocks.append([line + [""] * (most - len(section.common)) for line in block])
    widths = [max(map(len, column)) for column in zip(*(line for block in blocks for line in block), strict=True)]

    def aligned(line: list[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([line[0].ljust(len(first)), *others]).rstrip()

    return "\n\n".join("\n".join(map(aligned, block)) for block in blocks)


def _render(name: str, **page: Any) -> str:
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["pretty"] = pretty
    environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return environment.get_template(name).render(**page)
