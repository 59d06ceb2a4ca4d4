"""`features:dct`: the token grid's 2-D cosine transform, by bands of frequency that a reader may fetch alone.

For losses in frequency, as ScaleKD's (its frequency view is every band but `dc`). It is no codec for tokens: all bands
together take as much as int8, and a few alone keep little of a map whose tokens differ; the record says how much.

Orthonormal DCT-II along both axes of the H × W grid, of each standardised channel: for a side of n tokens

    D[k, i] = √((2 - [k = 0]) / n) · cos(π (i + ½) k / n),     Y = D_H · Z · D_Wᵀ,     Z = D_Hᵀ · Y · D_W.

Frequency (u, v) has the radius ρ = √((u/H)² + (v/W)²), in units of the Nyquist frequency. `dc` is ρ = 0: the spatial mean;
`low` ρ ≤ ¼, `mid` ρ ≤ ½, `high` the rest. On 14 × 14 tokens: 1, 12, 30 and 153 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..format import Component
from .base import Encoding, TargetShape, full_precision, standardise
from .int8 import decode_tokens, encode_tokens, token_components

BANDS = ("dc", "low", "mid", "high")


class DctFeatures(Encoding):
    """Each frequency is quantised as int8 quantises a token: one scale for its C standardised channels, then 8 bits.

    The scale follows the view, so that a massive token, which leaks into every frequency, costs precision in its own view only; scales that
    are calibrated a frequency and channel lose more there (z_l2 .0094 against .0064) and gain nothing elsewhere (`benchmarks/klt_choices.py`).

    Components per band that the grid has: `<band>` int8 (frequencies, C), row-major in (u, v), and `<band>_scale` float16 (frequencies,); for
    prefix tokens as in int8. The parts are the bands and `prefix`. Without `dc` a grid decodes to itself minus its spatial mean.
    """

    name: ClassVar[str] = "dct"
    summary: ClassVar[str] = "2-D cosine transform of the token grid in bands dc, low, mid, high that are read apart; about 7 bits a value"
    needs_calibration: ClassVar[bool] = True

    def __init__(self, shape: TargetShape, argument: str | None = None) -> None:
        super().__init__(shape, argument)
        self._frequencies = frequencies_of_bands(shape.grid)

    def components(self) -> dict[str, Component]:
        result: dict[str, Component] = {}
        for band, frequencies in self._frequencies.items():
            result |= token_components(band, len(frequencies), self.shape.channels)
        return result | token_components("prefix", self.shape.prefix_tokens, self.shape.channels)

    def parts(self) -> dict[str, tuple[str, ...]]:
        names = [*self._frequencies, *(["prefix"] if self.shape.prefix_tokens else [])]
        return {name: (name, f"{name}_scale") for name in names}

    def bands(self, z_BTC: Tensor) -> dict[str, Tensor]:
        coefficients_BTC = dct2(z_BTC, self.shape.grid)
        return {band: coefficients_BTC.index_select(1, _places(self.shape.grid, band, z_BTC.device)) for band in self._frequencies}

    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        components: dict[str, Tensor] = {}
        for part, tokens in value.items():
            z_BTC = standardise(tokens, *(self.statistic(f"{part}_{name}", tokens.device) for name in ("mean", "std")))
            for name, rows in (self.bands(z_BTC) if part == "grid" else {part: z_BTC}).items():
                components[name], components[f"{name}_scale"] = encode_tokens(rows)
        return components

    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        value: dict[str, Tensor] = {}
        first = next(iter(components.values()))
        bands = [band for band in self._frequencies if band in components]
        if bands:
            coefficients_BTC = torch.zeros(len(first), self.shape.num_tokens, self.shape.channels, device=first.device)
            for band in bands:
                rows_BTC = decode_tokens(components[band], components[f"{band}_scale"])
                coefficients_BTC.index_copy_(1, _places(self.shape.grid, band, first.device), rows_BTC)
            value["grid"] = idct2(coefficients_BTC, self.shape.grid) * self.statistic("grid_std", first.device)
            if "dc" in bands:
                value["grid"] += self.statistic("grid_mean", first.device)
        if "prefix" in components:
            std, mean = (self.statistic(f"prefix_{name}", first.device) for name in ("std", "mean"))
            value["prefix"] = decode_tokens(components["prefix"], components["prefix_scale"]) * std + mean
        return value


def frequencies_of_bands(grid: tuple[int, int]) -> dict[str, list[int]]:
    """Band → places of its frequencies in the row-major (u, v) order; bands that a small grid does not have are left out."""
    height, width = grid
    places: dict[str, list[int]] = {band: [] for band in BANDS}
    for u in range(height):
        for v in range(width):
            radius_sq, nyquist_sq = u * u * width * width + v * v * height * height, height * height * width * width  # ρ² is their ratio, exactly
            band = "dc" if radius_sq == 0 else "low" if 16 * radius_sq <= nyquist_sq else "mid" if 4 * radius_sq <= nyquist_sq else "high"
            places[band].append(u * width + v)
    return {band: found for band, found in places.items() if found}


@cache
def _places(grid: tuple[int, int], band: str, device: torch.device) -> Tensor:
    """A band's places on a device, int64 (frequencies,): as a list they would be copied there each time, and the host would wait for it."""
    return torch.tensor(frequencies_of_bands(grid)[band]).to(device)


@cache
def _matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II of `size` points, float32 (frequencies, points)."""
    k, i = torch.arange(size, dtype=torch.float64).unsqueeze(1), torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (i + 0.5) * k) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float().to(device)


def dct2(x_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H·W, C) float32 tokens → (B, H·W, C) coefficients, both row-major."""
    return _transform(x_BTC, grid, inverse=False)


def idct2(y_BTC: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse, which is the transpose."""
    return _transform(y_BTC, grid, inverse=True)


def _transform(x_BTC: Tensor, grid: tuple[int, int], *, inverse: bool) -> Tensor:
    height, width = grid
    rows_HH, columns_WW = (_matrix(size, x_BTC.device) for size in grid)
    if inverse:
        rows_HH, columns_WW = rows_HH.T, columns_WW.T
    with full_precision(x_BTC.device):  # view by view, as in klt: codes must not depend on the rows beside them
        down = [rows_HH @ x_TC.reshape(height, -1) for x_TC in x_BTC]
        return torch.stack([torch.matmul(columns_WW, y.view(height, width, -1)).flatten(0, 1) for y in down])
