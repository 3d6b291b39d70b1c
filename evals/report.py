"""A run -> report.html: one self-contained file. Several runs -> one comparison.

What a run has not written is named in the report, never invented: it can be written at any moment of a run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import diagnostics
from .charts import Series, categorical, line_chart, scatter, smooth
from .embeddings import EmbeddingSet
from .gallery import gallery
from .record import Record, Row, read_run, rows
from .results import table, write_atomically

LEGEND = 24  # classes named beside a t-SNE


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
        "recall": [chart for chart in [_recall_chart(task), *_evaluation_charts(record)] if chart],
        "gallery": gallery(record, task),
        "curves": _curves(record),
        "space": _space(record.embeddings),
        "geometry": _geometry(record),
        "throughput": _throughput(record),
        "failed": [line for line in record.history + _tasks(record) if line.get("error")],
    }
    path = record.path / "report.html"
    write_atomically(path, _render("report.html", **page).encode())
    return path


def headline(task: dict[str, Any] | None) -> list[Row]:
    """The rows that a reader looks at first: from and to the anchor modality, by cosine and by volume."""
    if task is None:
        return []
    anchor = task["protocol"].get("anchor")
    return [row for row in rows(task) if anchor in (row.query, row.gallery)][:8]


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
    skip = ("rows", "split_sha256", "anchor")
    words = [f"{key}: {value}" for key, value in task["protocol"].items() if key not in skip]
    return "; ".join([*words, f"split sha256 {task['protocol'].get('split_sha256', '')[:12]}"])


def _recall_chart(task: dict[str, Any] | None) -> dict[str, Any] | None:
    """R@k over k of the headline rows."""
    curves = ((task or {}).get("figures") or {}).get("recall") or {}
    names = [row.name for row in headline(task) if row.name in curves]
    series = [Series(pretty(name), curves[name]["k"], curves[name]["recall"], i) for i, name in enumerate(names)]
    return _chart("Recall at k, percent", series, x_label="k", log_x=True, percent=True)


def _chart(title: str, series: Sequence[Series], **options: Any) -> dict[str, Any] | None:
    """A titled chart with its legend; None when there is nothing to draw."""
    svg = line_chart(series, label=title, **options)
    named = [line for line in series if not line.faint]
    return {"title": title, "svg": svg, "legend": named if len(named) > 1 else []} if svg else None


def _curves(record: Record) -> list[dict[str, Any]]:
    """Every logged quantity over the steps, related ones together."""
    charts = [_chart("Loss", _smoothed(record, {"loss": "loss"}))]
    parts = {key: key.removeprefix("loss/") for key in record.keys("loss/")}
    charts.append(_chart("Loss, its parts", _smoothed(record, parts)))
    charts.append(_chart("Throughput, clips per second", _smoothed(record, {"clips_per_second": "clips/s"})))
    seconds = {"step_seconds": "whole step", "data_wait_seconds": "waiting for data"}
    charts.append(_chart("Seconds per step", _plain(record, seconds)))
    for key, title in (("temperature", "Temperature"), ("grad_norm", "Gradient norm"), ("lr", "Learning rate")):
        charts.append(_chart(title, _plain(record, {key: title})))
    families: dict[str, dict[str, str]] = {}
    for key in record.keys("geometry/"):
        family, _, rest = key.removeprefix("geometry/").partition("/")
        families.setdefault(family, {})[key] = rest or "mean"
    charts += [
        _chart(f"Geometry: {family.replace('_', ' ')}", _plain(record, keys)) for family, keys in families.items()
    ]
    return [chart for chart in charts if chart]


def _evaluation_charts(record: Record) -> list[dict[str, Any] | None]:
    """R@1 of the periodic evaluations over the steps, by score, with the chance level."""
    lines = [line for line in record.history if line["task"] == "retrieval" and not line.get("error")]
    if not lines:
        return []
    charts, latest = [], rows(lines[-1])
    for score in dict.fromkeys(row.score for row in latest):
        chosen = [row for row in latest if row.score == score][:8]
        steps = [line["step"] for line in lines]
        series = [
            Series(pretty(row.name, score=False), steps, [line["metrics"].get(f"{row.name}/R@1") for line in lines], i)
            for i, row in enumerate(chosen)
        ]
        level = [chosen[0].chance.get("R@1", 0.0)] * 2
        series.append(Series("chance", [min(steps), max(steps)], level, 7, dashed=True))
        charts.append(_chart(f"R@1 on {lines[-1]['split']} by {score}, percent", series, percent=True))
    return charts


def _plain(record: Record, names: dict[str, str]) -> list[Series]:
    return [Series(name, *record.curve(key), i) for i, (key, name) in enumerate(names.items())]


def _smoothed(record: Record, names: dict[str, str]) -> list[Series]:
    """Raw values behind, their moving average in front; short curves as they are."""
    lines = _plain(record, names)
    if max((len(line.x) for line in lines), default=0) < 30:
        return lines
    faint = [Series(line.name, line.x, line.y, line.colour, faint=True) for line in lines]
    return faint + [Series(line.name, line.x, smooth(line.y), line.colour) for line in lines]


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


def _geometry(record: Record) -> list[tuple[str, str]]:
    task, _ = record.task("geometry")
    if task is None or task.get("error"):
        return []
    return [(key, "n/a" if value is None else f"{value:.4g}") for key, value in task["metrics"].items()]


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


def pretty(name: str, score: bool = True) -> str:
    """`text->video+audio/volume` as a reader's words."""
    pair, _, how = name.partition("/")
    pair = pair.replace("->", " → ").replace("+", " + ")
    return f"{pair}, {how}" if score and how else pair


def duration(seconds: float) -> str:
    """Seconds as 1 h 02 min, 2 min 05 s, or 8.1 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def write_comparison(runs: Sequence[Path], out: Path) -> str:
    """Write an HTML page with the runs side by side, and return the same table as text for the terminal.

    R@1 of every retrieval row by cosine and by volume beside its chance level, training time, throughput, geometry.
    """
    records = [read_run(run) for run in runs]
    titles = [record.name for record in records]
    if len(set(titles)) < len(titles):
        titles = [record.path.name for record in records]
    sections = [("R@1, percent", _compared_recall(records)), ("Run", _compared_runs(records))]
    sections += [("Geometry", _compared_geometry(records))]
    sections = [(title, lines) for title, lines in sections if lines]
    page = {
        "titles": titles,
        "records": records,
        "sections": sections,
        "sources": [r.task("retrieval")[1] for r in records],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _render("comparison.html", **page).encode())
    return _as_text(titles, sections)


Line = tuple[str, list[str], set[int]]  # what, a cell per run and the chance level, the numbers of the best runs


def _compared_recall(records: Sequence[Record]) -> list[Line]:
    found = [{row.name: row for row in rows(record.task("retrieval")[0])} for record in records]
    lines: list[Line] = []
    for name in dict.fromkeys(name for row in found for name in row):
        values = [row[name].metrics.get("R@1") if name in row else None for row in found]
        cells = [_cell(value, ".1f") for value in values]
        top = _cell(max((value for value in values if value is not None), default=None), ".1f")
        best = {i for i, cell in enumerate(cells) if cell == top} if len(set(cells)) > 1 else set()
        level = next(row[name].chance.get("R@1", 0.0) for row in found if name in row)
        lines.append((pretty(name), [*cells, f"{level:.1f}"], best))
    return lines


def _compared_runs(records: Sequence[Record]) -> list[Line]:
    seconds = [record.training_seconds() for record in records]
    lines = [
        ("objective", [record.objective for record in records]),
        ("steps", [_cell(record.metrics[-1]["step"] if record.metrics else None, ",") for record in records]),
        ("training time", ["n/a" if value is None else duration(value) for value in seconds]),
        ("clips per second, median", [_cell(record.median("clips_per_second"), ".1f") for record in records]),
        ("state", [status(record)[1].partition(":")[0] for record in records]),
    ]
    return [(what, [*cells, ""], set()) for what, cells in lines]


def _compared_geometry(records: Sequence[Record]) -> list[Line]:
    found = [(record.task("geometry")[0] or {}).get("metrics", {}) for record in records]
    keys = dict.fromkeys(key for metrics in found for key in metrics)
    return [(key, [*(_cell(metrics.get(key), ".3g") for metrics in found), ""], set()) for key in keys]


def _cell(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _as_text(titles: Sequence[str], sections: Sequence[tuple[str, list[Line]]]) -> str:
    """Columns aligned by spaces; a star marks the best runs of a line."""
    blocks = []
    for title, lines in sections:
        block = [[title, *titles, "chance" if any(cells[-1] for _, cells, _ in lines) else ""]]
        for what, cells, best in lines:
            block.append([what, *(f"{cell}{'*' if i in best else ' '}" for i, cell in enumerate(cells))])
        blocks.append(block)
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
