"""What a teacher's logits say of a larger sample of rows: how sure it is, and how often it is right when it is that sure.

Legend: N rows of the sample, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from kdcache.cache import Cache
from kdcache.distance import log_softmax
from kdcache.errors import CorruptError, KDCacheError
from kdcache.index import rows_of_table

from ..facts import SAMPLE_ROWS, decoded_blocks, sample_rows
from .charts import Chart, histogram, reliability
from .opening import PageCache

_VIEW = 0
_BINS = 10


@dataclass(frozen=True)
class LogitFacts:
    """Of one teacher, by the softmax of its decoded logits at T = 1."""

    teacher: str
    encoding: str
    num_classes: int
    rows: int
    shards: int
    note: str
    mean_nats: float
    median_nats: float
    largest_nats: float
    """The logarithm of the number of classes: what a teacher that knows nothing has."""
    mean_confidence: float
    entropy_chart: Chart | None
    labelled: int
    """Rows with a label and without a partner: those that can be right or wrong."""
    correct: float
    """Share of them whose likeliest class is the label."""
    calibration_error: float
    """Mean of |confidence − accuracy| over ten bins, weighted by rows (arXiv:1706.04599 §2)."""
    reliability_chart: Chart | None


def describe_logits(opened: PageCache, teacher: str, max_rows: int | None = SAMPLE_ROWS) -> LogitFacts | None:
    """None for a teacher without logits. max_rows: None for all. Damaged shards are left out, with a note."""
    cache = opened.cache
    layer = cache.layer(teacher)
    if "logits" not in layer.targets:
        return None
    card = layer.targets["logits"].identity
    entropies: list[np.ndarray[Any, Any]] = [np.zeros(0)]
    confidences: list[np.ndarray[Any, Any]] = [np.zeros(0)]
    rights: list[np.ndarray[Any, Any]] = [np.zeros(0)]
    note = ""
    shards = 0
    for shard, rows in sample_rows(cache, teacher, "logits", view=_VIEW, max_rows=max_rows):
        try:
            labels = _unmixed_labels(cache, shard, rows)
            blocks = list(decoded_blocks(cache, teacher, "logits", [(shard, rows)], view=_VIEW))
        except KDCacheError as error:
            note = opened.tell(error, shard)
            continue
        shards += 1
        logits_NK = np.concatenate([value["logits"] for _, _, value in blocks])
        if not np.isfinite(logits_NK).all():
            note = opened.tell(CorruptError(f"shard {shard}: logits that are not finite"), shard)
            continue
        log_p = log_softmax(logits_NK)
        p = np.exp(log_p)
        entropies.append(np.maximum(-(p * log_p).sum(axis=1), 0))
        confidences.append(p.max(axis=1))
        rights.append(np.where(labels >= 0, p.argmax(axis=1) == labels, np.nan))
    entropy, confidence, right = np.concatenate(entropies), np.concatenate(confidences), np.concatenate(rights)
    known = ~np.isnan(right)
    bins = _bins(confidence[known], right[known])
    labelled = int(known.sum())
    largest = log(max(card.num_classes or 1, 1))
    some = len(entropy) > 0 and largest > 0
    mean, median = (float(entropy.mean()), float(np.median(entropy))) if some else (0.0, 0.0)
    return LogitFacts(
        teacher=teacher,
        encoding=card.encoding,
        num_classes=card.num_classes or 0,
        rows=len(entropy),
        shards=shards,
        note=note,
        mean_nats=mean,
        median_nats=median,
        largest_nats=largest,
        mean_confidence=float(confidence.mean()) if some else 0.0,
        entropy_chart=histogram(entropy.tolist(), largest, bins=40, x_title="entropy, nats", y_title="rows", marks=[(mean, "mean")])
        if some
        else None,
        labelled=labelled,
        correct=float(right[known].mean()) if labelled else 0.0,
        calibration_error=sum(abs(c - a) * n for c, a, n in bins) / labelled if labelled else 0.0,
        reliability_chart=reliability(bins) if labelled else None,
    )


def _unmixed_labels(cache: Cache, shard: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N,) labels; -1 for a row without one, or whose view is mixed and so has two."""
    table = cache.table_from_group(cache.views[shard][0].identity)
    labels: np.ndarray[Any, Any] = rows_of_table(table)[rows, 2].copy()
    if cache.plan.policy.mix is not None:
        mixed = [params.mix is not None for params in cache.read_params(shard, _VIEW, rows)]
        labels[np.array(mixed, bool)] = -1
    return labels


def _bins(confidence: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, rows) of each of ten equal bins that has rows."""
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    found = [(confidence[place == i], right[place == i]) for i in range(_BINS)]
    return [(float(c.mean()), float(r.mean()), len(c)) for c, r in found if len(c)]
