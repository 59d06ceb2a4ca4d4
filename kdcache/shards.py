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
    """BLAKE2b-128 of the canonical JSON of [name, data offset, size] of each regular member."""
    size: int
    mtime_ns: int
    cut: str | None
    """How the tar ends too early, or None. Whole samples before the cut are here; one that may have lost a member to it is not."""


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

    paths = [text] if os.path.exists(text) else list(braceexpand.braceexpand(text))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"shards {text!r}: no file {missing[0]}{more}; expected {len(paths)} tar files")
    return paths


def _shard_name(path: str) -> str:
    return os.path.basename(path).removesuffix(".tar")


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
    table = blake2b_128(canonical_json([[member.name, member.offset_data, member.size] for member in members]))
    return ShardIndex(source=source, samples=samples, member_table=table, size=stat.st_size, mtime_ns=stat.st_mtime_ns, cut=cut)


def _members(source: ShardSource, file: IO[bytes], size: int) -> tuple[list[tarfile.TarInfo], str | None, str | None]:
    """Regular members that lie wholly in the file, how the tar is cut short, and the name of the member that lies across the cut."""
    members: list[tarfile.TarInfo] = []
    if size == 0:
        return members, "empty file, expected a tar", None
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise ShardError(f"shard {source.name}: {source.path} is not an uncompressed tar: {error}; expected a WebDataset shard") from error
    cut: str | None = None
    torn: str | None = None
    with tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:
                cut = f"header at byte {tar.offset} of {size} can't be read: {error}"
                break
            except (OSError, ValueError, OverflowError) as error:
                cut = f"header at byte {tar.offset} of {size} can't be read: {type(error).__name__}"
                break
            if member is None:
                break
            end = member.offset_data + member.size
            if member.issparse():
                raise ShardError(f"shard {source.name}: member {member.name!r} is a sparse file; expected plain members, write the shard again")
            if member.isreg():
                if end > size:
                    cut = f"member {member.name!r} ends at byte {end}, the file has {size}"
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
    from webdataset.tariterators import base_plus_ext  # imports torch, 3 s: not at start-up

    grouped: dict[str, dict[str, tarfile.TarInfo]] = {}
    last_key: str | None = None
    for member in members:
        key, extension = base_plus_ext(member.name)
        if key is None or _META_MEMBER.match(member.name):
            continue
        extension = extension.lower()
        if key in grouped and (key != last_key or extension in grouped[key]):
            first = grouped[key].get(extension) or next(iter(grouped[key].values()))
            raise ShardError(
                f"shard {source.name}: key {key!r} appears twice: member {first.name!r} at byte {first.offset} and member"
                f" {member.name!r} at byte {member.offset}; expected the members of a sample next to each other and every key"
                f" once; write the shard again, for example with 'kdcache pack'"
            )
        grouped.setdefault(key, {})[extension] = member
        last_key = key
    if is_cut and grouped and not _last_is_whole(grouped, torn):
        grouped.popitem()
    return tuple(_sample(source, file, key, group) for key, group in grouped.items())


def _last_is_whole(grouped: dict[str, dict[str, tarfile.TarInfo]], torn: str | None) -> bool:
    """Whether the sample before a cut lost no member to it, such as its label: another sample was torn, or it looks like the one before."""
    from webdataset.tariterators import base_plus_ext

    if torn is not None:
        return bool(base_plus_ext(torn)[0] != next(reversed(grouped)))
    extensions = [group.keys() for group in grouped.values()][-2:]
    return len(extensions) == 2 and extensions[0] == extensions[1]


def _sample(source: ShardSource, file: IO[bytes], key: str, group: dict[str, tarfile.TarInfo]) -> Sample:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in group]
    label = _label(source, file, key, group)
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
    if member.size > _MAX_LABEL_BYTES:
        raise ShardError(f"shard {source.name}: key {key!r}: {member.name} has {member.size} bytes, expected a label of at most {_MAX_LABEL_BYTES}")
    file.seek(member.offset_data)
    data = file.read(member.size)
    try:
        value = int(data) if extension == "cls" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"shard {source.name}: key {key!r}: {member.name} holds {data[:40]!r}, expected a label") from error
    if extension == "json":
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return NO_LABEL
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LABEL:
        raise ShardError(f"shard {source.name}: key {key!r}: label {value!r} in {member.name}, expected a whole number from 0 to {MAX_LABEL}")
    return value


class ShardFiles:
    """Reads image bytes by offset from tars, with the last few files kept open. One per process."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._files: dict[str, int] = {}

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
