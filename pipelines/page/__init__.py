"""`kdcache inspect CACHE --html FILE`: what is in a cache as one page, to look at and to send on.

The page stands alone: one HTML file with its styles, script and pictures in it, and a content security policy that lets nothing
else load. It is a function of the cache, the tars and the options: no time, no path of the machine, the same bytes each time.

    opening    the cache, sound or not, and the state of each shard
    samples    a few rows: originals with crop boxes, views, what each teacher said of them
    features   token features of those views: colours by PCA, frequencies, outlier channels
    logits     a larger sample of rows: entropy, and confidence against accuracy
    pictures   from pixels to data: addresses, within a budget of bytes
    charts     from numbers to the geometry of small charts
    render     from a template to a page; what a sweep's report shares
    page.html, page.css, page.js    what a person sees; Jinja escapes whatever it is given; frame.html, charts.html and common.js are shared too

A cache that is damaged or not finished still gives a page: what can't be read says so where it would stand.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache import Cache, TeacherLayer
from kdcache.class_names import ClassNames
from kdcache.console import counted, human_bytes, visible
from kdcache.errors import CacheError, KDCacheError, UsageError

from ..facts import (
    REST_NAME,
    SAMPLE_ROWS,
    LabelHistogram,
    accuracy,
    check_names,
    class_names_of,
    label_histogram,
    label_names_of,
    made_with,
    sizes,
    stored_target,
)
from ..words import policy_in_words, policy_name
from .charts import Chart, bars, cell_map, curve
from .features import describe_features
from .logits import describe_logits
from .opening import PageCache, open_for_page, series
from .pictures import encode_pictures
from .render import render_page, replace_page
from .samples import Sample, choose_rows, gather_samples, pictures_of

DEFAULT_SAMPLES = 12
MAX_SAMPLES = 200
PICTURE_BYTES = 1_450_000
"""Of pictures at the default sample; the rest of 2 MB is for charts and words. A larger sample may have more."""
_DOCUMENTS_NAME = "index, records, cards"
_SHOWN_SHARDS = 200
"""Shards that are not done, named one by one."""


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """What the page shows."""

    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    """Chooses the samples."""
    shard: str | None = None
    """Samples of this shard only."""
    key: str | None = None
    """This sample only, with more of its views."""
    rows: int | None = SAMPLE_ROWS
    """Whose logits are read for the entropy; None: all."""
    data: str | None = None
    """SHARDS: where the tars lie now."""
    class_names: ClassNames | None = None
    """Of the labels, and of the teachers that have as many classes; None for those that are known for sure."""


@dataclass(frozen=True)
class PageSummary:
    """What was written."""

    path: str
    bytes: int
    samples: int
    problems: tuple[str, ...]
    """What is wrong with the cache, as far as the page looked."""

    def to_json(self) -> dict[str, Any]:
        return {"html": self.path, "bytes": self.bytes, "samples": self.samples, "problems": list(self.problems)}

    def as_text(self) -> str:
        """A line for people, and one more for a cache that is not sound."""
        text = f"{self.path}: {human_bytes(self.bytes)}, {counted(self.samples, 'sample')}"
        if not self.problems:
            return text
        return f"{text}\n{counted(len(self.problems), 'problem')}, the first: {visible(self.problems[0])}; run 'kdcache verify'"


def write_page(path: str, file: str, config: PageConfig) -> PageSummary:
    """Write the page of the cache at `path` to `file`, whole or not at all.

    Raises NotACacheError, FormatVersionError, UsageError for options that can't be, StoreError where the file can't be written.
    """
    page, summary = build_page(path, config)
    replace_page(file, page, remedy="name a file in a folder that is there with --html")
    return PageSummary(file, len(page), summary.samples, summary.problems)


def build_page(path: str, config: PageConfig) -> tuple[bytes, PageSummary]:
    """The page as UTF-8 bytes."""
    if not 0 <= config.samples <= MAX_SAMPLES:
        raise UsageError(f"--samples {config.samples}: expected 0 to {MAX_SAMPLES}")
    opened = open_for_page(path, config.data)
    cache = opened.cache
    if config.class_names is not None:
        with contextlib.suppress(CacheError):  # damaged labels can refuse no names
            check_names(cache, config.class_names)
    names = {name: class_names_of(layer, config.class_names) for name, layer in cache.teachers.items()}
    label_names = config.class_names or label_names_of(cache)
    samples = gather_samples(
        opened, choose_rows(cache, config.samples, config.seed, config.shard, config.key), names, label_names, all_views=config.key is not None
    )
    features = describe_features(opened, samples)
    logits = [facts for name in sorted(cache.teachers) if (facts := describe_logits(opened, name, config.rows)) is not None]
    encode_pictures(pictures_of(samples), PICTURE_BYTES * max(1.0, len(samples) / DEFAULT_SAMPLES))
    problems = tuple(opened.problems)  # by now with what was found in reading
    page = _render(
        name=Path(path).resolve().name,
        opened=opened,
        config=config,
        samples=samples,
        features=features,
        logits=logits,
        overview=_overview(opened),
        teachers=[_teacher(cache, layer, names[name]) for name, layer in sorted(cache.teachers.items())],
        labels=_labels(cache, label_names),
        sizes=_sizes(opened),
        problems=problems,
        mixes=cache.plan.policy.mix is not None,
    )
    return page, PageSummary("", len(page), len(samples), problems)


# --- facts -----------------------------------------------------------------------------------------------------------


def _overview(opened: PageCache) -> dict[str, Any]:
    cache = opened.cache
    skipped = Counter(skip.reason for records in cache.views.values() for skip in records[0].identity.skipped)
    made = made_with(cache.documents.values())
    shards = opened.states()
    states = Counter(shard.state for shard in shards)
    return {
        "plan": cache.plan,
        "policy": policy_in_words(cache.plan.policy),
        "policy_name": policy_name(cache.plan.policy),
        "skipped": skipped.most_common(),
        "made_with": {name: values for name, values in sorted(made.items()) if name not in ("host", "machine")},
        "shards": len(shards),
        "states": states,
        "done": sum(count for state, count in states.items() if state in ("done", "skips", "cut")),
        "not_done": [shard for shard in shards if shard.detail][:_SHOWN_SHARDS],
        "not_done_count": sum(1 for shard in shards if shard.detail),
        "map": cell_map([shard.state for shard in shards]),
        "names": series([shard.name for shard in shards]),
    }


def _teacher(cache: Cache, layer: TeacherLayer, names: ClassNames | None) -> dict[str, Any]:
    top1, labelled = accuracy(layer)
    return {
        "name": layer.name,
        "identity": layer.document.identity,
        "labelled": labelled,
        "top1": top1,
        "class_names": len(names) if names is not None else 0,
        "tail": layer.tail.identity if layer.tail is not None else None,
        "target_count": len(layer.targets),
        "targets": [_target(cache, layer, target) for target in sorted(layer.targets)],
    }


def _target(cache: Cache, layer: TeacherLayer, name: str) -> dict[str, Any]:
    stored = stored_target(layer, name)
    return {
        "card": layer.targets[name].identity,
        "views": cache.target_views(layer.name, name),
        "bytes": stored.bytes,
        "bytes_per_view": stored.bytes_per_view,
        "figures": stored.figures,
        "worst": stored.worst,
        "shards": stored.shards,
    }


def _labels(cache: Cache, names: ClassNames | None) -> dict[str, Any] | None:
    """Labels of all rows: bars where there are few classes, else the counts in descending order. None where none is labelled, or can't be read."""
    try:
        histogram: LabelHistogram = label_histogram(cache)
    except KDCacheError:  # a damaged views group, listed where it is found
        return None
    if not len(histogram.classes):
        return None
    chart: Chart
    if len(histogram.classes) <= 40:
        chart = bars(
            [(str(label), float(count)) for label, count in zip(histogram.classes.tolist(), histogram.counts.tolist(), strict=True)],
            x_title="class",
            y_title="samples",
        )
    else:
        ranked = sorted(histogram.counts.tolist(), reverse=True)
        chart = curve(list(enumerate(ranked, start=1)), x_title="class, by its number of samples", y_title="samples", from_zero=True)
    rarest, commonest = histogram.extremes(3)
    return {
        "classes": len(histogram.classes),
        "labelled": int(histogram.counts.sum()),
        "unlabelled": histogram.unlabelled,
        "uneven": len(histogram.classes) > 6 and commonest[0][1] > rarest[0][1],
        "chart": chart,
        "rarest": [(label, names.of(label) if names else None, count) for label, count in rarest],
        "commonest": [(label, names.of(label) if names else None, count) for label, count in commonest],
    }


def _sizes(opened: PageCache) -> dict[str, Any]:
    parts = [(part.name, part.views, part.bytes) for part in sizes(opened.cache)]
    rest = opened.bytes - sum(size for *_, size in parts)
    if rest > 0:
        parts.append((_DOCUMENTS_NAME, None, rest))
    total = sum(size for *_, size in parts) or 1
    start, result = 0.0, []
    for place, (name, views, size) in enumerate(parts):
        tint = "rest" if name in (REST_NAME, _DOCUMENTS_NAME) else f"p{place % 8}"
        result.append({"name": name, "views": views, "bytes": size, "start": start, "share": size / total, "tint": tint})
        start += size / total
    return {"parts": result, "total": total}


# --- the page --------------------------------------------------------------------------------------------------------


def _render(**context: Any) -> bytes:
    sources: list[Sample] = context["samples"]
    shown_views = max((len(sample.views) for sample in sources), default=0)
    return render_page("page.html", package=__name__, scripts=["page.js"], shown_views=shown_views, **context)
