"""Towers: raw signal -> features. One architecture a file, each registered by name.

A tower is an `nn.Module` with

- `spec`: the InputSpec (below) of what it eats; it is picklable, so that data workers decode and tokenise by it;
- `width`: the width d of its pooled features;
- `options`: constructor options that rebuild the tower anywhere (a tokenizer's path replaced by its contents);
- `forward(**inputs) -> Features`, called with the tensors that a decoder of `spec.kind` makes;
- `translate`, if other projects publish weights for it: from the names in their files to its own (see weights.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..datasets.registry import Registry

TOWERS = Registry("tower", "trivium.modalities")
register = TOWERS.register


class Features(NamedTuple):
    """What a tower returns: `pooled` (n, d) and, where there are any, `tokens` (n, S, d).

    A tuple, because ZeRO-3 hangs its backward hooks on the tensors of tuples and dicts only.
    """

    pooled: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class FrameSpec:
    """Video frames: `frames` uint8 (n, T, 3, size, size); the tower normalises them on the device.

    Attributes:
        frames: T, frames per clip; an image is T = 1.
        size: height and width in pixels.
        mean, std: per-channel statistics of pixels scaled to [0, 1].
    """

    frames: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    kind: str = "frames"


@dataclass(frozen=True)
class FbankSpec:
    """Kaldi log-mel filter banks: `fbank` float32 (n, clips, length, mel_bins), already normalised.

    The waveform is mono at `sample_rate_hz`, scaled by 2**15; `fbank = (log-mel - mean) / (2 * std)`; shorter audio is
    padded with zeros after normalisation.

    Attributes:
        length: frames (of `frame_shift_ms`) per audio clip.
        clips: audio clips per sample.
        mean, std: statistics of the log-mel values (BEATs: 15.41663, 6.55582).
    """

    length: int
    clips: int = 1
    mel_bins: int = 128
    sample_rate_hz: int = 16_000
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    mean: float = 15.41663
    std: float = 6.55582
    kind: str = "fbank"


@dataclass(frozen=True)
class TokenSpec:
    """Token ids: `ids` and `mask` int64 (n, max_tokens), padded on the right; mask is 1 on tokens.

    Attributes:
        tokenizer: the serialised JSON of a `tokenizers.Tokenizer` (special tokens included in its post-processor).
        max_tokens: length after truncation and padding.
    """

    tokenizer: str
    max_tokens: int
    kind: str = "tokens"


InputSpec = FrameSpec | FbankSpec | TokenSpec


def build(name: str, **options: Any) -> nn.Module:
    """The tower called `name`. Raises InputError for an unknown name or option, naming the nearest."""
    return TOWERS.build(name, **options)
