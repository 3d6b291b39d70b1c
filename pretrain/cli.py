"""`accelerate launch -m trivium.pretrain RECIPE key=value ...`: recipe and overrides -> Config; prints it; trains."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import traceback
from pathlib import Path

from ..datasets.registry import InputError
from .config import Config, describe, load, recipes, save

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
    try:
        config = load(recipe, overrides)
    except InputError as error:
        return _fail(None, error)
    try:
        outcome = _run(config)
    except InputError as error:
        return _fail(config.run, error)
    except BaseException as error:
        if _main_process():
            _write_exit(config.run, "failed", f"{type(error).__name__}: {error}", 1)
            _append_log(config.run, traceback.format_exc() + f"error: {error}")
        raise
    if _main_process():
        _write_exit(config.run, outcome, None, 0)
    return 0


def help_text() -> str:
    lines = [USAGE.format(names=", ".join(recipes()))]
    for key, meaning in describe().items():
        lines.append(textwrap.fill(f"  {key:<28} {meaning}", 118, subsequent_indent=" " * 31))
    return "\n".join(lines)


def _run(config: Config) -> str:
    # imported here: --help and a wrong key answer at once
    from . import preflight
    from .loop import train

    preflight.check_config(config)
    config.run.mkdir(parents=True, exist_ok=True)
    if preflight.is_finished(config):
        if _main_process():
            print(f"{config.run} has finished its {config.train.steps} steps; nothing is left to do", file=sys.stderr)
        return "finished"
    if _main_process():
        save(config, config.run / "config.yaml")
        (config.run / "exit.json").unlink(missing_ok=True)
    return train(config)


def _fail(run: Path | None, error: InputError) -> int:
    if _main_process():
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run is not None:
            _write_exit(run, "failed", str(error), 2)
            _append_log(run, f"error: {error}")
    return 2


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write_exit(run: Path, outcome: str, error: str | None, code: int) -> None:
    """Keep our exit code: launchers replace a rank's by their own. Left out where nothing can be written."""
    if os.path.isdir(run) and os.access(run, os.W_OK):
        (run / "exit.json").write_text(json.dumps({"outcome": outcome, "error": error, "exit_code": code}, indent=1))


def _append_log(run: Path, text: str) -> None:
    if os.path.isdir(run) and os.access(run, os.W_OK):
        with (run / "log.txt").open("a") as log:
            log.write(text + "\n")
