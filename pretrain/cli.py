"""`accelerate launch -m trivium.pretrain RECIPE key=value ...`: recipe and overrides -> Config; prints it; trains."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
import traceback
from pathlib import Path

from ..datasets.registry import InputError
from .config import Config, ForeignRun, describe, read, recipes, save, validate

STARTED = time.time()
USAGE = """\
usage: accelerate launch [--config_file launch/node.yaml] -m trivium.pretrain RECIPE [key.subkey=value ...]

Train the model that RECIPE describes: a shipped name ({names}) or a YAML file. Started again with the same
arguments, a run that was interrupted goes on where it was, and a finished one says so and ends.

examples:
  accelerate launch -m trivium.pretrain demo
  accelerate launch -m trivium.pretrain demo objective=gram run=runs/gram train.lr=0.0005
  torchrun --nproc_per_node 2 -m trivium.pretrain demo distributed.zero=2

options, as key=value:
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 finished or stopped as asked, 2 a user's mistake, 1 anything else."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    recipe, *overrides = arguments
    run = None
    try:
        tree = read(recipe, overrides)
        run = Path(tree["run"]) if isinstance(tree.get("run"), str) else None
        outcome = _run(validate(tree))
    except InputError as error:
        return _refuse(run, error)
    except BaseException as error:
        _record_end(run, f"{type(error).__name__}: {error}", 1, traceback.format_exc())
        raise
    if _main_process():
        _write_exit(run, outcome, None, 0)
    return 0


def help_text() -> str:
    lines = [USAGE.format(names=", ".join(recipes()))]
    for key, meaning in describe().items():
        lines.append(textwrap.fill(f"  {key:<34} {meaning}", 118, subsequent_indent=" " * 37))
    return "\n".join(lines)


def _run(config: Config) -> str:
    # imported here: --help and a wrong key answer at once
    from . import preflight
    from . import state as checkpoints
    from .loop import train

    preflight.check_config(config)
    config.run.mkdir(parents=True, exist_ok=True)
    if folder := preflight.finished(config):
        if _main_process():
            checkpoints.point(folder)
            print(f"{config.run} has finished its {config.train.steps} steps; nothing is left to do", file=sys.stderr)
        return "finished"
    if _main_process():
        save(config, config.run / "config.yaml")
        if not _told_by_another(config.run):
            (config.run / "exit.json").unlink(missing_ok=True)
    return train(config)


def _refuse(run: Path | None, error: InputError) -> int:
    """A user's mistake: one line on the terminal, once a node, and in the run directory unless that is another's."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    if run is not None and not isinstance(error, ForeignRun) and _outcome(run) != "finished":
        with contextlib.suppress(OSError):  # what cannot be written into may be the very mistake
            run.mkdir(parents=True, exist_ok=True)
            _record_end(run, str(error), 2)
    return 2


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _outcome(run: Path) -> str | None:
    try:
        return json.loads((run / "exit.json").read_text())["outcome"]
    except (OSError, ValueError, KeyError):
        return None


def _record_end(run: Path | None, error: str, code: int, details: str = "") -> None:
    """Keep what went wrong, on the rank where it first did: the others fail in consequence and know less."""
    if run is None or _told_by_another(run) or not os.access(run, os.W_OK):
        return
    _write_exit(run, "failed", error, code)
    with (run / "log.txt").open("a") as log:
        log.write(f"{details}error: {error}\n")


def _told_by_another(run: Path) -> bool:
    """Whether a process of this very start has written how it ended."""
    path = run / "exit.json"
    return path.exists() and path.stat().st_mtime >= STARTED


def _write_exit(run: Path, outcome: str, error: str | None, code: int) -> None:
    """Keep our exit code: launchers replace a rank's by their own."""
    (run / "exit.json").write_text(json.dumps({"outcome": outcome, "error": error, "exit_code": code}, indent=1))
