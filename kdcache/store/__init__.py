"""Where a cache's bytes live. Everything above asks a `Store`; nothing above knows whether it is a folder or an object store."""

from .base import Store
from .local import LocalStore
from .resolve import open_store

__all__ = ["LocalStore", "Store", "open_store"]
