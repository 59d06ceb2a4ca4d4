"""kdcache: run a vision teacher once, distil it into any number of students.

    tar shards ─▶ seeded views ─▶ teacher ─▶ encode ─▶ CACHE ON DISK ─▶ decode ─▶ student + method ─▶ checkpoint

This package holds values and functions; `pipelines` the two stages; `cli` the commands. Names below are imported on first
use, so that `import kdcache` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses, methods
    from .cache import Cache
    from .dataset import CachedDataset
    from .errors import KDCacheError
    from .opening import open_cache
    from .timm_task import CachedTeacher

__all__ = ["Cache", "CachedDataset", "CachedTeacher", "KDCacheError", "__version__", "losses", "methods", "open_cache"]

_HOMES = {
    "Cache": ".cache",
    "CachedDataset": ".dataset",
    "CachedTeacher": ".timm_task",
    "KDCacheError": ".errors",
    "open_cache": ".opening",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("kdcache")
    if name in ("losses", "methods"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
