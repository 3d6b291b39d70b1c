"""A few real clips and a recipe that trains on them in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trivium.datasets.registry import SOURCES


def tiny_recipe(data: Path, run: Path) -> dict:
    """Three real towers of width 16 on 64 clips: six steps of 16."""
    text = {"name": "bert", "tokenizer": str(data / "vocab.txt"), "max_tokens": 12, "width": 16, "layers": 1}
    video = {"name": "eva_clip", "frames": 2, "size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
    audio = {"name": "beats", "length": 192, "mel_bins": 64, "patch": 32, "patch_width": 8, "width": 16, "layers": 1}
    return {
        "name": "tiny",
        "run": str(run),
        "data": {split: str(data / f"{split}-*.tar") for split in ("train", "val", "test")} | {"workers": 0},
        "modalities": {
            "text": {"tower": text | {"heads": 2, "feedforward": 32}},
            "video": {"tower": video},
            "audio": {"tower": audio | {"heads": 2, "feedforward": 32, "conv_kernel": 4, "conv_groups": 2}},
        },
        "dim": 8,
        "objective": {"name": "infonce"},
        "train": {"steps": 6, "batch_size": 16, "lr": 0.003, "warmup_steps": 2},
        "evals": {"every": 3, "batch_size": 8},
        "checkpoint": {"every": 2},
        "log": {"every": 1, "wandb": False},
    }


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """64 / 20 / 20 moving digits."""
    folder = tmp_path_factory.mktemp("digits")
    SOURCES.build("moving-digits", train=64, val=20, test=20).prepare(folder)
    return folder


@pytest.fixture
def recipe(digits, tmp_path) -> Path:
    """A recipe file whose run directory is `tmp_path/run`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(digits, tmp_path / "run")))
    return path
