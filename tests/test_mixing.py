"""Random policies through real caches: every way to a view gives the pixels that the teacher saw, and labels follow the mix."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import MIXED, check_every_way_to_a_view
from helpers import make_shards, make_teacher_dir, random_policies
from hypothesis import given, settings

from kdcache.augment import OPS, blend
from kdcache.cache import Cache
from kdcache.draws import draw, draw_mix
from kdcache.errors import CorruptError, DriftError, ShardError
from kdcache.images import decode_image
from kdcache.join import CachedViews
from kdcache.losses import soft_labels
from kdcache.opening import open_cache
from kdcache.plan import MixedViews, Policy, ViewPlan
from kdcache.preflight import first_views
from kdcache.shards import scan_shard
from kdcache.view_params import CUTMIX, MIXUP, ViewParams
from kdcache.views import render
from pipelines import train as train_pipeline
from pipelines.extract import ExtractConfig, extract
from pipelines.inspect import inspect_cache, inspect_row
from pipelines.inspection.inspect_text import cache_as_text, row_as_text
from pipelines.verify import verify

CORRUPT = 1
YAML = "base: weak\ncrop: {scale: [0.3, 1]}\nerase: {mode: constant, color: [9, 8, 7], prob: 1}\nrand_augment: {num_ops: 3, prob: 1}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    make_shards(folder / "shards", num_shards=2, num_samples=6, corrupt=[CORRUPT])
    make_teacher_dir(folder / "teacher")
    (folder / "p.yaml").write_text(YAML)
    run(folder, "mixed", MIXED, views=4)
    return folder


def run(folder: Path, cache: str, policy: Policy | str | None, *, shards: str = "shards", **options: Any) -> Cache:
    teacher = f"local-dir:{folder / 'teacher'}"
    config = {"targets": ("logits",), "views": 3, "workers": 0, "batch_size": 5, **options}
    extract(ExtractConfig(shards=str(folder / shards), cache=str(folder / cache), teacher=teacher, augment=policy, **config))
    return open_cache(folder / cache)


@pytest.fixture
def mixed(folder: Path) -> Cache:
    return open_cache(folder / "mixed")


def all_params(cache: Cache) -> list[tuple[str, int, int, ViewParams]]:
    """(shard, view, row, params) of every view."""
    return [
        (shard, view, row, params)
        for shard in cache.shards
        for view in range(cache.num_views)
        for row, params in enumerate(cache.read_params(shard, view, range(5)))
    ]


@pytest.mark.parametrize("name", ["strong", "3aug", "p.yaml"])
def test_every_way_to_a_view_gives_the_pixels_that_the_teacher_saw(folder: Path, name: str) -> None:
    cache = run(folder, f"cache-{name}", str(folder / name) if "." in name else name)
    check_every_way_to_a_view(cache)
    assert ("partner_labels" in CachedViews(cache).__getitems__([(0, 0)])) is False


@settings(max_examples=6)
@given(random_policies)
def test_so_does_every_random_policy(folder: Path, policy: Policy) -> None:
    name = f"cache-{ViewPlan(dataset='d', policy=policy, size=8).fingerprint}"
    check_every_way_to_a_view(run(folder, name, policy, size=24, views=2 if policy.is_random else 1))


def test_mixed_views_too_and_however_many_workers_there_are(folder: Path, mixed: Cache) -> None:
    check_every_way_to_a_view(mixed)
    modes = {params.mix.mode for *_, params in all_params(mixed) if params.mix is not None}
    assert modes == {CUTMIX, MIXUP}
    assert run(folder, "workers", MIXED, views=4, workers=2).root == mixed.root


def test_a_cache_that_grows_draws_the_same_partners(folder: Path, mixed: Cache) -> None:
    run(folder, "grown", MIXED, views=2)
    grown = run(folder, "grown", None, views=4)
    assert [params for *_, params in all_params(grown)] == [params for *_, params in all_params(mixed)]
    check_every_way_to_a_view(grown)


def test_a_mixed_view_is_both_samples_own_views_mixed(folder: Path, mixed: Cache) -> None:
    """Written out once more, from the tar: the partner's position counts the sample that has no row, and is never it."""
    index = scan_shard(mixed.source("train-0001"))
    data = Path(index.source.path).read_bytes()

    def own_view(position: int, view: int) -> np.ndarray:
        sample = index.samples[position]
        image = decode_image(data[sample.image_offset : sample.image_offset + sample.image_size])
        return render(image, draw(mixed.plan, "train-0001", sample.key, view, image.size))

    probed = 0
    for _, view, row, params in (entry for entry in all_params(mixed) if entry[0] == "train-0001"):
        position = row + (row >= CORRUPT)
        drawn = draw_mix(mixed.plan, "train-0001", index.samples[position].key, view, position=position, num_samples=6)
        if drawn is not None and drawn.partner == CORRUPT:
            probed += 1
            drawn = replace(drawn, partner=2 if position != 2 else 3)
        assert params.mix == drawn
        expected = own_view(position, view)
        if drawn is not None and drawn.mode == MIXUP:
            expected = blend(expected, own_view(drawn.partner, view), drawn.lambda_q16)
        elif drawn is not None:
            box = drawn.box
            inside = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            expected[inside] = own_view(drawn.partner, view)[inside]
        np.testing.assert_array_equal(mixed.view("train-0001", index.samples[position].key, view), expected)
    assert probed > 0


def test_without_another_sample_nothing_is_mixed(folder: Path) -> None:
    make_shards(folder / "pairs", num_shards=1, num_samples=2, corrupt=[CORRUPT])
    cache = run(folder, "alone", MIXED.model_copy(update={"mix": MixedViews(cutmix_alpha=1.0)}), shards="pairs")
    assert [params.mix for params in cache.read_params("train-0000", 0, [0])] == [None]
    assert verify(str(folder / "alone"), views="all", workers=0).ok


def test_accuracy_counts_views_that_are_not_mixed(mixed: Cache) -> None:
    plain = sum(params.mix is None for *_, params in all_params(mixed))
    records = [record for records in mixed.layer(None).records.values() for record in records]
    assert 0 < sum(record.measured["accuracy"]["labelled"] for record in records) == plain < 40


def test_inspect_words_what_was_drawn(mixed: Cache) -> None:
    views = {params.mix.mode: (shard, row, view) for shard, view, row, params in all_params(mixed) if params.mix is not None and params.ops}
    for mode, word in ((CUTMIX, "CutMix"), (MIXUP, "Mixup with sample")):
        shard, row, view = views[mode]
        (params,) = mixed.read_params(shard, view, [row])
        text = row_as_text(inspect_row(mixed, shard, mixed.keys(shard)[row], view))
        assert word in text and all(OPS[op].name in text for op, _ in params.ops)
    assert "unmixed views" in cache_as_text(inspect_cache(mixed), "mixed")


def test_batches_carry_the_partners_label_and_the_own_labels_weight(mixed: Cache) -> None:
    items = [(number, view) for view in range(4) for number in (7, 2, 0, 9)]
    batch = CachedViews(mixed).__getitems__(items)
    assert (batch["labels"].dtype, batch["partner_labels"].dtype, batch["label_weights"].dtype) == (torch.int64, torch.int64, torch.float32)
    for place, (number, view) in enumerate(items):
        shard, row = mixed.rows.shards[mixed.rows.shard[number]], int(mixed.rows.row[number])
        (params,) = mixed.read_params(shard, view, [row])
        read = mixed.read(shard, mixed.keys(shard)[row], view)
        label = (int(shard[-1]) + row + (row >= CORRUPT)) % 10
        assert int(batch["labels"][place]) == read["label"] == label
        if params.mix is None:
            assert (int(batch["partner_labels"][place]), float(batch["label_weights"][place])) == (label, 1.0)
            assert "partner_label" not in read
        else:
            assert int(batch["partner_labels"][place]) == read["partner_label"] == (int(shard[-1]) + params.mix.partner) % 10
            assert float(batch["label_weights"][place]) == params.mix.lambda_q16 / 65536


@pytest.mark.parametrize(("method", "settings"), [("ce", {}), ("kd", {}), ("kd", {"task_loss_weight": 0.0})])
def test_training_on_mixed_views_gives_soft_labels_to_the_method(
    folder: Path, tmp_path: Path, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.methods.base import Method

    given: list[torch.Tensor] = []
    forward = Method.forward

    def spy(self: Any, images: torch.Tensor, labels: torch.Tensor, targets: Any) -> Any:
        given.append(labels)
        return forward(self, images, labels, targets)

    monkeypatch.setattr(Method, "forward", spy)
    config = train_pipeline.TrainConfig(
        cache=str(folder / "mixed"), students=("test_vit",), model_kwargs={"img_size": 32}, method=method, settings=settings, num_classes=10,
        out=str(tmp_path), epochs=2, batch_size=5, workers=0, device="cpu", check_views=1.0,
    )  # fmt: skip
    assert train_pipeline.train(config)[0]["status"] == "done"
    if settings:
        assert all(labels.shape == (5,) and labels.dtype == torch.int64 for labels in given)
        return
    assert all(labels.shape == (5, 10) for labels in given)
    sums = torch.cat(given)
    torch.testing.assert_close(sums.sum(1), torch.ones(20))
    assert ((sums > 0).sum(1) == 2).any()


def test_unlabelled_samples_are_refused_where_labels_are_used(folder: Path, tmp_path: Path) -> None:
    make_shards(folder / "unlabelled", num_shards=1, num_samples=3, labels=False)
    run(folder, "cache-unlabelled", MIXED, shards="unlabelled")
    config: dict[str, Any] = {
        "students": ("test_vit",),
        "model_kwargs": {"img_size": 32},
        "epochs": 1,
        "batch_size": 3,
        "workers": 0,
        "device": "cpu",
    }
    with pytest.raises(ShardError, match=r"has no label .*--task-loss-weight 0"):
        train_pipeline.train(train_pipeline.TrainConfig(cache=str(folder / "cache-unlabelled"), out=str(tmp_path), **config))
    train_pipeline.train(train_pipeline.TrainConfig(cache=str(folder / "cache-unlabelled"), out=str(tmp_path), task_loss_weight=0.0, **config))


def test_soft_labels_of_unmixed_rows_are_their_own() -> None:
    shares = soft_labels(torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([1.0, 0.25]), 3)
    assert shares.tolist() == [[0, 1, 0], [0.75, 0, 0.25]]


@pytest.mark.parametrize("position", [-1, CORRUPT, 6, 2**31 - 1])
def test_a_partner_without_a_row_is_refused(mixed: Cache, position: int) -> None:
    assert [mixed.row_at("train-0000", i) for i in (0, 2, 5)] == [0, 1, 4]
    with pytest.raises(CorruptError, match=f"sample {position} of 6 has no row"):
        mixed.row_at("train-0000", position)


def test_a_changed_partner_is_noticed(folder: Path, tmp_path: Path) -> None:
    """Only the partner's bytes are others: the mixed view's digest covers them."""
    cache = open_cache(folder / "mixed")
    shard, view, row, params = next(entry for entry in all_params(cache) if entry[3].mix is not None and entry[3].mix.lambda_q16 < 60000)
    assert params.mix is not None
    first = cache.rows.shards.index(shard) * 5
    number = first + cache.row_at(shard, params.mix.partner)
    path = tmp_path / f"{shard}.tar"
    data = bytearray(Path(cache.source(shard).path).read_bytes())
    offset, size = int(cache.rows.offset[number]), int(cache.rows.size[number])
    scan = data.index(b"\xff\xda", offset, offset + size)
    data[scan + 20 : offset + size - 2] = bytes(byte ^ 1 for byte in data[scan + 20 : offset + size - 2])
    path.write_bytes(bytes(data))
    moved = open_cache(folder / "mixed", data=str(path))
    with pytest.raises(DriftError, match=f"shard {shard}: key '{cache.keys(shard)[row]}', view {view}"):
        CachedViews(moved).__getitems__([(first + row, view)])
    with pytest.raises(DriftError, match=f"shard {shard}: key"):
        moved.view(shard, cache.keys(shard)[row], view)


def test_accuracy_is_of_unmixed_views_also_where_they_are_read_from_the_cache(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    run(tmp_path, "cache", MIXED, store_views="raw", name="first")
    cache = run(tmp_path, "cache", MIXED, name="second")
    facts = inspect_cache(cache)["teachers"]
    assert facts["first"]["labelled"] == sum(params.mix is None for *_, params in all_params(cache)) < 30
    assert [facts["second"][what] for what in ("labelled", "top1")] == [facts["first"][what] for what in ("labelled", "top1")]


def test_views_before_the_work_are_unmixed_also_where_mixed_ones_are_stored(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    options: dict[str, Any] = {"store_views": "raw", "targets": ("features@norm:int8",)}
    cache = run(tmp_path, "cache", MIXED, **options)
    (calibration,) = (tmp_path / "cache").glob("teachers/*/targets/*.calibration.safetensors")
    before = calibration.read_bytes()
    calibration.unlink()
    run(tmp_path, "cache", MIXED, **options)  # raises if the statistics come out otherwise
    assert calibration.read_bytes() == before
    sources = [cache.source(shard) for shard in cache.shards]
    unmixed, labels, _ = first_views(cache.plan, sources, scan_shard, 10)
    again, labels_again, _ = first_views(cache.plan, sources, scan_shard, 10, cache)
    assert (torch.equal(unmixed, again), labels_again) == (True, labels)
    shutil.rmtree(tmp_path / "shards")
    stored, known, _ = first_views(cache.plan, sources, scan_shard, 10, cache)
    mixed_rows = [params.mix is not None for shard in cache.shards for params in cache.read_params(shard, 0, range(5))]
    assert 0 < sum(mixed_rows) < 10
    assert known == [-1 if is_mixed else label for label, is_mixed in zip(labels, mixed_rows, strict=True)]
    assert [not torch.equal(a, b) for a, b in zip(stored, unmixed, strict=True)] == mixed_rows
