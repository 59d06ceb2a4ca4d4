"""Jobs in several processes of this machine, one a GPU: the engine of `kdcache train --sweep … --engine local`. Between the sweep and train.

Each process takes the next job when its last has ended. One that is killed disturbs no other: its job is tried again, and its runs go on from their
checkpoints; after so many times they have failed.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdcache.console import counted, say
from kdcache.errors import StoreError, UsageError
from kdcache.launch import available_cores

from . import Engine, Entry, InProcess, Job
from .job_process import RETRIES, JobProcess, close_all, describe_epoch, environ_of_child, log_of, on_gpu, with_share_of

_WAIT_S = 0.2


def local_engine(*, processes: int | None = None, device: str | None = None, retries: int | None = None) -> Engine:
    """As many processes as are asked for, by default one for each GPU that this process may use; this one, if that makes one.

    retries: of a job whose process is killed, by default `RETRIES`; a number has jobs run in a process of their own even if it is one: this one can't
    outlive its death. device: as `TrainConfig.device`. Raises UsageError for several processes on one numbered GPU.
    """
    gpus = visible_gpus() if device in (None, "cuda") else ()
    wanted = max(1, len(gpus)) if processes is None else processes
    if wanted == 1 and not retries:
        return InProcess()
    if wanted > 1 and device is not None and device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} with {wanted} processes: each is given a GPU; expected --device cuda, and CUDA_VISIBLE_DEVICES to choose"
        )
    return Local(wanted, gpus=gpus, retries=RETRIES if retries is None else retries)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. CUDA is not initialised for that where NVML can count."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch

    count = torch.cuda.device_count()
    if named is None:
        return tuple(str(number) for number in range(count))
    names = tuple(name.strip() for name in named.split(","))
    if count and all(name.startswith("MIG-") for name in names):
        return names  # a process uses one slice of a GPU, however many are named: torch counts one
    return names[:count]  # CUDA sees none after the first that it does not know


@dataclass
class _Attempt:
    job: Job
    count: int = 1


@dataclass
class _Slot:
    """One job at a time, in a process that stays while all goes well."""

    number: int
    gpu: str | None
    process: JobProcess | None = None
    attempt: _Attempt | None = None

    @property
    def name(self) -> str:
        return f"process {self.number}" if self.gpu is None else f"gpu {self.gpu}"

    def end(self) -> None:
        """Its process, at once."""
        if self.process is not None:
            self.process.close()
        self.process = self.attempt = None


class Local:
    """Jobs in child processes of this one."""

    def __init__(self, processes: int, *, gpus: Sequence[str] = (), retries: int = RETRIES) -> None:
        """gpus: process n gets number n, modulo their count. retries: of a job whose process is killed."""
        self.slots = processes
        self._gpus, self._retries = tuple(gpus), retries
        self.cores = max(1, available_cores() // processes)

    def run(self, jobs: Sequence[Job], *, progress: bool = False) -> Iterator[Entry]:
        """As `Engine.run`. progress: a line on stderr for each epoch of each run. Ends its children when it is closed or interrupted."""
        waiting = deque(_Attempt(with_share_of(job, self.cores)) for job in jobs)
        slots = [_Slot(number, self._gpus[number % len(self._gpus)] if self._gpus else None) for number in range(min(self.slots, len(jobs)))]
        try:
            while waiting or any(slot.attempt is not None for slot in slots):
                for slot in slots:
                    if waiting and slot.attempt is None:
                        yield from self._begin(slot, waiting.popleft())
                busy = [slot.process for slot in slots if slot.process is not None and slot.attempt is not None]
                select.select(busy, [], [], _WAIT_S)
                for slot in slots:
                    yield from self._follow(slot, waiting, progress=progress)
        finally:
            close_all([slot.process for slot in slots if slot.process is not None])

    def _begin(self, slot: _Slot, attempt: _Attempt) -> Iterator[Entry]:
        """Give a job to a slot's process; entries of its runs if that can't be."""
        job, log = attempt.job if slot.gpu is None else on_gpu(attempt.job), log_of(attempt.job)
        try:
            if slot.process is None:
                slot.process = JobProcess(log, environ=environ_of_child(os.environ, cores=self.cores, gpu=slot.gpu))
            slot.process.begin(job, log=log, title=f"{slot.name}, attempt {attempt.count} of {1 + self._retries}: {', '.join(job.ids)}")
        except StoreError as error:
            slot.end()
            yield from job.failures(str(error))
        else:
            slot.attempt = attempt

    def _follow(self, slot: _Slot, waiting: deque[_Attempt], *, progress: bool) -> Iterator[Entry]:
        """Take what a slot's process has told, and its end."""
        process, attempt = slot.process, slot.attempt
        if process is None or attempt is None:
            return
        has_ended = process.has_ended
        for event in process.receive():
            if "entry" in event:
                yield event["entry"]
            elif progress:
                say(f"{slot.name}: {describe_epoch(event['epoch'])}")
        left = process.left
        if left is None:
            slot.attempt = None
            if not process.is_reusable:
                slot.end()
        elif has_ended:
            slot.end()
            yield from self._after(process, left, attempt, slot.name, waiting)

    def _after(self, process: JobProcess, left: Job, attempt: _Attempt, name: str, waiting: deque[_Attempt]) -> Iterator[Entry]:
        """What becomes of the runs that a process has left: another attempt, or entries."""
        end = process.describe_end()
        if not process.was_killed:
            yield from left.failures(end)
        elif attempt.count > self._retries:
            yield from left.failures(f"{end}; given up after {counted(attempt.count, 'attempt')}")
        else:
            say(f"{name}: {', '.join(left.ids)}: {end}; going on from the last checkpoint, attempt {attempt.count + 1} of {1 + self._retries}")
            waiting.appendleft(_Attempt(left, attempt.count + 1))
