"""Which files a cache's documents own, and what is left over: the one place that verify and gc take this from.

A file is part of a cache because a record or a card names it, or because it is a document or the index. Everything else is what
killed attempts, lost races and people left behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import CacheError, KDCacheError
from .format import DigestField, Document
from .index import index_paths, read_index
from .paths import calibration_path, tail_weights_path, teacher_of
from .store import Store

GarbageKind = Literal["group", "index", "spool", "file"]


def owned_files(documents: Mapping[str, Document[Any]]) -> dict[str, tuple[DigestField, str]]:
    """Path → (size and digest, shard or '') of every file that a record or a card names."""
    owned: dict[str, tuple[DigestField, str]] = {}
    for path, document in documents.items():
        group = getattr(document.identity, "group", None)
        if group is not None:
            owned |= {f"{group_path(path, document)}/{name}": (field, document.identity.shard) for name, field in group.files.items()}
        elif document.kind == "target" and document.identity.calibration is not None:
            owned[calibration_path(teacher_of(path), document.identity.name)] = (document.identity.calibration, "")
        elif document.kind == "tail":
            owned[tail_weights_path(teacher_of(path))] = (document.identity.weights, "")
    return owned


def group_path(record: str, document: Document[Any]) -> str:
    """Path of the group that the record at `record` names."""
    return f"{record.rpartition('/')[0]}/{document.identity.group.name}"


def index_tables(store: Store) -> set[str]:
    """Tables that a sound index names."""
    tables = set()
    for path in index_paths(store):
        with contextlib.suppress(KDCacheError):  # verify reports it where it checks the index
            tables.add(read_index(store, path).table_path)
    return tables


@dataclass(frozen=True)
class Garbage:
    """Something that no document owns."""

    kind: GarbageKind
    """`group`: a zarr group without a record; `index`: not the current one; `spool`: of a killed attempt; `file`: any other."""
    path: str
    """A file, or the folder of a group or spool."""
    files: tuple[str, ...]
    """What to remove; of a spool nothing, it goes by `Store.sweep_spools`."""
    size: int
    """Bytes."""


def find_garbage(store: Store, documents: Mapping[str, Document[Any]]) -> list[Garbage]:
    """All that no document owns, by path. documents: all of the cache's, each read itself."""
    owned = {*documents, *owned_files(documents), *_current_index(store)}
    groups = {group_path(path, document) for path, document in documents.items() if getattr(document.identity, "group", None) is not None}
    found: dict[tuple[GarbageKind, str], dict[str, int]] = {}
    folders = {folder for path in owned for folder in _folders_above(path)}
    for path, size in store.list():
        if path in owned or path in folders:  # the second: a link to a folder, through which a document's files are read
            continue
        folder = _group_folder(path)
        is_orphan = folder is not None and folder not in groups
        kind: GarbageKind = "group" if is_orphan else "index" if path.startswith("index/") else "file"
        place = folder if is_orphan and folder is not None else path
        found.setdefault((kind, place), {})[path] = size
    garbage = [Garbage(kind, place, tuple(sorted(files)), sum(files.values())) for (kind, place), files in found.items()]
    garbage += [Garbage("spool", spool.path, (), spool.size) for spool in store.spools() if not spool.is_alive]
    return sorted(garbage, key=lambda one: (one.kind, one.path))


def _folders_above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _group_folder(path: str) -> str | None:
    """The group that a path lies in, as far as its name tells: `views/x.zarr`, `teachers/name/x.zarr`."""
    parts = path.split("/")
    depth = {"views": 2, "teachers": 3}.get(parts[0], 0)
    return "/".join(parts[:depth]) if 0 < depth < len(parts) and parts[depth - 1].endswith(".zarr") else None


def _current_index(store: Store) -> set[str]:
    """The sound index that knows most, and its table; of several, gc keeps this one."""
    indexes = []
    for path in index_paths(store):
        with contextlib.suppress(CacheError):  # damaged: derived, and rebuilt
            indexes.append(read_index(store, path))
    best = max(indexes, key=lambda index: len(index.documents), default=None)
    return {best.path, best.table_path} if best is not None else set()
