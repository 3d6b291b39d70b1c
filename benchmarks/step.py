"""Trivium's whole training step against a bare PyTorch step of the same model and objective.

Ours is what the loop does between two batches: learning rate, `train_step` through the engine, the exchange of losses
over ranks, the check that they are finite, clipping and update, `after_step`. The peer is what one would write by hand:
zero_grad, forward, backward, clip_grad_norm_, AdamW step, read the loss. Both start from the same weights and take the
same batch, parameter groups and learning rate, in one process, so that without dropout they compute the same losses
(`loss difference`, relative, is 0) and the ratio is the price of all that the framework adds. With `train.chunk=N` ours
caches embeddings and the peer does not.

The second table is what the telemetry adds as often as the recipe wants it: geometry and volumes of the batch on every
log line, conflicts of the loss's terms now and then, as a share of the step above.

    .venv/bin/python benchmarks/step.py
    .venv/bin/python benchmarks/step.py train.batch_size=32 objective=gram
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch
from paired import alternate, machine, parser, positive, table
from torch import nn
from workload import add_options, configuration

from trivium.datasets.batch import Batch
from trivium.datasets.stream import Source, train_batches
from trivium.objectives import Embeddings
from trivium.objectives.geometry import term_conflicts
from trivium.pretrain.build import build_module
from trivium.pretrain.config import Config
from trivium.pretrain.engine import Engine, build_accelerator
from trivium.pretrain.loop import exchange
from trivium.pretrain.optim import build_optimizer, freeze, set_learning_rate
from trivium.pretrain.step import TrainModule, train_step
from trivium.pretrain.telemetry import batch_geometry

FIXED = ("train.schedule=constant", "train.warmup_steps=0", "log.wandb=false", "distributed.zero=0")


def trivium_step(config: Config, module: TrainModule, batch: Batch, losses: list[float]) -> Callable[[], None]:
    """One step as the loop takes it; appends the loss."""
    optimizer = build_optimizer(module, config.train)
    engine = Engine(build_accelerator(config), module, optimizer, config.train.clip_norm)

    def step() -> None:
        number = len(losses)
        there = batch.to(engine.device)
        set_learning_rate(engine.optimizer, number, config.train)
        engine.module.train()
        loss, _ = train_step(engine, there, config.train.chunk, (config.seed, number, 0))
        means, _ = exchange(engine, loss, stop=False, skipped=0, due=False)
        assert math.isfinite(means["loss"])
        engine.step()
        engine.module.objective.after_step(min(1.0, (number + 1) / config.train.steps))
        losses.append(means["loss"])

    return step


def bare_step(config: Config, module: TrainModule, batch: Batch, losses: list[float]) -> Callable[[], None]:
    """The same by hand; appends the loss."""
    model, objective = module.model, module.objective
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(module, config.train)  # torch.optim.AdamW
    set_learning_rate(optimizer, 0, config.train)  # constant
    module.train()
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")

    def step() -> None:
        optimizer.zero_grad()
        with mixed:
            z = model(batch.inputs)
        loss = objective(Embeddings(z, batch.present, bucket=batch.bucket)).total
        loss.backward()
        if config.train.clip_norm:
            nn.utils.clip_grad_norm_(trained, config.train.clip_norm)
        optimizer.step()
        losses.append(loss.item())

    return step


def built(config: Config) -> TrainModule:
    """Model and objective with the seed's weights; the same at every call."""
    module = build_module(config, None, [])
    freeze(module, config.train)
    return module


def telemetry_share(config: Config, module: TrainModule, batch: Batch, step_ms: float) -> dict[str, str]:
    """The row of the second table."""
    z = module.model(batch.inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in z.items()}
    terms = module.objective(Embeddings(leaves, batch.present, bucket=batch.bucket)).terms
    geometry = _median_ms(lambda: batch_geometry(batch, z))
    conflicts = _median_ms(lambda: term_conflicts(terms, list(leaves.values()))) if config.log.conflicts else 0.0
    a_step = geometry / config.log.every + (conflicts / config.log.conflicts if config.log.conflicts else 0.0)
    return {
        "geometry ms": f"{geometry:.1f}",
        "every": str(config.log.every),
        "conflicts ms": f"{conflicts:.1f}",
        "every (steps)": str(config.log.conflicts or "-"),
        "share of a step": f"{100 * a_step / step_ms:.2f} %",
    }


def _median_ms(run: Callable[[], object], repeats: int = 9) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def compare(config: Config, repeats: int) -> tuple[dict[str, str], dict[str, str]]:
    """The one row of the second table, and that of the first."""
    ours, peer = built(config), built(config)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    source = Source(config.data.train, ours.model.specs, fields=config.data.fields, decoder=config.data.decoder)
    size = config.train.batch_size
    batches = train_batches(
        source, batch_size=size, rank=0, world=1, seed=config.seed, start_step=0, steps=1, workers=0
    )
    (batch,) = batches
    our_losses: list[float] = []
    peer_losses: list[float] = []
    times = alternate(
        bare_step(config, peer, batch, peer_losses), trivium_step(config, ours, batch, our_losses), repeats
    )
    difference = max(abs(a - b) / abs(b) for a, b in zip(our_losses, peer_losses, strict=True))
    share = telemetry_share(config, built(config), batch, float(times.our_ms()))
    return share, {
        "objective": config.objective.name,
        "parameters": f"{parameters / 1e6:.2f} M",
        "batch": str(size),
        "chunk": str(config.train.chunk or "-"),
        "bare ms": times.peer_ms(),
        "trivium ms": times.our_ms(),
        "time ratio": f"{times.ratio():.3f}",
        "of neighbours": times.range(),
        "CPU ratio": f"{times.ratio('cpu'):.3f}",
        "loss difference": f"{difference:.0e}",
    }


def main() -> None:
    options = parser(__doc__)
    add_options(options)
    options.add_argument("--repeats", type=positive, default=25, help="timed steps of each side [25]")
    chosen = options.parse_intermixed_args()
    with configuration(chosen, 1, *FIXED) as config:
        share, row = compare(config, chosen.repeats)
    print(f"recipe {config.name}, {config.train.precision}, one process; medians of {chosen.repeats} steps")
    print(f"{machine()}\n\n{table([row])}\n\n{table([share])}")


if __name__ == "__main__":
    main()
