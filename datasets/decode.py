"""One sample's parts and a tower's spec -> the tower's input tensors.

A spec is known by its `kind` alone ("frames", "fbank", "tokens"), so that this folder knows no tower. Every random
choice comes from the generator that is handed in; without one the choice is the middle, or the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .media import AUDIO_EXTENSIONS, VIDEO_DECODERS, VIDEO_EXTENSIONS, read_audio
from .registry import InputError, nearest
from .shards import AUDIO, CAPTIONS, VIDEO, read_captions

Inputs = dict[str, Tensor]
Random = np.random.Generator | None


class NoiseWords(NamedTuple):
    """Words that do not belong: with `probability` one of them is put somewhere into a caption in training.

    "Towards Bridging the Semantic Spaces of the One-to-Many Mapping in Cross-Modality Text-to-Video Generation",
    appendix: p = 0.15, a word dictionary without the words of the data set's captions.
    """

    probability: float
    words: tuple[str, ...]


class Ways(NamedTuple):
    """How samples are decoded; see `decode`."""

    rng: Random = None
    video_decoder: str = "pyav"
    crop_area: float = 0.8
    noise_words: NoiseWords | None = None


class Decoder(NamedTuple):
    """How one kind of spec is made.

    Attributes:
        fields: the parts it is read from unless the recipe names others; the first that a sample has is used.
        flag: what the index must say of such a part for it to be worth reading.
        read: the first part found (name and bytes), spec, ways -> inputs, or None when it has none.
        empty: spec -> the inputs of a sample that lacks the modality.
    """

    fields: tuple[str, ...]
    flag: int
    read: Callable[[str, bytes, Any, Ways], Inputs | None]
    empty: Callable[[Any], Inputs]


def decode(
    parts: dict[str, bytes],
    spec: Any,
    *,
    fields: tuple[str, ...] | None = None,
    rng: Random = None,
    video_decoder: str = "pyav",
    crop_area: float = 0.8,
    noise_words: NoiseWords | None = None,
) -> Inputs | None:
    """The keyword arguments of a tower's forward for one sample, without the batch axis; None when it lacks them.

    Args:
        parts: the sample's files by name ("mp4", "json").
        spec: the tower's spec.
        fields: the parts to look in, in order; None: the usual ones of the spec's kind.
        rng: draws frames, crop, slices and caption; None for evaluation: middle frames and slices, centre crop, first
            caption.
        video_decoder: "pyav" or "decord".
        crop_area: training keeps a random square of at least this share of the largest one; 1 keeps all of it.
        noise_words: put into captions, with `rng` only.

    Raises CorruptSample when a part is there and broken.
    """
    decoder, ways = decoder_of(spec), Ways(rng, video_decoder, crop_area, noise_words)
    for name in fields or decoder.fields:
        if name in parts:
            inputs = decoder.read(name, parts[name], spec, ways)
            if inputs is not None:
                return inputs
    return None


def decoder_of(spec: Any) -> Decoder:
    """The decoder of a spec's kind. Raises InputError when there is none."""
    if spec.kind not in DECODERS:
        raise InputError(f"nothing decodes inputs of kind {spec.kind!r}; {nearest(spec.kind, DECODERS)}")
    return DECODERS[spec.kind]


# -- frames -----------------------------------------------------------------------------------------------------------


def chunk_indices(count: int, chunks: int, rng: Random) -> list[int]:
    """One index of each of `chunks` consecutive, near-equal parts of range(count), the first parts longer by one.

    With `rng` any element of the part, without the lower middle one. Fewer elements than parts: the last one repeats.
    """
    if count < chunks:
        return [*range(count), *[count - 1] * (chunks - count)]
    whole, rest = divmod(count, chunks)
    sizes = np.full(chunks, whole) + (np.arange(chunks) < rest)
    starts = np.cumsum(sizes) - sizes
    offsets = (sizes + 1) // 2 - 1 if rng is None else rng.integers(sizes)
    return (starts + offsets).tolist()


def _read_frames(name: str, data: bytes, spec: Any, ways: Ways) -> Inputs | None:
    frames = VIDEO_DECODERS[ways.video_decoder](data, lambda count: chunk_indices(count, spec.frames, ways.rng))
    if frames is None:
        return None
    crop = None
    if ways.rng is not None and ways.crop_area < 1:
        crop = ways.rng.uniform(ways.crop_area, 1), *ways.rng.uniform(size=2)
    return {"frames": torch.stack([_fit(frame, spec.size, crop) for frame in frames])}


def _fit(frame: np.ndarray, size: int, crop: tuple[float, float, float] | None) -> Tensor:
    """A frame (H, W, 3) as uint8 (3, size, size), without changing its proportions.

    Args:
        crop: None for the whole shorter side and the centre of the longer one, pixels untouched if that is already the
            size; else the share of that area to keep, and two numbers in [0, 1) that choose where the square lies.
    """
    height, width = frame.shape[:2]
    side = full = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if crop is not None:
        area, down, right = crop
        side = max(1, round(full * area**0.5))
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    square = torch.from_numpy(frame[top : top + side, left : left + side]).permute(2, 0, 1)
    if side == size:
        return square.contiguous()
    return F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)[0].contiguous()


def _empty_frames(spec: Any) -> Inputs:
    return {"frames": torch.zeros(spec.frames, 3, spec.size, spec.size, dtype=torch.uint8)}


# -- filter banks -----------------------------------------------------------------------------------------------------


def _read_fbank(name: str, data: bytes, spec: Any, ways: Ways) -> Inputs | None:
    waveform = read_audio(data, spec.sample_rate_hz)
    if waveform is None or not len(waveform):
        return None
    samples = torch.from_numpy(waveform)
    shift = round(spec.sample_rate_hz * spec.frame_shift_ms / 1000)
    window = round(spec.sample_rate_hz * spec.frame_length_ms / 1000)
    frames = max(1, 1 + (len(samples) - window) // shift)
    samples = F.pad(samples, (0, max(0, window - len(samples))))
    fbank = torch.zeros(spec.clips, spec.length, spec.mel_bins)
    for clip, (start, stop) in enumerate(_slices(frames, spec.clips, spec.length, ways.rng)):
        if stop > start:  # frames are cut as samples: each frame depends on its own window alone
            piece = samples[start * shift : (stop - 1) * shift + window]
            fbank[clip, : stop - start] = (_log_mel(piece, spec, window, shift) - spec.mean) / (2 * spec.std)
    return {"fbank": fbank}


def _slices(frames: int, clips: int, length: int, rng: Random) -> list[tuple[int, int]]:
    """Where each clip lies: range(frames) in `clips` near-equal parts, of each `length` frames (all, if it has fewer)
    at a random place or in the middle."""
    edges = [frames * i // clips for i in range(clips + 1)]
    slices = []
    for start, stop in pairwise(edges):
        spare = max(0, stop - start - length)
        start += spare // 2 if rng is None else int(rng.integers(spare + 1))
        slices.append((start, min(stop, start + length)))
    return slices


def _log_mel(waveform: Tensor, spec: Any, window: int, shift: int) -> Tensor:
    """Kaldi's log-mel filter banks (frames, mel_bins) of mono samples in [-1, 1], its defaults, without dither.

    As `torchaudio.compliance.kaldi.fbank`, in a third of its time: it makes weights and window anew for every clip.
    """
    shape, mel = _kaldi_constants(window, spec.mel_bins, spec.sample_rate_hz)
    frames = (waveform * 2**15).unfold(0, window, shift)
    frames = frames - frames.mean(dim=1, keepdim=True)
    emphasised = frames * shape
    emphasised[:, 1:] -= 0.97 * frames[:, :-1] * shape[1:]  # the window is 0 at its first sample, which has none before
    spectrum = torch.view_as_real(torch.fft.rfft(emphasised, n=2 * len(mel)))[:, :-1]  # the last bin has no weight
    return (spectrum.square().sum(-1) @ mel).clamp_min(torch.finfo(torch.float32).eps).log()


@lru_cache(maxsize=8)
def _kaldi_constants(window: int, mel_bins: int, sample_rate_hz: int) -> tuple[Tensor, Tensor]:
    """Povey's window (window,), and mel weights (FFT size / 2, mel_bins) from 20 Hz to the highest frequency."""
    from torchaudio.compliance.kaldi import get_mel_banks

    fft_size = 1 << (window - 1).bit_length()
    mel, _ = get_mel_banks(mel_bins, fft_size, float(sample_rate_hz), 20.0, 0.0, 100.0, -500.0, 1.0)
    return torch.hann_window(window, periodic=False) ** 0.85, mel.T.contiguous()


def _empty_fbank(spec: Any) -> Inputs:
    return {"fbank": torch.zeros(spec.clips, spec.length, spec.mel_bins)}


# -- tokens -----------------------------------------------------------------------------------------------------------


def _read_tokens(name: str, data: bytes, spec: Any, ways: Ways) -> Inputs | None:
    captions = read_captions(name, data)
    if not captions:
        return None
    caption = captions[0 if ways.rng is None else int(ways.rng.integers(len(captions)))]
    if ways.rng is not None and ways.noise_words is not None:
        caption = _with_noise(caption, ways.noise_words, ways.rng)
    return tokenize(caption, spec)


def _with_noise(caption: str, noise: NoiseWords, rng: np.random.Generator) -> str:
    """The caption, with the noise's probability with one of its words between two of the caption's or at an end."""
    chance, (word, place) = rng.random(), rng.random(2)  # always three draws, so that no choice shifts another
    if chance >= noise.probability:
        return caption
    words = caption.split()
    words.insert(int(place * (len(words) + 1)), noise.words[int(word * len(noise.words))])
    return " ".join(words)


def tokenize(text: str, spec: Any) -> Inputs:
    """`ids` and `mask` int64 (max_tokens,) of one text."""
    encoding = _tokenizer(spec.tokenizer, spec.max_tokens).encode(text)
    return {"ids": torch.tensor(encoding.ids), "mask": torch.tensor(encoding.attention_mask)}


@lru_cache(maxsize=8)
def _tokenizer(serialised: str, max_tokens: int):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialised)
    pad = tokenizer.padding or {}
    token = pad.get("pad_token") or next((t for t in ("[PAD]", "<pad>") if tokenizer.token_to_id(t) is not None), None)
    if token is None:
        raise InputError("the tokenizer has no padding token ([PAD] or <pad>); add one to its vocabulary")
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(length=max_tokens, pad_token=token, pad_id=tokenizer.token_to_id(token))
    return tokenizer


def _empty_tokens(spec: Any) -> Inputs:
    ids, mask = torch.zeros(2, spec.max_tokens, dtype=torch.int64)
    mask[0] = 1  # attention over no token at all is not a number, and spreads by way of its gradient
    return {"ids": ids, "mask": mask}


DECODERS = {
    "frames": Decoder(VIDEO_EXTENSIONS, VIDEO, _read_frames, _empty_frames),
    "fbank": Decoder(AUDIO_EXTENSIONS + VIDEO_EXTENSIONS, AUDIO, _read_fbank, _empty_fbank),
    "tokens": Decoder(("json", "txt"), CAPTIONS, _read_tokens, _empty_tokens),
}
