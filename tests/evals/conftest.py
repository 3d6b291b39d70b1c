"""A small finished run with real shards, weights and a final evaluation of its own; built once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import normalize

from trivium.datasets.batch import Skip
from trivium.datasets.moving_digits import encode_mp4
from trivium.datasets.shards import write_shards
from trivium.evals.embeddings import EmbeddingSet
from trivium.evals.harness import append_history, run_tasks, write_results

N, UNREADABLE = 13, 5
CAPTIONS = [(f"a <b>{i % 4}</b> & more",) for i in range(N)]


def write_clips(folder: Path) -> str:
    """N clips, one of them cut short; the pattern of their shards."""
    samples = []
    for i in range(N):
        rng = np.random.default_rng(i)
        pictures = (rng.random((8, 32, 32)) * 60).astype(np.uint8)
        pictures[:, 4 * (i % 4) : 4 * (i % 4) + 8] = 200
        mp4 = encode_mp4(pictures, np.zeros(16_000, np.float32), 8)
        mp4 = mp4[: len(mp4) // 2] if i == UNREADABLE else mp4
        samples.append({"__key__": f"clip{i}", "mp4": mp4, "json": {"captions": list(CAPTIONS[i]), "bucket": i % 4}})
    write_shards(samples, folder, "test", samples_per_shard=5)
    return str(folder / "test-*.tar")


def embeddings_of(names: tuple[str, ...] = ("text", "video", "audio")) -> EmbeddingSet:
    g = torch.Generator().manual_seed(0)
    z = {name: normalize(torch.randn(N, 8, generator=g), dim=1) for name in names}
    valid = {name: torch.arange(N) != UNREADABLE for name in names}
    keys = tuple(f"clip{i}" for i in range(N))
    skipped = (Skip(UNREADABLE, f"clip{UNREADABLE}", "test-000001.tar", 512, "cut short"),)
    return EmbeddingSet(z, valid, keys, tuple(CAPTIONS), torch.arange(N) % 4, skipped)


def record_of(step: int) -> dict[str, float]:
    """A line of metrics.jsonl with the names that a run of the demo with `objective=gram` logs."""
    return {
        "step": step, "samples": 8 * step, "loss": 1 + math.exp(-step / 9), "loss/text-tuple": 2.5,
        "loss/tuple-text": 2.4, "loss/volume": 0.43, "loss/temperature": 0.07 + 1e-4 * step, "lr": 1e-3,
        "grad_norm": 1.0, "skipped": 0, "clips_per_second": 100 + step, "step_seconds": 0.08, "data_wait_seconds": 0.01,
        "geometry/alignment/text-video": 1.9, "geometry/gap/text-video": 0.4, "geometry/uniformity/text": -2.1,
        "geometry/zeta/text": 0.8, "geometry/chi/text": 0.2, "geometry/zeta": 0.6, "geometry/chi": 0.3,
        "geometry/holder_divergence": 170.2,
    }  # fmt: skip


def write_run(folder: Path, shards: str, *, name: str = "tiny", steps: int = 40) -> Path:
    folder.mkdir()
    config = {
        "name": name,
        "seed": 3,
        "data": {"test": shards, "workers": 0, "fields": None, "decoder": "pyav"},
        "modalities": {modality: {"tower": {"name": "any"}} for modality in ("text", "video", "audio")},
        "objective": {"name": "gram"},
        "train": {"steps": steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "hardware": {"cpu": "2 <cores>"}}))
    (folder / "exit.json").write_text(json.dumps({"outcome": "finished", "error": None, "exit_code": 0}))
    skip = {
        "split": "train",
        "position": 7,
        "key": "clip7",
        "shard": "train-0.tar",
        "offset": 0,
        "reason": "cut <short>",
    }
    (folder / "skipped.jsonl").write_text(json.dumps(skip) + "\n")
    lines = [record_of(step) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    embeddings = embeddings_of()
    results = run_tasks(embeddings, {"retrieval": {}, "geometry": {}})
    for step in (20, 40):
        append_history(folder, step, "val", results)
    write_results(folder / "evals" / "test", results, embeddings, {"split": "test", "shards": shards})
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return write_clips(tmp_path_factory.mktemp("shards of evals"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, shards) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a run", shards)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "a run")
