"""The cards of a teacher and its targets: created if absent, so that of several runs one makes them and all go on with them.

A target's calibration file is created before its card, and the card holds the digest of whatever file is then there: the loser
of that race uses the winner's statistics, be they of other views. A file that no card vouches for is left by a killed run, or
its card is about to come: who replaces it keeps it at hand, and puts it back if the card that then comes is for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .cache import MAX_CALIBRATION_BYTES, TeacherLayer, read_calibration
from .commit import create_document
from .digests import digest_of_file
from .encodings import Encoding, build_encoding, default_encoding
from .errors import CorruptError, MismatchError, TeacherError
from .format import DigestField, Document, TailIdentity, TargetIdentity, TeacherIdentity, digest_of_identity
from .index import drop_index, read_document
from .jobs import RecordedTarget
from .paths import calibration_path, tail_path, tail_weights_path, target_path, teacher_path
from .plan import blake2b_128, require_same
from .store import Store
from .tail import MAX_TAIL_BYTES, build_tail, cut_tail, tail_distance
from .targets import TargetSpec
from .teacher import Teacher, TeacherTarget
from .timm_models import built_size_of

_MAX_TAIL_DISTANCE = 1e-3
"""Of a tail with its prefix from the teacher, relative L2 in float32: 0 on a CPU, some 1e-4 where a device multiplies in TF32; wrong wiring gives 0.1 and more."""


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """A target to be recorded: its encoding, and its card if the cache has one."""

    target: TeacherTarget
    encoding: Encoding
    card: Document[TargetIdentity] | None
    needs_statistics: bool
    """Every feature target has channel statistics: encodings may need them, and `z_l2` does. False if they are there."""


def plan_targets(store: Store, resolved: Mapping[TargetSpec, TeacherTarget], layer: TeacherLayer | None, *, teacher_name: str) -> list[TargetPlan]:
    """Choose each target's encoding: as asked, else as in the cache, else the default. Raises MismatchError, UsageError."""
    plans: list[TargetPlan] = []
    for spec, target in resolved.items():
        card = layer.targets.get(target.name) if layer is not None else None
        name = spec.encoding or (card.identity.encoding if card is not None else default_encoding(target.kind))
        encoding = build_encoding(target.kind, name, target.shape)
        if card is not None and card.identity.encoding != encoding.full_name:
            raise MismatchError(
                f"target {target.name!r} of teacher {teacher_name!r}",
                "encoding",
                expected=card.identity.encoding,
                found=encoding.full_name,
                remedy="a target has one encoding a cache: leave it out, or record under another --name",
            )
        calibrated = card is not None and store.size(calibration_path(teacher_name, target.name)) is not None
        needs_statistics = target.kind == "features" and not calibrated
        plans.append(TargetPlan(target=target, encoding=encoding, card=card, needs_statistics=needs_statistics))
    return plans


def create_teacher(store: Store, name: str, identity: TeacherIdentity, *, provenance: Mapping[str, Any]) -> Document[TeacherIdentity]:
    """teacher.json as it is now. Raises MismatchError if another run has just recorded another model under this name."""
    document, _ = create_document(store, teacher_path(name), identity, provenance=provenance)
    require_same(f"teacher {name!r}", document.identity, identity, remedy="pass another --name")
    return document


def create_cards(
    store: Store, teacher_name: str, plans: Sequence[TargetPlan], statistics: Mapping[str, Mapping[str, Tensor]], *, making: Mapping[str, Any]
) -> tuple[dict[str, RecordedTarget], int]:
    """Target name → target with its card and calibrated encoding; and the bytes of the calibration files that this call has made.

    statistics: of every target that `needs_statistics`. making: what they were made of, kept as provenance to make them again.
    """
    recorded: dict[str, RecordedTarget] = {}
    added = 0
    for plan in plans:
        name = plan.target.name
        card, at_hand, is_made = plan.card, list[bytes](), False
        if name in statistics and (card is not None or store.size(target_path(teacher_name, name)) is None):  # else another run has made it since
            at_hand, is_made = _store_calibration(store, teacher_name, plan, statistics[name])
        card = card or _create_card(store, teacher_name, plan, at_hand[0] if at_hand else None, making)
        tensors = _load_calibration(store, teacher_name, card.identity, at_hand) if card.identity.calibration is not None else None
        if tensors is not None:
            plan.encoding.load_calibration(tensors)
        recorded[name] = RecordedTarget(target=plan.target, card=card, encoding=plan.encoding, calibration=tensors)
        added += len(at_hand[0]) if is_made else 0
    return recorded, added


def _create_card(store: Store, teacher_name: str, plan: TargetPlan, calibration: bytes | None, making: Mapping[str, Any]) -> Document[TargetIdentity]:
    """The card that is there now. calibration: the file that is there. Raises MismatchError if another run's differs in more than that."""
    target, shape = plan.target, plan.target.shape
    is_features = target.kind == "features"
    identity = TargetIdentity(
        name=target.name,
        kind=target.kind,
        node=target.node,
        encoding=plan.encoding.full_name,
        num_classes=None if is_features else shape.num_classes,
        channels=shape.channels if is_features else None,
        grid=shape.grid if is_features else None,
        prefix_tokens=shape.prefix_tokens if is_features else None,
        components=plan.encoding.components(),
        calibration=DigestField(size=len(calibration), digest=blake2b_128(calibration)) if calibration is not None else None,
    )
    provenance = {"calibration": dict(making) if calibration is not None else {}}
    card, _ = create_document(store, target_path(teacher_name, target.name), identity, provenance=provenance)
    expected = identity.model_copy(update={"calibration": card.identity.calibration})  # of other views, or to other last bits: as good
    require_same(f"target {target.name!r}", card.identity, expected, remedy="another run has just recorded it otherwise; pass another --name")
    return card


def _store_calibration(store: Store, teacher_name: str, plan: TargetPlan, statistics: Mapping[str, Tensor]) -> tuple[list[bytes], bool]:
    """Create the calibration file if absent; the one that is there now, and others that were; and whether this call made it.

    Raises CorruptError if a card wants another.
    """
    path, card = calibration_path(teacher_name, plan.target.name), plan.card
    new = safetensors.torch.save(dict(statistics))
    if card is not None and card.identity.calibration is not None and blake2b_128(new) != card.identity.calibration.digest:
        raise CorruptError(
            f"{store.url}/{path} is missing, and comes out otherwise now (expected digest {card.identity.calibration.digest}, found"
            f" {blake2b_128(new)}); it was made with {card.provenance.get('calibration')}: use the same, or record under another --name"
        )
    if store.put_new(path, new):
        return [new], True
    found = store.get(path, max_size=MAX_CALIBRATION_BYTES)
    if card is not None or _is_near(plan.encoding, found, statistics):
        return [found], False
    store.delete(path)  # no card vouches for it, and it is not what this run would have made
    return [new, found], store.put_new(path, new)


def _load_calibration(store: Store, teacher_name: str, card: TargetIdentity, at_hand: Sequence[bytes]) -> dict[str, Tensor]:
    """The statistics that a card names. If they are at hand, whatever file another run has put in the place of theirs is put right."""
    path = calibration_path(teacher_name, card.name)
    for data in at_hand:
        if card.calibration is not None and blake2b_128(data) == card.calibration.digest:
            if not store.put_new(path, data) and store.get(path, max_size=MAX_CALIBRATION_BYTES) != data:
                store.delete(path)
                store.put_new(path, data)
            return safetensors.torch.load(data)
    return read_calibration(store, teacher_name, card)


def _is_near(encoding: Encoding, data: bytes, statistics: Mapping[str, Tensor]) -> bool:
    """Whether a calibration file holds these statistics, as far as another batch size or device could move them."""
    try:
        found = safetensors.torch.load(data)
    except (SafetensorError, ValueError):
        return False
    return encoding.is_near(found, statistics)


# --- the tail --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TailPlan:
    """A tail to be recorded, cut and proved to be the teacher's."""

    known: TailIdentity | None
    """That of the cache, when the plan was made."""
    identity: TailIdentity
    data: bytes
    """Its file."""
    measured: Mapping[str, float]


def plan_tail(store: Store, teacher_name: str, teacher: Teacher, modules: Sequence[str], views_BHWC: Tensor) -> TailPlan:
    """Cut the teacher's tail, before anything of the teacher is recorded. modules: timm names in order; a tail that is there and has these serves.

    views_BHWC: uint8 views to try the tail on. Raises TeacherError for a teacher whose tail, built again, is not the teacher;
    MismatchError if the cache has one that can't give way to it.
    """
    known = _known_tail(store, teacher_name)
    if known is not None and set(modules) <= set(known.modules):
        modules = known.modules
    identity, data, measured = _cut(teacher, modules, views_BHWC)
    if known is not None and known.modules != identity.modules and not _gives_way(known, identity):
        raise MismatchError(
            f"the tail of teacher {teacher_name!r}", "modules", expected=", ".join(known.modules), found=", ".join(identity.modules),
            remedy="a tail that takes maps serves one split only: ask for the one that is there, or record this one under another --name",
        )  # fmt: skip
    return TailPlan(known=known, identity=identity, data=data, measured=measured)


def create_tail(store: Store, teacher_name: str, plan: TailPlan, teacher: Teacher, views_BHWC: Tensor) -> tuple[Document[TailIdentity], int]:
    """The card of the teacher's tail as it is now, its file made before it; and the bytes of the file, if this call has made it.

    A shorter tail gives way to a longer one.

    One that is there serves if it is the teacher's too: another device may give other last bits of what a pass computes beside the tokens.
    Raises MismatchError if another one is recorded.
    """
    if _known_tail(store, teacher_name) != plan.known:  # another run has just recorded one
        plan = plan_tail(store, teacher_name, teacher, plan.identity.modules, views_BHWC)
    path, weights = tail_path(teacher_name), tail_weights_path(teacher_name)
    known, identity, data = plan.known, plan.identity, plan.data
    if known is not None and _gives_way(known, identity):
        _drop_tail(store, teacher_name)
        known = None
    at_hand = [data]
    is_made = known is None and store.put_new(weights, data)
    if known is None and not is_made:
        found = store.get(weights, max_size=MAX_TAIL_BYTES)
        if found != data:
            store.delete(weights)  # no card vouches for it
            is_made = store.put_new(weights, data)
            at_hand.append(found)
    card, _ = create_document(store, path, identity, measured=plan.measured)
    for one in at_hand:
        if blake2b_128(one) == card.identity.weights.digest:
            is_made |= _put_right(store, weights, one)
    if card.identity != identity:
        _require_as_good(store, teacher_name, card.identity, identity, teacher, views_BHWC)
    return card, card.identity.weights.size if is_made else 0


def _known_tail(store: Store, teacher_name: str) -> TailIdentity | None:
    path = tail_path(teacher_name)
    return read_document(store, path).identity if store.size(path) is not None else None


def _gives_way(known: TailIdentity, identity: TailIdentity) -> bool:
    return set(known.modules) < set(identity.modules) and known.layout == identity.layout == "NLC"


def _require_as_good(store: Store, teacher_name: str, known: TailIdentity, identity: TailIdentity, teacher: Teacher, views_BHWC: Tensor) -> None:
    """Raise MismatchError for a recorded tail that differs from this run's in more than last bits."""
    what, remedy = f"the tail of teacher {teacher_name!r}", "a teacher has one tail: record this one under another --name"
    require_same(what, known.model_copy(update={"weights": identity.weights}), identity, remedy=remedy)
    path = tail_weights_path(teacher_name)
    if store.size(path) is None:
        raise CorruptError(
            f"{store.url}/{path} is missing, and comes out otherwise now (expected digest {known.weights.digest}, found"
            f" {identity.weights.digest}): make it on the device that it was made on, or record under another --name"
        )
    data = store.get(path, max_size=MAX_TAIL_BYTES)
    tail = build_tail(known, data, with_prefix=True).to(teacher.device)
    if not tail_distance(tail, teacher.model, teacher.normalize(views_BHWC.to(teacher.device))) <= _MAX_TAIL_DISTANCE:
        require_same(what, known, identity, remedy=remedy)


def _drop_tail(store: Store, teacher_name: str) -> None:
    """Make room for a longer tail, which serves what the shorter one did. No record names a tail; the index may hold its card."""
    drop_index(store)
    store.delete(tail_path(teacher_name))
    store.delete(tail_weights_path(teacher_name))


def _put_right(store: Store, path: str, data: bytes) -> bool:
    """The file that a card names, whatever another run has put in its place before the card was there; whether this call made it."""
    if store.put_new(path, data):
        return True
    if digest_of_file(store, path).digest == blake2b_128(data):
        return False
    store.delete(path)
    return store.put_new(path, data)


def _cut(teacher: Teacher, modules: Sequence[str], views_BHWC: Tensor) -> tuple[TailIdentity, bytes, dict[str, float]]:
    """The tail's identity, the bytes of its file, and its distances from the teacher. Proves that with prefix tokens it is the teacher."""
    model, images_BCHW = teacher.model, teacher.normalize(views_BHWC.to(teacher.device))
    cut = cut_tail(model, images_BCHW, modules, model_name=teacher.source)
    data = safetensors.torch.save(cut.tensors)
    size = built_size_of(model)
    identity = TailIdentity(
        teacher=digest_of_identity(teacher.identity),
        model=teacher.identity.model,
        model_args={
            **teacher.identity.model_args,
            "num_classes": teacher.identity.num_classes,
            **({"img_size": size[0]} if size is not None else {}),
        },
        modules=tuple(modules),
        head=cut.head,
        layout=cut.layout,
        grid=cut.grid,
        channels=cut.channels,
        prefix_tokens=cut.prefix_tokens,
        arguments=cut.arguments,
        weights=DigestField(size=len(data), digest=blake2b_128(data)),
    )
    found = tail_distance(build_tail(identity, data, with_prefix=True).to(teacher.device), model, images_BCHW)
    if not found <= _MAX_TAIL_DISTANCE:
        raise TeacherError(
            f"teacher {teacher.source}: its modules {', '.join(modules)}, built again, differ from it by {found:.2g} (relative L2), expected at most"
            f" {_MAX_TAIL_DISTANCE}: its pass does more than go through them; choose another teacher, or a method that needs no tail"
        )
    without = found if cut.prefix_tokens == 0 else tail_distance(build_tail(identity, data).to(teacher.device), model, images_BCHW)
    return identity, data, {"with_prefix": found, "without_prefix": without}
