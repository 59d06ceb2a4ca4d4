"""Stage two: cache → replayed views + decoded targets → student + method → checkpoints → a timm model. Read top to bottom:
open, resolve, check, build, feed, export, report. No teacher is built here, or could be: the targets come from the cache.

A run's folder is named by a digest of all that decides its result, so that a repeated command finds its own work:

    OUT/<student>-<method>-<8 hex>/
        args.yaml            the resolved recipe and where the run was started
        summary.csv          one row an epoch, timm's columns
        metrics.jsonl        one line every --log-interval steps and one an epoch
        last/checkpoint.pt   resumable, after every epoch and every ten minutes; the one before is in previous/
        best/checkpoint.pt   of the epoch with the best eval_top1, with --val
        tensorboard/ wandb/  if asked for
        export/              timm.create_model("local-dir:…/export", pretrained=True); made last: a run that has it is finished
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kdcache.device import fitting_threads
from kdcache.distributed import Processes, joined
from kdcache.errors import KDCacheError
from kdcache.join import BatchLoader, CachedViews
from kdcache.workers import naming_killed_workers

from .run import Run
from .student_loop import StudentLoop
from .train_config import TrainConfig
from .training_data import open_data
from .watching import check_watchers

__all__ = ["TrainConfig", "train", "train_configs", "train_each"]


def train(config: TrainConfig, *, progress: bool = False) -> list[dict[str, Any]]:
    """Run stage two: every student in turn. Returns [{"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}].

    top1 is in percent, of the exported weights, None without --val; status is "done" or "already done". Raises KDCacheError; runs
    that ended before the error stay, and are skipped when the command is repeated with --resume.
    """
    return list(train_each(config, progress=progress))


def train_each(config: TrainConfig, *, progress: bool = False) -> Iterator[dict[str, Any]]:
    """`train`, each run's entry as soon as the run ends, for callers that report what is done when a later run fails."""
    return train_configs([config], progress=progress)


def train_configs(configs: Sequence[TrainConfig], *, progress: bool = False) -> Iterator[dict[str, Any]]:
    """Every student of every config.

    All students are built once before the first is trained. Of a run that fails the entry has status "failed", and the epochs that are kept;
    then its error is raised. Started several times by a launcher, the processes train each student together.
    """
    with joined(configs[0].device) as processes:
        yield from _train_with(processes, configs, progress=progress)


def _train_with(processes: Processes, configs: Sequence[TrainConfig], *, progress: bool) -> Iterator[dict[str, Any]]:
    runs: list[Run] = []
    for config in configs:
        check_watchers(tensorboard=config.log_tensorboard, wandb=config.log_wandb)
        data = open_data(config)
        runs += [Run(config, data, name, processes) for name in config.students]
    for run in runs:
        run.check_folder()
    for run in runs:
        run.check_build()
    for run in runs:
        if run.is_finished:
            yield run.already_done()
            continue
        try:
            loop = run.begin()
            with fitting_threads(loop.method, loop.device), naming_killed_workers(), processes.naming_lost():
                _feed(loop, progress=progress)
            entry = run.finish()
        except KDCacheError:
            yield run.failed()
            raise
        yield entry


def _feed(loop: StudentLoop, *, progress: bool) -> None:
    """The batches of all epochs that are left."""
    config, data = loop.config, loop.data
    teacher = next(iter(data.teachers), None)  # of several each target says whose it is
    targets, parts = tuple(loop.encodings), loop.method.target_parts()
    dataset = CachedViews(data.cache, teacher=teacher, targets=targets, parts=parts, check_views=config.check_views)
    loader = BatchLoader(dataset, loop.batches, num_workers=config.num_workers, pin_memory=loop.device.type == "cuda")
    try:
        loop.begin(progress=progress)
        while not loop.is_done:
            for batch in loader.epoch(loop.epoch, start=loop.step):
                loop.train_step(batch)
            loop.end_epoch()
    finally:
        loader.close()
        loop.close()
