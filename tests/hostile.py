"""What an attacker would write: changes of a cache that its digests do not stop, since they are made right again. For `test_hostile.py` and `fuzz.py`."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from helpers import reseal

from kdcache import open_cache
from kdcache.errors import KDCacheError
from kdcache.format import ViewRange
from kdcache.join import CachedViews
from kdcache.paths import targets_record_path, views_record_path
from kdcache.plan import blake2b_128, canonical_json
from kdcache.tail import load_tail
from pipelines.inspect import inspect_cache, inspect_row, inspect_shard
from pipelines.inspection.inspect_text import cache_as_text, row_as_text, shard_as_text
from pipelines.verify import verify


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 255, 65535, 2**31, 2**53, 2**63, 10**30, -(10**30), 0.5, 1e308, -1e-320, float("nan"), float("inf"), "", "x", "1",
    "../../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "C:\\x", "\ud800", "\udce9", "é" * 300, "\x1b[2J", "A" * 100_000, "1e999", "0" * 32, "f" * 32,
    "hf-hub:evil/model", "local-dir:/etc", "python:os:system", "resnet50", "norm", "blocks.99", "klt=1e999", "topk=1000000000", "topk=" + "9" * 5000, "dct", "int8",
    [], {}, [[]], {"": {}}, {"a": None}, [1, 2, 3], [0, 0], [10**9, 10**9], list(range(2000)), nested(60), {"size": 10**15, "digest": "0" * 32},
    {"start": 0, "stop": 10**6}, {"start": 0, "stop": 1}, {"checkpoint_path": "/etc/passwd"}, {"depth": 10**7}, {"depth": 60_000},
    {"pretrained_cfg": {"url": "http://localhost"}}, {"img_size": 10**6, "patch_size": 1},
]  # fmt: skip
"""What stands in a document where something else is expected."""


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in items for place in [(*path, key), *places_in(one, (*path, key))]]


def change_document(path: Path, rng: random.Random) -> str:
    """Change one value of a document, or of the index; what was done."""
    body = json.loads(path.read_bytes())
    weighed = [place for place in places_in(body) if place[0] not in ("file_digest", "identity_digest")]
    weighed = [place for place in weighed if "files" not in place or rng.random() < 0.1] or weighed
    place = rng.choice(weighed)
    parent = body
    for key in place[:-1]:
        parent = parent[key]
    old, what = parent[place[-1]], rng.random()
    if what < 0.1 and isinstance(parent, dict):
        del parent[place[-1]]
        done = "gone"
    elif what < 0.2 and isinstance(parent, dict):
        parent[rng.choice(["a", "", "pretrained", "checkpoint_path", "source", "grid"])] = old
        done = "doubled"
    elif what < 0.45 and isinstance(old, int):
        parent[place[-1]] = rng.choice([old + 1, old - 1, -old, old * 1000, old + 10**7])
        done = str(parent[place[-1]])
    else:
        parent[place[-1]] = rng.choice(VALUES)
        done = repr(parent[place[-1]])[:60]
    path.write_bytes(reseal(body, identity=True))
    return f"{path.name}: {place}: {done}"


def change_array(group: Path, rng: random.Random) -> str:
    """Other values in an array, or other bytes in a chunk of it, with a right crc32c."""
    arrays = sorted(path.parent.relative_to(group) for path in group.rglob("zarr.json") if b'"shape"' in path.read_bytes())
    name = rng.choice(arrays)
    if rng.random() < 0.5:
        array = zarr.open_array(group / name, mode="r+")
        values = np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(array.shape).copy()
        how = rng.randrange(3)
        if how == 1:
            values = np.full(array.shape, rng.choice([0, 1, -1, np.inf, np.nan, 2**62, -(2**62)])).astype(array.dtype)
        elif how == 2:
            one = values.reshape(-1)[:1].copy()
            values = array[...]
            values.reshape(-1)[rng.randrange(values.size)] = one[0]
        with np.errstate(all="ignore"):
            array[...] = values
        return f"{name}: values ({how})"
    (file,) = (path for path in (group / name / "c").rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    views = 1
    num_chunks = max(1, json.loads((group / name / "zarr.json").read_bytes())["shape"][0] if len(data) > 64 else views)
    index = (
        np.frombuffer(bytes(data[-4 - 16 * num_chunks : -4]), "<u8").reshape(-1, 2).copy()
        if len(data) > 4 + 16 * num_chunks
        else np.zeros((0, 2), "<u8")
    )
    if rng.random() < 0.4 and index.size:
        index.reshape(-1)[rng.randrange(index.size)] = rng.choice([0, 1, 2**40, 2**63, 2**64 - 1, 2**64 - 2, len(data)])
        body = index.tobytes()
        data[-len(body) - 4 :] = body + struct.pack("<I", google_crc32c.value(body))
        done = "shard index"
    else:
        offset, size = (int(one) for one in index[0]) if index.size and index.sum() < 2 * len(data) else (0, len(data))
        if size > 8 and offset + size <= len(data):
            for _ in range(rng.randrange(1, 6)):
                place = offset + rng.randrange(min(size - 4, rng.choice([4, 16, 40, size])))
                data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            data[offset + size - 4 : offset + size] = struct.pack("<I", google_crc32c.value(bytes(data[offset : offset + size - 4])))
        done = "chunk"
    file.write_bytes(data)
    return f"{name}: {done}"


def change_tensors(path: Path, rng: random.Random) -> str:
    """A lying header, or other numbers, in a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    name = rng.choice([key for key in header if key != "__metadata__"])
    how = rng.randrange(8)
    if how == 0:
        header[name]["shape"] = rng.choice([[10**12], [2**62, 4], [-1], [], [1, *header[name]["shape"]], header[name]["shape"][::-1], [0]])
    elif how == 1:
        header[name]["dtype"] = rng.choice(["F64", "I64", "BOOL", "BF16", "F8_E4M3", "U64", "X", "C64"])
    elif how == 2:
        header[name]["data_offsets"] = rng.choice([[0, 4], [0, 10**15], [8, 0], [-4, 4], [0, len(payload)]])
    elif how == 3:
        header[rng.choice(["a", "../x", "grid_mean.y", "norm.weight"])] = header.pop(name)
    elif how == 4:
        start, stop = header[name]["data_offsets"]
        payload[start:stop] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 0.0, -1.0, 1e38])) * ((stop - start) // 4)
    elif how == 5:
        header["__metadata__"] = rng.choice([5, {"a": 1}, nested(200)])
    elif how == 6:
        payload = payload[: rng.randrange(len(payload))]
    text = json.dumps(header).encode()
    length = rng.choice([0, 2**63, 10**9, len(text) - 1]) if how == 7 else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(payload))
    return f"{path.name}: {how}"


def resign(cache: Path) -> None:
    """Make all digests right again, from the arrays up to the records; what is no digest any more stays. The index goes: it would say what was."""
    shutil.rmtree(cache / "index", ignore_errors=True)
    fingerprint = _seal(cache / "cache.json", lambda identity: None, part="plan")
    pixels: dict[tuple[str, int], str] = {}

    def views(path: Path) -> Callable[[Any], None]:
        def change(identity: Any) -> None:
            _set(identity, "plan", fingerprint)
            _regroup(path, identity)
            first = identity["views"]["start"]
            pixels.update({(identity["shard"], first + i): one for i, one in enumerate(identity["pixels_by_view"])})

        return change

    for path in sorted(cache.glob("views/*.json")):
        _seal(path, views(path))
        _move(path, lambda identity: views_record_path(identity["shard"], ViewRange(**identity["views"])), cache)
    for folder in sorted(path for path in cache.glob("teachers/*") if path.is_dir()):
        teacher = _seal(folder / "teacher.json", lambda identity: None)
        if (folder / "tail.json").exists():
            weights = _digest_of(folder / "tail.safetensors")
            _seal(
                folder / "tail.json",
                lambda identity, weights=weights, teacher=teacher: (_set(identity, "weights", weights, dict), _set(identity, "teacher", teacher)),
            )
        cards: dict[str, str] = {}
        for path in sorted(folder.glob("targets/*.json")):
            calibration = path.with_name(path.name.removesuffix(".json") + ".calibration.safetensors")
            made = _digest_of(calibration) if calibration.exists() else None
            cards[path.name.removesuffix(".json")] = _seal(path, lambda identity, made=made: _set(identity, "calibration", made, dict))

        def targets(path: Path, teacher: str = teacher, cards: dict[str, str] = cards) -> Callable[[Any], None]:
            def change(identity: Any) -> None:
                _set(identity, "teacher", teacher)
                identity["targets"] = {name: cards.get(name, digest) for name, digest in identity["targets"].items()}
                wanted = range(identity["views"]["start"], min(identity["views"]["stop"], 1000))
                _set(identity, "pixels", blake2b_128(canonical_json({str(view): pixels[identity["shard"], view] for view in wanted})))
                _regroup(path, identity)

            return change

        for path in sorted(set(folder.glob("*.json")) - {folder / "teacher.json", folder / "tail.json"}):
            _seal(path, targets(path))
            _move(
                path,
                lambda identity, name=folder.name: targets_record_path(name, identity["shard"], identity["targets"], ViewRange(**identity["views"])),
                cache,
            )


def _set(identity: Any, key: str, value: Any, kind: type = str) -> None:
    if isinstance(identity.get(key), kind):
        identity[key] = value


def _digest_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "digest": blake2b_128(data)}


_ODD = (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError, IndexError)
"""What comes of values that are not what they should be: then the digest stays as it is."""


def _seal(path: Path, change: Callable[[Any], Any], *, part: str | None = None) -> str:
    body = json.loads(path.read_bytes())
    with contextlib.suppress(*_ODD):
        change(body["identity"])
    path.write_bytes(reseal(body, identity=True))
    with contextlib.suppress(*_ODD):
        return blake2b_128(canonical_json(body["identity"] if part is None else body["identity"][part]))
    return "0" * 32


def _regroup(path: Path, identity: Any) -> None:
    group = identity["group"]
    folder = path.parent / group["name"]
    group["files"] = {name: _digest_of(folder / name) if (folder / name).is_file() else field for name, field in group["files"].items()}
    group["digest"] = blake2b_128(canonical_json(group["files"]))
    name = f"{folder.name.removesuffix('.zarr').rpartition('.')[0]}.{group['digest'][:12]}.zarr"
    folder.rename(folder.with_name(name))
    group["name"] = name


def _move(path: Path, place: Callable[[Any], str], cache: Path) -> None:
    with contextlib.suppress(*_ODD, KDCacheError):
        path.rename(cache / place(json.loads(path.read_bytes())["identity"]))


def change_something(cache: Path, rng: random.Random) -> str:
    """One thing of a cache changed, and all digests made right; what was done."""
    what = rng.random()
    if what < 0.55:
        done = change_document(
            rng.choice(sorted(path for path in cache.rglob("*.json") if path.name != "zarr.json" and path.parent.name != "index")), rng
        )
    elif what < 0.62:
        return change_document(next(iter(cache.glob("index/*.json"))), rng)
    elif what < 0.85:
        done = change_array(rng.choice(sorted(cache.rglob("*.zarr"))), rng)
    else:
        done = change_tensors(rng.choice(sorted(cache.rglob("*.safetensors"))), rng)
    resign(cache)
    return done


def use_everything(path: Path) -> bool:
    """All that inspect, verify and train do with a cache, but for the student. False if a KDCacheError ended it, which is fine; any other error is raised."""
    ended = False

    def attempt(action: Callable[[], Any]) -> Any:
        nonlocal ended
        try:
            return action()
        except KDCacheError:
            ended = True

    attempt(lambda: verify(str(path)))
    cache = attempt(lambda: open_cache(path))
    if cache is None:
        return False
    attempt(lambda: cache_as_text(inspect_cache(cache), str(path)))
    for name, layer in cache.teachers.items():
        if layer.tail is not None:
            attempt(lambda layer=layer: load_tail(cache.store, layer))
        for target in layer.targets:
            attempt(lambda name=name, target=target: _train_on(cache, name, target))
    for shard in cache.shards:
        attempt(lambda shard=shard: shard_as_text(inspect_shard(cache, shard)))
        for key in attempt(lambda shard=shard: cache.keys(shard)[:2]) or ():
            attempt(lambda shard=shard, key=key: row_as_text(inspect_row(cache, shard, key, 0)))
            attempt(lambda shard=shard, key=key: cache.view(shard, key))
    cache.close()
    return not ended


def _train_on(cache: Any, teacher: str, target: str) -> None:
    encoding = cache.encoding(teacher, target)
    batch = CachedViews(cache, teacher=teacher, targets=(target,)).__getitems__([(row, 0) for row in range(min(len(cache.rows), 16))])
    encoding.decode(batch["targets"][target])
