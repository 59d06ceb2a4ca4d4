"""From what the user typed to a Store."""

from __future__ import annotations

import os
import re

from ..errors import UsageError
from .base import Store
from .local import LocalStore


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store behind a path or `file://` URL. Raises UsageError for a scheme that has no store."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise UsageError(f"cache {text!r}: expected a folder, found a URL of a scheme that this kdcache has no store for")
    return LocalStore(text)
