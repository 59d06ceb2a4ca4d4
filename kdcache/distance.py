"""How far two decoded targets are from each other, row by row: what `diff` says of rows that two caches share.

The figures are those of `fidelity`, with neither side being the truth, so that both directions of the KL are kept. Sums are float64
on the host, so that blocks of rows add up in memory that does not grow.

Legend: N rows of a block, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RowName = tuple[str, str, int]
"""(shard, key, view)."""


def log_softmax(logits_NK: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Natural logarithms of the softmax at T = 1, float64 (N, K)."""
    shifted = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


@dataclass
class Distance:
    """Running sums over rows of A and B; `result` gives the figures."""

    rows: int = 0
    equal_rows: int = 0
    max_abs: float = 0.0
    worst: tuple[float, RowName] | None = None
    """The row that is farthest off, relative to A, and how far."""
    sums: dict[str, float] = field(default_factory=dict)

    def update(self, a: Mapping[str, np.ndarray[Any, Any]], b: Mapping[str, np.ndarray[Any, Any]], names: Sequence[RowName]) -> None:
        """Add N rows: part → (N, …) of equal shapes, decoded; the last axis is that of the cosine. names: of the rows."""
        error, value = np.zeros(len(names)), np.zeros(len(names))
        for part in a:
            x, y = a[part].astype(np.float64), b[part].astype(np.float64)
            axes = tuple(range(1, x.ndim))
            difference = y - x
            error += np.square(difference).sum(axis=axes)
            value += np.square(x).sum(axis=axes)
            self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)))
            dot, x_sq, y_sq = (x * y).sum(axis=-1), np.square(x).sum(axis=-1), np.square(y).sum(axis=-1)
            directed = (x_sq > 0) & (y_sq > 0)
            self._add("cosine", float((dot[directed] / np.sqrt(x_sq[directed]) / np.sqrt(y_sq[directed])).sum()))
            self._add("directed", float(directed.sum()))
            self._add("b_sq", float(y_sq.sum()))
            if part == "logits":
                log_p, log_q = log_softmax(x), log_softmax(y)
                self._add("kl_ab", float((np.exp(log_p) * (log_p - log_q)).sum()))
                self._add("kl_ba", float((np.exp(log_q) * (log_q - log_p)).sum()))
                self._add("agree", float((x.argmax(axis=1) == y.argmax(axis=1)).sum()))
        self._add("error_sq", float(error.sum()))
        self._add("a_sq", float(value.sum()))
        self.rows += len(names)
        self.equal_rows += int((error == 0).sum())
        relative = np.sqrt(error / np.where(value > 0, value, 1.0))
        if len(names) and (self.worst is None or relative.max() > self.worst[0]):
            self.worst = float(relative.max()), names[int(relative.argmax())]

    def _add(self, name: str, number: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + number

    def result(self) -> dict[str, Any]:
        """{"rows", "equal_rows"} and, where there are rows, {"rel_l2" (of B - A, relative to A), "norm_ratio" (B over A; None where A is zero),
        "cosine", "max_abs", "worst"}; of logits also {"kl_ab", "kl_ba", "top1_agreement" (per cent)}."""
        body: dict[str, Any] = {"rows": self.rows, "equal_rows": self.equal_rows}
        if not self.rows:
            return body
        sums = self.sums
        body["rel_l2"] = math.sqrt(sums["error_sq"] / sums["a_sq"] if sums["a_sq"] > 0 else sums["error_sq"])
        body["norm_ratio"] = math.sqrt(sums["b_sq"] / sums["a_sq"]) if sums["a_sq"] > 0 else None
        body["cosine"] = sums["cosine"] / sums["directed"] if sums["directed"] else 1.0
        body["max_abs"] = self.max_abs
        if "kl_ab" in sums:
            body |= {name: sums[name] / self.rows for name in ("kl_ab", "kl_ba")}
            body["top1_agreement"] = 100 * sums["agree"] / self.rows
        assert self.worst is not None
        body["worst"] = {"shard": self.worst[1][0], "key": self.worst[1][1], "view": self.worst[1][2], "rel_l2": self.worst[0]}
        return body
