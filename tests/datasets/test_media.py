from __future__ import annotations

import io
import wave
from collections import Counter

import av
import numpy as np
import pytest

from trivium.datasets import media
from trivium.datasets.media import (
    CorruptSample,
    probe,
    read_audio,
    read_frames,
    read_frames_decord,
)
from trivium.datasets.registry import InputError


def decode_all(data: bytes) -> list[np.ndarray]:
    """The reference: every frame, by the plainest loop there is."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


FILES = {
    "one group, B-frames": {"options": {"g": "250", "bf": "3"}},
    "short groups": {"options": {"g": "10", "bf": "2"}},
    "open groups": {"options": {"g": "10", "bf": "3", "x264-params": "open-gop=1"}},
    "pyramid": {"options": {"g": "25", "bf": "7", "x264-params": "b-pyramid=normal:ref=4"}},
    "no B-frames": {"options": {"g": "25", "bf": "0"}},
    "all key frames": {"options": {"g": "1"}},
    "variable rate": {"times": [i * 4 + (i * i) % 7 + i // 10 * 50 for i in range(60)], "options": {"g": "25"}},
    "matroska": {"container": "matroska", "options": {"g": "10", "x264-params": "open-gop=1"}},
    "matroska that starts late": {"container": "matroska", "audio": None, "times": [300 + 4 * i for i in range(60)]},
    "fragmented": {"container": "fragmented", "options": {"g": "25"}},
    "avi": {"codec": "mpeg4", "container": "avi", "audio": None},
    "hevc, open groups": {"codec": "libx265", "options": {"x265-params": "keyint=10:open-gop=1:bframes=3:log-level=0"}},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "audio": None, "options": {"g": "20", "deadline": "realtime"}},
    "vp8": {
        "codec": "libvpx", "container": "webm", "audio": None,
        "options": {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "20", "deadline": "good", "cpu-used": "5"},
    },
    "mpeg2": {"codec": "mpeg2video", "container": "mpegts", "audio": None, "options": {"g": "12", "bf": "2"}},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_planned_decode_equals_full_decode(name, encode):
    data = encode(**FILES[name])
    reference = decode_all(data)
    assert len(reference) == 60
    rng = np.random.default_rng(1)
    for count in (1, 1, 1, 2, 4, 8, 60):
        wanted = sorted(rng.choice(60, size=count, replace=False).tolist())
        frames = read_frames(data, lambda n, wanted=wanted: wanted if n == 60 else pytest.fail(f"{n} frames"))
        for index, frame in zip(wanted, frames, strict=True):
            assert np.array_equal(frame, reference[index]), f"frame {index} of {wanted}"


@pytest.mark.parametrize("first", [3, 27, 40])
def test_frames_before_an_edit_list_do_not_count(first, encode, cut_without_decoding):
    whole = encode(audio=None, options={"g": "25", "bf": "3"})
    data = cut_without_decoding(whole, first)
    reference = decode_all(whole)[first:]
    frames = read_frames(data, lambda n: range(n))
    assert len(frames) == len(reference) == 60 - first
    assert all(np.array_equal(a, b) for a, b in zip(frames, reference, strict=True))


def test_only_needed_frames_are_decoded(encode, monkeypatch):
    """One late frame of a late group: the earlier groups and the pictures that nothing refers to stay encoded."""
    import trivium.datasets.media as media

    data = encode(options={"g": "20", "bf": "3"})
    ranges = []
    plan = media._ranges
    monkeypatch.setattr(media, "_ranges", lambda *a: ranges.extend(plan(*a)) or plan(*a))
    read_frames(data, lambda n: [45])
    assert len(ranges) == 1 and ranges[0][0] == 40 and ranges[0][1] < 60


@pytest.mark.parametrize("options", [{"g": "250"}, {"g": "10", "bf": "3"}])
def test_decord_gives_the_same_frames(options, encode):
    data = encode(options=options)
    wanted = [0, 7, 8, 31, 59]
    ours, theirs = read_frames(data, lambda n: wanted), read_frames_decord(data, lambda n: wanted)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rotated_video_comes_upright(encode):
    """A telephone held upright: the pixels lie, and a matrix in the track header says so."""
    data = encode(audio=None)
    upright = np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4").tobytes()
    quarter = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4").tobytes()
    track = data.rindex(b"tkhd")
    at = data.index(upright, track)
    turned = data[:at] + quarter + data[at + len(quarter) :]
    plain, frame = read_frames(data, lambda n: [5])[0], read_frames(turned, lambda n: [5])[0]
    assert frame.shape == (96, 64, 3)
    assert np.array_equal(frame, np.rot90(plain, -1))  # a quarter clockwise


# -- sound ------------------------------------------------------------------------------------------------------------


def wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(sample_rate_hz)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, low, high", [(np.int16, -32768, 32768), (np.uint8, 0, 256), (np.int32, -(2**31), 2**31)]
)
def test_channels_are_averaged_at_full_scale(kind, low, high):
    samples = np.random.default_rng(0).integers(low, high, (5000, 2)).astype(kind)
    middle = (low + high) / 2
    expected = ((samples.astype(np.float64) - middle) / ((high - low) / 2)).mean(axis=1)
    got = read_audio(wav(samples, 16_000), 16_000)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_resampling_keeps_a_tone():
    tone = np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    got = read_audio(wav((tone * 20_000).astype(np.int16)[:, None], 44_100), 16_000)
    expected = 20_000 / 32_768 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert abs(len(got) - 16_000) <= 1
    np.testing.assert_allclose(got[200:15_800], expected[200:15_800], atol=2e-3)


@pytest.mark.parametrize(
    "container, audio, hz",
    [("mp4", "aac", 44_100), ("matroska", "aac", 22_050), ("ogg", "libopus", 48_000), ("flac", "flac", 8000)],
)
def test_sound_of_compressed_files_is_complete(container, audio, hz, encode):
    data = encode(video=False, container=container, audio=audio, seconds=2.0, sample_rate_hz=hz)
    got = read_audio(data, 16_000)
    assert 2.0 * 16_000 * 0.98 <= len(got) <= 2.1 * 16_000
    spectrum = np.abs(np.fft.rfft(got[2000:30_000]))
    assert abs(spectrum.argmax() * 16_000 / 28_000 - 440) < 1


def test_reading_again_gives_the_same(mp4, encode):
    """Frames and sound of one file share an opened container, in any order and number."""
    other = encode(frames=10, seed=3)
    once = read_frames(bytes(bytearray(mp4)), lambda n: [3, 40]), read_audio(bytes(bytearray(mp4)), 16_000)
    for data in (mp4, mp4, other, mp4):
        sound, frames = read_audio(data, 16_000), read_frames(data, lambda n: [3, 40] if n == 60 else [3, 4])
        if data is mp4:
            assert np.array_equal(sound, once[1])
            assert all(np.array_equal(a, b) for a, b in zip(frames, once[0], strict=True))


# -- broken and odd files ---------------------------------------------------------------------------------------------


def test_missing_streams_are_no_error(encode):
    silent, blind = encode(audio=None), encode(video=False)
    assert read_audio(silent, 16_000) is None and read_frames(blind, lambda n: [0]) is None
    assert read_frames_decord(blind, lambda n: [0]) is None
    assert probe(silent).video and not probe(silent).audio
    assert probe(blind).audio and not probe(blind).video


def test_header_facts(mp4):
    info = probe(mp4)
    assert (info.video, info.audio, info.frames) == (True, True, 60)
    assert 2.4 <= info.seconds <= 2.5


def front(data: bytes) -> bytes:
    """The same mp4 with its index before the media, as files for the web have it."""
    media, index = data.index(b"mdat") - 4, data.index(b"moov") - 4
    moved = bytearray(data[index:])
    for table in (i for i in range(len(moved)) if moved[i : i + 4] == b"stco"):  # the media's places in the file
        count = int.from_bytes(moved[table + 8 : table + 12], "big")
        places = np.frombuffer(moved, ">u4", count, table + 12) + len(moved)
        moved[table + 12 : table + 12 + 4 * count] = places.astype(">u4").tobytes()
    return data[:media] + bytes(moved) + data[media:index]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + b"\xff" * 200 + data[at + 200 :]


BROKEN = {
    "empty": lambda data: b"",
    "html": lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "64 bytes": lambda data: data[:64],
    "header only": lambda data: front(data)[: front(data).index(b"mdat") + 4],
    "64 bytes, index in front": lambda data: front(data)[:64],
    "first half": lambda data: data[: len(data) // 2],
    "first half, index in front": lambda data: front(data)[: len(data) // 2],
    "last tenth missing, index in front": lambda data: front(data)[: len(data) * 9 // 10],
    "index flipped": lambda data: flip(flip(data, data.index(b"stsz") + 20), data.rindex(b"stsz") + 20),
}


@pytest.mark.parametrize("reader", [read_frames, read_frames_decord])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_video_is_corrupt(case, reader, mp4):
    with pytest.raises(CorruptSample) as error:
        reader(BROKEN[case](mp4), lambda n: range(n))
    assert "\n" not in str(error.value) and str(error.value)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sound_is_corrupt(case, mp4):
    with pytest.raises(CorruptSample):
        read_audio(BROKEN[case](mp4), 16_000)


def test_one_missing_frame_is_noticed(mp4):
    """Shorter by less than any tolerance: the index names bytes that are not there."""
    data = front(mp4)
    with av.open(io.BytesIO(data)) as container:
        last = max(entry.pos + entry.size for entry in container.streams.video[0].index_entries)
    assert len(read_frames(data[:last], lambda n: range(n))) == 60
    with pytest.raises(CorruptSample, match="cut short"):
        read_frames(data[: last - 1], lambda n: range(n))


def test_front_is_the_same_film(mp4):
    assert all(np.array_equal(a, b) for a, b in zip(decode_all(front(mp4)), decode_all(mp4), strict=True))


@pytest.mark.parametrize("container", ["matroska", "avi"])
def test_half_a_file_without_index_is_corrupt(container, encode):
    codec = {"codec": "mpeg4", "audio": None} if container == "avi" else {}
    data = encode(container=container, **codec)
    with pytest.raises(CorruptSample, match="of"):
        read_frames(data[: len(data) // 2], lambda n: range(n))


def test_damage_inside_is_never_short(mp4):
    """Flipped bytes in the media: either it is reported, or everything comes, at full length."""
    rng = np.random.default_rng(0)
    start, stop = mp4.index(b"mdat") + 4, mp4.index(b"moov")
    for _ in range(12):
        data = bytearray(mp4)
        at = int(rng.integers(start, stop - 200))
        data[at : at + 200] = rng.bytes(200)
        try:
            assert len(read_frames(bytes(data), lambda n: range(n))) == 60
            assert len(read_audio(bytes(data), 16_000)) >= 0.95 * 60 / 25 * 16_000
        except CorruptSample:
            continue


def read_frames_in_full(data: bytes, choose: media.Choice) -> list[np.ndarray] | None:
    """What `read_frames` does with a codec that it cannot plan."""
    planned, media.PLANNED_CODECS = media.PLANNED_CODECS, frozenset()
    try:
        return read_frames(data, choose)
    finally:
        media.PLANNED_CODECS = planned


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The same mp4 with some bytes of its header changed."""
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(data.index(b"moov"), len(data), size=rng.integers(1, 9))
    changed[places] = rng.integers(256, size=len(places))
    return changed.tobytes()


def test_a_damaged_header_is_corrupt_or_harmless(encode):
    """Whatever it says, no reader raises anything but CorruptSample: that would end the run."""
    data = encode(frames=12, options={"g": "6", "bf": "2"})
    assert data.index(b"moov") > data.index(b"mdat")
    rng, outcomes = np.random.default_rng(0), Counter()
    readers = {
        "planned": lambda data: read_frames(data, lambda n: [0, n - 1]),
        "in full": lambda data: read_frames_in_full(data, lambda n: [0, n - 1]),
        "sound": lambda data: read_audio(data, 16_000),
        "header": probe,
    }
    for _ in range(400):
        film = damaged(data, rng)
        for name, read in readers.items():
            try:
                read(film)
                outcomes[name, "read"] += 1
            except CorruptSample as error:
                assert str(error) and "\n" not in str(error)
                outcomes[name, "corrupt"] += 1
    assert len(outcomes) == 2 * len(readers) and min(outcomes.values()) > 20


@pytest.mark.parametrize("error", [ValueError("no"), AttributeError("two\nlines"), OverflowError(), KeyError(3)])
@pytest.mark.parametrize("reader", [read_frames, read_frames_in_full, read_frames_decord, read_audio, probe])
def test_every_reader_names_what_went_wrong(reader, error, mp4, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(media, "_open", fail)
    choice = {read_audio: [16_000], probe: []}.get(reader, [lambda n: [0]])
    with pytest.raises(CorruptSample, match=f"{type(error).__name__}: ") as caught:
        reader(bytes(bytearray(mp4)), *choice)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [InputError("the user's mistake"), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_damage_keeps_its_name(error, mp4):
    def fail(_):
        raise error

    with pytest.raises(type(error)):
        read_frames(mp4, fail)


@pytest.mark.parametrize("tag", [b"zzzz", b"encv"])
def test_an_unknown_codec_leaves_the_rest_readable(tag, mp4):
    data = mp4.replace(b"avc1", tag)
    for reader in (read_frames, read_frames_decord):
        with pytest.raises(CorruptSample, match="no decoder for its video"):
            reader(data, lambda n: [0])
    assert np.array_equal(read_audio(data, 16_000), read_audio(mp4, 16_000))
    info = probe(data)
    assert (info.video, info.audio, info.undecodable, info.frames) == (False, True, True, 0)


def test_unknown_sound_leaves_the_frames_readable(encode):
    data = encode(frames=20, audio="aac").replace(b"mp4a", b"zzzz")
    sound = data.rindex(b"esds")  # names the codec a second time
    data = data[:sound] + b"free" + data[sound + 4 :]
    assert len(read_frames(data, lambda n: range(n))) == len(read_frames_decord(data, lambda n: range(n))) == 20
    with pytest.raises(CorruptSample, match="no decoder for its audio"):
        read_audio(data, 16_000)
    assert probe(data).video and not probe(data).audio and probe(data).undecodable


@pytest.mark.parametrize("table", [b"stsz", b"stco"])
def test_decord_gets_no_index_that_it_would_not_survive(table, mp4):
    """Of the sound, which it demuxes too: it reads behind the end of the file."""
    at = mp4.rindex(table) + (17 if table == b"stsz" else 13)  # the second byte of an entry
    with pytest.raises(CorruptSample, match=r"cut short: its audio|s of video"):
        read_frames_decord(mp4[:at] + b"\x40" + mp4[at + 1 :], lambda n: [0])


def test_absurd_sound_is_corrupt():
    """As a damaged header has it: few samples a second become very many, and not-a-number spreads to the weights."""
    data = wav(np.zeros((5000, 1), np.int16), 16_000)
    with pytest.raises(CorruptSample, match="claims 1 samples a second"):
        read_audio(data[:24] + (1).to_bytes(4, "little") + data[28:], 16_000)
    floats = bytearray(wav(np.zeros((5000, 1), np.int32), 16_000))
    floats[20] = 3  # the format's tag: floating point
    assert len(read_audio(bytes(floats), 16_000)) == 5000
    for value in (np.nan, np.inf, 1e30):
        floats[1000:1004] = np.float32(value).tobytes()
        with pytest.raises(CorruptSample, match="no sound"):
            read_audio(bytes(floats), 16_000)


def test_very_short_films_are_whole(encode):
    assert len(read_frames(encode(frames=3), lambda n: range(n))) == 3
    assert len(read_frames(encode(frames=1, audio=None), lambda n: [0] * 4)) == 4
