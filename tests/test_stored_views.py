"""Stored views: the teacher sees what the stored bytes decode to, everything goes on without the tars, and no damage is read as pixels."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from caches import FEATURES, groups, replay, run, tree
from click.testing import CliRunner
from helpers import TINY_VIT, Forked, die_at, make_image, make_shard, make_shards, make_teacher_dir
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from cli.main import main
from kdcache import join, open_cache, stored_views
from kdcache.arrays import STREAM_CHUNK_BYTES, StreamReader, StreamWriter, stream_spec
from kdcache.commit import ChunkPool
from kdcache.draws import draw
from kdcache.errors import CorruptError, DriftError, KDCacheError, MismatchError, ShardError, UsageError
from kdcache.format import ViewRange
from kdcache.images import decode_image
from kdcache.jobs import JobResult, ShardJob
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.plan import POLICIES, StoredCodec, ViewPlan
from kdcache.rendering import RenderTask, rendered_blocks, samples_per_task
from kdcache.shards import ShardSource, scan_shard
from kdcache.sources import resolve_shards
from kdcache.store import LocalStore
from kdcache.stored_views import as_stored, decode_view, encode_view
from kdcache.storing import ViewsWriter
from kdcache.views import render
from pipelines.train import TrainConfig, train
from pipelines.verify import verify

CODECS: tuple[StoredCodec, ...] = ("jpeg95", "png", "raw")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 2 × 6 samples, one of them unreadable; teacher/; a cache of 2 views in each codec, called by its name."""
    folder = tmp_path_factory.mktemp("stored")
    make_shard(folder / "shards" / "train-0000.tar", num_samples=6, corrupt=(2,))
    make_shard(folder / "shards" / "train-0001.tar", num_samples=6, seed=1)
    make_teacher_dir(folder / "teacher")
    for codec in CODECS:
        run(folder, codec, store_views=codec, targets=("logits", FEATURES))
    return folder


@pytest.fixture(params=CODECS)
def without_tars(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A folder with a teacher and a cache that stores its views, whose tars were there when it was made and are gone."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    shutil.copytree(made / "teacher", tmp_path / "teacher")
    run(tmp_path, store_views=request.param)
    shutil.rmtree(tmp_path / "shards")
    return tmp_path


def expected_view(folder: Path, plan: ViewPlan, shard: str, key: str, view: int) -> np.ndarray[Any, Any]:
    """What the teacher saw, from the tar and the plan alone."""
    path = folder / "shards" / f"{shard}.tar"
    (sample,) = (sample for sample in scan_shard(ShardSource(shard, str(path))).samples if sample.key == key)
    image = decode_image(path.read_bytes()[sample.image_offset : sample.image_offset + sample.image_size])
    pixels = render(image, draw(plan, shard, key, view, image.size))
    codec = plan.stored_views
    return pixels if codec is None else decode_view(codec, encode_view(codec, pixels), plan.size)


# --- the codecs ---


@given(st.sampled_from(CODECS), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_a_view_is_what_its_bytes_decode_to_and_lossless_codecs_lose_nothing(codec: StoredCodec, size: int, seed: int, smooth: bool) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    view = np.asarray(make_image(seed, (size, size))) if smooth else noise
    plan = ViewPlan(dataset="d", policy=POLICIES["weak"], size=size, stored_views=codec)
    seen, data = as_stored(plan, view)
    assert seen.shape == view.shape
    assert seen.flags.writeable or codec == "raw"
    assert data == (b"" if codec == "raw" else encode_view(codec, view))
    assert np.array_equal(decode_view(codec, encode_view(codec, view), size), seen)
    if codec == "jpeg95":
        assert np.abs(seen.astype(int) - view).mean() < (3 if smooth else 6)
    else:
        assert np.array_equal(seen, view)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_that_are_no_view_of_that_size_are_corrupt(codec: StoredCodec) -> None:
    data = encode_view(codec, np.asarray(make_image(0, (16, 16))))
    with pytest.raises(CorruptError, match="expected"):
        decode_view(codec, data, 17)
    for damaged in (b"", data[: len(data) // 2], b"\0" * 40):
        with pytest.raises(CorruptError):
            decode_view(codec, damaged, 16)


def test_plans_without_stored_views_keep_their_fingerprint_and_the_codec_changes_it() -> None:
    fingerprints = {codec: ViewPlan(dataset="d", policy=POLICIES["weak"], size=32, stored_views=codec).fingerprint for codec in (None, *CODECS)}
    assert fingerprints[None] == "66316da8a67a841b1a3152a61dc1de76"  # recorded before the field was there
    assert len(set(fingerprints.values())) == 4


# --- the arrays ---


@given(st.lists(st.integers(1, 3 * STREAM_CHUNK_BYTES), min_size=1, max_size=8), st.integers(0, 99))
def test_a_stream_is_read_back_by_spans_and_is_what_zarr_python_writes(sizes: list[int], seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, sum(sizes), dtype=np.uint8)
    spec = stream_spec("a/b")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = StreamWriter(folder / "g", "a/b")
        whole = len(data) // STREAM_CHUNK_BYTES * STREAM_CHUNK_BYTES
        writer.append(writer.encode(data[:whole]))
        writer.append(writer.encode(data[whole:]))
        files = writer.close(len(data))
        reader = StreamReader(LocalStore(folder), "g", "a/b", shard_size=files[spec.shard_path].size)
        stops = np.cumsum(sizes).tolist()
        for start, stop in zip([0, *stops], stops, strict=False):
            assert reader.read(start, stop) == data[start:stop].tobytes()
        theirs = zarr.create_array(
            str(folder / "z"),
            shape=data.shape,
            dtype="uint8",
            chunks=spec.shape(spec.num_blocks(len(data)) * spec.chunk_rows),
            serializer=ShardingCodec(chunk_shape=spec.chunk_shape, codecs=[BytesCodec(), Crc32cCodec()]),
            compressors=None,
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        theirs[...] = data
        assert (folder / "g" / "a" / "b" / "c" / "0").read_bytes() == (folder / "z" / "c" / "0").read_bytes()
        assert json.loads((folder / "g" / "a" / "b" / "zarr.json").read_bytes()) == json.loads((folder / "z" / "zarr.json").read_bytes())


def test_a_span_is_one_ranged_read_and_none_outside_the_stream_is_answered(tmp_path: Path) -> None:
    writer = StreamWriter(tmp_path / "g", "a")
    data = np.arange(5 * STREAM_CHUNK_BYTES // 2, dtype=np.int64).astype(np.uint8)
    writer.append(writer.encode(data))
    size = writer.close(len(data))[stream_spec("a").shard_path].size

    class Counting(LocalStore):
        reads = 0

        def get_range(self, path: str, offset: int, size: int) -> bytes:
            self.reads += 1
            return super().get_range(path, offset, size)

    store = Counting(tmp_path)
    reader = StreamReader(store, "g", "a", shard_size=size)
    assert reader.read(100, len(data) - 1) == data[100:-1].tobytes()
    assert store.reads == 1
    for start, stop in ((-1, 5), (5, 5), (9, 5), (0, 4 * STREAM_CHUNK_BYTES), (2**62, 2**62 + 5)):
        with pytest.raises(CorruptError, match="were asked for"):
            reader.read(start, stop)
    with pytest.raises(CorruptError, match="no whole number of chunks"):
        StreamReader(store, "g", "a", shard_size=size - 1)


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_python_reads_every_stored_view(made: Path, codec: StoredCodec) -> None:
    cache = open_cache(made / codec)
    for shard in cache.shards:
        group = zarr.open_group(str(made / codec / "views" / cache.views_record(shard, 0).group.name), mode="r")
        for view in range(2):
            for row, key in enumerate(cache.keys(shard)):
                if codec == "raw":
                    found = np.asarray(group["stored/pixels"][view, row])
                else:
                    start, stop = np.asarray(group["stored/span"][view, row]).tolist()
                    found = decode_view(codec, np.asarray(group["stored/bytes"][start:stop]).tobytes(), 32)
                assert np.array_equal(found, cache.view(shard, key, view))


def test_what_a_segment_holds_in_memory_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    """Whatever is appended, at most a chunk waits in the writer; the rest is with the pool, which is bounded in bytes."""
    shard = make_shards(tmp_path / "shards", num_shards=1, num_samples=6)[0]
    plan = ViewPlan(dataset="d", policy=POLICIES["weak"], size=160, stored_views="png")
    samples = tuple(enumerate(scan_shard(ShardSource("train-0000", str(shard))).samples))
    task = RenderTask(0, ShardSource("train-0000", str(shard)), samples, (0, 1, 2), True)
    (block,) = rendered_blocks(plan, [task], num_workers=0)
    pool = ChunkPool(num_threads=1, max_bytes=1 << 20)
    writer = ViewsWriter(tmp_path / "spool", plan, ViewRange(start=0, stop=2), 600, pool)
    for _ in range(100):
        writer.append_block(block, [0, 1])
        assert writer._tail.nbytes < STREAM_CHUNK_BYTES
        assert writer._tail.base is None, "the tail keeps the whole block alive"
        assert pool._bytes <= pool._max_bytes + block.encoded.nbytes
    writer.finish()
    files = writer.close()
    pool.close()
    assert files["stored/bytes/c/0"].size > 20 * (1 << 20)


def test_a_task_is_bounded_with_its_image_files() -> None:
    plans = {codec: ViewPlan(dataset="d", policy=POLICIES["weak"], size=224, stored_views=codec) for codec in (None, *CODECS)}
    counts = {codec: samples_per_task(plan, 4) for codec, plan in plans.items()}
    assert counts[None] == counts["raw"] == 2 * counts["jpeg95"] + 1 == 13
    assert counts["png"] == counts["jpeg95"]


# --- what the teacher saw ---


@pytest.mark.parametrize("codec", CODECS)
def test_the_teacher_saw_the_decoded_stored_views(made: Path, codec: StoredCodec) -> None:
    cache = open_cache(made / codec)
    assert cache.plan.stored_views == codec
    for shard in cache.shards:
        keys = cache.keys(shard)
        for view in range(2):
            for key in keys:
                assert np.array_equal(cache.view(shard, key, view), expected_view(made, cache.plan, shard, key, view))
            truth = replay(cache, made / "teacher", shard, keys, view)
            logits = torch.from_numpy(np.stack([cache.read(shard, key, view)["logits"] for key in keys]))
            assert torch.nn.functional.kl_div(logits.log_softmax(1), truth["logits"].log_softmax(1), log_target=True, reduction="batchmean") < 1e-5


def test_lossless_codecs_give_the_views_of_a_cache_that_stores_none(made: Path) -> None:
    run(made, "plain")
    plain, png, raw, jpeg = (open_cache(made / name) for name in ("plain", "png", "raw", "jpeg95"))
    for view in range(2):
        expected = plain.read_pixel_digests("train-0001", view, range(6))
        assert np.array_equal(png.read_pixel_digests("train-0001", view, range(6)), expected)
        assert np.array_equal(raw.read_pixel_digests("train-0001", view, range(6)), expected)
        assert not np.array_equal(jpeg.read_pixel_digests("train-0001", view, range(6)), expected)
    assert "stored_views" not in (made / "plain" / "cache.json").read_text()


# --- without the tars ---


@pytest.mark.parametrize("workers", [0, 1])
def test_training_reads_exactly_what_the_teacher_saw_after_the_tars_are_gone(without_tars: Path, made: Path, workers: int) -> None:
    cache = open_cache(without_tars / "cache")
    dataset = CachedViews(cache, targets=("logits",), check_views=1.0)
    loader = BatchLoader(dataset, EpochBatches(np.arange(11), batch_size=11, num_views=2, seed=0), num_workers=workers)
    for epoch in range(2):
        (batch,) = loader.epoch(epoch)
        order = join.epoch_order(11, 0, epoch)
        for place, number in enumerate(order.tolist()):
            shard = cache.rows.shards[cache.rows.shard[number]]
            key = cache.keys(shard)[cache.rows.row[number]]
            assert np.array_equal(batch["views"][place].numpy(), expected_view(made, cache.plan, shard, key, epoch))
    loader.close()


def test_a_student_trains_and_verify_and_inspect_work_without_the_tars(without_tars: Path) -> None:
    cache = without_tars / "cache"
    student = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = TrainConfig(
        cache=str(cache), students=(TINY_VIT,), model_kwargs=student, out=str(without_tars / "runs"), epochs=2, batch_size=4, workers=0,
        device="cpu", check_views=1.0,
    )  # fmt: skip
    assert train(config)[0]["status"] == "done"
    verdict = verify(str(cache), views="all", workers=0)
    assert (verdict.ok, verdict.views_replayed) == (True, 22)
    assert any("2 of 2 tars are gone" in note for note in verdict.notes)
    shown = CliRunner().invoke(main, ["inspect", str(cache), "--json"])
    facts = json.loads(shown.stdout)["stored_views"]
    assert facts["codec"] == open_cache(cache).plan.stored_views
    assert facts["bytes_per_view"] > 300
    text = CliRunner().invoke(main, ["inspect", str(cache)]).stdout
    assert f"stored views {facts['codec']}" in text


def test_a_target_and_a_teacher_are_added_without_the_tars(without_tars: Path, made: Path) -> None:
    cache = without_tars / "cache"
    before = {path: digest for path, digest in tree(cache).items() if not path.startswith("index/")}
    summary = run(without_tars, targets=("logits", FEATURES))
    assert (summary.shards, summary.rows, summary.skipped, summary.problems) == (2, 11, 1, [])
    assert before.items() <= tree(cache).items()
    make_teacher_dir(without_tars / "second", seed=7)
    assert run(without_tars, teacher=f"local-dir:{without_tars / 'second'}", targets=("features@norm",)).problems == []
    assert run(without_tars, targets=("logits", FEATURES)).resumed_shards == 2, "found finished, without a tar"
    opened = open_cache(cache)
    truth = replay(opened, without_tars / "teacher", "train-0000", opened.keys("train-0000"), 1)
    block = np.stack([opened.read("train-0000", key, 1, "teacher")["features@blocks.1"] for key in opened.keys("train-0000")])
    assert np.linalg.norm(block - truth["block"].numpy()) < 0.01 * truth["block"].norm()
    assert verify(str(cache), views="all", workers=0).ok
    codec = opened.plan.stored_views
    assert codec is not None
    found = {path: digest for path, digest in groups(cache).items() if path.startswith("teachers/teacher/") and "features" in path}
    whole = {path: digest for path, digest in groups(made / codec).items() if path.startswith("teachers/teacher/") and "features" in path}
    assert {path.split(".zarr")[1]: d for path, d in found.items() if "train-0001" in path} == {
        path.split(".zarr")[1]: d for path, d in whole.items() if "train-0001" in path
    }, "the bytes of a target do not depend on where its views were read from"


@pytest.mark.parametrize("spec", ["{}/shards", "{}/shards/train-{{0000..0001}}.tar", "{}/shards/train-0001.tar"])
def test_gone_tars_are_named_as_when_they_were_there(without_tars: Path, spec: str) -> None:
    wanted = 1 if spec.endswith("0001.tar") and "{0000" not in spec else 2
    assert run(without_tars, shards=spec.format(without_tars), targets=("logits", FEATURES)).shards == wanted


def test_gone_tars_are_found_where_they_would_be_found_if_they_were_there(tmp_path: Path) -> None:
    """Whatever SHARDS looks like: the same names in the same order, since the order decides which shards are the first N."""
    for name in ("a", "b", "c", "sub/d", ".hidden/e"):
        make_shard(tmp_path / f"{name}.tar", num_samples=1)
    (tmp_path / "some.list").write_text("c.tar\n{b,a}.tar\nsub\n")
    info = {"splits": {"train": {"filenames": ["b.tar", "sub/d.tar"]}, "val": {"filenames": ["a.tar"]}}}
    folder = str(tmp_path)
    specs = [f"{folder}/{text}" for text in ("*.tar", "**/*.tar", "*/*.tar", "[bc].tar", "{c,a}.tar", "some.list", f"b.tar::{folder}/a.tar")]

    def find(gone: Sequence[str]) -> list[list[str]]:
        found = [[source.path for source in resolve_shards(spec, gone=gone)] for spec in (*specs, folder)]
        (tmp_path / "_info.json").write_text(json.dumps(info))
        found.append([source.path for source in resolve_shards(f"{folder}:train", gone=gone)])
        (tmp_path / "_info.json").unlink()
        return found

    there = find([])
    assert [len(paths) for paths in there] == [3, 4, 1, 2, 2, 4, 2, 3, 2]
    every = [str(path) for path in tmp_path.rglob("*.tar")]
    for gone in (every[1::2], every[::2], every):
        for path in gone:
            Path(path).rename(f"{path}.away")
        assert find(gone) == there
        for path in gone:
            Path(f"{path}.away").rename(path)


def test_tars_that_are_neither_there_nor_known_are_an_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, store_views="jpeg95")
    (tmp_path / "shards" / "train-0000.tar").unlink()
    with pytest.raises(UsageError, match=r"no file .*train-0002\.tar"):
        run(tmp_path, shards=str(tmp_path / "shards" / "train-{0001..0002}.tar"))
    with pytest.raises(UsageError, match="elsewhere"):
        run(tmp_path, shards=str(tmp_path / "elsewhere"), targets=("features@norm",))
    summary = run(tmp_path, views=3)  # new views need the tars: that shard is a problem, the other is done
    assert [problem["shard"] for problem in summary.problems] == ["train-0000"]
    assert "is gone, and views [2] are not stored" in summary.problems[0]["detail"]
    assert summary.shards == 1
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok


def test_nothing_is_written_where_no_shard_can_be_done(without_tars: Path) -> None:
    before = tree(without_tars / "cache")
    second = make_teacher_dir(without_tars / "second", seed=3)
    with pytest.raises(ShardError, match=r"views \[2\] are not stored.*2 of 2 shards can't be done, and nothing was extracted"):
        run(without_tars, teacher=second, name="second", targets=(FEATURES,), views=3)
    assert tree(without_tars / "cache") == before


def test_views_and_a_target_are_added_in_one_run_with_the_tars(made: Path, tmp_path: Path) -> None:
    """Old views are read, new ones rendered, one old one rendered again to notice a changed image."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, store_views="jpeg95")
    run(tmp_path, views=4, targets=("logits", FEATURES), workers=1)
    run(tmp_path, "whole", store_views="jpeg95", views=4, targets=("logits", FEATURES))
    grown, whole = open_cache(tmp_path / "cache"), open_cache(tmp_path / "whole")
    for view in range(4):
        for key in whole.keys("train-0000"):
            assert np.array_equal(grown.view("train-0000", key, view), whole.view("train-0000", key, view))
    assert verify(str(tmp_path / "cache"), views="all", workers=0).ok
    path = tmp_path / "shards" / "train-0001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xda") + 30
    data[start : start + 4] = bytes(255 - byte if byte not in (0, 255) else byte for byte in data[start : start + 4])
    path.write_bytes(data)
    verdict = verify(str(tmp_path / "cache"), views="all", workers=0)
    assert {(problem.kind, problem.shard, problem.key) for problem in verdict.problems} == {("source", "train-0001", "s0000")}
    with pytest.raises(DriftError, match=r"shard train-0001: key 's0000'"):
        run(tmp_path, views=5)
    make_shard(path, num_samples=7, seed=1)
    summary = run(tmp_path, targets=("logits", "features@norm"))
    assert "was changed: expected member table" in summary.problems[0]["detail"]


# --- identity, kills and damage ---


def test_the_option_on_a_cache_that_was_made_otherwise_is_refused_and_left_out_it_is_the_caches(made: Path) -> None:
    run(made, "none", targets=("logits",))
    for name, asked in (("none", "jpeg95"), ("jpeg95", "png")):
        with pytest.raises(MismatchError) as caught:
            run(made, name, store_views=asked)
        assert caught.value.field == "stored_views"
    assert run(made, "jpeg95", targets=("logits", FEATURES)).resumed_shards == 2


@pytest.mark.parametrize(
    ("codec", "where", "change"), [("jpeg95", "/teachers/teacher/train-0001", 1), ("png", "/views/train-0001", 9), ("raw", "/tmp/", 60)]
)
def test_resume_after_kill_gives_identical_bytes(tmp_path: Path, codec: StoredCodec, where: str, change: int) -> None:
    """Struck between a shard's views and its targets, the run that resumes reads the views back, and its targets are the same."""
    make_shards(tmp_path / "shards", num_shards=3, num_samples=8)
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, "undisturbed", store_views=codec)
    cache = tmp_path / "killed"

    def action() -> None:
        die_at(cache, where, change)
        run(tmp_path, "killed", store_views=codec)

    child = Forked(action, tmp_path / "log")
    assert child.wait() == -signal.SIGKILL, child.output()
    views, targets = (len(list(cache.glob(f"{layer}/train-*.json"))) for layer in ("views", "teachers/teacher"))
    assert (views, targets) == {"jpeg95": (2, 1), "png": (1, 1), "raw": (0, 0)}[codec]
    if codec == "jpeg95":
        (tmp_path / "shards" / "train-0001.tar").unlink()
    run(tmp_path, "killed", shards=str(tmp_path / "shards" / "train-{0000..0002}.tar"))
    assert groups(cache) == groups(tmp_path / "undisturbed")
    assert open_cache(cache).root == open_cache(tmp_path / "undisturbed").root
    assert verify(str(cache), views="all", workers=0).ok


@pytest.mark.parametrize(("codec", "option"), [("png", {"compress_level": 9}), ("jpeg95", {"quality": 90})])
def test_the_loser_of_a_race_goes_on_with_the_same_pixels_or_reads_the_winners(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, option: dict[str, int]
) -> None:
    """Another run, whose encoder gives other bytes, records the shard while this one is rendering it."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    make_teacher_dir(tmp_path / "teacher")
    with monkeypatch.context() as patch:
        patch.setitem(stored_views._OPTIONS, codec, {**stored_views._OPTIONS[codec], **option})
        run(tmp_path, "winner", store_views=codec)
    commit = ShardJob.commit

    def commit_too_late(job: ShardJob, **arguments: Any) -> JobResult:
        shutil.copytree(tmp_path / "winner" / "views", tmp_path / "cache" / "views", dirs_exist_ok=True)
        return commit(job, **arguments)

    monkeypatch.setattr(ShardJob, "commit", commit_too_late)
    if codec == "jpeg95":
        with pytest.raises(DriftError, match=r"run the command again to go on with the views that are stored"):
            run(tmp_path, store_views=codec)
        monkeypatch.setattr(ShardJob, "commit", commit)
    run(tmp_path, store_views=codec)
    views, theirs = ({path: d for path, d in groups(tmp_path / name).items() if path.startswith("views/")} for name in ("cache", "winner"))
    assert views == theirs
    assert verify(str(tmp_path / "cache"), workers=0).ok
    assert read_all(tmp_path / "cache") == read_all(tmp_path / "winner")


def read_all(cache_path: Path) -> bytes:
    """Every view of a cache, through the loader's dataset."""
    with open_cache(cache_path) as cache:
        dataset = CachedViews(cache, check_views=0.0)
        items = [(number, view) for number in range(len(dataset)) for view in range(cache.num_views)]
        return dataset.__getitems__(items)["views"].numpy().tobytes()


def test_a_flipped_byte_of_a_stored_view_is_found_by_verify_and_refused_by_train(without_tars: Path) -> None:
    """Every 997th byte of the file: it is refused by whoever reads it, and any byte at all is found by verify."""
    cache = without_tars / "cache"
    wanted = read_all(cache)
    random = np.random.default_rng(0)
    raw = open_cache(cache).plan.stored_views == "raw"
    (path,) = cache.glob("views/train-0000.*.zarr/stored/" + ("pixels/c/0/0/0/0/0" if raw else "bytes/c/0"))
    original = path.read_bytes()
    record = open_cache(cache).views_record("train-0000", 0)
    payload = record.rows * 2 * (3072 + 4) if raw else (len(original) - 4) // (STREAM_CHUNK_BYTES + 20) * (STREAM_CHUNK_BYTES + 4)
    for place in range(0, len(original), 997):
        data = bytearray(original)
        data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        if raw or place < payload:
            with pytest.raises(CorruptError, match=r"shard train-0000: key 's000\d', view [01]: .*crc32c"):
                read_all(cache)
        else:  # a stream's shard index, which serves other readers
            assert read_all(cache) == wanted
        if place % 3 == 0:
            assert "corrupt" in {problem.kind for problem in verify(str(cache)).problems}
    path.write_bytes(original)
    if not raw:
        (span,) = cache.glob("views/train-0000.*.zarr/stored/span/c/0/0/0")
        data = bytearray(span.read_bytes())
        data[len(data) // 3] ^= 4
        span.write_bytes(data)
        with pytest.raises(KDCacheError):
            read_all(cache)


@pytest.mark.parametrize("without_tars", ["jpeg95", "png"], indirect=True)
def test_another_decoder_is_noticed_by_the_digest(without_tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound bytes that decode to other pixels, as another version of a library might."""
    monkeypatch.setattr("kdcache.cache.decode_view", lambda *arguments: decode_view(*arguments) ^ 1)
    cache = open_cache(without_tars / "cache")
    with pytest.raises(DriftError, match="view 1"):
        CachedViews(cache).__getitems__([(0, 1)])
    assert {problem.kind for problem in verify(str(without_tars / "cache"), views="all", workers=0).problems} == {"pixels"}
    with pytest.raises(DriftError):
        run(without_tars, targets=("features@norm",))


def test_the_command_stores_views_and_says_what_they_will_weigh(made: Path, tmp_path: Path) -> None:
    arguments = ["extract", made / "shards", tmp_path / "cache", "--teacher", f"local-dir:{made / 'teacher'}", "--views", 2, "-j", 0]
    result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--store-views", "jpeg95"]])
    assert result.exit_code == 0, result.stderr
    assert "of stored views (jpeg95" in result.stderr
    assert open_cache(tmp_path / "cache").plan.stored_views == "jpeg95"
    assert CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--store-views", "gif"]]).exit_code == 2


def test_files_of_raw_views_that_were_exchanged_are_refused_though_each_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are not compared with their record's digest, have one size, and no crc32c of theirs fails."""
    for number in range(2):
        make_shard(tmp_path / "shards" / f"train-{number:04d}.tar", num_samples=3, seed=number)
    make_teacher_dir(tmp_path / "teacher")
    run(tmp_path, store_views="raw", views=1)
    one, other = sorted((tmp_path / "cache").glob("views/*.zarr/stored/pixels/c/0/0/0/0/0"))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    monkeypatch.setattr("kdcache.cache.WHOLE_FILE_BYTES", 0)
    cache = open_cache(tmp_path / "cache")
    for shard in cache.shards:
        with pytest.raises(CorruptError, match=rf"shard {shard}: key 's0001', view 0: .*not the pixels that its record names.*--repair"):
            list(cache.read_stored(shard, 0, [1, 2]))
    views = CachedViews(cache, check_views=0)
    with pytest.raises(CorruptError):
        views.__getitems__([(0, 0)])
