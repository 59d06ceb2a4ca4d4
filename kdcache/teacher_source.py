"""What the user typed as the teacher: its name in the cache, and the local files its weights come from.

Apart from `teacher`, so that a finished extraction is recognised without torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import TeacherError


def default_teacher_name(model_name: str) -> str:
    """The folder name of a teacher: its model name without source, as far as that can stand in a path."""
    base = model_name.partition(":")[2] or model_name
    base = base.rstrip("/").rpartition("/")[2]
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in base).lstrip("._-")
    return cleaned[:100] or "teacher"


def weight_files(teacher: str, checkpoint: str | None) -> dict[str, str]:
    """File name → BLAKE2b-128 of the local files that a teacher's weights come from; empty for weights from the hub."""
    paths: list[Path] = []
    if checkpoint is not None:
        paths = [Path(checkpoint)]
    elif teacher.startswith("local-dir:"):
        folder = Path(teacher.partition(":")[2])
        paths = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".json", ".pth"))
    digests: dict[str, str] = {}
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest = hashlib.blake2b(digest_size=16)
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise TeacherError(f"teacher {teacher!r}: {path} can't be read: {error.strerror}") from error
        digests[path.name] = digest.hexdigest()
    return digests
