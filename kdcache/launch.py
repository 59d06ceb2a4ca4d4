"""Which of how many processes this one is, read from what launched it; and which shards it does first. Used by extract and train.

Ranks of extract never talk to each other: they meet in the cache, where a record exists once whoever made it. Rank and world say where a
rank begins, nothing more; a rank that is alone finishes everything. Those of train do every step together (`distributed`).
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .errors import UsageError

ItemT = TypeVar("ItemT")

MOST_WORKERS = 8
"""By default: more seldom load faster, and each takes memory."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that run the same command."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_world_size: int = 1
    """Processes on this machine."""
    cores: int = 1
    """CPU cores that are this process's share."""


def available_cores() -> int:
    """Cores that this process may run on: a container or a job step may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def default_workers(cores: int) -> int:
    """Loading or decoding processes where the user names no number: one a core, at most 8."""
    return min(MOST_WORKERS, cores)


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Rank and world from the first of these that is there; alone without any of them.

    * `KDCACHE_RANK` and `KDCACHE_WORLD_SIZE`, set by hand, for a job array or any other launcher;
    * `RANK` and `WORLD_SIZE` (torchrun), with `LOCAL_RANK` and `LOCAL_WORLD_SIZE`;
    * `SLURM_PROCID` of `SLURM_STEP_NUM_TASKS` (or `SLURM_NTASKS`) in a job step, with `SLURM_LOCALID`. The batch script itself is no
      step and is alone. So is each task of a job array: as often as not they run different commands;
    * `JOB_COMPLETION_INDEX` (a Kubernetes indexed job) of `KDCACHE_WORLD_SIZE`: Kubernetes tells a pod its index and not the job's
      `completions`, so the manifest must say it.

    environ: default os.environ. Raises UsageError that names the variables when one of a pair is missing or they contradict each other.
    """
    env = os.environ if environ is None else environ
    if "KDCACHE_RANK" in env:
        return _launch(env, rank="KDCACHE_RANK", world="KDCACHE_WORLD_SIZE")
    if "RANK" in env or "WORLD_SIZE" in env:
        return _launch(env, rank="RANK", world="WORLD_SIZE", local_rank="LOCAL_RANK", local_world="LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" in env and not _is_batch_script(env):
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        return _slurm_launch(env, _launch(env, rank="SLURM_PROCID", world=world))
    if "JOB_COMPLETION_INDEX" in env or "KDCACHE_WORLD_SIZE" in env:
        rank = "JOB_COMPLETION_INDEX" if "JOB_COMPLETION_INDEX" in env else "KDCACHE_RANK"
        return _launch(env, rank=rank, world="KDCACHE_WORLD_SIZE")
    return Launch(cores=available_cores())


def _launch(env: Mapping[str, str], *, rank: str, world: str, local_rank: str = "", local_world: str = "") -> Launch:
    found = {name: _number(env, name) for name in (rank, world)}
    _check_below(rank, found[rank], world, found[world])
    local = _number(env, local_rank) if local_rank in env else 0
    num_local = _number(env, local_world) if local_rank in env and local_world in env else local + 1  # so many at least: each has its GPU
    _check_below(local_rank, local, local_world, num_local)
    return Launch(
        rank=found[rank], world_size=found[world], local_rank=local, local_world_size=num_local, cores=max(1, available_cores() // num_local)
    )


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name)
    if text is None:
        there = ", ".join(f"{other}={env[other]}" for other in _VARIABLES if other in env)
        raise UsageError(f"{name} is not set, but {there}: expected both a rank and a number of ranks; set {name}, or unset the others to run alone")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{name}={text!r}: expected a whole number from 0")
    return int(text)


_VARIABLES = (
    "KDCACHE_RANK",
    "KDCACHE_WORLD_SIZE",
    "RANK",
    "WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "JOB_COMPLETION_INDEX",
)


def _check_below(rank: str, number: int, world: str, count: int) -> None:
    if number >= count:
        raise UsageError(f"{rank}={number} and {world}={count} contradict each other: expected a rank from 0 to {world} - 1")


def without_launch(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be alone, whatever launched the one that starts it: a job of a sweep, Ray's workers in a SLURM step."""
    return {name: value for name, value in environ.items() if name not in _VARIABLES}


def _is_batch_script(env: Mapping[str, str]) -> bool:
    """Whether this is the script that sbatch started: SLURM numbers it like task 0 of a step, but it is one process in no step."""
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEP_NUM_TASKS" in env
    return env["SLURM_PROCID"] == "0" and not in_step and ("SLURM_JOB_ID" in env or "SLURM_NTASKS" not in env)


def _slurm_launch(env: Mapping[str, str], launch: Launch) -> Launch:
    num_local = _slurm_tasks_here(env, launch.world_size)
    local_rank = _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else 0
    cores = available_cores()  # a step may bind each task to its own cores, or leave all tasks on all cores of the job
    on_node = env.get("SLURM_CPUS_ON_NODE", "")
    share = (int(on_node) if on_node.isdigit() else cores) // num_local
    return Launch(rank=launch.rank, world_size=launch.world_size, local_rank=local_rank, local_world_size=num_local, cores=min(cores, max(1, share)))


def _slurm_tasks_here(env: Mapping[str, str], world_size: int) -> int:
    """Tasks of the step on this node, from a list such as '4(x2),3'; without one as if they were spread evenly."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * min(int(match[2] or 1), 1 << 20)
    node = env.get("SLURM_NODEID", "0")
    if node.isdigit() and int(node) < len(counts):
        return max(1, min(counts[int(node)], world_size))
    nodes = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    return -(-world_size // max(1, int(nodes))) if nodes.isdigit() else world_size


def shard_order(shards: Sequence[ItemT], launch: Launch) -> list[ItemT]:
    """First those whose index is the rank modulo the world, as they come; then the others', in an order seeded by the rank.

    shards: the full list, the same for every rank. Different orders keep ranks that are done with their own off each other's heels.
    """
    own = [shard for index, shard in enumerate(shards) if index % launch.world_size == launch.rank]
    others = [shard for index, shard in enumerate(shards) if index % launch.world_size != launch.rank]
    random.Random(launch.rank).shuffle(others)
    return own + others
