"""What changed, when a view rendered now is not the one that the teacher saw: members of the tar, bytes of its images, or the decoder. Used by verify.

Only a digest of a view is kept, and a digest tells no distance. Two things give one: a stored view, and another resizer that renders the very
pixels of the digest, which then is the one that the view was made with. So the resizers that people use are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any, Literal

import google_crc32c
import numpy as np
from PIL import Image, features

from .augment import Pixels
from .cache import Cache, Replay
from .errors import KDCacheError
from .images import Decoded, as_pillow
from .index import rows_of_table
from .plan import ViewPlan
from .shards import ShardFiles, ShardIndex, ShardSource, digest_of_images
from .views import Resizer, pixel_digest, resize_torch

MAX_NAMED = 3
"""Members that a message names."""

Cause = Literal["source drift", "decoder drift", "drift"]


# --- the source ------------------------------------------------------------------------------------------------------


def member_differences(cache: Cache, index: ShardIndex) -> str:
    """In words, how the tar's samples differ from the rows of the cache: keys, labels, places and sizes. Raises CacheError for damaged groups."""
    shard = index.source.name
    table = cache.table_from_group(cache.views[shard][0].identity)
    rows = dict(zip(cache.keys(shard), rows_of_table(table).tolist(), strict=True))
    skipped = {skip.key for skip in cache.views[shard][0].identity.skipped}
    found = {sample.key: sample for sample in index.samples}
    words: list[str] = []

    def add(what: str, keys: list[str], detail: Callable[[str], str] = lambda _key: "") -> None:
        if keys:
            named = ", ".join(f"{key!r}{detail(key)}" for key in keys[:MAX_NAMED])
            words.append(f"{what}: {named}{f' and {len(keys) - MAX_NAMED} more' if len(keys) > MAX_NAMED else ''}")

    both = [key for key in rows if key in found]
    add("gone", [key for key in rows if key not in found])
    add("new", [key for key in found if key not in rows and key not in skipped])
    add("other label", [key for key in both if found[key].label != rows[key][2]], lambda key: f" ({rows[key][2]} then, {found[key].label} now)")
    add(
        "other size",
        [key for key in both if found[key].image_size != rows[key][1]],
        lambda key: f" ({rows[key][1]} bytes then, {found[key].image_size} now)",
    )
    moved = [key for key in both if found[key].image_size == rows[key][1] and found[key].image_offset != rows[key][0]]
    add("moved", moved, lambda key: f" (byte {rows[key][0]} then, {found[key].image_offset} now)")
    if not words:
        words.append("every row's key, label, place and size is as it was: a member was changed that is no row's image or label")
    if index.cut is not None:
        words.append(f"the tar is cut short: {index.cut}")
    return "; ".join(words)


def images_changed(cache: Cache, source: ShardSource) -> bool | None:
    """Whether the bytes of the rows' images are others than when the views were rendered; None where that was not recorded. Reads them all."""
    shard = source.name
    recorded = [document.provenance.get("source", {}).get("images") for document in cache.views[shard]]
    expected = next((digest for digest in recorded if digest is not None), None)
    if expected is None:
        return None
    table = cache.table_from_group(cache.views[shard][0].identity)
    files = ShardFiles()
    crcs = [google_crc32c.value(files.read(source, "", offset, size)) for offset, size, _, skip in table.tolist() if not skip]
    files.close()
    return bool(digest_of_images([np.array(crcs, np.uint32)]) != expected)


# --- the decoder -----------------------------------------------------------------------------------------------------


def libraries_then_and_now(provenance: Mapping[str, Any], plan: ViewPlan) -> str:
    """'Pillow 12.1.0, libjpeg_turbo 3.1.2 then; Pillow …, … now', from the provenance of a views record; of a plan's packages."""
    packages = {"Pillow" if name == "pillow" else name: name for name in plan.packages}
    then = {shown: provenance.get("packages", {}).get(name, "of an unknown version") for shown, name in packages.items()}
    recorded = {name: number for name, number in provenance.get("libraries", {}).items() if number is not None}
    now = {shown: version(name) for shown, name in packages.items()} | {name: features.version(name) for name in recorded}
    words = [", ".join(f"{name} {number}" for name, number in side.items()) for side in (then | recorded, now)]
    return f"{words[0]} then; {'the same' if words[0] == words[1] else words[1]} now"


@dataclass(frozen=True)
class PixelDistance:
    """How far two renderings of a view are from each other, in levels of 0 to 255."""

    most: int
    mean: float

    def __str__(self) -> str:
        return f"at most {self.most} of 255 levels, {self.mean:.2g} on average"


def pixel_distance(a: Pixels, b: Pixels) -> PixelDistance:
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return PixelDistance(int(difference.max(initial=0)), float(difference.mean()))


def other_resizers() -> Iterator[tuple[str, Resizer]]:
    """(name, resizer) of those that people use in place of Pillow's with the plan's filter."""
    for name, resample in Image.Resampling.__members__.items():
        yield f"Pillow's {name.lower()} filter", partial(_pillow_resize, resample=resample)
    for gap in (2.0, 3.0):
        yield f"Pillow with reducing_gap={gap:g}", partial(_pillow_resize, gap=gap)
    yield "torch on uint8", resize_torch
    yield "torch with antialiasing (torchvision on tensors)", partial(_torch_resize, antialias=True)
    yield "torch without antialiasing (torchvision on tensors)", partial(_torch_resize, antialias=False)


def _pillow_resize(
    image: Decoded, size: int, planned: Image.Resampling, *, resample: Image.Resampling | None = None, gap: float | None = None
) -> Image.Image:
    return as_pillow(image).resize((size, size), planned if resample is None else resample, reducing_gap=gap)


def _torch_resize(image: Decoded, size: int, planned: Image.Resampling, *, antialias: bool) -> Image.Image:
    import torch
    import torch.nn.functional as F

    mode = "bicubic" if planned == Image.Resampling.BICUBIC else "bilinear"
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels.float(), (size, size), mode=mode, antialias=antialias, align_corners=False)
    return Image.fromarray(resized.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy())


def resizer_of(cache: Cache, shard: str, view: int, row: int, digest: int, image_of: Callable[[int], Decoded]) -> tuple[str, PixelDistance] | None:
    """The resizer that renders a view with this digest, and how far from it the view is that is rendered now; None if no known one does."""
    replay: Replay = next(islice(cache.read_replays(shard, view, [row]), 1))
    now = replay.render(image_of)
    for name, resizer in other_resizers():
        then = replay.render(image_of, resizer)
        if pixel_digest(then) == digest:
            return name, pixel_distance(then, now)
    return None


def distance_from_stored(cache: Cache, shard: str, view: int, row: int, now: Pixels) -> PixelDistance | None:
    """How far a view that is rendered now is from the stored one; None if that can't be read, which is told elsewhere."""
    try:
        (stored,) = cache.read_stored(shard, view, [row])
    except KDCacheError:
        return None
    return pixel_distance(stored, now)
