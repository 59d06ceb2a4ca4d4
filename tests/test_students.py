"""Students: built for a cache's views from a seed, refused with a reason, exported so that timm loads them back to the bit."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import CNN, CNN_ARGS, QUICK_STUDENT_ARGS, TINY_VIT, Forked, make_train_folder, quick_config, state_of, where_files_end_at

from kdcache.checkpoint import load_checkpoint, save_checkpoint
from kdcache.errors import StudentError, UsageError
from kdcache.opening import open_cache
from kdcache.students import build_student
from pipelines.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 2 shards × 6 images × 3 views, shards/ and val/."""
    return make_train_folder(tmp_path_factory.mktemp("students"))


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Any:
    """TrainConfig with defaults that are quick; keywords override."""
    return partial(quick_config, folder, tmp_path / "runs")


# --- building ---


def test_students_get_views_at_their_own_size_and_as_many_classes_as_the_teacher() -> None:
    vit = build_student(TINY_VIT, num_classes=7, view_size=32, model_args={"embed_dim": 16, "depth": 1, "num_heads": 2})
    assert (vit.input_size, vit.model_args["img_size"], vit.model.num_classes) == (32, 32, 7)
    own = build_student(TINY_VIT, num_classes=7, view_size=32, model_args={"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 48})
    assert own.input_size == 48
    assert own.normalize()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 3, 48, 48)
    assert build_student(CNN, num_classes=7, view_size=32, model_args=CNN_ARGS).input_size == 32


def test_a_students_weights_are_a_function_of_its_seed() -> None:
    states = [build_student(CNN, num_classes=3, view_size=32, model_args=CNN_ARGS, seed=seed).model.state_dict() for seed in (1, 1, 2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "model_args", "error", "text"),
    [
        ("vit_tyni_patch16_224", {}, StudentError, "knows no such model; near ones: .*vit_tiny_patch16_224"),
        (CNN, {"nonsense": 1}, StudentError, "can't be built with"),
        (CNN, {"num_classes": 3}, UsageError, "pass --num-classes"),
        ("local-dir:/nowhere", {}, StudentError, "no /nowhere/config.json"),
    ],
)
def test_a_student_that_cannot_be_built_says_why(name: str, model_args: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build_student(name, num_classes=3, view_size=32, model_args=model_args)


def test_pretrained_weights_that_cannot_be_had_suggest_a_local_folder() -> None:
    with pytest.raises(StudentError, match=r"student 'resnet18': its pretrained weights can't be had.*local-dir:.* or leave --pretrained out$"):
        build_student("resnet18", num_classes=3, view_size=32, pretrained=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"students": (CNN, "efficientformer_l1")},
            r"'efficientformer_l1': can't be trained on images of 32 x 32 pixels, 4 a batch: .*choose a student",
        ),
        ({"students": (CNN,), "batch_size": 1}, r"'resnet18': can't be trained .*more than 1 value per channel.*or a larger --batch-size"),
    ],
)
def test_a_student_that_can_not_be_fed_fails_before_any_is_trained(config: Any, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(StudentError, match=text):
        train(config(model_kwargs={}, **options))
    assert not (tmp_path / "runs").exists()


# --- the export ---


@pytest.mark.parametrize(("student", "model_args"), [(TINY_VIT, QUICK_STUDENT_ARGS), (CNN, CNN_ARGS)])
@pytest.mark.parametrize("with_val", [True, False])
def test_timm_loads_the_export_and_gives_the_same_logits(config: Any, folder: Path, student: str, model_args: dict[str, Any], with_val: bool) -> None:
    (run,) = train(config(students=(student,), model_kwargs=model_args, val=str(folder / "val") if with_val else None))
    export = Path(run["path"], "export")
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    trained = build_student(student, num_classes=10, view_size=32, model_args=model_args).model.eval()
    state = state_of(run, "best" if with_val else "last")["method"]
    trained.load_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained(images), rtol=0, atol=0)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    body = json.loads((export / "config.json").read_text())["kdcache"]
    cache = open_cache(folder / "cache")
    assert (body["fingerprint"], body["root"], body["method"]) == (cache.fingerprint, cache.root, "kd")
    assert body["teacher"]["weights"] == cache.teachers["teacher"].document.identity.weights
    card = (export / "README.md").read_text()
    assert cache.fingerprint in card
    assert cache.root in card
    assert not list(Path(run["path"]).glob("*.tmp"))


def test_a_torn_best_checkpoint_gives_way_to_the_better_of_the_last_two(config: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"val": str(folder / "val"), "resume": True}
    (whole,) = train(config(**options))
    path = Path(whole["path"])
    shutil.rmtree(path / "export")
    for name, top1 in (("last", 20.0), ("previous", 30.0)):  # epochs 2 and 1; epoch 0 was the best
        state = load_checkpoint(path / name / "checkpoint.pt")
        for row, value in zip(state["history"], (90.0, 30.0, 20.0), strict=False):
            row["eval_top1"] = value
        assert state["history"][-1]["eval_top1"] == top1
        save_checkpoint(path / name / "checkpoint.pt", state, fingerprint=state["fingerprint"], root=state["root"])
    best = path / "best" / "checkpoint.pt"
    best.write_bytes(best.read_bytes()[:-30])
    (found,) = train(config(**options))
    assert found["top1"] == 30.0
    said = capsys.readouterr().err
    assert f"{best}: expected a checkpoint of kdcache" in said
    assert f"exporting {path / 'previous' / 'checkpoint.pt'} instead, after 2 epochs: top-1 30.00 %, the best was 90.00 %" in said
    assert "| epoch | 1 |" in (path / "export" / "README.md").read_text()
    exported = timm.create_model(f"local-dir:{path}/export", pretrained=True).state_dict()
    assert torch.equal(exported["head.weight"], state_of(found, "previous")["method"]["student.head.weight"])


def test_the_figures_of_an_export_are_of_its_weights(config: Any, folder: Path) -> None:
    """A device that repeats an epoch after a kill may get another top-1: best/ is then of an epoch that the history has otherwise."""
    (run,) = train(config(val=str(folder / "val")))
    shutil.rmtree(Path(run["path"], "export"))
    state = load_checkpoint(Path(run["path"], "best", "checkpoint.pt"))
    state["history"][-1] |= {"eval_top1": 73.5, "epoch": 0}
    save_checkpoint(Path(run["path"], "best", "checkpoint.pt"), state, fingerprint=state["fingerprint"], root=state["root"])
    (again,) = train(config(val=str(folder / "val"), resume=True))
    assert again["top1"] == 73.5
    assert "| eval_top1 | 73.5 |" in Path(run["path"], "export", "README.md").read_text()


def test_an_export_says_nothing_of_weights_that_it_does_not_hold(config: Any, tmp_path: Path) -> None:
    (first,) = train(config(epochs=1))
    path = Path(first["path"], "export", "config.json")
    body = json.loads(path.read_text())
    assert not {"tag", "license", "origin_url", "paper_ids"} & set(body["pretrained_cfg"])
    body["pretrained_cfg"] |= {"license": "mine", "tag": "pets"}
    body["label_names"] = [f"pet {number}" for number in range(10)]
    shutil.copytree(path.parent, tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text(json.dumps(body))
    for pretrained in (True, False):
        name = f"local-dir:{tmp_path / 'student'}"
        (run,) = train(config(epochs=1, students=(name,), pretrained=pretrained, model_kwargs={}))
        exported = json.loads(Path(run["path"], "export", "config.json").read_text())
        assert exported["pretrained_cfg"].get("license") == ("mine" if pretrained else None)
        assert "label_names" not in exported  # of the classes that it had before


def test_an_export_that_can_not_be_written_says_so_and_is_made_by_resume(config: Any, tmp_path: Path) -> None:
    (run,) = train(config(epochs=1))
    export = Path(run["path"], "export")
    weights = (export / "model.safetensors").read_bytes()
    shutil.rmtree(export)

    child = Forked(where_files_end_at(len(weights) // 2, lambda: train(config(epochs=1, resume=True))), tmp_path / "log")
    assert child.wait() == 3, child.output()
    assert f"{export}: can't be written: " in child.output()
    assert "run again with --resume" in child.output()
    assert not list(export.parent.glob("export*"))
    assert train(config(epochs=1, resume=True))[0]["status"] == "done"
    assert (export / "model.safetensors").read_bytes() == weights


def test_an_export_can_be_a_student(config: Any) -> None:
    (run,) = train(config(epochs=1))
    (again,) = train(config(epochs=1, students=(f"local-dir:{run['path']}/export",), pretrained=True, model_kwargs={}))
    assert again["id"].startswith("export-kd-")
