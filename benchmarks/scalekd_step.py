"""A ScaleKD step from the cache: where its time goes, against a straightforward version with equal values, and against a live teacher.

    OMP_NUM_THREADS=2 python benchmarks/scalekd_step.py
    OMP_NUM_THREADS=2 python benchmarks/scalekd_step.py --amp --batch-size 8
    python benchmarks/scalekd_step.py --device cuda --amp --channels-last --batch-size 64 --rounds 20
    python benchmarks/scalekd_step.py --small                    (seconds, sizes that say nothing)

Makes images, a randomly initialised teacher and a cache by `extract --for scalekd`, and takes one batch from it. Before anything is timed,
losses and gradients of both versions are compared in float64, to 1e-5. Then interleaves, round by round, whole steps (targets, losses,
backward, optimizer; no loading):

* cached: `kdcache.methods.scalekd`, targets decoded from the cache;
* plain: the same with `plain_losses` below: queries repeated for each image, attention written out, each view through the tail by
  itself, targets normalised for each loss, as the authors' code goes about it;
* live: as cached, but the targets come from the teacher's forward pass over the same images.

Prints the median of each and the ratios; then one more cached step with a clock between its parts, forward and backward apart: marks in the
graph (identities that note the time when the pass goes through them, either way), and the MACs that torch counts there. With one thread on a
CPU the time that it worked is counted, else the time that passed.

Expected, before the first run, of ResNet-50 under Swin-L at 224, GMAC an image and step (products only, backward included): student 12, projectors
40 (two views; each stage 3: convolution 5.5, MLP 2.8, keys and values .9, rest .5; stage 4: 5.5, 2.8, .9, .7), tail 12 (no gradients
of weights). What the views may share without another value is little of that: the learned queries' two layers, 1.4, and reading
the tail's weights once. So: plain / cached at most 1.1; live / cached about (66 + 34) / 66 = 1.5; and on a CPU, at a batch of 4, AdamW over
200 million parameters as dear as a part.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdcache.device import autocast, resolve_device
from kdcache.join import BatchLoader, CachedViews, EpochBatches, to_device
from kdcache.losses import soft_cross_entropy
from kdcache.methods import build, needed, parse_settings
from kdcache.methods.scalekd import TARGET, VIEWS, ScaleKD
from kdcache.opening import open_cache
from kdcache.projector import CrossAttentionProjector
from kdcache.students import build_student
from kdcache.targets import parse_target
from kdcache.teacher import load_teacher
from pipelines.extract import ExtractConfig, extract

SMALL_TEACHER = {
    "img_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1, 2),
    "num_heads": (1, 1, 2, 2),
    "num_classes": 10,
}

# --- the straightforward version -------------------------------------------------------------------------------------


def plain_projector(projector: CrossAttentionProjector, map_BCHW: Tensor, queries_BQC: Tensor | None = None) -> Tensor:
    """What a projector computes, written down as its formula is, image by image."""
    if queries_BQC is None:
        assert projector.queries is not None
        queries_BQC = projector.queries.repeat(len(map_BCHW), 1, 1)

    def heads(tokens_BTC: Tensor) -> Tensor:
        return tokens_BTC.unflatten(2, (projector.num_heads, -1)).transpose(1, 2)

    positioned = (F.relu(projector.norm(projector.convolution(map_BCHW))) + projector.position).flatten(2).transpose(1, 2)
    query = heads(projector.query(F.relu(projector.query_in(queries_BQC))))
    key, value = heads(projector.key(positioned)), heads(projector.value(positioned))
    attended = (query @ key.transpose(-2, -1) * projector.scale).softmax(-1) @ value
    tokens: Tensor = projector.out_norm(projector.out(attended.transpose(1, 2).flatten(2)))
    projected: Tensor = tokens + projector.mlp(tokens)
    return projected


def plain_losses(method: ScaleKD, outputs: Mapping[str, Tensor], targets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`ScaleKD.losses` as the authors' code goes about it: view by view, loss by loss."""
    s3_BCHW, s4_BCHW = (outputs[f"features@{node}"] for node in (method.s3, method.s4))
    target_BTC = targets[TARGET]["grid"]

    def mimicking(tokens_BTC: Tensor, frequency: bool) -> Tensor:
        maps = [one if one.dtype == torch.float64 else one.float() for one in (tokens_BTC, target_BTC)]
        if frequency:
            maps = [one - one.mean(1, keepdim=True) for one in maps]
        student, teacher = (F.normalize(one, dim=2) for one in maps)
        return F.mse_loss(student, teacher, reduction="sum") / len(teacher)

    parts: dict[str, Tensor] = {}
    for view in VIEWS:
        alpha_s3, alpha_s4 = method.alphas[view]
        if alpha_s3 == alpha_s4 == 0:
            continue
        passed_BTC = method.tail(plain_projector(method.projectors[f"s3_{view}"], s3_BCHW), modules=method.s3_modules)["grid"]
        if alpha_s3 > 0:
            parts[f"s3_{view}"] = alpha_s3 * mimicking(passed_BTC, view == "frequency")
        if alpha_s4 > 0:
            asked_BTC = plain_projector(method.projectors[f"s4_{view}"], s4_BCHW, passed_BTC)
            if method.s4_modules:
                asked_BTC = method.tail(asked_BTC, modules=method.s4_modules)["grid"]
            parts[f"s4_{view}"] = alpha_s4 * mimicking(asked_BTC, view == "frequency")
    weight = method.settings.logits_weight
    if weight > 0:
        parts["logits"] = weight * soft_cross_entropy(outputs["logits"], targets["logits"]["logits"], temperature=method.settings.temperature)
    return parts


def assert_equal_values(method: ScaleKD, outputs: Mapping[str, Tensor], targets: Mapping[str, Mapping[str, Tensor]], *, tolerance: float) -> float:
    """Raise AssertionError where a loss, or the gradient of a parameter or of a student's map, differs by more than `tolerance`, relative; the largest difference."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in outputs.items()}
    wanted = {**leaves, **dict(method.projectors.named_parameters())}
    found: list[dict[str, Tensor]] = []
    for parts in (method.losses(leaves, torch.empty(0), targets), plain_losses(method, leaves, targets)):
        gradients = torch.autograd.grad(torch.stack([*parts.values()]).sum(), [*wanted.values()], allow_unused=True)
        by_name = {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
        found.append({name: part.detach() for name, part in parts.items()} | by_name)
    ours, plain = found
    assert list(ours) == list(plain)
    scale = max(float(value.norm()) for name, value in plain.items() if name.startswith("gradient"))
    largest = 0.0
    for name, expected in plain.items():
        # a key's bias moves all logits of a query alike: its gradient is zero but for rounding
        size = max(float(expected.norm()), 1e-6 * scale) if name.startswith("gradient") else float(expected.norm())
        distance = float((ours[name] - expected).norm()) / size
        assert distance <= tolerance, f"{name}: relative distance {distance:.2g}, expected at most {tolerance}"
        largest = max(largest, distance)
    return largest


def now(device: torch.device) -> float:
    """Seconds: of a single thread on a CPU those that it worked, so that a busy neighbour counts for little; else those that passed."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


# --- the clock -------------------------------------------------------------------------------------------------------


class _Mark(torch.autograd.Function):
    """The identity; tells the clock when either pass comes through."""

    @staticmethod
    def forward(ctx: Any, clock: SectionClock, ended: str, ended_backward: str, *tensors: Tensor) -> Any:
        ctx.clock, ctx.ended = clock, ended_backward
        clock.lap(ended)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.clock.lap(ctx.ended)
        return (None, None, None, *gradients)


class SectionClock:
    """Seconds and MACs by section of one step. The engine runs the backward pass in the reverse order of the forward pass, so marks bound sections there too."""

    def __init__(self, device: torch.device, counter: FlopCounterMode | None) -> None:
        self._device, self._counter = device, counter
        self.seconds: dict[str, float] = {}
        self.macs: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return now(self._device), self._counter.get_total_flops() / 2 if self._counter is not None else 0.0

    def lap(self, ended: str) -> None:
        """Charge the time since the last lap to the section that ended."""
        now = self._now()
        for sums, value in zip((self.seconds, self.macs), (now[0] - self._last[0], now[1] - self._last[1]), strict=True):
            sums[ended] = sums.get(ended, 0.0) + value
        self._last = self._now()

    def _marked(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        rest = "losses"

        def call(*args: Any, **options: Any) -> Any:
            tensors = [one for one in args if isinstance(one, Tensor)]
            entered = iter(_Mark.apply(self, rest, f"{section}, backward", *tensors))
            result = function(*(next(entered) if isinstance(one, Tensor) else one for one in args), **options)
            names, values = ([*result], [*result.values()]) if isinstance(result, dict) else (None, [result])
            left = _Mark.apply(self, f"{section}, forward", f"{rest}, backward", *values)
            return dict(zip(names, left, strict=True)) if names is not None else left[0]

        return call

    @contextmanager
    def installed(self, method: ScaleKD) -> Iterator[None]:
        """Marks around the student, every projector and the tail while this lasts."""
        watched: list[tuple[str, Any, str]] = [("student", method, "run_student"), ("tail", method.tail, "forward")]
        watched += [(f"projectors of stage {name[1]}", projector, "forward") for name, projector in method.projectors.items()]
        for section, owner, name in watched:
            setattr(owner, name, self._marked(section, getattr(owner, name)))
        try:
            yield
        finally:
            for _, owner, name in watched:
                delattr(owner, name)


# --- the run ---------------------------------------------------------------------------------------------------------


def make_shard(path: Path, *, num_samples: int, size: int) -> None:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(num_samples):
            image = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
                (size * 8 // 7, size * 8 // 7), Image.Resampling.BICUBIC
            )
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            for extension, data in (("jpg", buffer.getvalue()), ("cls", str(i % 10).encode())):
                info = tarfile.TarInfo(f"s{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="swin_large_patch4_window7_224")
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16, the live teacher too")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--small", action="store_true", help="a tiny teacher and student at 64 pixels")
    args = parser.parse_args()
    if args.small:
        args.teacher, args.student = "swin_tiny_patch4_window7_224", "resnet10t"
    device, precision = resolve_device(args.device), "bf16" if args.amp else "fp32"

    import timm
    from timm.models import save_for_hf
    from timm.optim import create_optimizer_v2

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        torch.manual_seed(0)
        teacher_args: dict[str, Any] = SMALL_TEACHER if args.small else {}
        model = timm.create_model(args.teacher, **teacher_args)
        save_for_hf(model, str(root / "teacher"), safe_serialization=True, model_args=teacher_args)
        make_shard(root / "shards" / "bench-0000.tar", num_samples=args.batch_size, size=model.patch_embed.img_size[0])
        source = f"local-dir:{root / 'teacher'}"
        del model
        extract(
            ExtractConfig(shards=str(root / "shards"), cache=str(root / "cache"), teacher=source, methods=("scalekd",), views=1, workers=0,
                          batch_size=args.batch_size, precision=precision, device=args.device)
        )  # fmt: skip
        cache = open_cache(root / "cache")
        teacher = load_teacher(source, precision=precision, device=device)
        settings = parse_settings("scalekd", {})
        layer, targets = needed("scalekd", settings, cache)
        assert layer is not None
        encodings = {target: cache.encoding(layer.name, target) for target in targets}
        resolved = list(teacher.resolve([parse_target(target) for target in targets]).values())
        num_classes = layer.document.identity.num_classes
        student = build_student(args.student, num_classes=num_classes, view_size=cache.plan.size)
        torch.manual_seed(0)
        built = build("scalekd", student=student.model, cache=cache)
        assert isinstance(built, ScaleKD)
        method: ScaleKD = built
        batches = EpochBatches(np.arange(len(cache.rows)), batch_size=args.batch_size, num_views=1, seed=0)
        dataset = CachedViews(cache, teacher=layer.name, targets=targets, parts=method.target_parts(), check_views=0.0)
        loader = BatchLoader(dataset, batches, num_workers=0)
        batch = next(iter(loader.epoch(0)))
        loader.close()
        views, labels = batch["views"].to(device), batch["labels"].to(device)
        components = {name: to_device(batch["targets"][name], device) for name in encodings}
        normalize = student.normalize().to(device)
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, {args.student} under {args.teacher}, {precision},"
            f" {'channels_last' if args.channels_last else 'contiguous'}, batch of {args.batch_size}"
        )

        method.train()
        with torch.no_grad():
            outputs = method.run_student(student.normalize()(batch["views"][:2]))
        double = {name: tensor.double() for name, tensor in outputs.items()}
        values = {name: {part: t[:2].double() for part, t in encoding.decode(batch["targets"][name]).items()} for name, encoding in encodings.items()}
        largest = assert_equal_values(method.double(), double, values, tolerance=1e-5)
        method.float().to(device)
        print(f"losses and gradients in float64: cached and plain apart by {largest:.1g} at most")
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        method.to(memory_format=memory_format)
        optimizer = create_optimizer_v2(method, opt="adamw", lr=1e-6)

        def normalized() -> Tensor:
            images = normalize(views)
            return images.contiguous(memory_format=memory_format)

        def step(kind: str, clock: SectionClock | None = None) -> None:
            def lap(section: str) -> None:
                if clock is not None:
                    clock.lap(section)

            if kind == "live":
                wanted = teacher(views, resolved)
            else:
                wanted = {name: encoding.decode(components[name]) for name, encoding in encodings.items()}
            lap("targets")
            with autocast(device, precision):
                if kind == "plain":
                    parts = plain_losses(method, outputs := method.run_student(normalized()), wanted)
                    parts["task"] = method.weights(method.settings)[1] * F.cross_entropy(outputs["logits"].float(), labels, label_smoothing=0.1)
                else:
                    parts = method(normalized(), labels, wanted)
            loss = torch.stack([*parts.values()]).sum()
            lap("losses")
            optimizer.zero_grad()
            loss.backward()
            lap("student, backward")
            optimizer.step()
            lap("optimizer")

        def timed(kind: str) -> float:
            begin = now(device)
            step(kind)
            return now(device) - begin

        times: dict[str, list[float]] = {"cached": [], "plain": [], "live": []}
        for kind in times:
            step(kind)
        for _ in range(args.rounds):
            for kind, spent in times.items():
                spent.append(timed(kind))
        print(f"\n{'step':8} {'median ms':>10} {'fastest':>9} {'/ cached':>9}")
        for kind, spent in times.items():
            ratio = statistics.median(one / ours for one, ours in zip(spent, times["cached"], strict=True))
            print(f"{kind:8} {1e3 * statistics.median(spent):10.1f} {1e3 * min(spent):9.1f} {ratio:9.3f}")

        clocks: list[SectionClock] = []
        for _ in range(args.rounds):
            clock = SectionClock(device, None)
            with clock.installed(method):
                step("cached", clock)
            clocks.append(clock)
        with FlopCounterMode(display=False) as counter:
            counted = SectionClock(device, counter)
            with counted.installed(method):
                step("cached", counted)
        medians = {section: statistics.median(clock.seconds[section] for clock in clocks) for section in clocks[0].seconds}
        total = sum(medians.values())
        print(f"\n{'of a cached step':32} {'ms':>9} {'share':>8} {'GMAC an image':>14}")
        for section, seconds in sorted(medians.items(), key=lambda item: -item[1]):
            print(f"{section:32} {1e3 * seconds:9.1f} {100 * seconds / total:6.1f} % {counted.macs[section] / args.batch_size / 1e9:14.2f}")
        print(f"{'together':32} {1e3 * total:9.1f} {'':8} {sum(counted.macs.values()) / args.batch_size / 1e9:14.2f}")
        for kind in ("plain", "live"):
            with FlopCounterMode(display=False) as counter:
                step(kind)
            print(f"{kind + ', together':32} {'':9} {'':8} {counter.get_total_flops() / 2 / args.batch_size / 1e9:14.2f}")


if __name__ == "__main__":
    main()
