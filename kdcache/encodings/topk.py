"""`logits:topk=K`: the K largest logits, the label's own, and the mass of the rest spread uniformly. For T = 1 only.

About 30 bytes a row at K = 10, 1000 classes. The flat tail is what costs: KL .04 to .6 at T = 1 by how sure the teacher
is, and more at higher temperatures, where the tail is the knowledge (research: storage §1). `dense` is 0.9 kB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..console import counted
from ..errors import CorruptError, UsageError
from ..format import Component
from .base import Encoding, TargetShape

_STEPS = 256
"""Logits are kept to 1/256: a probability to 0.2 %, finer than half precision at the size of logits."""
_LARGEST = float(2**31 - 256) / _STEPS
"""A logit beyond it is stored as it; the largest float32 of int32's range in steps."""


class TopKLogits(Encoding):
    """Rank by rank, in steps of 1/256: `top` the largest logit; `index` (N,) the classes in descending order of their logits;
    `gaps` (N,), gaps[i] from rank i to rank i + 1, the last from rank K to the logit that every other class decodes to.

    N = K + 1: behind the K largest stands the label if it is not among them, else (or if it is unknown) the next largest; its gap is counted
    from rank K. N = K if there are only K classes. The tail's logit is the log of the mean of exp over the other classes, so that the softmax
    has its normaliser, log Z, without cancellation. A gap is at most 65535 steps, 256 nats: what is farther off has no mass.
    """

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "the K largest logits, the label's and log Z; about 30 B at K=10. Useless for T > 1: the rest is flat"
    argument_name: ClassVar[str | None] = "K"
    example: ClassVar[str] = "10"

    def __init__(self, shape: TargetShape, argument: str | None = None) -> None:
        super().__init__(shape, argument)
        assert argument is not None
        if not re.fullmatch("[1-9][0-9]{0,8}", argument):
            raise UsageError(
                f"encoding {self.full_name!r}: expected a whole number of classes from 1 on, e.g. topk={self.example}, found {argument!r:.40}"
            )
        self.k = int(argument)
        if self.k > shape.num_classes:
            raise UsageError(
                f"encoding {self.full_name!r}: the teacher has {counted(shape.num_classes, 'class')}; expected K up to that, or logits:dense, which keeps all"
            )
        self.num_kept = min(self.k + 1, shape.num_classes)

    def components(self) -> dict[str, Component]:
        index_dtype, index_size = ("uint16", 2) if self.shape.num_classes <= 1 << 16 else ("int32", 4)

        def whole_row(size: int) -> int | None:  # bitshuffle then gathers each rank's bits over rows: 28 B become 25
            return size * self.num_kept if size * self.num_kept <= 255 else None

        return {
            "top": Component(dtype="int32", shape=()),
            "index": Component(dtype=index_dtype, shape=(self.num_kept,), typesize=whole_row(index_size)),  # type: ignore[arg-type]
            "gaps": Component(dtype="uint16", shape=(self.num_kept,), typesize=whole_row(2)),
        }

    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        logits_BK = value["logits"].float().clamp(-_LARGEST, _LARGEST)
        num_classes, k, kept = self.shape.num_classes, self.k, self.num_kept
        order_BK = logits_BK.argsort(dim=1, descending=True, stable=True)  # stable: ties by class, on every device
        index_BN = order_BK[:, :kept].clone()
        if labels_B is not None and kept > k:
            wanted_B1 = labels_B.to(logits_BK.device).unsqueeze(1)
            takes_place_B1 = (wanted_B1 >= 0) & (wanted_B1 < num_classes) & (index_BN[:, :k] != wanted_B1).all(dim=1, keepdim=True)
            index_BN[:, k:] = torch.where(takes_place_B1, wanted_B1, index_BN[:, k:])
        kept_BN = logits_BK.gather(1, index_BN)
        if num_classes > kept:
            rest_BK = logits_BK.scatter(1, index_BN, -torch.inf)
            tail_B1 = rest_BK.logsumexp(dim=1, keepdim=True) - math.log(num_classes - kept)
        else:
            tail_B1 = kept_BN[:, -1:]
        steps_BM = (torch.cat([kept_BN, tail_B1], dim=1) * _STEPS).round().to(torch.int64)
        gaps_BN = torch.cat([steps_BM[:, : k - 1] - steps_BM[:, 1:k], steps_BM[:, k - 1 : k] - steps_BM[:, k:]], dim=1)
        bits_BN = gaps_BN.clamp_(0, 65535).to(torch.int32).to(torch.int16)
        index = index_BN.to(torch.int32)
        return {"top": steps_BM[:, 0].to(torch.int32), "index": index.to(torch.int16) if num_classes <= 1 << 16 else index, "gaps": bits_BN}

    def check(self, components: Mapping[str, Tensor]) -> None:
        index_BN = _classes(components)
        if bool(((index_BN < 0) | (index_BN >= self.shape.num_classes)).any()):
            raise CorruptError(f"{self.full_name}: expected classes below {self.shape.num_classes}, found others; run 'kdcache verify' on the cache")

    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        k = self.k
        if components["index"].device.type == "cpu":
            self.check(components)
        gaps_BN, index_BN = components["gaps"].to(torch.int64) & 0xFFFF, _classes(components)
        top_B1 = components["top"].to(torch.int64).unsqueeze(1)
        ranked_BK = top_B1 - torch.cat([torch.zeros_like(top_B1), gaps_BN[:, : k - 1].cumsum(dim=1)], dim=1)
        others_BM = ranked_BK[:, -1:] - gaps_BN[:, k - 1 :]  # the label, if there is a place for it, and the tail
        logits_BN = torch.cat([ranked_BK, others_BM], dim=1).float() / _STEPS
        logits_BK = logits_BN[:, -1:].repeat(1, self.shape.num_classes)
        return {"logits": logits_BK.scatter_(1, index_BN, logits_BN[:, : self.num_kept])}


def _classes(components: Mapping[str, Tensor]) -> Tensor:
    """int64 (B, N)."""
    index_BN = components["index"]
    return index_BN.to(torch.int64) & 0xFFFF if index_BN.dtype == torch.int16 else index_BN.to(torch.int64)
