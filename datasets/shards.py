"""WebDataset tar shards: writing them, and an index over them for reading any sample directly.

A shard is an uncompressed tar; members that share a name up to the first dot of the base name are one sample, and the
rest of the name says which part it is: `clip7.mp4`, `clip7.json`. The index of `train-000000.tar` is kept beside it in
`train-000000.tar.index.npz` and holds for that size and modification time only; it is rebuilt when it is stale and
stays in memory where the folder cannot be written.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .media import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, CorruptSample, probe
from .registry import InputError
from .tar import Part, walk

log = logging.getLogger("trivium.datasets")

VERSION = 2  # of the sidecar's columns
NO_BUCKET = -1
VIDEO, AUDIO, CAPTIONS, UNREADABLE = 1, 2, 4, 8  # flags of a part
SUFFIX = ".index.npz"
TEXT_EXTENSIONS = ("json", "txt")
OPEN_SHARDS = 64  # file descriptors one process keeps

PER_SAMPLE = ("key_bytes", "parts", "bucket", "captions", "frames", "seconds", "offset")
PER_PART = ("part_extension", "part_offset", "part_size", "part_flags")


def write_shards(
    samples: Iterable[dict[str, Any]], folder: Path, prefix: str, samples_per_shard: int = 1000
) -> list[Path]:
    """Write `<folder>/<prefix>-000000.tar`, ... and return their paths.

    The bytes depend on the samples alone. Shards appear under their names only when all are complete, in place of all
    earlier ones of that prefix; whatever ends the writing early leaves the folder as it was.

    Args:
        samples: WebDataset samples, `{"__key__": "clip7", "mp4": bytes, "json": {...}}`; dicts are encoded as JSON.
        folder: made when it is absent.
        prefix: of the file names.
        samples_per_shard: the last shard may hold fewer.
    """
    from webdataset import ShardWriter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{prefix}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir()
    try:
        # the writer fills its pattern in by `%`, so one in the folder's name is doubled
        pattern = str(staging.absolute()).replace("%", "%%") + f"/{prefix}-%06d.tar"
        fixed = {"mtime": 0.0, "user": "trivium", "group": "trivium"}
        with ShardWriter(pattern, maxcount=samples_per_shard, maxsize=float("inf"), verbose=0, **fixed) as writer:
            for sample in samples:
                writer.write({key: _encoded(value) for key, value in sample.items()})
        for old in shards_of(folder, prefix):
            Path(f"{old}{SUFFIX}").unlink(missing_ok=True)
            old.unlink()
        return [path.replace(folder / path.name) for path in sorted(staging.iterdir())]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def shards_of(folder: Path, prefix: str) -> list[Path]:
    """The shards that `write_shards` has left in `folder`, in order."""
    name = re.compile(re.escape(prefix) + r"-\d{6}\.tar")
    return sorted(path for path in Path(folder).iterdir() if name.fullmatch(path.name))


def _encoded(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False).encode() if isinstance(value, dict) else value


class Index:
    """Where every part of every sample lies, and what the headers say about it, as numpy columns.

    Attributes:
        shards: paths of the tar files, in order.
        extensions: all part names ("mp4", "json", ...); `part_extension` numbers them.
        shard: int32 (n,), number of the sample's shard.
        bucket: int64 (n,), `bucket` of the sample's JSON part, NO_BUCKET where it has none.
        captions: int32 (n,), number of captions.
        frames: int32 (n,), video frames as the header says (0: unknown or none).
        seconds: float32 (n,), the longest part's duration as its header says.
        offset: int64 (n,), where the sample begins in its shard.
    """

    def __init__(self, shards: Sequence[str], columns: Sequence[dict[str, np.ndarray]]) -> None:
        self.shards = tuple(shards)
        self.extensions: tuple[str, ...] = ()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self.shard = np.repeat(np.arange(len(columns), dtype=np.int32), [len(c["bucket"]) for c in columns])
        joined = {name: np.concatenate([c[name] for c in columns]) for name in (*PER_SAMPLE[1:], *PER_PART[1:])}
        self.bucket, self.captions, self.frames = joined["bucket"], joined["captions"], joined["frames"]
        self.seconds, self.offset = joined["seconds"], joined["offset"]
        self._part_offset, self._part_size, self._part_flags = (joined[name] for name in PER_PART[1:])
        self._part_extension = self._number_extensions(columns)
        self._first_part = np.concatenate([[0], np.cumsum(joined["parts"])])
        self._keys = b"".join(c["keys"].tobytes() for c in columns)
        self._key_end = np.cumsum(np.concatenate([c["key_bytes"] for c in columns]), dtype=np.int64)

    @classmethod
    def open(cls, pattern: str | Sequence[str]) -> Index:
        """The index over all shards that match: a path, a glob, a `{000..012}` range, or a list of them.

        Missing and stale sidecars are built, and written where that is possible; any number of processes may do so at
        once. Raises InputError when nothing matches, for a tar that is cut short, and for duplicate or scattered keys.
        """
        shards = expand(pattern)
        columns: dict[str, dict[str, np.ndarray]] = {}
        start = os.getpid() * 7919 % len(shards)  # processes that build at once begin at different shards
        for shard in shards[start:] + shards[:start]:
            columns[shard] = _load(shard) or _build_and_keep(shard)
        for column in columns.values():
            column.pop("words")  # wanted by few and as large as the rest
        index = cls(shards, [columns[shard] for shard in shards])
        if not len(index):
            raise InputError(f"the shards of {pattern!r} hold no sample; write some, or name others")
        return index

    def __len__(self) -> int:
        return len(self.bucket)

    def key(self, sample: int) -> str:
        """The sample's key, unique within its shard."""
        start = self._key_end[sample - 1] if sample else 0
        return self._keys[start : self._key_end[sample]].decode()

    def digest(self) -> str:
        """SHA-256 (hex) of which samples these are, in which order: equal wherever the same shards lie.

        It covers the number of samples, their keys, the shards' base names and where each sample begins in its shard,
        but no content: a shard written again with other bytes of the same sizes keeps it.
        """
        counts = np.bincount(self.shard, minlength=len(self.shards)).tolist()
        names = [os.path.basename(shard) for shard in self.shards]
        digest = hashlib.sha256(json.dumps([len(self), names, counts]).encode())
        for column in (self._key_end, self.offset):
            digest.update(np.ascontiguousarray(column, dtype="<i8"))
        digest.update(self._keys)
        return digest.hexdigest()

    def parts(self, sample: int) -> list[str]:
        """The names of the sample's parts, in the tar's order."""
        return [self.extensions[e] for e in self._part_extension[self._span(sample)]]

    def flags(self, extensions: Collection[str]) -> np.ndarray:
        """uint8 (n,): VIDEO | AUDIO | CAPTIONS | UNREADABLE, joined over the parts of these names."""
        numbers = [i for i, extension in enumerate(self.extensions) if extension in extensions]
        flags = np.where(np.isin(self._part_extension, numbers), self._part_flags, 0).astype(np.uint8)
        return np.bitwise_or.reduceat(flags, self._first_part[:-1])

    def read(self, sample: int, only: Collection[str] | None = None) -> dict[str, bytes]:
        """The sample's parts by name; with `only`, those of these names.

        Raises CorruptSample when the shard no longer holds what the index says.
        """
        span = self._span(sample)
        file = self._file(int(self.shard[sample]))
        parts: dict[str, bytes] = {}
        for number in range(span.start, span.stop):
            name = self.extensions[self._part_extension[number]]
            if only is None or name in only:
                parts[name] = _pread(file, int(self._part_offset[number]), int(self._part_size[number]))
        return parts

    def words(self) -> frozenset[str]:
        """All words of all captions, in lower case. Reads the sidecars again."""
        found: set[str] = set()
        for shard in self.shards:
            columns = _load(shard) or build(shard)
            found |= set(columns["words"].tobytes().decode().split())
        return frozenset(found)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # every process opens its own

    def _span(self, sample: int) -> slice:
        return slice(int(self._first_part[sample]), int(self._first_part[sample + 1]))

    def _file(self, shard: int):
        file = self._files.pop(shard, None)
        if file is None:
            try:
                file = open(self.shards[shard], "rb", buffering=0)  # noqa: SIM115 - kept open
            except OSError as error:
                raise CorruptSample(f"the shard cannot be opened: {error.strerror}") from None
        self._files[shard] = file
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        return file

    def _number_extensions(self, columns: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """One numbering of part names for all shards: each shard has its own."""
        numbers: dict[str, int] = {}
        pieces = []
        for column in columns:
            own = [numbers.setdefault(name, len(numbers)) for name in json.loads(column["extensions"].tobytes())]
            pieces.append(np.array(own, dtype=np.int32)[column["part_extension"]])
        self.extensions = tuple(numbers)
        return np.concatenate(pieces)


def expand(pattern: str | Sequence[str]) -> list[str]:
    """Absolute paths of the shards that match, in order. Raises InputError when a pattern matches none."""
    from braceexpand import braceexpand

    paths: dict[str, None] = {}
    for one in [pattern] if isinstance(pattern, (str, Path)) else pattern:
        if "://" in str(one) or str(one).startswith("pipe:"):
            raise InputError(f"{str(one)!r} is not a path; shards are read from a file system: copy or mount them")
        plain = os.path.expanduser(str(one))
        for text in [plain] if os.path.isfile(plain) else braceexpand(plain):
            found = [text] if os.path.isfile(text) else sorted(filter(os.path.isfile, glob.glob(text)))
            if not found:
                raise InputError(
                    f"no shards match {text!r} (in {os.getcwd()}); check the path, "
                    "or write the demo's with `trivium prepare moving-digits --out DIR`"
                )
            paths.update(dict.fromkeys(map(os.path.abspath, found)))
    if not paths:
        raise InputError(f"no shards are named by {pattern!r}; name at least one tar file")
    return list(paths)


def _pread(file, offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    while len(data) < size:  # the kernel gives at most 2 GiB at once
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            raise CorruptSample(f"the shard ends {size - len(data)} bytes early: it has changed since it was indexed")
        data += more
    return data


# -- sidecars ---------------------------------------------------------------------------------------------------------


def _stamp(shard: str) -> np.ndarray:
    status = os.stat(shard)
    return np.array([VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _load(shard: str) -> dict[str, np.ndarray] | None:
    """The columns of the shard's sidecar, or None when it is absent, stale or damaged."""
    try:
        with np.load(shard + SUFFIX, allow_pickle=False) as file:
            columns = dict(file)
        if not np.array_equal(columns.pop("stamp"), _stamp(shard)):
            return None
        if set(columns) != {*PER_SAMPLE, *PER_PART, "keys", "extensions", "words"}:
            raise ValueError("other columns")
        return columns
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged zip file can raise; it is rebuilt from the tar
        log.warning("%s%s is damaged (%s): rebuilding it", shard, SUFFIX, type(error).__name__)
        return None


def _build_and_keep(shard: str) -> dict[str, np.ndarray]:
    log.info("indexing %s", shard)
    stamp = _stamp(shard)
    columns = build(shard)
    folder, name = os.path.split(shard)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=SUFFIX, delete=False) as file:
            temporary = file.name
            np.savez(file, stamp=stamp, **columns)
        os.chmod(temporary, 0o644)
        os.replace(temporary, shard + SUFFIX)
    except OSError as error:
        log.warning("the index of %s is kept in memory only: %s", shard, error.strerror)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return columns


def build(shard: str) -> dict[str, np.ndarray]:
    """The columns of one shard, from its tar and the headers of its media.

    Raises InputError for a tar that is cut short, for duplicate or scattered keys and for a bucket that is no number.
    """
    rows: dict[str, list] = {name: [] for name in (*PER_SAMPLE, *PER_PART)}
    extensions: dict[str, int] = {}
    keys = bytearray()
    words: set[str] = set()
    with open(shard, "rb", buffering=0) as file:
        for key, offset, parts in walk(file, shard):
            facts = {"bucket": NO_BUCKET, "captions": 0, "frames": 0, "seconds": 0.0}
            for part in parts:
                data = _pread(file, part.offset, part.size)
                flags = _examine(part, data, facts, words, f"{shard}, sample {key!r}")
                number = extensions.setdefault(part.name, len(extensions))
                for name, value in zip(PER_PART, (number, part.offset, part.size, flags), strict=True):
                    rows[name].append(value)
            keys += key.encode()
            for name, value in {"key_bytes": len(key.encode()), "parts": len(parts), "offset": offset, **facts}.items():
                rows[name].append(value)
    kinds = {"frames": np.int32, "captions": np.int32, "seconds": np.float32, "part_flags": np.uint8}
    columns = {name: np.array(values, dtype=kinds.get(name, np.int64)) for name, values in rows.items()}
    texts = {"extensions": json.dumps(list(extensions)), "words": " ".join(sorted(words))}
    texts = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    return columns | {"keys": np.frombuffer(keys, np.uint8)} | texts


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out."""
    return re.findall(r"\w+", text.lower())


def _examine(part: Part, data: bytes, facts: dict[str, Any], words: set[str], where: str) -> int:
    """The part's flags; what it tells about its sample goes into `facts`, the words of its captions into `words`."""
    if part.name.rpartition(".")[2] in VIDEO_EXTENSIONS + AUDIO_EXTENSIONS:
        try:
            info = probe(data)
        except CorruptSample:
            return UNREADABLE
        facts["frames"] = facts["frames"] or info.frames
        facts["seconds"] = max(facts["seconds"], info.seconds)
        return VIDEO * info.video | AUDIO * info.audio | UNREADABLE * info.undecodable
    if part.name.rpartition(".")[2] not in TEXT_EXTENSIONS:
        return 0
    try:
        captions = read_captions(part.name, data)
        annotation = read_annotation(data) if part.name == "json" else {}
    except CorruptSample:
        return UNREADABLE
    if "bucket" in annotation:
        facts["bucket"] = annotation["bucket"]
        if type(facts["bucket"]) is not int or not 0 <= facts["bucket"] < 2**63:
            rule = "is no whole number from 0 to 2**63 - 1; write the shard again"
            raise InputError(f"{where}: bucket {facts['bucket']!r} {rule}")
    facts["captions"] = max(facts["captions"], len(captions))
    words.update(word for caption in captions for word in words_of(caption))
    return CAPTIONS * bool(captions)


# -- text parts -------------------------------------------------------------------------------------------------------


def read_annotation(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises CorruptSample when it is none."""
    try:
        annotation = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptSample(f"its json does not parse: {' '.join(str(error).split())}") from None
    if not isinstance(annotation, dict):
        raise CorruptSample(f"its json holds {type(annotation).__name__}, not an object")
    return annotation


def read_captions(name: str, data: bytes) -> tuple[str, ...]:
    """All captions of a part: `captions`, `caption` or `desc` (text or list) of a JSON object, else lines of text.

    Raises CorruptSample when they are not text.
    """
    if name.rpartition(".")[2] == "json":
        annotation = read_annotation(data)
        key = next((key for key in ("captions", "caption", "desc") if key in annotation), None)
        captions = annotation.get(key, [])
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise CorruptSample(f"its {key} is not text nor a list of texts")
    else:
        try:
            captions = data.decode().splitlines()
        except UnicodeDecodeError as error:
            raise CorruptSample(f"its {name} is not UTF-8: {error.reason}") from None
    # JSON can hold half a character (a text cut between the two codes of an emoji), which nothing can write or tokenise
    captions = [caption.encode(errors="replace").decode().strip() for caption in captions]
    return tuple(caption for caption in captions if caption)
