"""How long the runs of a sweep will take, and on what that rests: what runs were measured to take, or a few real steps now. For --dry-run."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdcache.console import ProgressBar, counted, say
from kdcache.device import fitting_threads, resolve_device, torch_threads
from kdcache.errors import StudentError
from kdcache.join import Batch, BatchLoader
from kdcache.launch import default_workers
from kdcache.plan import canonical_json
from kdcache.workers import naming_killed_workers

from ..training.gang import portion_of
from ..training.recipes import read_args
from ..training.run import Run
from ..training.shared_batch import SharedBatch, dataset_of, union
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


def predict(runs: Sequence[PlannedRun], *, time_steps: int, cores: int | None = None, progress: bool = False) -> dict[str, Prediction]:
    """Run id → prediction; runs of which nothing is known are left out. cores: that a job will have; None: all that this process has.

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
    for key, planned in ProgressBar(list(distinct.items())[::-1], desc="timing", unit="run", disable=not (progress and distinct)):
        try:
            alike[key] = time_run(planned.run, time_steps, cores=cores)
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
    how = {"precision": config.precision, "ema": config.model_ema, "compiled": config.torchcompile, "channels_last": config.channels_last}
    return canonical_json({**{name: recipe.get(name) for name in names}, **how})


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


def time_run(run: Run, steps: int, *, cores: int | None = None) -> Pace:
    """Of a run's first steps, `steps` of them or more, on so many cores (None: all). Nothing is kept.

    The first step, which builds and tunes, is taken on batches that this process loads: the workers begin after it, so that they have nothing ahead.
    From the first batch on that they give, each of them gives as many. So loading counts where it is slower than the student, as it will in the run.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-timing-") as folder:
        config = run.config
        workers = config.workers if config.workers is not None or cores is None else default_workers(cores)
        config = replace(config, out=folder, workers=workers, log_tensorboard=False, log_wandb=False, recovery_interval=0, resume=False)
        twin = Run(config, run.data, run.student_name)
        twin.claim()
        loop = twin.begin()
        portion = portion_of(loop)
        dataset = dataset_of(run.data.cache, union([portion]), check_views=config.check_views)
        pinned, ahead, per_step = loop.device.type == "cuda", config.prefetch_bytes, config.grad_accum_steps
        first = BatchLoader(dataset, loop.batches, num_workers=0, pin_memory=pinned, prefetch_bytes=ahead)
        loader = BatchLoader(dataset, loop.batches, num_workers=config.num_workers, pin_memory=pinned, prefetch_bytes=ahead)
        turns = max(1, loader.num_workers)
        wanted = per_step + -(-steps * per_step // turns) * turns
        times: list[tuple[float, float, int]] = []  # of each batch: when it was there, when its step had ended, its images

        def step(batch: Batch) -> None:
            loaded = time.perf_counter()
            loop.train_step(SharedBatch(batch, loop.device).inputs(portion))  # ends when the device has told its loss
            times.append((loaded, time.perf_counter(), len(batch["labels"])))

        try:
            with _threads_of_job(cores), fitting_threads(loop.method, loop.device), naming_killed_workers():
                loop.begin()
                for batch in itertools.islice(first.epoch(0), per_step):
                    step(batch)
                times.clear()
                begin = time.perf_counter()
                for batch in loader.epoch(0):
                    step(batch)
                    if len(times) >= wanted or (len(times) > per_step and times[-1][1] - begin > BUDGET_S):
                        break
        finally:
            first.close()
            loader.close()
            loop.close()
            twin.release()
    begin, kept = (times[per_step - 1][1], times[per_step:]) if len(times) > per_step else (begin, times)
    images, count = sum(number for *_, number in kept), max(1, len(kept) // per_step)
    basis = f"{counted(count, 'step')} on {resolve_device(config.device)} now, without evaluation"
    return Pace((kept[-1][1] - begin) / images, sum(ended - loaded for loaded, ended, _ in kept) / images, basis)


def _threads_of_job(cores: int | None) -> AbstractContextManager[None]:
    """Within, torch has the threads that a job with so many cores has."""
    return torch_threads(cores if "OMP_NUM_THREADS" not in os.environ else None)
