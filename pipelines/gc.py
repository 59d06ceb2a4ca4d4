"""Show what no record owns, and what dropping a target, a teacher or views would free; remove it when told to.

The order of removal makes a kill harmless: index, then for each segment the record of what stays, the old record, the old group;
then cards, views, and what no record owns. At every moment what is there is a sound cache, and what is left over is found
by the next gc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcache.cache import Cache
from kdcache.console import ProgressBar, counted, human_bytes, say, view_range
from kdcache.errors import CorruptError, StoreError, UsageError
from kdcache.format import Document
from kdcache.index import drop_index
from kdcache.opening import document_problems, open_to_write, refresh_index
from kdcache.ownership import Garbage, find_garbage, group_path
from kdcache.paths import calibration_path, tail_path, tail_weights_path, target_path, teacher_path
from kdcache.store import Store, open_store
from kdcache.subset import Part, Selection, commit_part, parts_of

MAX_LISTED = 20
"""Lines of one kind of garbage; the rest are counted."""

_IN_WORDS = {"group": "orphan group", "index": "stale index", "spool": "dead spool", "file": "stray file"}


@dataclass(frozen=True, kw_only=True)
class GcConfig:
    """What to remove beyond what no record owns, and whether to do it."""

    cache: str
    drop_targets: Sequence[str] = ()
    teacher: str | None = None
    """Whose targets. Default: the only teacher that has them."""
    drop_teachers: Sequence[str] = ()
    keep_views: int | None = None
    """Drop views from this number on, with their targets."""
    delete: bool = False
    """False: only tell."""


@dataclass(frozen=True)
class Change:
    """What a drop does to one record: `part` of it stays, or nothing."""

    path: str
    document: Document[Any]
    part: Part | None

    @property
    def size(self) -> int:
        """Bytes of groups that it frees; an estimate where views are dropped."""
        whole: int = self.document.identity.group.size_of()
        return whole - (self.part.size if self.part is not None else 0)


@dataclass
class GcReport:
    """What there is to remove, or was. The keys of `kdcache gc --json`."""

    deleted: bool = False
    """Whether it was removed."""
    bytes: int = 0
    """Of all below, about."""
    garbage: list[Garbage] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """In words: each target, teacher or range of views."""
    removed_records: int = 0
    rewritten_records: int = 0
    """Segments of which a part stays."""
    alive: list[str] = field(default_factory=list)
    """Spools of attempts that run now."""
    root: str = ""
    """As it is now."""

    def to_json(self) -> dict[str, Any]:
        garbage = [{"kind": one.kind, "path": one.path, "files": len(one.files), "bytes": one.size} for one in self.garbage]
        return {**self.__dict__, "garbage": garbage}


def gc(config: GcConfig, *, progress: bool = False) -> GcReport:
    """Collect garbage. Raises UsageError for a drop of what is not there, CorruptError for a cache whose documents are damaged, and
    StoreError where another process writes to the cache."""
    if not config.delete:
        return _Collection(config).report()
    store = open_store(config.cache)
    if store.size("cache.json") is None:
        open_to_write(config.cache)  # raises NotACacheError, and makes no folder
    with store.hold(alone=True):
        collection = _Collection(config)
        if collection.found.alive:
            raise StoreError(f"{store.url}: another process is writing to it ({collection.found.alive[0]}); nothing was deleted: wait until it ends")
        collection.drop(progress=progress)
        collection.sweep(progress=progress)
        collection.found.root = refresh_index(config.cache).root
    collection.found.deleted = True
    return collection.report()


class _Collection:
    """What a cache holds that is to go."""

    def __init__(self, config: GcConfig) -> None:
        self.config = config
        self.cache = open_to_write(config.cache)
        self.store: Store = self.cache.store
        self.found = GcReport(root=self.cache.root)
        self.selection = _select(config, self.cache)
        self.changes = [
            Change(path, self.cache.documents[path], part) for path, part in parts_of(self.cache, self.selection) if part is None or not part.is_whole
        ]
        self.cards = _dropped_cards(self.cache, self.selection)
        if self.changes:
            for problem in document_problems(self.cache):
                raise CorruptError(f"{self.store.url}: {problem.text}; finish the extraction before dropping a part of it")
        self.found.garbage = find_garbage(self.store, self.cache.documents)
        self.found.alive = [spool.path for spool in self.store.spools() if spool.is_alive]
        self.found.removed_records = sum(change.part is None for change in self.changes)
        self.found.rewritten_records = len(self.changes) - self.found.removed_records
        of_cards = sum(self.store.size(path) or 0 for path in self.cards)  # a tail's file is hundreds of MB
        self.found.bytes = sum(one.size for one in self.found.garbage) + sum(change.size for change in self.changes) + of_cards
        self.found.dropped = list(_drops_in_words(config, self.cache, self.selection, self.changes))

    # --- removing ---

    def drop(self, *, progress: bool) -> None:
        """Targets first, then their cards, then views: nothing is there without what it needs."""
        if not self.changes and not self.cards:
            return
        drop_index(self.store)  # it must not vouch for a record that goes
        total = sum(change.part.source_bytes if change.part is not None else 0 for change in self.changes)
        with ProgressBar(total=total, unit="B", unit_scale=True, desc="gc", disable=not progress or not total) as bar:
            for change in [change for change in self.changes if change.document.kind == "targets"]:
                self._apply(change, bar)
            for path in self.cards:
                self.store.delete(path)
            for change in [change for change in self.changes if change.document.kind == "views"]:
                self._apply(change, bar)

    def _apply(self, change: Change, bar: Any) -> None:
        if change.part is not None:
            commit_part(self.cache, change.part, self.store, advance=bar.update)
        self.store.delete(change.path)
        group = group_path(change.path, change.document)
        for path in change.document.identity.group.files:
            self.store.delete(f"{group}/{path}")

    def sweep(self, *, progress: bool) -> None:
        """Remove what no record owns now: a group that an attempt left may be what a rewritten segment has just taken up."""
        documents = open_to_write(self.config.cache).documents
        for one in ProgressBar(find_garbage(self.store, documents), unit="item", desc="gc", disable=not progress or not self.found.garbage):
            for path in one.files:
                self.store.delete(path)
        self.store.sweep_spools()
        groups = {group_path(path, document) for path, document in documents.items() if document.kind in ("views", "targets")}
        self.found.garbage = [one for one in self.found.garbage if one.path not in groups]

    # --- telling ---

    def report(self) -> GcReport:
        """Word the facts for people, on stderr."""
        found = self.found
        counts = Counter(one.kind for one in found.garbage)
        shown: Counter[str] = Counter()
        for one in found.garbage:
            shown[one.kind] += 1
            if shown[one.kind] <= MAX_LISTED:
                count = counted(len(one.files), "file") if len(one.files) > 1 else ""
                say(f"{_IN_WORDS[one.kind]:>13}  {human_bytes(one.size):>8}  {count:>9}  {one.path}")
            elif shown[one.kind] == counts[one.kind]:
                say(f"{'':>13}  and {counts[one.kind] - MAX_LISTED} more of this kind")
        for text in found.dropped:
            say(f"{'drop':>13}  {text}")
        for path in found.alive:
            say(f"{'note':>13}  {path} belongs to a process that is writing to the cache now; what it has just written may be among the above")
        say(f"{self.config.cache}: {self._verdict()}")
        return found

    def _verdict(self) -> str:
        found = self.found
        if not found.garbage and not found.dropped:
            return "nothing to remove: records own every file"
        things = f"{counted(len(found.garbage), 'thing')} that no record owns"
        if found.removed_records:
            things += f", {counted(found.removed_records, 'segment')}"
        if found.rewritten_records:
            things += f", parts of {counted(found.rewritten_records, 'segment')}"
        if found.deleted:
            return f"removed {things}: about {human_bytes(found.bytes)}; root {found.root}"
        return f"{things}: about {human_bytes(found.bytes)}. Nothing was changed: pass --delete to remove all of this"


# --- what to drop ----------------------------------------------------------------------------------------------------


def _select(config: GcConfig, cache: Cache) -> Selection:
    """What stays. Raises UsageError that says what the cache has."""
    kept = {name: set(layer.targets) for name, layer in cache.teachers.items()}
    for name in config.drop_teachers:
        cache.layer(name)
        kept.pop(name, None)
    if config.teacher is not None:
        cache.layer(config.teacher)
        if not config.drop_targets:
            raise UsageError("--teacher says whose --drop-target goes; to drop a whole teacher pass --drop-teacher")
    for target in config.drop_targets:
        owner = _owner(config, cache, target)
        kept.get(owner, set()).discard(target)
    highest = max((record.identity.views.stop for records in cache.views.values() for record in records), default=0)
    if config.keep_views is not None and config.keep_views > highest:
        raise UsageError(f"{cache.store.url}: --keep-views {config.keep_views}: the cache has {counted(highest, 'view')}")
    targets = {name: frozenset(names) for name, names in kept.items()}
    shards = {document.identity.shard for document in cache.documents.values() if document.kind in ("views", "targets")}
    return Selection(shards=frozenset(shards), views=config.keep_views, targets=targets)


def _owner(config: GcConfig, cache: Cache, target: str) -> str:
    """The one teacher whose target is meant."""
    owners = [name for name, layer in sorted(cache.teachers.items()) if target in layer.targets and config.teacher in (None, name)]
    if not owners:
        names = [config.teacher] if config.teacher is not None else sorted(cache.teachers)
        known = "; ".join(f"teacher {name} has: {', '.join(sorted(cache.teachers[name].targets)) or 'none'}" for name in names)
        raise UsageError(f"{cache.store.url}: no target {target!r}; {known or 'the cache has no teacher'}")
    if len(owners) > 1:
        raise UsageError(f"{cache.store.url}: target {target!r} is there of the teachers {', '.join(owners)}; pass --teacher to say whose goes")
    return owners[0]


def _dropped_cards(cache: Cache, selection: Selection) -> list[str]:
    """Cards of what goes, in the order in which they may: a target's before its calibration, a teacher's last."""
    paths: list[str] = []
    for name, layer in sorted(cache.teachers.items()):
        for target, document in sorted(layer.targets.items()):
            if target in selection.targets.get(name, ()):
                continue
            paths.append(target_path(name, target))
            if document.identity.calibration is not None:
                paths.append(calibration_path(name, target))
        if name not in selection.targets:
            if layer.tail is not None:
                paths += [tail_path(name), tail_weights_path(name)]
            paths.append(teacher_path(name))
    return paths


def _drops_in_words(config: GcConfig, cache: Cache, selection: Selection, changes: Sequence[Change]) -> Iterator[str]:
    for name, layer in sorted(cache.teachers.items()):
        of_teacher = [change for change in changes if change.path.startswith(f"teachers/{name}/")]
        if name not in selection.targets:
            size = sum(change.size for change in of_teacher)
            tail = f", and its tail, {human_bytes(layer.tail.identity.weights.size)}" if layer.tail is not None else ""
            yield f"teacher {name} ({', '.join(sorted(layer.targets)) or 'no targets'}): {counted(len(of_teacher), 'segment')}, {human_bytes(size)}{tail}"
            continue
        for target in sorted(set(layer.targets) - selection.targets[name]):
            holding = [change for change in of_teacher if target in change.document.identity.targets]
            size = sum(change.document.identity.group.size_of(target) for change in holding)
            yield f"target {target} of teacher {name}: in {counted(len(holding), 'segment')}, {human_bytes(size)}"
    keep = config.keep_views
    cut = [change for change in changes if keep is not None and change.document.identity.views.stop > keep]
    if keep is not None and cut:
        stop = max(change.document.identity.views.stop for change in cut)
        yield f"{view_range(keep, stop)}, and what teachers gave: in {counted(len(cut), 'segment')}"
