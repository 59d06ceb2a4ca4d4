"""Where each document and file of a cache lies, and what a path says of it. The names of FORMAT.md §1; nothing is read here."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from .errors import UsageError
from .format import Digest, SourceIdentity, ViewRange, digest_of_identity
from .plan import blake2b_128, canonical_json


def name_on_disk(shard: str) -> str:
    """The shard's name as it stands in file names: characters outside [A-Za-z0-9._-] percent-encoded, also a leading dot."""
    quoted = urllib.parse.quote(shard.encode("utf-8", "surrogateescape"), safe="._-")
    quoted = quoted.replace("~", "%7E")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def segment_id(description: Mapping[str, Any]) -> str:
    """12 hex digits: the digest of what one run adds to one shard of one layer."""
    return blake2b_128(canonical_json(dict(description)))[:12]


def views_segment_id(views: ViewRange) -> str:
    """Segment id in the views layer."""
    return segment_id({"views": [views.start, views.stop]})


def targets_segment_id(targets: Mapping[str, Digest], views: ViewRange) -> str:
    """Segment id in a teacher's layer: targets with their cards' digests × views."""
    return segment_id({"targets": dict(targets), "views": [views.start, views.stop]})


TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_teacher_name(name: str) -> str:
    """`name` if it can be a folder's name. Raises UsageError."""
    if not TEACHER_NAME.fullmatch(name):
        raise UsageError(f"teacher name {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit; pass --name")
    return name


def views_record_path(shard: str, views: ViewRange) -> str:
    return f"views/{name_on_disk(shard)}.{views_segment_id(views)}.json"


def targets_record_path(teacher: str, shard: str, targets: Mapping[str, Digest], views: ViewRange) -> str:
    return f"teachers/{teacher}/{name_on_disk(shard)}.{targets_segment_id(targets, views)}.json"


def source_path(source: SourceIdentity) -> str:
    return f"sources/{digest_of_identity(source)[:12]}.json"


def teacher_path(teacher: str) -> str:
    return f"teachers/{teacher}/teacher.json"


def tail_path(teacher: str) -> str:
    return f"teachers/{teacher}/tail.json"


def tail_weights_path(teacher: str) -> str:
    return f"teachers/{teacher}/tail.safetensors"


def target_path(teacher: str, target: str) -> str:
    return f"teachers/{teacher}/targets/{target}.json"


def calibration_path(teacher: str, target: str) -> str:
    return f"teachers/{teacher}/targets/{target}.calibration.safetensors"


# --- and back --------------------------------------------------------------------------------------------------------


def teacher_of(path: str) -> str:
    """The teacher in whose folder a path lies, '' for a path in none."""
    parts = path.split("/")
    return parts[1] if parts[0] == "teachers" and len(parts) > 2 else ""


def shard_of(path: str) -> str:
    """The shard that a record, a group or a file in a group is of, as far as the name tells; '' for what is of no shard."""
    parts = path.split("/")
    name = parts[1] if parts[0] == "views" and len(parts) > 1 else parts[2] if teacher_of(path) else ""
    if name in ("teacher.json", "tail.json") or not name.endswith((".json", ".zarr")):
        return ""
    stem = name.removesuffix(".json").rpartition(".")[0] if name.endswith(".json") else name.rsplit(".", 3)[0]
    return urllib.parse.unquote(stem, errors="surrogateescape")
