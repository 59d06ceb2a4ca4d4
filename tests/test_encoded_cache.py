"""Encodings in a real cache: what extract writes with each, what growth and repair calibrate on, and what a reader of a part fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from caches import replay, run
from helpers import make_cache, make_shard

import kdcache.cards
from kdcache import open_cache
from kdcache.cache import Cache
from kdcache.encodings.dct import BANDS
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.join import CachedViews
from kdcache.paths import calibration_path, target_path
from kdcache.plan import blake2b_128
from kdcache.store import LocalStore
from pipelines.inspect import inspect_cache
from pipelines.inspection.inspect_text import cache_as_text
from pipelines.verify import verify

KLT = "features@blocks.0:klt=0.99"


def test_what_each_encoding_keeps_of_a_real_teacher(setup: Path) -> None:
    targets = ("logits:topk=3", KLT, "features@blocks.1:dct", "features@norm:bf16")
    run(setup, targets=targets)
    cache = open_cache(setup / "cache")
    shard = cache.shards[1]
    keys = cache.keys(shard)
    truth = replay(cache, setup / "teacher", shard, keys, 1)
    for i, key in enumerate(keys):
        row = cache.read(shard, key, 1)
        kept = [*truth["logits"][i].topk(3).indices.tolist(), row["label"]]
        assert row["logits"][kept] == pytest.approx(truth["logits"][i][kept].numpy(), abs=1 / 256)
        assert torch.from_numpy(row["features@blocks.1"] - truth["block"][i].numpy()).norm() < 0.01 * truth["block"][i].norm()
        assert torch.from_numpy(row["features@norm"] - truth["norm"][i, 1:].numpy()).norm() < 2**-8 * truth["norm"][i].norm()
    recorded = inspect_cache(cache)["teachers"]["teacher"]["targets"]
    assert recorded["features@blocks.0"]["cosine"] > 0.985
    assert sum(recorded["features@blocks.1"][f"energy_{band}"] for band in BANDS) == pytest.approx(1)
    assert all(recorded["features@blocks.1"][f"error_{band}"] < 0.01 for band in BANDS)
    assert "energy by band: dc " in cache_as_text(inspect_cache(cache), "cache")
    assert verify(str(setup / "cache"), views="all", workers=0).ok
    assert run(setup, targets=("logits:topk=3.0", "features@blocks.0:klt=.990")).resumed_shards == 2
    with pytest.raises(MismatchError, match=r"'encoding' differs: the cache has 'klt=0\.99', this run has 'klt=0\.995'"):
        run(setup, targets=("features@blocks.0:klt=0.995",))


def test_a_cosine_that_can_not_be_met_stops_before_a_cache_is_made(setup: Path) -> None:
    with pytest.raises(UsageError, match=r"'features@blocks\.1': encoding 'klt=0\.9999999999999' can't be met"):
        run(setup, targets=("features@blocks.-1:klt=0.9999999999999",))
    with pytest.raises(UsageError, match="'topk=11': the teacher has 10 classes"):
        run(setup, targets=("logits:topk=11",))
    assert not (setup / "cache" / "cache.json").exists()


def calibration_file(setup: Path, cache: str = "cache") -> Path:
    return setup / cache / calibration_path("teacher", "features@blocks.0")


def test_a_target_added_later_is_calibrated_on_the_shards_its_neighbours_were(setup: Path) -> None:
    run(setup, targets=("features@blocks.1",))
    for number in (2, 3):
        make_shard(setup / "shards" / f"train-000{number}.tar", num_samples=6, seed=number)
    run(setup, targets=(KLT,))
    card = open_cache(setup / "cache").layer(None).targets["features@blocks.0"]
    assert card.provenance["calibration"]["shards"] == ["train-0000", "train-0001"]
    path = calibration_file(setup)
    before = path.read_bytes()
    path.unlink()
    run(setup, targets=(KLT,))
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(CorruptError, match=r"comes out otherwise now .* it was made with .*'batch_size': 5"):
        run(setup, targets=(KLT,), batch_size=4, shards=str(setup / "shards" / "train-0003.tar"))


@pytest.mark.parametrize("near", [True, False])
def test_the_loser_of_a_race_takes_the_winners_basis_if_it_is_of_the_same_teacher(setup: Path, near: bool) -> None:
    run(setup, targets=(KLT,))
    tensors = safetensors.torch.load(calibration_file(setup).read_bytes())
    if near:
        tensors["basis"] *= -1
    else:
        tensors["basis"] = torch.eye(len(tensors["basis"]))
    winners = safetensors.torch.save(tensors)
    calibration_file(setup, "raced").parent.mkdir(parents=True)
    calibration_file(setup, "raced").write_bytes(winners)
    run(setup, cache="raced", targets=(KLT,))
    cache = open_cache(setup / "raced")
    card = cache.layer(None).targets["features@blocks.0"].identity
    assert card.calibration is not None
    assert (card.calibration.digest == blake2b_128(winners)) == near
    key = cache.keys("train-0000")[0]
    one, other = (torch.from_numpy(read.read("train-0000", key)["features@blocks.0"]) for read in (cache, open_cache(setup / "cache")))
    assert torch.nn.functional.cosine_similarity(one, other, dim=-1).min() > 0.95


@pytest.mark.parametrize("moment", ["before its file", "before its card", "after its card"])
def test_of_two_runs_over_other_shards_that_race_on_a_new_target_both_go_on_with_one_calibration(
    setup: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """moment: of the run that made the card; the other one has its own statistics at hand since before, and its file where it has put one."""
    first, second = (str(setup / "shards" / f"train-000{number}.tar") for number in (0, 1))
    run(setup, "first", targets=(KLT,), shards=first)
    create = kdcache.cards._create_card

    def of_the_first_meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(kdcache.cards, "_create_card", create)
        if moment == "before its card":
            run(setup, targets=(KLT,), shards=first)
        elif moment == "after its card":  # which came between a look whether it is there, and the replacement of its file
            card = target_path("teacher", "features@blocks.0")
            (setup / "cache" / card).write_bytes((setup / "first" / card).read_bytes())
        return create(*given)

    create_teacher = kdcache.cards.create_teacher

    def the_first_meanwhile(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(kdcache.cards, "create_teacher", create_teacher)
        if moment == "before its file":
            run(setup, targets=(KLT,), shards=first)
        return create_teacher(*given, **options)

    if moment == "after its card":
        calibration_file(setup).parent.mkdir(parents=True)
        calibration_file(setup).write_bytes(calibration_file(setup, "first").read_bytes())
    monkeypatch.setattr(kdcache.cards, "_create_card", of_the_first_meanwhile)
    monkeypatch.setattr(kdcache.cards, "create_teacher", the_first_meanwhile)
    run(setup, targets=(KLT,), shards=second)
    assert calibration_file(setup).read_bytes() == calibration_file(setup, "first").read_bytes()
    run(setup, targets=(KLT,))
    verdict = verify(str(setup / "cache"), workers=0)
    assert (verdict.problems, verdict.shards) == ([], 2)


@pytest.fixture(scope="module")
def banded(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("banded")
    return open_cache(make_cache(folder, views=1, targets=("features@norm:dct", "logits"), num_shards=1, num_samples=4))


def test_a_reader_of_some_bands_fetches_their_bytes_and_no_others(banded: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = banded.encoding("teacher", "features@norm")
    (record,) = banded.layer(None).records["train-0000"]
    files = record.identity.group.files
    fetched: dict[str, int] = {}
    get_range = LocalStore.get_range

    def counted(self: LocalStore, path: str, offset: int, size: int) -> bytes:
        fetched[path] = fetched.get(path, 0) + size
        return get_range(self, path, offset, size)

    monkeypatch.setattr(LocalStore, "get_range", counted)
    whole = CachedViews(banded, targets=("features@norm",)).__getitems__([(2, 0), (0, 0)])["targets"]["features@norm"]
    grid = encoding.decode(whole)["grid"]
    std = encoding.calibration["grid_std"]
    for bands in (("low",), ("dc", "mid"), ("low", "mid", "high"), ("prefix",)):
        fresh = Cache(banded.store, banded.documents)  # no shard index is remembered
        dataset = CachedViews(fresh, targets=("features@norm",), parts={"features@norm": bands})
        fetched.clear()
        batch = dataset.__getitems__([(2, 0), (0, 0)])["targets"]["features@norm"]
        read = {path.split("/")[4]: size for path, size in fetched.items() if "/features@norm/" in path}
        expected = encoding.components_of(bands)
        assert set(batch) == set(read) == set(expected)
        sizes = {name: files[f"features@norm/{name}/c/0/0" + "/0" * len(encoding.components()[name].shape)].size for name in expected}
        assert read == {
            name: 2 * size for name, size in sizes.items()
        }  # this small, a file is proved whole; then its index and its one chunk are read
        decoded = encoding.decode(batch)
        assert set(decoded) == ({"prefix"} if bands == ("prefix",) else {"grid"})
        if bands == ("low", "mid", "high"):
            detail = grid - grid.mean(dim=1, keepdim=True)
            assert ((decoded["grid"] - detail) / std).norm() < 1e-5 * (detail / std).norm()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"features@norm": ["lowest"]}, "no part 'lowest' in this target; expected some of: dc, low, mid, high, prefix"),
        ({"features@norm": []}, "no part is asked for"),
        ({"logits": ["logits"]}, "parts logits of 'logits': expected one of the targets that are read: features@norm"),
    ],
)
def test_parts_that_are_not_there_are_refused(banded: Cache, parts: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        CachedViews(banded, targets=("features@norm",), parts=parts)
