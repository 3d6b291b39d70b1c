"""Media bytes -> frames and waveform, by PyAV (FFmpeg's libraries, bundled in its wheel).

Frames are decoded by plan. The container is demuxed first, which is cheap and gives the exact table of presentation
times; then only the groups of pictures that hold a wanted frame are decoded, each only up to its last wanted frame, and
in between only the pictures that others refer to. The frames equal those of a full decode bit for bit.

Broken media raises `CorruptSample` and nothing else. FFmpeg itself is silent about much of what is missing (a file cut
short gives fewer frames, or less sound), so completeness is checked here: packets against the header's index, sound
against its duration.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .registry import InputError

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
AUDIO_EXTENSIONS = ("wav", "flac", "m4a", "mp3", "ogg", "opus", "aac")

# One packet is one shown frame. Not so e.g. in VP8 with its hidden alternate references: those are decoded in full.
PLANNED_CODECS = frozenset({"h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4", "mpeg2video", "mjpeg"})
# "Not a reference" is a promise about every later picture. In HEVC it is one about the same temporal layer only.
SKIPPABLE_CODECS = frozenset({"h264", "mpeg4", "mpeg2video"})
# Headers of these state no duration: FFmpeg guesses one from the bit rate.
GUESSED_DURATION = frozenset({"mp3", "aac"})
SHORT = 0.02  # the share of the promised duration that may be missing
SLOWEST_HZ = 1000  # no sound has fewer samples a second; at the 1 Hz of a damaged header it would fill the memory
LOUDEST = 2.0**31  # times full scale: room for unscaled samples, none for flipped exponents

Choice = Callable[[int], Sequence[int]]  # number of frames -> the wanted ones, in the order they are wanted


class CorruptSample(Exception):
    """A sample whose bytes cannot be turned into what its headers promise; the message says how."""


@dataclass(frozen=True)
class MediaInfo:
    """What a container's header says.

    Attributes:
        video, audio: does it hold moving pictures, sound that can be decoded.
        undecodable: does it hold moving pictures or sound that nothing here decodes.
        frames: how many (0: unknown).
        seconds: how long it is.
    """

    video: bool
    audio: bool
    undecodable: bool
    frames: int
    seconds: float


def probe(data: bytes) -> MediaInfo:
    """The header of `data`. Raises CorruptSample when there is none."""
    with _errors_named(), _open(data) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        streams = [stream for stream in (video, audio) if stream is not None]
        decodable = [stream for stream in streams if stream.codec_context is not None]
        frames = video.frames if video in decodable else 0
        _require(0 <= frames < 2**31, f"its header promises {frames} frames")
        return MediaInfo(
            video=video in decodable,
            audio=audio in decodable,
            undecodable=len(decodable) < len(streams),
            frames=frames,
            seconds=(container.duration or 0) / 1e6,
        )


def read_frames(data: bytes, choose: Choice) -> list[np.ndarray] | None:
    """The chosen frames of the first video stream: RGB uint8 (H, W, 3) each; None when there is no such stream.

    Args:
        data: a whole media file.
        choose: gets the number of frames, in order of presentation and without those that an edit list cuts away,
            and returns the wanted indices (repeats allowed).
    """
    with _errors_named():
        film = _demux(data, "video")
        if film.video is None:
            return None
        packets = film.packets(film.video)
        shown = sorted(packet.pts for packet in packets if packet.pts is not None and not packet.is_discard)
        timed = len(set(shown)) == len(shown) and all(packet.pts is not None for packet in packets)
        context = film.video.codec_context
        if not timed or context.name not in PLANNED_CODECS:
            return _read_frames_in_full(data, choose)
        _require(len(shown) > 0, "the video stream holds no frame")
        times = [shown[index] for index in choose(len(shown))]
        frames = _decode_planned(context, packets, set(times))
        _require(len(frames) == len(set(times)), f"only {len(frames)} of {len(set(times))} wanted frames decode")
        return [frames[time] for time in times]


def read_frames_decord(data: bytes, choose: Choice) -> list[np.ndarray] | None:
    """`read_frames` by decord. It decodes ordinary files alike; of damaged ones it tells less.

    An index that points behind the end of the file makes decord crash, and the process with it, whichever track it
    belongs to. So all of them are looked at before; what damage is left that decord does not survive is rare.
    """
    import decord

    with _errors_named():
        film = _demux(data, "video")
        if film.video is None:
            return None
        film.packets(film.video)
        for stream in film.container.streams:
            _require_inside(film.container, stream, len(data))
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        return list(reader.get_batch(list(choose(len(reader)))).asnumpy())


VIDEO_DECODERS = {"pyav": read_frames, "decord": read_frames_decord}


def read_audio(data: bytes, sample_rate_hz: int) -> np.ndarray | None:
    """The first audio stream as mono float32 (samples,) in [-1, 1] at `sample_rate_hz`; None when there is none.

    Channels are averaged.
    """
    with _errors_named():
        film = _demux(data, "audio")
        if film.audio is None:
            return None
        packets, context = film.packets(film.audio), film.audio.codec_context
        frames = [frame for packet in [*packets, None] for frame in context.decode(packet)]
        if not frames:
            _require(not packets, "the audio stream does not decode")
            return None  # a track that is declared, and empty
        kinds = {(frame.sample_rate, frame.layout.nb_channels, frame.format.name) for frame in frames}
        _require(len(kinds) == 1, f"the audio changes its form: {sorted(kinds)}")
        waveform = _mono(frames)
        source_hz = frames[0].sample_rate
        _require(source_hz >= SLOWEST_HZ, f"its audio claims {source_hz} samples a second")
        _require(bool(np.abs(waveform).max(initial=0) < LOUDEST), "its audio holds values that are no sound")  # or NaN
        promised = float(sum(p.duration or 0 for p in packets if not p.is_discard) * film.audio.time_base) * source_hz
        _require(
            len(waveform) >= promised * (1 - SHORT) - 2 * max(frame.samples for frame in frames),
            f"the audio decodes to {len(waveform)} of {promised:.0f} samples",
        )
        return _resample(waveform, source_hz, sample_rate_hz)


# -- the container ----------------------------------------------------------------------------------------------------


class _Film:
    """An open container, and all packets of its first video and audio stream.

    Attributes:
        data: the file it was opened from.
        video, audio: the streams, None where there is none.
        taken: the streams that were decoded; a decoder that has run once begins a second time with what it remembers.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.container = _open(data)
        self.video = _video_stream(self.container)
        self.audio = _audio_stream(self.container)
        self.taken: set[str] = set()
        self._packets: dict[int, list] = {}
        streams = [s for s in (self.video, self.audio) if s is not None and s.codec_context is not None]
        for stream in streams:
            stream.codec_context.thread_count = 1  # workers are the parallelism; and skipping is per packet only then
        for packet in self.container.demux(streams) if streams else ():  # asked for none, it gives all
            if packet.size:
                self._packets.setdefault(packet.stream_index, []).append(packet)

    def packets(self, stream) -> list:
        """The stream's packets in decoding order. Raises CorruptSample when some are missing or none can be decoded."""
        _require_decoder(stream)
        packets = self._packets.get(stream.index, [])
        _check_packets(self.container, stream, packets, len(self.data))
        return packets


_latest: _Film | None = None


def _demux(data: bytes, stream: str) -> _Film:
    """The opened film, to decode `stream` ("video", "audio"). The latest one is kept, since a sample's frames and sound
    are asked for one after the other."""
    global _latest
    if _latest is None or _latest.data is not data or stream in _latest.taken:
        if _latest is not None:
            _latest.container.close()
            _latest = None
        _latest = _Film(data)
    _latest.taken.add(stream)
    return _latest


def _open(data: bytes):
    import av

    container = av.open(io.BytesIO(data), metadata_errors="replace")
    _require(len(container.streams) > 0, "its header names no stream")
    return container


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Whatever a damaged file makes PyAV, FFmpeg or the code here raise becomes CorruptSample.

    That is no short list: a flipped bit in a header also gives a ValueError, an OverflowError, a division by zero.
    """
    import av

    try:
        yield
    except (CorruptSample, InputError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # FFmpeg says so of sizes that only a damaged header can ask for
        raise CorruptSample(f"{type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise CorruptSample(reason)


def _video_stream(container):
    """The first video stream that is not the cover picture of a piece of music."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _audio_stream(container):
    """The first audio stream."""
    return next(iter(container.streams.audio), None)


def _require_decoder(stream) -> None:
    """PyAV gives a stream without a codec context where FFmpeg knows no decoder of its codec's tag."""
    _require(stream.codec_context is not None, f"no decoder for its {stream.type}: the codec is unknown or encrypted")


def _check_packets(container, stream, packets: list, size: int) -> None:
    """Are all packets there that the header promises, and do they last as long as it says?"""
    _require_inside(container, stream, size)
    kind = stream.type
    promised = _promised_seconds(container, stream)
    times = [(p.pts, p.duration or 0) for p in packets if p.pts is not None and not p.is_discard]
    if promised is not None and times:
        start, last, end = min(times)[0], max(times)[0], max(pts + duration for pts, duration in times)
        frame = max((last - start) / max(1, len(times) - 1), max(duration for _, duration in times))
        if stream.duration is None:  # what then stands in its place counts from the container's beginning
            start = min(start, 0)
        got, slack = float((end - start) * stream.time_base), 2 * float(frame * stream.time_base)
        _require(got >= promised * (1 - SHORT) - slack, f"holds {got:.2f} of {promised:.2f} s of {kind}")


def _require_inside(container, stream, size: int) -> None:
    """Does the file hold every place that its index names?"""
    if "mp4" in container.format.name:  # an index of every packet; `stream.frames` also counts what an edit list cuts
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        _require(end <= size, f"cut short: its {stream.type} needs {end} bytes and there are {size}")


def _promised_seconds(container, stream) -> float | None:
    """The stream's duration as its header states it, if it does."""
    if container.format.name in GUESSED_DURATION:
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if (tag := stream.metadata.get("DURATION", "")).count(":") == 2:  # Matroska
        hours, minutes, seconds = tag.split(":")
        return float(hours) * 3600 + float(minutes) * 60 + float(seconds)
    alone = len(container.streams.video) + len(container.streams.audio) == 1
    return container.duration / 1e6 if alone and container.duration is not None else None


# -- video ------------------------------------------------------------------------------------------------------------


def _decode_planned(context, packets: list, wanted: set[int]) -> dict[int, np.ndarray]:
    """By presentation time, the wanted frames."""
    to_rgb = _RGB()
    skippable = context.name in SKIPPABLE_CODECS
    found: dict[int, np.ndarray] = {}
    for start, stop in _ranges(packets, wanted):
        for packet in packets[start:stop]:
            if skippable:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in context.decode(packet):
                if frame.pts in wanted:
                    found[frame.pts] = to_rgb(frame)
        for frame in context.decode(None):  # those that wait for reordering
            if frame.pts in wanted:
                found[frame.pts] = to_rgb(frame)
        context.flush_buffers()
    return found


def _ranges(packets: list, wanted: set[int]) -> list[tuple[int, int]]:
    """Ranges of packets, in decoding order, that must be decoded to get the wanted frames.

    A group starts at a key packet. Pictures behind it in decoding order but before it in presentation order (an open
    group) refer to the group before, which is then needed too.
    """
    starts = [i for i, packet in enumerate(packets) if packet.is_keyframe or i == 0]
    ranges: list[tuple[int, int]] = []
    for start, end in zip(starts, [*starts[1:], len(packets)], strict=True):
        hits = [i for i in range(start, end) if packets[i].pts in wanted]
        if not hits:
            continue
        stop = hits[-1] + 1
        if any(packets[i].pts < packets[start].pts for i in hits) and start > 0:
            start = starts[starts.index(start) - 1]
        if ranges and start <= ranges[-1][1]:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


def _read_frames_in_full(data: bytes, choose: Choice) -> list[np.ndarray]:
    """Two passes over all frames: count, then pick. For what cannot be planned."""
    count = sum(1 for _ in _all_frames(data))
    _require(count > 0, "the video stream holds no frame")
    wanted = list(choose(count))
    to_rgb = _RGB()
    found = {index: to_rgb(frame) for index, frame in enumerate(_all_frames(data)) if index in wanted}
    return [found[index] for index in wanted]


def _all_frames(data: bytes) -> Iterator:
    with _open(data) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


class _RGB:
    """Frame -> RGB uint8 (H, W, 3), upright, at its own size. One converter serves all frames of a clip."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        quarter_turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if quarter_turns else rgb


# -- audio ------------------------------------------------------------------------------------------------------------


def _mono(frames: list) -> np.ndarray:
    """The mean over channels of audio frames of one form, float32 (samples,) in [-1, 1]."""
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    if not frames[0].format.is_planar:
        samples = samples.reshape(-1, frames[0].layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.mean(axis=0, dtype=np.float32)


def _resample(waveform: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    if source_hz == target_hz:
        return waveform
    import av

    frame = av.AudioFrame.from_ndarray(waveform[None], format="flt", layout="mono")
    frame.sample_rate = source_hz
    resampler = av.AudioResampler(format="flt", layout="mono", rate=target_hz)
    return np.concatenate([piece.to_ndarray()[0] for piece in [*resampler.resample(frame), *resampler.resample(None)]])
