"""Coverage-guided fuzzing of what parses bytes from outside, by hand: `pip install atheris`, then `PYTHONPATH=.:tests python tests/fuzz.py PARSER -max_total_time=600`.

PARSER is one of: document, index, policy, tar, image, safetensors, checkpoint. It ends at the first error that is none of kdcache's own, and
keeps the input; libFuzzer's options (-runs, -rss_limit_mb, -timeout, a corpus folder) follow.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kdcache", "tarfile", "yaml", "zipfile"]):
    from kdcache.checkpoint import load_checkpoint
    from kdcache.errors import KDCacheError, TeacherError
    from kdcache.format import TailIdentity, TeacherIdentity, ViewsIdentity, parse_document
    from kdcache.images import UnreadableImageError, decode_image
    from kdcache.index import read_index
    from kdcache.policy_file import load_policy
    from kdcache.shards import ShardSource, scan_shard
    from kdcache.store import open_store
    from kdcache.timm_models import load_weights

from kdcache.format import ZERO_DIGEST
from kdcache.plan import blake2b_128

WORK = Path(tempfile.mkdtemp(prefix="kdcache-fuzz-"))


def _sealed(text: bytes) -> bytes:
    """A document of these bytes whose file digest holds."""
    data = b'{\n "file_digest": "' + ZERO_DIGEST.encode() + b'", "format": "kdcache", "version": 1, ' + text
    return data.replace(ZERO_DIGEST.encode(), blake2b_128(data).encode(), 1)


def _file(name: str, data: bytes) -> Path:
    path = WORK / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def fuzz_document(data: bytes) -> None:
    for identity in (ViewsIdentity, TeacherIdentity, TailIdentity):
        try:
            parse_document(_sealed(data), identity, where="fuzz")
        except KDCacheError:
            continue


def fuzz_index(data: bytes) -> None:
    _file("index/index.json", _sealed(data))
    read_index(open_store(WORK), "index/index.json")


def fuzz_policy(data: bytes) -> None:
    load_policy(_file("policy.yaml", data))


def fuzz_tar(data: bytes) -> None:
    scan_shard(ShardSource("fuzz", str(_file("fuzz.tar", data))))


def fuzz_image(data: bytes) -> None:
    try:
        decode_image(data)
    except UnreadableImageError:
        return


def fuzz_safetensors(data: bytes) -> None:
    load_weights(_file("w.safetensors", data), error=TeacherError, role="fuzz")


def fuzz_checkpoint(data: bytes) -> None:
    load_checkpoint(_file("c.pt", data), fingerprint="f")


def main() -> None:
    parser = globals()[f"fuzz_{sys.argv.pop(1)}"]

    def one(data: bytes) -> None:
        try:
            parser(data)
        except KDCacheError:
            return

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
