"""Zarr v3 sharded arrays: a streaming writer and a direct reader. Below `commit` and `cache`, above nothing but a Store.

An array has the shape (views, rows, …) or (rows, …) and lies in one shard file. A chunk is some rows of one view. The
writer appends encoded chunks row block by row block, then the shard index: constant memory. For one view its file is
byte-identical to zarr-python's. The reader caches the index, reads chunks with one ranged read each run of neighbours,
checks each chunk's crc32c and decompresses into the caller's array. zarr-python is the reference for both (tests).

Why ours: zarr-python's floor was measured at 1.6 × the decompression limit in order and 6 × for one row, against
1.07 × here, and appending to a zarr shard rewrites it each time (research: storage §3, §4).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import google_crc32c
import numcodecs.blosc
import numpy as np

from .errors import CorruptError, StoreError
from .format import MAX_ROW_BYTES, DigestField
from .store import Store

numcodecs.blosc.use_threads = False  # bytes then depend on neither threads nor cores

CHUNK_BYTES = 64 * 1024
"""Rows are gathered into chunks of at most this size; a larger row is a chunk of its own."""

MAX_CHUNK_BYTES = MAX_ROW_BYTES
"""Of a row that is a chunk of its own."""
DATA_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint64", "float16", "float32")

STREAM_CHUNK_BYTES = 8 * 1024
"""Of a stream: an item of 28 kB is then read as 36 kB on average, and the crc32c of every byte that is used is checked."""
_STREAM_STRIDE = STREAM_CHUNK_BYTES + 4
READ_BYTES = 512 * 1024
"""Neighbouring chunks are read together up to this size: what is read is then still in the core's cache when it is decoded. In order, rows
of 200 kB cost 1.03 × the decompression limit this way, 1.13 × with a whole batch of 12 MB a read."""

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
_EMPTY = 2**64 - 1
_SMALLEST_CHUNK = 16 + 4
"""A Blosc header and a crc32c: what Blosc adds at most to bytes that it can't compress."""
_CRC = struct.Struct("<I")
_BLOSC_SIZES = struct.Struct("<III")
"""From byte 4 of a Blosc header: bytes before compression, of a block, of all that is stored."""
_BLOSC_LEVEL = 5
"""zstd 5: level 9 encodes at 2 to 17 MB/s (research: storage §2)."""

GROUP_METADATA = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array is, before its number of rows is known."""

    name: str
    """Path inside the group, e.g. ``logits/values``."""
    dtype: np.dtype[Any]
    inner: tuple[int, ...]
    """Shape of one row (of one view)."""
    views: int | None
    """Length of the view axis, or None for an array without one."""
    chunk_rows: int
    typesize: int
    """Blosc's element size, 1 to 255: bitshuffle gathers the same bit of every element."""
    compressed: bool = True
    """False: the chunk's bytes as they are, then crc32c. For pixels and image files, from which Blosc takes 5 % or nothing."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return ((1,) if self.views is not None else ()) + (self.chunk_rows, *self.inner)

    def shape(self, rows: int) -> tuple[int, ...]:
        return ((self.views,) if self.views is not None else ()) + (rows, *self.inner)

    def num_blocks(self, rows: int) -> int:
        return -(-rows // self.chunk_rows)

    def metadata(self, rows: int) -> bytes:
        """The bytes of `zarr.json`, as zarr-python writes them."""
        padded = max(1, self.num_blocks(rows)) * self.chunk_rows
        bytes_codec: dict[str, Any] = {"name": "bytes"}
        if self.dtype.itemsize > 1:
            bytes_codec["configuration"] = {"endian": "little"}
        blosc = {"typesize": self.typesize, "cname": "zstd", "clevel": _BLOSC_LEVEL, "shuffle": "bitshuffle", "blocksize": 0}
        compressor = [{"name": "blosc", "configuration": blosc}] if self.compressed else []
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": [bytes_codec, *compressor, {"name": "crc32c"}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        body = {
            "shape": list(self.shape(rows)),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shape(padded))}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if self.dtype.kind == "f" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        return json.dumps(body, indent=2).encode()

    @property
    def shard_path(self) -> str:
        return f"{self.name}/c/" + "/".join("0" for _ in self.shape(0))


def array_spec(name: str, dtype: str, inner: Sequence[int], *, views: int | None, max_rows: int, typesize: int | None = None) -> ArraySpec:
    """The spec with the chunk size of format v1: as many rows as fit CHUNK_BYTES, at least one, at most `max_rows`."""
    numpy_dtype = np.dtype(dtype).newbyteorder("<")
    row_bytes = prod(inner) * numpy_dtype.itemsize
    chunk_rows = max(1, min(CHUNK_BYTES // row_bytes, max_rows))
    return ArraySpec(name=name, dtype=numpy_dtype, inner=tuple(inner), views=views, chunk_rows=chunk_rows, typesize=typesize or numpy_dtype.itemsize)


def stream_spec(name: str) -> ArraySpec:
    """The spec of a stream: uint8 (bytes,), not compressed, so that every chunk lies at a known place."""
    return ArraySpec(name=name, dtype=np.dtype("uint8"), inner=(), views=None, chunk_rows=STREAM_CHUNK_BYTES, typesize=1, compressed=False)


def spec_of_metadata(name: str, data: bytes, *, has_views: bool, where: str) -> tuple[ArraySpec, int]:
    """The spec and number of rows that `ArraySpec.metadata` wrote as `data`. Raises CorruptError for an array of any other kind."""
    axis = int(has_views)
    try:
        body = json.loads(data)
        if body["data_type"] not in DATA_TYPES:
            raise ValueError(body["data_type"])
        sharding = body["codecs"][0]["configuration"]
        chunk, shape, compressor = sharding["chunk_shape"], body["shape"], sharding["codecs"][1]
        compressed = compressor["name"] == "blosc"
        dtype = np.dtype(body["data_type"]).newbyteorder("<")
        spec = ArraySpec(
            name=name,
            dtype=dtype,
            inner=tuple(shape[axis + 1 :]),
            views=shape[0] if has_views else None,
            chunk_rows=chunk[axis],
            typesize=compressor["configuration"]["typesize"] if compressed else dtype.itemsize,
            compressed=compressed,
        )
        rows = int(shape[axis])
        is_ours = (
            0 <= rows < 2**48 and spec.chunk_rows * prod(spec.inner) * dtype.itemsize <= MAX_CHUNK_BYTES and json.loads(spec.metadata(rows)) == body
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError):
        is_ours = False
    if not is_ours:
        axes = "views and rows" if has_views else "rows"
        raise CorruptError(f"{where}: expected an array of {axes} as kdcache writes them, found another; run 'kdcache verify' on the cache")
    return spec, rows


def encode_chunk(spec: ArraySpec, rows: np.ndarray[Any, Any]) -> bytes:
    """One encoded chunk: `rows` (n <= chunk_rows, *inner) padded with zeros, Blosc if compressed, then crc32c (little-endian)."""
    if len(rows) < spec.chunk_rows:
        rows = np.concatenate([rows, np.zeros((spec.chunk_rows - len(rows), *spec.inner), spec.dtype)])
    raw = np.ascontiguousarray(rows, dtype=spec.dtype)
    if not spec.compressed:
        return _with_crc(raw.tobytes())
    blosc = numcodecs.blosc.Blosc(cname="zstd", clevel=_BLOSC_LEVEL, shuffle=numcodecs.blosc.BITSHUFFLE, blocksize=0, typesize=spec.typesize)
    return _with_crc(blosc.encode(raw))


def _with_crc(payload: bytes) -> bytes:
    return payload + struct.pack("<I", google_crc32c.value(payload))


class DigestingFile:
    """A new file that knows its size and BLAKE2b-128 when it is closed; closing makes it durable."""

    def __init__(self, path: Path) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "xb")  # noqa: SIM115 - owned by this object until close()
        except OSError as error:
            raise StoreError(f"{path} can't be created: {error.strerror}") from error
        self._path = path

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise StoreError(f"{self._path}: writing failed: {error.strerror}; free space and run the command again") from error
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> DigestField:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise StoreError(f"{self._path}: writing failed: {error.strerror}; free space and run the command again") from error
        return DigestField(size=self.size, digest=self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without finishing; what can't be flushed is not wanted."""
        with contextlib.suppress(OSError):
            self._file.close()


class ShardWriter:
    """Appends encoded chunks of one array in the format's order: block 0 of each view, block 1 of each view, …"""

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self.spec = spec
        self._folder = folder
        self._entries: list[tuple[int, int]] = []
        self._file = DigestingFile(folder / spec.shard_path)
        self._lock = threading.Lock()
        self._abandoned = False

    def encode(self, rows: np.ndarray[Any, Any]) -> bytes:
        """What `append` takes, from the rows of one chunk. On any thread."""
        return encode_chunk(self.spec, rows)

    def append(self, encoded: bytes) -> None:
        """Append the next chunk in order. After `abandon` it does nothing: a pool may still hold chunks of a failed shard."""
        with self._lock:
            if not self._abandoned:
                self._entries.append((self._file.size, len(encoded)))
                self._file.write(encoded)

    def close(self, rows: int) -> dict[str, DigestField]:
        """Write the shard index and `zarr.json`; path in the group → size and digest. An array of no rows has no shard file."""
        num_views = self.spec.views or 1
        num_blocks = self.spec.num_blocks(rows)
        if len(self._entries) != num_views * num_blocks:
            raise AssertionError(f"{self.spec.name}: {len(self._entries)} chunks appended, expected {num_views} views x {num_blocks} blocks")
        files: dict[str, DigestField] = {}
        if num_blocks:
            index = np.array(self._entries, dtype="<u8").reshape(num_blocks, num_views, 2).transpose(1, 0, 2)
            index_bytes = np.ascontiguousarray(index).tobytes()
            self._file.write(index_bytes + struct.pack("<I", google_crc32c.value(index_bytes)))
            files[self.spec.shard_path] = self._file.close()
        else:
            self._file.abandon()
            (self._folder / self.spec.shard_path).unlink()
        metadata = DigestingFile(self._folder / self.spec.name / "zarr.json")
        metadata.write(self.spec.metadata(rows))
        files[f"{self.spec.name}/zarr.json"] = metadata.close()
        return files

    def abandon(self) -> None:
        """Close the file without finishing it."""
        with self._lock:
            self._abandoned = True
            self._file.abandon()


class StreamWriter(ShardWriter):
    """A 1-D uint8 array to which any number of bytes is appended, in chunks of STREAM_CHUNK_BYTES: variable-length items, one after another."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, stream_spec(name))

    def encode(self, rows: np.ndarray[Any, Any]) -> bytes:
        """Any number of whole chunks; the last one of the array may be short."""
        return b"".join(encode_chunk(self.spec, rows[start : start + STREAM_CHUNK_BYTES]) for start in range(0, len(rows), STREAM_CHUNK_BYTES))

    def append(self, encoded: bytes) -> None:
        """Append what `encode` gave."""
        for start in range(0, len(encoded), _STREAM_STRIDE):
            super().append(encoded[start : start + _STREAM_STRIDE])


def write_array(folder: Path, spec: ArraySpec, values: np.ndarray[Any, Any]) -> dict[str, DigestField]:
    """Write a whole small array at once; as ShardWriter.close."""
    writer = ShardWriter(folder, spec)
    rows = values.shape[0 if spec.views is None else 1]
    for start in range(0, rows, spec.chunk_rows):
        block = slice(start, start + spec.chunk_rows)
        for part in [values[block]] if spec.views is None else values[:, block]:
            writer.append(encode_chunk(spec, part))
    return writer.close(rows)


# --- reading ---------------------------------------------------------------------------------------------------------


class ArrayReader:
    """Reads rows of one array straight from its shard file. Raises CorruptError for any byte that is not as written."""

    def __init__(self, store: Store, group: str, spec: ArraySpec, rows: int, *, shard_size: int) -> None:
        """group: path of the zarr group in the store. shard_size: size of the shard file in bytes, from the record."""
        self.spec, self.rows = spec, rows
        self._store = store
        self._path = f"{group}/{spec.shard_path}"
        num_chunks = (spec.views or 1) * spec.num_blocks(rows)
        if num_chunks == 0:
            self._index = np.zeros((0, 2), np.int64)
            return
        index_size = num_chunks * 16 + 4
        if index_size > shard_size:
            raise CorruptError(f"{self._path}: expected an index of {index_size} bytes, the file has {shard_size}; run 'kdcache verify' on the cache")
        data = store.get_range(self._path, shard_size - index_size, index_size)
        if google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise CorruptError(f"{self._path}: the shard index fails its crc32c; run 'kdcache verify' on the cache")
        index = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
        if (index == _EMPTY).any():
            raise CorruptError(f"{self._path}: a chunk is absent; expected all {num_chunks}; run 'kdcache verify' on the cache")
        payload_size = shard_size - index_size
        inside = (index[:, 0] <= payload_size) & (index[:, 1] <= payload_size)  # before adding: a sum may wrap around
        sizes, plain = index[:, 1], spec.chunk_rows * prod(spec.inner) * spec.dtype.itemsize
        smallest, largest = (_SMALLEST_CHUNK, plain + _SMALLEST_CHUNK) if spec.compressed else (plain + 4, plain + 4)
        if not inside.all() or (index.sum(axis=1) > payload_size).any() or (sizes < smallest).any() or (sizes > largest).any():
            raise CorruptError(f"{self._path}: the shard index points outside the file; run 'kdcache verify' on the cache")
        self._index = index.astype(np.int64)

    def read(self, view: int, rows: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows `rows` of `view` (0 for an array without views), in the order asked: array (len(rows), *inner)."""
        spec, chunk_rows = self.spec, self.spec.chunk_rows
        if len(rows) == 1:
            return self._read_row(view, int(rows[0]))
        wanted = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(wanted), *spec.inner), spec.dtype)
        if not len(wanted):
            return out
        consecutive = chunk_rows == 1 or bool((wanted[1:] - wanted[:-1] == 1).all())  # whole chunks then need no copy
        order = wanted.argsort(kind="stable")
        wanted = wanted[order]
        if wanted[0] < 0 or wanted[-1] >= self.rows or not 0 <= view < (spec.views or 1):
            raise IndexError(f"{self._path}: view {view}, rows {wanted[0]} to {wanted[-1]} of {spec.views} views, {self.rows} rows")
        blocks = wanted // chunk_rows
        starts = [0, *((blocks[1:] != blocks[:-1]).nonzero()[0] + 1).tolist()]  # where each chunk's part of `wanted` begins
        stops = [*starts[1:], len(wanted)]
        chunks = blocks[starts] + view * spec.num_blocks(self.rows)
        numbers, entries, places = chunks.tolist(), self._index[chunks].tolist(), order[starts].tolist()
        scratch: np.ndarray[Any, Any] | None = None
        for first, last in _adjacent_runs(entries):
            begin = entries[first][0]
            data = np.frombuffer(self._store.get_range(self._path, begin, sum(entries[last]) - begin), np.uint8)  # its slices copy nothing
            for i in range(first, last + 1):
                offset, size = entries[i]
                encoded = data[offset - begin : offset - begin + size]
                if consecutive and stops[i] - starts[i] == chunk_rows:
                    self._decode(encoded, numbers[i], out[places[i] : places[i] + chunk_rows])
                else:
                    scratch = np.empty((chunk_rows, *spec.inner), spec.dtype) if scratch is None else scratch
                    self._decode(encoded, numbers[i], scratch)
                    out[order[starts[i] : stops[i]]] = scratch[wanted[starts[i] : stops[i]] % chunk_rows]
        return out

    def touch(self, view: int, rows: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Read the chunks of these rows, ascending, and drop them, unchecked: whoever reads them next finds them in the page cache."""
        chunks = np.unique(np.asarray(rows, dtype=np.int64) // self.spec.chunk_rows) + view * self.spec.num_blocks(self.rows)
        entries = self._index[chunks].tolist()
        for first, last in _adjacent_runs(entries):
            self._store.get_range(self._path, entries[first][0], sum(entries[last]) - entries[first][0])

    def read_encoded(self, view: int, block: int) -> bytes:
        """One chunk as it lies in the file, its crc32c checked: what `ShardWriter.append` takes."""
        offset, size = self._index[view * self.spec.num_blocks(self.rows) + block].tolist()
        encoded = self._store.get_range(self._path, offset, size)
        self._check_crc(encoded, view * self.spec.num_blocks(self.rows) + block)
        return encoded

    def _read_row(self, view: int, row: int) -> np.ndarray[Any, Any]:
        """As `read` of one row, without the planning: a batch drawn from many shards wants one row of each."""
        spec = self.spec
        if not (0 <= row < self.rows and 0 <= view < (spec.views or 1)):
            raise IndexError(f"{self._path}: view {view}, row {row} of {spec.views} views, {self.rows} rows")
        block, in_chunk = divmod(row, spec.chunk_rows)
        chunk = view * spec.num_blocks(self.rows) + block
        offset, size = self._index[chunk].tolist()
        decoded = np.empty((spec.chunk_rows, *spec.inner), spec.dtype)
        self._decode(np.frombuffer(self._store.get_range(self._path, offset, size), np.uint8), chunk, decoded)
        return decoded if spec.chunk_rows == 1 else decoded[in_chunk : in_chunk + 1].copy()

    @property
    def index_bytes(self) -> int:
        """Memory that the cached index takes."""
        return int(self._index.nbytes) + 500

    def _check_crc(self, encoded: Any, chunk: int) -> None:
        """encoded: bytes, or a uint8 array of them."""
        payload: Any = encoded[:-4]  # numpy's stubs do not say that arrays are buffers
        if google_crc32c.value(payload) != _CRC.unpack_from(encoded, len(payload))[0]:
            raise CorruptError(f"{self._path}: chunk {chunk} fails its crc32c; its row is not used; run 'kdcache verify' on the cache")

    def _decode(self, encoded: Any, chunk: int, out: np.ndarray[Any, Any]) -> None:
        self._check_crc(encoded, chunk)
        payload: Any = encoded[:-4]
        if not self.spec.compressed:
            if len(payload) != out.nbytes:
                raise CorruptError(f"{self._path}: chunk {chunk} has {len(payload)} bytes, expected {out.nbytes}; run 'kdcache verify' on the cache")
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(payload, np.uint8)
            return
        declared, _, compressed = _BLOSC_SIZES.unpack_from(payload, 4)  # Blosc itself trusts both sizes
        if (declared, compressed) != (out.nbytes, len(payload)):
            raise CorruptError(
                f"{self._path}: chunk {chunk} declares {declared} bytes in {compressed}, expected {out.nbytes} in {len(payload)};"
                f" run 'kdcache verify' on the cache"
            )
        try:
            numcodecs.blosc.decompress(payload, out)
        except RuntimeError as error:
            raise CorruptError(f"{self._path}: chunk {chunk} does not decompress: {error}; run 'kdcache verify' on the cache") from error


class StreamReader:
    """Reads spans of bytes of a stream, with one ranged read a span. Raises CorruptError for any byte that is not as written.

    The shard index is not read: chunk i of a stream lies at i times the size of a chunk.
    """

    def __init__(self, store: Store, group: str, name: str, *, shard_size: int) -> None:
        """group: path of the zarr group in the store. shard_size: size of the shard file in bytes, from the record."""
        self._store = store
        self._path = f"{group}/{stream_spec(name).shard_path}"
        self._num_chunks, rest = divmod(shard_size - 4, _STREAM_STRIDE + 16)
        if rest or shard_size < 4:
            raise CorruptError(f"{self._path}: {shard_size} bytes are no whole number of chunks; run 'kdcache verify' on the cache")

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        if not 0 <= start < stop <= self._num_chunks * STREAM_CHUNK_BYTES:
            raise CorruptError(
                f"{self._path}: bytes {start} to {stop} were asked for, it has {self._num_chunks} chunks of {STREAM_CHUNK_BYTES};"
                f" run 'kdcache verify' on the cache"
            )
        first, last = start // STREAM_CHUNK_BYTES, (stop - 1) // STREAM_CHUNK_BYTES
        data = self._store.get_range(self._path, first * _STREAM_STRIDE, (last - first + 1) * _STREAM_STRIDE)
        payloads: list[bytes] = []
        for chunk, place in enumerate(range(0, len(data), _STREAM_STRIDE), start=first):
            payload = data[place : place + STREAM_CHUNK_BYTES]
            if google_crc32c.value(payload) != struct.unpack_from("<I", data, place + STREAM_CHUNK_BYTES)[0]:
                raise CorruptError(f"{self._path}: chunk {chunk} fails its crc32c; it is not used; run 'kdcache verify' on the cache")
            payloads.append(payload)
        begin = start - first * STREAM_CHUNK_BYTES
        return b"".join(payloads)[begin : begin + stop - start]

    def touch(self, start: int, stop: int) -> None:
        """Read the chunks of these bytes and drop them, unchecked: whoever reads them next finds them in the page cache."""
        first, last = start // STREAM_CHUNK_BYTES, (stop - 1) // STREAM_CHUNK_BYTES
        if 0 <= first <= last < self._num_chunks:  # else who reads says what is wrong
            self._store.get_range(self._path, first * _STREAM_STRIDE, (last - first + 1) * _STREAM_STRIDE)


def _adjacent_runs(entries: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """First and last place of each group of (offset, size) that lie next to each other and hold at most READ_BYTES: one read serves each group."""
    runs: list[tuple[int, int]] = []
    for place, (offset, size) in enumerate(entries):
        if runs:
            first, last = runs[-1]
            if sum(entries[last]) == offset and offset + size - entries[first][0] <= READ_BYTES:
                runs[-1] = (first, place)
                continue
        runs.append((place, place))
    return runs


class ByteLRU(Generic[KeyT, ValueT]):
    """The latest results of a function of a key, as many as fit a number of bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._bytes = 0
        self._items: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()

    def get_or(self, key: KeyT, make: Callable[[], ValueT], size_of: Callable[[ValueT], int]) -> ValueT:
        """The remembered value, or `make()`'s, which weighs `size_of` it bytes."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key][0]
        value = make()
        size = size_of(value)
        self._items[key] = (value, size)
        self._bytes += size
        while self._bytes > self._capacity and len(self._items) > 1:
            self._bytes -= self._items.popitem(last=False)[1][1]
        return value
