"""`accelerate launch -m trivium.evals`: evaluate a checkpoint on a split, on any number of processes."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..datasets.registry import InputError
from .record import read_config

if TYPE_CHECKING:
    import torch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SPLITS = ("train", "val", "test")
TIMEOUT = timedelta(hours=1)


def main() -> None:
    """Run the command. A user's mistake is one line on stderr and exit code 2."""
    app()


@app.command()
def command(
    model: Annotated[Path, typer.Option(help="run directory, or one of its checkpoint folders")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="of a run: best, latest or a folder's name; by default best where there is one, else latest"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="name of the split: train, val or test of the run's recipe, or a new name")
    ] = "test",
    shards: Annotated[str | None, typer.Option(help="shard pattern in place of the recipe's")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="comma-separated task names; by default those of the recipe, and geometry")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="items per forward pass of a process; by default the recipe's")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="decoding workers per process; by default the recipe's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to; by default RUN/evals/SPLIT")] = None,
    if_needed: Annotated[
        bool, typer.Option("--if-needed", help="keep results of the same weights, shards, tasks and version")
    ] = False,
) -> None:
    """Embed a split on all processes, run evaluation tasks on it, print and write the results."""
    import torch
    from accelerate import PartialState

    from .embeddings import EmbeddingError

    # without `cpu` Accelerate forms no group of CPU processes; the others wait while the first runs the tasks
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    problem, code = None, 0
    try:
        plan = resolve(model, checkpoint, split, shards, tasks, batch_size, workers, out)
        results = (kept(plan) if if_needed else None) or _evaluate(plan, state.device)
        code = 1 if any(result["error"] for result in results) else 0
    except InputError as error:  # a property of the arguments and files, so every process is here
        problem, code = error, 2
    except EmbeddingError as error:  # raised on all processes or on none
        problem, code = error, 1
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        print(f"error: {problem}", file=sys.stderr) if problem else show(results, plan)
    raise typer.Exit(code)


@dataclass(frozen=True)
class Plan:
    """What one evaluation will do, all paths and defaults filled in."""

    folder: Path
    split: str
    shards: str | list[str]
    tasks: dict[str, dict[str, Any]]
    batch_size: int
    workers: int
    out: Path
    config: Mapping[str, Any]


def resolve(
    model: Path,
    checkpoint: str | None,
    split: str,
    shards: str | None,
    tasks: str | None,
    batch_size: int | None,
    workers: int | None,
    out: Path | None,
) -> Plan:
    """The arguments filled in from the run's config.yaml. InputError for what is absent or unknown."""
    from .harness import check_tasks

    folder, run = checkpoint_folder(model, checkpoint)
    config = read_config(run) if run else {}
    data, evals = config.get("data") or {}, config.get("evals") or {}
    pattern = shards or data.get(split)
    if not pattern:
        known = ", ".join(name for name in SPLITS if data.get(name)) or "none"
        raise InputError(f"no shards for the split {split!r}: the recipe has {known}; give --shards PATTERN")
    if out is None and run is None:
        raise InputError(f"{str(model)!r} is a checkpoint outside a run directory; say where to write with --out DIR")
    options = {"geometry": {}, **(evals.get("tasks") or {"retrieval": {}})}
    chosen = options if tasks is None else {name.strip(): options.get(name.strip()) or {} for name in tasks.split(",")}
    check_tasks(chosen)
    return Plan(
        folder=folder,
        split=split,
        shards=pattern,
        tasks=dict(sorted(chosen.items(), reverse=True)),
        batch_size=batch_size or evals.get("batch_size") or 64,
        workers=data.get("workers", 0) if workers is None else workers,
        out=out or run / "evals" / split,
        config=config,
    )


def checkpoint_folder(model: Path, checkpoint: str | None = None) -> tuple[Path, Path | None]:
    """The folder of the weights, and the run directory that it belongs to (None outside of one)."""
    if (model / "model.json").is_file():
        if checkpoint is not None:
            raise InputError(
                f"{str(model)!r} is a checkpoint already; leave out --checkpoint, or give the run directory"
            )
        return model, model.parents[1] if model.resolve().parent.name == "checkpoints" else None
    folder = model / "checkpoints"
    if not folder.is_dir():
        raise InputError(
            f"{str(model)!r} is neither a run directory nor a checkpoint; give a folder with checkpoints/ in it"
        )
    name = checkpoint or ("best" if (folder / "best").is_file() else "latest")
    pointer = folder / name
    found = folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else pointer
    if not (found / "model.json").is_file():
        known = sorted(path.parent.name for path in folder.glob("*/model.json"))
        raise InputError(f"no checkpoint {name!r} in {str(folder)!r}; there are: {', '.join(known) or 'none'}")
    return found, model


def inputs_sha256(plan: Plan) -> str:
    """sha256 of what the results depend on: weights, shard files (size and time), tasks, version of Trivium."""
    from ..datasets.shards import expand

    with (plan.folder / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    stats = [(path, Path(path).stat()) for path in expand(plan.shards)]
    shards = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    data = plan.config.get("data") or {}
    reading = [data.get("fields"), data.get("decoder")]
    return hashlib.sha256(json.dumps([version("trivium"), weights, shards, plan.tasks, reading]).encode()).hexdigest()


def kept(plan: Plan) -> list[dict[str, Any]] | None:
    """The results in `plan.out` when they are complete and of the same inputs, else None."""
    from .results import read_embeddings, read_results

    try:
        card = read_results(plan.out)
    except InputError:  # written by another version
        return None
    valid = card is not None and card.get("inputs_sha256") == inputs_sha256(plan)
    if not valid or read_embeddings(plan.out) is None:
        return None
    results = [{"error": None, **task} for task in card["tasks"]]
    return None if any(result["error"] for result in results) else results


def _evaluate(plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    from ..datasets.stream import Source
    from ..modalities.weights import load_model
    from .harness import evaluate_split

    model = load_model(plan.folder, device)
    data = plan.config.get("data") or {}
    source = Source(plan.shards, model.specs, fields=data.get("fields"), decoder=data.get("decoder") or "pyav")
    about = {
        "model": str(plan.config.get("name") or plan.folder),
        "checkpoint": plan.folder.name,
        "split": plan.split,
        "shards": plan.shards,
        "trained_on": data.get("train"),
        "inputs_sha256": inputs_sha256(plan),
        "batch_size": plan.batch_size,
        "precision": "fp32",
        "command": shlex.join(["python", "-m", "trivium.evals", *sys.argv[1:]]),
    }
    options = {"batch_size": plan.batch_size, "workers": plan.workers, "folder": plan.out, "about": about}
    return [vars(result) for result in evaluate_split(model, source, plan.tasks, **options)[0]]


def show(results: list[dict[str, Any]], plan: Plan) -> None:
    """Print a table per task, and where the files are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .results import table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for result in results:
        if result["error"]:
            console.print(f"[bold]{result['task']}[/bold] [red]failed:[/red] {escape(result['error'])}")
            continue
        header, lines = table(result)
        grid = Table(title=f"{result['task']} on {plan.split}", title_justify="left", box=None, pad_edge=False)
        for i, column in enumerate(header):
            grid.add_column(column, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            grid.add_row(*line)
        console.print(grid)
        console.print()
    if unreadable := max((result["protocol"].get("n_unreadable", 0) for result in results), default=0):
        console.print(f"unreadable items, counted as missing: {unreadable}; see skipped.jsonl")
    console.print(f"written to {escape(str(plan.out))}", soft_wrap=True)
