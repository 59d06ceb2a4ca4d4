"""How a target is stored: one encoding a file, under the interface of `base`. Extract encodes on the teacher's device, train
decodes on the student's; between them lie only the encoded components.
"""

from __future__ import annotations

from ..errors import UsageError
from ..targets import canonical_encoding
from .base import Calibrator, ChannelStatistics, Encoding, TargetShape
from .bf16 import Bf16Features
from .dct import DctFeatures
from .dense import DenseLogits
from .fp16 import Fp16Features
from .int8 import Int8Features
from .klt import KltFeatures
from .topk import TopKLogits

ENCODINGS: dict[str, dict[str, type[Encoding]]] = {
    "logits": {"dense": DenseLogits, "topk": TopKLogits},
    "features": {"int8": Int8Features, "fp16": Fp16Features, "bf16": Bf16Features, "klt": KltFeatures, "dct": DctFeatures},
}
"""kind → name → class; the first of a kind is its default."""


def default_encoding(kind: str) -> str:
    """The encoding of a target whose spec names none."""
    return next(iter(ENCODINGS[kind]))


def build_encoding(kind: str, encoding: str, shape: TargetShape) -> Encoding:
    """The encoding written `encoding`, `name` or `name=argument`, for a target of this kind and shape.

    Raises UsageError that lists the known ones, or for an argument that it can't have.
    """
    known = ENCODINGS[kind]
    name, equals, argument = (canonical_encoding(encoding) or "").partition("=")
    if name not in known:
        forms = (one if of.argument_name is None else f"{one}={of.argument_name}" for one, of in known.items())
        raise UsageError(f"encoding {encoding!r} is not known for {kind}; expected one of: {', '.join(forms)}")
    return known[name](shape, argument if equals else None)


__all__ = ["ENCODINGS", "Calibrator", "ChannelStatistics", "Encoding", "TargetShape", "build_encoding", "default_encoding"]
