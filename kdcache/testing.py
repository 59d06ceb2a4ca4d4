"""Conformance checks that every store and every encoding must pass, ours and those of others. Used by tests only.

A new implementation of `kdcache.store.Store` or `kdcache.encodings.Encoding` is right when these return without an
AssertionError; each check is one sentence of the contract in `store/base.py` or `encodings/base.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .encodings import Encoding, build_encoding
from .errors import CorruptError, KDCacheError, MissingError, StoreError
from .store import Store

_LARGEST_FLOAT = torch.finfo(torch.float32).max


def check_store(make_store: Callable[[], Store]) -> None:
    """make_store: gives an empty store of its own at each call. Raises AssertionError naming the promise that is broken."""
    _check_objects(make_store())
    _check_listing(make_store())
    _check_paths(make_store())
    _check_creation_race(make_store())
    _check_spools(make_store())
    _check_holding(make_store())
    _check_pickling(make_store())


def _refuses(error: type[KDCacheError], action: Callable[[], object], promise: str) -> None:
    try:
        action()
    except error:
        return
    raise AssertionError(f"{promise}: expected {error.__name__}")


def _check_objects(store: Store) -> None:
    data = bytes(range(256)) * 8
    assert store.put_new("a/b/object", data), "put_new of an absent object gives True"
    assert store.get("a/b/object", max_size=len(data)) == data, "get gives the bytes that were put"
    assert store.get_range("a/b/object", 3, 500) == data[3:503], "get_range gives the bytes of the range"
    assert store.get_range("a/b/object", len(data), 0) == b"", "an empty range is no error"
    assert store.size("a/b/object") == len(data), "size gives the number of bytes"
    assert not store.put_new("a/b/object", b"other"), "put_new of an object that exists gives False"
    assert store.get("a/b/object", max_size=len(data)) == data, "put_new never overwrites"
    assert store.put_new("empty", b""), "an empty object can be put"
    assert store.get("empty", max_size=0) == b"", "an empty object can be read"
    assert store.size("a/b") is None, "a folder is no object"
    assert store.size("absent") is None, "an absent object has no size"
    _refuses(MissingError, lambda: store.get("absent", max_size=10), "get of an absent object")
    _refuses(MissingError, lambda: store.get_range("absent", 0, 1), "get_range of an absent object")
    _refuses(MissingError, lambda: store.get_range("a/b/object/below", 0, 1), "get_range below an object")
    _refuses(CorruptError, lambda: store.get_range("a/b/object", len(data) - 2, 3), "get_range past the end")
    _refuses(CorruptError, lambda: store.get("a/b/object", max_size=len(data) - 1), "get of an object larger than max_size")
    store.delete("a/b/object")
    assert store.size("a/b/object") is None, "a deleted object is gone"
    _refuses(MissingError, lambda: store.get_range("a/b/object", 0, 1), "get_range of a deleted object that was read before")
    store.delete("a/b/object")  # no error
    assert store.put_new("a/b/object", b"new"), "a deleted object can be put again"
    assert store.get_range("a/b/object", 0, 3) == b"new", "an object that was put again reads as its new bytes"


def _check_listing(store: Store) -> None:
    paths = {"x": 1, "f/a": 2, "f/b": 3, "f/g/c": 4, "fa/d": 5}
    for path, size in paths.items():
        store.put_new(path, bytes(size))
    assert dict(store.list()) == paths, "list names every object with its size"
    assert dict(store.list("f/")) == {"f/a": 2, "f/b": 3, "f/g/c": 4}, "list names the objects below a folder and no others"
    assert dict(store.list("f/", deep=False)) == {"f/a": 2, "f/b": 3, "f/g/": 0}, "a shallow list names the folders in it, not what they hold"
    assert list(store.list("absent/")) == [], "a folder that is not there is empty"


def _check_paths(store: Store) -> None:
    for path in ("", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\\b", "a\0b"):
        _refuses(StoreError, lambda path=path: store.put_new(path, b"x"), f"put_new at {path!r}")  # type: ignore[misc]
        _refuses(StoreError, lambda path=path: store.get_range(path, 0, 1), f"get_range at {path!r}")  # type: ignore[misc]
        _refuses(StoreError, lambda path=path: store.delete(path), f"delete at {path!r}")  # type: ignore[misc]
        _refuses(StoreError, lambda path=path: store.size(path), f"size at {path!r}")  # type: ignore[misc]
    for path in ("a b", "é/日本", "a..b", "..c", "%2F", "a:b*?"):
        assert store.put_new(path, path.encode()), f"an object can be called {path!r}"
        assert store.get(path, max_size=100) == path.encode(), f"the object {path!r} can be read"


def _check_creation_race(store: Store) -> None:
    contents = [bytes([i]) * 50_000 for i in range(8)]
    for attempt in range(10):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda content, path=f"race/{attempt}": store.put_new(path, content), contents))
        assert sum(won) == 1, f"of several writers of one object exactly one succeeds: found {won}"
        assert store.get(f"race/{attempt}", max_size=50_000) == contents[won.index(True)], "the object is the winner's, and whole"


def _check_spools(store: Store) -> None:
    spool, other = store.new_spool(), store.new_spool()
    assert spool != other, "every attempt has a spool of its own"
    (spool / "file").write_bytes(b"spooled")
    assert list(store.list()) == [], "what is spooled is no object"
    assert sorted((one.size >= 7, one.is_alive) for one in store.spools()) == [(False, True), (True, True)], "spools tells sizes and live attempts"
    assert store.sweep_spools() == 0, "sweep_spools never touches a live attempt"
    assert store.put_new("object", spool / "file"), "a spooled file can be put"
    assert store.get("object", max_size=7) == b"spooled", "a spooled file is put whole"
    (other / "file").write_bytes(b"too late")
    assert not store.put_new("object", other / "file"), "a spooled file never overwrites"
    store.drop_spool(spool)
    store.drop_spool(other)
    assert not spool.exists(), "drop_spool removes the folder"
    assert dict(store.list()) == {"object": 7}, "objects outlive their spool"
    labelled, unlabelled = store.new_spool("train-0007"), store.new_spool()
    assert store.live_labels() == {"train-0007"}, "the labels of live attempts are shown"
    store.drop_spools()
    assert not labelled.exists() and not unlabelled.exists(), "drop_spools removes every folder of this process"
    assert store.live_labels() == set(), "an attempt that was dropped is not alive"


def _check_holding(store: Store) -> None:
    with store.hold(), store.hold():
        _refuses(StoreError, lambda: store.hold(alone=True).__enter__(), "holding a store alone that others hold")
    with store.hold(alone=True):
        _refuses(StoreError, lambda: store.hold().__enter__(), "holding a store that another holds alone")
        assert store.put_new("object", b"x"), "who holds a store can put"
    with store.hold(alone=True):
        store.delete("object")


def _check_pickling(store: Store) -> None:
    store.put_new("object", b"bytes")
    store.get_range("object", 0, 5)
    copy: Store = pickle.loads(pickle.dumps(store))
    assert copy.get_range("object", 0, 5) == b"bytes", "a store can be sent to another process"
    assert copy.url == store.url, "a store that was sent keeps its url"


def check_encoding(encoding: Encoding, value: Mapping[str, Tensor]) -> None:
    """encoding: with its statistics loaded, if it needs any. value: at least two rows of what a teacher gives, float32.

    Raises AssertionError naming the promise that is broken.
    """
    kept = {part: tensor.clone() for part, tensor in value.items()}
    num_rows = len(next(iter(value.values())))
    labels_B = torch.arange(num_rows) - 1  # the first is unknown
    components = encoding.encode(value, labels_B)
    stated = encoding.components()
    assert list(components) == list(stated), f"encode gives the components that are stated: {list(stated)}, found {list(components)}"
    for name, tensor in components.items():
        dtype = {"uint16": "int16"}.get(stated[name].dtype, stated[name].dtype)
        assert tuple(tensor.shape) == (num_rows, *stated[name].shape), f"{name} has the stated shape: found {tuple(tensor.shape)}"
        assert str(tensor.dtype) == f"torch.{dtype}", f"{name} has the stated dtype {dtype}: found {tensor.dtype}"
    assert all(torch.equal(value[part], kept[part]) for part in value), "encode does not change its input"
    _check_decoded(encoding, value, components)
    _check_parts(encoding, value, components)
    _check_rows_are_independent(encoding, value, components, labels_B)
    assert build_encoding("logits" if "logits" in value else "features", encoding.full_name, encoding.shape).components() == stated, (
        "an encoding can be built again from its name and shape"
    )
    for extreme in _extremes(value):
        for labels in (None, labels_B):
            decoded = encoding.decode(encoding.encode(extreme, labels))
            assert all(bool(tensor.isfinite().all()) for tensor in decoded.values()), "every finite value decodes to a finite one"


def _check_decoded(encoding: Encoding, value: Mapping[str, Tensor], components: Mapping[str, Tensor]) -> None:
    kept = {name: tensor.clone() for name, tensor in components.items()}
    decoded = encoding.decode(components)
    assert decoded.keys() == value.keys(), f"decode gives the parts of the value: {sorted(value)}, found {sorted(decoded)}"
    for part, tensor in decoded.items():
        assert tensor.shape == value[part].shape, f"{part} keeps its shape {tuple(value[part].shape)}: found {tuple(tensor.shape)}"
        assert tensor.dtype == torch.float32, f"{part} decodes to float32: found {tensor.dtype}"
        assert bool(tensor.isfinite().all()), f"{part} decodes to finite values"
    assert all(torch.equal(components[name], kept[name]) for name in components), "decode does not change its input"
    device = next(iter(components.values())).device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = encoding.decode(components)
    for part, tensor in decoded.items():
        assert under_autocast[part].dtype == torch.float32, f"{part} decodes to float32 under autocast"
        assert torch.equal(under_autocast[part], tensor), f"{part} decodes to the same bits under autocast"
    with torch.inference_mode():
        inferred = encoding.decode(components)
    assert all(torch.equal(inferred[part], tensor) for part, tensor in decoded.items()), "decode is pure"


def _check_parts(encoding: Encoding, value: Mapping[str, Tensor], components: Mapping[str, Tensor]) -> None:
    parts = encoding.parts()
    assert sorted(name for names in parts.values() for name in names) == sorted(components), "every component is in exactly one part"
    whole = encoding.decode(components)
    sums: dict[str, Tensor] = {}
    for part, names in parts.items():
        assert encoding.components_of([part]) == names, f"the components of {part} are those that parts() gives it"
        for name, tensor in encoding.decode({name: components[name] for name in names}).items():
            assert tensor.shape == value[name].shape and tensor.dtype == torch.float32, f"part {part} alone decodes to the shape of {name}"
            sums[name] = sums[name] + tensor if name in sums else tensor
    assert sums.keys() == whole.keys(), "the parts alone decode to what all decode to"
    for name, tensor in sums.items():
        assert torch.allclose(tensor, whole[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max())), f"the parts of {name} add up to it"


def _check_rows_are_independent(encoding: Encoding, value: Mapping[str, Tensor], components: Mapping[str, Tensor], labels_B: Tensor) -> None:
    for row in range(len(labels_B)):
        alone = encoding.encode({part: tensor[row : row + 1] for part, tensor in value.items()}, labels_B[row : row + 1])
        for name, tensor in components.items():
            assert torch.equal(alone[name][0], tensor[row]), f"{name} of row {row} is the same alone and in a batch"


def _extremes(value: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
    """Values of the same shape: zeros, constants, huge ones of both signs, tiny ones, one outlier in an ordinary value."""

    def of(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {part: change(tensor.clone()) for part, tensor in value.items()}

    def with_outlier(tensor: Tensor) -> Tensor:
        tensor[..., 0] = _LARGEST_FLOAT
        return tensor

    return [
        of(torch.zeros_like),
        of(lambda tensor: torch.full_like(tensor, -3.5)),
        of(lambda tensor: torch.full_like(tensor, _LARGEST_FLOAT)),
        of(lambda tensor: torch.where(tensor > tensor.median(), _LARGEST_FLOAT, -_LARGEST_FLOAT)),
        of(lambda tensor: tensor * 1e-44),
        of(with_outlier),
    ]
