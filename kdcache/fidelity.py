"""How far a decoded target is from what the teacher gave: measured by extract on every row, stored in each shard's record.

Features: relative L2, mean cosine of tokens (of those that have a direction: one of zeros has none), and relative L2 after standardising each channel (`z_l2`), because outlier
channels hide damage in the first two. Logits: relative L2, mean cosine and KL(teacher ‖ decoded) at T = 1 and T = 4.
Sums are kept as float64 on the host, so that shards add up. Of an encoding with bands of frequency, each band's share and error too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import CorruptError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEMPERATURES = (1, 4)
_TINY = 1e-30
"""A batch whose values are all below it is taken as zeros."""


@dataclass(frozen=True, eq=False)
class Terms:
    """What a batch adds to the sums, still on its device."""

    names: tuple[str, ...]
    """Of the sums; of parts of a value one name may stand several times."""
    numbers: Tensor
    """float32 (2, names): terms of values scaled to at most 1, and their scales."""
    vectors: int


@dataclass
class Fidelity:
    """Running sums for one target; `result` gives the figures."""

    calibration: Mapping[str, Tensor] | None = None
    """The calibrator's result of a feature target; None for logits."""
    bands: Callable[[Tensor], Mapping[str, Tensor]] | None = None
    """`Encoding.bands` of the target's encoding: energy and error are then kept for each."""
    sums: dict[str, float] = field(default_factory=dict)
    _statistics: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def update(self, value: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> bool:
        """Measure a batch and add it; False, and nothing added, if a value is not finite. value, decoded: as encodings take and give them."""
        terms = self.measure(value, decoded)
        return self.add(terms, terms.numbers)

    def measure(self, value: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> Terms:
        """What a batch adds, for `add`; the host does not wait for it.

        Squares are taken of values scaled to at most 1, since float32 can't hold those of values above 2e19 and mps has no float64.
        """
        import torch  # here, so that `combine_fidelity` serves inspect without it
        import torch.nn.functional as F

        names: list[str] = []
        terms: list[Tensor] = []
        scales: list[Tensor] = []

        def add(name: str, term: Tensor, scale: Tensor) -> None:
            names.append(name)
            terms.append(term)
            scales.append(scale)

        vectors = 0
        for part, original in value.items():
            x, y = original.float(), decoded[part].float()
            sizes = [x.abs().amax(), y.abs().amax()]
            if part != "logits" and self.calibration is not None:
                mean, std = (self._statistic(f"{part}_{name}", x.device) for name in ("mean", "std"))
                sizes.append(mean.abs().amax())
            largest = torch.stack(sizes).amax().clamp_min(_TINY)
            one = torch.ones_like(largest)
            x_unit, y_unit = x / largest, y / largest
            error = y_unit - x_unit
            add("error_sq", error.square().sum(), largest)
            add("value_sq", x_unit.square().sum(), largest)
            directed = x.abs().amax(dim=-1) > 0
            add("cosine_sum", (F.cosine_similarity(x_unit, y_unit, dim=-1, eps=_TINY**0.5) * directed).sum(), one)
            add("directed", directed.sum().float(), one)
            vectors += x.numel() // x.shape[-1]
            if part == "logits":
                for temperature in TEMPERATURES:
                    log_p, log_q = F.log_softmax(x / temperature, dim=-1), F.log_softmax(y / temperature, dim=-1)
                    add(f"kl_t{temperature}_sum", (log_p.exp() * (log_p - log_q)).sum(), one)
            elif self.calibration is not None:
                smallest = std.amin()
                z_scale = largest / smallest
                z_value, z_error = (x_unit - mean / largest) * (smallest / std), error * (smallest / std)
                add("z_error_sq", z_error.square().sum(), z_scale)
                add("z_value_sq", z_value.square().sum(), z_scale)
                if self.bands is not None and part == "grid":
                    for quantity, split in (("error", self.bands(z_error)), ("value", self.bands(z_value))):
                        for band, coefficients in split.items():
                            add(f"z_{quantity}_sq:{band}", coefficients.square().sum(), z_scale)
        return Terms(tuple(names), torch.stack([torch.stack(terms), torch.stack(scales)]), vectors)  # one transfer a batch

    def add(self, terms: Terms, numbers: Tensor) -> bool:
        """Add what was measured, in the order of batches; False, and nothing added, if it is not finite. numbers: `terms.numbers`, or a copy of it on the host."""
        rows = numbers.tolist()
        if not all(math.isfinite(number) for row in rows for number in row):
            return False
        for name, number, scale in [("vectors", float(terms.vectors), 1.0), *zip(terms.names, *rows, strict=True)]:
            self.sums[name] = self.sums.get(name, 0.0) + number * scale * scale
        return True

    def _statistic(self, name: str, device: torch.device) -> Tensor:
        """Of the calibration, on a device: moved there once, not in every batch."""
        from .device import moved

        assert self.calibration is not None
        tensor = self._statistics.get(name, self.calibration[name])
        if tensor.device != device:
            tensor = self._statistics[name] = moved(tensor, device)
        return tensor

    def result(self) -> dict[str, float]:
        """{"rel_l2", "cosine"} and {"z_l2"} or {"kl_t1", "kl_t4"}; empty if no row was seen.

        With bands, "energy_BAND", its share of the standardised grid's energy, and "error_BAND", its own relative L2: 1 - error² of it is kept.
        """
        return combine_fidelity([self.sums])


def combine_fidelity(all_sums: list[dict[str, float]]) -> dict[str, float]:
    """The figures over several shards from their stored sums. Raises CorruptError for sums that none of ours are."""
    try:
        return _combine(all_sums)
    except (KeyError, ValueError, ArithmeticError) as error:
        raise CorruptError(f"the fidelity that a record holds is no sum over rows ({error!r}); run 'kdcache verify' on the cache") from error


def _combine(all_sums: list[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in all_sums:
        for name, number in ({"directed": one["vectors"]} | one if "vectors" in one else one).items():  # which older records do not have
            sums[name] = sums.get(name, 0.0) + number
    if not sums.get("vectors"):
        return {}
    result = {"rel_l2": _relative(sums["error_sq"], sums["value_sq"]), "cosine": sums["cosine_sum"] / sums["directed"] if sums["directed"] else 1.0}
    if "z_error_sq" in sums:
        result["z_l2"] = _relative(sums["z_error_sq"], sums["z_value_sq"])
    for temperature in TEMPERATURES:
        if f"kl_t{temperature}_sum" in sums:
            result[f"kl_t{temperature}"] = sums[f"kl_t{temperature}_sum"] / sums["vectors"]
    bands = [name.partition(":")[2] for name in sums if name.startswith("z_value_sq:")]
    energy = sum(sums[f"z_value_sq:{band}"] for band in bands)
    for band in bands:
        result[f"energy_{band}"] = sums[f"z_value_sq:{band}"] / energy if energy > 0 else 0.0
        result[f"error_{band}"] = _relative(sums[f"z_error_sq:{band}"], sums[f"z_value_sq:{band}"])
    return result


def _relative(error_sq: float, value_sq: float) -> float:
    return math.sqrt(error_sq / value_sq if value_sq > 0 else error_sq)
