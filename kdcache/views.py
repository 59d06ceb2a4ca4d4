"""Views: `render` makes the pixels that the teacher sees from an image and a view's params. Both stages call this and nothing else for pixels.

It draws nothing: all it needs is in the params (`kdcache.view_params`), which `kdcache.draws` draws and the cache stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image

from . import augment
from .augment import Pixels, apply_op
from .errors import CorruptError, UsageError
from .images import Decoded, as_pillow, size_of
from .view_params import ERASE_NOISE, MIXUP, Box, Erase, ViewParams

Resizer: TypeAlias = Callable[[Decoded, int, Image.Resampling], Decoded]
"""(image, side of the square, the plan's filter) → the resized image."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(image: Decoded, size: int, resample: Image.Resampling) -> Decoded:
    """The image as a square of `size` pixels, antialiased: Pillow's own resizer."""
    return as_pillow(image).resize((size, size), resample)


def resize_torch(image: Decoded, size: int, resample: Image.Resampling) -> Decoded:
    """The same by torch in 16-bit integers, uint8 (size, size, 3): a sixth of the time. Its arithmetic is written down in FORMAT.md §3.

    Called directly, since torchvision takes another way round on a CPU without AVX2, with other pixels.
    """
    import torch
    import torch.nn.functional as F

    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    mode = "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"
    image_1CHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order its strides say channels last, and the view's too
    view: Pixels = F.interpolate(image_1CHW, (size, size), mode=mode, antialias=True, align_corners=False)[0].permute(1, 2, 0).numpy()
    return view


def render(image: Decoded, params: ViewParams, partner: Pixels | None = None, *, resizer: Resizer | None = None) -> Pixels:
    """The view: uint8 (size, size, 3), before any normalisation. Draws nothing.

    image: RGB, as `kdcache.images.decode_image` gives it. partner: of a mixed view the partner's own view of the same number, unmixed:
    uint8 (size, size, 3). resizer: another than the plan's, to find out which one a view was made with. Raises CorruptError for params that
    this version can't render or that do not fit the image, UsageError for a mixed view without its partner.
    """
    if (partner is None) != (params.mix is None):
        found = "none was given" if partner is None else "one was given"
        raise UsageError(f"view params: a view with mix {params.mix} takes {'no' if params.mix is None else 'a'} partner, {found}; see Cache.view")
    box, (width, height) = params.crop, size_of(image)
    if box.left + box.width > width or box.top + box.height > height:
        raise CorruptError(f"view params: crop {box} lies outside the image of {width}x{height} pixels; the image was changed")
    resample = _RESAMPLING[params.interpolation]
    resizer = resizer or (resize_torch if params.resizer == "torch" else resize)
    view = resizer(_crop(image, box), params.size, resample)
    if params.flip:
        view = _flip(view)
    for op, magnitude in params.ops:
        view = apply_op(as_pillow(view), op, magnitude, resample)
    pixels: Pixels = np.array(view, dtype=np.uint8, order="C")  # a copy: torch warns of arrays that can't be written to
    if params.erase is not None:
        _erase_pixels(pixels, params.erase)
    if params.mix is not None and partner is not None:
        if params.mix.mode == MIXUP:
            return augment.blend(pixels, partner, params.mix.lambda_q16)
        inside = _slices(params.mix.box)
        pixels[inside] = partner[inside]
    return pixels


def _crop(image: Decoded, box: Box) -> Decoded:
    if isinstance(image, np.ndarray):
        return image[_slices(box)]
    if (box.width, box.height) == image.size:
        return image
    return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))


def _flip(view: Decoded) -> Decoded:
    if not isinstance(view, np.ndarray):
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    import torch

    flipped: Pixels = torch.from_numpy(view).flip(1).numpy()  # .01 ms; NumPy copies view[:, ::-1] in .17
    return flipped


def _erase_pixels(pixels: Pixels, erase: Erase) -> None:
    box = erase.box
    if erase.mode == ERASE_NOISE:
        pixels[_slices(box)] = augment.noise(erase.seed, box.height, box.width)
    else:
        pixels[_slices(box)] = tuple(erase.seed.to_bytes(3, "big"))


def _slices(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)


def pixel_digest(view: Pixels) -> int:
    """BLAKE2b-64 of the view's bytes in C order, as a little-endian uint64."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(view).data, digest_size=8).digest(), "little")
