"""How a target is stored: one encoding a file, under the interface of `base`. Extract encodes on the teacher's device, train
decodes on the student's; between them lie only the encoded components.
"""

from __future__ import annotations

from ..errors import UsageError
from .base import ChannelStatistics, Encoding, TargetShape
from .dense import DenseLogits
from .fp16 import Fp16Features
from .int8 import Int8Features

ENCODINGS: dict[str, dict[str, type[Encoding]]] = {
    "logits": {"dense": DenseLogits},
    "features": {"int8": Int8Features, "fp16": Fp16Features},
}
"""kind → name → class; the first of a kind is its default."""


def default_encoding(kind: str) -> str:
    """The encoding of a target whose spec names none."""
    return next(iter(ENCODINGS[kind]))


def build_encoding(kind: str, encoding: str, shape: TargetShape) -> Encoding:
    """The encoding called `encoding` for a target of this kind and shape. Raises UsageError that lists the known ones."""
    known = ENCODINGS[kind]
    if encoding not in known:
        raise UsageError(f"encoding {encoding!r} is not known for {kind}; expected one of: {', '.join(known)}")
    return known[encoding](shape)


__all__ = ["ENCODINGS", "ChannelStatistics", "Encoding", "TargetShape", "build_encoding", "default_encoding"]
