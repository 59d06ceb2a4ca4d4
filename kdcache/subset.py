"""Part of a cache: what stays of each record under a selection of shards, targets and views, and how that part is committed.

Below `pipelines.copy` (to another store) and `pipelines.gc` (to the same one). Nothing is decoded: chunks hold rows of one view and
are independent, so the arrays of fewer views are made of the encoded chunks as they are; of stored views the image files, which lie
one after another, are joined anew. Both give the bytes that an extraction of so many views writes. Whatever is read is compared with the
digest that its record holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import (
    STREAM_CHUNK_BYTES,
    ArrayReader,
    ArraySpec,
    DigestingFile,
    ShardWriter,
    StreamReader,
    StreamWriter,
    encode_chunk,
    spec_of_metadata,
    stream_spec,
)
from .cache import Cache
from .commit import create_document, publish_group, unpublish_group
from .digests import read_pieces
from .errors import CorruptError, MismatchError
from .format import DigestField, Document, Group, TargetsIdentity, ViewRange, ViewsIdentity, digest_of_pixels
from .index import MAX_DOCUMENT_BYTES, read_document
from .layout import STORED_BYTES, STORED_SPAN, grows_with_views, has_views_axis
from .paths import targets_record_path, views_record_path
from .plan import require_same
from .store import Store

_MAX_METADATA_BYTES = 1 << 20

Advance = Callable[[int], object]
"""Takes the number of bytes that were just read."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is to stay of a cache."""

    shards: frozenset[str]
    views: int | None
    """Views 0 <= v < views; None: all."""
    targets: Mapping[str, frozenset[str]]
    """Teacher → its targets; a teacher that is not in it goes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What stays of one record."""

    layer: str
    """`views` or `teachers/<name>`."""
    path: str
    """Of the record that it is a part of."""
    document: Document[Any]
    views: ViewRange
    targets: Mapping[str, str]
    """Target → identity digest of its card; empty in the views layer."""

    @property
    def is_whole(self) -> bool:
        return self.views == self.document.identity.views and len(self.targets) == len(getattr(self.document.identity, "targets", {}))

    @property
    def new_path(self) -> str:
        """Of the record of this part; the same if it is whole."""
        shard = self.document.identity.shard
        if self.layer == "views":
            return views_record_path(shard, self.views)
        return targets_record_path(self.layer.partition("/")[2], shard, self.targets, self.views)

    @property
    def source_bytes(self) -> int:
        """Bytes of the files that it is made from."""
        return sum(field.size for _, field in self._files())

    @property
    def size(self) -> int:
        """Its bytes, exact unless views were left out: a view then counts as much as another."""
        share = len(self.views) / len(self.document.identity.views)
        return round(sum(field.size * (share if grows_with_views(self.layer, _array_of(path)) else 1) for path, field in self._files()))

    def _files(self) -> Iterator[tuple[str, DigestField]]:
        files: Mapping[str, DigestField] = self.document.identity.group.files
        return ((path, field) for path, field in files.items() if self.has_file(path))

    def has_file(self, path: str) -> bool:
        """Whether a file of the group, or some of it, stays."""
        return self.layer == "views" or "/" not in path or path.partition("/")[0] in self.targets


def _array_of(path: str) -> str:
    """The array or sub-group that a file of a group belongs to."""
    return path.removesuffix("zarr.json").rstrip("/") if path.endswith("zarr.json") else path.rpartition("/c/")[0]


def parts_of(cache: Cache, selection: Selection) -> Iterator[tuple[str, Part | None]]:
    """(record path, what stays of it) for every record of the cache, by path; None for one that goes."""
    for path, document in sorted(cache.documents.items()):
        if document.kind not in ("views", "targets"):
            continue
        identity = document.identity
        layer = path.rpartition("/")[0]
        views = _first_views(identity.views, selection.views)
        targets = {}
        if document.kind == "targets":
            kept = selection.targets.get(layer.partition("/")[2], frozenset())
            targets = {name: digest for name, digest in identity.targets.items() if name in kept}
        is_kept = identity.shard in selection.shards and views is not None and (targets or document.kind == "views")
        yield path, Part(layer=layer, path=path, document=document, views=views, targets=targets) if is_kept and views is not None else None


def _first_views(views: ViewRange, count: int | None) -> ViewRange | None:
    stop = views.stop if count is None else min(views.stop, count)
    return ViewRange(start=views.start, stop=stop) if views.start < stop else None


# --- committing a part -----------------------------------------------------------------------------------------------


def commit_part(cache: Cache, part: Part, store: Store, *, advance: Advance = lambda _: None) -> tuple[Document[Any], bool]:
    """Commit a part of a record of `cache` to `store`, which may be the cache's own; its record, and whether this call made it.

    A whole record keeps its bytes, and its group too. Raises CorruptError naming a file of the cache that is not as recorded, and
    MismatchError if the store has another record in this place; the store is then as it was.
    """
    if store.size(part.new_path) is not None:
        found = read_document(store, part.new_path)
        _require_same_record(found, part, where=store.url)
        advance(part.source_bytes)
        return found, False
    spool = store.new_spool()
    try:
        files = _spool_files(cache, part, spool / "group", advance)
        group = publish_group(store, spool / "group", files, layer=part.layer, stem=part.new_path.rpartition("/")[2].removesuffix(".json"))
        recorded, created = _create_record(cache, part, group, store)
        if not created and recorded.identity.group != group:
            unpublish_group(store, group, layer=part.layer)
    finally:
        store.drop_spool(spool)
    return recorded, created


def _create_record(cache: Cache, part: Part, group: Group, store: Store) -> tuple[Document[Any], bool]:
    document = part.document
    if part.is_whole:
        if group != document.identity.group:
            raise CorruptError(
                f"{cache.store.url}: {part.path}: the group's name or digest is not that of its files; run 'kdcache verify' on the cache"
            )
        created = store.put_new(part.path, cache.store.get(part.path, max_size=MAX_DOCUMENT_BYTES))
        return read_document(store, part.path), created
    identity: ViewsIdentity | TargetsIdentity = _cut_identity(cache, part, group)
    provenance = {**document.provenance, "subset_of": document.identity_digest}
    return create_document(store, part.new_path, identity, measured=_cut_measured(cache, part), provenance=provenance)


def _cut_identity(cache: Cache, part: Part, group: Group) -> Any:
    identity, views = part.document.identity, part.views
    changes: dict[str, Any] = {"views": views, "group": group}
    if part.layer == "views":
        first = views.start - identity.views.start
        changes["pixels_by_view"] = identity.pixels_by_view[first : first + len(views)]
    else:
        records = {view: cache.views_record(identity.shard, view) for view in views.numbers}
        changes["targets"] = dict(part.targets)
        changes["pixels"] = digest_of_pixels({view: record.pixels_by_view[view - record.views.start] for view, record in records.items()})
    return type(identity).model_validate(identity.model_copy(update=changes).to_json())


def _cut_measured(cache: Cache, part: Part) -> dict[str, Any]:
    """What was measured holds for the targets that stay. Its sums can't be split by view: `views` says which they are of."""
    measured = dict(part.document.measured)
    if part.layer == "views":
        return measured
    cards = cache.teachers[part.layer.partition("/")[2]].targets
    measured["fidelity"] = {name: fidelity for name, fidelity in measured.get("fidelity", {}).items() if name in part.targets}
    if not any(cards[name].identity.kind == "logits" for name in part.targets):
        measured.pop("accuracy", None)  # of the logits that went
    old = part.document.identity.views
    if part.views != old:
        measured.setdefault("views", [old.start, old.stop])
    return measured


def _require_same_record(found: Document[Any], part: Part, *, where: str) -> None:
    """Raise MismatchError unless the record there is of the same shard, teacher, cards and pixels. A part's group may have been cut by another run."""
    what, remedy = f"{where}: {part.new_path}", "it holds another cache or another selection: choose an empty folder"
    if part.is_whole:
        require_same(what, found.identity, part.document.identity, remedy=remedy)
        return
    for field in ("shard", "targets", "teacher", "plan", "member_table", "samples", "rows"):
        expected = dict(part.targets) if field == "targets" and part.targets else getattr(part.document.identity, field, None)
        if getattr(found.identity, field, None) != expected:
            raise MismatchError(what, field, expected=getattr(found.identity, field, None), found=expected, remedy=remedy)


# --- files -----------------------------------------------------------------------------------------------------------


def _spool_files(cache: Cache, part: Part, folder: Path, advance: Advance) -> dict[str, DigestField]:
    """Write the part's group to a local folder; path in the group → size and digest."""
    identity = part.document.identity
    group = f"{part.layer}/{identity.group.name}"
    wanted = {path: field for path, field in identity.group.files.items() if part.has_file(path)}
    _check_names(f"{cache.store.url}/{group}", part)
    cut = set(_cut_arrays(cache.store, group, wanted, part)) if part.views != identity.views else set()
    files: dict[str, DigestField] = {}
    for path, field in wanted.items():
        if _array_of(path) not in cut:
            files[path] = copy_file(cache.store, f"{group}/{path}", field, folder / path, advance)
    for name in sorted(cut - {STORED_BYTES, STORED_SPAN}):
        files |= _cut_array(cache, part, name, folder, advance)
    if STORED_BYTES in cut:
        files |= _cut_stream(cache, part, folder, advance)
    return files


def _check_names(where: str, part: Part) -> None:
    """Nothing may be left out because its name is not understood."""
    identity = part.document.identity
    folders = {path.partition("/")[0] for path in identity.group.files if "/" in path}
    if part.layer != "views" and folders != set(identity.targets):
        raise CorruptError(f"{where}: expected arrays of {', '.join(sorted(identity.targets))}, found {', '.join(sorted(folders))}")


def _cut_arrays(store: Store, group: str, files: Mapping[str, DigestField], part: Part) -> Iterator[str]:
    """The arrays of which some views are to be taken."""
    arrays: set[str] = set()
    for path, field in files.items():
        if path.endswith("zarr.json") and _node_type(read_file(store, f"{group}/{path}", field)) == "array":
            arrays.add(_array_of(path))
    for path in files:
        if _array_of(path) not in arrays and not path.endswith("zarr.json"):
            raise CorruptError(
                f"{store.url}/{group}: {path} belongs to no array, so some of its views can't be taken; run 'kdcache verify' on the cache"
            )
    yield from (name for name in arrays if grows_with_views(part.layer, name))


def _node_type(metadata: bytes) -> object:
    body = json.loads(metadata)
    return body.get("node_type") if isinstance(body, dict) else None


def _cut_array(cache: Cache, part: Part, name: str, folder: Path, advance: Advance) -> dict[str, DigestField]:
    """Write an array with the part's views only."""
    spec, rows, reader = _open_array(cache, part, name, advance)
    first = part.document.identity.views.start
    writer = ShardWriter(folder, replace(spec, views=len(part.views)))
    try:
        for block in range(spec.num_blocks(rows)):
            for view in part.views.numbers:
                writer.append(reader.read_encoded(view - first, block))
        return writer.close(rows)
    finally:
        writer.abandon()


def _open_array(cache: Cache, part: Part, name: str, advance: Advance) -> tuple[ArraySpec, int, ArrayReader]:
    """An array with a views axis, its rows, and a reader of it; the whole of its file is what the record says."""
    identity, store = part.document.identity, cache.store
    group = f"{part.layer}/{identity.group.name}"
    spec, rows = spec_of_metadata(
        name, _read_metadata(cache, part, name, advance), has_views=has_views_axis(part.layer, name), where=f"{store.url}/{group}/{name}/zarr.json"
    )
    if (spec.views, rows) != (len(identity.views), identity.rows):
        raise CorruptError(
            f"{store.url}/{group}/{name}: expected {len(identity.views)} views of {identity.rows} rows, found an array of shape {spec.shape(rows)};"
            f" this kdcache can't take some of its views"
        )
    return spec, rows, ArrayReader(store, group, spec, rows, shard_size=_check_shard_file(cache, part, spec, advance))


def _read_metadata(cache: Cache, part: Part, name: str, advance: Advance) -> bytes:
    group = part.document.identity.group
    metadata = read_file(cache.store, f"{part.layer}/{group.name}/{name}/zarr.json", group.files[f"{name}/zarr.json"])
    advance(len(metadata))
    return metadata


def _check_shard_file(cache: Cache, part: Part, spec: ArraySpec, advance: Advance) -> int:
    """Read the whole file and compare it with the record; its size, 0 for an array of no rows."""
    group = part.document.identity.group
    field: DigestField | None = group.files.get(spec.shard_path)
    if field is None:
        return 0
    _check_digest(cache.store, f"{part.layer}/{group.name}/{spec.shard_path}", field, advance)
    return field.size


def _cut_stream(cache: Cache, part: Part, folder: Path, advance: Advance) -> dict[str, DigestField]:
    """Write the stored image files of the part's views one after another, and where each begins and ends."""
    identity, store = part.document.identity, cache.store
    group = f"{part.layer}/{identity.group.name}"
    spec, rows, spans = _open_array(cache, part, STORED_SPAN, advance)
    where = f"{store.url}/{group}/{STORED_BYTES}/zarr.json"
    stream, num_bytes = spec_of_metadata(STORED_BYTES, _read_metadata(cache, part, STORED_BYTES, advance), has_views=False, where=where)
    if stream != stream_spec(STORED_BYTES) or (spec.dtype, spec.inner) != (np.dtype("<i8"), (2,)) or (num_bytes > 0) != (rows > 0):
        raise CorruptError(f"{where}: expected a stream of image files as kdcache writes them, found another; run 'kdcache verify' on the cache")
    size = _check_shard_file(cache, part, stream, advance)
    span_writer = ShardWriter(folder, replace(spec, views=len(part.views)))
    stream_writer = StreamWriter(folder, STORED_BYTES)
    try:
        written = 0
        if rows:
            written = _join_images(part, spans, StreamReader(store, group, STORED_BYTES, shard_size=size), span_writer, stream_writer)
        return span_writer.close(rows) | stream_writer.close(written)
    finally:
        span_writer.abandon()
        stream_writer.abandon()


def _join_images(part: Part, spans: ArrayReader, stream: StreamReader, span_writer: ShardWriter, stream_writer: StreamWriter) -> int:
    """Append image after image, row by row and view by view as an extraction does; how many bytes they are. A chunk at most is held."""
    written, pending = 0, bytearray()
    columns = range(part.views.start - part.document.identity.views.start, part.views.stop - part.document.identity.views.start)
    for start in range(0, spans.rows, spans.spec.chunk_rows):
        rows = range(start, min(start + spans.spec.chunk_rows, spans.rows))
        old = np.stack([spans.read(column, rows) for column in columns], axis=1)
        new = np.empty_like(old)
        for place in np.ndindex(old.shape[:2]):
            image = stream.read(*old[place].tolist())
            new[place] = written, written + len(image)
            written += len(image)
            pending += image
            whole = len(pending) // STREAM_CHUNK_BYTES * STREAM_CHUNK_BYTES
            stream_writer.append(stream_writer.encode(np.frombuffer(bytes(pending[:whole]), np.uint8)))
            del pending[:whole]
        for column in range(len(columns)):
            span_writer.append(encode_chunk(span_writer.spec, new[:, column]))
    stream_writer.append(stream_writer.encode(np.frombuffer(bytes(pending), np.uint8)))
    return written


def copy_file(store: Store, path: str, field: DigestField, target: Path, advance: Advance = lambda _: None) -> DigestField:
    """Copy an object to a new local file. Raises CorruptError if it is not as `field` says."""
    file = DigestingFile(target)
    try:
        for data in _pieces(store, path, field):
            file.write(data)
            advance(len(data))
        found = file.close()
    finally:
        file.abandon()
    _require_digest(store, path, field, found.digest)
    return found


def read_file(store: Store, path: str, field: DigestField) -> bytes:
    """A small object. Raises CorruptError if it is not as `field` says."""
    data = b"".join(_pieces(store, path, field)) if field.size <= _MAX_METADATA_BYTES else b""
    _require_digest(store, path, field, hashlib.blake2b(data, digest_size=16).hexdigest())
    return data


def _check_digest(store: Store, path: str, field: DigestField, advance: Advance) -> None:
    digest = hashlib.blake2b(digest_size=16)
    for data in _pieces(store, path, field):
        digest.update(data)
        advance(len(data))
    _require_digest(store, path, field, digest.hexdigest())


def _pieces(store: Store, path: str, field: DigestField) -> Iterator[bytes]:
    size = store.size(path)
    if size is not None and size != field.size:
        raise CorruptError(f"{store.url}/{path} has {size} bytes, expected {field.size}; {_REMEDY}")
    yield from read_pieces(store, path, field.size)


def _require_digest(store: Store, path: str, field: DigestField, found: str) -> None:
    if found != field.digest:
        raise CorruptError(f"{store.url}/{path}: bytes were changed: expected digest {field.digest}, found {found}; {_REMEDY}")


_REMEDY = "nothing of this segment was written; run 'kdcache verify' on the cache"
