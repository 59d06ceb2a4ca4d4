"""Show what is in a cache: the whole, one shard, or one key and its views. Text and `--json` say the same facts.

Each function gathers plain facts, its `as_text` words them for people. Documents and the index's table tell nearly all; a bounded
sample of rows is read for the entropy of logits, and single rows for a key.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kdcache.augment import OPS
from kdcache.cache import Cache, TeacherLayer
from kdcache.class_names import ClassNames, teacher_class_names
from kdcache.console import counted, human_bytes, one_line, view_range
from kdcache.distance import log_softmax
from kdcache.errors import UsageError
from kdcache.fidelity import combine_fidelity
from kdcache.layout import STORED_FOLDER
from kdcache.shards import printable
from kdcache.views import ViewParams

from .facts import (
    SAMPLE_ROWS,
    fidelity_by_shard,
    fidelity_sums,
    find_lacks,
    group_bytes,
    label_histogram,
    made_with,
    owned_bytes,
    sample_logits,
    sizes,
    when_written,
    worst_shard,
)
from .words import params_in_words, policy_in_words, policy_name

NUM_EXTREMES = 3
"""Rarest and commonest classes that are named."""
NUM_BINS = 50
"""Bars of the label histogram."""
MAX_LABEL = 1 << 20
"""From which on labels have no bars: they may be any numbers, such as those of persons."""
LISTED_SHARDS = 3
"""Unfinished shards that the text names; `--json` names all."""
MIN_AGREEMENT = 50.0
"""Top-1 in per cent from which on the labels are taken to be numbered as the teacher's classes, so that its names are theirs too."""


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
        "views_bytes": sum(group_bytes(document) for records in cache.views.values() for document in records),
        "stored_views": _stored_views(cache),
        "sizes": [asdict(part) for part in sizes(cache)],
        "skipped": dict(reasons.most_common()),
        "cut": {shard: records[0].identity.cut for shard, records in sorted(cache.views.items()) if records[0].identity.cut is not None},
        "labels": _labels(cache, names),
        "made_with": cache.document.provenance.get("packages", {}),
        "provenance": made_with(cache.documents.values()),
        "written": {"first": written[0], "last": written[1]} if written is not None else None,
    }


def check_names(cache: Cache, names: ClassNames | None) -> None:
    highest = int(cache.rows.label.max(initial=-1))
    classes = sorted({layer.document.identity.num_classes for layer in cache.teachers.values()})
    if names is not None and len(names) <= highest and len(names) not in classes:
        raise UsageError(
            f"class names {names.source!r}: it names {len(names)} classes; expected {' or '.join(map(str, classes)) or 'more'} as the teacher has,"
            f" or at least {highest + 1}, since labels reach {highest}"
        )


def _stored_views(cache: Cache) -> dict[str, Any] | None:
    """How the views are stored and what one weighs, None where they are not stored."""
    if cache.plan.stored_views is None:
        return None
    records = [document for documents in cache.views.values() for document in documents]
    size = sum(group_bytes(record, f"{STORED_FOLDER}/") for record in records)
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


def label_names_of(cache: Cache) -> ClassNames | None:
    """The labels' names: those of a teacher that knows its own, and mostly agrees with the labels."""
    for _, layer in sorted(cache.teachers.items()):
        top1, _labelled = _top1(layer)
        if top1 is not None and top1 >= MIN_AGREEMENT and (names := teacher_class_names(layer)) is not None:
            return names
    return None


def class_names_of(layer: TeacherLayer, given: ClassNames | None) -> ClassNames | None:
    """The names of a teacher's classes: the user's if there are as many, else those that are known for sure."""
    return given if given is not None and len(given) == layer.document.identity.num_classes else teacher_class_names(layer)


def _top1(layer: TeacherLayer) -> tuple[float | None, int]:
    """(per cent, of how many labelled views) of a teacher's own cached views."""
    scores = [record.measured.get("accuracy", {}) for records in layer.records.values() for record in records]
    labelled = sum(score.get("labelled", 0) for score in scores)
    return 100 * sum(score.get("correct", 0) for score in scores) / labelled if labelled else None, labelled


def _teacher(cache: Cache, layer: TeacherLayer, rows: int | None, given: ClassNames | None) -> dict[str, Any]:
    identity, made = layer.document.identity, layer.document.provenance
    top1, labelled = _top1(layer)
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
    segments = [record for records in layer.records.values() for record in records if name in record.identity.targets]
    size = sum(group_bytes(record, f"{name}/") for record in segments)
    row_views = sum(record.identity.rows * len(record.identity.views) for record in segments)
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
        "worst": worst_shard(fidelity_by_shard(layer, name)),
        **combine_fidelity([fidelity_sums(record, name) for record in segments]),
    }


def inspect_shard(cache: Cache, shard: str) -> dict[str, Any]:
    """One shard: rows, skipped samples, where its tar lay, its segments and their fidelity. Raises MissingError."""
    first = cache.views_record(shard, 0)
    targets = [
        {
            "teacher": name,
            "targets": sorted(record.identity.targets),
            "views": [record.identity.views.start, record.identity.views.stop],
            "bytes": group_bytes(record),
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
    drawn = [_drawn(cache, shard, row, number) for number in ([shown] if view is not None else _views_of(cache, shard))]
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


def _views_of(cache: Cache, shard: str) -> Iterator[int]:
    """The numbers of the views that a shard has."""
    cache.views_record(shard, 0)  # raises MissingError for a shard that is not there
    for record in cache.views[shard]:
        yield from range(record.identity.views.start, record.identity.views.stop)


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


# --- words -----------------------------------------------------------------------------------------------------------

_BARS = "▁▂▃▄▅▆▇█"
WIDTH = 100
"""Columns that the text keeps to, but for a name that is longer."""
_FIGURES = ("rel_l2", "cosine", "z_l2", "kl_t1", "kl_t4")


def cache_as_text(facts: Mapping[str, Any], path: str) -> str:
    """A page for people."""
    facts, path = one_line(facts), one_line(path)
    plan, shards, stored = facts["plan"], facts["shards"], facts["stored_views"]
    done = f"{shards['done']} of {shards['total']} shards"
    lines = [
        f"{path}: {'complete' if facts['complete'] else 'UNFINISHED'}",
        f"  root         {facts['root']}",
        f"  plan         {facts['fingerprint']}: dataset {plan['dataset']!r}, {plan['size']} px, seed {plan['seed']}, decoder {plan['decoder']}"
        + (f", resizer {plan['resizer']}" if plan["resizer"] != plan["decoder"] else ""),
        *_block("policy", [f"{facts['policy']['name']}:", *facts["policy"]["words"]], joined=True),
        f"  rows         {facts['rows']:,} x {facts['views']} views in {done}",
        *_block("unfinished", _unfinished_in_words(facts["unfinished"])),
        f"  skipped      {sum(facts['skipped'].values())}",
        *(f"               {count:5d}  {reason}" for reason, count in facts["skipped"].items()),
        *(f"  cut          {shard}: {cut}" for shard, cut in facts["cut"].items()),
        *_block("labels", _labels_in_words(facts)),
        *_block("size", _sizes_in_words(facts)),
    ]
    if stored:
        weight = f", {stored['bytes_per_view']:,.0f} B a view" if stored["bytes_per_view"] is not None else ""
        lines.append(f"  stored views {stored['codec']}: {human_bytes(stored['bytes'])}{weight}; training needs no tars")
    if facts["written"]:
        first, last = (time.replace("T", " ").removesuffix("+00:00") for time in facts["written"].values())
        lines.append(f"  written      from {first} to {last} UTC, by the times of its files")
    lines += _block("made with", [_made_in_words(facts["provenance"])])
    for name, teacher in facts["teachers"].items():
        lines += ["", *_teacher_in_words(name, teacher, mixes="mix" in plan["policy"])]
    return "\n".join(lines)


def _block(title: str, texts: Sequence[str], *, joined: bool = False) -> list[str]:
    """Lines under one title, the longer ones wrapped; joined: the first text is a name that stands before the second."""
    if joined:
        texts = [" ".join(texts[:2]), *texts[2:]]
    lines = [line for text in texts for line in ([text] if len(text) <= WIDTH - 15 else _wrapped(text))]
    return [f"  {title if not place else '':<12} {line}".rstrip() for place, line in enumerate(lines)]


def _wrapped(text: str, width: int = WIDTH - 15) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _unfinished_in_words(unfinished: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for lack in unfinished:
        named = ", ".join(lack["shards"][:LISTED_SHARDS])
        more = f" and {len(lack['shards']) - LISTED_SHARDS:,} more" if len(lack["shards"]) > LISTED_SHARDS else ""
        what = (
            "not begun"
            if lack["what"] == "shards"
            else f"with fewer than {_count(lack['views'], 'view')}" + ("" if lack["what"] == "views" else f" of {lack['what']}")
        )
        lines.append(f"{_count(len(lack['shards']), 'shard')} {what}: {named}{more}")
    return lines + ["run 'kdcache extract' again with the same arguments to finish it"] * bool(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _labels_in_words(facts: Mapping[str, Any]) -> list[str]:
    labels = facts["labels"]
    if not labels["classes"]:
        return ["none"]
    some = f"{labels['labelled']:,} of {facts['rows']:,} rows" if labels["labelled"] != facts["rows"] else "every row"
    spread, classes = labels["per_class"], f"{labels['classes']:,} classes" if labels["classes"] != 1 else "one class"
    unused = labels["highest"] + 1 - labels["classes"]
    lines = [
        f"{some} labelled, {classes}, labels up to {labels['highest']}" + (f" ({unused:,} of them on no row)" if unused else ""),
        f"{spread['min']:,} to {spread['max']:,} rows a class, median {spread['median']:,.0f}"
        if spread["min"] != spread["max"]
        else f"{_count(spread['min'], 'row')} of each",
    ]
    if labels["classes"] > 1 and labels["bins"]:
        top = max(labels["bins"])
        bars = "".join(_BARS[round(7 * count / top)] if count else " " for count in labels["bins"])
        lines.append(f"0 {bars} {labels['highest']}")
    if spread["min"] != spread["max"]:
        for title in ("rarest", "commonest"):
            lines.append(f"{title}: " + ", ".join(f"{_class_in_words(one)} ({one['rows']:,})" for one in labels[title]))
    return lines


def _class_in_words(one: Mapping[str, Any]) -> str:
    return f"{one['class']} {one['name']!r}" if "name" in one else f"{one['class']}"


def _sizes_in_words(facts: Mapping[str, Any]) -> list[str]:
    parts, total = facts["sizes"], facts["bytes"]
    width = max(len(part["name"]) for part in parts)
    lines = [f"{human_bytes(total)}"]
    for part in parts:
        views = f"{_count(part['views'], 'view'):>8}" if part["views"] is not None else f"{'':>8}"
        share = 100 * part["bytes"] / total if total else 0.0
        lines.append(f"  {part['name']:<{width}} {views} {human_bytes(part['bytes']):>8} {share:5.1f} %")
    return lines


def _made_in_words(made: Mapping[str, Sequence[str]]) -> str:
    """Packages and Python; where several versions or machines had a hand in it, all of them."""
    packages = [f"{name} {' and '.join(versions)}" for name, versions in made.items() if name not in ("machine", "host", "device", "batch_size")]
    return ", ".join([*packages, *(" and ".join(made[name]) for name in ("machine",) if name in made)])


def _teacher_in_words(name: str, teacher: Mapping[str, Any], *, mixes: bool) -> list[str]:
    pre, made = teacher["preprocessing"], teacher["provenance"]
    origin = f"from {teacher['source']}" if teacher["source"] else "of unknown origin"
    files = f" ({', '.join(f'{file} {digest[:12]}' for file, digest in teacher['weight_files'].items())})" if teacher["weight_files"] else ""
    lines = [
        f"  teacher      {name}: {teacher['model']}, {teacher['precision']}",
        f"  weights      {teacher['weights']}",
        *_block("", [origin + (f", checkpoint {teacher['checkpoint']}" if teacher["checkpoint"] else "") + files]),
        f"  input        {pre['input_size']} px, mean {_numbers(pre['mean'])}, std {_numbers(pre['std'])}",
    ]
    if teacher["num_classes"]:
        lines.append(
            f"  classes      {teacher['num_classes']:,}" + (f", named by {teacher['class_names']}" if teacher["class_names"] else ", names not known")
        )
    if made:
        lines.append(f"  run on       {' and '.join(made.get('device', ['?']))}, batch size {' and '.join(made.get('batch_size', ['?']))}")
    if teacher["top1"] is not None:
        which = f"its {teacher['labelled']:,} unmixed views" if mixes else f"its own {teacher['labelled']:,} views"
        lines.append(f"  accuracy     {teacher['top1']:.2f} % top-1 on {which}")
    if (logits := teacher["logits"]) is not None and logits["rows"]:
        e, c = logits["entropy"], logits["confidence"]
        lines += [
            f"  entropy      mean {e['mean']:.4g} nats of at most {e['most']:.4g}; 5 % below {e['q05']:.4g}, half below {e['q50']:.4g}, 95 % below {e['q95']:.4g}",
            f"  confidence   mean {100 * c['mean']:.1f} % for the likeliest class; 5 % below {100 * c['q05']:.1f}, half below {100 * c['q50']:.1f} %",
            f"               (softmax of {logits['rows']:,} of {logits['of_rows']:,} rows, view {logits['view']}, from {_count(logits['shards'], 'shard')})",
        ]
    if (tail := teacher["tail"]) is not None:
        through = " → ".join([*tail["modules"], *([f"head ({', '.join(tail['head'])})"] if tail["head"] else [])])
        lines.append(f"  tail         {through}: {human_bytes(tail['bytes'])}")
        distance = (
            f"; without its {counted(tail['prefix_tokens'], 'prefix token')} {tail['without_prefix']:.2g} from the teacher (relative L2)"
            if tail["prefix_tokens"] and tail["without_prefix"] is not None
            else ""
        )
        lines.append(f"               takes {tail['grid'][0]}x{tail['grid'][1]} x {tail['channels']} {tail['layout']}{distance}")
    return lines + _targets_in_words(teacher["targets"])


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _targets_in_words(targets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max((len(name) for name in targets), default=0)
    encoding_width = max((len(t["encoding"]) for t in targets.values()), default=0) if targets else 0
    figures = [figure for figure in _FIGURES if any(figure in t for t in targets.values())]
    titles = {"kl_t1": "KL T=1", "kl_t4": "KL T=4"}
    width, encoding_width = max(width, len("target")), max(encoding_width, len("encoding"))
    head = f"  {'target':<{width}} {'encoding':<{encoding_width}} {'views':>5} {'shape':<11} {'B/view':>8}"
    lines = [head + "".join(f" {titles.get(figure, figure):>8}" for figure in figures)]
    for target, t in targets.items():
        shape = "x".join(map(str, t["shape"])) + (f"+{t['prefix_tokens']}" if t["prefix_tokens"] else "")
        cells = "".join(f" {t[f]:8.6f}" if f == "cosine" and f in t else f" {t[f]:8.2g}" if f in t else f" {'':>8}" for f in figures)
        size = f"{t['bytes_per_view']:8,.0f}" if t["bytes_per_view"] is not None else f"{'':>8}"
        lines.append(f"  {target:<{width}} {t['encoding']:<{encoding_width}} {t['views']:5d} {shape:<11} {size}{cells}".rstrip())
        if t["worst"]:
            figure = titles.get(t["worst"]["figure"], t["worst"]["figure"])
            lines.append(f"      worst in {t['worst']['shard']}: {figure} {t['worst']['value']:.2g}")
        bands = [name.removeprefix("energy_") for name in t if name.startswith("energy_")]
        if bands:
            words = (f"{band} {100 * t[f'energy_{band}']:.2g} % (error {t[f'error_{band}']:.2g})" for band in bands)
            lines += [f"      {line}" for line in _wrapped(f"energy by band: {', '.join(words)}", WIDTH - 6)]
    if any(t["measured_on_more"] for t in targets.values()):
        lines.append("  (measured when it was extracted, over views that copy or gc has left out since, too)")
    return lines


def shard_as_text(facts: Mapping[str, Any]) -> str:
    """A shard for people."""
    facts = one_line(facts)
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
            f"  segment      {segment['teacher']}: {', '.join(segment['targets'])}; {view_range(start, stop)}; {human_bytes(segment['bytes'])}"
        )
        first, end = segment["measured_on"]
        over = f" (over {view_range(first, end)})" if segment["measured_on"] != segment["views"] else ""
        for target, fidelity in segment["fidelity"].items():
            words = ", ".join(f"{name} {value:.6f}" if name == "cosine" else f"{name} {value:.3g}" for name, value in fidelity.items())
            lines += _block("", [f"{target}: {words}{over}"])
    return "\n".join(lines)


def row_as_text(facts: Mapping[str, Any]) -> str:
    """A row for people."""
    facts = one_line(facts)
    label = f"{facts['label']}" if facts["label"] >= 0 else "none"
    named = f" {facts['label_name']!r}" if facts["label_name"] is not None else ""
    lines = [f"shard {facts['shard']}, key {facts['key']} (row {facts['row']})", f"  label        {label}{named}"]
    width = len(str(facts["views"][-1]["view"]))
    for drawn in facts["views"]:
        lines.append(f"  view {drawn['view']:<{max(width, 7)}} {', '.join(drawn['words'])}; pixel digest {drawn['pixels']}")
    for name, targets in facts["teachers"].items():
        lines.append(f"  {name}, view {facts['view']}" + ("" if targets else ": no targets of this view"))
        for target, t in targets.items():
            shape = "x".join(map(str, t["shape"]))
            spread = f"mean {t['mean']:.4g}, std {t['std']:.4g}, from {t['min']:.4g} to {t['max']:.4g}"
            lines.append(f"    {target} ({shape}): {spread}" + (f"; entropy {t['entropy']:.3g} nats" if "top5" in t else ""))
            if "top5" in t:
                lines.append("      top-5: " + ", ".join(f"{_class_in_words(one)} ({100 * one['probability']:.1f} %)" for one in t["top5"]))
    return "\n".join(lines)


def check_selection(shard: str | None, key: str | None, view: int | None, *, sampled: bool = False) -> None:
    """Raise UsageError for a key without a shard, a view without a key, or, with `sampled`, a sample of the rows of one shard."""
    if sampled and shard is not None:
        raise UsageError("--rows is of the whole cache: leave out --shard")
    if key is not None and shard is None:
        raise UsageError("--key needs --shard: a key is known within its shard only")
    if view is not None and key is None:
        raise UsageError("--view needs --key")
