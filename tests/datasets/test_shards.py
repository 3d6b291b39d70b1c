from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trivium.datasets.media import CorruptSample
from trivium.datasets.registry import InputError
from trivium.datasets.shards import (
    AUDIO,
    CAPTIONS,
    SUFFIX,
    UNREADABLE,
    VIDEO,
    Index,
    expand,
    read_captions,
    write_shards,
)


def samples(count: int, start: int = 0) -> list[dict]:
    rng = np.random.default_rng(start)
    return [
        {"__key__": f"clip{i:04d}", "bin": rng.bytes(int(rng.integers(0, 3000))), "json": {"captions": [f"é {i}"]}}
        for i in range(start, start + count)
    ]


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


# -- writing ----------------------------------------------------------------------------------------------------------


def test_written_shards_read_back_the_same(tmp_path):
    folder = tmp_path / "100% new"
    paths = write_shards(samples(25), folder, "train", samples_per_shard=10)
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(3)]
    index = Index.open([str(path) for path in paths])
    assert len(index) == 25 and np.bincount(index.shard).tolist() == [10, 10, 5]
    for i, sample in enumerate(samples(25)):
        parts = index.read(i)
        assert index.key(i) == sample["__key__"]
        assert parts["bin"] == sample["bin"] and json.loads(parts["json"]) == sample["json"]


def test_the_bytes_depend_on_the_samples_alone(tmp_path):
    for name in ("a", "b"):
        write_shards(iter(samples(12)), tmp_path / name, "train", samples_per_shard=5)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_failing_source_leaves_the_folder_as_it_was(tmp_path):
    def failing():
        yield from samples(12, start=100)
        raise RuntimeError("the disk of the source is gone")

    write_shards(samples(12), tmp_path, "train", samples_per_shard=5)
    before = hashes(tmp_path)
    with pytest.raises(RuntimeError, match="disk"):
        write_shards(failing(), tmp_path, "train", samples_per_shard=5)
    assert hashes(tmp_path) == before and len(list(tmp_path.iterdir())) == 3


def test_fewer_shards_replace_more_and_other_prefixes_stay(tmp_path):
    write_shards(samples(12), tmp_path, "train", samples_per_shard=3)
    write_shards(samples(2), tmp_path, "train-extra")
    Index.open(str(tmp_path / "train-0*.tar"))
    write_shards(samples(4, start=50), tmp_path, "train", samples_per_shard=3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "train-000000.tar", "train-000001.tar", "train-extra-000000.tar",
    }  # fmt: skip
    assert Index.open(str(tmp_path / "train-0*.tar")).key(0) == "clip0050"


# -- the walk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_equal_those_of_tarfile(tmp_path, format):
    long = "deep/" * 15 + "er" * 20  # a name that needs two header fields, or a header of its own
    names = ["a.mp4x", "a.json", "dir/b.seg.json", "dir/b.bin", f"{long}/c.JPG", f"{long}/c.txt", "ü.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("x" * 300 + ".bin")
    rng = np.random.default_rng(0)
    path = make_tar(tmp_path / "s.tar", [(name, rng.bytes(int(rng.integers(0, 2000)))) for name in names], format)
    index = Index.open(str(path))
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, tar.extractfile(member).read()) for member in tar}
        starts = {member.name: member.offset for member in tar}
    found = {}
    for i in range(len(index)):
        for part, data in index.read(i).items():
            found[f"{index.key(i)}.{part}"] = data
        first = f"{index.key(i)}.{index.parts(i)[0]}"
        assert index.offset[i] == starts[next(name for name in starts if name.lower() == first.lower())]
    assert {name.lower(): data for name, (_, data) in expected.items()} == {n.lower(): d for n, d in found.items()}


def test_what_is_no_sample_is_passed_over(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("clips")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", ".hidden.json", "__index__/x.json", "__info__", "clips/a.txt", "clips/a.bin"):
            tar.addfile(tarfile.TarInfo(name))
    index = Index.open(str(path))
    assert [index.key(i) for i in range(len(index))] == ["clips/a"] and index.parts(0) == ["txt", "bin"]


def test_scattered_and_doubled_keys_are_named(tmp_path):
    scattered = make_tar(tmp_path / "scattered.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.bin", b"3")])
    with pytest.raises(InputError, match=r"scattered\.tar: key 'a' comes back"):
        Index.open(str(scattered))
    doubled = make_tar(tmp_path / "doubled.tar", [("a.txt", b"1"), ("a.txt", b"2")])
    with pytest.raises(InputError, match=r"doubled\.tar: sample 'a' has two parts 'txt'"):
        Index.open(str(doubled))


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1536, 2048, 2560])
def test_a_tar_that_is_cut_short_is_named(tmp_path, keep):
    whole = make_tar(tmp_path / "whole.tar", [("a.bin", b"x" * 900), ("b.bin", b"y" * 10)])
    short = tmp_path / "short.tar"
    short.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"short\.tar is cut short") as error:
        Index.open(str(short))
    assert "\n" not in str(error.value)


def test_a_damaged_extended_header_is_named(tmp_path):
    path = make_tar(tmp_path / "pax.tar", [("é" * 80 + ".txt", b"1")], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    for damage in (b"99999999999", b"\xff\xff\xff\xff", b"0 path=", b"12 no"):
        path.write_bytes(data[:512] + damage + data[512 + len(damage) :])
        with pytest.raises(InputError, match=r"pax\.tar: the extended header at byte 0 is damaged"):
            Index.open(str(path))


@pytest.mark.parametrize(
    "content, why", [(b"not a tar at all " * 100, "damaged"), (b"\x1f\x8b\x08" + b"z" * 900, "compressed")]
)
def test_what_is_no_tar_is_named(tmp_path, content, why):
    path = tmp_path / "odd.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"odd\.tar: .*{why}"):
        Index.open(str(path))


# -- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path, monkeypatch):
    for i in range(12):
        make_tar(tmp_path / f"t-{i:03d}.tar", [(f"{i}.txt", b"x")])
    all_of_them = [str(tmp_path / f"t-{i:03d}.tar") for i in range(12)]
    assert expand(str(tmp_path / "t-*.tar")) == all_of_them
    assert expand(str(tmp_path / "t-{000..011}.tar")) == all_of_them
    assert expand([all_of_them[3], str(tmp_path / "t-{002..003}.tar")]) == [all_of_them[3], all_of_them[2]]
    monkeypatch.chdir(tmp_path)
    assert expand("t-00{1,3}.tar") == [all_of_them[1], all_of_them[3]]
    for pattern in ("no-*.tar", "t-{000..012}.tar", ["t-000.tar", "no.tar"], []):
        with pytest.raises(InputError, match="no shards"):
            expand(pattern)
    with pytest.raises(InputError, match="not a path"):
        expand("s3://bucket/t.tar")


def test_shards_without_samples_are_refused(tmp_path):
    with pytest.raises(InputError, match="hold no sample"):
        Index.open(str(make_tar(tmp_path / "none.tar", [])))


# -- what the index knows ---------------------------------------------------------------------------------------------


def test_flags_and_facts(tmp_path, encode):
    film, silent, sound = encode(frames=30), encode(frames=10, audio=None), encode(video=False, seconds=2.0)
    members = [
        ("0.mp4", film), ("0.json", b'{"captions": ["a", "b"], "bucket": 7}'),
        ("1.mp4", silent), ("1.wav", sound),
        ("2.mp4", b"<html>"), ("2.json", b"{"),
        ("3.m4a", sound), ("3.txt", b"one line\n"),
    ]  # fmt: skip
    index = Index.open(str(make_tar(tmp_path / "s.tar", members)))
    assert index.flags(["mp4"]).tolist() == [VIDEO | AUDIO, VIDEO, UNREADABLE, 0]
    assert index.flags(["wav", "m4a"]).tolist() == [0, AUDIO, 0, AUDIO]
    assert index.flags(["json", "txt"]).tolist() == [CAPTIONS, 0, UNREADABLE, CAPTIONS]
    assert index.bucket.tolist() == [7, -1, -1, -1] and index.captions.tolist() == [2, 0, 0, 1]
    assert index.frames.tolist() == [30, 10, 0, 0]
    np.testing.assert_allclose(index.seconds, [1.2, 2.0, 0.0, 2.0], atol=0.05)


def test_media_that_nothing_decodes_is_unreadable(tmp_path, encode):
    film = encode(frames=10)
    members = [("0.mp4", film.replace(b"avc1", b"zzzz")), ("1.mp4", film)]
    index = Index.open(str(make_tar(tmp_path / "s.tar", members)))
    assert index.flags(["mp4"]).tolist() == [AUDIO | UNREADABLE, VIDEO | AUDIO] and index.frames.tolist() == [0, 10]


def test_damaged_headers_never_stop_the_index(tmp_path, encode):
    film = encode(frames=4)
    rng, members = np.random.default_rng(0), []
    for number in range(150):
        damaged = np.frombuffer(film, np.uint8).copy()
        places = rng.integers(film.index(b"moov"), len(film), size=rng.integers(1, 9))
        damaged[places] = rng.integers(256, size=len(places))
        members.append((f"{number:03d}.mp4", damaged.tobytes()))
    flags = Index.open(str(make_tar(tmp_path / "s.tar", members))).flags(["mp4"])
    assert (flags & UNREADABLE > 0).sum() > 20 and (flags == VIDEO | AUDIO).sum() > 20


def test_half_a_character_does_no_harm(tmp_path):
    path = make_tar(tmp_path / "s.tar", [("a.json", b'{"captions": ["cut \\ud83d", " \\u00e9 "]}')])
    captions = read_captions("json", Index.open(str(path)).read(0)["json"])
    assert captions == ("cut ?", "é") and "".join(captions).encode()


@pytest.mark.parametrize("bucket", ['"three"', "1.5", "-1", "-2", "true", "null", "9223372036854775808"])
def test_a_bucket_is_a_whole_number(tmp_path, bucket):
    path = make_tar(tmp_path / "s.tar", [("a.json", b'{"bucket": %s}' % bucket.encode())])
    with pytest.raises(InputError, match=r"s\.tar, sample 'a': bucket"):
        Index.open(str(path))


def test_extensions_are_numbered_alike_over_shards(tmp_path):
    one = make_tar(tmp_path / "1.tar", [("a.x", b"1"), ("a.y", b"2")])
    two = make_tar(tmp_path / "2.tar", [("b.y", b"3"), ("b.z", b"4"), ("c.x", b"5")])
    index = Index.open([str(one), str(two)])
    assert [index.read(i) for i in range(3)] == [{"x": b"1", "y": b"2"}, {"y": b"3", "z": b"4"}, {"x": b"5"}]
    assert index.read(1, only=["z", "x"]) == {"z": b"4"}


def test_the_digest_is_that_of_the_samples_in_their_order(tmp_path):
    write_shards(samples(12), tmp_path / "here", "train", samples_per_shard=5)
    write_shards(samples(12), tmp_path / "there", "train", samples_per_shard=5)
    here = [str(tmp_path / "here" / f"train-{i:06d}.tar") for i in range(3)]
    digest = Index.open(here).digest()
    assert len(digest) == 64 and int(digest, 16)
    assert Index.open(str(tmp_path / "there" / "*.tar")).digest() == Index.open(here).digest() == digest
    os.utime(here[0], ns=(0, 12345))
    assert Index.open(here).digest() == digest
    write_shards(samples(12), tmp_path / "cut elsewhere", "train", samples_per_shard=4)
    write_shards(samples(12), tmp_path / "renamed", "val", samples_per_shard=5)
    write_shards(samples(12, start=1), tmp_path / "other", "train", samples_per_shard=5)
    others = [here[:2], here[::-1], [here[1], here[0], here[2]]]
    others += [[str(path) for path in sorted((tmp_path / name).glob("*.tar"))] for name in ("cut elsewhere", "renamed")]
    others.append(str(tmp_path / "other" / "*.tar"))
    assert len({digest, *(Index.open(other).digest() for other in others)}) == 7


def test_the_digest_sees_where_keys_and_samples_begin(tmp_path):
    def digest(*members: tuple[str, bytes]) -> str:
        return Index.open(str(make_tar(tmp_path / "s.tar", list(members)))).digest()

    found = [
        digest(("ab.x", b"1"), ("c.x", b"2")),
        digest(("a.x", b"1"), ("bc.x", b"2")),
        digest(("ab.x", b"1" * 600), ("c.x", b"2")),
    ]
    assert len(set(found)) == 3


# -- sidecars ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shards(samples(5), tmp_path, "train")[0]


def walks(monkeypatch) -> list[str]:
    """Names of the shards that are indexed from their tar from now on."""
    import trivium.datasets.shards as module

    built, build = [], module.build
    monkeypatch.setattr(module, "build", lambda shard: built.append(os.path.basename(shard)) or build(shard))
    return built


def test_a_sidecar_is_built_once_and_again_when_stale(shard, monkeypatch):
    built = walks(monkeypatch)
    Index.open(str(shard))
    Index.open(str(shard))
    assert built == [shard.name] and Path(f"{shard}{SUFFIX}").is_file()
    os.utime(shard, ns=(0, 12345))
    assert Index.open(str(shard)).key(4) == "clip0004" and len(built) == 2
    write_shards(samples(7, start=20), shard.parent, "train")
    assert Index.open(str(shard)).key(6) == "clip0026" and len(built) == 3
    Index.open(str(shard))
    assert len(built) == 3


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "foreign", "pickle"])
def test_a_damaged_sidecar_is_rebuilt(shard, damage, monkeypatch):
    Index.open(str(shard))
    sidecar = Path(f"{shard}{SUFFIX}")
    good = sidecar.read_bytes()
    stamp = np.load(sidecar)["stamp"]
    if damage == "foreign":
        np.savez(sidecar, stamp=stamp, something=np.zeros(3))
    elif damage == "pickle":
        np.savez(sidecar, stamp=np.array([print], dtype=object))
    else:
        middle = len(good) // 2
        flipped = good[:middle] + bytes(b ^ 0xFF for b in good[middle : middle + 50]) + good[middle + 50 :]
        sidecar.write_bytes({"empty": b"", "half": good[:middle], "flipped": flipped}[damage])
    built = walks(monkeypatch)
    assert Index.open(str(shard)).key(4) == "clip0004" and built == [shard.name]


def test_an_index_that_cannot_be_written_stays_in_memory(shard, monkeypatch, caplog):
    import trivium.datasets.shards as module

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")  # root may write anywhere, so the refusal is acted

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", refuse)
    with caplog.at_level(logging.WARNING):
        index = Index.open(str(shard))
    assert len(index) == 5 and index.read(3)["json"]
    assert not Path(f"{shard}{SUFFIX}").exists() and "in memory only: Permission denied" in caplog.text


def test_processes_build_at_once(tmp_path):
    write_shards(samples(60), tmp_path, "train", samples_per_shard=6)
    pattern = str(tmp_path / "train-*.tar")
    script = "import sys; from trivium.datasets.shards import Index; print(len(Index.open(sys.argv[1])))"
    command = [sys.executable, "-c", script, pattern]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["60\n"] * 4
    assert len(list(tmp_path.iterdir())) == 20  # a sidecar each, and nothing left over
    index = Index.open(pattern)
    assert [index.read(i)["bin"] for i in range(60)] == [sample["bin"] for sample in samples(60)]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_an_index_travels_to_another_process(shard):
    index = Index.open(str(shard))
    index.read(0)
    assert pickle.loads(pickle.dumps(index)).read(2) == index.read(2)


def test_few_files_stay_open(tmp_path, monkeypatch):
    import trivium.datasets.shards as module

    monkeypatch.setattr(module, "OPEN_SHARDS", 3)
    write_shards(samples(30), tmp_path, "train", samples_per_shard=2)
    index = Index.open(str(tmp_path / "*.tar"))
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).permutation(30):
        assert json.loads(index.read(int(i))["json"])["captions"] == [f"é {i}"]
    assert len(os.listdir("/proc/self/fd")) - before == 3


def test_a_shard_that_shrank_or_went_is_corrupt(shard):
    index = Index.open(str(shard))
    with open(shard, "r+b") as file:
        file.truncate(int(index.offset[3]) + 600)
    assert index.read(1)
    with pytest.raises(CorruptSample, match="changed since it was indexed"):
        index.read(4)
    shard.unlink()
    with pytest.raises(CorruptSample, match="cannot be opened"):
        pickle.loads(pickle.dumps(index)).read(0)
