"""THE loop.

    build the model and the objective; load the newest checkpoint of the run, else init_from
    for step, batch in the plan from the checkpoint's position on:
        run the towers and the objective, backward (plain or by cached embeddings)
        gather every rank's loss, stop wish and skip count: one small collective
        stop on a non-finite loss, before it can touch the weights
        clip, update, tell the objective
        once in a while: log; evaluate zero-shot on the validation split; write a checkpoint
    evaluate and write the last checkpoint

Every rank takes the same steps and makes the same decisions, because all of them see the same summed numbers. The order
of the data and all random draws are functions of (seed, position) and (seed, step, rank): a killed run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..datasets.batch import Batch, Skip
from ..datasets.stream import eval_batches, train_batches
from ..objectives import Loss
from . import state as checkpoints
from .build import build_module, source_of
from .config import Config
from .engine import Engine, build_accelerator
from .health import Stopper, check_corrupt, end_with_the_launcher, report_non_finite, write_skips
from .optim import build_optimizer, freeze, set_learning_rate
from .state import RunState
from .step import CONFLICT, train_step
from .telemetry import Clock, Telemetry, batch_geometry
from .validation import Validation


def train(config: Config) -> str:
    """Run a recipe to its end, or until it is asked to stop. All ranks. Returns "finished" or "stopped"."""
    stopper = Stopper()
    end_with_the_launcher()
    accelerator = build_accelerator(config)
    folder, messages = checkpoints.find(config.run)
    module = build_module(config, folder, messages)
    freeze(module, config.train)
    engine = Engine(accelerator, module, build_optimizer(module, config.train), config.train.clip_norm)
    state = RunState()
    if folder:
        state = checkpoints.load_rest(folder, engine)
        messages.append(f"resumed from {folder.name}")
    train_source = source_of(config, module.model, config.data.train)
    state.data = train_source.index.digest()
    rank, world, workers = accelerator.process_index, accelerator.num_processes, config.data.workers
    batches = train_batches(
        train_source,
        batch_size=config.train.batch_size,
        rank=rank,
        world=world,
        seed=config.seed,
        start_step=state.step,
        steps=config.train.steps,
        workers=workers,
    )
    validation = None
    if config.data.val:
        val_source = source_of(config, module.model, config.data.val)
        rows = config.evals.batch_size
        val_batches = eval_batches(val_source, batch_size=rows, rank=rank, world=world, workers=workers)
        validation = Validation(config, engine, val_batches, len(val_source))
    if folder and accelerator.is_main_process:
        checkpoints.point(folder)
    with Telemetry(config, accelerator, state.step) as telemetry:
        for message in messages:
            telemetry.say(message)
        return _steps(config, engine, state, batches, len(train_source), validation, telemetry, stopper)


def _steps(
    config: Config,
    engine: Engine,
    state: RunState,
    batches: Iterable[Batch],
    dataset_size: int,
    validation: Validation | None,
    telemetry: Telemetry,
    stopper: Stopper,
) -> str:
    every, clock = config.checkpoint, Clock()
    skips: list[Skip] = []
    for batch in batches:
        clock.data_arrived()
        batch = batch.to(engine.device)
        rate = set_learning_rate(engine.optimizer, state.step, config.train)
        engine.module.train()
        seed = (config.seed, state.step, engine.accelerator.process_index)
        measured = bool(config.log.conflicts) and (state.step + 1) % config.log.conflicts == 0
        loss, z = train_step(engine, batch, config.train.chunk, seed, measured)
        means, totals = exchange(
            engine,
            loss,
            stop=stopper.asked,
            skipped=len(batch.skipped),
            due=clock.due(every.minutes),
            failed=batch.error is not None,
        )  # all ranks
        if totals["failed"]:
            checkpoints.raise_everywhere(batch.error)  # all ranks
        if not math.isfinite(means["loss"]):
            report_non_finite(config, engine, state.step, means, batch, loss, z)  # all ranks; raises
        gradient_norm = engine.step()
        if not math.isfinite(gradient_norm):
            means["grad_norm"] = gradient_norm
            report_non_finite(config, engine, state.step, means, batch, loss, z)  # all ranks; raises
        state.step += 1
        state.samples += config.train.batch_size
        state.skipped += totals["skipped"]
        engine.after_step(state.step / config.train.steps)
        skips += batch.skipped
        telemetry.advance(state.step)

        last, stop = state.step == config.train.steps, totals["stop"] > 0
        logged = state.step % config.log.every == 0 or last or stop or measured
        if logged:
            record = {"step": state.step, "samples": state.samples, **means, "lr": rate, "grad_norm": gradient_norm}
            record |= {"skipped": state.skipped} | clock.rates(config.train.batch_size)
            if config.log.geometry:
                record |= batch_geometry(batch, z)  # all ranks
            telemetry.record(record)
        best = False
        if validation and (last or (config.evals.every and state.step % config.evals.every == 0)):
            best = validation.run(state, telemetry)  # all ranks
        save = last or stop or best or totals["due"] or (every.every and state.step % every.every == 0)
        if save or logged:
            skips = write_skips(config.run, engine, skips)  # all ranks
            check_corrupt(config, state, dataset_size)
        if save:
            state.seconds += clock.since_saved()
            checkpoints.save(config.run, engine, state, every.keep)  # all ranks
        if stop and not last:
            telemetry.say(f"stopped after step {state.step} as asked; the same command goes on from here")
            return "stopped"
        clock.step_done()
    return "finished"


def exchange(engine: Engine, loss: Loss, **counts: int) -> tuple[dict[str, float], dict[str, int]]:
    """Means over ranks of the loss and its parts, and sums over ranks of the counts; waits for the GPU. All ranks."""
    names = ["loss", *(name if name.startswith(CONFLICT) else f"loss/{name}" for name in loss.parts)]
    values = torch.stack([x.detach().double().reshape(()) for x in (loss.total, *loss.parts.values())])
    own = torch.cat([values, torch.tensor(list(counts.values()), dtype=torch.float64, device=values.device)])
    if engine.accelerator.num_processes > 1:
        torch.distributed.all_reduce(own)  # all ranks
    sums = own.tolist()
    means = [value / engine.accelerator.num_processes for value in sums[: len(names)]]
    return dict(zip(names, means, strict=True)), {k: int(v) for k, v in zip(counts, sums[len(names) :], strict=True)}
