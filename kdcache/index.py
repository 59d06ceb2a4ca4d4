"""The derived index: all documents in one file, and one numeric table for all samples. Written by extract, read on opening.

It holds nothing that is not elsewhere: opening a finished cache costs a few reads instead of one for each shard. Documents
that the index lacks are read one by one; entries whose document is gone are dropped, because a record is what makes a
segment exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import CacheError, CorruptError, MisplacedError, MissingError, NotACacheError
from .format import (
    FORMAT_VERSION,
    ZERO_DIGEST,
    CacheIdentity,
    Document,
    SourceIdentity,
    TailIdentity,
    TargetIdentity,
    TargetsIdentity,
    TeacherIdentity,
    ViewsIdentity,
    body_of,
    document_from_body,
    parse_document,
    parse_sealed_json,
    root_digest,
    seal_json,
)
from .paths import TEACHER_NAME, source_path, target_path, targets_record_path, views_record_path
from .plan import FrozenModel, blake2b_128
from .store import Store

MAX_INDEX_BYTES = 4 << 30
MAX_DOCUMENT_BYTES = 64 << 20

TABLE_COLUMNS = ("offset", "size", "label", "skip")
"""Of the int64 table: image bytes in the tar, label (-1: none), 1 for a sample that has no row."""


def rows_of_table(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """int64 (rows, len(TABLE_COLUMNS)) of a shard's samples that have a row, in row order. table: (samples, len(TABLE_COLUMNS))."""
    rows: np.ndarray[Any, Any] = table[table[:, TABLE_COLUMNS.index("skip")] == 0]
    return rows


def identity_type_of(path: str) -> type[FrozenModel] | None:
    """What kind of document lies at a path of the cache, or None for a file that is no document."""
    parts = path.split("/")
    if path == "cache.json":
        return CacheIdentity
    if not path.endswith(".json"):
        return None
    if parts[0] == "sources" and len(parts) == 2:
        return SourceIdentity
    if parts[0] == "views" and len(parts) == 2:
        return ViewsIdentity
    if parts[0] == "teachers" and len(parts) == 3:
        return TeacherIdentity if parts[2] == "teacher.json" else TailIdentity if parts[2] == "tail.json" else TargetsIdentity
    if parts[0] == "teachers" and len(parts) == 4 and parts[2] == "targets":
        return TargetIdentity
    return None


def document_paths(store: Store) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of every document there is, by listing folders only; cache.json first."""
    yield "cache.json", store.size("cache.json") or 0
    teachers = [path for path, _ in store.list("teachers/", deep=False) if path.endswith("/")]
    # What is created first is listed last, so that a cache that is being written never seems to lack a parent.
    for folder in [*teachers, *(f"{teacher}targets/" for teacher in teachers), "views/", "sources/"]:
        for path, size in store.list(folder, deep=False):
            if identity_type_of(path) is not None:
                yield path, size


def read_document(store: Store, path: str) -> Document[Any]:
    """Read and prove one document."""
    identity_type = identity_type_of(path)
    assert identity_type is not None, path
    where = f"{store.url}/{path}"
    document: Document[Any] = parse_document(store.get(path, max_size=MAX_DOCUMENT_BYTES), identity_type, where=where)
    _check_place(path, document, where=where)
    return document


def _check_place(path: str, document: Document[Any], *, where: str) -> None:
    """Raise MisplacedError for a document that lies where another belongs: two of one segment would both be heard."""
    parts, identity = path.split("/"), document.identity
    if parts[0] == "teachers" and not TEACHER_NAME.fullmatch(parts[1]):
        raise CorruptError(f"{where}: {parts[1]!a} is no teacher's name; expected letters, digits, '.', '_' and '-'")
    proper = path
    if isinstance(identity, SourceIdentity):
        proper = source_path(identity)
    elif isinstance(identity, ViewsIdentity):
        proper = views_record_path(identity.shard, identity.views)
    elif isinstance(identity, TargetsIdentity):
        proper = targets_record_path(parts[1], identity.shard, identity.targets, identity.views)
    elif isinstance(identity, TargetIdentity):
        proper = target_path(parts[1], identity.name)
    if path != proper:
        raise MisplacedError(
            f"{where}: what it describes belongs at {proper!a}: it was moved, or copied over another; run 'kdcache verify' to see what else is damaged"
        )


@dataclass(frozen=True)
class Index:
    """What an index file says."""

    path: str
    root: str
    documents: dict[str, Document[Any]]
    sizes: dict[str, int]
    """Path → bytes of the document's file when it was indexed: another size means another document."""
    table_path: str
    table_digest: str
    table_shards: dict[str, tuple[int, int]]
    """Shard → its samples' first and last + 1 place in the table."""


def index_paths(store: Store) -> list[str]:
    """The index files that lie in the cache: one, or more after a kill or a race."""
    return sorted(path for path, _ in store.list("index/", deep=False) if path.endswith(".json"))


def read_index(store: Store, path: str) -> Index:
    """Parse and prove one index file. Raises CorruptError."""
    where = f"{store.url}/{path}"
    try:
        body = parse_sealed_json(store.get(path, max_size=MAX_INDEX_BYTES), where=where)
    except CorruptError as error:
        raise CorruptError(f"{where}: the index is damaged; run 'kdcache extract' again to rebuild it, nothing else is lost") from error
    try:
        documents: dict[str, Document[Any]] = {}
        for document_path, document_body in body["documents"].items():
            identity_type = identity_type_of(document_path)
            if identity_type is None:
                raise CorruptError(f"{where}: {document_path!r} is not the path of a document; run 'kdcache extract' again to rebuild the index")
            documents[document_path] = document_from_body(document_body, identity_type, where=f"{where}: {document_path}")
            _check_place(document_path, documents[document_path], where=f"{where}: {document_path}")
        table = body["table"]
        shards = {str(name): (_count(start), _count(stop)) for name, (start, stop) in table["shards"].items()}
        sizes = {str(name): _count(size) for name, size in body["sizes"].items()}
        return Index(path, str(body["root"]), documents, sizes, str(table["path"]), str(table["digest"]), shards)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{where}: not an index: {error!r}; run 'kdcache extract' again to rebuild it") from error


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"expected a number from 0, found {value!a:.80}")
    return value


def load_documents(store: Store, *, use_index: bool = True) -> tuple[dict[str, Document[Any]], Index | None]:
    """Every document of the cache, through the index where it serves, and the index used.

    use_index: False reads every document itself, as a writer must. Raises NotACacheError without cache.json. A damaged index is
    an error for a reader, not a detour: nothing damaged is passed over.
    """
    if store.size("cache.json") is None:
        raise NotACacheError(f"{store.url}: no cache.json; expected a folder that 'kdcache extract' wrote")
    index = _best_index(store) if use_index else None
    documents: dict[str, Document[Any]] = {}
    for path, size in document_paths(store):
        indexed = index.documents.get(path) if index is not None and index.sizes.get(path) == size else None
        documents[path] = indexed if indexed is not None and path != "cache.json" else read_document(store, path)
    return documents, index


def _best_index(store: Store) -> Index | None:
    """The index file that knows most; several lie there after a race."""
    for attempt in range(5):
        try:
            indexes = [read_index(store, path) for path in index_paths(store)]
        except MissingError:  # a writer has just replaced it
            if attempt == 4:
                raise
            continue
        return max(indexes, key=lambda index: len(index.documents), default=None)
    raise AssertionError("unreachable")


def root_of(documents: Mapping[str, Document[Any]]) -> str:
    """The digest that names the whole content (`format.root_digest`)."""
    views = {path: document.identity_digest for path, document in documents.items() if document.kind == "views"}
    teachers: dict[str, dict[str, Any]] = {}
    for path, document in documents.items():
        parts = path.split("/")
        if parts[0] != "teachers":
            continue
        entry = teachers.setdefault(parts[1], {"targets": {}, "records": {}})
        if document.kind == "teacher":
            entry["teacher"] = document.identity_digest
        elif document.kind == "target":
            entry["targets"][document.identity.name] = document.identity_digest
        elif document.kind == "tail":
            entry["tail"] = document.identity_digest
        else:
            entry["records"][path] = document.identity_digest
    return root_digest(cache=documents["cache.json"].identity_digest, views=views, teachers=teachers)


def build_index(
    documents: Mapping[str, Document[Any]], sizes: Mapping[str, int], tables: Mapping[str, np.ndarray[Any, Any]]
) -> tuple[str, bytes, str, bytes]:
    """(index path, its bytes, table path, its bytes). tables: shard → int64 (samples, len(TABLE_COLUMNS)) in tar order."""
    shards, start = {}, 0
    for shard in sorted(tables):
        shards[shard] = (start, start + len(tables[shard]))
        start += len(tables[shard])
    table = b"".join(np.ascontiguousarray(tables[shard], dtype="<i8").tobytes() for shard in sorted(tables))
    table_path = f"index/table.{blake2b_128(table)[:12]}.bin"
    body = {
        "file_digest": ZERO_DIGEST,
        "format": "kdcache",
        "version": FORMAT_VERSION,
        "kind": "index",
        "root": root_of(documents),
        "table": {"path": table_path, "digest": blake2b_128(table), "columns": list(TABLE_COLUMNS), "shards": shards},
        "sizes": {path: sizes[path] for path in sorted(documents)},
        "documents": {path: body_of(documents[path]) for path in sorted(documents)},
    }
    data = seal_json(body)
    return f"index/index.{blake2b_128(data)[:12]}.json", data, table_path, table


def write_index(store: Store, documents: Mapping[str, Document[Any]], tables: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write the index of `documents` and remove those that lay there before; one that another run writes meanwhile stays."""
    before = [path for path, _ in store.list("index/", deep=False)]
    path, data, table_path, table = build_index(documents, dict(document_paths(store)), tables)
    for new, content in ((table_path, table), (path, data)):
        while not store.put_new(new, content) and not _holds(store, new, content):
            store.delete(new)  # damaged since
    for old in before:
        if old not in (path, table_path):
            store.delete(old)


def _holds(store: Store, path: str, content: bytes) -> bool:
    """Whether the object is there with this content; it is not if another run has just replaced it."""
    try:
        return store.get(path, max_size=MAX_INDEX_BYTES) == content
    except (MissingError, CorruptError):
        return False


def drop_index(store: Store) -> None:
    """Remove the index: a document that it holds was deleted, and may soon be there with other content."""
    for path, _ in list(store.list("index/", deep=False)):
        store.delete(path)


def read_table(store: Store, index: Index) -> dict[str, np.ndarray[Any, Any]]:
    """Shard → int64 (samples, 4) from the index's table. Raises CorruptError if it was changed, MissingError if it is gone."""
    rows = max((stop for _, stop in index.table_shards.values()), default=0)
    width = len(TABLE_COLUMNS)
    data = store.get(index.table_path, max_size=max(rows * width * 8, 1))
    if blake2b_128(data) != index.table_digest or len(data) != rows * width * 8:
        raise CorruptError(
            f"{store.url}/{index.table_path}: bytes were changed; run 'kdcache extract' again to rebuild the index, nothing else is lost"
        )
    table = np.frombuffer(data, "<i8").reshape(-1, width)
    if rows and (table[:, :2].min() < 0 or table[:, 2].min() < -1 or not np.isin(table[:, 3], (0, 1)).all()):
        raise CorruptError(
            f"{store.url}/{index.table_path}: no table of offsets, sizes, labels and skips; run 'kdcache extract' again to rebuild the index"
        )
    return {shard: table[start:stop] for shard, (start, stop) in index.table_shards.items()}


def is_current(store: Store, documents: Mapping[str, Document[Any]]) -> bool:
    """Whether exactly one sound index lies in the cache, with its table and nothing else, and says what the documents say."""
    paths = index_paths(store)
    if len(paths) != 1:
        return False
    try:
        index = read_index(store, paths[0])
        read_table(store, index)
    except CacheError:
        return False
    files = {path for path, _ in store.list("index/", deep=False)}
    sizes = dict(document_paths(store))
    return files == {index.path, index.table_path} and index.documents == dict(documents) and index.sizes == sizes
