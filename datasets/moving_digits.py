"""moving-digits: small real videos of handwritten digits that move and sound, with captions.

After SyncDraw's Moving MNIST (Mittal et al. 2017), with scikit-learn's 8x8 digits, which need no download, and with
sound. A digit moves up and down or left and right and meanwhile sounds its telephone tone pair (DTMF, ITU-T Q.23); the
pitch follows its height, or the loudness its way to the right. Caption, picture and sound each tell both digit and
motion, and every caption fits all clips of its bucket: one to many.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .processes import leave_with_the_run
from .registry import SOURCES, InputError
from .shards import Index, shards_of, write_shards

VERSION = 3  # of the clips; a change of what is drawn, sounded or said raises it
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}  # share of the handwriting images
MOTIONS = ("up and down", "left and right")
TEMPLATES = (
    "the digit {digit} is moving {motion}",
    "a handwritten {digit} moves {motion}",
    "the number {digit} goes {motion}",
    "{digit} travels {motion} on a black background",
    "a white {digit} that keeps moving {motion}",
    "we see the digit {digit} drift {motion}",
    "a {digit} bounces {motion} in the dark",
    "the handwritten digit {digit} wanders {motion}",
)
CAPTIONS = 4  # per clip
DTMF_HZ = {
    0: (941, 1336), 1: (697, 1209), 2: (697, 1336), 3: (697, 1477), 4: (770, 1209),
    5: (770, 1336), 6: (770, 1477), 7: (852, 1209), 8: (852, 1336), 9: (852, 1477),
}  # fmt: skip
SAMPLE_RATE_HZ = 16_000
GLIDE_OCTAVES = 0.06  # up and down from the pair; the pairs lie 0.14 apart, so that they never meet
QUIET = 0.1  # loudness at the left edge
MIDDLE = (0.4, 0.6)  # anywhere in [0, 1], no linear map of a mean over single frames could tell the motion
GLYPH = 28 / 64  # of the picture's size
CLIPS_PER_SHARD = 500


@dataclass(frozen=True)
class Mover:
    """One digit on its way.

    Attributes:
        digit: 0 to 9.
        motion: 0 up and down, 1 left and right.
        image: which handwriting.
        across: where it stays on the other axis, within MIDDLE.
        phase: where it starts on its way there and back, in [0, 2).
        speed: ways per frame.
    """

    digit: int
    motion: int
    image: int
    across: float
    phase: float
    speed: float

    def place(self, frame: np.ndarray) -> np.ndarray:
        """Where it is at a time in frames: 0 at the top or left, 1 at the bottom or right; it bounces at both."""
        way = (self.phase + self.speed * frame) % 2
        return np.minimum(way, 2 - way)


@SOURCES.register("moving-digits")
class MovingDigits:
    """Videos of handwritten digits that move and sound (SyncDraw's Moving MNIST, with telephone tones).

    Args:
        digits: digits in a clip. One gives 20 buckets (digit x motion), two give 210.
        train: clips to train on.
        val: clips to validate on.
        test: clips to test on; the three share no handwriting.
        seed: of everything random.
        size: height and width in pixels.
        frames: per clip.
        fps: frames per second.
    """

    def __init__(
        self,
        *,
        digits: Literal[1, 2] = 1,
        train: int = 6000,
        val: int = 500,
        test: int = 500,
        seed: int = 0,
        size: int = 64,
        frames: int = 16,
        fps: int = 8,
    ) -> None:
        self.options = {
            "digits": digits, "train": train, "val": val, "test": test,
            "seed": seed, "size": size, "frames": frames, "fps": fps,
        }  # fmt: skip
        for name, least in {"train": 1, "val": 1, "test": 1, "seed": 0, "size": 32, "frames": 2, "fps": 1}.items():
            if self.options[name] < least:
                raise InputError(f"{name}={self.options[name]} is too small; use at least {least}")
        if size % 2:
            raise InputError(f"size={size} is odd, which H.264 cannot hold; use {size - 1} or {size + 1}")
        self.digits, self.seed, self.size, self.frames, self.fps = digits, seed, size, frames, fps

    def prepare(self, out: Path) -> dict[str, Any]:
        """Write `<split>-000000.tar` ..., their indexes, `vocab.txt` and `card.json` into `out`; returns the card.

        A complete earlier result of the same options is kept; an unfinished one, and one of another version of this
        source, is written again. Two runs write the same bytes. Raises InputError when `out` holds something else, or
        cannot be written.
        """
        from rich.console import Console

        out = Path(out)
        console = Console(stderr=True)
        try:
            card = self._existing(out, console)
            if card is not None:
                console.print(f"moving-digits: {out} is complete ({self._total} clips), kept", highlight=False)
                return card
            return self._write(out, console)
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}; choose another folder") from None

    @property
    def _total(self) -> int:
        return sum(self.options[split] for split in SPLITS)

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _existing(self, out: Path, console) -> dict[str, Any] | None:
        """The card of a complete result in `out`, None when it is to be written. InputError when that would destroy."""
        begun = (out / _MARKER).exists()
        try:
            card = json.loads((out / "card.json").read_text())
            wanted = {"source": "moving-digits", "options": self.options}
            found, version = {name: card[name] for name in wanted}, card.get("version")
            splits = card["splits"].values() if version == VERSION else ()
            shards = {path: size for split in splits for path, size in split["shards"].items()}
        except FileNotFoundError:
            if not begun and out.is_dir() and any(shards_of(out, split) for split in SPLITS):
                raise InputError(f"{out} holds shards that are not this source's; choose another folder") from None
            return None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{out / 'card.json'} is not this source's; choose another folder") from None
        if found != wanted and not begun:
            differ = {k: v for k, v in (found["options"] or {}).items() if self.options.get(k) != v} or found["source"]
            raise InputError(f"{out} holds another result ({differ}); choose another folder, or delete that one")
        if version != VERSION:
            console.print(
                f"moving-digits: {out} holds version {version} of these clips, version {VERSION} replaces it",
                highlight=False,
            )
            return None
        present = {path.name: path.stat().st_size for split in SPLITS for path in shards_of(out, split)}
        return card if present == shards and not begun and (out / "vocab.txt").is_file() else None

    def _write(self, out: Path, console) -> dict[str, Any]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).touch()
        (out / "card.json").unlink(missing_ok=True)
        glyphs, labels = _glyphs(round(self.size * GLYPH))
        images = _split_images(labels, self.seed)
        card = {"source": "moving-digits", "version": VERSION, "options": self.options}
        card |= {"seconds": self.frames / self.fps, "missing": 0, "corrupt": 0, "splits": {}}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with _pool(self._total, (self, glyphs)) as run, Progress(*columns, console=console) as progress:
            for number, split in enumerate(SPLITS):
                plans = self._plan(number, self.options[split], labels, images[split])
                samples = run(_make_sample, [(f"{split}-{i:06d}", *plan) for i, plan in enumerate(plans)])
                samples = progress.track(samples, total=len(plans), description=f"moving-digits {split}")
                shards = write_shards(samples, out, split, CLIPS_PER_SHARD)
                list(run(_index, shards))
                card["splits"][split] = {
                    "clips": len(plans),
                    "handwritings": len(images[split]),
                    "buckets": len({self.bucket(movers) for movers, _ in plans}),
                    "shards": {path.name: path.stat().st_size for path in shards},
                }
        (out / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
        (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        (out / _MARKER).unlink()
        return card

    # -- one clip -----------------------------------------------------------------------------------------------------

    def _plan(self, split: int, clips: int, labels: np.ndarray, images: np.ndarray) -> list[tuple]:
        """For each clip of a split, its movers and captions: all that is random, drawn here."""
        of_digit = [images[labels[images] == digit] for digit in range(10)]
        plans = []
        for clip in range(clips):
            rng = np.random.default_rng((self.seed, split, clip))
            kinds = [clip % 20] if self.digits == 1 else rng.integers(20, size=2).tolist()
            movers = []
            for digit, motion in (divmod(kind, 2) for kind in kinds):
                speed = rng.uniform(3, 7) / 36  # in pixels of 64, of a way of 36, per frame
                where = rng.uniform(*MIDDLE), rng.uniform(0, 2)
                movers.append(Mover(digit, motion, int(rng.choice(of_digit[digit])), *where, speed))
            captions = [describe(movers, TEMPLATES[i]) for i in rng.permutation(len(TEMPLATES))[:CAPTIONS]]
            plans.append((movers, captions))
        return plans

    def bucket(self, movers: list[Mover]) -> int:
        """digit * 2 + motion; of two digits, in any order, one number for each pair of these."""
        first, *second = sorted(mover.digit * 2 + mover.motion for mover in movers)
        return first * 20 + second[0] if second else first

    def annotation(self, movers: list[Mover], captions: list[str]) -> dict[str, Any]:
        """The JSON part."""
        digits, motions = [m.digit for m in movers], [MOTIONS[m.motion] for m in movers]
        one = {"digit": digits[0], "motion": motions[0]}
        which = one if self.digits == 1 else {"digits": digits, "motions": motions}
        return {"captions": captions, "bucket": self.bucket(movers), **which}

    def pictures(self, movers: list[Mover], glyphs: np.ndarray) -> np.ndarray:
        """uint8 (frames, size, size), white on black."""
        pictures = np.zeros((self.frames, self.size, self.size), np.uint8)
        side = glyphs.shape[-1]
        way = self.size - side
        for mover in movers:
            across = round(mover.across * way)
            for picture, place in zip(pictures, mover.place(np.arange(self.frames)), strict=True):
                along = round(float(place) * way)
                top, left = (along, across) if mover.motion == 0 else (across, along)
                window = picture[top : top + side, left : left + side]
                np.maximum(window, glyphs[mover.image], out=window)
        return pictures

    def sound(self, movers: list[Mover]) -> np.ndarray:
        """float32 (samples,) at 16 kHz, as long as the pictures."""
        samples = np.arange(round(self.frames / self.fps * SAMPLE_RATE_HZ))
        waveform = np.zeros(len(samples))
        for mover in movers:
            place = mover.place(samples / SAMPLE_RATE_HZ * self.fps)
            pitch = 2 ** (GLIDE_OCTAVES * (1 - 2 * place)) if mover.motion == 0 else np.ones(len(samples))
            loudness = QUIET + (1 - QUIET) * place if mover.motion == 1 else (1 + QUIET) / 2
            seconds = np.cumsum(pitch) / SAMPLE_RATE_HZ
            for hz in DTMF_HZ[mover.digit]:
                turn = (hz * seconds % 1).astype(np.float32)  # a sine in single precision takes a fifth of the time
                waveform += loudness * np.sin(2 * np.pi * turn)
        return (0.4 / len(movers) * waveform).astype(np.float32)


_MARKER = ".moving-digits.unfinished"


def describe(movers: list[Mover], template: str) -> str:
    """The caption of a clip by one template."""
    return " and ".join(template.format(digit=mover.digit, motion=MOTIONS[mover.motion]) for mover in movers)


def vocabulary() -> list[str]:
    """A WordPiece vocabulary of all captions; what else is written falls apart into letters, not into [UNK]."""
    texts = [template.format(digit="", motion=motion) for template in TEMPLATES for motion in MOTIONS]
    words = sorted({word for text in texts for word in text.split()} | {"and"})
    signs = list("0123456789abcdefghijklmnopqrstuvwxyz")
    pieces = [*signs, *words, *(f"##{sign}" for sign in signs), *".,'-"]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]


def encode_mp4(pictures: np.ndarray, waveform: np.ndarray, fps: int) -> bytes:
    """H.264 (yuv420p) and AAC (mono) in an mp4; the same bytes for the same clip.

    Args:
        pictures: uint8 (frames, size, size), grey.
        waveform: float32 (samples,) at 16 kHz in [-1, 1].
    """
    import av

    buffer = io.BytesIO()
    size = pictures.shape[-1]
    planes = np.full((len(pictures), size * 3 // 2, size), 128, np.uint8)  # Y, then grey U and V
    planes[:, :size] = np.round(16 + pictures * (219 / 255))
    with av.open(buffer, "w", format="mp4") as container:
        # what looks ahead reads past the edge of pictures this small: other bytes now and then
        blind = "bframes=0:mbtree=0:rc-lookahead=0:scenecut=0"
        options = {"preset": "veryfast", "crf": "18", "x264-params": blind}
        video = container.add_stream("libx264", rate=fps, options=options)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # several threads may give other bytes
        # 37 dB between these tones and the coding noise; the default search takes five times as long and is worse here
        options = {"aac_coder": "fast", "aac_pns": "0", "aac_tns": "0"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono", options=options)
        audio.bit_rate = 16_000
        for plane in planes:
            container.mux(video.encode(av.VideoFrame.from_ndarray(plane, format="yuv420p")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return buffer.getvalue()


@cache
def _glyphs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits, smoothly enlarged: uint8 (1797, side, side), and their labels."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = [zoom(image, side / 8, order=3, mode="grid-constant", grid_mode=True) for image in digits.images]
    return np.clip(np.stack(large) * (255 / 16), 0, 255).round().astype(np.uint8), digits.target


def _split_images(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """By split, the handwriting images it may use: of every digit the same share, none in two splits."""
    pieces: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    edges = np.cumsum(list(SPLITS.values()))[:-1]
    for digit in range(10):
        images = np.random.default_rng((seed, digit)).permutation(np.flatnonzero(labels == digit))
        for split, piece in zip(SPLITS, np.split(images, np.round(edges * len(images)).astype(int)), strict=True):
            pieces[split].append(piece)
    return {split: np.concatenate(parts) for split, parts in pieces.items()}


# -- several processes ------------------------------------------------------------------------------------------------

_shared: tuple[MovingDigits, np.ndarray]  # of a worker process


@contextmanager
def _pool(clips: int, shared: tuple[MovingDigits, np.ndarray]) -> Iterator:
    """A `map` over processes that hold `shared`; in this process when there is little to do."""
    processes = min(len(os.sched_getaffinity(0)), 16)
    if processes == 1 or clips < 400:
        _share(shared)
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(shared,)) as pool:
        yield lambda function, items: pool.map(function, items, chunksize=max(1, min(25, len(items) // processes)))


def _begin(shared: tuple[MovingDigits, np.ndarray]) -> None:
    leave_with_the_run()
    _share(shared)


def _share(shared: tuple[MovingDigits, np.ndarray]) -> None:
    global _shared
    _shared = shared


def _make_sample(plan: tuple[str, list[Mover], list[str]]) -> dict[str, Any]:
    key, movers, captions = plan
    source, glyphs = _shared
    media = encode_mp4(source.pictures(movers, glyphs), source.sound(movers), source.fps)
    return {"__key__": key, "mp4": media, "json": source.annotation(movers, captions)}


def _index(shard: Path) -> int:
    return len(Index.open(str(shard)))
