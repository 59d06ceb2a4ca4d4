"""Whether an extraction has nothing to do, or no image to decode: found from the cache's documents, without torch and without scanning a tar that has
not changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.cache import Cache
from kdcache.errors import CacheError, ShardError
from kdcache.format import Document
from kdcache.index import is_current
from kdcache.opening import open_cache
from kdcache.shards import ShardSource, scan_shard
from kdcache.targets import parse_target
from kdcache.teacher_card import card_of_layer
from kdcache.teacher_source import default_teacher_name, weight_files

from .request import ExtractConfig, ExtractSummary, check_given_plan, num_views, requested_specs, requested_tail


def finished_already(config: ExtractConfig, sources: Sequence[ShardSource], all_sources: Sequence[ShardSource]) -> ExtractSummary | None:
    """The summary, if everything asked for is there already; found without loading torch or scanning a tar that has not changed."""
    try:
        cache = open_cache(config.cache)
    except CacheError:
        return None  # what an extraction can't mend is raised again on opening to write
    check_given_plan(config, cache, sources)
    summary = _summary_if_complete(config, cache, sources)
    if not {source.name for source in all_sources} <= set(cache.all_shards):
        return None
    return summary if summary is not None and is_current(cache.store, cache.documents) else None


def decodes_images(config: ExtractConfig, cache: Cache | None, sources: Sequence[ShardSource]) -> bool:
    """Whether tars' images are decoded: not where a cache stores all views that are asked for, and the teacher's first views are seen as stored too."""
    if cache is None or cache.plan.stored_views is None:
        return True
    views = max(config.views or 0, *(parse_target(text).views or 0 for text in config.targets), 0)
    if views > cache.num_views or not {source.name for source in sources} <= set(cache.shards):
        return True
    if cache.plan.policy.mix is None or not any(os.path.exists(source.path) for source in sources):
        return False
    return _summary_if_complete(config, cache, sources) is None  # `kdcache.preflight.first_views` renders them unmixed


def _summary_if_complete(config: ExtractConfig, cache: Cache, sources: Sequence[ShardSource]) -> ExtractSummary | None:
    """The summary, if the cache's documents hold everything asked for, whatever its index says."""
    layer = cache.teachers.get(config.name or default_teacher_name(config.teacher))
    if layer is None or not _same_teacher(config, layer.document.provenance) or config.precision not in (None, layer.document.identity.precision):
        return None
    tail = layer.tail.identity.modules if layer.tail is not None else ()
    if not set(requested_tail(config, card_of_layer(layer))) <= set(tail):
        return None
    specs = requested_specs(config, card_of_layer(layer), layer)
    wanted_views = num_views(config, specs, cache.plan, cache)
    views = max(wanted_views, *(spec.views or 0 for spec in specs))
    summary = ExtractSummary(views=views)
    for source in map(cache.with_labels, sources):
        records = cache.views.get(source.name, [])
        if not records or not all(any(view in record.identity.views for record in records) for view in range(views)):
            return None
        for spec in specs:
            card = layer.targets.get(spec.name)
            if card is None or spec.encoding not in (None, card.identity.encoding):
                return None
            segments = layer.segments(source.name, spec.name)
            if not all(any(view in segment.identity.views for segment in segments) for view in range(spec.views or wanted_views)):
                return None
        if not is_unchanged(source, records[0], may_be_gone=cache.plan.stored_views is not None):
            return None
        count_complete(summary, records[0])
        summary.resumed_shards += 1
    return summary


def count_complete(summary: ExtractSummary, record: Document[Any]) -> None:
    """Add a shard that has all that was asked for."""
    summary.shards += 1
    summary.rows += record.identity.rows
    summary.skipped += len(record.identity.skipped)
    _note_cut(summary, record.identity.shard, record.identity.cut)


def _note_cut(summary: ExtractSummary, shard: str, cut: str | None) -> None:
    if cut is not None:
        summary.problems.append(
            {"kind": "source", "shard": shard, "key": "", "detail": f"the tar is cut short: {cut}; its samples before the cut are kept"}
        )


def is_unchanged(source: ShardSource, record: Document[Any], *, may_be_gone: bool) -> bool:
    """Whether the tar is the one that was scanned: by size and time of change, else by its member table. may_be_gone: its views are stored.

    A tar that was changed in place with its time set back is not noticed here: its pixel digests are left, which train and verify compare.
    """
    remembered = record.provenance.get("source", {})
    try:
        stat = os.stat(source.path)
    except FileNotFoundError:
        return may_be_gone
    except OSError:
        return False  # told when its turn comes
    if (stat.st_size, stat.st_mtime_ns) == (remembered.get("size"), remembered.get("mtime_ns")):
        return True
    try:
        return bool(scan_shard(source).member_table == record.identity.member_table)
    except ShardError:
        return False  # told when its turn comes


def _same_teacher(config: ExtractConfig, provenance: Mapping[str, Any]) -> bool:
    found = weight_files(config.teacher, config.checkpoint)
    same_files = sorted(found.values()) == sorted(provenance.get("weight_files", {}).values())
    same_model = provenance.get("source") == config.teacher or (bool(found) and config.checkpoint is None)  # a folder may be moved
    return bool(same_files and same_model and provenance.get("model_args") == dict(config.model_args))
