"""What differs between two caches, A and B: plan, shards, rows, labels, pixels, teachers, and how far shared targets are apart.

Documents tell most of it: two shards with one member table and one list of skipped samples have the same rows and labels, and
none of their arrays is read. Values are compared on a sample of the shared rows, decoded, so that encodings may differ; the sample
does not depend on which cache is called A. Nothing is changed, and memory does not grow with the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.cache import Cache, TeacherLayer
from kdcache.console import ProgressBar
from kdcache.distance import Distance
from kdcache.fidelity import combine_fidelity
from kdcache.format import TargetIdentity
from kdcache.index import rows_of_table
from kdcache.opening import open_cache
from kdcache.shards import printable

from .facts import decode_rows, fidelity_sums, made_with, spread, views_of

DIFF_ROWS = 256
"""Shared rows that are compared by default, each in one of its views."""
SAMPLE_SHARDS = 32
BLOCK_BYTES = 4 << 20
"""Of decoded float32 values of one cache, held at once."""
MAX_EXAMPLES = 5

Rows = np.ndarray[Any, np.dtype[np.int64]]


def diff(path_a: str, path_b: str, *, rows: int | None = DIFF_ROWS, teachers: Sequence[str] = (), progress: bool = False) -> dict[str, Any]:
    """Compare two caches; docs/inspect.md lists the keys.

    rows: how many shared rows are compared by value; None for all in every view, 0 for none. teachers: 'NAME' in both, or 'NAME_IN_A=NAME_IN_B'; none for all
    of equal names, or the only one of each. Raises UsageError for a teacher that is not there, and as `open_cache`.
    """
    with open_cache(path_a) as a, open_cache(path_b) as b:
        pairs = _pair_teachers(a, b, teachers)
        identical = a.root == b.root and all(pair_a == pair_b for pair_a, pair_b in pairs)
        shared = sorted(a.views.keys() & b.views.keys())
        facts: dict[str, Any] = {
            "identical": identical,
            "a": _summary(path_a, a),
            "b": _summary(path_b, b),
            "plan": differences(a.document.identity.to_json(), b.document.identity.to_json()),
            "provenance": _provenance(a, b),
            "shards": {"shared": len(shared), "only_a": sorted(a.views.keys() - b.views.keys()), "only_b": sorted(b.views.keys() - a.views.keys())},
            **_compare_rows(a, b, shared),
            "views": _compare_views(a, b, shared),
        }
        sample = [] if identical else _sample(a, b, shared, rows)
        facts["pixels"] = _compare_pixels(a, b, shared, sample, all_views=rows is None)
        taken = [one for pair in pairs for one in pair]
        facts["teachers"] = {
            "only_a": sorted(a.teachers.keys() - set(taken[::2])) if not teachers else [],
            "only_b": sorted(b.teachers.keys() - set(taken[1::2])) if not teachers else [],
            "pairs": [
                _compare_teachers(_Pair(a, b, a.teachers[name_a], b.teachers[name_b]), sample, all_views=rows is None, progress=progress)
                for name_a, name_b in pairs
            ],
        }
        return facts


def _summary(path: str, cache: Cache) -> dict[str, Any]:
    return {
        "path": path,
        "root": cache.root,
        "fingerprint": cache.fingerprint,
        "rows": cache.num_rows,
        "views": cache.num_views,
        "shards": len(cache.views),
        "teachers": sorted(cache.teachers),
    }


def _pair_teachers(a: Cache, b: Cache, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Which teacher of A is compared with which of B."""
    if wanted:
        named = [(name.partition("=")[0], name.partition("=")[2] or name) for name in wanted]
        return [(a.layer(name_a).name, b.layer(name_b).name) for name_a, name_b in named]  # raises UsageError that lists the names
    same = sorted(a.teachers.keys() & b.teachers.keys())
    if not same and len(a.teachers) == len(b.teachers) == 1:
        return [(next(iter(a.teachers)), next(iter(b.teachers)))]
    return [(name, name) for name in same]


def differences(a: Any, b: Any, path: str = "") -> list[dict[str, Any]]:
    """[{"field", "a", "b"}] of two JSON values, objects field by field; None where one lacks the field."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = [differences(a.get(name), b.get(name), f"{path}.{name}" if path else name) for name in sorted(a.keys() | b.keys())]
        return [one for part in found for one in part]
    return [] if a == b else [{"field": path, "a": a, "b": b}]


def _provenance(a: Cache, b: Cache) -> list[dict[str, Any]]:
    made_a, made_b = made_with(a.documents.values()), made_with(b.documents.values())
    names = [name for name in {**made_a, **made_b} if sorted(made_a.get(name, [])) != sorted(made_b.get(name, []))]
    return [{"name": name, "a": made_a.get(name, []), "b": made_b.get(name, [])} for name in names]


# --- rows ------------------------------------------------------------------------------------------------------------


def _is_same_tar(a: Cache, b: Cache, shard: str) -> bool:
    """Whether the shard has the same samples, labels and rows in both, in the same order: told by its records alone."""
    one, other = a.views[shard][0].identity, b.views[shard][0].identity
    return (one.member_table, one.samples, one.rows, one.skipped) == (other.member_table, other.samples, other.rows, other.skipped)


def _shared_rows(a: Cache, b: Cache, shard: str) -> tuple[Rows, Rows]:
    """Rows of A and of B that have the same keys: in row order where they are the same rows, else in the order of keys."""
    if _is_same_tar(a, b, shard):
        rows = np.arange(a.views[shard][0].identity.rows)
        return rows, rows
    rows_a, rows_b = ({key: row for row, key in enumerate(cache.keys(shard))} for cache in (a, b))
    keys = sorted(rows_a.keys() & rows_b.keys())
    return np.array([rows_a[key] for key in keys], np.int64), np.array([rows_b[key] for key in keys], np.int64)


def _compare_rows(a: Cache, b: Cache, shared: Sequence[str]) -> dict[str, Any]:
    """{"rows", "labels", "skipped", "tars"}: counts, and a few examples of each difference."""
    rows: dict[str, Any] = {"shared": 0, "only_a": 0, "only_b": 0, "examples": []}
    labels, skipped = _Examples(), _Examples()
    tars: list[str] = []
    for shard in shared:
        one, other = a.views[shard][0].identity, b.views[shard][0].identity
        if one.member_table != other.member_table:
            tars.append(shard)
        if _is_same_tar(a, b, shard):
            rows["shared"] += one.rows
            continue
        rows_a, rows_b = _shared_rows(a, b, shard)
        rows["shared"] += len(rows_a)
        keys_a, keys_b = a.keys(shard), b.keys(shard)
        for side, keys, others in (("a", keys_a, set(keys_b)), ("b", keys_b, set(keys_a))):
            only = [key for key in keys if key not in others]
            rows[f"only_{side}"] += len(only)
            rows["examples"] += [{"shard": shard, "key": printable(key), "in": side} for key in only[:MAX_EXAMPLES]]
        labels_a, labels_b = _labels(a, shard)[rows_a], _labels(b, shard)[rows_b]
        for place in np.flatnonzero(labels_a != labels_b):
            labels.add(shard=shard, key=printable(keys_a[rows_a[place]]), a=int(labels_a[place]), b=int(labels_b[place]))
        reasons_a, reasons_b = ({skip.key: skip.reason for skip in record.skipped} for record in (one, other))
        for key in sorted(reasons_a.keys() | reasons_b.keys()):
            if reasons_a.get(key) != reasons_b.get(key):
                skipped.add(shard=shard, key=printable(key), a=reasons_a.get(key), b=reasons_b.get(key))
    rows["examples"] = rows["examples"][:MAX_EXAMPLES]
    for side, cache, other_cache in (("a", a, b), ("b", b, a)):
        rows[f"only_{side}"] += sum(cache.views[shard][0].identity.rows for shard in cache.views if shard not in other_cache.views)
    return {"rows": rows, "labels": labels.to_json(), "skipped": skipped.to_json(), "tars": tars}


class _Examples:
    """A count, and the first few of what was counted."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[dict[str, Any]] = []

    def add(self, **example: Any) -> None:
        self.count += 1
        if self.count <= MAX_EXAMPLES:
            self.examples.append(example)

    def to_json(self) -> dict[str, Any]:
        return {"differ": self.count, "examples": self.examples}


def _labels(cache: Cache, shard: str) -> np.ndarray[Any, Any]:
    """(rows,) labels in row order."""
    labels: np.ndarray[Any, Any] = rows_of_table(cache.tables[shard])[:, 2]
    return labels


def _compare_views(a: Cache, b: Cache, shared: Sequence[str]) -> dict[str, Any]:
    """How many views both have from 0 on, and the shared shards that have other views in A than in B."""
    differ = [shard for shard in shared if views_of(a.views[shard]) != views_of(b.views[shard])]
    return {"a": a.num_views, "b": b.num_views, "shards_differ": differ}


# --- a sample of shared rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SampledShard:
    shard: str
    number: int
    """Of the shard, so that rows of all shards together take turns over all views."""
    rows_a: Rows
    rows_b: Rows
    places: Rows
    """Of each row among all that are shared: decides which view of it is compared."""

    def by_view(self, views: set[int], *, all_views: bool) -> Iterator[tuple[int, Rows, Rows]]:
        """(view, rows of A, rows of B): every row in one of these views, or in all."""
        ordered = sorted(views)
        for turn, view in enumerate(ordered):
            chosen = np.full(len(self.places), True) if all_views else (self.places + self.number) % len(ordered) == turn
            if chosen.any():
                yield view, self.rows_a[chosen], self.rows_b[chosen]


def _sample(a: Cache, b: Cache, shared: Sequence[str], rows: int | None) -> Sequence[_SampledShard] | _Everything:
    """Shared rows, evenly spaced over evenly spaced shards."""
    if rows is None:
        return _Everything(a, b, shared)
    filled = [shard for shard in shared if a.views[shard][0].identity.rows and b.views[shard][0].identity.rows]
    chosen = [filled[i] for i in spread(len(filled), min(rows, SAMPLE_SHARDS))]
    sample: list[_SampledShard] = []
    left = rows
    chosen.sort(key=lambda shard: min(cache.views[shard][0].identity.rows for cache in (a, b)))  # what a small shard leaves open the next ones take
    for number, shard in enumerate(chosen):
        rows_a, rows_b = _shared_rows(a, b, shard)
        places = spread(len(rows_a), -(-left // (len(chosen) - number)))
        sample.append(_SampledShard(shard, number, rows_a[places], rows_b[places], np.arange(len(places))))
        left -= len(places)
    return sample


class _Everything:
    """Every shared row, a shard at a time."""

    def __init__(self, a: Cache, b: Cache, shared: Sequence[str]) -> None:
        self._a, self._b, self._shared = a, b, shared

    def __len__(self) -> int:
        return len(self._shared)

    def __iter__(self) -> Iterator[_SampledShard]:
        for number, shard in enumerate(self._shared):
            rows_a, rows_b = _shared_rows(self._a, self._b, shard)
            yield _SampledShard(shard, number, rows_a, rows_b, np.arange(len(rows_a)))


def _compare_pixels(a: Cache, b: Cache, shared: Sequence[str], sample: Sequence[_SampledShard] | _Everything, *, all_views: bool) -> dict[str, Any]:
    """Columns (a view of a shard) with equal digests in both records, and pixel digests that differ in the sample."""
    columns = equal = 0
    for shard in shared:
        digests_a, digests_b = _columns(a, shard), _columns(b, shard)
        both = digests_a.keys() & digests_b.keys()
        columns += len(both)
        equal += sum(digests_a[view] == digests_b[view] for view in both)
    found, compared = _Examples(), 0
    for one in sample if equal < columns else []:
        for view, rows_a, rows_b in one.by_view({*views_of(a.views[one.shard])} & {*views_of(b.views[one.shard])}, all_views=all_views):
            wrong = np.flatnonzero(a.read_pixel_digests(one.shard, view, rows_a) != b.read_pixel_digests(one.shard, view, rows_b))
            compared += len(rows_a)
            for place in wrong:
                found.add(shard=one.shard, key=printable(a.keys(one.shard)[rows_a[place]]), view=view)
    return {"columns": columns, "columns_equal": equal, "rows": compared, **found.to_json()}


def _columns(cache: Cache, shard: str) -> dict[int, str]:
    """View → digest of its pixel digests."""
    return {
        view: digest
        for document in cache.views[shard]
        for view, digest in enumerate(document.identity.pixels_by_view, start=document.identity.views.start)
    }


# --- teachers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A teacher of A and one of B."""

    a: Cache
    b: Cache
    one: TeacherLayer
    other: TeacherLayer


def _compare_teachers(pair: _Pair, sample: Sequence[_SampledShard] | _Everything, *, all_views: bool, progress: bool) -> dict[str, Any]:
    one, other = pair.one, pair.other
    shared = sorted(one.targets.keys() & other.targets.keys())
    tails = [layer.tail.identity.to_json() if layer.tail is not None else None for layer in (one, other)]
    for tail in tails:
        if tail is not None:
            del tail["teacher"]  # says again that the teachers differ
    return {
        "a": one.name,
        "b": other.name,
        "identity": differences(one.document.identity.to_json(), other.document.identity.to_json()),
        "tail": differences({"tail": tails[0]}, {"tail": tails[1]}),
        "only_a": sorted(one.targets.keys() - other.targets.keys()),
        "only_b": sorted(other.targets.keys() - one.targets.keys()),
        "targets": {name: _compare_target(pair, name, sample, all_views=all_views, progress=progress) for name in shared},
    }


def _compare_target(pair: _Pair, target: str, sample: Sequence[_SampledShard] | _Everything, *, all_views: bool, progress: bool) -> dict[str, Any]:
    """Cards field by field, coverage, what each lost when it was stored, and the distance of decoded values on the sample."""
    one, other = pair.one.targets[target].identity, pair.other.targets[target].identity
    body: dict[str, Any] = {
        "card": differences(one.to_json(), other.to_json()),
        "encoding": {"a": one.encoding, "b": other.encoding},
        "views": {"a": pair.a.target_views(pair.one.name, target), "b": pair.b.target_views(pair.other.name, target)},
        "shards": {side: sum(bool(layer.segments(shard, target)) for shard in layer.records) for side, layer in (("a", pair.one), ("b", pair.other))},
        "shards_differ": sorted(
            shard
            for shard in pair.a.views.keys() & pair.b.views.keys()
            if views_of(pair.one.segments(shard, target)) != views_of(pair.other.segments(shard, target))
        ),
        "stored_rel_l2": {"a": _stored_rel_l2(pair.one, target), "b": _stored_rel_l2(pair.other, target)},
        "comparable": _shape(one) == _shape(other),
    }
    if not body["comparable"]:
        return {**body, "shape": {"a": _shape(one), "b": _shape(other)}}
    distance = Distance()
    encodings = pair.a.encoding(pair.one.name, target), pair.b.encoding(pair.other.name, target)
    block = max(1, BLOCK_BYTES // (4 * max(1, int(np.prod([side for side in _shape(one) if side], dtype=np.int64)))))
    for shard in ProgressBar(sample, unit="shard", desc=f"diff {target}", disable=not progress or not all_views):
        views = {*views_of(pair.one.segments(shard.shard, target))} & {*views_of(pair.other.segments(shard.shard, target))}
        keys = pair.a.keys(shard.shard)
        for view, rows_a, rows_b in shard.by_view(views, all_views=all_views):
            for start in range(0, len(rows_a), block):
                part = slice(start, start + block)
                value_a = decode_rows(pair.a, pair.one.name, target, encodings[0], shard.shard, view, rows_a[part])
                value_b = decode_rows(pair.b, pair.other.name, target, encodings[1], shard.shard, view, rows_b[part])
                distance.update(value_a, value_b, [(shard.shard, printable(keys[row]), view) for row in rows_a[part]])
    return {**body, **distance.result()}


def _shape(card: TargetIdentity) -> list[int]:
    """Classes; or prefix tokens, rows and columns of the grid, channels."""
    return [card.num_classes or 0] if card.kind == "logits" else [card.prefix_tokens or 0, *(card.grid or (0, 0)), card.channels or 0]


def _stored_rel_l2(layer: TeacherLayer, target: str) -> float | None:
    """What storing cost, as extraction measured it over all shards."""
    sums = [fidelity_sums(record, target) for records in layer.records.values() for record in records]
    return combine_fidelity(sums).get("rel_l2")
