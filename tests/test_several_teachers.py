"""Several teachers at once: the loss is the weighted sum of each one's own, from one pass of one student; one alone changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import SWIN_ARGS, TINY_VIT, assert_same_state, make_shards, make_teacher_dir, save_local_dir, state_of, tiny_model

import pipelines.training.checkpoints
from cli.main import main
from kdcache import methods
from kdcache.cache import Cache
from kdcache.checkpoint import save_checkpoint
from kdcache.errors import MissingError, StudentError, UsageError
from kdcache.join import CachedViews, to_device
from kdcache.methods.base import Method
from kdcache.opening import open_cache
from kdcache.student_features import StudentFeatures
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train

STUDENT_ARGS: dict[str, Any] = {"patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}
BOTH = ("swin", "vit.tiny")
WEIGHTS = {"swin": 0.7, "vit.tiny": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 8 images and cache/ of four teachers: a Swin and a ViT with tails and 2 views, the ViT's twin, and one of 7 classes, with 1."""
    folder = tmp_path_factory.mktemp("several")
    make_shards(folder / "shards", num_shards=1, num_samples=8)
    swin = save_local_dir(tiny_model("swin_tiny_patch4_window7_224", **SWIN_ARGS), folder / "swin", SWIN_ARGS)
    vit = make_teacher_dir(folder / "vit", seed=1, img_size=64, depth=4)
    few = make_teacher_dir(folder / "few", seed=2, img_size=64, num_classes=7)
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("swin", swin, {"targets": ("logits", "features@norm:fp16"), "methods": ("scalekd",), "views": 2}),
        ("vit.tiny", vit, {"targets": ("logits", "features@norm:dct", "features@blocks.1"), "methods": ("scalekd",), "views": 2}),
        ("twin", vit, {"targets": ("logits",), "views": 1}),
        ("few", few, {"targets": ("logits", "features@norm"), "views": 1}),
    ]
    for name, teacher, options in wanted:
        extract(ExtractConfig(shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=teacher, name=name, workers=0, **options))
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Any:
    def make(**overrides: Any) -> TrainConfig:
        options = {
            "cache": str(folder / "cache"), "students": (TINY_VIT,), "model_kwargs": STUDENT_ARGS, "out": str(tmp_path / "runs"), "teacher": BOTH,
            "epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**{**options, **overrides})

    return make


def build(name: str, cache: Cache, teacher: Any, **settings: Any) -> Method[Any]:
    torch.manual_seed(0)
    student = tiny_model(TINY_VIT, **STUDENT_ARGS, img_size=cache.plan.size, num_classes=10)
    return methods.build(name, student=student, cache=cache, teacher=teacher, settings=settings)


def batch_of(cache: Cache, method: Method[Any], teacher: str | None = None) -> Any:
    """Six rows as the training loop has them: noise for images, labels, decoded targets, of several teachers or of `teacher`."""
    names = method.target_names
    batch = CachedViews(cache, teacher=teacher, targets=names, parts=method.target_parts()).__getitems__([(row, 0) for row in (6, 1, 4, 0, 7, 2)])
    of = {key: key.split("/") if "/" in key else (teacher, key) for key in names}
    targets = {key: cache.encoding(*of[key]).decode(to_device(batch["targets"][key], torch.device("cpu"))) for key in names}
    size = cache.plan.size
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(3)), batch["labels"], targets


def gradients(method: Method[Any], parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    method.zero_grad()
    torch.stack(list(parts.values())).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in method.student.named_parameters() if parameter.grad is not None}


# --- the loss ---


@pytest.mark.parametrize(
    ("name", "common", "own"),
    [
        ("kd", {"temperature": 3.0, "smoothing": 0.2}, {"vit.tiny/temperature": 1.5}),
        ("nkd", {"task_loss_weight": 0.5}, {"swin/distill_loss_weight": 2.0}),
        ("mimic", {"distill_loss_weight": 2.0}, {"vit.tiny/node": "blocks.1"}),
        ("frequency", {"bands": "low"}, {"swin/bands": "low,high"}),
        ("scalekd", {}, {"vit.tiny/alpha_s3": [0.02, 0.0], "vit.tiny/kd_alpha": 0.25}),
        ("kd+mgd", {"temperature": 2.0, "distill_loss_weight": 0.5}, {"swin/kd.temperature": 3.0, "vit.tiny/mgd.alpha": 1e-4}),
    ],
)
def test_the_loss_and_its_gradient_are_the_weighted_sum_of_each_teachers_own(name: str, common: Any, own: Any, cache: Cache) -> None:
    method = build(name, cache, WEIGHTS, **common, **own).eval()  # a whole pass without dropout, BatchNorm with its own statistics
    calls: list[int] = []
    method.student.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    images, labels, targets = batch_of(cache, method)
    expected: dict[str, torch.Tensor] = {}
    tasks: dict[str, torch.Tensor] = {}
    for number, (teacher, weight) in enumerate(WEIGHTS.items()):
        mine = {key.partition("/")[2]: value for key, value in own.items() if key.startswith(f"{teacher}/")}
        settings = {**{key: value for key, value in common.items() if f"kd.{key}" not in mine}, **mine}
        alone = methods.build(name, student=method.student, cache=cache, teacher=teacher, settings=settings).eval()
        lacking = alone.load_state_dict(method.terms[number].state_dict(), strict=False)  # the student is the same one
        assert not lacking.unexpected_keys
        assert all(key.startswith("student.") for key in lacking.missing_keys)
        parts = alone(*batch_of(cache, alone, teacher))
        tasks[teacher] = parts.pop("task")
        expected |= {f"{teacher}/{key}": weight * value for key, value in parts.items()}
    expected["task"] = sum(WEIGHTS[teacher] * task for teacher, task in tasks.items()) / sum(WEIGHTS.values())
    calls.clear()
    found = method(images, labels, targets)
    assert len(calls) == 1
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(method, found), gradients(method, expected), rtol=1e-4, atol=1e-6)
    names = [parameter for parameter, _ in method.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(parameter) for parameter in method.parameters()})
    assert {key for key in method.state_dict() if "student" in key} == {f"student.{key}" for key in method.student.state_dict()}


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "wsld"])
def test_two_equal_teachers_are_one(name: str, cache: Cache) -> None:
    one, two = build(name, cache, "vit.tiny"), build(name, cache, ["twin", "vit.tiny"])
    expected, found = one(*batch_of(cache, one, "vit.tiny")), two(*batch_of(cache, two))
    torch.testing.assert_close(found["task"], expected["task"])
    torch.testing.assert_close(sum(found.values()), sum(expected.values()))
    torch.testing.assert_close(gradients(two, found), gradients(one, expected))


def test_every_module_of_every_teacher_learns_and_nothing_else_is_there(cache: Cache) -> None:
    method = build("scalekd", cache, WEIGHTS)
    parts = method(*batch_of(cache, method))
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    moved = method.to(torch.float64)
    assert {parameter.dtype for part in moved.terms for parameter in part.tail.parameters()} == {torch.float64}
    assert isinstance(method.features, StudentFeatures)
    assert "student.pos_embed" in method.no_weight_decay()


def test_what_each_teachers_method_keeps_from_decay_is_kept_from_it(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.METHODS["mimic"], "no_weight_decay", lambda self: Method.no_weight_decay(self) | {"adapter.weight"})
    method = build("mimic", cache, WEIGHTS)
    own = {f"terms.{number}.adapter.weight" for number in range(len(WEIGHTS))}
    assert own <= {*dict(method.named_parameters())} and len(own) > 1
    assert method.no_weight_decay() == {*Method.no_weight_decay(method), *own}


def test_one_teacher_in_any_spelling_is_what_it_was(cache: Cache, config: Any) -> None:
    for teacher in ("vit.tiny", ["vit.tiny"], {"vit.tiny": 1}):
        method = build("kd", cache, teacher, **{"temperature": 1.0, "vit.tiny/temperature": 2.0})
        assert (type(method), method.target_names, method.settings.temperature) == (methods.METHODS["kd"], ("logits",), 2.0)
    runs = [train(config(teacher=teacher, epochs=1))[0] for teacher in ("vit.tiny", ("vit.tiny",), {"vit.tiny": 1.0})]
    assert [run["status"] for run in runs] == ["done", "already done", "already done"]
    recipe = state_of(runs[0])["recipe"]
    assert "teachers" not in recipe
    assert recipe["settings"] == {"temperature": 4.0, "smoothing": 0.1}
    assert recipe["data"]["teacher"] == cache.layer("vit.tiny").document.identity_digest
    assert list(recipe["data"]["targets"]) == ["logits"]


# --- what is read ---


def test_a_batch_holds_the_targets_of_every_teacher_for_the_same_rows(cache: Cache) -> None:
    items = [(5, 1), (0, 0), (3, 1)]
    names = ["swin/features@norm", "swin/logits", "vit.tiny/features@norm"]
    batch = CachedViews(cache, targets=names, parts={"vit.tiny/features@norm": ("low", "high")}).__getitems__(items)
    assert list(batch["targets"]) == names
    of_swin = CachedViews(cache, teacher="swin", targets=("features@norm", "logits")).__getitems__(items)
    of_vit = CachedViews(cache, teacher="vit.tiny", targets=("features@norm",), parts={"features@norm": ("low", "high")}).__getitems__(items)
    expected = {f"swin/{name}": value for name, value in of_swin["targets"].items()} | {"vit.tiny/features@norm": of_vit["targets"]["features@norm"]}
    torch.testing.assert_close(batch["targets"], expected, rtol=0, atol=0)
    torch.testing.assert_close(batch["views"], of_swin["views"], rtol=0, atol=0)
    with pytest.raises(MissingError, match=r"teacher 'swin' has no target 'features@layers.2'"):
        CachedViews(cache, targets=["swin/features@layers.2"])


# --- a run ---


def test_a_run_records_its_teachers_and_their_order_does_not_matter(config: Any, folder: Path, cache: Cache) -> None:
    (run,) = train(config(teacher={"vit.tiny": 0.3, "swin": 0.7}, method="scalekd"))
    path = Path(run["path"])
    columns = (path / "summary.csv").read_text().splitlines()[0].split(",")
    assert columns[2:4] == ["train_swin/s3_spatial", "train_swin/s4_spatial"]
    assert "train_vit.tiny/s4_frequency" in columns
    args = yaml.safe_load((path / "args.yaml").read_text())
    assert args["teachers"] == {"swin": 0.7, "vit.tiny": 0.3}
    assert set(args["data"]["targets"]) == {"swin/features@norm", "swin/logits", "vit.tiny/features@norm", "vit.tiny/logits"}
    record = json.loads((path / "export" / "config.json").read_text())["kdcache"]
    expected = [(name, cache.layer(name).document.identity.model, cache.layer(name).document.identity.weights) for name in BOTH]
    assert [(one["name"], one["model"], one["weights"]) for one in record["teachers"]] == expected
    card = (path / "export" / "README.md").read_text()
    assert all(f"`{model}` (weights {weights})" in card for _, model, weights in expected)
    assert timm.create_model(f"local-dir:{path / 'export'}", pretrained=True).num_classes == 10
    arguments = [
        "train",
        str(folder / "cache"),
        "--student",
        TINY_VIT,
        "--out",
        str(path.parent),
        "--method",
        "scalekd",
        "--epochs",
        "2",
        "-b",
        "4",
        "-j",
        "0",
    ]
    for key, value in STUDENT_ARGS.items():
        arguments += ["--model-kwargs", f"{key}={value}"]
    outcome = CliRunner().invoke(main, [*arguments, "--json", "--device", "cpu", "--teacher", "swin=0.7", "--teacher", "vit.tiny=0.3"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["runs"] == [{**run, "status": "already done"}]
    assert CliRunner().invoke(main, [*arguments, "--teacher", "swin=0.7", "--teacher", "vit.tiny"]).exit_code == 2


def test_a_run_of_two_teachers_that_was_killed_resumes_to_the_same_bits(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "kd+mgd", "epochs": 3, "clip_grad": 1.0}  # mgd draws its masks, for each teacher by a generator of its own
    (expected,) = train(config(**options, out=str(tmp_path / "whole")))

    def save_then_die(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        save_checkpoint(path, state, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(config(**options))
    for teacher in ({"swin": 0.6, "vit.tiny": 0.4}, "swin"):
        with pytest.raises(StudentError, match=r"field 'teachers.* differs: .*; give --teacher as that run was given to continue it"):
            train(config(**options, teacher=teacher, resume=True))
    torch.manual_seed(999)
    (found,) = train(config(**options, teacher=BOTH[::-1], resume=True))
    assert (found["id"], found["status"]) == (expected["id"], "done")
    assert_same_state(state_of(found), state_of(expected))
    for file in ("summary.csv", "export/model.safetensors", "export/config.json"):
        assert Path(found["path"], file).read_bytes() == Path(expected["path"], file).read_bytes(), file


def test_only_views_that_every_teacher_has_are_trained_on(config: Any) -> None:
    (run,) = train(config(teacher=("swin", "twin"), epochs=1))
    assert state_of(run)["recipe"]["data"]["views"] == 1
    with pytest.raises(MissingError, match="--views 2: the cache has 1 view of all that is trained on"):
        train(config(teacher=("swin", "twin"), views=2))


def test_teachers_of_other_classes_teach_by_features_but_not_by_logits(config: Any) -> None:
    with pytest.raises(UsageError, match=r"matches the logits of teachers that differ in their number of classes: 'few' has 7, 'swin' has 10"):
        train(config(teacher=("swin", "few")))
    assert train(config(teacher=("swin", "few"), method="mimic", epochs=1))[0]["status"] == "done"


def test_a_method_without_a_teacher_takes_any_choice_of_them(config: Any) -> None:
    method, field = "uskd", "alpha"
    runs = [train(config(teacher=teacher, method=method, epochs=1))[0] for teacher in (None, (), BOTH)]
    assert [run["status"] for run in runs] == ["done", "already done", "already done"]
    with pytest.raises(UsageError, match=f"method '{method}' needs nothing of a teacher; expected its settings without swin/"):
        train(config(method=method, settings={f"swin/{field}": 0.2}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"teacher": None},
            r"4 teachers \(few, swin, twin, vit.tiny\); pass --teacher NAME, or several that teach at once: --teacher few --teacher swin",
        ),
        ({"teacher": ("swin", "vat")}, "no teacher 'vat'; the cache has: few, swin, twin, vit.tiny"),
        ({"teacher": ("swin", "vat"), "method": "ce"}, "no teacher 'vat'"),
        ({"teacher": ("swin", "swin")}, "expected each name once"),
        ({"teacher": ("swin", "vit.tiny=0.3")}, "all of them with a weight or none"),
        ({"teacher": ("swin=0.1", "swin=0.3")}, "expected each name once"),
        ({"teacher": ("swin=a", "vit.tiny=1")}, "expected a number behind the '='"),
        ({"teacher": {"swin": 0, "twin": 1}}, "--teacher swin=0(.0)?: expected a weight above 0"),
        ({"teacher": {"swin": float("nan"), "twin": 1}}, "swin=nan: expected a weight above 0"),
        ({"teacher": {"swin": 0.5}}, "swin=0.5: one teacher alone has weight 1; expected several, or distill_loss_weight=0.5"),
        ({"settings": {"vit/temperature": 1}}, "setting 'vit/temperature': 'vit' is no teacher of this run; expected one of swin, vit.tiny"),
        ({"settings": {"swin/smoothing": 0}}, "cross-entropy counts once; set smoothing without a teacher"),
        ({"settings": {"swin/temprature": 0}}, "no field 'temprature'; did you mean 'temperature'"),
        ({"settings": {"swin/temperature": 0}}, "temperature: .*greater than 0"),
        ({"method": "kd+mimic", "settings": {"swin/kd.smoothing": 0}}, "cross-entropy counts once in a sum"),
        ({"method": "vitkd"}, "needs a plain ViT for a teacher.*swin_tiny"),
        ({"num_classes": 3}, "--num-classes 3: teacher 'swin' has 10 classes"),
    ],
)
def test_a_choice_of_teachers_that_cannot_be_right_says_why(config: Any, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        train(config(**options))
    assert not (tmp_path / "runs").exists()


def test_a_target_that_one_of_the_teachers_lacks_is_named_with_the_line_that_adds_it(config: Any) -> None:
    with pytest.raises(MissingError, match=r"teacher 'twin' has no target 'features@norm', it has: logits; .*--name twin --target features@norm"):
        train(config(teacher=("swin", "twin"), method="mimic"))
