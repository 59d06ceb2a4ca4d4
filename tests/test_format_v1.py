"""Format v1 lasts: the cache that is checked in stays readable, by today's code and by a reader that knows FORMAT.md alone."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import format_reader
import numpy as np
import pytest
import zarr
from helpers import TINY_VIT, reseal
from PIL import Image

from kdcache import open_cache
from kdcache.draws import draw, draw_mix
from kdcache.errors import FormatVersionError
from kdcache.tail import load_tail
from kdcache.views import pixel_digest
from pipelines.train import TrainConfig, train
from pipelines.verify import verify

FIXTURES = Path(__file__).parent / "fixtures"
CACHE = FIXTURES / "format-v1"
EXPECTED = json.loads((FIXTURES / "format-v1.json").read_text())
"""Root, and of every row and view its params, pixel digest, labels, and of each target the first three values and the sum."""
IMAGE_SIZE = (40, 30)
"""Of every image behind the fixture."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(CACHE, tmp_path / "cache")
    return tmp_path / "cache"


def test_the_fixture_has_one_of_everything() -> None:
    """What it lacks, these tests do not keep readable."""
    with open_cache(CACHE) as cache:
        encodings = {card.identity.encoding for layer in cache.teachers.values() for card in layer.targets.values()}
        assert {name.partition("=")[0] for name in encodings} == {"dense", "topk", "fp16", "bf16", "int8", "klt", "dct"}
        assert {layer.document.identity.model for layer in cache.teachers.values() if layer.tail is not None} == {"vit_tiny_patch16_224"}
        assert all(card.identity.prefix_tokens for layer in cache.teachers.values() for card in layer.targets.values() if card.identity.node)
        assert [skip.reason for skip in cache.views_record("train-0000", 0).skipped] == ["damaged image"]
        assert [len(cache.views[shard]) for shard in cache.shards] == [2, 1]  # growth
        params = [one for shard in cache.shards for view in range(2) for one in cache.read_params(shard, view, range(len(cache.keys(shard))))]
        assert {one.mix.mode for one in params if one.mix} == {1, 2}
        assert len({op for one in params for op, _ in one.ops}) > 8
        assert any(one.erase for one in params) and any(one.flip for one in params)
        assert -1 in cache.rows.label and "日本" in cache.keys("train-0001")


def test_the_fixture_reads_as_when_it_was_made() -> None:
    with open_cache(CACHE) as cache:
        assert (cache.root, cache.fingerprint) == (EXPECTED["root"], EXPECTED["fingerprint"])
        assert len(EXPECTED["rows"]) == cache.num_rows * cache.num_views == 16
        for name, expected in EXPECTED["rows"].items():
            shard, key, view = name.split(" ")
            row = cache.row_of(shard, key)
            assert cache.read_params(shard, int(view), [row])[0].to_row().tolist() == expected["params"]
            assert int(cache.read_pixel_digests(shard, int(view), [row])[0]) == expected["pixels"]
            assert pixel_digest(cache.view(shard, key, int(view))) == expected["pixels"]
            for teacher in cache.teachers:
                read = cache.read(shard, key, int(view), teacher)
                assert read["label"] == expected["label"] and read.get("partner_label") == expected.get("partner_label")
                values = {target: value for target, value in read.items() if isinstance(value, np.ndarray)}
                assert {f"{teacher} {target}" for target in values} == {one for one in expected if one.startswith(f"{teacher} ")}
                for target, value in values.items():
                    found = [*value.reshape(-1)[:3].tolist(), float(value.sum())]
                    assert found == pytest.approx(expected[f"{teacher} {target}"], rel=1e-4, abs=1e-4)


def test_the_fixture_is_sound() -> None:
    """Its tars are not kept: with another Pillow their images might well render otherwise. The stored views are decoded and compared."""
    verdict = verify(str(CACHE), views="all", workers=0)
    assert verdict.ok, verdict.problems
    assert (verdict.root, verdict.rows, verdict.views_replayed) == (EXPECTED["root"], 8, 16)


def test_views_are_drawn_as_when_the_fixture_was_made() -> None:
    with open_cache(CACHE) as cache:
        for shard in cache.shards:
            record = cache.views_record(shard, 0)
            skipped = {skip.index for skip in record.skipped}
            positions = [position for position in range(record.samples) if position not in skipped]
            for row, (position, key) in enumerate(zip(positions, cache.keys(shard), strict=True)):
                for view in range(cache.num_views):
                    (stored,) = cache.read_params(shard, view, [row])
                    assert stored.unmixed == draw(cache.plan, shard, key, view, IMAGE_SIZE)
                    mix = draw_mix(cache.plan, shard, key, view, position=position, num_samples=record.samples)
                    while mix is not None and mix.partner in {*skipped, position}:
                        mix = replace(mix, partner=(mix.partner + 1) % record.samples)
                    assert stored.mix == mix


def test_a_student_trains_on_the_fixture(copy: Path, tmp_path: Path) -> None:
    """With the tail, and with the encoding that needs most: both teachers are read."""
    student = {"students": (TINY_VIT,), "model_kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}}
    common: dict[str, Any] = {
        "cache": str(copy),
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "out": str(tmp_path / "runs"),
    } | student
    for options in (
        {"teacher": "vit", "method": "scalekd", "settings": {"student_s3": "blocks.0"}},
        {"teacher": "registers", "method": "kd"},
    ):
        (run,) = train(TrainConfig(**{"check_views": 1.0, "task_loss_weight": 0.0, **common, **options}))
        assert run["status"] == "done"


# --- a reader of its own ---------------------------------------------------------------------------------------------


def test_a_reader_of_less_than_a_hundred_lines_reads_what_kdcache_reads() -> None:
    code = Path(format_reader.__file__).read_text()
    docstring = (ast.get_docstring(ast.parse(code), clean=False) or "").count("\n") + 1
    assert sum(bool(line.strip()) for line in code.splitlines()) - docstring < 100
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert imported - {"numpy", "zarr"} <= set(sys.stdlib_module_names)
    found = format_reader.read_cache(CACHE)
    with open_cache(CACHE) as cache:
        assert (found["root"], found["plan"]) == (cache.root, cache.plan.to_json())
        assert found["rows"].keys() == {(shard, key, view) for shard in cache.shards for key in cache.keys(shard) for view in range(cache.num_views)}
        for (shard, key, view), row in found["rows"].items():
            place = [cache.row_of(shard, key)]
            assert (row.pop("params") == cache.read_params(shard, view, place)[0].to_row()).all()
            assert row.pop("pixels") == cache.read_pixel_digests(shard, view, place)[0]
            assert (np.array(Image.open(io.BytesIO(row.pop("stored")))) == cache.view(shard, key, view)).all()
            label = row.pop("label")
            for teacher in cache.teachers:
                expected = cache.read(shard, key, view, teacher)
                assert label == expected["label"]
                for target in [target for target, value in expected.items() if isinstance(value, np.ndarray)]:
                    np.testing.assert_allclose(row.pop(f"{teacher} {target}"), expected[target], rtol=1e-5, atol=1e-5)
            assert row == {}
        tail = load_tail(cache.store, cache.layer("vit")).model.state_dict()
        assert found["tails"]["vit"].keys() >= tail.keys()
        assert all((found["tails"]["vit"][name] == tensor.numpy()).all() for name, tensor in tail.items())


def test_zarr_opens_every_group_and_reads_every_array() -> None:
    """As users do: no option, nothing but the path. A warning would fail the test."""
    groups = sorted(CACHE.rglob("*.zarr"))
    assert len(groups) == 3 + 3 + 2
    for path in groups:
        group = zarr.open_group(path, mode="r")
        arrays = {name: array for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
        assert {str(file.parent.relative_to(path)) for file in path.rglob("zarr.json")} == {".", *dict(group.members(max_depth=None))}
        assert len(arrays) > 8 or "logits/codes" in arrays or "logits/top" in arrays
        for name, array in arrays.items():
            assert array[...].shape == array.shape
            assert (zarr.open_array(path / name, mode="r")[...] == array[...]).all()
            assert array.nbytes_stored() > 0


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["cache.json", "views/*.json", "teachers/vit/teacher.json", "teachers/vit/tail.json", "teachers/vit/targets/logits.json",
                "teachers/vit/train-0000.*.json", "sources/*.json", "index/index.*.json"],
)  # fmt: skip
def test_a_file_of_another_version_is_refused_by_its_number(copy: Path, pattern: str) -> None:
    """Whatever else such a file says, by every command."""
    version = 2
    path = sorted(copy.glob(pattern))[0]
    path.write_bytes(reseal({**json.loads(path.read_bytes()), "version": version, "kind": "unheard of", "identity": 5}))
    if not pattern.startswith("index"):
        shutil.rmtree(copy / "index")  # which holds the documents as they were
    expected = rf"{path.name}.*format version {version}, this kdcache reads version 1; install"
    commands: list[Callable[[], Any]] = [lambda: open_cache(copy), lambda: train(TrainConfig(cache=str(copy), students=(TINY_VIT,)))]
    if pattern.startswith("index"):  # derived: the cache itself is of our version
        (problem,) = [problem for problem in verify(str(copy)).problems if problem.kind == "index"]
        assert re.search(expected, problem.detail)
    else:
        commands.append(lambda: verify(str(copy)))
    for command in commands:
        with pytest.raises(FormatVersionError, match=expected):
            command()
