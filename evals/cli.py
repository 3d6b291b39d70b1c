"""`accelerate launch -m trivium.evals`: evaluate a checkpoint on a split, on any number of processes."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..datasets.registry import InputError
from .record import read_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SPLITS = ("train", "val", "test")


def main() -> None:
    """Run the command. A user's mistake is one line on stderr and exit code 2."""
    app()


@app.command()
def command(
    model: Annotated[Path, typer.Option(help="run directory, or one of its checkpoint folders")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="of a run: best, latest or a folder's name [best where there is one, else latest]"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="name of the split: train, val or test of the run's recipe, or a new name")
    ] = "test",
    shards: Annotated[str | None, typer.Option(help="shard pattern in place of the recipe's")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="comma-separated task names [those of the recipe, and geometry]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="items per forward pass of a process [the recipe's]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="decoding processes per process [the recipe's]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to [RUN/evals/SPLIT]")] = None,
) -> None:
    """Embed a split on all processes, run evaluation tasks on it, print and write the results."""
    from accelerate import PartialState

    state = PartialState()
    try:
        plan = resolve(model, checkpoint, split, shards, tasks, batch_size, workers, out)
        results = _evaluate(plan, state.device)
    except InputError as error:  # a property of the arguments and files, so every process is here
        if state.is_main_process:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        show(results, plan)
    raise typer.Exit(1 if any(result.error for result in results) else 0)


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


def _evaluate(plan: Plan, device) -> list:
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
        "weights_sha256": _sha256(plan.folder / "model.safetensors"),
        "batch_size": plan.batch_size,
        "precision": "fp32",
        "command": shlex.join(["python", "-m", "trivium.evals", *sys.argv[1:]]),
    }
    options = {"batch_size": plan.batch_size, "workers": plan.workers, "folder": plan.out, "about": about}
    return evaluate_split(model, source, plan.tasks, **options)[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show(results: list, plan: Plan) -> None:
    """Print a table per task, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    from .results import table

    console = Console()
    for result in results:
        if result.error:
            console.print(f"[bold]{result.task}[/bold] [red]failed:[/red] {result.error}", highlight=False)
            continue
        header, lines = table(vars(result))
        grid = Table(title=f"{result.task} · {plan.split}", title_justify="left", box=None, pad_edge=False)
        for i, column in enumerate(header):
            grid.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
        for line in lines:
            grid.add_row(*line)
        console.print(grid)
        console.print()
    console.print(f"written to {plan.out}", highlight=False, soft_wrap=True)
