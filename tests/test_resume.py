"""A run that is killed anywhere and resumed equals one that was not: real processes, torn checkpoints, full disks, other caches; and who watches."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import (
    TINY_VIT,
    Forked,
    Killed,
    assert_same_run,
    die_at,
    kdcache_command,
    leaves,
    lines_of,
    make_cache,
    make_shard,
    run_python,
    state_of,
    wandb_history,
    where_files_end_at,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.training.checkpoints
import pipelines.training.gang
import pipelines.training.loop
from kdcache.checkpoint import load_checkpoint, save_checkpoint
from kdcache.console import counted
from kdcache.errors import CorruptError, KDCacheError, MismatchError, StudentError, UsageError
from kdcache.evaluate import Evaluator
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.opening import open_cache
from pipelines.train import TrainConfig, train
from pipelines.training.checkpoints import RunCheckpoints
from pipelines.training.loop import StudentLoop

STEPS = 6
STUDENT_ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 2 shards × 6 images × 2 views: 6 batches of 2 an epoch; shards/ and val/."""
    folder = tmp_path_factory.mktemp("resume")
    make_cache(folder, num_shards=2, num_samples=6, views=2, targets=["logits", "features@norm", "features@blocks.0", "features@blocks.1"])
    make_shard(folder / "val" / "val-00.tar", num_samples=6, seed=7)
    return folder


def options_of(folder: Path, out: Path, **overrides: Any) -> dict[str, Any]:
    """Of a run with everything that has a state: dropout, masks, an EMA, a loss scale, a schedule, momenta; every step in metrics.jsonl."""
    options = {
        "cache": str(folder / "cache"), "students": (TINY_VIT,), "model_kwargs": STUDENT_ARGS, "method": "nkd+vitkd", "val": str(folder / "val"),
        "out": str(out), "epochs": 3, "batch_size": 2, "workers": 0, "device": "cpu", "log_interval": 1, "recovery_interval": 2,
        "model_ema": True, "model_ema_decay": 0.9, "amp": True,
    }  # fmt: skip
    return {**options, **overrides}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing interrupts."""
    (run,) = train(TrainConfig(**options_of(folder, tmp_path_factory.mktemp("whole"))))
    return run


def die_after(monkeypatch: pytest.MonkeyPatch, updates: int, die: Callable[[], None]) -> None:
    """Arm this process: `die` after so many updates, before they are logged or saved."""
    seen = 0
    step = pipelines.training.loop.StudentLoop._step

    def counting(self: Any, *arguments: Any) -> dict[str, float]:
        nonlocal seen
        losses = step(self, *arguments)
        seen += 1
        if seen == updates:
            die()
        return losses

    monkeypatch.setattr(pipelines.training.loop.StudentLoop, "_step", counting)


def raise_killed() -> None:
    raise Killed


# --- killed anywhere ---


def test_a_command_that_is_killed_again_and_again_equals_the_uninterrupted_one(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Real SIGKILLs at random moments: metrics.jsonl growing by a random number of lines is the signal to shoot."""
    arguments: list[object] = [
        "train",
        folder / "cache",
        "--student",
        TINY_VIT,
        "--method",
        "nkd+vitkd",
        "--val",
        folder / "val",
        "--out",
        tmp_path / "runs",
    ]
    arguments += ["--epochs", 3, "-b", 2, "-j", 0, "--device", "cpu", "--log-interval", 1, "--recovery-interval", 2, "--model-ema", "--amp"]
    arguments += ["--model-ema-decay", 0.9, *(part for name, value in STUDENT_ARGS.items() for part in ("--model-kwargs", f"{name}={value}"))]
    log, chance = tmp_path / "runs" / whole["id"] / "metrics.jsonl", random.Random(5)
    kills = 0
    for _ in range(3):
        child = Forked(kdcache_command(*arguments, "--resume"), tmp_path / "log")
        before, wanted, deadline = log.stat().st_size if log.exists() else 0, 150 * chance.randrange(1, 4), time.monotonic() + 60
        while (log.stat().st_size if log.exists() else 0) < before + wanted and time.monotonic() < deadline:
            if (log.parent / "export").exists():
                break
            time.sleep(0.001)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1  # of 3: on a busy machine a run may get to its end before it is shot
    assert Forked(kdcache_command(*arguments, "--resume"), tmp_path / "log").wait() == 0
    assert_same_run({**whole, "path": str(log.parent)}, whole)


@pytest.mark.parametrize("moment", [2, 4, 5])
def test_a_run_that_is_killed_while_it_saves_equals_the_uninterrupted_one(folder: Path, whole: dict[str, Any], tmp_path: Path, moment: int) -> None:
    """2: the first checkpoint is written and not yet in its place; 4: so is the second; 5: the first is in previous/ and there is no last."""

    def command() -> None:
        die_at(tmp_path / "runs", "checkpoint", moment)
        train(TrainConfig(**options_of(folder, tmp_path / "runs")))

    assert Forked(command, tmp_path / "log").wait() == -signal.SIGKILL
    (run,) = (tmp_path / "runs").iterdir()
    saved = sorted(str(path.relative_to(run)) for path in run.glob("*/checkpoint.pt"))
    assert saved == {2: [], 4: ["last/checkpoint.pt"], 5: ["previous/checkpoint.pt"]}[moment]
    assert len(list((run / "last").glob(".checkpoint-*.tmp"))) == 1
    (found,) = train(TrainConfig(**options_of(folder, tmp_path / "runs", resume=True)))
    assert_same_run(found, whole)


@pytest.mark.parametrize("updates", [1, 3, STEPS, 2 * STEPS - 1])
def test_a_run_that_is_killed_within_an_epoch_repeats_no_more_than_the_steps_since(
    folder: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    with monkeypatch.context() as patch:
        die_after(patch, updates, raise_killed)
        with pytest.raises(Killed):
            train(TrainConfig(**options_of(folder, tmp_path)))
    read: list[int] = []
    get = CachedViews.__getitems__
    monkeypatch.setattr(CachedViews, "__getitems__", lambda self, items: read.append(len(items)) or get(self, items))
    torch.manual_seed(999)
    (found,) = train(TrainConfig(**options_of(folder, tmp_path, resume=True)))
    saved = (updates - 1) // STEPS * STEPS + (updates - 1) % STEPS // 2 * 2  # the update that died was not saved
    assert len(read) == 3 * STEPS - saved
    assert_same_run(found, whole)


@pytest.mark.parametrize("interval", [0, 1, None])
def test_how_often_a_run_is_saved_changes_nothing(folder: Path, whole: dict[str, Any], tmp_path: Path, interval: int | None) -> None:
    (found,) = train(TrainConfig(**options_of(folder, tmp_path, recovery_interval=interval)))
    assert_same_run(found, whole)


def test_by_default_a_checkpoint_is_due_by_the_clock(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = pipelines.training.checkpoints.RunCheckpoints(tmp_path, open_cache(folder / "cache"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 590)
    assert not checkpoints.is_due(1)
    monkeypatch.setattr(time, "monotonic", lambda: now + 610)
    assert checkpoints.is_due(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_within_an_epoch_and_reads_nothing_before(folder: Path, workers: int) -> None:
    cache = open_cache(folder / "cache")
    batches = EpochBatches(range(len(cache.rows)), batch_size=2, num_views=2, seed=3)
    loader = BatchLoader(CachedViews(cache, targets=("logits",)), batches, num_workers=workers)
    try:
        all_batches, rest, after = ([batch["views"] for batch in loader.epoch(epoch, start=start)] for epoch, start in ((1, 0), (1, 4), (1, 0)))
    finally:
        loader.close()
    assert (len(loader), len(all_batches), len(rest)) == (6, 6, 2)
    assert all(torch.equal(a, b) for a, b in zip([*all_batches[4:], *all_batches], [*rest, *after], strict=True))
    batches.set_epoch(1, start=4)
    asked = list(batches)
    batches.set_epoch(1)
    assert asked == list(batches)[4:]


# --- stopped by a signal ---


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "step"), (signal.SIGTERM, "evaluation"), (signal.SIGINT, "save"), (signal.SIGTERM, "loading")]
)
def test_a_signal_saves_what_was_done_and_the_run_goes_on_from_there(
    folder: Path, whole: dict[str, Any], tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    """By default a checkpoint within an epoch is due after ten minutes only."""
    arguments: list[object] = ["train", folder / "cache", "--student", TINY_VIT, "--method", "nkd+vitkd", "--val", folder / "val", "--out", tmp_path]
    arguments += ["--epochs", 3, "-b", 2, "--device", "cpu", "--log-interval", 1, "--model-ema", "--amp", "--model-ema-decay", 0.9]
    arguments += ["-j", int(number == signal.SIGTERM)]  # its workers end at once
    arguments += [part for name, value in STUDENT_ARGS.items() for part in ("--model-kwargs", f"{name}={value}")]

    def command() -> int:
        patch, seen = pytest.MonkeyPatch(), 0
        owner, name = {
            "step": (StudentLoop, "_step"), "evaluation": (Evaluator, "__call__"), "save": (RunCheckpoints, "save"), "loading": (pipelines.training.gang._Bar, "move"),
        }[moment]  # fmt: skip
        inner = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == {"step": STEPS + 3, "evaluation": 3, "save": 2, "loading": STEPS + 4}[moment]:
                os.killpg(0, number)  # as a terminal and SLURM do: workers get it too
            return inner(*arguments, **options)

        patch.setattr(owner, name, counting)
        return kdcache_command(*arguments)()

    child = Forked(command, tmp_path / "log")
    assert child.wait() == 1
    assert child.group_is_gone(10)
    run = tmp_path / str(whole["id"])
    state = load_checkpoint(run / "last" / "checkpoint.pt")
    where = {"step": (1, 3), "evaluation": (1, 6), "save": (2, 0), "loading": (1, 3)}[moment]
    assert (state["epoch"], state["step"]) == where
    said = child.output()
    if moment != "save":
        assert f"saved after {counted(where[0], 'epoch')} and {counted(where[1], 'step')}, in {run / 'last' / 'checkpoint.pt'}" in said
    assert f"stopped by {number.name}; the last checkpoint is kept: run the same command again with --resume to go on" in said
    assert "Traceback" not in said
    (tmp_path / "log").unlink()
    (found,) = train(TrainConfig(**options_of(folder, tmp_path, resume=True)))
    assert_same_run(found, whole)


# --- torn ---


@pytest.fixture
def stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was killed in its second epoch, after a checkpoint at step 2 and the one of the first epoch."""
    with monkeypatch.context() as patch:
        die_after(patch, STEPS + 3, raise_killed)
        with pytest.raises(Killed):
            train(TrainConfig(**options_of(folder, tmp_path)))
    (run,) = tmp_path.iterdir()
    return run


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zero(data: bytes) -> bytes:
    return data[: len(data) // 3] + bytes(len(data) - len(data) // 3)


def flip(data: bytes) -> bytes:
    """One bit of one weight."""
    weight = torch.load(io.BytesIO(data), weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    place = data.index(weight.numpy().tobytes()) + 2
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize("tear", [cut, zero, flip, lambda data: b"", None], ids=["cut", "zeros", "flipped", "empty", "gone"])
def test_a_torn_checkpoint_is_noticed_and_the_one_before_used_and_said(
    folder: Path, whole: dict[str, Any], stopped: Path, capsys: pytest.CaptureFixture[str], tear: Callable[[bytes], bytes] | None
) -> None:
    last, previous = (stopped / name / "checkpoint.pt" for name in ("last", "previous"))
    assert [(state["epoch"], state["step"]) for state in map(load_checkpoint, (last, previous))] == [(1, 2), (1, 0)]
    if tear is None:
        last.unlink()
    else:
        last.write_bytes(tear(last.read_bytes()))
    (found,) = train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))
    said = capsys.readouterr().err
    assert str(last) in said
    assert f"going on from {previous}" in said
    assert "after 1 epoch" in said
    assert_same_run(found, whole)


def test_what_a_loss_of_power_left_in_metrics_is_passed_over(folder: Path, whole: dict[str, Any], stopped: Path) -> None:
    log = stopped / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + bytes(50) + b'\n\xff{"epoch": 1\n[1]\n{"epoch": 1, "step": 3, "lo')
    (found,) = train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))
    assert_same_run(found, whole)


def test_two_torn_checkpoints_end_the_command_with_the_reason(folder: Path, stopped: Path) -> None:
    for name in ("last", "previous"):
        path = stopped / name / "checkpoint.pt"
        path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(CorruptError, match=r"last/checkpoint.pt: expected a checkpoint of kdcache"):
        train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))


@pytest.mark.parametrize("part", ["method", "optimizer"])
def test_a_checkpoint_with_the_tensors_of_another_model_is_refused(folder: Path, stopped: Path, part: str) -> None:
    path = stopped / "last" / "checkpoint.pt"
    state = load_checkpoint(path)
    if part == "method":
        state["method"] = {name: torch.zeros(3) for name in state["method"]}
    else:
        state["optimizer"]["param_groups"][0]["params"] = [0]
    save_checkpoint(path, state, fingerprint=state["fingerprint"], root=state["root"])
    with pytest.raises(StudentError, match=r"does not hold this run's weights and optimizer .* delete the folder"):
        train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))


SMALL = {
    "recipe": {}, "epoch": 1, "step": 3, "sums": {"loss": 2.5}, "method": {"w": torch.arange(6.0)}, "optimizer": {}, "scheduler": {},
    "generators": {}, "history": [0.5], "seconds": 1.5, "epoch_seconds": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "checkpoint.pt"
    save_checkpoint(path, SMALL, fingerprint="a", root="b")
    return path


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), length=st.sampled_from([1, 1, 1, 64, 10_000]), cut_there=st.booleans())
def test_no_change_of_a_checkpoint_goes_unnoticed_or_changes_nothing(small: Path, place: float, bit: int, length: int, cut_there: bool) -> None:
    data = bytearray(small.read_bytes())
    start = int(place * len(data))
    if cut_there:
        del data[start:]
    elif length == 1:
        data[start] ^= 1 << bit
    else:
        data[start : start + length] = bytes(len(data[start : start + length]))
    changed = small.with_name("changed.pt")
    changed.write_bytes(data)
    try:
        found = load_checkpoint(changed)
    except KDCacheError:
        return
    expected = dict(leaves({**SMALL, "fingerprint": "a", "root": "b", "format": "kdcache-checkpoint", "version": 2}))
    for path, value in leaves(found):
        assert torch.equal(value, expected[path]) if isinstance(value, torch.Tensor) else value == expected[path]


def test_a_full_disk_ends_the_run_and_leaves_both_checkpoints(folder: Path, whole: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("checkpoint.pt")}

    half = len(before[stopped / "last" / "checkpoint.pt"]) // 2
    child = Forked(where_files_end_at(half, lambda: train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))), tmp_path / "log")
    assert child.wait() == 3, child.output()
    assert "last/checkpoint.pt: can't be written: File too large; the checkpoint before it is whole, run again with --resume" in child.output()
    assert {path: path.read_bytes() for path in stopped.rglob("checkpoint.pt")} == before
    assert not list(stopped.rglob("*.tmp"))
    (tmp_path / "log").unlink()
    (found,) = train(TrainConfig(**options_of(folder, stopped.parent, resume=True)))
    assert_same_run(found, whole)


# --- the moving average ---


def test_the_moving_average_is_measured_beside_the_weights_and_exported(folder: Path, whole: dict[str, Any]) -> None:
    with open(Path(whole["path"], "summary.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-7:] == ["eval_loss", "eval_top1", "eval_top5", "eval_raw_loss", "eval_raw_top1", "eval_raw_top5", "lr"]
    assert any(row["eval_loss"] != row["eval_raw_loss"] for row in rows)
    model = timm.create_model(f"local-dir:{whole['path']}/export", pretrained=True).state_dict()
    best = state_of(whole, "best")
    assert all(torch.equal(model[name], value) for name, value in best["ema"].items())
    assert not torch.equal(model["head.weight"], best["method"]["student.head.weight"])
    assert best["recipe"]["model_ema_decay"] == 0.9
    assert "The weights are a moving average" in Path(whole["path"], "export", "README.md").read_text()


@pytest.mark.parametrize("warmup", [False, True])
def test_the_moving_average_is_timms_formula(folder: Path, tmp_path: Path, warmup: bool) -> None:
    """Update n, counted over all epochs, keeps a share of .75, with the warm-up at most 1 - n^-2/3; the first one keeps nothing."""
    average_of = {"model_ema_decay": 0.75, "model_ema_warmup": warmup}
    options = options_of(folder, tmp_path, method="kd", val=None, epochs=2, recovery_interval=1, **average_of)
    seen: list[dict[str, torch.Tensor]] = []
    save = save_checkpoint

    def note(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        seen.append({name: value.clone() for name, value in {**state["method"], **{f"ema.{k}": v for k, v in state["ema"].items()}}.items()})
        save(path, state, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", note)
        train(TrainConfig(**options))
    average = seen[0]["student.head.weight"]
    for number, state in enumerate(seen[1:], start=2):
        kept = min(0.75, 1 - number ** (-2 / 3)) if warmup else 0.75
        average = kept * average + (1 - kept) * state["student.head.weight"]
    assert len(seen) == 2 * STEPS
    torch.testing.assert_close(seen[-1]["ema.head.weight"], average)


@pytest.mark.parametrize(
    ("options", "is_told"), [({"model_ema_decay": 0.9998}, True), ({"model_ema_decay": 0.9998, "model_ema_warmup": True}, False), ({}, False)]
)
def test_an_average_that_keeps_what_it_began_with_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], is_told: bool
) -> None:
    updates = 1 * STEPS
    train(TrainConfig(**options_of(folder, tmp_path, method="ce", val=None, epochs=1, **{"model_ema_decay": 0.1, **options})))
    told = f"still has {100 * 0.9998**updates:.0f} % of the weights it began with after all {updates} updates"
    assert (told in capsys.readouterr().err) == is_told


# --- another cache ---


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A cache of the same tars and teacher, of other views."""
    from pipelines.extract import ExtractConfig, extract

    path = tmp_path_factory.mktemp("other") / "cache"
    targets = ("logits", "features@norm", "features@blocks.0", "features@blocks.1")
    extract(
        ExtractConfig(
            shards=str(folder / "shards"), cache=str(path), teacher=f"local-dir:{folder / 'teacher'}", targets=targets, views=2, workers=0, seed=9
        )
    )
    return path


def test_a_run_refuses_another_cache_and_says_what_differs_unless_allowed(folder: Path, stopped: Path, other: Path) -> None:
    options = options_of(folder, stopped.parent, cache=str(other), resume=True)
    first, second = open_cache(folder / "cache").fingerprint, open_cache(other).fingerprint
    text = rf"{re.escape(str(stopped))} .* is unfinished: field 'data.fingerprint' .*{first}.*{second}.*the views differ in seed \(0 there, 9 here\).*--allow-other-cache"
    with pytest.raises(StudentError, match=text):
        train(TrainConfig(**options))
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]
    (found,) = train(TrainConfig(**options, allow_other_cache=True))
    assert (found["path"], found["status"], found["epochs"]) == (str(stopped), "done", 3)
    record = json.loads((stopped / "export" / "config.json").read_text())["kdcache"]
    assert record["fingerprint"] == second
    assert [(cache["fingerprint"], cache["epoch"]) for cache in record["other_caches"]] == [(first, 1)]
    assert f"Its first 1 epoch: cache `{first}`" in (stopped / "export" / "README.md").read_text()
    steps = [(line["epoch"], line.get("step")) for line in lines_of(found)]
    assert steps == [(epoch, step) for epoch in range(3) for step in [*range(1, STEPS + 1), None]]  # the second epoch was begun again
    assert train(TrainConfig(**options))[0] == {**found, "status": "already done"}


def test_a_folder_that_holds_a_checkpoint_of_another_cache_refuses_it(folder: Path, stopped: Path, other: Path) -> None:
    checkpoints = pipelines.training.checkpoints.RunCheckpoints(stopped, open_cache(other))
    with pytest.raises(MismatchError, match=r"field 'fingerprint' differs.*the views differ in seed \(0 there, 9 here\); .*pass --allow-other-cache"):
        checkpoints.load()
    with pytest.raises(UsageError, match=r"--allow-other-cache: .*expected it with --resume"):
        TrainConfig(**options_of(folder, stopped.parent, allow_other_cache=True))


# --- watching ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_one_curve_of_a_run_that_was_killed(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = options_of(folder, tmp_path / "runs", log_tensorboard=True)

    def command() -> None:
        patch = pytest.MonkeyPatch()
        die_after(patch, 2 * STEPS - 1, lambda: signal.raise_signal(signal.SIGKILL))
        train(TrainConfig(**options))

    assert Forked(command, tmp_path / "log").wait() == -signal.SIGKILL
    (event_file,) = (tmp_path / "runs").glob("*/tensorboard/events.out.tfevents.*")
    time.sleep(max(0.0, int(event_file.name.split(".")[3]) + 1 - time.time()))  # event files sort by the second they were begun in
    (found,) = train(TrainConfig(**{**options, "resume": True}))
    assert found["id"] == whole["id"]
    assert lines_of(found) == lines_of(whole)
    events = EventAccumulator(str(Path(found["path"], "tensorboard"))).Reload()
    lines = lines_of(whole)
    for name, key in (("step/loss", "loss"), ("train/loss", "train_loss"), ("eval/top1", "eval_top1"), ("epoch/lr", None)):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        measured = [line for line in lines if ("step" in line) == name.startswith("step")]
        expected = [(line["epoch"] * STEPS + line.get("step", STEPS), line[key or "lr"]) for line in measured]
        assert [step for step, _ in shown] == [step for step, _ in expected], name
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_wandb_shows_whole_curves_of_a_run_that_was_killed_offline(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    options = options_of(folder, tmp_path / "runs", log_wandb=True, wandb_project="mine")

    def killed() -> None:
        die_after(pytest.MonkeyPatch(), STEPS + 4, lambda: signal.raise_signal(signal.SIGKILL))
        train(TrainConfig(**options))

    def resumed() -> None:
        train(TrainConfig(**{**options, "resume": True}))

    environ = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **{f"WANDB_{name}_DIR": str(tmp_path) for name in ("CONFIG", "CACHE", "DATA")}}
    assert Forked(killed, tmp_path / "log", environ).wait() == -signal.SIGKILL
    time.sleep(1)  # folders are named by the second
    child = Forked(resumed, tmp_path / "log", environ)
    assert child.wait() == 0, child.output()
    found = {**whole, "path": str(tmp_path / "runs" / whole["id"])}
    assert lines_of(found) == lines_of(whole)
    run, history = wandb_history(max(Path(found["path"], "wandb").glob("offline-run-*/*.wandb")))
    assert (run.run_id, run.project) == (whole["id"], "mine")
    assert list(history) == list(range(1, 3 * STEPS + 1))
    for line in lines_of(whole):
        shown = history[line["epoch"] * STEPS + line.get("step", STEPS)]
        assert shown["epoch"] == line["epoch"]
        names = {"step/loss": "loss"} if "step" in line else {"train/loss": "train_loss", "eval/top1": "eval_top1", "eval/raw_loss": "eval_raw_loss"}
        assert {name: shown[name] for name in names} == {name: line[key] for name, key in names.items()}


@pytest.mark.parametrize(("option", "module"), [("log_tensorboard", "tensorboard"), ("log_wandb", "wandb")])
def test_a_watcher_that_is_not_installed_is_named_with_its_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if module == "tensorboard" else "wandb", None)
    with pytest.raises(UsageError, match=rf"--{option.replace('_', '-')}: .*pip install 'kdcache\[{module}\]'"):
        train(TrainConfig(**options_of(folder, tmp_path, **{option: True})))
    assert not list(tmp_path.iterdir())


def test_watchers_are_imported_only_when_asked() -> None:
    run_python("import sys, cli.train, pipelines.train; assert not {'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)")
