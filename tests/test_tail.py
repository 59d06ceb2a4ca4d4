"""The teacher's tail: cut out of a model, built again in a fresh process without the rest of it, and equal to it to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import make_shards, run_python, save_local_dir, tiny_model
from test_losses import load
from torch import Tensor, nn

from kdcache.cache import open_cache
from kdcache.errors import CorruptError, MismatchError, MissingError, TeacherError
from kdcache.format import DigestField, TailIdentity
from kdcache.methods.scalekd import ScaleKDSettings, split_tail
from kdcache.plan import blake2b_128
from kdcache.tail import Tail, build_tail, cut_tail, load_tail, tail_distance
from kdcache.teacher import load_teacher
from kdcache.teacher_card import TeacherCard
from pipelines.copy import CopyConfig, copy
from pipelines.extract import ExtractConfig, extract
from pipelines.gc import GcConfig, gc
from pipelines.verify import verify

SWIN_ARGS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1, 2),
    "num_heads": (1, 1, 2, 2),
    "num_classes": 10,
}
"""Maps of 8 × 8 × 64 behind stage 3 and 4 × 4 × 128 behind stage 4."""
_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN_ARGS),
    "swin, padded windows": ("swin_tiny_patch4_window7_224", SWIN_ARGS | {"window_size": 3, "img_size": 96}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit of 12 blocks": ("vit_tiny_patch16_224", _VIT | {"depth": 12}),
    "deit3": ("deit3_small_patch16_224", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "beit, shared bias": ("beit_base_patch16_224", _VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva, no bias": ("eva_large_patch14_196", _VIT),
    "eva, rope": ("eva02_tiny_patch14_224", _VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", _VIT | {"num_classes": 0}),
    "dinov3": ("vit_small_patch16_dinov3", _VIT | {"num_classes": 0}),
}


def cut(model: nn.Module, name: str, args: dict[str, Any]) -> tuple[TailIdentity, bytes]:
    """The tail that scalekd wants, as extract makes it."""
    container = "layers" if hasattr(model, "layers") else "blocks"
    card = TeacherCard(model=name, containers={container: len(getattr(model, container))})
    s3, s4 = split_tail(ScaleKDSettings(), card)
    tail = cut_tail(model, images_of(args), [*s3, *s4], model_name=name)
    data = safetensors.torch.save(tail.tensors)
    identity = TailIdentity(
        teacher="0" * 32, model=name, model_args=args, modules=(*s3, *s4), head=tail.head, layout=tail.layout, grid=tail.grid, channels=tail.channels,
        prefix_tokens=tail.prefix_tokens, arguments=tail.arguments, weights=DigestField(size=len(data), digest=blake2b_128(data)),
    )  # fmt: skip
    return identity, data


def images_of(args: dict[str, Any], *, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, args["img_size"], args["img_size"], generator=torch.Generator().manual_seed(seed))


def inputs_of(model: nn.Module, tail: Tail, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Grid and prefix tokens that the first module of the tail takes in the model's own pass."""
    taken: list[Tensor] = []
    handle = model.get_submodule(tail.card.modules[0]).register_forward_pre_hook(lambda _module, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        model.forward_features(images)
    handle.remove()
    (x,) = taken
    if tail.card.layout != "NLC":
        return x.flatten(1, 2), None
    return x[:, tail.card.prefix_tokens :], x[:, : tail.card.prefix_tokens] if tail.card.prefix_tokens else None


def test_a_tail_built_in_a_fresh_process_is_the_teacher_to_the_bit(tmp_path: Path) -> None:
    for family, (name, args) in FAMILIES.items():
        folder = tmp_path / family
        folder.mkdir()
        model = tiny_model(name, **args)
        identity, data = cut(model, name, args)
        images = images_of(args, seed=1)  # others than it was cut on
        tail = build_tail(identity, data, with_prefix=True)
        assert tail_distance(tail, model, images) == 0, family
        grid, prefix = inputs_of(model, tail, images)
        with torch.no_grad():
            features = model.forward_features(images)
            expected = {"features": features} | ({"logits": model.forward_head(features)} if args["num_classes"] else {})
        safetensors.torch.save_file({"grid": grid.contiguous()} | ({"prefix": prefix.contiguous()} if prefix is not None else {}), folder / "inputs")
        safetensors.torch.save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected")
        (folder / "tail").write_bytes(data)
        (folder / "card").write_text(json.dumps(identity.to_json()))
    run_python(
        """
import json, sys, torch, safetensors.torch
from pathlib import Path
from kdcache.format import TailIdentity
from kdcache.tail import build_tail
torch.set_num_threads(1)
for folder in Path(sys.argv[1]).iterdir():
    inputs, expected = (safetensors.torch.load_file(folder / name) for name in ("inputs", "expected"))
    tail = build_tail(TailIdentity.model_validate(json.loads((folder / "card").read_text())), (folder / "tail").read_bytes(), with_prefix=True)
    assert not any(parameter.requires_grad for parameter in tail.parameters()), folder
    value = tail.train()(inputs["grid"], inputs.get("prefix"))
    tokens = torch.cat([value["prefix"], value["grid"]], 1) if "prefix" in value else value["grid"]
    assert torch.equal(tokens.reshape(expected["features"].shape), expected["features"]), folder
    if "logits" in expected:
        side = round(value["grid"].shape[1] ** 0.5)
        assert torch.equal(tail.head(value, (side, side)), expected["logits"]), folder
assert "kdcache.teacher" not in sys.modules
""",
        tmp_path,
    )


@pytest.mark.parametrize("family", [family for family, (name, _) in FAMILIES.items() if "swin" not in name])
def test_a_tail_without_prefix_tokens_is_near_the_teacher_and_not_it(family: str) -> None:
    name, args = FAMILIES[family]
    model = tiny_model(name, **args)
    identity, data = cut(model, name, args)
    tail = build_tail(identity, data)
    assert 1e-4 < tail_distance(tail, model, images_of(args)) < 0.5
    grid, prefix = inputs_of(model, tail, images_of(args))
    with pytest.raises(ValueError, match="expected 0 prefix tokens"):
        tail(grid, prefix)


def test_without_prefix_positions_are_those_of_the_grid() -> None:
    """Against attention written out: a block of BEiT whose bias lost the cls token, one of EVA02 whose rope starts at the first token."""
    for family in ("beit", "eva, rope"):
        name, args = FAMILIES[family]
        model = tiny_model(name, **args)
        identity, data = cut(model, name, args)
        tail = build_tail(identity, data)
        grid, _ = inputs_of(model, tail, images_of(args))
        attention = model.get_submodule(identity.modules[0]).attn
        seen: list[Tensor] = []
        own = torch.nn.functional.scaled_dot_product_attention

        def spy(q: Tensor, k: Tensor, v: Tensor, seen: list[Tensor] = seen, own: Any = own, **options: Any) -> Tensor:
            seen.extend([q, k, options.get("attn_mask")])
            return own(q, k, v, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            tail(grid, modules=identity.modules[:1])
            with_cls = torch.cat([torch.zeros_like(grid[:, :1]), grid], 1)
            arguments = {} if family == "beit" else {"rope": model.rope.get_embed()}
            model.get_submodule(identity.modules[0])(with_cls, **arguments)
        q, k, bias, q_cls, k_cls, bias_cls = seen
        torch.testing.assert_close(q, q_cls[:, :, 1:])
        torch.testing.assert_close(k, k_cls[:, :, 1:])
        if family == "beit":
            assert bias_cls.shape[-1] == attention.relative_position_index.shape[0] == 17
            assert torch.equal(bias, bias_cls[..., 1:, 1:])


def test_a_swin_tail_and_its_gradient_equal_the_authors() -> None:
    arrays = load("scalekd_tpp_tail_swin")
    args = {
        "img_size": 56, "patch_size": 1, "window_size": int(arrays["window"]), "embed_dim": 4, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, int(arrays["num_heads"])),
        "num_classes": 0,
    }  # fmt: skip
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    weights = {name[5:]: torch.tensor(array) for name, array in arrays.items() if name.startswith("timm.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not any(name.startswith(("layers.3", "norm")) for name in missing if "relative_position_index" not in name)
    identity, data = cut(model.eval(), "swin_tiny_patch4_window7_224", args)
    tail = build_tail(identity, data).double()
    z = torch.tensor(arrays["z"], dtype=torch.float64, requires_grad=True)
    y = tail(z)["grid"]
    np.testing.assert_allclose(y.detach(), arrays["y"], rtol=1e-5, atol=1e-7)
    (y * torch.tensor(arrays["cotangent"])).sum().backward()
    np.testing.assert_allclose(z.grad, arrays["grad_z"], rtol=1e-5, atol=1e-7)


def test_nothing_but_the_tail_takes_memory(tmp_path: Path) -> None:
    """Of 24 blocks of a ViT, 680 MB, the last two are built: the process grows by little more than these."""
    torch.manual_seed(0)
    args = {"depth": 24, "num_classes": 10}
    model = timm.create_model("vit_base_patch16_224", **args).eval()
    identity, data = cut(model, "vit_base_patch16_224", args | {"img_size": 224})
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert len(data) < 0.1 * whole
    (tmp_path / "tail").write_bytes(data)
    (tmp_path / "card").write_text(json.dumps(identity.to_json()))
    result = run_python(
        """
import json, resource, sys, timm, torch
from pathlib import Path
from kdcache.format import TailIdentity
from kdcache.tail import build_tail
folder = Path(sys.argv[1])
card, data = TailIdentity.model_validate(json.loads((folder / "card").read_text())), (folder / "tail").read_bytes()
timm.create_model("test_vit")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tail = build_tail(card, data)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
""",
        tmp_path,
    )
    assert int(result.stdout) < 2 * len(data) < 0.2 * whole


# --- in a cache ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/, teacher/ (a Swin) and cache/, recorded for scalekd."""
    folder = tmp_path_factory.mktemp("tail")
    make_shards(folder / "shards", num_shards=1, num_samples=3)
    save_local_dir(tiny_model("swin_tiny_patch4_window7_224", **SWIN_ARGS), folder / "teacher", SWIN_ARGS)
    run_extract(folder, "cache")
    return folder


def run_extract(folder: Path, cache: str, **options: Any) -> Any:
    config: dict[str, Any] = {
        "teacher": f"local-dir:{folder / 'teacher'}",
        "methods": ("scalekd",),
        "views": 1,
        "workers": 0,
        "device": "cpu",
    } | options
    return extract(ExtractConfig(shards=str(folder / "shards"), cache=str(folder / cache), **config))


def tail_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("teachers/*/tail.*"))


def test_extract_stores_the_tail_and_train_builds_it(folder: Path) -> None:
    cache = open_cache(folder / "cache")
    layer = cache.layer(None)
    assert layer.tail is not None and layer.tail.identity.modules == ("layers.3", "norm") and layer.tail.identity.head == ("head",)
    assert layer.tail.measured == {"without_prefix": 0.0}
    model = load_teacher(f"local-dir:{folder / 'teacher'}").model
    assert tail_distance(load_tail(cache.store, layer), model, images_of(SWIN_ARGS)) == 0
    assert verify(str(folder / "cache")).ok
    card, weights = tail_files(folder / "cache")
    before = {path: path.stat().st_mtime_ns for path in (card, weights)}
    assert run_extract(folder, "cache").resumed_shards == 1
    assert before == {path: path.stat().st_mtime_ns for path in (card, weights)}


def test_a_tail_is_added_to_a_cache_and_is_part_of_its_root(folder: Path) -> None:
    run_extract(folder, "other", methods=(), targets=("logits", "features@norm"))
    without = open_cache(folder / "other").root
    with pytest.raises(MissingError, match=r"has no tail; run 'kdcache extract' again"):
        load_tail(open_cache(folder / "other").store, open_cache(folder / "other").layer(None))
    run_extract(folder, "other")
    assert open_cache(folder / "other").root == open_cache(folder / "cache").root != without
    assert verify(str(folder / "other")).ok


def test_a_changed_or_missing_tail_is_found_and_made_again(folder: Path) -> None:
    run_extract(folder, "damaged")
    root = open_cache(folder / "damaged").root
    _, weights = tail_files(folder / "damaged")
    data = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match=r"tail\.safetensors: bytes were changed.*delete the file"):
        open_cache(folder / "damaged")
    assert [problem.kind for problem in verify(str(folder / "damaged")).problems] == ["corrupt"]
    weights.unlink()
    with pytest.raises(MissingError, match=r"tail\.safetensors is missing"):
        open_cache(folder / "damaged")
    assert [problem.kind for problem in verify(str(folder / "damaged")).problems] == ["missing"]
    run_extract(folder, "damaged")
    assert weights.read_bytes() == data and open_cache(folder / "damaged").root == root


def test_a_tail_that_is_there_must_be_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdcache.methods.scalekd as scalekd

    monkeypatch.setattr(scalekd.ScaleKD, "tail_modules", classmethod(lambda cls, settings, teacher: ("layers.2", "layers.3", "norm")))
    with pytest.raises(MismatchError, match="differs: the cache has 64, this run has 32"):
        run_extract(folder, "cache")


def test_copy_takes_the_tail_along_and_gc_drops_it_with_its_teacher(folder: Path) -> None:
    summary = copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / "copy")))
    assert summary.root == open_cache(folder / "cache").root and verify(str(folder / "copy")).ok
    gc(GcConfig(cache=str(folder / "copy"), drop_teachers=("teacher",), delete=True))
    assert not tail_files(folder / "copy") and verify(str(folder / "copy")).ok


def test_a_teacher_whose_pass_is_more_than_its_blocks_is_refused() -> None:
    model = tiny_model("vit_tiny_patch16_224", **_VIT)
    with pytest.raises(TeacherError, match="does not go through module 'fc_norm'"):
        cut_tail(model, images_of(_VIT), ["blocks.3", "fc_norm"], model_name="x")
