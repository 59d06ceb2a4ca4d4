"""On what file systems paths lie: which reads cost a round trip. Used by train, to choose between a full permutation and one in blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

MOUNTS = "/proc/self/mountinfo"
"""Of Linux: one mount a line, later ones above earlier ones (man 5 proc_pid_mountinfo)."""

NETWORK_TYPES = (
    "nfs", "cifs", "smb", "lustre", "gpfs", "mmfs", "ceph", "beegfs", "glusterfs", "wekafs", "panfs", "pvfs2", "orangefs", "ocfs2", "gfs2",
    "afs", "9p", "virtiofs", "vboxsf", "acfs", "juicefs", "fuse", "drvfs", "davfs", "prl_fs",
)  # fmt: skip
"""Beginnings of the types of file systems whose reads go to another machine, or through another process: `fuse.sshfs`, `fuse.gcsfuse`, `nfs4`, …"""
_LOCAL_TYPES = ("fuseblk", "fuse.ntfs", "fuse.overlayfs", "fuse.fuse-overlayfs")
"""Disks of this machine all the same: NTFS, the root of a rootless container."""


def file_system_of(path: str, mounts: str) -> str | None:
    """The type of the file system that an absolute path without links lies on, by the text of a `mountinfo`; None if it tells none."""
    found, depth = None, -1
    for line in mounts.splitlines():
        fields, separator, rest = line.partition(" - ")
        parts = fields.split(" ")
        if not separator or len(parts) < 5 or not rest:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), parts[4]).rstrip("/")
        if len(point) >= depth and (path == point or path.startswith(point + "/")):
            found, depth = rest.split(" ")[0], len(point)
    return found


def is_network_type(name: str) -> bool:
    """Whether reads of a file system of this type cost a round trip."""
    return name.startswith(NETWORK_TYPES) and not name.startswith(_LOCAL_TYPES)


def far_path(paths: Iterable[str]) -> tuple[str, str] | None:
    """(path, type of its file system) of the first path that lies on a network file system; None if none does, or if this machine does not say."""
    try:
        mounts = Path(MOUNTS).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # macOS, Windows
        return None
    seen: set[str] = set()
    for path in paths:
        folder = os.path.realpath(path)
        if folder in seen:
            continue
        seen.add(folder)
        name = file_system_of(folder, mounts)
        if name is not None and is_network_type(name):
            return path, name
    return None
