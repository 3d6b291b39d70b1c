from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from trivium.datasets import moving_digits
from trivium.datasets.media import probe, read_audio, read_frames
from trivium.datasets.moving_digits import DTMF_HZ, MOTIONS, MovingDigits, encode_mp4, vocabulary
from trivium.datasets.registry import SOURCES, InputError
from trivium.datasets.shards import Index


def clips(folder: Path, split: str) -> list[tuple[dict, bytes]]:
    index = Index.open(str(folder / f"{split}-*.tar"))
    parts = [index.read(i) for i in range(len(index))]
    return [(json.loads(part["json"]), part["mp4"]) for part in parts]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def train(digits) -> list[tuple[dict, bytes]]:
    return clips(digits, "train")


def test_it_is_a_registered_source():
    assert "moving-digits" in SOURCES.names()
    assert isinstance(SOURCES.build("moving-digits", train=5), MovingDigits)


def test_the_card_counts(digits):
    card = json.loads((digits / "card.json").read_text())
    assert {split: facts["clips"] for split, facts in card["splits"].items()} == {"train": 60, "val": 20, "test": 20}
    for split, facts in card["splits"].items():
        index = Index.open(str(digits / f"{split}-*.tar"))
        assert len(index) == facts["clips"] and np.bincount(index.bucket, minlength=20).min() >= 1
        assert facts["buckets"] == 20 and facts["handwritings"] > 200
        assert (index.captions == moving_digits.CAPTIONS).all() and (index.frames == 16).all()
        assert set(facts["shards"]) == {path.name for path in digits.glob(f"{split}-*.tar")}


def test_clips_are_h264_and_aac(train):
    import av

    for _, media in train[:3]:
        assert probe(media).video and probe(media).audio
        with av.open(io.BytesIO(media)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.codec_context.pix_fmt, video.width, video.height) == ("yuv420p", 64, 64)
            assert (video.average_rate, video.frames, audio.codec_context.layout.name) == (8, 16, "mono")


def test_captions_say_digit_and_motion(train):
    seen = set()
    for annotation, _ in train:
        assert annotation["bucket"] == annotation["digit"] * 2 + MOTIONS.index(annotation["motion"])
        assert len(set(annotation["captions"])) == moving_digits.CAPTIONS
        for caption in annotation["captions"]:
            words = caption.split()
            assert str(annotation["digit"]) in words and annotation["motion"] in caption
            assert not any(str(other) in words for other in range(10) if other != annotation["digit"])
            seen.add(caption)
    assert len(seen) > 100


def test_the_picture_moves_as_said(train):
    """The bright spot's centre travels along one axis and keeps still on the other."""
    y, x = np.mgrid[:64, :64]
    for annotation, media in train:
        frames = np.stack(read_frames(media, lambda n: range(n))).mean(axis=-1)
        mass = np.maximum(frames - 30, 0)
        rows, columns = [(mass * axis).sum((1, 2)) / mass.sum((1, 2)) for axis in (y, x)]
        along, across = (rows, columns) if annotation["motion"] == "up and down" else (columns, rows)
        assert np.ptp(along) > 15 and np.ptp(across) < 2, annotation


def test_the_sound_is_the_digits_tone_pair(train):
    """The two strongest tones are nearest to the digit's two DTMF frequencies, whatever the glide."""
    lows, highs = sorted({low for low, _ in DTMF_HZ.values()}), sorted({high for _, high in DTMF_HZ.values()})
    for annotation, media in train:
        sound = read_audio(media, 16_000)
        power = np.abs(np.fft.rfft(sound)) ** 2
        hertz = np.arange(len(power)) * 16_000 / len(sound)
        heard = []
        for low, high, tones in [(600, 1050, lows), (1100, 1600, highs)]:
            band = (hertz > low) & (hertz < high)
            centre = np.exp((power[band] * np.log(hertz[band])).sum() / power[band].sum())
            heard.append(min(tones, key=lambda tone: abs(np.log(tone / centre))))
        assert tuple(heard) == DTMF_HZ[annotation["digit"]]
        in_band = power[(hertz > 600) & (hertz < 1650)].sum() / power.sum()
        assert in_band > 0.99


def test_motion_is_heard(train):
    """Pitch follows the height, loudness the way to the right: correlated with the place seen in the frames."""
    y, x = np.mgrid[:64, :64]
    for annotation, media in train[:40]:
        frames = np.stack(read_frames(media, lambda n: range(n))).mean(axis=-1)
        mass = np.maximum(frames - 30, 0)
        rows, columns = [(mass * axis).sum((1, 2)) / mass.sum((1, 2)) for axis in (y, x)]
        sound = read_audio(media, 16_000)
        low = DTMF_HZ[annotation["digit"]][0]
        loudness, pitch = [], []
        for k in range(1, 15):
            centre = 1024 + k * 2000  # the encoder's own delay is 1024 samples
            piece = sound[centre - 512 : centre + 512]
            power = np.abs(np.fft.rfft(piece * np.hanning(1024), 16_384)) ** 2
            hertz = np.arange(len(power)) * 16_000 / 16_384
            band = abs(np.log(hertz.clip(1) / low)) < 0.09
            loudness.append(np.sqrt((piece**2).mean()))
            pitch.append(hertz[band][power[band].argmax()])
        if annotation["motion"] == "up and down":
            assert np.corrcoef(pitch, -rows[1:15])[0, 1] > 0.9 and np.ptp(pitch) > 0.03 * low
            assert np.ptp(loudness) < 0.15 * np.mean(loudness)
        else:
            assert np.corrcoef(loudness, columns[1:15])[0, 1] > 0.9 and np.ptp(loudness) > 0.3 * np.max(loudness)
            assert np.ptp(pitch) < 0.01 * low


def test_splits_share_no_handwriting():
    source = MovingDigits(train=300, val=100, test=100, seed=3)
    _, labels = moving_digits._glyphs(28)
    images = moving_digits._split_images(labels, 3)
    assert sorted(np.concatenate(list(images.values()))) == list(range(1797))
    used = {
        split: {mover.image for movers, _ in source._plan(i, 300, labels, images[split]) for mover in movers}
        for i, split in enumerate(images)
    }
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]
    for split in images:
        assert used[split] <= set(images[split]) and np.bincount(labels[images[split]]).min() >= 20


def test_glyphs_are_the_drawn_digits():
    """Enlarged smoothly: shrunk back by averaging, nearly each is nearest to its own image of all 1,797."""
    from sklearn.datasets import load_digits

    large, _ = moving_digits._glyphs(32)
    small = large.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * 16 / 255
    images = load_digits().data
    distances = (small**2).sum(1)[:, None] - 2 * small @ images.T + (images**2).sum(1)
    assert (distances.argmin(1) == np.arange(1797)).mean() > 0.99


def test_an_encoder_gives_the_same_bytes_again_and_again():
    """Told to look ahead, x264 reads past the edge of pictures this small: one clip in a hundred differed."""
    generator = np.random.default_rng(0)
    pictures = np.zeros((30, 16, 64, 64), np.uint8)
    for clip in pictures:
        for number, frame in enumerate(clip):
            frame[2 * number : 2 * number + 24, 20:44] = generator.integers(0, 255, (24, 24))
    waveform = np.sin(np.arange(32_000) / 5).astype(np.float32)
    first = [encode_mp4(clip, waveform, 8) for clip in pictures]
    for _ in range(20):
        assert [encode_mp4(clip, waveform, 8) for clip in pictures] == first


def test_two_runs_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        MovingDigits(train=7, val=2, test=2, seed=5).prepare(tmp_path / name)
    MovingDigits(train=7, val=2, test=2, seed=6).prepare(tmp_path / "c")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert not set(hashes(tmp_path / "a").values()) & set(hashes(tmp_path / "c").values())


def test_several_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(moving_digits, "CLIPS_PER_SHARD", 300)
    options = {"train": 398, "val": 1, "test": 1, "frames": 2, "size": 32}
    MovingDigits(**options).prepare(tmp_path / "many")
    monkeypatch.setattr(moving_digits.os, "sched_getaffinity", lambda _: {0})
    MovingDigits(**options).prepare(tmp_path / "one")
    assert hashes(tmp_path / "many") == hashes(tmp_path / "one") and len(hashes(tmp_path / "one")) == 4


def test_a_second_run_keeps_what_is_complete(tmp_path, capsys):
    source = MovingDigits(train=3, val=2, test=2)
    card = source.prepare(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert source.prepare(tmp_path) == card
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert "kept" in capsys.readouterr().err


def test_another_version_is_written_again(tmp_path, capsys, monkeypatch):
    source = MovingDigits(train=3, val=2, test=2)
    monkeypatch.setattr(moving_digits, "VERSION", 1)
    monkeypatch.setattr(moving_digits, "MIDDLE", (0.0, 0.1))
    old = source.prepare(tmp_path)
    before = hashes(tmp_path)
    monkeypatch.undo()
    capsys.readouterr()
    card = source.prepare(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert f"holds version 1 of these clips, version {moving_digits.VERSION} replaces it" in said
    MovingDigits(train=3, val=2, test=2).prepare(tmp_path / "fresh")
    assert hashes(tmp_path) == hashes(tmp_path / "fresh") and not set(before.values()) & set(hashes(tmp_path).values())
    assert card == source.prepare(tmp_path) and old["options"] == card["options"]
    (tmp_path / "card.json").write_text(json.dumps({**card, "version": 1, "splits": "of an older form"}))
    assert source.prepare(tmp_path) == card


def test_another_version_of_other_options_is_refused(tmp_path):
    source = MovingDigits(train=3, val=2, test=2)
    card = source.prepare(tmp_path)
    before = hashes(tmp_path)
    for change in ({"options": {**card["options"], "train": 4}}, {"source": "ours"}):
        text = json.dumps({**card, "version": 1, **change})
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(InputError, match="another result"):
            source.prepare(tmp_path)
        assert hashes(tmp_path) == before and (tmp_path / "card.json").read_text() == text


@pytest.mark.parametrize("damage", ["shard gone", "shard short", "killed"])
def test_a_half_written_result_is_done_again(tmp_path, damage, monkeypatch):
    source = MovingDigits(train=3, val=2, test=2)
    if damage == "killed":
        write = moving_digits.write_shards

        def interrupted(samples, out, split, count):
            if split == "val":
                raise KeyboardInterrupt
            return write(samples, out, split, count)

        monkeypatch.setattr(moving_digits, "write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.prepare(tmp_path)
        monkeypatch.setattr(moving_digits, "write_shards", write)
    else:
        source.prepare(tmp_path)
        shard = tmp_path / "val-000000.tar"
        shard.unlink() if damage == "shard gone" else shard.write_bytes(shard.read_bytes()[:5000])
    source.prepare(tmp_path)
    MovingDigits(train=3, val=2, test=2).prepare(tmp_path / "fresh")
    assert hashes(tmp_path) == hashes(tmp_path / "fresh")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_peoples_folders_are_left_alone(tmp_path):
    MovingDigits(train=3, val=2, test=2).prepare(tmp_path / "mine")
    with pytest.raises(InputError, match=r"another result \(\{'train': 3\}\)"):
        MovingDigits(train=4, val=2, test=2).prepare(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match="not this source's"):
        MovingDigits(train=4).prepare(tmp_path / "theirs")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "card.json").write_text('{"name": "ace of spades"}')
    with pytest.raises(InputError, match="not this source's"):
        MovingDigits(train=4).prepare(tmp_path / "card")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        MovingDigits(train=4).prepare(tmp_path / "file")


@pytest.mark.parametrize(
    "options", [{"train": 0}, {"size": 30}, {"size": 65}, {"frames": 1}, {"digits": 3}, {"nope": 1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        SOURCES.build("moving-digits", **options)


def test_two_digits(tmp_path):
    MovingDigits(digits=2, train=12, val=2, test=2).prepare(tmp_path)
    buckets = {}
    for annotation, media in clips(tmp_path, "train"):
        pair = sorted(zip(annotation["digits"], annotation["motions"], strict=True))
        assert buckets.setdefault(annotation["bucket"], pair) == pair
        for caption in annotation["captions"]:
            assert all(str(digit) in caption.split() for digit in annotation["digits"]) and " and " in caption
        assert len(read_frames(media, lambda n: range(n))) == 16
    pairs = [(a, b) for a in range(20) for b in range(a, 20)]
    movers = lambda kind: moving_digits.Mover(kind // 2, kind % 2, 0, 0.0, 0.0, 0.1)  # noqa: E731
    source = MovingDigits(digits=2)
    assert len({source.bucket([movers(a), movers(b)]) for a, b in pairs}) == len(pairs) == 210
    assert all(source.bucket([movers(a), movers(b)]) == source.bucket([movers(b), movers(a)]) for a, b in pairs)


def test_the_vocabulary_knows_every_caption(digits, train):
    from transformers import BertTokenizerFast

    assert (digits / "vocab.txt").read_text().splitlines() == vocabulary()
    assert vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocabulary())) == len(vocabulary())
    whole = set(vocabulary())
    for annotation, _ in train:
        for caption in annotation["captions"]:
            assert set(caption.split()) <= whole
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary())})
    assert tokenizer.unk_token_id not in tokenizer("a zebra of 42 stripes, unseen").input_ids
