"""The console script `trivium`: prepares data, checks recipes, lists what there is, writes reports.

It imports nothing heavy at the top, so that `trivium --help` answers at once; each command imports what it needs. The
training run is started by `accelerate launch -m trivium.pretrain`, never from here.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..datasets.registry import InputError

app = typer.Typer(
    name="trivium",
    help="Text, video and audio encoders trained together.\n\n"
    "\b\nTraining starts with\n    accelerate launch -m trivium.pretrain RECIPE key=value ...",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# Everything behind the command's name goes on as it is: `trivium prepare` to the source, `trivium eval` to the program.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool = True) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trivium {version('trivium')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def prepare(
    context: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="A name of `trivium sources`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the shards; made when missing.")] = None,
) -> None:
    """Write a dataset's shards.

    The source's own options follow as `--option value` or `option=value`; `trivium prepare SOURCE --help` shows them.

    \b
    Example:
        trivium prepare moving-digits --out data/moving-digits --train 6000
    """
    if source in ("--help", "-h"):
        print(context.get_help())
        return
    from ..datasets.registry import SOURCES
    from .catalogue import card, page
    from .options import parse

    if source is None:
        raise InputError(f"prepare needs the name of a source; known: {', '.join(SOURCES.names()) or 'none'}")
    if {"--help", "-h"} & set(context.args):
        print(page(SOURCES, source))
        return
    if out is None:
        raise InputError(f"prepare {source!r} needs a folder for the shards; add --out data/{source}")
    options = parse(context.args, SOURCES.parameters(source))
    print(card(SOURCES.build(source, **options).prepare(out)))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the recipe.")] = None,
) -> None:
    """Check a recipe and its data before a run.

    Exit code 0, or 2 with one line that names the value, the rule and the remedy.

    \b
    Example:
        trivium check demo objective=gram train.batch_size=64
    """
    from ..pretrain.preflight import check as preflight
    from .catalogue import card

    found = preflight(recipe, overrides or [])
    print(f"ok: {' '.join([recipe, *(overrides or [])])}")
    print(card(found))


doctor = typer.Typer(
    help="Check what must hold on any machine for your recipe on yours.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(doctor, name="doctor")


@doctor.command("grad")
def doctor_grad(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the recipe.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes.  [default: one for each of several GPUs, else 2 on the CPU]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Clips of the joined batch.  [default: 12 or more, at most the recipe's]")
    ] = None,
    zero: Annotated[str, typer.Option(metavar="STAGES", help="ZeRO stages to try; 0 is plain DDP.")] = "0,1,2,3",
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Clips per pass with cached embeddings.  [default: half of a rank's]")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest share of the largest gradient that counts as equal.")
    ] = 1e-5,
    timeout_minutes: Annotated[float, typer.Option(min=0.01, help="After which the ranks are ended.")] = 30,
) -> None:
    """Compare the gradients of several ranks with those of one process on the joined batch.

    One step of your recipe on your data at its first weights, under DDP and every ZeRO stage, plain and by cached
    embeddings, with fp32 towers and dropout off; the run directory is left alone. ZeRO-3 keeps parameters below
    distributed.persist_below whole: set it to 0 to see it gather a small model's too.

    Exit code 0 if all gradients are equal, 1 if not, 2 for a mistake in the recipe or the options.

    \b
    Example:
        trivium doctor grad demo objective=gram --ranks 2
    """
    from .doctor import check_gradients

    code = check_gradients(
        recipe,
        overrides or [],
        ranks=ranks,
        batch_size=batch_size,
        zero=zero,
        chunk=chunk,
        tolerance=tolerance,
        timeout_minutes=timeout_minutes,
    )
    raise typer.Exit(code)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe instead of the list.")] = None,
) -> None:
    """List the shipped recipes, or print one: a start for your own.

    \b
    Example:
        trivium recipes demo > my.yaml
    """
    from ..datasets.registry import nearest
    from ..pretrain.config import recipes as shipped
    from .catalogue import columns

    texts = {key: path.read_text() for key, path in shipped().items()}
    if name is None:
        print(columns([(key, text.partition("\n")[0].lstrip("# ")) for key, text in texts.items()]))
    elif name in texts:
        print(texts[name], end="")
    else:
        raise InputError(f"no recipe is called {name!r}; {nearest(name, texts)}")


def _catalogue(command: str, module: str, registry: str, what: str, example: str) -> None:
    """Add the command that lists a registry or prints the page of one of its entries."""

    @app.command(
        command,
        help=f"List the {what}, or show the options of one.\n\n\b\nExample:\n    trivium {command} {example}",
    )
    def show(
        name: Annotated[
            str | None, typer.Argument(metavar="NAME", help="Show this one: options and description.")
        ] = None,
    ) -> None:
        from .catalogue import listing, page

        entries = getattr(importlib.import_module(module), registry)
        print(listing(entries) if name is None else page(entries, name))


_catalogue("objectives", "trivium.objectives", "OBJECTIVES", "objectives (losses)", "unialign")
_catalogue("towers", "trivium.modalities", "TOWERS", "towers (encoders)", "bert")
_catalogue("tasks", "trivium.evals", "TASKS", "evaluation tasks", "retrieval")
_catalogue("sources", "trivium.datasets.registry", "SOURCES", "sources of shards", "moving-digits")


@app.command("eval", context_settings=PASS_THROUGH, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Evaluate a trained run in one process.

    All arguments go to `python -m trivium.evals`; on many GPUs: `accelerate launch -m trivium.evals`.

    \b
    Example:
        trivium eval --model runs/demo-unialign --split test
    """
    import os

    sys.stdout.flush()
    # The program takes the place of this one, so that signals and the exit code are its own.
    os.execv(sys.executable, [sys.executable, "-m", "trivium.evals", *context.args])


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Write a run's report.html and print where it is.

    \b
    Example:
        trivium report runs/demo-unialign
    """
    from ..evals.report import write_report

    print(write_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; by default comparison.html beside the first run.")
    ] = None,
) -> None:
    """Put the numbers of several runs side by side.

    \b
    Example:
        trivium compare runs/demo-infonce runs/demo-gram runs/demo-unialign
    """
    from ..evals.report import write_comparison

    page = out or runs[0].parent / "comparison.html"
    print(write_comparison(runs, page))
    print(f"\nwritten to {page}")


@app.command()
def version() -> None:
    """Print the version."""
    _print_version()
