"""Several processes that train one student: equal to one process of the same batch, resumed to the same bits, and one voice when one of them fails."""

from __future__ import annotations

import dataclasses
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import (
    CNN,
    CNN_ARGS,
    TINY_VIT,
    Forked,
    assert_same_run,
    free_port,
    kdcache_command,
    leaves,
    lines_of,
    make_cache,
    make_shard,
    start,
    state_of,
)
from hypothesis import given
from hypothesis import strategies as st

import kdcache.distributed
import pipelines.training.gang
import pipelines.training.loop
from cli.main import main
from kdcache.distributed import ALONE, Processes, joined, slurm_meeting_place
from kdcache.errors import DriftError, KDCacheError, StudentError, UsageError
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.join import CachedViews, EpochBatches
from kdcache.launch import Launch, read_launch
from kdcache.methods import METHODS
from kdcache.methods.kd import KD
from kdcache.shards import scan_shard
from kdcache.sources import resolve_shards
from kdcache.students import build_student
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train, train_configs
from pipelines.training.data import open_data
from pipelines.training.run import Run

ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DROPPING = {**ARGS, "drop_rate": 0.1, "drop_path_rate": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 2 shards × 12 images × 2 views with what every method needs; shards/ and val/ of 7 images."""
    folder = tmp_path_factory.mktemp("processes")
    make_cache(folder, num_shards=2, num_samples=12, views=2, targets=["logits"])
    teacher = f"local-dir:{folder / 'teacher'}"
    methods = ("scalekd", "vitkd", "frequency")
    extract(ExtractConfig(shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=teacher, methods=methods, views=2, workers=0))
    make_shard(folder / "val" / "val-00.tar", num_samples=7, seed=7)
    return folder


def options_of(folder: Path, out: Path, **overrides: Any) -> dict[str, Any]:
    """Three updates of 8 views an epoch, in however many processes and batches."""
    options = {
        "cache": str(folder / "cache"), "students": (TINY_VIT,), "model_kwargs": ARGS, "val": str(folder / "val"), "out": str(out),
        "epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "log_interval": 1, "recovery_interval": 1, "warmup_epochs": 0, "seed": 3,
    }  # fmt: skip
    return {**options, **overrides}


def as_an_interpreter_ends(action: Callable[[], int]) -> int:
    """What it gives; then the processes that are left get a SIGTERM and are waited for, while what it raised still holds what it holds."""
    try:
        return action()
    finally:
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]


def train_in_two(configs: Sequence[TrainConfig], logs: Path, *, world: int = 2) -> None:
    """All of them in turn, in processes that meet once."""

    def action() -> None:
        list(train_configs(configs))

    forked = start(action, logs, world=world)
    assert [one.wait() for one in forked] == [0] * world, "".join(one.output() for one in forked)


def the_run(out: Path) -> dict[str, Any]:
    """The report's entry of the only run in a folder, as far as `assert_same_run` looks."""
    (path,) = out.iterdir()
    history = torch.load(path / "last" / "checkpoint.pt", weights_only=True)["history"]
    return {"id": path.name, "path": str(path), "top1": max(row["eval_top1"] for row in history), "status": "done"}


def largest_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Between the weights of two checkpoints, their averages included."""
    pairs = dict(leaves({part: found[part] for part in ("method", "ema") if part in found}))
    others = dict(leaves({part: expected[part] for part in ("method", "ema") if part in expected}))
    assert pairs.keys() == others.keys()
    floats = [name for name, value in others.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert floats
    return max(float((pairs[name].double() - others[name].double()).abs().max()) for name in floats)


# --- the rows of a step ---


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_the_rows_of_a_step_are_those_of_one_process_with_its_batch(rows: int, batch_size: int, world: int, accumulate: int, start: int) -> None:
    shares = world * accumulate
    options: dict[str, Any] = {"num_views": 2, "seed": 1}
    if rows < shares:
        with pytest.raises(UsageError, match=f"{rows} images for {world} processes and {accumulate} batches in a step"):
            EpochBatches(range(rows), batch_size=batch_size, world=world, accumulate=accumulate, **options)
        return
    ranks = [EpochBatches(range(rows), batch_size=batch_size, rank=rank, world=world, accumulate=accumulate, **options) for rank in range(world)]
    alone = EpochBatches(range(rows), batch_size=ranks[0].step_size, **options)
    assert ranks[0].step_size == shares * ranks[0].batch_size <= max(shares * batch_size, rows)
    start = min(start, len(alone))
    for batches in (alone, *ranks):
        batches.set_epoch(3, start=start)
    parts = [list(batches) for batches in ranks]
    assert [len(part) for part in parts] == [accumulate * (len(alone) - start)] * world
    for step, whole in enumerate(alone):
        assert sorted(whole) == sorted(item for part in parts for batch in part[step * accumulate : (step + 1) * accumulate] for item in batch)


# --- two processes equal one ---

EQUAL: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 5e-6),
    "clip and average": ({"clip_grad": 0.5, "model_ema": True, "model_ema_decay": 0.9}, 5e-6),
    "bfloat16": ({"clip_grad": 0.5, "model_ema": True, "model_ema_decay": 0.9, "amp": True, "amp_dtype": "bfloat16"}, 2e-3),
    "float16": ({"clip_grad": 0.5, "amp": True, "amp_dtype": "float16"}, 2e-3),
}
"""What is asked of a run, and how far weights may be from those of one process after 6 updates. Steps of adamw are of size lr = 1e-3 for any gradient, so
sgd is what shows the gradients."""


@pytest.fixture(scope="module")
def equals(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE/one, CASE/batches and CASE/two: one process of a batch of 8; one that accumulates 2 of 4; two of 2 that accumulate 2 each."""
    out = tmp_path_factory.mktemp("equal")
    options = {"opt": "sgd", "lr": 0.05}
    for case, (more, _) in EQUAL.items():
        train(TrainConfig(**options_of(folder, out / case / "one", **options, **more)))
        train(TrainConfig(**options_of(folder, out / case / "batches", batch_size=4, grad_accum_steps=2, **options, **more)))
    configs = [
        TrainConfig(**options_of(folder, out / case / "two", batch_size=2, grad_accum_steps=2, **options, **more))
        for case, (more, _) in EQUAL.items()
    ]
    train_in_two(configs, out / "logs")
    return out


@pytest.mark.parametrize("other", ["batches", "two"])
@pytest.mark.parametrize("case", EQUAL)
def test_processes_and_accumulated_batches_equal_one_process_of_the_same_batch(equals: Path, case: str, other: str) -> None:
    one, others = (state_of(the_run(equals / case / name)) for name in ("one", other))
    untrained = build_student(TINY_VIT, num_classes=10, view_size=32, model_args=ARGS, seed=3).model.state_dict()
    moved = max(float((one["method"][f"student.{name}"] - tensor).abs().max()) for name, tensor in untrained.items())
    difference, bound = largest_difference(others, one), EQUAL[case][1]
    assert difference <= bound < 0.2 * moved
    assert [row["train_loss"] for row in others["history"]] == pytest.approx([row["train_loss"] for row in one["history"]], abs=20 * bound)
    assert [row["lr"] for row in others["history"]] == [row["lr"] for row in one["history"]]
    assert len(lines_of(the_run(equals / case / other))) == 2 * (3 + 1)


ALIKE = {"vitkd": {"mask_ratio": 1.0}, "mgd": {"mask_ratio": 0.0}, "scalekd": {"projector_norm": "layer", "heads_s3": 4, "heads_s4": 4}}
"""Methods with fields that make them no function of the whole batch and of no draw."""


def test_every_method_is_trained_by_two_processes_as_by_one(folder: Path, tmp_path: Path) -> None:
    """mimic and frequency without the labels' cross-entropy leave the student's head without a gradient. uskd averages its confidences over a batch."""
    more: dict[str, dict[str, Any]] = {name: {"settings": ALIKE.get(name, {})} for name in METHODS}
    more["mimic"] = more["frequency"] = {"task_loss_weight": 0.0}
    more |= {"nkd+vitkd": {"settings": {"vitkd.mask_ratio": 1.0}}}
    configs = [
        TrainConfig(
            **options_of(folder, tmp_path / "two" / name, method=name, epochs=1, batch_size=4, val=None, opt="sgd", num_classes=10, **options)
        )
        for name, options in more.items()
    ]
    train_in_two(configs, tmp_path / "logs")
    for config in configs:
        out = tmp_path / "one" / config.method
        (one,) = train(dataclasses.replace(config, out=str(out), batch_size=8))
        (two,) = Path(config.out).iterdir()
        difference = largest_difference(state_of({"path": two}), state_of(one))
        assert difference < 1e-6 or config.method == "uskd", (config.method, difference)
        assert difference < 1e-2


@pytest.mark.parametrize("synchronised", [True, False])
def test_synchronised_batch_norms_equal_one_process_of_the_whole_batch(folder: Path, tmp_path: Path, synchronised: bool) -> None:
    """A ResNet of timm's BatchNormAct2d and BatchNorm2d; running statistics too. Without it two processes are far from one."""
    options = {"students": ("test_resnet",), "model_kwargs": {}, "method": "kd", "opt": "sgd", "lr": 0.05}
    train_in_two([TrainConfig(**options_of(folder, tmp_path / "two", batch_size=4, sync_bn=synchronised, **options))], tmp_path / "logs")
    train(TrainConfig(**options_of(folder, tmp_path / "one", batch_size=8, **options)))
    found, expected = (state_of(the_run(tmp_path / name)) for name in ("two", "one"))
    difference = largest_difference(found, expected)
    assert (difference < 5e-6) == synchronised, difference
    assert any("running_var" in name for name in expected["method"])


# --- evaluation ---


def test_a_shared_evaluation_gives_the_figures_of_one_process_to_the_last_digit(folder: Path, tmp_path: Path) -> None:
    """7 images of which one can't be read, in batches of 2: each rank's last batch is another."""
    make_shard(tmp_path / "val" / "val-00.tar", num_samples=7, seed=7, corrupt=[4])
    student = build_student(TINY_VIT, num_classes=10, view_size=32, model_args=ARGS)
    dataset = EvaluationSet([scan_shard(source) for source in resolve_shards(str(tmp_path / "val"))], student, crop_pct=None)
    alone = Evaluator(dataset, batch_size=2, num_workers=0)(student.model, torch.device("cpu"))
    assert (alone.images, len(alone.skipped)) == (6, 1)
    for world in (2, 3, 5):  # 4 batches

        def action() -> None:
            with joined("cpu") as processes:
                evaluation = Evaluator(dataset, batch_size=2, num_workers=0, processes=processes)(student.model, torch.device("cpu"))
            assert evaluation == alone

        forked = start(action, tmp_path / f"logs-{world}", world=world)
        assert [one.wait() for one in forked] == [0] * world, "".join(one.output() for one in forked)


# --- killed and resumed ---

KILLED: dict[str, Any] = {
    "students": (CNN,), "model_kwargs": {**CNN_ARGS, "drop_rate": 0.1, "drop_path_rate": 0.1}, "method": "mgd", "batch_size": 2, "grad_accum_steps": 2,
    "amp": True, "model_ema": True, "model_ema_decay": 0.9, "clip_grad": 1.0, "opt": "adamw",
}  # fmt: skip
"""A run with everything that has a state, or one of each process: running statistics, dropout, masks, a loss scale, an average."""


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of two processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("undisturbed")
    train_in_two([TrainConfig(**options_of(folder, out / "runs", **KILLED))], out / "logs")
    return the_run(out / "runs")


def test_the_processes_draw_and_measure_apart_and_agree_after_an_epoch(undisturbed: dict[str, Any]) -> None:
    last, previous = (torch.load(Path(undisturbed["path"], name, "checkpoint.pt"), weights_only=True) for name in ("last", "previous"))
    assert (last["step"], previous["step"]) == (0, 2)
    ((own,), (own_within,)) = last["ranks"], previous["ranks"]
    assert own.keys() == own_within.keys() == {"method", "generators", "ema"}
    assert set(own["generators"]) == {"cpu"}
    assert set(own["method"]) == {"noise._extra_state"}, "running statistics are averaged after an epoch"
    assert {"student.bn1.running_mean", "noise._extra_state"} < set(own_within["method"])
    assert not any(name.endswith(("weight", "bias", "num_batches_tracked")) for name in own_within["method"])
    assert (own["ema"], "bn1.running_var" in own_within["ema"]) == ({}, True)


@pytest.mark.parametrize("victim", [0, 1, None])
def test_processes_that_are_killed_within_an_epoch_resume_to_the_same_bits(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path, victim: int | None
) -> None:
    """One of the two, or both at once, before the second update of the second epoch is saved."""
    options = options_of(folder, tmp_path / "runs", **KILLED)

    def killed() -> None:
        finish = pipelines.training.loop.StudentLoop._finish_values

        def dying(self: Any, names: Sequence[str], step: int) -> dict[str, float]:
            values = finish(self, names, step)
            if (self.epoch, step) == (1, 1) and victim in (None, self.processes.rank):
                os.kill(os.getpid(), signal.SIGKILL)
            return values

        pipelines.training.loop.StudentLoop._finish_values = dying  # type: ignore[method-assign]
        train(TrainConfig(**options))

    forked = start(killed, tmp_path / "logs")
    statuses = [one.wait(60) for one in forked]
    assert [status == -signal.SIGKILL for status in statuses] == [victim in (None, rank) for rank in range(2)], [one.output() for one in forked]
    if victim is not None:
        assert "another process of this run is gone" in forked[1 - victim].output()
    train_in_two([TrainConfig(**options, resume=True)], tmp_path / "again")
    assert_same_run(the_run(tmp_path / "runs"), undisturbed)


@pytest.mark.parametrize(
    ("moment", "signalled", "where"),
    [("step", (0, 1), (1, 2)), ("loading", (0, 1), (1, 2)), ("step", (1,), (1, 2)), ("evaluation", (0, 1), (0, 3)), ("evaluation", (1,), (0, 3))],
)
def test_a_signal_to_any_process_saves_what_all_have_done(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path, moment: str, signalled: tuple[int, ...], where: tuple[int, int]
) -> None:
    """SIGTERM as torchrun sends it: to a process and its workers, which still load the batch that the other one waits for."""
    arguments = arguments_of(options_of(folder, tmp_path / "runs", **KILLED, recovery_interval=0, workers=1))

    def command() -> int:
        owner, name, count = {
            "step": (pipelines.training.loop.StudentLoop, "_step", 9),  # the first batch of the second update of the second epoch
            "loading": (pipelines.training.gang._Bar, "update", 4),  # the next batch is asked for
            "evaluation": (Evaluator, "_measure", 2),
        }[moment]  # fmt: skip
        inner, seen = getattr(owner, name), []

        def counting(*given: Any, **options: Any) -> Any:
            seen.append(1)
            if len(seen) == count and int(os.environ["RANK"]) in signalled:
                os.killpg(0, signal.SIGTERM)
            return inner(*given, **options)

        setattr(owner, name, counting)
        return as_an_interpreter_ends(kdcache_command(*arguments))

    forked = start(command, tmp_path / "logs")
    assert [one.wait(60) for one in forked] == [1, 1], [one.output() for one in forked]
    assert all(one.group_is_gone(10) for one in forked)
    (path,) = (tmp_path / "runs").iterdir()
    state = torch.load(path / "last" / "checkpoint.pt", weights_only=True)
    text = "".join(one.output() for one in forked)
    assert (state["epoch"], state["step"]) == where, text
    assert (text.count("saved after"), text.count("Error: stopped by "), text.count("Traceback")) == (1, 1, 0), text
    train_in_two([TrainConfig(**options_of(folder, tmp_path / "runs", **KILLED, resume=True))], tmp_path / "again")
    assert_same_run(the_run(tmp_path / "runs"), undisturbed)


def test_a_resume_with_other_processes_or_batches_says_how_to_go_on(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(undisturbed["path"]).parent, tmp_path / "runs", ignore=shutil.ignore_patterns("export"))
    options = options_of(folder, tmp_path / "runs", **KILLED, resume=True)
    with pytest.raises(StudentError, match=r"'world_size' differs: that run has 2, this command None; start it with torchrun in 2 processes"):
        train(TrainConfig(**options))
    monkeypatch.setattr(Processes, "world", 2)
    monkeypatch.setattr(Processes, "decide", lambda self, action: action())
    run = Run(TrainConfig(**{**options, "grad_accum_steps": 1}), open_data(TrainConfig(**options)), CNN)
    with pytest.raises(StudentError, match=r"'grad_accum_steps' differs: that run has 2, this command None; pass --grad-accum-steps 2"):
        run.check_folder()


# --- one voice ---


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """The command line of `options_of`."""
    words = ["train", options["cache"]]
    for name, value in options.items():
        option = {"students": "--student"}.get(name, f"--{name.replace('_', '-')}")
        if name == "model_kwargs":
            words += [word for key, one in value.items() for word in ("--model-kwargs", f"{key}={one}")]
        elif name != "cache" and value is not False:
            words += [option] if value is True else [option, *value] if name == "students" else [option, str(value)]
    return words


def fail_in_rank(rank: int, fail: Callable[[], None], arguments: Sequence[str]) -> Callable[[], int]:
    """The command, in which reading the third batch of one rank fails."""

    def command() -> int:
        get, asked = CachedViews.__getitems__, []

        def failing(self: CachedViews, items: Any) -> Any:
            asked.append(items)
            if os.environ["RANK"] == str(rank) and len(asked) == 3:
                fail()
            return get(self, items)

        CachedViews.__getitems__ = failing  # type: ignore[method-assign]
        return as_an_interpreter_ends(kdcache_command(*arguments))

    return command


def raise_drift() -> None:
    raise DriftError("shard train-0000: key 's0003', view 0: another image")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_with_its_message_once(folder: Path, tmp_path: Path, rank: int) -> None:
    arguments = arguments_of(options_of(folder, tmp_path / "runs", batch_size=4, workers=1))
    forked = start(fail_in_rank(rank, raise_drift, arguments), tmp_path / "logs")
    assert [one.wait(60) for one in forked] == [1, 1]
    outputs = [one.output() for one in forked]
    assert "".join(outputs).count("key 's0003', view 0: another image") == 1
    assert f"Error: {'rank 1: ' if rank else ''}shard train-0000" in outputs[rank]
    assert not any("Traceback" in output for output in outputs)
    assert "failed" in outputs[0]
    if rank == 0:  # which keeps the store that the other asks, and waits for that
        assert outputs[1] == ""


def test_an_error_that_all_meet_is_told_once(folder: Path, tmp_path: Path) -> None:
    """A loss that is not finite in one process only; a cache that none finds; a request that can't be right."""
    options = options_of(folder, tmp_path / "runs", batch_size=4)

    def spoil() -> int:
        finish = pipelines.training.loop.StudentLoop._finish_values

        def spoiling(self: Any, names: Sequence[str], step: int) -> dict[str, float]:
            if self.processes.rank == 1 and step == 2:
                self._values = self._values * float("nan")
            return finish(self, names, step)

        pipelines.training.loop.StudentLoop._finish_values = spoiling  # type: ignore[method-assign]
        return kdcache_command(*arguments_of(options))()

    other = {**options, "cache": str(tmp_path / "none")}
    impossible = {**options, "allow_other_cache": True}
    several = {"nan": spoil, "cache": kdcache_command(*arguments_of(other)), "request": kdcache_command(*arguments_of(impossible))}
    texts = {"nan": "the loss is not finite in epoch 0, step 3 of 3", "cache": "no cache.json", "request": "--allow-other-cache"}
    for name, command in several.items():
        forked = start(command, tmp_path / name)
        assert [one.wait(60) for one in forked] == [2 if name == "request" else 1] * 2
        text = "".join(one.output() for one in forked)
        assert (text.count("Error: "), text.count("Traceback")) == (1, 0), text
        assert texts[name] in text


# --- what can't be ---


@pytest.mark.parametrize(
    ("options", "world", "text"),
    [
        ({"sync_bn": True}, 1, "--sync-bn: one process has nobody"),
        ({"torchcompile": "inducter"}, 1, "--torchcompile 'inducter': torch has no such backend; near ones: inductor"),
        ({"grad_accum_steps": 20}, 2, "24 images for 2 processes and 20 batches in a step"),
    ],
)
def test_a_request_that_cannot_be_right_leaves_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], world: int, text: str
) -> None:
    config = TrainConfig(**options_of(folder, tmp_path / "runs", **options))
    run = Run(config, open_data(config), TINY_VIT, Processes(launch=Launch(world_size=world)))
    monkeypatch.setattr(Processes, "decide", lambda self, action: action())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(UsageError, match=re.escape(text)):
        run.check_build()
    assert not (tmp_path / "runs").exists()


def test_each_process_of_a_machine_takes_a_gpu_of_its_own_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(launch=Launch(rank=1, world_size=4, local_rank=1, local_world_size=4))
    monkeypatch.setattr(kdcache.distributed, "resolve_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(one.device(None)) for one in (second, ALONE)] == ["cuda:1", "cuda"]
    for name, gpus, text in (
        ("cuda:0", 4, "all 4 processes of this machine would take it"),
        ("cuda", 2, "4 processes on a machine with 2 GPUs"),
        ("mps", 0, "mps"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(UsageError, match=text):
            second.device(name)


def test_a_plain_run_never_touches_torch_distributed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "all_reduce", "all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, None)
    train(TrainConfig(**options_of(folder, tmp_path, epochs=1)))


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, {}),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}),
        ({"SLURM_PROCID": "1", "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[007-009,12],big3"}, ("gpu007", "20073")),
        ({"SLURM_PROCID": "1", "SLURM_JOB_ID": "20001", "SLURM_JOB_NODELIST": "a-1,b"}, ("a-1", "20001")),
    ],
)
def test_slurm_tasks_meet_on_the_first_node_of_their_step(environ: dict[str, str], place: Any) -> None:
    assert slurm_meeting_place(environ) == (dict(zip(("MASTER_ADDR", "MASTER_PORT"), place, strict=True)) if place else {})


def test_a_process_that_waits_for_others_who_do_not_come_hears_a_signal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join, hearing = threading.Thread.join, kdcache.distributed._hearing_signals

    def telling(wait: Callable[[], Any]) -> Any:
        """The process is in the wait, and says so, once it asks whether that has ended."""
        threading.Thread.join = lambda *given: (os.write(2, b"waiting\n"), join(*given))[1]  # type: ignore[method-assign]
        return hearing(wait)

    monkeypatch.setattr(kdcache.distributed, "_hearing_signals", telling)
    command = kdcache_command(*arguments_of(options_of(folder, tmp_path)))
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    children = [Forked(command, tmp_path / rank, {**meeting, "RANK": rank, "MASTER_PORT": str(free_port())}) for rank in ("0", "1")]
    for child in children:
        child.wait_for(lambda child=child: "waiting" in child.output())
        child.kill(signal.SIGTERM)
    for child in children:
        assert child.wait(20) == 1
        assert "Error: stopped by SIGTERM" in child.output()


@pytest.mark.parametrize(
    ("environ", "text"), [({}, "MASTER_ADDR is not set"), ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "start torchrun with --standalone")]
)
def test_processes_without_a_place_to_meet_are_told_what_to_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], text: str
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **environ}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, arguments_of(options_of(folder, tmp_path)))
    assert (result.exit_code, text in result.stderr) == (2, True), result.stderr


# --- compiled ---


@pytest.fixture(scope="module")
def graphs() -> list[Any]:
    """What the backend `kdcache_counting` has been given to compile; `kdcache_failing` compiles nothing."""
    found: list[Any] = []

    def kdcache_counting(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    def kdcache_failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    for backend in (kdcache_counting, kdcache_failing):
        torch._dynamo.register_backend(backend)
    return found


@pytest.mark.parametrize(("student", "args", "method"), [(CNN, CNN_ARGS, "kd"), (TINY_VIT, DROPPING, "nkd+vitkd")])
def test_a_compiled_student_trains_to_the_same_bits_and_is_saved_and_exported_as_the_plain_one(
    folder: Path, tmp_path: Path, graphs: list[Any], student: str, args: dict[str, Any], method: str
) -> None:
    graphs.clear()
    options = {"students": (student,), "model_kwargs": args, "method": method, "model_ema": True, "epochs": 1}
    plain, compiled = (
        train(TrainConfig(**options_of(folder, tmp_path / name, torchcompile=backend, **options)))[0]
        for name, backend in (("plain", None), ("compiled", "kdcache_counting"))
    )
    assert graphs
    assert_same_run(compiled, plain)


def test_processes_compile_too(folder: Path, tmp_path: Path) -> None:
    options = {"students": (CNN,), "model_kwargs": CNN_ARGS, "batch_size": 4, "epochs": 1, "opt": "sgd"}
    configs = [TrainConfig(**options_of(folder, tmp_path / str(backend), torchcompile=backend, **options)) for backend in (None, "eager")]
    train_in_two(configs, tmp_path / "logs")
    plain, compiled = (state_of(the_run(Path(config.out))) for config in configs)
    assert largest_difference(compiled, plain) < 1e-6


def test_a_student_that_cannot_be_compiled_is_named_with_the_reason(folder: Path, tmp_path: Path, graphs: list[Any]) -> None:
    with pytest.raises(StudentError, match=rf"student {TINY_VIT}: --torchcompile kdcache_failing can't compile it .*no compiler here"):
        train(TrainConfig(**options_of(folder, tmp_path, torchcompile="kdcache_failing")))


class Direct(KD):
    """Calls the student itself."""

    name = "direct"

    def forward(self, images_BCHW: torch.Tensor, labels: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
        return self.losses({"logits": self.student(images_BCHW)}, labels, targets)


def test_a_method_that_would_not_be_compiled_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"method 'direct' has a `forward` that does not call `run_student`"):
        train(TrainConfig(**options_of(folder, tmp_path, torchcompile="eager", method="test_processes:Direct")))


# --- torchrun ---

KILLED_ONCE = """
import os, signal
import pipelines.training.loop as loops
finish, attempt = loops.StudentLoop._finish_values, os.environ["TORCHELASTIC_RESTART_COUNT"]

def dying(self, names, step):
    values = finish(self, names, step)
    if (attempt, self.epoch, step, self.processes.rank) == ("0", 1, 1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return values

loops.StudentLoop._finish_values = dying
from cli.main import main; main()
"""


def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_ends_with_the_same_bits(
    folder: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The one that is left says so, once: or torchrun's signal has come first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--no-python"]
    arguments = arguments_of(options_of(folder, tmp_path / "runs", **KILLED, resume=True))
    result = subprocess.run([*launcher, sys.executable, "-c", KILLED_ONCE, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert ("(exitcode: -9) local_rank: 1" in result.stderr, result.stderr.count("Error: ")) == (True, 1), result.stderr
    assert re.search("Error: (another process of this run is gone|stopped by SIGTERM)", result.stderr), result.stderr
    assert_same_run(the_run(tmp_path / "runs"), undisturbed)


@pytest.mark.parametrize("uuids", [("a", "b"), ("a", "a")])
def test_gpus_are_compared_where_a_launcher_tells_no_number_of_processes(monkeypatch: pytest.MonkeyPatch, uuids: tuple[str, str]) -> None:
    """Of two with LOCAL_RANK alone the first takes itself to be the only one of its machine."""
    monkeypatch.setattr(kdcache.distributed, "SILENCE_S", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index]))
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def compare(rank: int) -> str:
        launch = read_launch({"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
        try:
            kdcache.distributed._check_own_gpu(store, launch, torch.device("cuda", rank))
        except KDCacheError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(compare, range(2)))
    if uuids == ("a", "b"):
        assert told == ["", ""]
    else:
        assert told[0].startswith("UsageError: ranks 0 and 1 would train on one GPU (a)") and told[1].startswith("ToldError")
