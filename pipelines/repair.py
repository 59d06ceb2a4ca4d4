"""Mend a cache: put back documents that the index holds, make bad or missing segments again, remove what nobody owns, rebuild the index.

What is sound is never touched. A segment is made again in a spool, with the settings that its record holds; if the bytes come out as its record says,
only its bad files are replaced, and the record stays. Otherwise (another device, another codec version) the whole segment is
replaced, provided that its pixels are those of before. An index needs neither tars nor teacher, views need their tar, targets their teacher and the
views' tar, or the stored views.

The order makes a kill harmless, as in an extraction: documents, views, calibration and tails, targets, index; and what is bad goes last before its
replacement comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import Cache, document_problems, refresh_index
from kdcache.console import human_bytes, say
from kdcache.errors import CacheError, CorruptError, DriftError, KDCacheError, MismatchError, ShardError, StoreError, UsageError
from kdcache.format import (
    Document,
    SourceIdentity,
    ViewRange,
    body_of,
    calibration_path,
    file_digest_holds,
    name_on_disk,
    source_path,
    tail_weights_path,
    targets_segment_id,
    views_segment_id,
)
from kdcache.index import Index, document_paths, drop_index, index_paths, is_current, read_document, read_index
from kdcache.ownership import group_path, index_tables, owned_files
from kdcache.shards import ShardIndex, ShardSource, check_same_tar, scan_shard
from kdcache.sources import locate_shards
from kdcache.store import LocalStore, Store, open_store

from .verification.verdict import MAX_LISTED, Verdict
from .verify import digest_all

if TYPE_CHECKING:
    from kdcache.commit import ChunkPool
    from kdcache.jobs import Missing, RecordedTarget
    from kdcache.teacher import Teacher

MAX_VIEWS_GUESSED = 256
"""Of a record that is damaged beyond reading, whose range of views its name tells only as a digest."""
MAX_TARGETS_GUESSED = 10


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """What may be done, and where teachers and tars lie now."""

    data: str | None = None
    """SHARDS. Default: where they lay."""
    model: str | None = None
    """Where the teacher lies now. Default: as it was named when it was recorded."""
    checkpoint: str | None = None
    teacher: str | None = None
    """Of which teacher `model` and `checkpoint` speak. Default: the only one that is needed."""
    batch_size: int | None = None
    """Default: as the segment was made, so that its bytes come out the same. Likewise the device."""
    device: str | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A segment to be made again."""

    path: str
    """Of its record."""
    shard: str
    views: ViewRange
    targets: tuple[str, ...]
    """None in the views layer."""
    teacher: str
    """'' in the views layer."""
    document: Document[Any] | None
    """Its record, if that is sound: then it stays, unless the bytes come out otherwise."""
    bad_files: tuple[str, ...]
    """Of its group, in the cache."""

    @property
    def words(self) -> str:
        what = f"{', '.join(self.targets)} of teacher {self.teacher}, " if self.targets else ""
        return f"shard {self.shard}: {what}views {self.views.start} to {self.views.stop - 1}"


@dataclass
class RepairPlan:
    """What repair would do, in the order in which it would."""

    delete: dict[str, int] = field(default_factory=dict)
    """Path → bytes: damaged files, and what no record owns."""
    restore: dict[str, bytes] = field(default_factory=dict)
    """Documents that the index holds: path → bytes as they were."""
    rewrite_sources: bool = False
    views: list[Segment] = field(default_factory=list)
    calibrations: list[tuple[str, str]] = field(default_factory=list)
    """(teacher, target)"""
    tails: list[str] = field(default_factory=list)
    targets: list[Segment] = field(default_factory=list)
    index: bool = False
    notes: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    """What can't be mended, and what to do instead. Then nothing is."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Path → bytes of every file when the plan was made: a cache that has changed since is not touched."""

    def __bool__(self) -> bool:
        return bool(self.delete or self.restore or self.rewrite_sources or self.segments or self.calibrations or self.tails or self.index)

    @property
    def segments(self) -> list[Segment]:
        return [*self.views, *self.targets]

    @property
    def teachers(self) -> set[str]:
        """That have to be loaded."""
        return {segment.teacher for segment in self.targets} | {teacher for teacher, _ in self.calibrations} | set(self.tails)

    def lines(self) -> Iterator[str]:
        """For people: what would be deleted first, then what would be made."""
        listed = list(self.delete.items())
        for path, size in listed[:MAX_LISTED]:
            yield f"{'delete':>13}  {human_bytes(size):>8}  {path}"
        if len(listed) > MAX_LISTED:
            yield f"{'':>13}  and {len(listed) - MAX_LISTED} more files, {human_bytes(sum(size for _, size in listed[MAX_LISTED:]))}"
        for path in self.restore:
            yield f"{'put back':>13}  {'':>8}  {path}, from the index"
        if self.rewrite_sources:
            yield f"{'write':>13}  {'':>8}  sources/, from the shards that are there"
        for segment in self.segments:
            needs = "its teacher and its views" if segment.targets else "its tar"
            files = "all files" if not segment.bad_files else "1 file" if len(segment.bad_files) == 1 else f"{len(segment.bad_files)} files"
            yield f"{'make again':>13}  {'':>8}  {segment.words} ({files}; needs {needs})"
        for teacher, target in self.calibrations:
            yield f"{'make again':>13}  {'':>8}  calibration of {target} of teacher {teacher} (needs the teacher and the first views)"
        for teacher in self.tails:
            yield f"{'make again':>13}  {'':>8}  the tail of teacher {teacher} (needs the teacher)"
        if self.index:
            yield f"{'rebuild':>13}  {'':>8}  the index"
        for text in self.notes:
            yield f"{'note':>13}  {'':>8}  {text}"
        for text in self.impossible:
            yield f"{'cannot':>13}  {'':>8}  {text}"


def plan_repair(path: str, verdict: Verdict) -> RepairPlan:
    """What it takes to mend what verify found. Reads only; digests what verify could not, because its record was damaged."""
    return _Planner(open_store(path), verdict).plan


class _Planner:
    """From what is on disk and in the index to a plan."""

    def __init__(self, store: Store, verdict: Verdict) -> None:
        self.store, self.verdict, self.plan = store, verdict, RepairPlan()
        self.sizes = self.plan.sizes = dict(store.list())
        self.index = _best_index(store)
        self.documents: dict[str, Document[Any]] = {}
        """That are sound, or will be when they are put back."""
        self.lost: list[str] = []
        """Paths of documents that are there, are no good, and are not in the index."""
        self._read_documents()
        if not self._lost_parents():
            self._plan_files()
        self._plan_extras()
        self.plan.index = self._index_is_stale()
        if self.plan.index:  # writing it removes what is stale, and keeps a table that is as it should be
            stale = [path for path in self.plan.delete if path.startswith("index/table.")]
            self.plan.delete = {path: size for path, size in self.plan.delete.items() if path not in stale}
            self.plan.delete |= {path: self.sizes[path] for path in index_paths(self.store) if self.index is None or path != self.index.path}

    # --- documents ---

    def _read_documents(self) -> None:
        indexed = self.index.documents if self.index is not None else {}
        bad: list[str] = []
        for path, _ in document_paths(self.store):
            try:
                self.documents[path] = read_document(self.store, path)
            except KDCacheError:
                bad.append(path)
        if self.index is not None and self._is_foreign(self.index):
            self.plan.notes.append(f"{self.index.path} is of another cache, or of another time of this one: nothing is put back from it")
            self.index, indexed = None, {}
        for path in [*bad, *(path for path in indexed if path not in self.documents and path not in bad)]:
            self._put_back(path)
        for path in self._disagreeing():
            del self.documents[path]
            self._put_back(path)

    def _is_foreign(self, index: Index) -> bool:
        """Whether an index that contradicts documents is the one that is wrong: they agree among themselves, or are the many."""
        shared = [path for path, document in self.documents.items() if path in index.documents and document.kind != "tail"]
        differing = [path for path in shared if index.documents[path].identity != self.documents[path].identity]
        return bool(differing) and (2 * len(differing) > len(shared) or self._agree())

    def _put_back(self, path: str) -> None:
        """Take a document from the index; note it as lost if it is not there."""
        if path in self.sizes:
            self.plan.delete[path] = self.sizes[path]
        data = self._indexed_bytes(path)
        if data is not None and self.index is not None:
            self.plan.restore[path] = data
            self.documents[path] = self.index.documents[path]
        elif path in self.sizes or path == "cache.json":
            self.lost.append(path)

    def _indexed_bytes(self, path: str) -> bytes | None:
        """The bytes of a document that the index holds, exactly as they were: its own file digest says so."""
        if self.index is None or path not in self.index.documents:
            return None
        data = json.dumps(body_of(self.index.documents[path]), indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"
        return data if file_digest_holds(data) and len(data) == self.index.sizes.get(path) else None

    def _disagreeing(self) -> list[str]:
        """Documents that are sound in themselves, and are not of this cache."""
        found: list[str] = []
        cache = self.documents.get("cache.json")
        if cache is None:
            return found
        indexed = self.index.documents if self.index is not None else {}
        if not self._agree():
            found += [path for path, document in self.documents.items() if path in indexed and indexed[path] != document]
        for path, document in self.documents.items():
            if path in found:
                continue
            if document.kind == "views" and document.identity.plan != cache.identity.plan.fingerprint:
                found.append(path)
            teacher = self.documents.get(f"teachers/{path.split('/')[1]}/teacher.json") if path.startswith("teachers/") else None
            if teacher is not None and document.kind in ("targets", "tail") and document.identity.teacher != teacher.identity_digest:
                found.append(path)
        return found

    def _agree(self) -> bool:
        if "cache.json" not in self.documents:
            return False
        try:
            cache = Cache(self.store, self.documents, None, sources={}, check=False)
        except CacheError:
            return False
        return not document_problems(cache)

    def _lost_parents(self) -> bool:
        """Whether something is lost on which all else rests; says so."""
        for path in self.lost:
            kind = path.split("/")
            if path == "cache.json":
                self.plan.impossible.append(
                    "cache.json is lost, and no sound index holds a copy: the plan can't be made from what is left. Restore the file, or move it away and run"
                    " 'kdcache extract' with the options that made the cache (dataset, augment, size, seed, decoder, resizer, store-views): a plan that differs is refused"
                )
                self.plan.delete.pop(path, None)
            elif kind[0] == "teachers" and (kind[2] in ("teacher.json", "tail.json") or kind[2] == "targets"):
                self.plan.impossible.append(
                    f"{path} is lost, and no sound index holds a copy: delete it and run 'kdcache extract' with the same teacher and targets to write it"
                    f" again"
                )
                self.plan.delete.pop(path, None)
            elif kind[0] == "sources":
                self.plan.rewrite_sources = True
        for path in sorted({f"teachers/{path.split('/')[1]}/teacher.json" for path in self.documents if path.startswith("teachers/")}):
            if path not in self.documents and path not in self.lost:
                self.plan.impossible.append(
                    f"{path} is gone, and no sound index holds a copy: run 'kdcache extract' with the same teacher and --name into a new cache, and copy the file"
                )
        return bool(self.plan.impossible)

    # --- files ---

    def _plan_files(self) -> None:
        bad = {problem.path for problem in self.verdict.problems if problem.path and problem.kind in ("missing", "corrupt")}
        owned = owned_files(self.documents)
        missing = {path for path in owned if path not in self.sizes}
        unchecked = [(path, field) for path, (field, _) in owned.items() if path not in missing and path not in self.verdict.checked]
        bad |= missing | {path for path, _ in digest_all(self.store, unchecked, lambda _size: None)}
        for path, document in sorted(self.documents.items()):
            if document.kind not in ("views", "targets"):
                continue
            group = group_path(path, document)
            files = tuple(name for name in document.identity.group.files if f"{group}/{name}" in bad)
            self._delete_bad(f"{group}/{name}" for name in files)
            if files:
                identity = document.identity
                targets = tuple(sorted(identity.targets)) if document.kind == "targets" else ()
                segment = Segment(
                    path=path, shard=identity.shard, views=identity.views, targets=targets, document=document, bad_files=files,
                    teacher=path.split("/")[1] if targets else "",
                )  # fmt: skip
                (self.plan.targets if targets else self.plan.views).append(segment)
        for path, document in sorted(self.documents.items()):
            teacher = path.split("/")[1] if path.startswith("teachers/") else ""
            if document.kind == "target" and document.identity.calibration is not None:
                file = calibration_path(teacher, document.identity.name)
                if file in bad:
                    self._delete_bad([file])
                    self.plan.calibrations.append((teacher, document.identity.name))
            elif document.kind == "tail" and tail_weights_path(teacher) in bad:
                self._delete_bad([tail_weights_path(teacher)])
                self.plan.tails.append(teacher)
        for path in self.lost:
            self._plan_lost_record(path)
        self._plan_lost_views()

    def _delete_bad(self, paths: Any) -> None:
        self.plan.delete |= {path: self.sizes[path] for path in paths if path in self.sizes}

    def _plan_lost_record(self, path: str) -> None:
        """A record that nobody can read: its name says which segment it was of."""
        parts = path.split("/")
        is_views = parts[0] == "views"
        if not is_views and (parts[0] != "teachers" or parts[2] in ("teacher.json", "tail.json", "targets")):
            return
        stem, _, segment = parts[-1].removesuffix(".json").rpartition(".")
        shard = urllib.parse.unquote(stem, errors="surrogateescape")
        if name_on_disk(shard) != stem:
            return  # no name that kdcache gives: it goes, and nothing comes in its place
        found = self._views_of(segment) if is_views else self._targets_of(parts[1], segment)
        if found is None:
            self.plan.notes.append(f"{path}: which views and targets it was of can't be told; run 'kdcache extract' again to finish the cache")
            return
        targets, views = found
        one = Segment(path=path, shard=shard, views=views, targets=targets, teacher="" if is_views else parts[1], document=None, bad_files=())
        (self.plan.views if is_views else self.plan.targets).append(one)

    def _views_of(self, segment: str) -> tuple[tuple[str, ...], ViewRange] | None:
        ranges = (ViewRange(start=start, stop=stop) for stop in range(1, MAX_VIEWS_GUESSED + 1) for start in range(stop))
        return next((((), views) for views in ranges if views_segment_id(views) == segment), None)

    def _targets_of(self, teacher: str, segment: str) -> tuple[tuple[str, ...], ViewRange] | None:
        cards = {
            document.identity.name: document.identity_digest
            for path, document in self.documents.items()
            if document.kind == "target" and path.split("/")[1] == teacher
        }
        last = max((d.identity.views.stop for d in self.documents.values() if d.kind == "views"), default=0)
        names = sorted(cards)[:MAX_TARGETS_GUESSED]
        for count in range(1, len(names) + 1):
            for chosen in combinations(names, count):
                for stop in range(1, last + 1):
                    for start in range(stop):
                        views = ViewRange(start=start, stop=stop)
                        if targets_segment_id({name: cards[name] for name in chosen}, views) == segment:
                            return chosen, views
        return None

    def _plan_lost_views(self) -> None:
        """Views of which there are targets and no record: as many as the targets tell of, in one segment."""
        have: dict[str, list[ViewRange]] = {}
        for document in self.documents.values():
            if document.kind == "views":
                have.setdefault(document.identity.shard, []).append(document.identity.views)
        for segment in self.plan.views:
            have.setdefault(segment.shard, []).append(segment.views)
        for shard in sorted({document.identity.shard for document in self.documents.values() if document.kind == "targets"}):
            wanted = max(d.identity.views.stop for d in self.documents.values() if d.kind == "targets" and d.identity.shard == shard)
            lacking = [view for view in range(wanted) if not any(view in views for views in have.get(shard, []))]
            if lacking:
                views = ViewRange(start=lacking[0], stop=lacking[-1] + 1)
                path = f"views/{name_on_disk(shard)}.{views_segment_id(views)}.json"
                self.plan.views.append(Segment(path=path, shard=shard, views=views, targets=(), teacher="", document=None, bad_files=()))

    # --- the rest ---

    def _plan_extras(self) -> None:
        """What no record owns, and no segment that is made again will take up."""
        if self.plan.impossible:
            return  # a group whose record is lost looks like nobody's
        owned = {*self.documents, *owned_files(self.documents), *index_paths(self.store), *index_tables(self.store)}
        taken_up = tuple(_group_prefix(segment) for segment in self.plan.segments if segment.document is None)
        extras = {path: size for path, size in sorted(self.sizes.items()) if path not in owned and not path.startswith(taken_up)}
        self.plan.delete |= extras

    def _index_is_stale(self) -> bool:
        if self.plan.impossible:
            return False
        if any(problem.kind == "index" for problem in self.verdict.problems) and not self.plan.restore:
            return True
        segments = [segment for segment in self.plan.segments if segment.document is None]
        return (
            bool(segments or self.plan.rewrite_sources)
            or self.index is None
            or self.index.documents != self.documents
            or len(index_paths(self.store)) != 1
        )


def _group_prefix(segment: Segment) -> str:
    """What the paths of a segment's groups begin with, whatever their digest."""
    return f"{segment.path.removesuffix('.json')}."


def _best_index(store: Store) -> Index | None:
    """The sound index that knows most."""
    found: list[Index] = []
    for path in index_paths(store):
        with contextlib.suppress(CacheError):  # reported by verify, and rebuilt
            found.append(read_index(store, path))
    return max(found, key=lambda index: len(index.documents), default=None)


# --- doing it --------------------------------------------------------------------------------------------------------


def carry_out(path: str, plan: RepairPlan, config: RepairConfig) -> list[str]:
    """Do what the plan says; what could not be done, in words.

    Raises StoreError while another process writes to the cache, or if one has since the plan was made; UsageError for a `model` or `checkpoint`
    that may be of several teachers.
    """
    if (config.model or config.checkpoint) and config.teacher is None and len(plan.teachers) > 1:
        raise UsageError(f"--model and --checkpoint are of one teacher, and {', '.join(sorted(plan.teachers))} are needed: pass --teacher NAME too")
    store = open_store(path)
    with store.hold(alone=True):
        if dict(store.list()) != plan.sizes:
            raise StoreError(f"{store.url}: another process has changed it since it was verified; nothing was changed: run the command again")
        try:
            return _Repair(store, plan, config).run()
        finally:
            store.drop_spools()
            store.sweep_spools()  # of a repair or an extraction that was killed


class _Repair:
    """A plan being carried out."""

    def __init__(self, store: Store, plan: RepairPlan, config: RepairConfig) -> None:
        self.store, self.plan, self.config = store, plan, config
        self.failures: list[str] = []
        self._lost = {segment.path for segment in plan.segments if segment.document is None}
        """Records that can't be read, till their segment is made again."""
        self._teachers: dict[str, Teacher] = {}
        self._cache: Cache | None = None

    def run(self) -> list[str]:
        kept = {f"{group_path(s.path, s.document)}/{name}" for s in self.plan.segments if s.document is not None for name in s.bad_files}
        kept |= self._lost
        kept |= {calibration_path(*one) for one in self.plan.calibrations} | {tail_weights_path(one) for one in self.plan.tails}
        for path in self.plan.delete:
            if path not in kept:  # those go when what replaces them is at hand
                self.store.delete(path)
        for path, data in self.plan.restore.items():
            self.store.delete(path)
            self.store.put_new(path, data)
        self._cache = self._open()
        if self.plan.rewrite_sources:
            self._rewrite_sources()
        for segment in self.plan.views:
            self._try(segment.words, self._make_views, segment)
        for teacher, target in self.plan.calibrations:
            self._try(f"calibration of {target} of teacher {teacher}", self._make_calibration, teacher, target)
        for teacher in self.plan.tails:
            self._try(f"the tail of teacher {teacher}", self._make_tail, teacher)
        for segment in self.plan.targets:
            self._try(segment.words, self._make_targets, segment)
        self._finish_index()
        return self.failures

    def _open(self) -> Cache:
        documents: dict[str, Document[Any]] = {}
        for path, _ in document_paths(self.store):
            if path not in self._lost:
                documents[path] = read_document(self.store, path)
        return self._with(documents)

    def _with(self, documents: Mapping[str, Document[Any]]) -> Cache:
        return Cache(self.store, documents, None, sources=locate_shards(self.config.data) if self.config.data is not None else {}, check=False)

    @property
    def cache(self) -> Cache:
        assert self._cache is not None
        return self._cache

    def _try(self, what: str, action: Any, *arguments: Any) -> None:
        """One thing that can't be mended does not stop the others."""
        try:
            action(*arguments)
        except KDCacheError as error:
            self.failures.append(f"{what}: {error}")
        else:
            say(f"{'mended':>13}  {'':>8}  {what}")

    def _rewrite_sources(self) -> None:
        from kdcache.commit import create_document

        source = SourceIdentity(shards=tuple(self.cache.shards))
        create_document(self.store, source_path(source), source)

    def _finish_index(self) -> None:
        if any(self.store.size(path) is not None for path in self._lost):
            return  # could not be made again, as the failures say: no index while they are there
        documents = self._open().documents
        if is_current(self.store, documents):
            return
        self._try("the index", refresh_index, self.store.url)

    # --- segments ---

    def _make_views(self, segment: Segment) -> None:
        """Render a views segment again; its pixels must be those of before, since targets were made of them."""
        from kdcache.jobs import Missing

        source = self.cache.source(segment.shard) if segment.shard in self.cache.views or self.config.data is not None else self._remembered(segment)
        index = scan_shard(source)
        known = segment.document or next(iter(self.cache.views.get(segment.shard, [])), None)
        if known is not None:
            check_same_tar(index, known.identity)
        document = self._do(segment, index, Missing(views=(segment.views,), segments=()), known, {}, {}, batch_size=1)
        old = segment.document
        if old is not None and document.identity.pixels_by_view != old.identity.pixels_by_view:
            raise DriftError(
                f"shard {segment.shard}: the views come out with other pixels than the teacher saw; nothing of it was replaced: run 'kdcache verify"
                f" CACHE --views all' to see why, and install the versions of then"
            )
        self._settle(segment, document)

    def _remembered(self, segment: Segment) -> ShardSource:
        """Where a shard's tar may lie of which no views record is left: beside those of the others."""
        folders = {os.path.dirname(self.cache.source(shard).path) for shard in self.cache.shards}
        for folder in sorted(folders):
            path = os.path.join(folder, f"{segment.shard}.tar")
            if os.path.exists(path):
                return ShardSource(segment.shard, path, self.cache.label_key)
        raise ShardError(
            f"shard {segment.shard}: its record was lost, and with it where its tar lies; pass --data with SHARDS where the tars lie now"
        )

    def _make_targets(self, segment: Segment) -> None:
        """Show a segment's views to the teacher again, in the batches of then."""
        from kdcache.jobs import Missing, RecordedTarget
        from kdcache.stored_source import index_of_stored

        from .verification.recompute import targets_of_layer

        layer = self.cache.layer(segment.teacher)
        records = self.cache.views.get(segment.shard, [])
        if not records:
            raise CorruptError(f"shard {segment.shard}: its views could not be mended, and targets need them")
        made = segment.document.provenance if segment.document is not None else self._made_like(segment)
        teacher = self._teacher(segment.teacher, made.get("device"))
        recorded: dict[str, RecordedTarget] = {}
        for name, target in targets_of_layer(teacher, layer, segment.targets).items():
            card, encoding = layer.targets[name], self.cache.encoding(segment.teacher, name)
            calibration = encoding.calibration if card.identity.calibration is not None else None
            recorded[name] = RecordedTarget(target=target, card=card, encoding=encoding, calibration=calibration)
        source = self.cache.source(segment.shard)
        stores = self.cache.plan.stored_views is not None
        index = index_of_stored(self.cache, source) if stores and not os.path.exists(source.path) else scan_shard(source)
        check_same_tar(index, records[0].identity)
        views = range(segment.views.start, segment.views.stop)
        digests = {view: self.cache.read_pixel_digests(segment.shard, view, np.arange(records[0].identity.rows)) for view in views}
        missing = Missing(views=(), segments=((segment.targets, segment.views),))
        with _threads(made.get("threads")):
            batch_size = self.config.batch_size or int(made.get("batch_size", 64))
            document = self._do(
                segment, index, missing, records[0], recorded, digests, batch_size=batch_size, stored=frozenset(views if stores else ())
            )
        self._settle(segment, document)

    def _made_like(self, segment: Segment) -> Mapping[str, Any]:
        """How the teacher's other segments were made."""
        records = [record for one in self.cache.layer(segment.teacher).records.values() for record in one]
        return records[0].provenance if records else {}

    def _do(
        self,
        segment: Segment,
        index: ShardIndex,
        missing: Missing,
        known: Document[Any] | None,
        targets: Mapping[str, RecordedTarget],
        known_digests: Mapping[int, Any],
        *,
        batch_size: int,
        stored: frozenset[int] = frozenset(),
    ) -> Document[Any]:
        """Make a segment in a spool; the record that is there then, beside its group."""
        import torch

        from kdcache.jobs import ShardJob
        from kdcache.rendering import FailedTask, rendered_blocks, samples_per_task

        plan, pool = self.cache.plan, _pool()
        teacher = self._teachers.get(segment.teacher)
        self._drop_spool()
        self._spool = self.store.new_spool(f"repair/{segment.shard}")
        spool = LocalStore(self._spool / "made")
        job = ShardJob(
            index=index, missing=missing, targets=targets, plan=plan, store=spool, pool=pool, batch_size=batch_size,
            known=known.identity if known is not None else None, known_digests=known_digests, stored=stored,
        )  # fmt: skip
        try:
            tasks = job.tasks(0, samples_per_task(plan, len(job.rendered_views)))
            workers = self.config.workers if self.config.workers is not None else min(8, os.cpu_count() or 1)
            with contextlib.closing(rendered_blocks(plan, tasks, num_workers=workers, cache=self.cache)) as blocks:
                for block in blocks:
                    if isinstance(block, FailedTask):
                        raise block.error
                    job.add(block, teacher)
            job.finish(teacher)
            provenance = {"device": str(teacher.device), "batch_size": batch_size, "threads": torch.get_num_threads()} if teacher is not None else {}
            digest = self.cache.layer(segment.teacher).document.identity_digest if segment.teacher else None
            result = job.commit(teacher_name=segment.teacher or None, teacher_digest=digest, provenance=provenance)
        finally:
            pool.close()
            job.abandon()
        self._made = spool
        (document,) = result.documents.values()
        return document

    _spool: Path | None = None
    _made: LocalStore

    def _drop_spool(self) -> None:
        if self._spool is not None:
            self.store.drop_spool(self._spool)
            self._spool = None

    def _settle(self, segment: Segment, document: Document[Any]) -> None:
        """Put what was made in the place of what was bad: files alone if the record vouches for them, else the whole segment."""
        old, group = segment.document, group_path(segment.path, document)
        if old is not None and document.identity.group == old.identity.group:
            for name in segment.bad_files:
                self._replace(f"{group}/{name}")
        else:
            for name, expected in document.identity.group.files.items():
                path = f"{group}/{name}"
                if self.store.size(path) is None or list(digest_all(self.store, [(path, expected)], lambda _size: None)):
                    self._replace(path)
            if old is not None:
                say(
                    f"{'note':>13}  {'':>8}  {segment.words}: came out with other bytes, made on another device or with other versions: replaced as a whole"
                )
                drop_index(self.store)
            self._replace(segment.path)
            self._lost.discard(segment.path)
            if old is not None:
                for name in old.identity.group.files:
                    self.store.delete(f"{group_path(segment.path, old)}/{name}")
            for path, _ in list(self.store.list(f"{group.rpartition('/')[0]}/")):
                if path.startswith(_group_prefix(segment)) and path != segment.path and not path.startswith(f"{group}/"):
                    self.store.delete(path)  # what the lost record named
            self._cache = self._with({**self.cache.documents, segment.path: document})
        self._drop_spool()

    def _replace(self, path: str) -> None:
        self.store.delete(path)
        self.store.put_new(path, self._made.root / path)

    # --- what belongs to a teacher ---

    def _teacher(self, name: str, device: str | None) -> Teacher:
        """The teacher of a layer, on the device of then where this machine has it. Raises MismatchError for another model."""
        from .verification.recompute import load_recorded_teacher

        if name not in self._teachers:
            config = self.config
            model, checkpoint = (config.model, config.checkpoint) if config.teacher in (None, name) else (None, None)
            self._teachers[name] = load_recorded_teacher(
                self.cache.layer(name), model=model, checkpoint=checkpoint, device=config.device or _usable(device)
            )
        return self._teachers[name]

    def _make_calibration(self, teacher_name: str, target: str) -> None:
        """Channel statistics of the views that they were taken over. Raises MismatchError if they come out otherwise."""
        import safetensors.torch

        from kdcache.plan import blake2b_128
        from kdcache.preflight import first_views, run_preflight

        from .extract import CALIBRATION_VIEWS
        from .verification.recompute import targets_of_layer

        layer = self.cache.layer(teacher_name)
        card = layer.targets[target]
        made = card.provenance.get("calibration", {})
        teacher = self._teacher(teacher_name, made.get("device"))
        sources = [self.cache.source(shard) for shard in made.get("shards", [])]
        views, labels, _ = first_views(self.cache.plan, sources, scan_shard, CALIBRATION_VIEWS, self.cache)
        resolved = targets_of_layer(teacher, layer, [target])
        expected = card.identity.calibration
        assert expected is not None
        calibrator = _blank_encoding(card).calibrator(target)
        assert calibrator is not None
        with _threads(made.get("threads")):
            batch_size = self.config.batch_size or int(made.get("batch_size", 64))
            found = run_preflight(teacher, list(resolved.values()), {target: calibrator}, views, labels, batch_size=batch_size)
        data, path = safetensors.torch.save(dict(found.statistics[target])), calibration_path(teacher_name, target)
        if blake2b_128(data) != expected.digest:
            raise MismatchError(
                f"target {target!r} of teacher {teacher_name!r}", "calibration", expected=expected.digest, found=blake2b_128(data),
                remedy=f"it was made with {made}: use the same device, batch size and threads, or record the target under another --name",
            )  # fmt: skip
        self.store.delete(path)
        self.store.put_new(path, data)

    def _make_tail(self, teacher_name: str) -> None:
        from kdcache.cards import create_tail, plan_tail
        from kdcache.preflight import first_views

        from .extract import TAIL_VIEWS

        layer = self.cache.layer(teacher_name)
        assert layer.tail is not None
        teacher = self._teacher(teacher_name, None)
        sources = [self.cache.source(shard) for shard in self.cache.shards]
        views, _, _ = first_views(self.cache.plan, sources, scan_shard, TAIL_VIEWS, self.cache)
        plan = plan_tail(self.store, teacher_name, teacher, layer.tail.identity.modules, views)
        create_tail(self.store, teacher_name, plan, teacher, views)


def _blank_encoding(card: Document[Any]) -> Any:
    """The encoding of a card, without its calibration."""
    from kdcache.encodings import TargetShape, build_encoding

    identity = card.identity
    shape = TargetShape(grid=identity.grid or (0, 0), channels=identity.channels or 0, prefix_tokens=identity.prefix_tokens or 0)
    return build_encoding(identity.kind, identity.encoding, shape)


def _pool() -> ChunkPool:
    from kdcache.commit import ChunkPool

    from .extract import WRITE_QUEUE_BYTES

    return ChunkPool(num_threads=min(4, os.cpu_count() or 1), max_bytes=WRITE_QUEUE_BYTES)


def _usable(device: str | None) -> str | None:
    """The device of then if this machine has it; None for the best there is, whose bytes may come out otherwise."""
    from kdcache.device import resolve_device

    try:
        return str(resolve_device(device)) if device is not None else None
    except UsageError:
        return None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many torch threads as then: they decide the order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(count) if count else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
