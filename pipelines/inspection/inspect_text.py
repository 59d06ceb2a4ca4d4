"""What `pipelines.inspect` found, for people at a terminal: of a cache, a shard, a row. Nothing is read here: facts in, text out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.console import counted, human_bytes, one_line, view_range

from ..facts import FIGURES

LISTED_SHARDS = 3
"""Unfinished shards that the text names; `--json` names all."""
_BARS = "▁▂▃▄▅▆▇█"
WIDTH = 100
"""Columns that the text keeps to, but for a name that is longer."""


def cache_as_text(facts: Mapping[str, Any], path: str) -> str:
    """A page for people."""
    facts, path = one_line(facts), one_line(path)
    plan, shards, stored = facts["plan"], facts["shards"], facts["stored_views"]
    done = f"{shards['done']} of {counted(shards['total'], 'shard')}"
    lines = [
        f"{path}: {'complete' if facts['complete'] else 'UNFINISHED'}",
        f"  root         {facts['root']}",
        f"  plan         {facts['fingerprint']}: dataset {plan['dataset']!r}, {plan['size']} px, seed {plan['seed']}, decoder {plan['decoder']}"
        + (f", resizer {plan['resizer']}" if plan["resizer"] != plan["decoder"] else ""),
        *_block("policy", [f"{facts['policy']['name']}:", *facts["policy"]["words"]], joined=True),
        f"  rows         {facts['rows']:,} x {counted(facts['views'], 'view')} in {done}",
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
            else f"with fewer than {counted(lack['views'], 'view')}" + ("" if lack["what"] == "views" else f" of {lack['what']}")
        )
        lines.append(f"{counted(len(lack['shards']), 'shard')} {what}: {named}{more}")
    return lines + ["run 'kdcache extract' again with the same arguments to finish it"] * bool(lines)


def _labels_in_words(facts: Mapping[str, Any]) -> list[str]:
    labels = facts["labels"]
    if not labels["classes"]:
        return ["none"]
    some = f"{labels['labelled']:,} of {counted(facts['rows'], 'row')}" if labels["labelled"] != facts["rows"] else "every row"
    spread, classes = labels["per_class"], counted(labels["classes"], "class")
    unused = labels["highest"] + 1 - labels["classes"]
    lines = [
        f"{some} labelled, {classes}, labels up to {labels['highest']}" + (f" ({unused:,} of them on no row)" if unused else ""),
        f"{spread['min']:,} to {spread['max']:,} rows a class, median {spread['median']:,.0f}"
        if spread["min"] != spread["max"]
        else f"{counted(spread['min'], 'row')} of each",
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
        views = f"{counted(part['views'], 'view'):>8}" if part["views"] is not None else f"{'':>8}"
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
        which = f"its {counted(teacher['labelled'], 'unmixed view')}" if mixes else f"its own {counted(teacher['labelled'], 'view')}"
        lines.append(f"  accuracy     {teacher['top1']:.2f} % top-1 on {which}")
    if (logits := teacher["logits"]) is not None and logits["rows"]:
        e, c = logits["entropy"], logits["confidence"]
        lines += [
            f"  entropy      mean {e['mean']:.4g} nats of at most {e['most']:.4g}; 5 % below {e['q05']:.4g}, half below {e['q50']:.4g}, 95 % below {e['q95']:.4g}",
            f"  confidence   mean {100 * c['mean']:.1f} % for the likeliest class; 5 % below {100 * c['q05']:.1f}, half below {100 * c['q50']:.1f} %",
            f"               (softmax of {logits['rows']:,} of {counted(logits['of_rows'], 'row')}, view {logits['view']}, from {counted(logits['shards'], 'shard')})",
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
    figures = [figure for figure in FIGURES if any(figure in t for t in targets.values())]
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
        f"  samples      {facts['samples']:,}: {counted(facts['rows'], 'row')}, {len(facts['skipped'])} skipped",
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
