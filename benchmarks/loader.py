"""The loader's clips per second against the bare decode loop.

The peer calls `source.clip` for the very same positions in a plain `for` loop: no DataLoader, no collate, no transport
between processes. A loader of W workers is set against W such loops, each in a process of its own at the same time
(workers=0 and 1 against one), so both have equally many cores decoding and compete for them equally. That is the limit
of any loader of this design: `share` is how much of it arrives at the consumer, 100 % if batching cost nothing.

Both run in turns on the same clips. The loader's clock runs in the steady state, from one batch to a later one with
more to come, so that neither its start nor work done ahead counts. CPU time is that of workers and consumer.

    .venv/bin/python benchmarks/loader.py --workers 0,1,2
    .venv/bin/python benchmarks/loader.py --shards 'data/moving-digits/train-*.tar'
"""

from __future__ import annotations

import multiprocessing
import os
import time
from statistics import median
from typing import NamedTuple

import torch
from paired import listed, machine, parser, positive, table
from workload import add_options, configuration

from trivium.datasets.stream import Batches, Plan, Source, train_batches
from trivium.modalities.model import MultimodalModel
from trivium.pretrain.config import Config

PREFETCH = 2  # batches a worker prepares ahead
LOOP = "bare-loop-"  # names their processes


class Rate(NamedTuple):
    """One run.

    Attributes:
        clips_per_second: of all processes together.
        cpu_ms: processor time per clip, milliseconds.
    """

    clips_per_second: float
    cpu_ms: float


class Loader:
    """`train_batches` with `workers` workers, timed over `batches` batches in the middle.

    Args:
        batches: a multiple of the number of processes, which deliver in turns.
    """

    def __init__(self, source: Source, seed: int, batch_size: int, workers: int, batches: int) -> None:
        self.batch_size, self.workers = batch_size, workers
        self.first = 1 + workers * PREFETCH
        self.last = self.first + batches
        self.batches: Batches = train_batches(
            source, batch_size=batch_size, rank=0, world=1, seed=seed, start_step=0,
            steps=self.last + self.first, workers=workers, prefetch=PREFETCH,
        )  # fmt: skip

    def run(self) -> Rate:
        for number, _ in enumerate(self.batches):
            if number == self.first - 1:
                wall, cpu = time.perf_counter(), self._cpu_seconds()
            if number == self.last - 1:
                wall, cpu = time.perf_counter() - wall, self._cpu_seconds() - cpu
        clips = self.batch_size * (self.last - self.first)
        return Rate(clips / wall, 1000 * cpu / clips)

    def positions(self) -> range:
        """The clips delivered while the clock runs."""
        return range(self.batch_size * self.first, self.batch_size * self.last)

    def _cpu_seconds(self) -> float:
        """Processor time so far of this process and its workers, which are its children but for the bare loops."""
        children = multiprocessing.active_children()
        workers = [child.pid for child in children if not child.name.startswith(LOOP)]
        assert len(workers) == self.workers, f"{len(workers)} workers, not {self.workers}"
        return time.process_time() + sum(_ticks(pid) for pid in workers) / os.sysconf("SC_CLK_TCK")


class BareLoops:
    """`processes` plain loops over `source.clip`, at the same time, each on its share of the positions."""

    def __init__(self, source: Source, seed: int, batch_size: int, processes: int, positions: range) -> None:
        context = multiprocessing.get_context("forkserver")
        self.start = context.Barrier(processes)  # kept: it must outlive the start of the processes
        batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
        self.pipes, self.processes = [], []
        for number in range(processes):
            pipe, theirs = context.Pipe()
            mine = [position for batch in batches[number::processes] for position in batch]
            loop = context.Process(
                target=_bare_loop, args=(theirs, self.start, source, seed, mine), name=f"{LOOP}{number}", daemon=True
            )
            loop.start()
            theirs.close()  # so that a loop that fails ends the benchmark
            self.pipes.append(pipe)
            self.processes.append(loop)

    def run(self) -> Rate:
        for pipe in self.pipes:
            pipe.send("go")
        found = [pipe.recv() for pipe in self.pipes]  # clips, seconds, processor seconds of each loop
        cpu_ms = 1000 * sum(cpu for _, _, cpu in found) / sum(clips for clips, _, _ in found)
        return Rate(sum(clips / wall for clips, wall, _ in found), cpu_ms)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send("end")
            process.join()


def _bare_loop(pipe, start, source: Source, seed: int, positions: list[int]) -> None:
    torch.set_num_threads(1)  # as the loader does
    plan = Plan(len(source), seed)
    while pipe.recv() == "go":
        start.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for position in positions:
            source.clip(plan.sample(position), position, seed)
        pipe.send((len(positions), time.perf_counter() - wall, time.process_time() - cpu))


def _ticks(pid: int) -> int:
    """Processor time of a process so far, user and system."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def compare(source: Source, config: Config, workers: int, batches: int, repeats: int) -> dict[str, str]:
    """A row of the table."""
    processes = max(workers, 1)
    batches = -(-batches // processes) * processes
    size = config.train.batch_size
    loader = Loader(source, config.seed, size, workers, batches)
    bare = BareLoops(source, config.seed, size, processes, loader.positions())
    loader.run(), bare.run()  # untimed: workers start, files enter the page cache
    found: dict[object, list[Rate]] = {loader: [], bare: []}
    for repeat in range(repeats):
        for side in (bare, loader) if repeat % 2 == 0 else (loader, bare):
            found[side].append(side.run())
    bare.close()
    shares = [o.clips_per_second / p.clips_per_second for o, p in zip(found[loader], found[bare], strict=True)]
    ours, peer = (median(run.clips_per_second for run in found[side]) for side in (loader, bare))
    our_cpu, peer_cpu = (median(run.cpu_ms for run in found[side]) for side in (loader, bare))
    return {
        "workers": str(workers),
        "bare loops": str(processes),
        "bare clips/s": f"{peer:.0f}",
        "loader clips/s": f"{ours:.0f}",
        "per core": f"{ours / processes:.0f}",
        "share": f"{100 * ours / peer:.0f} %",
        "of neighbours": f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %",
        "bare CPU ms/clip": f"{peer_cpu:.2f}",
        "loader CPU ms/clip": f"{our_cpu:.2f}",
    }


def main() -> None:
    options = parser(__doc__)
    add_options(options)
    options.add_argument("--workers", type=listed(int), default=[0, 1, 2], help="decoding processes [0,1,2]")
    options.add_argument("--batches", type=positive, default=8, help="timed in a run [8]")
    options.add_argument("--repeats", type=positive, default=7, help="timed runs of each side [7]")
    chosen = options.parse_intermixed_args()
    with configuration(chosen, chosen.batches) as config:
        tree = config.tree()
        specs = MultimodalModel(tree["modalities"], config.dim).specs
        source = Source(config.data.train, specs, fields=config.data.fields, decoder=config.data.decoder)
        rows = [compare(source, config, workers, chosen.batches, chosen.repeats) for workers in chosen.workers]
    print(f"recipe {config.name}, {len(source)} clips, batches of {config.train.batch_size}, decoder", end=" ")
    print(f"{config.data.decoder}; medians of {chosen.repeats} runs of {chosen.batches} batches")
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
