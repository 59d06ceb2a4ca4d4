"""What losses on feature maps share: tokens and maps, grids of other sizes, the 2-D DCT, masks with a generator of their own.

A student's map is brought to the teacher's grid, never the other way: the target stays what the teacher gave.

Legend: B batch, C channels, H W rows and columns of a map, T = H · W tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import moved
from .encodings.dct import frequencies_of_bands

Grid = tuple[int, int]
"""(rows, columns)."""


def map_to_tokens(map_BCHW: Tensor) -> Tensor:
    """(B, T, C), row-major."""
    return map_BCHW.flatten(2).transpose(1, 2)


def tokens_to_map(tokens_BTC: Tensor, grid: Grid) -> Tensor:
    """(B, C, H, W) of row-major tokens."""
    return tokens_BTC.transpose(1, 2).reshape(len(tokens_BTC), -1, *grid)


def resize_map(map_BCHW: Tensor, grid: Grid) -> Tensor:
    """The map on another grid: bilinear, antialiased where it shrinks, corners not aligned; the map itself if the grid is its own.

    It is two products with constant matrices, the same as torch's interpolation but deterministic on every device and differentiable
    in every precision. A constant map stays constant, and a linear adapter may come before or after.
    """
    for axis, size in ((2, grid[0]), (3, grid[1])):
        if map_BCHW.shape[axis] != size:
            weights = _placed(_resizing, (map_BCHW.shape[axis], size), map_BCHW.dtype, map_BCHW.device)
            map_BCHW = torch.tensordot(map_BCHW, weights, dims=([axis], [1])).movedim(-1, axis)
    return map_BCHW


@lru_cache(maxsize=256)
def _placed(constant: Callable[..., Tensor], arguments: tuple[Hashable, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `constant` gives, on a device: copied there once, since the host would wait for the device with a copy in every step."""
    with torch.inference_mode(False):  # whoever asks first: others need gradients through it
        return constant(*arguments).to(dtype).to(device)  # in two steps: mps has no float64


@lru_cache(maxsize=64)
def _resizing(source: int, size: int) -> Tensor:
    """(size, source) weights of one axis, float64."""
    impulses = torch.eye(source, dtype=torch.float64).view(source, 1, 1, source)
    resized = F.interpolate(impulses, size=(1, size), mode="bilinear", antialias=True, align_corners=False)
    weights: Tensor = resized.view(source, size).T.contiguous()
    return weights


def squared_error(found: Tensor, expected: Tensor, *, where: Tensor | None = None) -> Tensor:
    """Σ (found - expected)² in at least float32, outside of autocast. where: bool mask of what counts."""
    with torch.autocast(found.device.type, enabled=False):
        difference = found.to(torch.promote_types(found.dtype, torch.float32)) - expected
        total: Tensor = (difference if where is None else difference * where).square().sum()
        return total


@lru_cache(maxsize=64)
def dct_matrix(size: int) -> Tensor:
    """(size, size) orthonormal DCT-II, float64: row k holds √(2/n) · cos(π(i + ½)k/n), row 0 √(1/n)."""
    k, i = torch.meshgrid(torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64), indexing="ij")
    matrix: Tensor = (2 / size) ** 0.5 * torch.cos(torch.pi * (i + 0.5) * k / size)
    matrix[0] *= 0.5**0.5
    return matrix


def dct2(map_BCHW: Tensor) -> Tensor:
    """2-D orthonormal DCT-II of each channel: coefficient [..., u, v] of row frequency u and column frequency v; a sum of squares stays what it is."""
    rows, columns = (_placed(dct_matrix, (size,), map_BCHW.dtype, map_BCHW.device) for size in map_BCHW.shape[-2:])
    return rows @ map_BCHW @ columns.T


@lru_cache(maxsize=64)
def band_mask(grid: Grid, bands: tuple[str, ...]) -> Tensor:
    """bool (H, W): the coefficients of these bands of the `dct` encoding (`encodings.dct`). A small grid lacks some."""
    places = frequencies_of_bands(grid)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[[place for band in bands for place in places.get(band, [])]] = True
    return mask.view(grid)


def band_mask_on(device: torch.device, grid: Grid, bands: tuple[str, ...]) -> Tensor:
    """`band_mask` on a device."""
    return _placed(band_mask, (grid, bands), torch.bool, device)


class Noise(nn.Module):
    """Uniform noise from a generator of its own, whose state is in the state dict: a resumed run draws what the unbroken one draws.

    The numbers are drawn on the CPU, so that they are the same for every device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()
        self.reseed()

    def reseed(self) -> None:
        """Seed it from torch's global generator, as when it was made."""
        self._generator.manual_seed(int(torch.randint(2**62, ()).item()))

    def forward(self, *shape: int, like: Tensor) -> Tensor:
        """float32 in [0, 1), on the device of `like`."""
        return moved(torch.rand(shape, generator=self._generator), like.device)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        self._generator.set_state(state.cpu())
