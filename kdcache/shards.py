"""Tar shards: from what the user typed to a list of tars, and from a tar's headers to its samples. First step of both stages.

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
from pathlib import Path
from typing import IO

from .errors import ShardError, UsageError
from .images import IMAGE_EXTENSIONS
from .plan import blake2b_128, canonical_json

_LABEL_EXTENSIONS = ("cls", "json")
_MAX_LABEL_BYTES = 1 << 20
_META_MEMBER = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset skips: its `skip_meta`."""
_CLS = re.compile(rb"\s*([0-9]{1,20})\s*")
"""A label as .cls members write it; Python's int() would take 1_0, +4 and other scripts' digits too."""
NOT_UTF8 = "name is not UTF-8"
"""The problem of a sample whose members' names are bytes that are no text."""
NO_LABEL = -1
MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class ShardSource:
    """Where a shard lies. `name` (base name without .tar) is its identity in a dataset, `path` may change."""

    name: str
    path: str


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


def resolve_shards(spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[ShardSource]:
    """The shards that SHARDS names: a tar, a folder of tars, a brace expression of tars, or a list of these.

    Raises UsageError when nothing is found, a tar is missing, or two shards share a base name.
    """
    specs = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    paths: list[str] = []
    for item in specs:
        paths.extend(_expand(os.fspath(item)))
    if not paths:
        raise UsageError(f"no shards: {specs} names no .tar file; expected a folder of tars or a brace expression such as 'train-{{0000..0007}}.tar'")
    sources = [ShardSource(name=_shard_name(path), path=os.path.abspath(path)) for path in paths]
    seen: dict[str, str] = {}
    for source in sources:
        if source.name in seen:
            raise UsageError(f"two shards are called {source.name!r}: {seen[source.name]} and {source.path}; rename one, names are identities")
        seen[source.name] = source.path
    return sources


def _expand(text: str) -> list[str]:
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", text) and not text.startswith("file:"):
        raise UsageError(f"shards {text!r}: only local files and folders can be read so far")
    text = os.path.expanduser(text.removeprefix("file://"))
    if os.path.isdir(text):
        return sorted(str(path) for path in Path(text).iterdir() if path.suffix == ".tar")
    import braceexpand

    try:
        paths = [text] if os.path.exists(text) else list(braceexpand.braceexpand(text))
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise UsageError(f"shards {text!r}: its braces are not balanced; expected a brace expression such as 'train-{{0000..0007}}.tar'") from error
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"shards {text!r}: no file {missing[0]}{more}; expected {len(paths)} tar files")
    return paths


def _shard_name(path: str) -> str:
    """Raises UsageError for a file whose name can be no identity."""
    name = os.path.basename(path).removesuffix(".tar")
    if not name:
        raise UsageError(f"shard {path!r} has no name before .tar, and a shard's name is its identity; rename the file")
    if printable(name) != name:
        raise UsageError(f"shard {printable(path)!r}: its name is not UTF-8, and a shard's name is its identity; rename the file")
    return name


def printable(text: str) -> str:
    """`text` with backslash escapes for the bytes of a file name that are not UTF-8, which Python keeps as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def split_member(name: str) -> tuple[str, str] | None:
    """(sample key, lower-case extension) of a tar member by webdataset's rules, or None for one that it skips."""
    from webdataset.tariterators import base_plus_ext  # imports torch, 3 s: not at start-up

    key, extension = base_plus_ext(name)
    return None if key is None or _META_MEMBER.match(name) else (key, extension.lower())


def default_dataset_id(sources: Sequence[ShardSource]) -> str:
    """The shards' common name: their longest common prefix without trailing digits and separators."""
    prefix = os.path.commonprefix([source.name for source in sources])  # noqa: RUF071 - of names, character by character
    return prefix.rstrip("0123456789").rstrip("-_. ") or prefix or "dataset"


def scan_shard(source: ShardSource) -> ShardIndex:
    """Read a tar's headers (and its label members).

    Raises ShardError for a file that is no tar, a key that appears twice (both members are named), or a label that is not
    a whole number from 0. A tar that ends too early keeps its whole samples, with `cut` saying where.
    """
    try:
        stat = os.stat(source.path)
        file: IO[bytes] = open(source.path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise ShardError(f"shard {source.name}: {source.path} can't be read: {error.strerror}") from error
    with file:
        members, cut, torn = _members(source, file, stat.st_size)
        samples = _group_samples(source, file, members, is_cut=cut is not None, torn=torn)
    places = [[member.name, member.offset_data, member.size] for member in members]
    table = blake2b_128(canonical_json({"members": places, "labels": [sample.label for sample in samples]}))
    return ShardIndex(source=source, samples=samples, member_table=table, size=stat.st_size, mtime_ns=stat.st_mtime_ns, cut=cut)


def _members(source: ShardSource, file: IO[bytes], size: int) -> tuple[list[tarfile.TarInfo], str | None, str | None]:
    """Regular members that lie wholly in the file, how the tar is cut short, and the name of the member that lies across the cut."""
    members: list[tarfile.TarInfo] = []
    if size == 0:
        return members, "empty file, expected a tar", None
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise ShardError(f"shard {source.name}: {source.path} is not an uncompressed tar: {error}; expected a WebDataset shard") from error
    cut: str | None = None
    torn: str | None = None
    with tar:
        while True:
            try:
                member = tar.next()
            except (tarfile.TarError, OSError, ValueError, OverflowError):
                cut = f"header at byte {tar.offset} of {size} can't be read"
                break
            if member is None:
                break
            end = member.offset_data + member.size
            if member.issparse():
                raise ShardError(
                    f"shard {source.name}: member {printable(member.name)!r} is a sparse file; expected plain members, write the shard again"
                )
            if member.isreg():
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
    label = _label(source, file, key, group)
    if any(printable(member.name) != member.name for member in group.values()):
        return Sample(key, 0, 0, label, NOT_UTF8)
    if len(images) != 1:
        found = ", ".join(sorted(group)) if not images else " and ".join(images)
        return Sample(key, 0, 0, label, f"expected one image member ({', '.join(IMAGE_EXTENSIONS)}), found {found}")
    member = group[images[0]]
    return Sample(key, member.offset_data, member.size, label, None)


def _label(source: ShardSource, file: IO[bytes], key: str, group: dict[str, tarfile.TarInfo]) -> int:
    extension = next((name for name in _LABEL_EXTENSIONS if name in group), None)
    if extension is None:
        return NO_LABEL
    member = group[extension]
    name = printable(member.name)
    if member.size > _MAX_LABEL_BYTES:
        raise ShardError(f"shard {source.name}: key {key!r}: {name} has {member.size} bytes, expected a label of at most {_MAX_LABEL_BYTES}")
    file.seek(member.offset_data)
    data = file.read(member.size)
    digits = _CLS.fullmatch(data)
    if extension == "cls" and digits is None:
        raise ShardError(f"shard {source.name}: key {key!r}: {name} holds {data[:40]!r}, expected a label in plain digits, such as 7")
    try:
        value = int(digits[1]) if extension == "cls" and digits is not None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"shard {source.name}: key {key!r}: {name} holds {data[:40]!r}, expected a label") from error
    if extension == "json":
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return NO_LABEL
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LABEL:
        raise ShardError(f"shard {source.name}: key {key!r}: label {value!r} in {name}, expected a whole number from 0 to {MAX_LABEL}")
    return value


class ShardFiles:
    """Reads image bytes by offset from tars, with the last few files kept open. One per process."""

    def __init__(self, capacity: int = 16) -> None:
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
            descriptor = self._files.pop(source.path, None)
            if descriptor is None:
                descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[source.path] = descriptor  # most recent last
            if len(self._files) > self._capacity:
                os.close(self._files.pop(next(iter(self._files))))
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(
                f"shard {source.name}: key {key!r}: {source.path} can't be read: {error.strerror};"
                f" pass --data with the folder that holds the tars now"
            ) from error
        if len(data) != size:
            raise ShardError(
                f"shard {source.name}: key {key!r}: expected {size} bytes at {offset} of {source.path}, found {len(data)}; the tar was changed"
            )
        return data
