"""SHARDS: from what the user typed to a list of tars. The first step of both stages; what is in a tar, `shards` reads.

    a tar                      train-0000.tar
    a folder of tars           FOLDER, or FOLDER:SPLIT for a split of timm's `_info.json` in it
    a brace expression         'train-{0000..1023}.tar'
    a glob                     'data/*/train-*.tar', ** for any depth
    a list file                one of the above a line, relative to the file's folder; blank lines and lines from # on are passed over
    several of these           'a.tar::b-{00..07}.tar', webdataset's way

The order is the one written: of the parts, of a brace expression, of a list's lines, of the files in an `_info.json`; what a
folder or a glob gives is sorted by name, character by character. Dataset code may rely on it: it decides which shards are the first N.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from .console import counted
from .errors import UsageError
from .paths import name_on_disk
from .shards import ShardSource, printable

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_INFO_NAMES = ("_info.json", "info.json")
"""Where timm's ReaderWds looks for the splits of a folder (timm 1.0.31, data/readers/reader_wds.py)."""
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\}")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:")
_MAX_LIST_BYTES = 64 << 20
_MAX_SHARDS = 1_000_000
_TRAINING_WORDS = {"train", "training"}
_HELD_OUT_WORDS = {"val", "valid", "validation", "test", "testing", "dev", "eval"}


@dataclass(frozen=True)
class _Look:
    """How SHARDS is read."""

    every_split: bool = False
    """Whether a folder gives all its tars, whatever its splits."""
    gone: frozenset[str] = frozenset()
    """Absolute paths of tars that are taken as there."""
    in_list: bool = False

    def has_tar(self, path: str) -> bool:
        return os.path.isfile(path) or os.path.abspath(path) in self.gone

    @cached_property
    def _gone_folders(self) -> frozenset[str]:
        return frozenset(map(os.path.dirname, self.gone))

    def has_folder(self, path: str) -> bool:
        return os.path.isdir(path) or os.path.abspath(path) in self._gone_folders

    def has(self, path: str) -> bool:
        return os.path.exists(path) or self.has_tar(path) or self.has_folder(path)

    def gone_in(self, folder: str) -> list[str]:
        """The tars that are gone from a folder."""
        path = os.path.abspath(folder)
        return [tar for tar in self.gone if os.path.dirname(tar) == path]


def resolve_shards(spec: Shards, *, label_key: str | None = None, gone: Iterable[str] = ()) -> list[ShardSource]:
    """The shards that SHARDS names, in its order, with their labels read from `label_key` of .json members (None: as the split says, or the default).

    gone: absolute paths of tars that are taken as still there, for a cache that does without them.
    Raises UsageError for a part that names nothing, a listed tar that is missing, a folder of several splits when none is named, and two
    shards that share a name, also in another case: names are identities, and file names on some disks do not tell case.
    """
    sources = _expand_all(spec, _Look(gone=frozenset(gone)))
    if not sources:
        raise UsageError(
            f"no shards: {_parts(spec)} names no .tar file; expected a folder of tars or a brace expression such as 'train-{{0000..0007}}.tar'"
        )
    check_names(sources)
    return sources if label_key is None else [replace(source, label_key=label_key) for source in sources]


def locate_shards(spec: Shards) -> dict[str, ShardSource]:
    """Shard name → where it lies now, of all tars that SHARDS names: for a cache that has its own list of names and labels.

    A folder gives all its tars, whatever its splits. Raises UsageError for a part that names nothing and for two tars of one name.
    """
    sources = _expand_all(spec, _Look(every_split=True))
    check_names(sources)
    return {source.name: ShardSource(source.name, source.path) for source in sources}


def check_names(sources: Iterable[ShardSource], known: Iterable[str] = ()) -> None:
    """Raise UsageError for two shards of one name, or of names that are one on a disk that does not tell case. known: names that a cache has."""
    seen: dict[str, str] = {}
    on_disk = {name_on_disk(name).casefold(): name for name in known}
    for source in sources:
        if source.name in seen:
            if seen[source.name] == source.path:
                raise UsageError(f"shard {source.path} is named twice; name it once")
            raise UsageError(f"two shards are called {source.name!r}: {seen[source.name]} and {source.path}; rename one, names are identities")
        seen[source.name] = source.path
        other = on_disk.setdefault(name_on_disk(source.name).casefold(), source.name)
        if other != source.name:
            raise UsageError(
                f"shards {other!r} and {source.name!r} differ in case only, and a cache of both could not lie on a disk that does not tell case;"
                f" rename one"
            )


def default_dataset_id(sources: Sequence[ShardSource]) -> str:
    """The shards' common name: their longest common prefix without trailing digits and separators."""
    prefix = os.path.commonprefix([source.name for source in sources])  # noqa: RUF071 - of names, character by character
    return prefix.rstrip("0123456789").rstrip("-_. ") or prefix or "dataset"


# --- parts -----------------------------------------------------------------------------------------------------------


def _parts(spec: Shards) -> list[str]:
    return [os.fspath(spec)] if isinstance(spec, str | os.PathLike) else [os.fspath(item) for item in spec]


def _expand_all(spec: Shards, look: _Look) -> list[ShardSource]:
    return [source for text in _parts(spec) for source in _expand(text, "", look)]


def _expand(text: str, base: str, look: _Look) -> Iterator[ShardSource]:
    """The shards that one text names, relative to the folder `base`. Raises UsageError."""
    if "\0" in text:
        raise UsageError(f"shards {text!r}: a name can't hold a zero byte")
    text = os.path.expanduser(text.removeprefix("file://"))
    if "::" in text and not look.has(os.path.join(base, text)):
        for part in text.split("::"):
            yield from _expand(part, base, look)
        return
    if _ELSEWHERE.match(text):
        raise UsageError(f"shards {text!r}: only local files and folders can be read so far")
    whole = os.path.join(base, text)
    folder, colon, split = whole.rpartition(":")
    if not text:
        raise UsageError("an empty name names no shards; expected a folder of tars or a brace expression such as 'train-{0000..0007}.tar'")
    if look.has(whole):
        yield from _existing(whole, look)
    elif colon and os.path.isdir(folder):
        yield from _folder(folder, split, look)
    else:
        yield from _expression(text, base, look)


def _expression(text: str, base: str, look: _Look) -> Iterator[ShardSource]:
    """A brace expression, of globs or of names that are all there."""
    names = _brace_names(text)
    missing = [name for name in names if not glob.has_magic(name) and not look.has(os.path.join(base, name))]
    if names == [text] and missing:
        near = _near_name(missing[0], base)
        raise UsageError(f"shards {text!r}: no file or folder {os.path.join(base, text)}{near}; expected a tar, a folder of tars or a list file")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"shards {text!r}: no file {os.path.join(base, missing[0])}{more}; expected {len(names)} tar files")
    for name in names:
        if look.has(os.path.join(base, name)):
            yield from _existing(os.path.join(base, name), look)
        else:
            yield from _glob(name, base, look)


def _near_name(name: str, base: str) -> str:
    """A hint at what lies in the same folder under nearly the same name, or nothing."""
    folder, _, last = os.path.join(base, name).rstrip("/").rpartition("/")
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(last, sorted({*os.listdir(folder or ".")} - {last}), n=1)  # itself: a link to nothing
        if near:
            return f"; did you mean {printable(os.path.join(folder, near[0]))!r}?"
    return ""


def _brace_names(text: str) -> list[str]:
    """What a brace expression gives. Raises UsageError for braces that are not balanced, or give more names than anybody has shards."""
    import braceexpand

    too_many = UsageError(f"shards {text!r}: its braces give more than {_MAX_SHARDS:,} names; expected fewer shards")
    for first, last, step in _RANGE.findall(text):  # braceexpand makes a list of each before it gives the first name
        if abs(int(last) - int(first)) // max(1, abs(int(step or 1))) >= _MAX_SHARDS:
            raise too_many
    try:
        names = list(islice(braceexpand.braceexpand(text), _MAX_SHARDS + 1))
    except (ValueError, RecursionError) as error:  # braceexpand's UnbalancedBracesError; thousands of braces in each other
        raise UsageError(f"shards {text!r}: its braces are not balanced; expected a brace expression such as 'train-{{0000..0007}}.tar'") from error
    if len(names) > _MAX_SHARDS:
        raise too_many
    return names


def _glob(pattern: str, base: str, look: _Look) -> Iterator[ShardSource]:
    """The .tar files that match, sorted."""
    names = glob.iglob(pattern, root_dir=base or None, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = sorted(os.path.join(base, name) for name in names)
    tars = [path for path in found if path.endswith(".tar") and not os.path.isdir(path)]
    if look.gone:
        parts = os.path.abspath(os.path.join(base, pattern)).split("/")
        tars = sorted({*map(os.path.abspath, tars), *(path for path in look.gone if _matches(parts, path.split("/")))})
    if not tars:
        what = f"it matches {len(found)} names, {found[0]} first, of which none is a .tar file" if found else "no file matches"
        raise UsageError(f"shards {os.path.join(base, pattern)!r}: {what}; expected a glob of tars such as 'train-*.tar'")
    yield from (_source(path) for path in tars)


def _matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a glob would find a path if it were there: ** is any depth, nothing else crosses a slash, and hidden names are passed over."""
    if not pattern or not path:
        return pattern in ([], ["**"]) and not path
    is_hidden = path[0].startswith(".")
    if pattern[0] == "**":
        return _matches(pattern[1:], path) or (not is_hidden and _matches(pattern, path[1:]))
    return fnmatchcase(path[0], pattern[0]) and (not is_hidden or pattern[0].startswith(".")) and _matches(pattern[1:], path[1:])


def _existing(path: str, look: _Look) -> Iterator[ShardSource]:
    """A tar, a folder or a list file."""
    if look.has_folder(path):
        yield from _folder(path, None, look)
    elif not look.has_tar(path):
        raise UsageError(f"shards {printable(path)!r}: neither a file nor a folder")
    elif not os.path.exists(path) or path.endswith(".tar") or _begins_as_tar(path):
        yield _source(path)
    elif look.in_list:
        raise UsageError(f"shards {path!r}: no tar, and a list file can't name another one; expected tars")
    else:
        yield from _list_file(path, look)


def _source(path: str, *, label_key: str | None = None, num_samples: int | None = None) -> ShardSource:
    """Raises UsageError for a file whose name can be no identity."""
    name = os.path.basename(path).removesuffix(".tar")
    if not name:
        raise UsageError(f"shard {path!r} has no name before .tar, and a shard's name is its identity; rename the file")
    if printable(name) != name:
        raise UsageError(f"shard {printable(path)!r}: its name is not UTF-8, and a shard's name is its identity; rename the file")
    return ShardSource(name=name, path=os.path.abspath(path), label_key=label_key, num_samples=num_samples)


# --- list files ------------------------------------------------------------------------------------------------------


def _begins_as_tar(path: str) -> bool:
    """Whether a file without .tar at its end is one all the same: POSIX and GNU tars say so at byte 257."""
    with _opened(path) as file:
        begin: bytes = file.read(262)
    return begin[257:] == b"ustar"


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"shards {path!r} can't be read: {error.strerror}") from error


def _list_file(path: str, look: _Look) -> Iterator[ShardSource]:
    with _opened(path) as file:
        data = file.read(_MAX_LIST_BYTES + 1)
    try:
        if len(data) > _MAX_LIST_BYTES or b"\0" in data:
            raise ValueError
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise UsageError(
            f"shards {path!r}: neither a tar nor a list file; expected UTF-8 text with a path, brace expression or glob a line"
        ) from error
    empty = True
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        empty = False
        try:
            yield from _expand(entry, os.path.dirname(path), replace(look, in_list=True))
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
    if empty:
        raise UsageError(f"{path} names no shards; expected a path, brace expression or glob a line")


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(folder: str, split: str | None, look: _Look) -> Iterator[ShardSource]:
    """The tars in a folder, or those of a split of its `_info.json`. Sub-folders are not looked into."""
    splits = _read_splits(folder)
    if split is not None and splits is None:
        raise UsageError(
            f"shards '{folder}:{split}': no _info.json in {folder}, hence no split {split!r}; name its tars by a glob such as '{split}-*.tar'"
        )
    if splits is not None and not (look.every_split and split is None):
        yield from _split(folder, _choose_split(folder, split, splits), splits, look)
        return
    by_name = {os.path.basename(path): path for path in [*look.gone_in(folder), *(_tars_in(folder) if os.path.isdir(folder) else [])]}
    tars = [path for _, path in sorted(by_name.items())]
    if look.every_split:
        listed = [os.path.normpath(path) for name, body in (splits or {}).items() for path in _listed(folder, name, body)[0]]
        tars = list(dict.fromkeys([*tars, *(path for path in listed if os.path.isfile(path))]))
    else:
        _refuse_mixture(folder, tars)
    if not tars:
        _refuse_empty(folder)
    yield from (_source(path) for path in tars)


def _tars_in(folder: str) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())  # a link to nothing is told when its turn comes
    except OSError as error:
        raise UsageError(f"shards {folder!r} can't be read: {error.strerror}") from error
    # hidden files are what a copy leaves that is not finished, or macOS beside each file
    return [os.path.normpath(os.path.join(folder, name)) for name in names if name.endswith(".tar") and not name.startswith(".")]


def _refuse_empty(folder: str) -> None:
    below = sorted({path.parent.name for path in Path(folder).glob("*/*.tar")})
    hint = f"sub-folders hold some ({', '.join(below[:5])}): name one of them, or all as '{os.path.join(folder, '*', '*.tar')}'" if below else ""
    raise UsageError(f"no shards: {folder!r} holds no .tar file; {hint or 'expected a folder of tars'}")


def _refuse_mixture(folder: str, tars: Sequence[str]) -> None:
    """Raise UsageError for training and held-out shards in one folder: a cache of both would train students on the held-out images."""
    training: list[str] = []
    held_out: list[str] = []
    for path in tars:
        words = set(re.split(r"[^a-z]+", os.path.basename(path).lower()))
        (training if words & _TRAINING_WORDS else held_out if words & _HELD_OUT_WORDS else []).append(os.path.basename(path))
    if training and held_out:
        raise UsageError(
            f"shards {folder!r}: the folder holds training and held-out shards, {len(training)} as {training[0]} and {len(held_out)} as {held_out[0]};"
            f" say which, for example '{os.path.join(folder, _series(training))}', or '{os.path.join(folder, '*.tar')}' for all"
        )


def _series(names: Sequence[str]) -> str:
    """A glob of file names that are one series."""
    prefix = os.path.commonprefix([name.removesuffix(".tar") for name in names])  # noqa: RUF071 - of names, character by character
    return f"{prefix.rstrip('0123456789')}*.tar"


def _read_splits(folder: str) -> Mapping[str, Any] | None:
    """The splits of timm's `_info.json` in a folder, or None. Raises UsageError for one that is no such file."""
    for name in _INFO_NAMES:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        with _opened(path) as file:
            data = file.read(_MAX_LIST_BYTES)
        try:
            info = json.loads(data)
        except (ValueError, RecursionError) as error:
            info = error
        splits = info.get("splits") if isinstance(info, dict) else None
        if isinstance(splits, dict) and splits:
            return splits
        if name == _INFO_NAMES[0]:  # info.json is a name that others use too
            raise UsageError(f"{path}: expected an object with 'splits', as timm reads it, found {data[:40]!r}")
    return None


def _choose_split(folder: str, split: str | None, splits: Mapping[str, Any]) -> str:
    """The split that was named, or the only one. Raises UsageError that lists them: guessing could train on the validation images."""
    names = ", ".join(f"{name} ({_count(body)})" for name, body in splits.items())
    if split is None and len(splits) > 1:
        raise UsageError(
            f"shards {folder!r}: its _info.json has {len(splits)} splits: {names}; say which, for example '{folder}:{next(iter(splits))}'"
        )
    if split is not None and split not in splits:
        raise UsageError(f"shards '{folder}:{split}': its _info.json has no split {split!r}, it has: {names}")
    return next(iter(splits)) if split is None else split


def _count(body: Any) -> str:
    files = body.get("filenames") if isinstance(body, dict) else None
    return counted(len(files), "tar") if isinstance(files, list) else "no tars"


def _listed(folder: str, split: str, body: Any) -> tuple[list[str], list[int] | None]:
    """(paths, samples of each or None) of a split. Raises UsageError for one that timm could not read."""
    body = body if isinstance(body, dict) else {}
    files, lengths = body.get("filenames"), body.get("shard_lengths")
    if not isinstance(files, list) or not files or not all(isinstance(name, str) and name and "\0" not in name for name in files):
        raise UsageError(f"shards '{folder}:{split}': expected 'filenames' with at least one name in its _info.json")
    if lengths and not (
        isinstance(lengths, list) and len(lengths) == len(files) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in lengths)
    ):
        raise UsageError(
            f"shards '{folder}:{split}': expected as many whole numbers in 'shard_lengths' of its _info.json as it has filenames, {len(files)}"
        )
    return [os.path.join(folder, name) for name in files], lengths or None


def _split(folder: str, split: str, splits: Mapping[str, Any], look: _Look) -> Iterator[ShardSource]:
    paths, lengths = _listed(folder, split, splits[split])
    label_key = splits[split].get("alt_label") or None
    if label_key is not None and not isinstance(label_key, str):
        raise UsageError(f"shards '{folder}:{split}': expected a key of .json members as 'alt_label' in its _info.json, found {label_key!r}")
    missing = [path for path in paths if not look.has_tar(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"shards '{folder}:{split}': no file {missing[0]}{more}; its _info.json lists {len(paths)} tar files")
    for number, path in enumerate(paths):
        # with another label than .cls, timm leaves out samples that have none, and may count without them
        yield _source(path, label_key=label_key, num_samples=lengths[number] if lengths and label_key is None else None)
