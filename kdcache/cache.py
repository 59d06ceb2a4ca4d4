"""Reading a cache, once it is open (`kdcache.opening`): rows of targets, view params and keys by (shard, key, view). Used by train, inspect, verify.

Chunks are checked when they are read. Nothing here needs the teacher.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .arrays import STREAM_CHUNK_BYTES, ArrayReader, ArraySpec, ByteLRU, StreamReader, stream_spec
from .augment import Pixels
from .console import counted, view_range
from .errors import CorruptError, DriftError, MissingError, ShardError, UsageError
from .format import (
    CacheIdentity,
    Digest,
    DigestField,
    Document,
    Group,
    TailIdentity,
    TargetIdentity,
    TargetsIdentity,
    TeacherIdentity,
    ViewRange,
    ViewsIdentity,
)
from .images import Decoded, decode_image, require_decoder
from .index import Index, read_table, root_of, rows_of_table
from .layout import (
    ROW_ARRAYS,
    STORED_BYTES,
    STORED_PIXELS,
    STORED_SPAN,
    arrays_to_keys,
    key_bytes_spec,
    params_spec,
    pixels_spec,
    row_spec,
    stored_specs,
    target_specs,
)
from .paths import calibration_path, teacher_of, views_record_path
from .plan import ViewPlan, blake2b_128
from .shards import RUN_BYTES, ShardFiles, ShardSource, check_same_tar, runs_of, scan_shard
from .store import Store
from .stored_views import decode_view
from .view_params import ViewParams
from .views import Resizer, pixel_digest, render

if TYPE_CHECKING:
    from .encodings import Encoding

INDEX_CACHE_BYTES = 128 << 20
"""Shard indexes kept in memory, per process."""
WHOLE_FILE_BYTES = 1 << 20
"""An array's file of at most this size is compared with its record's digest when it is first read, in 1 ms: two such files may well have the same size,
and each would pass for the other. The chunks of larger ones compress to sizes of their own, so that their index is not found where the record says; of those of raw views the first
pixels that are read are compared."""
KEY_CACHE_BYTES = 64 << 20
"""Sample keys kept in memory, per process, counted at 150 bytes each."""
MAX_CALIBRATION_BYTES = 1 << 30

RowNumbers: TypeAlias = Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of a cache, shard after shard in name order: what index-driven training draws from."""

    shards: tuple[str, ...]
    shard: np.ndarray[Any, np.dtype[np.int32]]
    """(N,) index into `shards`."""
    row: np.ndarray[Any, np.dtype[np.int32]]
    """(N,) row within its shard."""
    offset: np.ndarray[Any, np.dtype[np.int64]]
    """(N,) first byte of the image in its tar."""
    size: np.ndarray[Any, np.dtype[np.int64]]
    """(N,) bytes of the image."""
    label: np.ndarray[Any, np.dtype[np.int64]]
    """(N,) label, -1 where the tar has none."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Replay:
    """All that it takes to render one view of one row again. The one place that knows how stored views are mixed."""

    row: int
    """Within its shard."""
    params: ViewParams
    partner: Replay | None = None
    """Of a mixed view: its partner's view of the same number, unmixed."""

    def render(self, image_of: Callable[[int], Decoded], resizer: Resizer | None = None) -> Pixels:
        """The view: uint8 (size, size, 3), unchecked. image_of: row → its decoded image. resizer: as `views.render` takes it."""
        partner = self.partner.render(image_of, resizer) if self.partner is not None else None
        return render(image_of(self.row), self.params, partner, resizer=resizer)


@dataclass
class TeacherLayer:
    """One teacher of a cache: its card, its targets' cards, its records by shard, its tail's card if it has one."""

    name: str
    document: Document[TeacherIdentity]
    targets: dict[str, Document[TargetIdentity]] = field(default_factory=dict)
    records: dict[str, list[Document[TargetsIdentity]]] = field(default_factory=dict)
    tail: Document[TailIdentity] | None = None

    def segments(self, shard: str, target: str) -> list[Document[TargetsIdentity]]:
        """The records of this shard that hold the target."""
        return [record for record in self.records.get(shard, []) if target in record.identity.targets]


class Cache:
    """An open cache. Cheap to pickle: workers get the documents, and open files of their own."""

    def __init__(
        self, store: Store, documents: Mapping[str, Document[Any]], index: Index | None = None, *, sources: Mapping[str, ShardSource] | None = None
    ) -> None:
        """Of documents that may not agree with each other: `kdcache.opening` opens a cache and checks that. sources: shard → its tar, where tars
        have moved."""
        self.store = store
        self.documents = dict(documents)
        self._index = index
        self._given_sources = dict(sources or {})
        self._readers: ByteLRU[tuple[str, str], ArrayReader] = ByteLRU(INDEX_CACHE_BYTES)
        self._files = ShardFiles()
        self._keys: ByteLRU[str, dict[str, int]] = ByteLRU(KEY_CACHE_BYTES)
        self._known_pixels: set[str] = set()
        """Groups whose raw views were found to be those of the record, by the first that was read."""
        self.document: Document[CacheIdentity] = documents["cache.json"]
        self.views: dict[str, list[Document[ViewsIdentity]]] = {}
        self.teachers: dict[str, TeacherLayer] = {}
        self._sort_documents()

    def __getstate__(self) -> dict[str, Any]:
        state = {"store": self.store, "documents": self.documents, "index": self._index, "sources": self._given_sources}
        if "rows" in self.__dict__:
            state["rows"] = self.rows
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"], state["documents"], state["index"], sources=state["sources"])  # type: ignore[misc]
        if "rows" in state:
            self.__dict__["rows"] = state["rows"]

    def _sort_documents(self) -> None:
        for path, document in sorted(self.documents.items()):
            if document.kind == "views":
                self.views.setdefault(document.identity.shard, []).append(document)
            elif document.kind == "teacher":
                self.teachers[teacher_of(path)] = TeacherLayer(teacher_of(path), document)
        for path, document in sorted(self.documents.items()):
            if document.kind in ("target", "targets", "tail"):
                layer = self.teachers.get(teacher_of(path))
                if layer is None:
                    raise CorruptError(f"{self.store.url}/{path} belongs to a teacher without a teacher.json; run 'kdcache verify' on the cache")
                if document.kind == "target":
                    layer.targets[document.identity.name] = document
                elif document.kind == "tail":
                    layer.tail = document
                else:
                    layer.records.setdefault(document.identity.shard, []).append(document)
        for records in self.views.values():
            records.sort(key=lambda record: record.identity.views.start)

    def add_record(self, path: str, record: Document[Any]) -> None:
        """Take note of a views or targets record that another process has committed since the cache was opened."""
        self.documents[path] = record
        shard = record.identity.shard
        if record.kind == "views":
            self.views[shard] = sorted([*self.views.get(shard, []), record], key=lambda one: one.identity.views.start)
        else:
            self.teachers[teacher_of(path)].records.setdefault(shard, []).append(record)

    # --- what it is ---

    @property
    def plan(self) -> ViewPlan:
        return self.document.identity.plan

    @property
    def fingerprint(self) -> Digest:
        return self.plan.fingerprint

    @cached_property
    def root(self) -> Digest:
        """The digest that names the whole content: equal caches have equal roots."""
        return root_of(self.documents)

    @property
    def shards(self) -> list[str]:
        """Names of the shards that have views, sorted."""
        return sorted(self.views)

    @property
    def num_rows(self) -> int:
        """Samples that have a row, over all shards; not times views."""
        return sum(records[0].identity.rows for records in self.views.values())

    @property
    def num_views(self) -> int:
        """Views that every shard has, counted from 0."""
        return min((count_contiguous([record.identity.views for record in records]) for records in self.views.values()), default=0)

    @property
    def all_shards(self) -> list[str]:
        """Shards that any run was asked for, sorted: done or not."""
        asked = [document.identity.shards for document in self.documents.values() if document.kind == "source"]
        return sorted({*self.views, *(shard for shards in asked for shard in shards)})

    def target_views(self, teacher: str, target: str) -> int:
        """Views of a target that every shard has, counted from 0."""
        layer = self.layer(teacher)
        if target not in layer.targets:
            raise self._missing_target(teacher, target)
        return min((count_contiguous([r.identity.views for r in layer.segments(shard, target)]) for shard in self.views), default=0)

    def layer(self, teacher: str | None) -> TeacherLayer:
        """The teacher called `teacher`, or the only one. Raises UsageError that lists the names."""
        names = ", ".join(sorted(self.teachers)) or "none yet"
        if teacher is None:
            if len(self.teachers) != 1:
                raise UsageError(
                    f"{self.store.url}: the cache has {len(self.teachers)} teachers ({names}); pass --teacher NAME, from Python teacher=NAME"
                )
            return next(iter(self.teachers.values()))
        if teacher not in self.teachers:
            raise UsageError(f"{self.store.url}: no teacher {teacher!r}; the cache has: {names}")
        return self.teachers[teacher]

    def _missing_target(self, teacher: str, target: str) -> MissingError:
        known = ", ".join(sorted(self.teachers[teacher].targets)) or "none"
        return MissingError(
            f"{self.store.url}: teacher {teacher!r} has no target {target!r}, it has: {known};"
            f" run 'kdcache extract SHARDS {self.store.url} --teacher ... --name {teacher} --target {target}' to add it"
        )

    # --- rows ---

    @cached_property
    def tables(self) -> dict[str, np.ndarray[Any, Any]]:
        """Shard → int64 (samples, 4): offset, size, label, skip in tar order; from the index, or from the views groups."""
        tables: dict[str, np.ndarray[Any, Any]] = {}
        if self._index is not None:
            with contextlib.suppress(MissingError):  # replaced by a writer, or gone: the groups say the same
                tables = {shard: table for shard, table in read_table(self.store, self._index).items() if self._is_indexed(shard)}
        for shard, records in self.views.items():
            if shard not in tables or len(tables[shard]) != records[0].identity.samples:
                tables[shard] = self.table_from_group(records[0].identity)
        return tables

    def _is_indexed(self, shard: str) -> bool:
        """Whether the index's table speaks of the views records that are there now."""
        assert self._index is not None
        paths = [views_record_path(shard, document.identity.views) for document in self.views.get(shard, [])]
        return bool(paths) and all(self._index.documents.get(path) == self.documents.get(path) for path in paths)

    def table_from_group(self, record: ViewsIdentity) -> np.ndarray[Any, Any]:
        """A shard's part of the numeric table, from its views group."""
        table = np.zeros((record.samples, 4), np.int64)
        skipped = [skip.index for skip in record.skipped]
        if any(index >= record.samples for index in skipped) or len(set(skipped)) != len(skipped):
            raise CorruptError(f"{self.store.url}: shard {record.shard}: skipped samples {skipped[:5]} do not fit {record.samples} samples")
        table[skipped] = (0, 0, -1, 1)
        kept = table[:, 3] == 0
        for column, name in enumerate(("image/offset", "image/size", "labels")):
            table[kept, column] = self._views_reader(record, name).read(0, np.arange(record.rows))
        return table

    @cached_property
    def rows(self) -> Rows:
        """All rows, shard after shard in name order."""
        shards = tuple(self.shards)
        tables = [rows_of_table(self.tables[shard]) for shard in shards]
        counts = [len(table) for table in tables]
        stacked = np.concatenate(tables) if tables else np.zeros((0, 4), np.int64)
        return Rows(
            shards=shards,
            shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            row=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]) if counts else np.zeros(0, np.int32),
            offset=stacked[:, 0],
            size=stacked[:, 1],
            label=stacked[:, 2],
        )

    def keys(self, shard: str) -> list[str]:
        """The shard's sample keys in row order."""
        return list(self._key_rows(shard))

    def _key_rows(self, shard: str) -> dict[str, int]:
        """Key → row, in row order."""
        return self._keys.get_or(shard, lambda: self._read_keys(shard), lambda keys: 150 * len(keys))

    def _read_keys(self, shard: str) -> dict[str, int]:
        record = self.views_record(shard, 0)
        ends = self._views_reader(record, "keys/ends").read(0, np.arange(record.rows))
        total = int(ends[-1]) if len(ends) else 0
        if (np.diff(ends, prepend=0) < 0).any() or total > 1 << 30:
            raise CorruptError(f"{self.store.url}: shard {shard}: key ends are not increasing; run 'kdcache verify' on the cache")
        data = self._reader("views", record.group, key_bytes_spec(total), total).read(0, np.arange(total))
        keys = {key: row for row, key in enumerate(arrays_to_keys(data, ends))}
        if len(keys) != record.rows:
            raise CorruptError(f"{self.store.url}: shard {shard}: a key stands there twice; run 'kdcache verify' on the cache")
        return keys

    def row_of(self, shard: str, key: str) -> int:
        """The row of a key. Raises MissingError, saying why if the sample was skipped."""
        rows = self._key_rows(shard)
        if key in rows:
            return rows[key]
        for skip in self.views_record(shard, 0).skipped:
            if skip.key == key:
                raise MissingError(f"shard {shard}: key {key!r} was skipped when the cache was made: {skip.reason}")
        near = ", ".join(map(repr, difflib.get_close_matches(key, rows, n=3) or list(rows)[:3]))
        raise MissingError(f"shard {shard}: no key {key!r}; the shard has {counted(len(rows), 'key')}, such as {near}")

    def close(self) -> None:
        """Close the files that reading keeps open; the cache can still be used."""
        self.store.close()
        self._files.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def no_shard(self, shard: str) -> MissingError:
        """The error for a shard that the cache has not, naming one that it has."""
        near = difflib.get_close_matches(shard.removesuffix(".tar"), self.shards, n=1) or self.shards[:1]
        hint = f", such as {near[0]!r}" if near else ""
        return MissingError(f"{self.store.url}: no shard {shard!r}; it has {len(self.views)}{hint}")

    def views_record(self, shard: str, view: int) -> ViewsIdentity:
        """The views record that holds this view of the shard. Raises MissingError."""
        records = self.views.get(shard)
        if not records:
            raise self.no_shard(shard)
        for record in records:
            if view in record.identity.views:
                return record.identity
        have = [view_range(r.identity.views.start, r.identity.views.stop) for r in records]
        raise MissingError(f"shard {shard}: no view {view}; it has {', '.join(have)}; run 'kdcache extract' with more --views to add it")

    # --- arrays ---

    def _reader(self, layer: str, group: Group, spec: ArraySpec, rows: int) -> ArrayReader:
        path = f"{layer}/{group.name}"

        def make() -> ArrayReader:
            shard_file = group.files.get(spec.shard_path)
            if shard_file is not None and shard_file.size <= WHOLE_FILE_BYTES:
                self._check_whole_file(f"{path}/{spec.shard_path}", shard_file)
            return ArrayReader(self.store, path, spec, rows, shard_size=shard_file.size if shard_file else 0)

        return self._readers.get_or((path, spec.name), make, lambda reader: reader.index_bytes)

    def _check_whole_file(self, path: str, expected: DigestField) -> None:
        """Raise CorruptError for a file that is sound in itself, as its crc32c tell, and is not the one that its record names."""
        found = blake2b_128(self.store.get_range(path, 0, expected.size))
        if found != expected.digest:
            raise CorruptError(
                f"{self.store.url}/{path}: not the bytes that its record names: expected digest {expected.digest}, found {found}: changed since"
                f" its crc32c were written, or another file's; run 'kdcache verify CACHE --repair'"
            )

    def _views_reader(self, record: ViewsIdentity, name: str) -> ArrayReader:
        views = len(record.views)
        if name in ROW_ARRAYS:
            spec = row_spec(name, record.samples)
        elif name in (STORED_PIXELS, STORED_SPAN):
            spec = stored_specs(self.plan, views, record.samples)[name]
        else:
            spec = params_spec(views, record.samples) if name == "params" else pixels_spec(views, record.samples)
        return self._reader("views", record.group, spec, record.rows)

    def read_params(self, shard: str, view: int, rows: RowNumbers) -> list[ViewParams]:
        """The stored params of rows of one view."""
        record = self.views_record(shard, view)
        stored = self._views_reader(record, "params").read(view - record.views.start, rows)
        return [ViewParams.from_row(row, self.plan) for row in stored]

    def read_replays(self, shard: str, view: int, rows: RowNumbers) -> list[Replay]:
        """How to render rows of one view again. Raises CorruptError for a partner that has no row."""
        params = self.read_params(shard, view, rows)
        partner_rows = {one.mix.partner: self.row_at(shard, one.mix.partner) for one in params if one.mix is not None}
        read = self.read_params(shard, view, list(partner_rows.values())) if partner_rows else []
        partners = {position: Replay(row, own.unmixed) for (position, row), own in zip(partner_rows.items(), read, strict=True)}
        return [Replay(int(row), one, partners.get(one.mix.partner) if one.mix is not None else None) for row, one in zip(rows, params, strict=True)]

    def row_at(self, shard: str, position: int) -> int:
        """The row of the sample at a position of the tar. Raises CorruptError if it has none."""
        record = self.views_record(shard, 0)
        skipped = [skip.index for skip in record.skipped]  # ascending
        place = bisect_left(skipped, position)
        if not 0 <= position < record.samples or (place < len(skipped) and skipped[place] == position):
            raise CorruptError(
                f"{self.store.url}: shard {shard}: sample {position} of {record.samples} has no row; run 'kdcache verify' on the cache"
            )
        return position - place

    def read_pixel_digests(self, shard: str, view: int, rows: RowNumbers) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """uint64 (len(rows),): the stored pixel digests of one view."""
        record = self.views_record(shard, view)
        return self._views_reader(record, "pixels").read(view - record.views.start, rows)

    def read_stored(self, shard: str, view: int, rows: RowNumbers) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Rows of one view of a plan that stores its views, as the teacher saw them: uint8 (S, S, 3) each, decoded. No tar is read.

        Raises CorruptError, naming the key, for stored bytes that changed.
        """
        codec, record = self.plan.stored_views, self.views_record(shard, view)
        assert codec is not None
        if codec == "raw":
            yield from self._read_raw(record, view, rows)
            return
        spans = self._views_reader(record, STORED_SPAN).read(view - record.views.start, rows)
        run, held = (0, 0), b""
        run_of = _span_runs(spans)
        for i, row in enumerate(rows):
            start, stop = spans[i].tolist()
            try:
                if stop - start > _most_stored_bytes(self.plan.size):
                    raise CorruptError(f"its image file is said to have {stop - start} bytes; run 'kdcache verify' on the cache")
                if i in run_of and run != run_of[i]:
                    run = run_of[i]
                    try:
                        held = self._stream(record).read(*run)
                    except CorruptError:  # of one of them: each is read alone
                        run_of = {}
                data = held[start - run[0] : stop - run[0]] if i in run_of else self._stream(record).read(start, stop)
                yield decode_view(codec, data, self.plan.size)
            except CorruptError as error:
                raise CorruptError(f"shard {shard}: key {self.keys(shard)[row]!r}, view {view}: {error}") from error

    def _read_raw(self, record: ViewsIdentity, view: int, rows: RowNumbers) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        def read(some: RowNumbers) -> np.ndarray[Any, np.dtype[np.uint8]]:
            found = self._views_reader(record, STORED_PIXELS).read(view - record.views.start, some)
            if record.group.name not in self._known_pixels and len(found):
                self._check_first_pixels(record, view, int(some[0]), found[0])
            return found

        together = max(1, RUN_BYTES // (3 * self.plan.size**2))
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            try:
                yield from read(some)
                continue
            except CorruptError:  # of one of them: each is read alone
                pass
            for row in some:
                try:
                    yield read([row])[0]
                except CorruptError as error:
                    raise CorruptError(f"shard {record.shard}: key {self.keys(record.shard)[row]!r}, view {view}: {error}") from error

    def _check_first_pixels(self, record: ViewsIdentity, view: int, row: int, found: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Raise CorruptError for a file that is sound in itself and another's: of a plan's raw views all have one size."""
        (expected,) = self.read_pixel_digests(record.shard, view, [row]).tolist()
        if pixel_digest(found) != expected:
            raise CorruptError(
                f"{self.store.url}/views/{record.group.name}/{STORED_PIXELS}: not the pixels that its record names: expected digest {expected:016x},"
                f" found {pixel_digest(found):016x}: another file's; run 'kdcache verify CACHE --repair'"
            )
        self._known_pixels.add(record.group.name)

    def touch_stored(self, shard: str, view: int, rows: RowNumbers) -> None:
        """Read what `read_stored` of any of these rows will, in runs as long as it lies, and drop it: it is in the page cache then."""
        codec, record = self.plan.stored_views, self.views_record(shard, view)
        column = view - record.views.start
        if codec == "raw":
            self._views_reader(record, STORED_PIXELS).touch(column, rows)
            return
        spans = self._views_reader(record, STORED_SPAN).read(column, rows)
        stream = self._stream(record)
        for first, last in runs_of(spans[:, 0], spans[:, 1] - spans[:, 0], gap=STREAM_CHUNK_BYTES):
            stream.touch(int(spans[first, 0]), int(spans[last, 1]))

    def _stream(self, record: ViewsIdentity) -> StreamReader:
        file = record.group.files.get(stream_spec(STORED_BYTES).shard_path)
        return StreamReader(self.store, f"views/{record.group.name}", STORED_BYTES, shard_size=file.size if file else 0)

    def read_components(
        self, teacher: str, target: str, shard: str, view: int, rows: RowNumbers, *, components: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The encoded components of rows of one view of a target: component → (len(rows), *shape). Raises MissingError.

        components: which ones, and of the others no byte is read; default all. `Encoding.components_of` gives those of a part.
        """
        column, readers = self._component_readers(teacher, target, shard, view, components)
        return {name: reader.read(column, rows) for name, reader in readers.items()}

    def touch_components(
        self, teacher: str, target: str, shard: str, view: int, rows: RowNumbers, *, components: Sequence[str] | None = None
    ) -> None:
        """Read what `read_components` of any of these rows will, in runs as long as it lies, and drop it: it is in the page cache then."""
        column, readers = self._component_readers(teacher, target, shard, view, components)
        for reader in readers.values():
            reader.touch(column, rows)

    def _component_readers(
        self, teacher: str, target: str, shard: str, view: int, components: Sequence[str] | None
    ) -> tuple[int, dict[str, ArrayReader]]:
        """Where the view lies in their arrays, and the readers of a target's components. Raises MissingError."""
        layer = self.layer(teacher)
        if target not in layer.targets:
            raise self._missing_target(teacher, target)
        card = layer.targets[target].identity
        for document in layer.segments(shard, target):
            record = document.identity
            if view in record.views:
                specs = target_specs({target: card}, len(record.views), record.samples)
                prefix = len(target) + 1
                return view - record.views.start, {
                    name[prefix:]: self._reader(f"teachers/{teacher}", record.group, spec, record.rows)
                    for name, spec in specs.items()
                    if components is None or name[prefix:] in components
                }
        raise MissingError(
            f"shard {shard}: teacher {teacher!r} has no {target!r} for view {view}; run 'kdcache extract' again with the same arguments to finish the cache"
        )

    def encoding(self, teacher: str, target: str) -> Encoding:
        """The encoding of a target, with its calibration. Raises CorruptError if the calibration file was changed."""
        from .encodings import TargetShape, build_encoding

        card = self.layer(teacher).targets[target].identity
        where = f"{self.store.url}: teacher {teacher!r}, target {target!r}"
        try:
            encoding = build_encoding(card.kind, card.encoding, TargetShape.of_card(card))
        except UsageError as error:
            raise CorruptError(f"{where}: its card can't be right: {error}") from error
        if encoding.components() != card.components:
            raise CorruptError(f"{where}: its card's components are not those of {encoding.full_name}; run 'kdcache verify' on the cache")
        if card.calibration is not None:
            encoding.load_calibration(read_calibration(self.store, teacher, card))
        elif encoding.needs_calibration:
            raise CorruptError(f"{where}: its card names no calibration, which {encoding.full_name} needs; run 'kdcache verify' on the cache")
        problem = encoding.calibration_problem()
        if problem is not None:
            raise CorruptError(f"{where}: {calibration_path(teacher, target)}: {problem}")
        return encoding

    # --- single rows, for people ---

    def read(self, shard: str, key: str, view: int = 0, teacher: str | None = None) -> dict[str, Any]:
        """One row: {"label": int, "params": ViewParams, "logits": (K,), "features@NODE": (tokens, C), …}, decoded to float32 numpy.

        Prefix tokens (cls, registers) come apart, as "features@NODE.prefix": (prefix tokens, C). A mixed view has its "partner_label" too, and
        params.mix the weight of both. teacher: its name, or None for the only one; a cache without teachers gives label and params. Raises
        MissingError for a row, view or target that is not there.
        """
        import torch

        row = self.row_of(shard, key)
        result: dict[str, Any] = {
            "label": int(self._views_reader(self.views_record(shard, view), "labels").read(0, [row])[0]),
            "params": self.read_params(shard, view, [row])[0],
        }
        if result["params"].mix is not None:
            partner = self.row_at(shard, result["params"].mix.partner)
            result["partner_label"] = int(self._views_reader(self.views_record(shard, view), "labels").read(0, [partner])[0])
        if teacher is None and not self.teachers:
            return result
        layer = self.layer(teacher)
        for target in layer.targets:
            if not any(view in record.identity.views for record in layer.segments(shard, target)):
                continue
            components = self.read_components(layer.name, target, shard, view, [row])
            value = self.encoding(layer.name, target).decode({name: torch.from_numpy(array) for name, array in components.items()})
            for part, tensor in value.items():
                result[f"{target}.prefix" if part == "prefix" else target] = tensor[0].numpy()
        return result

    def view(self, shard: str, key: str, view: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The view as the teacher saw it: uint8 (H, W, 3), as stored, else rendered from the tar. Raises DriftError if its pixels are others."""
        row = self.row_of(shard, key)
        if self.plan.stored_views is not None:
            (pixels,) = self.read_stored(shard, view, [row])
        else:
            pixels = self.render_row(shard, view, row)
        stored = int(self.read_pixel_digests(shard, view, [row])[0])
        if pixel_digest(pixels) != stored:
            raise pixel_drift(shard, key, view, expected=stored, found=pixel_digest(pixels))
        return pixels

    def render_row(self, shard: str, view: int, row: int) -> Pixels:
        """Render a view from its stored params and the image bytes in its tar, unchecked."""
        kept = rows_of_table(self.tables[shard])
        keys = self.keys(shard)

        def image_of(number: int) -> Decoded:
            data = self._files.read(self.source(shard), keys[number], int(kept[number, 0]), int(kept[number, 1]))
            try:
                return decode_image(data, self.plan.decoder)
            except ValueError as error:
                raise DriftError(
                    f"shard {shard}: key {keys[number]!r}: the image can't be decoded now ({error}), it could when the cache was made;"
                    f" the tar was changed"
                ) from error

        return self.read_replays(shard, view, [row])[0].render(image_of)

    def require_decoder(self) -> None:
        """Raise UsageError, with its cure, if views are rendered from tars and the plan's decoder is not installed. Stored views need none."""
        if self.plan.stored_views is None:
            require_decoder(self.plan.decoder)

    @property
    def label_key(self) -> str | None:
        """Where the labels stand in .json members. None: .cls, else `label` of .json."""
        return self.document.identity.label_key

    def with_labels(self, source: ShardSource) -> ShardSource:
        """A shard whose labels are read as this cache's are."""
        return replace(source, label_key=self.label_key)

    def source(self, shard: str) -> ShardSource:
        """Where the shard's tar lies: as given on opening, else as remembered."""
        if shard in self._given_sources:
            return self.with_labels(self._given_sources[shard])
        if self._given_sources:
            raise UsageError(f"shard {shard}: not given with --data, which has {counted(len(self._given_sources), 'tar')}")
        documents = self.views.get(shard) or []
        if not documents:
            raise MissingError(f"{self.store.url}: no shard {shard!r}")
        return ShardSource(shard, str(documents[-1].provenance.get("source", {}).get("path", "")), self.label_key)

    def check_source(self, shard: str) -> None:
        """Raise ShardError if the shard's tar is not there, or of another size and with other members than when the cache was made.

        Costs a look at the file's size. A tar of the same size is left to the pixel digests.
        """
        source, documents = self.source(shard), self.views[shard]
        try:
            size = os.stat(source.path).st_size
        except OSError as error:
            raise ShardError(
                f"shard {shard}: {source.path} can't be read: {error.strerror}; pass --data with SHARDS where the tars lie now"
            ) from error
        if size != documents[-1].provenance.get("source", {}).get("size"):
            check_same_tar(scan_shard(source), documents[0].identity)


def _span_runs(spans: np.ndarray[Any, Any]) -> dict[int, tuple[int, int]]:
    """Place → first byte of the run that one read serves and the byte after its last, for spans that have neighbours. spans: (n, 2), ascending."""
    run_of: dict[int, tuple[int, int]] = {}
    for first, last in runs_of(spans[:, 0], spans[:, 1] - spans[:, 0], gap=STREAM_CHUNK_BYTES):
        if last > first:
            run_of |= dict.fromkeys(range(first, last + 1), (int(spans[first, 0]), int(spans[last, 1])))
    return run_of


def _most_stored_bytes(size: int) -> int:
    """More than any image file of a view has: of noise a PNG or JPEG has a third more than its 3 · size² pixels at most."""
    return 8 * size * size + (1 << 16)


def count_contiguous(ranges: Sequence[ViewRange]) -> int:
    """How many views from 0 on the ranges cover without a gap."""
    count = 0
    for views in sorted(ranges, key=lambda views: views.start):
        if views.start <= count:
            count = max(count, views.stop)
    return count


def pixel_drift(shard: str, key: str, view: int, *, expected: int, found: int) -> DriftError:
    """The error for a view whose pixels are not those that the teacher saw."""
    return DriftError(
        f"shard {shard}: key {key!r}, view {view}: expected pixels with digest {expected:016x}, found {found:016x}; the image or the"
        f" decoder is not the one that the teacher saw: run 'kdcache verify CACHE --views all', then install the recorded versions"
    )


def read_calibration(store: Store, teacher: str, card: TargetIdentity) -> dict[str, Any]:
    """The calibration tensors of a target. Raises CorruptError if the file is not the one its card names."""
    import safetensors.torch

    from .timm_models import SAFETENSORS_ERRORS

    assert card.calibration is not None
    path = calibration_path(teacher, card.name)
    data = store.get(path, max_size=MAX_CALIBRATION_BYTES)
    if blake2b_128(data) != card.calibration.digest:
        raise CorruptError(f"{store.url}/{path}: bytes were changed: expected digest {card.calibration.digest}, found {blake2b_128(data)}")
    try:
        tensors: dict[str, Any] = safetensors.torch.load(data)
    except SAFETENSORS_ERRORS as error:
        raise CorruptError(f"{store.url}/{path}: no safetensors file: {error}") from error
    return tensors
