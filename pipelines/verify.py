"""Prove that a cache is what it claims to be: every byte against its record, every record against its parents, up to the root.

Story: read every document, hash every file that they name, compare the documents with each other and the index with them; on request
render views again (`pipelines.verification.replay`) and show them to the teacher again (`pipelines.verification.recompute`, the only part that loads one). Nothing is
changed; the verdict is a list of problems, empty for a sound cache. `pipelines.repair` mends what can be mended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from kdcache.cache import Cache
from kdcache.console import ProgressBar, counted
from kdcache.digests import find_changed
from kdcache.errors import CacheError, CorruptError, FormatVersionError, KDCacheError, MisplacedError, MissingError, NotACacheError
from kdcache.format import (
    Document,
    Group,
    ViewsIdentity,
    digest_of_files,
    file_digest_holds,
)
from kdcache.index import MAX_DOCUMENT_BYTES, document_paths, index_paths, read_document, read_index, read_table
from kdcache.opening import document_problems
from kdcache.ownership import index_tables, owned_files
from kdcache.paths import shard_of
from kdcache.plan import blake2b_128
from kdcache.sources import locate_shards
from kdcache.store import Store, open_store

from .facts import find_lacks
from .verification.request import Recompute
from .verification.verdict import Kind, Problem, Verdict

__all__ = ["Recompute", "verify"]


def verify(
    path: str,
    *,
    views: int | Literal["all"] | None = None,
    recompute: Recompute | None = None,
    data: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Verdict:
    """Verify a cache. views: how many views a shard to replay, or all. data: where the tars lie now.

    Raises NotACacheError, FormatVersionError; UsageError for a teacher that the cache does not have.
    """
    store = open_store(path)
    verdict = Verdict()
    if store.size("cache.json") is None:
        if not index_paths(store):
            raise NotACacheError(f"{store.url}: no cache.json; expected a folder that 'kdcache extract' wrote")
        verdict.problems.append(Problem("missing", "", "", "cache.json is not there; the index holds a copy", "cache.json"))
        return verdict
    documents = _read_documents(store, verdict)
    if "cache.json" not in documents:
        return verdict
    cache = _build_cache(store, documents, data, verdict)
    if cache is not None and (views is not None or recompute is not None):
        cache.require_decoder()  # before the hours that reading every file may take
    if cache is not None and views is not None:
        from .verification.replay import require_decoder_of_tars

        require_decoder_of_tars(cache)
    _check_files(store, documents, verdict, progress=progress)
    if cache is None:
        return verdict
    verdict.root, verdict.fingerprint, verdict.shards, verdict.rows = cache.root, cache.fingerprint, len(cache.views), cache.num_rows
    verdict.problems += [Problem(one.kind, one.shard, "", one.text) for one in document_problems(cache)]
    _check_index(store, cache, verdict)
    _check_pixel_columns(cache, verdict)
    _note_completeness(cache, verdict)
    if views is not None:
        from .verification.replay import replay

        replay(cache, views, verdict, workers=workers, progress=progress)
    if recompute is not None:
        from .verification.recompute import recompute_targets

        recompute_targets(cache, recompute, verdict, progress=progress)
    return verdict


# --- documents -------------------------------------------------------------------------------------------------------


def _read_documents(store: Store, verdict: Verdict) -> dict[str, Document[Any]]:
    """Every document that is sound; the others become problems."""
    documents: dict[str, Document[Any]] = {}
    for path, _ in document_paths(store):
        try:
            documents[path] = read_document(store, path)
        except KDCacheError as error:
            if isinstance(error, FormatVersionError) and file_digest_holds(store.get(path, max_size=MAX_DOCUMENT_BYTES)):
                raise  # a sound file of a later version, not a damaged one of ours
            kind: Kind = "missing" if isinstance(error, MissingError) else "plan" if isinstance(error, MisplacedError) else "corrupt"
            verdict.problems.append(Problem(kind, shard_of(path), "", str(error), path))
    return documents


def _build_cache(store: Store, documents: Mapping[str, Document[Any]], data: str | None, verdict: Verdict) -> Cache | None:
    sources = locate_shards(data) if data is not None else {}
    try:
        return Cache(store, documents, sources=sources)
    except CorruptError as error:
        verdict.problems.append(Problem("missing", "", "", str(error)))
        verdict.finished = False
        return None


# --- files -----------------------------------------------------------------------------------------------------------


def _check_files(store: Store, documents: Mapping[str, Document[Any]], verdict: Verdict, *, progress: bool) -> None:
    """Every file that a record names: there, of its size, with its digest. Every file that is there: named by something."""
    for path, document in documents.items():
        group = getattr(document.identity, "group", None)
        if group is not None:
            _check_table(path, group, document.identity.shard, verdict)
    expected = owned_files(documents)
    found = dict(store.list())
    verdict.files, verdict.bytes = len(found), sum(found.values())
    suspect = {problem.detail for problem in verdict.problems}
    present = [(path, field) for path, (field, _) in expected.items() if path in found]
    for path, (_, shard) in expected.items():
        if path not in found:
            verdict.problems.append(Problem("missing", shard, "", f"{path} is not there; the segment's record names it", path))
    total = sum(field.size for _, field in present)
    with ProgressBar(total=total, unit="B", unit_scale=True, desc="verify bytes", disable=not progress) as bar:
        for path, detail in find_changed(store, present, bar.update):
            verdict.problems.append(Problem("corrupt", expected[path][1], "", detail, path))
    verdict.checked = set(expected)
    known = set(expected) | set(documents) | set(index_paths(store))
    known |= index_tables(store)
    for path in sorted(found):
        if path not in known and not any(path in detail for detail in suspect) and not _belongs_to_damaged(path, suspect):
            verdict.problems.append(
                Problem(
                    "extra",
                    shard_of(path),
                    "",
                    f"{path}: no record names this file; run the extraction that was cut off again, or 'kdcache gc' to remove it",
                    path,
                )
            )


def _check_table(record: str, group: Group, shard: str, verdict: Verdict) -> None:
    if digest_of_files(group.files) != group.digest or f".{group.digest[:12]}.zarr" not in group.name:
        verdict.problems.append(Problem("corrupt", shard, "", f"{record}: the group's digest does not match its file table", record))


def _belongs_to_damaged(path: str, details: Iterable[str]) -> bool:
    """Whether the file is of a segment whose record is damaged, and so can't vouch for it."""
    layer, _, rest = path.rpartition("/c/") if "/c/" in path else ("", "", path)
    folder = next((part for part in (layer or rest).split("/") if part.endswith(".zarr")), "")
    stem = folder.removesuffix(".zarr").rpartition(".")[0]
    return bool(stem) and any(f"/{stem}.json" in detail for detail in details)


# --- index, pixels ---------------------------------------------------------------------------------------------------


def _check_index(store: Store, cache: Cache, verdict: Verdict) -> None:
    """The one index there should be says what the documents and groups say."""
    paths = index_paths(store)
    if len(paths) != 1:
        verdict.notes.append(f"{len(paths)} index files, one makes opening fast: run 'kdcache extract' again to finish the cache and its index")
    for path in paths:
        try:
            index = read_index(store, path)
            table = read_table(store, index)
        except KDCacheError as error:
            verdict.problems.append(Problem("index", "", "", str(error), path))
            continue
        wrong = sorted(p for p, document in index.documents.items() if cache.documents.get(p) != document)
        if wrong or (index.documents.keys() == cache.documents.keys() and index.root != cache.root):
            detail = f"{path} does not say what the documents say, for example of {wrong[:1]}; run 'kdcache extract' again to rebuild it"
            verdict.problems.append(Problem("index", "", "", detail, path))
        behind = cache.documents.keys() - index.documents.keys()
        if behind:
            verdict.notes.append(
                f"{path} is behind: it lacks {counted(len(behind), 'document')}; run 'kdcache extract' again to finish the cache and its index"
            )
        for shard, expected in table.items():
            if shard in cache.views and not _table_agrees(cache, shard, expected):
                verdict.problems.append(Problem("index", shard, "", f"{index.table_path}: the rows of this shard differ from its views group", path))


def _table_agrees(cache: Cache, shard: str, table: np.ndarray[Any, Any]) -> bool:
    try:
        return np.array_equal(table, cache.table_from_group(cache.views[shard][0].identity))
    except CacheError:
        return True  # the group is damaged, and reported as such


def _check_pixel_columns(cache: Cache, verdict: Verdict) -> None:
    """Each views record's digest of its pixel digests."""
    for shard, records in cache.views.items():
        for document in records:
            record: ViewsIdentity = document.identity
            rows = np.arange(record.rows)
            for view, digest in enumerate(record.pixels_by_view, start=record.views.start):
                try:
                    stored = cache.read_pixel_digests(shard, view, rows)
                except CacheError as error:
                    verdict.problems.append(Problem("corrupt", shard, "", str(error)))
                    continue
                if blake2b_128(np.ascontiguousarray(stored, dtype="<u8").tobytes()) != digest:
                    verdict.problems.append(Problem("plan", shard, "", f"view {view}: the record's digest of pixel digests is not that of its array"))


def _note_completeness(cache: Cache, verdict: Verdict) -> None:
    lacks = find_lacks(cache)
    for lack in lacks:
        if lack.what == "shards":
            done = f"{len(cache.views)} of {len(cache.all_shards)} shards are done, {lack.shards[0]} is the first that is not"
        elif lack.what == "views":
            done = f"{len(lack.shards)} of {len(cache.views)} shards have fewer views than the {lack.views} of others, {lack.shards[0]} is the first"
        else:
            done = f"{lack.what}: {len(lack.shards)} of {len(cache.views)} shards lack it or views of it, {lack.shards[0]} is the first"
        verdict.notes.append(f"unfinished: {done}")
    verdict.finished = not lacks
    for shard, records in cache.views.items():
        if records[0].identity.cut is not None:
            verdict.notes.append(
                f"shard {shard}: the tar was cut short when it was read ({records[0].identity.cut}); its samples before the cut are cached"
            )
