"""What a run has logged and measured over its steps -> titled charts with legends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .charts import Series, line_chart, smooth
from .record import Record, headline, pretty, rows

Chart = dict[str, Any]  # title, svg, legend


def learning_curves(record: Record) -> list[Chart]:
    """Every logged quantity over the steps, related ones together."""
    charts = [_chart("Loss", _smoothed(record, {"loss": "loss"}))]
    charts += [_chart(title, _smoothed(record, keys)) for title, keys in _objective(record).items()]
    charts.append(_chart("Throughput, clips per second", _smoothed(record, {"clips_per_second": "clips/s"})))
    seconds = {"step_seconds": "whole step", "data_wait_seconds": "waiting for data"}
    charts.append(_chart("Seconds per step", _plain(record, seconds)))
    for key, title in (("grad_norm", "Gradient norm"), ("lr", "Learning rate")):
        charts.append(_chart(title, _plain(record, {key: title})))
    families: dict[str, dict[str, str]] = {}
    for key in record.keys("geometry/"):
        family, _, rest = key.removeprefix("geometry/").partition("/")
        families.setdefault(family, {})[key] = rest or "mean"
    charts += [
        _chart(f"Geometry: {family.replace('_', ' ')}", _plain(record, keys)) for family, keys in families.items()
    ]
    conflicts = {key: key.removeprefix("conflict/").replace(":", " and ") for key in record.keys("conflict/")}
    charts.append(_chart("Conflict of the loss's terms, cosine of their gradients", _plain(record, conflicts)))
    charts.append(_volumes(record))
    return [chart for chart in charts if chart]


def _volumes(record: Record) -> Chart | None:
    """How the volumes of tuples that belong together and of others were spread at the last step that logged them."""
    spread = next((line for line in reversed(record.metrics) if "volumes/matched" in line), {})
    series = []
    for colour, name in enumerate(("matched", "unmatched")):
        shares = spread.get(f"volumes/{name}", [])
        middles = [(i + 0.5) / len(shares) for i in range(len(shares))]
        series.append(Series(name, middles, [100 * share for share in shares], colour))
    title = f"Volumes of tuples at step {spread.get('step')}, percent in each of {len(series[0].x)} bins"
    return _chart(title, series, x_label="volume")


def _objective(record: Record) -> dict[str, dict[str, str]]:
    """What the objective logs, by the title of the chart that it belongs to: names of curves by key.

    Not all of it adds up to the loss: a temperature does not, and a `volume` is a summand of one objective and a mere
    observation of another. The log does not say which, so each kind of quantity has a chart of its own. A kind is what
    is left of `loss/<name>` without the modalities in it, which name the curve: `uniformity/text`, `text-tuple`.
    """
    names = sorted([*map(re.escape, record.config.get("modalities") or {}), "tuple"], key=len, reverse=True)
    modality = re.compile(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)")
    charts: dict[str, dict[str, str]] = {}
    for key in record.keys("loss/"):
        name = key.removeprefix("loss/")
        kind = " ".join(re.findall(r"[^\W_]+", modality.sub("", name)))
        title = f"Objective: {kind}" if kind else "Loss by modality"
        charts.setdefault(title, {})[key] = "-".join(modality.findall(name)) or "whole"
    return charts


def recall_chart(task: dict[str, Any] | None) -> Chart | None:
    """R@k over k of the headline rows."""
    curves = ((task or {}).get("figures") or {}).get("recall") or {}
    names = [row.name for row in headline(task) if row.name in curves]
    series = [Series(pretty(name), curves[name]["k"], curves[name]["recall"], i) for i, name in enumerate(names)]
    return _chart("Recall at k, percent", series, x_label="k", log_x=True, percent=True)


def evaluation_charts(record: Record) -> list[Chart | None]:
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


def _chart(title: str, series: Sequence[Series], **options: Any) -> Chart | None:
    """A titled chart with its legend; None when there is nothing to draw."""
    svg = line_chart(series, label=title, **options)
    named = [line for line in series if not line.faint]
    return {"title": title, "svg": svg, "legend": named if len(named) > 1 else []} if svg else None
