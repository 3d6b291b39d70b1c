"""Shards -> batches. The order is a pure function: no shuffle buffer, no state.

Position p of the plan (p = 0, 1, ...) is sample `permutation(seed, p // n)[p % n]` of a source of n samples, and step s
of global batch size G is positions sG .. (s + 1)G - 1. Every random draw is keyed by (seed, position, purpose). So a
run resumes at any step at no cost, and neither the number of workers nor the number of ranks changes a sample, a frame,
a crop or a caption.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .batch import Batch, Clip, Skip, collate
from .decode import NoiseWords, decode, decoder_of
from .media import VIDEO_DECODERS, CorruptSample
from .processes import DataWorkers, serve_workers
from .registry import InputError, nearest
from .shards import CAPTIONS, NO_BUCKET, UNREADABLE, Index, read_captions, words_of

ATTEMPTS = 8  # samples tried for one position before the run gives up
PRELOAD = ["trivium.datasets.stream", "av", "tokenizers", "torchaudio.compliance.kaldi"]


class Plan:
    """The order of `samples` samples: each exactly once an epoch, every epoch in an order of its own.

    Args:
        samples: n, how many there are.
        seed: of the order.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def sample(self, position: int) -> int:
        """The sample at `position` (0, 1, ... without end)."""
        epoch, place = divmod(position, self.samples)
        return int(_permutation(self.samples, self.seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    # sorted raw words of the bit generator: NumPy keeps that stream for ever, `Generator.permutation` it may change
    return np.argsort(_philox(seed, epoch, "order", 0).random_raw(samples), kind="stable")


def draw(seed: int, position: int, purpose: str, attempt: int = 0) -> np.random.Generator:
    """The random numbers of (seed, position, purpose, attempt): the same in any process, in any order."""
    return np.random.Generator(_philox(seed, position, purpose, attempt))


def _philox(seed: int, position: int, purpose: str, attempt: int) -> np.random.Philox:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest(), "little")
    return np.random.Philox(key=key, counter=[0, attempt, position, 0])  # the first word counts the numbers drawn


class Source:
    """Indexed shards and what to make of their samples.

    Args:
        pattern: path, glob or `{000..012}` range, or a list of them.
        specs: by modality name, its tower's spec.
        fields: by modality, the parts of a sample it is read from, the first that exists; by default those of the
            spec's kind.
        decoder: video decoder, "pyav" or "decord".
        crop_area: training keeps a random square of at least this share of a frame's largest one; 1 does not crop.
        noise_words: by modality that is text, words for its captions in training; those that occur in captions of the
            source are left out.

    Raises InputError for a pattern without shards, for an unknown modality in `fields` or `noise_words`, kind or
    decoder, and for noise words that all occur.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        specs: Mapping[str, Any],
        *,
        fields: Mapping[str, str | Sequence[str]] | None = None,
        decoder: str = "pyav",
        crop_area: float = 0.8,
        noise_words: Mapping[str, NoiseWords] | None = None,
    ) -> None:
        if decoder not in VIDEO_DECODERS:
            raise InputError(f"no video decoder is called {decoder!r}; {nearest(decoder, VIDEO_DECODERS)}")
        for option, names in {"fields": fields or {}, "noise_words": noise_words or {}}.items():
            for name in names:
                if name not in specs:
                    raise InputError(f"data.{option} names the modality {name!r}; {nearest(name, specs)}")
        self.pattern = pattern
        self.specs = dict(specs)
        self.decoder = decoder
        self.crop_area = crop_area
        named = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in (fields or {}).items()}
        self.fields = {name: named.get(name, decoder_of(spec).fields) for name, spec in self.specs.items()}
        self.empty = {name: decoder_of(spec).empty(spec) for name, spec in self.specs.items()}
        self.index = Index.open(pattern)
        self.noise_words = {name: self._outside(name, noise) for name, noise in (noise_words or {}).items()}
        self.bucketed = bool((self.index.bucket != NO_BUCKET).any())
        texts = [self.fields[name] for name, spec in self.specs.items() if spec.kind == "tokens"]
        self._captions = texts[0] if texts else ("json", "txt")
        self._parts = {part for names in (*self.fields.values(), self._captions) for part in names}

    def __len__(self) -> int:
        return len(self.index)

    def _outside(self, name: str, noise: NoiseWords) -> NoiseWords:
        """The noise without the words that the source's captions have."""
        if self.specs[name].kind != "tokens":
            raise InputError(f"data.noise_words: {name!r} is no text but {self.specs[name].kind}; name a text modality")
        known = self.index.words()
        words = tuple(word for word in noise.words if not known.intersection(words_of(word)))
        if not words:
            raise InputError(
                f"data.noise_words.{name}: all {len(noise.words)} words occur in captions of {self.pattern!r}; "
                "give words that do not, such as a dictionary"
            )
        return noise._replace(words=words)

    def check(self) -> dict[str, int]:
        """By modality, how many samples have it, as their headers say; under "unreadable", if there are any, how many
        samples have a wanted part that cannot be read.

        Raises InputError when none has one that is wanted, and when some samples have a bucket and others none.
        """
        counts: dict[str, int] = {}
        unreadable = self._unreadable()
        for name, spec in self.specs.items():
            counts[name] = int((self.index.flags(self.fields[name]) & decoder_of(spec).flag > 0).sum())
            if not counts[name]:
                parts, fields = ", ".join(self.index.extensions), " or ".join(self.fields[name])
                broken = f", of {unreadable} samples unreadable" if unreadable else ""
                raise InputError(
                    f"no sample of {self.pattern!r} has {name}: of its {len(self)} samples none holds {spec.kind} in a "
                    f"part {fields} (parts: {parts}{broken}); name the right part in data.fields.{name}, or leave "
                    f"{name} out"
                )
        unknown = self.index.flags(["json"]) & UNREADABLE > 0
        without = int(((self.index.bucket == NO_BUCKET) & ~unknown).sum())
        if self.bucketed and without:
            raise InputError(
                f"{without} of the {len(self)} samples of {self.pattern!r} have no bucket and the others have one; "
                "give every sample's json a `bucket`, or none"
            )
        return counts | ({"unreadable": unreadable} if unreadable else {})

    def _unreadable(self) -> int:
        """How many samples have a wanted part that is broken, or of a codec that nothing decodes."""
        wanted = [(self.fields[name], decoder_of(spec).flag) for name, spec in self.specs.items()]
        broken = np.zeros(len(self), dtype=bool)
        for fields, flag in [*wanted, (self._captions, CAPTIONS)]:
            for part in set(fields).intersection(self.index.extensions):
                flags = self.index.flags([part])
                broken |= (flags & UNREADABLE > 0) & (flags & flag == 0)  # of a film, the other half may be in order
        return int(broken.sum())

    def clip(self, sample: int, position: int, seed: int | None) -> Clip:
        """Sample number `sample`, decoded with the draws of (seed, position); the evaluation form without a seed.

        Raises CorruptSample when any wanted part of it is broken.
        """
        parts = self.index.read(sample, only=self._parts)
        captions = (read_captions(name, parts[name]) for name in self._captions if name in parts)
        captions = next(filter(None, captions), ())
        inputs = {}
        for name, spec in self.specs.items():
            rng = None if seed is None else draw(seed, position, f"decode {name}")
            made = decode(
                parts,
                spec,
                fields=self.fields[name],
                rng=rng,
                video_decoder=self.decoder,
                crop_area=self.crop_area,
                noise_words=self.noise_words.get(name),
            )
            if made is not None:
                inputs[name] = made
        if not inputs:
            raise CorruptSample(f"it has none of the wanted modalities: {', '.join(self.specs)}")
        return Clip(self.index.key(sample), position, inputs, self._bucket(sample), captions)

    def blank(self, position: int, sample: int | None = None) -> Clip:
        """A row with no modality at all: padding, or the place of a corrupt `sample`."""
        if sample is None:
            return Clip("", position, {}, NO_BUCKET if self.bucketed else None)
        return Clip(self.index.key(sample), position, {}, self._bucket(sample))

    def skip(self, sample: int, position: int, error: CorruptSample) -> Skip:
        """The report of a corrupt sample."""
        shard = self.index.shards[self.index.shard[sample]]
        return Skip(position, self.index.key(sample), shard, int(self.index.offset[sample]), str(error))

    def _bucket(self, sample: int) -> int | None:
        return int(self.index.bucket[sample]) if self.bucketed else None


def train_batches(
    source: Source,
    *,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    start_step: int,
    steps: int,
    workers: int,
    prefetch: int = 2,
) -> Batches:
    """This rank's batches of steps start_step, ..., steps - 1.

    A corrupt sample is replaced by another one of the source, drawn by (seed, position), and reported in
    `Batch.skipped`.

    Args:
        batch_size: clips of one step over all ranks; rank r takes the r-th of `world` equal pieces.
        start_step: the first step, later than 0 in a resumed run.
        steps: of the whole run.
        workers: decoding processes; 0 decodes in this one.
        prefetch: batches that each worker prepares ahead.

    Raises InputError when the batch does not divide over the ranks or is larger than the source.
    """
    if batch_size % world:
        low = batch_size // world * world
        raise InputError(
            f"batch_size={batch_size} does not divide over {world} processes; use {low or world} or {low + world}"
        )
    if batch_size > len(source):
        raise InputError(
            f"batch_size={batch_size} is larger than the {len(source)} samples of {source.pattern!r}; "
            f"use at most {len(source) // world * world}, or more data"
        )
    dataset = _TrainBatches(source, batch_size, rank, world, seed)
    return Batches(dataset, range(start_step, steps), workers, prefetch)


def eval_batches(source: Source, *, batch_size: int, rank: int, world: int, workers: int, prefetch: int = 2) -> Batches:
    """All samples once over all ranks: rank r takes samples r, r + world, ... with the choices of evaluation.

    Every rank gets the same number of batches of the same size. Rows with nothing to hold have position -1 and no
    modality; a corrupt sample keeps its row, position and bucket, has no modality, and is reported in `Batch.skipped`.

    Args:
        batch_size: clips of one batch of one rank (fewer, if a rank has fewer in all).
    """
    share = -(-len(source) // world)
    rows = min(batch_size, share)
    return Batches(_EvalBatches(source, rows, rank, world), range(-(-share // rows)), workers, prefetch)


class Batches:
    """Batches in order, assembled by worker processes; iterating again starts again, with the same workers.

    Where a position finds no usable sample, the batch says so in `error`: raising would leave the other ranks waiting.
    """

    def __init__(self, dataset: Dataset, numbers: range, workers: int, prefetch: int) -> None:
        self._numbers = numbers
        options: dict[str, Any] = {}
        if workers:
            # a clean server process forks the workers: nothing of CUDA, NCCL or open files comes along, and what the
            # server has imported is shared
            options = {"multiprocessing_context": DataWorkers(), "prefetch_factor": prefetch}
            options |= {"persistent_workers": True}
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iterator draws from the global one, and resuming shifts dropout
            **options,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        if self._loader.num_workers:
            serve_workers(PRELOAD)
        yield from self._loader


def _as_is(batch: Batch) -> Batch:
    return batch


class _Numbered(Dataset):
    """Number -> batch; one that cannot be built is blank and says why in `error`."""

    def __getitem__(self, number: int) -> Batch:
        skipped: list[Skip] = []
        rows, problem = self._rows(number), None
        try:
            with _one_thread():
                clips = [self._clip(row, skipped) for row in rows]
        except InputError as error:
            clips, problem = [self.source.blank(row) for row in rows], str(error)
        return collate(clips, self.source.empty, skipped, problem)


class _TrainBatches(_Numbered):
    """Step -> this rank's batch; its rows are positions."""

    def __init__(self, source: Source, batch_size: int, rank: int, world: int, seed: int) -> None:
        self.source, self.seed = source, seed
        self.plan = Plan(len(source), seed)
        self.batch_size, self.rank, self.share = batch_size, rank, batch_size // world

    def _rows(self, step: int) -> range:
        first = step * self.batch_size + self.rank * self.share
        return range(first, first + self.share)

    def _clip(self, position: int, skipped: list[Skip]) -> Clip:
        sample = self.plan.sample(position)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.source.clip(sample, position, self.seed)
            except CorruptSample as error:
                skipped.append(self.source.skip(sample, position, error))
            sample = int(draw(self.seed, position, "replacement", attempt).integers(len(self.source)))
        last = skipped[-1]
        raise InputError(
            f"{ATTEMPTS} samples drawn for position {position} are all corrupt, the last one {last.key!r} in "
            f"{last.shard}: {last.reason}; check the shards of {self.source.pattern!r}"
        )


class _EvalBatches(_Numbered):
    """Number -> this rank's batch; its rows are samples, and padding behind the last one."""

    def __init__(self, source: Source, rows: int, rank: int, world: int) -> None:
        self.source, self.rows, self.rank, self.world = source, rows, rank, world

    def _rows(self, number: int) -> range:
        first = self.rank + self.world * number * self.rows
        return range(first, first + self.world * self.rows, self.world)

    def _clip(self, sample: int, skipped: list[Skip]) -> Clip:
        if sample >= len(self.source):
            return self.source.blank(-1)
        try:
            return self.source.clip(sample, sample, None)
        except CorruptSample as error:
            skipped.append(self.source.skip(sample, sample, error))
            return self.source.blank(sample, sample)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Decode as a worker does: sums of several threads may differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
