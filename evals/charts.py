"""Charts as inline SVG: no script, no external file, colours by CSS class so that light and dark mode both read.

Series number i is drawn in the colour of the page's CSS variable `--s<i>`, i from 0 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 8, 26
COLOURS = 8
POINTS = 240  # per series: more cannot be told apart at this width


@dataclass(frozen=True)
class Series:
    """One line: `x` and `y` of equal length, y None or non-finite where it has a gap.

    Attributes:
        faint: drawn thin and pale behind the others, without a legend entry (raw values behind a smoothed line).
        dashed: a reference such as the chance level.
        colour: number of its colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    faint: bool = False
    dashed: bool = False


def line_chart(
    series: Sequence[Series], *, label: str, x_label: str = "step", log_x: bool = False, percent: bool = False
) -> str:
    """Lines over a common axis as one <svg>, or "" when no point is finite.

    Args:
        label: what the chart shows, for readers who do not see it.
        log_x: logarithmic horizontal axis; x must be positive.
        percent: the vertical axis goes from 0 to 100.
    """
    lines = [(line, _points(line)) for line in series]
    dots = [dot for _, run in lines for part in run for dot in part]
    if not dots:
        return ""
    xs, ys = [x for x, _ in dots], [y for _, y in dots]
    y_ticks = [0, 25, 50, 75, 100] if percent else ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    up = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    body = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    body += _axes(across, up, _x_ticks(xs, log_x), y_ticks, x_label)
    for line, run in lines:
        body += [_path(line, part, across, up) for part in run]
    return "".join([*body, "</svg>"])


def scatter(points: Sequence[tuple[float, float]], colours: Sequence[str], *, label: str, size: int = 420) -> str:
    """Points in their own units as a square <svg>, one CSS colour each; axes of a projection mean nothing, so none."""
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    half = max(max(xs) - min(xs), max(ys) - min(ys), 1e-9) / 2
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    groups: dict[str, list[str]] = {}
    for (x, y), colour in zip(points, colours, strict=True):
        px = size / 2 + (x - middle_x) / half * (size / 2 - 10)
        py = size / 2 - (y - middle_y) / half * (size / 2 - 10)
        groups.setdefault(colour, []).append(f"M{px:.1f} {py:.1f}h0")
    paths = [f'<path style="stroke:{colour}" d="{"".join(dots)}"/>' for colour, dots in groups.items()]
    box = f'viewBox="0 0 {size} {size}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="scatter" {box}>{"".join(paths)}</svg>'


def smooth(y: Sequence[float | None], share: float = 0.03) -> list[float | None]:
    """Moving average over a window of 2 * `share` of the curve, centred, so that nothing is delayed; gaps stay gaps."""
    reach = max(1, round(share * len(y)))
    finite = [value is not None and math.isfinite(value) for value in y]
    out: list[float | None] = []
    for i in range(len(y)):
        half = min(reach, i, len(y) - 1 - i)
        window = [y[j] for j in range(i - half, i + half + 1) if finite[j]]
        out.append(sum(window) / len(window) if finite[i] else None)
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` steps apart, the first at most `low` and the last at least `high`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def categorical(index: int, total: int) -> str:
    """A colour for class `index` of `total`: a series colour while they last, then hues around the circle."""
    if total <= COLOURS:
        return f"var(--s{index})"
    return f"hsl({360 * index / total:.0f} 62% {(46, 60)[index % 2]}%)"


def number(value: float) -> str:
    """A tick label: few digits, thousands as k."""
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _points(line: Series) -> list[list[tuple[float, float]]]:
    """The finite points, thinned, cut where there is a gap."""
    stride = max(1, math.ceil(len(line.x) / POINTS))
    runs: list[list[tuple[float, float]]] = [[]]
    last = len(line.x) - 1
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if y is None or not math.isfinite(y):
            runs.append([])
        elif i % stride == 0 or i == last:
            runs[-1].append((float(x), float(y)))
    return [run for run in runs if run]


def _path(line: Series, part: list[tuple[float, float]], across, up) -> str:
    kind = "faint" if line.faint else "dashed" if line.dashed else "line"
    d = "".join(f"{'L' if i else 'M'}{across(x):.1f} {up(y):.1f}" for i, (x, y) in enumerate(part))
    name = f"<title>{escape(line.name)}</title>"
    style = f'class="{kind}" style="stroke:var(--s{line.colour % COLOURS})"'
    out = f'<path {style} d="{d}{"h0" if len(part) == 1 else ""}">{name}</path>'
    if line.faint or line.dashed or len(part) > 24:
        return out
    dots = "".join(
        f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.2">'
        f"<title>{escape(line.name)}: {y:.4g} at {x:g}</title></circle>"
        for x, y in part
    )
    return f'{out}<g style="fill:var(--s{line.colour % COLOURS})">{dots}</g>'


def _axes(across, up, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> list[str]:
    out = []
    for y in y_ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{up(y) + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        out.append(f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{number(x)}</text>')
    out.append(f'<text class="tick" x="{LEFT - 8}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    return out


def _x_ticks(xs: Sequence[float], log: bool) -> list[float]:
    low, high = min(xs), max(xs)
    if log:
        return [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= k <= high]
    inside = [x for x in ticks(low, high, 5) if low <= x <= high] if low < high else [low]
    return [x for x in inside if x > low + 0.03 * (high - low)] or inside  # the axis label stands at the left end


def _scale(low: float, high: float, start: float, end: float, log: bool = False):
    f = math.log if log else float
    low, high = f(low), f(high)
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (f(value) - low) / (high - low) * (end - start)
