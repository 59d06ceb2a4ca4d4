"""Stage two: cache → replayed views + decoded targets → student + method → checkpoints → a timm model. Read top to bottom:
open, resolve, check, build, feed, export, report. No teacher is built here, or could be: the targets come from the cache.

A run's folder is named by a digest of all that decides its result, so that a repeated command finds its own work:

    OUT/<student>-<method>-<8 hex>/
        args.yaml            the resolved recipe and where the run was started
        summary.csv          one row an epoch, timm's columns
        metrics.jsonl        one line every --log-interval steps and one an epoch
        last/checkpoint.pt   resumable, after every epoch, every ten minutes and a signal; the one before is in previous/
        best/checkpoint.pt   of the epoch with the best eval_top1, with --val
        tensorboard/ wandb/  if asked for
        error.txt            of a run that failed: why, and the traceback; gone when it is resumed
        export/              timm.create_model("local-dir:…/export", pretrained=True); made last: a run that has it is finished
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from kdcache.console import counted, say
from kdcache.distributed import Processes, joined
from kdcache.errors import KDCacheError, StudentError, UsageError

from .training.config import TrainConfig
from .training.data import Opened, open_data
from .training.gang import ERROR_FILE, Gang, gangs_of
from .training.run import Run
from .training.watching import check_watchers

__all__ = ["TrainConfig", "train", "train_configs", "train_each"]


def train(config: TrainConfig, *, gang: int = 1, progress: bool = False) -> list[dict[str, Any]]:
    """Run stage two: every student in turn, or `gang` at a time. Returns [{"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}].

    top1 is in percent, of the exported weights, None without --val; status is "done" or "already done"; seconds passed while the run trained, those of
    its gang included: what it took of them itself is own_seconds in metrics.jsonl. Raises KDCacheError; runs that ended before the error stay, and
    are skipped when the command is repeated with --resume.
    """
    return list(train_each(config, gang=gang, progress=progress))


def train_each(config: TrainConfig, *, gang: int = 1, progress: bool = False) -> Iterator[dict[str, Any]]:
    """`train`, each run's entry as soon as the run ends, for callers that report what is done when a later run fails."""
    return train_configs([config], gang=gang, progress=progress)


def train_configs(configs: Sequence[TrainConfig], *, gang: int = 1, progress: bool = False) -> Iterator[dict[str, Any]]:
    """Every student of every config; up to `gang` of those that train on the same stream of batches at once, in this process, on one loader.

    All students are built once before the first is trained. Of a run that fails the entry has status "failed", the epochs that are kept, and
    "error". Its error is raised at once if runs go one by one; in gangs the others go on, and StudentError names all that failed at the end.
    Started several times by a launcher, the processes train each student together.
    """
    with joined(configs[0].device) as processes:
        yield from _train_with(processes, configs, gang=gang, progress=progress)


def _train_with(processes: Processes, configs: Sequence[TrainConfig], *, gang: int, progress: bool) -> Iterator[dict[str, Any]]:
    if gang > 1 and processes.world > 1:
        raise processes.common(
            UsageError(f"--gang {gang}: {processes.world} processes train one student at a time; expected one process, or no --gang")
        )
    opened, runs = Opened(), list[Run]()
    for config in configs:
        check_watchers(tensorboard=config.log_tensorboard, wandb=config.log_wandb)
        data = open_data(config, opened)
        runs += [Run(config, data, name, processes) for name in config.students]
    for run in runs:
        run.check_folder()
    for run in runs:
        run.check_build()
    is_done = all(run.is_finished for run in runs)  # asked by all processes
    if progress and len(configs) == 1 and processes.is_first and not is_done:
        say(runs[0].data.in_words())
    failed: dict[str, dict[str, Any]] = {}
    for members in gangs_of(runs, gang):
        if members[0].is_finished:
            yield members[0].already_done()
            continue
        if members[0].id in failed:  # it was asked for twice
            continue
        try:
            for entry in Gang(members, isolate=gang > 1, progress=progress).train():
                if entry["status"] == "failed":
                    failed[entry["id"]] = entry
                yield entry
        except KDCacheError:  # of the loader
            if gang == 1:
                raise
    if failed:
        raise _failed(failed.values(), len(runs))


def _failed(entries: Collection[Mapping[str, Any]], count: int) -> StudentError:
    listed = "\n".join(f"  {entry['path']}: {entry['error']}" for entry in entries)
    return StudentError(
        f"{len(entries)} of {counted(count, 'run')} failed:\n{listed}\n{ERROR_FILE} in each of these folders has the traceback; all others are done. Mend the"
        f" cause and run the same command again with --resume: what is done is left alone, what failed goes on from its last checkpoint"
    )
