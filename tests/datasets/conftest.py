"""Small real media files, and shards of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

SIZE = (96, 64)


def _pictures(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 (count, H, W, 3): texture that moves, so that no two frames are alike and motion vectors matter."""
    width, height = size
    large = np.random.default_rng(seed).integers(0, 256, (height // 4 + count, width // 4 + count, 3), dtype=np.uint8)
    large = large.repeat(4, 0).repeat(4, 1)
    return np.stack([large[2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(count)])


def _encode(
    frames: int = 60,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    audio: str | None = "aac",
    sample_rate_hz: int = 44_100,
    seconds: float | None = None,
    video: bool = True,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
) -> bytes:
    """A media file at 25 frames a second; `times` gives other presentation times, in 1/100 s."""
    buffer = io.BytesIO()
    movflags = {"options": {"movflags": "frag_keyframe+empty_moov"}} if container == "fragmented" else {}
    container = "mp4" if container == "fragmented" else container
    with av.open(buffer, "w", format=container, **movflags) as out:
        if video:
            stream = out.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            if times:
                stream.codec_context.time_base = Fraction(1, 100)
        if audio:
            sound = out.add_stream(audio, rate=sample_rate_hz, layout="stereo" if audio == "aac" else "mono")
        if video:
            for number, picture in enumerate(_pictures(frames, seed, size)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if times:
                    frame.pts, frame.time_base = times[number], Fraction(1, 100)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        if audio:
            length = round((seconds or frames / 25) * sample_rate_hz)
            tone = np.sin(2 * np.pi * 440 * np.arange(length) / sample_rate_hz) * 0.5
            if audio == "aac":
                frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]).astype(np.float32), "fltp", "stereo")
            else:
                frame = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate = sample_rate_hz
            out.mux(sound.encode(frame))
            out.mux(sound.encode())
    return buffer.getvalue()


def _cut_without_decoding(data: bytes, first: int) -> bytes:
    """The file from frame `first` on as `ffmpeg -ss -c copy` makes it: earlier frames stay, an edit list hides them."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as out:
        video = source.streams.video[0]
        target = out.add_stream_from_template(video)
        packets = [packet for packet in source.demux(video) if packet.size]
        start = sorted(packet.pts for packet in packets)[first]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start]
        for packet in packets[keys[-1] :]:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, target
            out.mux(packet)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return _encode


@pytest.fixture(scope="session")
def cut_without_decoding() -> Callable[[bytes, int], bytes]:
    return _cut_without_decoding


@pytest.fixture(scope="session")
def mp4() -> bytes:
    """60 frames in groups of 25 with B-frames, and stereo sound."""
    return _encode(options={"g": "25", "bf": "3", "crf": "20"})


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small moving-digits folder: 60 / 20 / 20 clips."""
    from trivium.datasets.moving_digits import MovingDigits

    folder = tmp_path_factory.mktemp("moving digits")  # with a space
    MovingDigits(train=60, val=20, test=20).prepare(folder)
    return folder
