"""Open a cache for its page, sound or not, and say what state each shard is in: from records and the sizes of files, not their bytes.

A sound cache opens as for every reader. One that does not is read document by document; those that are damaged are listed and left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kdcache.cache import Cache
from kdcache.errors import CacheError, CorruptError, KDCacheError, MissingError, StoreError
from kdcache.format import Document
from kdcache.index import document_paths, read_document
from kdcache.opening import document_problems, open_cache
from kdcache.ownership import owned_files
from kdcache.paths import shard_of, teacher_of, teacher_path
from kdcache.sources import locate_shards
from kdcache.store import open_store

from ..facts import find_lacks

State = Literal["done", "skips", "cut", "unfinished", "missing", "damaged"]


@dataclass(frozen=True)
class ShardState:
    """One cell of the shard map."""

    name: str
    state: State
    rows: int
    detail: str
    """What is not as it should be; empty for a shard that is done."""


@dataclass
class PageCache:
    """A cache, and what is known of its soundness: from records and sizes at first, then from what the page reads."""

    cache: Cache
    bytes: int
    """Of every file in it."""
    problems: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Shard → what is wrong with it; '' for what belongs to none."""

    def add(self, text: str, shard: str) -> str:
        """Take note of something that is wrong, once; the text without this machine's paths."""
        text = self._plain(text)
        if text not in self.problems:
            self.problems.append(text)
        self.damaged.setdefault(shard, text)
        return text

    def tell(self, error: KDCacheError, shard: str) -> str:
        """The text of an error that came from reading; damage is noted, of a shard the first."""
        if isinstance(error, (CorruptError, MissingError, StoreError)) and shard not in self.damaged:
            return self.add(str(error), shard)
        return self._plain(str(error))

    def _plain(self, text: str) -> str:
        url = self.cache.store.url
        return text.replace(f"{url}/", "").replace(f"{url}: ", "").replace(url, "the cache")

    def states(self) -> list[ShardState]:
        """The state of each shard, by what has been noted so far, in the order of their names."""
        return _states(self.cache, self.damaged)


def open_for_page(path: str, data: str | None) -> PageCache:
    """Raises NotACacheError, FormatVersionError, and CorruptError where cache.json itself is damaged."""
    wrong: list[tuple[str, str]] = []
    try:
        cache = open_cache(path, data=data)
    except (CorruptError, MissingError) as error:
        cache = _open_damaged(path, data, wrong)
        if not wrong:  # nothing that a document says: a calibration or tail file
            wrong.append((str(error), ""))
    found = dict(cache.store.list())
    opened = PageCache(cache, sum(found.values()))
    for text, shard in wrong:
        opened.add(text, shard)
    for file, (expected, shard) in owned_files(cache.documents).items():
        if found.get(file) != expected.size:
            opened.add(f"{file} is not there" if file not in found else f"{file} has {found[file]} bytes, expected {expected.size}", shard)
    return opened


def _open_damaged(path: str, data: str | None, wrong: list[tuple[str, str]]) -> Cache:
    """The documents that are sound, as a cache; fills in (what is wrong, shard)."""
    store = open_store(path)
    documents: dict[str, Document[Any]] = {}
    for place, _ in document_paths(store):
        try:
            documents[place] = read_document(store, place)
        except CacheError as error:
            if place == "cache.json":
                raise
            wrong.append((str(error), shard_of(place)))
    for place in [place for place in documents if teacher_of(place) and teacher_path(teacher_of(place)) not in documents]:
        del documents[place]
    cache = Cache(store, documents, sources=locate_shards(data) if data is not None else {})
    wrong += [(problem.text, problem.shard) for problem in document_problems(cache)]
    return cache


def _states(cache: Cache, damaged: Mapping[str, str]) -> list[ShardState]:
    lacking: dict[str, list[str]] = {}
    for lack in find_lacks(cache):
        for shard in lack.shards:
            lacking.setdefault(shard, []).append(lack.what)
    states: list[ShardState] = []
    for shard in sorted({*cache.all_shards, *(shard for shard in damaged if shard)}):
        records = cache.views.get(shard)
        first = records[0].identity if records else None
        rows, state, detail = first.rows if first is not None else 0, "done", ""
        if shard in damaged:
            state, detail = "damaged", damaged[shard]
        elif first is None:
            state, detail = "missing", "asked for, and nothing of it is here"
        elif shard in lacking:
            state, detail = "unfinished", f"lacks {', '.join(lacking[shard])}"
        elif first.cut is not None:
            state, detail = "cut", f"its tar was cut short: {first.cut}"
        elif first.skipped:
            state, detail = "skips", f"{len(first.skipped)} of {first.samples} samples skipped"
        states.append(ShardState(shard, state, rows, detail))  # type: ignore[arg-type]
    return states


def series(names: Sequence[str]) -> list[list[Any]]:
    """Names in short: [prefix, first, count, digits] for a run of numbered names, else [name]. For the map's labels."""
    runs: list[list[Any]] = []
    for name in names:
        prefix, digits = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]
        if digits and runs and len(runs[-1]) == 4:
            last = runs[-1]
            if last[0] == prefix and last[3] == len(digits) and last[1] + last[2] == int(digits):
                last[2] += 1
                continue
        runs.append([prefix, int(digits), 1, len(digits)] if digits else [name])
    return runs


_NUMBERED = re.compile(r"(.*?)([0-9]{0,15})", re.DOTALL)
