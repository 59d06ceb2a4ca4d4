"""Growing a cache from the views that it stores, after its tars are gone: which shards are meant, and what they held. Used by extract and repair.

A cache that stores its views remembers of each shard where its tar lay, its keys, labels and skipped samples: all that a further
target or teacher needs. More views need the tars.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .cache import Cache
from .shards import Sample, ShardIndex, ShardSource
from .sources import resolve_shards


def resolve_or_remember(spec: str | Sequence[str], cache: Cache, *, label_key: str | None) -> list[ShardSource]:
    """The shards that SHARDS names, those of the cache whose tars lay there and are gone among them, in the order of SHARDS.

    Raises UsageError for a tar that is neither there nor known, and whatever `resolve_shards` raises.
    """
    paths = [cache.source(shard).path for shard in cache.shards]
    return resolve_shards(spec, label_key=label_key, gone=[path for path in paths if path and not os.path.exists(path)])


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
