"""What the stream hands to the model: a Batch, and how clips become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """One decoded sample.

    Attributes:
        key: the sample's key in its shard, unique within a source.
        position: index in the plan; it also keys every random draw (frames, crop, caption).
        inputs: by modality, the keyword arguments of its tower's forward, without the batch axis
            (frames uint8 (T, 3, H, W); fbank float (C, F, mels); ids and mask int64 (L,)).
            A modality that the sample lacks is absent here.
        bucket: id of the group of clips that one caption fits equally, or None.
        captions: all captions of the clip.
    """

    key: str
    position: int
    inputs: dict[str, dict[str, Tensor]]
    bucket: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skip:
    """One sample that could not be used, and why."""

    position: int
    key: str
    shard: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """n clips stacked.

    Attributes:
        keys: n sample keys.
        position: int64 (n,), index in the plan; -1 for a padding row.
        inputs: by modality, the keyword arguments of its tower's forward, each (n, ...); rows of an absent modality
            are zeros, so that every rank runs every tower equally often.
        present: by modality, bool (n,).
        bucket: int64 (n,) or None when the source has no buckets.
        captions: n tuples of captions.
        skipped: samples that were replaced (training) or left out (evaluation) while this batch was built.
        error: why this rank could not build its batch, whose rows are then blank: it takes part in the step's
            collectives all the same, and all ranks stop together.
    """

    keys: tuple[str, ...]
    position: Tensor
    inputs: dict[str, dict[str, Tensor]]
    present: dict[str, Tensor]
    bucket: Tensor | None
    captions: tuple[tuple[str, ...], ...]
    skipped: tuple[Skip, ...] = field(default=())
    error: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with `inputs`, `present` and `bucket` on `device`; pixels stay uint8."""
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run beside its work."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs={name: {key: change(x) for key, x in parts.items()} for name, parts in self.inputs.items()},
            present={name: change(x) for name, x in self.present.items()},
            bucket=None if self.bucket is None else change(self.bucket),
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Rows start..stop as a batch, for towers that run in chunks."""
        return Batch(
            keys=self.keys[start:stop],
            position=self.position[start:stop],
            inputs={name: {key: x[start:stop] for key, x in parts.items()} for name, parts in self.inputs.items()},
            present={name: x[start:stop] for name, x in self.present.items()},
            bucket=None if self.bucket is None else self.bucket[start:stop],
            captions=self.captions[start:stop],
        )


def collate(
    clips: Sequence[Clip],
    empty: dict[str, dict[str, Tensor]],
    skipped: Sequence[Skip] = (),
    error: str | None = None,
) -> Batch:
    """Stack clips; a modality that a clip lacks gets the zeros of `empty[modality]` and `present` False.

    Args:
        clips: n clips.
        empty: by modality, the inputs of one clip that lacks it (same keys, shapes and dtypes as a real one).
        skipped, error: passed on.
    """
    inputs = {
        name: {key: torch.stack([clip.inputs.get(name, zeros)[key] for clip in clips]) for key in zeros}
        for name, zeros in empty.items()
    }
    present = {name: torch.tensor([name in clip.inputs for clip in clips]) for name in empty}
    buckets = [clip.bucket for clip in clips]
    return Batch(
        keys=tuple(clip.key for clip in clips),
        position=torch.tensor([clip.position for clip in clips], dtype=torch.int64),
        inputs=inputs,
        present=present,
        bucket=None if None in buckets else torch.tensor(buckets, dtype=torch.int64),
        captions=tuple(clip.captions for clip in clips),
        skipped=tuple(skipped),
        error=error,
    )
