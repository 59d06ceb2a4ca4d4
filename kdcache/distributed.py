"""Several processes that train one student: who they are, what they tell each other, and who speaks when one of them fails. Used by train.

A process alone never touches torch.distributed. Of several, whichever launcher started them (`launch`), each has its device and its share of
every step; the first one writes files and speaks.

One that fails says why and ends, and the others end after it without a word: whoever is first to note its error in the store in which they
met is the one that speaks.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from .device import resolve_device, share_machine
from .errors import KDCacheError, ProcessError, ToldError, UsageError
from .interrupt import Stopped, is_asked_to_stop, stop
from .launch import Launch, read_launch

ValueT = TypeVar("ValueT")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: the first one saves and exports while they do."""
MEETING = timedelta(minutes=10)
"""How long the first to start waits for the others."""
SILENCE_S = 1.0
"""How long one that has nothing to say waits before it ends: torchrun stops all of them as soon as one has ended."""
PATIENCE_S = 5.0
"""How long rank 0, where it keeps the store, lets the others look there before it ends."""
_TOLD, _HEARD, _ATTEMPT = "told", "heard", "kdcache/attempt"
_LOST = re.compile(r"gloo|nccl|process ?group|connection (closed|reset)|timed out", re.IGNORECASE)
"""In the messages of torch's communication, which are plain RuntimeErrors."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process and those that train the same student. What it says of all, all must ask for, in the same order."""

    launch: Launch = field(default_factory=Launch)
    store: Any = None
    """torch's store in which they met; None of a process alone."""

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return self.launch.world_size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def beside(self) -> range:
        """The ranks on this machine, numbered in a row as torchrun and SLURM do by default."""
        first = self.rank - self.launch.local_rank
        return range(first, first + self.launch.local_world_size)

    def device(self, name: str | None) -> torch.device:
        """The device of this one: of several on a machine each has a GPU of its own. Raises UsageError for one that can't be shared so."""
        device = resolve_device(name)
        if self.world == 1:
            return device
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {device}: torch has no communication between processes for {device.type}; expected cuda or cpu")
        here = self.launch.local_world_size
        if device.type == "cuda" and here > 1:
            if str(device) != "cuda":
                raise UsageError(f"--device {name}: all {here} processes of this machine would take it; expected --device cuda: one GPU each")
            if 1 < torch.cuda.device_count() < here:
                raise UsageError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; expected at most one for each GPU")
        return share_machine(device, self.launch)

    # --- what all do together ---

    def mean(self, values: Tensor, *, flag: bool = False) -> tuple[list[float], bool, bool]:
        """Each of `values` (N,) averaged over the processes, the first one's flag, and whether a signal asks any to stop, by one small all-reduce.

        Of a process alone it never does: there a signal raises `Stopped` itself.
        """
        if self.world == 1:
            return values.tolist(), flag, False
        flags = values.new_tensor([float(flag and self.is_first), float(is_asked_to_stop())], dtype=torch.float64)
        body = torch.cat([values.detach().double(), flags])
        dist.all_reduce(body)
        *sums, flagged, asked = body.tolist()
        return [one / self.world for one in sums], flagged > 0, asked > 0

    def gather(self, value: ValueT) -> list[ValueT]:
        """What each of them has, by rank. value: anything that can be pickled; tensors on the CPU."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def stop_if_asked(self) -> None:
        """Raise `Stopped` in all processes if a signal asks any of them to stop."""
        if self.world > 1 and any(self.gather(is_asked_to_stop())):
            raise stop()

    def decide(self, action: Callable[[], ValueT]) -> ValueT:
        """What `action` gives in the first one, to all: whatever looks at files that the first one changes. Its error ends all."""
        if self.world == 1:
            return action()
        told: list[Any] = [None, False]
        if self.is_first:
            try:
                told = [action(), True]
            except BaseException:
                dist.broadcast_object_list(told)
                raise
        dist.broadcast_object_list(told)
        value, is_there = told
        if not is_there:
            raise ToldError("another process of this run has said why it ends")
        decided: ValueT = value
        return decided

    def common(self, error: KDCacheError) -> KDCacheError:
        """An error that every one of them has met: the first one's to tell."""
        return error if self.is_first else ToldError(str(error))

    # --- when one of them fails ---

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Within, torch's errors of communication are ProcessErrors: another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
                raise
            if self._is_told():
                raise ToldError("another process of this run has said why it ends") from error
            reason = re.sub(r"^\[\S*/", "[", str(error).splitlines()[0])
            raise ProcessError(
                f"another process of this run is gone, or has not answered for {TIMEOUT.total_seconds() / 60:.0f} minutes ({reason}); the last checkpoint"
                f" is kept: start all of them again with --resume"
            ) from error

    def _is_told(self) -> bool:
        return (self._add_told(0) or 0) > 0

    def _is_first_to_tell(self) -> bool:
        count = self._add_told(1)
        return self.rank == 1 if count is None else count == 1

    def _end_in_turn(self) -> None:
        """Where rank 0 keeps the store, it ends when the others have looked there: its connections to them are closed first, which is what they notice."""
        if _outlives_ranks():
            return
        if self.is_first:
            _leave_group()
            deadline = time.monotonic() + PATIENCE_S
            with suppress(KeyboardInterrupt):
                while time.monotonic() < deadline and self.store.add(_HEARD, 0) < self.world - 1:
                    time.sleep(0.01)
        elif not self._store_is_gone():
            with suppress(dist.DistError):
                self.store.add(_HEARD, 1)

    def _add_told(self, amount: int) -> int | None:
        """How many have told why they end, after so many more; None if the store is gone."""
        if not self._store_is_gone():
            with suppress(dist.DistError):  # it has ended since
                return int(self.store.add(_TOLD, amount))
        return None

    def _store_is_gone(self) -> bool:
        """Whether rank 0 has ended, and the store with it, and what it may have said there; torchrun's outlives all ranks."""
        if self.is_first or _outlives_ranks():
            return False
        return not _answers(int(os.environ["MASTER_PORT"]))  # asked itself, torch's store prints its stack


def _outlives_ranks() -> bool:
    """Whether the store is torchrun's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


ALONE = Processes()
"""The only process there is."""


@contextmanager
def joined(device_name: str | None) -> Iterator[Processes]:
    """All processes of this command's launcher, within; ALONE where it was started once.

    Raises UsageError for variables of a launcher that contradict each other or lack an address, ProcessError for processes that do not come. Of
    errors within, the one that is told is raised in its process, in the others it is a ToldError.
    """
    launch = read_launch()
    if launch.world_size == 1:
        yield ALONE
        return
    device = Processes(launch=launch).device(device_name)
    processes = _join(launch, device)
    try:
        with processes.naming_lost():
            yield processes
    except GeneratorExit:  # whoever trains in a loop has left it
        raise
    except BaseException as error:
        if isinstance(error, Stopped) and error.is_agreed:
            is_told = not processes.is_first
        else:
            is_told = isinstance(error, ToldError) or not processes._is_first_to_tell()
            processes._end_in_turn()
        if is_told:
            _leave_group()  # while the others are there: the one that speaks ends at once
            _be_silent()
            raise ToldError(str(error)) from error
        if isinstance(error, KDCacheError) and not processes.is_first:
            error.args = (f"rank {launch.rank}: {error}",)
        raise
    finally:
        _leave_group()


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _be_silent() -> None:
    with suppress(KeyboardInterrupt):  # torchrun's SIGTERM, because the one that speaks has ended
        time.sleep(SILENCE_S)


def _join(launch: Launch, device: torch.device) -> Processes:
    try:
        place = _meeting_place(launch.rank, launch.world_size)
        with _attempt(place, launch) as attempt:
            store = PrefixStore(f"kdcache/{attempt}", place)
            _check_own_gpu(store, launch, device)
            dist.init_process_group(
                "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl",
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=TIMEOUT,
                device_id=None if device.type == "cpu" or str(device) == device.type else device,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(
            f"rank {launch.rank}: the {launch.world_size} processes of this run can't reach each other at"
            f" {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); check that all were started, and"
            f" that MASTER_ADDR names the machine of rank 0"
        ) from error
    return Processes(launch=launch, store=store)


def _check_own_gpu(store: Store, launch: Launch, device: torch.device) -> None:
    """Raise UsageError for two processes on one GPU, which NCCL would tell as a process that is gone; in all but the first ToldError.

    Which GPU a number means differs between processes that were shown different ones; its UUID does not. All are compared: not every launcher
    says how many processes a machine has.
    """
    is_gpu = device.type == "cuda"
    store.set(f"gpu/{launch.rank}", str(torch.cuda.get_device_properties(device).uuid) if is_gpu else "")
    if not is_gpu:
        return
    rank_of: dict[bytes, int] = {}
    error: UsageError | None = None
    for rank in range(launch.world_size):
        gpu = store.get(f"gpu/{rank}")
        if gpu and rank_of.setdefault(gpu, rank) != rank:
            error = error or UsageError(
                f"ranks {rank_of[gpu]} and {rank} would train on one GPU ({gpu.decode()}); expected one for each: start at most as many processes on a"
                f" machine as it has GPUs (torchrun --nproc-per-node), or show each its own (CUDA_VISIBLE_DEVICES)"
            )
    if error is None:
        return
    store.add("gpu/looked", 1)
    if launch.rank != 0:
        _be_silent()
        raise ToldError(str(error))
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and store.add("gpu/looked", 0) < launch.world_size:  # the store may end with this one
        time.sleep(0.01)
    raise error


@contextmanager
def _attempt(place: Store, launch: Launch) -> Iterator[str]:
    """A name for this meeting, which all have alike: torchrun's store still holds what the processes before a restart have written there.

    Rank 0 names it by a port at which it listens until all have come: what is there of a rank 0 that is gone is known by its silence.
    """
    if launch.rank == 0:
        dual = socket.has_dualstack_ipv6()
        with socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=launch.world_size
        ) as server:
            name = f"{server.getsockname()[1]}-{uuid.uuid4().hex}"
            place.set(_ATTEMPT, name)
            yield name
        return
    deadline = time.monotonic() + MEETING.total_seconds()
    while True:
        found: str = _hearing_signals(lambda: place.get(_ATTEMPT)).decode()  # waits for the first one ever
        if _answers(int(found.partition("-")[0])):
            break
        if time.monotonic() > deadline:
            raise OSError(f"rank 0 has not come within {MEETING.total_seconds() / 60:.0f} minutes")
        time.sleep(0.05)
    yield found


def _answers(port: int) -> bool:
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=SILENCE_S).close()
    except OSError:
        return False
    return True


@lru_cache(maxsize=1)
def _meeting_place(rank: int, world: int) -> Store:
    """torchrun's store, or one that rank 0 keeps at MASTER_ADDR and MASTER_PORT."""
    for name, value in slurm_meeting_place(os.environ).items():
        os.environ.setdefault(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(
                f"{name} is not set, but there are {world} processes; start them with torchrun, or set MASTER_ADDR and MASTER_PORT for all"
            )
    if os.environ["MASTER_PORT"] == "0":  # torchrun --master-port 0 tells its workers no other
        raise UsageError("MASTER_PORT=0: the processes would look for each other for ever; start torchrun with --standalone, or with a port")
    from torch.distributed.rendezvous import rendezvous

    store: Store = _hearing_signals(lambda: next(iter(rendezvous("env://", rank, world, timeout=MEETING)))[0])
    return store


def _hearing_signals(wait: Callable[[], ValueT]) -> ValueT:
    """What it gives, from a thread of its own: torch's store, waiting for others, would hear no signal before its time is over."""
    found: list[ValueT] = []
    errors: list[RuntimeError | ValueError | OSError] = []

    def run() -> None:
        try:
            found.append(wait())
        except (RuntimeError, ValueError, OSError) as error:  # torch's of a place that is not there, or of others who do not come
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
    if errors:
        raise errors[0]
    return found[0]


def slurm_meeting_place(env: Any) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of a SLURM step: its first node, and a port that its job's number gives. {} outside of one."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    if match is None or "SLURM_PROCID" not in env:
        return {}
    numbers = [int(env.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if env.get(name, "0").isdigit()]
    return {"MASTER_ADDR": match[1] + (match[2] or ""), "MASTER_PORT": str(20_000 + sum(numbers) % 20_000)}
