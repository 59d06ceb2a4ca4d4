"""Show what is in a cache: the whole, one shard, or one key and view. Reads documents; only a single row reads chunks.

Each function gathers plain facts, `as_text` words them for people; `--json` prints the same facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from kdcache.augment import OPS
from kdcache.cache import Cache, TeacherLayer
from kdcache.console import human_bytes
from kdcache.errors import UsageError
from kdcache.fidelity import combine_fidelity
from kdcache.format import Document
from kdcache.layout import STORED_FOLDER


def inspect_cache(cache: Cache) -> dict[str, Any]:
    """The whole cache. Keys as DESIGN: fingerprint, root, views, rows, bytes, shards, teachers; plus plan, skipped, labels."""
    reasons = Counter(skip.reason for records in cache.views.values() for skip in records[0].identity.skipped)
    labels = cache.rows.label
    return {
        "fingerprint": cache.fingerprint,
        "root": cache.root,
        "views": cache.num_views,
        "rows": cache.num_rows,
        "bytes": sum(_group_bytes(document) for document in cache.documents.values()),
        "shards": {"done": len(cache.views), "total": len(cache.all_shards)},
        "teachers": {name: _teacher(cache, layer) for name, layer in sorted(cache.teachers.items())},
        "plan": cache.plan.to_json(),
        "views_bytes": sum(_group_bytes(document) for records in cache.views.values() for document in records),
        "stored_views": _stored_views(cache),
        "skipped": dict(reasons.most_common()),
        "cut": {shard: records[0].identity.cut for shard, records in sorted(cache.views.items()) if records[0].identity.cut is not None},
        "labels": {"labelled": int((labels >= 0).sum()), "classes": len(np.unique(labels[labels >= 0])), "highest": int(labels.max(initial=-1))},
        "made_with": cache.document.provenance.get("packages", {}),
    }


def _group_bytes(document: Document[Any]) -> int:
    group = getattr(document.identity, "group", None)
    return sum(field.size for field in group.files.values()) if group is not None else 0


def _stored_views(cache: Cache) -> dict[str, Any] | None:
    """How the views are stored and what one weighs, None where they are not stored."""
    if cache.plan.stored_views is None:
        return None
    records = [document.identity for documents in cache.views.values() for document in documents]
    size = sum(field.size for record in records for path, field in record.group.files.items() if path.startswith(f"{STORED_FOLDER}/"))
    row_views = sum(record.rows * len(record.views) for record in records)
    return {"codec": cache.plan.stored_views, "bytes": size, "bytes_per_view": size / row_views if row_views else None}


def _teacher(cache: Cache, layer: TeacherLayer) -> dict[str, Any]:
    identity = layer.document.identity
    records = [record for by_shard in layer.records.values() for record in by_shard]
    scores = [record.measured.get("accuracy", {}) for record in records]
    labelled = sum(score.get("labelled", 0) for score in scores)
    return {
        "model": identity.model,
        "weights": identity.weights,
        "precision": identity.precision,
        "num_classes": identity.num_classes,
        "top1": 100 * sum(score.get("correct", 0) for score in scores) / labelled if labelled else None,
        "labelled": labelled,
        "targets": {name: _target(cache, layer, name) for name in sorted(layer.targets)},
    }


def _target(cache: Cache, layer: TeacherLayer, name: str) -> dict[str, Any]:
    card = layer.targets[name].identity
    segments = [record for records in layer.records.values() for record in records if name in record.identity.targets]
    size = sum(field.size for record in segments for path, field in record.identity.group.files.items() if path.startswith(f"{name}/"))
    row_views = sum(record.identity.rows * len(record.identity.views) for record in segments)
    fidelity = combine_fidelity([record.measured.get("fidelity", {}).get(name, {}).get("sums", {}) for record in segments])
    shape = [card.num_classes] if card.kind == "logits" else [*(card.grid or ()), card.channels]
    return {
        "encoding": card.encoding,
        "views": cache.target_views(layer.name, name),
        "shards": len({record.identity.shard for record in segments}),
        "measured_on_more": any("views" in record.measured for record in segments),
        "bytes": size,
        "bytes_per_view": size / row_views if row_views else None,
        "shape": shape,
        "prefix_tokens": card.prefix_tokens,
        **fidelity,
    }


def inspect_shard(cache: Cache, shard: str) -> dict[str, Any]:
    """One shard: rows, skipped samples, where its tar lay, its segments and their fidelity. Raises MissingError."""
    first = cache.views_record(shard, 0)
    targets = [
        {
            "teacher": name,
            "targets": sorted(record.identity.targets),
            "views": [record.identity.views.start, record.identity.views.stop],
            "bytes": _group_bytes(record),
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
        "keys": [_printable(key) for key in keys[:5]],
    }


def inspect_row(cache: Cache, shard: str, key: str, view: int) -> dict[str, Any]:
    """One key and view: label, params in words, and for each teacher the top-5 and each target's shape and statistics."""
    row = cache.row_of(shard, key)
    result: dict[str, Any] = {"shard": shard, "key": _printable(key), "row": row, "view": view, "teachers": {}}
    names: list[str | None] = [*sorted(cache.teachers)] or [None]
    for name in names:
        read = cache.read(shard, key, view, name)
        params = read["params"]
        result["label"] = read["label"]
        result["crop"] = [params.crop.left, params.crop.top, params.crop.width, params.crop.height]
        result["flip"] = params.flip
        result["ops"] = [[OPS[op].name, magnitude / 65536] for op, magnitude in params.ops]
        result["erase"] = None if params.erase is None else asdict(params.erase)
        result["mix"] = None if params.mix is None else asdict(params.mix)
        if name is not None:
            arrays = {target: value for target, value in read.items() if isinstance(value, np.ndarray)}
            result["teachers"][name] = {target: _statistics(value) for target, value in arrays.items()}
            if "logits" in arrays:
                result["teachers"][name]["logits"]["top5"] = _top5(arrays["logits"])
    result["pixels"] = f"{int(cache.read_pixel_digests(shard, view, [row])[0]):016x}"
    return result


def _statistics(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"shape": list(value.shape), "mean": float(value.mean()), "std": float(value.std()), "min": float(value.min()), "max": float(value.max())}


def _top5(logits: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    shifted = np.exp(logits - logits.max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-probabilities, kind="stable")[:5]
    return [{"class": int(i), "probability": float(probabilities[i])} for i in order]


def _printable(text: str) -> str:
    """A key that JSON can carry: undecodable bytes of a tar's names shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- words -----------------------------------------------------------------------------------------------------------


def cache_as_text(facts: Mapping[str, Any], path: str) -> str:
    """A page for people."""
    plan, policy = facts["plan"], facts["plan"]["policy"]
    shards, stored = facts["shards"], facts["stored_views"]
    crop = policy["crop"]
    crop_text = (
        f"centre crop {crop['crop_pct']:g}" if crop["kind"] == "center" else f"random resized crop {crop['scale'][0]:g} to {crop['scale'][1]:g}"
    )
    lines = [
        f"{path}",
        f"  root         {facts['root']}",
        f"  plan         {facts['fingerprint']}: dataset {plan['dataset']!r}, {plan['size']} px, seed {plan['seed']}",
        f"  policy       {crop_text}, flip {policy['hflip']:g}, {policy['interpolation']}; decoder {plan['decoder']}",
        *(f"               {name}: {_in_words(fields)}" for name, fields in policy.items() if isinstance(fields, dict) and name != "crop"),
        f"  shards       {shards['done']} of {shards['total']} done",
        f"  rows         {facts['rows']:,} x {facts['views']} views",
        f"  labels       {facts['labels']['labelled']:,} labelled, {facts['labels']['classes']} classes",
        f"  size         {human_bytes(facts['bytes'])} ({human_bytes(facts['views_bytes'])} of them views: keys, params, digests{', pixels' if stored else ''})",
        f"  skipped      {sum(facts['skipped'].values())}"
        + "".join(f"\n               {count:5d}  {reason}" for reason, count in facts["skipped"].items()),
        f"  made with    {', '.join(f'{name} {version}' for name, version in facts['made_with'].items())}",
    ]
    if stored:
        weight = f", {stored['bytes_per_view']:,.0f} B a view" if stored["bytes_per_view"] is not None else ""
        lines.append(f"  stored views {stored['codec']}: {human_bytes(stored['bytes'])}{weight}; training needs no tars")
    lines += [f"  cut          {shard}: {cut}" for shard, cut in facts["cut"].items()]
    for name, teacher in facts["teachers"].items():
        which = f"its {teacher['labelled']:,} unmixed views" if "mix" in policy else "its own views"
        accuracy = f", {teacher['top1']:.2f} % top-1 on {which}" if teacher["top1"] is not None else ""
        lines.append(f"  teacher      {name}: {teacher['model']}, weights {teacher['weights']}, {teacher['precision']}{accuracy}")
        lines.append(
            f"               {'target':<24} {'encoding':<9} {'views':>5} {'shape':<12} {'B/view':>9} {'rel_l2':>9} {'cosine':>9} {'z_l2':>9} {'KL T=1':>9} {'KL T=4':>9}"
        )
        for target, t in teacher["targets"].items():
            shape = "x".join(map(str, t["shape"])) + (f"+{t['prefix_tokens']}" if t["prefix_tokens"] else "")
            figures = " ".join(
                f"{t[k]:9.2g}" if k != "cosine" and k in t else f"{t[k]:9.6f}" if k in t else f"{'':>9}"
                for k in ("rel_l2", "cosine", "z_l2", "kl_t1", "kl_t4")
            )
            size = f"{t['bytes_per_view']:9,.0f}" if t["bytes_per_view"] is not None else f"{'':>9}"
            lines.append(f"               {target:<24} {t['encoding']:<9} {t['views']:5d} {shape:<12} {size} {figures}".rstrip())
            bands = [name.removeprefix("energy_") for name in t if name.startswith("energy_")]
            if bands:
                words = (f"{band} {100 * t[f'energy_{band}']:.2g} % (error {t[f'error_{band}']:.2g})" for band in bands)
                lines.append(f"               {'':<24} energy by band: {', '.join(words)}")
        if any(t["measured_on_more"] for t in teacher["targets"].values()):
            lines.append("               (measured when it was extracted, over views that copy or gc has left out since, too)")
    return "\n".join(lines)


def _in_words(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items())


def shard_as_text(facts: Mapping[str, Any]) -> str:
    """A shard for people."""
    views = ", ".join(f"{start} to {stop - 1}" for start, stop in facts["views"])
    lines = [
        f"shard {facts['shard']}",
        f"  tar          {facts['source'].get('path')}, {facts['source'].get('size')} bytes, member table {facts['member_table']}",
        f"  samples      {facts['samples']}: {facts['rows']} rows, {len(facts['skipped'])} skipped",
        f"  views        {views}",
        f"  first keys   {', '.join(facts['keys'])}",
    ]
    for skip in facts["skipped"]:
        detail = f" ({skip['detail']})" if skip["detail"] else ""
        lines.append(f"  skipped      {skip['key']}: {skip['reason']}{detail}")
    if facts["cut"]:
        lines.append(f"  cut          {facts['cut']}")
    for segment in facts["segments"]:
        start, stop = segment["views"]
        lines.append(
            f"  segment      {segment['teacher']}: {', '.join(segment['targets'])}; views {start} to {stop - 1}; {human_bytes(segment['bytes'])}"
        )
        first, end = segment["measured_on"]
        over = f" (over views {first} to {end - 1})" if segment["measured_on"] != segment["views"] else ""
        for target, fidelity in segment["fidelity"].items():
            lines.append(f"               {target}: " + ", ".join(f"{name} {value:.3g}" for name, value in fidelity.items()) + over)
    return "\n".join(lines)


def _box_in_words(box: Mapping[str, int]) -> str:
    return f"{box['width']} x {box['height']} px at ({box['left']}, {box['top']})"


def row_as_text(facts: Mapping[str, Any]) -> str:
    """A row for people."""
    left, top, width, height = facts["crop"]
    lines = [
        f"shard {facts['shard']}, key {facts['key']}, view {facts['view']} (row {facts['row']})",
        f"  label        {facts['label'] if facts['label'] >= 0 else 'none'}",
        f"  view         crop {width} x {height} px at ({left}, {top}){', flipped' if facts['flip'] else ''}; pixel digest {facts['pixels']}",
        *(f"               {name} {magnitude:g}" for name, magnitude in facts["ops"]),
    ]
    if facts["erase"] is not None:
        lines.append(f"               erased {_box_in_words(facts['erase']['box'])} with {'noise' if facts['erase']['mode'] == 2 else 'a colour'}")
    if facts["mix"] is not None:
        mix = facts["mix"]
        how = f"CutMix {_box_in_words(mix['box'])}" if mix["mode"] == 1 else "Mixup"
        lines.append(f"               {how} with sample {mix['partner']} of the tar, own weight {mix['lambda_q16'] / 65536:.4f}")
    for name, targets in facts["teachers"].items():
        for target, t in targets.items():
            shape = "x".join(map(str, t["shape"]))
            lines.append(f"  {name}  {target} ({shape}): mean {t['mean']:.4g}, std {t['std']:.4g}, from {t['min']:.4g} to {t['max']:.4g}")
            if "top5" in t:
                lines.append("      top-5: " + ", ".join(f"{one['class']} ({100 * one['probability']:.1f} %)" for one in t["top5"]))
    return "\n".join(lines)


def check_selection(shard: str | None, key: str | None, view: int | None) -> None:
    """Raise UsageError for a key without a shard, or a view without a key."""
    if key is not None and shard is None:
        raise UsageError("--key needs --shard: a key is known within its shard only")
    if view is not None and key is None:
        raise UsageError("--view needs --key")
