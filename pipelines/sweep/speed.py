"""How long the runs of a sweep will take, and on what that rests: what runs were measured to take, or a few real steps now. For --dry-run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from kdcache.console import say
from kdcache.device import fitting_threads, resolve_device
from kdcache.errors import StudentError
from kdcache.join import BatchLoader
from kdcache.plan import canonical_json
from kdcache.workers import naming_killed_workers

from ..gang import portion_of
from ..recipes import read_args
from ..run import Run
from ..shared_batch import SharedBatch, dataset_of, union
from .plan import PlannedRun
from .results import read_epochs

BUDGET_S = 20.0
"""Of timing one student and method: no step is begun after it."""


@dataclass(frozen=True)
class Pace:
    """What an image takes, and on what that rests."""

    seconds: float
    """That pass, loading with it; of a run that was in a gang those of the others too."""
    own_seconds: float
    """Of these what the student itself takes."""
    basis: str
    """For people."""


@dataclass(frozen=True)
class Prediction:
    """Of one run."""

    seconds: float
    """All its epochs."""
    left: float
    """Those that are not done."""
    own_left: float
    """Of these what the student itself takes."""
    basis: str
    """What it rests on, for people."""

    def to_json(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "left": round(self.left, 3), "basis": self.basis}


def predict(runs: Sequence[PlannedRun], *, time_steps: int, progress: bool = False) -> dict[str, Prediction]:
    """Run id → prediction; runs of which nothing is known are left out.

    A run's pace comes from its own epochs, or from those of a run of the same student and method, or from `time_steps` steps that are timed now
    (0: none), or from a run of the same student by another method: in this order. Epochs measured include their evaluation, steps do not.
    """
    own = {planned.run.id: pace for planned in runs if (pace := _measured(planned.run)) is not None}
    alike: dict[bytes, Pace] = {}
    of_student: dict[bytes, Pace] = {}
    for planned in runs:
        if (pace := own.get(planned.run.id)) is not None:
            alike.setdefault(_key(planned.run), replace(pace, basis=f"measured: {planned.run.id}"))
            of_student.setdefault(_key(planned.run, method=False), replace(pace, basis=f"measured: {planned.run.id}, another method"))
    waiting = [planned for planned in runs if not planned.run.is_finished and planned.run.id not in own and _key(planned.run) not in alike]
    distinct = {_key(planned.run): planned for planned in reversed(waiting)} if time_steps > 0 else {}
    for key, planned in tqdm(list(distinct.items())[::-1], desc="timing", unit="run", disable=not (progress and distinct)):
        try:
            alike[key] = time_run(planned.run, time_steps)
        except (StudentError, torch.OutOfMemoryError) as error:
            say(f"note: run {planned.run.id} fails in its first steps: {error}")
    found: dict[str, Prediction] = {}
    for planned in runs:
        known = own.get(planned.run.id) or alike.get(_key(planned.run)) or of_student.get(_key(planned.run, method=False))
        if known is not None:
            images, left = (planned.images * number for number in (planned.run.config.epochs, planned.run.config.epochs - planned.epochs_done))
            found[planned.run.id] = Prediction(known.seconds * images, known.seconds * left, known.own_seconds * left, known.basis)
    return found


def _key(run: Run, *, method: bool = True) -> bytes:
    """What decides the time of a step, nearly."""
    recipe, config = run.recipe, run.config
    names = ["student", "model_kwargs", "batch_size", *(["method", "teachers"] if method else [])]
    return canonical_json({**{name: recipe.get(name) for name in names}, "precision": config.precision, "ema": config.model_ema})


def _measured(run: Run) -> Pace | None:
    """Of the run's own epochs, with their evaluations; None without a whole one, or for one of another kind of device."""
    session = read_args(run.folder / "args.yaml").get("session")
    device = str(session.get("device")) if isinstance(session, dict) else ""
    epochs = [line for line in read_epochs(run.folder) if line.get("images")]
    if not epochs or device.partition(":")[0] != resolve_device(run.config.device).type:
        return None
    images = sum(line["images"] for line in epochs)
    seconds, own_seconds = (sum(line.get(name, line["seconds"]) for line in epochs) for name in ("seconds", "own_seconds"))
    return Pace(seconds / images, own_seconds / images, "measured: its own epochs")


def time_run(run: Run, steps: int) -> Pace:
    """Of a run's first steps: the median, without the first step. Nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="kdcache-timing-") as folder:
        config = replace(run.config, out=folder, log_tensorboard=False, log_wandb=False, recovery_interval=0, resume=False)
        twin = Run(config, run.data, run.student_name)
        twin.claim()
        loop = twin.begin()
        portion = portion_of(loop)
        dataset = dataset_of(run.data.cache, union([portion]), check_views=config.check_views)
        loader = BatchLoader(dataset, loop.batches, num_workers=config.num_workers, pin_memory=loop.device.type == "cuda")
        times: list[tuple[float, float]] = []
        begin = last = time.perf_counter()
        try:
            with fitting_threads(loop.method, loop.device), naming_killed_workers():
                loop.begin()
                for batch in loader.epoch(0, start=0):
                    loaded = time.perf_counter()
                    loop.train_step(SharedBatch(batch, loop.device).inputs(portion))  # ends when the device has told its loss
                    now = time.perf_counter()
                    times.append(((now - last) / len(batch["labels"]), (now - loaded) / len(batch["labels"])))
                    last = now
                    if len(times) > steps or now - begin > BUDGET_S:
                        break
        finally:
            loader.close()
            loop.close()
            twin.release()
    kept = times[1:] or times
    basis = f"{len(kept)} step{'' if len(kept) == 1 else 's'} on {resolve_device(config.device)} now, without evaluation"
    return Pace(median(total for total, _ in kept), median(own for _, own in kept), basis)
