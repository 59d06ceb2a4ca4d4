"""Parts that were made apart, together: stored views, mixing, encodings, label keys, copies, drops, kills and races in one cache."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import MIXED, check_every_way_to_a_view, flip, groups, one, run, stored, tree
from helpers import Forked, die_at, kdcache_command, make_shard, make_shards, make_teacher_dir, slurm

from kdcache import open_cache
from kdcache.cache import Cache
from kdcache.errors import CorruptError, MismatchError
from kdcache.join import CachedViews
from kdcache.losses import soft_labels
from kdcache.paths import calibration_path
from kdcache.plan import POLICIES, StoredCodec
from kdcache.teacher import Teacher
from pipelines.copy import CopyConfig, copy
from pipelines.extract import ExtractSummary
from pipelines.gc import GcConfig, gc
from pipelines.train import TrainConfig, train
from pipelines.verify import verify

TOPK, KLT, DCT = "logits:topk=2", "features@norm:klt=0.99", "features@blocks.0:dct"
NORM, BLOCK = "features@norm", "features@blocks.0"


def extract(folder: Path, cache: str = "cache", **options: Any) -> ExtractSummary:
    """One view a batch, so that a segment of fewer views is made of the same passes and hence the same bytes."""
    return run(folder, cache, **{"batch_size": 1, **options})


def sound(cache: Path) -> bool:
    verdict = verify(str(cache), views="all", workers=0)
    assert verdict.problems == []
    return verdict.ok


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with a skipped sample each, one without rows, and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    make_shards(folder / "shards", num_shards=2, num_samples=6, corrupt=(1,))
    make_shard(folder / "shards" / "train-0002.tar", num_samples=2, corrupt=(0, 1), seed=2)
    make_teacher_dir(folder / "teacher")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A copy of `inputs`, whose tars may go."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- stored views of a random policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "policy"), [("jpeg95", MIXED), ("png", POLICIES["strong"]), ("raw", MIXED)])
def test_stored_views_of_a_random_policy_are_copied_cut_dropped_grown_and_trained_from(folder: Path, codec: StoredCodec, policy: Any) -> None:
    for views in (2, 5):
        extract(folder, augment=policy, store_views=codec, views=views)
    for views in (2, 3):
        extract(folder, "alone", augment=policy, store_views=codec, views=views)
    check_every_way_to_a_view(open_cache(folder / "cache"))
    copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / "whole")))
    assert tree(folder / "whole") == tree(folder / "cache")
    shutil.rmtree(folder / "shards")
    alone = open_cache(folder / "alone")
    assert copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / "part"), views=3)).root == alone.root
    report = gc(GcConfig(cache=str(folder / "whole"), keep_views=3, delete=True))
    assert (report.root, report.garbage) == (alone.root, [])
    for name in ("part", "whole"):
        assert stored(folder / name) == stored(folder / "alone")
        assert sound(folder / name)
    # the tars are gone
    assert extract(folder, "part", targets=("logits", KLT, DCT), shards=str(folder / "shards"), views=3).problems == []
    check_every_way_to_a_view(open_cache(folder / "part"))
    student = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = TrainConfig(
        cache=str(folder / "part"), students=("vit_tiny_patch16_224",), model_kwargs=student, out=str(folder / "runs"), epochs=1, batch_size=5,
        workers=0, device="cpu", check_views=1.0, num_classes=10,
    )  # fmt: skip
    assert train(config)[0]["status"] == "done"


@pytest.mark.parametrize("damaged", ["stored/bytes/c/0", "stored/span/c/0/0/0", "stored/bytes/zarr.json"])
def test_a_flipped_byte_of_stored_views_is_refused_by_a_copy_of_some(folder: Path, damaged: str) -> None:
    extract(folder, store_views="jpeg95", views=2)
    for place in (3, -30):
        path = one(folder / "cache", f"views/train-0000.*.zarr/{damaged}")
        data = path.read_bytes()
        flip(path, place % len(data))
        with pytest.raises(CorruptError, match=f"{damaged}: bytes were changed"):
            copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / f"part{place}"), views=1))
        assert not list(folder.glob("part*/views/train-0000*.json"))
        path.write_bytes(data)


def test_a_mixed_cache_grown_from_its_stored_views_is_the_one_made_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tars there calibration sees view 0 unmixed in both cases; accuracy counts unmixed views wherever they were read from."""
    extract(folder, "whole", augment=MIXED, store_views="jpeg95", views=4, targets=("logits", NORM))
    extract(folder, augment=MIXED, store_views="jpeg95", views=3, targets=("logits",))
    extract(folder, views=3, targets=(NORM,))
    extract(folder, views=4, targets=("logits", NORM))
    whole, grown = open_cache(folder / "whole"), open_cache(folder / "cache")
    path = calibration_path("teacher", NORM)
    assert (folder / "cache" / path).read_bytes() == (folder / "whole" / path).read_bytes()
    for shard in whole.shards:
        for key, view in product(whole.keys(shard), range(4)):
            one, other = (cache.read(shard, key, view) for cache in (whole, grown))
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)
    check_every_way_to_a_view(grown)
    shutil.rmtree(folder / "shards")
    seen: list[np.ndarray[Any, Any]] = []
    forward = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, views, targets: (seen.append(views.numpy()), forward(self, views, targets))[1])
    extract(folder, name="second", views=4, targets=("logits",))
    monkeypatch.undo()
    plain = sum(
        drawn.mix is None for shard in whole.shards for view in range(4) for drawn in whole.read_params(shard, view, range(len(whole.keys(shard))))
    )
    assert 0 < plain < 40
    for teacher in ("teacher", "second"):
        records = [record for records in open_cache(folder / "cache").layer(teacher).records.values() for record in records]
        assert sum(record.measured.get("accuracy", {"labelled": 0})["labelled"] for record in records) == plain
    views = {whole.view(shard, key, view).tobytes() for shard in whole.shards for key in whole.keys(shard) for view in range(4)}
    assert views == {view.tobytes() for batch in seen for view in batch}


@pytest.mark.parametrize("tars", ["there", "gone"])
def test_topk_keeps_the_label_of_the_greater_weight(folder: Path, tars: str) -> None:
    """A method that takes the likeliest of two labels finds that one's own logit, whether views were rendered or read back."""
    if tars == "gone":
        extract(folder, augment=MIXED, store_views="png", views=4, targets=(NORM,))
        shutil.rmtree(folder / "shards")
        extract(folder, views=4, targets=("logits:topk=1",))
    else:
        extract(folder, augment=MIXED, views=4, targets=("logits:topk=1",))
    cache = open_cache(folder / "cache")
    items = [(number, view) for number in range(len(cache.rows)) for view in range(4)]
    batch = CachedViews(cache, targets=("logits",)).__getitems__(items)
    shares = soft_labels(batch["labels"], batch["partner_labels"], batch["label_weights"], 10)
    kept = batch["targets"]["logits"]["index"].numpy()
    assert kept.shape == (40, 2)
    for share, index in zip(shares.numpy(), kept, strict=True):
        assert share[index].max() == share.max()
    assert (batch["label_weights"] < 0.5).sum() > 3


def test_a_stored_partner_that_has_no_row_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(folder, augment=MIXED, store_views="png", views=4, targets=(NORM,))
    read_params = Cache.read_params

    def hostile(self: Cache, shard: str, view: int, rows: Any) -> list[Any]:
        read = read_params(self, shard, view, rows)
        return [one if one.mix is None else replace(one, mix=replace(one.mix, partner=1)) for one in read]

    monkeypatch.setattr(Cache, "read_params", hostile)
    with pytest.raises(CorruptError, match="shard train-0000: sample 1 of 6 has no row"):
        extract(folder, views=4, targets=(TOPK,))


# --- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tars", ["there", "gone"])
def test_calibrated_targets_are_killed_resumed_copied_dropped_and_added_again(folder: Path, tars: str) -> None:
    options = {"store_views": "jpeg95"} if tars == "gone" else {}
    extract(folder, "undisturbed", targets=(TOPK, KLT, DCT), **options)

    def action() -> None:
        die_at(folder / "cache", "/teachers/teacher/train-0001", 9)
        extract(folder, targets=(TOPK, KLT, DCT), **options)

    child = Forked(action, folder / "log")
    assert child.wait() == -signal.SIGKILL, child.output()
    extract(folder, targets=(TOPK, KLT, DCT))
    assert tree(folder / "cache").keys() == tree(folder / "undisturbed").keys()
    assert stored(folder / "cache") == stored(folder / "undisturbed")
    root = open_cache(folder / "undisturbed").root
    assert open_cache(folder / "cache").root == root

    extract(folder, "alone", targets=(KLT, DCT), views=1, **options)
    taken = copy(CopyConfig(cache=str(folder / "cache"), dest=str(folder / "part"), targets=(NORM, BLOCK), views=1))
    assert taken.root == open_cache(folder / "alone").root
    assert stored(folder / "part") == stored(folder / "alone")

    if tars == "gone":
        shutil.rmtree(folder / "shards")
    shards = str(folder / "shards")
    gc(GcConfig(cache=str(folder / "cache"), drop_targets=(NORM,), delete=True))
    assert not any("norm" in path for path in tree(folder / "cache"))
    assert sound(folder / "cache")
    assert extract(folder, targets=(KLT,), shards=shards).problems == []
    assert sound(folder / "cache")
    again, before = open_cache(folder / "cache"), open_cache(folder / "undisturbed")
    for shard in before.shards:
        for key in before.keys(shard):
            assert all(np.array_equal(value, again.read(shard, key, 1)[name]) for name, value in before.read(shard, key, 1).items())
    assert extract(folder, targets=(TOPK, KLT, DCT), shards=shards).resumed_shards == 3


# --- several processes -----------------------------------------------------------------------------------------------


def arguments(folder: Path, cache: Path, batch_size: int) -> list[object]:
    given = ["extract", folder / "shards", cache, "--teacher", f"local-dir:{folder / 'teacher'}", "--target", "logits", "--target", KLT]
    return [*given, "--views", 2, "-b", batch_size, "--device", "cpu", "-j", 0, "--store-views", "jpeg95", "--augment", "3aug"]


@pytest.mark.parametrize("batch_sizes", [(5, 5), (5, 4)])
def test_racing_ranks_agree_on_stored_views_and_on_a_basis(folder: Path, batch_sizes: tuple[int, int]) -> None:
    """Alike, they make what one makes. With other batches their bases differ in the last bits, and both use the one that was first."""
    cache = folder / "raced"
    ranks = [Forked(kdcache_command(*arguments(folder, cache, size)), folder / f"log{i}", slurm(i)) for i, size in enumerate(batch_sizes)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output() for rank in ranks]
    assert sound(cache)
    assert not (cache / "tmp").exists()
    extract(folder, "alone", augment="3aug", store_views="jpeg95", targets=("logits", KLT), batch_size=5)
    raced, alone = open_cache(cache), open_cache(folder / "alone")
    assert {path: d for path, d in groups(cache).items() if path.startswith("views/")} == {
        path: d for path, d in groups(folder / "alone").items() if path.startswith("views/")
    }
    assert len(list(cache.glob("teachers/*/targets/*.safetensors"))) == 1
    if batch_sizes == (5, 5):
        assert raced.root == alone.root
        assert stored(cache) == stored(folder / "alone")
    for shard in alone.shards:
        for key in alone.keys(shard):
            one, other = (cache.read(shard, key, 1)[NORM] for cache in (raced, alone))
            assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


# --- label keys ------------------------------------------------------------------------------------------------------


def test_a_copy_and_what_is_added_to_it_keep_the_label_key(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, num_samples=3, label_extension="json")
    make_teacher_dir(tmp_path / "teacher")
    extract(tmp_path, label_key="label", store_views="jpeg95")
    copy(CopyConfig(cache=str(tmp_path / "cache"), dest=str(tmp_path / "part"), limit_shards=1, views=1))
    part = open_cache(tmp_path / "part")
    assert part.label_key == "label"
    extract(tmp_path, "part")
    assert labels(open_cache(tmp_path / "part")) == labels(open_cache(tmp_path / "cache")) == [0, 1, 2, 1, 2, 3]
    with pytest.raises(MismatchError, match="labels"):
        extract(tmp_path, "part", label_key="fine")
    assert sound(tmp_path / "part")


def labels(cache: Cache) -> list[int]:
    return [int(label) for label in cache.rows.label]
