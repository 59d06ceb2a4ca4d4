"""Training checkpoints: written whole or not at all, read without running code, tied to the cache they were trained on.

A checkpoint is a torch.save file of tensors and plain Python values: a zip archive, whose crc32 of each member is compared on
reading. It is replaced atomically, so that a kill leaves the one before; a file that is torn, changed or foreign is refused.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from .errors import CorruptError, FormatVersionError, MismatchError, StoreError
from .store.local import sync_folder
from .timm_models import UNPICKLING_ERRORS

CHECKPOINT_VERSION = 2
"""2 has a place within an epoch, "step" and "sums"; 1 is read as one between epochs."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "recipe": dict, "root": str, "epoch": int, "method": dict, "optimizer": dict, "scheduler": dict, "generators": dict, "history": list,
    "seconds": (int, float),
}  # fmt: skip
"""What a checkpoint must hold."""
_TYPES_SINCE_2: dict[str, type | tuple[type, ...]] = {"step": int, "sums": dict, "epoch_seconds": (int, float)}


def save_checkpoint(path: Path, state: dict[str, Any], *, fingerprint: str, root: str, previous: Path | None = None) -> None:
    """Replace `path` by a checkpoint of `state`: tensors, numbers, strings, lists and dicts only. Raises StoreError.

    fingerprint, root: of the cache that the run trains on. previous: where the file that is replaced goes, once the new one is whole on
    disk; a kill between the two leaves it there and none at `path`.
    """
    body = {"format": "kdcache-checkpoint", "version": CHECKPOINT_VERSION, "fingerprint": fingerprint, "root": root, **state}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".checkpoint-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(body, file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                previous.parent.mkdir(exist_ok=True)
                os.replace(path, previous)  # not synced: whichever of the two names a loss of power undoes, one whole checkpoint is left
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # gone, if a signal came right after it got its name
            raise
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path}: can't be written: {reason}; the checkpoint before it is whole, run again with --resume") from error


def _write(body: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save, which raises an error of its own for a disk that is full: the system's in its place."""
    failed: list[OSError] = []

    class Noting:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(body, Noting())  # type: ignore[arg-type]  # a file needs no more for it
    except RuntimeError as error:
        if failed:
            raise failed[0] from error
        raise


def load_checkpoint(path: Path, *, fingerprint: str | None = None) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU, with "fingerprint" and "root".

    Raises CorruptError for a file that is missing, torn, changed or not a checkpoint of ours, FormatVersionError for one of a later kdcache,
    MismatchError for one that was trained on a cache with another fingerprint than the one that is given.
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
    if body.get("version") not in (1, CHECKPOINT_VERSION):
        found = body.get("version")
        raise FormatVersionError(
            f"{path}: checkpoint version {found!r}, this kdcache reads 1 and {CHECKPOINT_VERSION}; use the kdcache that wrote it"
        )
    types = _TYPES if body["version"] == 1 else {**_TYPES, **_TYPES_SINCE_2}
    missing = [name for name in types if name not in body]
    if missing:
        raise CorruptError(f"{path}: the checkpoint lacks {', '.join(missing)}; {remedy}")
    for name, kind in types.items():
        if not isinstance(body[name], kind):
            raise CorruptError(f"{path}: {name!r} of the checkpoint is of type {type(body[name]).__name__}, expected another; {remedy}")
    if fingerprint is not None and body.get("fingerprint") != fingerprint:
        raise MismatchError(
            f"checkpoint {path}",
            "fingerprint",
            expected=fingerprint,
            found=body.get("fingerprint"),
            remedy="train against the cache it was begun with, or pass another --out",
        )
    return body
