"""Jobs in a process of their own: what the engines that use several processes are made of. Between engines and train.

`JobProcess` is the parent's side. The child is `python -m pipelines.engines.job_process FD`: it reads requests, one line of JSON each, from stdin, trains
their jobs one after another as `run_job` does, and writes events, a JSON object a line, to descriptor FD; what it says goes into the job's log:

    {"job": {…}, "log": PATH}                                            a request; null: no more will come
    {"epoch": {"id", "epoch", "epochs", "loss", "top1", "seconds"}}      an event, after each epoch of a run; top1 None if it was not measured
    {"entry": {…}}                                                       an event, of a run that has ended, as `train` reports it

A child is used again, since a new one needs seconds to import torch; not after a run has failed in it, which may have left a device unusable.

Neither side outlives the other. The parent keeps the child's stdin open: where that ends, the parent has died, be it by SIGKILL, and the child kills
its process group, workers included. A SIGTERM ends it as it ends a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.console import harmless, say
from kdcache.errors import KDCacheError, StoreError
from kdcache.interrupt import Stopped, finishing_first, stopping_cleanly
from kdcache.launch import default_workers, without_launch

from ..training.watching import Line, telling
from . import Job, run_job

Event = dict[str, Any]

RETRIES = 2
"""How often a job whose process was killed is tried again."""

_POLL_S = 0.2
"""The workers of a child that was killed may keep its pipe open for seconds, so that its end must be asked for."""


class JobDied(KDCacheError):
    """A job's process was killed. The text says how, and what it said last."""


# --- the parent's side -----------------------------------------------------------------------------------------------


class JobProcess:
    """A child that trains jobs: `begin` one, then `events` or `receive` until `left` is None or it `has_ended`. `close_all` in any case."""

    def __init__(self, log: Path, *, environ: Mapping[str, str], cwd: str | None = None) -> None:
        """log: takes what it says until it has its first job. environ: of the child. Raises StoreError."""
        self.environ, self.cwd = environ, cwd
        self.log = log
        self.job: Job | None = None
        self._reported: dict[str, str] = {}
        """Id → status of the job's runs whose entry has come."""
        self._rest = b""
        self._is_told = False
        """To end: a second word would end it at once."""
        with _naming(log), _open_log(log) as file:
            self._events, events = os.pipe()
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-X", "faulthandler", "-m", __name__, str(events)],
                    stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=[events], cwd=cwd,
                    env={**environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},  # what can be imported here can be there
                    process_group=0,  # Ctrl-C reaches this process, which ends its children as it sees fit
                )  # fmt: skip
            except OSError:
                os.close(self._events)
                raise
            finally:
                os.close(events)
        os.set_blocking(self._events, False)

    def begin(self, job: Job, *, log: Path, title: str) -> None:
        """Give it a job. log: what it says is added there, under `title`. Raises StoreError."""
        self.job, self.log, self._reported = job, log, {}
        with _naming(log), _open_log(log) as file:
            file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
        self._send({"job": job.to_json(), "log": str(log)})

    def _send(self, request: Mapping[str, Any] | None) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which is seen where its end is
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def fileno(self) -> int:
        """Readable when an event has come."""
        return self._events

    @property
    def has_ended(self) -> bool:
        """Whether no more events will come than `receive` has after this."""
        return self.process.poll() is not None

    def receive(self) -> list[Event]:
        """The events that have come since."""
        while True:
            try:
                data = os.read(self._events, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        events: list[Event] = [json.loads(line) for line in lines]
        self._reported |= {event["entry"]["id"]: event["entry"]["status"] for event in events if "entry" in event}
        return events

    def events(self, *, is_unwanted: Callable[[], bool] | None = None) -> Iterator[Event]:
        """Each as it comes, to the end of the job or of the child. is_unwanted: asked on the way; the child is told to end where it says so."""
        has_ended = False
        while self.left is not None and not has_ended:
            select.select([self], [], [], _POLL_S)
            if is_unwanted is not None and is_unwanted():
                self.stop()
            has_ended = self.has_ended
            yield from self.receive()

    @property
    def left(self) -> Job | None:
        """The job's runs without an entry, None if there are none."""
        assert self.job is not None
        kept = [(config, run_id) for config, run_id in zip(self.job.configs, self.job.ids, strict=True) if run_id not in self._reported]
        return Job(tuple(config for config, _ in kept), tuple(run_id for _, run_id in kept)) if kept else None

    @property
    def is_busy(self) -> bool:
        """Whether it has a job that has not ended."""
        return self.job is not None and self.left is not None

    @property
    def is_reusable(self) -> bool:
        """Whether it may be given another job: it lives, and none of its last one's runs failed."""
        return not self.has_ended and self.left is None and "failed" not in self._reported.values()

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it: the same job may do better next time, as it would not after an error."""
        return self.process.returncode is not None and self.process.returncode < 0

    def describe_end(self) -> str:
        """How it ended, for the entries of the runs that are left."""
        code = self.process.returncode
        if code is None or code >= 0:
            how = f"its process ended with status {code}"
        else:
            how = f"its process was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += ", often for lack of memory"
        return f"{how}; its log {self.log} ends: {_last_words(self.log)}"

    def stop(self) -> None:
        """Ask it to end, once: within a job as a command is asked, between two by ending its loop."""
        if self.has_ended or self._is_told:
            return
        self._is_told = True
        if self.is_busy:
            self.process.terminate()
        else:
            self._send(None)

    def close(self, *, grace_s: float | None = 0.0) -> None:
        """Its end, within `grace_s` (None: whenever it comes), and that of what it leaves behind."""
        if grace_s is None:
            for _ in self.events():  # what it tells is in its folders too; unread it would fill the pipe, and wait
                pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the second: macOS, of a group of the dead
            os.killpg(self.process.pid, signal.SIGKILL)  # the workers of one that was killed linger
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self._events)


@finishing_first()
def close_all(processes: Sequence[JobProcess]) -> None:
    """End children that are no longer wanted, all at once and orderly: one that trains finishes its step and saves, which takes what it takes.

    No child is waited for without an end: outside of a step and a save each gives itself up after the time that a command has.
    """
    for process in processes:
        process.stop()
    if busy := sum(process.is_busy and not process.has_ended for process in processes):
        say(f"{busy} process{'' if busy == 1 else 'es'} told to end: each finishes its step and saves; a second signal ends all at once")
    begun = time.monotonic()
    for process in processes:
        process.close(grace_s=None if process.is_busy else max(0.0, begun + 1.0 - time.monotonic()))


def environ_of_child(environ: Mapping[str, str], *, cores: int, gpu: str | None = None) -> dict[str, str]:
    """The environment of a child that may use so many cores, and of the GPUs this one only (None: those of `environ`). It is no rank of a launch."""
    threads = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(cores)}
    return {**without_launch(environ), **threads, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})}


def with_share_of(job: Job, cores: int) -> Job:
    """The job with as many loading processes as fit its cores, where its configs leave that open."""
    configs = [config if config.workers is not None else dataclasses.replace(config, workers=default_workers(cores)) for config in job.configs]
    return Job(tuple(configs), job.ids)


def on_gpu(job: Job) -> Job:
    """The job on the GPU that its process is given, where its configs leave the device open: one whose GPU fails would train on the CPU, and not say so."""
    configs = [config if config.device is not None else dataclasses.replace(config, device="cuda") for config in job.configs]
    return Job(tuple(configs), job.ids)


def log_of(job: Job) -> Path:
    """Where a job's log is: OUT/logs."""
    more = f"+{len(job.ids) - 1}" if len(job.ids) > 1 else ""
    return job.folders[0].parent / "logs" / f"{job.ids[0]}{more}.log"


def describe_epoch(event: Mapping[str, Any]) -> str:
    """One line for a person."""
    top1 = f", top1 {event['top1']:.2f}" if event["top1"] is not None else ""
    return f"{event['id']}: epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.3f}{top1}, {event['seconds']:.1f} s"


@contextlib.contextmanager
def _naming(log: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{log}: the job's process can't be started: {error.strerror or error}") from error


def _open_log(log: Path) -> Any:
    """Unbuffered, at its end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return open(log, "ab", buffering=0)


def _last_words(log: Path) -> str:
    """Of what a child has said of its last job, on one line: where it crashed, else its last lines."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(it can't be read: {error.strerror})"
    lines = [line.strip() for line in text.rpartition("=== ")[2].splitlines()[1:] if line.strip()]
    crash = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), None)  # as faulthandler has it
    kept = lines[-3:] if crash is None else [lines[crash], *(line for line in lines[crash:] if line.startswith("File "))][:3]
    return harmless(" | ".join(kept))[-600:] or "(it said nothing)"


# --- the child -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Train the jobs that come on stdin; the process's whole life."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # Ray's workers block the first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever started the command may ignore it; this process is ended by it
    events = int(sys.argv[1])
    os.set_inheritable(events, False)
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    try:
        with stopping_cleanly():
            while (request := requests.get()) is not None:
                _log_to(request["log"])
                _train(Job.from_json(request["job"]), events)
    except Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # so that the parent sees what ended it


def _train(job: Job, events: int) -> None:
    epochs = {run_id: config.epochs for config, run_id in zip(job.configs, job.ids, strict=True)}

    def send(event: Event) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(events, data) :]

    def tell(run_id: str, line: Line) -> None:
        if "step" not in line:
            of_epoch = {"epoch": line["epoch"] + 1, "epochs": epochs.get(run_id, 0), "loss": line["train_loss"], "top1": line.get("eval_top1")}
            send({"epoch": {"id": run_id, **of_epoch, "seconds": line["seconds"]}})

    with telling(tell):
        for entry in run_job(job):
            send({"entry": entry})
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # of a GPU that it may share


def _log_to(path: str) -> None:
    """Let what this process says go there."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _read_requests(requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Hand requests over until the parent is gone. Unbuffered: a forked worker would inherit a buffer, with its lock."""
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            requests.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
