"""What a person sees of a run: a progress line, log.txt, metrics.jsonl, W&B. Written by the main process only."""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..datasets.batch import Batch
from ..objectives.gather import gather_rows, world_size
from ..objectives.geometry import geometry, volume_histograms
from .config import Config

GEOMETRY_SAMPLES = 1024  # of the global batch; time grows with the square
PACKAGES = ("trivium", "torch", "torchaudio", "accelerate", "deepspeed", "transformers", "timm", "webdataset", "av")


class Telemetry:
    """Progress line, log.txt, metrics.jsonl and W&B of one start of a run.

    Args:
        config: the run's configuration.
        accelerator: decides who is the main process, and owns the W&B tracker.
        step: steps already taken; records of later steps (of a start that was killed) are removed.
    """

    def __init__(self, config: Config, accelerator, step: int) -> None:
        self.config = config
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        if not self.main:
            return
        run = config.run
        for name in ("metrics.jsonl", "evals.jsonl"):
            _forget_after(run / name, step)
        self._metrics = (run / "metrics.jsonl").open("a", buffering=1)
        self._log = (run / "log.txt").open("a", buffering=1)
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(config.name, total=config.train.steps, completed=step, text="")
        (run / "environment.json").write_text(json.dumps(environment(accelerator), indent=1))

    def __enter__(self) -> Telemetry:
        """Start the tracker and the progress line. All ranks."""
        if self.config.log.wandb:
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            wandb = {"dir": str(self.config.run), "mode": mode, "name": self.config.name, "settings": {"silent": True}}
            if self.main:  # a resumed run is the same run there too
                wandb |= {"id": _kept_id(self.config.run / "wandb_id.txt"), "resume": "allow"}
            self.accelerator.init_trackers(self.config.log.project, self.config.tree(), {"wandb": wandb})
        if self.main:
            self._progress.start()
        return self

    def say(self, text: str) -> None:
        """A line for the terminal and log.txt. Main process only; the others return."""
        if self.main:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        if self.main:
            self._progress.update(self._task, completed=step)

    def record(self, record: dict[str, float]) -> None:
        """One step's metrics; `record["step"]` is the number of steps taken. Main process only; the others return."""
        if not self.main:
            return
        self._metrics.write(json.dumps(record) + "\n")
        if self.config.log.wandb:
            shown = {k: _histogram(v) if isinstance(v, list) else v for k, v in record.items() if k != "step"}
            self.accelerator.log(shown, step=record["step"])
        parts = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in record.items() if k.startswith("loss/"))
        wait = 100 * record["data_wait_seconds"] / max(record["step_seconds"], 1e-9)
        text = f"loss {record['loss']:.4f}  {parts}  {record['clips_per_second']:.0f} clips/s  data wait {wait:.0f} %"
        self._progress.update(self._task, completed=record["step"], text=text)
        line = f"step {record['step']}/{self.config.train.steps}  {text}  lr {record['lr']:.2e}"
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *error) -> None:
        """End the tracker and the progress line. All ranks."""
        if self.config.log.wandb:
            self.accelerator.end_training()
        if self.main:
            self._progress.stop()
            self._metrics.close()
            self._log.close()


def _histogram(shares: list[float]):
    import wandb

    return wandb.Histogram(np_histogram=(shares, [i / len(shares) for i in range(len(shares) + 1)]))


def _kept_id(path: Path) -> str:
    """The name in the file, which is made up the first time."""
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def environment(accelerator) -> dict:
    """What the run ran on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "processes": accelerator.num_processes,
        "engine": str(accelerator.distributed_type.value),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
    }


def _forget_after(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("".join(kept))
    scratch.replace(path)


def batch_geometry(batch: Batch, z: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """Geometry and volumes of (a sample of) the global batch's embeddings. All ranks, the same numbers on each."""
    limit = -(-GEOMETRY_SAMPLES // world_size())
    rows = torch.arange(min(len(batch), limit)) * len(batch) // min(len(batch), limit)
    with torch.no_grad():
        vectors = {name: gather_rows(z[name].detach()[rows].float()) for name in batch.present}  # all ranks
        valid = {name: gather_rows(present[rows]) for name, present in batch.present.items()}  # all ranks
        found = {f"geometry/{name}": value for name, value in geometry(vectors, valid).items()}
        return found | {f"volumes/{name}": shares for name, shares in volume_histograms(vectors, valid).items()}


class Clock:
    """Times between log lines: whole steps, and the part of them spent waiting for data."""

    def __init__(self) -> None:
        self._saved = self._logged = self._waiting = time.perf_counter()
        self._steps, self._wait = 0, 0.0

    def data_arrived(self) -> None:
        self._wait += time.perf_counter() - self._waiting
        self._steps += 1

    def step_done(self) -> None:
        self._waiting = time.perf_counter()

    def due(self, minutes: float | None) -> bool:
        return minutes is not None and time.perf_counter() - self._saved > 60 * minutes

    def since_saved(self) -> float:
        now = time.perf_counter()
        seconds, self._saved = now - self._saved, now
        return seconds

    def rates(self, clips_per_step: int) -> dict[str, float]:
        """Means per step since the last call."""
        now = time.perf_counter()
        seconds, steps, wait = now - self._logged, max(1, self._steps), self._wait
        self._logged, self._steps, self._wait = now, 0, 0.0
        return {
            "clips_per_second": clips_per_step * steps / seconds,
            "step_seconds": seconds / steps,
            "data_wait_seconds": wait / steps,
        }
