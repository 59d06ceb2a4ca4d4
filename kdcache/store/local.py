"""A cache in a folder. Commits are hard links of fsynced files, so that a name appears whole or not at all.

Reads use `pread` on cached descriptors: mmap was measured 6 × slower cold (research: storage §3).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CorruptError, MissingError, StoreError
from .base import Spool, Store, check_relative

MAX_OPEN_FILES = 128
"""Descriptors kept for reading, per process; well under the usual limit of 1024."""

_UNASKED_BYTES = 1 << 20
"""A read of more is first compared with the file's size."""
_SPOOL = "tmp"
_LOCK = "lock"
_MAX_LABEL_BYTES = 4096


class LocalStore(Store):
    """Objects are files below `root`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._spool_locks: dict[Path, int] = {}
        self.root = Path(os.path.abspath(os.path.expanduser(os.fspath(root))))
        self.url = str(self.root)

    def __getstate__(self) -> dict[str, str]:
        return {"root": str(self.root)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    def close(self) -> None:
        """Close the descriptors kept for reading; the store can still be used."""
        with self._descriptor_lock():
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def free_bytes(self) -> int:
        """Of the disk that the root lies on, or will: of the nearest folder above it that is there."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def __del__(self) -> None:
        while self._descriptors:  # no lock: nobody else can hold this object now
            os.close(self._descriptors.popitem()[1])

    def _path(self, path: str) -> Path:
        return self.root / check_relative(path)

    def _descriptor_lock(self) -> threading.Lock:
        if self._pid != os.getpid():  # a fork: the parent's descriptors still work, its lock may be held
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            self._descriptors.move_to_end(path)
            return descriptor
        try:
            descriptor = os.open(self._path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for who writes
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(path) from error
        except OSError as error:
            raise StoreError(f"{self.url}: {path} can't be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CorruptError(f"{self.url}: {path} is no file; run 'kdcache verify' on the cache")
        self._descriptors[path] = descriptor
        if len(self._descriptors) > MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def get_range(self, path: str, offset: int, size: int) -> bytes:
        with self._descriptor_lock():
            descriptor = self._open(path)
            try:
                if size > _UNASKED_BYTES:  # it is allocated before it is read
                    size_there = max(0, os.fstat(descriptor).st_size - offset)
                    if size_there < size:
                        raise self._too_short(path, offset, size, size_there)
                data = os.pread(descriptor, size, offset)
                while len(data) < size:  # pread may stop early, at 2 GiB or on a network file system
                    more = os.pread(descriptor, size - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
            except OSError as error:
                raise StoreError(f"{self.url}: {path}: reading {size} bytes at {offset} failed: {error.strerror}") from error
        if len(data) != size:
            raise self._too_short(path, offset, size, len(data))
        return data

    def _too_short(self, path: str, offset: int, size: int, found: int) -> CorruptError:
        return CorruptError(f"{self.url}: {path} is too short: expected {size} bytes at {offset}, found {found}; run 'kdcache verify' on the cache")

    def get(self, path: str, *, max_size: int) -> bytes:
        size = self.size(path)
        if size is None:
            raise self._missing(path)
        if size > max_size:
            raise CorruptError(f"{self.url}: {path} has {size} bytes, expected at most {max_size}")
        try:
            return self._path(path).read_bytes()
        except FileNotFoundError as error:  # deleted by another process since
            raise self._missing(path) from error
        except OSError as error:
            raise StoreError(f"{self.url}: {path} can't be read: {error.strerror}") from error

    def _missing(self, path: str) -> MissingError:
        return MissingError(f"{self.url}: no file {path}; run 'kdcache verify' on the cache to see what is missing")

    def size(self, path: str) -> int | None:
        try:
            status = self._path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self.url}: {path}: {error.strerror}") from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def put_new(self, path: str, source: bytes | Path) -> bool:
        target = self._path(path)
        spool: Path | None = None
        try:
            if isinstance(source, bytes):
                spool = self.new_spool()
                spooled = spool / "object"
                with open(spooled, "wb") as file:
                    file.write(source)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                spooled = source
            for _ in range(10):  # another process may remove an empty folder between these two, or while pathlib looks whether it exists
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    return _link_new(spooled, target)
            return _link_new(spooled, target)
        except OSError as error:
            raise StoreError(f"{self.url}: {path} can't be written: {error.strerror}; nothing that was there before is lost") from error
        finally:
            if spool is not None:
                self.drop_spool(spool)

    def list(self, prefix: str = "", *, deep: bool = True) -> Iterator[tuple[str, int]]:
        base = self.root / prefix if prefix else self.root
        stack = [base]
        while stack:
            folder = stack.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise StoreError(f"{folder}: can't be listed: {error.strerror}") from error
            for entry in entries:
                if folder == self.root and entry.name == _SPOOL:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if deep:
                        stack.append(Path(entry.path))
                    else:
                        yield str(Path(entry.path).relative_to(self.root)) + "/", 0
                elif entry.is_file(follow_symlinks=False):
                    try:
                        size = entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:  # deleted by another process since
                        continue
                    yield str(Path(entry.path).relative_to(self.root)), size
                else:
                    yield str(Path(entry.path).relative_to(self.root)), 0  # a link or device: nobody's file, shown as extra

    def delete(self, path: str) -> None:
        target = self._path(path)
        with self._descriptor_lock():
            descriptor = self._descriptors.pop(path, None)
            if descriptor is not None:
                os.close(descriptor)
        folder = target.parent
        try:
            target.unlink()
            if not any(part.endswith(".zarr") for part in path.split("/")[:-1]):  # a document: gone for good before what it named may go
                sync_folder(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"{self.url}: {path} can't be deleted: {error.strerror}") from error
        while len(folder.relative_to(self.root).parts) > 1:  # a group's and a teacher's folders go with their last file
            try:
                folder.rmdir()
            except OSError:  # not empty: the usual case
                break
            folder = folder.parent

    def new_spool(self, label: str = "") -> Path:
        for _ in range(20):  # another process may drop the common folder, or sweep ours before it is locked
            try:
                (self.root / _SPOOL).mkdir(parents=True, exist_ok=True)
                spool = Path(tempfile.mkdtemp(dir=self.root / _SPOOL))
                descriptor = os.open(spool / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            except (FileNotFoundError, FileExistsError):  # the second: removed while pathlib looks whether it exists
                continue
            except OSError as error:
                raise StoreError(f"{self.url}: no spool folder can be made: {error.strerror}; expected a writable folder with free space") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = (spool / _LOCK).exists()
            except BlockingIOError:
                locked = False
            if locked:
                self._spool_locks[spool] = descriptor
                self._write_label(spool, descriptor, label)
                return spool
            os.close(descriptor)
        raise StoreError(f"{self.url}: no spool folder can be made: {_SPOOL}/ is no folder, or another process keeps removing it")

    def _write_label(self, spool: Path, descriptor: int, label: str) -> None:
        try:
            if label:
                os.write(descriptor, label.encode())
        except OSError as error:
            self.drop_spool(spool)
            raise StoreError(f"{self.url}: no spool folder can be made: {error.strerror}; expected a writable folder with free space") from error

    def drop_spool(self, spool: Path) -> None:
        _remove_spool(spool)
        descriptor = self._spool_locks.pop(spool, None)
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # another attempt is alive
            (self.root / _SPOOL).rmdir()

    def drop_spools(self) -> None:
        for spool in list(self._spool_locks):
            self.drop_spool(spool)

    def sweep_spools(self) -> int:
        return self._sweep()[0]

    def live_labels(self) -> set[str]:
        return self._sweep()[1]

    def _sweep(self) -> tuple[int, set[str]]:
        """How many dead attempts' folders were removed, and the labels of the live ones."""
        folder = self.root / _SPOOL
        swept = 0
        live: set[str] = set()
        for spool in sorted(folder.iterdir()) if folder.is_dir() else []:
            try:
                descriptor = os.open(spool / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # killed or still busy between folder and lock (then it makes another), or being dropped
                with contextlib.suppress(OSError):
                    spool.rmdir()
                    swept += 1
                continue
            except OSError:  # another user's, or no folder of ours
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its attempt is alive
                live.add(os.pread(descriptor, _MAX_LABEL_BYTES, 0).decode(errors="replace"))
            else:
                _remove_spool(spool)
                swept += 1
            finally:
                os.close(descriptor)
        with contextlib.suppress(OSError):  # another attempt is alive, or nothing was there
            folder.rmdir()
        return swept, live - {""}

    def spools(self) -> Sequence[Spool]:
        folder = self.root / _SPOOL
        found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        return [Spool(f"{_SPOOL}/{path.name}", _bytes_below(path), self._is_alive(path)) for path in found]

    def _is_alive(self, spool: Path) -> bool:
        try:
            descriptor = os.open(spool / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # as `sweep_spools` has it
        except OSError:
            return True  # another user's: not ours to judge
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @contextlib.contextmanager
    def hold(self, *, alone: bool = False) -> Iterator[None]:
        is_new = not self.root.exists()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{self.url} can't be opened for writing: {error.strerror}; expected a writable folder with free space") from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            whose = "another process is writing to it" if alone else "'kdcache gc' is removing from it"
            raise StoreError(f"{self.url}: {whose}; nothing was changed: run the command again when that has ended") from error
        except OSError as error:  # a file system that locks no folders
            if alone:
                os.close(descriptor)
                raise StoreError(
                    f"{self.url}: the folder can't be locked ({error.strerror}), so nobody knows whether another process writes to it"
                ) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # see above; a forked worker may outlive this and keep the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            if is_new:
                with contextlib.suppress(OSError):  # not empty: the usual case
                    self.root.rmdir()


def _remove_spool(spool: Path) -> None:
    """Remove a spool, its lock last: one that is killed half-way is still known for a spool, and swept."""
    with contextlib.suppress(OSError):
        for path in sorted(spool.iterdir(), key=lambda path: path.name == _LOCK):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        spool.rmdir()


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder that others may be removing meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _link_new(source: Path, target: Path) -> bool:
    """Give `source` the name `target` if that is free, durably. A file system without hard links gets a rename after a check."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
            raise
        if target.exists():
            return False
        os.rename(source, target)
    else:
        source.unlink()
    sync_folder(target.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
