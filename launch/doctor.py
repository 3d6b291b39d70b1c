"""`trivium doctor`: what must hold on any machine, checked for the user's own recipe on the user's own.

`trivium doctor grad` compares the gradients of one training batch: several ranks, under every engine, plain and by
cached embeddings, against plain autograd in one process on the joined batch. The command starts its ranks as processes
of gradients.py, which says how they compare. They share a temporary folder with it: the recipe as resolved, one line of
results for each engine and form, and what a rank has to say about its failure.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..datasets.registry import InputError
from . import gradients
from .gradients import JOB, RECIPE, RESULTS, Agreement

ENGINES = {None: "single", 0: "DDP", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
YARDSTICKS = 4.0  # of one process's rounding may be an engine's, which adds up in another order
COARSEST = 0.1  # of the largest gradient is a difference whatever the rounding
LEAST_CLIPS = 12  # of the joined batch, where the recipe has as many: it divides over 2, 3, 4 and 6 ranks
GRACE_SECONDS = 5.0  # after one rank has failed, for the others to end by themselves
TAIL = 30  # lines of a failed rank's output that are shown


class RanksFailed(RuntimeError):
    """A rank raised, was killed or did not come to an end; the message is one line for the user."""


@dataclass(frozen=True)
class Row:
    """An Agreement and where it was found: ZeRO stage (None: one process in float32), and form of the step (None: all
    clips at once, else the clips of a pass)."""

    zero: int | None
    chunk: int | None
    agreement: Agreement

    @property
    def place(self) -> tuple[str, str, str]:
        form = "plain" if self.zero is None or not self.chunk else "cached"
        return ENGINES[self.zero], form, self.agreement.part

    @property
    def badness(self) -> float:
        """The difference; infinite for a NaN, which is worse than any number."""
        return math.inf if math.isnan(self.agreement.difference) else self.agreement.difference


# -- the command ------------------------------------------------------------------------------------------------------


def check_gradients(
    recipe: str,
    overrides: list[str],
    *,
    ranks: int | None = None,
    batch_size: int | None = None,
    zero: str = "0,1,2,3",
    chunk: int | None = None,
    tolerance: float = 1e-5,
    timeout_minutes: float = 30,
) -> int:
    """Print how gradients on several ranks compare with those of one process; 0 if they are equal, else 1.

    Nothing is read from the recipe's run directory or written into it.

    Args:
        recipe, overrides: as for training.
        ranks: processes; by default one for each of several GPUs, else 2 on the CPU. On GPUs if there are enough.
        batch_size: clips of the joined batch; by default 12 or a little more, at most the recipe's.
        zero: stages, comma-separated.
        chunk: clips per forward pass where embeddings are cached; by default half of a rank's, rounded up.
        tolerance: the largest Agreement.difference that counts as equal, unless one process rounds more coarsely.
        timeout_minutes: until the ranks are ended.

    Raises InputError for anything that is wrong with the recipe, its data or these options.
    """
    import torch

    from ..pretrain import config as recipes
    from ..pretrain.preflight import check_config

    gpus = torch.cuda.device_count()
    ranks = ranks or (gpus if gpus > 1 else 2)
    stages = parse_stages(zero)
    config = recipes.load(recipe, overrides)
    clips = joined_clips(batch_size, ranks, config.train.batch_size)
    chunk = cached_clips(chunk, clips // ranks)
    job = {"batch_size": clips, "steps": [(z, c) for z in stages for c in ([None, chunk] if chunk else [None])]}
    with tempfile.TemporaryDirectory(prefix="trivium-doctor-") as scratch:
        folder = Path(scratch)
        tree = config.tree() | {"run": str(folder / "run")}  # nobody's: so no run is in the way, and none is touched
        tree["train"] |= {"precision": "fp32", "clip_norm": None}
        tree["distributed"] |= {"timeout_minutes": timeout_minutes}
        tree["log"] |= {"wandb": False}
        resolved = recipes.validate(tree)
        there = check_config(resolved)["train"]["clips"]
        if clips > there:
            raise InputError(f"--batch-size {clips} is larger than the dataset ({there} clips); use at most {there}")
        recipes.save(resolved, folder / RECIPE)
        (folder / JOB).write_text(json.dumps(job))
        where = "on GPUs" if ranks <= gpus else "on the CPU"
        cached = f"{clips // ranks} clips a rank in passes of {chunk}" if chunk else "left out, a rank has one clip"
        print(
            f"{config.name}, objective {config.objective.name}: {clips} clips at the first weights; "
            f"{ranks} ranks {where} against one process on all of them\n"
            f"towers in fp32 (the recipe: {config.train.precision}), dropout off; cached embeddings: {cached}\n"
        )
        report = Report(list(config.modalities), tolerance)
        try:
            with contextlib.closing(run_ranks(folder, ranks, ranks <= gpus, timeout_minutes * 60)) as results:
                for found in results:
                    report.add(found)
        except RanksFailed as error:
            print(f"error: {report.next_of(job['steps'])}: {error}", file=sys.stderr)
            return 1
    return report.conclude()


def parse_stages(text: str) -> list[int]:
    """The ZeRO stages of `0,1,2,3`, each once, ascending. Raises InputError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in ("0", "1", "2", "3"):
            raise InputError(f"--zero {text}: {word!r} is no ZeRO stage; take some of 0,1,2,3")
    return sorted({int(word) for word in words})


def joined_clips(wanted: int | None, ranks: int, of_recipe: int) -> int:
    """Clips of the joined batch: `wanted`, or as many as LEAST_CLIPS if the recipe's batch has them. InputError."""
    if wanted is None:
        wanted = min(-(-LEAST_CLIPS // ranks), of_recipe // ranks) * ranks
        if not wanted:
            raise InputError(
                f"train.batch_size={of_recipe} has no clip for each of {ranks} ranks; use --ranks {of_recipe} or "
                f"fewer, or --batch-size {ranks}"
            )
    if wanted % ranks:
        low = wanted // ranks * ranks
        raise InputError(
            f"--batch-size {wanted} does not divide over {ranks} ranks; use {low or ranks} or {low + ranks}"
        )
    return wanted


def cached_clips(wanted: int | None, rows: int) -> int | None:
    """Clips per forward pass of a rank that has `rows`; None where there is no such number below `rows`. InputError."""
    if wanted is not None and wanted >= rows:
        remedy = f"use 1 to {rows - 1}" if rows > 1 else "use a larger --batch-size"
        raise InputError(f"--chunk {wanted} is not less than the {rows} clips of a rank; {remedy}")
    return (wanted or -(-rows // 2)) if rows > 1 else None


class Report:
    """The table, printed as it grows, and the verdict.

    Args:
        modalities: names of the towers and heads.
        tolerance: see `check_gradients`.

    Attributes:
        rows: what engines have given so far.
        limit: the largest difference that counts as equal: the tolerance, or what rounding explains.
    """

    def __init__(self, modalities: list[str], tolerance: float) -> None:
        self.limit = self.tolerance = tolerance
        self.rows: list[Row] = []
        self._rounding: float | None = None
        self._width = max(len("objective"), *(len(f"tower {name}") for name in modalities))
        self._print(("engine", "form", "part"), ("values", "difference", "cosine", "norm ratio"))

    def add(self, found: list[Row]) -> None:
        """Print rows of one place; those of the one process in float32, which come first, set the limit."""
        if found[0].zero is None:
            self._rounding = max(row.badness for row in found)
            self.limit = max(self.limit, min(YARDSTICKS * self._rounding, COARSEST))
        else:
            self.rows += found
        for row in found:
            what = row.agreement
            numbers = [f"{what.values:,}", f"{what.difference:.1e}", _number(what.cosine), _number(what.norm_ratio)]
            self._print(row.place, tuple(numbers), "  differs" if self._differs(row) else "")
        sys.stdout.flush()

    def next_of(self, steps: list[tuple[int, int | None]]) -> str:
        """Where the ranks are, of all steps that they are to take."""
        if self._rounding is None:
            return "before the first engine"
        done = {(row.zero, row.chunk) for row in self.rows}
        left = [
            f"{ENGINES[zero]}, {'cached' if chunk else 'plain'}" for zero, chunk in steps if (zero, chunk) not in done
        ]
        return left[0] if left else "after the last engine"

    def conclude(self) -> int:
        """Print the verdict, "ok: ..." or "error: ...", naming the worst row; returns the exit code."""
        worst = max(self.rows, key=lambda row: row.badness)
        bad = sum(self._differs(row) for row in self.rows)
        print()
        if self.limit > self.tolerance:
            rounding = f"one process in float32 is off by {self._rounding:.1e} itself"
            print(f"{rounding}: the limit is {self.limit:.1e} instead of {self.tolerance:g}")
        if self._rounding == 0:
            print("tower or objective does not compute in float64: how far off float32 itself is, is not known")
        how_many = f"error: {bad} of {len(self.rows)} rows differ" if bad else f"ok: all {len(self.rows)} rows agree"
        of_what = "the loss" if worst.agreement.part == "loss" else "the largest gradient"
        share = f"{worst.agreement.difference:.1e} of {of_what} (limit {self.limit:.1e})"
        print(f"{how_many}; worst {', '.join(worst.place)}: {share}")
        return int(bad > 0)

    def _differs(self, row: Row) -> bool:
        return row.zero is not None and not row.badness <= self.limit

    def _print(self, place: tuple[str, ...], numbers: tuple[str, ...], mark: str = "") -> None:
        widths = (6, 6, self._width, -13, -10, -10, -11)
        cells = [f"{x:<{w}}" if w > 0 else f"{x:>{-w}}" for x, w in zip((*place, *numbers), widths, strict=True)]
        print("  ".join(cells) + mark)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.7f}" if abs(x) < 1000 else f"{x:.1e}"


# -- its processes ----------------------------------------------------------------------------------------------------


def run_ranks(folder: Path, ranks: int, on_gpus: bool, seconds: float) -> Iterator[list[Row]]:
    """Start the ranks and hand on what they find, engine by engine, form by form; none of them outlives this.

    Raises RanksFailed when one fails or all of them have not ended after `seconds`, and InputError when a rank did.
    """
    deadline, told = time.monotonic() + seconds, 0
    processes: list[subprocess.Popen] = []
    try:
        for rank, environment in enumerate(_environments(ranks, on_gpus)):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                command = rank_command(folder)
                processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        while True:
            codes = [process.poll() for process in processes]  # before reading: what ended has written all it will
            lines = (folder / RESULTS).read_text().split("\n")[:-1] if (folder / RESULTS).exists() else []
            for line in lines[told:]:
                found = json.loads(line)
                yield [Row(found["zero"], found["chunk"], Agreement(**one)) for one in found["agreements"]]
            told = len(lines)
            if all(code == 0 for code in codes):
                return
            if any(codes):
                _wait(processes, GRACE_SECONDS)
                _explain(codes, folder)
            if time.monotonic() > deadline:
                raise RanksFailed(
                    f"the ranks have not ended after {seconds / 60:g} minutes; raise --timeout-minutes, or look into "
                    "one engine with --zero"
                )
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def rank_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", gradients.__name__, str(folder)]


def _environments(ranks: int, on_gpus: bool) -> Iterator[dict[str, str]]:
    """What a launcher would set for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = dict(os.environ) | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if sys.platform == "linux":
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    if not on_gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    for rank in range(ranks):
        yield shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _wait(processes: list[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _explain(codes: list[int | None], folder: Path) -> None:
    """Raise what the rank said that failed first; the others fail in consequence and know less.

    Args:
        codes: when a failure was first seen.
    """
    notes = sorted(folder.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    first = json.loads(notes[0].read_text()) if notes else {"rank": next(r for r, code in enumerate(codes) if code)}
    if first.get("mistake"):
        raise InputError(first["line"])
    # a rank that was killed left no note, those that missed it did; aborting is what some libraries do in consequence
    consequence = -signal.SIGABRT if notes else None
    killed = [rank for rank, code in enumerate(codes) if (code or 0) < 0 and code != consequence]
    rank = killed[0] if killed else first["rank"]
    output = (folder / f"rank-{rank}.log").read_text(errors="replace")
    said = [line for line in output.splitlines() if line.strip()] or ["nothing"]
    print("\n".join(["", f"the output of rank {rank} ends with", *said[-TAIL:], ""]), file=sys.stderr)
    if killed:
        name = signal.Signals(-codes[rank]).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        raise RanksFailed(f"rank {rank} was ended by {name}{memory}; its last line: {said[-1]}")
    raise RanksFailed(f"rank {rank} failed: {first.get('line', said[-1])}")
