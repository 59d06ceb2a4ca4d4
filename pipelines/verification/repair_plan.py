"""What a repair would do: from the verdict of verify and what lies in the store to the documents, segments and files that change. Used by repair."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from kdcache.cache import Cache
from kdcache.console import counted, human_bytes, view_range
from kdcache.digests import find_changed
from kdcache.errors import CacheError, KDCacheError
from kdcache.format import (
    CacheIdentity,
    Document,
    SourceIdentity,
    TailIdentity,
    TargetIdentity,
    TargetsIdentity,
    TeacherIdentity,
    ViewRange,
    ViewsIdentity,
    body_of,
    file_digest_holds,
)
from kdcache.index import Index, document_paths, identity_type_of, index_paths, read_document, read_index
from kdcache.opening import document_problems
from kdcache.ownership import group_path, index_tables, owned_files
from kdcache.paths import calibration_path, name_on_disk, shard_of, tail_weights_path, targets_segment_id, teacher_of, teacher_path, views_segment_id
from kdcache.store import Store, open_store

from .verdict import MAX_LISTED, Verdict

MAX_VIEWS_GUESSED = 256
"""Of a record that is damaged beyond reading, whose range of views its name tells only as a digest."""
MAX_TARGETS_GUESSED = 10


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
        return f"shard {self.shard}: {what}{view_range(self.views.start, self.views.stop)}"


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
            yield f"{'':>13}  and {counted(len(listed) - MAX_LISTED, 'more file')}, {human_bytes(sum(size for _, size in listed[MAX_LISTED:]))}"
        for path in self.restore:
            yield f"{'put back':>13}  {'':>8}  {path}, from the index"
        if self.rewrite_sources:
            yield f"{'write':>13}  {'':>8}  sources/, from the shards that are there"
        for segment in self.segments:
            needs = "its teacher and its views" if segment.targets else "its tar"
            files = counted(len(segment.bad_files), "file") if segment.bad_files else "all files"
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
            teacher = self.documents.get(teacher_path(teacher_of(path))) if teacher_of(path) else None
            if teacher is not None and document.kind in ("targets", "tail") and document.identity.teacher != teacher.identity_digest:
                found.append(path)
        return found

    def _agree(self) -> bool:
        if "cache.json" not in self.documents:
            return False
        try:
            cache = Cache(self.store, self.documents)
        except CacheError:
            return False
        return not document_problems(cache)

    def _lost_parents(self) -> bool:
        """Whether something is lost on which all else rests; says so."""
        for path in self.lost:
            kind = identity_type_of(path)
            if kind is CacheIdentity:
                self.plan.impossible.append(
                    "cache.json is lost, and no sound index holds a copy: the plan can't be made from what is left. Restore the file, or move it away and run"
                    " 'kdcache extract' with the options that made the cache (dataset, augment, size, seed, decoder, resizer, store-views): a plan that differs is refused"
                )
                self.plan.delete.pop(path, None)
            elif kind in (TeacherIdentity, TailIdentity, TargetIdentity):
                self.plan.impossible.append(
                    f"{path} is lost, and no sound index holds a copy: delete it and run 'kdcache extract' with the same teacher and targets to write it"
                    f" again"
                )
                self.plan.delete.pop(path, None)
            elif kind is SourceIdentity:
                self.plan.rewrite_sources = True
        for path in sorted({teacher_path(teacher_of(path)) for path in self.documents if teacher_of(path)}):
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
        bad |= missing | {path for path, _ in find_changed(self.store, unchecked)}
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
                    teacher=teacher_of(path),
                )  # fmt: skip
                (self.plan.targets if targets else self.plan.views).append(segment)
        for path, document in sorted(self.documents.items()):
            teacher = teacher_of(path)
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
        if identity_type_of(path) not in (ViewsIdentity, TargetsIdentity):
            return
        shard, teacher = shard_of(path), teacher_of(path)
        stem, _, segment = path.rpartition("/")[2].removesuffix(".json").rpartition(".")
        if name_on_disk(shard) != stem:
            return  # no name that kdcache gives: it goes, and nothing comes in its place
        found = self._targets_of(teacher, segment) if teacher else self._views_of(segment)
        if found is None:
            self.plan.notes.append(f"{path}: which views and targets it was of can't be told; run 'kdcache extract' again to finish the cache")
            return
        targets, views = found
        one = Segment(path=path, shard=shard, views=views, targets=targets, teacher=teacher, document=None, bad_files=())
        (self.plan.targets if teacher else self.plan.views).append(one)

    def _views_of(self, segment: str) -> tuple[tuple[str, ...], ViewRange] | None:
        ranges = (ViewRange(start=start, stop=stop) for stop in range(1, MAX_VIEWS_GUESSED + 1) for start in range(stop))
        return next((((), views) for views in ranges if views_segment_id(views) == segment), None)

    def _targets_of(self, teacher: str, segment: str) -> tuple[tuple[str, ...], ViewRange] | None:
        cards = {
            document.identity.name: document.identity_digest
            for path, document in self.documents.items()
            if document.kind == "target" and teacher_of(path) == teacher
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
        taken_up = tuple(group_prefix(segment) for segment in self.plan.segments if segment.document is None)
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


def group_prefix(segment: Segment) -> str:
    """What the paths of a segment's groups begin with, whatever their digest."""
    return f"{segment.path.removesuffix('.json')}."


def _best_index(store: Store) -> Index | None:
    """The sound index that knows most."""
    found: list[Index] = []
    for path in index_paths(store):
        with contextlib.suppress(CacheError):  # reported by verify, and rebuilt
            found.append(read_index(store, path))
    return max(found, key=lambda index: len(index.documents), default=None)
