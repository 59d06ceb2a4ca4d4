"""What verify may be asked beyond bytes: to run teachers again. Apart from `recompute`, which loads torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How to run teachers again."""

    rows: int
    """A shard."""
    teacher: str | None = None
    """Its name in the cache. Default: every teacher."""
    model: str | None = None
    """Where the teacher lies now: timm name, `hf-hub:…` or `local-dir:…`. Default: as it was named when it was recorded."""
    checkpoint: str | None = None
    """Its weights file now. Default: as recorded."""
    device: str | None = None
    batch_size: int = 64
