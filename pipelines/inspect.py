"""Show what is in a cache: the whole, one shard, or one key and its views. Text and `--json` say the same facts.

Each function gathers plain facts; `inspection.inspect_text` words them for people. Documents and the index's table tell nearly all; a bounded
sample of rows is read for the entropy of logits, and single rows for a key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kdcache.augment import OPS
from kdcache.cache import Cache, TeacherLayer
from kdcache.class_names import ClassNames
from kdcache.distance import log_softmax
from kdcache.errors import UsageError
from kdcache.layout import STORED_FOLDER
from kdcache.shards import printable
from kdcache.view_params import ViewParams

from .facts import (
    SAMPLE_ROWS,
    accuracy,
    check_names,
    class_names_of,
    find_lacks,
    label_histogram,
    label_names_of,
    made_with,
    owned_bytes,
    sample_logits,
    sizes,
    stored_target,
    views_of,
    when_written,
)
from .words import params_in_words, policy_in_words, policy_name

NUM_EXTREMES = 3
"""Rarest and commonest classes that are named."""
NUM_BINS = 50
"""Bars of the label histogram."""
MAX_LABEL = 1 << 20
"""From which on labels have no bars: they may be any numbers, such as those of persons."""


def inspect_cache(cache: Cache, *, rows: int | None = SAMPLE_ROWS, names: ClassNames | None = None) -> dict[str, Any]:
    """The whole cache: the keys of DESIGN §10, and more (docs/inspect.md lists them all).

    rows: of how many the logits are read, None for all of view 0, 0 for none. names: the user's, of the classes. Raises UsageError for
    names that fit nothing here.
    """
    check_names(cache, names)
    reasons = Counter(skip.reason for records in cache.views.values() for skip in records[0].identity.skipped)
    lacks, written, policy = find_lacks(cache), when_written(cache), cache.plan.policy
    return {
        "fingerprint": cache.fingerprint,
        "root": cache.root,
        "complete": not lacks,
        "views": cache.num_views,
        "rows": cache.num_rows,
        "bytes": owned_bytes(cache),
        "shards": {"done": len(cache.views), "total": len(cache.all_shards)},
        "unfinished": [{"what": lack.what, "views": lack.views, "shards": list(lack.shards)} for lack in lacks],
        "teachers": {name: _teacher(cache, layer, rows, names) for name, layer in sorted(cache.teachers.items())},
        "plan": cache.plan.to_json(),
        "policy": {"name": policy_name(policy), "words": policy_in_words(policy)},
        "views_bytes": sum(document.identity.group.size_of() for records in cache.views.values() for document in records),
        "stored_views": _stored_views(cache),
        "sizes": [asdict(part) for part in sizes(cache)],
        "skipped": dict(reasons.most_common()),
        "cut": {shard: records[0].identity.cut for shard, records in sorted(cache.views.items()) if records[0].identity.cut is not None},
        "labels": _labels(cache, names),
        "made_with": cache.document.provenance.get("packages", {}),
        "provenance": made_with(cache.documents.values()),
        "written": {"first": written[0], "last": written[1]} if written is not None else None,
    }


def _stored_views(cache: Cache) -> dict[str, Any] | None:
    """How the views are stored and what one weighs, None where they are not stored."""
    if cache.plan.stored_views is None:
        return None
    records = [document for documents in cache.views.values() for document in documents]
    size = sum(record.identity.group.size_of(STORED_FOLDER) for record in records)
    row_views = sum(record.identity.rows * len(record.identity.views) for record in records)
    return {"codec": cache.plan.stored_views, "bytes": size, "bytes_per_view": size / row_views if row_views else None}


def _labels(cache: Cache, names: ClassNames | None) -> dict[str, Any]:
    found = label_histogram(cache)
    names = names or label_names_of(cache)
    rarest, commonest = found.extremes(NUM_EXTREMES)
    highest = int(found.classes[-1]) if len(found.classes) else -1
    bins: list[float] = []
    if 0 <= highest < MAX_LABEL:
        counts = np.zeros(highest + 1, np.int64)
        counts[found.classes] = found.counts
        bins = [float(part.mean()) for part in np.array_split(counts, min(NUM_BINS, len(counts)))]

    def named(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return [{"class": number, "rows": count, **_named(names, number)} for number, count in pairs]

    body: dict[str, Any] = {"labelled": len(cache.rows) - found.unlabelled, "classes": len(found.classes), "highest": highest}
    if len(found.classes):
        body["per_class"] = {"min": int(found.counts.min()), "median": float(np.median(found.counts)), "max": int(found.counts.max())}
        body |= {"rarest": named(rarest), "commonest": named(commonest), "bins": bins}
    return body


def _named(names: ClassNames | None, number: int) -> dict[str, str]:
    """{"name"} of a class where it has one."""
    name = names.of(number) if names is not None else None
    return {"name": name} if name is not None else {}


def _teacher(cache: Cache, layer: TeacherLayer, rows: int | None, given: ClassNames | None) -> dict[str, Any]:
    identity, made = layer.document.identity, layer.document.provenance
    top1, labelled = accuracy(layer)
    names = class_names_of(layer, given)
    return {
        "model": identity.model,
        "model_args": identity.model_args,
        "source": made.get("source"),
        "checkpoint": made.get("checkpoint"),
        "weight_files": made.get("weight_files", {}),
        "weights": identity.weights,
        "precision": identity.precision,
        "preprocessing": identity.preprocessing.to_json(),
        "num_classes": identity.num_classes,
        "class_names": names.source if names is not None else None,
        "top1": top1,
        "labelled": labelled,
        "provenance": made_with(record for records in layer.records.values() for record in records),
        "logits": sample_logits(cache, layer.name, max_rows=rows).to_json() if "logits" in layer.targets else None,
        "tail": _tail(layer),
        "targets": {name: _target(cache, layer, name) for name in sorted(layer.targets)},
    }


def _tail(layer: TeacherLayer) -> dict[str, Any] | None:
    if layer.tail is None:
        return None
    card = layer.tail.identity
    return {
        "modules": list(card.modules),
        "head": list(card.head),
        "layout": card.layout,
        "grid": list(card.grid),
        "channels": card.channels,
        "prefix_tokens": card.prefix_tokens,
        "bytes": card.weights.size,
        "without_prefix": layer.tail.measured.get("without_prefix"),
    }


def _target(cache: Cache, layer: TeacherLayer, name: str) -> dict[str, Any]:
    card = layer.targets[name].identity
    stored = stored_target(layer, name)
    shape = [card.num_classes] if card.kind == "logits" else [*(card.grid or ()), card.channels]
    return {
        "encoding": card.encoding,
        "views": cache.target_views(layer.name, name),
        "shards": stored.shards,
        "measured_on_more": any("views" in record.measured for record in stored.segments),
        "bytes": stored.bytes,
        "bytes_per_view": stored.bytes_per_view,
        "shape": shape,
        "prefix_tokens": card.prefix_tokens,
        "worst": stored.worst,
        "by_shard": stored.by_shard,
        **stored.figures,
    }


def inspect_shard(cache: Cache, shard: str) -> dict[str, Any]:
    """One shard: rows, skipped samples, where its tar lay, its segments and their fidelity. Raises MissingError."""
    first = cache.views_record(shard, 0)
    targets = [
        {
            "teacher": name,
            "targets": sorted(record.identity.targets),
            "views": [record.identity.views.start, record.identity.views.stop],
            "bytes": record.identity.group.size_of(),
            "fidelity": {t: {k: v for k, v in f.items() if k != "sums"} for t, f in record.measured.get("fidelity", {}).items()},
            "measured_on": record.measured.get("views", [record.identity.views.start, record.identity.views.stop]),
            "group": record.identity.group.name,
        }
        for name, layer in sorted(cache.teachers.items())
        for record in layer.records.get(shard, [])
    ]
    keys = cache.keys(shard)
    details = cache.views[shard][0].measured.get("skip_details", {})
    return {
        "shard": shard,
        "source": cache.views[shard][0].provenance.get("source", {}),
        "member_table": first.member_table,
        "samples": first.samples,
        "rows": first.rows,
        "skipped": [{**skip.to_json(), "detail": details.get(skip.key, "")} for skip in first.skipped],
        "cut": first.cut,
        "views": [[r.identity.views.start, r.identity.views.stop] for r in cache.views[shard]],
        "segments": targets,
        "keys": [printable(key) for key in keys[:5]],
    }


def inspect_row(cache: Cache, shard: str, key: str, view: int | None = None, *, names: ClassNames | None = None) -> dict[str, Any]:
    """One key: label, what was drawn for each view, and for each teacher the top-5 and each target's shape and statistics.

    view: the one that is shown, and whose targets are read; None for what was drawn for all, and the targets of view 0.
    """
    check_names(cache, names)
    row, shown = cache.row_of(shard, key), view or 0
    drawn = [_drawn(cache, shard, row, number) for number in ([shown] if view is not None else views_of(cache.views[shard]))]
    first = next((one for one in drawn if one["view"] == shown), None) or _drawn(cache, shard, row, shown)
    result: dict[str, Any] = {"shard": shard, "key": printable(key), "row": row, "view": shown, "teachers": {}}
    label_names = names or label_names_of(cache)
    if not cache.teachers:
        result["label"] = cache.read(shard, key, shown)["label"]
    for name in sorted(cache.teachers):
        read = cache.read(shard, key, shown, name)
        result["label"] = read["label"]
        arrays = {target: value for target, value in read.items() if isinstance(value, np.ndarray)}
        result["teachers"][name] = {target: _statistics(value) for target, value in arrays.items()}
        if "logits" in arrays:
            result["teachers"][name]["logits"] |= _top5(arrays["logits"], class_names_of(cache.layer(name), names))
    result["label_name"] = label_names.of(result["label"]) if label_names is not None else None
    return {**result, **{name: value for name, value in first.items() if name != "view"}, "views": drawn}


def _drawn(cache: Cache, shard: str, row: int, view: int) -> dict[str, Any]:
    """What happened to one view of a row, in numbers and in words, and the digest of its pixels."""
    (params,) = cache.read_params(shard, view, [row])
    return {
        "view": view,
        "crop": [params.crop.left, params.crop.top, params.crop.width, params.crop.height],
        "flip": params.flip,
        "ops": [[OPS[op].name, magnitude / 65536] for op, magnitude in params.ops],
        "erase": None if params.erase is None else asdict(params.erase),
        "mix": None if params.mix is None else asdict(params.mix),
        "words": params_in_words(params, _partner(cache, shard, params)),
        "pixels": f"{int(cache.read_pixel_digests(shard, view, [row])[0]):016x}",
    }


def _partner(cache: Cache, shard: str, params: ViewParams) -> str | None:
    """What the partner of a mixed view is called: its key, and its own label."""
    if params.mix is None:
        return None
    row = cache.row_at(shard, params.mix.partner)
    label = int(cache.tables[shard][params.mix.partner, 2])
    return f"{printable(cache.keys(shard)[row])!r}" + (f" (label {label})" if label >= 0 else "")


def _statistics(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"shape": list(value.shape), "mean": float(value.mean()), "std": float(value.std()), "min": float(value.min()), "max": float(value.max())}


def _top5(logits: np.ndarray[Any, Any], names: ClassNames | None) -> dict[str, Any]:
    """The five likeliest classes of one row of logits, and its entropy in nats."""
    log_p = log_softmax(logits[None])[0]
    order = np.argsort(-log_p, kind="stable")[:5]
    top5 = [{"class": int(i), "probability": float(np.exp(log_p[i])), **_named(names, int(i))} for i in order]
    return {"entropy": float(-(np.exp(log_p) * log_p).sum()), "top5": top5}


def check_selection(shard: str | None, key: str | None, view: int | None, *, sampled: bool = False) -> None:
    """Raise UsageError for a key without a shard, a view without a key, or, with `sampled`, a sample of the rows of one shard."""
    if sampled and shard is not None:
        raise UsageError("--rows is of the whole cache: leave out --shard")
    if key is not None and shard is None:
        raise UsageError("--key needs --shard: a key is known within its shard only")
    if view is not None and key is None:
        raise UsageError("--view needs --key")
