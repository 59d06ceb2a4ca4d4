"""What an extraction is asked for, and whether the cache can be that: options, summary, shards, targets, plan. Used by extract only.

What the user leaves out is as the cache has it; what is given must be what the cache has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kdcache.cache import Cache, TeacherLayer
from kdcache.errors import UsageError
from kdcache.format import CacheIdentity
from kdcache.index import read_document
from kdcache.opening import open_to_write
from kdcache.plan import DecoderName, Policy, ResizerName, StoredCodec, ViewPlan, require_same
from kdcache.shards import ShardSource
from kdcache.sources import check_names, default_dataset_id, resolve_shards
from kdcache.store import Store
from kdcache.stored_source import resolve_or_remember
from kdcache.targets import TargetSpec, merge_targets, merge_wishes, parse_target
from kdcache.teacher_card import TeacherCard

DEFAULT_VIEWS = 8
"""Views of a random policy when the user names no number: about 50 suffice for ImageNet logits (research: peers §6)."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, from where, with what. None means: as the cache has it, else the default named."""

    shards: str | Sequence[str]
    """SHARDS, as `kdcache.sources` reads them: a tar, a folder of tars, a brace expression, a glob, a list file, or several of these."""
    cache: str
    """Folder of the cache; made if it is not there."""
    teacher: str
    """timm name, `hf-hub:…` or `local-dir:…`."""
    checkpoint: str | None = None
    """Weights file to load in place of the pretrained ones."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the teacher, e.g. {"img_size": 224}."""
    name: str | None = None
    """The teacher's name in the cache. Default: from its model name."""
    label_key: str | None = None
    """Key of the labels in .json members, e.g. `fine` or `cls.id`. Default: .cls members, else `label` of .json."""
    dataset: str | None = None
    """Dataset id. Default: the shards' common name."""
    methods: Sequence[str] = ()
    """Record what these methods need."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of these methods, as train is given them: what a method needs may depend on them."""
    targets: Sequence[str] = ()
    """Specs. Default: `logits`, unless methods say more."""
    views: int | None = None
    """Views a sample. Default: 8, or 1 for a policy without randomness."""
    augment: str | Policy | None = None
    """Policy, its name, or the YAML file that holds it. Default: weak."""
    size: int | None = None
    """Side of a view, pixels. Default: the teacher's input size."""
    seed: int | None = None
    """Plan seed. Default: 0."""
    decoder: DecoderName | None = None
    """What decodes images. Default: pillow."""
    resizer: ResizerName | None = None
    """What resizes a view's crop. Default: pillow."""
    store_views: StoredCodec | None = None
    """Store the rendered views, so that training and further targets need no tars. Default: no."""
    batch_size: int = 64
    workers: int | None = None
    """Decoding processes; 0: decode in this one. Default: one a core of this process's share, at most 8."""
    device: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Default: fp32."""
    limit_shards: int | None = None
    """Only the first N shards."""
    min_teacher_top1: float = 0.0
    """Stop before the work if the teacher's top-1 on the first labelled views is below this, percent."""


@dataclass
class ExtractSummary:
    """What is there now, and what this run added: this rank of it. The keys of `kdcache extract --json`."""

    shards: int = 0
    """Shards asked for that are complete now."""
    rows: int = 0
    """Samples with a row in these shards; not times views."""
    views: int = 0
    skipped: int = 0
    """Samples without a row in these shards."""
    bytes: int = 0
    """Added by this run: arrays, stored views, tail and calibration, as `inspect` counts them; neither documents nor the index."""
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    """Of these in the teacher and the encoders."""
    resumed_shards: int = 0
    """Shards that were complete before this run and were left alone."""
    problems: list[dict[str, str]] = field(default_factory=list)
    """[{"kind", "shard", "key", "detail"}]: shards that were cut, or could not be done."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3), "teacher_seconds": round(self.teacher_seconds, 3)}


def resolve_sources(config: ExtractConfig, store: Store) -> list[ShardSource]:
    """The shards that SHARDS names; of a cache that stores its views also those that it named when their tars were still there."""
    if store.size("cache.json") is None or read_document(store, "cache.json").identity.plan.stored_views is None:
        return resolve_shards(config.shards, label_key=config.label_key)
    return resolve_or_remember(config.shards, open_to_write(config.cache), label_key=config.label_key)


def requested_specs(config: ExtractConfig, card: TeacherCard, layer: TeacherLayer | None) -> list[TargetSpec]:
    """The targets to record: what the user named, and what the methods need of this teacher; logits where neither is named.

    layer: what the cache has of the teacher. Nodes are absolute where the card knows them. A method's encoding is a wish, since any encoding
    serves any method: one that the user names, or that the cache has, wins, then the wish of the method that was named first.
    Raises UsageError for specs that contradict each other, and for methods that need nothing when no target is named.
    """
    named = merge_targets(card.absolute(parse_target(text)) for text in config.targets)
    wishes: list[TargetSpec] = []
    if config.methods:
        from kdcache.methods import requirements, share_out

        shared = share_out(config.methods, config.settings)
        wishes = [card.absolute(parse_target(text)) for method, settings in shared.items() for text in requirements(method, card, settings)]
    elif config.settings:
        raise UsageError(f"--set {next(iter(config.settings))}: a field of which method? expected --for METHOD beside it")
    settled = [spec.name for spec in named if spec.encoding is not None] + list(layer.targets if layer is not None else ())
    specs = merge_targets([*named, *merge_wishes(wishes, settled)])
    if config.methods and not specs:
        raise UsageError(
            f"--for {' --for '.join(config.methods)}: needs nothing of a teacher; train with it on any cache, or name a --target to record"
        )
    return specs or [parse_target("logits")]


def requested_tail(config: ExtractConfig, card: TeacherCard) -> list[str]:
    """Modules of the teacher that the methods run, in order; none for methods that need no tail. Raises UsageError."""
    if not config.methods:
        return []
    from kdcache.methods import share_out, tail_of

    return tail_of(share_out(config.methods, config.settings), card)


# --- the plan --------------------------------------------------------------------------------------------------------


def policy_of(config: ExtractConfig) -> Policy | None:
    """The policy that was given, read from its file if it is one; None if none was. Raises UsageError."""
    if config.augment is None or isinstance(config.augment, Policy):
        return config.augment
    from kdcache.policy_file import parse_policy

    return parse_policy(config.augment)


def check_given_plan(config: ExtractConfig, cache: Cache, sources: Sequence[ShardSource]) -> None:
    """What the user gave must be what the cache has; what was not given is taken from it. Raises MismatchError."""
    given: dict[str, Any] = {"dataset": config.dataset, "policy": policy_of(config), "size": config.size, "seed": config.seed}
    given |= {"decoder": config.decoder, "resizer": config.resizer, "stored_views": config.store_views}
    if config.dataset is None and not {source.name for source in sources} & set(cache.all_shards):
        given["dataset"] = default_dataset_id(sources)  # other shards altogether: most likely the wrong cache
    asked = cache.plan.model_copy(update={key: value for key, value in given.items() if value is not None})
    require_same("view plan", cache.plan, asked, remedy="a cache holds one plan: use another folder, or leave the option out")
    if config.label_key is not None:
        check_label_key(cache.document.identity, config.label_key)
    check_names(sources, cache.all_shards)


def check_label_key(identity: CacheIdentity, label_key: str | None) -> None:
    """Raise MismatchError for a cache whose labels were read from another place: students would learn from a mixture."""
    found = identity.model_copy(update={"label_key": label_key})
    require_same(
        "labels", identity, found, remedy="all labels of a cache are read from one key (none: .cls, else 'label' of .json): use another folder"
    )


def common_label_key(sources: Sequence[ShardSource]) -> str | None:
    """Where all labels are read from. Raises UsageError for splits of `_info.json` that do not agree on it."""
    keys = sorted({source.label_key for source in sources}, key=str)
    if len(keys) > 1:
        raise UsageError(f"the shards' _info.json files name different labels: {keys}; pass --label-key KEY for one of all")
    return keys[0]


def num_views(config: ExtractConfig, specs: Sequence[TargetSpec], plan: ViewPlan, cache: Cache | None) -> int:
    """Views wanted of targets that name no number. Raises UsageError for several views of a policy without randomness."""
    default = DEFAULT_VIEWS if plan.policy.is_random else 1
    wanted = config.views or (cache.num_views if cache is not None and cache.num_views else default)
    most = max([wanted, *(spec.views or 0 for spec in specs)])
    if most > 1 and not plan.policy.is_random:
        raise UsageError(f"{most} views were asked for, but the policy has no randomness: every view would be the same; expected --views 1")
    return wanted
