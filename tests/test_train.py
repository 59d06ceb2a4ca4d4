"""Stage two end to end on tiny real tars and tiny real timm models: no teacher, exact resume, loadable exports, clear errors."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import (
    CNN,
    CNN_ARGS,
    QUICK_STUDENT_ARGS,
    TINY_VIT,
    Forked,
    assert_same_state,
    make_cache,
    make_shard,
    make_shards,
    make_teacher_dir,
    make_train_folder,
    quick_config,
    run_python,
    state_of,
)

import pipelines.train
import pipelines.training.checkpoints
from cli.main import main
from kdcache.checkpoint import load_checkpoint, save_checkpoint
from kdcache.errors import CorruptError, DriftError, MismatchError, MissingError, ShardError, StoreError, StudentError, UsageError
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.images import decode_image
from kdcache.join import CachedViews
from kdcache.opening import open_cache
from kdcache.shards import ShardFiles, scan_shard
from kdcache.sources import resolve_shards
from kdcache.students import build_student
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train
from pipelines.training.loop import best_epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 2 shards × 6 images × 3 views, shards/ and val/."""
    return make_train_folder(tmp_path_factory.mktemp("train"))


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Any:
    """TrainConfig with defaults that are quick; keywords override."""
    return partial(quick_config, folder, tmp_path / "runs")


# --- what it trains, and with what ---


def test_a_run_writes_what_it_promises(config: Any, folder: Path) -> None:
    (run,) = train(config(val=str(folder / "val"), log_interval=1))
    path = Path(run["path"])
    assert run["id"] == path.name
    assert run["id"].startswith(f"{TINY_VIT}-kd-")
    assert (run["student"], run["method"], run["epochs"], run["status"]) == (TINY_VIT, "kd", 3, "done")
    assert sorted(child.name for child in path.iterdir()) == ["args.yaml", "best", "export", "last", "metrics.jsonl", "previous", "summary.csv"]
    with open(path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "train_distill", "train_task", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert run["top1"] == max(float(row["eval_top1"]) for row in rows)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line.get("step")) for line in lines] == [(epoch, step) for epoch in range(3) for step in (1, 2, 3, None)]
    assert lines[0]["lr"] == 1e-5  # that the first update was made with: where the warm-up begins
    args = yaml.safe_load((path / "args.yaml").read_text())
    assert args["id"] == run["id"]
    assert args["settings"] == {"temperature": 4.0, "smoothing": 0.1}
    assert args["data"]["fingerprint"] == open_cache(folder / "cache").fingerprint


def test_stage_two_never_builds_a_teacher(folder: Path, tmp_path: Path) -> None:
    code = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        assert name not in ("kdcache.teacher", "kdcache.commit", "kdcache.jobs"), f"stage two imported {name}"

sys.meta_path.insert(0, Forbid())
import timm
built, create = [], timm.create_model
timm.create_model = lambda name, **kwargs: built.append(name) or create(name, **kwargs)
from pipelines.train import TrainConfig, train

for method in ("kd", "ce"):
    train(TrainConfig(cache=sys.argv[1], out=sys.argv[2], val=sys.argv[3], students=("resnet18",), method=method, num_classes=10, epochs=1,
                      batch_size=4, workers=0, device="cpu", model_kwargs={"channels": [4, 4, 8, 8], "stem_width": 4}))
assert set(built) == {"resnet18"}, built
assert "kdcache.teacher" not in sys.modules
print("no teacher")
"""
    assert run_python(code, folder / "cache", tmp_path / "runs", folder / "val").stdout.strip() == "no teacher"


def test_training_needs_no_teacher_weights(folder: Path, tmp_path: Path, config: Any) -> None:
    moved = folder / "teacher"
    moved.rename(tmp_path / "teacher")
    try:
        assert train(config(epochs=1))[0]["status"] == "done"
    finally:
        (tmp_path / "teacher").rename(moved)


def test_epochs_replay_the_views_in_turn(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []

    read = CachedViews.__getitems__

    def spy(self: CachedViews, items: Any) -> Any:
        seen.append({item.view for item in items})
        return read(self, items)

    monkeypatch.setattr(CachedViews, "__getitems__", spy)
    train(config(epochs=4, batch_size=12))
    assert seen == [{0}, {1}, {2}, {0}]


def test_the_student_learns_what_the_teacher_says(config: Any) -> None:
    (run,) = train(
        config(epochs=60, batch_size=6, lr=5e-3, task_loss_weight=0.0, model_kwargs={**QUICK_STUDENT_ARGS, "drop_rate": 0, "drop_path_rate": 0})
    )
    history = state_of(run)["history"]
    assert history[-1]["train_distill"] < 0.2 * history[0]["train_distill"]


# --- the same result, whatever happens ---


def step_lines(run: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(run["path"], "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before last", "after last"])
def test_a_run_killed_in_any_epoch_and_resumed_equals_the_uninterrupted_one(
    config: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, moment: str
) -> None:
    options = {"val": str(folder / "val"), "clip_grad": 1.0, "log_interval": 1}
    (expected,) = train(config(**options, out=str(tmp_path / "whole")))

    def save_then_die(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        dying = path.parent.name == "last" and state["epoch"] == stop_after
        if not (dying and moment == "before last"):
            save_checkpoint(path, state, **kwargs)
        if dying:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(config(**options))
    torch.manual_seed(999)
    (found,) = train(config(**options, resume=True))
    assert found["id"] == expected["id"]
    assert (found["top1"], found["status"]) == (expected["top1"], "done")
    for name in ("last", "best"):
        assert_same_state(state_of(found, name), state_of(expected, name))
    for file in ("summary.csv", "export/model.safetensors", "export/config.json"):
        assert Path(found["path"], file).read_bytes() == Path(expected["path"], file).read_bytes(), file
    assert step_lines(found) == step_lines(expected)


def test_a_process_killed_by_the_system_resumes_to_the_same_bits(config: Any, folder: Path, tmp_path: Path) -> None:
    def killed() -> None:
        save = pipelines.training.checkpoints.save_checkpoint

        def save_then_die(path: Path, state: dict[str, Any], **options: Any) -> None:
            save(path, state, **options)
            if state["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        pipelines.training.checkpoints.save_checkpoint = save_then_die
        train(config())

    child = Forked(killed, tmp_path / "log")
    assert child.wait() == -signal.SIGKILL, child.output()
    (found,) = train(config(resume=True))
    (expected,) = train(config(out=str(tmp_path / "whole")))
    assert_same_state(state_of(found), state_of(expected))


@pytest.mark.parametrize("changed", [{"workers": 2}, {"log_interval": 1}, {"check_views": 0.0}])
def test_what_does_not_change_the_result_does_not_change_the_id(config: Any, tmp_path: Path, changed: dict[str, Any]) -> None:
    (first,) = train(config(epochs=2))
    (second,) = train(config(epochs=2, out=str(tmp_path / "again"), **changed))
    assert second["id"] == first["id"]
    assert_same_state(state_of(second), state_of(first))


def test_what_changes_the_result_changes_the_id(config: Any, folder: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"lr": 2e-3}, {"kd_temperature": 2.0}, {"method": "ce"}, {"batch_size": 3}, {"limit_shards": 1}]
    changes += [{"val": str(folder / "val")}, {"opt": "sgd"}, {"model_kwargs": {**QUICK_STUDENT_ARGS, "depth": 2}}]
    ids = [train(config(epochs=1, **change))[0]["id"] for change in changes]
    assert len(set(ids)) == len(ids)


def test_a_cache_that_grew_by_what_a_run_does_not_read_leaves_its_id_alone(tmp_path: Path, config: Any) -> None:
    cache = make_cache(tmp_path, num_shards=1, num_samples=4, views=1, targets=["logits"])
    (first,) = train(config(cache=str(cache), epochs=1))
    teacher = make_teacher_dir(tmp_path / "second", seed=5)
    extract(ExtractConfig(shards=str(tmp_path / "shards"), cache=str(cache), teacher=teacher, views=1, workers=0))
    (again,) = train(config(cache=str(cache), epochs=1, teacher="teacher"))
    assert (again["id"], again["status"]) == (first["id"], "already done")
    (other,) = train(config(cache=str(cache), epochs=1, teacher="second"))
    assert other["id"] != first["id"]


def test_a_finished_run_is_reported_and_left_alone(config: Any, folder: Path) -> None:
    (first,) = train(config(val=str(folder / "val")))
    before = {path: path.stat().st_mtime_ns for path in Path(first["path"]).rglob("*")}
    (second,) = train(config(val=str(folder / "val")))
    assert second == {**first, "status": "already done"}
    assert {path: path.stat().st_mtime_ns for path in Path(first["path"]).rglob("*")} == before


def test_a_finished_run_is_reported_without_its_checkpoints(config: Any, folder: Path) -> None:
    """They are most of a run's bytes, and of use to none but an unfinished one."""
    (first,) = train(config(val=str(folder / "val")))
    for name in ("last", "previous", "best"):
        shutil.rmtree(Path(first["path"], name))
    assert train(config(val=str(folder / "val"))) == [{**first, "status": "already done"}]
    Path(first["path"], "metrics.jsonl").unlink()
    with pytest.raises(CorruptError, match=r"last/checkpoint.pt: expected a checkpoint, found no file"):
        train(config(val=str(folder / "val")))


def test_an_unfinished_run_is_not_overwritten_without_resume(config: Any) -> None:
    (run,) = train(config(epochs=1))
    shutil.rmtree(Path(run["path"], "export"))
    with pytest.raises(StudentError, match="unfinished; pass --resume"):
        train(config(epochs=1))
    assert train(config(epochs=1, resume=True))[0]["status"] == "done"


def test_students_are_trained_one_after_another_as_if_alone(config: Any, tmp_path: Path) -> None:
    both = train(config(epochs=1, students=(CNN, "resnet34"), model_kwargs=CNN_ARGS))
    (alone,) = train(config(epochs=1, students=("resnet34",), model_kwargs=CNN_ARGS, out=str(tmp_path / "alone")))
    assert [run["student"] for run in both] == [CNN, "resnet34"]
    assert_same_state(state_of(both[1]), state_of(alone))


def test_a_second_student_that_cannot_be_built_fails_before_the_first_is_trained(config: Any, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="'resnet_no_such'"):
        train(config(students=(CNN, "resnet_no_such"), model_kwargs=CNN_ARGS))
    assert not (tmp_path / "runs").exists()


# --- a cache that grew, a run that was stopped ---


@pytest.fixture
def stopped(tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A config over a cache of 2 views, and the folder of its run, stopped after one epoch of three; then the cache grew to 3 views."""
    cache = make_cache(tmp_path / "grow", num_shards=1, num_samples=6, views=2, targets=["logits"])

    def make(**overrides: Any) -> TrainConfig:
        return config(cache=str(cache), **overrides)

    def save_then_die(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        save_checkpoint(path, state, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(make())
    (run,) = (tmp_path / "runs").iterdir()
    extract(
        ExtractConfig(
            shards=str(tmp_path / "grow" / "shards"),
            cache=str(cache),
            teacher=f"local-dir:{tmp_path / 'grow' / 'teacher'}",
            targets=("logits",),
            views=3,
            workers=0,
        )
    )
    return make, run


def test_resume_after_the_cache_grew_names_the_run_and_how_to_continue_it(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    make, run = stopped
    text = rf"no run .*, but {run} .* is unfinished: field 'data.views' differs: that run has 2, this command 3; pass --views 2 to continue it, or drop --resume"
    with pytest.raises(StudentError, match=text):
        train(make(resume=True))
    assert list((tmp_path / "runs").iterdir()) == [run]


def test_views_continues_a_run_of_a_cache_that_grew_to_the_same_bits(stopped: tuple[Any, Path], tmp_path: Path) -> None:
    make, run = stopped
    (found,) = train(make(resume=True, views=2))
    assert (found["path"], found["epochs"], found["status"]) == (str(run), 3, "done")
    (expected,) = train(make(views=2, out=str(tmp_path / "whole")))
    assert_same_state(state_of(found), state_of(expected))


def test_without_resume_another_run_begins_beside_the_unfinished_one(stopped: tuple[Any, Path]) -> None:
    make, run = stopped
    (other,) = train(make(epochs=1))
    assert Path(other["path"]) != run
    assert state_of(other)["recipe"]["data"]["views"] == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 2e-3}, r"field 'lr' differs: that run has 0.001, this command 0.002; pass --lr 0.001"),
        ({"kd_temperature": 2.0}, r"field 'settings.temperature' differs: that run has 4.0, this command 2.0; pass --set temperature=4.0"),
        ({"clip_grad": 1.0}, r"field 'clip_grad' differs: that run has None, this command 1.0; leave --clip-grad out"),
        ({"lr": 2e-3, "batch_size": 3}, r"field 'batch_size' \(and 1 more\) differs"),
    ],
)
def test_resume_with_another_setting_says_which(stopped: tuple[Any, Path], options: dict[str, Any], text: str) -> None:
    make, _ = stopped
    with pytest.raises(StudentError, match=text):
        train(make(resume=True, views=2, **options))


def test_more_views_than_there_are_is_an_error(config: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"--views 4: the cache has 3 views of all that is trained on"):
        train(config(views=4))


def test_the_best_epoch_is_the_first_of_equals_and_of_those_that_were_measured() -> None:
    assert best_epoch([{}, {"eval_top1": 3.0}, {}, {"eval_top1": 7.0}, {"eval_top1": 7.0}, {"eval_top1": 5.0}]) == 3


def test_an_evaluation_is_made_in_eval_mode_and_leaves_the_student_as_it_was(folder: Path) -> None:
    student = build_student(CNN, num_classes=10, view_size=32, model_args={**CNN_ARGS, "drop_rate": 0.5})
    dataset = EvaluationSet([scan_shard(source) for source in resolve_shards(str(folder / "val"))], student, crop_pct=None)
    images, labels = torch.stack([dataset[i][0] for i in range(10)]), torch.tensor([dataset[i][1] for i in range(10)])
    evaluator, model = Evaluator(dataset, batch_size=4, num_workers=0), student.model
    with torch.no_grad():
        logits = model.eval()(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        found = evaluator(model.train(training), torch.device("cpu"))
        assert model.training == training
        assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert (found.top1, found.images) == (10.0 * int((logits.argmax(1) == labels).sum()), 10)
        assert found.top5 == 10.0 * int((logits.topk(5).indices == labels[:, None]).sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with_worker = Evaluator(dataset, batch_size=4, num_workers=1)
    for _ in range(2):  # closed in between: it begins a new worker
        assert with_worker(model, torch.device("cpu")) == found
        with_worker.close()
    assert not multiprocessing.active_children()


# --- labels and classes ---


def test_images_without_labels_train_with_the_distillation_loss_alone(tmp_path: Path, config: Any) -> None:
    cache = make_cache(tmp_path, num_shards=1, num_samples=4, views=1, targets=["logits"], labels=False)
    assert train(config(cache=str(cache), epochs=1, task_loss_weight=0.0))[0]["status"] == "done"
    with pytest.raises(ShardError, match=r"shard train-0000: key 's0000' has no label \(4 of 4 rows have none\).*--task-loss-weight 0"):
        train(config(cache=str(cache), epochs=1))
    with pytest.raises(UsageError, match="no labels, so the number of classes is not known; pass --num-classes"):
        train(config(cache=str(cache), epochs=1, method="ce"))


def test_a_label_out_of_range_names_its_shard_and_key(tmp_path: Path, config: Any) -> None:
    cache = make_cache(tmp_path, num_shards=1, num_samples=4, num_classes=4, views=1, targets=["logits"])
    with pytest.raises(ShardError, match=r"shard train-0000: key 's0002' has label 2, the student has 2 classes \(0 to 1\)"):
        train(config(cache=str(cache), epochs=1, method="ce", num_classes=2))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError, match="--num-classes 2: teacher 'teacher' has 10 classes"):
        train(config(cache=str(cache), epochs=1, num_classes=2))
    (run,) = train(config(cache=str(cache), epochs=1, method="ce"))
    assert state_of(run)["recipe"]["num_classes"] == 4


def test_few_labels_leave_the_number_of_classes_alone(config: Any, folder: Path) -> None:
    (run,) = train(config(epochs=1, method="ce", limit_shards=1))
    recipe = state_of(run)["recipe"]
    assert recipe["num_classes"] == int(open_cache(folder / "cache").rows.label.max()) + 1
    assert list(recipe["data"]["shards"]) == ["train-0000"]


# --- validation ---


def test_images_that_cannot_be_read_are_left_out_of_validation_and_counted(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shard(tmp_path / "val" / "val-00.tar", num_samples=4, corrupt=[2])
    train(config(val=str(tmp_path / "val"), epochs=2))
    assert capsys.readouterr().err.count("--val: 1 image can't be read and is left out; first: shard val-00: key 's0002': damaged image") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [({"labels": False}, "has no label; --val needs"), ({"num_classes": 30, "seed": 20}, "has label 20, the student has 10")],
)
def test_validation_labels_that_cannot_be_right_are_named(config: Any, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    make_shard(tmp_path / "val" / "val-00.tar", **options)
    with pytest.raises(ShardError, match=f"shard val-00: key 's0000' {text}"):
        train(config(val=str(tmp_path / "val"), epochs=1))


def test_validation_can_be_rarer_than_epochs(config: Any, folder: Path) -> None:
    (run,) = train(config(val=str(folder / "val"), epochs=4, val_interval=3))
    with open(Path(run["path"], "summary.csv"), newline="") as file:
        assert [bool(row["eval_top1"]) for row in csv.DictReader(file)] == [False, False, True, True]


@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", None), ("squash", None), ("border", 0.7)])
def test_validation_sees_what_timms_transform_of_the_export_gives(
    config: Any, folder: Path, tmp_path: Path, crop_mode: str, crop_pct: float | None
) -> None:
    (first,) = train(config(epochs=1))
    body = json.loads(Path(first["path"], "export", "config.json").read_text())
    body["pretrained_cfg"] |= {"crop_mode": crop_mode, "crop_pct": 0.8}
    shutil.copytree(Path(first["path"], "export"), tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text(json.dumps(body))
    name = f"local-dir:{tmp_path / 'student'}"
    options: dict[str, Any] = {"students": (name,), "pretrained": True, "model_kwargs": {}, "val_crop_pct": crop_pct, "val": str(folder / "val")}
    (run,) = train(config(epochs=1, **options))
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{run['path']}/export", pretrained=True))
    )
    (index,) = (scan_shard(source) for source in resolve_shards(str(folder / "val")))
    seen = EvaluationSet([index], build_student(name, num_classes=10, view_size=32, pretrained=True), crop_pct=crop_pct)
    sample = index.samples[3]
    image = decode_image(ShardFiles().read(index.source, sample.key, sample.image_offset, sample.image_size))
    assert torch.equal(seen[3][0], transform(image))


# --- errors ---


@pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(config: Any) -> None:
    with pytest.raises(StudentError, match=r"loss is not finite in epoch \d, step \d of 3 .*smaller --lr"):
        train(config(lr=1e38, opt="sgd", warmup_epochs=0))


@pytest.mark.parametrize("val", [True, False])
def test_weights_that_the_last_update_ruined_are_not_exported(config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, val: bool) -> None:
    """The loss of a step is of the weights before it."""
    step, seen = torch.optim.AdamW.step, 0

    def ruin(self: Any, *arguments: Any) -> None:
        nonlocal seen
        seen += 1
        step(self, *arguments)
        if seen == 6:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    with pytest.raises(StudentError, match=r"weights are not finite after epoch 1; .*keeps its last checkpoint"):
        train(config(epochs=2, val=str(folder / "val") if val else None))
    (run,) = (Path(config().out)).iterdir()
    assert load_checkpoint(run / "last" / "checkpoint.pt")["epoch"] == 1
    assert not (run / "export").exists()


def test_a_folder_that_can_not_be_made_is_named(config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/.*: can't be made: Not a directory; pass --out"):
        train(config(out=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "kdd"}, "method 'kdd' is not known"),
        ({"settings": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"settings": {"temperature": 1.0}, "kd_temperature": 2.0}, "are the same field"),
        ({"method": "ce", "kd_temperature": 2.0}, "method 'ce' has no field 'temperature'"),
        ({"teacher": "other"}, "no teacher 'other'; the cache has: teacher"),
        ({"opt": "adamv"}, "no such optimizer; near ones: adam, radam"),
        ({"opt": "sgd", "opt_betas": (0.9, 0.99)}, "sgd has no betas"),
        ({"opt": "adahessian"}, "second derivatives"),
        ({"opt": "fusedadam"}, "--opt fusedadam: timm can't build it here"),
        ({"limit_shards": 3}, "the cache has 2 shards"),
        ({"views": 0}, "--views 0: expected at least 1"),
        ({"device": "warp"}, "device 'warp'"),
    ],
)
def test_a_request_that_cannot_be_right_leaves_no_folder(config: Any, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        train(config(**options))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"lr": float("nan")}, {"check_views": 2.0}, {"students": ()}, {"sched": "sine"}, {"batch_size": 0}]
)
def test_a_config_checks_itself(config: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-').removesuffix('s')}.*expected"):
        config(**options)


def test_a_cache_that_is_not_finished_is_not_trained_on_unless_asked(tmp_path: Path, config: Any) -> None:
    cache = make_cache(tmp_path, num_shards=2, num_samples=3, views=1, targets=["logits"])
    for layer in ("views", "teachers/teacher"):
        (record,) = (cache / layer).glob("train-0001.*.json")
        record.unlink()
    with pytest.raises(MissingError, match=r"1 of 2 shards are done, 'train-0001' is not.*--limit-shards 1"):
        train(config(cache=str(cache)))
    assert train(config(cache=str(cache), epochs=1, limit_shards=1))[0]["status"] == "done"


def test_an_empty_cache_suggests_extract_and_nothing_else(tmp_path: Path, config: Any) -> None:
    cache = make_cache(tmp_path, num_shards=1, num_samples=2, views=1, targets=["logits"])
    for layer in ("views", "teachers/teacher"):
        for record in (cache / layer).glob("train-*.json"):
            record.unlink()
    for options in ({}, {"limit_shards": 1}):
        with pytest.raises(MissingError, match=r"the cache is empty: .*kdcache extract") as caught:
            train(config(cache=str(cache), **options))
        assert "--limit-shards" not in str(caught.value)


def test_tars_that_moved_are_found_with_data(folder: Path, tmp_path: Path, config: Any) -> None:
    shutil.copytree(folder / "shards", tmp_path / "moved")
    (run,) = train(config(data=str(tmp_path / "moved"), epochs=1))
    (tmp_path / "moved" / "train-0001.tar").unlink()
    with pytest.raises(UsageError, match="shard train-0001: not given with --data, which has 1 tar"):
        train(config(data=str(tmp_path / "moved"), epochs=2))
    assert run["status"] == "done"


def test_other_images_under_the_same_names_are_not_trained_on(folder: Path, tmp_path: Path, config: Any) -> None:
    make_shards(tmp_path / "shards", num_shards=2, num_samples=6, size_wh=(60, 60))
    with pytest.raises((DriftError, ShardError), match=r"shard train-000[01]: key"):
        train(config(data=str(tmp_path / "shards"), epochs=1))


# --- checkpoints ---


def test_a_torn_changed_or_foreign_checkpoint_is_refused(config: Any, tmp_path: Path, folder: Path) -> None:
    (run,) = train(config(epochs=1))
    fingerprint = open_cache(folder / "cache").fingerprint
    path = Path(run["path"], "last", "checkpoint.pt")
    whole = path.read_bytes()
    assert load_checkpoint(path, fingerprint=fingerprint)["epoch"] == 1
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptError, match="checkpoint"):
            load_checkpoint(path, fingerprint=fingerprint)
    middle = bytearray(whole)
    place = whole.index(state_of_bytes(whole, tmp_path)["method"]["student.head.weight"].numpy().tobytes())
    middle[place + 3] ^= 1
    path.write_bytes(bytes(middle))
    with pytest.raises(CorruptError, match="fails its crc32"):
        load_checkpoint(path, fingerprint=fingerprint)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CorruptError, match="another file of torch"):
        load_checkpoint(path, fingerprint=fingerprint)
    path.unlink()
    with pytest.raises(CorruptError, match="found no file"):
        load_checkpoint(path, fingerprint=fingerprint)


def state_of_bytes(data: bytes, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "copy.pt").write_bytes(data)
    return torch.load(tmp_path / "copy.pt", weights_only=True)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["KDCACHE_TRAP"],)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_TRAP", str(tmp_path / "trapped"))
    torch.save({"format": "kdcache-checkpoint", "method": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CorruptError, match="can't be read as one"):
        load_checkpoint(tmp_path / "checkpoint.pt", fingerprint="0" * 32)
    assert not (tmp_path / "trapped").exists()


def test_a_checkpoint_of_another_cache_is_refused(config: Any) -> None:
    (run,) = train(config(epochs=1))
    with pytest.raises(MismatchError, match="field 'fingerprint' differs"):
        load_checkpoint(Path(run["path"], "last", "checkpoint.pt"), fingerprint="0" * 32)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last" / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1}, fingerprint="a", root="b")
    before = path.read_bytes()

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(Exception, match="No space left on device; the checkpoint before it is whole"):
        save_checkpoint(path, {"epoch": 2}, fingerprint="a", root="b")
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["checkpoint.pt"]


# --- the command ---


def test_the_command_prints_one_json_object_on_stdout(folder: Path, tmp_path: Path) -> None:
    arguments = ["train", str(folder / "cache"), "--student", TINY_VIT, "--out", str(tmp_path), "--epochs", "1", "-b", "4", "-j", "0", "--json"]
    for key, value in QUICK_STUDENT_ARGS.items():
        arguments += ["--model-kwargs", f"{key}={value}"]
    arguments += ["--set", "temperature=2", "--opt-betas", "0.9", "0.98", "--val", str(folder / "val"), "--lr", "1e-3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert set(run) == {"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}
    assert f"{run['top1']:.2f}" in result.stderr
    assert "img/s" in result.stderr
    recipe = state_of(run)["recipe"]
    assert (recipe["settings"]["temperature"], recipe["opt_betas"]) == (2.0, [0.9, 0.98])


def test_the_command_exits_2_for_usage_and_1_for_problems(folder: Path, tmp_path: Path) -> None:
    base = ["train", str(folder / "cache"), "--out", str(tmp_path), "--student"]
    assert CliRunner().invoke(main, [*base, TINY_VIT, "--method", "nope"]).exit_code == 2
    result = CliRunner().invoke(main, [*base, "no_such_model"])
    assert result.exit_code == 1
    assert "knows no such model" in result.output


def test_the_command_reports_finished_runs_when_a_later_one_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_second(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        if state["recipe"]["student"] == "resnet34" and state["epoch"] == 2:
            raise StudentError("no more")
        save_checkpoint(path, state, **kwargs)

    monkeypatch.setattr(pipelines.training.checkpoints, "save_checkpoint", break_second)
    arguments = ["train", str(folder / "cache"), "--out", str(tmp_path), "--epochs", "2", "-b", "4", "-j", "0", "--json"]
    for key, value in CNN_ARGS.items():
        arguments += ["--model-kwargs", f"{key}={value}"]
    result = CliRunner().invoke(main, [*arguments, "--student", CNN, "--student", "resnet34", "--student", "resnet26"])
    assert result.exit_code == 1
    assert "no more" in result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [(run["student"], run["status"]) for run in runs] == [(CNN, "done"), ("resnet34", "failed")]
    assert set(runs[0]) == {"id", "student", "method", "epochs", "top1", "seconds", "path", "status"}
    assert (set(runs[1]) - set(runs[0]), runs[1]["error"]) == ({"error"}, "no more")
    assert (Path(runs[1]["path"]) / "error.txt").read_text().startswith("StudentError: no more\n")
    assert Path(runs[0]["path"], "export").is_dir()
