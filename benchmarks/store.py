"""Reading target rows: our direct reader against the limit, zarr-python, HDF5, LMDB and np.memmap, on the same bytes in one run.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/store.py

Rows of five sizes, that compress about as real tokens do, are written once with `kdcache.arrays`. Every reader
returns the same rows, and reads the very chunks (Blosc zstd 5 bitshuffle, crc32c) that the first one does:

* limit: the encoded chunks lie in memory; crc32c and decompression into the batch, each chunk once a batch, nothing else;
* direct: `ArrayReader` over `LocalStore`;
* zarr-python: the same files, by orthogonal index (a slice where rows are in order);
* HDF5: a chunked dataset that holds our encoded chunks, read with `read_direct_chunk`, then as `limit`;
* LMDB: one value a chunk, readahead off, then as `limit`;
* memmap: uncompressed rows, unchecked: what compression and checks cost.

Access: batches of 64 rows in order, 64 rows at random within one array (a batch of a block shuffle), and single rows at random (a full
permutation over many shards: a batch then finds one row in each). Warm: the page cache holds the files. Cold:
`posix_fadvise(DONTNEED)` before each; the table's last line says how much was still resident, since the kernel need not obey.

One process on one core; each call of a reader is followed by the same call of `limit`, so that a busy neighbour slows both; warm is CPU
time (nothing waits then), cold is wall time; medians over rounds. Budget (DESIGN §12): direct ≤ 1.2 ×
for rows of 64 kB and more, warm, in order and at random.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import lmdb
import numcodecs.blosc
import numpy as np
import zarr

from kdcache.arrays import GROUP_METADATA, ArrayReader, ArraySpec, array_spec, write_array
from kdcache.store import LocalStore

BATCH = 64
BUDGET = 1.2
BUDGET_ROW_BYTES = 64 * 1024
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Rows of one size."""

    label: str
    inner: tuple[int, ...]
    rows: int
    spread: float
    """Of the codes: chosen so that the array compresses to about .9, as real ones do. Blosc stores what it can't shrink, and decodes that at once."""

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.inner))


CASES = [
    Case("201.7 kB (197x1024)", (197, 1024), 384, 16),
    Case("64 kB", (64, 1024), 1024, 12),
    Case("16 kB", (16, 1024), 2048, 12),
    Case("1 kB", (1000,), 32768, 5),
    Case("40 B", (40,), 262144, 8),
]


class Reader(ABC):
    """One way to read rows of the case's array."""

    name: str
    files: Sequence[Path] = ()

    def open(self) -> None:
        """Open files; not timed."""
        return

    def close(self) -> None:
        """Close files, so that their pages can be dropped."""
        return

    @abstractmethod
    def read(self, rows: Array) -> Array:
        """Rows in the order asked."""


class ChunkReader(Reader):
    """Readers that get encoded chunks from somewhere: crc32c, decompression, and the choice of rows are the same for all."""

    def __init__(self, spec: ArraySpec) -> None:
        self.spec = spec

    @abstractmethod
    def chunk(self, block: int) -> bytes: ...

    def read(self, rows: Array) -> Array:
        per_chunk = self.spec.chunk_rows
        out = np.empty((len(rows), *self.spec.inner), self.spec.dtype)
        if per_chunk == 1:
            for place, row in enumerate(rows.tolist()):
                self._decode(row, out[place])
            return out
        blocks = rows // per_chunk
        scratch = np.empty((per_chunk, *self.spec.inner), self.spec.dtype)
        for block in dict.fromkeys(blocks.tolist()):
            self._decode(block, scratch)
            places = np.nonzero(blocks == block)[0]
            out[places] = scratch[rows[places] - block * per_chunk]
        return out

    def _decode(self, block: int, out: Array) -> None:
        encoded = self.chunk(block)
        if google_crc32c.value(encoded[:-4]) != int.from_bytes(encoded[-4:], "little"):
            raise ValueError("crc32c")
        numcodecs.blosc.decompress(memoryview(encoded)[:-4], out)


class Limit(ChunkReader):
    name = "limit"

    def __init__(self, spec: ArraySpec, chunks: list[bytes]) -> None:
        super().__init__(spec)
        self._chunks = chunks

    def chunk(self, block: int) -> bytes:
        return self._chunks[block]


class Direct(Reader):
    name = "direct"

    def __init__(self, folder: Path, spec: ArraySpec, rows: int) -> None:
        self._folder, self._spec, self._rows = folder, spec, rows
        self.files = [folder / "g" / spec.shard_path]

    def open(self) -> None:
        self._store = LocalStore(self._folder)
        self._reader = ArrayReader(self._store, "g", self._spec, self._rows, shard_size=self.files[0].stat().st_size)

    def close(self) -> None:
        self._store.close()

    def read(self, rows: Array) -> Array:
        return self._reader.read(0, rows)


class ZarrPython(Reader):
    name = "zarr-python"

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self._path = folder / "g" / spec.name
        self.files = [folder / "g" / spec.shard_path]

    def open(self) -> None:
        self._array = zarr.open_array(str(self._path), mode="r")

    def read(self, rows: Array) -> Array:
        first, last = int(rows[0]), int(rows[-1])
        if len(rows) == last - first + 1:
            return np.asarray(self._array[0, first : last + 1])
        order = np.argsort(rows)  # zarr-python wants them ascending
        out = np.empty((len(rows), *self._array.shape[2:]), self._array.dtype)
        out[order] = self._array.oindex[0, rows[order]]  # type: ignore[index]
        return out


class Hdf5(ChunkReader):
    name = "HDF5"

    def __init__(self, folder: Path, spec: ArraySpec, chunks: list[bytes], rows: int) -> None:
        super().__init__(spec)
        self.files = [folder / "a.h5"]
        with h5py.File(self.files[0], "w") as file:
            shape, chunk_shape = (len(chunks) * spec.chunk_rows, *spec.inner), (spec.chunk_rows, *spec.inner)
            # a filter is declared, so that a chunk's size may vary; what lies there is our chunk, and no filter runs
            dataset = file.create_dataset("a", shape, spec.dtype, chunks=chunk_shape, compression="gzip")
            for block, chunk in enumerate(chunks):
                dataset.id.write_direct_chunk((block * spec.chunk_rows, *(0 for _ in spec.inner)), chunk)

    def open(self) -> None:
        self._file = h5py.File(self.files[0], "r")
        self._dataset = self._file["a"].id
        self._zeros = (0,) * len(self.spec.inner)

    def close(self) -> None:
        self._file.close()

    def chunk(self, block: int) -> bytes:
        encoded: bytes = self._dataset.read_direct_chunk((block * self.spec.chunk_rows, *self._zeros))[1]
        return encoded


class Lmdb(ChunkReader):
    name = "LMDB"

    def __init__(self, folder: Path, spec: ArraySpec, chunks: list[bytes]) -> None:
        super().__init__(spec)
        self._path = folder / "a.lmdb"
        self.files = [self._path / "data.mdb"]
        environment = lmdb.open(str(self._path), map_size=4 << 30)
        with environment.begin(write=True) as transaction:
            for block, chunk in enumerate(chunks):
                transaction.put(block.to_bytes(8, "big"), chunk, append=True)
        environment.close()

    def open(self) -> None:
        self._environment = lmdb.open(str(self._path), readonly=True, lock=False, readahead=False, map_size=4 << 30)
        self._transaction = self._environment.begin()

    def close(self) -> None:
        self._transaction.abort()
        self._environment.close()

    def chunk(self, block: int) -> bytes:
        encoded: bytes = self._transaction.get(block.to_bytes(8, "big"))
        return encoded


class Memmap(Reader):
    name = "memmap, raw"

    def __init__(self, folder: Path, values: Array) -> None:
        self.files = [folder / "a.npy"]
        np.save(self.files[0], values)

    def open(self) -> None:
        self._array = np.load(self.files[0], mmap_mode="r")

    def close(self) -> None:
        del self._array

    def read(self, rows: Array) -> Array:
        return np.asarray(self._array[rows])  # fancy: a copy


# --- cold ------------------------------------------------------------------------------------------------------------


def drop_pages(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the files."""
    gc.collect()  # memory maps that nobody holds
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    total = resident = 0
    for path in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-len(mapped) // mmap.PAGESIZE)
            state = (ctypes.c_ubyte * pages)()
            held = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(mapped)), state):
                raise OSError(ctypes.get_errno(), "mincore")
            del held
            total += pages
            resident += sum(value & 1 for value in state)
    return resident / total


# --- measuring -------------------------------------------------------------------------------------------------------


def accesses(case: Case, random: np.random.Generator) -> dict[str, list[Array]]:
    """Access pattern → the row numbers of each call."""
    batches = 6
    start = int(random.integers(case.rows - batches * BATCH + 1))
    permutation = random.permutation(case.rows)
    return {
        "in order, 64": [np.arange(start + i * BATCH, start + (i + 1) * BATCH) for i in range(batches)],
        "random, 64": [permutation[i * BATCH : (i + 1) * BATCH] for i in range(batches)],
        "random, 1": [permutation[i : i + 1] for i in range(case.rows - 4 * BATCH, case.rows)],
    }


def time_pairs(reader: Reader, limit: Reader, calls: Sequence[Array], clock: Callable[[], float]) -> tuple[float, float]:
    """µs a row of the reader and of the limit, call by call in turn: a busy neighbour then slows both."""
    seconds = [0.0, 0.0]
    for rows in calls:
        for i, one in enumerate((reader, limit)):
            begin = clock()
            one.read(rows)
            seconds[i] += clock() - begin
    scale = 1e6 / sum(len(rows) for rows in calls)
    return seconds[0] * scale, seconds[1] * scale


def make_readers(folder: Path, case: Case, random: np.random.Generator) -> tuple[list[Reader], float]:
    values = np.empty((case.rows, *case.inner), np.int8)
    for start in range(0, case.rows, 256):  # codes with the tails of real ones
        codes = case.spread * random.standard_t(5, (len(values[start : start + 256]), *case.inner))
        values[start : start + 256] = np.clip(np.rint(codes), -127, 127)
    spec = array_spec("a", "int8", case.inner, views=1, max_rows=case.rows)
    write_array(folder / "g", spec, values[None])
    (folder / "g" / "zarr.json").write_bytes(GROUP_METADATA)
    shard = (folder / "g" / spec.shard_path).read_bytes()
    blocks = spec.num_blocks(case.rows)
    compression = len(shard) / values.nbytes
    index = np.frombuffer(shard[-16 * blocks - 4 : -4], "<u8").reshape(-1, 2).tolist()
    chunks = [shard[offset : offset + size] for offset, size in index]
    readers = [
        Limit(spec, chunks), Direct(folder, spec, case.rows), ZarrPython(folder, spec), Hdf5(folder, spec, chunks, case.rows),
        Lmdb(folder, spec, chunks), Memmap(folder, values),
    ]  # fmt: skip
    for reader in readers:  # all of them give the same rows
        reader.open()
        for rows in (np.arange(BATCH), random.permutation(case.rows)[:BATCH], np.array([case.rows - 1])):
            assert np.array_equal(reader.read(rows), values[rows]), reader.name
        reader.close()
    return readers, compression


def measure(case: Case, *, rounds: int, folder: Path, notes: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Access → reader → medians of (µs a row, ratio to the limit measured with it)."""
    random = np.random.default_rng(0)
    (limit, *readers), compression = make_readers(folder, case, random)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    resident: list[float] = []
    for number in range(rounds):
        for access, calls in accesses(case, random).items():
            for state in ("warm", "cold"):
                if state == "cold" and number % 2:
                    continue  # half as many rounds: they are slow
                clock = time.process_time if state == "warm" else time.perf_counter
                by_reader = found.setdefault(f"{access}, {state}", {})
                for reader in readers:
                    chosen = calls[:32] if reader.name == "zarr-python" else calls
                    if state == "cold":
                        drop_pages(reader.files)
                        resident.append(resident_share(reader.files))
                    reader.open()
                    if state == "warm":
                        time_pairs(reader, limit, chosen, clock)
                    mine, theirs = time_pairs(reader, limit, chosen, clock)
                    reader.close()
                    by_reader.setdefault(reader.name, []).append((mine, mine / theirs))
                    by_reader.setdefault(limit.name, []).append((theirs, 1.0))
    notes.append(
        f"{case.label}: {compression:.3f} of its size after compression; after the drop {100 * statistics.median(resident):.0f} % of the"
        f" pages were resident (median), at most {100 * max(resident):.0f} %"
    )
    return {
        access: {
            name: (statistics.median(time for time, _ in pairs), statistics.median(ratio for _, ratio in pairs)) for name, pairs in by_reader.items()
        }
        for access, by_reader in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--case", type=int, action="append", choices=range(len(CASES)), help="only these row sizes")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    numcodecs.blosc.use_threads = False

    names = ["limit", "direct", "zarr-python", "HDF5", "LMDB", "memmap, raw"]
    print(
        f"zarr {zarr.__version__}, numcodecs {numcodecs.__version__}, h5py {h5py.__version__}, lmdb {lmdb.__version__}; one core; µs a row (x limit)"
    )
    print()
    print("| row | access | " + " | ".join(names) + " | direct <= 1.2 x |")
    print("|---|---|" + "---|" * (len(names) + 1))
    notes: list[str] = []
    for case in [CASES[i] for i in args.case or range(len(CASES))]:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for access, figures in measure(case, rounds=args.rounds, folder=Path(folder), notes=notes).items():
                judged = access.endswith("warm") and case.row_bytes >= BUDGET_ROW_BYTES
                verdict = ("met" if figures["direct"][1] <= BUDGET else "not met") if judged else "-"
                shown = [f"{figures[name][0]:.1f} ({figures[name][1]:.2f})" for name in names]
                print(f"| {case.label} | {access} | " + " | ".join(shown) + f" | {verdict} |", flush=True)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
