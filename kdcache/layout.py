"""Which arrays a group holds: the one place that writer, reader and verify take array names, types and shapes from.

Views group: `keys/bytes` and `keys/ends` (end of each key in bytes), `labels`, `image/offset`, `image/size`, each (rows,);
`params` (views, rows, fields) and `pixels` (views, rows); with stored views also `stored/pixels` (views, rows, S, S, 3), or `stored/bytes`
(bytes,) and `stored/span` (views, rows, 2). A targets group: `<target>/<component>` (views, rows, …).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .arrays import ArraySpec, array_spec
from .format import TargetIdentity
from .plan import ViewPlan
from .view_params import PARAM_FIELDS

ROW_ARRAYS = {"keys/ends": "int64", "labels": "int64", "image/offset": "int64", "image/size": "int64"}
"""Arrays of the views group with one number a row and no views axis."""

STORED_FOLDER = "stored"
STORED_PIXELS, STORED_BYTES, STORED_SPAN = (f"{STORED_FOLDER}/{name}" for name in ("pixels", "bytes", "span"))
"""Of stored views: the pixels as they are; or image files one after another, and where each begins and ends."""


def stored_specs(plan: ViewPlan, views: int, samples: int) -> dict[str, ArraySpec]:
    """Array name → spec of what a plan stores of its views, but the stream STORED_BYTES (`arrays.stream_spec`)."""
    if plan.stored_views is None:
        return {}
    if plan.stored_views == "raw":
        pixels = array_spec(STORED_PIXELS, "uint8", (plan.size, plan.size, 3), views=views, max_rows=1)  # a chunk a view, whatever its size
        return {STORED_PIXELS: replace(pixels, compressed=False)}
    return {STORED_SPAN: array_spec(STORED_SPAN, "int64", (2,), views=views, max_rows=samples, typesize=16)}


def has_views_axis(layer: str, name: str) -> bool:
    """Whether an array of a group of this layer (`views` or `teachers/<name>`) has a views axis before its rows."""
    return layer != "views" or name not in {*ROW_ARRAYS, "keys/bytes", STORED_BYTES}


def grows_with_views(layer: str, name: str) -> bool:
    """Whether an array holds something of each view: along an axis, or as a stream."""
    return has_views_axis(layer, name) or name == STORED_BYTES


def params_spec(views: int, samples: int) -> ArraySpec:
    """typesize is a whole row of params, so that bitshuffle gathers each field over rows: most fields compress to nothing."""
    return array_spec("params", "int32", (len(PARAM_FIELDS),), views=views, max_rows=samples, typesize=4 * len(PARAM_FIELDS))


def pixels_spec(views: int, samples: int) -> ArraySpec:
    return array_spec("pixels", "uint64", (), views=views, max_rows=samples)


def row_spec(name: str, samples: int) -> ArraySpec:
    return array_spec(name, ROW_ARRAYS[name], (), views=None, max_rows=samples)


def key_bytes_spec(size: int) -> ArraySpec:
    return array_spec("keys/bytes", "uint8", (), views=None, max_rows=size)


def target_specs(cards: Mapping[str, TargetIdentity], views: int, samples: int) -> dict[str, ArraySpec]:
    """Array name → spec for a targets group."""
    return {
        f"{target}/{component}": array_spec(f"{target}/{component}", part.dtype, part.shape, views=views, max_rows=samples, typesize=part.typesize)
        for target, card in cards.items()
        for component, part in card.components.items()
    }


def group_folders(array_names: list[str]) -> list[str]:
    """Sub-groups that need a zarr.json of their own, the root group ('') first."""
    folders = {""}
    for name in array_names:
        parts = name.split("/")[:-1]
        folders |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    return sorted(folders)


def keys_to_arrays(keys: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys as (bytes uint8, ends int64): zarr's string dtypes are not settled."""
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def arrays_to_keys(data: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> list[str]:
    """The inverse of `keys_to_arrays`."""
    raw = data.tobytes()
    starts = [0, *ends.tolist()]
    return [raw[start:end].decode("utf-8", "surrogateescape") for start, end in zip(starts, ends.tolist(), strict=False)]
