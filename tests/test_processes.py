"""Several processes that train one student: equal to one process of the same batch, resumed to the same bits, and one voice when one of them fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_VIT, Forked, kdcache_command, make_cache, make_shard
from hypothesis import given
from hypothesis import strategies as st
from test_resume import assert_same_run, lines_of
from test_train import CNN, CNN_ARGS, leaves, state_of

import pipelines.student_loop
from cli.main import main
from kdcache.cache import open_cache
from kdcache.distributed import ALONE, Processes, slurm_meeting_place
from kdcache.errors import StudentError, UsageError
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.join import CachedViews, EpochBatches
from kdcache.launch import Launch
from kdcache.shards import scan_shard
from kdcache.students import build_student
from kdcache.timm_models import architecture_of
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train, train_configs

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


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def start(action: Callable[[], int | None], logs: Path, *, world: int = 2) -> list[Forked]:
    """Processes that meet as those of torchrun do, but are forked: a fresh interpreter would need seconds for torch."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [
        Forked(
            action,
            logs / f"log-{rank}",
            {
                **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
        )
        for rank in range(world)
    ]


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
    print(f"{case}, {other}: weights differ by {difference:.1e}, were moved by {moved:.1e}")
    assert difference <= bound < 0.2 * moved
    assert [row["train_loss"] for row in others["history"]] == pytest.approx([row["train_loss"] for row in one["history"]], abs=20 * bound)
    assert [row["lr"] for row in others["history"]] == [row["lr"] for row in one["history"]]
    assert len(lines_of(the_run(equals / case / other))) == 2 * (3 + 1)
