"""Several extractions of one cache: launched by torchrun or SLURM, or racing, or killed. Nothing is lost, nothing is twice, values are the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import FEATURES, groups, run, tree
from click.testing import CliRunner
from helpers import Forked, kdcache_command, make_shards, make_teacher_dir, slurm
from hypothesis import given
from hypothesis import strategies as st

import kdcache.rendering
import pipelines.extraction.turns
from cli.main import main
from kdcache import open_cache
from kdcache.device import share_machine
from kdcache.errors import UsageError
from kdcache.index import is_current, load_documents
from kdcache.launch import Launch, available_cores, read_launch, shard_order
from kdcache.store import open_store
from pipelines.facts import owned_bytes
from pipelines.verify import verify

SHARDS, SAMPLES = 6, 20


# --- variables -------------------------------------------------------------------------------------------------------

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environ", "rank", "world", "local_rank", "local_world"),
    [
        ({}, 0, 1, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 3, 4, 1, 2),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 3, 4, 1, 2),  # DeepSpeed's launcher, or by hand
        ({**STEP, "RANK": "1", "WORLD_SIZE": "2"}, 1, 2, 0, 1),  # torchrun in a step
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, 5, 7, 1, 3),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x1),3(x1)"}, 5, 7, 1, 3),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, 1, 2, 1, 2),
        (BATCH, 0, 1, 0, 1),  # the batch script of eight tasks is one process
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 0, 1, 0, 1),  # a shell of salloc
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, 0, 1, 0, 1),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 0, 1, 0, 1),  # srun --pty bash of a larger job
        ({"JOB_COMPLETION_INDEX": "2", "KDCACHE_WORLD_SIZE": "5"}, 2, 5, 0, 1),
        ({"JOB_COMPLETION_INDEX": "2", "RANK": "0", "WORLD_SIZE": "1"}, 0, 1, 0, 1),
        ({**STEP, "KDCACHE_RANK": "6", "KDCACHE_WORLD_SIZE": "9"}, 6, 9, 0, 1),
    ],
)
def test_each_launcher_is_read_from_its_variables(environ: dict[str, str], rank: int, world: int, local_rank: int, local_world: int) -> None:
    launch = read_launch(environ)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (rank, world, local_rank, local_world)
    assert launch.cores == max(1, available_cores() // local_world)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE is not set", "RANK=0"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set", "WORLD_SIZE=2"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK='-1'", "whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE='two'", "whole number"]),
        ({"JOB_COMPLETION_INDEX": "0"}, ["KDCACHE_WORLD_SIZE is not set", "JOB_COMPLETION_INDEX=0"]),
        ({"KDCACHE_WORLD_SIZE": "3"}, ["KDCACHE_RANK is not set"]),
        ({"KDCACHE_RANK": "3"}, ["KDCACHE_WORLD_SIZE is not set"]),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, ["SLURM_NTASKS is not set", "SLURM_PROCID=3"]),
        ({"SLURM_PROCID": "8", "SLURM_NTASKS": "8"}, ["SLURM_PROCID=8", "SLURM_NTASKS=8"]),
    ],
)
def test_variables_that_contradict_each_other_are_named(environ: dict[str, str], named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read_launch(environ)
    assert all(text in str(caught.value) for text in named), str(caught.value)


def test_contradicting_variables_are_usage_errors_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, num_shards=1, num_samples=1)
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(main, ["extract", str(tmp_path), str(tmp_path / "cache"), "--teacher", "vit_tiny_patch16_224"])
    assert (result.exit_code, (tmp_path / "cache").exists()) == (2, False)
    assert "WORLD_SIZE is not set" in result.stderr


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_rank_begins_with_its_own_shards_and_sweeps_all_others(num_shards: int, world: int) -> None:
    shards = [f"train-{i:04d}" for i in range(num_shards)]
    begins = []
    for rank in range(world):
        order = shard_order(shards, Launch(rank=rank, world_size=world))
        own = shards[rank::world]
        assert order[: len(own)] == own
        assert sorted(order) == shards
        assert order == shard_order(shards, Launch(rank=rank, world_size=world))
        begins += own
    assert sorted(begins) == shards


def test_a_rank_takes_its_own_gpu_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda, second = torch.device("cuda"), Launch(rank=3, world_size=4, local_rank=1, local_world_size=2)
    for count, index in ((2, 1), (1, 0)):  # two GPUs, or the one that SLURM shows this task
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert share_machine(cuda, second) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert share_machine(torch.device("cuda:0"), second) == torch.device("cuda:0")
    assert share_machine(torch.device("cpu"), second) == torch.device("cpu")
    assert share_machine(cuda, Launch()) == cuda


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher, and the cache `alone` that one process made of them."""
    folder = tmp_path_factory.mktemp("launch")
    make_shards(folder / "shards", num_shards=SHARDS, num_samples=SAMPLES)
    make_teacher_dir(folder / "teacher")
    run(folder, "alone", targets=("logits", FEATURES))
    return folder


def arguments(setup: Path, cache: Path, *more: object) -> list[object]:
    """As `test_extract.run` extracts."""
    given = ["extract", setup / "shards", cache, "--teacher", f"local-dir:{setup / 'teacher'}", "--target", "logits", "--target", FEATURES]
    return [*given, "--views", 2, "-b", 5, "--device", "cpu", "-j", 0, *more]


def assert_as_if_one_process_had_made_it(cache: Path, setup: Path) -> None:
    """Root and every stored byte as of `alone`; one record a segment, every row once, a current index, nothing else left."""
    alone, made = open_cache(setup / "alone"), open_cache(cache)
    assert made.root == alone.root
    assert groups(cache) == groups(setup / "alone")
    assert tree(cache).keys() - {path for path in tree(cache) if path.startswith("index/")} == {
        path for path in tree(setup / "alone") if not path.startswith("index/")
    }
    (layer,) = made.teachers.values()
    assert [len(records) for records in (*made.views.values(), *layer.records.values())] == [1] * (2 * SHARDS)
    assert [made.keys(shard) for shard in made.shards] == [[f"s{i:04d}" for i in range(SAMPLES)]] * SHARDS
    assert made.num_rows == SHARDS * SAMPLES
    store = open_store(cache)
    assert is_current(store, load_documents(store, use_index=False)[0]), "the last rank leaves a current index"
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.ok, verdict.problems
    assert not (cache / "tmp").exists()


SLOW_IMAGES = """
import time, kdcache.rendering as rendering
decode = rendering.decode_image
rendering.decode_image = lambda *given: (time.sleep(0.02), decode(*given))[1]
"""


def launch_torchrun(command: list[object], log: Path, *, before: str = "") -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--no-python"]
    code = before + "from cli.main import main; main()"
    with open(log, "wb") as out:
        return subprocess.Popen([*launcher, sys.executable, "-c", code, *map(str, command)], stdout=out, stderr=subprocess.STDOUT)


def test_torchrun_shares_the_shards_and_only_the_first_rank_speaks(setup: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch_torchrun(arguments(setup, tmp_path / "cache", "--json"), log).wait(120) == 0, log.read_text()
    assert_as_if_one_process_had_made_it(tmp_path / "cache", setup)
    text = log.read_text()
    body = json.loads(text[text.index("\n{") : text.index("\n}") + 2])
    assert (text.count('"shards"'), body["shards"], body["rows"], body["resumed_shards"], body["problems"]) == (1, SHARDS, SHARDS * SAMPLES, 0, [])
    assert text.count("teacher: ") == 1
    assert "on each of 2 ranks" in text


def test_torchrun_with_a_killed_rank_stops_cleanly_and_the_same_command_finishes(setup: Path, tmp_path: Path) -> None:
    """torchrun sends the others SIGTERM when one rank dies. The first to work is held, so that both surely work at one time."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    launched = launch_torchrun(arguments(setup, cache), log, before=SLOW_IMAGES)
    deadline = time.monotonic() + 120
    victim: set[int] = set()
    while len(at_work := working(cache)) < 2 and time.monotonic() < deadline:
        assert launched.poll() is None, log.read_text()
        if at_work and not victim:
            victim = at_work
            os.kill(min(victim), signal.SIGSTOP)
    os.kill(min(victim or at_work), signal.SIGKILL)  # without a victim, both were seen at once
    assert launched.wait(60) == 1
    assert "stopped by SIGTERM; what was committed is kept" in log.read_text()
    assert open_cache(cache).num_rows < SHARDS * SAMPLES, "killed too late to show anything"
    assert {problem.kind for problem in verify(str(cache)).problems} <= {"extra"}
    run(setup, str(cache), targets=("logits", FEATURES))
    assert_as_if_one_process_had_made_it(cache, setup)


def working(cache: Path) -> set[int]:
    """Processes that are doing a shard: they hold the lock of a spool that names one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            places = [os.readlink(descriptor) for descriptor in (process / "fd").iterdir()]
            if any(place.startswith(f"{cache}/tmp/") and place.endswith("/lock") and Path(place).read_bytes() for place in places):
                found.add(int(process.name))
    return found


def test_slurm_tasks_share_the_shards(setup: Path, tmp_path: Path) -> None:
    tasks = [Forked(kdcache_command(*arguments(setup, tmp_path / "cache", "--json")), tmp_path / f"log-{rank}", slurm(rank)) for rank in range(2)]
    assert [task.wait() for task in tasks] == [0, 0], [task.output() for task in tasks]
    assert_as_if_one_process_had_made_it(tmp_path / "cache", setup)
    assert tasks[1].output() == "", "ranks but the first tell problems only"
    assert '"rows": 120' in tasks[0].output()


def test_a_shard_that_cannot_be_done_is_told_by_the_exit_code_of_the_first_rank(setup: Path, tmp_path: Path) -> None:
    """Of the others it is 0: torchrun stops every rank when one ends with another code, the first before it has summed up."""
    shutil.copytree(setup / "shards", tmp_path / "shards")
    os.truncate(tmp_path / "shards" / "train-0002.tar", 30_000)
    (tmp_path / "shards" / "train-0003.tar").write_bytes(b"no tar" * 200)
    command = [tmp_path / "shards" if part == setup / "shards" else part for part in arguments(setup, tmp_path / "cache", "--json")]
    ranks = [Forked(kdcache_command(*command), tmp_path / f"log-{rank}", slurm(rank)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [1, 0], [rank.output() for rank in ranks]
    text = ranks[0].output()
    body = json.loads(text[text.index("\n{") : text.index("\n}") + 2])
    assert (body["shards"], sorted(problem["shard"] for problem in body["problems"])) == (SHARDS - 1, ["train-0002", "train-0003"])
    assert "rank 1: problem: shard train-0003" in ranks[1].output()


def test_more_ranks_than_shards_and_ranks_that_are_not_there(setup: Path, tmp_path: Path) -> None:
    assert Forked(kdcache_command(*arguments(setup, tmp_path / "cache")), tmp_path / "log", slurm(8, world=9)).wait() == 0
    assert_as_if_one_process_had_made_it(tmp_path / "cache", setup)


def test_the_survivor_of_two_ranks_does_what_the_killed_one_left(setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim is stopped in the middle of a shard, so that it holds it; the survivor waits for it, and takes over once it is dead."""
    cache, decode = tmp_path / "cache", kdcache.rendering.decode_image
    monkeypatch.setattr(kdcache.rendering, "decode_image", lambda *given: (time.sleep(0.01), decode(*given))[1])
    victim = Forked(kdcache_command(*arguments(setup, cache)), tmp_path / "victim", slurm(1))
    while victim.pid not in working(cache):
        assert os.waitpid(victim.pid, os.WNOHANG) == (0, 0), victim.output()
    victim.kill(signal.SIGSTOP)
    held = open_store(cache).live_labels()
    assert held, "the victim was too quick"
    survivor = Forked(kdcache_command(*arguments(setup, cache)), tmp_path / "survivor", slurm(0))
    others = SHARDS - len(held)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("teachers/teacher/train-*.json"))) < others and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.waitpid(survivor.pid, os.WNOHANG) == (0, 0), survivor.output()
    assert len(list(cache.glob("teachers/teacher/train-*.json"))) == others, "what a live rank holds is left to it"
    victim.kill(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert survivor.wait() == 0, survivor.output()
    assert_as_if_one_process_had_made_it(cache, setup)


def test_a_shard_that_a_live_rank_never_finishes_is_done_all_the_same(setup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.extraction.turns, "MIN_PATIENCE_S", 0.3)
    store = open_store(tmp_path / "cache")
    spool = store.new_spool("teacher/train-0002")
    summary = run(setup, str(tmp_path / "cache"), targets=("logits", FEATURES))
    assert (summary.shards, summary.rows, summary.resumed_shards) == (SHARDS, SHARDS * SAMPLES, 0)
    store.drop_spool(spool)
    assert_as_if_one_process_had_made_it(tmp_path / "cache", setup)


def test_racing_extractions_of_one_empty_cache_do_no_shard_twice(setup: Path, tmp_path: Path) -> None:
    """Without any launcher: they see what the others are doing. What each has added, together, is the cache."""
    cache = tmp_path / "cache"

    def race() -> int:
        summary: Any = run(setup, str(cache), targets=("logits", FEATURES))
        sys.stdout.write(json.dumps(summary.to_json()) + "\n")
        return 0 if summary.rows == SHARDS * SAMPLES else 1

    racers = [Forked(race, tmp_path / f"log-{i}") for i in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0], [racer.output() for racer in racers]
    assert_as_if_one_process_had_made_it(cache, setup)
    added = sum(json.loads(racer.output().splitlines()[-1])["bytes"] for racer in racers)
    assert added == owned_bytes(open_cache(cache))
