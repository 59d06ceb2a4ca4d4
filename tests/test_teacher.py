"""The teacher: nodes are timm's own values, weights are what they are said to be, and no weights file can run code.

Legend: B batch, T grid tokens, C channels.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_VIT, TINY_VIT_ARGS, make_teacher_dir, save_local_dir, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from cli.main import main
from kdcache.errors import TeacherError
from kdcache.format import Preprocessing, TeacherIdentity
from kdcache.nodes import NORM, _agree, capture, list_nodes, resolve_node, to_tokens
from kdcache.targets import parse_target
from kdcache.teacher import Teacher, load_teacher, weights_digest
from kdcache.timm_models import input_size_of, mean_std_of

TINY: dict[str, tuple[dict[str, Any], str, int]] = {
    "vit_tiny_patch16_224": (TINY_VIT_ARGS, "blocks", 1),
    "vit_tiny_patch16_dinov3_qkvb": ({"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 5),
    "vit_small_patch16_dinov3": ({"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 5),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 5),
    "beit_base_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 1),
    "deit3_small_patch16_224": ({"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 1),
    "eva02_tiny_patch14_224": ({"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}, "blocks", 1),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 5, "drop_path_rate": 0.5},
        "layers",
        0,
    ),
    "swinv2_tiny_window8_256": (
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 5},
        "layers",
        0,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5}, "stages", 0),
    "mixer_s16_224": ({"img_size": 32, "num_classes": 5}, "blocks", 0),
    "resnet10t": ({"num_classes": 5}, "layer", 0),
    "maxvit_pico_rw_256": ({"img_size": 256, "num_classes": 5}, "stages", 0),
    "pvt_v2_b0": ({"num_classes": 5}, "stages", 0),
}
"""timm name → constructor arguments that make it small, the container of its nodes, its prefix tokens."""


def views_of(side: int, rows: int = 2) -> Tensor:
    return torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def teacher_of(name: str, folder: Path) -> Teacher:
    args = TINY[name][0]
    return load_teacher(save_local_dir(tiny_model(name, **args), folder, args))


@contextmanager
def own_hooks(model: nn.Module, nodes: list[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules of these names give, read without kdcache."""
    raw: dict[str, Tensor] = {}
    handles = [model.get_submodule(node).register_forward_hook(lambda _m, _i, out, node=node: raw.__setitem__(node, out)) for node in nodes]
    yield raw
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", TINY)
def test_one_pass_gives_timms_own_logits_and_intermediates(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(name, tmp_path)
    _, container, num_prefix = TINY[name]
    model, side = teacher.model, teacher.identity.preprocessing.input_size
    views_BHWC = views_of(side)
    nodes = [node for node in list_nodes(model) if node.startswith(container)]
    assert nodes
    resolved = teacher.resolve([parse_target(text) for text in ["logits", "features@norm", *(f"features@{node}" for node in nodes)]])
    targets = list(resolved.values())
    values = teacher(views_BHWC, targets)
    with torch.inference_mode():
        x_BCHW = teacher.normalize(views_BHWC)
        assert torch.equal(values["logits"]["logits"], model(x_BCHW))
        with own_hooks(model, nodes) as raw:
            features = model.forward_features(x_BCHW)  # type: ignore[operator]
        final, intermediates = model.forward_intermediates(x_BCHW, norm=False)  # type: ignore[operator]
    expected, _ = to_tokens(model, features)
    assert all(torch.equal(values["features@norm"][part], tokens) for part, tokens in expected.items())
    assert torch.allclose(to_tokens(model, final)[0]["grid"], expected["grid"], atol=1e-5)
    assert len(intermediates) >= len(nodes)
    for node, intermediate_BCHW in zip(nodes, intermediates[-len(nodes) :], strict=True):
        grid_BTC = intermediate_BCHW.flatten(2).transpose(1, 2)
        value, shape = values[f"features@{node}"], resolved[parse_target(f"features@{node}")].shape
        assert torch.equal(value["grid"], grid_BTC), node
        assert (shape.grid, shape.channels) == (tuple(intermediate_BCHW.shape[2:]), intermediate_BCHW.shape[1]), node
        assert ("prefix" in value) == (num_prefix > 0)
        if num_prefix:
            assert torch.equal(value["prefix"], raw[node][:, :num_prefix]), node
    for back, node in enumerate(reversed(nodes), start=1):
        if container != "layer":  # a ResNet's stages are layer1 to layer4, in no module that could be counted in
            negative = parse_target(f"features@{container}.-{back}")
            assert teacher.resolve([negative])[negative] == resolved[parse_target(f"features@{node}")]
    for target in targets:
        if target.kind == "features":
            value, shape = values[target.name], target.shape
            assert value["grid"].shape == (2, shape.num_tokens, shape.channels)
            assert shape.prefix_tokens == num_prefix
            if num_prefix:
                assert value["prefix"].shape == (2, num_prefix, shape.channels)
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in values[target.name].values())


UNEXPLAINED: list[tuple[str, dict[str, Any], str, str]] = [
    ("cait_xxs24_224", {"img_size": 32, "patch_size": 8, "depth": 2}, "blocks.0", "4x4, or a square, after 1 prefix tokens, found 16 tokens"),
    ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 2}, "blocks.1", "after 1 prefix tokens, found 16 tokens"),
    ("volo_d1_224", {"img_size": 64}, "network.0", r"timm's own grid of 8x8 with 192 channels, found .* 8x192"),
    ("volo_d1_224", {"img_size": 64}, "norm", "found 17 tokens"),
    ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}, "blocks.0", "row by row, .*found its tokens in another order"),
    ("coat_lite_tiny", {"img_size": 64, "serial_depths": (1, 1, 1, 1)}, "norm", "found 5 tokens"),
    ("coat_lite_tiny", {"img_size": 64, "serial_depths": (1, 1, 1, 1)}, "serial_blocks2", "expected one output in a forward pass, found none"),
    ("tnt_s_patch16_224", {"img_size": 32, "depth": 2}, "blocks.0", r"expected a batch of 2 first, found a tensor of shape \(8, "),
    ("twins_svt_small", {"img_size": 64, "depths": (1, 1, 1, 1)}, "blocks.0", "expected one output in a forward pass, found none"),
    ("crossvit_tiny_240", {"depth": ((1, 1, 0),)}, "norm", "expected a tensor, found a list"),
    ("convit_tiny", {"img_size": 32, "patch_size": 8, "depth": 3, "local_up_to_layer": 2}, "blocks.0", "found 16 tokens, which leave 15"),
    ("pit_ti_224", {}, "norm", "expected the last map's grid of 7x7, found 1x1"),
    ("samvit_base_patch16_224", {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 2}, "blocks.0", "found its output to read as 4x48"),
]
"""timm name, constructor arguments, a node whose value has no order that is known, and what is found there."""


def teacher_around(name: str, **args: Any) -> Teacher:
    """A teacher without a file: what resolving looks at is the model."""
    model = tiny_model(name, **args, num_classes=5)
    mean, std = mean_std_of(model)
    preprocessing = Preprocessing(mean=mean, std=std, input_size=input_size_of(model) if "img_size" not in args else args["img_size"])
    identity = TeacherIdentity(model=name, model_args={}, weights="0" * 32, num_classes=5, preprocessing=preprocessing, precision="fp32")
    return Teacher(model, identity, device=torch.device("cpu"), source=name)


@pytest.mark.parametrize(("name", "args", "node", "found"), UNEXPLAINED)
def test_a_node_whose_tokens_cannot_be_explained_is_refused(name: str, args: dict[str, Any], node: str, found: str) -> None:
    teacher = teacher_around(name, **args)
    with pytest.raises(TeacherError, match=rf"teacher {name}: node '{node}' can't be recorded: .*{found}.*; choose another node"):
        teacher.resolve([parse_target(f"features@{node}")])
    assert "logits" in {target.name for target in teacher.resolve([parse_target("logits")]).values()}


@pytest.mark.parametrize(
    ("name", "args", "node", "grid", "prefix"),
    [
        ("vit_tiny_patch16_224", {**TINY_VIT_ARGS, "patch_size": (8, 16)}, "blocks.1", (4, 2), 1),
        ("vit_tiny_patch16_224", {**TINY_VIT_ARGS, "patch_size": (8, 16)}, "norm", (4, 2), 1),
        ("vit_relpos_small_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2}, "blocks.0", (2, 2), 0),
        ("cait_xxs24_224", {"img_size": 32, "patch_size": 8, "depth": 2}, "norm", (4, 4), 1),
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}, "blocks.3", (7, 7), 0),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 2}, "blocks.1", (2, 2), 5),
    ],
)
def test_nodes_that_can_be_explained_are_kept(name: str, args: dict[str, Any], node: str, grid: tuple[int, int], prefix: int) -> None:
    args = {key: value for key, value in args.items() if key != "num_classes"}
    (target,) = teacher_around(name, **args).resolve([parse_target(f"features@{node}")]).values()
    assert (target.shape.grid, target.shape.prefix_tokens) == (grid, prefix)


def test_a_permutation_hides_neither_behind_outlier_channels_nor_dead_ones() -> None:
    tokens = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 0.01, 0, 0])
    tokens[..., 0] += 1000
    assert _agree(tokens, tokens + 1e-6)
    assert not _agree(tokens.flip(1), tokens)
    assert not _agree(tokens.reshape(2, 4, 4, 6).transpose(1, 2).flatten(1, 2), tokens)


def test_the_grid_is_row_major_and_apart_from_the_prefix(tmp_path: Path) -> None:
    teacher = load_teacher(make_teacher_dir(tmp_path))
    target = teacher.resolve([parse_target("features@blocks.0")]).popitem()[1]
    assert (target.shape.grid, target.shape.channels, target.shape.prefix_tokens) == ((4, 4), 32, 1)
    views = views_of(32, 1)
    with torch.inference_mode(), capture(teacher.model, ["blocks.0"]) as captured:
        teacher.model(teacher.normalize(views))
    value = teacher(views, [target])[target.name]
    assert torch.equal(value["prefix"], captured["blocks.0"][:, :1])
    assert torch.equal(value["grid"], captured["blocks.0"][:, 1:])


def test_half_precision_is_an_autocast_whose_targets_stay_float32(tmp_path: Path) -> None:
    name = make_teacher_dir(tmp_path)
    values = {}
    for precision in ("fp32", "bf16"):
        teacher = load_teacher(name, precision=precision)  # type: ignore[arg-type]
        target = teacher.resolve([parse_target("features@norm")]).popitem()[1]
        values[precision] = teacher(views_of(32), [target])[target.name]["grid"]
    error = (values["bf16"] - values["fp32"]).norm() / values["fp32"].norm()
    assert values["bf16"].dtype == torch.float32
    assert 0 < float(error) < 0.02


def test_hooks_are_gone_after_a_pass(tmp_path: Path) -> None:
    model = tiny_model()
    with capture(model, ["blocks.0"]) as captured:
        model(torch.zeros(1, 3, 32, 32))
    first = captured["blocks.0"]
    model(torch.ones(1, 3, 32, 32))
    assert captured["blocks.0"] is first
    assert all(not module._forward_hooks for module in model.modules())


def test_negative_nodes_count_from_the_end_and_unknown_ones_name_near_ones() -> None:
    model = tiny_model()
    assert resolve_node(model, "blocks.-1", model_name="m") == "blocks.1"
    assert resolve_node(model, "blocks.-2", model_name="m") == "blocks.0"
    assert resolve_node(model, NORM, model_name="m") == "norm"
    for node in ("blocks.2", "blocks.-3", "block.0", "blocks", "head", "blocks.0.attn"):
        lists = "it has 3 nodes from 'blocks.0' to 'norm': 'kdcache extract --list-nodes --teacher m' lists them"
        with pytest.raises(TeacherError, match=rf"teacher m: no node '{node}'; near ones: .*; {lists}"):
            resolve_node(model, node, model_name="m")
    with pytest.raises(TeacherError, match=r"no node 'blcks.1'; near ones: blocks.1, blocks.0;"):
        resolve_node(model, "blcks.1", model_name="m")


def test_negative_nodes_count_all_blocks_also_where_only_some_are_nodes() -> None:
    model = tiny_model("efficientnet_b0", num_classes=5)
    assert [node for node in list_nodes(model) if node.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]
    assert resolve_node(model, "blocks.-1", model_name="m") == "blocks.6"
    with pytest.raises(TeacherError, match=r"no node 'blocks.-2'"):
        resolve_node(model, "blocks.-2", model_name="m")


def test_list_nodes_shows_what_extract_would_record_without_weights_or_shards(tmp_path: Path) -> None:
    teacher = make_teacher_dir(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    result = CliRunner().invoke(main, ["extract", "--list-nodes", "--teacher", teacher, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    shape = {"grid": [4, 4], "channels": 32, "prefix_tokens": 1, "encoding": "int8", "bytes_per_view": 17 * (32 + 2)}
    assert facts == {
        "model": TINY_VIT,
        "input_size": 32,
        "logits": {"encoding": "dense", "bytes_per_view": 18, "classes": 10},
        "nodes": [{"node": node, **shape} for node in ("blocks.0", "blocks.1", "norm")],
    }
    text = CliRunner().invoke(main, ["extract", "a.tar", "cache", "--list-nodes", "--teacher", teacher]).stdout
    assert [line.split() for line in text.splitlines() if line.startswith("blocks")] == [
        [node, "4x4", "32", "1", "578", "B"] for node in ("blocks.0", "blocks.1")
    ]
    arguments = ["extract", "--list-nodes", "--teacher", "hiera_tiny_224", "--model-kwargs", "stages=[1,1,1,1]", "--model-kwargs", "num_classes=0"]
    text = CliRunner().invoke(main, arguments).stdout
    assert "no classifier" in text
    assert "blocks.0: can't be recorded: expected the grid row by row" in text
    assert "\nblocks.3   7x7       768       0 " in text
    for given, missing in ([], "SHARDS"), (["a.tar"], "CACHE"):
        result = CliRunner().invoke(main, ["extract", *given, "--teacher", teacher])
        assert (result.exit_code, f"Missing argument '{missing}'" in result.stderr) == (2, True)


def test_two_passes_of_a_teacher_with_drop_path_are_equal(tmp_path: Path) -> None:
    teacher = load_teacher(make_teacher_dir(tmp_path, drop_path_rate=0.9, drop_rate=0.5, attn_drop_rate=0.5))
    target = teacher.resolve([parse_target("logits")]).popitem()[1]
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    first, second = (teacher(views_of(32), [target])["logits"]["logits"] for _ in range(2))
    assert torch.equal(first, second)


def test_views_of_another_size_are_resized_to_the_teachers(tmp_path: Path) -> None:
    teacher = load_teacher(make_teacher_dir(tmp_path))
    target = teacher.resolve([parse_target("logits")]).popitem()[1]
    flat = torch.full((1, 48, 48, 3), 77, dtype=torch.uint8)
    logits = [teacher(flat[:, :side, :side], [target])["logits"]["logits"] for side in (48, 32)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_the_weights_digest_notices_one_weight_one_name_and_one_dtype() -> None:
    digests = {weights_digest(tiny_model())}
    assert digests == {weights_digest(tiny_model())}
    changed = tiny_model()
    with torch.no_grad():
        changed.get_parameter("blocks.1.mlp.fc2.bias")[3] += 1e-6
    half = tiny_model()
    half.get_submodule("head").to(torch.bfloat16)
    renamed = nn.ModuleDict({"model": tiny_model()})
    digests |= {weights_digest(changed), weights_digest(half), weights_digest(renamed)}
    assert len(digests) == 4


def test_the_identity_says_how_to_build_the_teacher_again(tmp_path: Path) -> None:
    identity = load_teacher(make_teacher_dir(tmp_path)).identity
    assert (identity.model, identity.num_classes, identity.precision) == (TINY_VIT, 10, "fp32")
    assert identity.preprocessing.input_size == 32
    assert weights_digest(tiny_model(identity.model, **identity.model_args)) == identity.weights


def test_a_checkpoint_gives_the_same_teacher_as_its_folder(tmp_path: Path) -> None:
    model = tiny_model()
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "w.pth")
    args = {name: value for name, value in TINY_VIT_ARGS.items() if name != "num_classes"}  # read from the checkpoint
    digests = {load_teacher(TINY_VIT, checkpoint=tmp_path / file, model_args=args).identity.weights for file in ("w.safetensors", "w.pth")}
    assert digests == {load_teacher(make_teacher_dir(tmp_path / "folder")).identity.weights}


def test_a_teacher_without_a_head_has_features_and_no_logits(tmp_path: Path) -> None:
    teacher = load_teacher(make_teacher_dir(tmp_path, num_classes=0))
    assert teacher.identity.num_classes == 0
    teacher.resolve([parse_target("features@norm")])
    with pytest.raises(TeacherError, match="no classifier, hence no logits"):
        teacher.resolve([parse_target("logits")])


def test_an_unknown_model_names_near_ones() -> None:
    with pytest.raises(TeacherError, match=r"'vit_tiny_patch61_224': timm .* knows no such model; near ones: vit_tiny_patch16_224"):
        load_teacher("vit_tiny_patch61_224")
    with pytest.raises(TeacherError, match=r"'qqqqzzzz': timm .* knows no such model; none is called nearly so; timm.list_models\(\) names all$"):
        load_teacher("qqqqzzzz")


def test_a_folder_that_is_named_without_its_prefix_is_pointed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher_dir(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TeacherError, match="knows no such model; a folder of this name is here: 'local-dir:mine' takes its model"):
        load_teacher("mine")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hf-hub:timm/no-such-model-at-all"])
def test_weights_that_cannot_be_had_offline_suggest_a_folder(name: str) -> None:
    with pytest.raises(TeacherError, match=r"pretrained weights can't be had .*local-dir:FOLDER.*--checkpoint FILE"):
        load_teacher(name)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no .*config.json; expected a folder that timm's save_for_hf wrote"):
        load_teacher(f"local-dir:{tmp_path}")


def test_a_checkpoint_of_another_shape_is_an_error(tmp_path: Path) -> None:
    save_file(tiny_model(**{**TINY_VIT_ARGS, "depth": 1}).state_dict(), str(tmp_path / "w.safetensors"))
    with pytest.raises(TeacherError, match=r"w.safetensors does not fit the model: .*blocks.1"):
        load_teacher(TINY_VIT, checkpoint=tmp_path / "w.safetensors", model_args=TINY_VIT_ARGS)
    save_file(tiny_model(**{**TINY_VIT_ARGS, "img_size": 64}).state_dict(), str(tmp_path / "large.safetensors"))
    with pytest.raises(
        TeacherError, match=r"large.safetensors does not fit the model: pos_embed is 1x.*; build the model as it was trained: --model-kwargs"
    ):
        load_teacher(TINY_VIT, checkpoint=tmp_path / "large.safetensors", model_args=TINY_VIT_ARGS)
    with pytest.raises(TeacherError, match=r"can't be built with .*'colour': 3"):
        load_teacher(TINY_VIT, checkpoint=tmp_path / "w.safetensors", model_args={"colour": 3})
    with pytest.raises(TeacherError, match="no checkpoint file"):
        load_teacher(TINY_VIT, checkpoint=tmp_path / "absent.pth")


@pytest.mark.parametrize("keep", [0, 5, 2000, -7])
def test_a_damaged_weights_file_is_an_error(tmp_path: Path, keep: int) -> None:
    name = make_teacher_dir(tmp_path / "t")
    file = tmp_path / "t" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TeacherError, match=r"local-dir"):
        load_teacher(name)
    with pytest.raises(TeacherError, match=r"can't be read as safetensors"):
        load_teacher(TINY_VIT, checkpoint=file, model_args=TINY_VIT_ARGS)


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, suffix: str) -> None:
    trap = tmp_path / "ran"
    for i, content in enumerate((RunsCode(trap), {"state_dict": RunsCode(trap)})):
        plain, zipped = tmp_path / f"plain{i}{suffix}", tmp_path / f"zipped{i}{suffix}"
        plain.write_bytes(pickle.dumps(content, protocol=2))
        torch.save(content, zipped)
        for file in (plain, zipped):
            with pytest.raises(TeacherError, match="weights-only"):
                load_teacher(TINY_VIT, checkpoint=file, model_args=TINY_VIT_ARGS)
    name = make_teacher_dir(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    torch.save(RunsCode(trap), tmp_path / "t" / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="local-dir"):
        load_teacher(name)
    assert not trap.exists()
