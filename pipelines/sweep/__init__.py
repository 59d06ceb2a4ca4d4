"""`kdcache train CACHE --sweep FILE.yaml`: many students, methods and settings against one cache. Told top to bottom: read, plan, train, report.

    file      the YAML file → configs
    plan      ids, what differs, cost of each student, what is done already
    speed     predicted times, for --dry-run
    results   what the runs' folders hold → leaderboard.csv
    report    report.html

A run's id is a digest of all that decides its result, so a sweep that is run again skips what is done and goes on with what is not. A run that
fails ends nothing but itself. OUT/leaderboard.csv and OUT/report.html are written anew after every run, so that a sweep can be watched.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from kdcache.console import aligned, counted, human_seconds, say
from kdcache.errors import StoreError

from ..engines import Engine, Entry, InProcess, Job, plan_jobs
from .file import Sweep, SweepRun, read_sweep
from .plan import PlannedRun, SweepPlan, plan_sweep, shown_value
from .report import write_report
from .results import read_result, read_results, settle, write_leaderboard
from .speed import Prediction, predict


def run_sweep(plan: SweepPlan, *, engine: Engine | None = None, gang: int = 1, progress: bool = False) -> Iterator[Entry]:
    """Train what is not done. An entry for every run, as soon as it is known: "already done", "done", or "failed" with its "error".

    engine: where jobs run; by default one after another in this process. gang: runs of a job, at most. Raises StoreError if the results can't
    be written; nothing else ends a sweep.
    """
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"--out {plan.out}: can't be used as a folder: {error.strerror}") from error
    by_id = {planned.run.id: planned for planned in plan.runs}
    done = [planned for planned in plan.runs if planned.run.is_finished]
    left = [planned.run for planned in plan.runs if planned not in done]
    engine = engine or InProcess()
    jobs = plan_jobs(left, gang=gang, slots=engine.slots if left and gang > 1 else 1)
    errors: dict[str, str] = {}
    _publish(plan, errors)
    yield from (read_result(planned).entry() for planned in done)
    ended = len(done)
    entries = engine.run(jobs, progress=progress)
    try:
        for entry in entries:
            ended += 1
            if entry["status"] == "failed":
                errors[entry["id"]] = entry["error"]
            _say_end(entry, by_id[entry["id"]], ended, len(plan.runs))
            _publish(plan, errors)
            yield entry
    finally:
        if isinstance(entries, Generator):
            entries.close()  # a signal may have come here: the engine ends its processes now
        _publish(plan, errors)  # with the epochs of runs that a signal ended


def _publish(plan: SweepPlan, errors: Mapping[str, str]) -> None:
    results = read_results(plan, errors)
    write_leaderboard(plan, results)
    write_report(plan, results)


def _say_end(entry: Entry, planned: PlannedRun, ended: int, total: int) -> None:
    top1 = f", top-1 {entry['top1']:.2f} %" if entry["top1"] is not None else ""
    how = (
        f"failed: {entry['error']}"
        if entry["status"] == "failed"
        else f"{counted(entry['epochs'], 'epoch')} in {human_seconds(entry['seconds'])}{top1}"
    )
    say(f"{ended}/{total} {' '.join(filter(None, (entry['id'], _differing_in_words(planned))))}: {how}")


# --- what it would do ------------------------------------------------------------------------------------------------


def describe_plan(plan: SweepPlan, predictions: Mapping[str, Prediction], *, slots: int = 1, gang: int = 1) -> dict[str, Any]:
    """What --dry-run shows, JSON types.

    {"runs": [{"id", "student", "method", "differs", "params", "macs", "epochs", "steps", "status", "epochs_done", "path", "seconds", "left",
    "basis"}], "seconds", "left", "wall_seconds", "slots", "gang", "jobs"}; seconds are null where nothing is known. left, beside the runs: of all
    jobs, as if one after another; wall_seconds: `slots` at a time. A gang takes as long as its students themselves, or as its slowest alone.
    """
    runs = []
    for planned in plan.runs:
        prediction = predictions.get(planned.run.id)
        runs.append(
            {
                "id": planned.run.id,
                "student": planned.run.student_name,
                "method": planned.run.config.method,
                "differs": planned.differing,
                "params": planned.cost.params,
                "macs": planned.cost.macs,
                "epochs": planned.run.config.epochs,
                "steps": planned.steps * planned.run.config.epochs,
                "status": planned.status,
                "epochs_done": planned.epochs_done,
                "path": str(planned.run.folder),
                **(prediction.to_json() if prediction is not None else {"seconds": None, "left": None, "basis": None}),
            }
        )
    jobs = plan_jobs([planned.run for planned in plan.runs if not planned.run.is_finished], gang=gang, slots=slots)
    known = len(predictions) == len(plan.runs)
    known_left = all(run_id in predictions for job in jobs for run_id in job.ids)
    times = [_seconds_of(job, predictions) for job in jobs] if known_left else []
    return {
        "runs": runs,
        "seconds": sum(prediction.seconds for prediction in predictions.values()) if known else None,
        "left": sum(times) if known_left else None,
        "wall_seconds": _wall_seconds(times, slots) if known_left else None,
        "slots": slots,
        "gang": gang,
        "jobs": len(jobs),
    }


def _seconds_of(job: Job, predictions: Mapping[str, Prediction]) -> float:
    """Of a job: loading overlaps with training, and is done once for a gang."""
    known = [predictions[run_id] for run_id in job.ids]
    return max(sum(one.own_left for one in known), max(one.left for one in known))


def _wall_seconds(times: Sequence[float], slots: int) -> float:
    """Jobs in their order, each to the slot that is free first."""
    free = [0.0] * slots
    for seconds in times:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def plan_as_text(plan: SweepPlan, facts: Mapping[str, Any]) -> str:
    """`describe_plan` for people."""
    rows = [("run", "student", "method", "differs", "M params", "GMACs", "steps", "status", "predicted", "from")]
    for planned, run in zip(plan.runs, facts["runs"], strict=True):
        status = f"at epoch {run['epochs_done']} of {run['epochs']}" if run["status"] == "resume" else run["status"]
        cost = f"{run['params'] / 1e6:.3g}", f"{run['macs'] / 1e9:.3g}"
        time = human_seconds(run["seconds"]) if run["seconds"] is not None else "?"
        rows.append(
            (run["id"], run["student"], run["method"], _differing_in_words(planned), *cost, f"{run['steps']:,}", status, time, run["basis"] or "")
        )
    lines = [aligned(rows)]
    count = {status: sum(run["status"] == status for run in facts["runs"]) for status in ("done", "resume", "new")}
    lines.append(f"\n{counted(len(rows) - 1, 'run')}: {count['done']} done, {count['resume']} begun, {count['new']} new")
    if not facts["jobs"]:
        lines.append("nothing is left to train")
    elif facts["left"] is None:
        lines.append("how long is not known: nothing was measured; --time-steps 5 times a few steps of each student and method")
    else:
        at_once = f", {facts['slots']} jobs at a time: about {human_seconds(facts['wall_seconds'])}" if facts["slots"] > 1 else ""
        gangs = f" in {counted(facts['jobs'], 'job')} of up to {facts['gang']} students" if facts["gang"] > 1 else ""
        lines.append(f"what is left takes about {human_seconds(facts['left'])}{gangs} in all{at_once}")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def leaderboard_as_text(plan: SweepPlan, errors: Mapping[str, str]) -> str:
    """The results for people, the best first."""
    rows: list[Sequence[str]] = [
        ("", "student", "method", "differs", "M params", "GMACs", "top1 %", "top5 %", "epochs", "seconds", "img/s", "status", "run")
    ]
    for rank, result in enumerate(read_results(plan, errors), start=1):
        row = result.row()
        figures = [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("top1", "top5")]
        rate = f"{row['images_per_second']:,.0f}" if row["images_per_second"] is not None else "-"
        rows.append(
            (
                str(rank) if result.top1 is not None else "", result.student, result.method, _differing_in_words(result.planned), f"{row['params'] / 1e6:.3g}",
                f"{row['macs'] / 1e9:.3g}", *figures, str(row["epochs"]), f"{row['seconds']:.1f}", rate, result.status, result.id,
            )
        )  # fmt: skip
    return aligned(rows)


def _differing_in_words(planned: PlannedRun) -> str:
    return " ".join(f"{name}={shown_value(value)}" for name, value in planned.differing.items() if value is not None)


__all__ = [
    "PlannedRun", "Sweep", "SweepPlan", "SweepRun", "describe_plan", "leaderboard_as_text", "plan_as_text", "plan_sweep", "predict",
    "read_sweep", "run_sweep", "settle",
]  # fmt: skip
