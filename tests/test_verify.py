"""`verify` tells what is wrong and why, readers refuse it, and `--repair` brings back the very bytes: each on a real cache with a real tiny teacher."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import flip, groups, one, read_everything, run, tree
from click.testing import CliRunner
from helpers import TINY_VIT_ARGS, make_shard, make_shards, make_teacher_dir, run_python, save_local_dir, tiny_model
from PIL import Image

import kdcache.teacher
import kdcache.views
from cli.main import main
from kdcache import open_cache
from kdcache.errors import KDCacheError, NotACacheError, StoreError, UsageError
from kdcache.index import load_documents, write_index
from kdcache.store import LocalStore, open_store
from pipelines.repair import RepairConfig, carry_out
from pipelines.verification.repair_plan import plan_repair
from pipelines.verification.verdict import Verdict
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
    "target records exchanged, no index": (
        all_of(lambda r: swap_groups(r, f"{LAYER}/train-*.json"), drop_index),
        {("plan", "train-0000"), ("plan", "train-0001")},
    ),
    "target record of another cache": (foreign("teachers/teacher/train-0000.*.json"), {("teacher", "train-0000")}),
    "views file flipped": (lambda r: flip(one(r, "cache/views/train-0000.*.zarr/labels/c/0"), 20), {("corrupt", "train-0000")}),
    "views group and targets damaged": (
        all_of(lambda r: shutil.rmtree(one(r, "cache/views/train-0000.*.zarr")), lambda r: flip(one(r, TARGET), 20)),
        {("missing", "train-0000"), ("corrupt", "train-0000")},
    ),
    "views groups exchanged": (lambda r: swap_groups(r, "cache/views/train-*.zarr"), {("corrupt", "train-0000"), ("corrupt", "train-0001")}),
    "views record flipped": (
        lambda r: flip(one(r, "cache/views/train-0000.*.json")),
        {("corrupt", "train-0000"), ("index", ""), ("missing", "train-0000")},
    ),
    "views record deleted, no index": (
        all_of(lambda r: one(r, "cache/views/train-0000.*.json").unlink(), drop_index),
        {("missing", "train-0000"), ("extra", "train-0000")},
    ),
    "views record of another cache": (
        foreign("views/train-0000.*.json"),
        {("plan", "train-0000"), ("teacher", "train-0000"), ("index", ""), ("extra", "train-0000")},
    ),
    "views record of another cache, cache.json flipped": (
        all_of(foreign("views/train-0000.*.json"), lambda r: flip(r / "cache/cache.json")),
        {("corrupt", "")},
    ),
    "calibration lost": (lambda r: (r / f"{LAYER}/targets/features@norm.calibration.safetensors").unlink(), {("missing", "")}),
    "calibration flipped": (lambda r: flip(r / f"{LAYER}/targets/features@norm.calibration.safetensors"), {("corrupt", "")}),
    "tail lost": (lambda r: (r / f"{LAYER}/tail.safetensors").unlink(), {("missing", "")}),
    "tail flipped": (lambda r: flip(r / f"{LAYER}/tail.safetensors"), {("corrupt", "")}),
    "index flipped": (lambda r: flip(one(r, "cache/index/index.*.json")), {("index", ""), ("extra", "")}),
    "index lost": (drop_index, set()),
    "index of another cache": (
        all_of(drop_index, lambda r: shutil.copytree(r / "other/index", r / "cache/index")),
        {("index", "")},
    ),
    "table lost": (lambda r: one(r, "cache/index/table.*.bin").unlink(), {("index", "")}),
    "cache.json flipped": (lambda r: flip(r / "cache/cache.json"), {("corrupt", "")}),
    "cache.json lost": (lambda r: (r / "cache/cache.json").unlink(), {("missing", "")}),
    "teacher.json flipped": (lambda r: flip(r / f"{LAYER}/teacher.json"), {("corrupt", ""), ("missing", "")}),
    "card lost": (lambda r: (r / f"{LAYER}/targets/logits.json").unlink(), {("teacher", "train-0000"), ("teacher", "train-0001"), ("index", "")}),
    "source lost": (lambda r: one(r, "cache/sources/*.json").unlink(), {("index", "")}),
    "source flipped, no index": (all_of(lambda r: flip(one(r, "cache/sources/*.json")), drop_index), {("corrupt", "")}),
    "garbage": (garbage, {("extra", ""), ("extra", "train-0000"), ("index", "")}),
}


SERVED = {
    "group file deleted",  # zarr.json: for other readers
    "target record flipped", "views record flipped", "views record of another cache", "teacher.json flipped", "source lost",
    "views file flipped",  # the index holds all of these too, and proves its own bytes
    "index lost", "table lost",  # derived: records and groups say the same
}  # fmt: skip
"""Damage that readers need not care about; all else they refuse."""
SERVED_OR_REFUSED = {"target records exchanged", "index of another cache"}
"""From the index, if the records have the size that it knows; as they are, or by what they say of each other, if not."""


@pytest.fixture(scope="module")
def wanted(made: Path) -> list[bytes]:
    return read_everything(made / "cache")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name_or_never_read_as_another_value(setup: Path, made: Path, wanted: list[bytes], name: str) -> None:
    damage, expected = DAMAGES[name]
    if "another cache" in name:
        shutil.copytree(made / "other", setup / "other")
    damage(setup)
    if name in SERVED:
        assert read_everything(setup / "cache") == wanted
    elif name not in SERVED_OR_REFUSED:
        with pytest.raises(KDCacheError, match=r"kdcache (verify|extract)") as refusal:
            read_everything(setup / "cache")
        assert any(shard in str(refusal.value) for _, shard in expected)
    if (setup / "cache/index").exists():
        drop_index(setup)
    with contextlib.suppress(KDCacheError):
        assert read_everything(setup / "cache") == wanted


def test_an_index_behind_the_records_is_no_damage_and_what_it_lacks_is_read(setup: Path, wanted: list[bytes]) -> None:
    cache = setup / "cache"
    whole, store = tree(cache), open_store(cache)
    documents, index = load_documents(store)
    assert index is not None
    drop_index(setup)
    path = str(one(setup, RECORD).relative_to(cache))
    write_index(store, {name: document for name, document in documents.items() if name != path}, open_cache(cache).tables)
    verdict = verify(str(cache))
    assert verdict.ok
    assert any("is behind: it lacks" in note for note in verdict.notes)
    assert read_everything(cache) == wanted
    assert repair(cache) == []
    assert tree(cache) == whole


def test_exchanged_groups_are_refused_by_train_with_shard_array_and_remedy(setup: Path) -> None:
    """Sound in themselves, of the same size, and each other's: no crc32c tells."""
    swap_groups(setup, f"{LAYER}/train-*.zarr")
    student = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    arguments = ["train", setup / "cache", "--student", "vit_tiny_patch16_224", "--method", "kd", "--out", setup / "runs", "--epochs", 1, "-j", 0]
    settings = [part for key, value in student.items() for part in ("--model-kwargs", f"{key}={value}")]
    result = invoke(*arguments, "--device", "cpu", *settings)
    assert result.exit_code == 1
    assert "train-000" in result.stderr
    assert "logits/" in result.stderr
    assert "kdcache verify CACHE --repair" in result.stderr


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
    if name in ("views record deleted, no index", "target records exchanged, no index"):  # nothing is left that says who made them: provenance
        assert (groups(cache), verdict.root) == (groups(made / "cache"), open_cache(made / "cache").root)
    else:
        assert tree(cache) == before
    for path, status in untouched.items():
        assert (os.stat(cache / path).st_ino, os.stat(cache / path).st_mtime_ns) == (status.st_ino, status.st_mtime_ns), f"{path} was touched"
    assert not (cache / "tmp").exists()


# --- what repair needs, and what it can't do ---


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_shows_first_and_does_it_when_told(setup: Path) -> None:
    cache = setup / "cache"
    before = tree(cache)
    bad = one(setup, TARGET)
    flip(bad, 20)
    damaged = tree(cache)
    shown = invoke("verify", cache, "--repair", "--json")
    assert shown.exit_code == 1
    assert tree(cache) == damaged
    assert f"{bad.relative_to(cache)}\n" in shown.stderr
    assert "nothing was changed: pass --repair --yes" in shown.stderr
    assert [problem["kind"] for problem in json.loads(shown.stdout)["problems"]] == ["corrupt"]
    done = invoke("verify", cache, "--repair", "--yes", "-j", 0, "--json")
    assert done.exit_code == 0, done.stderr
    assert tree(cache) == before
    body = json.loads(done.stdout)
    assert (set(body), body["ok"], body["problems"]) == ({"ok", "root", "shards", "rows", "problems"}, True, [])
    root, fingerprint = open_cache(cache).root, open_cache(cache).fingerprint
    assert f"root {root} fingerprint {fingerprint}: sound\n" in done.stderr
    assert "nothing to repair" in invoke("verify", cache, "--repair").stderr
    assert invoke("verify", cache, "--yes").exit_code == 2
    assert invoke("verify", cache, "--model", "local-dir:/nowhere").exit_code == 2


def test_a_repair_that_is_cut_off_anywhere_is_finished_by_the_next(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = setup / "cache"
    before = tree(cache)
    (cache / "cache.json").unlink()
    flip(one(setup, TARGET), 20)
    one(setup, RECORD).unlink()
    one(setup, "cache/index/table.*.bin").unlink()
    left = 0

    def dying(method: Any) -> Any:
        def change(store: LocalStore, *arguments: Any) -> Any:
            nonlocal left
            is_there = store.size(arguments[0]) is not None
            if store.root == cache and is_there == (method.__name__ == "delete"):
                left -= 1
                if left < 0:
                    raise InterruptedError
            return method(store, *arguments)

        return change

    for method in ("put_new", "delete"):
        monkeypatch.setattr(LocalStore, method, dying(getattr(LocalStore, method)))
    moments = 0
    while True:
        left = 1  # one change of the cache a run, and each must be a step forward
        moments += 1
        assert moments < 30
        with contextlib.suppress(InterruptedError):
            assert repair(cache) == []
            break
    left = 1000
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.ok, verdict.problems
    assert tree(cache) == before
    assert moments > 3


def test_a_record_beyond_reading_stays_until_its_segment_is_made_again(setup: Path) -> None:
    flip(one(setup, RECORD))
    drop_index(setup)
    damaged = tree(setup / "cache")
    (failure,) = repair(setup / "cache", model="local-dir:/nowhere")
    assert "/nowhere" in failure
    assert tree(setup / "cache") == damaged
    assert repair(setup / "cache") == []
    assert verify(str(setup / "cache")).ok


def test_a_plan_of_before_another_process_changed_the_cache_is_not_carried_out(setup: Path, made: Path) -> None:
    """The group of an extraction that had not yet written its record when verify looked."""
    cache, record = setup / "cache", one(setup, RECORD)
    data = record.read_bytes()
    record.unlink()
    drop_index(setup)
    plan = plan_repair(str(cache), verify(str(cache)))
    assert any(f"{path}".startswith("teachers/teacher/train-0001.") for path in plan.delete)
    record.write_bytes(data)
    before = tree(cache)
    with pytest.raises(StoreError, match="has changed it since it was verified; nothing was changed"):
        carry_out(str(cache), plan, RepairConfig(workers=0))
    assert tree(cache) == before


def test_what_is_repaired_is_not_advised_to_be(setup: Path) -> None:
    swap_groups(setup, "cache/views/train-*.zarr")  # told of each file, and of the arrays that readers refuse with a hint
    flip(one(setup, TARGET), 20)
    assert invoke("verify", setup / "cache").stderr.count("kdcache verify CACHE --repair") > 2
    result = invoke("verify", setup / "cache", "--repair", "--yes", "-j", 0, "--model", "local-dir:/nowhere")
    assert result.exit_code == 1
    before, after = result.stderr.split("failed", 1)
    assert "see below what the repair does about it" in before
    assert "the repair did not mend it: 'failed' above says why" in after
    assert "--repair" not in result.stderr


def test_a_repair_leaves_the_views_that_were_found_to_differ_in_the_verdict(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdcache.views, "resize", brighter)
    flip(one(setup, "cache/index/index.*.json"))
    result = invoke("verify", setup / "cache", "--views", 1, "--repair", "--yes", "-j", 0, "--json")
    assert "mended" in result.stderr
    assert {problem["kind"] for problem in json.loads(result.stdout)["problems"]} == {"pixels"}
    assert result.exit_code == 1


def test_where_a_teacher_lies_now_is_said_of_one_teacher(encodings: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(encodings, tmp_path / "cache")
    before = tree(tmp_path / "cache")
    for path in sorted(tmp_path.glob("cache/teachers/*/train-0000.*.zarr/features@blocks.0/grid/c/0/0/0/0")):
        flip(path, 20)
    elsewhere = f"local-dir:{made / 'teacher'}"
    with pytest.raises(UsageError, match="half, teacher are needed: pass --teacher NAME too"):
        repair(tmp_path / "cache", model=elsewhere)
    (failure,) = repair(tmp_path / "cache", model="local-dir:/nowhere", teacher="half")
    assert "/nowhere" in failure
    assert repair(tmp_path / "cache", model=elsewhere, teacher="half") == []
    assert tree(tmp_path / "cache") == before


def test_shards_with_fewer_views_than_others_are_unfinished(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shards": str(made / "shards"), "teacher": f"local-dir:{made / 'teacher'}", "targets": ("logits",)}
    run(tmp_path, views=1, **options)
    assert verify(str(tmp_path / "cache")).words == "sound"
    run(tmp_path, limit_shards=1, **options)
    verdict = verify(str(tmp_path / "cache"))
    assert (verdict.ok, verdict.words) == (True, "sound, but unfinished")
    assert {note.split(", train")[0] for note in verdict.notes if "unfinished" in note} == {
        "unfinished: 1 of 2 shards have fewer views than the 2 of others",
        "unfinished: teacher: logits: 1 of 2 shards lack it or views of it",
    }


def test_only_recompute_and_repair_load_a_teacher(setup: Path) -> None:
    code = """
import sys
from pipelines.verify import verify
assert verify(sys.argv[1]).ok
assert 'torch' not in sys.modules
assert verify(sys.argv[1], views=2, workers=0).ok
assert 'kdcache.teacher' not in sys.modules and 'timm' not in sys.modules
"""
    run_python(code, setup / "cache")


def test_what_is_lost_for_good_is_said_and_nothing_is_changed(setup: Path) -> None:
    cache = setup / "cache"
    flip(cache / "cache.json")
    drop_index(setup)
    before = tree(cache)
    result = invoke("verify", cache, "--repair", "--yes")
    assert result.exit_code == 1
    assert "cache.json is lost" in result.stderr
    assert "Restore the file" in result.stderr
    assert tree(cache) == before
    (cache / "cache.json").unlink()
    with pytest.raises(NotACacheError):
        verify(str(cache))


def test_tars_and_teacher_are_needed_only_for_what_is_bad(made: Path, tmp_path: Path) -> None:
    """Stored views, no tars, the teacher elsewhere: targets come back, views do not, and the index needs nothing."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, store_views="png", targets=("logits", KLT), limit_shards=1)
    run(tmp_path, views=3, targets=("logits", KLT))
    cache = tmp_path / "cache"
    before = tree(cache)
    (tmp_path / "shards").rename(tmp_path / "gone")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    drop_index(tmp_path)
    assert repair(cache) == []
    flip(one(tmp_path, f"{LAYER}/train-0000.*.zarr/logits/range/c/0/0/0"), 20)
    (failure,) = repair(cache)
    assert "save_for_hf" in failure
    assert repair(cache, model=f"local-dir:{tmp_path / 'moved'}") == []
    assert tree(cache) == before
    for path in sorted(cache.glob("views/train-0000.*.zarr/stored/bytes/c/0")):
        flip(path, 20)
    assert len(list(cache.glob("views/train-0000.*.json"))) == 2, "two segments, of two runs"
    failures = repair(cache)
    assert len(failures) == 2
    assert all("train-0000.tar can't be read" in failure for failure in failures)
    assert repair(cache, data=str(tmp_path / "gone")) == []
    assert tree(cache) == before
    assert verify(str(cache), views="all", workers=0).ok


def test_a_segment_that_comes_out_otherwise_is_replaced_whole_and_its_pixels_never(setup: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = setup / "cache"
    root = open_cache(cache).root
    flip(one(setup, TARGET), 20)
    monkeypatch.setattr("kdcache.arrays._BLOSC_LEVEL", 1)  # as another version of a codec
    assert repair(cache) == []
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.ok
    assert verdict.root != root
    flip(one(setup, "cache/views/train-0000.*.zarr/labels/c/0"), 20)
    before = tree(cache)
    monkeypatch.setattr(kdcache.views, "resize", lanczos)
    (failure,) = repair(cache)
    assert "other pixels than the teacher saw; nothing of it was replaced" in failure
    assert tree(cache) == before


def test_students_name_the_cache_that_they_come_from_by_the_root_that_verify_prints(setup: Path) -> None:
    arguments = ["train", setup / "cache", "--student", "vit_tiny_patch16_224", "--method", "kd", "--out", setup / "runs", "--epochs", 1, "-j", 0]
    settings = [
        part for key, value in {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}.items() for part in ("--model-kwargs", f"{key}={value}")
    ]
    assert invoke(*arguments, "--device", "cpu", *settings).exit_code == 0
    body = json.loads(invoke("verify", setup / "cache", "--json").stdout)
    (run_folder,) = (path.parent for path in (setup / "runs").rglob("summary.csv"))
    exported = [json.loads(path.read_text())["kdcache"] for path in run_folder.rglob("config.json")]
    assert exported
    assert {one["root"] for one in exported} == {body["root"]}


# --- pixels ---


def lanczos(image: Image.Image, size: int, _resample: Any) -> Image.Image:
    return image.resize((size, size), Image.Resampling.LANCZOS)


def brighter(image: Image.Image, size: int, resample: Any) -> Image.Image:
    return image.resize((size, size), resample).point(lambda value: min(255, value + 3))


def details(cache: Path, **options: Any) -> list[str]:
    return [problem.detail for problem in verify(str(cache), views="all", workers=0, **options).problems]


def test_no_drift_is_said(setup: Path) -> None:
    result = invoke("verify", setup / "cache", "--views", "all", "-j", 0)
    assert result.exit_code == 0
    assert "24 views compared: no drift" in result.stderr


def test_decoder_drift_names_the_resizer_that_was_used_and_how_far_the_pixels_are(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kdcache.views, "resize", lanczos)
        run(tmp_path, shards=str(made / "shards"), teacher=f"local-dir:{made / 'teacher'}")
    assert verify(str(tmp_path / "cache")).ok
    found = details(tmp_path / "cache")
    assert len(found) == 24
    assert all(text.startswith("decoder drift: view ") and "images' bytes are those of then" in text and "Pillow" in text for text in found)
    measured = [text for text in found if "Pillow's lanczos filter renders what the teacher saw: pixels then and now differ by at most" in text]
    assert len(measured) == 8, "the first four of each shard"
    with monkeypatch.context() as patch:
        patch.setattr(kdcache.views, "resize", brighter)
        run(tmp_path, "unknown", shards=str(made / "shards"), teacher=f"local-dir:{made / 'teacher'}", views=1, limit_shards=1)
    assert "only their digest is kept, and no resizer that is known here gives it" in details(tmp_path / "unknown")[0]


@pytest.mark.parametrize("codec", ["png", "jpeg95"])
def test_drift_of_stored_views_is_measured_against_what_is_stored(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    run(tmp_path, shards=str(made / "shards"), teacher=f"local-dir:{made / 'teacher'}", store_views=codec)
    monkeypatch.setattr(kdcache.views, "resize", brighter)
    verdict = verify(str(tmp_path / "cache"), views="all", workers=0)
    assert {problem.kind for problem in verdict.problems} == {"source"}
    text = verdict.problems[0].detail
    assert text.startswith("decoder drift: ")
    assert "training reads what is stored" in text
    if codec == "png":
        assert "differ from the stored ones by at most 3 of 255 levels, 3 on average" in text or "at most 3 of 255 levels, 2." in text


def test_an_image_that_was_changed_in_place_is_source_drift_and_no_decoders_fault(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path)
    path = tmp_path / "shards/train-0001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xda") + 30
    data[start : start + 4] = bytes(255 - byte if byte not in (0, 255) else byte for byte in data[start : start + 4])
    path.write_bytes(data)
    found = details(tmp_path / "cache")
    assert len(found) == 2
    assert all(text.startswith("source drift: view ") and "the bytes of images in" in text and "restore the tar" in text for text in found)


def test_a_changed_member_table_says_which_members(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path)
    path = tmp_path / "shards/train-0000.tar"
    original = path.read_bytes()
    place = original.index(b"s0001.cls") + 512
    path.write_bytes(original[:place] + b"9" + original[place + 1 :])
    (found,) = details(tmp_path / "cache")
    assert "other label: 's0001' (1 then, 9 now)" in found
    make_shard(path, num_samples=5, seed=0, size_wh=(41, 30))
    (found,) = details(tmp_path / "cache")
    assert "gone: 's0005'" in found
    assert "bytes then" in found
    path.write_bytes(original[: len(original) // 2])
    (found,) = details(tmp_path / "cache")
    assert "the tar is cut short" in found


# --- the teacher ---


def again(cache: Path, rows: int = 3, **options: Any) -> Verdict:
    return verify(str(cache), recompute=Recompute(rows=rows, device="cpu", **options), workers=0)


@pytest.fixture(scope="module")
def encodings(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of encoding, mixed and stored views, and a second teacher in bf16."""
    folder = tmp_path_factory.mktemp("encodings")
    policy = folder / "mix.yaml"
    policy.write_text("base: strong\nmix: {prob: 1.0, mixup_alpha: 0.8, cutmix_alpha: 1.0}\n")
    targets = ("logits:topk=3", "features@norm:dct", "features@blocks.0:int8", "features@blocks.1:klt=0.99")
    options: dict[str, Any] = {"shards": str(made / "shards"), "teacher": f"local-dir:{made / 'teacher'}"}
    run(folder, augment=str(policy), store_views="png", targets=targets, **options)
    run(
        folder, name="half", precision="bf16", targets=("logits", "features@norm:bf16", "features@blocks.0:fp16", "features@blocks.1:int8"), **options
    )
    return folder / "cache"


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_teacher_that_is_as_it_was_gives_what_is_cached_in_any_batch(encodings: Path, batch_size: int) -> None:
    verdict = again(encodings, rows=6, batch_size=batch_size)
    assert verdict.ok, verdict.problems
    assert verdict.rows_recomputed == 24
    assert sum("outputs as recorded" in note for note in verdict.notes) == 2


def test_teacher_drift_is_told_by_weights_or_else_by_outputs(made: Path, encodings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made / "cache"
    model = tiny_model(**TINY_VIT_ARGS)
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    save_local_dir(model, tmp_path / "altered", TINY_VIT_ARGS)
    (problem,) = again(cache, model=f"local-dir:{tmp_path / 'altered'}").problems
    assert problem.kind == "teacher"
    assert "teacher drift: teacher 'teacher': field 'weights' differs" in problem.detail
    (problem,) = again(cache, model="local-dir:/nowhere").problems
    assert "can't be run again" in problem.detail
    assert "pass --model or --checkpoint" in problem.detail
    original = kdcache.teacher.Teacher.__call__

    def drifted(teacher: Any, *arguments: Any) -> Any:
        values = original(teacher, *arguments)
        return {name: {part: tensor * 1.03 for part, tensor in value.items()} for name, value in values.items()}

    monkeypatch.setattr(kdcache.teacher.Teacher, "__call__", drifted)
    found = again(encodings).problems
    assert {(problem.kind, problem.shard) for problem in found} == {("teacher", "train-0000"), ("teacher", "train-0001")}
    assert all("differ though its weights are those of then" in problem.detail for problem in found)
    assert {name for name in ("topk", "features@norm") for problem in found if name in problem.detail} == {"features@norm"}


def test_rows_to_show_again_are_chosen_by_seed_and_other_pixels_are_not_the_teachers_fault(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    original = kdcache.teacher.Teacher.__call__

    def spy(teacher: Any, views: torch.Tensor, targets: Any) -> Any:
        seen.append(views.numpy().tobytes())
        return original(teacher, views, targets)

    monkeypatch.setattr(kdcache.teacher.Teacher, "__call__", spy)
    for _ in range(2):
        assert again(made / "cache", rows=2).rows_recomputed == 4
    assert seen[:2] == seen[2:]
    monkeypatch.setattr(kdcache.views, "resize", brighter)
    assert {problem.kind for problem in again(made / "cache").problems} == {"pixels"}


def test_a_target_that_holds_another_rows_values_is_found_by_the_teacher_alone(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digest holds, since it was written so: a fault of whoever wrote the cache."""
    from kdcache.commit import GroupWriter

    append = GroupWriter.append

    def shifted(writer: GroupWriter, arrays: Any) -> None:
        append(writer, {name: np.roll(values, 1, axis=0) if name.startswith("logits") else values for name, values in arrays.items()})

    monkeypatch.setattr(GroupWriter, "append", shifted)
    run(tmp_path, shards=str(made / "shards"), teacher=f"local-dir:{made / 'teacher'}", targets=("logits", KLT))
    monkeypatch.undo()
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok
    found = again(tmp_path / "cache", rows=12).problems
    assert {(problem.shard, "'logits'" in problem.detail) for problem in found} == {("train-0000", True), ("train-0001", True)}
