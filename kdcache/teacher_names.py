"""The name of a teacher in a cache, from what the user typed. Apart from `teacher`, so that a finished run needs no torch."""

from __future__ import annotations


def default_teacher_name(model_name: str) -> str:
    """The folder name of a teacher: its model name without source, as far as that can stand in a path."""
    base = model_name.partition(":")[2] or model_name
    base = base.rstrip("/").rpartition("/")[2]
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in base).lstrip("._-")
    return cleaned[:100] or "teacher"
