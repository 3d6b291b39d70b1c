"""What captions find: queries of the evaluated split and their best clips, with frames cut from the shards."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..datasets.media import VIDEO_EXTENSIONS, CorruptSample, read_frames
from ..datasets.registry import InputError
from .embeddings import EmbeddingSet
from .record import Record, Row, rows
from .retrieval import cosine_score, labels, ranks, volume_score

QUERIES, CLIPS = 8, 5
FRAMES, SIDE = 8, 112  # of a film: frames, and pixels of their side
SECONDS = 1.6  # a film's duration on the page


@dataclass(frozen=True)
class Film:
    """A clip's frames side by side in one JPEG, as a data: address."""

    uri: str
    frames: int
    seconds: float = SECONDS


@dataclass(frozen=True)
class Found:
    """One clip that a query found; `film` indexes the gallery's films, None when its frames could not be read."""

    item: int
    caption: str
    score: float
    hit: bool
    film: int | None = None


@dataclass(frozen=True)
class Query:
    caption: str
    verdict: str
    clips: tuple[Found, ...]


@dataclass(frozen=True)
class Gallery:
    """The grid, its films, what it shows (`note`) and what of it is missing (`missing`, "" when nothing is)."""

    queries: tuple[Query, ...] = ()
    films: tuple[Film, ...] = ()
    note: str = ""
    missing: str = ""


@dataclass
class _Search:
    """One row of the retrieval table, made again for single queries."""

    row: Row
    volume: bool
    label: torch.Tensor
    rows: torch.Tensor  # items in the gallery
    members: list[torch.Tensor] = field(default_factory=list)


def gallery(record: Record, task: Mapping[str, Any] | None) -> Gallery:
    """Queries spread over the split (chosen by their position alone, never by outcome) and their top clips."""
    embeddings, row = record.embeddings, _row(record, task)
    if embeddings is None or row is None or len(embeddings) == 0:
        return Gallery(
            missing="No examples: the retrieval result and embeddings of a final evaluation are not there yet."
        )
    search = _search(embeddings, row, task["protocol"]["relevance"])
    if len(search.rows) == 0:
        return Gallery(missing=f"No examples: no item of the {record.split} split has {row.gallery}.")
    queries = [_ask(embeddings, search, item) for item in _spread(embeddings, row.query)]
    items = sorted({clip.item for query in queries for clip in query.clips})
    films, missing = films_of(record, items)
    place = {item: i for i, item in enumerate(films)}
    shown = tuple(
        Query(
            query.caption,
            query.verdict,
            tuple(Found(**{**vars(clip), "film": place.get(clip.item)}) for clip in query.clips),
        )
        for query in queries
    )
    how = "smallest volume" if search.volume else "highest cosine"
    note = (
        f"{row.query} → {row.gallery.replace('+', ' + ')}, {how} first; green is a hit "
        f"({task['protocol']['relevance']}), red a miss. The queries are spread over the {record.split} split, "
        "chosen without regard to the outcome."
    )
    return Gallery(shown, tuple(films.values()), note, missing)


def _row(record: Record, task: Mapping[str, Any] | None) -> Row | None:
    """From the anchor to the pictures: by cosine, or to the whole tuple by volume where that ranks better."""
    if record.card is None or task not in record.card.get("tasks", []):
        return None
    anchor = task["protocol"].get("anchor")
    kinds = record.card.get("kinds") or {}
    found = [row for row in rows(task) if row.query == anchor]
    pictures = [row for row in found if kinds.get(row.gallery) == "frames"]
    tuples = [row for row in found if row.score == "volume"]
    return max([*(pictures or found)[:1], *tuples], key=lambda row: row.metrics.get("R@1", 0.0), default=None)


def _search(embeddings: EmbeddingSet, row: Row, relevance: str) -> _Search:
    members = row.gallery.split("+")
    whole = torch.stack([embeddings.valid[name] for name in members]).all(dim=0).nonzero().flatten()
    vectors = [embeddings.z[name][whole] for name in members]
    return _Search(row, row.score == "volume", labels(embeddings, relevance), whole, vectors)


def _ask(embeddings: EmbeddingSet, search: _Search, item: int) -> Query:
    query = embeddings.z[search.row.query][item : item + 1]
    score = volume_score(query, search.members) if search.volume else cosine_score(query, search.members[0])
    values = score(torch.tensor([0]))[0]
    best = values.topk(min(CLIPS, len(values))).indices.tolist()
    rank = ranks(score, search.label[item : item + 1], search.label[search.rows])[0].item()
    clips = []
    for i in best:
        other = int(search.rows[i])
        hit = bool(search.label[other] == search.label[item])
        value = -values[i].item() if search.volume else values[i].item()
        clips.append(Found(other, _caption(embeddings, other), value, hit))
    verdict = f"first hit at rank {rank + 1:g}" if rank < len(values) else "nothing to find: its clip is missing"
    return Query(_caption(embeddings, item), verdict, tuple(clips))


def _spread(embeddings: EmbeddingSet, modality: str) -> list[int]:
    """Rows spread over the split by the golden ratio, of different buckets while there are any."""
    valid = embeddings.valid[modality].tolist()
    order = sorted((i for i in range(len(valid)) if valid[i]), key=lambda i: (i * 0.6180339887) % 1)
    bucket = [-1] * len(order) if embeddings.bucket is None else embeddings.bucket[order].tolist()
    seen: set[int] = set()
    fresh, rest = [], []
    for item, label in zip(order, bucket, strict=True):
        (rest if label >= 0 and label in seen else fresh).append(item)
        seen.add(label)
    return (fresh + rest)[:QUERIES]


def _caption(embeddings: EmbeddingSet, item: int) -> str:
    captions = embeddings.captions[item]
    return captions[0] if captions else embeddings.keys[item]


def films_of(record: Record, items: Sequence[int]) -> tuple[dict[int, Film], str]:
    """By item, its film; and in words what is missing and why."""
    from ..datasets.shards import Index

    data = record.config.get("data") or {}
    pattern = (record.card or {}).get("shards") or data.get(record.split)
    if not pattern:
        return {}, f"No frames: neither the results nor config.yaml say where the shards of {record.split!r} are."
    try:
        index = Index.open(pattern)
    except InputError as error:
        return {}, f"No frames: {error}"
    films, problem = {}, ""
    for item in items:
        try:
            films[item] = film(_frames(index, item, record.embeddings.keys[item], data.get("fields")))
        except CorruptSample as error:
            problem = f"for example {record.embeddings.keys[item]}: {error}"
    return films, f"Frames of {len(items) - len(films)} clips are missing, {problem}." if problem else ""


def _frames(index: Any, item: int, key: str, fields: Mapping[str, Any] | None) -> list[np.ndarray]:
    """FRAMES frames of a sample, evenly spaced. Raises CorruptSample, saying why there are none."""
    if item >= len(index) or index.key(item) != key:
        raise CorruptSample("the shards have changed since the evaluation")
    named = {name for value in (fields or {}).values() for name in ([value] if isinstance(value, str) else value)}
    videos = [part for part in index.parts(item) if part.rpartition(".")[2] in VIDEO_EXTENSIONS]
    for part in [part for part in videos if part in named] or videos:
        data = index.read(item, only=[part])[part]
        frames = read_frames(data, lambda count: [(2 * i + 1) * count // (2 * FRAMES) for i in range(FRAMES)])
        if frames:
            return frames
    raise CorruptSample("the sample holds no moving picture")


def film(frames: Sequence[np.ndarray]) -> Film:
    """Frames uint8 (H, W, 3) -> one strip of squares; a picture that is not square is cut to its middle."""
    from PIL import Image

    strip = Image.new("RGB", (SIDE * len(frames), SIDE))
    for i, frame in enumerate(frames):
        height, width = frame.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(np.ascontiguousarray(frame[top : top + side, left : left + side]))
        strip.paste(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (SIDE * i, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80, optimize=True)
    return Film(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", len(frames))
