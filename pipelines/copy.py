"""Take a part of a cache to another folder: open, choose, check the destination, copy shard after shard, index, report.

The part is a cache like any other: students train from it, extract adds to it, and verify finds it sound. Segments that are
taken whole keep every byte; of others the part is cut out of the encoded chunks. The order of commit is that of extract,
so a copy that was killed is continued by the same command.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from kdcache.cache import Cache, TeacherLayer
from kdcache.commit import create_document
from kdcache.console import ProgressBar, counted, human_bytes, human_seconds, say
from kdcache.errors import StoreError, UsageError
from kdcache.format import DigestField, Document, SourceIdentity
from kdcache.index import MAX_DOCUMENT_BYTES, drop_index, is_current, load_documents, read_document
from kdcache.launch import available_cores
from kdcache.opening import check_documents, refresh_index
from kdcache.ownership import owned_files
from kdcache.paths import source_path, tail_path, target_path, teacher_path
from kdcache.plan import require_same
from kdcache.store import Store, open_store
from kdcache.subset import Part, Selection, commit_part, copy_file, parts_of

_OTHER = "choose an empty folder"


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """What to take of which cache, and where to."""

    cache: str
    dest: str
    """A folder that is empty or not there, or holds an earlier copy of the same."""
    teachers: Sequence[str] = ()
    """Default: all."""
    targets: Sequence[str] = ()
    """Of these teachers. Default: all."""
    views: int | None = None
    """Only the first so many views."""
    limit_shards: int | None = None
    """Only the first N shards of the cache."""


@dataclass
class CopySummary:
    """What the copy holds, and what this run did. The keys of `kdcache copy --json`."""

    root: str = ""
    shards: int = 0
    rows: int = 0
    """Samples; not times views."""
    views: int = 0
    teachers: dict[str, list[str]] = field(default_factory=dict)
    """Teacher → its targets in the copy."""
    segments: int = 0
    """Segments that the copy holds, of all layers."""
    cut_segments: int = 0
    """Of these cut out of larger ones."""
    resumed_segments: int = 0
    """Of these there before this run."""
    bytes: int = 0
    """Added by this run: arrays, stored views, tail and calibration, as `inspect` counts them; neither documents nor the index."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def copy(config: CopyConfig, *, progress: bool = False) -> CopySummary:
    """Copy a part of a cache. Raises UsageError for a choice or a destination that can't be, CorruptError for damage in the cache."""
    begin = time.perf_counter()
    cache = _open_source(config.cache)
    selection = _select(config, cache)
    parts = [part for _, part in parts_of(cache, selection) if part is not None]
    dest = open_store(config.dest)
    _check_apart(cache.store, dest)
    with dest.hold():
        missing = _check_destination(dest, cache, selection, parts)
        beside = [field.size for path, field in _files_beside(cache, selection).items() if dest.size(path) is None]
        _check_space(dest, [*beside, *(part.size for part in missing)])
        dest.sweep_spools()
        summary = CopySummary(segments=len(parts), cut_segments=sum(not part.is_whole for part in parts), resumed_segments=len(parts) - len(missing))
        summary.bytes = _copy_documents(cache, selection, dest)
        summary.bytes += _copy_segments(cache, parts, dest, progress=progress)
        copied = refresh_index(config.dest)
    summary.root, summary.shards, summary.rows, summary.views = copied.root, len(copied.views), copied.num_rows, copied.num_views
    summary.teachers = {name: sorted(layer.targets) for name, layer in sorted(copied.teachers.items())}
    summary.seconds = time.perf_counter() - begin
    _report(config, summary, cache)
    return summary


# --- what ------------------------------------------------------------------------------------------------------------


def _open_source(path: str) -> Cache:
    """The cache, every document read itself: what is copied must be proved, not an index of it."""
    store = open_store(path)
    documents, _ = load_documents(store, use_index=False)
    return check_documents(Cache(store, documents))


def _select(config: CopyConfig, cache: Cache) -> Selection:
    """What stays. Raises UsageError that says what the cache has."""
    layers = [cache.layer(name) for name in dict.fromkeys(config.teachers)] or [cache.teachers[name] for name in sorted(cache.teachers)]
    known = {target for layer in layers for target in layer.targets}
    for target in config.targets:
        if target not in known:
            raise UsageError(f"{cache.store.url}: no target {target!r}; {_what_there_is(layers)}")
    highest = max((record.identity.views.stop for records in cache.views.values() for record in records), default=0)
    if config.views is not None and config.views > highest:
        raise UsageError(f"{cache.store.url}: --views {config.views}: the cache has {counted(highest, 'view')}")
    targets = {layer.name: frozenset(set(layer.targets) & set(config.targets) if config.targets else layer.targets) for layer in layers}
    for name in [name for name, chosen in targets.items() if config.targets and not chosen]:
        say(f"teacher {name} has none of these targets and is not copied")
        del targets[name]
    return Selection(shards=frozenset(cache.shards[: config.limit_shards]), views=config.views, targets=targets)


def _what_there_is(layers: Sequence[TeacherLayer]) -> str:
    return "; ".join(f"teacher {layer.name} has: {', '.join(sorted(layer.targets)) or 'none'}" for layer in layers) or "the cache has no teacher"


def _sources(cache: Cache, selection: Selection) -> dict[str, SourceIdentity]:
    """Path → which shards the copy is asked to hold: what the runs were asked for, or the chosen shards alone."""
    if len(selection.shards) == len(cache.views):
        return {path: document.identity for path, document in cache.documents.items() if document.kind == "source"}
    source = SourceIdentity(shards=tuple(sorted(selection.shards)))
    return {source_path(source): source}


# --- where to --------------------------------------------------------------------------------------------------------


def _check_apart(source: Store, dest: Store) -> None:
    """Neither may lie in the other: what is copied would be no part of the cache around it."""
    one, other = (os.path.realpath(store.url) for store in (source, dest))
    if os.path.commonpath([one, other]) in (one, other):
        raise UsageError(f"{dest.url}: the copy and the cache {source.url} can't lie in each other; {_OTHER} elsewhere")


def _check_destination(dest: Store, cache: Cache, selection: Selection, parts: Sequence[Part]) -> list[Part]:
    """The parts that are not there yet. Raises UsageError for a folder that holds anything but an earlier copy of the same."""
    if dest.size("cache.json") is None:
        stray = next((path for path, _ in dest.list()), None)
        if stray is not None:
            raise UsageError(f"{dest.url}: expected an empty folder, found {stray}; {_OTHER}")
        return list(parts)
    documents, _ = load_documents(dest, use_index=False)
    require_same(f"{dest.url}: view plan", documents["cache.json"].identity.plan, cache.plan, remedy=f"it holds another cache: {_OTHER}")
    expected = {part.new_path for part in parts} | {"cache.json"}
    expected |= {path for name in selection.targets for path in _teacher_documents(cache, name, selection)}
    asked = {shard for source in _sources(cache, selection).values() for shard in source.shards}
    for path, document in documents.items():
        if path not in expected and not (document.kind == "source" and asked.issuperset(document.identity.shards)):
            raise UsageError(
                f"{dest.url}: holds {path}, which this copy has no place for: it is another cache, or a copy of something else; {_OTHER}"
            )
    if not is_current(dest, documents):
        drop_index(dest)
    return [part for part in parts if part.new_path not in documents]


def _teacher_documents(cache: Cache, name: str, selection: Selection) -> list[str]:
    """The teacher's card, then its tail's and its targets', in the order of creation."""
    tail = [tail_path(name)] if cache.teachers[name].tail is not None else []
    return [teacher_path(name), *tail, *(target_path(name, target) for target in sorted(selection.targets[name]))]


def _files_beside(cache: Cache, selection: Selection) -> dict[str, DigestField]:
    """Path → size and digest of the tails and calibrations that the copy takes along."""
    cards = {path: cache.documents[path] for name in selection.targets for path in _teacher_documents(cache, name, selection)}
    return {path: field for path, (field, _) in owned_files(cards).items()}


def _check_space(dest: Store, sizes: Iterable[int]) -> None:
    """Refuse what can't fit before a byte is written."""
    needed, free = sum(sizes), dest.free_bytes()
    if free is not None and needed > free:
        raise StoreError(f"{dest.url}: the copy needs about {human_bytes(needed)}, {human_bytes(free)} are free; free space, or copy less")


# --- copying ---------------------------------------------------------------------------------------------------------


def _copy_documents(cache: Cache, selection: Selection, dest: Store) -> int:
    """What segments need to be there: the plan, what was asked for, and the cards, each calibration and tail before its card.

    Returns the bytes of calibrations and tails that were added.
    """
    added = 0
    _copy_document(cache, "cache.json", dest)
    for path, source in _sources(cache, selection).items():
        if path in cache.documents:
            _copy_document(cache, path, dest)
        else:
            create_document(dest, path, source)
    for name in sorted(selection.targets):
        for path in _teacher_documents(cache, name, selection):
            for beside, (expected, _) in owned_files({path: cache.documents[path]}).items():
                added += expected.size if _copy_beside(cache, beside, expected, dest, card=path) else 0
            _copy_document(cache, path, dest)
    return added


def _copy_document(cache: Cache, path: str, dest: Store) -> None:
    if not dest.put_new(path, cache.store.get(path, max_size=MAX_DOCUMENT_BYTES)):
        found: Document[Any] = read_document(dest, path)
        require_same(f"{dest.url}/{path}", found.identity, cache.documents[path].identity, remedy=f"it holds another cache: {_OTHER}")


def _copy_beside(cache: Cache, path: str, expected: DigestField, dest: Store, *, card: str) -> bool:
    """A file that the document at `card` names; whether it was not there."""
    spool = dest.new_spool()
    try:
        copy_file(cache.store, path, expected, spool / "file")
        if dest.size(path) is not None and dest.size(card) is None:
            dest.delete(path)  # no card vouches for it
        return dest.put_new(path, spool / "file")
    finally:
        dest.drop_spool(spool)


def _copy_segments(cache: Cache, parts: Sequence[Part], dest: Store, *, progress: bool) -> int:
    """Copy shard after shard, views before targets, a few shards at once; the bytes that were added. The first error ends it."""
    by_shard: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.layer != "views"):
        by_shard.setdefault(part.document.identity.shard, []).append(part)
    total = sum(part.source_bytes for part in parts)
    added = 0
    with (
        ProgressBar(total=total, unit="B", unit_scale=True, desc="copy", disable=not progress) as bar,
        ThreadPoolExecutor(min(4, available_cores())) as pool,
    ):

        def copy_shard(shard: str) -> int:
            committed = [commit_part(cache, part, dest, advance=bar.update) for part in by_shard[shard]]
            return sum(document.identity.group.size_of() for document, created in committed if created)

        futures = [pool.submit(copy_shard, shard) for shard in sorted(by_shard)]
        try:
            for future in as_completed(futures):
                added += future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return added


# --- report ----------------------------------------------------------------------------------------------------------


def _report(config: CopyConfig, summary: CopySummary, cache: Cache) -> None:
    """The summary for people, on stderr."""
    say(
        f"{config.dest}: {counted(summary.shards, 'shard')}, {counted(summary.rows, 'row')} x {counted(summary.views, 'view')}, {_teachers_in_words(summary)};"
        f" added {human_bytes(summary.bytes)} in {human_seconds(summary.seconds)}"
    )
    for line in _segments_in_words(summary):
        say(line)
    same = ": the whole of the cache" if summary.root == cache.root else ""
    say(f"root {summary.root}{same}")


def _teachers_in_words(summary: CopySummary) -> str:
    teachers = [f"teacher {name} ({', '.join(targets) or 'no targets'})" for name, targets in summary.teachers.items()]
    return ", ".join(teachers) or "no teacher"


def _segments_in_words(summary: CopySummary) -> Iterator[str]:
    if summary.cut_segments:
        others = "; the others are the same to the byte" if summary.cut_segments < summary.segments else ""
        yield f"{summary.cut_segments:,} of {counted(summary.segments, 'segment')}: cut out of larger ones{others}"
    if summary.resumed_segments:
        yield f"{summary.resumed_segments:,} of {counted(summary.segments, 'segment')}: there already"
