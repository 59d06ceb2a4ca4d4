"""OUT/report.html: what a sweep has come to, as one page to look at and to send on. Written anew after every run, so it may be of a part.

Accuracy against what a student costs, with the front of those that none beats; learning curves; what extraction cost against what teachers in
memory would have cost; every run. The page stands alone, as that of `inspect`, and is a function of the runs' folders and the sweep's file.

A *pass* is one view that a teacher sees. Passes are exact, whatever the machine; hours need the file's `teacher_seconds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from kdcache.console import human_seconds

from ..facts import teacher_passes
from ..page.charts import Chart, Curve, curves, scatter
from ..page.render import render_page, replace_page
from .plan import SweepPlan, shown_value
from .results import Result

_CURVES = 60
"""Runs that are drawn as learning curves: the most accurate."""
_KINDS = 8
"""Colours and forms that charts have; methods beyond share the last."""


def write_report(plan: SweepPlan, results: Sequence[Result]) -> str:
    """Write OUT/report.html, and return its path. results: in the order of the table. Raises StoreError."""
    path = str(plan.out / "report.html")
    replace_page(path, build_report(plan, results), remedy="the runs are whole; give --out a folder that can be written")
    return path


def build_report(plan: SweepPlan, results: Sequence[Result]) -> bytes:
    """The page, UTF-8."""
    look = _Look(plan)
    statuses = Counter(result.status for result in results)
    measured = [result for result in results if result.top1 is not None and result.status == "done"]
    fronts = {
        name: [measured[one] for one in front_of([(cost(result), result.top1 or 0.0) for result in measured])]
        for name, (_, cost, _) in _COSTS.items()
    }
    return render_page(
        "report.html",
        package=__package__,
        styles=["report.css"],
        scripts=["report.js"],
        name=PurePath(plan.sweep.path).stem,
        dataset=plan.runs[0].run.data.cache.plan.dataset,
        root=plan.runs[0].run.data.cache.root,
        teachers=sorted({teacher for planned in plan.runs for teacher in planned.run.data.teachers}),
        statuses=statuses,
        total=len(results),
        results=results,
        fields=plan.fields,
        shown_value=shown_value,
        look=look,
        best=measured[0] if measured else None,
        students=len({result.student for result in results}),
        trained=sum(result.own_seconds for result in results),
        with_ema=any("eval_raw_top1" in result.best for result in results),
        scatters=[_scatter(measured, fronts[name], name, look) for name in _COSTS if measured],
        fronts={result.id: [name for name, front in fronts.items() if result in front] for result in results},
        curves=_curves(results, look),
        curves_shown=_CURVES,
        curves_left_out=max(0, sum(bool(result.history) for result in results) - _CURVES),
        payback=_payback(plan, results),
        failed=[result for result in results if result.status == "failed"],
    )


class _Look:
    """Each method's colour and form, and the words for a run."""

    def __init__(self, plan: SweepPlan) -> None:
        methods = dict.fromkeys(planned.run.config.method for planned in plan.runs)
        self.kinds = {method: f"v{min(number, _KINDS - 1)}" for number, method in enumerate(methods)}

    def title(self, result: Result) -> str:
        """'resnet18, kd, lr=0.001: top-1 91.20 %'."""
        differing = [f"{name}={shown_value(value)}" for name, value in result.planned.differing.items() if value is not None]
        return f"{', '.join([result.student, result.method, *differing])}: " + (
            f"top-1 {result.top1:.2f} %" if result.top1 is not None else result.status
        )

    def curve(self, result: Result, values: Sequence[tuple[float, float]], more: str = "") -> Curve:
        return Curve(values, self.kinds[result.method], result.method, f"run-{result.id}", self.title(result) + more)


# --- accuracy against cost -------------------------------------------------------------------------------------------

_COSTS: dict[str, tuple[str, Callable[[Result], float], Callable[[float], str]]] = {
    "parameters": ("parameters, millions", lambda result: result.planned.cost.params / 1e6, lambda value: f"{value:.3g} M parameters"),
    "MACs": ("multiply-accumulates of an image, 10⁹", lambda result: result.planned.cost.macs / 1e9, lambda value: f"{value:.3g} GMACs"),
    "time": ("the student's own training time, ", lambda result: result.own_seconds, human_seconds),
}
"""What a student costs: name → (words for the axis, figure above 0, the figure in words). Time, in seconds, is drawn in the unit that fits."""
_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (cost, accuracy) no other beats, being as cheap and as accurate and better in one; the cheapest first, of equal ones the first."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda one: (points[one][0], -points[one][1], one)):
        if not front or points[number][1] > points[front[-1]][1]:
            front.append(number)
    return front


def _scatter(measured: Sequence[Result], front: Sequence[Result], name: str, look: _Look) -> tuple[str, Chart]:
    words, cost, in_words = _COSTS[name]
    unit = 1.0
    if name == "time":
        unit, unit_words = next((one for one in _UNITS if max(map(cost, measured)) >= one[0]), _UNITS[-1])
        words += unit_words

    def place(result: Result) -> tuple[float, float]:
        return max(cost(result) / unit, 1e-9), result.top1 or 0.0

    things = [look.curve(result, [place(result)], f", {in_words(cost(result))}") for result in measured]
    return name, scatter(things, [place(result) for result in front], x_title=words, y_title="")


def _curves(results: Sequence[Result], look: _Look) -> list[tuple[str, Chart]]:
    """(what, chart) of accuracy and of the training loss by epoch, where there are any."""
    shown = [result for result in results if result.history][:_CURVES]
    charts: list[tuple[str, Chart]] = []
    for what, column, is_loss in (("Top-1 of the evaluations, %", "eval_top1", False), ("Training loss, logarithmic", "train_loss", True)):
        things = [
            look.curve(result, values)
            for result in shown
            if (values := [(row["epoch"] + 1, row[column]) for row in result.history if column in row and (not is_loss or row[column] > 0)])
        ]
        if things:
            charts.append((what, curves(things[::-1], x_title="epochs", y_title="", log_y=is_loss)))
    return charts


# --- break-even ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Payback:
    """What the cache cost against what it saved; all in passes."""

    spent: int
    """Of extraction, over the teachers that the sweep's runs learn from."""
    saved: int
    """That teachers in memory would have needed for the epochs that are done."""
    to_come: int
    """Likewise for all epochs of all runs, the done ones with them."""
    distilled: int
    """Runs that learn from a teacher, done or not."""
    paid_in: tuple[Result, int] | None
    """The run, in the sweep's order, in whose epochs extraction was paid for, and in which epoch (from 1); None if not yet."""
    seconds_a_pass: float | None
    """By what extraction measured."""
    trained: float
    """Seconds that the distilled students took themselves."""
    chart: tuple[str, Chart] | None
    """What it shows, and the chart."""


def _payback(plan: SweepPlan, results: Sequence[Result]) -> Payback | None:
    """None where no run learns from a teacher."""
    in_order = {planned.run.id: number for number, planned in enumerate(plan.runs)}
    distilled = sorted((result for result in results if result.planned.run.data.teachers), key=lambda result: in_order[result.id])
    if not distilled:
        return None
    cache = distilled[0].planned.run.data.cache
    passes = {name: teacher_passes(cache.layer(name)) for result in distilled for name in result.planned.run.data.teachers}
    spent, saved, paid_in = sum(passes.values()), 0, None
    rising: list[tuple[float, float]] = [(0.0, 0.0)]
    for number, result in enumerate(distilled, start=1):
        before, saved = saved, saved + result.teacher_views
        if paid_in is None and saved >= spent and result.history:
            paid_in = result, max(1, -(-(spent - before) * len(result.history) // result.teacher_views))
        rising.append((float(number), float(saved)))
    to_come = sum(result.planned.images * result.planned.run.config.epochs * len(result.planned.run.data.teachers) for result in distilled)
    of_all = sum(teacher_passes(layer) for layer in cache.teachers.values())
    seconds = plan.sweep.teacher_seconds
    chart: tuple[str, Chart] | None = None
    if saved:
        last, most = float(len(distilled)), max(spent, saved)
        unit, words = next((unit, words) for unit, words in ((1e9, "10⁹"), (1e6, "10⁶"), (1e3, "10³"), (1, "")) if most >= unit)
        things = [
            Curve([(0.0, spent / unit), (last, spent / unit)], "v0", "cache", "payback", f"the cache: {spent:,} passes, once"),
            Curve([(x, y / unit) for x, y in rising], "v3", "online", "payback", f"teachers in memory: {saved:,} passes so far"),
        ]
        chart = (
            f"Teacher passes{', ' if words else ''}{words}",
            curves(things, x_title="distilled runs, in the sweep's order", y_title="", from_zero=True),
        )
    return Payback(
        spent, saved, to_come, len(distilled), paid_in, seconds / of_all if seconds is not None and of_all else None,
        sum(result.own_seconds for result in distilled), chart,
    )  # fmt: skip
