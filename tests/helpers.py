"""Builders that the tests share: tiny real tars, tiny real images, tiny real timm models, and scripts run in a fresh process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from kdcache.errors import StoreError
from kdcache.plan import CenterCrop, ColorJitter, MixedViews, Policy, RandAugment, RandomErasing, RandomResizedCrop, ThreeAugment

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

Member = tuple[str, bytes]
"""Name and bytes of one tar member."""

TINY_VIT = "vit_tiny_patch16_224"
TINY_VIT_ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
"""4 × 4 grid tokens and a cls token, 32 channels, 10 classes."""


def make_image(seed: int, size_wh: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth random image, so that JPEG and resizing behave as on photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size_wh, Image.Resampling.BICUBIC).convert(mode)


def image_bytes(image: Image.Image, extension: str = "jpg", **options: Any) -> bytes:
    """The image as a file of that extension."""
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return buffer.getvalue()


def sample_members(
    key: str, seed: int, *, label: int | None = 0, extension: str = "jpg", label_extension: str = "cls", size_wh: tuple[int, int] = (40, 30)
) -> list[Member]:
    """The members of one sample in the WebDataset layout: the image, then its label if there is one."""
    members = [(f"{key}.{extension}", image_bytes(make_image(seed, size_wh), extension))]
    if label is not None:
        text = str(label) if label_extension == "cls" else json.dumps({"label": label})
        members.append((f"{key}.{label_extension}", text.encode()))
    return members


def write_tar(path: Path, members: Iterable[Member], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of these members in this order, with fixed times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shard(
    path: Path,
    *,
    num_samples: int = 4,
    num_classes: int = 10,
    extension: str = "jpg",
    label_extension: str = "cls",
    labels: bool = True,
    size_wh: tuple[int, int] = (40, 30),
    seed: int = 0,
    corrupt: Sequence[int] = (),
    truncate_at: int | None = None,
) -> Path:
    """A shard of samples `s0000`, `s0001`, …, with label i % num_classes.

    corrupt: positions whose image is cut to its first 60 bytes. truncate_at: the tar keeps only so many bytes.
    """
    members: list[Member] = []
    for i in range(num_samples):
        label = (seed + i) % num_classes if labels else None
        sample = sample_members(f"s{i:04d}", 1000 * seed + i, label=label, extension=extension, label_extension=label_extension, size_wh=size_wh)
        if i in corrupt:
            sample[0] = (sample[0][0], sample[0][1][:60])
        members += sample
    write_tar(path, members)
    if truncate_at is not None:
        path.write_bytes(path.read_bytes()[:truncate_at])
    return path


def make_shards(folder: Path, *, num_shards: int = 2, **options: Any) -> list[Path]:
    """Shards `train-0000.tar`, … in `folder`; options as `make_shard`."""
    return [make_shard(folder / f"train-{i:04d}.tar", seed=i, **options) for i in range(num_shards)]


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter and buffer of floats: a fresh initialisation hides errors behind its zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).abs())
    return model


def tiny_model(name: str = TINY_VIT, *, seed: int = 0, **model_args: Any) -> nn.Module:
    """A small timm model with perturbed weights, in eval mode. Without arguments: `TINY_VIT`."""
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=False, **(model_args or (TINY_VIT_ARGS if name == TINY_VIT else {})))
    return perturb(model, seed).eval()


def save_local_dir(model: nn.Module, folder: Path, model_args: Mapping[str, Any]) -> str:
    """Save as timm's save_for_hf does; the `local-dir:…` name to load it by."""
    from timm.models import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=True, model_args=dict(model_args))
    return f"local-dir:{folder}"


def make_teacher_dir(folder: Path, *, seed: int = 0, **overrides: Any) -> str:
    """A tiny ViT with perturbed weights in a folder; its `local-dir:…` name. overrides: of `TINY_VIT_ARGS`."""
    args = {**TINY_VIT_ARGS, **overrides}
    return save_local_dir(tiny_model(TINY_VIT, seed=seed, **args), folder, args)


def make_cache(folder: Path, *, views: int = 3, targets: Sequence[str] = ("logits", "features@norm"), **shards: Any) -> Path:
    """Shards in `folder/shards`, a tiny teacher in `folder/teacher`, and a cache of its targets; the cache's path. shards: as `make_shards`."""
    from pipelines.extract import ExtractConfig, extract

    make_shards(folder / "shards", **shards)
    teacher = make_teacher_dir(folder / "teacher")
    extract(ExtractConfig(shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=teacher, targets=targets, views=views, workers=0))
    return folder / "cache"


def reseal(body: Mapping[str, Any], *, identity: bool = False) -> bytes:
    """The bytes of a changed document whose digests hold again, as one who made it so would write them. identity: `identity_digest` too."""
    changed = dict(body)
    if identity and "identity" in changed:
        changed["identity_digest"] = hashlib.blake2b(_as_python_has_it(changed["identity"], compact=True), digest_size=16).hexdigest()
    data = _as_python_has_it({"file_digest": "0" * 32, **{name: value for name, value in changed.items() if name != "file_digest"}})
    return data.replace(b"0" * 32, hashlib.blake2b(data, digest_size=16).hexdigest().encode(), 1)


def _as_python_has_it(value: Any, *, compact: bool = False) -> bytes:
    """JSON, NaN and lone surrogates included: nothing is refused here."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) if compact else json.dumps(value, indent=1) + "\n").encode()


def run_python(code: str, *arguments: object, check: bool = True, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, with the repository's packages importable."""
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s)
    if check:
        assert result.returncode == 0, result.stderr
    return result


class Forked:
    """A process of its own group that runs `action` and exits with what it returns (None is 0), its output in `log`.

    Forked from this one, which has torch loaded: a fresh interpreter would need seconds for that.
    """

    def __init__(self, action: Callable[[], int | None], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action, environ or {})
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)  # here too: whoever comes first

    def _run(self, action: Callable[[], int | None], environ: Mapping[str, str]) -> None:
        status = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
            os.environ.update(environ)
            status = action() or 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - shown, and the process ends
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout_s: float = 240) -> int:
        """The exit status, negative for a signal. Kills the group and fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {timeout_s} s: {self.output()}")

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until the condition holds; fails if the process ends before that."""
        while not condition():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.output()
            time.sleep(0.002)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def group_is_gone(self, timeout_s: float = 0.0) -> bool:
        """Whether no process of its group is left; its workers have `timeout_s` to notice."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)


def kdcache_command(*arguments: object) -> Callable[[], int]:
    """The command line in this process, for `Forked`: `kdcache_command("verify", cache)`."""

    def run() -> int:
        from cli.main import main

        main([str(argument) for argument in arguments])
        return 0

    return run


def python_script(path: Path, *arguments: object) -> Callable[[], None]:
    """A script as `python PATH ARGUMENTS` runs it, for `Forked`."""

    def run() -> None:
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return run


_CHANGES = {"os.link", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "tempfile.mkdtemp"}


def die_at(cache: Path, where: str, count: int) -> None:
    """Arm this process: SIGKILL to its group right before the count-th change of the file system below `cache` whose path holds `where`."""
    seen = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in _CHANGES:
            return
        paths = [os.fspath(part) for part in details[:2] if isinstance(part, str | os.PathLike)]
        if any(path.startswith(str(cache)) and where in path[len(str(cache)) :] for path in paths):
            seen += 1
            if seen >= count:  # two threads may count at once
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


fractions = st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0])
pairs = st.tuples(fractions, fractions).map(lambda pair: (min(pair), max(pair)))
random_policies = st.builds(
    Policy,
    crop=st.just(CenterCrop()) | st.builds(RandomResizedCrop, scale=st.sampled_from([(0.08, 1.0), (0.5, 0.5)])),
    hflip=fractions,
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    three_augment=st.none() | st.builds(ThreeAugment, prob=fractions, sigma=st.sampled_from([(0.1, 2.0), (0.01, 32.0)])),
    rand_augment=st.none()
    | st.builds(
        RandAugment,
        num_ops=st.integers(1, 4),
        magnitude=st.floats(0, 10),
        magnitude_std=st.floats(0, 100),
        increasing=st.booleans(),
        prob=fractions,
        translate=fractions,
    ),
    color_jitter=st.none() | st.builds(ColorJitter, prob=fractions, brightness=fractions, contrast=fractions, saturation=fractions),
    erase=st.none()
    | st.builds(RandomErasing, prob=fractions, mode=st.sampled_from(["noise", "constant"]), area=pairs.filter(lambda pair: pair[1] > 0)),
    mix=st.none()
    | st.builds(MixedViews, prob=fractions, switch_prob=fractions, mixup_alpha=st.just(0.0) | st.floats(0.01, 32), cutmix_alpha=st.floats(0.01, 32)),
)
"""Policies of every kind, with everything on or off."""


# --- runs of stage two -----------------------------------------------------------------------------------------------

QUICK_STUDENT_ARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_rate": 0.1, "drop_path_rate": 0.1}
"""Of TINY_VIT, as a student."""
CNN = "resnet18"
CNN_ARGS: dict[str, Any] = {"channels": [4, 4, 8, 8], "stem_width": 4}


def make_train_folder(folder: Path) -> Path:
    """cache/ of 2 shards × 6 images × 3 views, shards/ and val/."""
    make_cache(folder, num_shards=2, num_samples=6, views=3)
    make_shard(folder / "val" / "val-00.tar", num_samples=10, seed=7)
    return folder


def quick_config(folder: Path, runs: Path, /, **overrides: Any) -> TrainConfig:
    """What is quick to train on a folder of `make_train_folder`."""
    from pipelines.train import TrainConfig

    options = {
        "cache": str(folder / "cache"),
        "students": (TINY_VIT,),
        "model_kwargs": QUICK_STUDENT_ARGS,
        "out": str(runs),
        "epochs": 3,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "check_views": 1.0,
    }
    return TrainConfig(**{**options, **overrides})


def where_files_end_at(most_bytes: int, action: Callable[[], object]) -> Callable[[], int]:
    """For `Forked`: `action` where no file can be larger, as on a disk that is full; 3 and the error's text for a StoreError, else 0."""

    def command() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes,) * 2)
        try:
            action()
        except StoreError as error:
            sys.stdout.write(str(error))
            return 3
        return 0

    return command


def state_of(run: dict[str, Any], name: str = "last") -> dict[str, Any]:
    return torch.load(Path(run["path"], name, "checkpoint.pt"), weights_only=True)


TIMES = {"seconds": 0, "own_seconds": 0, "own_epoch_seconds": 0}
"""In place of a state's or a line's own."""


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every tensor, number and row alike to the last bit; times aside."""
    found_leaves, expected_leaves = (dict(leaves({**state, **TIMES})) for state in (found, expected))
    assert list(found_leaves) == list(expected_leaves)
    for path, value in expected_leaves.items():
        same = torch.equal(found_leaves[path], value) if isinstance(value, torch.Tensor) else found_leaves[path] == value
        assert same, path


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


# --- models, processes and runs that several files of tests use --------------------------------------------------------


def slurm(rank: int, world: int = 2) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0"}


GOLDENS = Path(__file__).parent / "goldens"


def load_golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


SWIN_ARGS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1, 2),
    "num_heads": (1, 1, 2, 2),
    "num_classes": 10,
}
"""Maps of 8 × 8 × 64 behind stage 3 and 4 × 4 × 128 behind stage 4."""


SWIN = "swin_tiny_patch4_window7_224"


STUDENTS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "cnn": ("resnet10t", {"channels": (8, 16, 24, 32)}, ("layer3", "norm")),
    "mobilenet": ("mobilenetv3_small_050", {}, ("blocks.3", "norm")),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, ("stages.2", "norm")),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}, ("blocks.2", "norm")),
    "mixer": ("mixer_s32_224", {"mlp_ratio": (0.5, 0.5)}, ("blocks.5", "norm")),
    "swin": (SWIN, {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, ("layers.2", "norm")),
}  # fmt: skip


def lines_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """metrics.jsonl, times aside."""
    return [{**json.loads(line), **TIMES} for line in Path(run["path"], "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["id"], found["top1"], found["status"]) == (expected["id"], expected["top1"], "done")
    for name in ("last", "best"):
        assert_same_state(state_of(found, name), state_of(expected, name))
    for file in ("summary.csv", "export/model.safetensors", "export/config.json", "export/README.md"):
        assert Path(found["path"], file).read_bytes() == Path(expected["path"], file).read_bytes(), file
    assert lines_of(found) == lines_of(expected)
    assert not list(Path(found["path"]).rglob("*.tmp"))


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would tell no more."""


def wandb_history(path: Path) -> tuple[Any, dict[int, dict[str, Any]]]:
    """(the run's record, update → what was logged) of a .wandb file: 7 bytes, then LevelDB's log format of 32 kB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, run, history = path.read_bytes(), 7, b"", None, {}
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # first or middle part
            continue
        record, parts = wandb_internal_pb2.Record.FromString(parts), b""
        run = record.run if record.WhichOneof("record_type") == "run" else run
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history[items["_step"]] = items
    return run, history


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def start(action: Callable[[], int | None], logs: Path, *, world: int = 2) -> list[Forked]:
    """Processes that meet as those of torchrun do, but are forked: a fresh interpreter would need seconds for torch."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [
        Forked(
            action,
            logs / f"log-{rank}",
            {
                **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
        )
        for rank in range(world)
    ]
