"""Format v1, the JSON half: the documents that make a cache, and their digests. `FORMAT.md` is the normative text.

Flow: extract writes these documents (`kdcache.commit`), every reader parses them (`kdcache.index`), verify proves them. Where they lie: `kdcache.paths`.
Each document carries two digests: `identity_digest` of what it *is* (which its parent holds, up to the root), and
`file_digest` of every byte of the file. A document is trusted only through `parse_document`, which checks both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import CorruptError, FormatVersionError
from .plan import FrozenModel, ViewPlan, blake2b_128, canonical_json, explain_validation_error

FORMAT_VERSION = 1

Digest = str
"""32 lower-case hex digits: BLAKE2b-128."""

_DIGEST_PATTERN = r"^[0-9a-f]{32}$"
_PREFIX = b'{\n "file_digest": "'
ZERO_DIGEST = "0" * 32
_ZERO_DIGEST = ZERO_DIGEST.encode()


# What a document may ask for before anything is read or allocated: far above what anybody has, far below what fills a machine.
MAX_SAMPLES = 1 << 24
"""Of a shard: 16 GB of tar headers."""
MAX_CLASSES = 1 << 20
MAX_CHANNELS = 1 << 16
MAX_SIDE = 4096
"""Rows or columns of a token grid; pixels of a view's side."""
MAX_TAIL_TOKENS = 1 << 14
"""Tokens that a tail takes: attention is tried on them before training begins."""
MAX_ROW_BYTES = 64 << 20
"""Of one component of a target, one view of one row: 4096 tokens of 4096 channels in half precision are 32 MiB."""


def _shard_name(name: str) -> str:
    if not 0 < len(name) <= 255 or any(c in "/\0" or "\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"a shard's name must be a file name of UTF-8 text, found {name!a:.80}")
    return name


def _no_zero_byte(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path can't hold a zero byte")
    return path


ShardName = Annotated[str, AfterValidator(_shard_name)]


class DigestField(FrozenModel):
    """Size in bytes and BLAKE2b-128 of one file."""

    size: int = Field(ge=0)
    digest: Digest = Field(pattern=_DIGEST_PATTERN)


class Group(FrozenModel):
    """A zarr group as a record names it: its folder, and every file in it."""

    name: str = Field(min_length=1, max_length=400)
    digest: Digest = Field(pattern=_DIGEST_PATTERN)
    """BLAKE2b-128 of the canonical JSON of `files`; its first 12 digits stand in the folder's name."""
    files: dict[str, DigestField]
    """Path inside the group → size and digest."""

    @model_validator(mode="after")
    def _check(self) -> Group:
        for path in self.files:
            if any(part in {"", ".", ".."} for part in path.split("/")) or "\\" in path or "\0" in path:
                raise ValueError(f"file path {path!r} leaves the group")
        if "/" in self.name or "\\" in self.name or "\0" in self.name or self.name in {".", ".."}:
            raise ValueError(f"group name {self.name!r} is not a plain name")
        return self

    def size_of(self, folder: str = "") -> int:
        """Bytes of its files, or of those below a folder of it."""
        return sum(field.size for path, field in self.files.items() if not folder or path.startswith(f"{folder}/"))


def digest_of_files(files: Mapping[str, DigestField]) -> Digest:
    """The digest of a group: of the canonical JSON of its file table."""
    return blake2b_128(canonical_json({path: field.to_json() for path, field in files.items()}))


class Skipped(FrozenModel):
    """A sample that has no row, and why. Both stages skip the same ones."""

    key: str
    index: int = Field(ge=0, lt=MAX_SAMPLES)
    """Position among the samples of the tar."""
    reason: str


class ViewRange(FrozenModel):
    """Views start <= v < stop."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _check(self) -> ViewRange:
        if self.start >= self.stop:
            raise ValueError(f"an empty range of views: start {self.start}, stop {self.stop}")
        return self

    @property
    def numbers(self) -> range:
        """The views themselves."""
        return range(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, view: object) -> bool:
        return isinstance(view, int) and self.start <= view < self.stop


class CacheIdentity(FrozenModel):
    """Identity of `cache.json`."""

    plan: ViewPlan
    label_key: str | None = None
    """Where the labels of all its shards stand in .json members. None: .cls, else `label` of .json."""


class ViewsIdentity(FrozenModel):
    """Identity of a views record: one segment of one shard of the views layer."""

    shard: ShardName
    views: ViewRange
    plan: Digest = Field(pattern=_DIGEST_PATTERN)
    """Fingerprint of the view plan."""
    member_table: Digest = Field(pattern=_DIGEST_PATTERN)
    """Digest of (name, offset, size) of the tar's members."""
    samples: int = Field(ge=0, le=MAX_SAMPLES)
    """Samples in the tar: rows + skipped."""
    rows: int = Field(ge=0, le=MAX_SAMPLES)
    skipped: tuple[Skipped, ...]
    cut: str | None = None
    """Where and how the tar was cut short, if it was."""
    pixels_by_view: tuple[Digest, ...]
    """For each view of the range, BLAKE2b-128 of its `rows` little-endian uint64 pixel digests."""
    group: Group

    @model_validator(mode="after")
    def _check(self) -> ViewsIdentity:
        if self.rows + len(self.skipped) != self.samples:
            raise ValueError(f"rows {self.rows} + skipped {len(self.skipped)} is not samples {self.samples}")
        places = [skip.index for skip in self.skipped]
        if any(place >= self.samples for place in places) or any(one >= other for one, other in pairwise(places)):
            raise ValueError(f"skipped samples {places[:5]} are not ascending positions of {self.samples} samples")
        if len(self.pixels_by_view) != len(self.views):
            raise ValueError(f"{len(self.pixels_by_view)} pixel digests for {len(self.views)} views")
        return self


Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class Preprocessing(FrozenModel):
    """How a teacher turns a uint8 view into its input: resize to `input_size`, divide by 255, subtract mean, divide by std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int = Field(ge=1, le=4 * MAX_SIDE)
    """Side of the square input, pixels; views of another size are resized on the device (bicubic, antialiased)."""

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if not min(self.std) > 0:
            raise ValueError(f"std must be above 0, found {self.std}")
        return self


class TeacherIdentity(FrozenModel):
    """Identity of `teacher.json`."""

    model: str
    """timm architecture name, e.g. ``vit_large_patch16_224``."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Constructor arguments beside the architecture's own."""
    weights: Digest = Field(pattern=_DIGEST_PATTERN)
    """BLAKE2b-128 over the sorted state dict: name, dtype, shape and little-endian bytes of each tensor."""
    num_classes: int = Field(ge=0, le=MAX_CLASSES)
    """0: the teacher has no head, hence no logits."""
    preprocessing: Preprocessing
    precision: Literal["fp32", "bf16", "fp16"]
    """fp32, or autocast to this type."""


class Component(FrozenModel):
    """One array of a target: zarr data type and shape of one view of one row."""

    dtype: Literal["uint8", "int8", "uint16", "int16", "int32", "float16", "float32"]
    shape: tuple[int, ...]
    typesize: int | None = Field(default=None, ge=1, le=255)
    """Blosc's element size where it is not the data type's: a whole row, so that bitshuffle gathers each of its fields over rows."""

    @model_validator(mode="after")
    def _check(self) -> Component:
        if any(side < 1 for side in self.shape) or len(self.shape) > 4:
            raise ValueError(f"component shape {self.shape} must have up to 4 sides of at least 1")
        if prod(self.shape) * int(self.dtype.lstrip("uintfloa")) > 8 * MAX_ROW_BYTES:
            raise ValueError(f"component of {self.dtype} {self.shape} must have at most {MAX_ROW_BYTES} bytes a row")
        return self


class TailIdentity(FrozenModel):
    """Identity of a tail's card, `teachers/<name>/tail.json`: the teacher's last modules, and how to build them without the others."""

    teacher: Digest = Field(pattern=_DIGEST_PATTERN)
    """Identity digest of teacher.json."""
    model: str
    """timm architecture name."""
    model_args: dict[str, Any]
    """Constructor arguments that give these modules their shapes."""
    modules: tuple[str, ...] = Field(min_length=1)
    """The modules that a pass goes through, in this order, by their timm names, e.g. ``layers.3``, ``norm``."""
    head: tuple[str, ...] = ()
    """The modules of `forward_head`; none for a teacher without a classifier."""
    layout: Literal["NLC", "NHWC", "NCHW"]
    """What the first module takes: tokens, prefix first, or a map."""
    grid: tuple[Side, Side]
    """Rows and columns of what it takes."""
    channels: int = Field(ge=1, le=MAX_CHANNELS)
    prefix_tokens: int = Field(ge=0, le=MAX_SIDE)
    arguments: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Module → keyword → tensor of the file that it is given beside the tokens, such as ``rope``."""
    weights: DigestField
    """The safetensors file beside the card."""

    @model_validator(mode="after")
    def _check(self) -> TailIdentity:
        tokens = self.grid[0] * self.grid[1] + self.prefix_tokens
        if tokens > MAX_TAIL_TOKENS or 4 * tokens * self.channels > MAX_ROW_BYTES * 4:
            raise ValueError(
                f"{tokens} tokens of {self.channels} channels are more than a tail takes, {MAX_TAIL_TOKENS} tokens and {MAX_ROW_BYTES} numbers"
            )
        return self


class TargetIdentity(FrozenModel):
    """Identity of a target card, `teachers/<name>/targets/<target>.json`."""

    name: str = Field(pattern=r"^(logits|features@[A-Za-z0-9_.-]+)$", max_length=200)
    kind: Literal["logits", "features"]
    node: str | None = None
    """Absolute node name for features, e.g. ``blocks.22`` or ``norm``."""
    encoding: str
    num_classes: int | None = Field(default=None, ge=1, le=MAX_CLASSES)
    channels: int | None = Field(default=None, ge=1, le=MAX_CHANNELS)
    grid: tuple[Side, Side] | None = None
    """Rows and columns of the token grid."""
    prefix_tokens: int | None = Field(default=None, ge=0, le=MAX_SIDE)
    components: dict[str, Component]
    calibration: DigestField | None = None
    """The safetensors file beside the card, where the target has one."""

    @model_validator(mode="after")
    def _check(self) -> TargetIdentity:
        if self.name != (self.kind if self.node is None else f"{self.kind}@{self.node}") or (self.kind == "logits") != (self.node is None):
            raise ValueError(f"target {self.name!r} is not {self.kind} at node {self.node!r}")
        sizes = (self.num_classes,) if self.kind == "logits" else (self.channels, self.grid, self.prefix_tokens)
        if None in sizes:
            raise ValueError(f"a target of {self.kind} must say num_classes, or channels, grid and prefix_tokens")
        return self


class TargetsIdentity(FrozenModel):
    """Identity of a teacher's record: one segment (targets × views) of one shard."""

    shard: ShardName
    views: ViewRange
    targets: dict[str, Digest]
    """Target name → identity digest of its card."""
    teacher: Digest = Field(pattern=_DIGEST_PATTERN)
    """Identity digest of teacher.json."""
    member_table: Digest = Field(pattern=_DIGEST_PATTERN)
    samples: int = Field(ge=0, le=MAX_SAMPLES)
    """Samples in the tar, skipped ones included; bounds the rows of a chunk."""
    rows: int = Field(ge=0, le=MAX_SAMPLES)
    pixels: Digest = Field(pattern=_DIGEST_PATTERN)
    """What the teacher saw: `digest_of_pixels` of this segment's views."""
    group: Group


def digest_of_pixels(pixels_by_view: Mapping[int, Digest]) -> Digest:
    """One digest for the pixels of some views of a shard: of the canonical JSON of `view → column digest`."""
    return blake2b_128(canonical_json({str(view): digest for view, digest in pixels_by_view.items()}))


IdentityT = TypeVar("IdentityT", bound=FrozenModel)


class SourceIdentity(FrozenModel):
    """Identity of `sources/<digest12>.json`: the shards that a run was asked for, done or not. Bookkeeping: no part of the root."""

    shards: tuple[ShardName, ...]


class _Noted(BaseModel):
    model_config = ConfigDict(strict=True)


class _Source(_Noted):
    path: Annotated[str, AfterValidator(_no_zero_byte)]
    size: Annotated[int, Field(ge=0, lt=2**63)] = 0
    mtime_ns: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0


class _Calibration(_Noted):
    shards: list[ShardName] = Field(default_factory=list)


class _Measured(_Noted):
    fidelity: dict[str, dict[str, float | dict[str, float]]] = Field(default_factory=dict)
    accuracy: dict[str, int] = Field(default_factory=dict)
    views: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    skip_details: dict[str, str] = Field(default_factory=dict)
    without_prefix: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> _Measured:
        for target, figures in self.fidelity.items():
            for name, figure in figures.items():
                if isinstance(figure, dict) != (name == "sums"):
                    raise ValueError(f"fidelity of {target!r}: {name!r} must be a number, and 'sums' an object of numbers")
        return self


class _Provenance(_Noted):
    packages: dict[str, str] = Field(default_factory=dict)
    source: _Source | str = ""
    checkpoint: str = ""
    model_args: dict[str, Any] = Field(default_factory=dict)
    weight_files: dict[str, str] = Field(default_factory=dict)
    nodes: list[str] = Field(default_factory=list)
    containers: dict[str, int] = Field(default_factory=dict)
    calibration: _Calibration = Field(default_factory=_Calibration)
    of: str

    @model_validator(mode="after")
    def _check(self) -> _Provenance:
        if "source" in self.model_fields_set and isinstance(self.source, str) != (self.of != "views"):
            raise ValueError("source must be an object in a views record, text elsewhere")
        return self


class _Notes(_Noted):
    """What readers take from `measured` and `provenance`, by its types; whatever else is there is nobody's to judge."""

    measured: _Measured
    provenance: _Provenance


_KINDS: dict[str, type[FrozenModel]] = {
    "cache": CacheIdentity,
    "source": SourceIdentity,
    "views": ViewsIdentity,
    "teacher": TeacherIdentity,
    "tail": TailIdentity,
    "target": TargetIdentity,
    "targets": TargetsIdentity,
}


@dataclass(frozen=True, kw_only=True)
class Document(Generic[IdentityT]):
    """A parsed document: identity is compared, measured and provenance are not."""

    kind: str
    identity: IdentityT
    measured: dict[str, Any]
    """Fidelity, accuracy: properties of what was stored, not part of what it is."""
    provenance: dict[str, Any]
    """Versions, device, times, places: who made it, never compared."""
    file_digest: Digest

    @property
    def identity_digest(self) -> Digest:
        return digest_of_identity(self.identity)


def digest_of_identity(identity: FrozenModel) -> Digest:
    """BLAKE2b-128 of the canonical JSON of an identity."""
    return blake2b_128(canonical_json(identity.to_json()))


def dump_document(identity: FrozenModel, *, measured: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a document. `file_digest` comes first, at a fixed place, and covers every other byte of the file."""
    kind = next(name for name, model in _KINDS.items() if type(identity) is model)
    body = {
        "file_digest": ZERO_DIGEST,
        "format": "kdcache",
        "version": FORMAT_VERSION,
        "kind": kind,
        "identity_digest": digest_of_identity(identity),
        "identity": identity.to_json(),
        "measured": dict(measured or {}),
        "provenance": dict(provenance or {}),
    }
    return seal_json(body)


def seal_json(body: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON object whose first key is a `file_digest` of zeros, with the digest filled in."""
    data = json.dumps(body, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"
    return data.replace(_ZERO_DIGEST, blake2b_128(data).encode(), 1)


def body_of(document: Document[Any]) -> dict[str, Any]:
    """The JSON object that a document was parsed from."""
    return {
        "file_digest": document.file_digest,
        "format": "kdcache",
        "version": FORMAT_VERSION,
        "kind": document.kind,
        "identity_digest": document.identity_digest,
        "identity": document.identity.to_json(),
        "measured": document.measured,
        "provenance": document.provenance,
    }


def file_digest_holds(data: bytes) -> bool:
    """Whether `data` is as it was written: its digest, taken with the digits of `file_digest` as zeros, is `file_digest`."""
    start = len(_PREFIX)
    if not data.startswith(_PREFIX):
        return False
    found = data[start : start + 32]
    return blake2b_128(data[:start] + _ZERO_DIGEST + data[start + 32 :]).encode() == found


def parse_json_object(data: bytes, *, where: str) -> dict[str, Any]:
    """`data` as a JSON object. Raises CorruptError naming `where`."""
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: expected a JSON object, found bytes that don't parse ({error}); {REPAIR}") from error
    if not isinstance(body, dict):
        raise CorruptError(f"{where}: expected a JSON object, found {type(body).__name__}; {REPAIR}")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_version(body: Mapping[str, Any], *, where: str) -> None:
    """Raises FormatVersionError for a format version other than ours, CorruptError where there is none."""
    version = body.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or body.get("format") != "kdcache":
        raise CorruptError(f'{where}: expected "format": "kdcache" and a version number, found {body.get("format")!r} and {version!r}; {REPAIR}')
    if version != FORMAT_VERSION:
        raise FormatVersionError(f"{where}: format version {version}, this kdcache reads version {FORMAT_VERSION}; install the kdcache that wrote it")


REPAIR = "run 'kdcache verify' to see what else is damaged, delete the damaged segment's record and run 'kdcache extract' again"


def parse_document(data: bytes, identity_type: type[IdentityT], *, where: str) -> Document[IdentityT]:
    """Parse and prove a document.

    where: path shown in errors. Raises FormatVersionError for another version, CorruptError for anything that is not
    exactly what `dump_document` wrote.
    """
    return document_from_body(parse_sealed_json(data, where=where), identity_type, where=where)


def parse_sealed_json(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object of ours whose version and `file_digest` hold. Raises FormatVersionError or CorruptError."""
    body = parse_json_object(data, where=where)
    check_version(body, where=where)
    if not file_digest_holds(data):
        raise CorruptError(f"{where}: bytes were changed: file_digest says {body.get('file_digest')!r}, the content does not match it; {REPAIR}")
    return body


def document_from_body(body: Mapping[str, Any], identity_type: type[IdentityT], *, where: str) -> Document[IdentityT]:
    """A document from its parsed JSON, as the index keeps it. Raises CorruptError."""
    kind = next(name for name, model in _KINDS.items() if model is identity_type)
    if body.get("kind") != kind:
        raise CorruptError(f"{where}: expected a document of kind {kind!r}, found {body.get('kind')!r}; {REPAIR}")
    try:
        identity = identity_type.model_validate(body.get("identity"))
    except ValidationError as error:
        raise CorruptError(f"{where}: the identity does not fit the format: {explain_validation_error(error)}") from error
    measured, provenance = body.get("measured"), body.get("provenance")
    if not isinstance(measured, dict) or not isinstance(provenance, dict):
        raise CorruptError(f"{where}: 'measured' and 'provenance' must be objects; {REPAIR}")
    try:
        _Notes.model_validate({"measured": measured, "provenance": provenance | {"of": kind}})
    except ValidationError as error:
        raise CorruptError(f"{where}: what is noted does not fit the format: {explain_validation_error(error)}; {REPAIR}") from error
    try:
        digest = digest_of_identity(identity)
    except (ValueError, RecursionError) as error:  # nested deeper than Python or pydantic follows
        raise CorruptError(f"{where}: the identity can't be digested ({error}); {REPAIR}") from error
    if body.get("identity_digest") != digest:
        raise CorruptError(f"{where}: identity_digest does not match the identity; {REPAIR}")
    return Document(kind=kind, identity=identity, measured=measured, provenance=provenance, file_digest=str(body.get("file_digest")))


def root_digest(*, cache: Digest, views: Mapping[str, Digest], teachers: Mapping[str, Mapping[str, Any]]) -> Digest:
    """The one digest that names a cache's whole content.

    cache: identity digest of cache.json. views: record path → identity digest. teachers: name → {"teacher": digest,
    "targets": {target: digest}, "records": {record path: digest}[, "tail": digest]}.
    """
    return blake2b_128(canonical_json({"cache": cache, "views": dict(views), "teachers": {k: dict(v) for k, v in teachers.items()}}))
