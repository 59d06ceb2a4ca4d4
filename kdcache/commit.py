"""Writing a cache: groups are spooled, digested and published, then a record makes them exist. Used by whatever adds to one.

The order that makes a kill harmless: spool under a name unique to this attempt, fsync, publish under a name that holds the
content's digest, create the record if it is absent. No record, no segment; what no record names is garbage.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import features

from .arrays import GROUP_METADATA, ArraySpec, DigestingFile, ShardWriter, write_array
from .digests import digest_of_file
from .errors import CorruptError
from .format import (
    DigestField,
    Document,
    Group,
    digest_of_files,
    dump_document,
    parse_document,
)
from .index import MAX_DOCUMENT_BYTES
from .layout import group_folders
from .plan import FrozenModel
from .store import Store

WRITE_QUEUE_BYTES = 256 << 20
"""Of chunks that wait to be written."""

_PROVENANCE_PACKAGES = ("kdcache", "numpy", "pillow", "numcodecs", "torch", "timm")
_PROVENANCE_LIBRARIES = ("libjpeg_turbo", "zlib", "webp")
"""What Pillow decodes with, as it names them; None for one that it is built without."""


class ChunkPool:
    """Encodes chunks on a few threads and appends them in the order they were given, holding a bounded number of bytes.

    An error on a thread is raised by a later `submit`, and by `GroupWriter.close`.
    """

    def __init__(self, *, num_threads: int, max_bytes: int = WRITE_QUEUE_BYTES) -> None:
        self._encoders = ThreadPoolExecutor(num_threads, thread_name_prefix="kdcache-encode")
        self._appender = ThreadPoolExecutor(1, thread_name_prefix="kdcache-append")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._max_bytes = max_bytes

    def submit(self, writer: ShardWriter, rows: np.ndarray[Any, Any]) -> Future[None]:
        """Encode `rows` (of one chunk; of any number, for a stream) and append them to `writer`. The array must not be changed afterwards. From one thread only."""
        encoded = self._encoders.submit(writer.encode, rows)
        appended = self._appender.submit(lambda: writer.append(encoded.result()))
        self._pending.append((appended, rows.nbytes))
        self._bytes += rows.nbytes
        while self._pending and (self._bytes > self._max_bytes or self._pending[0][0].done()):
            oldest, size = self._pending.popleft()
            self._bytes -= size
            oldest.result()
        return appended

    def close(self) -> None:
        """Stop the threads; what is queued and not begun is dropped."""
        self._encoders.shutdown(wait=True, cancel_futures=True)
        self._appender.shutdown(wait=True, cancel_futures=True)


class GroupWriter:
    """One zarr group being spooled: takes items in row-major, view-minor order and cuts them into chunks."""

    def __init__(self, folder: Path, specs: Mapping[str, ArraySpec], pool: ChunkPool, *, num_views: int) -> None:
        self._folder, self._pool, self._num_views = folder, pool, num_views
        self._writers = {name: ShardWriter(folder, spec) for name, spec in specs.items()}
        self._blocks: dict[str, np.ndarray[Any, Any]] = {}
        self._filled = dict.fromkeys(specs, 0)
        self.num_items = 0
        self._extra: dict[str, DigestField] = {}
        self._appended: deque[Future[None]] = deque()

    def append(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """arrays: array name → (n, *inner), the same n for all; item i is row i // views, view i % views."""
        sizes = {len(values) for values in arrays.values()}
        assert len(sizes) == 1 and arrays.keys() == self._writers.keys(), (sizes, arrays.keys())
        for name, values in arrays.items():
            self._append_array(name, values)
        self.num_items += sizes.pop()

    def _append_array(self, name: str, values: np.ndarray[Any, Any]) -> None:
        spec = self._writers[name].spec
        capacity = spec.chunk_rows * self._num_views
        start = 0
        while start < len(values):
            if name not in self._blocks:
                self._blocks[name] = np.empty((capacity, *spec.inner), spec.dtype)
                self._filled[name] = 0
            filled = self._filled[name]
            count = min(capacity - filled, len(values) - start)
            self._blocks[name][filled : filled + count] = values[start : start + count]
            self._filled[name] += count
            start += count
            if self._filled[name] == capacity:
                self._emit(name)

    def add_files(self, files: Mapping[str, DigestField]) -> None:
        """Take in an array that was written beside: path in the group → size and digest."""
        self._extra |= files

    def append_to(self, writer: ShardWriter, rows: np.ndarray[Any, Any]) -> None:
        """Append to another array of the group, which the caller closes."""
        self._appended.append(self._pool.submit(writer, rows))

    def _emit(self, name: str) -> None:
        block, filled = self._blocks.pop(name), self._filled[name]
        by_view = block[:filled].reshape(-1, self._num_views, *self._writers[name].spec.inner)
        for view in range(self._num_views):
            self.append_to(self._writers[name], np.ascontiguousarray(by_view[:, view]))
        while self._appended and self._appended[0].done():
            self._appended.popleft().result()

    def add_array(self, spec: ArraySpec, values: np.ndarray[Any, Any]) -> None:
        """Write one more whole array without a views axis."""
        self.add_files(write_array(self._folder, spec, values))

    def finish(self) -> None:
        """Hand the last, partial chunks to the pool; no more items come. On the thread that appends."""
        for name in list(self._blocks):
            self._emit(name)

    def wait(self) -> None:
        """Wait for every chunk that was handed to the pool."""
        while self._appended:
            self._appended.popleft().result()

    def close(self) -> dict[str, DigestField]:
        """Wait for every chunk and finish every array; path in the group → size and digest. After `finish`, on any thread."""
        self.wait()
        rows = self.num_items // self._num_views
        files = dict(self._extra)
        for writer in self._writers.values():
            files |= writer.close(rows)
        names = [*self._writers, *(path.rpartition("/c/")[0] or path.removesuffix("/zarr.json") for path in self._extra)]
        for folder in group_folders(names):
            path = f"{folder}/zarr.json" if folder else "zarr.json"
            file = DigestingFile(self._folder / path)
            file.write(GROUP_METADATA)
            files[path] = file.close()
        return files

    def abandon(self) -> None:
        """Close the files without finishing them."""
        for writer in self._writers.values():
            writer.abandon()


def publish_group(store: Store, folder: Path, files: Mapping[str, DigestField], *, layer: str, stem: str) -> Group:
    """Move a spooled group to `<layer>/<stem>.<digest12>.zarr`.

    A file that is there already was left by an attempt that was killed before its record, or belongs to a run that is racing
    this one: it must have the same bytes. If it was damaged since, and no record vouches for it, it is replaced.
    """
    digest = digest_of_files(files)
    group = Group(name=f"{stem}.{digest[:12]}.zarr", digest=digest, files=dict(files))
    for path, field in files.items():
        target = f"{layer}/{group.name}/{path}"
        if not store.put_new(target, folder / path) and digest_of_file(store, target) != field:
            if store.size(f"{layer}/{stem}.json") is not None:
                raise CorruptError(f"{store.url}: {target} is damaged; delete the record {layer}/{stem}.json and run the command again to replace it")
            store.delete(target)
            store.put_new(target, folder / path)
    return group


def unpublish_group(store: Store, group: Group, *, layer: str) -> None:
    """Remove a group that lost the race for its record."""
    for path in group.files:
        store.delete(f"{layer}/{group.name}/{path}")


IdentityT = TypeVar("IdentityT", bound=FrozenModel)


def create_document(
    store: Store,
    path: str,
    identity: IdentityT,
    *,
    measured: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    packages: Iterable[str] = (),
) -> tuple[Document[IdentityT], bool]:
    """Create a document if it is absent; the one that is there now, and whether this call made it. packages: as `environment` takes them."""
    data = dump_document(identity, measured=measured, provenance={**environment(packages), **(provenance or {})})
    created = store.put_new(path, data)
    if not created:
        data = store.get(path, max_size=MAX_DOCUMENT_BYTES)
    return parse_document(data, type(identity), where=f"{store.url}/{path}"), created


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Provenance that every document carries: versions and machine, never compared. packages: whose version to note beside those that all note."""
    return {
        "packages": {name: version(name) for name in dict.fromkeys((*_PROVENANCE_PACKAGES, *packages))},
        "libraries": {name: features.version(name) for name in _PROVENANCE_LIBRARIES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "host": platform.node(),
    }
