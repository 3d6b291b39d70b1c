from __future__ import annotations

import io
import json
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from trivium.datasets.decode import NoiseWords, _with_noise, chunk_indices, decode, decoder_of
from trivium.datasets.media import CorruptSample, read_audio, read_frames
from trivium.datasets.registry import InputError
from trivium.modalities import FbankSpec, FrameSpec, TokenSpec

HALF = (0.5, 0.5, 0.5)


def frames_spec(frames: int, size: int) -> FrameSpec:
    return FrameSpec(frames=frames, size=size, mean=HALF, std=HALF)


# -- which frames -----------------------------------------------------------------------------------------------------


def chunks_slowly(count: int, chunks: int) -> list[list[int]]:
    """Cards dealt into piles so that the first piles are larger by one, then filled in order."""
    sizes = [0] * chunks
    for i in range(count):
        sizes[i % chunks] += 1
    order = iter(range(count))
    return [[next(order) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 100])
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_one_frame_of_each_chunk(count, chunks):
    middle = chunk_indices(count, chunks, None)
    drawn = [chunk_indices(count, chunks, np.random.default_rng(seed)) for seed in range(60)]
    assert len(middle) == chunks and all(len(indices) == chunks for indices in drawn)
    if count < chunks:
        assert all(indices == list(range(count)) + [count - 1] * (chunks - count) for indices in [middle, *drawn])
        return
    for place, chunk in enumerate(chunks_slowly(count, chunks)):
        assert middle[place] == chunk[(len(chunk) + 1) // 2 - 1]
        seen = {indices[place] for indices in drawn}
        assert seen <= set(chunk) and (len(chunk) > 8 or seen == set(chunk))


# -- which pixels -----------------------------------------------------------------------------------------------------


def test_a_frame_of_the_right_size_is_untouched(encode):
    data = encode(size=(64, 64), audio=None)
    got = decode({"mp4": data}, frames_spec(4, 64))["frames"]
    expected = np.stack(read_frames(data, lambda n: chunk_indices(n, 4, None)))
    assert got.dtype == torch.uint8 and got.shape == (4, 3, 64, 64) and got.is_contiguous()
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), expected)


def area_average(image: np.ndarray, size: int) -> np.ndarray:
    """Shrink by a whole factor with the triangle filter of that width, slowly, in double precision."""
    factor = len(image) // size
    weights = np.zeros((size, len(image)))
    for i in range(size):
        centre = (i + 0.5) * factor
        for j in range(len(image)):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / factor)
        weights[i] /= weights[i].sum()
    return np.einsum("ih,jw,hwc->ijc", weights, weights, image.astype(np.float64))


def test_evaluation_takes_the_centre_and_filters(encode):
    data = encode(audio=None, frames=5)  # 96 x 64
    got = decode({"mp4": data}, frames_spec(1, 32))["frames"][0]
    frame = read_frames(data, lambda n: [2])[0]
    expected = area_average(frame[:, 16:80], 32)
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() <= 1.01


def test_training_crops_all_frames_alike(encode):
    """A still film stays still, the draw decides, and no crop shows less than the smallest."""
    data = encode(audio=None, frames=1)
    draws = [decode({"mp4": data}, frames_spec(3, 64), rng=np.random.default_rng(seed))["frames"] for seed in range(6)]
    assert all(torch.equal(clip[0], clip[1]) and torch.equal(clip[0], clip[2]) for clip in draws)
    assert any(not torch.equal(draws[0], clip) for clip in draws[1:])
    again = decode({"mp4": data}, frames_spec(3, 64), rng=np.random.default_rng(0))["frames"]
    assert torch.equal(again, draws[0])


def test_crops_keep_handedness_and_reach_every_edge():
    """Coordinates as pixels: each crop is upright, unmirrored, square, 80 to 100 % of the largest square's area."""
    from trivium.datasets.decode import _fit

    y, x = np.mgrid[:80, :120].astype(np.uint8)
    frame = np.stack([x, y, np.zeros_like(x)], axis=-1)
    rng = np.random.default_rng(0)
    corners = []
    for _ in range(300):
        red, green, _ = _fit(frame, 40, (rng.uniform(0.8, 1), *rng.uniform(size=2)))
        width, height = float(red[0, -1]) - float(red[0, 0]), float(green[-1, 0]) - float(green[0, 0])
        assert 0.97 * 80 * 0.8**0.5 - 3 <= width <= 80 and abs(width - height) <= 2
        corners.append((float(red[0, 0]), float(red[0, -1]), float(green[0, 0]), float(green[-1, 0])))
    left, right, top, bottom = np.array(corners).T
    assert left.min() <= 2 and right.max() >= 117 and top.min() <= 2 and bottom.max() >= 77


@pytest.mark.parametrize("rng", [None, 3])
def test_decord_and_pyav_make_the_same_input(mp4, rng):
    made = [
        decode({"mp4": mp4}, frames_spec(8, 48), rng=rng and np.random.default_rng(rng), video_decoder=name)["frames"]
        for name in ("pyav", "decord")
    ]
    assert torch.equal(*made)


# -- sound ------------------------------------------------------------------------------------------------------------


def wav(waveform: np.ndarray, sample_rate_hz: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(waveform.astype("<i2").tobytes())
    return buffer.getvalue()


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).integers(-8000, 8000, round(16_000 * seconds)).astype(np.int16)


def slow_fbank(samples: np.ndarray, mels: int) -> np.ndarray:
    """Kaldi's log-mel filter bank in double precision, frame by frame; samples on the scale of 16-bit integers."""
    mel = lambda hz: 1127 * np.log1p(hz / 700)  # noqa: E731
    edges = mel(20.0) + (mel(8000.0) - mel(20.0)) * np.arange(mels + 2) / (mels + 1)
    bins = mel(np.arange(256) * 16_000 / 512)
    bank = np.zeros((mels, 257))
    for m in range(mels):
        rising = (bins - edges[m]) / (edges[m + 1] - edges[m])
        falling = (edges[m + 2] - bins) / (edges[m + 2] - edges[m + 1])
        bank[m, :256] = np.clip(np.minimum(rising, falling), 0, None)
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * povey, 512)) ** 2
        rows.append(np.log(np.maximum(bank @ power, np.finfo(np.float32).eps)))
    return np.array(rows)


def test_fbank_is_kaldis_normalised_and_padded():
    spec = FbankSpec(length=160)
    samples = noise(1.2)
    got = decode({"wav": wav(samples)}, spec)["fbank"]
    expected = (slow_fbank(samples, 128) - spec.mean) / (2 * spec.std)
    assert got.shape == (1, 160, 128) and got.dtype == torch.float32
    assert len(expected) == 118 and bool((got[0, 118:] == 0).all())
    np.testing.assert_allclose(got[0, :118].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"mel_bins": 64}, {"mel_bins": 80, "sample_rate_hz": 8000}, {"frame_shift_ms": 12.5}]
)
def test_fbank_equals_torchaudios(options):
    spec = FbankSpec(length=420, **options)
    sound = wav(noise(2.0), spec.sample_rate_hz)
    reference = kaldi.fbank(
        torch.from_numpy(read_audio(sound, spec.sample_rate_hz))[None] * 2**15,
        num_mel_bins=spec.mel_bins,
        sample_frequency=spec.sample_rate_hz,
        frame_shift=spec.frame_shift_ms,
        dither=0.0,
    )
    got = decode({"wav": sound}, spec)["fbank"][0, : len(reference)] * (2 * spec.std) + spec.mean
    assert 150 < len(reference) < 420
    torch.testing.assert_close(got, reference, atol=1e-3, rtol=0)


@pytest.mark.parametrize("clips, length, seconds", [(1, 50, 3.0), (3, 40, 3.0), (3, 200, 3.0), (4, 30, 0.1)])
def test_slices_of_long_sound(clips, length, seconds):
    """Each clip is a piece of the whole sound's filter bank, from its own part: in the middle, or where drawn."""
    spec = FbankSpec(length=length, clips=clips)
    samples = noise(seconds)
    waveform = torch.from_numpy(samples.astype(np.float32))[None]
    whole = kaldi.fbank(waveform, num_mel_bins=128, sample_frequency=16_000, dither=0.0)
    whole = ((whole - spec.mean) / (2 * spec.std)).numpy()
    for seed in (None, 0, 1):
        got = decode({"wav": wav(samples)}, spec, rng=None if seed is None else np.random.default_rng(seed))["fbank"]
        for clip in range(clips):
            low, high = len(whole) * clip // clips, len(whole) * (clip + 1) // clips
            size = min(length, high - low)
            starts = range(low, high - size + 1)
            errors = [np.abs(got[clip, :size].numpy() - whole[start : start + size]).max() for start in starts]
            assert min(errors) < 1e-4 and bool((got[clip, size:] == 0).all())
            if seed is None:
                assert starts[int(np.argmin(errors))] == low + (high - low - size) // 2


def test_sound_shorter_than_a_window_is_one_frame():
    got = decode({"wav": wav(noise(0.01))}, FbankSpec(length=20))["fbank"]
    assert bool(torch.isfinite(got).all()) and bool((got[0, 1:] == 0).all()) and bool((got[0, 0] != 0).any())


def test_silence_is_finite():
    assert bool(torch.isfinite(decode({"wav": wav(np.zeros(16_000, np.int16))}, FbankSpec(length=98))["fbank"]).all())


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> TokenSpec:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return TokenSpec(tokenizer=tokenizer.to_str(), max_tokens=6)


def test_ids_are_padded_and_cut(tokens):
    short = decode({"txt": b"a zebra"}, tokens)
    assert short["ids"].tolist() == [2, 4, 1, 3, 0, 0] and short["mask"].tolist() == [1, 1, 1, 1, 0, 0]
    long = decode({"txt": b"a b c d e f"}, tokens)
    assert long["ids"].tolist() == [2, 4, 5, 6, 7, 3] and long["mask"].tolist() == [1] * 6
    assert short["ids"].dtype == short["mask"].dtype == torch.int64


@pytest.mark.parametrize(
    "annotation", [{"captions": ["a", "b", "c"]}, {"caption": ["a", "b", "c"]}, {"desc": ["a", "b", "c"]}]
)
def test_first_caption_or_a_drawn_one(annotation, tokens):
    parts = {"json": json.dumps(annotation).encode()}
    assert decode(parts, tokens)["ids"][1] == 4
    drawn = [int(decode(parts, tokens, rng=np.random.default_rng(seed))["ids"][1]) for seed in range(40)]
    assert set(drawn) == {4, 5, 6}


@pytest.mark.parametrize("parts", [{}, {"json": b"{}"}, {"json": b'{"captions": []}'}, {"txt": b" \n"}])
def test_no_caption_is_no_error(parts, tokens):
    assert decode(parts, tokens) is None


@pytest.mark.parametrize("json_part", [b"{", b"[1]", b'{"captions": 7}', b'{"caption": [1]}', b"\xff", b"[" * 100_000])
def test_broken_annotations_are_corrupt(json_part, tokens):
    with pytest.raises(CorruptSample):
        decode({"json": json_part}, tokens)


def test_a_tokenizer_without_padding_is_refused():
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str()
    with pytest.raises(InputError, match="padding token"):
        decode({"txt": b"a"}, TokenSpec(tokenizer=bare, max_tokens=4))


# -- fields, kinds, absence -------------------------------------------------------------------------------------------


def test_fields_choose_the_part_in_order(encode):
    loud, quiet = wav(noise(0.5)), wav(noise(0.5) // 100)
    spec = FbankSpec(length=48)
    pick = lambda fields: decode({"wav": loud, "other.wav": quiet}, spec, fields=fields)  # noqa: E731
    assert torch.equal(pick(("wav",))["fbank"], pick(None)["fbank"])
    assert torch.equal(pick(("other.wav", "wav"))["fbank"], pick(("other.wav",))["fbank"])
    assert not torch.equal(pick(("wav",))["fbank"], pick(("other.wav",))["fbank"])
    assert pick(("flac",)) is None


def test_sound_of_its_own_comes_before_the_films(encode):
    sound = wav(noise(0.5))
    both = decode({"mp4": encode(frames=10), "wav": sound}, FbankSpec(length=48))["fbank"]
    assert torch.equal(both, decode({"wav": sound}, FbankSpec(length=48))["fbank"])


def test_absent_modalities_are_none(encode):
    assert decode({"mp4": encode(frames=3, audio=None)}, FbankSpec(length=10)) is None
    assert decode({"mp4": encode(video=False, seconds=0.2)}, frames_spec(2, 32)) is None


def test_empty_inputs_look_like_real_ones(mp4, tokens):
    for spec, parts in [
        (frames_spec(2, 32), {"mp4": mp4}),
        (FbankSpec(length=9), {"mp4": mp4}),
        (tokens, {"txt": b"a"}),
    ]:
        real, empty = decode(parts, spec), decoder_of(spec).empty(spec)
        assert {k: (x.shape, x.dtype) for k, x in real.items()} == {k: (x.shape, x.dtype) for k, x in empty.items()}
    assert decoder_of(tokens).empty(tokens)["mask"].sum() == 1


def test_an_unknown_kind_names_the_known():
    with pytest.raises(InputError, match="did you mean 'frames'"):
        decoder_of(SimpleNamespace(kind="frame"))


def test_a_crop_of_everything_is_no_crop(encode):
    mp4 = {"mp4": encode(frames=16)}
    whole = decode(mp4, frames_spec(16, 48), rng=None)["frames"]
    drawn = decode(mp4, frames_spec(16, 48), rng=np.random.default_rng(3), crop_area=1.0)["frames"]
    assert torch.equal(whole, drawn)
    assert not torch.equal(whole, decode(mp4, frames_spec(16, 48), rng=np.random.default_rng(3))["frames"])


def test_noise_words_come_as_often_as_asked_and_anywhere(tokens):
    noise = NoiseWords(0.3, ("zebra", "quagga"))
    plain = decode({"txt": b"a b c"}, tokens)["ids"].tolist()
    drawn = [
        decode({"txt": b"a b c"}, tokens, rng=np.random.default_rng(seed), noise_words=noise)["ids"].tolist()
        for seed in range(400)
    ]
    changed = [ids for ids in drawn if ids != plain]
    assert 0.22 < len(changed) / len(drawn) < 0.38
    assert decode({"txt": b"a b c"}, tokens, noise_words=noise)["ids"].tolist() == plain, "not in evaluation"
    again = decode({"txt": b"a b c"}, tokens, rng=np.random.default_rng(0), noise_words=noise)["ids"].tolist()
    assert again == drawn[0]


def test_a_noise_word_leaves_the_caption_in_its_order():
    noise = NoiseWords(1.0, ("x", "y"))
    texts = {_with_noise("a b", noise, np.random.default_rng(seed)) for seed in range(60)}
    assert texts == {"x a b", "a x b", "a b x", "y a b", "a y b", "a b y"}
