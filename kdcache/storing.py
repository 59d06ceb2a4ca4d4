"""The views group of one segment being spooled: params, pixel digests and, if the plan says so, the views themselves. Used by extract and repair.

Stored views pass through in constant memory: `raw` by chunks of a view, images of variable length by a stream whose last,
partial chunk is kept until more comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import STREAM_CHUNK_BYTES, StreamWriter
from .commit import ChunkPool, GroupWriter
from .format import DigestField, ViewRange
from .layout import STORED_BYTES, STORED_PIXELS, STORED_SPAN, params_spec, pixels_spec, stored_specs
from .plan import ViewPlan
from .rendering import RenderedBlock


class ViewsWriter(GroupWriter):
    """Takes rendered blocks; the arrays of one number a row are added when the segment is committed."""

    def __init__(self, folder: Path, plan: ViewPlan, views: ViewRange, samples: int, pool: ChunkPool) -> None:
        specs = {"params": params_spec(len(views), samples), "pixels": pixels_spec(len(views), samples)}
        super().__init__(folder, specs | stored_specs(plan, len(views), samples), pool, num_views=len(views))
        self._codec = plan.stored_views
        self._stream = StreamWriter(folder, STORED_BYTES) if self._codec not in (None, "raw") else None
        self._stream_bytes = 0
        self._tail = np.zeros(0, np.uint8)

    def append_block(self, block: RenderedBlock, columns: Sequence[int]) -> None:
        """columns: the places in `block.task.views` of this segment's views, which were rendered, in order."""
        chosen = list(columns)
        arrays = {"params": _items(block.params[:, chosen]), "pixels": _items(block.digests[:, chosen])}
        if self._codec == "raw":
            arrays[STORED_PIXELS] = _items(block.pixels.numpy()[:, chosen])
        elif self._stream is not None:
            arrays[STORED_SPAN] = self._append_encoded(block, chosen)
        self.append(arrays)

    def _append_encoded(self, block: RenderedBlock, columns: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Hand whole chunks to the pool; int64 (items, 2), where each view's bytes begin and end in the stream."""
        assert self._stream is not None
        assert block.encoded is not None
        ends = block.sizes.cumsum().reshape(block.sizes.shape)
        data = block.encoded.numpy()
        views = [data[end - size : end] for row in range(len(ends)) for end, size in zip(ends[row, columns], block.sizes[row, columns], strict=True)]
        ready = np.concatenate([self._tail, *views])
        whole = len(ready) // STREAM_CHUNK_BYTES * STREAM_CHUNK_BYTES
        if whole:
            self.append_to(self._stream, ready[:whole])
        self._tail = ready[whole:].copy()
        sizes = block.sizes[:, columns].reshape(-1)
        stops = self._stream_bytes + sizes.cumsum()
        self._stream_bytes += int(sizes.sum())
        return np.stack([stops - sizes, stops], axis=1)

    def finish(self) -> None:
        super().finish()
        if self._stream is not None and len(self._tail):
            self.append_to(self._stream, self._tail)

    def close(self) -> dict[str, DigestField]:
        self.wait()
        if self._stream is not None:
            self.add_files(self._stream.close(self._stream_bytes))
        return super().close()

    def abandon(self) -> None:
        super().abandon()
        if self._stream is not None:
            self._stream.abandon()


def _items(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n, V, …) → (n × V, …), row-major and view-minor, as GroupWriter takes them."""
    return values.reshape(values.shape[0] * values.shape[1], *values.shape[2:])
