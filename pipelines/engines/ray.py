"""Jobs as tasks of a Ray cluster: the engine of `kdcache train --sweep … --engine ray`. Between the sweep and train.

A task is a thin parent of the same child process that a local engine has (`job_process`): what trains knows nothing of Ray, and what Ray kills takes
it along. Ray runs a task again, here or on another node, when its worker or node dies, and when its child was killed (`JobDied`, the one exception
that is worth it); errors of training are not retried, they are in the entries. Each attempt is counted in a file below OUT too, since Ray itself
sets no bound to tasks that its memory monitor kills.

The cache and OUT must be the same files on every node. Nothing else of the driver is assumed there: not its folder, not its environment.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdcache.console import say
from kdcache.errors import StoreError, UsageError
from kdcache.interrupt import Stopped, finishing_first

from . import Entry, Job
from .job_process import RETRIES, JobDied, JobProcess, close_all, describe_epoch, environ_of_child, log_of, on_gpu, with_share_of

_WAIT_S = 1.0
_MAX_CPUS = 9
"""Of a job by default: eight loading processes and the one that they feed."""


class OnRay:
    """Jobs as tasks of the Ray cluster at `address`."""

    def __init__(
        self, *, address: str | None = None, gpus_per_job: float | None = None, cpus_per_job: int | None = None, device: str | None = None,
        retries: int = RETRIES,
    ) -> None:  # fmt: skip
        """address: default RAY_ADDRESS, else a cluster that runs on this machine, else one of this machine alone, which ends with the jobs.

        gpus_per_job: 0.5 lets two share one. Default: 1 if the cluster has any and `device` is not another one, else 0. cpus_per_job: default a
        GPU's share of the cluster's cores, at most 9; 1 without GPUs. retries: of a job whose process, worker or node dies.

        Raises UsageError without Ray, or if no cluster is at `address`.
        """
        self._ray = _import_ray()
        self._address, self._gpus, self._cpus, self._device, self._retries = address, gpus_per_job, cpus_per_job, device, retries
        self._is_ours = False

    @property
    def slots(self) -> int:
        """Jobs that the cluster runs at a time, as it is now."""
        self._connect()
        return self._slots(*self._needs())

    @property
    def cores(self) -> int:
        """Of a job."""
        self._connect()
        return self._needs()[1]

    def _slots(self, gpus: float, cpus: int) -> int:
        have = self._ray.cluster_resources()
        by_gpu = int(have.get("GPU", 0) / gpus) if gpus else sys.maxsize
        return max(1, min(by_gpu, int(have.get("CPU", 0)) // cpus))

    def run(self, jobs: Sequence[Job], *, progress: bool = False) -> Iterator[Entry]:
        """As `Engine.run`; entries come when their job ends. progress: a line on stderr for each epoch of each run, as Ray brings them."""
        if not jobs:
            return
        self._connect()
        gpus, cpus = self._needs()
        self._say_waiting(gpus, cpus)
        absolute = [_with_absolute_places(with_share_of(job, max(1, cpus - 1))) for job in jobs]
        if gpus > 0:
            absolute = [on_gpu(job) for job in absolute]
        meeting = _make_meeting(absolute[0])
        there = {
            "meeting": str(meeting), "cwd": os.getcwd(), "version": version("kdcache"), "cpus": cpus, "retries": self._retries, "progress": progress,
        }  # fmt: skip
        task = self._ray.remote(_task()).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=self._retries, retry_exceptions=[JobDied], name="kdcache train"
        )
        refs: dict[Any, Job] = {}
        try:
            for number, job in enumerate(absolute):
                refs[task.remote(job.to_json(), number, there)] = job
            while refs:
                for ref in self._wait(refs):
                    yield from self._entries_of(ref, refs.pop(ref))
        finally:
            with finishing_first():  # their children save, as a command does
                for ref in refs:
                    self._ray.cancel(ref)
                left = list(refs)
                while left:
                    left = self._ray.wait(left, num_returns=len(left), timeout=_WAIT_S)[1]
            shutil.rmtree(meeting, ignore_errors=True)
            self._disconnect()

    def _wait(self, refs: Mapping[Any, Job]) -> list[Any]:
        """Tasks that have ended. Raises Stopped at a signal, which Ray would make a bare KeyboardInterrupt."""
        try:
            ended: list[Any] = self._ray.wait(list(refs), num_returns=1, timeout=_WAIT_S)[0]
        except Stopped:
            raise
        except KeyboardInterrupt as error:
            raise Stopped("a signal") from error
        return ended

    def _entries_of(self, ref: Any, job: Job) -> Iterator[Entry]:
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            what = str(cause) if isinstance(cause, JobDied) else f"Ray lost its task: {type(error).__name__}: {_first_line(error)}"
            yield from job.failures(f"{what}; given up after {1 + self._retries} attempts")
            return
        yield from result["entries"]
        if result["problem"] is not None:
            yield from job.failures(result["problem"], but=[entry["id"] for entry in result["entries"]])

    # --- the cluster ---

    def _connect(self) -> None:
        """To the cluster, unless this process is connected to one."""
        if self._ray.is_initialized():
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            context = self._ray.init(self._address, include_dashboard=False, logging_level="ERROR", log_to_driver=True)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise UsageError(f"--engine ray: no Ray cluster at {where}: {_first_line(error)}; start one with 'ray start --head'") from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray has put its own in their place
        self._is_ours = True
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        have = self._ray.cluster_resources()
        say(f"Ray at {context.address_info['address']}: {len(nodes)} nodes, {have.get('CPU', 0):.0f} CPUs, {have.get('GPU', 0):.0f} GPUs")

    def _disconnect(self) -> None:
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False

    def _needs(self) -> tuple[float, int]:
        """(GPUs, CPUs) of a job."""
        have = self._ray.cluster_resources()
        all_gpus, all_cpus = have.get("GPU", 0.0), have.get("CPU", 1.0)
        gpus = self._gpus
        if gpus is None:
            gpus = 1.0 if all_gpus >= 1 and self._device in (None, "cuda") else 0.0
        if self._cpus is not None:
            return gpus, self._cpus
        return gpus, max(1, min(_MAX_CPUS, int(all_cpus / all_gpus * gpus))) if gpus and all_gpus else 1

    def _say_waiting(self, gpus: float, cpus: int) -> None:
        """A task that fits no node waits for ever; a cluster that scales may get one that it fits."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            say(f"Ray: no node has the {cpus} CPUs and {gpus:g} GPUs of a job now; waiting for one (--cpus-per-job, --gpus-per-job ask for less)")


def _import_ray() -> Any:
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or it drops lines of runs that look alike
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(f"--engine ray: Ray can't be imported ({error}); install it: pip install 'kdcache[ray]'") from error


def _with_absolute_places(job: Job) -> Job:
    """The job with the cache and OUT where they are from anywhere."""
    configs = [
        dataclasses.replace(
            config,
            cache=config.cache if "://" in config.cache else str(Path(config.cache).expanduser().absolute()),
            out=str(Path(config.out).expanduser().absolute()),
        )
        for config in job.configs
    ]
    return Job(tuple(configs), job.ids)


def _make_meeting(job: Job) -> Path:
    """A folder below OUT where tasks prove that they see the driver's files, and count their attempts."""
    folder = log_of(job).parent / f".ray-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StoreError(f"{folder}: can't be made: {error.strerror}; expected a writable folder") from error
    return folder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- on a node -------------------------------------------------------------------------------------------------------


def _task() -> Callable[[Mapping[str, Any], int, Mapping[str, Any]], dict[str, Any]]:
    """The task. Ray carries a function within a function by value, so that a node without kdcache can say so."""

    def train(job: Mapping[str, Any], number: int, there: Mapping[str, Any]) -> dict[str, Any]:
        import socket
        import sys

        try:
            from pipelines.engines.ray import train_on_node
        except ImportError as error:
            problem = f"node {socket.gethostname()}: {sys.executable} can't import kdcache ({error}); install it on every node of the cluster"
            return {"entries": [], "problem": problem}
        return train_on_node(job, number, there)

    return train


def train_on_node(body: Mapping[str, Any], number: int, there: Mapping[str, Any]) -> dict[str, Any]:
    """Train a job in a child of this Ray worker: {"entries", "problem"}, the second of the runs without an entry. Raises JobDied if it was killed."""
    job, node = Job.from_json(body), socket.gethostname()
    problem = _find_problem(job, node, there)
    if problem is not None:
        return {"entries": [], "problem": problem}
    attempt, attempts = _count_attempt(Path(there["meeting"]) / str(number), node), 1 + there["retries"]
    if attempt > attempts:
        return {"entries": [], "problem": f"its process, worker or node died {attempts} times, here is node {node}: given up"}
    log = log_of(job)
    process = _child(log, environ_of_child(os.environ, cores=there["cpus"]), there["cwd"] if Path(there["cwd"]).is_dir() else None)
    entries: list[Entry] = []
    try:
        process.begin(job, log=log, title=f"node {node}, attempt {attempt} of {attempts}: {', '.join(job.ids)}")
        for event in process.events():
            if "entry" in event:
                entries.append(_of_this_sweep(event["entry"], node, is_again=attempt > 1))
            elif there["progress"]:
                print(describe_epoch(event["epoch"]), file=sys.stderr, flush=True)  # noqa: T201 - Ray brings it to the driver
        if process.left is None:
            return {"entries": entries, "problem": None}
        if process.was_killed:
            raise JobDied(f"node {node}: {process.describe_end()}")
        return {"entries": entries, "problem": f"node {node}: {process.describe_end()}"}
    finally:
        if process.is_reusable:
            _idle.append(process)
        else:
            close_all([process])


_idle: list[JobProcess] = []
"""The child of this Ray worker, between two tasks; it ends with the worker."""


def _child(log: Path, environ: Mapping[str, str], cwd: str | None) -> JobProcess:
    """The one that is there, if it is as asked for; else a new one."""
    if _idle:
        process = _idle.pop()
        if process.is_reusable and process.environ == environ and process.cwd == cwd:
            return process
        close_all([process])
    return JobProcess(log, environ=environ, cwd=cwd)


def _of_this_sweep(entry: Entry, node: str, *, is_again: bool) -> Entry:
    """The entry with the node where its run failed; a run that an earlier attempt at the job has finished is done now."""
    if entry["status"] == "failed":
        return {**entry, "error": f"node {node}: {entry['error']}"}
    return {**entry, "status": "done"} if is_again else entry


def _find_problem(job: Job, node: str, there: Mapping[str, Any]) -> str | None:
    """Why a job can't be trained on this node, None if it can."""
    if (found := version("kdcache")) != there["version"]:
        return f"node {node}: kdcache {found} is installed, expected {there['version']} as where the command runs; install the same on every node"
    if not Path(there["meeting"]).is_dir():
        return f"node {node}: does not see {Path(there['meeting']).parent}; expected --out on a file system that every node shares, at the same path"
    for config in job.configs:
        if "://" not in config.cache and not Path(config.cache).is_dir():
            return (
                f"node {node}: does not see the cache {config.cache}; expected it on a file system that every node shares, at the same path, or in an"
                f" object store"
            )
    return None


def _count_attempt(path: Path, node: str) -> int:
    """Which attempt at its job this is, from 1."""
    try:
        with open(path, "a+", encoding="utf-8") as file:
            file.write(json.dumps({"node": node, "process": os.getpid()}) + "\n")
            file.flush()
            file.seek(0)
            return len(file.readlines())
    except OSError as error:
        raise StoreError(f"node {node}: {path}: can't be written: {error.strerror}; expected --out writable on every node") from error
