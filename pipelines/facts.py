"""Facts about a cache that `inspect`, its page and `diff` show: gathered here, worded there.

Most come from documents and the index's table alone. Only what is asked of logits reads chunks, and then of a sample that is
bounded in bytes and the same each time: evenly spaced shards, evenly spaced chunks in them, evenly spaced rows in those.

Legend: N rows of a sample, K classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import Cache, TeacherLayer, count_contiguous
from kdcache.class_names import ClassNames, teacher_class_names
from kdcache.console import counted
from kdcache.distance import log_softmax
from kdcache.errors import UsageError
from kdcache.fidelity import combine_fidelity
from kdcache.format import Document, TargetIdentity, TargetsIdentity
from kdcache.layout import STORED_FOLDER, target_specs
from kdcache.ownership import owned_files
from kdcache.store import LocalStore

if TYPE_CHECKING:
    from kdcache.encodings import Encoding

SAMPLE_ROWS = 4096
SAMPLE_BYTES = 4 << 20
"""Of chunks, before compression, that a sample of one target reads at most."""
SAMPLE_CHUNKS = 64
"""That it reads at most, hence also shards: on an object store each costs two requests."""
REST_NAME = "array metadata, calibration"
"""Part of a size: what is named by records and cards and belongs to no target."""
MIN_AGREEMENT = 50.0
"""Top-1 in per cent from which on the labels are taken to be numbered as the teacher's classes, so that its names are theirs too."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def views_of(records: Iterable[Document[Any]]) -> list[int]:
    """The numbers of the views that records hold, ascending, each once."""
    return sorted({view for record in records for view in record.identity.views.numbers})


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelHistogram:
    """How many samples carry each label."""

    classes: np.ndarray[Any, np.dtype[np.int64]]
    """(C,) the labels that occur, ascending."""
    counts: np.ndarray[Any, np.dtype[np.int64]]
    """(C,) samples of each."""
    unlabelled: int

    def extremes(self, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(rarest, commonest): at most `count` (class, samples) each, the outermost first."""
        order = np.argsort(self.counts, kind="stable")
        pairs = list(zip(self.classes.tolist(), self.counts.tolist(), strict=True))
        return [pairs[i] for i in order[:count]], [pairs[i] for i in order[::-1][:count]]


def label_histogram(cache: Cache) -> LabelHistogram:
    """Over every row, one a sample, whatever its views: from the index's table."""
    labels = cache.rows.label
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return LabelHistogram(classes.astype(np.int64), counts.astype(np.int64), int((labels < 0).sum()))


# --- fidelity --------------------------------------------------------------------------------------------------------


FIGURES = ("rel_l2", "cosine", "z_l2", "kl_t1", "kl_t4")
"""Of fidelity, in the order in which they are told."""


def fidelity_by_shard(layer: TeacherLayer, target: str) -> dict[str, dict[str, float]]:
    """Shard → the target's figures over its segments, as extraction measured them. A shard without rows is left out."""
    figures: dict[str, dict[str, float]] = {}
    for shard in sorted(layer.records):
        found = combine_fidelity([fidelity_sums(record, target) for record in layer.segments(shard, target)])
        if found:
            figures[shard] = found
    return figures


def fidelity_sums(record: Document[Any], target: str) -> dict[str, float]:
    """What a record keeps of a target for `combine_fidelity`; empty where it keeps nothing."""
    sums: dict[str, float] = record.measured.get("fidelity", {}).get(target, {}).get("sums", {})
    return sums


def deciding_figure(figures: Mapping[str, float]) -> str:
    """The figure by which a target is judged: the KL of logits, the standardised error of features."""
    return next(name for name in ("kl_t1", "z_l2", "rel_l2") if name in figures)


def worst_shard(by_shard: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """{"shard", "figure", "value"} of the shard that lost most; the first of several. None where nothing was measured."""
    if not by_shard:
        return None
    figure = deciding_figure(next(iter(by_shard.values())))
    shard = max(by_shard, key=lambda name: by_shard[name].get(figure, 0.0))
    return {"shard": shard, "figure": figure, "value": by_shard[shard].get(figure, 0.0)}


# --- a teacher, and one of its targets ---------------------------------------------------------------------------------


def accuracy(layer: TeacherLayer) -> tuple[float | None, int]:
    """(top-1 in per cent, of how many labelled views) of a teacher's own cached views; None of none."""
    scores = [record.measured.get("accuracy", {}) for records in layer.records.values() for record in records]
    labelled = sum(score.get("labelled", 0) for score in scores)
    return 100 * sum(score.get("correct", 0) for score in scores) / labelled if labelled else None, labelled


@dataclass(frozen=True)
class StoredTarget:
    """What a cache holds of a target, by its records."""

    segments: tuple[Document[TargetsIdentity], ...]
    """The records that have it."""
    shards: int
    bytes: int
    bytes_per_view: float | None
    """None of no view."""
    figures: dict[str, float]
    """Fidelity over all of them; empty where nothing was measured."""
    by_shard: dict[str, dict[str, float]]
    """Shard → its own, without those of single bands."""
    worst: dict[str, Any] | None
    """As `worst_shard`."""


def stored_target(layer: TeacherLayer, name: str) -> StoredTarget:
    """Of one target of a teacher."""
    segments = tuple(record for records in layer.records.values() for record in records if name in record.identity.targets)
    size = sum(record.identity.group.size_of(name) for record in segments)
    row_views = sum(record.identity.rows * len(record.identity.views) for record in segments)
    by_shard = fidelity_by_shard(layer, name)
    return StoredTarget(
        segments=segments,
        shards=len({record.identity.shard for record in segments}),
        bytes=size,
        bytes_per_view=size / row_views if row_views else None,
        figures=combine_fidelity([fidelity_sums(record, name) for record in segments]),
        by_shard={shard: {figure: found[figure] for figure in FIGURES if figure in found} for shard, found in by_shard.items()},
        worst=worst_shard(by_shard),
    )


# --- what classes are called -----------------------------------------------------------------------------------------


def check_names(cache: Cache, names: ClassNames | None) -> None:
    """Raise UsageError for names of the user's that fit neither a teacher's classes nor the labels."""
    highest = int(cache.rows.label.max(initial=-1))
    classes = sorted({layer.document.identity.num_classes for layer in cache.teachers.values()})
    if names is not None and len(names) <= highest and len(names) not in classes:
        raise UsageError(
            f"class names {names.source!r}: it names {counted(len(names), 'class')}; expected {' or '.join(map(str, classes)) or 'more'} as the teacher has,"
            f" or at least {highest + 1}, since labels reach {highest}"
        )


def label_names_of(cache: Cache) -> ClassNames | None:
    """The labels' names: those of a teacher that knows its own, and mostly agrees with the labels."""
    for _, layer in sorted(cache.teachers.items()):
        top1, _labelled = accuracy(layer)
        if top1 is not None and top1 >= MIN_AGREEMENT and (names := teacher_class_names(layer)) is not None:
            return names
    return None


def class_names_of(layer: TeacherLayer, given: ClassNames | None) -> ClassNames | None:
    """The names of a teacher's classes: the user's if there are as many, else those that are known for sure."""
    return given if given is not None and len(given) == layer.document.identity.num_classes else teacher_class_names(layer)


# --- completeness ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lack:
    """A part of a cache that some shards have, or were asked for, and others lack."""

    what: str
    """'shards' (that were asked for and have nothing yet), 'views', or 'TEACHER: TARGET'."""
    views: int
    """How many views from 0 on the fullest shard has."""
    shards: tuple[str, ...]
    """Those that have fewer."""


def find_lacks(cache: Cache) -> list[Lack]:
    """What an interrupted extraction left undone; empty for a finished cache. A shard that was not begun is named as such alone."""
    waiting = tuple(shard for shard in cache.all_shards if shard not in cache.views)
    have = {shard: _views_from_zero(records) for shard, records in cache.views.items()}
    lacks = [Lack("shards", max(have.values(), default=0), waiting)] if waiting else []
    lacks += _lack("views", have)
    for name, layer in sorted(cache.teachers.items()):
        for target in sorted(layer.targets):
            lacks += _lack(f"{name}: {target}", {shard: _views_from_zero(layer.segments(shard, target)) for shard in cache.views})
    return lacks


def _views_from_zero(records: Iterable[Document[Any]]) -> int:
    return count_contiguous([record.identity.views for record in records])


def _lack(what: str, have: Mapping[str, int]) -> list[Lack]:
    most = max(have.values(), default=0)
    lacking = tuple(shard for shard, views in sorted(have.items()) if views < max(most, 1))
    return [Lack(what, most, lacking)] if lacking else []


# --- provenance and size ---------------------------------------------------------------------------------------------


def made_with(documents: Iterable[Document[Any]]) -> dict[str, list[str]]:
    """What made these documents, most used first: package, 'python', 'machine', 'host', 'device' or 'batch_size' → versions or values."""
    counts: dict[str, Counter[str]] = {}
    for document in documents:
        made = document.provenance
        facts = {**made.get("packages", {}), **{name: made[name] for name in ("python", "machine", "host", "device", "batch_size") if name in made}}
        for name, value in facts.items():
            counts.setdefault(name, Counter())[str(value)] += 1
    return {name: [value for value, _ in count.most_common()] for name, count in counts.items()}


def when_written(cache: Cache) -> tuple[str, str] | None:
    """(first, last) time at which a document was written, UTC, ISO 8601, by the times of the files, which a copy may have changed.

    None where the store has no such times.
    """
    if not isinstance(cache.store, LocalStore):
        return None
    times: list[float] = []
    for path in cache.documents:
        try:
            times.append(os.stat(cache.store.root / path).st_mtime)
        except OSError:  # taken away since the cache was opened
            continue
    if not times:
        return None
    first, last = (datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds") for time in (min(times), max(times)))
    return first, last


def teacher_passes(layer: TeacherLayer) -> int:
    """Views that the teacher saw when its records were made: a view once for each segment, calibration aside."""
    return sum(record.identity.rows * len(record.identity.views) for records in layer.records.values() for record in records)


@dataclass(frozen=True)
class Part:
    """One part of a cache's size."""

    name: str
    """'views', 'stored views', 'TEACHER: TARGET', 'TEACHER: tail', or REST_NAME."""
    views: int | None
    """Views of it, from 0 on, in the shard that has most; None for what has none."""
    bytes: int


def owned_bytes(cache: Cache) -> int:
    """Of every file that a record or a card names: all of a cache but its documents and its index."""
    return sum(field.size for field, _ in owned_files(cache.documents).values())


def sizes(cache: Cache) -> list[Part]:
    """Where `owned_bytes` are, the largest part first."""
    records = [document for documents in cache.views.values() for document in documents]
    views = max((_views_from_zero(documents) for documents in cache.views.values()), default=0)
    stored = sum(record.identity.group.size_of(STORED_FOLDER) for record in records)
    parts = [Part("views", views, sum(record.identity.group.size_of() for record in records) - stored)]
    if cache.plan.stored_views is not None:
        parts.append(Part("stored views", views, stored))
    for name, layer in cache.teachers.items():
        segments = [record for by_shard in layer.records.values() for record in by_shard]
        for target in layer.targets:
            size = sum(record.identity.group.size_of(target) for record in segments if target in record.identity.targets)
            parts.append(
                Part(f"{name}: {target}", max((_views_from_zero(layer.segments(shard, target)) for shard in layer.records), default=0), size)
            )
        if layer.tail is not None:
            parts.append(Part(f"{name}: tail", None, layer.tail.identity.weights.size))
    parts.append(Part(REST_NAME, None, owned_bytes(cache) - sum(part.bytes for part in parts)))
    return sorted(parts, key=lambda part: -part.bytes)


# --- a sample of rows ------------------------------------------------------------------------------------------------


def sample_rows(
    cache: Cache, teacher: str, target: str, *, view: int = 0, max_rows: int | None = SAMPLE_ROWS, max_bytes: int = SAMPLE_BYTES
) -> list[tuple[str, np.ndarray[Any, np.dtype[np.int64]]]]:
    """(shard, ascending rows) of a target's view, spread over all shards that have it, and within each over its chunks; the same each time.

    max_rows: None for every row, whatever it reads; 0 for none. max_bytes: of the chunks that hold the rows, before compression.
    """
    layer = cache.layer(teacher)
    counts = {
        record.identity.shard: record.identity.rows
        for shard in cache.shards
        for record in layer.segments(shard, target)
        if view in record.identity.views and record.identity.rows
    }
    shards = sorted(counts)
    if max_rows is None:
        return [(shard, np.arange(counts[shard])) for shard in shards]
    if not max_rows or not shards:
        return []
    chunk_rows, chunk_bytes = _chunk_of(layer.targets[target].identity, max(cache.views_record(shard, view).samples for shard in shards))
    num_chunks = max(1, min(max_rows, SAMPLE_CHUNKS, max_bytes // chunk_bytes))
    chosen = [shards[i] for i in spread(len(shards), num_chunks)]
    rows_a_shard, chunks_a_shard = -(-max_rows // len(chosen)), max(1, num_chunks // len(chosen))
    sample: list[tuple[str, np.ndarray[Any, np.dtype[np.int64]]]] = []
    left = max_rows
    for shard in chosen:
        chunks = spread(-(-counts[shard] // chunk_rows), min(chunks_a_shard, rows_a_shard))
        inside = [np.arange(chunk * chunk_rows, min((chunk + 1) * chunk_rows, counts[shard])) for chunk in chunks]
        near = np.concatenate(inside)
        rows = near[spread(len(near), min(rows_a_shard, left))]
        left -= len(rows)
        if len(rows):
            sample.append((shard, rows))
    return sample


def spread(length: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`count` of 0 … length - 1, all if there are no more: the middles of as many equal parts."""
    count = min(count, length)
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // max(2 * count, 1)


def _chunk_of(card: TargetIdentity, samples: int) -> tuple[int, int]:
    """(rows, bytes before compression) of a chunk of the target's largest component, the bytes with its share of the others."""
    specs = target_specs({card.name: card}, 1, samples).values()
    row_bytes = [int(np.prod(spec.inner, dtype=np.int64)) * spec.dtype.itemsize for spec in specs]
    rows = min(spec.chunk_rows for spec in specs)
    return rows, max(1, rows * sum(row_bytes))


def decode_rows(
    cache: Cache, teacher: str, target: str, encoding: Encoding, shard: str, view: int, rows: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """part → float32 (len(rows), …), as a student reads it. encoding: `cache.encoding` of the target, which is costly to make for each block."""
    import torch

    components = cache.read_components(teacher, target, shard, view, rows)
    value = encoding.decode({name: torch.from_numpy(array) for name, array in components.items()})
    return {part: tensor.numpy() for part, tensor in value.items()}


def decoded_blocks(
    cache: Cache, teacher: str, target: str, sample: Sequence[tuple[str, np.ndarray[Any, Any]]], *, view: int = 0, block_rows: int = 512
) -> Iterator[tuple[str, np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]]:
    """(shard, rows, {part: float32 (rows, …)}) of a sample, decoded, at most `block_rows` at a time. An empty sample imports no torch."""
    if not sample:
        return
    encoding = cache.encoding(teacher, target)
    for shard, rows in sample:
        for start in range(0, len(rows), block_rows):
            chosen = rows[start : start + block_rows]
            yield shard, chosen, decode_rows(cache, teacher, target, encoding, shard, view, chosen)


# --- logits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitSample:
    """A teacher's softmax at T = 1 on a sample of its cached rows."""

    view: int
    shards: int
    """Shards that the sample is of."""
    of_rows: int
    """Rows that have this view."""
    entropy: np.ndarray[Any, np.dtype[np.float64]]
    """(N,) in nats."""
    confidence: np.ndarray[Any, np.dtype[np.float64]]
    """(N,) probability of the likeliest class."""
    num_classes: int

    def to_json(self) -> dict[str, Any]:
        """{"rows", "of_rows", "shards", "view", "entropy": {"mean", "most", "q05" …}, "confidence": {…}}; figures only where there are rows."""
        body: dict[str, Any] = {"rows": len(self.entropy), "of_rows": self.of_rows, "shards": self.shards, "view": self.view}
        if len(self.entropy):
            body["entropy"] = {**_spread_of(self.entropy), "most": log(self.num_classes)}
            body["confidence"] = _spread_of(self.confidence)
        return body


def _spread_of(values: np.ndarray[Any, Any]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    return {"mean": float(values.mean()), **{f"q{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, found, strict=True)}}


def sample_logits(cache: Cache, teacher: str, *, view: int = 0, max_rows: int | None = SAMPLE_ROWS, max_bytes: int = SAMPLE_BYTES) -> LogitSample:
    """Entropy and confidence of a teacher that has logits, over `sample_rows` of one view."""
    layer = cache.layer(teacher)
    sample = sample_rows(cache, teacher, "logits", view=view, max_rows=max_rows, max_bytes=max_bytes)
    entropies: list[np.ndarray[Any, Any]] = [np.zeros(0)]
    confidences: list[np.ndarray[Any, Any]] = [np.zeros(0)]
    for _, _, value in decoded_blocks(cache, teacher, "logits", sample, view=view):
        log_p = log_softmax(value["logits"])
        p = np.exp(log_p)
        entropies.append(-(p * log_p).sum(axis=1))
        confidences.append(p.max(axis=1))
    of_rows = sum(record.identity.rows for shard in cache.shards for record in layer.segments(shard, "logits") if view in record.identity.views)
    classes = layer.targets["logits"].identity.num_classes or 1
    return LogitSample(view, len(sample), of_rows, np.concatenate(entropies), np.concatenate(confidences), classes)
