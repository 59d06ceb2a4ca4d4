"""The runs of a sweep, opened and checked: ids, what they differ in, what they cost, how far they are. Second step of a sweep.

All that can be known before hours are spent is asked here: whether every student, method and optimizer can be built, and every target is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.console import counted
from kdcache.errors import KDCacheError, UsageError
from kdcache.join import EpochBatches
from kdcache.model_cost import ModelCost, cost_of
from kdcache.plan import canonical_json
from kdcache.students import build_student

from ..engines import Opener, epochs_kept
from ..training.loop import make_batches
from ..training.run import Run
from ..training.watching import check_watchers
from .file import Sweep, SweepRun

_TOLD = 10
"""Errors that are told one by one."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep."""

    run: Run
    differing: dict[str, Any]
    """Field → value, of the fields in which runs of the sweep differ, student and method aside."""
    cost: ModelCost

    @property
    def steps(self) -> int:
        """Updates of an epoch."""
        return len(self._batches)

    @property
    def images(self) -> int:
        """Views that an epoch trains on."""
        return len(self._batches) * self._batches.step_size

    @property
    def _batches(self) -> EpochBatches:
        return make_batches(self.run.config, self.run.data, self.run.processes)

    @property
    def epochs_done(self) -> int:
        """That are kept."""
        return self.run.config.epochs if self.run.is_finished else min(epochs_kept(self.run.folder), self.run.config.epochs)

    @property
    def status(self) -> str:
        """done, resume (begun) or new."""
        return "done" if self.run.is_finished else "resume" if self.run.folder.exists() else "new"


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, each once, in the file's order."""

    sweep: Sweep
    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...]
    """What a person should know of it."""

    @property
    def out(self) -> Path:
        """The folder of the runs' folders."""
        return self.runs[0].run.folder.parent

    @property
    def fields(self) -> tuple[str, ...]:
        """In which the runs differ, student and method aside."""
        return tuple(dict.fromkeys(name for planned in self.runs for name in planned.differing))


def plan_sweep(sweep: Sweep) -> SweepPlan:
    """Open the cache and check every run. Raises the error of the first run that can't be trained, with those of the others."""
    opened = list(_open(sweep))
    fields = _differing_fields(sweep.runs)
    places: dict[str, list[SweepRun]] = {}
    planned: list[PlannedRun] = []
    costs: dict[bytes, ModelCost] = {}
    for asked, run in opened:
        places.setdefault(run.id, []).append(asked)
        if len(places[run.id]) > 1:
            continue
        planned.append(PlannedRun(run, {name: _value(asked, name) for name in fields}, _cost(run, costs)))
    notes = [
        f"{' and '.join(one.place for one in alike)} are the same: {run_id}; it is trained once" for run_id, alike in places.items() if len(alike) > 1
    ]
    return SweepPlan(sweep, tuple(planned), tuple(notes))


def _open(sweep: Sweep) -> Iterator[tuple[SweepRun, Run]]:
    """Every run with what the file says of it. Raises after all were tried."""
    opener = Opener()
    errors: list[tuple[SweepRun, KDCacheError]] = []
    built: set[bytes] = set()
    for asked in sweep.runs:
        config = dataclasses.replace(asked.config, out=str(Path(asked.config.out).expanduser().absolute()))
        try:
            check_watchers(tensorboard=config.log_tensorboard, wandb=config.log_wandb)
            (run,) = opener.runs(config)
            how = {**{name: value for name, value in run.recipe.items() if name not in _NOT_BUILT}, "device": config.device}
            if (key := canonical_json(how)) not in built:
                run.check_build()
            if not run.is_finished:  # of which nothing was built
                built.add(key)
        except KDCacheError as error:
            errors.append((asked, error))
            continue
        if not errors:
            yield asked, run
    if errors:
        first = errors[0][1]
        places: dict[str, list[str]] = {}
        for asked, problem in errors:
            places.setdefault(str(problem), []).append(asked.place)
        told = "".join(
            f"\n  {alike[0]}{f' and {len(alike) - 1} more' if len(alike) > 1 else ''}: {text}" for text, alike in list(places.items())[:_TOLD]
        )
        more = f"\n  and {len(places) - _TOLD} more errors" if len(places) > _TOLD else ""
        kind = UsageError if isinstance(first, UsageError) else KDCacheError
        raise kind(
            f"sweep file {sweep.path}: {len(errors)} of its {counted(len(sweep.runs), 'run')} can't be trained; nothing was begun:{told}{more}"
        ) from first


_NOT_BUILT = ("epochs", "seed", "lr", "weight_decay", "clip_grad", "sched", "warmup_epochs", "min_lr", "val_interval")
"""Fields of a recipe that nothing is built from whose building could fail."""


def _cost(run: Run, known: dict[bytes, ModelCost]) -> ModelCost:
    """Of a run's student, counted once for all runs that have it."""
    config, data = run.config, run.data
    key = canonical_json({name: run.recipe[name] for name in ("student", "model_kwargs", "num_classes")})
    if key not in known:
        student = build_student(
            run.student_name, num_classes=data.num_classes, view_size=data.cache.plan.size, model_args=config.model_kwargs, seed=config.seed
        )
        known[key] = cost_of(student.model, student.input_size)
    return known[key]


def _differing_fields(runs: Sequence[SweepRun]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.chosen if name not in ("student", "method"))
    return [name for name in names if len({canonical_json({"value": _value(run, name)}) for run in runs}) > 1]


def _value(run: SweepRun, name: str) -> Any:
    """A field's value in a run; None for one of a method's or a model's that it was not given."""
    return run.leaves[name].value if name in run.leaves else getattr(run.config, name, None)


def shown_value(value: Any) -> str:
    """A field's value for people; nothing for one that was not given."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)  # 0 of 0.0
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
