"""Jobs as tasks of a Ray cluster: the engine of `kdcache train --sweep … --engine ray`. Between the sweep and train.

A task is a thin parent of the same child process that a local engine has (`job_process`): what trains knows nothing of Ray, and what Ray kills takes
it along. Ray runs a task again, here or on another node, when its worker or node dies, and when its child was killed (`JobDied`, the one exception
that is worth it); errors of training are not retried, they are in the entries. Each attempt is counted in a file below OUT too, since Ray itself
sets no bound to tasks that its memory monitor kills. What a node has to say on the way comes by a file there as well: Ray would print it on the
driver's stdout, among much of its own.

The cache and OUT must be the same files on every node. Nothing else of the driver is assumed there: not its folder, not its environment.
"""

from __future__ import annotations

import dataclasses
import fcntl
import glob
import importlib
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from kdcache.console import counted, say
from kdcache.errors import StoreError, StudentError, UsageError
from kdcache.interrupt import Stopped, finishing_first, raise_if_dropped

from ..training.lock import RunLock
from ..training.run import describe_error
from . import Entry, Job
from .job_process import RETRIES, JobDied, JobProcess, close_all, describe_epoch, environ_of_child, log_of, on_gpu, with_share_of
from .ray_address import check_address, describe_refusal, show_token_here

_WAIT_S = 1.0
_BUSY_S = 30.0
"""Ray's workers have imported torch by then; a cluster that has begun no job is in others' hands, which is said."""
_PATIENCE_S = 120.0
"""How long a node waits for runs that one which Ray has lost still trains: one cut off from the cluster gives itself up after a minute."""
_HEARD_S = 3.0
"""How long tasks have to hear Ray's cancellation, an exception in their main thread: Python drops one that comes while a destructor runs."""
_END = "end"
"""A file that tells them then."""
_OWNER = "owner"
"""A file that the driver has locked for as long as it lives."""
_UNWANTED = "the command was told to end"
_MAX_CPUS = 9
"""Of a job by default: eight loading processes and the one that they feed."""


class OnRay:
    """Jobs as tasks of the Ray cluster at `address`."""

    def __init__(
        self, *, address: str | None = None, gpus_per_job: float | None = None, cpus_per_job: int | None = None, device: str | None = None,
        retries: int = RETRIES,
    ) -> None:  # fmt: skip
        """address: default RAY_ADDRESS, else a cluster that runs on this machine, else one of this machine alone, which ends with the jobs.

        gpus_per_job: 0.5 lets two share one; a job with 0 sees none. Default: 1 if a node has one and `device` is no other one, else 0. cpus_per_job: default the
        smallest share of cores that a GPU has on any node, at most 9; 1 without GPUs. retries: of a job whose process, worker or node dies.

        Raises UsageError without Ray, or for a device that a job can't have.
        """
        if device == "cuda" and gpus_per_job == 0:
            raise UsageError(
                "--gpus-per-job 0 with --device cuda: such a job sees no GPU; expected more, e.g. 0.25 for four on each, or --device cpu"
            )
        if device is not None and device.startswith("cuda:"):
            raise UsageError(f"--device {device} with --engine ray: Ray gives each job its GPU; expected --device cuda, or none")
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        show_token_here(self._address)
        self._ray = _import_ray()
        self._gpus, self._cpus, self._device, self._retries = gpus_per_job, cpus_per_job, device, retries
        self._is_ours = False

    @property
    def slots(self) -> int:
        """Jobs that the cluster runs at a time, as it is now."""
        self.connect()
        return self._slots(*self._needs())

    @property
    def cores(self) -> int:
        """Of a job."""
        self.connect()
        return self._needs()[1]

    def _slots(self, gpus: float, cpus: int) -> int:
        def fit(node: Mapping[str, float]) -> int:
            by_cpu = int(node.get("CPU", 0)) // cpus
            return min(by_cpu, int(node.get("GPU", 0) / gpus)) if gpus else by_cpu

        return max(1, sum(fit(node) for node in self._nodes()))

    def run(self, jobs: Sequence[Job], *, progress: bool = False) -> Iterator[Entry]:
        """As `Engine.run`; entries come when their job ends. progress: a line on stderr for each epoch of each run, when its node has written it."""
        if not jobs:
            return
        self.connect()
        gpus, cpus = self._needs()
        self._say_waiting(gpus, cpus)
        absolute = [_with_absolute_places(with_share_of(job, max(1, cpus - 1))) for job in jobs]
        if gpus > 0:
            absolute = [on_gpu(job) for job in absolute]
        meeting, owned = _make_meeting(absolute[0])
        there = {
            "meeting": str(meeting), "cwd": os.getcwd(), "version": version("kdcache"), "gpus": gpus, "cpus": cpus, "retries": self._retries,
            "progress": progress,
        }  # fmt: skip
        task = self._ray.remote(_task()).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=self._retries, retry_exceptions=[JobDied], name="kdcache train"
        )
        refs: dict[Any, tuple[int, Job]] = {}
        messages = _Messages(meeting)
        try:
            for number, job in enumerate(absolute):
                refs[task.remote(job.to_json(), number, there)] = number, job
            busy_at = time.monotonic() + _BUSY_S
            while refs:
                ended = self._wait(refs)
                messages.say_new()
                for ref in ended:
                    number, job = refs.pop(ref)
                    messages.end(number)
                    yield from self._entries_of(ref, job)
                if time.monotonic() > busy_at:
                    busy_at = float("inf")
                    self._say_busy(meeting)
        finally:
            with finishing_first():  # their children save, as a command does
                if refs:
                    jobs_are = "1 job is" if len(refs) == 1 else f"{len(refs)} jobs are"
                    say(f"{jobs_are} told to end: what trains finishes its step and saves; a second signal ends all at once")
                for ref in refs:
                    self._ray.cancel(ref)
                left, unheard_at = list(refs), time.monotonic() + _HEARD_S
                while left:
                    left = self._ray.wait(left, num_returns=len(left), timeout=_WAIT_S)[1]
                    if time.monotonic() > unheard_at:
                        (meeting / _END).touch()
            owned.close()
            shutil.rmtree(meeting, ignore_errors=True)
            self._disconnect()

    def _wait(self, refs: Mapping[Any, Any]) -> list[Any]:
        """Tasks that have ended. Raises Stopped at a signal, which Ray would make a bare KeyboardInterrupt."""
        try:
            ended: list[Any] = self._ray.wait(list(refs), num_returns=1, timeout=_WAIT_S)[0]
        except Stopped:
            raise
        except KeyboardInterrupt as error:
            raise Stopped("a signal") from error
        raise_if_dropped()
        return ended

    def _entries_of(self, ref: Any, job: Job) -> Iterator[Entry]:
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            what = f"Ray lost its task: {type(error).__name__}: {_one_line(error)}" if cause is None else describe_error(cause)
            is_final = cause is not None and not isinstance(cause, JobDied)
            yield from job.failures(what if is_final else f"{what}; given up after {counted(1 + self._retries, 'attempt')}")
            return
        yield from result["entries"]
        if result["problem"] is not None:
            yield from job.failures(result["problem"], but=[entry["id"] for entry in result["entries"]])

    # --- the cluster ---

    def connect(self) -> None:
        """To the cluster, unless this process is connected to one. Raises UsageError if there is none, or if it lets nobody in."""
        if self._ray.is_initialized():
            return
        check_address(self._address)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            context = self._ray.init(self._address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        except SystemExit as error:  # Ray's own handler, which is in place for its last steps
            if error.code != signal.SIGTERM:
                raise
            raise Stopped("SIGTERM") from error
        except (ConnectionError, ValueError, RuntimeError, OSError, self._ray.exceptions.RayError) as error:
            where = self._address or "this machine"
            if (refusal := describe_refusal(error)) is not None:
                raise UsageError(f"--engine ray: the Ray cluster at {where} asks for a token: {refusal}") from error
            raise UsageError(
                f"--engine ray: no connection to a Ray cluster at {where}: {_one_line(error)}; start one with 'ray start --head', and run the command on"
                f" one of its nodes ('ray stop' makes Ray forget one that has died)"
            ) from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray has put its own in their place
        self._is_ours = True
        nodes = self._nodes()
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        say(f"Ray at {context.address_info['address']}: {counted(len(nodes), 'node')}, {counted(round(cpus), 'CPU')}, {counted(round(gpus), 'GPU')}")

    def _disconnect(self) -> None:
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False

    def _nodes(self) -> list[Mapping[str, float]]:
        """What each node that lives has for tasks."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _needs(self) -> tuple[float, int]:
        """(GPUs, CPUs) of a job."""
        nodes = self._nodes()
        gpus = self._gpus
        if gpus is None:
            is_wanted = self._device == "cuda" or (self._device is None and any(node.get("GPU", 0) >= 1 for node in nodes))
            gpus = 1.0 if is_wanted else 0.0
        if self._cpus is not None:
            return gpus, self._cpus
        shares = [int(node.get("CPU", 0) / node["GPU"] * gpus) for node in nodes if node.get("GPU", 0) >= gpus > 0]
        return gpus, max(1, min([_MAX_CPUS, *shares])) if shares else 1

    def _say_waiting(self, gpus: float, cpus: int) -> None:
        """A task that fits no node waits for ever; a cluster that scales may get one that it fits."""
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in self._nodes()):
            say(
                f"Ray: no node has what a job takes now ({counted(cpus, 'CPU')}, GPUs: {gpus:g}); waiting for one (--cpus-per-job, --gpus-per-job ask for less)"
            )

    def _say_busy(self, meeting: Path) -> None:
        if not any(meeting.glob("[0-9]*")):
            have, free = self._ray.cluster_resources(), self._ray.available_resources()
            told = ", ".join(f"{free.get(kind, 0):g} of {have[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in have)
            say(f"Ray: no job has begun yet; waiting for its workers, or for others to leave the cluster: {told} are free")


class _Messages:
    """What nodes say on the way, each job's in a file of its own: shown here as it comes."""

    def __init__(self, meeting: Path) -> None:
        self._meeting = meeting
        self._seen: dict[Path, int] = {}
        """Bytes of each file that were shown."""

    def say_new(self) -> None:
        """On stderr, whole lines."""
        for path in sorted(self._meeting.glob("*" + _TOLD)):
            with open(path, "rb") as file:
                file.seek(self._seen.get(path, 0))
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._seen[path] = self._seen.get(path, 0) + len(data)
            for line in data.decode().splitlines():
                say(line)

    def end(self, number: int) -> None:
        """Of a job, after its last."""
        (self._meeting / f"{number}{_TOLD}").unlink(missing_ok=True)


_TOLD = ".told"


def _import_ray() -> Any:
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


def _make_meeting(job: Job) -> tuple[Path, IO[bytes]]:
    """A folder below OUT where tasks prove that they see the driver's files, and count their attempts; and its lock, to be kept open.

    Those of drivers that were killed are removed: nobody has locked them.
    """
    logs = log_of(job).parent
    here = f".ray-{socket.gethostname()}-"
    for left in logs.glob(f"{glob.escape(here)}*"):  # of this machine alone: not every file system knows of the locks of another
        with suppress(OSError), open(left / _OWNER, "r+b") as its_lock:  # another driver's, being made or removed, or not to be known here
            fcntl.flock(its_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    folder = logs / f"{here}{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
        lock = open(folder / "new", "wb")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{folder}: can't be made: {error.strerror}; expected a writable folder") from error
    with suppress(OSError):  # of a file system without locks: it stays after a kill
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "new").rename(folder / _OWNER)  # that nobody sees without its lock
    return folder, lock


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


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
    place, is_unwanted = Path(there["meeting"]) / str(number), (Path(there["meeting"]) / _END).exists
    if is_unwanted():
        return {"entries": [], "problem": _UNWANTED}
    before, attempts = _count_attempt(place, node), 1 + there["retries"]
    attempt, names = 1 + len(before), ", ".join(job.ids)
    if attempt > attempts:
        return {"entries": [], "problem": f"its process, worker or node died {counted(attempts, 'time')}, here is node {node}: given up"}
    if before:
        _tell(place, f"node {node}: {names}: goes on, attempt {attempt} of {attempts}; its process, worker or node died (node {before[-1]})")
        _wait_for_runs(job, node)
    log = log_of(job)
    environ = environ_of_child(os.environ, cores=there["cpus"], gpu=None if there["gpus"] else "")  # Ray hides no GPU from a task that asked for none
    process = _child(log, environ, there["cwd"] if Path(there["cwd"]).is_dir() else None)
    entries: list[Entry] = []
    try:
        process.begin(job, log=log, title=f"node {node}, attempt {attempt} of {attempts}: {names}")
        for event in process.events(is_unwanted=is_unwanted):
            if "entry" in event:
                entries.append(_of_this_sweep(event["entry"], node, is_again=attempt > 1))
            elif there["progress"]:
                _tell(place, f"node {node}: {describe_epoch(event['epoch'])}")
        if process.left is None:
            return {"entries": entries, "problem": None}
        if is_unwanted():
            return {"entries": entries, "problem": _UNWANTED}
        if process.was_killed:
            died = JobDied(f"node {node}: {process.describe_end()}")
            _tell(place, f"{names}: {died}")
            raise died
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


def _count_attempt(path: Path, node: str) -> list[str]:
    """Begin an attempt at a job: the nodes of those before it."""
    try:
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            before = file.read().splitlines()
            file.write(f"{node}\n")
        return before
    except OSError as error:
        raise StoreError(f"node {node}: {path}: can't be written: {error.strerror}; expected --out writable on every node") from error


def _tell(place: Path, line: str) -> None:
    """Let the driver say a line. The file is closed after each, which is when other machines of a network file system see it."""
    try:
        with open(place.with_name(place.name + _TOLD), "a", encoding="utf-8") as file:
            file.write(" ".join(line.split()) + "\n")
    except OSError as error:
        raise StoreError(f"{place.parent}: can't be written: {error.strerror}; expected --out writable on every node") from error


def _wait_for_runs(job: Job, node: str) -> None:
    """Until nobody trains them: a node that Ray has lost may be cut off and at work. Raises JobDied, to be tried again, if it does not end."""
    for folder in job.folders:
        if folder.is_dir():
            try:
                RunLock(folder, patience_s=_PATIENCE_S).release()
            except StudentError as error:
                raise JobDied(f"node {node}: {error}") from error
