"""Growing a cache from the views that it stores, after its tars are gone: which shards are meant, and what they held. Used by extract only.

A cache that stores its views remembers of each shard where its tar lay, its keys, labels and skipped samples: all that a further
target or teacher needs. More views need the tars.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence

from .cache import Cache
from .errors import UsageError
from .shards import Sample, ShardIndex, ShardSource
from .sources import resolve_shards


def resolve_or_remember(spec: str | Sequence[str], cache: Cache, *, label_key: str | None) -> list[ShardSource]:
    """The shards that SHARDS names, and those of the cache whose tars lay there and are gone, in name order.

    A gone tar is named by its folder, its path, or a brace expression or pattern of it. Raises UsageError for a tar that is neither there
    nor known, and whatever `resolve_shards` raises.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    gone: dict[str, ShardSource] = {}
    for source in map(cache.source, cache.shards):
        if not os.path.exists(source.path) and any(_names(pattern, source.path) for item in items for pattern in _expand(item)):
            gone[source.name] = source
    if not gone:
        return resolve_shards(spec, label_key=label_key)
    there: list[str] = []
    for item in items:
        try:
            there += [source.path for source in resolve_shards(item)]
        except UsageError:
            for pattern in _expand(item):
                if os.path.isfile(pattern):
                    there.append(pattern)
                elif not any(_names(pattern, source.path) for source in gone.values()):
                    raise
    found = {source.name: source for source in (resolve_shards(there, label_key=label_key) if there else ())}
    return [source for _, source in sorted((gone | found).items())]


def _expand(item: str) -> list[str]:
    """The absolute paths of a brace expression, or the one path; whether they are there or not."""
    import braceexpand

    try:
        paths = list(braceexpand.braceexpand(os.path.expanduser(item.removeprefix("file://"))))
    except ValueError:  # told by resolve_shards
        return []
    return [os.path.abspath(path) for path in paths]


def _names(pattern: str, path: str) -> bool:
    """Whether a path, folder or pattern names a tar's path."""
    return pattern in (path, os.path.dirname(path)) or (any(mark in pattern for mark in "*?[") and fnmatch.fnmatchcase(path, pattern))


def index_of_stored(cache: Cache, source: ShardSource) -> ShardIndex:
    """What a shard's tar held, as the cache has it. Raises CorruptError for stored bytes that changed."""
    document = cache.views[source.name][0]
    record, remembered = document.identity, document.provenance.get("source", {})
    skipped = {skip.index: skip for skip in record.skipped}
    keys = iter(cache.keys(source.name))
    samples = tuple(
        Sample(skipped[position].key, 0, 0, -1, skipped[position].reason) if position in skipped else Sample(next(keys), offset, size, label, None)
        for position, (offset, size, label, _) in enumerate(cache.table_from_group(record).tolist())
    )
    return ShardIndex(
        source=source,
        samples=samples,
        member_table=record.member_table,
        size=int(remembered.get("size", 0)),
        mtime_ns=int(remembered.get("mtime_ns", 0)),
        cut=record.cut,
    )
