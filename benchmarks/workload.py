"""What the loader and step benchmarks work on: a recipe, and shards that are made when none are given."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivium.datasets.registry import SOURCES
from trivium.pretrain.config import Config, load


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--recipe", default="demo", help="a shipped recipe or a YAML file [demo]")
    options.add_argument(
        "--shards",
        metavar="PATTERN",
        help="shards to read instead of the recipe's data.train; left out, moving digits are made in a temporary "
        "folder, whose vocabulary replaces the text tower's",
    )
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, e.g. train.batch_size=32")


@contextmanager
def configuration(chosen: argparse.Namespace, batches: int, *fixed: str) -> Iterator[Config]:
    """The recipe on the chosen shards, or on `batches` batches of moving digits that go when the context ends.

    Args:
        fixed: overrides that the benchmark needs; those of the command line come after them.
    """
    overrides = [*fixed, *chosen.overrides]
    with tempfile.TemporaryDirectory(prefix="trivium-benchmark-") as scratch:
        data = [f"data.train={chosen.shards}", f"run={scratch}/run"]  # nothing is written to the run
        if chosen.shards is None:
            clips = batches * load(chosen.recipe, overrides).train.batch_size
            SOURCES.build("moving-digits", train=clips, val=1, test=1).prepare(Path(scratch))
            data[0] = f"data.train={scratch}/train-*.tar"
            data.append(f"modalities.text.tower.tokenizer={scratch}/vocab.txt")
        yield load(chosen.recipe, [*data, *overrides])
