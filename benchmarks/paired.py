"""Two things timed in turns, so that whatever slows the machine slows both; and how the numbers are shown."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """One run: elapsed time, and processor time of this process, all threads."""

    wall: float
    cpu: float


class Pair(NamedTuple):
    """Equally many runs of Trivium and of its peer; the i-th of each were neighbours."""

    peer: list[Seconds]
    ours: list[Seconds]

    def peer_ms(self) -> str:
        """Median elapsed time in milliseconds."""
        return _milliseconds(self.peer)

    def our_ms(self) -> str:
        """Median elapsed time in milliseconds."""
        return _milliseconds(self.ours)

    def ratio(self, clock: str = "wall") -> float:
        """Median of ours / median of the peer, by "wall" or "cpu" time: below 1, ours is faster."""
        ours, peer = (median(getattr(run, clock) for run in runs) for runs in (self.ours, self.peer))
        return ours / peer

    def range(self) -> str:
        """Smallest and largest ratio of two neighbours."""
        ratios = [ours.wall / peer.wall for ours, peer in zip(self.ours, self.peer, strict=True)]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"


def alternate(peer: Callable[[], object], ours: Callable[[], object], repeats: int) -> Pair:
    """Run both in turns, `repeats` times each, after one untimed run each; the one that goes first changes."""
    peer(), ours()
    runs: dict[Callable, list[Seconds]] = {peer: [], ours: []}
    for repeat in range(repeats):
        for side in (peer, ours) if repeat % 2 == 0 else (ours, peer):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            runs[side].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return Pair(runs[peer], runs[ours])


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse takes its types."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def listed(kind: Callable[[str], object]) -> Callable[[str], list]:
    """`kind,kind,...`, as argparse takes its types."""
    return lambda text: [kind(part) for part in text.split(",")]


def machine() -> str:
    """One line to keep with the numbers: what they were taken on, and how busy it was."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{len(os.sched_getaffinity(0))} cores ({_processor()}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}, load average {load}"
    )


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as an aligned Markdown table."""
    heads = list(rows[0])
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    lines = [[head.rjust(widths[head]) for head in heads], ["-" * (widths[head] - 1) + ":" for head in heads]]
    lines += [[row[head].rjust(widths[head]) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _milliseconds(runs: list[Seconds]) -> str:
    return f"{1000 * median(run.wall for run in runs):.1f}"


def _processor() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.machine()
