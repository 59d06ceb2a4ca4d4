"""Arrays: zarr-python reads what we write, the bytes are its own, our reader reads as it does, and no damage is read as a value."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from kdcache.arrays import GROUP_METADATA, ArrayReader, ArraySpec, ByteLRU, array_spec, encode_chunk, write_array
from kdcache.errors import CorruptError, MissingError, StoreError
from kdcache.store import LocalStore

DTYPES = ["uint8", "int8", "uint16", "int16", "int32", "int64", "uint64", "float16", "float32"]

Array = np.ndarray[Any, np.dtype[Any]]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def make_values(spec: ArraySpec, rows: int, seed: int = 0) -> Array:
    """Half random bits, half small numbers, so that chunks differ in how they compress."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, spec.shape(rows)).astype(spec.dtype)
    noisy = np.frombuffer(rng.bytes(values.nbytes // 2), np.uint8)
    values.reshape(-1).view(np.uint8)[: len(noisy)] = noisy
    if spec.dtype.kind == "f":
        values = np.nan_to_num(values)
    return values


def reader_of(path: Path, spec: ArraySpec, rows: int, *, shard_size: int | None = None) -> ArrayReader:
    file = path / "g" / spec.shard_path
    size = shard_size if shard_size is not None else (file.stat().st_size if file.exists() else 0)
    return ArrayReader(LocalStore(path), "g", spec, rows, shard_size=size)


def read_all(path: Path, spec: ArraySpec, rows: int) -> Array:
    """(views, rows, …), by a fresh reader."""
    reader = reader_of(path, spec, rows)
    return np.stack([reader.read(view, range(rows)) for view in range(spec.views or 1)])


specs = st.builds(
    lambda dtype, inner, views, chunk_rows, typesize: ArraySpec(
        name="a/b", dtype=np.dtype(dtype).newbyteorder("<"), inner=tuple(inner), views=views, chunk_rows=chunk_rows, typesize=typesize
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), max_size=3),
    st.none() | st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4, 8, 148]),
)


@given(specs, st.integers(0, 17), st.integers(0, 99))
def test_zarr_reads_what_we_write_and_our_reader_reads_the_same(spec: ArraySpec, rows: int, seed: int) -> None:
    values = make_values(spec, rows, seed)
    with folder() as path:
        files = write_array(path / "g", spec, values)
        assert all((path / "g" / name).stat().st_size == field.size for name, field in files.items())
        array = zarr.open_array(str(path / "g" / spec.name), mode="r")
        assert array.shape == values.shape
        assert array.dtype == values.dtype
        assert np.asarray(array[:]).tobytes() == values.tobytes()
        reader = reader_of(path, spec, rows)
        wanted = np.random.default_rng(seed).integers(0, rows, 25) if rows else np.zeros(0, np.int64)
        for view in range(spec.views or 1):
            expected = values if spec.views is None else values[view]
            assert reader.read(view, range(rows)).tobytes() == expected.tobytes()
            assert reader.read(view, wanted).tobytes() == expected[wanted].tobytes()


@given(specs, st.integers(1, 17), st.integers(0, 99))
def test_bytes_are_those_of_zarr_python(spec: ArraySpec, rows: int, seed: int) -> None:
    spec = replace(spec, views=None if spec.views is None else 1)
    values = make_values(spec, rows, seed)
    sharding = ShardingCodec(
        chunk_shape=spec.chunk_shape,
        codecs=[BytesCodec(), BloscCodec(typesize=spec.typesize, cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
    )
    with folder() as path:
        write_array(path / "g", spec, values)
        theirs = zarr.create_array(
            str(path / "z"),
            shape=values.shape,
            dtype=values.dtype,
            chunks=spec.shape(spec.num_blocks(rows) * spec.chunk_rows),
            serializer=sharding,
            compressors=None,
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        theirs[...] = values
        chunk = "c/" + "/".join("0" for _ in values.shape)
        assert (path / "g" / spec.name / chunk).read_bytes() == (path / "z" / chunk).read_bytes()
        assert json.loads((path / "g" / spec.name / "zarr.json").read_bytes()) == json.loads((path / "z" / "zarr.json").read_bytes())
        assert (path / "g" / spec.name / "zarr.json").read_bytes() == (path / "z" / "zarr.json").read_bytes()


@given(specs, st.integers(1, 17), st.lists(st.integers(0, 16), max_size=20), st.integers(0, 200))
def test_rows_come_in_the_order_asked_however_they_lie_in_chunks(spec: ArraySpec, rows: int, asked: list[int], read_bytes: int) -> None:
    """Whole chunks, parts, repetitions, single rows; runs of chunks that are read together or one by one."""
    values = make_values(spec, rows)
    wanted = [row % rows for row in asked]
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.arrays.READ_BYTES", read_bytes)
        write_array(path / "g", spec, values)
        reader = reader_of(path, spec, rows)
        for view in range(spec.views or 1):
            expected = values if spec.views is None else values[view]
            for order in (wanted, sorted(wanted), list(range(rows)), [rows - 1]):
                assert np.array_equal(reader.read(view, order), expected[order])


def test_a_group_of_ours_is_a_zarr_group(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "theirs"))
    theirs = json.loads((tmp_path / "theirs" / "zarr.json").read_bytes())
    theirs.pop("consolidated_metadata", None)  # zarr-python 3.1.0 writes a null here, later ones leave it out
    assert theirs == json.loads(GROUP_METADATA)


def test_zeros_are_stored_and_not_left_out(tmp_path: Path) -> None:
    spec = array_spec("a", "int32", (3,), views=2, max_rows=5)
    write_array(tmp_path / "g", spec, np.zeros((2, 5, 3), np.int32))
    assert np.array_equal(reader_of(tmp_path, spec, 5).read(1, range(5)), np.zeros((5, 3)))


def test_chunks_hold_64_kb_and_never_less_than_a_row() -> None:
    assert array_spec("a", "int8", (1000,), views=1, max_rows=10_000).chunk_rows == 65
    assert array_spec("a", "int8", (1000,), views=1, max_rows=7).chunk_rows == 7
    assert array_spec("a", "float32", (197, 1024), views=1, max_rows=7).chunk_rows == 1
    assert array_spec("a", "uint8", (), views=None, max_rows=0).chunk_rows == 1


def test_no_rows_make_no_shard_file_and_read_as_none(tmp_path: Path) -> None:
    spec = array_spec("a", "float16", (4,), views=3, max_rows=0)
    assert write_array(tmp_path / "g", spec, np.zeros((3, 0, 4), np.float16)).keys() == {"a/zarr.json"}
    assert reader_of(tmp_path, spec, 0).read(2, []).shape == (0, 4)
    assert not (tmp_path / "g" / spec.shard_path).exists()


class CountingStore(LocalStore):
    """Counts ranged reads."""

    reads = 0

    def get_range(self, path: str, offset: int, size: int) -> bytes:
        self.reads += 1
        return super().get_range(path, offset, size)


def test_neighbouring_chunks_are_one_read_and_rows_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(array_spec("a", "int32", (3,), views=1, max_rows=40), chunk_rows=4)
    values = make_values(spec, 40)
    write_array(tmp_path / "g", spec, values)
    store = CountingStore(tmp_path)
    reader = ArrayReader(store, "g", spec, 40, shard_size=(tmp_path / "g" / spec.shard_path).stat().st_size)
    store.reads = 0
    assert np.array_equal(reader.read(0, range(40)), values[0])
    assert store.reads == 1
    scattered = [39, 0, 5, 39, 6, 20, 0]
    store.reads = 0
    assert np.array_equal(reader.read(0, scattered), values[0][scattered])
    assert store.reads == 3  # chunks 0 and 1 together, 5, 9
    monkeypatch.setattr("kdcache.arrays.READ_BYTES", int(reader._index[:4, 1].sum()))
    store.reads = 0
    assert np.array_equal(reader.read(0, range(40)), values[0])
    assert store.reads >= 3  # ten chunks, about four a read
    with pytest.raises(IndexError):
        reader.read(0, [40])
    with pytest.raises(IndexError):
        reader.read(1, [0])


@pytest.mark.parametrize("views", [None, 2])
def test_no_flipped_byte_is_read_as_a_value(tmp_path: Path, views: int | None) -> None:
    spec = replace(array_spec("a", "int16", (3,), views=views, max_rows=9), chunk_rows=4)
    values = make_values(spec, 9)
    write_array(tmp_path / "g", spec, values)
    file = tmp_path / "g" / spec.shard_path
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        with pytest.raises(CorruptError, match=spec.shard_path):
            read_all(tmp_path, spec, 9)
    file.write_bytes(good)
    assert np.array_equal(read_all(tmp_path, spec, 9).reshape(values.shape), values)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    spec = replace(array_spec("a", "int16", (3,), views=1, max_rows=9), chunk_rows=4)
    write_array(tmp_path / "g", spec, make_values(spec, 9))
    file = tmp_path / "g" / spec.shard_path
    good = file.read_bytes()
    for size in range(len(good)):
        file.write_bytes(good[:size])
        for believed in (len(good), size):
            with pytest.raises(CorruptError):
                reader_of(tmp_path, spec, 9, shard_size=believed).read(0, range(9))
    file.unlink()
    with pytest.raises(MissingError, match="kdcache verify"):
        reader_of(tmp_path, spec, 9, shard_size=len(good))


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def test_an_absent_chunk_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    spec = replace(array_spec("a", "int32", (2,), views=1, max_rows=6), chunk_rows=3)
    array = zarr.create_array(
        str(tmp_path / "g" / "a"),
        shape=(1, 6, 2),
        dtype="int32",
        shards=(1, 6, 2),
        chunks=(1, 3, 2),
        compressors=[BloscCodec(typesize=4, cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=0,
    )
    array[:, :3] = 7
    with pytest.raises(CorruptError, match="a chunk is absent; expected all 2"):
        reader_of(tmp_path, spec, 6)


@pytest.mark.parametrize("entry", [(2**64 - 21, 21), (2**63, 40), (0, 2**63), (10**6, 40), (0, 3)])
def test_a_hostile_index_is_refused(tmp_path: Path, entry: tuple[int, int]) -> None:
    spec = array_spec("a", "int32", (2,), views=1, max_rows=3)
    write_array(tmp_path / "g", spec, make_values(spec, 3))
    file = tmp_path / "g" / spec.shard_path
    index = np.array(entry, dtype="<u8").tobytes()
    file.write_bytes(file.read_bytes()[:-20] + index + crc(index))
    with pytest.raises(CorruptError, match="shard index points outside"):
        reader_of(tmp_path, spec, 3)


@pytest.mark.parametrize("field", [4, 8, 12, 16])
def test_a_hostile_chunk_with_a_valid_checksum_is_refused(tmp_path: Path, field: int) -> None:
    """The sizes of the Blosc header, and its first block offset, which the checksum's author may have set to anything."""
    spec = array_spec("a", "uint8", (5000,), views=1, max_rows=1)
    rng = np.random.default_rng(0)
    write_array(tmp_path / "g", spec, (rng.integers(0, 3, (1, 1, 5000))).astype(np.uint8))
    file = tmp_path / "g" / spec.shard_path
    data = bytearray(file.read_bytes())
    chunk = data[:-24]
    chunk[field : field + 4] = (2**31 - 1).to_bytes(4, "little")
    file.write_bytes(bytes(chunk) + crc(bytes(chunk)) + bytes(data[-20:]))
    with pytest.raises(CorruptError, match="chunk 0"):
        reader_of(tmp_path, spec, 1).read(0, [0])


def test_encoded_chunks_do_not_depend_on_blosc_threads() -> None:
    spec = array_spec("a", "float32", (197, 64), views=1, max_rows=1)
    values = np.random.default_rng(0).normal(size=(1, 197, 64)).astype(np.float32)
    assert numcodecs.blosc.use_threads is False
    assert encode_chunk(spec, values) == encode_chunk(spec, values.copy(order="F"))


def test_a_writer_never_overwrites(tmp_path: Path) -> None:
    spec = array_spec("a", "int32", (), views=None, max_rows=3)
    write_array(tmp_path, spec, np.arange(3, dtype=np.int32))
    with pytest.raises(StoreError, match="can't be created"):
        write_array(tmp_path, spec, np.arange(3, dtype=np.int32))
    assert os.listdir(tmp_path) == ["a"]


def test_the_cache_of_readers_is_bounded_in_bytes() -> None:
    cache: ByteLRU[int, bytes] = ByteLRU(100)
    made: list[int] = []

    def get(key: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return bytes(40)

        return cache.get_or(key, make, len)

    for key in (1, 2, 1, 3, 1, 2):
        get(key)
    assert made == [1, 2, 3, 2]
