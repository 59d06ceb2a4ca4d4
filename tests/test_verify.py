"""`verify` tells what is wrong and why, readers refuse it, and `--repair` brings back the very bytes: each on a real cache with a real tiny teacher."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_VIT_ARGS, make_shard, make_shards, make_teacher_dir, perturb, save_local_dir, tiny_model
from PIL import Image
from test_extract import groups, run, tree
from test_repair import flip, one, read_everything

import kdcache.views
from cli.main import main
from kdcache import open_cache
from kdcache.errors import CorruptError, KDCacheError, NotACacheError
from kdcache.join import CachedViews
from pipelines.repair import RepairConfig, carry_out, plan_repair
from pipelines.verdict import Verdict
from pipelines.verify import Recompute, verify

KLT = "features@norm:klt=0.99"
LAYER = "cache/teachers/teacher"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of six samples, a cache with a calibrated target and a tail, and one of another seed and another teacher of the same name."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder / "shards", num_shards=2, num_samples=6)
    make_teacher_dir(folder / "teacher")
    run(folder, targets=("logits", KLT), methods=("scalekd",))
    make_teacher_dir(folder / "second", seed=5)
    run(folder, "other", seed=7, teacher=f"local-dir:{folder / 'second'}", name="teacher", targets=("logits", KLT))
    return folder


@pytest.fixture
def setup(made: Path, tmp_path: Path) -> Path:
    """A copy of the cache, times included, beside the shards that it was made from."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path


def problems(cache: Path, **options: Any) -> set[tuple[str, str]]:
    """(kind, shard) of what verify finds."""
    return {(problem.kind, problem.shard) for problem in verify(str(cache), workers=0, **options).problems}


def repair(cache: Path, **options: Any) -> list[str]:
    """Mend what verify finds; what could not be done."""
    plan = plan_repair(str(cache), verify(str(cache)))
    assert not plan.impossible, plan.impossible
    return carry_out(str(cache), plan, RepairConfig(workers=0, **options))


def swap(a: Path, b: Path) -> None:
    """Exchange two files or folders."""
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def swap_groups(folder: Path, pattern: str) -> None:
    first, second = sorted(folder.glob(pattern))
    swap(first, second)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_index(root: Path) -> None:
    shutil.rmtree(root / "cache/index")


def all_of(*actions: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for action in actions:
            action(root)

    return damage


def foreign(pattern: str) -> Callable[[Path], None]:
    """A record of another cache with its group, in the place of ours if it has its name."""

    def damage(root: Path) -> None:
        theirs = one(root, f"other/{pattern}")
        ours = root / "cache" / theirs.relative_to(root / "other")
        ours.write_bytes(theirs.read_bytes())
        group = json.loads(theirs.read_text())["identity"]["group"]["name"]
        if not (ours.parent / group).exists():
            shutil.copytree(theirs.parent / group, ours.parent / group)

    return damage


def garbage(root: Path) -> None:
    (root / "cache/views/notes.txt").write_text("mine")
    shutil.copytree(one(root, f"{LAYER}/train-0000.*.zarr"), root / f"{LAYER}/train-0000.000000000000.000000000000.zarr")
    (root / "cache/index/index.000000000000.json").write_text("{}")


TARGET, RECORD = f"{LAYER}/train-0000.*.zarr/logits/codes/c/0/0/0", f"{LAYER}/train-0001.*.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], set[tuple[str, str]]]] = {
    "target chunk flipped": (lambda r: flip(one(r, TARGET), 20), {("corrupt", "train-0000")}),
    "target file cut": (lambda r: cut(one(r, TARGET), 30), {("corrupt", "train-0000")}),
    "group file deleted": (lambda r: one(r, f"{LAYER}/train-0000.*.zarr/logits/range/zarr.json").unlink(), {("missing", "train-0000")}),
    "group deleted": (lambda r: shutil.rmtree(one(r, f"{LAYER}/train-0001.*.zarr")), {("missing", "train-0001")}),
    "target groups exchanged": (lambda r: swap_groups(r, f"{LAYER}/train-*.zarr"), {("corrupt", "train-0000"), ("corrupt", "train-0001")}),
    "target record deleted": (lambda r: one(r, RECORD).unlink(), {("index", ""), ("extra", "train-0001")}),
    "target record flipped": (lambda r: flip(one(r, RECORD)), {("corrupt", "train-0001"), ("index", "")}),
    "target record flipped, no index": (all_of(lambda r: flip(one(r, RECORD)), drop_index), {("corrupt", "train-0001")}),
    "target records exchanged": (lambda r: swap_groups(r, f"{LAYER}/train-*.json"), {("plan", "train-0000"), ("plan", "train-0001"), ("index", "")}),
    "target record of another cache": (foreign("teachers/teacher/train-0000.*.json"), {("teacher", "train-0000")}),
    "views file flipped": (lambda r: flip(one(r, "cache/views/train-0000.*.zarr/labels/c/0"), 20), {("corrupt", "train-0000")}),
    "views group and targets damaged": (
        all_of(lambda r: shutil.rmtree(one(r, "cache/views/train-0000.*.zarr")), lambda r: flip(one(r, TARGET), 20)),
        {("missing", "train-0000"), ("corrupt", "train-0000")},
    ),
    "views groups exchanged": (lambda r: swap_groups(r, "cache/views/train-*.zarr"), {("corrupt", "train-0000"), ("corrupt", "train-0001")}),
    "views record flipped": (lambda r: flip(one(r, "cache/views/train-0000.*.json")), {("corrupt", "train-0000"), ("index", ""), ("missing", "train-0000")}),
    "views record deleted, no index": (
        all_of(lambda r: one(r, "cache/views/train-0000.*.json").unlink(), drop_index),
        {("missing", "train-0000"), ("extra", "train-0000")},
    ),
    "views record of another cache": (foreign("views/train-0000.*.json"), {("plan", "train-0000"), ("teacher", "train-0000"), ("index", ""), ("extra", "train-0000")}),
    "calibration lost": (lambda r: (r / f"{LAYER}/targets/features@norm.calibration.safetensors").unlink(), {("missing", "")}),
    "calibration flipped": (lambda r: flip(r / f"{LAYER}/targets/features@norm.calibration.safetensors"), {("corrupt", "")}),
    "tail lost": (lambda r: (r / f"{LAYER}/tail.safetensors").unlink(), {("missing", "")}),
    "tail flipped": (lambda r: flip(r / f"{LAYER}/tail.safetensors"), {("corrupt", "")}),
    "index flipped": (lambda r: flip(one(r, "cache/index/index.*.json")), {("index", ""), ("extra", "")}),
    "index lost": (drop_index, set()),
    "table lost": (lambda r: one(r, "cache/index/table.*.bin").unlink(), {("index", "")}),
    "cache.json flipped": (lambda r: flip(r / "cache/cache.json"), {("corrupt", "")}),
    "cache.json lost": (lambda r: (r / "cache/cache.json").unlink(), {("missing", "")}),
    "teacher.json flipped": (lambda r: flip(r / f"{LAYER}/teacher.json"), {("corrupt", ""), ("missing", "")}),
    "card lost": (lambda r: (r / f"{LAYER}/targets/logits.json").unlink(), {("teacher", "train-0000"), ("teacher", "train-0001"), ("index", "")}),
    "source lost": (lambda r: one(r, "cache/sources/*.json").unlink(), {("index", "")}),
    "source flipped, no index": (all_of(lambda r: flip(one(r, "cache/sources/*.json")), drop_index), {("corrupt", "")}),
    "garbage": (garbage, {("extra", ""), ("extra", "train-0000"), ("index", "")}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_by_its_kind_and_repair_brings_back_the_very_bytes(setup: Path, made: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    if "another cache" in name:
        shutil.copytree(made / "other", setup / "other")
    cache = setup / "cache"
    before = tree(cache)
    damage(setup)
    assert problems(cache) == expected
    untouched = {path: os.stat(cache / path) for path, digest in tree(cache).items() if before.get(path) == digest}
    assert repair(cache) == []
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.ok, verdict.problems
    if name == "views record deleted, no index":  # nothing is left that says who made it: provenance, of which the root does not speak
        assert (groups(cache), verdict.root) == (groups(made / "cache"), open_cache(made / "cache").root)
    else:
        assert tree(cache) == before
    for path, status in untouched.items():
        assert (os.stat(cache / path).st_ino, os.stat(cache / path).st_mtime_ns) == (status.st_ino, status.st_mtime_ns), f"{path} was touched"
    assert not (cache / "tmp").exists()
