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
from .results import read_metrics

BUDGET_S = 20.0
"""Of timing one student and method: no step is begun after it."""


@dataclass(frozen=True)
class Prediction:
    """Of one run."""

    seconds: float
    """All its epochs."""
    left: float
    """Those that are not done."""
    basis: str
    """What it rests on, for people."""

    def to_json(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "left": round(self.left, 3), "basis": self.basis}


def predict(runs: Sequence[PlannedRun], *, time_steps: int, progress: bool = False) -> dict[str, Prediction]:
    """Run id → prediction; runs of which nothing is known are left out.

    A run's seconds come from its own epochs, or from those of a run of the same student and method, or from `time_steps` steps that are timed now
    (0: none), or from a run of the same student by another method: in this order. Epochs measured include their evaluation, steps do not.
    """
    own = {planned.run.id: seconds for planned in runs if (seconds := _seconds_per_image(planned.run)) is not None}
    alike: dict[bytes, tuple[float, str]] = {}
    of_student: dict[bytes, tuple[float, str]] = {}
    for planned in runs:
        if (seconds := own.get(planned.run.id)) is not None:
            alike.setdefault(_key(planned.run), (seconds, f"measured: {planned.run.id}"))
            of_student.setdefault(_key(planned.run, method=False), (seconds, f"measured: {planned.run.id}, another method"))
    waiting = [planned for planned in runs if not planned.run.is_finished and planned.run.id not in own and _key(planned.run) not in alike]
    if time_steps > 0:
        distinct = {_key(planned.run): planned for planned in reversed(waiting)}
        for key, planned in tqdm(list(distinct.items())[::-1], desc="timing", unit="run", disable=not progress):
            seconds, steps = time_run(planned.run, time_steps)
            alike[key] = seconds, f"{steps} step{'' if steps == 1 else 's'} on {resolve_device(planned.run.config.device)} now, without evaluation"
    found: dict[str, Prediction] = {}
    for planned in runs:
        run_id, key, student = planned.run.id, _key(planned.run), _key(planned.run, method=False)
        known = (own[run_id], "measured: its own epochs") if run_id in own else alike.get(key) or of_student.get(student)
        if known is not None:
            epochs = planned.run.config.epochs
            an_epoch = known[0] * planned.images
            found[run_id] = Prediction(an_epoch * epochs, an_epoch * (epochs - planned.epochs_done), known[1])
    return found


def _key(run: Run, *, method: bool = True) -> bytes:
    """What decides the time of a step, nearly."""
    recipe, config = run.recipe, run.config
    names = ["student", "model_kwargs", "batch_size", *(["method", "teachers"] if method else [])]
    return canonical_json({**{name: recipe.get(name) for name in names}, "precision": config.precision, "ema": config.model_ema})


def _seconds_per_image(run: Run) -> float | None:
    """Of the run's own epochs, with their evaluations; None without a whole one, or for one of another kind of device."""
    device = read_args(run.folder / "args.yaml").get("session", {}).get("device")
    epochs = [line for line in read_metrics(run.folder) if "step" not in line and line.get("images")]
    if not epochs or str(device).partition(":")[0] != resolve_device(run.config.device).type:
        return None
    return float(sum(line["seconds"] for line in epochs) / sum(line["images"] for line in epochs))


def time_run(run: Run, steps: int) -> tuple[float, int]:
    """(seconds an image, steps that were timed) of a run's first steps: the median, without the first step. Nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="kdcache-timing-") as folder:
        config = replace(run.config, out=folder, log_tensorboard=False, log_wandb=False, recovery_interval=0, resume=False)
        twin = Run(config, run.data, run.student_name)
        twin.claim()
        loop = twin.begin()
        portion = portion_of(loop)
        dataset = dataset_of(run.data.cache, union([portion]), check_views=config.check_views)
        loader = BatchLoader(dataset, loop.batches, num_workers=config.num_workers, pin_memory=loop.device.type == "cuda")
        times: list[float] = []
        begin = last = time.perf_counter()
        try:
            with fitting_threads(loop.method, loop.device), naming_killed_workers():
                loop.begin()
                for batch in loader.epoch(0, start=0):
                    loop.train_step(SharedBatch(batch, loop.device).inputs(portion))
                    if loop.device.type == "cuda":
                        torch.cuda.synchronize(loop.device)
                    now = time.perf_counter()
                    times.append((now - last) / len(batch["labels"]))
                    last = now
                    if len(times) > steps or now - begin > BUDGET_S:
                        break
        except StudentError as error:
            raise StudentError(f"run {run.id}: the first steps fail: {error}") from error
        finally:
            loader.close()
            loop.close()
            twin.release()
    kept = times[1:] or times
    return median(kept), len(kept)
