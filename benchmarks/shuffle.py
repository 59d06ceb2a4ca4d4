"""How well `--shuffle block` mixes, against `full`, on data in a random order and on data sorted by label, the worst case.

    OMP_NUM_THREADS=1 python benchmarks/shuffle.py
    OMP_NUM_THREADS=1 python benchmarks/shuffle.py --digits DIR          # the folder of a finished `kdcache quickstart DIR`

First the orders themselves, of a data set of ImageNet's size: 1,281,167 rows of 111 kB and 1,000 classes in 1,024 shards, batches of 128. Printed are means over the batches
of an epoch (worst batch in brackets) of: shards and blocks that a batch draws from; labels in it; its largest share of one label; labels that it shares with the batch
before; then the rank correlation of a row's place in two epochs, and how often two rows that were in one batch are again in the next epoch, over what chance would give.
Then what storage is asked for a batch: requests, and MB read for its rows' images (what a page cache that holds a window leaves to be read).

With --digits: top-1 of a small ViT after 600 steps, by labels and from the cache, over seeds: full; block on rows in random order; block on rows sorted by label. The digits
are few, so blocks are of 16 rows: a window of 8 holds 9 % of the rows, one of 3 hardly more than a batch.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.methods import build
from kdcache.opening import open_cache
from kdcache.order import Blocks, Order, block_order, epoch_order
from kdcache.shards import scan_shard
from kdcache.sources import resolve_shards
from kdcache.students import build_student
from pipelines.quickstart import NUM_CLASSES, STUDENT_ARGS, TEACHER_MODEL

ROWS, CLASSES, SHARDS, IMAGE_BYTES, BATCH = 1_281_167, 1000, 1024, 111_000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--digits", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    describe_orders(args.rows)
    if args.digits is not None:
        train_on_digits(args.digits, seeds=args.seeds, steps=args.steps)


# --- orders ----------------------------------------------------------------------------------------------------------


def describe_orders(num_rows: int) -> None:
    blocks = Blocks.fitting(np.full(num_rows, IMAGE_BYTES, np.int64))
    print(
        f"{num_rows:,} rows of {IMAGE_BYTES / 1e3:.0f} kB; blocks of {blocks.rows} rows, {blocks.rows * IMAGE_BYTES / 1e6:.1f} MB, {blocks.window} in a window"
    )
    header = ("order, data", "shards", "blocks", "labels", "largest share %", "kept labels", "correlation", "together again", "requests", "MB read")
    print(" | ".join(header))
    shard = np.arange(num_rows) * SHARDS // num_rows
    by_label = np.arange(num_rows) * CLASSES // num_rows
    mixed = by_label[np.random.default_rng(0).permutation(num_rows)]
    for name, order_of in (
        ("full", lambda epoch: epoch_order(num_rows, 42, epoch)),
        ("block", lambda epoch: block_order(num_rows, 42, epoch, blocks)),
    ):
        orders = [order_of(epoch) for epoch in (0, 1)]
        for data, labels in (("random", mixed), ("sorted", by_label)):
            print(" | ".join((f"{name}, {data}", *describe(orders, shard, labels, blocks, is_block=name == "block"))), flush=True)


def describe(orders: list[Order], shard: Any, labels: Any, blocks: Blocks, *, is_block: bool) -> list[str]:
    first = orders[0][: len(orders[0]) // BATCH * BATCH].reshape(-1, BATCH)
    of_labels = np.sort(labels[first], axis=1)
    distinct_labels = 1 + (np.diff(of_labels, axis=1) != 0).sum(axis=1)
    sample = np.linspace(0, len(first) - 1, 2000).astype(int)
    largest = np.array([np.bincount(labels[first[i]]).max() for i in sample]) / BATCH
    kept = [len(np.intersect1d(labels[first[i]], labels[first[i - 1]])) / distinct_labels[i] for i in sample[1:]]
    places = [np.argsort(order) for order in orders]
    correlation = np.corrcoef(*places)[0, 1]
    batch_then = places[1] // BATCH
    pairs = batch_then[first[sample]]
    again = np.mean([(np.bincount(row - row.min()) * (np.bincount(row - row.min()) - 1)).sum() for row in pairs]) / (BATCH * (BATCH - 1))
    requests, read = BATCH, BATCH * IMAGE_BYTES
    if is_block:  # each block once, in one run
        requests = BATCH / blocks.rows  # type: ignore[assignment]
    return [
        worst(distinct(shard[first]), min), worst(distinct(first // blocks.rows), min), worst(distinct_labels, min),
        f"{100 * largest.mean():.1f} ({100 * largest.max():.1f})", f"{100 * statistics.mean(kept):.0f} %", f"{correlation:+.4f}",
        f"{again * len(orders[0]) / BATCH:.2f} ×", f"{requests:.1f}", f"{read / 1e6:.1f}",
    ]  # fmt: skip


def distinct(values: Any) -> Any:
    """How many different values each row has."""
    return 1 + (np.diff(np.sort(values, axis=1), axis=1) != 0).sum(axis=1)


def worst(values: Any, which: Any) -> str:
    return f"{values.mean():.1f} ({which(values.tolist())})"


# --- digits ----------------------------------------------------------------------------------------------------------


def train_on_digits(folder: Path, *, seeds: int, steps: int) -> None:
    cache = open_cache(folder / "cache")
    rows = np.random.default_rng(0).permutation(len(cache.rows))
    by_label = rows[np.argsort(cache.rows.label[rows], kind="stable")]
    wide, narrow = Blocks(rows=16, window=8), Blocks(rows=16, window=3)
    orders: dict[str, tuple[Any, Blocks | None]] = {
        "full": (rows, None), "block, random": (rows, wide), "block, sorted": (by_label, wide), "narrow, sorted": (by_label, narrow)
    }  # fmt: skip
    print(
        f"digits: top-1 % after {steps} steps, mean ± standard deviation over {seeds} seeds; {len(rows)} rows, 16 a block, 8 blocks in a window (narrow: 3)"
    )
    print("method | " + " | ".join(orders))
    for method in ("ce", "kd"):
        cells: list[str] = []
        for numbers, blocks in orders.values():
            found = [top1(cache, method, numbers, blocks, seed=seed, steps=steps, val=folder / "shards" / "val") for seed in range(seeds)]
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found) if seeds > 1 else 0:.1f}")
        print(f"{method} | " + " | ".join(cells), flush=True)


def top1(cache: Cache, method: str, row_numbers: Any, blocks: Blocks | None, *, seed: int, steps: int, val: Path) -> float:
    """Train the quickstart's student; top-1 of its last weights."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    student = build_student(TEACHER_MODEL, num_classes=NUM_CLASSES, view_size=cache.plan.size, model_args=STUDENT_ARGS, seed=seed)
    module = build(method, student=student.model, cache=cache, settings={"temperature": 2.0, "task_loss_weight": 0.0} if method == "kd" else {})
    normalize, targets = student.normalize(), ("logits",) if method == "kd" else ()
    decoders = {name: cache.encoding(cache.layer(None).name, name) for name in targets}
    batches = EpochBatches(row_numbers, batch_size=64, num_views=cache.num_views, seed=seed, blocks=blocks)
    loader = BatchLoader(CachedViews(cache, targets=targets, check_views=0.0), batches, num_workers=0)
    optimizer = create_optimizer_v2(module, opt="adamw", lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)
    module.train()
    for step in range(steps):
        if step % len(batches) == 0:
            epoch = loader.epoch(step // len(batches))
        batch = next(epoch)
        values = {name: decoder.decode(batch["targets"][name]) for name, decoder in decoders.items()}
        scheduler.step_update(step)
        loss = torch.stack(list(module(normalize(batch["views"]), batch["labels"], values).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    loader.close()
    indexes = tuple(scan_shard(source) for source in resolve_shards(str(val)))
    return Evaluator(EvaluationSet(indexes, student, crop_pct=1.0), batch_size=256, num_workers=0)(student.model, torch.device("cpu")).top1


if __name__ == "__main__":
    main()
