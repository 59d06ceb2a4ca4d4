"""Opening a cache: every document checked, through the index where there is one, and what they say of each other. Used by all that reads or adds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .cache import MAX_CALIBRATION_BYTES, Cache, TeacherLayer
from .digests import digest_of_file
from .errors import CacheError, CorruptError, MissingError
from .format import TailIdentity, TargetsIdentity, digest_of_pixels
from .index import is_current, load_documents, write_index
from .paths import calibration_path, tail_weights_path
from .plan import blake2b_128
from .sources import locate_shards
from .store import Store, open_store

_TAIL_REMEDY = "run 'kdcache extract' again with the same teacher and --for to write it again; it must come out the same"
_CALIBRATION_REMEDY = "run 'kdcache extract' again with the same teacher, batch size and device to compute it again; it must come out the same"


def open_cache(path: str | os.PathLike[str], *, data: str | os.PathLike[str] | Sequence[str] | None = None) -> Cache:
    """Open a cache for reading and check every document in it.

    data: SHARDS, where the tars lie now; None for where they lay when the cache was made. Raises NotACacheError,
    FormatVersionError or CorruptError.
    """
    store = open_store(path)
    documents, index = load_documents(store)
    sources = locate_shards(data) if data is not None else {}
    cache = check_documents(Cache(store, documents, index, sources=sources))
    for name, layer in cache.teachers.items():
        for document in layer.targets.values():
            if document.identity.calibration is not None:
                calibration = calibration_path(name, document.identity.name)
                if store.size(calibration) is None:
                    raise MissingError(f"{store.url}/{calibration} is missing; {_CALIBRATION_REMEDY}")
                if blake2b_128(store.get(calibration, max_size=MAX_CALIBRATION_BYTES)) != document.identity.calibration.digest:
                    raise CorruptError(f"{store.url}/{calibration}: bytes were changed; delete the file, then {_CALIBRATION_REMEDY}")
        if layer.tail is not None:
            check_tail_weights(store, name, layer.tail.identity)
    return cache


def check_tail_weights(store: Store, teacher: str, card: TailIdentity) -> None:
    """Raise MissingError or CorruptError if a tail's file is not the one that its card names. Reads all of it, in pieces."""
    path, expected = tail_weights_path(teacher), card.weights
    if store.size(path) is None:
        raise MissingError(f"{store.url}/{path} is missing; {_TAIL_REMEDY}")
    found = digest_of_file(store, path)
    if found != expected:
        raise CorruptError(
            f"{store.url}/{path}: bytes were changed: expected digest {expected.digest}, found {found.digest}; delete the file, then {_TAIL_REMEDY}"
        )


def open_to_write(path: str | os.PathLike[str]) -> Cache:
    """Open a cache to add to it: every document is read itself, and what an extraction mends is no error.

    That is a damaged or missing index, a missing calibration file, and targets whose views are gone. Raises as `open_cache` for the rest.
    """
    store = open_store(path)
    documents, _ = load_documents(store, use_index=False)
    cache = Cache(store, documents)
    for problem in document_problems(cache):
        if problem.kind != "missing":
            raise CorruptError(f"{store.url}: {problem.text}; run 'kdcache verify' on the cache")
    return cache


def refresh_index(path: str | os.PathLike[str]) -> Cache:
    """Bring the index up to date with the documents, and the cache as it is then. For who holds the store. Raises CacheError."""
    cache = open_to_write(path)
    if not is_current(cache.store, cache.documents):
        write_index(cache.store, cache.documents, {shard: cache.table_from_group(records[0].identity) for shard, records in cache.views.items()})
    return cache


def check_documents(cache: Cache) -> Cache:
    """The cache. Raises CorruptError where its documents do not agree with each other."""
    for problem in document_problems(cache):
        raise CorruptError(f"{cache.store.url}: {problem.text}; run 'kdcache verify' on the cache")
    return cache


class DocumentProblem(NamedTuple):
    """Something that two documents do not agree on."""

    kind: Literal["plan", "teacher", "missing"]
    """missing: targets without their views, which an extraction mends."""
    text: str
    shard: str = ""
    """'' for what is of no shard."""


def document_problems(cache: Cache) -> list[DocumentProblem]:
    """What documents say of each other and do not agree on. Empty for a sound cache."""
    problems: list[DocumentProblem] = []
    for shard, records in cache.views.items():
        first = records[0].identity
        for document in records:
            record = document.identity
            if record.plan != cache.fingerprint:
                problems.append(
                    DocumentProblem("plan", f"shard {shard}: its views are of plan {record.plan}, the cache's plan is {cache.fingerprint}", shard)
                )
            if (record.member_table, record.samples, record.rows, record.skipped) != (first.member_table, first.samples, first.rows, first.skipped):
                problems.append(DocumentProblem("plan", f"shard {shard}: two views records are of different tars or skip different samples", shard))
    for name, layer in cache.teachers.items():
        if layer.tail is not None and layer.tail.identity.teacher != layer.document.identity_digest:
            problems.append(
                DocumentProblem(
                    "teacher",
                    f"teacher {name!r}: its tail is of a teacher with identity {layer.tail.identity.teacher}, expected {layer.document.identity_digest}",
                )
            )
        for targets_records in layer.records.values():
            for targets_document in targets_records:
                problems += _targets_problems(cache, name, layer, targets_document.identity)
    return problems


def _targets_problems(cache: Cache, name: str, layer: TeacherLayer, record: TargetsIdentity) -> list[DocumentProblem]:
    shard = record.shard
    found: list[str] = []
    if record.teacher != layer.document.identity_digest:
        found.append(
            f"shard {shard}: a record of teacher {name!r} was made by a teacher with identity {record.teacher}, expected {layer.document.identity_digest}"
        )
    for target, digest in record.targets.items():
        card = layer.targets.get(target)
        if card is None or card.identity_digest != digest:
            found.append(f"shard {shard}: teacher {name!r}, target {target!r}: the record names a card that is not there")
    try:
        views = [cache.views_record(shard, view) for view in record.views.numbers]
    except CacheError as error:
        text = f"shard {shard}: teacher {name!r} has targets of views that are not there ({error})"
        return [DocumentProblem("missing", text, shard), *(DocumentProblem("teacher", one, shard) for one in found)]
    pixels = {view: one.pixels_by_view[view - one.views.start] for view, one in enumerate(views, start=record.views.start)}
    if (record.rows, record.samples, record.member_table) != (
        views[0].rows,
        views[0].samples,
        views[0].member_table,
    ) or record.pixels != digest_of_pixels(pixels):
        found.append(f"shard {shard}: teacher {name!r} saw other rows or pixels than the views record holds")
    return [DocumentProblem("teacher", one, shard) for one in found]
