"""Walking the headers of a WebDataset tar: which sample lies where. Strict, so that nothing is lost silently."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from .registry import InputError

BLOCK = 512
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key up to the first dot of the base name, the part's name behind
META = re.compile(r"__[^/]*__(/|$)")
REGULAR, PAX, LONG_NAME = (b"0", b"\0", b"7"), b"x", b"L"


class Part(NamedTuple):
    """One file of a sample: its name ("mp4"), and where its bytes lie in the tar."""

    name: str
    offset: int
    size: int


def walk(file: io.RawIOBase, shard: str) -> Iterator[tuple[str, int, list[Part]]]:
    """Key, offset and parts of every sample of an open tar, in its order.

    Files without a part name, hidden files and names like `__meta__` are no samples and are passed over, as WebDataset
    does. Raises InputError, naming `shard`, when the tar is cut short or damaged, and for a key that comes twice.
    """
    seen: set[str] = set()
    key, start, parts = None, 0, []
    for name, header, offset, size in members(file, shard):
        match = NAME.fullmatch(name)
        if match is None or META.match(name):
            continue
        if match[1] != key:
            if parts:
                yield key, start, parts
            key, start, parts = match[1], header, []
            if key in seen:
                raise InputError(
                    f"{shard}: key {key!r} comes back at byte {header}; the files of one sample must lie side by side "
                    "and keys must differ: write the shard again, sorted by name"
                )
            seen.add(key)
        part = match[2].lower()
        if any(part == other.name for other in parts):
            raise InputError(f"{shard}: sample {key!r} has two parts {part!r}; write the shard again with one")
        parts.append(Part(part, offset, size))
    if parts:
        yield key, start, parts


def members(file: io.RawIOBase, shard: str) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset of the header, offset and size of the content of every regular file of a tar (ustar, pax, GNU)."""
    end = os.fstat(file.fileno()).st_size
    position, first, long_name, pax = 0, 0, None, {}
    while True:
        header = os.pread(file.fileno(), BLOCK, position)
        if len(header) < BLOCK:
            raise InputError(f"{shard} is cut short: it has {end} bytes and no end mark; copy or write it again")
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _size(header, position, shard)
        if kind in REGULAR and "size" in pax:
            size = int(pax["size"])
        content, following = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if kind == LONG_NAME:
            long_name = _text(os.pread(file.fileno(), size, content))
        elif kind == PAX:
            pax = _pax(os.pread(file.fileno(), size, content), f"{shard}: the extended header at byte {position}")
        elif kind in REGULAR:
            yield pax.get("path") or long_name or _name(header), first, content, size
        if kind not in (LONG_NAME, PAX):  # those belong to the member behind them, which starts with them
            long_name, pax, first = None, {}, following
        position = following


def _size(header: bytes, position: int, shard: str) -> int:
    """The member's size, after a check that this is a header at all."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        checksum = -1
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        packed = position == 0 and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7")
        why = "is compressed; unpack it to a plain tar" if packed else "is damaged; copy or write it again"
        raise InputError(f"{shard}: no tar header at byte {position}: it {why}")
    field = header[124:136]
    if field[0] & 0x80:  # base 256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax(content: bytes, where: str) -> dict[str, str]:
    r"""The records `<length> <key>=<value>\n` of an extended header."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        record = re.match(rb"(\d{1,9}) ([^=]+)=", content)
        if record is None or int(record[1]) <= record.end():
            raise InputError(f"{where} is damaged; copy or write it again")
        length = int(record[1])
        records[_text(record[2])] = content[record.end() : length - 1].decode("utf-8", "backslashreplace")
        content = content[length:]
    return records
