"""Jobs in several processes and as Ray tasks: the bits of one process; whoever is killed is tried again and disturbs no other; no orphans."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_VIT, Forked, assert_same_state, make_cache, make_shard, state_of

import pipelines.training.lock
from cli.main import main
from kdcache.checkpoint import load_checkpoint
from kdcache.errors import StoreError, StudentError, UsageError
from kdcache.interrupt import Stopped, stopping_cleanly
from pipelines.engines import Entry, InProcess, Job, open_runs, plan_jobs
from pipelines.engines.job_process import JobProcess, close_all, environ_of_child, with_share_of
from pipelines.engines.local import Local, local_engine, visible_gpus
from pipelines.engines.ray import OnRay, _make_meeting, train_on_node
from pipelines.train import TrainConfig, train
from pipelines.training.lock import RunLock

STUDENT_ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_rate": 0.1}

METHODS = """
import os, signal, time
from kdcache.methods.kd import KD


class Mortal(KD):
    '''Dies in its ninth step if there is a file that says who is to be killed, once.'''
    name, steps = "mortal", 0

    def losses(self, outputs, labels, targets):
        self.steps += 1
        order = os.environ["MORTAL"] + f"/{self.settings.temperature:g}"
        if self.steps == 9 and os.path.exists(order):
            whom = open(order).read()
            os.remove(order)
            os.kill({"itself": os.getpid, "its parent": os.getppid, "its node": raylet}[whom](), signal.SIGKILL)
            signal.pause()  # the death of its parent is its own
        return super().losses(outputs, labels, targets)


def raylet():
    '''The process that started the worker whose child this is.'''
    import psutil

    return psutil.Process(os.getppid()).ppid()


class Doomed(KD):
    '''Dies whenever it is tried.'''
    name = "doomed"

    def losses(self, outputs, labels, targets):
        os.kill(os.getpid(), signal.SIGSEGV)


class Slow(KD):
    '''Its third step takes 1.5 s: longer than a process that is idle is waited for.'''
    name, steps = "slow", 0

    def losses(self, outputs, labels, targets):
        self.steps += 1
        if self.steps == 3:
            open(os.environ["MORTAL"] + "/slow", "w").close()
            time.sleep(1.5)
        return super().losses(outputs, labels, targets)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """cache/ of 2 shards × 6 images × 2 views: 6 batches of 2 an epoch; val/; orders/ for Mortal, whose module can be imported."""
    folder = tmp_path_factory.mktemp("engines")
    make_cache(folder, num_shards=2, num_samples=6, views=2, targets=["logits"])
    make_shard(folder / "val" / "val-00.tar", num_samples=6, seed=7)
    (folder / "orders").mkdir()
    (folder / "methods").mkdir()
    (folder / "methods" / "methods_of_engines.py").write_text(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "methods")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # of Ray's workers
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # or Ray kills workers when others fill the machine
        patch.setenv("MORTAL", str(folder / "orders"))
        yield folder


def jobs_of(folder: Path, out: Path, *runs: dict[str, Any]) -> list[Job]:
    options: dict[str, Any] = {
        "cache": str(folder / "cache"), "students": (TINY_VIT,), "model_kwargs": STUDENT_ARGS, "val": str(folder / "val"), "out": str(out),
        "epochs": 3, "batch_size": 2, "workers": 0, "device": "cpu", "log_interval": 1, "recovery_interval": 2,
    }  # fmt: skip
    return plan_jobs(open_runs([TrainConfig(**{**options, **run}) for run in runs]))


MORTALS: list[dict[str, Any]] = [{"method": "methods_of_engines:Mortal", "settings": {"temperature": temperature}} for temperature in (2.0, 3.0)]
GOOD: list[dict[str, Any]] = [{"method": "kd"}, {"method": "nkd", "model_ema": True}]
FAILING: dict[str, Any] = {"method": "kd", "lr": 1e30}


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Of a process that nothing happens to."""
    return list(InProcess().run(jobs_of(folder, tmp_path_factory.mktemp("alone"), *MORTALS, *GOOD, FAILING)))


def by_id(entries: Sequence[Entry]) -> dict[str, Entry]:
    assert len({entry["id"] for entry in entries}) == len(entries)
    return {entry["id"]: entry for entry in entries}


def assert_same_runs(found: Sequence[Entry], expected: Sequence[Entry]) -> None:
    """Those of `found`, bit for bit as the ones with their ids."""
    for run_id, entry in by_id(found).items():
        other = by_id(expected)[run_id]
        assert [entry[name] for name in ("student", "method", "epochs", "top1", "status")] == [
            other[name] for name in ("student", "method", "epochs", "top1", "status")
        ]
        if entry["status"] == "done":
            for name in ("last", "best"):
                assert_same_state(state_of(entry, name), state_of(other, name))
            for file in ("summary.csv", "export/model.safetensors"):
                assert Path(entry["path"], file).read_bytes() == Path(other["path"], file).read_bytes(), file
        assert not Path(entry["path"], ".lock").exists()


def wait_for(what: Any, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_processes_train_what_one_process_trains_whoever_is_killed(
    folder: Path, alone: list[Entry], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "orders" / "2").write_text("itself")
    jobs = jobs_of(folder, tmp_path, MORTALS[0], *GOOD, FAILING, {"method": "methods_of_engines:Doomed"})
    assert [Job.from_json(json.loads(json.dumps(job.to_json()))) for job in jobs] == jobs
    entries = by_id(list(Local(2, retries=1).run(jobs, progress=True)))
    (doomed,) = (entries.pop(run_id) for run_id in list(entries) if "doomed" in run_id)
    assert_same_runs(list(entries.values()), alone)
    assert sorted(entry["status"] for entry in entries.values()) == ["done", "done", "done", "failed"]
    assert (doomed["status"], doomed["epochs"]) == ("failed", 0)
    assert "killed by SIGSEGV" in doomed["error"] and "given up after 2 attempts" in doomed["error"] and "Segmentation fault" in doomed["error"]
    told = capfd.readouterr().err.splitlines()
    assert sum("killed by SIGKILL, often for lack of memory" in line and "attempt 2 of 2" in line for line in told) == 1
    assert [line.partition(": ")[2][:40] for line in told if line.startswith("process ") and f"{jobs[1].ids[0]}: epoch" in line] == [
        f"{jobs[1].ids[0]}: epoch {epoch}/3, loss "[:40] for epoch in (1, 2, 3)
    ]
    attempts = (tmp_path / "logs" / f"{jobs[0].ids[0]}.log").read_text()
    assert [f"attempt {number} of 2" in attempts for number in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    jobs = jobs_of(folder, tmp_path / "runs", {"epochs": 100_000, "workers": 1})

    def command() -> None:
        with stopping_cleanly():
            list(Local(1).run(jobs))

    parent = Forked(command, tmp_path / "log")
    child = int(wait_for(lambda: _holder(jobs[0].folders[0])))
    wait_for(lambda: (jobs[0].folders[0] / "last" / "checkpoint.pt").exists())
    parent.kill(number)
    assert parent.wait() == (-number if number == signal.SIGKILL else 70), parent.output()
    if number == signal.SIGTERM:
        assert "Stopped: SIGTERM" in parent.output()
        assert "Stopped" not in (tmp_path / "runs" / "logs" / f"{jobs[0].ids[0]}.log").read_text()
    wait_for(lambda: _group_is_gone(child), 10)
    RunLock(jobs[0].folders[0]).release()


def test_gangs_leave_no_process_idle(folder: Path, tmp_path: Path) -> None:
    runs = open_runs([config for job in jobs_of(folder, tmp_path, *[{"lr": 10.0**-number} for number in range(1, 7)]) for config in job.configs])
    for slots, sizes in ((1, [4, 2]), (2, [3, 3]), (3, [2, 2, 2]), (5, [2, 2, 2]), (8, [1] * 6)):
        assert [len(job.ids) for job in plan_jobs(runs, gang=4, slots=slots)] == sizes


def test_a_process_that_is_to_end_is_waited_for_while_it_finishes_its_step_and_saves(folder: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(folder, tmp_path, {"method": "methods_of_engines:Slow", "recovery_interval": 0})
    process = JobProcess(tmp_path / "log", environ=environ_of_child(os.environ, cores=1))
    process.begin(job, log=tmp_path / "log", title="a job")
    wait_for(lambda: (folder / "orders" / "slow").exists())
    (folder / "orders" / "slow").unlink()
    close_all([process])
    assert process.process.returncode == -signal.SIGTERM
    assert "saved after 0 epochs and 3 steps" in (tmp_path / "log").read_text()


def _holder(run: Path) -> str:
    """The process that a run's lock names, once it does."""
    path = run / ".lock"
    words = path.read_text().split() if path.exists() else []
    return words[1] if len(words) == 4 else ""


def _group_is_gone(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def test_two_processes_never_train_one_run_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(folder, tmp_path / "runs", {"epochs": 40})
    config = job.configs[0]
    first = Forked(lambda: train(config) and None, tmp_path / "log")
    process = wait_for(lambda: _holder(job.folders[0]))
    monkeypatch.setattr(pipelines.training.lock, "PATIENCE_S", 0.0)
    resumed = TrainConfig(**{**vars(config), "resume": True})
    with pytest.raises(StudentError, match=rf"is being trained by process {process} on .*; nothing of it was changed"):
        train(resumed)
    monkeypatch.setattr(pipelines.training.lock, "PATIENCE_S", 100.0)
    (entry,) = train(resumed)
    assert first.wait() == 0, first.output()
    assert entry["status"] == "already done"
    epochs = [line["epoch"] for line in map(json.loads, (job.folders[0] / "metrics.jsonl").read_text().splitlines()) if "step" not in line]
    assert epochs == list(range(40))
    assert not (job.folders[0] / ".lock").exists()


def test_a_lock_is_free_when_its_process_is_dead(tmp_path: Path) -> None:
    def hold() -> None:
        RunLock(tmp_path)
        signal.pause()

    holder = Forked(hold, tmp_path / "log")
    wait_for(lambda: (tmp_path / ".lock").exists() and (tmp_path / ".lock").read_text())
    holder.kill()
    holder.wait()
    RunLock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(StoreError, match="can't be written"):
        RunLock(tmp_path / "absent")


def test_a_signal_leaves_no_lock_released_by_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a run releases it again: its descriptor may be another file's by then, and the file another process's lock."""
    lock, close = RunLock(tmp_path), os.close

    def close_and_signal(descriptor: int) -> None:
        close(descriptor)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "close", close_and_signal)
    with stopping_cleanly(), pytest.raises(Stopped):
        lock.release()
    monkeypatch.undo()
    lock.release()
    assert not (tmp_path / ".lock").exists()


def test_each_process_has_its_gpu_and_its_share_of_the_cores(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 5,7,-1")
    engine = local_engine()
    assert isinstance(engine, Local) and (engine.slots, engine._gpus) == (3, ("GPU-a", "5", "7"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert visible_gpus() == ("MIG-a", "MIG-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local_engine(processes=6, device="cuda").slots == 6
    assert isinstance(local_engine(device="cpu"), InProcess) and isinstance(local_engine(processes=1), InProcess)
    with pytest.raises(UsageError, match=r"--device cuda:1 with 2 processes.*CUDA_VISIBLE_DEVICES"):
        local_engine(processes=2, device="cuda:1")
    child = environ_of_child({"A": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "WORLD_SIZE": "8", "RANK": "3"}, cores=4, gpu="GPU-a")
    assert child == {"A": "1", "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "GPU-a"}
    assert environ_of_child({"OMP_NUM_THREADS": "1"}, cores=4) == {"OMP_NUM_THREADS": "1"}
    (job,) = jobs_of(folder, tmp_path, {"workers": None})
    assert [with_share_of(job, cores).configs[0].workers for cores in (3, 99)] == [3, 8]


def test_a_job_whose_gpu_is_gone_fails_and_is_not_trained_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    (entry,) = Local(2, gpus=("-1",)).run(jobs_of(folder, tmp_path, {"device": None}))
    assert entry["status"] == "failed"
    assert "device 'cuda': this machine can't use it" in entry["error"] and "CUDA_VISIBLE_DEVICES is '-1'" in entry["error"]


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of Ray's own files and processes
@pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning")  # of 2.50
def test_ray_trains_what_one_process_trains_whoever_is_killed(
    folder: Path, alone: list[Entry], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One worker of Ray's is killed and one child of theirs; a run fails; Ray is a real one, of this machine."""
    (folder / "orders" / "2").write_text("its parent")
    (folder / "orders" / "3").write_text("itself")
    engine = OnRay(retries=1, cpus_per_job=1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    entries = list(engine.run(jobs_of(folder, tmp_path, *MORTALS, GOOD[0], FAILING), progress=True))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_runs(entries, alone)
    assert [entry["status"] for entry in entries].count("done") == 3
    assert not list((folder / "orders").iterdir())
    (failed,) = (entry for entry in entries if entry["status"] == "failed")
    assert failed["error"].startswith("node ") and "the loss is not finite" in failed["error"]
    assert "epoch 3/3" in capfd.readouterr().err
    assert not list((tmp_path / "logs").glob(".ray-*"))


def test_a_job_on_ray_asks_for_what_every_node_with_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 30.0, "GPU": 2.0}]  # 110 cores, but none of them is beside all GPUs
    monkeypatch.setattr(OnRay, "_nodes", lambda self: nodes)
    monkeypatch.setattr(OnRay, "connect", lambda self: None)
    for engine, expected in (
        (OnRay(), (1.0, 4, 6)), (OnRay(gpus_per_job=0.5), (0.5, 2, 12)), (OnRay(device="cpu"), (0.0, 1, 110)), (OnRay(cpus_per_job=8), (1.0, 8, 4)),
    ):  # fmt: skip
        assert (*engine._needs(), engine.slots) == expected
    nodes[1:] = []
    assert OnRay()._needs() == (0.0, 1) and OnRay(device="cuda")._needs() == (1.0, 1)
    for options, message in (({"device": "cuda:1"}, "gives each job its GPU"), ({"device": "cuda", "gpus_per_job": 0}, "such a job sees no GPU")):
        with pytest.raises(UsageError, match=message):
            OnRay(**options)  # type: ignore[arg-type]


class RayNodes:
    """A cluster on this machine as 'ray start' makes it, node by node, for a user who has a token. environ: of those who use it."""

    def __init__(self, folder: Path) -> None:
        self._temp = tempfile.mkdtemp(prefix="kdcache-ray-", dir="/tmp")  # Ray's sockets need a short path
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        (folder / "home" / ".ray").mkdir(parents=True)
        (folder / "home" / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
        unset = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        self.environ = {name: value for name, value in os.environ.items() if name not in unset}
        self.environ |= {"HOME": str(folder / "home"), "RAY_TMPDIR": self._temp, "RAY_USAGE_STATS_ENABLED": "0"}

    @property
    def address(self) -> str:
        path = Path(self._temp, "ray", "ray_current_cluster")
        return str(wait_for(lambda: path.exists() and path.read_text().strip()))

    def start(self, *arguments: str, **environ: str) -> None:
        """Begin a node, and wait for it. Two that begin at once take each other's sockets."""
        log = self._folder / f"node-{len(self._nodes)}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory", str(100 << 20), *arguments]
        with open(log, "wb") as file:
            node = subprocess.Popen(command, env={**self.environ, **environ}, stdout=file, stderr=file, process_group=0)
        self._nodes.append(node)
        wait_for(lambda: "Ray runtime started." in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(self._temp, ignore_errors=True)


@pytest.fixture
def ray_nodes(tmp_path: Path) -> Iterator[RayNodes]:
    nodes = RayNodes(tmp_path)
    try:
        yield nodes
    finally:
        nodes.stop()


@pytest.mark.timeout(600)
def test_runs_of_a_node_that_is_lost_go_on_on_another(folder: Path, alone: list[Entry], tmp_path: Path, ray_nodes: RayNodes) -> None:
    """The raylet of the only node that trains is killed, then one joins. The cluster asks for a token, which is shown at an address of this machine.

    Then a driver is told to end: its child saves, and nothing is left.
    """
    (folder / "orders" / "2").write_text("its node")
    base = {
        "student": TINY_VIT, "model_kwargs": STUDENT_ARGS, "val": str(folder / "val"), "epochs": 3, "batch_size": 2, "workers": 0, "device": "cpu",
        "log_interval": 1, "recovery_interval": 2, "out": str(tmp_path / "runs"),
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(json.dumps({"base": base, "runs": MORTALS[:1]}))
    environ = {"RAY_AUTH_MODE": "token", "RAY_health_check_period_ms": "300"}  # the newest ask for tokens unasked; Ray's period is 3 s
    ray_nodes.start("--head", "--port", "0", "--num-cpus", "0", "--include-dashboard", "false", **environ)
    join = "--address", ray_nodes.address, "--num-cpus", "1"
    command = [sys.executable, "-m", "cli.main", "train", str(folder / "cache"), "--sweep", str(tmp_path / "sweep.yaml"), "--json"]
    command += ["--engine", "ray", "--ray-address", ray_nodes.address, "--retries", "1"]
    if hasattr(importlib.import_module("ray.exceptions"), "AuthenticationError"):  # Ray has tokens since 2.52
        nobody = {**ray_nodes.environ, "HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "1"}
        refused = subprocess.run(command, env=nobody, capture_output=True, text=True)
        assert refused.returncode == 2, refused.stderr
        assert "asks for a token: it was shown none, since RAY_AUTH_MODE is not set; set RAY_AUTH_MODE=token, and put the" in refused.stderr
        assert not (tmp_path / "runs").exists()
    told = tmp_path / "told"
    with open(told, "wb") as file:
        sweep = subprocess.Popen(command, env=ray_nodes.environ, stdout=subprocess.PIPE, stderr=file)
    try:
        # connected while the head is alone: nodes of one address are all the driver's own to Ray, which may attach it to the one that dies
        wait_for(lambda: "waiting for one" in told.read_text() or sweep.poll() is not None)
        ray_nodes.start(*join, RAY_AUTH_MODE="token")
        wait_for(lambda: not (folder / "orders" / "2").exists() or sweep.poll() is not None)
        ray_nodes.start(*join, RAY_AUTH_MODE="token")
        output = sweep.communicate(timeout=300)[0]
    finally:
        sweep.kill()
    assert sweep.returncode == 0, told.read_text()
    assert "no node has what a job takes now (1 CPU, GPUs: 0); waiting for one" in told.read_text()
    assert_same_runs(json.loads(output)["runs"], alone)
    assert told.read_text().count("goes on, attempt 2 of 2; its process, worker or node died (node ") == 1
    (log,) = (tmp_path / "runs" / "logs").iterdir()
    assert [f"attempt {number} of 2" in log.read_text() for number in (1, 2, 3)] == [True, True, False]

    (tmp_path / "sweep.yaml").write_text(json.dumps({"base": {**base, "epochs": 100_000}, "runs": GOOD[:1]}))
    with open(told, "wb") as file:
        endless = subprocess.Popen(command, env=ray_nodes.environ, stdout=subprocess.DEVNULL, stderr=file)
    try:
        (checkpoint,) = wait_for(lambda: list(tmp_path.glob("runs/*-kd-*/last/checkpoint.pt")))
        child = int(_holder(checkpoint.parents[1]))
        endless.terminate()
        with suppress(subprocess.TimeoutExpired):
            endless.wait(120)
    finally:
        endless.kill()
        endless.wait()
    complaint = told.read_text()
    assert (endless.returncode, _group_is_gone(child), _holder(checkpoint.parents[1])) == (1, True, ""), complaint
    assert "1 job is told to end" in complaint and "Error: stopped by " in complaint
    assert checkpoint.exists() and not list((tmp_path / "runs" / "logs").glob(".ray-*"))


def test_a_task_that_did_not_hear_its_cancellation_ends_by_a_file(folder: Path, tmp_path: Path) -> None:
    """Ray's is an exception in a worker's main thread, which Python drops where a destructor runs. The child saves, as on a signal."""
    (endless,) = jobs_of(folder, tmp_path / "runs", {**GOOD[0], "epochs": 100_000})
    meeting = tmp_path / "meeting"
    meeting.mkdir()

    def end_when_it_trains() -> None:
        wait_for(lambda: list(tmp_path.glob("runs/*/last/checkpoint.pt")))
        (meeting / "end").touch()

    thread = threading.Thread(target=end_when_it_trains)
    thread.start()
    there = {"meeting": str(meeting), "cwd": "/", "version": "0.1.0", "gpus": 0, "cpus": 1, "retries": 1, "progress": False}
    result = train_on_node(endless.to_json(), 0, there)
    thread.join()
    assert result == {"entries": [], "problem": "the command was told to end"}
    (checkpoint,) = tmp_path.glob("runs/*/last/checkpoint.pt")
    assert _holder(checkpoint.parents[1]) == "" and load_checkpoint(checkpoint)["step"] + load_checkpoint(checkpoint)["epoch"] > 0
    assert train_on_node(endless.to_json(), 0, there) == result  # Ray's second attempt, if it makes one


def test_a_signal_while_ray_begins_is_told_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler of SIGTERM ends the process with 15, without a word."""
    engine = OnRay()
    monkeypatch.setattr(engine._ray, "init", lambda *_given, **_options: sys.exit(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM"):
        engine.connect()


def test_the_next_sweep_removes_the_meeting_of_a_driver_that_was_killed_and_of_no_other(folder: Path, tmp_path: Path) -> None:
    (job,) = jobs_of(folder, tmp_path / "runs", GOOD[0])

    def drive() -> None:
        _kept = _make_meeting(job)
        signal.pause()

    drivers: list[Forked] = []
    try:
        for number in (1, 2):
            drivers.append(Forked(drive, tmp_path / f"log-{number}"))
            wait_for(lambda number=number: len(list(tmp_path.glob("runs/logs/.ray-*/owner"))) == number)
        for left in (1, 0):
            drivers[left].kill()
            drivers[left].wait()
            meeting, owned = _make_meeting(job)
            other, also_owned = _make_meeting(job)
            assert meeting.exists()
            also_owned.close()
            shutil.rmtree(other)
            assert len(list((tmp_path / "runs" / "logs").iterdir())) == left + 1
            assert [path.name for path in meeting.iterdir()] == ["owner"]
            owned.close()
            shutil.rmtree(meeting)
    finally:
        for driver in drivers:
            with suppress(ProcessLookupError):
                driver.kill(group=True)


def test_a_node_that_does_not_see_what_the_driver_sees_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(folder, tmp_path, GOOD[0])
    there = {"meeting": str(tmp_path), "cwd": "/", "version": "0.1.0", "gpus": 0, "cpus": 1, "retries": 1, "progress": False}
    body = job.to_json()
    elsewhere = {**body, "configs": [{**body["configs"][0], "cache": "/nowhere/cache"}]}
    for given, place, expected in (
        (body, {**there, "version": "0.0.1"}, "is installed, expected 0.0.1"),
        (body, {**there, "meeting": "/nowhere/logs/x"}, "does not see /nowhere/logs; expected --out on a file system that every node shares"),
        (elsewhere, there, "does not see the cache /nowhere/cache; expected it on a file system that every node shares"),
    ):
        result = train_on_node(given, 0, place)
        assert result["entries"] == [] and expected in result["problem"] and result["problem"].startswith("node ")
    (tmp_path / "0").write_text("1\n2\n")  # two attempts, of which Ray counted none: its memory monitor's kills have no bound
    assert "died 2 times" in train_on_node(body, 0, there)["problem"]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'kdcache\[ray\]'"):
        OnRay()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--student", TINY_VIT, "--processes", "2"], "--processes is for sweeps; expected --sweep FILE.yaml beside it"),
        (["--sweep", "S", "--gpus-per-job", "0.5"], "--gpus-per-job 0.5 with --engine local: it is an option of --engine ray"),
        (["--sweep", "S", "--engine", "ray", "--processes", "2"], "--processes 2 with --engine ray: it is an option of --engine local"),
    ],
)
def test_options_of_the_other_engine_are_refused(folder: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"base: {{student: {TINY_VIT}, model-kwargs: {json.dumps(STUDENT_ARGS)}}}\ngrid: {{lr: [1e-3, 2e-3]}}\n")
    given = [str(file) if argument == "S" else argument for argument in arguments]
    result = CliRunner().invoke(main, ["train", str(folder / "cache"), *given, "--out", str(tmp_path / "runs")])
    assert result.exit_code == 2, result.output
    assert expected in " ".join(result.output.split())
    assert not (tmp_path / "runs").exists()
