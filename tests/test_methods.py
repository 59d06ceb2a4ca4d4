"""Methods: the registry, settings and sums, what they ask of a cache, and that each one trains on a real cache."""

from __future__ import annotations

import copy
import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from helpers import TINY_VIT, TINY_VIT_ARGS, make_cache, make_shards, make_teacher_dir, tiny_model
from safetensors import safe_open

import pipelines.training.recipes
from cli.main import main
from kdcache import methods
from kdcache.cache import Cache
from kdcache.errors import MissingError, StudentError, TeacherError, UsageError
from kdcache.losses import kd, nkd
from kdcache.methods.base import Method, loss_weights
from kdcache.nodes import resolve_node
from kdcache.opening import open_cache
from kdcache.targets import merge_wishes, parse_target
from kdcache.teacher import load_teacher
from kdcache.teacher_card import ANY_TEACHER, TeacherCard, card_of_layer
from pipelines.extract import ExtractConfig, extract
from pipelines.extraction.request import requested_specs
from pipelines.quickstart import TEACHER_ARGS, TEACHER_MODEL
from pipelines.train import TrainConfig, train

ALL = [*methods.METHODS, "nkd+vitkd", "kd+mimic+frequency"]
TARGETS = ("logits", "features@blocks.0:fp16", "features@blocks.1:fp16", "features@norm:fp16")
STUDENT_ARGS: dict[str, Any] = {"patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
"""Another width, depth and grid than the teacher's, and a cls token, which that lacks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache/ of 1 shard × 8 images × 2 views with all that the methods need, shards/ and teacher/: the quickstart's, trained on their labels."""
    folder = tmp_path_factory.mktemp("methods")
    labels_only = make_cache(folder / "labels", num_shards=1, num_samples=8, views=2)
    arguments = {name: value for name, value in TEACHER_ARGS.items() if name not in ("img_size", "num_classes")}
    config = TrainConfig(
        cache=str(labels_only), students=(TEACHER_MODEL,), method="ce", settings={"smoothing": 0.0}, model_kwargs=arguments, num_classes=10,
        out=str(folder / "runs"), epochs=25, batch_size=8, lr=3e-3, workers=0, device="cpu",
    )  # fmt: skip
    (run,) = train(config)
    Path(run["path"], "export").rename(folder / "teacher")
    (folder / "labels" / "shards").rename(folder / "shards")
    teacher = f"local-dir:{folder / 'teacher'}"
    config = ExtractConfig(
        shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=teacher, targets=TARGETS, methods=("scalekd",), views=2, workers=0
    )
    extract(config)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


def batch(cache: Cache, *, seed: int = 0, soft: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    """Images, labels and targets of the shapes that the cache holds, 4 rows."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    targets: dict[str, dict[str, torch.Tensor]] = {"logits": {"logits": torch.randn(4, 10, generator=generator)}}
    for name in ("features@blocks.0", "features@blocks.1", "features@norm"):
        targets[name] = {"grid": torch.randn(4, 64, 64, generator=generator)}
    labels = torch.tensor([0, 1, 2, 9])
    return images, 0.7 * F.one_hot(labels, 10).float() + 0.03 if soft else labels, targets


def build(name: str, cache: Cache, *, seed: int = 0, **settings: Any) -> Method[Any]:
    torch.manual_seed(seed)
    return methods.build(name, student=tiny_model(**TINY_VIT_ARGS | STUDENT_ARGS), cache=cache, settings=settings)


# --- every method ---


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_method_gives_finite_parts_and_a_gradient_to_all_it_trains(name: str, soft: bool, cache: Cache) -> None:
    method = build(name, cache)
    assert methods.method_class(name).name == name
    assert method.summary
    parts = method(*batch(cache, soft=soft))
    assert all(part.ndim == 0 and part.isfinite() for part in parts.values())
    assert list(parts)[-1] == "task"
    torch.stack(list(parts.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    names = [parameter for parameter, _ in method.named_parameters(remove_duplicate=False)]
    assert len(names) == len({*names}) == len({id(parameter) for parameter in method.parameters()})
    assert {name for name in method.state_dict() if "student" in name} == {f"student.{name}" for name in method.student.state_dict()}


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_near_itself_under_bfloat16_autocast(name: str, cache: Cache) -> None:
    method = build(name, cache)
    again = copy.deepcopy(method)  # the same noise
    images, labels, targets = batch(cache)
    expected = method(images, labels, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = again(images, labels, targets)
    torch.stack(list(found.values())).sum().backward()
    for part, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[part], rtol=0.05, atol=0.02)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in again.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_on_a_real_cache_and_lowers_its_own_loss(name: str, folder: Path, tmp_path: Path) -> None:
    weights = {} if name == "ce" else {"distill_loss_weight": 1.0, "task_loss_weight": 0.0}  # a random teacher and the labels want different things
    config = TrainConfig(
        cache=str(folder / "cache"), students=(TINY_VIT,), method=name, settings=weights, model_kwargs=STUDENT_ARGS, num_classes=10, out=str(tmp_path),
        epochs=12, batch_size=8, lr=3e-3, warmup_epochs=1, workers=0, device="cpu", views=1,
    )  # fmt: skip
    (run,) = train(config)
    with open(Path(run["path"], "summary.csv"), newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.03 * abs(losses[0])
    exported = timm.create_model(f"local-dir:{Path(run['path'], 'export')}", pretrained=True)
    with safe_open(Path(run["path"], "export", "model.safetensors"), "pt") as file:
        assert {*file.keys()} == {*exported.state_dict()}


# --- weights, labels ---


def test_kd_is_the_weighted_sum_of_both_losses(cache: Cache) -> None:
    images, labels, targets = batch(cache)
    method = build("kd", cache, temperature=2.0, distill_loss_weight=0.3, task_loss_weight=0.6, smoothing=0.0)
    parts = method(images, labels, targets)
    logits = method.student(images)
    torch.testing.assert_close(parts["distill"], 0.3 * kd(logits, targets["logits"]["logits"], temperature=2.0))
    torch.testing.assert_close(parts["task"], 0.6 * F.cross_entropy(logits, labels))


def test_a_method_without_a_task_loss_looks_at_labels_only_if_its_own_loss_does(cache: Cache) -> None:
    uses = {
        name: methods.method_class(name).needs_labels_with(methods.parse_settings(name, {"task_loss_weight": 0.0})) for name in ALL if name != "ce"
    }
    assert {name for name, value in uses.items() if value} == {"dkd", "nkd", "wsld", "uskd", "nkd+vitkd"}
    assert all(methods.method_class(name).needs_labels_with(methods.parse_settings(name)) for name in ALL)
    images, labels, targets = batch(cache)
    for name in (name for name, value in uses.items() if not value):
        assert "task" not in build(name, cache, task_loss_weight=0.0)(images, torch.full_like(labels, -1), targets)


def test_weights_follow_timms_rule() -> None:
    assert loss_weights(distill=None, task=None) == (1.0, 1.0)
    assert loss_weights(distill=2.0, task=0.5) == (2.0, 0.5)
    assert loss_weights(distill=2.0, task=None) == (2.0, 1.0)
    assert loss_weights(distill=None, task=0.25) == (0.75, 0.25)


# --- sums ---


def test_a_sum_is_the_sum_of_its_parts_with_the_labels_once_in_one_pass(cache: Cache) -> None:
    images, labels, targets = batch(cache)
    settings = {
        "gamma": 0.5,
        "vitkd.alpha": 2e-4,
        "vitkd.distill_loss_weight": 3.0,
        "smoothing": 0.2,
        "distill_loss_weight": 0.25,
        "task_loss_weight": 0.5,
    }
    method = build("nkd+vitkd", cache, **settings)
    calls = []
    method.student.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    vitkd = copy.deepcopy(method.terms["vitkd"])  # with its noise
    parts = method(images, labels, targets)
    assert len(calls) == 1
    assert list(parts) == ["nkd_distill", "vitkd_shallow", "vitkd_deep", "task"]
    logits = method.student(images)
    torch.testing.assert_close(parts["nkd_distill"], 0.25 * nkd(logits, targets["logits"]["logits"], labels, gamma=0.5, temperature=1.0))
    torch.testing.assert_close(parts["task"], 0.5 * F.cross_entropy(logits, labels, label_smoothing=0.2))
    alone = vitkd.losses(method.run_student(images), labels, targets)
    assert vitkd.settings.alpha == 2e-4
    torch.testing.assert_close(parts["vitkd_shallow"], 0.25 * 3.0 * alone["shallow"])
    torch.testing.assert_close(parts["vitkd_deep"], 0.25 * 3.0 * alone["deep"])
    resumed = methods.parse_settings("nkd+vitkd", method.settings.to_json())
    assert resumed == method.settings


def test_a_sum_leaves_without_weight_decay_what_its_parts_do(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    mimic = methods.METHODS["mimic"]
    monkeypatch.setattr(mimic, "no_weight_decay", lambda self: Method.no_weight_decay(self) | {"adapter.weight"})
    method = build("kd+mimic", cache)
    assert "terms.mimic.adapter.weight" in dict(method.named_parameters())
    assert method.no_weight_decay() == {*Method.no_weight_decay(method), "terms.mimic.adapter.weight"}


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("kd", {"temprature": 2}, "no field 'temprature'; did you mean 'temperature'.*its fields: temperature, distill_loss_weight"),
        ("kd", {"temperature": 0}, "temperature: .*greater than 0"),
        ("kd", {"temperature": float("nan")}, "temperature: .*finite"),
        ("kd", {"temperature": "warm"}, "temperature: .*'warm'"),
        ("kd", {"task_loss_weight": 1.5}, "task loss weight 1.5 alone"),
        ("frequency", {"bands": "dc,bass"}, r"bands.1: .*found 'bass'"),  # as --set gives it
        ("frequency", {"bands": []}, "bands: .*at least 1"),
        ("frequency", {"bands": ["bass"]}, r"bands.0: .*'dc', 'low', 'mid' or 'high'"),
        ("vitkd", {"mask_ratio": 0}, "mask_ratio: .*greater than 0"),
        ("nkd+vitkd", {"vitkd.alfa": 1}, r"no field 'vitkd.alfa'; did you mean 'alpha'\?; its fields: vitkd.alpha, vitkd.beta"),
        ("nkd+vitkd", {"vitkd.alfa": 1}, "distill_loss_weight$"),  # no field of the whole is said to be the part's
        ("nkd+vitkd", {"alfa": 1}, "no field 'alfa'"),
        ("nkd+vitkd", {"nkd": 3, "nkd.gamma": 1}, "nkd.gamma is given twice"),
        ("nkd+vitkd", {"nkd": {1: 2}}, "no field 'nkd.1'"),
        ("nkd+vitkd", {"nkd.smoothing": 0.2}, "cross-entropy counts once in a sum; set smoothing without a part"),
        ("nkd+vitkd", {"vitkd.alpha": 1, "alpha": 2}, "vitkd.alpha is given twice"),
        ("nkd+vitkd", {"vitkd.beta": -1}, "vitkd.beta: .*greater than or equal to 0"),
        ("nkd+kd", {"temperature": 2}, "'temperature' is a field of nkd and of kd; say nkd.temperature or kd.temperature"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_names_the_field(name: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        methods.parse_settings(name, settings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kdd", r"'kdd' is not known; did you mean 'kd'.*one of: ce, kd, .*; a sum of them such as nkd\+vitkd; or package.module:Class"),
        ("nkd+", "'' is not known"),
        ("nkd+nkd", "'nkd' is in it twice"),
        ("ce+nkd", "every method has the labels' cross-entropy already; leave 'ce' out"),
        ("no_such_module:Kd", "no module 'no_such_module' can be imported; .*PYTHONPATH"),
        ("kdcache.methods.kd:Kd", "module kdcache.methods.kd has no class 'Kd' that derives from"),
        ("kdcache.methods.kd:KDSettings", "no class 'KDSettings' that derives from"),
        (":KD", "'' is no module name"),
        (".kd:KD", "'.kd' is no module name"),
        ("kdcache.methods:Method", "class Method does not say its Settings, losses, name, paper, requires, summary"),
    ],
)
def test_an_unknown_method_is_a_usage_error(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        methods.method_class(name)


def test_the_hint_for_a_run_to_be_resumed_names_the_part(cache: Cache) -> None:
    ours, theirs = ({"settings": methods.parse_settings("nkd+vitkd", {"gamma": gamma}).to_json()} for gamma in (1.0, 2.0))
    ((field, value, _),) = pipelines.training.recipes.differences(theirs, ours)
    assert pipelines.training.recipes.how_to_continue(field, value) == "pass --set nkd.gamma=2.0 to continue it"


# --- what they ask of the cache ---


class LastBlock(methods.METHODS["mimic"]):
    """A method whose needs depend on the teacher."""

    name: ClassVar[str] = "last_block"

    @classmethod
    def requires(cls, settings: Any, teacher: TeacherCard) -> Sequence[str]:
        return ["features@blocks.-1"]


def test_a_node_counted_from_the_end_is_that_of_the_teacher_in_extract_and_in_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "last_block", LastBlock)
    methods.method_class.cache_clear()
    path = make_cache(tmp_path, num_shards=1, num_samples=2, views=1, targets=["features@blocks.1"])
    method = methods.build("last_block", student=tiny_model(**TINY_VIT_ARGS), cache=open_cache(path))  # recorded under another spelling
    assert method.target_names == ("features@blocks.1",)
    other = tmp_path / "other"
    extract(
        ExtractConfig(shards=str(tmp_path / "shards"), cache=str(other), teacher=f"local-dir:{tmp_path / 'teacher'}", methods=["last_block"], views=1)
    )
    assert list(open_cache(other).layer(None).targets) == ["features@blocks.1"]
    both = methods.build("mimic+last_block", student=tiny_model(**TINY_VIT_ARGS), cache=open_cache(path), settings={"mimic.node": "blocks.1"})
    assert both.target_names == ("features@blocks.1",)  # read once
    methods.method_class.cache_clear()


def test_extract_for_a_method_records_exactly_what_it_needs(tmp_path: Path, folder: Path) -> None:
    def run(**options: Any) -> Any:
        teacher = f"local-dir:{folder / 'teacher'}"
        return extract(ExtractConfig(shards=str(folder / "shards"), cache=str(tmp_path / "cache"), teacher=teacher, views=1, workers=0, **options))

    run(methods=["vitkd"])
    vitkd = ["features@blocks.0", "features@blocks.1", "features@norm"]
    assert sorted(open_cache(tmp_path / "cache").layer(None).targets) == vitkd
    assert run(methods=["vitkd"]).resumed_shards == 1
    run(methods=["frequency", "nkd+vitkd"])  # the node is there, in an encoding of its own
    targets = open_cache(tmp_path / "cache").layer(None).targets
    assert sorted(targets) == [*vitkd, "logits"]
    assert targets["features@norm"].identity.encoding == "int8"
    with pytest.raises(UsageError, match="'vitdk' is not known; did you mean 'vitkd'"):
        run(methods=["vitdk"])
    with pytest.raises(UsageError, match="--for ce --for uskd: needs nothing of a teacher"):
        run(methods=["ce", "uskd"])


def test_train_names_what_the_cache_lacks_and_the_line_that_adds_it(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=1, num_samples=4)
    teacher = make_teacher_dir(tmp_path / "teacher")
    make_teacher_dir(tmp_path / "other", seed=1)
    path, weights = tmp_path / "cache", str(tmp_path / "other" / "model.safetensors")
    extract(
        ExtractConfig(
            shards=str(tmp_path / "shards"), cache=str(path), teacher=teacher, checkpoint=weights, targets=["features@norm"], views=1, workers=0
        )
    )
    with pytest.raises(MissingError, match=r"no targets 'logits', 'features@blocks.0', 'features@blocks.1', it has: features@norm") as caught:
        train(TrainConfig(cache=str(path), students=("resnet18",), method="nkd+vitkd"))
    line = re.search(r"run '(kdcache extract .*)' to add them", str(caught.value))
    assert line is not None
    outcome = CliRunner().invoke(main, shlex.split(line[1])[1:])
    assert outcome.exit_code == 0, outcome.output
    config = TrainConfig(
        cache=str(path), students=(TINY_VIT,), method="nkd+vitkd", model_kwargs=STUDENT_ARGS, out=str(tmp_path / "runs"), epochs=1, batch_size=4,
        workers=0, device="cpu",
    )  # fmt: skip
    assert train(config)[0]["status"] == "done"
    with pytest.raises(UsageError, match="no teacher 'other'"):
        methods.build("kd", student=tiny_model(), cache=open_cache(path), teacher="other")
    assert isinstance(methods.build("ce", student=tiny_model(), cache=open_cache(path)), Method)


def test_vitkd_is_refused_where_there_are_no_blocks_to_match(tmp_path: Path, cache: Cache) -> None:
    card = TeacherCard(model="resnet50", nodes=("layer1", "layer2", "norm"))
    with pytest.raises(UsageError, match=r"needs a plain ViT for a teacher.*resnet50 has layer1, layer2, norm; mimic and mgd"):
        methods.requirements("vitkd", card)
    resnet = tiny_model("resnet18", channels=[4, 4, 8, 8], stem_width=4)
    with pytest.raises(StudentError, match=r"no node 'blocks\.0'; near ones.*; method 'vitkd' needs a plain ViT for a student"):
        methods.build("vitkd", student=resnet, cache=cache)
    with pytest.raises(StudentError, match=r"no node 'blocks.1'; .*it has 2 nodes from 'blocks.0' to 'norm'"):
        methods.build("vitkd", student=tiny_model(**TINY_VIT_ARGS | {"depth": 1}), cache=cache)


@pytest.mark.parametrize(
    ("name", "arguments", "node", "expected"),
    [
        (TINY_VIT, TINY_VIT_ARGS, "blocks.-1", "blocks.1"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, "layers.-1", "layers.3"),
        ("efficientnet_b0", {}, "blocks.-1", "blocks.6"),  # nodes: blocks 0, 1, 2, 4 and 6
        ("efficientnet_b0", {}, "blocks.-2", None),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, "stages.-2", "stages.2"),
        ("repvgg_a0", {}, "stages.-1", None),  # nodes: stages 0, 1, 2 of 4, and final_conv
    ],
)
def test_a_node_counted_from_the_end_is_one_with_and_without_the_model(
    name: str, arguments: dict[str, Any], node: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model(name, **arguments)
    monkeypatch.setattr("kdcache.teacher.build_model", lambda *_, **__: model)
    card = load_teacher(name).card
    if expected is not None:
        assert resolve_node(model, node, model_name=name) == card.resolve(node) == expected
        return
    with pytest.raises(TeacherError, match="no node"):
        resolve_node(model, node, model_name=name)
    with pytest.raises(UsageError, match="no node"):
        card.resolve(node)


def test_of_several_wishes_for_an_encoding_the_users_wins_then_the_caches_then_the_first() -> None:
    methods_of_both = ["vitkd", "frequency"]  # the one has no wish for features@norm, the other wants dct

    def encodings(*, targets: Sequence[str] = (), names: Sequence[str] = methods_of_both, layer: Any = None) -> dict[str, str | None]:
        config = ExtractConfig(shards="", cache="", teacher="", methods=names, targets=targets)
        return {spec.name: spec.encoding for spec in requested_specs(config, ANY_TEACHER, layer)}

    assert encodings()["features@norm"] == encodings(names=methods_of_both[::-1])["features@norm"] == "dct"
    assert encodings(names=["vitkd+frequency"]) == encodings()
    assert encodings(targets=["features@norm:klt=0.99"])["features@norm"] == "klt=0.99"
    assert encodings(targets=["features@norm"])["features@norm"] == "dct"  # the user left it open
    assert encodings(layer=SimpleNamespace(targets={"features@norm": None}))["features@norm"] is None  # as in the cache
    specs = [parse_target(text) for text in ("features@norm", "features@norm:dct", "features@norm:int8", "features@norm:klt=0.9,views=2")]
    assert [spec.text for spec in merge_wishes(specs)] == ["features@norm:dct,views=2"]


def test_a_card_resolves_nodes_and_names_near_ones(cache: Cache) -> None:
    card = card_of_layer(cache.layer(None))
    assert card.nodes == ("blocks.0", "blocks.1", "blocks.2", "norm")
    assert card.containers == {"blocks": 3}
    assert card.resolve("blocks.-3") == "blocks.0"
    assert ANY_TEACHER.resolve("blocks.-2") == "blocks.-2"
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224 has no node 'blocks.3'; near ones: blocks"):
        card.resolve("blocks.3")


def test_parameters_that_the_student_keeps_from_decay_are_kept_from_it(cache: Cache) -> None:
    from timm.optim import create_optimizer_v2

    for name in ("kd", "nkd+vitkd"):
        method = build(name, cache)
        assert "student.pos_embed" in method.no_weight_decay()
        optimizer = create_optimizer_v2(method, opt="adamw", lr=1e-3, weight_decay=0.1)
        without = next(group for group in optimizer.param_groups if group["weight_decay"] == 0)["params"]
        assert any(parameter is method.student.pos_embed for parameter in without)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters()))


# --- the command, and a method of one's own ---


def test_the_command_lists_every_method_with_needs_constants_and_paper() -> None:
    listed = json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)["methods"]
    assert list(listed) == list(methods.METHODS)
    for name, facts in listed.items():
        assert facts["summary"]
        assert bool(facts["paper"]) is (name != "ce")
        assert [parse_target(spec).name for spec in facts["needs"]] == [spec.partition(":")[0] for spec in methods.requirements(name)]
        assert all(constant["help"] for constant in facts["constants"].values())
    assert listed["vitkd"]["constants"]["alpha"] == {
        "default": 3e-5,
        "help": "Weight of the mimicked first two blocks: a sum of squares over tokens and channels.",
    }
    text = CliRunner().invoke(main, ["methods"]).output
    assert all(f"\n{name}: " in f"\n{text}" for name in methods.METHODS)
    assert "--set vitkd.alpha=3e-05" in CliRunner().invoke(main, ["methods", "nkd+vitkd"]).output
    assert CliRunner().invoke(main, ["methods", "vitdk"]).exit_code == 2


def test_the_worked_example_of_the_docs_works(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "adding-a-method.md").read_text()
    (tmp_path / "attention_transfer.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    places = {"shards": folder / "shards", "cache": tmp_path / "cache", "TEACHER": f"local-dir:{folder / 'teacher'}"}
    more = {"train": f"--epochs 1 -b 4 -j 0 --device cpu --num-classes 10 --out {tmp_path / 'runs'}", "extract": "--views 1 -j 0", "methods": ""}
    commands = [shlex.split(line) for line in re.findall(r"^    kdcache (\w+ .*)$", text, re.MULTILINE)]
    assert [words[0] for words in commands] == ["methods", "extract", "train", "train"]
    for words in commands:
        outcome = CliRunner().invoke(main, [*(str(places.get(word, word)) for word in words), *more[words[0]].split()])
        assert outcome.exit_code == 0, outcome.output
    assert sorted(run.name.rpartition("-")[0] for run in (tmp_path / "runs").iterdir()) == [f"{TINY_VIT}-attention", f"{TINY_VIT}-kd+attention"]
    targets = open_cache(tmp_path / "cache").layer(None).targets
    assert sorted(targets) == ["features@blocks.2", "logits"]


def test_a_broken_import_inside_a_method_of_ones_own_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_method.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        methods.method_class("broken_method:Any")
