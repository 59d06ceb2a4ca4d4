"""How far a decoded target is from what the teacher gave: measured by extract on every row, stored in each shard's record.

Features: relative L2, mean cosine of tokens, and relative L2 after standardising each channel (`z_l2`), because outlier
channels hide damage in the first two. Logits: relative L2, mean cosine and KL(teacher ‖ decoded) at T = 1 and T = 4.
Sums are kept as float64 on the host, so that shards add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURES = (1, 4)


@dataclass
class Fidelity:
    """Running sums for one target; `result` gives the figures."""

    calibration: Mapping[str, Tensor] | None = None
    """`ChannelStatistics` result of a feature target; None for logits."""
    sums: dict[str, float] = field(default_factory=dict)

    def update(self, value: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> bool:
        """Add a batch; False, and nothing added, if a value is not finite. value, decoded: as encodings take and give them."""
        import torch  # here, so that `combine_fidelity` serves inspect without it
        import torch.nn.functional as F

        names: list[str] = []
        terms: list[Tensor] = []
        vectors = 0
        for part, original in value.items():
            x, y = original.float(), decoded[part].float()
            error = y - x
            names += ["error_sq", "value_sq", "cosine_sum"]
            terms += [error.square().sum(), x.square().sum(), F.cosine_similarity(x, y, dim=-1).sum()]
            vectors += x.numel() // x.shape[-1]
            if part == "logits":
                for temperature in TEMPERATURES:
                    log_p, log_q = F.log_softmax(x / temperature, dim=-1), F.log_softmax(y / temperature, dim=-1)
                    names.append(f"kl_t{temperature}_sum")
                    terms.append((log_p.exp() * (log_p - log_q)).sum())
            elif self.calibration is not None:
                mean, std = (self.calibration[f"{part}_{name}"].to(x.device) for name in ("mean", "std"))
                names += ["z_error_sq", "z_value_sq"]
                terms += [(error / std).square().sum(), ((x - mean) / std).square().sum()]
        numbers = torch.stack(terms).tolist()  # one transfer a batch
        if not all(math.isfinite(number) for number in numbers):
            return False
        for name, number in [("vectors", float(vectors)), *zip(names, numbers, strict=True)]:
            self.sums[name] = self.sums.get(name, 0.0) + number
        return True

    def result(self) -> dict[str, float]:
        """{"rel_l2", "cosine"} and {"z_l2"} or {"kl_t1", "kl_t4"}; empty if no row was seen."""
        return combine_fidelity([self.sums])


def combine_fidelity(all_sums: list[dict[str, float]]) -> dict[str, float]:
    """The figures over several shards from their stored sums."""
    sums: dict[str, float] = {}
    for one in all_sums:
        for name, number in one.items():
            sums[name] = sums.get(name, 0.0) + number
    if not sums.get("vectors"):
        return {}
    result = {"rel_l2": _relative(sums["error_sq"], sums["value_sq"]), "cosine": sums["cosine_sum"] / sums["vectors"]}
    if "z_error_sq" in sums:
        result["z_l2"] = _relative(sums["z_error_sq"], sums["z_value_sq"])
    for temperature in TEMPERATURES:
        if f"kl_t{temperature}_sum" in sums:
            result[f"kl_t{temperature}"] = sums[f"kl_t{temperature}_sum"] / sums["vectors"]
    return result


def _relative(error_sq: float, value_sq: float) -> float:
    return math.sqrt(error_sq / value_sq if value_sq > 0 else error_sq)
