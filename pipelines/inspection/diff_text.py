"""What `pipelines.diff` found, for people at a terminal. Nothing is read here: facts in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.console import counted, one_line

from ..diff import MAX_EXAMPLES


def diff_as_text(facts: Mapping[str, Any]) -> str:
    """A short table for people: what is equal is said in a word, what differs with both values."""
    facts = one_line(facts)
    lines = [_cache_in_words(side.upper(), facts[side]) for side in ("a", "b")]
    if facts["identical"]:
        lines.append(f"identical: the root {facts['a']['root']} names the content of both")
        return "\n".join([*lines, *_section("made with", _provenance_in_words(facts["provenance"]))])
    lines.append("they differ:")
    lines += _section("plan", [text.removeprefix("plan.") for text in _fields(facts["plan"])] or ["equal"])
    lines += _section("shards", _shards_in_words(facts))
    lines += _section("rows", _rows_in_words(facts["rows"]))
    lines += _section("views", _views_in_words(facts))
    lines += _section("labels", _examples_in_words(facts["labels"], "shared rows have other labels"))
    lines += _section("skipped", _examples_in_words(facts["skipped"], "skipped in one only, or for another reason"))
    lines += _section("pixels", _pixels_in_words(facts))
    lines += _section("made with", _provenance_in_words(facts["provenance"]) or ["equal"])
    teachers = facts["teachers"]
    for side in ("a", "b"):
        if teachers[f"only_{side}"]:
            lines += _section("teachers", [f"only in {side.upper()}: {', '.join(teachers[f'only_{side}'])}"])
    if teachers["only_a"] and teachers["only_b"] and not teachers["pairs"]:
        lines += _section("", [f"--teacher {teachers['only_a'][0]}={teachers['only_b'][0]} compares these two"])
    for pair in teachers["pairs"]:
        lines += _pair_in_words(pair)
    return "\n".join(lines)


def _cache_in_words(side: str, one: Mapping[str, Any]) -> str:
    return f"{side}  {one['path']}: root {one['root']}, {counted(one['rows'], 'row')} x {counted(one['views'], 'view')} in {counted(one['shards'], 'shard')}"


def _section(title: str, texts: Sequence[str]) -> list[str]:
    return [f"  {title if not place else '':<11} {text}" for place, text in enumerate(texts)]


def _value(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{one['field']}: A {_value(one['a'])}, B {_value(one['b'])}" for one in found]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_EXAMPLES} more" if len(names) > MAX_EXAMPLES else ""
    return ", ".join(names[:MAX_EXAMPLES]) + more


def _shards_in_words(facts: Mapping[str, Any]) -> list[str]:
    shards = facts["shards"]
    lines = [f"{shards['shared']:,} in both"]
    lines += [f"{len(shards[f'only_{side}']):,} only in {side.upper()}: {_listed(shards[f'only_{side}'])}" for side in "ab" if shards[f"only_{side}"]]
    if facts["tars"]:
        lines.append(f"{len(facts['tars']):,} made from other tars (members or labels differ): {_listed(facts['tars'])}")
    return lines


def _rows_in_words(rows: Mapping[str, Any]) -> list[str]:
    lines = [f"{rows['shared']:,} in both, {rows['only_a']:,} only in A, {rows['only_b']:,} only in B"]
    return lines + [f"  only in {one['in'].upper()}: shard {one['shard']}, key {one['key']}" for one in rows["examples"]]


def _views_in_words(facts: Mapping[str, Any]) -> list[str]:
    views, shared = facts["views"], facts["shards"]["shared"]
    differ = views["shards_differ"]
    if not differ:
        return [f"{views['a']} in both"]
    where = "every shared shard" if len(differ) == shared else f"{len(differ):,} of {shared:,} shared shards: {_listed(differ)}"
    return [f"{views['a']} in A, {views['b']} in B; other ones in {where}"]


def _examples_in_words(found: Mapping[str, Any], what: str) -> list[str]:
    if not found["differ"]:
        return ["equal"]
    return [
        f"{found['differ']:,} {what}",
        *(f"  shard {one['shard']}, key {one['key']}: A {_value(one['a'])}, B {_value(one['b'])}" for one in found["examples"]),
    ]


def _pixels_in_words(facts: Mapping[str, Any]) -> list[str]:
    pixels = facts["pixels"]
    if pixels["columns"] == pixels["columns_equal"]:
        return ["equal in every view of every shared shard" if pixels["columns"] else "no view in both"]
    lines = [f"digests agree for {pixels['columns_equal']:,} of {pixels['columns']:,} (shard, view) as a whole"]
    if pixels["rows"]:
        lines.append(f"{pixels['differ']:,} of {pixels['rows']:,} shared views that were looked at differ")
        lines += [f"  shard {one['shard']}, key {one['key']}, view {one['view']}" for one in pixels["examples"][:1]]
    if pixels["differ"]:
        lines.append("the teachers saw other images there: distances below are not of the teachers alone")
    return lines


def _provenance_in_words(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{one['name']}: A {' and '.join(one['a']) or 'none'}, B {' and '.join(one['b']) or 'none'}" for one in found]


def _pair_in_words(pair: Mapping[str, Any]) -> list[str]:
    name = pair["a"] if pair["a"] == pair["b"] else f"{pair['a']} in A, {pair['b']} in B"
    lines = ["", f"  teacher     {name}", *_section("identity", _fields(pair["identity"]) or ["equal"])]
    if pair["tail"]:
        whole = pair["tail"][0]
        only = next((side for side, other in (("a", "b"), ("b", "a")) if whole["field"] == "tail" and whole[other] is None), None)
        lines += _section("tail", [f"only in {only.upper()}: {' → '.join(whole[only]['modules'])}"] if only else _fields(pair["tail"]))
    for side in ("a", "b"):
        if pair[f"only_{side}"]:
            lines += _section("targets", [f"only in {side.upper()}: {', '.join(pair[f'only_{side}'])}"])
    targets = pair["targets"]
    for name, target in targets.items():
        if target["shards_differ"]:
            where = f"{len(target['shards_differ']):,} of the shared shards: {_listed(target['shards_differ'])}"
            lines += _section("views", [f"{name}: other ones in {where}"])
        if cards := [one for one in target["card"] if one["field"] not in ("encoding", "name") and not one["field"].startswith("components.")]:
            lines += _section("card", [f"{name}: {text}" for text in _fields(cards)])
    return lines + (_targets_in_words(targets) if targets else [])


def _targets_in_words(targets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("target", "encoding", "views", "compared", "rel L2", "stored", "cosine", "max diff", "KL(A|B)", "KL(B|A)", "top-1 =")
    ]
    farthest: list[str] = []
    for name, t in targets.items():
        encoding, views = (f"{t[key]['a']}" if t[key]["a"] == t[key]["b"] else f"{t[key]['a']} / {t[key]['b']}" for key in ("encoding", "views"))
        stored = "/".join("-" if t["stored_rel_l2"][side] is None else f"{t['stored_rel_l2'][side]:.1g}" for side in "ab")
        if not t["comparable"]:
            rows.append((name, encoding, views, "other shapes", *[""] * 7))
        elif not t["rows"]:
            rows.append((name, encoding, views, "no row", "", stored, *[""] * 5))
        else:
            logits = (f"{t['kl_ab']:.2g}", f"{t['kl_ba']:.2g}", f"{t['top1_agreement']:.1f} %") if "kl_ab" in t else ("", "", "")
            error = "equal" if t["equal_rows"] == t["rows"] else f"{t['rel_l2']:.2g}"
            rows.append((name, encoding, views, f"{t['rows']:,}", error, stored, f"{t['cosine']:.6f}", f"{t['max_abs']:.2g}", *logits))
            if t["worst"]["rel_l2"] > 0:
                worst = t["worst"]
                farthest.append(f"  farthest    {name}: {worst['rel_l2']:.2g} in shard {worst['shard']}, key {worst['key']}, view {worst['view']}")
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in used}
    table = ["  " + " ".join(f"{row[c]:<{widths[c]}}" if c < 2 else f"{row[c]:>{widths[c]}}" for c in used).rstrip() for row in rows]
    return [*table, *farthest]
