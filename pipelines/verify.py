"""Prove that a cache is what it claims to be: every byte against its record, every record against its parents, up to the root.

With `views` also the pixels: views are drawn and rendered again from the tars, without a teacher or a GPU, and compared with
the digests of what the teacher saw. Stored views are decoded and compared, and rendered again too where the tar is there.
Nothing is changed; the verdict is a list of problems, empty for a sound cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from kdcache.cache import Cache, document_problems
from kdcache.errors import CacheError, CorruptError, FormatVersionError, KDCacheError, MissingError, NotACacheError
from kdcache.format import DigestField, Document, Group, ViewsIdentity, digest_of_files, file_digest_holds
from kdcache.index import MAX_DOCUMENT_BYTES, document_paths, index_paths, read_document, read_index, read_table
from kdcache.ownership import index_tables, owned_files
from kdcache.plan import blake2b_128, canonical_json
from kdcache.shards import Sample, ShardIndex, ShardSource, scan_shard
from kdcache.sources import locate_shards
from kdcache.store import Store, open_store

if TYPE_CHECKING:
    from kdcache.rendering import Neighbours

READ_BYTES = 4 << 20
MAX_LISTED = 20
"""Pixel problems listed a shard; the rest are counted."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    kind: Literal["missing", "corrupt", "plan", "index", "pixels", "source", "teacher", "quarantined", "extra"]
    shard: str
    key: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "shard": self.shard, "key": self.key, "detail": self.detail}


@dataclass
class Verdict:
    """What verify found. `notes` are facts that are no problems."""

    root: str | None = None
    shards: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    views_replayed: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "root": self.root,
            "shards": self.shards,
            "rows": self.rows,
            "problems": [problem.to_json() for problem in self.problems],
        }


def verify(
    path: str, *, views: int | Literal["all"] | None = None, data: str | None = None, workers: int | None = None, progress: bool = False
) -> Verdict:
    """Verify a cache. views: how many views a shard to replay, or all. data: where the tars lie now. Raises NotACacheError, FormatVersionError."""
    store = open_store(path)
    if store.size("cache.json") is None:
        raise NotACacheError(f"{store.url}: no cache.json; expected a folder that 'kdcache extract' wrote")
    verdict = Verdict()
    documents = _read_documents(store, verdict)
    if "cache.json" not in documents:
        return verdict
    cache = _build_cache(store, documents, data, verdict)
    _check_files(store, documents, verdict, progress=progress)
    if cache is None:
        return verdict
    verdict.root, verdict.shards, verdict.rows = cache.root, len(cache.views), cache.num_rows
    verdict.problems += [Problem(_problem_kind(kind), shard, "", text) for kind, text, shard in document_problems(cache)]
    _check_index(store, cache, verdict)
    _check_pixel_columns(cache, verdict)
    _note_completeness(cache, verdict)
    if views is not None:
        _replay(cache, views, verdict, workers=workers, progress=progress)
    return verdict


def _problem_kind(kind: str) -> Literal["plan", "missing", "teacher"]:
    return "plan" if kind == "plan" else "missing" if kind == "missing" else "teacher"


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
            kind: Literal["missing", "corrupt"] = "missing" if isinstance(error, MissingError) else "corrupt"
            verdict.problems.append(Problem(kind, _shard_in(path), "", str(error)))
    return documents


def _shard_in(path: str) -> str:
    """The shard that a record's or group's path speaks of, as far as its name tells."""
    parts = path.split("/")
    name = parts[1] if parts[0] == "views" and len(parts) > 1 else parts[2] if parts[0] == "teachers" and len(parts) > 2 else ""
    if name in ("", "teacher.json", "targets"):
        return ""
    stem = name.removesuffix(".json").removesuffix(".zarr")
    return stem.rsplit(".", 1)[0] if name.endswith(".json") else stem.rsplit(".", 2)[0]


def _build_cache(store: Store, documents: Mapping[str, Document[Any]], data: str | None, verdict: Verdict) -> Cache | None:
    sources = locate_shards(data) if data is not None else {}
    try:
        return Cache(store, documents, None, sources=sources, check=False)
    except CorruptError as error:
        verdict.problems.append(Problem("missing", "", "", str(error)))
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
            verdict.problems.append(Problem("missing", shard, "", f"{path} is not there; the segment's record names it"))
    total = sum(field.size for _, field in present)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify bytes", disable=not progress) as bar:
        for path, detail in _digest_all(store, present, bar.update):
            verdict.problems.append(Problem("corrupt", expected[path][1], "", detail))
    known = set(expected) | set(documents) | set(index_paths(store))
    known |= index_tables(store)
    for path in sorted(found):
        damaged = any(path in detail for detail in suspect)
        if path not in known and not damaged and not _belongs_to_damaged(path, suspect):
            verdict.problems.append(
                Problem(
                    "extra",
                    _shard_in(path),
                    "",
                    f"{path}: no record names this file; run the extraction that was cut off again, or 'kdcache gc' to remove it",
                )
            )


def _check_table(record: str, group: Group, shard: str, verdict: Verdict) -> None:
    if digest_of_files(group.files) != group.digest or f".{group.digest[:12]}.zarr" not in group.name:
        verdict.problems.append(Problem("corrupt", shard, "", f"{record}: the group's digest does not match its file table"))


def _belongs_to_damaged(path: str, details: Iterable[str]) -> bool:
    """Whether the file is of a segment whose record is damaged, and so can't vouch for it."""
    layer, _, rest = path.rpartition("/c/") if "/c/" in path else ("", "", path)
    folder = next((part for part in (layer or rest).split("/") if part.endswith(".zarr")), "")
    stem = folder.removesuffix(".zarr").rpartition(".")[0]
    return bool(stem) and any(f"/{stem}.json" in detail for detail in details)


def _digest_all(store: Store, files: Sequence[tuple[str, DigestField]], advance: Callable[[int], Any]) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of each file that is not as recorded; a few threads, since hashing leaves the GIL."""

    def check(item: tuple[str, DigestField]) -> tuple[str, str | None, int]:
        path, expected = item
        size = store.size(path)
        if size != expected.size:
            return path, f"{path} has {size} bytes, expected {expected.size}", expected.size
        digest = hashlib.blake2b(digest_size=16)
        try:
            for offset in range(0, expected.size, READ_BYTES):
                digest.update(store.get_range(path, offset, min(READ_BYTES, expected.size - offset)))
        except KDCacheError as error:
            return path, str(error), expected.size
        wrong = digest.hexdigest() != expected.digest
        return path, f"{path}: bytes were changed: expected digest {expected.digest}, found {digest.hexdigest()}" if wrong else None, expected.size

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, detail, size in pool.map(check, files):
            advance(size)
            if detail is not None:
                yield path, detail


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
            verdict.problems.append(Problem("index", "", "", str(error)))
            continue
        wrong = sorted(p for p, document in index.documents.items() if cache.documents.get(p) != document)
        if wrong or (index.documents.keys() == cache.documents.keys() and index.root != cache.root):
            detail = f"{path} does not say what the documents say, for example of {wrong[:1]}; run 'kdcache extract' again to rebuild it"
            verdict.problems.append(Problem("index", "", "", detail))
        behind = cache.documents.keys() - index.documents.keys()
        if behind:
            verdict.notes.append(f"{path} is behind: it lacks {len(behind)} documents; run 'kdcache extract' again to finish the cache and its index")
        for shard, expected in table.items():
            if shard in cache.views and not _table_agrees(cache, shard, expected):
                verdict.problems.append(Problem("index", shard, "", f"{index.table_path}: the rows of this shard differ from its views group"))


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
    missing = [shard for shard in cache.all_shards if shard not in cache.views]
    if missing:
        verdict.notes.append(f"unfinished: {len(cache.views)} of {len(cache.all_shards)} shards are done, {missing[0]} is the first that is not")
    for name, layer in cache.teachers.items():
        for target in layer.targets:
            lacking = [shard for shard in cache.views if not layer.segments(shard, target)]
            if lacking:
                verdict.notes.append(
                    f"unfinished: teacher {name}, {target}: {len(lacking)} of {len(cache.views)} shards lack it, {lacking[0]} is the first"
                )
    for shard, records in cache.views.items():
        if records[0].identity.cut is not None:
            verdict.notes.append(
                f"shard {shard}: the tar was cut short when it was read ({records[0].identity.cut}); its samples before the cut are cached"
            )


# --- replay ----------------------------------------------------------------------------------------------------------


def _replay(cache: Cache, views: int | Literal["all"], verdict: Verdict, *, workers: int | None, progress: bool) -> None:
    """Render views again from the tars and compare params and pixel digests."""
    from kdcache.rendering import FailedTask, rendered_blocks

    plan = _Replay(cache, views, verdict)
    total = sum(plan.count(shard) for shard in cache.shards)
    num_workers = workers if workers is not None else min(8, os.cpu_count() or 1)
    with tqdm(total=total, unit="view", desc="verify views", disable=not progress) as bar:
        for block in rendered_blocks(cache.plan, plan.tasks(), num_workers=num_workers, cache=cache):
            if isinstance(block, FailedTask):
                verdict.problems.append(Problem("corrupt" if block.task.stored else "source", block.task.source.name, "", str(block.error)))
            else:
                plan.compare(block)
            bar.update(len(block.task.samples) * len(block.task.views))
    if plan.gone:
        verdict.notes.append(
            f"{len(plan.gone)} of {len(cache.shards)} tars are gone, {plan.gone[0]} is the first: their stored views were compared, not rendered again"
        )
    for shard, more in plan.unlisted.items():
        verdict.problems.append(Problem("pixels", shard, "", f"{more} more views of this shard differ"))


class _Replay:
    """Which views to render again, and what they should be."""

    def __init__(self, cache: Cache, views: int | Literal["all"], verdict: Verdict) -> None:
        self.cache, self.views, self.verdict = cache, views, verdict
        self.unlisted: dict[str, int] = {}
        self.gone: list[str] = []
        """Tars that are not there, of a cache that stores its views."""
        self._listed: dict[str, int] = {}

    def count(self, shard: str) -> int:
        every = sum(record.identity.rows * len(record.identity.views) for record in self.cache.views[shard])
        once = every if self.views == "all" else min(every, self.views)
        return 2 * once if self.cache.plan.stored_views is not None else once

    def tasks(self) -> Iterator[Any]:
        """Render tasks, shard after shard; a tar that is gone or was changed becomes a problem instead."""
        from kdcache.rendering import Neighbours

        for shard in self.cache.shards:
            if self.cache.plan.stored_views is not None:
                yield from self._stored_tasks(shard)
            source, index = self._source(shard)
            if source is None or index is None:
                continue
            by_key = {sample.key: (position, sample) for position, sample in enumerate(index.samples)}
            try:
                rows = [by_key[key] for key in self.cache.keys(shard)]
            except KDCacheError as error:
                self.verdict.problems.append(Problem("corrupt", shard, "", str(error)))
                continue
            except KeyError as error:
                self.verdict.problems.append(
                    Problem("plan", shard, "", f"key {error} of the cache is not in the tar, though its member table is the same")
                )
                continue
            neighbours = Neighbours.of(index, self._skipped(shard)) if self.cache.plan.policy.mix is not None else None
            yield from self._cut(source, rows, stored=False, neighbours=neighbours)

    def _skipped(self, shard: str) -> list[int]:
        return [skip.index for skip in self.cache.views[shard][0].identity.skipped]

    def _stored_tasks(self, shard: str) -> Iterator[Any]:
        """Tasks that read the stored views and need no tar."""
        skipped = set(self._skipped(shard))
        positions = [position for position in range(self.cache.views[shard][0].identity.samples) if position not in skipped]
        try:
            rows = [(position, Sample(key, 0, 0, -1, None)) for position, key in zip(positions, self.cache.keys(shard), strict=True)]
        except KDCacheError:  # reported with the bytes
            return
        yield from self._cut(ShardSource(shard, ""), rows, stored=True)

    def _cut(
        self, source: ShardSource, samples: Sequence[tuple[int, Sample]], *, stored: bool, neighbours: Neighbours | None = None
    ) -> Iterator[Any]:
        """A shard's rows, all or a sample of them, as tasks. samples: position in the tar and sample of every row."""
        from kdcache.rendering import RenderTask, samples_per_task

        records = self.cache.views[source.name]
        all_views = tuple(view for record in records for view in range(record.identity.views.start, record.identity.views.stop))
        wanted: list[tuple[Sequence[int], tuple[int, ...]]]
        if self.views == "all":
            step = samples_per_task(self.cache.plan, len(all_views))
            wanted = [(range(start, min(start + step, len(samples))), all_views) for start in range(0, len(samples), step)]
        else:
            wanted = [([row], (view,)) for row, view in self._chosen(source.name, len(samples), all_views)]
        for rows, views in wanted:
            chosen = tuple(samples[row] for row in rows)
            yield RenderTask(0, source, chosen, views, False, frozenset(views if stored else ()), tuple(rows), neighbours)

    def _source(self, shard: str) -> tuple[ShardSource | None, ShardIndex | None]:
        record = self.cache.views[shard][0].identity
        try:
            source = self.cache.source(shard)
            if self.cache.plan.stored_views is not None and not os.path.exists(source.path):
                self.gone.append(source.path)
                return None, None
            index = scan_shard(source)
        except KDCacheError as error:
            self.verdict.problems.append(Problem("source", shard, "", f"{error}; pass --data with SHARDS where the tars lie now"))
            return None, None
        if index.member_table != record.member_table:
            detail = (
                f"{source.path} is not the tar that the cache was made from: expected member table {record.member_table}, found {index.member_table}"
            )
            self.verdict.problems.append(Problem("source", shard, "", f"{detail}; restore the tar"))
            return None, None
        return source, index

    def _chosen(self, shard: str, num_rows: int, all_views: Sequence[int]) -> list[tuple[int, int]]:
        """A sample of (row, view) that is the same in every run."""
        assert self.views != "all"
        total = num_rows * len(all_views)
        if total == 0:
            return []
        seed = hashlib.blake2b(canonical_json([self.cache.fingerprint, shard]), digest_size=16).digest()
        words = np.random.Philox(key=np.frombuffer(seed, "<u8").astype(np.uint64)).random_raw(total)
        chosen = np.sort(np.argsort(words, kind="stable")[: self.views])
        return [(int(place) // len(all_views), all_views[int(place) % len(all_views)]) for place in chosen]

    def compare(self, block: Any) -> None:
        """A block of views that were rendered or read, against the stored params and digests."""
        task = block.task
        stores = self.cache.plan.stored_views is not None
        shard = task.source.name
        for place, reason in block.reasons.items():
            text = f"can't be decoded now ({reason}), it could when the cache was made"
            self._problem(shard, task.samples[place][1], text, kind="source" if stores else "pixels")
        for column, view in enumerate(task.views):
            try:
                rows = [self.cache.row_at(shard, task.samples[place][0]) for place in block.kept]
                digests = self.cache.read_pixel_digests(shard, view, rows)
                params = self.cache.read_params(shard, view, rows)
            except CacheError as error:
                self.verdict.problems.append(Problem("corrupt", shard, "", str(error)))
                return
            for i, place in enumerate(block.kept):
                self.verdict.views_replayed += view in task.stored or not stores  # a stored view is counted once
                sample = task.samples[place][1]
                if block.digests[i, column] != digests[i]:
                    found = f"expected pixel digest {int(digests[i]):016x}, found {int(block.digests[i, column]):016x}"
                    if view in task.stored:
                        self._problem(shard, sample, f"view {view}: decoded as stored: {found}; {self._decoders(shard)}")
                    elif stores:  # what the teacher saw lies in the cache
                        text = f"view {view}: rendered again: {found}; training reads what is stored; {self._decoders(shard)}"
                        self._problem(shard, sample, text, kind="source")
                    else:
                        self._problem(shard, sample, f"view {view}: {found}; {self._decoders(shard)}")
                elif view in task.stored:
                    continue
                elif not np.array_equal(block.params[i, column], params[i].to_row()):
                    self._problem(shard, sample, f"view {view}: the stored params are not those that the plan draws")

    def _decoders(self, shard: str) -> str:
        from importlib.metadata import version

        then = self.cache.views[shard][0].provenance.get("packages", {}).get("pillow")
        return f"rendered with Pillow {then} then and {version('pillow')} now: the image or its decoder changed"

    def _problem(self, shard: str, sample: Sample, detail: str, *, kind: Literal["pixels", "source"] = "pixels") -> None:
        self._listed[shard] = self._listed.get(shard, 0) + 1
        if self._listed[shard] > MAX_LISTED:
            self.unlisted[shard] = self.unlisted.get(shard, 0) + 1
        else:
            self.verdict.problems.append(Problem(kind, shard, sample.key, detail))
