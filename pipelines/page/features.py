"""Token features of the page's views: colours by PCA, spatial frequencies, outlier channels; one analysis a target.

One basis and one scaling serve all views of a page, so that equal colours mean like features. Tokens are read twice, once for the
statistics and once to show them, and never all at once.

Legend: T grid tokens, C channels, H W rows and columns of the grid; z: standardised by each channel's mean and deviation over the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.encodings.dct import dct2, frequencies_of_bands
from kdcache.errors import CorruptError, KDCacheError

from ..facts import decode_rows
from .charts import Chart, curve
from .opening import PageCache
from .pictures import Picture, heat, png_uri
from .samples import FeatureMap, Sample, View

if TYPE_CHECKING:
    from kdcache.encodings import Encoding

_TINY = 1e-12
_TOP_CHANNELS = 6
_MAX_CHANNELS = 4096
"""Wider features get no colours: the eigenvectors of their channels would take minutes."""


@dataclass(frozen=True)
class Channel:
    """A channel that stands out."""

    number: int
    std: float
    times_median: float
    """Its deviation, as a multiple of the median channel's."""
    largest: float
    """Largest value by magnitude, with its sign."""


@dataclass(frozen=True)
class Band:
    """A band of spatial frequency, as `encodings.dct` divides them."""

    name: str
    frequencies: int
    share: float
    """Of the standardised energy."""


@dataclass(frozen=True)
class Spectrum:
    """Mean energy by frequency: the map, and what its darkest and lightest colours stand for."""

    uri: str
    low_db: float
    high_db: float
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class FeatureFacts:
    """What the page says of one features target."""

    teacher: str
    target: str
    encoding: str
    grid: tuple[int, int]
    channels: int
    prefix_tokens: int
    views: int
    """Views that were read."""
    tokens: int
    note: str
    """What could not be read."""
    explained: tuple[float, ...]
    """Share of the standardised variance of each shown component."""
    spectrum: Spectrum | None
    outliers: tuple[Channel, ...]
    outlier_chart: Chart | None
    norms: tuple[float, float, float] | None
    """Median, 99th percentile and largest of the tokens' lengths."""
    prefix_norms: tuple[float, ...]
    """Median length of each prefix token."""


def describe_features(opened: PageCache, samples: Sequence[Sample]) -> list[FeatureFacts]:
    """Facts of each features target; its colours are added to the samples' views."""
    return [
        _describe(opened, teacher, target, samples)
        for teacher, layer in sorted(opened.cache.teachers.items())
        for target in sorted(layer.targets)
        if layer.targets[target].identity.kind == "features"
    ]


class _Reader:
    """Decoded tokens of the page's views, one at a time."""

    def __init__(self, opened: PageCache, teacher: str, target: str, samples: Sequence[Sample]) -> None:
        self._opened, self._teacher, self._target = opened, teacher, target
        layer = opened.cache.layer(teacher)
        self._places = [
            (sample, view)
            for sample in samples
            for view in sample.views
            if any(view.number in record.identity.views for record in layer.segments(sample.shard, target))
        ]
        self._encoding: Encoding | None = None
        self.note = ""

    def __iter__(self) -> Iterator[tuple[View, dict[str, np.ndarray[Any, Any]]]]:
        """(view, {"grid": float64 (T, C), "prefix": …}); what can't be read is noted and left out."""
        cache = self._opened.cache
        for sample, view in self._places:
            try:
                if self._encoding is None:
                    self._encoding = cache.encoding(self._teacher, self._target)
                value = decode_rows(cache, self._teacher, self._target, self._encoding, sample.shard, view.number, np.array([sample.row]))
            except KDCacheError as error:
                self.note = self._opened.tell(error, sample.shard)
                continue
            if not all(np.isfinite(array).all() for array in value.values()):
                self.note = self._opened.tell(CorruptError(f"shard {sample.shard}: {self._target} has values that are not finite"), sample.shard)
                continue
            yield view, {part: array[0].astype(np.float64) for part, array in value.items()}


def _describe(opened: PageCache, teacher: str, target: str, samples: Sequence[Sample]) -> FeatureFacts:
    card = opened.cache.layer(teacher).targets[target].identity
    grid, channels = card.grid or (0, 0), card.channels or 0
    reader = _Reader(opened, teacher, target, samples)
    statistics = TokenStatistics()
    for _, value in reader:
        if "grid" in value:
            statistics.add(value["grid"], value.get("prefix"))
    explained: tuple[float, ...] = ()
    spectrum: Spectrum | None = None
    if statistics.tokens > 1 and grid[0] * grid[1] > 0:
        mean, std = statistics.mean, statistics.std
        basis, explained = statistics.basis() if channels <= _MAX_CHANNELS else (np.zeros((channels, 0)), ())
        energy_HW = np.zeros(grid)
        projected: list[tuple[View, np.ndarray[Any, Any]]] = []
        for view, value in reader:
            z_TC = (value["grid"] - mean) / std
            energy_HW += energy_by_frequency(z_TC, grid)
            if basis.shape[1]:
                projected.append((view, z_TC @ basis))
        for view, colours in colour_maps(projected, grid):
            view.maps.append(FeatureMap(teacher, target, Picture(colours)))
        spectrum = summarise_spectrum(energy_HW, grid)
    outliers, chart = statistics.outliers()
    return FeatureFacts(
        teacher=teacher,
        target=target,
        encoding=card.encoding,
        grid=grid,
        channels=channels,
        prefix_tokens=card.prefix_tokens or 0,
        views=statistics.views,
        tokens=statistics.tokens,
        note=reader.note,
        explained=explained,
        spectrum=spectrum,
        outliers=outliers,
        outlier_chart=chart,
        norms=statistics.norms(),
        prefix_norms=statistics.prefix_norms(),
    )


class TokenStatistics:
    """Sums over tokens: enough for means, deviations and the correlation of channels. About the first view's mean, against cancellation."""

    def __init__(self) -> None:
        self.views = self.tokens = 0
        self._about = self._sum = self._squares = self._largest = np.zeros(0)
        self._products: np.ndarray[Any, Any] | None = None
        self._norms: list[np.ndarray[Any, Any]] = []
        self._prefix_norms: list[np.ndarray[Any, Any]] = []

    def add(self, grid_TC: np.ndarray[Any, Any], prefix_PC: np.ndarray[Any, Any] | None) -> None:
        if not self.views:  # by what was read: a damaged card may claim any width
            channels = grid_TC.shape[1]
            self._about = grid_TC.mean(axis=0)
            self._sum, self._squares, self._largest = np.zeros(channels), np.zeros(channels), np.zeros(channels)
            self._products = np.zeros((channels, channels)) if channels <= _MAX_CHANNELS else None
        x = grid_TC - self._about
        self._sum += x.sum(axis=0)
        self._squares += np.square(x).sum(axis=0)
        if self._products is not None:
            self._products += x.T @ x
        extreme = grid_TC[np.abs(grid_TC).argmax(axis=0), np.arange(grid_TC.shape[1])]
        self._largest = np.where(np.abs(extreme) > np.abs(self._largest), extreme, self._largest)
        self._norms.append(np.linalg.norm(grid_TC, axis=1))
        if prefix_PC is not None and len(prefix_PC):
            self._prefix_norms.append(np.linalg.norm(prefix_PC, axis=1))
        self.views += 1
        self.tokens += len(grid_TC)

    @property
    def mean(self) -> np.ndarray[Any, Any]:
        return self._about + self._sum / self.tokens

    @property
    def _true_std(self) -> np.ndarray[Any, Any]:
        centred = self._sum / self.tokens
        return np.sqrt(np.maximum(self._squares / self.tokens - centred * centred, 0))

    @property
    def std(self) -> np.ndarray[Any, Any]:
        """What tokens are divided by: 1 for a channel that never changes."""
        std = self._true_std
        return np.where(std > _TINY * max(float(std.max(initial=0)), _TINY), std, 1.0)

    def basis(self) -> tuple[np.ndarray[Any, Any], tuple[float, ...]]:
        """(C, up to 3) leading eigenvectors of the channels' correlation, and their shares of its trace. The largest entry of each is positive."""
        assert self._products is not None
        centred = self._sum / self.tokens
        covariance = self._products / self.tokens - np.outer(centred, centred)
        correlation = covariance / np.outer(self.std, self.std)
        values, vectors = np.linalg.eigh(correlation)
        count = min(3, len(values), self.tokens - 1)
        basis = vectors[:, ::-1][:, :count]
        signs = np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(count)])
        total = max(float(np.trace(correlation)), _TINY)
        return basis * signs, tuple(float(value) / total for value in values[::-1][:count])

    def outliers(self) -> tuple[tuple[Channel, ...], Chart | None]:
        """The channels whose deviation is the largest, and all of them in descending order."""
        if self.tokens < 2:
            return (), None
        std = self._true_std
        median = max(float(np.median(std)), _TINY)
        order = np.argsort(-std, kind="stable")
        named = tuple(Channel(int(i), float(std[i]), float(std[i] / median), float(self._largest[i])) for i in order[:_TOP_CHANNELS])
        ratios = np.maximum(std[order] / median, 1e-3)
        points = [(float(rank), float(ratio)) for rank, ratio in enumerate(ratios, start=1)]
        return named, curve(points, x_title="channel, by its deviation", y_title="× the median", log_y=True)

    def norms(self) -> tuple[float, float, float] | None:
        if not self._norms:
            return None
        lengths = np.concatenate(self._norms)
        return float(np.median(lengths)), float(np.quantile(lengths, 0.99)), float(lengths.max())

    def prefix_norms(self) -> tuple[float, ...]:
        return tuple(np.median(np.stack(self._prefix_norms), axis=0).tolist()) if self._prefix_norms else ()


def colour_maps(projected: Sequence[tuple[View, np.ndarray[Any, Any]]], grid: tuple[int, int]) -> Iterator[tuple[View, np.ndarray[Any, Any]]]:
    """uint8 (H, W, 3): the 1st and 99th percentile of each component over the page become 0 and 255; a component that is lacking is mid-grey."""
    if not projected:
        return
    everything = np.concatenate([tokens for _, tokens in projected])
    low, high = np.quantile(everything, (0.01, 0.99), axis=0)
    width = np.where(high - low > _TINY, high - low, 1.0)
    for view, tokens in projected:
        scaled = np.full((len(tokens), 3), 0.5)
        scaled[:, : tokens.shape[1]] = np.clip((tokens - low) / width, 0, 1)
        yield view, np.round(255 * scaled).astype(np.uint8).reshape(*grid, 3)


def energy_by_frequency(z_TC: np.ndarray[Any, Any], grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """(H, W) squares of the orthonormal DCT-II's coefficients, summed over channels."""
    import torch

    coefficients = dct2(torch.from_numpy(z_TC.astype(np.float32)).unsqueeze(0), grid)[0].numpy().astype(np.float64)
    energy: np.ndarray[Any, Any] = np.square(coefficients).sum(axis=1).reshape(grid)
    return energy


def summarise_spectrum(energy_HW: np.ndarray[Any, Any], grid: tuple[int, int]) -> Spectrum | None:
    """None for a grid of one position, which has no frequencies."""
    total = float(energy_HW.sum())
    if energy_HW.size < 2 or total <= 0:
        return None
    decibels = 10 * np.log10(np.maximum(energy_HW / total, 1e-12))
    low, high = float(decibels.min()), float(decibels.max())
    flat = energy_HW.ravel()
    bands = tuple(Band(name, len(places), float(flat[places].sum()) / total) for name, places in frequencies_of_bands(grid).items())
    return Spectrum(png_uri(heat((decibels - low) / max(high - low, _TINY))), low, high, bands)
