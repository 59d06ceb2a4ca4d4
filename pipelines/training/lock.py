"""One process at a time trains a run: a lock in its folder. Used by run.

RUN/.lock is there while the run is being trained, and after a kill; who holds it is what the operating system says, not that it exists. The
locks are POSIX record locks: they go with their process (which may take them twice), no worker forked from it keeps them, and a network file
system that has locks at all has these, across machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from kdcache.console import say
from kdcache.errors import StoreError, StudentError
from kdcache.interrupt import finishing_first

PATIENCE_S = 10.0
"""How long a lock is waited for: a process that was told to end has had its time by then."""

_NAME = ".lock"


class RunLock:
    """The right to write into a run's folder. Release it when the run has ended; a process that ends has released it."""

    def __init__(self, folder: Path, *, patience_s: float | None = None) -> None:
        """Take it, and wait for it if need be, by default `PATIENCE_S`.

        Raises StudentError if another process keeps it, StoreError for a folder that can't be written.
        """
        self._path = folder.resolve() / _NAME
        self._descriptor: int | None = None
        patience_s = PATIENCE_S if patience_s is None else patience_s
        deadline = time.monotonic() + patience_s
        said = False
        while (holder := self._try()) is not None:
            if time.monotonic() >= deadline:
                raise StudentError(
                    f"run {folder} is being trained by {holder}; nothing of it was changed: wait for that, or end it, then run the command again to"
                    f" go on or to see that it is done"
                )
            if not said:
                say(f"run {folder.name} is being trained by {holder}: waiting for {patience_s:.0f} s")
                said = True
            time.sleep(0.05)

    def _try(self) -> str | None:
        """None if it is ours now, else who has it."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"{self._path}: can't be written: {error.strerror}; expected a writable folder with free space") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                return holder or "another process"
            # a file system without locks: nobody can be kept out
        else:
            if not _is_at(self._path, descriptor):  # its holder has just removed it: another file may be there, and be locked
                os.close(descriptor)
                return "another process"
            with contextlib.suppress(OSError):  # a full disk: it tells who has it, and need not
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._descriptor = descriptor
        return None

    def release(self) -> None:
        """Let others have it, and remove its file. More than once does no more."""
        if self._descriptor is None:
            return
        with finishing_first():  # done by half, and again on the way out, it would take what is another's by then
            with contextlib.suppress(OSError):  # the folder is gone or read-only by now
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
