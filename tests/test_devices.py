"""Both stages on a pretended GPU (`pretended_device`): the same results as on the CPU, nothing on the wrong device, one wait of the host a step."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import TINY_VIT, make_shards, make_teacher_dir, start
from pretended_device import SYNC_BN_KERNELS, Pretended, Transfer, is_on_device
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

import kdcache.methods
from kdcache import open_cache
from kdcache.checkpoint import load_checkpoint
from kdcache.dataset import Decoder
from kdcache.device import HostCopies, resolve_device
from kdcache.distributed import joined
from kdcache.encodings import Encoding, TargetShape, build_encoding
from kdcache.errors import CorruptError, TeacherError
from kdcache.evaluate import Evaluator
from kdcache.feature_maps import Noise
from kdcache.jobs import TargetSegment
from kdcache.join import to_device
from kdcache.methods.scalekd import ScaleKD
from kdcache.teacher import Teacher
from kdcache.workers import Room, pack
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train, train_configs
from pipelines.training import gang
from pipelines.training.loop import StudentLoop

TARGETS = {
    "a": ("logits", "features@norm:int8", "features@blocks.0:int8", "features@blocks.1:klt=0.9"),
    "b": ("logits:topk=3", "features@norm:dct", "features@blocks.0:bf16", "features@blocks.1:fp16"),
}
"""Teacher → targets: every encoding."""
STUDENT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CNN = {"channels": [8, 8, 16, 16]}
BF16, FP16 = {"amp": True, "amp_dtype": "bfloat16"}, {"amp": True, "amp_dtype": "float16"}


def make(folder: Path, cache: str, device: str) -> None:
    for name, targets in TARGETS.items():
        extract(
            ExtractConfig(
                shards=str(folder / "shards"), cache=str(folder / cache), teacher=f"local-dir:{folder / 'teacher'}", name=name, targets=targets,
                methods=("scalekd",) if name == "a" else (), views=2, workers=0, device=device, batch_size=4, augment="3aug",
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, of five more the accuracy is measured, a teacher, and cache/ made on the CPU."""
    folder = tmp_path_factory.mktemp("devices")
    make_shards(folder / "shards", num_shards=1, num_samples=12)
    make_shards(folder / "val", num_shards=1, num_samples=5)
    make_teacher_dir(folder / "teacher")
    make(folder, "cache", "cpu")
    return folder


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_cache_made_on_a_gpu_is_the_one_made_on_the_cpu(folder: Path, kind: str) -> None:
    with Pretended(kind) as device:
        make(folder, kind, kind)
    assert open_cache(folder / kind).root == open_cache(folder / "cache").root
    if kind == "mps":
        assert all(one.blocks for one in device.transfers if one.kind == "to device")


# --- stage one -------------------------------------------------------------------------------------------------------


def make_twice(folder: Path, cache: Path, device: str) -> None:
    """Views are added to a cache whose targets are not all in the first: a job then has two segments. Batches do not divide them."""
    for views, targets in ((1, ("logits",)), (3, ("logits", "features@norm:int8"))):
        extract(
            ExtractConfig(
                shards=str(folder / "shards"), cache=str(cache), teacher=f"local-dir:{folder / 'teacher'}", name="a", targets=targets, views=views,
                workers=0, device=device, batch_size=5,
            )
        )  # fmt: skip


def measured(cache: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_bytes())["measured"] for path in sorted(cache.glob("teachers/a/*.json"))}


def at_each_batch(monkeypatch: pytest.MonkeyPatch, then: Callable[[int, dict[str, dict[str, Tensor]]], None]) -> None:
    """Call `then` with the number and the values of each batch of a segment when the teacher has been run; not of calibration."""
    call, numbers = Teacher.__call__, count()

    def calling(teacher: Teacher, *arguments: Any) -> dict[str, dict[str, Tensor]]:
        values = call(teacher, *arguments)
        if sys._getframe(1).f_globals["__name__"] == "kdcache.jobs":
            then(next(numbers), values)
        return values

    monkeypatch.setattr(Teacher, "__call__", calling)


def test_a_gpu_has_its_next_batch_before_the_host_waits_for_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_twice(folder, tmp_path / "cpu", "cpu")
    segments: dict[Path, list[Transfer]] = {}
    with Pretended() as device, monkeypatch.context() as patches:
        at_each_batch(patches, lambda number, values: device.note("forward", f"batch {number}", blocks=False))

        def noting(work: Callable[..., None]) -> Callable[..., None]:
            def call(segment: TargetSegment, *arguments: Any, **options: Any) -> None:
                with device.noted() as found:
                    work(segment, *arguments, **options)
                segments.setdefault(segment.folder, []).extend(found)

            return call

        patches.setattr(TargetSegment, "add", noting(TargetSegment.add))
        patches.setattr(TargetSegment, "finish", noting(TargetSegment.finish))
        make_twice(folder, tmp_path / "cuda", "cuda")
    turns = ["".join(one.kind[0] for one in found if one.kind in ("forward", "wait")) for found in segments.values()]
    assert turns == ["ffwfww", "ffwfww", "ffwfwfwfww"]
    for found in segments.values():
        later = found[[one.what for one in found].index("event") :]  # the first batch moves constants there
        assert not any(one.blocks for one in later)
        assert all(one.is_pinned for one in later if one.kind in ("to device", "to host"))
    assert open_cache(tmp_path / "cuda").root == open_cache(tmp_path / "cpu").root
    assert measured(tmp_path / "cuda") == measured(tmp_path / "cpu"), "sums of float64, to the last bit"


def test_values_that_are_not_finite_in_a_batch_on_its_way_are_told_with_their_own_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []

    def spoil(number: int, values: dict[str, dict[str, Tensor]]) -> None:
        launched.append(number)
        if number == 1:
            with torch.inference_mode():
                values["logits"]["logits"][3, 2] = torch.inf

    with Pretended(), monkeypatch.context() as patches:
        at_each_batch(patches, spoil)
        with pytest.raises(TeacherError, match=r"shard train-0000: key 's0008', view 0: .* 'logits' that are not finite"):
            make_twice(folder, tmp_path / "cache", "cuda")
    assert launched == [0, 1, 2]
    require_nothing_of_the_shard(tmp_path / "cache")


def test_a_batch_on_its_way_is_dropped_with_its_job(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, values: dict[str, dict[str, Tensor]]) -> None:
        if number == 1:
            raise RuntimeError("CUDA error: unspecified launch failure")

    with Pretended() as device:
        with monkeypatch.context() as patches:
            at_each_batch(patches, fail)
            with pytest.raises(RuntimeError, match="launch failure") as raised:
                make_twice(folder, tmp_path / "cuda", "cuda")
        gc.collect()
        assert device.underway and not [one for one in gc.get_objects() if type(one) is HostCopies], raised
        require_nothing_of_the_shard(tmp_path / "cuda")
        make_twice(folder, tmp_path / "cuda", "cuda")
    make_twice(folder, tmp_path / "cpu", "cpu")
    assert open_cache(tmp_path / "cuda").root == open_cache(tmp_path / "cpu").root


def require_nothing_of_the_shard(cache: Path) -> None:
    assert not [path for path in cache.rglob("*") if "train-0000" in path.name or "spool" in path.name], "no group, record or spool"


# --- stage two -------------------------------------------------------------------------------------------------------


class Steps:
    """What every student's step has to do with the host, and every evaluation."""

    def __init__(self, device: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[Transfer]] = []
        self.evaluations: list[list[Transfer]] = []
        step, evaluate = gang._Member.train_step, Evaluator.__call__

        def noting_step(member: Any, batch: Any) -> None:
            with device.noted() as found:
                step(member, batch)
            self.steps.append(found)

        def noting_evaluation(evaluator: Any, *arguments: Any) -> Any:
            with device.noted() as found:
                result = evaluate(evaluator, *arguments)
            self.evaluations.append(found)
            return result

        monkeypatch.setattr(gang._Member, "train_step", noting_step)
        monkeypatch.setattr(Evaluator, "__call__", noting_evaluation)


def config_of(folder: Path, out: Path, device: str, **options: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "students": (TINY_VIT,), "model_kwargs": STUDENT, "epochs": 1, "batch_size": 3, "workers": 0, "check_views": 0.0, "log_interval": 1,
        "opt": "sgd", "lr": 1e-2, "warmup_epochs": 0.0,
    }  # fmt: skip
    return TrainConfig(cache=str(folder / "cache"), out=str(out), device=device, **given | options)


def run(folder: Path, out: Path, device: str, **options: Any) -> dict[str, Any]:
    """A run's last checkpoint, with its export."""
    (entry,) = train(config_of(folder, out, device, **options))
    return {**load_checkpoint(Path(entry["path"], "last", "checkpoint.pt")), "export": load_file(Path(entry["path"], "export", "model.safetensors"))}


def require_near(found: Any, expected: Any, tolerance: float) -> None:
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


METHODS: list[tuple[str, tuple[str, ...] | None, dict[str, Any]]] = [
    ("ce", None, {"opt": "adamw"}),
    ("kd", ("a",), {}),
    ("kd", ("b",), {}),
    ("dkd", ("a",), {}),
    ("wsld", ("a",), {}),
    ("uskd", None, {}),
    ("mimic", ("a",), {"settings": {"node": "blocks.1"}, **BF16, "clip_grad": 1.0, "model_ema": True, "grad_accum_steps": 2}),
    ("mgd", ("b",), {"students": ("resnet10t",), "model_kwargs": CNN, "channels_last": True, "model_ema": True}),
    ("frequency", ("b",), {"students": ("resnet10t",), "model_kwargs": CNN}),
    ("vitkd", ("b",), BF16),
    ("scalekd", ("a",), {"clip_grad": 1.0}),
    ("scalekd", ("a",), {"settings": {"logits": "head"}, **FP16}),
    ("nkd+vitkd", ("a", "b"), {"opt": "adamw"}),
]


def test_every_method_is_tried() -> None:
    assert {part for method, *_ in METHODS for part in method.split("+")} == set(kdcache.methods.METHODS)


@pytest.mark.parametrize(("method", "teachers", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_run_on_a_gpu_gives_what_one_on_the_cpu_gives_and_waits_once_a_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, teachers: tuple[str, ...] | None, options: dict[str, Any]
) -> None:
    given = {"method": method, "teacher": teachers, "val": str(folder / "val") if "model_ema" in options else None, **options}
    expected = run(folder, tmp_path / "cpu", "cpu", **given)
    with Pretended() as device:
        noted = Steps(device, monkeypatch)
        found = run(folder, tmp_path / "cuda", "cuda", **given)
    tolerance = 2e-2 if options.get("amp") else 1e-4
    require_near(found["method"], expected["method"], tolerance)
    require_near(found["export"], expected["export"], tolerance)
    assert found["history"][0]["train_loss"] == pytest.approx(expected["history"][0]["train_loss"], rel=tolerance)
    assert found["history"][0].get("eval_top1") == expected["history"][0].get("eval_top1")
    assert len(noted.evaluations) == 2 * ("model_ema" in options)
    assert not any(is_on_device(one) for one in found["method"].values() if isinstance(one, Tensor))

    every = options.get("grad_accum_steps", 1)
    for number, transfers in enumerate(noted.steps[every:], every):  # the first moves constants there
        waits = [one for one in transfers if one.blocks]  # for the loss and its parts; of float16 the scaler asks whether gradients are finite
        is_last = (number + 1) % every == 0
        assert [one.what.partition(" (")[0] for one in waits[:1]] == ["tolist of"] * is_last, waits
        assert {one.kind for one in transfers if not one.blocks} == {"to device"}
        assert [one.where for one in waits[1:]] == ["pipelines.training.loop._step"] * (is_last and options.get("amp_dtype") == "float16")
        assert sum(not one.blocks and not one.is_pinned for one in transfers) <= ("mgd" in method) + ("vitkd" in method) * len(
            teachers or ()
        )  # masks
    for transfers in noted.evaluations:
        assert Counter(one.kind for one in transfers if one.blocks) == {"wait": 1}
        assert all(one.is_pinned for one in transfers if one.kind == "to device")


def test_methods_of_one_batch_on_a_gpu_move_it_there_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gang, whose members have adapters, masks and dropout of their own: each is what it is alone, and draws from the device's generator as it would alone."""
    configs = [{"method": "kd", "teacher": ("a",), "model_kwargs": STUDENT | {"drop_rate": 0.5}}, {"method": "mgd", "teacher": ("a",)}]
    with Pretended():
        alone = [run(folder, tmp_path / "alone", "cuda", **config) for config in configs]
    with Pretended() as device:
        noted = Steps(device, monkeypatch)
        together = list(train_configs([config_of(folder, tmp_path / "gang", "cuda", **config) for config in configs], gang=2))
    for entry, one in zip(together, alone, strict=True):
        found = load_checkpoint(Path(entry["path"], "last", "checkpoint.pt"))
        assert all(torch.equal(found["method"][name], tensor) for name, tensor in one["method"].items())
        assert all(torch.equal(found["generators"][kind], state) for kind, state in one["generators"].items())
    moved = [[one.what for one in step if one.is_pinned] for step in noted.steps]
    assert all(
        "torch.uint8 (3, 32, 32, 3)" in one and "torch.uint8 (3, 32, 32, 3)" not in other for one, other in zip(moved[::2], moved[1::2], strict=True)
    )


def test_methods_on_mps_make_no_float64_and_copy_nothing_that_may_be_freed(folder: Path, tmp_path: Path) -> None:
    methods = [("kd", "b"), ("frequency", "b"), ("scalekd", "a")]
    cnn, vit = ({"students": (name,), "model_kwargs": args} for name, args in (("resnet10t", CNN), (TINY_VIT, STUDENT)))
    configs = [
        config_of(folder, tmp_path, "mps", method=method, teacher=name and (name,), batch_size=6, **vit if method == "scalekd" else cnn)
        for method, name in methods
    ]
    with Pretended("mps") as device:
        entries = list(train_configs(configs, gang=len(configs)))
    assert [entry["status"] for entry in entries] == ["done"] * len(configs)
    assert all(one.blocks and not one.is_pinned for one in device.transfers if one.kind == "to device")


def test_a_run_that_was_stopped_on_a_gpu_goes_on_as_if_it_had_not_been(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "method": "mgd", "teacher": ("a",), "model_kwargs": STUDENT | {"drop_rate": 0.5, "drop_path_rate": 0.2}, "model_ema": True,
        "recovery_interval": 1, "opt": "adamw", **FP16,
    }  # fmt: skip
    with Pretended():
        whole = run(folder, tmp_path / "whole", "cuda", **options)
    step = StudentLoop._step

    def failing(loop: StudentLoop, inputs: Any, number: int) -> Any:
        if number == 2:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return step(loop, inputs, number)

    with Pretended(), monkeypatch.context() as patches:
        patches.setattr(StudentLoop, "_step", failing)
        with pytest.raises(RuntimeError, match="launch failure"):
            run(folder, tmp_path / "resumed", "cuda", **options)
    with Pretended():  # another process: its generators are new
        resumed = run(folder, tmp_path / "resumed", "cuda", resume=True, **options)
    for part in ("method", "ema", "export", "generators"):
        assert all(torch.equal(resumed[part][name], tensor) for name, tensor in whole[part].items())
    assert resumed["scaler"] == whole["scaler"] and whole["scaler"]["scale"] > 1
    assert not torch.equal(whole["generators"]["cuda"], torch.Generator().manual_seed(0).get_state())


def test_two_processes_with_a_gpu_each_and_common_batch_norms_equal_one_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    """torch's own SyncBatchNorm and DistributedDataParallel on device tensors; what carries them is gloo, in place of NCCL."""
    options: dict[str, Any] = {
        "students": ("resnet10t",), "model_kwargs": CNN, "method": "mgd", "teacher": ("a",), "settings": {"mask_ratio": 0.0}, "epochs": 2,
        "model_ema": True, "clip_grad": 1.0,
    }  # fmt: skip
    expected = run(folder, tmp_path / "one", "cpu", batch_size=6, **options)
    config = config_of(folder, tmp_path / "two", "cuda", sync_bn=True, **options)
    meet = torch.distributed.init_process_group

    def action() -> None:
        with Pretended(index=int(os.environ["LOCAL_RANK"]), count=2, has_buckets=True) as device:

            def over_gloo(backend: str, *, device_id: torch.device, **others: Any) -> None:
                assert (backend, device_id) == ("cpu:gloo,cuda:nccl", device.device)
                meet("gloo", **others)

            with patch("torch.distributed.init_process_group", over_gloo):
                (entry,) = train_configs([config])
            assert entry["status"] == "done"
            assert set(device.kernels) == set(SYNC_BN_KERNELS)

    forked = start(action, tmp_path / "logs")
    assert [one.wait() for one in forked] == [0, 0], "".join(one.output() for one in forked)
    (place,) = (tmp_path / "two").iterdir()
    found = load_checkpoint(place / "last" / "checkpoint.pt")
    require_near(found["method"], expected["method"], 1e-4)
    require_near(found["ema"], expected["ema"], 1e-4)
    assert set(load_file(place / "export" / "model.safetensors")) == set(expected["export"])


def test_two_processes_on_one_gpu_are_told_so_once(tmp_path: Path) -> None:
    def action() -> None:
        with Pretended(index=0, count=1), joined("cuda"):
            pass

    first, second = start(action, tmp_path)
    assert [first.wait(), second.wait()] == [70, 70]
    assert "UsageError: ranks 0 and 1 would train on one GPU (GPU-0); expected one for each" in first.output()
    assert "kdcache.errors.ToldError" in second.output() and "UsageError" not in second.output()


# --- what the device would refuse ------------------------------------------------------------------------------------


def drop_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ScaleKD, "_apply")


def leave_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "forward", lambda self, *shape, like: torch.rand(shape, generator=self._generator))


def leave_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoding, "statistic", lambda self, name, device: self.calibration[name])


@pytest.mark.parametrize(("method", "forget"), [("scalekd", drop_tail), ("mgd", leave_noise), ("mimic", leave_statistics)])
def test_a_tensor_that_stays_behind_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, forget: Any) -> None:
    """That the pretended device tells, and so the tests above can fail."""
    forget(monkeypatch)
    with Pretended(), pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        run(folder, tmp_path, "cuda", method=method, teacher=("a",))


def test_a_worker_s_batch_is_pinned_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        patches.setattr("kdcache.workers.get_worker_info", lambda: object())  # as in a worker
        room = Room(4 * 6 + 2 * 5, 2, shared=True)
        views, gaps = room.empty((2, 3), np.dtype(np.float32)), room.empty((5,), np.dtype(np.uint16))
        views.copy_(torch.arange(6.0).view(2, 3))
        gaps.copy_(torch.arange(5))
        packed = pack({"views": views, "targets": {"logits": {"gaps": gaps}}})
    with Pretended() as device:
        item = pin_memory(packed).item()
        tensors = {"views": item["views"], **item["targets"]["logits"]}
        on_device = to_device(tensors, device.device)
        assert all(one.is_pinned() for one in tensors.values())
        assert [(one.blocks, one.is_pinned) for one in device.transfers] == [(False, True)] * 2
        assert on_device["views"].tolist() == [[0, 1, 2], [3, 4, 5]] and on_device["gaps"].tolist() == [0, 1, 2, 3, 4]


def test_a_class_that_no_encoder_gives_never_reaches_a_gpu(tmp_path: Path) -> None:
    """There it would end the process; a look at it there would let the host wait in every step."""
    encoding = build_encoding("logits", "topk=2", TargetShape(num_classes=5))
    components = encoding.encode({"logits": torch.randn(3, 5)})
    components["index"][1, 2] = 5
    with Pretended("cuda") as device:
        decoder = Decoder({"logits": encoding}).to("cuda")
        with pytest.raises(CorruptError, match="expected classes below 5"):
            decoder({"logits": components})
        components["index"][1, 2] = 4
        value = decoder({"logits": components})["logits"]["logits"]
    assert is_on_device(value) and [one.kind for one in device.transfers if one.blocks] == ["to device"]  # the decoder itself


def test_a_numbered_gpu_is_the_one_that_pinning_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pretended():
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        resolve_device("cuda")
        resolve_device("cuda:0")
    assert chosen == [torch.device("cuda:0")]
