"""What an error tells the user to do works: every remedy is followed to its end, and no damage is adopted, shadowed or passed over."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import FEATURES, flip, groups, one, run, tree
from helpers import Forked, make_shard, make_shards, make_teacher_dir, run_python

import kdcache.preflight
import pipelines.extract
from kdcache import open_cache
from kdcache.errors import CorruptError, KDCacheError, MismatchError, MissingError, ShardError, TeacherError, UsageError
from kdcache.index import index_paths, load_documents
from kdcache.store import LocalStore, open_store
from kdcache.teacher import load_teacher
from pipelines.verify import verify


def kinds(cache: Path) -> set[str]:
    return {problem.kind for problem in verify(str(cache)).problems}


def test_damaged_group_is_replaced_once_its_record_is_deleted(setup: Path) -> None:
    run(setup)
    expected = groups(setup / "cache")
    flip(one(setup / "cache", "teachers/teacher/train-0000.*.zarr/logits/codes/c/0/0/0"))
    assert kinds(setup / "cache") == {"corrupt"}
    with pytest.raises(CorruptError, match=r"train-0000.*crc32c"):
        [open_cache(setup / "cache").read("train-0000", "s0000", view) for view in range(2)]
    one(setup / "cache", "teachers/teacher/train-0000.*.json").unlink()
    run(setup)
    assert groups(setup / "cache") == expected
    assert verify(str(setup / "cache"), views="all", workers=0).ok


def test_recreated_record_with_other_content_is_what_readers_see(setup: Path) -> None:
    """The index remembers the old record: it must neither shadow the new one nor survive."""
    run(setup, batch_size=1)
    layer = setup / "cache" / "teachers" / "teacher"
    old = json.loads(one(layer, "train-0001.*.json").read_text())["identity"]["group"]["name"]
    one(layer, "train-0001.*.json").unlink()
    shutil.rmtree(layer / old)
    make_teacher_dir(setup / "teacher2")
    run(setup, batch_size=64)
    cache = open_cache(setup / "cache")
    on_disk = load_documents(open_store(setup / "cache"), use_index=False)[0]
    assert cache.documents == on_disk
    assert cache.read("train-0001", "s0005", 1)["logits"].shape == (10,)
    assert verify(str(setup / "cache"), views="all", workers=0).ok


@pytest.mark.parametrize("damage", ["index-missing", "index-flipped", "table-missing", "table-flipped"])
def test_damaged_index_is_told_and_rebuilt_by_extract(setup: Path, damage: str) -> None:
    run(setup)
    before = groups(setup / "cache")
    what, how = damage.split("-")
    path = one(setup / "cache" / "index", "index.*.json" if what == "index" else "table.*.bin")
    if how == "missing":
        path.unlink()
    else:
        flip(path)
        assert kinds(setup / "cache") >= {"index"}
        with pytest.raises(CorruptError, match=r"run 'kdcache extract' again to rebuild"):
            assert len(open_cache(setup / "cache").rows)
    if damage in ("index-missing", "table-missing"):
        assert len(open_cache(setup / "cache").rows) == 12  # derived: the groups say the same
    summary = run(setup)
    assert (summary.bytes, summary.rows) == (0, 12)
    assert verify(str(setup / "cache"), views="all", workers=0).ok
    assert groups(setup / "cache") == before
    assert len(list((setup / "cache" / "index").iterdir())) == 2


def test_deleted_views_record_is_extracted_again_and_joins_its_targets(setup: Path) -> None:
    run(setup)
    before = groups(setup / "cache")
    flip(one(setup / "cache", "views/train-0000.*.json"), 200)
    assert "corrupt" in kinds(setup / "cache")
    one(setup / "cache", "views/train-0000.*.json").unlink()
    with pytest.raises(CorruptError, match="targets of views that are not there"):
        open_cache(setup / "cache")
    run(setup)
    assert groups(setup / "cache") == before
    assert verify(str(setup / "cache"), views="all", workers=0).ok


def test_missing_calibration_is_computed_again_and_must_come_out_the_same(setup: Path) -> None:
    run(setup, targets=("logits", FEATURES))
    before = tree(setup / "cache")
    path = setup / "cache" / "teachers" / "teacher" / "targets" / "features@blocks.1.calibration.safetensors"
    flip(path)
    with pytest.raises(CorruptError, match="delete the file, then run 'kdcache extract' again"):
        open_cache(setup / "cache")
    path.unlink()
    with pytest.raises(MissingError, match="run 'kdcache extract' again"):
        open_cache(setup / "cache")
    run(setup, targets=("logits", FEATURES))
    assert {path: digest for path, digest in tree(setup / "cache").items() if not path.startswith("index")} == {
        path: digest for path, digest in before.items() if not path.startswith("index")
    }


def test_shards_that_a_later_run_asked_for_are_remembered(setup: Path) -> None:
    """A cache begun with one tar and then killed early on the whole folder is unfinished, and says so."""
    run(setup, shards=str(setup / "shards" / "train-0000.tar"))
    make_shard(setup / "shards" / "train-0002.tar", num_samples=6, seed=2)
    run(setup, limit_shards=2)
    assert open_cache(setup / "cache").all_shards == ["train-0000", "train-0001", "train-0002"]
    assert any("2 of 3 shards are done, train-0002" in note for note in verify(str(setup / "cache")).notes)


def test_finished_run_with_another_model_for_the_same_checkpoint_is_refused(setup: Path) -> None:
    torch.save(load_teacher(f"local-dir:{setup / 'teacher'}").model.state_dict(), setup / "w.pth")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    run(setup, teacher="vit_tiny_patch16_224", checkpoint=str(setup / "w.pth"), model_args=args, name="t")
    with pytest.raises(TeacherError):
        run(setup, teacher="resnet18", checkpoint=str(setup / "w.pth"), name="t")
    with pytest.raises((TeacherError, MismatchError)):
        run(setup, teacher="vit_tiny_patch16_224", checkpoint=str(setup / "w.pth"), name="t")


def test_minimum_accuracy_counts_when_only_features_are_asked_for_and_leaves_no_cache(setup: Path) -> None:
    with pytest.raises(TeacherError, match="nothing was extracted"):
        run(setup, targets=("features@norm",), min_teacher_top1=99.0)
    assert not (setup / "cache" / "cache.json").exists()
    run(setup, size=24)  # no plan was pinned by the failure


def test_more_views_than_any_target_are_kept_for_methods_without_targets(setup: Path) -> None:
    summary = run(setup, targets=("logits,views=2",), views=5)
    cache = open_cache(setup / "cache")
    assert (summary.views, cache.num_views, cache.target_views("teacher", "logits")) == (5, 5, 2)
    assert run(setup, targets=("logits,views=2",), views=5).resumed_shards == 2


def test_changed_labels_are_source_drift(setup: Path) -> None:
    run(setup)
    path = setup / "shards" / "train-0000.tar"
    data = path.read_bytes()
    place = data.index(b"s0001.cls") + 512
    assert data[place : place + 1] == b"1"
    path.write_bytes(data[:place] + b"9" + data[place + 1 :])
    assert {(p.kind, p.shard) for p in verify(str(setup / "cache"), views="all", workers=0).problems} == {("source", "train-0000")}
    assert run(setup, views=3).problems[0]["shard"] == "train-0000"


def test_touched_tars_and_negative_nodes_need_no_teacher_on_a_finished_cache(setup: Path) -> None:
    run(setup, targets=("logits", FEATURES))
    for tar in (setup / "shards").iterdir():
        os.utime(tar)
    (setup / "teacher" / "unrelated.txt").write_text("")
    code = """
import sys
from pipelines.extract import *
root = sys.argv[1]
s = extract(ExtractConfig(shards=root + '/shards', cache=root + '/cache', teacher='local-dir:' + root + '/teacher', targets=('logits', 'features@blocks.-1:int8')))
assert s.resumed_shards == 2, s
assert 'kdcache.teacher' not in sys.modules
"""
    run_python(code, setup)


def test_first_shard_s_own_error_is_told(tmp_path: Path) -> None:
    make_shard(tmp_path / "shards" / "train-0000.tar", num_samples=2)
    path = tmp_path / "shards" / "train-0000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"s0000.cls") + 512] = ord("x")
    path.write_bytes(data)
    make_teacher_dir(tmp_path / "teacher")
    with pytest.raises(ShardError, match=r"key 's0000': s0000\.cls holds b'x'"):
        run(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_that_shrinks_while_it_is_read_is_a_problem_of_its_shard_only(setup: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    original = pipelines.extract.scan_shard

    def scan_then_cut(source: Any) -> Any:
        index = original(source)
        if source.name == "train-0000" and os.path.getsize(source.path) > 4000:
            os.truncate(source.path, 4000)
        return index

    run(setup, "other")  # so that the accuracy check is not what meets it
    monkeypatch.setattr(kdcache.preflight, "ACCURACY_VIEWS", 1)
    monkeypatch.setattr(pipelines.extract, "scan_shard", scan_then_cut)
    summary = run(setup, workers=workers)
    assert [(problem["kind"], problem["shard"]) for problem in summary.problems] == [("source", "train-0000")]
    assert "the tar was changed" in summary.problems[0]["detail"]
    assert open_cache(setup / "cache").shards == ["train-0001"]
    assert not (setup / "cache" / "tmp").exists()


def test_two_extractions_of_different_teachers_into_one_empty_cache_lose_nothing(tmp_path: Path) -> None:
    """They race for cache.json and every view (test_launch: for one teacher)."""
    make_shards(tmp_path / "shards", num_shards=4, num_samples=12)
    make_teacher_dir(tmp_path / "teacher")
    make_teacher_dir(tmp_path / "other", seed=5)

    def extraction(name: str) -> Any:
        return lambda: int(run(tmp_path, teacher=f"local-dir:{tmp_path / name}", name=name, targets=("logits", "features@norm:int8")).rows != 48)

    racers = [Forked(extraction(name), tmp_path / name / "log") for name in ("teacher", "other")]
    assert [racer.wait() for racer in racers] == [0, 0], [racer.output() for racer in racers]
    verdict = verify(str(tmp_path / "cache"), views="all", workers=0)
    assert verdict.ok, verdict.problems
    cache = open_cache(tmp_path / "cache")
    assert sorted(cache.teachers) == ["other", "teacher"]
    for name in cache.teachers:
        logits = np.stack([cache.read(shard, key, 1, name)["logits"] for shard in cache.shards for key in cache.keys(shard)])
        assert logits.shape == (48, 10)
        assert len(np.unique(logits[:, 0])) > 24  # rows, not one row many times


def test_an_index_that_another_run_replaces_at_any_moment_stops_neither_writers_nor_readers(
    setup: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The moments: after this run found its own index there already, and between a reader's look at an index and its reading."""
    put_new, size = LocalStore.put_new, LocalStore.size
    struck: list[str] = []

    def put_by_another_and_removed(store: LocalStore, path: str, source: bytes | Path) -> bool:
        created = put_new(store, path, source)
        if path.startswith("index/") and path not in struck:
            struck.append(path)
            store.delete(path)
            return False
        return created

    monkeypatch.setattr(LocalStore, "put_new", put_by_another_and_removed)
    run(setup)
    assert len(struck) == 2
    assert len(index_paths(open_store(setup / "cache"))) == 1

    def removed_once_seen(store: LocalStore, path: str) -> int | None:
        found = size(store, path)
        if path.startswith("index/index") and found is not None:
            store.delete(path)
        return found

    monkeypatch.setattr(LocalStore, "size", removed_once_seen)
    assert open_cache(setup / "cache").num_rows > 0


def test_descriptors_are_given_back(setup: Path) -> None:
    run(setup)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        cache = open_cache(setup / "cache")
        cache.read("train-0000", "s0000")
        cache.view("train-0001", "s0001")
        cache.close()
        verify(str(setup / "cache"))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_min_top1_without_a_classifier_is_a_usage_error(setup: Path) -> None:
    make_teacher_dir(setup / "headless", num_classes=0)
    with pytest.raises(UsageError, match="no classifier"):
        run(setup, teacher=f"local-dir:{setup / 'headless'}", targets=("features@norm",), min_teacher_top1=10.0)
    with pytest.raises(KDCacheError, match="no classifier, hence no logits"):
        run(setup, teacher=f"local-dir:{setup / 'headless'}")


def test_shard_that_fails_late_leaves_the_others_whole_while_chunks_are_queued(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed shard's chunks are still in the pool that the next shard uses."""
    import kdcache.arrays
    from kdcache.shards import ShardFiles

    encode, read = kdcache.arrays.encode_chunk, ShardFiles.read

    def slow_encode(spec: Any, rows: Any) -> bytes:
        time.sleep(0.02)
        return encode(spec, rows)

    def broken_read(files: Any, source: Any, key: str, offset: int, size: int) -> bytes:
        if source.name == "train-0000" and key >= "s0150":
            raise ShardError(f"shard {source.name}: key {key!r}: gone")
        return read(files, source, key, offset, size)

    shutil.rmtree(setup / "shards")
    make_shards(setup / "shards", num_shards=2, num_samples=200)
    monkeypatch.setattr(kdcache.arrays, "encode_chunk", slow_encode)
    monkeypatch.setattr(ShardFiles, "read", broken_read)
    monkeypatch.setattr("kdcache.rendering.BLOCK_BYTES", 300_000)
    summary = run(setup, targets=("logits", "features@blocks.0:fp16", "features@norm:fp16"))
    assert [(problem["shard"], summary.rows) for problem in summary.problems] == [("train-0000", 200)]
    assert open_cache(setup / "cache").shards == ["train-0001"]
    assert not (setup / "cache" / "tmp").exists()


def test_unreadable_tar_stops_no_other_shard(setup: Path) -> None:
    (setup / "shards" / "train-0000a.tar").symlink_to("nowhere.tar")
    summary = run(setup)
    assert (summary.rows, [problem["shard"] for problem in summary.problems]) == (12, ["train-0000a"])
    summary = run(setup)
    assert (summary.resumed_shards, [problem["shard"] for problem in summary.problems]) == (2, ["train-0000a"])


def test_damaged_shard_does_not_stop_the_extraction_of_another(setup: Path) -> None:
    run(setup, limit_shards=1)
    flip(one(setup / "cache", "views/train-0000.*.zarr/labels/c/0"), 5)
    assert "corrupt" in kinds(setup / "cache")
    assert "corrupt" in {problem.kind for problem in verify(str(setup / "cache"), views="all", workers=0).problems}
    summary = run(setup)
    (problem,) = summary.problems
    assert (problem["kind"], problem["shard"]) == ("corrupt", "train-0000")
    record = problem["detail"].partition("delete ")[2].partition(" and run")[0]
    (setup / "cache" / record).unlink()
    assert run(setup).problems == []
    assert verify(str(setup / "cache"), views="all", workers=0).ok


def test_two_spellings_of_a_node_are_one_target(setup: Path) -> None:
    run(setup, targets=("features@blocks.-1:fp16,views=2", "features@blocks.1:fp16,views=1"))
    assert open_cache(setup / "cache").target_views("teacher", "features@blocks.1") == 2
    with pytest.raises(UsageError, match="one encoding a name"):
        run(setup, "other", targets=("features@blocks.-1:fp16", "features@blocks.1:int8"))
    assert not (setup / "other").exists() or not (setup / "other" / "cache.json").exists()
    run(setup, "other", targets=("features@blocks.-1", "features@blocks.1:fp16"))
    assert open_cache(setup / "other").layer(None).targets["features@blocks.1"].identity.encoding == "fp16"


@pytest.mark.parametrize("position", [20, -5])
def test_damaged_calibration_that_no_card_vouches_for_is_made_anew(setup: Path, position: int) -> None:
    run(setup, targets=(FEATURES,))
    before = groups(setup / "cache")
    teacher = setup / "cache" / "teachers" / "teacher"
    for path in [*teacher.glob("targets/*.json"), *teacher.glob("train-*.json")]:
        path.unlink()
    calibration = one(teacher, "targets/*.safetensors")
    data = bytearray(calibration.read_bytes())
    data[position] ^= 0x7F
    calibration.write_bytes(data)
    run(setup, targets=(FEATURES,))
    assert groups(setup / "cache") == before
    assert verify(str(setup / "cache")).ok


def test_calibration_of_a_grown_cache_comes_out_the_same(setup: Path) -> None:
    run(setup, targets=(FEATURES,), limit_shards=1)
    run(setup, targets=(FEATURES,))
    path = one(setup / "cache", "teachers/teacher/targets/*.safetensors")
    before = path.read_bytes()
    path.unlink()
    run(setup, targets=(FEATURES,))
    assert path.read_bytes() == before
