"""What a sweep's runs have come to: read from their folders, ranked, written as leaderboard.csv. Used while it runs and at its end."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines import Entry
from ..training.gang import ERROR_FILE
from ..training.loop import best_epoch
from ..training.watching import replace_file
from .plan import PlannedRun, SweepPlan


@dataclass(frozen=True)
class Result:
    """One run."""

    planned: PlannedRun
    status: str
    """done, failed, unfinished or waiting (not begun)."""
    history: tuple[Mapping[str, Any], ...]
    """Rows of summary.csv, numbers."""
    images: int
    """Trained on, in whole epochs."""
    seconds: float
    """That passed meanwhile, evaluation included; for a run of a gang those of the others too."""
    own_seconds: float
    """Of these what the student itself took: without waiting for batches, or for others."""
    error: str = ""

    @property
    def id(self) -> str:
        return self.planned.run.id

    @property
    def student(self) -> str:
        return self.planned.run.student_name

    @property
    def method(self) -> str:
        return self.planned.run.config.method

    @property
    def best(self) -> Mapping[str, Any]:
        """The epoch whose weights are exported: the best measured one; empty where none was measured."""
        return self.history[best_epoch(self.history)] if any("eval_top1" in row for row in self.history) else {}

    @property
    def top1(self) -> float | None:
        """Percent, of what is exported."""
        return self.best.get("eval_top1")

    @property
    def teacher_views(self) -> int:
        """Views of teachers that were replayed, which teachers in memory would have had to see again."""
        return self.images * len(self.planned.run.data.teachers)

    def row(self) -> dict[str, Any]:
        """Of the leaderboard."""
        run = self.planned.run
        return {
            "id": self.id,
            "student": self.student,
            "method": self.method,
            **{name: _cell(value) for name, value in self.planned.differing.items()},
            "params": self.planned.cost.params,
            "macs": self.planned.cost.macs,
            "top1": self.top1,
            "top5": self.best.get("eval_top5"),
            "weights": "ema" if run.config.model_ema else "raw",
            "raw_top1": self.best.get("eval_raw_top1", self.top1),
            "epochs": len(self.history),
            "seconds": round(self.seconds, 3),
            "own_seconds": round(self.own_seconds, 3),
            "images_per_second": round(self.images / self.seconds, 1) if self.seconds else None,
            "status": self.status,
            "path": str(run.folder),
            "error": self.error,
        }

    def entry(self) -> Entry:
        """As `train` reports a run that was finished before."""
        status = "already done" if self.status == "done" else self.status
        return {
            "id": self.id, "student": self.student, "method": self.method, "epochs": len(self.history), "top1": self.top1,
            "seconds": round(self.seconds, 3), "path": str(self.planned.run.folder), "status": status,
        }  # fmt: skip


def read_results(plan: SweepPlan, errors: Mapping[str, str]) -> list[Result]:
    """Every run of a sweep, the most accurate first, then those without a measurement in the sweep's order, then what is not done.

    errors: id → why a run failed.
    """
    results = [read_result(planned, errors.get(planned.run.id)) for planned in plan.runs]
    order = {"done": 0, "unfinished": 1, "failed": 2, "waiting": 3}
    return sorted(results, key=lambda result: (order[result.status], -(result.top1 if result.top1 is not None else -1.0)))


def settle(plan: SweepPlan, entries: Sequence[Entry]) -> list[Entry]:
    """Entries at a sweep's end: a run that failed here, because another process was training it, may be finished now."""
    by_id = {planned.run.id: planned for planned in plan.runs}
    return [
        read_result(by_id[entry["id"]]).entry() if entry["status"] == "failed" and by_id[entry["id"]].run.is_finished else entry for entry in entries
    ]


def read_result(planned: PlannedRun, error: str | None = None) -> Result:
    """One run, by what its folder holds. error: why it failed just now; of no account if another process has finished it since."""
    run = planned.run
    error = None if run.is_finished else error
    history = _read_summary(run.folder)
    epochs = read_epochs(run.folder)[: len(history)]
    if error is None and not run.is_finished:
        error = _read(run.folder / ERROR_FILE).partition("\n")[0] or None  # of a command before this one
    status = "failed" if error is not None else "done" if run.is_finished else "unfinished" if run.folder.exists() else "waiting"
    images, seconds = (sum(line.get(name, 0) for line in epochs) for name in ("images", "seconds"))
    own_seconds = sum(line.get("own_seconds", line.get("seconds", 0)) for line in epochs)
    return Result(planned, status, tuple(history), int(images), float(seconds), float(own_seconds), error or "")


def write_leaderboard(plan: SweepPlan, results: Sequence[Result]) -> Path:
    """OUT/leaderboard.csv: a line a run, in the order given. Raises StoreError."""
    text = io.StringIO()
    rows = [result.row() for result in results]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = plan.out / "leaderboard.csv"
    replace_file(path, text.getvalue())
    return path


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are of whole epochs."""
    found = []
    for line in _read(folder / "metrics.jsonl").splitlines():
        if '"step": ' in line:  # most are, and there may be many
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # half a line: a kill, or a run that is writing it
            continue
    return found


def _read_summary(folder: Path) -> list[dict[str, Any]]:
    """Of each epoch what was measured."""
    rows = csv.DictReader(io.StringIO(_read(folder / "summary.csv")))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _cell(value: Any) -> Any:
    """A value of a file as one word: numbers and names as they are, lists and mappings as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)
