"""What verify found, as values: problems, the verdict, and how people are told. Used by `verify`, `replay`, `recompute` and `repair`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kdcache.console import counted, human_bytes

Kind = Literal["missing", "corrupt", "plan", "index", "pixels", "source", "teacher", "quarantined", "extra"]

MAX_LISTED = 20
"""Problems of one shard, and lines of one kind, that are listed; the rest are counted."""

NEXT_STEPS: dict[tuple[Kind, str], str] = {
    ("missing", ""): "'kdcache verify CACHE --repair' shows what it would make again",
    ("corrupt", ""): "'kdcache verify CACHE --repair' shows what it would make again; look at the disk",
    ("plan", ""): "'kdcache verify CACHE --repair' puts back, or makes again, what records of another cache or place have replaced",
    ("index", ""): "'kdcache verify CACHE --repair' rebuilds the index; nothing else is lost",
    ("pixels", ""): "install the versions of then, or restore the tars: students can't train on these views as they are",
    ("pixels", "decoder drift"): "install the versions of then: students can't train on these views with those of now",
    ("pixels", "source drift"): "restore the tars: students can't train on these views as they are",
    ("source", ""): "restore the tars, or pass --data with SHARDS where they lie now",
    ("source", "decoder drift"): "nothing, to train on what is stored; to add views install the versions of then",
    ("teacher", ""): "'kdcache verify CACHE --repair' if records are of another cache; if the teacher can't be had pass --model or --checkpoint",
    ("teacher", "teacher drift"): "find the weights and the versions of then (--model, --checkpoint), or record the new teacher under another --name",
    ("quarantined", ""): "look at the shards that were given up, then run 'kdcache extract' again",
    ("extra", ""): "run the extraction that was cut off again, or remove them: 'kdcache gc CACHE' shows them",
}
"""Kind of problem and its cause ('' where there is none of its own) → what to do next."""

REPAIR = "kdcache verify CACHE --repair"
"""What a hint is told by that advises a repair."""
REPAIR_STEPS = {
    "planned": "see below what the repair does about it",
    "done": "the repair did not mend it: 'failed' above says why; if nothing failed, look at the disk",
}
"""How far a repair is → what to do next, in place of a hint that advises one."""

CAUSES = ("decoder drift", "source drift", "teacher drift")


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be."""

    kind: Kind
    shard: str
    key: str
    detail: str
    path: str = ""
    """The file of the cache that it is about, if it is one."""

    @property
    def cause(self) -> str:
        """The drift that the detail begins with, or ''."""
        start = self.detail.partition(":")[0]
        return start if start in CAUSES else ""

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "shard": self.shard, "key": self.key, "detail": self.detail}


@dataclass
class Verdict:
    """What verify found. `notes` are facts that are no problems."""

    root: str | None = None
    fingerprint: str | None = None
    shards: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    views_replayed: int = 0
    rows_recomputed: int = 0
    """Views of rows that a teacher saw again."""
    finished: bool = True
    """Whether every shard that was asked for has its views and every target."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)
    """Files whose bytes were compared with their digests; what differs is among the problems."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def words(self) -> str:
        """The verdict: sound, sound but unfinished, or not sound."""
        if self.problems:
            return f"NOT SOUND, {counted(len(self.problems), 'problem')}"
        return "sound" if self.finished else "sound, but unfinished"

    @property
    def line(self) -> str:
        """One line that names the cache and says what became of it. A student's checkpoint and export hold the same root and fingerprint."""
        return f"root {self.root} fingerprint {self.fingerprint}: {self.words}"

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "root": self.root,
            "shards": self.shards,
            "rows": self.rows,
            "problems": [problem.to_json() for problem in self.problems],
        }


def as_lines(verdict: Verdict, path: str, *, repair: Literal["planned", "done"] | None = None) -> Iterator[str]:
    """The verdict for people: problems, notes, a table of what to do next, what was read, and the one line.

    repair: how far one is that was asked for; it is not advised then.
    """
    counts = Counter(problem.kind for problem in verdict.problems)
    listed: Counter[str] = Counter()
    for problem in verdict.problems:
        listed[problem.kind] += 1
        if listed[problem.kind] <= 5 * MAX_LISTED:
            place = " ".join(part for part in (problem.shard, problem.key) if part)
            detail = problem.detail.removesuffix(f"; run '{REPAIR}'") if repair else problem.detail
            yield f"{problem.kind:>11}  {place}  {detail}" if place else f"{problem.kind:>11}  {detail}"
        elif listed[problem.kind] == counts[problem.kind]:
            yield f"{'':>11}  and {counts[problem.kind] - 5 * MAX_LISTED} more of this kind; --json lists all"
    for note in verdict.notes:
        yield f"{'note':>11}  {note}"
    if counts:
        yield ""
        yield f"{'what':>11}  {'cause':<13}  {'count':>5}  what to do next"
        for (kind, cause), count in Counter((problem.kind, problem.cause) for problem in verdict.problems).items():
            step = NEXT_STEPS.get((kind, cause)) or NEXT_STEPS[kind, ""]
            step = REPAIR_STEPS[repair] if repair and REPAIR in step else step
            yield f"{kind:>11}  {cause:<13}  {count:>5}  {step}"
        yield ""
    read = (
        f"{path}: {counted(verdict.files, 'file')}, {human_bytes(verdict.bytes)}, {counted(verdict.shards, 'shard')}, {counted(verdict.rows, 'row')}"
    )
    if verdict.views_replayed:
        drift = any(problem.kind in ("pixels", "source") for problem in verdict.problems)
        read += f", {counted(verdict.views_replayed, 'view')} compared{'' if drift else ': no drift'}"
    if verdict.rows_recomputed:
        drift = any(problem.kind == "teacher" for problem in verdict.problems)
        read += f", {counted(verdict.rows_recomputed, 'view')} seen again by the teacher{'' if drift else ': no drift'}"
    yield read
    yield verdict.line
