"""Tar shards: from a tar's headers to its samples. Which tars there are, `sources` finds; first step of both stages.

A sample is the run of members that share a WebDataset key. Counts, offsets and sizes come from the tar headers, never from
a guess; the member-table digest notices a shard that was replaced. Image bytes are later read by offset, in any order.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from stat import S_ISDIR, S_ISREG
from typing import IO, Any

import numpy as np

from .errors import ShardError
from .format import ViewsIdentity
from .images import IMAGE_EXTENSIONS
from .plan import blake2b_128, canonical_json

_LABEL_EXTENSIONS = ("cls", "json")
_READ_EXTENSIONS = {*IMAGE_EXTENSIONS, *_LABEL_EXTENSIONS}
_DEFAULT_LABEL_KEY = "label"
_MAX_LABEL_BYTES = 1 << 20
_META_MEMBER = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset skips: its `skip_meta`."""
_CLS = re.compile(rb"\s*([0-9]{1,20})\s*")
"""A label as .cls members write it; Python's int() would take 1_0, +4 and other scripts' digits too."""
_HEADER_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError, IndexError, KeyError)
"""What tarfile raises on damage; MemoryError for a long name or PAX header that is said to have terabytes, RecursionError for headers of headers."""
NOT_UTF8 = "name is not UTF-8"
"""The problem of a sample whose members' names are bytes that are no text."""
NO_LABEL = -1
MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class ShardSource:
    """Where a shard lies. `name` (base name without .tar) is its identity in a dataset, `path` may change."""

    name: str
    path: str
    label_key: str | None = None
    """Where labels stand in .json members, parts of nested objects joined by dots. None: .cls, else `label` of .json."""
    num_samples: int | None = None
    """Samples that a list of the shards says it holds, if one does."""


@dataclass(frozen=True)
class Sample:
    """One sample of a tar, from its headers. `problem` says why it can have no row, or is None."""

    key: str
    """webdataset's `__key__`; of a name that is not UTF-8, with backslash escapes for the bytes that are no text."""
    image_offset: int
    image_size: int
    label: int
    problem: str | None


@dataclass(frozen=True)
class ShardIndex:
    """What a tar holds, in tar order."""

    source: ShardSource
    samples: tuple[Sample, ...]
    member_table: str
    """BLAKE2b-128 of the canonical JSON of {"members": [[name, data offset, size], …], "labels": [label of each sample]}."""
    size: int
    mtime_ns: int
    cut: str | None
    """How the tar ends too early, or None: ASCII, in words of ours alone, since it is part of an identity.

    Whole samples before the cut are here; one that may have lost a member to it is not."""


def digest_of_images(crcs: Sequence[np.ndarray[Any, np.dtype[np.uint32]]]) -> str:
    """BLAKE2b-128 of the rows' image bytes, each by its crc32c as little-endian uint32, in row order: provenance of a views record.

    With it verify tells an image that was changed under an unchanged member table from a decoder that was. crc32c costs a fiftieth of decoding.
    """
    return blake2b_128(b"".join(np.ascontiguousarray(block, dtype="<u4").tobytes() for block in crcs))


def printable(text: str) -> str:
    """`text` with backslash escapes for the bytes of a file name that are not UTF-8, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def split_member(name: str) -> tuple[str, str] | None:
    """(sample key, lower-case extension) of a tar member by webdataset's rules, or None for one that it skips."""
    from webdataset.tariterators import base_plus_ext  # imports torch, 3 s: not at start-up

    key, extension = base_plus_ext(name)
    return None if key is None or _META_MEMBER.match(name) else (key, extension.lower())


def scan_shard(source: ShardSource) -> ShardIndex:
    """Read a tar's headers (and its label members).

    Raises ShardError for a file that is no tar, a key that appears twice (both members are named), a label that is not
    a whole number from 0 or not where `source.label_key` says, or another number of samples than `source` expects. A tar that ends
    too early keeps its whole samples, with `cut` saying where. Nothing is ever extracted: names are text here, never paths.
    """
    try:
        stat = os.stat(source.path)
        if not S_ISREG(stat.st_mode) and not S_ISDIR(stat.st_mode):
            raise ShardError(f"shard {source.name}: {source.path} is no file; expected a WebDataset shard")
        file: IO[bytes] = open(source.path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise ShardError(f"shard {source.name}: {source.path} can't be read: {error.strerror}") from error
    with file:
        members, cut, torn = _members(source, file, stat.st_size)
        samples = _group_samples(source, file, members, is_cut=cut is not None, torn=torn)
    if cut is None and source.num_samples not in (None, len(samples)):
        raise ShardError(
            f"shard {source.name}: {source.path} holds {len(samples)} samples, its _info.json says {source.num_samples}; fetch the tar again, or"
            f" correct the file"
        )
    places = [[member.name, member.offset_data, member.size] for member in members if member.isreg()]
    table = blake2b_128(canonical_json({"members": places, "labels": [sample.label for sample in samples]}))
    return ShardIndex(source=source, samples=samples, member_table=table, size=stat.st_size, mtime_ns=stat.st_mtime_ns, cut=cut)


def check_same_tar(index: ShardIndex, known: ViewsIdentity) -> None:
    """Raise ShardError if the tar is not the one that the cache was made from."""
    if index.member_table != known.member_table:
        raise ShardError(
            f"shard {index.source.name}: {index.source.path} was changed: expected member table {known.member_table} with {known.samples} samples,"
            f" found {index.member_table} with {len(index.samples)}; restore the tar, or make a new cache for the new data"
        )


def _members(source: ShardSource, file: IO[bytes], size: int) -> tuple[list[tarfile.TarInfo], str | None, str | None]:
    """Members that lie wholly in the file, folders aside, how the tar is cut short, and the name of the member that lies across the cut."""
    members: list[tarfile.TarInfo] = []
    if size == 0:
        return members, "empty file, expected a tar", None
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - closed below
    except _HEADER_ERRORS as error:
        raise ShardError(f"shard {source.name}: {source.path} is not an uncompressed tar: {error}; expected a WebDataset shard") from error
    cut: str | None = None
    torn: str | None = None
    before = -1
    with tar:
        while True:
            try:
                member = tar.next()
            except _HEADER_ERRORS:
                cut = f"header at byte {tar.offset} of {size} can't be read"
                break
            if member is None:
                break
            if member.size < 0 or tar.offset <= before:  # a header that leads back would be read for ever
                cut = f"header at byte {member.offset} of {size} can't be read"
                break
            before = tar.offset
            end = member.offset_data + member.size
            if member.issparse():
                raise ShardError(
                    f"shard {source.name}: member {printable(member.name)!r} is a sparse file; expected plain members, write the shard again"
                )
            if not member.isreg():
                if not member.isdir():
                    members.append(member)  # a link or a device: seen, so that what it stands for is not lost without a word
            else:
                if end > size:
                    cut = f"member {member.name!a} ends at byte {end}, the file has {size}"
                    torn = member.name
                    break
                members.append(member)
            tar.members = []  # type: ignore[attr-defined]  # headers are not kept twice
    if cut is None:  # tarfile stops without a word at a damaged header; only a block of zeros is an end
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            cut = f"no end-of-archive block at byte {tar.offset} of {size}"
    return members, cut, torn


def _group_samples(source: ShardSource, file: IO[bytes], members: Sequence[tarfile.TarInfo], *, is_cut: bool, torn: str | None) -> tuple[Sample, ...]:
    grouped: dict[str, dict[str, tarfile.TarInfo]] = {}
    last_key: str | None = None
    for member in members:
        split = split_member(member.name)
        if split is None:
            continue
        raw_key, extension = split
        key = printable(raw_key)
        if not member.isreg() and (extension not in _READ_EXTENSIONS or (key in grouped and (key != last_key or extension in grouped[key]))):
            continue  # webdataset passes over it, and nothing is lost with it
        if key in grouped and (key != last_key or extension in grouped[key]):
            first = grouped[key].get(extension) or next(iter(grouped[key].values()))
            raise ShardError(
                f"shard {source.name}: key {key!r} appears twice: member {printable(first.name)!r} at byte {first.offset} and member"
                f" {printable(member.name)!r} at byte {member.offset}; expected the members of a sample next to each other and every key"
                f" once; write the shard again, for example with 'kdcache pack'"
            )
        grouped.setdefault(key, {})[extension] = member
        last_key = key
    if is_cut and grouped and not _last_is_whole(grouped, torn):
        grouped.popitem()
    return tuple(_sample(source, file, key, group) for key, group in grouped.items())


def _last_is_whole(grouped: dict[str, dict[str, tarfile.TarInfo]], torn: str | None) -> bool:
    """Whether the sample before a cut lost no member to it, such as its label: another sample was torn, or it looks like the one before."""
    if torn is not None:
        split = split_member(torn)
        return split is None or printable(split[0]) != next(reversed(grouped))
    extensions = [group.keys() for group in grouped.values()][-2:]
    return len(extensions) == 2 and extensions[0] == extensions[1]


def _sample(source: ShardSource, file: IO[bytes], key: str, group: dict[str, tarfile.TarInfo]) -> Sample:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in group]
    for member in group.values():
        if not member.isreg():
            kind = "a hard link" if member.islnk() else "a symbolic link" if member.issym() else "a device or a pipe"
            return Sample(key, 0, 0, NO_LABEL, f"expected plain files, found {kind}")
    label = _label(source, file, key, group)
    if any(printable(member.name) != member.name for member in group.values()):
        return Sample(key, 0, 0, label, NOT_UTF8)
    if len(images) != 1:
        found = ", ".join(sorted(group)) if not images else " and ".join(images)
        return Sample(key, 0, 0, label, f"expected one image member ({', '.join(IMAGE_EXTENSIONS)}), found {found}")
    member = group[images[0]]
    return Sample(key, member.offset_data, member.size, label, None)


def _label(source: ShardSource, file: IO[bytes], key: str, group: dict[str, tarfile.TarInfo]) -> int:
    found = [name for name in _LABEL_EXTENSIONS if name in group]
    if not found:
        return NO_LABEL
    where = f"shard {source.name}: key {key!r}"
    extension = found[0] if source.label_key is None else "json"
    if extension not in group:
        raise ShardError(f"{where}: expected a label at {source.label_key!r} of a .json member, found only .cls; leave --label-key out to read it")
    member = group[extension]
    name = printable(member.name)
    if member.size > _MAX_LABEL_BYTES:
        raise ShardError(f"{where}: {name} has {member.size} bytes, expected a label of at most {_MAX_LABEL_BYTES}")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if extension == "cls":
        digits = _CLS.fullmatch(data)
        if digits is None:
            raise ShardError(f"{where}: {name} holds {data[:40]!r}, expected a label in plain digits, such as 7")
        value: Any = int(digits[1])
    else:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{where}: {name} holds {data[:40]!r}, expected a label") from error
        try:
            value = _look_up(body, _DEFAULT_LABEL_KEY if source.label_key is None else source.label_key)
        except KeyError as error:
            if source.label_key is not None:
                known = ", ".join(sorted(body)[:8]) if isinstance(body, dict) else "none"
                raise ShardError(f"{where}: {name} has no {source.label_key!r}, its keys are: {known}; pass one of them as --label-key") from error
            value = None
        if value is None or (value == NO_LABEL and not isinstance(value, bool | float)):  # timm, too, reads -1 as none
            return NO_LABEL
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LABEL:
        raise ShardError(f"{where}: label {value!r} in {name}, expected a whole number from 0 to {MAX_LABEL}")
    return value


def _look_up(body: Any, key: str) -> Any:
    """The value under a key as it stands, else under its parts between dots. Raises KeyError."""
    if isinstance(body, dict) and key in body:
        return body[key]
    for part in key.split("."):
        if not isinstance(body, dict):
            raise KeyError(part)
        body = body[part]
    return body


RUN_BYTES = 512 * 1024
"""Neighbours are read together up to this size, as chunks of targets are."""
_TOUCH_BYTES = 1 << 20


def runs_of(offsets: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any], *, gap: int, limit: int = RUN_BYTES) -> list[tuple[int, int]]:
    """First and last place of each run of (offset, size), ascending, that lie no further than `gap` apart and hold at most `limit` bytes, or are one."""
    starts, stops = offsets.tolist(), (offsets + sizes).tolist()
    runs: list[tuple[int, int]] = []
    for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if runs:
            first, last = runs[-1]
            if 0 <= start - stops[last] <= gap and stop - starts[first] <= limit:
                runs[-1] = (first, place)
                continue
        runs.append((place, place))
    return runs


class ShardFiles:
    """Reads image bytes by offset from tars, with the last few files kept open. One per process."""

    reads_runs = True
    """Whether any span of a tar can be asked for."""

    def __init__(self, capacity: int = 16) -> None:
        """capacity: files kept open."""
        self._capacity = capacity
        self._files: dict[str, int] = {}

    def close(self) -> None:
        """Close the files; they are opened again when asked for."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def read(self, source: ShardSource, key: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`. Raises ShardError naming the shard and key."""
        try:
            descriptor = self._open(source.path)
            there = os.fstat(descriptor).st_size - offset  # what is asked for is allocated first
            data = os.pread(descriptor, size, offset) if 0 <= size <= there and offset >= 0 else b""
        except OSError as error:
            raise ShardError(
                f"shard {source.name}: key {key!r}: {source.path} can't be read: {error.strerror}; pass --data with SHARDS where the tars lie now"
            ) from error
        if len(data) != size:
            raise ShardError(
                f"shard {source.name}: key {key!r}: expected {size} bytes at {offset} of {source.path}, found {len(data)}; the tar was changed"
            )
        return data

    def touch(self, source: ShardSource, start: int, stop: int) -> None:
        """Read a span and drop it: whoever reads of it next finds it in the page cache. What is not there is left to whoever needs it. Raises ShardError."""
        try:
            descriptor = self._open(source.path)
            scratch = bytearray(max(0, min(_TOUCH_BYTES, stop - start)))
            while start < stop and (count := os.preadv(descriptor, [memoryview(scratch)[: stop - start]], start)):
                start += count
        except OSError as error:
            raise ShardError(
                f"shard {source.name}: {source.path} can't be read: {error.strerror}; pass --data with SHARDS where the tars lie now"
            ) from error

    def _open(self, path: str) -> int:
        descriptor = self._files.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for who writes
        self._files[path] = descriptor  # most recent last
        if len(self._files) > self._capacity:
            os.close(self._files.pop(next(iter(self._files))))
        return descriptor
