"""`features:klt=COSINE`: tokens in a calibrated basis, quantised as coarsely as the stated mean cosine allows.

The basis is the Karhunen-Loève transform (PCA) of the standardised channels: the eigenvectors of their correlation over
calibration tokens, all of them, so that nothing is cut off and what is new in a view costs bytes, not error. Two means keep the bytes
down: most coefficients are far below the step, round to 0 and compress to almost nothing; and the codes lie component-major, so
that bitshuffle meets long runs of small numbers. Measured in docs/encodings.md.

The basis is orthonormal: squared distances between coefficients are those between standardised tokens, so a loss may be
taken on `decode_coefficients` and save the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..format import Component
from .base import Calibrator, ChannelStatistics, Encoding, TargetShape, full_precision, standardise
from .int8 import decode_tokens, encode_tokens, token_components

_ROUNDING = 0.36
"""|code| = floor(|y| / step + this). Below ½: a coefficient near a boundary goes to the smaller code, which is the likelier one and takes fewer
bits. At one cosine this is 6 to 10 % smaller than rounding to nearest (dead-zone quantisation, as in video coding; .30 to .42 are alike)."""
_LARGEST_CODE = 32767
_HELD_OUT_EVERY = 4
_HELD_OUT_VIEWS = 16
_HELD_OUT_BYTES = 64 << 20
_STEPS_PER_OCTAVE = 16
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0


class KltFeatures(Encoding):
    """token = mean_C + std_C * (basis @ (code * step * scale_token)); scale_token is the root mean square of the token's z-scores.

    Both the mean cosine of raw tokens and that of standardised ones meet COSINE on calibration views that the basis was not fitted to: outlier
    channels make the raw one easy to meet. The scale a token makes the error a share of each token, which is the cheapest way to a mean
    cosine: 8 % smaller than one step for all, 28 % with a massive token among 37 (`benchmarks/klt_choices.py`).

    Components: `grid` uint16 (C, T), zigzag codes (0, -1, 1, -2, … → 0, 1, 2, 3, …), which leave the high bits empty where two's
    complement repeats the sign (13 % smaller); `grid_scale` float16 (T,). Prefix tokens as in int8. Calibration adds `basis` (C, C), one
    eigenvector a column by falling `variance` (C,), and `step` ().
    """

    name: ClassVar[str] = "klt"
    summary: ClassVar[str] = "calibrated basis, step chosen for the stated mean cosine, e.g. .99; under 2 bits a value"
    argument_name: ClassVar[str | None] = "COSINE"
    example: ClassVar[str] = "0.99"
    needs_calibration: ClassVar[bool] = True

    def __init__(self, shape: TargetShape, argument: str | None = None) -> None:
        super().__init__(shape, argument)
        try:
            self.cosine = float(argument or "")
        except ValueError:
            self.cosine = 0.0
        if not 0 < self.cosine < 1:
            raise UsageError(f"encoding {self.full_name!r}: expected a mean cosine between 0 and 1, e.g. klt={self.example}, found {argument!r}")

    def components(self) -> dict[str, Component]:
        tokens, channels = self.shape.num_tokens, self.shape.channels
        grid = {"grid": Component(dtype="uint16", shape=(channels, tokens)), "grid_scale": Component(dtype="float16", shape=(tokens,))}
        return grid | token_components("prefix", self.shape.prefix_tokens, channels)

    def calibration_shapes(self) -> dict[str, tuple[int, ...]]:
        channels = self.shape.channels
        return super().calibration_shapes() | {"basis": (channels, channels), "variance": (channels,), "step": ()}

    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        device = value["grid"].device
        mean, std, basis_CC, step = (self.statistic(name, device) for name in ("grid_mean", "grid_std", "basis", "step"))
        y_BTC, scale_BT = to_coefficients(standardise(value["grid"], mean, std), basis_CC)
        codes_BCT = quantise(y_BTC, scale_BT, step).transpose(1, 2)
        zigzag_BCT = (codes_BCT << 1) ^ (codes_BCT >> 31)
        components = {"grid": zigzag_BCT.to(torch.int16).contiguous(), "grid_scale": scale_BT}
        if "prefix" in value:
            mean, std = self.statistic("prefix_mean", device), self.statistic("prefix_std", device)
            components["prefix"], components["prefix_scale"] = encode_tokens(standardise(value["prefix"], mean, std))
        return components

    def decode_coefficients(self, components: Mapping[str, Tensor]) -> Tensor:
        """(B, T, C) float32: the grid's standardised tokens in the basis. Of the teacher's own tokens: standardise, then `@ basis`."""
        zigzag_BCT = components["grid"].to(torch.int32) & 0xFFFF
        codes_BTC = ((zigzag_BCT >> 1) ^ -(zigzag_BCT & 1)).transpose(1, 2)
        step = self.statistic("step", codes_BTC.device)
        return codes_BTC.float() * (components["grid_scale"].float() * step).unsqueeze(2)

    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        value: dict[str, Tensor] = {}
        if "grid" in components:
            device = components["grid"].device
            mean, std, basis_CC = (self.statistic(name, device) for name in ("grid_mean", "grid_std", "basis"))
            with full_precision(device):
                value["grid"] = self.decode_coefficients(components) @ basis_CC.T * std + mean
        if "prefix" in components:
            device = components["prefix"].device
            mean, std = self.statistic("prefix_mean", device), self.statistic("prefix_std", device)
            value["prefix"] = decode_tokens(components["prefix"], components["prefix_scale"]) * std + mean
        return value

    def calibrator(self, target: str) -> Calibrator:
        return _KltCalibrator(self, target)

    def is_near(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
        """Eigenvectors may change sign, or turn within an eigenspace: what is compared is the correlation that they are of."""
        if found.keys() != expected.keys() or any(found[name].shape != tensor.shape for name, tensor in expected.items()):
            return False
        names = [name for name in expected if name not in ("basis", "variance")]
        if not super().is_near({name: found[name] for name in names}, {name: expected[name] for name in names}):
            return False
        bases = [calibration["basis"].double() for calibration in (found, expected)]
        one, other = ((basis * calibration["variance"]) @ basis.T for basis, calibration in zip(bases, (found, expected), strict=True))
        unit = torch.eye(len(one), dtype=torch.float64)
        return bool(((bases[0].T @ bases[0] - unit).abs() < 1e-3).all()) and float((one - other).norm()) <= 0.05 * float(other.norm())


def to_coefficients(z_BTC: Tensor, basis_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (B, T, C) and root mean square (B, T) float16 of standardised tokens.

    One multiplication a view: the codes of a row must not depend on which rows stand beside it, and a matrix product's last bits do.
    """
    with full_precision(z_BTC.device):
        y_BTC = torch.stack([z_TC @ basis_CC for z_TC in z_BTC])
    scale_BT = z_BTC.square().mean(dim=2).sqrt().clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    return y_BTC, scale_BT


def quantise(y_BTC: Tensor, scale_BT: Tensor, step: Tensor) -> Tensor:
    """int32 codes (B, T, C)."""
    size_BTC = (y_BTC.abs() / (scale_BT.float() * step).unsqueeze(2) + _ROUNDING).floor_().clamp_(max=_LARGEST_CODE)
    return (size_BTC * y_BTC.sign()).to(torch.int32)


class _KltCalibrator:
    """Second moments of the channels in float64, and a few views held out to choose the step on.

    Of four consecutive views the second is held out; when that makes more than 16 of them or 64 MB, of eight, of sixteen, and so on: they are
    spread over all views, whose first may be of one class. What is not held out is fitted to. Memory: C² numbers and those views.
    """

    def __init__(self, encoding: KltFeatures, target: str) -> None:
        self._encoding, self._target = encoding, target
        self._channels = ChannelStatistics()
        size = encoding.shape.channels
        self._count, self._views = 0, 0
        self._sum_C = torch.zeros(size, dtype=torch.float64)
        self._moment_CC = torch.zeros(size, size, dtype=torch.float64)
        self._held_out: dict[int, dict[str, Tensor]] = {}
        self._every = _HELD_OUT_EVERY
        view_bytes = 4 * encoding.shape.num_tokens * size
        self._most_held_out = max(1, min(_HELD_OUT_VIEWS, _HELD_OUT_BYTES // view_bytes))

    def update(self, value: Mapping[str, Tensor]) -> None:
        on_host = {part: tokens.cpu() for part, tokens in value.items()}
        for i in range(len(on_host["grid"])):
            view = {part: tokens[i : i + 1] for part, tokens in on_host.items()}
            if self._views % self._every == 1:
                self._held_out[self._views] = {part: tokens.clone() for part, tokens in view.items()}
                self._thin_out()
            else:
                self._fit(view)
            self._views += 1

    def _thin_out(self) -> None:
        """Hold out every other one of too many, and fit to the rest."""
        while len(self._held_out) > self._most_held_out:
            self._every *= 2
            for number in [number for number in self._held_out if number % self._every != 1]:
                self._fit(self._held_out.pop(number))

    def _fit(self, view: Mapping[str, Tensor]) -> None:
        """The mean and deviation too: a held-out token must not be the sum of the others with its sign turned."""
        self._channels.update(view)
        wide_TC = view["grid"][0].double()
        self._count += len(wide_TC)
        self._sum_C += wide_TC.sum(dim=0)
        self._moment_CC.addmm_(wide_TC.T, wide_TC)

    def result(self) -> dict[str, Tensor]:
        if not self._held_out:
            raise UsageError(
                f"target {self._target!r}: encoding {self._encoding.full_name!r} is calibrated on one part of the first views and tried on the"
                f" other: expected at least 2 readable samples, found {self._views}; use int8"
            )
        tensors = self._channels.result()
        mean, std = tensors["grid_mean"].double(), tensors["grid_std"].double()
        cross_CC = torch.outer(self._sum_C, mean) / self._count
        centred_CC = self._moment_CC / self._count - cross_CC - cross_CC.T + torch.outer(mean, mean)
        variance_C, basis_CC = torch.linalg.eigh(centred_CC / torch.outer(std, std))
        variance_C, basis_CC = variance_C.flip(0).clamp_min(0), basis_CC.flip(1)
        largest = basis_CC.gather(0, basis_CC.abs().argmax(dim=0, keepdim=True))  # the sign of an eigenvector is free: this makes one of the two
        tensors["basis"] = (basis_CC * largest.sign()).float().contiguous()
        tensors["variance"] = variance_C.float()
        tensors["step"] = torch.tensor(self._choose_step(tensors))
        return tensors

    def _choose_step(self, tensors: Mapping[str, Tensor]) -> float:
        """The largest power of 2^(1/16) at which both mean cosines of the held-out views are at least COSINE. Raises UsageError."""
        encoding = self._encoding
        held_out_BTC = torch.cat([view["grid"].float() for view in self._held_out.values()])
        mean, std, basis_CC = tensors["grid_mean"], tensors["grid_std"], tensors["basis"]
        z_BTC = standardise(held_out_BTC, mean, std)
        y_BTC, scale_BT = to_coefficients(z_BTC, basis_CC)

        def worst_cosine(step: float) -> float:
            decoded_BTC = quantise(y_BTC, scale_BT, torch.tensor(step)) * (scale_BT.float() * step).unsqueeze(2)
            z_decoded_BTC = decoded_BTC @ basis_CC.T
            pairs = [(z_BTC, z_decoded_BTC), (held_out_BTC, z_decoded_BTC * std + mean)]
            return min(_mean_cosine(one, other) for one, other in pairs)

        lowest = _power_above(encoding.shape.channels**0.5 / _LARGEST_CODE)
        highest = 4 * _STEPS_PER_OCTAVE
        best = worst_cosine(2 ** (lowest / _STEPS_PER_OCTAVE))
        if best < encoding.cosine:
            raise UsageError(
                f"target {self._target!r}: encoding {encoding.full_name!r} can't be met: wanted a mean cosine of {encoding.argument} on held-out"
                f" views, the best is {best:.9f} (codes of 16 bits, float32); ask for less, or use int8, bf16 or fp16"
            )
        while highest - lowest > 1:
            middle = (lowest + highest) // 2
            if worst_cosine(2 ** (middle / _STEPS_PER_OCTAVE)) >= encoding.cosine:
                lowest = middle
            else:
                highest = middle
        return float(2 ** (lowest / _STEPS_PER_OCTAVE))


def _power_above(step: float) -> int:
    """The smallest i with 2^(i/16) >= step."""
    power = -20 * _STEPS_PER_OCTAVE
    while 2 ** (power / _STEPS_PER_OCTAVE) < step:
        power += 1
    return power


def _mean_cosine(one: Tensor, other: Tensor) -> float:
    """Over tokens that have a direction: a token of zeros has none."""
    live = one.abs().amax(dim=-1) > 0
    return float(F.cosine_similarity(one[live].double(), other[live].double(), dim=-1, eps=1e-100).mean()) if live.any() else 1.0
