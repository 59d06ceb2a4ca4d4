"""Gangs: every member equals the run that it would be alone, to the last bit, whatever the others do, fail at, or are killed in."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_VIT, Forked, Killed, assert_same_run, kdcache_command, make_shard, make_shards, make_teacher_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipelines.training.checkpoints
import pipelines.training.gang
import pipelines.training.loop
import pipelines.training.run
from cli.main import main
from kdcache.cache import Cache
from kdcache.distributed import ALONE
from kdcache.errors import KDCacheError, StudentError
from kdcache.evaluate import Evaluator
from kdcache.join import CachedViews
from kdcache.methods.kd import KD
from kdcache.opening import open_cache
from kdcache.plan import POLICIES, MixedViews
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train, train_configs
from pipelines.training.gang import ERROR_FILE, gangs_of

STEPS = 6
VIT_ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1}
CNN_ARGS = {"channels": [4, 4, 8, 8], "stem_width": 4}
MIXED = POLICIES["weak"].model_copy(update={"mix": MixedViews(prob=0.7, mixup_alpha=0.8, cutmix_alpha=1.0)})


class Vandal(KD):
    """`kd` that spoils all that it is given, draws random numbers of its own, and fails when told to."""

    name = "vandal"
    fail: ClassVar[Callable[[], object] | None] = None
    seen: ClassVar[list[weakref.ref[Any]]] = []

    def forward(self, images_BCHW: Tensor, labels: Tensor, targets: Any) -> dict[str, Tensor]:
        copies = {name: {key: tensor.clone() for key, tensor in value.items()} for name, value in targets.items()}
        parts = super().forward(images_BCHW.clone(), labels.clone(), copies)
        parts["noise"] = 0.1 * torch.rand(()) * self.student(images_BCHW.clone()).square().mean()
        images_BCHW.requires_grad_()
        with torch.no_grad():
            images_BCHW.mul_(0).sub_(3)
            labels.zero_()
            for value in targets.values():
                for tensor in value.values():
                    tensor.unsqueeze_(0).fill_(7.0)
        if Vandal.fail is not None:
            Vandal.seen.append(weakref.ref(self.student))
            Vandal.fail()
        return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 12 mixed images × 2 views from teachers one (dct bands too) and two: 6 batches of 2 an epoch; val/."""
    folder = tmp_path_factory.mktemp("gang")
    make_shards(folder / "shards", num_shards=2, num_samples=6)
    wanted = {"one": ("logits", "features@norm:dct", "features@blocks.0", "features@blocks.1"), "two": ("logits",)}
    for seed, (name, targets) in enumerate(wanted.items()):
        extract(
            ExtractConfig(
                shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=make_teacher_dir(folder / name, seed=seed), name=name,
                augment=MIXED, targets=targets, views=2, workers=0,
            )
        )  # fmt: skip
    make_shard(folder / "val" / "val-00.tar", num_samples=6, seed=7)
    return folder


def configs_of(folder: Path, out: Path, **overrides: Any) -> dict[str, TrainConfig]:
    """Four that differ in all that members of a gang may differ in."""
    common: dict[str, Any] = {
        "cache": str(folder / "cache"), "val": str(folder / "val"), "out": str(out), "batch_size": 2, "workers": 0, "device": "cpu",
        "log_interval": 1, **overrides,
    }  # fmt: skip
    vit: dict[str, Any] = {"students": (TINY_VIT,), "model_kwargs": VIT_ARGS}
    cnn: dict[str, Any] = {"students": ("resnet18",), "model_kwargs": CNN_ARGS}
    ema: dict[str, Any] = {"model_ema": True, "model_ema_decay": 0.9}
    return {
        "sum": TrainConfig(**vit, **ema, teacher="one", method="nkd+vitkd", epochs=3, amp=True, recovery_interval=2, **common),
        "vandal": TrainConfig(**vit, teacher="one", method="test_gang:Vandal", epochs=2, clip_grad=1.0, recovery_interval=4, **common),
        "bands": TrainConfig(
            **cnn, teacher="one", method="frequency", settings={"bands": ["low"], "student_node": "layer1"}, epochs=2, opt="sgd", lr=0.1, num_classes=10,
            recovery_interval=0, **common,
        ),
        "two": TrainConfig(
            **cnn, **ema, teacher=("one", "two"), method="kd", epochs=1, opt="lamb", sched="none", amp=True, amp_dtype="bfloat16",
            recovery_interval=5, channels_last=True, **common,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each of the four trained by itself."""
    configs = configs_of(folder, tmp_path_factory.mktemp("alone"))
    return dict(zip(configs, train_configs([*configs.values()]), strict=True))


def train_gang(configs: Mapping[str, TrainConfig]) -> tuple[dict[str, dict[str, Any]], StudentError | None]:
    """Name → entry, as they ended, and the error at the end, if any."""
    names = {one.id: name for name, one in zip(configs, runs_of([*configs.values()]), strict=True)}
    entries: dict[str, dict[str, Any]] = {}
    try:
        for entry in train_configs([*configs.values()], gang=len(configs)):
            assert names[entry["id"]] not in entries
            entries[names[entry["id"]]] = entry
    except StudentError as error:
        return entries, error
    return entries, None


def runs_of(configs: Sequence[TrainConfig]) -> list[pipelines.training.run.Run]:
    from pipelines.training.data import Opened, open_data

    opened = Opened()
    return [pipelines.training.run.Run(config, open_data(config, opened), name) for config in configs for name in config.students]


# --- as if it were alone ---


def test_a_gang_of_different_students_equals_single_runs(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    found, error = train_gang(configs_of(folder, tmp_path))
    assert error is None
    assert list(found) == ["two", "vandal", "bands", "sum"]  # each as soon as it ends
    for name, run in found.items():
        assert_same_run(run, alone[name])
        assert not Path(run["path"], ERROR_FILE).exists()
    lines = [json.loads(line) for line in Path(found["sum"]["path"], "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["own_seconds"] < line["seconds"] for line in lines if "seconds" in line)


def test_a_gang_reads_each_batch_once_and_of_targets_what_any_member_wants(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, str, tuple[str, ...]]] = []
    items: list[int] = []
    components, batches = Cache.read_components, CachedViews.__getitems__

    def note_components(self: Cache, teacher: str, target: str, *arguments: Any, components: Any = None) -> Any:
        read.append((teacher, target, components))
        return original(self, teacher, target, *arguments, components=components)

    def note_items(self: CachedViews, wanted: Any) -> Any:
        items.append(len(wanted))
        return batches(self, wanted)

    original = components
    monkeypatch.setattr(Cache, "read_components", note_components)
    monkeypatch.setattr(CachedViews, "__getitems__", note_items)
    some = configs_of(folder, tmp_path)["bands"]
    of_bands = {"dc,low": 2, "mid": 1, "low": 2}  # of one epoch: that of the first has no reader afterwards
    configs = [replace(some, settings={**some.settings, "bands": bands.split(",")}, epochs=epochs, val=None) for bands, epochs in of_bands.items()]
    entries = list(train_configs(configs, gang=3))
    assert [entry["status"] for entry in entries] == ["done"] * 3
    assert items == [2] * (2 * STEPS)
    assert {(teacher, target) for teacher, target, _ in read} == {("one", "features@norm")}
    asked = list(dict.fromkeys(components for _, _, components in read))
    assert asked == [("dc", "dc_scale", "low", "low_scale", "mid", "mid_scale"), ("dc", "dc_scale", "low", "low_scale")]


def test_generators_and_threads_are_given_back(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """On two threads a small student runs on one, whoever is beside it."""
    torch.set_num_threads(2)
    try:
        found, _ = train_gang({name: config for name, config in configs_of(folder, tmp_path).items() if name in ("sum", "two")})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for name, run in found.items():
        assert_same_run(run, alone[name])


# --- who trains with whom ---


def stub(number: int, **differing: Any) -> Any:
    config = {
        "data": None,
        "batch_size": 2,
        "seed": 42,
        "check_views": 0.05,
        "num_workers": 0,
        "device": "cpu",
        "prefetch_bytes": 1,
        "grad_accum_steps": 1,
        **differing,
    }
    blocks = config.pop("blocks", None)
    views, shards = config.pop("views", 1), config.pop("shards", 1)
    data = SimpleNamespace(cache=SimpleNamespace(store=SimpleNamespace(url="file:///c")), shards=("s",) * shards, num_views=views, blocks=blocks)
    finished = config.pop("finished", False)
    folder = Path(f"run{config.pop('twin', number)}")
    return SimpleNamespace(config=SimpleNamespace(**config), data=data, processes=ALONE, is_finished=finished, folder=folder, id=f"run{number}")


differing = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.sampled_from([2, 4]), "seed": st.sampled_from([42, 1]), "views": st.integers(1, 2), "finished": st.booleans(),
        "twin": st.integers(0, 2), "check_views": st.just(1.0), "data": st.just("elsewhere"), "shards": st.just(2), "num_workers": st.just(1),
        "blocks": st.just(object), "prefetch_bytes": st.just(9),
    },
)  # fmt: skip


@settings(max_examples=200)
@given(options=st.lists(differing, min_size=1, max_size=9), size=st.integers(1, 4))
def test_gangs_hold_every_run_once_in_order_and_agree_in_their_stream(options: list[dict[str, Any]], size: int) -> None:
    runs = [stub(number, **one) for number, one in enumerate(options)]
    gangs = gangs_of(runs, size)
    assert sorted(run.id for gang in gangs for run in gang) == sorted(run.id for run in runs)
    number = {run.id: place for place, run in enumerate(runs)}
    assert all(gang == sorted(gang, key=lambda run: number[run.id]) for gang in gangs)
    assert gangs == sorted(gangs, key=lambda gang: number[gang[0].id])
    for gang in gangs:
        assert len(gang) <= size
        assert len({run.folder for run in gang}) == len(gang)
        assert len(gang) == 1 or not any(run.is_finished for run in gang)
        assert all(pipelines.training.gang.stream_of(run) == pipelines.training.gang.stream_of(gang[0]) for run in gang)
    unfinished = [gang for gang in gangs if not gang[0].is_finished and len({run.folder for run in runs}) == len(runs)]
    for place, gang in enumerate(unfinished):  # none could have joined one before
        for before in unfinished[:place]:
            assert len(before) == size or pipelines.training.gang.stream_of(before[0]) != pipelines.training.gang.stream_of(gang[0])


def test_runs_that_can_not_share_a_loader_are_told_why(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = replace(configs_of(folder, tmp_path)["two"], val=None)
    configs = [some, replace(some, batch_size=3), replace(some, lr=0.1), replace(some, batch_size=3, seed=1), replace(some, lr=0.2)]
    runs = runs_of(configs)
    entries = list(train_configs([*configs, some], gang=2))
    assert [entry["id"] for entry in entries] == [runs[i].id for i in (0, 2, 1, 3, 4)] + [runs[0].id]
    assert [entry["status"] for entry in entries] == ["done"] * 5 + ["already done"]
    said = capsys.readouterr().err
    assert f"gang 1 of 4: {runs[0].id}, {runs[2].id}\n" in said
    assert f"gang 2 of 4: {runs[1].id} (apart from gang 1: --batch-size 3, not 2)\n" in said
    assert f"gang 3 of 4: {runs[3].id} (apart from gang 1: --batch-size 3, not 2; --seed 1, not 42, and the seed orders the rows)\n" in said
    assert f"gang 4 of 4: {runs[4].id} (gang 1 is full)\n" in said
    assert "gains nothing" not in said
    gangs_of(runs_of([replace(some, seed=seed) for seed in (7, 8, 9)]), 3)
    assert "gang 3 of 3" in (said := capsys.readouterr().err) and "each loads for itself, and --gang gains nothing" in said


# --- one fails, the others do not notice ---


def raise_error(kind: type[Exception], text: str) -> Callable[[], None]:
    def fail() -> None:
        raise kind(text)

    return fail


def at_update(count: int, fail: Callable[[], object]) -> Callable[[], object]:
    seen = 0

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            fail()

    return step


def in_steps(patch: pytest.MonkeyPatch, count: int, fail: Callable[[], object]) -> None:
    patch.setattr(Vandal, "fail", staticmethod(at_update(count, fail)))


def in_method(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int, fail: Callable[[], object]) -> None:
    """At the count-th call of it for the vandal."""
    original, tick = getattr(owner, name), at_update(count, fail)

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        if "-vandal-" in str(getattr(self, "folder", None) or getattr(self, "last", None)):
            tick()
        return original(self, *arguments, **options)

    patch.setattr(owner, name, wrapped)


FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "memory, first step": (lambda patch: in_steps(patch, 1, raise_error(torch.OutOfMemoryError, "CUDA out of memory.")), "OutOfMemoryError: CUDA"),
    "exception, first epoch": (lambda patch: in_steps(patch, 5, raise_error(KeyError, "mine")), "KeyError: 'mine'"),
    "memory, second epoch": (lambda patch: in_steps(patch, STEPS + 1, raise_error(MemoryError, "host")), "MemoryError: host"),
    "exception, last step": (lambda patch: in_steps(patch, 2 * STEPS, raise_error(ZeroDivisionError, "x")), "ZeroDivisionError: x"),
    "build": (
        lambda patch: in_method(patch, pipelines.training.run.Run, "begin", 1, raise_error(torch.OutOfMemoryError, "no room")), "OutOfMemoryError: no room"
    ),
    "disk, second save": (
        lambda patch: in_method(patch, pipelines.training.checkpoints.RunCheckpoints, "save", 2, raise_error(OSError, "No space left")), "OSError: No space"
    ),
    "evaluation": (
        lambda patch: in_method(patch, pipelines.training.loop.StudentLoop, "_evaluate", 2, raise_error(RuntimeError, "shapes")), "RuntimeError: shapes"
    ),
    "export": (lambda patch: in_method(patch, pipelines.training.run.Run, "_export", 1, raise_error(OSError, "quota")), "OSError: quota"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_a_member_that_fails_ends_alone_and_can_be_resumed(
    folder: Path, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arm, said = FAILURES[kind]
    configs = {name: config for name, config in configs_of(folder, tmp_path).items() if name != "sum"}
    is_held: set[bool] = set()
    with monkeypatch.context() as patch:
        update = pipelines.training.gang._Bar.update

        def note(self: Any) -> None:
            if any(tmp_path.glob(f"*/{ERROR_FILE}")):
                is_held.update(student() is not None for student in Vandal.seen)
            update(self)

        patch.setattr(Vandal, "seen", [])
        patch.setattr(pipelines.training.gang._Bar, "update", note)
        arm(patch)
        found, error = train_gang(configs)
        assert is_held <= {False}, "its memory is free by the end of that very step"
    assert error is not None
    path = Path(found["vandal"]["path"])
    assert f"1 of 3 runs failed:\n  {path}: {found['vandal']['error']}\n" in str(error)
    assert "again with --resume" in str(error)
    assert (found["vandal"]["status"], found["vandal"]["error"].startswith(said)) == ("failed", True)
    record = (path / ERROR_FILE).read_text()
    assert record.startswith(found["vandal"]["error"])
    assert "Traceback (most recent call last)" in record
    for name in ("bands", "two"):
        assert_same_run(found[name], alone[name])

    again, error = train_gang({name: replace(config, resume=True) for name, config in configs.items()})
    assert error is None
    assert [run["status"] for name, run in again.items() if name != "vandal"] == ["already done"] * 2
    assert_same_run(again["vandal"], alone["vandal"])
    assert not (path / ERROR_FILE).exists()


def test_a_full_device_is_an_error_with_its_cure_in_a_run_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps(monkeypatch, 2, raise_error(torch.OutOfMemoryError, "CUDA out of memory.\nmore"))
    with pytest.raises(StudentError, match=f"student {TINY_VIT}: CUDA out of memory; try a smaller --batch-size"):
        train(configs_of(folder, tmp_path)["vandal"])


def test_a_loss_that_is_not_finite_ends_its_student_only(folder: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    configs = configs_of(folder, tmp_path)
    del configs["vandal"]
    configs = {"diverging": replace(configs["bands"], lr=1e30), **configs}
    found, error = train_gang(configs)
    assert error is not None
    assert "the loss is not finite in epoch 0, step" in found["diverging"]["error"]
    assert "StudentError" in Path(found["diverging"]["path"], ERROR_FILE).read_text()
    for name in ("sum", "bands", "two"):
        assert_same_run(found[name], alone[name])


def test_a_failure_in_the_middle_of_an_evaluation_leaves_the_shared_loader_usable(
    folder: Path, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members behind take their validation images from the very worker processes that were left in the middle."""
    configs = configs_of(folder, tmp_path, workers=1)
    chosen = {"vandal": configs["vandal"], "sum": configs["sum"]}
    evaluators: set[int] = set()
    forward = Vandal.train

    def fail_in_evaluation(self: Any, mode: bool = True) -> Any:
        return forward(self, mode)

    call = Evaluator.__call__

    def note(self: Evaluator, model: Any, *arguments: Any) -> Any:
        evaluators.add(id(self))
        handle = model.register_forward_pre_hook(at_hook) if len(evaluators) == 1 and not failed else None
        try:
            return call(self, model, *arguments)
        finally:
            if handle is not None:
                handle.remove()

    failed: list[int] = []

    def at_hook(_module: Any, _inputs: Any) -> None:
        failed.append(1)
        if len(failed) == 2:
            raise RuntimeError("in the second batch")

    monkeypatch.setattr(Vandal, "train", fail_in_evaluation)
    monkeypatch.setattr(Evaluator, "__call__", note)
    found, error = train_gang(chosen)
    assert error is not None
    assert found["vandal"]["error"] == "RuntimeError: in the second batch"
    assert len(evaluators) == 1
    assert_same_run(found["sum"], alone["sum"])


def test_what_the_loader_meets_ends_the_gang_and_keeps_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    tar = tmp_path / "shards" / "train-0001.tar"
    data = bytearray(tar.read_bytes())
    row = open_cache(folder / "cache").rows
    place = int(row.offset[8]) + int(row.size[8]) // 2  # of the second shard
    data[place : place + 40] = bytes(40)
    tar.write_bytes(data)
    configs = configs_of(folder, tmp_path / "runs", data=str(tmp_path / "shards"), check_views=1.0)
    found, error = train_gang({name: configs[name] for name in ("sum", "vandal")})
    assert error is not None
    assert {run["status"] for run in found.values()} == {"failed"}
    for run in found.values():
        assert "shard train-0001" in run["error"]
        assert "shard train-0001" in Path(run["path"], ERROR_FILE).read_text().splitlines()[0]
    (one,) = {str(run["error"]) for run in found.values()}
    with pytest.raises(KDCacheError, match="shard train-0001") as raised:  # alone it is raised as it is
        train(replace(configs["sum"], out=str(tmp_path / "alone")))
    assert str(raised.value) == one


def test_the_command_reports_all_runs_and_exits_with_1_if_one_failed(folder: Path, tmp_path: Path) -> None:
    arguments = ["train", folder / "cache", "--teacher", "one", "--student", "test_vit", "--student", "test_resnet", "--out", tmp_path / "runs"]
    arguments += ["-b", 2, "-j", 0, "--device", "cpu", "--gang", 2, "--epochs", 1, "--json", "--opt", "sgd"]
    good = CliRunner().invoke(main, [str(one) for one in [*arguments, "--lr", 1e-3]])
    assert good.exit_code == 0, good.output
    assert [run["status"] for run in json.loads(good.stdout)["runs"]] == ["done", "done"]
    bad = CliRunner().invoke(main, [str(one) for one in [*arguments, "--lr", 1e35]])
    assert bad.exit_code == 1
    assert [run["status"] for run in json.loads(bad.stdout)["runs"]] == ["failed", "failed"]
    assert "2 of 2 runs failed" in bad.stderr


# --- killed, and gone on with ---


@pytest.mark.parametrize("updates", [3, 9, 16, 27])
def test_members_that_were_killed_at_different_steps_go_on_together(
    folder: Path, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    """They save every 2, 4, never, and 5 steps; one joins on resume."""
    configs = configs_of(folder, tmp_path)
    left = {name: config for name, config in configs.items() if name != "bands" or updates % 2}
    with monkeypatch.context() as patch:
        step, seen = pipelines.training.loop.StudentLoop._step, 0

        def dying(self: Any, *arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == updates:
                raise Killed
            return step(self, *arguments)

        patch.setattr(pipelines.training.loop.StudentLoop, "_step", dying)
        with pytest.raises(Killed):
            list(train_configs([*left.values()], gang=4))
    torch.manual_seed(999)
    found, error = train_gang({name: replace(config, resume=True) for name, config in configs.items()})
    assert error is None
    for name, run in found.items():
        assert_same_run({**run, "status": "done"}, alone[name])


def test_those_who_save_by_the_clock_save_at_one_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, int, int]] = []
    save = pipelines.training.checkpoints.RunCheckpoints.save

    def note(self: Any, state: Mapping[str, Any]) -> None:
        saved.append((self.last.parent.parent.name, state["epoch"], state["step"]))
        save(self, state)

    clock = iter(range(10**6))
    monkeypatch.setattr(pipelines.training.checkpoints.RunCheckpoints, "save", note)
    monkeypatch.setattr(pipelines.training.checkpoints, "RECOVERY_SECONDS", 7)
    monkeypatch.setattr(pipelines.training.checkpoints, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second a look
    configs = configs_of(folder, tmp_path, val=None)
    train_gang({name: replace(configs[name], recovery_interval=None) for name in ("sum", "vandal", "bands")})
    places: dict[tuple[int, int], int] = {}
    for _, epoch, step in saved:
        places[epoch, step] = places.get((epoch, step), 0) + 1
    within = {place: count for place, count in places.items() if place[1]}
    assert within
    assert all(count == (3 if epoch < 2 else 1) for (epoch, _), count in within.items()), places


def test_a_gang_that_is_killed_again_and_again_equals_single_runs(folder: Path, tmp_path: Path) -> None:
    """Real SIGKILLs of the command at random moments."""
    common = [folder / "cache", "--teacher", "one", "--student", "test_vit", "--student", "test_resnet", "--method", "kd", "--val", folder / "val"]
    common += ["--epochs", 3, "-b", 2, "-j", 1, "--device", "cpu", "--log-interval", 1, "--recovery-interval", 2, "--model-ema"]
    expected = {run["student"]: run for run in run_command([*common, "--out", tmp_path / "alone"], tmp_path)}
    arguments = ["train", *common, "--out", tmp_path / "runs", "--gang", 2, "--resume"]
    chance, kills = random.Random(3), 0

    def written() -> int:
        return sum(log.stat().st_size for log in (tmp_path / "runs").glob("*/metrics.jsonl"))

    for _ in range(3):
        child = Forked(kdcache_command(*arguments), tmp_path / "log")
        before, wanted, deadline = written(), 150 * chance.randrange(1, 8), time.monotonic() + 60
        while written() < before + wanted and time.monotonic() < deadline and len(list((tmp_path / "runs").glob("*/export"))) < 2:
            time.sleep(0.001)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1
    for run in run_command([*common, "--out", tmp_path / "runs", "--gang", 2, "--resume"], tmp_path):
        assert_same_run({**run, "status": "done"}, expected[run["student"]])


def run_command(arguments: Sequence[object], folder: Path) -> list[dict[str, Any]]:
    """Its runs, from a process of its own."""
    log = folder / "json"
    child = Forked(kdcache_command("train", *arguments, "--json"), log)
    assert child.wait() == 0, child.output()
    text = child.output()
    runs: list[dict[str, Any]] = json.loads(text[text.index('{\n "runs"') :])["runs"]
    return runs


def test_each_member_has_a_wandb_run_of_its_own(folder: Path, tmp_path: Path) -> None:
    from helpers import wandb_history

    configs = {name: config for name, config in configs_of(folder, tmp_path / "runs", log_wandb=True).items() if name in ("bands", "two")}

    def action() -> None:
        list(train_configs([*configs.values()], gang=2))

    environ = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **{f"WANDB_{name}_DIR": str(tmp_path) for name in ("CONFIG", "CACHE", "DATA")}}
    child = Forked(action, tmp_path / "log", environ)
    assert child.wait() == 0, child.output()
    for run in runs_of([*configs.values()]):
        (file,) = run.folder.glob("wandb/offline-run-*/*.wandb")
        of_run, history = wandb_history(file)
        assert of_run.run_id == run.id
        assert list(history) == list(range(1, run.config.epochs * STEPS + 1))
