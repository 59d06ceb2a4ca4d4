"""No flipped bit, cut file or added byte of a cache passes: verify finds every one, and what is trained on is never another value.

`pytest -s tests/test_flips.py` prints the table.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache import open_cache
from kdcache.errors import KDCacheError
from kdcache.join import CachedViews
from kdcache.tail import load_tail
from pipelines.copy import CopyConfig, copy
from pipelines.verify import verify

FLIPS = 500
KINDS = {
    "cache.json": "cache.json",
    "source": "sources/*",
    "views record": "views/*.json",
    "teacher's card": "teachers/*/teacher.json",
    "tail's card": "teachers/*/tail.json",
    "tail": "teachers/*/tail.safetensors",
    "target's card": "teachers/*/targets/*.json",
    "calibration": "teachers/*/targets/*.safetensors",
    "targets record": "teachers/*/*.json",
    "index": "index/*.json",
    "index table": "index/*.bin",
    "zarr metadata": "zarr.json",
    "array": "*",
}
"""Kind of file → its pattern; of several the first that matches."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the fixture: few files, but every kind of them."""
    folder = tmp_path_factory.mktemp("flips") / "cache"
    copy(
        CopyConfig(
            cache=str(Path(__file__).parent / "fixtures" / "format-v1"),
            dest=str(folder),
            teachers=("vit",),
            targets=("logits", "features@norm"),
            limit_shards=1,
            views=1,
        )
    )
    return folder


def trained_on(folder: Path, *, tail: bool) -> list[bytes]:
    """All that a training run is given, decoded: views, labels, targets. No pixel digest is compared: the bytes alone must be safe.

    tail: whether the tail is built too, which takes longer than all else.
    """
    with open_cache(folder) as cache:
        (layer,) = cache.teachers.values()
        given = [tensor.numpy().tobytes() for tensor in load_tail(cache.store, layer).model.state_dict().values()] if tail else []
        rows = CachedViews(cache, targets=tuple(layer.targets), check_views=0)
        for view in range(cache.num_views):
            batch = rows.__getitems__([(row, view) for row in range(len(rows))])
            given += [batch["views"].numpy().tobytes(), batch["labels"].numpy().tobytes(), batch["partner_labels"].numpy().tobytes()]
            for target, components in batch["targets"].items():
                given += [value.numpy().tobytes() for value in cache.encoding(layer.name, target).decode(components).values()]
    return given


def flips(data: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    for place in rng.sample(range(8 * len(data)), min(count, 8 * len(data))):
        bad = bytearray(data)
        bad[place // 8] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place // 8} flipped", bytes(bad)


def cuts(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    yield "cut to nothing", b""
    place = rng.randrange(1, len(data))
    yield f"cut to {place} bytes", data[:place]
    yield "a byte added", data + bytes([rng.randrange(256)])


def test_every_flip_cut_and_added_byte_is_found_and_none_is_trained_on(cache: Path) -> None:
    """At least one flip of every file, the rest by size: a large file has more to go wrong."""
    rng = random.Random(0)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    kinds = {path: next(kind for kind, pattern in KINDS.items() if path.relative_to(cache).match(pattern)) for path in files}
    assert set(kinds.values()) == set(KINDS)
    shares = [0 if kinds[path] == "zarr metadata" else path.stat().st_size ** 0.5 for path in files]  # of the flips that are not one a file
    expected, table = {tail: trained_on(cache, tail=tail) for tail in (False, True)}, defaultdict[str, list[int]](lambda: [0] * 6)
    missed: list[str] = []
    for path, share in zip(files, shares, strict=True):
        data, row = path.read_bytes(), table[kinds[path]]
        row[0] += 1
        cases = [(1, *case) for case in flips(data, round(FLIPS * share / sum(shares)) + 1, rng)] + [(2, *case) for case in cuts(data, rng)]
        for column, what, bad in cases:
            row[column] += 1
            path.write_bytes(bad)
            found, refused = not verify(str(cache)).ok, False
            try:
                tail = kinds[path].startswith("tail")
                same = trained_on(cache, tail=tail) == expected[tail]
            except KDCacheError:
                refused = True
            row[3] += found
            row[4] += refused
            if not found or not (refused or same):
                row[5] += 1
                missed.append(f"{path.relative_to(cache)}: {what}: {'trained on' if found else 'not found by verify'}")
        path.write_bytes(data)
    assert verify(str(cache)).ok
    print(f"\n{'':<16} {'files':>6} {'flips':>6} {'cuts':>6} {'found':>6} {'refused':>8} {'missed':>7}")  # noqa: T201
    table["all"] = [sum(column) for column in zip(*table.values(), strict=True)]
    for kind, (count, flipped, cut, found, refused, lost) in table.items():
        print(f"{kind:<16} {count:6} {flipped:6} {cut:6} {found:6} {refused:8} {lost:7}")  # noqa: T201
    assert not missed, missed
    assert table["all"][1] >= 500
