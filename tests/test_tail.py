"""The teacher's tail: cut out of a model, built again in a fresh process without the rest of it, and equal to it to the bit."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from caches import groups
from helpers import SWIN_ARGS, Forked, die_at, load_golden, make_shards, run_python, save_local_dir, tiny_model
from torch import Tensor, nn

from kdcache import methods
from kdcache.errors import CorruptError, MismatchError, MissingError, TeacherError, UsageError
from kdcache.format import DigestField, TailIdentity
from kdcache.methods.scalekd import ScaleKDSettings, split_tail
from kdcache.opening import open_cache
from kdcache.plan import blake2b_128
from kdcache.store import open_store
from kdcache.tail import Tail, build_tail, cut_tail, load_tail, tail_distance
from kdcache.teacher import load_teacher
from kdcache.teacher_card import TeacherCard
from pipelines.copy import CopyConfig, copy
from pipelines.extract import ExtractConfig, extract
from pipelines.facts import owned_bytes
from pipelines.gc import GcConfig, gc
from pipelines.verify import verify

_VIT: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN_ARGS),
    "swin, padded windows": ("swin_tiny_patch4_window7_224", SWIN_ARGS | {"window_size": 3, "img_size": 96}),
    "vit": ("vit_tiny_patch16_224", _VIT),
    "vit of 12 blocks": ("vit_tiny_patch16_224", _VIT | {"depth": 12}),
    "deit3": ("deit3_small_patch16_224", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "beit, shared bias": ("beit_base_patch16_224", _VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "vit, relative positions": ("vit_relpos_base_patch16_cls_224", _VIT),
    "eva, no bias": ("eva_large_patch14_196", _VIT),
    "eva, rope": ("eva02_tiny_patch14_224", _VIT),
    "mixer": ("mixer_s32_224", {"img_size": 64, "mlp_ratio": (0.5, 0.5), "num_classes": 10}),
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


@pytest.mark.parametrize("family", [family for family, (name, _) in FAMILIES.items() if "swin" not in name and "mixer" not in name])
def test_a_tail_without_prefix_tokens_is_near_the_teacher_and_not_it(family: str) -> None:
    name, args = FAMILIES[family]
    model = tiny_model(name, **args)
    identity, data = cut(model, name, args)
    tail = build_tail(identity, data)
    assert 1e-4 < tail_distance(tail, model, images_of(args)) < 0.5
    grid, prefix = inputs_of(model, tail, images_of(args))
    with pytest.raises(ValueError, match="expected 0 prefix tokens"):
        tail(grid, prefix)
    expected = tail(grid)["grid"]
    for twin in (deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert torch.equal(twin(grid)["grid"], expected)
        for parameter in tail.parameters():
            parameter.data.zero_()
        assert torch.equal(twin(grid)["grid"], expected)  # it looks at nothing of the tail it was made from
        tail = twin


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
    arrays = load_golden("scalekd_tpp_tail_swin")
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


@pytest.mark.parametrize("family", ["vit of 12 blocks", "beit", "eva, rope", "dinov2", "dinov3", "deit3"])
def test_the_gradient_through_a_tail_is_the_teachers(family: str) -> None:
    """Of the grid's and the prefix's tokens, against the teacher's own blocks; its weights get none."""
    name, args = FAMILIES[family]
    model = tiny_model(name, **args)
    identity, data = cut(model, name, args)
    tail, model, images = build_tail(identity, data, with_prefix=True).double(), model.double(), images_of(args).double()
    given, arguments = [tokens for tokens in inputs_of(model, tail, images) if tokens is not None], {}
    handles = [
        model.get_submodule(module).register_forward_pre_hook(lambda _m, _i, more, key=module: arguments.update({key: more}), with_kwargs=True)
        for module in identity.modules
    ]
    with torch.no_grad():
        model.forward_features(images)
    for handle in handles:
        handle.remove()
    gradients = []
    for run in ("tail", "teacher"):
        grid, prefix = (tokens.clone().requires_grad_() for tokens in given)
        if run == "tail":
            value = tail(grid, prefix)
            out = torch.cat([value["prefix"], value["grid"]], 1)
        else:
            out = torch.cat([prefix, grid], 1)
            for module in identity.modules:
                out = model.get_submodule(module)(out, **arguments[module])
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append((grid.grad, prefix.grad))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    assert all(parameter.grad is None for parameter in tail.parameters())


def test_nothing_but_the_tail_takes_memory(tmp_path: Path) -> None:
    """Of 16 blocks of a ViT, 460 MB, the last two are built: the process grows by little more than these."""
    args = {"depth": 16, "num_classes": 10, "img_size": 32}
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", **args)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    identity, data = cut(model, "vit_base_patch16_224", args)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert len(data) < 0.15 * whole
    (tmp_path / "tail").write_bytes(data)
    (tmp_path / "card").write_text(json.dumps(identity.to_json()))
    result = run_python(
        """
import json, resource, sys, timm, torch
from pathlib import Path
from kdcache.format import TailIdentity
from kdcache.tail import build_tail
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # not ru_maxrss: on Linux a process inherits that of the one that started it
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
folder = Path(sys.argv[1])
card, data = TailIdentity.model_validate(json.loads((folder / "card").read_text())), (folder / "tail").read_bytes()
timm.create_model("test_vit")
before = peak()
tail = build_tail(card, data)
print(peak() - before)
""",
        tmp_path,
    )
    assert 0.9 * len(data) < int(result.stdout) < 1.5 * len(data) < 0.2 * whole


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
    assert layer.tail.measured == {"with_prefix": 0.0, "without_prefix": 0.0}
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


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, of a ViT of four blocks; its cache holds no logits."""
    folder = tmp_path_factory.mktemp("vit")
    make_shards(folder / "shards", num_shards=1, num_samples=3)
    save_local_dir(tiny_model("vit_tiny_patch16_224", **_VIT), folder / "teacher", _VIT)
    run_extract(folder, "cache", settings={"logits": "head"})
    return folder


def test_settings_decide_what_is_recorded_and_train_names_those_that_matter(vit: Path) -> None:
    cache = open_cache(vit / "cache")
    layer = cache.layer(None)
    assert list(layer.targets) == ["features@norm"] and layer.tail is not None and layer.tail.identity.modules == ("blocks.2", "blocks.3", "norm")
    assert 0 == layer.tail.measured["with_prefix"] < 1e-4 < layer.tail.measured["without_prefix"]
    student = tiny_model("vit_tiny_patch16_224", **_VIT)
    asked = {"logits": "head", "alpha_s4": (0.1, 0.1), "s3_blocks": 2, "s4_blocks": 1}
    line = r"--for scalekd --set logits=head --set s4_blocks=1' to add it"
    with pytest.raises(MissingError, match=rf"runs blocks\.1, blocks\.2, blocks\.3, norm .* whose tail has modules blocks\.2, .*{line}"):
        methods.build("scalekd", student=student, cache=cache, settings=asked)
    with pytest.raises(MissingError, match=r"no target 'logits'.* serves with --set logits=head, or with --set kd_alpha=0\.0$"):
        methods.build("scalekd", student=student, cache=cache)
    with pytest.raises(
        MissingError, match=r"whose tail has .* serves with --set s3_blocks=2 --set s4_blocks=0, or with --set s3_blocks=1 --set s4_blocks=1$"
    ):
        methods.build("scalekd", student=student, cache=cache, settings=asked)
    needs_both = {"s4_blocks": 1, "alpha_s4": (0.1, 0.1)}
    with pytest.raises(
        MissingError, match=r"serves with --set logits=head --set s3_blocks=2 --set s4_blocks=0, or with --set logits=head --set s3_b"
    ) as error:
        methods.build("scalekd", student=student, cache=cache, settings=needs_both)
    methods.build("scalekd", student=student, cache=cache, settings=needs_both | {"logits": "head", "s3_blocks": 1, "s4_blocks": 1})
    assert "kd_alpha=0.0 --set s3_blocks=1" in str(error.value)
    with pytest.raises(MissingError, match=r"serves with --set scalekd\.logits=head, or with --set scalekd\.kd_alpha=0\.0$"):
        methods.build("mimic+scalekd", student=student, cache=cache)
    of_sum = {"s4_blocks": 1, "alpha_s4": (0.1, 0.1)}  # what was given stays, in all that is tried
    with pytest.raises(MissingError, match=r"serves with --set scalekd\.logits=head --set scalekd\.s3_blocks=2 --set scalekd\.s4_blocks=0, or"):
        methods.build("mimic+scalekd", student=student, cache=cache, settings=of_sum)
    methods.build("mimic+scalekd", student=student, cache=cache, settings={"scalekd.logits": "head"})
    with pytest.raises(MissingError, match=r"no target 'logits'.* to add it$"):  # kd has no way without them
        methods.build("kd+scalekd", student=student, cache=cache)
    repeating = asked | {"s4_repeats": True}  # the last block serves both stages: the tail that is there is enough
    method = methods.build("scalekd", student=student, cache=cache, settings=repeating)
    assert (method.s3_modules, method.s4_modules) == (["blocks.2", "blocks.3"], ["blocks.3", "norm"])
    grid = torch.randn(2, 16, 32)
    assert all(part.isfinite() for part in method(images_of(_VIT), torch.tensor([1, 2]), {"features@norm": {"grid": grid}}).values())
    with pytest.raises(UsageError, match=r"--set s5_blocks: none of the methods scalekd has this field; did you mean 's._blocks'\?"):
        run_extract(vit, "cache", settings={"s5_blocks": 1})
    with pytest.raises(UsageError, match="expected --for METHOD beside it"):
        run_extract(vit, "cache", methods=(), settings={"s4_blocks": 1})


def test_settings_go_to_every_method_that_has_them_or_to_the_one_that_is_named() -> None:
    given = {"temperature": 2, "scalekd.logits": "head", "vitkd.alpha": 1, "heads_s3": 4}
    assert methods.share_out(["kd", "scalekd", "nkd+vitkd"], given) == {
        "kd": {"temperature": 2},
        "scalekd": {"temperature": 2, "logits": "head", "heads_s3": 4},
        "nkd+vitkd": {"temperature": 2, "vitkd.alpha": 1},
    }


def test_a_longer_tail_takes_the_place_of_a_shorter_one_and_serves_both(vit: Path) -> None:
    run_extract(vit, "grown", settings={"logits": "head"})
    whole = {"logits": "head", "s4_blocks": 1, "s3_blocks": 3}
    assert run_extract(vit, "grown", settings=whole).resumed_shards == 1
    assert open_cache(vit / "grown").layer(None).tail.identity.modules == ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm")
    run_extract(vit, "whole", settings=whole)
    assert run_extract(vit, "grown", settings={"logits": "head"}).resumed_shards == 1  # within it: nothing to do
    assert open_cache(vit / "grown").root == open_cache(vit / "whole").root != open_cache(vit / "cache").root
    assert verify(str(vit / "grown")).ok
    student = tiny_model("vit_tiny_patch16_224", **_VIT)
    parts = []
    for name in ("cache", "grown"):
        torch.manual_seed(0)
        method = methods.build("scalekd", student=student, cache=open_cache(vit / name), settings={"logits": "head"}).eval()
        parts.append(method(images_of(_VIT), torch.tensor([1, 2]), {"features@norm": {"grid": torch.ones(2, 16, 32)}}))
    assert parts[0] == parts[1]


def test_a_tail_of_maps_serves_one_split(folder: Path) -> None:
    with pytest.raises(MismatchError, match=r"'modules' differs: the cache has 'layers\.3, norm', this run has 'layers\.2, layers\.3, norm'"):
        run_extract(folder, "cache", settings={"s3_blocks": 2})


def test_killed_while_it_stores_the_tail_a_run_resumes_to_the_same_bytes(vit: Path, tmp_path: Path) -> None:
    """SIGKILL before its file appears, before its card does, and at what comes before and after; two processes finish at once."""
    cache = vit / "killed"
    moments = [("/teacher.json", 1), *(("/tmp/", count) for count in range(1, 26, 4)), ("/tail.safetensors", 1), ("/tail.json", 1), ("/targets/", 1)]
    struck = 0
    for where, count in moments:

        def action(where: str = where, count: int = count) -> None:
            die_at(cache, where, count)
            run_extract(vit, "killed", settings={"logits": "head"})

        child = Forked(action, tmp_path / "log")
        assert child.wait() == -signal.SIGKILL, f"the kill at {where} {count} did not strike: {child.output()}"
        struck = max(struck, len(tail_files(cache)))
        assert len(tail_files(cache)) >= {"/tail.json": 1, "/targets/": 2}.get(where, 0)
    assert struck == 2
    shutil.rmtree(cache)
    runs = [Forked(lambda: run_extract(vit, "killed", settings={"logits": "head"}) and 0, tmp_path / f"log{i}") for i in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.output() for run in runs]
    compare_tails(cache, vit / "cache")


def compare_tails(cache: Path, other: Path) -> None:
    assert [path.name for path in tail_files(cache)] == ["tail.json", "tail.safetensors"]
    assert [path.read_bytes() for path in tail_files(cache)] == [path.read_bytes() for path in tail_files(other)]
    assert groups(cache) == groups(other) and open_cache(cache).root == open_cache(other).root
    assert verify(str(cache)).ok


@pytest.mark.parametrize(("ours_first", "difference"), [(True, 1e-6), (False, 1e-6), (False, 0.1)])
def test_of_two_runs_that_make_other_bytes_the_cards_file_stays(
    vit: Path, monkeypatch: pytest.MonkeyPatch, ours_first: bool, difference: float
) -> None:
    """Another device may compute other last bits of what the file holds. Whose card is there, his file is there, and serves if that is all."""
    import kdcache.cards as cards

    _, weights = tail_files(vit / "cache")
    tensors = safetensors.torch.load(weights.read_bytes())
    theirs = safetensors.torch.save({name: tensor + (difference if name == "norm.weight" else 0) for name, tensor in tensors.items()})
    other = vit / f"race{ours_first}{difference}"
    store = open_store(other)
    own = cards.create_document

    def create(target: Any, path: str, identity: Any, **more: Any) -> Any:
        if path.endswith("tail.json"):  # now the other run comes in between
            found = other / "teachers" / "teacher" / "tail.safetensors"
            if ours_first:  # it has found our file, and replaced it, before our card is there
                store.delete("teachers/teacher/tail.safetensors")
                store.put_new("teachers/teacher/tail.safetensors", theirs)
            else:  # its file was there first; its card comes before ours
                assert found.read_bytes() == weights.read_bytes()
                digest = DigestField(size=len(theirs), digest=blake2b_128(theirs))
                own(target, path, identity.model_copy(update={"weights": digest}))
        return own(target, path, identity, **more)

    if not ours_first:
        store.put_new("teachers/teacher/tail.safetensors", theirs)
    monkeypatch.setattr(cards, "create_document", create)
    if ours_first:
        run_extract(vit, other.name, settings={"logits": "head"})
        assert (other / "teachers" / "teacher" / "tail.safetensors").read_bytes() == weights.read_bytes()
    else:
        if difference > 0.01:
            with pytest.raises(MismatchError, match=r"'weights\.digest' differs.*a teacher has one tail"):
                run_extract(vit, other.name, settings={"logits": "head"})
        else:
            run_extract(vit, other.name, settings={"logits": "head"})
            monkeypatch.setattr(cards, "create_document", own)
            run_extract(vit, other.name, settings={"logits": "head"}, views=2)  # resumed on this device: there is work to do, and theirs is known
            assert verify(str(other)).ok
        assert (other / "teachers" / "teacher" / "tail.safetensors").read_bytes() == theirs
    open_cache(other)


def test_copy_takes_the_tail_along_and_gc_drops_it_with_its_teacher(folder: Path) -> None:
    summary = copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / "copy")))
    assert summary.root == open_cache(folder / "cache").root and verify(str(folder / "copy")).ok
    report = gc(GcConfig(cache=str(folder / "copy"), drop_teachers=("teacher",), delete=True))
    assert report.bytes > tail_files(folder / "cache")[1].stat().st_size and "and its tail, 1.73 MB" in report.dropped[0]
    assert not tail_files(folder / "copy") and verify(str(folder / "copy")).ok


def test_what_is_added_is_counted_with_tail_and_calibration_as_inspect_counts_it(vit: Path) -> None:
    added = [
        run_extract(vit, "counted", settings={"logits": "head"}, **more).bytes for more in ({}, {}, {"views": 2}, {"methods": ("vitkd", "scalekd")})
    ]
    assert added[1] == 0 and sum(added) == owned_bytes(open_cache(vit / "counted")) > tail_files(vit / "counted")[1].stat().st_size


def test_a_teacher_that_is_refused_for_its_tail_leaves_nothing_in_the_cache(vit: Path, tmp_path: Path) -> None:
    args = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    name = save_local_dir(tiny_model("cait_xxs24_224", **args), tmp_path / "cait", args)
    shutil.copytree(vit / "cache", vit / "refused")
    for cache in ("refused", "new"):
        with pytest.raises(TeacherError, match="its tail can't be cut"):
            run_extract(vit, cache, teacher=name, name="cait")
    assert list(open_cache(vit / "refused").teachers) == ["teacher"] and not (vit / "new" / "cache.json").exists()


def test_a_teacher_whose_pass_is_more_than_its_blocks_is_refused() -> None:
    model = tiny_model("vit_tiny_patch16_224", **_VIT)
    with pytest.raises(TeacherError, match="does not go through module 'fc_norm'"):
        cut_tail(model, images_of(_VIT), ["blocks.3", "fc_norm"], model_name="x")
