"""What a command asks of stage two: TrainConfig, checked. Nothing is opened or built here. First step of train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcache.errors import UsageError
from kdcache.join import DEFAULT_PREFETCH_BYTES
from kdcache.launch import default_workers, read_launch
from kdcache.methods import TeacherChoice

SCHEDULES = ("cosine", "tanh", "constant", "none")
"""timm's schedules that need no options beyond ours."""

SHUFFLES = ("auto", "full", "block")

AMP_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
"""timm's names of them → ours."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how. Names and defaults follow timm's train.py; None means: the default named."""

    cache: str
    """Folder of the cache."""
    students: Sequence[str]
    """timm names, `hf-hub:…` or `local-dir:…`; trained one after another, or in gangs."""
    method: str = "kd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method."""
    teacher: TeacherChoice = None
    """Its name in the cache. Default: the only one. Several teach at once: their names, or name → weight in the loss."""
    data: str | None = None
    """SHARDS, where the tars lie now. Default: where they lay when the cache was made."""
    val: str | None = None
    """SHARDS to measure accuracy on. Default: none."""
    label_key: str | None = None
    """Key of the labels in the .json members of `val`. Default: as the cache's labels were read."""
    val_interval: int = 1
    """Epochs between two measurements; the last epoch is always measured."""
    val_crop_pct: float | None = None
    """Share of the side that the evaluation crop keeps. Default: the student's own."""
    out: str = "runs"
    limit_shards: int | None = None
    """Train on the first N shards of the cache only."""
    views: int | None = None
    """V: train on the first V views. Default: all that every shard has of what the method needs."""
    pretrained: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments of the students."""
    num_classes: int | None = None
    """Default: the teacher's if the method uses logits, else the largest label + 1."""

    epochs: int = 100
    batch_size: int = 128
    """Of one process: with several, a batch each."""
    grad_accum_steps: int = 1
    """Batches of each process in one update."""
    seed: int = 42
    """Of the student's weights, its dropout and the order of the rows."""
    shuffle: str = "auto"
    """One of SHUFFLES. full: a permutation of all rows. block: of blocks of neighbours, mixed in a window of at most 512 MiB of images, so that storage is read in
    long runs. auto: block where cache or tars lie on a network file system and are not sorted by label, else full."""
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    """Of optimizers that have one, such as sgd."""
    opt_betas: tuple[float, float] | None = None
    """Default: the optimizer's own."""
    clip_grad: float | None = None
    """Largest gradient norm. Default: no clipping."""
    sched: str = "cosine"
    """One of SCHEDULES; stepped after every update."""
    warmup_epochs: float | None = None
    """Default: 5, or a tenth of the epochs if that is less."""
    min_lr: float = 0.0
    amp: bool = False
    """Autocast, in training and evaluation: products in half precision, sums, norms of losses and weights in float32."""
    amp_dtype: str = "float16"
    """One of AMP_DTYPES; float16 scales the loss, so that small gradients are not lost."""
    sync_bn: bool = False
    """With several processes: BatchNorms take the statistics of the batches of all."""
    torchcompile: str | None = None
    """Backend of torch.compile for the student's pass, such as inductor. Default: not compiled."""

    model_ema: bool = False
    """Keep a moving average of the student's weights: timm's ModelEmaV3. It is evaluated too, and is what is exported."""
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    """Begin with a smaller decay, for runs of few updates."""

    kd_temperature: float | None = None
    """The method's field `temperature`; likewise the three below."""
    distill_loss_weight: float | None = None
    task_loss_weight: float | None = None
    smoothing: float | None = None

    check_views: float = 0.05
    """Fraction of views whose pixels are compared with the digest of what the teacher saw."""
    workers: int | None = None
    """Loading processes; 0: load in this one. Default: one a core, at most 8; of several processes each its share of the cores."""
    prefetch_bytes: int = DEFAULT_PREFETCH_BYTES
    """The most that batches hold which are being loaded or wait for their step."""
    device: str | None = None
    """Default: cuda, else mps, else cpu. Of several processes each takes a GPU of its own."""
    channels_last: bool = False
    """Maps and convolutions with channels innermost: another speed, the same values but for rounding."""
    log_interval: int = 50
    """Steps between lines in metrics.jsonl."""
    recovery_interval: int | None = None
    """Steps between checkpoints within an epoch; 0: at its end only. Default: one every ten minutes."""
    log_tensorboard: bool = False
    """Event files in the run's tensorboard/."""
    log_wandb: bool = False
    wandb_project: str = "kdcache"
    resume: bool = False
    """Continue unfinished runs."""
    allow_other_cache: bool = False
    """With `resume`: continue a run that was begun with another cache or other rows."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that can't be right."""
        checks: list[tuple[str, Any, bool, str]] = [
            ("--student", list(self.students), len(self.students) > 0, "at least one"),
            ("--epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("--grad-accum-steps", self.grad_accum_steps, self.grad_accum_steps >= 1, "at least 1"),
            ("--lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a number above 0"),
            ("--min-lr", self.min_lr, math.isfinite(self.min_lr) and self.min_lr >= 0, "a number from 0"),
            ("--weight-decay", self.weight_decay, math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a number from 0"),
            ("--clip-grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "a number above 0"),
            ("--warmup-epochs", self.warmup_epochs, self.warmup_epochs is None or self.warmup_epochs >= 0, "a number from 0"),
            ("--check-views", self.check_views, 0 <= self.check_views <= 1, "a fraction from 0 to 1"),
            ("--val-crop-pct", self.val_crop_pct, self.val_crop_pct is None or 0 < self.val_crop_pct <= 1, "a fraction above 0, at most 1"),
            ("--limit-shards", self.limit_shards, self.limit_shards is None or self.limit_shards >= 1, "at least 1"),
            ("--views", self.views, self.views is None or self.views >= 1, "at least 1"),
            ("--val-interval", self.val_interval, self.val_interval >= 1, "at least 1"),
            ("--num-classes", self.num_classes, self.num_classes is None or self.num_classes >= 1, "at least 1"),
            ("--log-interval", self.log_interval, self.log_interval >= 1, "at least 1"),
            ("--recovery-interval", self.recovery_interval, self.recovery_interval is None or self.recovery_interval >= 0, "at least 0"),
            ("--model-ema-decay", self.model_ema_decay, 0 <= self.model_ema_decay < 1, "a number from 0, below 1"),
            ("--sched", self.sched, self.sched in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("--shuffle", self.shuffle, self.shuffle in SHUFFLES, f"one of {', '.join(SHUFFLES)}"),
            ("--prefetch-bytes", self.prefetch_bytes, self.prefetch_bytes >= 1, "at least 1"),
            ("--amp-dtype", self.amp_dtype, self.amp_dtype in AMP_DTYPES, f"one of {', '.join(AMP_DTYPES)}"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "a whole number from 0, below 2^63"),
        ]
        for option, value, holds, expected in checks:
            if not holds:
                raise UsageError(f"{option} {value!r}: expected {expected}")
        if self.allow_other_cache and not self.resume:
            raise UsageError("--allow-other-cache: a run begun now has no other cache; expected it with --resume")

    @property
    def precision(self) -> str:
        """As `kdcache.device.autocast` calls it."""
        return AMP_DTYPES[self.amp_dtype] if self.amp else "fp32"

    @property
    def num_workers(self) -> int:
        """Loading processes."""
        return default_workers(read_launch().cores) if self.workers is None else self.workers
