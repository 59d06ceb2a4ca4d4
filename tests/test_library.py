"""A cache in loops that are not ours: torch's DataLoader with any sampler, webdataset's pipelines, timm's tasks."""

from __future__ import annotations

import gc
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.task
import torch
import webdataset as wds
from helpers import TINY_VIT, TINY_VIT_ARGS, make_cache, make_shards, make_teacher_dir, save_local_dir, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_collate

from kdcache import CachedDataset, CachedTeacher, methods
from kdcache.cache import Cache
from kdcache.errors import DriftError, MissingError, ShardError, TeacherError, UsageError
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.losses import soft_labels
from kdcache.opening import open_cache
from kdcache.pixels import Normalize
from pipelines.extract import ExtractConfig, extract

pytestmark = [  # webdataset leaves its tars to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file .*Popen:ResourceWarning"),
]
BOTH = ("logits", "features@norm")


@pytest.fixture(scope="module", autouse=True)
def _close_what_webdataset_left_open() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 2 × 9 images, of which 2 can't be decoded, teacher/, and cache/ with 3 views of 16 rows."""
    folder = tmp_path_factory.mktemp("library")
    make_cache(folder, num_shards=2, num_samples=9, views=3, corrupt=[4])
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


def expected(cache: Cache, index: int, view: int) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """(pixels, decoded row) by the reader for people, which shares no code with the loader."""
    rows = cache.rows
    shard = rows.shards[rows.shard[index]]
    key = cache.keys(shard)[rows.row[index]]
    return cache.view(shard, key, view), cache.read(shard, key, view)


def assert_rows(cache: Cache, indices: list[int], view: int, batch: Any, dataset: CachedDataset) -> None:
    """A collated batch holds these rows of a view."""
    views, labels, targets = batch
    values = dataset.decoder()(targets)
    assert (views.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for place, index in enumerate(indices):
        pixels, row = expected(cache, index, view)
        np.testing.assert_array_equal(views[place].numpy(), pixels)
        assert int(labels[place]) == row["label"]
        np.testing.assert_array_equal(values["logits"]["logits"][place].numpy(), row["logits"])
        if "features@norm" in values:
            np.testing.assert_array_equal(values["features@norm"]["grid"][place].numpy(), row["features@norm"])
            np.testing.assert_array_equal(values["features@norm"]["prefix"][place].numpy(), row["features@norm.prefix"])


# --- torch ---


def test_a_plain_loader_gives_the_views_of_the_epoch_that_was_set(cache: Cache) -> None:
    dataset = CachedDataset(cache, BOTH)
    assert len(dataset) == 16
    for epoch in (0, 2, 4):
        dataset.set_epoch(epoch)
        for number, batch in enumerate(DataLoader(dataset, batch_size=6)):
            assert_rows(cache, list(range(6 * number, min(6 * number + 6, 16))), epoch % 3, batch, dataset)
    assert_rows(cache, [7, 0], 2, default_collate([dataset[7, 2], dataset[0, 2]]), dataset)
    assert_rows(cache, [5, 1], 1, next(iter(DataLoader(Subset(dataset, [5, 1]), batch_size=2))), dataset)
    assert sum(1 for _ in dataset) == 16  # type: ignore[misc, attr-defined]  # ends in IndexError, as sequences do
    np.testing.assert_array_equal(dataset[-1][0].numpy(), dataset[15][0].numpy())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_running_workers_hear_of_a_new_epoch(cache: Cache, start: str) -> None:
    dataset = CachedDataset(cache, "logits")
    sampler = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(
        dataset, batch_size=8, sampler=sampler, num_workers=2 if start == "fork" else 1, persistent_workers=True, multiprocessing_context=start
    )
    for epoch in range(3 if start == "fork" else 2):
        dataset.set_epoch(epoch)
        for number, batch in enumerate(loader):
            assert_rows(cache, sampler[8 * number : 8 * number + 8], epoch, batch, dataset)
        assert number == 1


def test_an_epoch_that_is_left_early_does_not_reach_into_the_next(cache: Cache) -> None:
    dataset = CachedDataset(cache, "logits")
    loader = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    dataset.set_epoch(0)
    assert_rows(cache, [0, 1], 0, next(iter(loader)), dataset)
    dataset.set_epoch(1)
    for number, batch in enumerate(loader):
        assert_rows(cache, [2 * number, 2 * number + 1], 1, batch, dataset)
    assert number == 7


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stage", ["loader", "pipeline"])
def test_a_loop_that_never_chooses_an_epoch_is_told(
    cache: Cache, folder: Path, num_workers: int, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.dataset._LOOKS", 8)

    def reads(dataset: CachedDataset, passes: int) -> None:
        urls = wds.WebDataset(urls_of(folder), shardshuffle=False).compose(dataset.join).to_tuple("jpg", "label", "targets")
        source: Any = dataset if stage == "loader" else urls
        loader = DataLoader(source, batch_size=4, num_workers=num_workers, persistent_workers=num_workers > 0)
        for _ in range(passes):
            assert sum(len(labels) for _, labels, _ in loader) == 16

    forgetful = CachedDataset(cache, "logits")
    reads(forgetful, 1)
    next(iter(DataLoader(forgetful, batch_size=4)))  # a look
    with pytest.raises(UsageError, match=r"\d+ rows were read again and no epoch was ever chosen, .* view 0 of 3 .*set_epoch\(epoch\).*views=1"):
        reads(forgetful, 1)
    for dataset in (CachedDataset(cache, "logits", views=1), CachedDataset(cache, "logits")):
        if dataset.num_views > 1:
            dataset.set_epoch(0)
        reads(dataset, 3)
    chosen = CachedDataset(cache, "logits")
    for _ in range(5):
        chosen.__getitems__([(row, 1) for row in range(16)])  # a sampler that chooses views itself
    with pytest.raises(UsageError, match=r"set_epoch\(-1\)"):
        chosen.set_epoch(-1)


def test_distributed_ranks_share_an_epoch(cache: Cache) -> None:
    dataset = CachedDataset(cache, "logits")
    dataset.set_epoch(2)
    seen: list[int] = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=rank, seed=7)
        sampler.set_epoch(2)
        (batch,) = DataLoader(dataset, batch_size=8, sampler=sampler)
        assert_rows(cache, list(sampler), 2, batch, dataset)
        seen += list(sampler)
    assert sorted(seen) == list(range(16))


def test_our_order_gives_the_batches_of_our_own_loop(cache: Cache) -> None:
    batches = EpochBatches(range(16), batch_size=5, num_views=3, seed=3)
    batches.set_epoch(4)
    ours = BatchLoader(CachedViews(cache, targets=BOTH), EpochBatches(range(16), batch_size=5, num_views=3, seed=3), num_workers=0)
    for batch, (views, labels, targets) in zip(ours.epoch(4), DataLoader(CachedDataset(cache, BOTH), batch_sampler=batches), strict=True):
        assert torch.equal(batch["views"], views) and torch.equal(batch["labels"], labels)
        assert {key: value.keys() for key, value in batch["targets"].items()} == {key: value.keys() for key, value in targets.items()}
        assert all(torch.equal(tensor, targets[key][name]) for key, value in batch["targets"].items() for name, tensor in value.items())


def test_decoding_and_normalising_in_the_worker_give_what_the_device_gives(cache: Cache) -> None:
    student = tiny_model()
    fast = CachedDataset(cache, BOTH)
    mean, std = (torch.tensor(student.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))  # type: ignore[index, union-attr, arg-type]
    slow = CachedDataset(cache, BOTH, decode=True, transform=lambda view_CHW: (view_CHW / 255 - mean) / std)
    views, _, targets = next(iter(DataLoader(fast, batch_size=7)))
    images, _, values = next(iter(DataLoader(slow, batch_size=7)))
    torch.testing.assert_close(images, fast.normalize_for(student)(views))
    decoded = fast.decoder()(targets)
    assert all(torch.equal(values[key][part], tensor) for key, value in decoded.items() for part, tensor in value.items())
    elsewhere = fast.decoder().to("meta")(targets)  # a module like any other: it goes where it is sent, and takes the batch along
    assert all(elsewhere[key][part].is_meta for key, value in decoded.items() for part in value)
    with torch.no_grad():
        method = methods.build("kd+mimic", student=student, cache=cache)
        assert sum(method(images, torch.zeros(7, dtype=torch.int64), values).values()) > 0


def test_it_pickles_between_processes_of_any_kind(cache: Cache) -> None:
    dataset = CachedDataset(cache, "logits", views=2)
    dataset.set_epoch(5)
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.epoch, again.num_views, len(again)) == (5, 2, 16)
    assert_rows(cache, [3], 1, default_collate([again[3]]), again)


def test_errors_of_a_worker_keep_their_class_and_their_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    make_shards(tmp_path / "other", num_shards=2, num_samples=4)
    cache = open_cache(folder / "cache", data=tmp_path / "shards")
    dataset = CachedDataset(cache, "logits", check_views=1.0)
    tar = tmp_path / "shards" / "train-0001.tar"
    data = bytearray(tar.read_bytes())
    place = int(cache.rows.offset[8]) + int(cache.rows.size[8]) // 2
    data[place : place + 40] = bytes(40)
    tar.write_bytes(data)
    with pytest.raises(DriftError, match=r"shard train-0001: key 's0000', view 0"):
        list(DataLoader(dataset, batch_size=4, num_workers=1))
    shutil.copy(tmp_path / "other" / tar.name, tar)
    with pytest.raises(ShardError, match=r"train-0001: .* was changed"):
        CachedDataset(cache, "logits")
    tar.unlink()
    with pytest.raises(ShardError, match="--data"):
        list(DataLoader(CachedDataset(cache, "logits"), batch_size=4))


def test_requests_that_can_not_be_met(cache: Cache, folder: Path, tmp_path: Path) -> None:
    for options, error, text in (
        ({"targets": "features@blocks.0"}, MissingError, "features@blocks.0"),
        ({"teacher": "nobody", "targets": "logits"}, UsageError, "nobody"),
        ({"targets": "logits", "views": 4}, MissingError, "3 views"),
        ({"targets": "logits", "views": 0}, UsageError, "at least 1"),
        ({"shards": ["train-0007"]}, MissingError, "train-0007"),
        ({"targets": "logits", "parts": {"features@norm": ["grid"]}}, UsageError, "features@norm"),
    ):
        with pytest.raises(error, match=text):
            CachedDataset(cache, **options)  # type: ignore[arg-type]
    shutil.copytree(folder / "cache", tmp_path / "cache")
    for record in (tmp_path / "cache").glob("*/**/train-0001.*.json"):
        record.unlink()
    shutil.rmtree(tmp_path / "cache" / "index")
    half = open_cache(tmp_path / "cache")
    with pytest.raises(MissingError, match=r"1 of 2 shards are done, 'train-0001' is not"):
        CachedDataset(half, "logits")
    assert len(CachedDataset(half, "logits", shards=half.shards)) == 8
    one = CachedDataset(cache, "logits", shards=["train-0001"])
    assert_rows(cache, [8, 15], 0, default_collate([one[0], one[-1]]), one)


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two teachers over mixed views."""
    place = tmp_path_factory.mktemp("mixed")
    (place / "policy.yaml").write_text("base: weak\nmix: {prob: 0.8, switch_prob: 0.5, mixup_alpha: 0.8, cutmix_alpha: 1.0}\n")
    for name, seed in (("a", 1), ("b", 2)):
        teacher = make_teacher_dir(place / name, seed=seed)
        extract(
            ExtractConfig(
                shards=str(folder / "shards"), cache=str(place / "cache"), teacher=teacher, name=name, targets=("logits",), views=2 if name == "a" else 1,
                augment=str(place / "policy.yaml"), workers=0,
            )
        )  # fmt: skip
    return open_cache(place / "cache")


def test_mixed_views_have_soft_labels_and_several_teachers_their_names(mixed: Cache) -> None:
    method = methods.build("kd", student=tiny_model(), cache=mixed, teacher=["a", "b"])
    dataset = CachedDataset(mixed, method.target_names)
    assert dataset.num_views == 1
    views, labels, targets = next(iter(DataLoader(dataset, batch_size=16)))
    batch = CachedViews(mixed, targets=method.target_names).__getitems__([(row, 0) for row in range(16)])
    assert torch.equal(labels, soft_labels(batch["labels"], batch["partner_labels"], batch["label_weights"], 10))
    assert (labels.max(dim=1).values < 1).any()
    parts = method(dataset.normalize_for(method.student)(views), labels, dataset.decoder()(targets))
    assert set(parts) == {"a/distill", "b/distill", "task"}
    hard = CachedDataset(mixed, "a/logits", labels=False)
    assert (hard.num_views, hard[3][1]) == (2, int(mixed.rows.label[3]))
    with pytest.raises(ShardError, match="has label 3, expected 0 to 2"):
        CachedDataset(mixed, "a/logits", num_classes=3)


# --- webdataset ---


def urls_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "shards").glob("*.tar"))]


def joined(dataset: CachedDataset, urls: list[str], *, num_workers: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    stages = [wds.split_by_worker, wds.tarfile_to_samples(), wds.shuffle(8, initial=8, seed=seed), dataset.join]
    pipeline = wds.DataPipeline(wds.SimpleShardList(urls, seed=seed), *stages)
    return list(DataLoader(pipeline, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is))


def _as_it_is(sample: Any) -> Any:
    return sample


def assert_joined(cache: Cache, samples: list[dict[str, Any]], view: int, dataset: CachedDataset) -> None:
    """Every row once, with its own view and targets."""
    numbers = {(shard, key): cache.rows.shards.index(shard) * 8 + row for shard in cache.shards for row, key in enumerate(cache.keys(shard))}
    indices = [numbers[Path(sample["__url__"]).stem, sample["__key__"]] for sample in samples]
    assert sorted(indices) == list(range(16))
    assert indices != sorted(indices)
    assert_rows(cache, indices, view, default_collate([(sample["jpg"], sample["label"], sample["targets"]) for sample in samples]), dataset)
    assert all(int(sample["cls"]) == sample["label"] for sample in samples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pipeline_gets_views_and_targets_of_its_samples(cache: Cache, folder: Path, num_workers: int) -> None:
    dataset = CachedDataset(cache, BOTH, check_views=1.0)
    for epoch in (0, 4):
        dataset.set_epoch(epoch)
        assert_joined(cache, joined(dataset, urls_of(folder), num_workers=num_workers, seed=epoch), epoch % 3, dataset)
    assert dataset.dropped == 4  # the two of each epoch that the cache skipped


def test_a_fluid_pipeline_with_persistent_workers_and_either_collation(cache: Cache, folder: Path) -> None:
    dataset = CachedDataset(cache, "logits")
    source = wds.WebDataset(urls_of(folder), shardshuffle=2, seed=1).shuffle(5, seed=1).compose(dataset.join).to_tuple("jpg", "label", "targets")
    loader = DataLoader(source, batch_size=3, num_workers=2, persistent_workers=True)
    method = methods.build("kd", student=tiny_model(), cache=cache)
    normalize, decode = dataset.normalize_for(method.student), dataset.decoder()
    means = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert sum(len(labels) for _, labels, _ in batches) == 16
        losses = [sum(method(normalize(views), labels, decode(targets)).values()) for views, labels, targets in batches]
        assert all(torch.isfinite(loss) for loss in losses)  # type: ignore[arg-type]
        means.append(torch.cat([views.flatten() for views, _, _ in batches]).float().mean())
    assert means[0] != means[1]  # another view
    theirs = next(iter(source.batched(16)))
    assert decode(theirs[2])["logits"]["logits"].shape == (16, 10)


def test_streamed_tars_are_not_read_again(cache: Cache, folder: Path, tmp_path: Path) -> None:
    """The tars that the cache knows are gone; the pipeline has others of the same content, by a command."""
    shutil.copytree(folder / "shards", tmp_path / "gone")
    elsewhere = open_cache(folder / "cache", data=tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    dataset = CachedDataset(elsewhere, BOTH, check_views=1.0)
    samples = joined(dataset, [f"pipe:cat {url}" for url in urls_of(folder)])
    assert len(samples) == 16
    renamed = [{**sample, "__url__": sample["__url__"].rpartition(" ")[2]} for sample in samples]
    assert_joined(cache, renamed, 0, dataset)


def test_mixed_views_are_joined_with_their_soft_labels(mixed: Cache, folder: Path) -> None:
    dataset = CachedDataset(mixed, "a/logits", check_views=1.0)
    samples = list(joined(dataset, urls_of(folder)))
    assert len(samples) == 16
    for sample in samples:
        shard = Path(sample["__url__"]).stem
        index = mixed.rows.shards.index(shard) * 8 + mixed.row_of(shard, sample["__key__"])
        view, label, _ = dataset[index]
        assert torch.equal(sample["jpg"], view) and torch.equal(sample["label"], label)


def test_stored_views_are_joined_and_what_is_not_of_the_cache_is_refused(cache: Cache, folder: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=1, num_samples=3)
    teacher = f"local-dir:{folder / 'teacher'}"
    extract(ExtractConfig(shards=str(tmp_path / "shards"), cache=str(tmp_path / "cache"), teacher=teacher, views=1, workers=0, store_views="png"))
    stored = CachedDataset(tmp_path / "cache", "logits", check_views=1.0)
    (url,) = urls_of(tmp_path)
    decoded = [{**sample, "jpg": "decoded already"} for sample in wds.DataPipeline(wds.SimpleShardList([url]), wds.tarfile_to_samples())]
    for index, sample in enumerate(stored.join(decoded)):
        assert torch.equal(sample["jpg"], stored[index][0])
    assert index == 2
    dataset = CachedDataset(cache, "logits")
    (first, *_) = wds.DataPipeline(wds.SimpleShardList(urls_of(folder)), wds.tarfile_to_samples())
    for change, error, text in (
        ({"__key__": "s9999"}, MissingError, "shard train-0000: no key 's9999'"),
        ({"__url__": "https://a/b/val-0000.tar?x=1"}, MissingError, "val-0000"),
        ({"jpg": np.zeros((2, 2, 3), np.uint8)}, UsageError, r"jpg \(ndarray\).*before any decode"),
        ({"jpg": first["jpg"] + b"\0"}, ShardError, "the tar was changed"),
    ):
        with pytest.raises(error, match=text):
            list(dataset.join([{**first, **change}]))  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="__url__"):
        list(dataset.join([{"jpg": b""}]))
    assert len(list(dataset.join([{**first, "__url__": "https://a/b/train-0000.tar?x=1"}]))) == 1


# --- timm ---


def teachers_of(folder: Path, cache: Cache) -> tuple[torch.nn.Module, CachedTeacher]:
    return timm.create_model(f"local-dir:{folder / 'teacher'}", pretrained=True).eval(), CachedTeacher(cache)


def a_student(**overrides: Any) -> torch.nn.Module:
    return tiny_model(TINY_VIT, **{**TINY_VIT_ARGS, "embed_dim": 24, **overrides})


@pytest.mark.parametrize("task_class", [timm.task.LogitDistillationTask, timm.task.FeatureDistillationTask, timm.task.TokenDistillationTask])
def test_a_task_of_timm_loses_by_the_cache_what_it_loses_online(cache: Cache, folder: Path, task_class: Any) -> None:
    """Same student, same views; the rest is the error of `dense` and `int8`."""
    online, cached = teachers_of(folder, cache)
    options: dict[str, Any] = {"criterion": torch.nn.CrossEntropyLoss(), "distill_loss_weight": 2.0, "task_loss_weight": 0.5, "verbose": False}
    is_token = task_class is timm.task.TokenDistillationTask
    args = {**TINY_VIT_ARGS, "embed_dim": 24}
    student = tiny_model("deit_tiny_distilled_patch16_224", **args) if is_token else a_student()
    tasks = []
    for teacher in (online, cached):
        torch.manual_seed(0)  # of the projection
        tasks.append(task_class(student, teacher, **options).train())
    dataset = CachedDataset(cache, BOTH)
    normalize, decode = dataset.normalize_for(student), dataset.decoder()
    optimizer = torch.optim.AdamW(tasks[1].parameters(), lr=1e-2)
    losses = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        for views, labels, targets in DataLoader(dataset, batch_size=16, shuffle=False):
            if epoch == 0:
                by_teacher = tasks[0](normalize(views), labels)
            cached.feed(decode(targets))
            by_cache = tasks[1](normalize(views), labels)
            if epoch == 0:
                assert by_cache.keys() == by_teacher.keys()
                for name in by_cache:
                    torch.testing.assert_close(by_cache[name], by_teacher[name], rtol=5e-3, atol=1e-5)
                assert not torch.equal(by_cache["loss"], by_teacher["loss"])  # it did come from the cache
            optimizer.zero_grad()
            by_cache["loss"].backward()
            optimizer.step()
            losses.append(float(by_cache["loss"].detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_takes_its_own_batch_and_no_other(cache: Cache, folder: Path) -> None:
    cached = CachedTeacher(cache)
    dataset = CachedDataset(cache, "logits")
    views, labels, targets = next(iter(DataLoader(dataset, batch_size=4)))
    task = timm.task.LogitDistillationTask(a_student(), cached, criterion=torch.nn.CrossEntropyLoss(), verbose=False)
    images, values = dataset.normalize_for(task.trainable_module)(views), dataset.decoder()(targets)
    cached.feed(values)
    task(images, labels)
    with pytest.raises(UsageError, match="no batch was fed"):
        task(images, labels)
    cached.feed(values)
    with pytest.raises(UsageError, match="4 rows were fed, the task's batch has 3"):
        task(images[:3], labels[:3])
    features = timm.task.FeatureDistillationTask(a_student(), cached, criterion=torch.nn.CrossEntropyLoss(), verbose=False)
    cached.feed(values)
    with pytest.raises(MissingError, match="no 'features@norm'"):
        features(images, labels)


@pytest.mark.parametrize(
    ("name", "args", "refused"),
    [
        ("resnet10t", {}, None),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}, None),
        (TINY_VIT, {**TINY_VIT_ARGS, "global_pool": "avg", "fc_norm": False}, None),
        (TINY_VIT, {**TINY_VIT_ARGS, "global_pool": "avg"}, "fc_norm"),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, "head.norm"),
    ],
)
def test_pooled_features_are_those_of_the_teacher_or_refused(
    folder: Path, tmp_path: Path, name: str, args: dict[str, Any], refused: str | None
) -> None:
    args = {**args, "num_classes": 10}
    model = tiny_model(name, **args)
    teacher = save_local_dir(model, tmp_path / "teacher", args)
    options: dict[str, Any] = {"targets": ("features@norm:bf16",), "views": 1, "workers": 0, "size": 64}
    extract(ExtractConfig(shards=urls_of(folder)[0], cache=str(tmp_path / "cache"), teacher=teacher, **options))
    dataset = CachedDataset(tmp_path / "cache", "features@norm")
    cached = CachedTeacher(dataset.cache)
    if refused is not None:
        with pytest.raises(TeacherError, match=refused):
            timm.task.FeatureDistillationTask(a_student(), cached, criterion=torch.nn.CrossEntropyLoss(), verbose=False)
        return
    views, _, targets = next(iter(DataLoader(dataset, batch_size=4)))
    cached.feed(dataset.decoder()(targets))
    with torch.no_grad():
        seen = dataset.cache.layer(None).document.identity.preprocessing
        images = Normalize(seen.mean, seen.std, seen.input_size)(views)
        found: Tensor = cached(images, return_features=True)
        torch.testing.assert_close(found, model.forward_head(model.forward_features(images), pre_logits=True), rtol=1e-2, atol=1e-2)  # type: ignore[operator]
    assert found.shape[1] == cached.model.head_hidden_size


# --- docs ---


def test_the_lines_of_the_docs_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "library.md").read_text(), re.DOTALL)
    assert blocks[0] in (root / "README.md").read_text()
    assert [("WebDataset" in block, "timm.task" in block) for block in blocks] == [(False, False), (True, False), (False, True)]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"wds": wds, "urls": urls_of(folder)}
    for block in blocks:
        exec(block, names)
    assert sum(len(labels) for _, labels, _ in names["loader"]) == 16
