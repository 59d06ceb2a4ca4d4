"""Training checkpoints: written whole or not at all, read without running code, tied to the cache they were trained on.

A checkpoint is a torch.save file of tensors and plain Python values. It is replaced atomically, so that a kill leaves the one
before; a file that is torn, changed or foreign is refused.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import CorruptError, MismatchError, StoreError
from .timm_models import UNPICKLING_ERRORS

CHECKPOINT_VERSION = 1
_TYPES: dict[str, type | tuple[type, ...]] = {
    "recipe": dict, "root": str, "epoch": int, "method": dict, "optimizer": dict, "scheduler": dict, "generators": dict, "history": list,
    "seconds": (int, float),
}  # fmt: skip
"""What a checkpoint must hold."""


def save_checkpoint(path: Path, state: dict[str, Any], *, fingerprint: str, root: str) -> None:
    """Replace `path` by a checkpoint of `state`: tensors, numbers, strings, lists and dicts only. Raises StoreError.

    fingerprint, root: of the cache that the run trains on.
    """
    body = {"format": "kdcache-checkpoint", "version": CHECKPOINT_VERSION, "fingerprint": fingerprint, "root": root, **state}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".checkpoint-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(body, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: can't be written: {error.strerror}; the checkpoint before it is whole, run again with --resume") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, *, fingerprint: str) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU, with "fingerprint" and "root".

    Raises CorruptError for a file that is missing, torn, changed or not a checkpoint of ours, MismatchError for one that was trained on
    a cache with another fingerprint.
    """
    remedy = "delete the run's folder and train again, or restore the file"
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        with zipfile.ZipFile(path) as archive:
            packed = next((info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:  # torch never compresses: this may unpack to terabytes
                raise CorruptError(f"{path}: {packed!a} is compressed, expected a file that torch.save wrote; {remedy}")
            damaged = archive.testzip()  # torch.load skips the crc32 of each member
        if damaged is not None:
            raise CorruptError(f"{path}: bytes were changed: {damaged} fails its crc32; {remedy}")
        body = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: expected a checkpoint, found no file; {remedy}") from error
    except UNPICKLING_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CorruptError(f"{path}: expected a checkpoint of kdcache, found a file that can't be read as one ({reason}); {remedy}") from error
    if not isinstance(body, dict) or body.get("format") != "kdcache-checkpoint":
        raise CorruptError(f"{path}: expected a checkpoint of kdcache, found another file of torch; {remedy}")
    if body.get("version") != CHECKPOINT_VERSION:
        found = body.get("version")
        raise CorruptError(f"{path}: checkpoint version {found!r}, this kdcache reads {CHECKPOINT_VERSION}; use the kdcache that wrote it")
    missing = [name for name in _TYPES if name not in body]
    if missing:
        raise CorruptError(f"{path}: the checkpoint lacks {', '.join(missing)}; {remedy}")
    for name, kind in _TYPES.items():
        if not isinstance(body[name], kind):
            raise CorruptError(f"{path}: {name!r} of the checkpoint is of type {type(body[name]).__name__}, expected another; {remedy}")
    if body.get("fingerprint") != fingerprint:
        raise MismatchError(
            f"checkpoint {path}",
            "fingerprint",
            expected=fingerprint,
            found=body.get("fingerprint"),
            remedy="train against the cache it was begun with, or pass another --out",
        )
    return body
