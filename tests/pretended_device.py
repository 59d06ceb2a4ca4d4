"""A pretended GPU for machines that have none: its tensors are real ones in the host's memory, but say that they are on cuda:0, or mps:0.

Within `Pretended("cuda")` an operation that mixes them with the host's tensors raises what torch raises, random numbers of the device come from a generator
of its own, a tensor of the device gives no NumPy array, and every transfer between the two, and every wait of the host for the device, is noted. What is
copied to pinned memory without waiting arrives there when the host has waited, not before. The numbers are those of the CPU, so a run may be compared
with one that was on the CPU from the beginning.

Why not torch's FakeTensorMode: its tensors have no values, so that nothing behind the first `.item()` runs; and with a torch that is built for CUDA it
has no backward pass where there is no GPU (torch 2.15: "hasPrimaryContext expects a valid device index").

A storage that is "on the device" carries a mark. Operators are seen below autograd (`_Operators`), what Python asks for above it (`_Calls`): there the
names of devices are taken out of calls before torch sees them. Kernels that only CUDA has are not there; autocast is the CPU's, whose list of
operators is another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::repeat_interleave"}
"""Operators whose result the host waits for."""


@dataclass(frozen=True)
class Transfer:
    """Something that the host and the device have to do with each other."""

    kind: str
    """`to device`, `to host`, or `wait`: the host asks for a value, or for a shape that values decide."""
    what: str
    """Operator and shape."""
    blocks: bool
    """Whether the host stands still until the device has done all that it was given before."""
    is_pinned: bool
    """Whether the host's side of it is pinned memory, which is what lets a copy run beside other work."""
    where: str
    """The innermost function of kdcache or pipelines."""


@dataclass
class Pretended:
    """A context within which a device of this kind, "cuda" or "mps", is there."""

    kind: str = "cuda"
    index: int = 0
    count: int = 1
    """Of its kind on this machine."""
    has_buckets: bool = False
    """Whether what torch allocates below Python is on the device, as DDP's buckets of gradients are."""
    transfers: list[Transfer] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    """Those that ran of the few that only a GPU has, in order."""
    underway: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(pinned memory, what is copied there), in order, until the host waits for it."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Pretended:
        generator = torch.Generator().manual_seed(0)
        operators = _Operators(self, generator)
        grouped = torch._C._group_tensors_by_device_and_dtype

        def group(lists: Any, *args: Any) -> Any:
            found = grouped(lists, *args)
            return {(self.device if is_on_device(value[0][0][0]) else device, dtype): value for (device, dtype), value in found.items()}

        autocast, kind = torch.autocast.__init__, self.kind
        seeded = torch.manual_seed

        def on_cpu(this: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            autocast(this, "cpu" if device_type == kind else device_type, *args, **kwargs)

        for name, value in {
            "torch.Generator": type("Generator", (torch.Generator,), {"__new__": lambda cls, device="cpu": torch._C.Generator.__new__(cls)}),
            "torch.autocast.__init__": on_cpu,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.accelerator.is_available": lambda: True,
            "torch.accelerator.current_accelerator": lambda *_, **__: self.device,
            "torch.accelerator.current_stream": lambda *_: _Stream(),
            "torch._C._group_tensors_by_device_and_dtype": group,
            f"torch.{kind}.get_rng_state": lambda *_: generator.get_state(),
            f"torch.{kind}.set_rng_state": lambda state, *_: generator.set_state(state),
            f"torch.{kind}.empty_cache": lambda: None,
            "torch.cuda.set_device": lambda *_: None,
            "torch.cuda.current_device": lambda: self.index,
            "torch.cuda.current_stream": lambda *_: _Stream(),
            "torch.cuda.Event": lambda: _Event(self),
            "torch.cuda.get_device_properties": lambda *_: SimpleNamespace(uuid=f"GPU-{self.index}"),
            "torch.cuda.device_count": lambda: self.count,
            "torch.random.manual_seed": lambda seed: (generator.manual_seed(seed), seeded(seed))[1],
            "torch.manual_seed": lambda seed: (generator.manual_seed(seed), seeded(seed))[1],
        }.items():
            self._stack.enter_context(patch(name, value))
        self._stack.enter_context(operators)
        self._stack.enter_context(_Calls(self, operators))
        return self

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, self.index)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def note(self, kind: str, what: str, *, blocks: bool, is_pinned: bool = False) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None and not frame.f_globals.get("__name__", "").startswith(("kdcache.", "pipelines.")):
            frame = frame.f_back
        where = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}" if frame is not None else "elsewhere"
        self.transfers.append(Transfer(kind, what, blocks, is_pinned, where))
        if blocks:
            self.arrive(len(self.underway))

    def arrive(self, count: int) -> None:
        """The host has waited for the first `count` copies that are under way."""
        with torch._C.DisableTorchFunction():
            for to, source in self.underway[:count]:
                to.copy_(source)
        del self.underway[:count]

    @contextmanager
    def noted(self) -> Iterator[list[Transfer]]:
        """The transfers within."""
        before, found = len(self.transfers), list[Transfer]()
        yield found
        found += self.transfers[before:]


class _Stream:
    @staticmethod
    def is_capturing() -> bool:
        return False


class _Event:
    """Of the device's one stream: stands behind what was under way when it was recorded."""

    def __init__(self, device: Pretended) -> None:
        self._device = device
        self._behind: tuple[Tensor, Tensor] | None = None

    def record(self, stream: _Stream) -> None:
        self._behind = self._device.underway[-1] if self._device.underway else None

    def synchronize(self) -> None:
        places = [place for place, one in enumerate(self._device.underway, 1) if one is self._behind]
        self._device.arrive(places[0] if places else 0)
        self._device.note("wait", "event", blocks=False)


def is_on_device(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return hasattr(tensor.untyped_storage(), "on_device")


def _mark(tensor: Tensor, on_device: bool) -> None:
    storage = tensor.untyped_storage()
    if on_device:
        storage.on_device = True  # type: ignore[attr-defined]
    elif hasattr(storage, "on_device"):
        del storage.on_device


def _is_pinned(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "is_in_pinned_memory")


class _Operators(TorchDispatchMode):
    """Marks what operators give, as their arguments are marked."""

    def __init__(self, device: Pretended, generator: torch.Generator) -> None:
        super().__init__()
        self.device, self.generator = device, generator
        self.frames: list[bool] = []
        """Whether the calls that are under way are on the device, the innermost last: what an operator without tensors gives is where its caller is."""
        self.moves = False
        """Whether the innermost call moves a tensor there, wherever it was."""
        self.looks = False
        """Whether the innermost call looks at values on a CPU only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        name = func._schema.name
        marks = [is_on_device(one) for one in tensors]
        if self.moves:
            on_device = self.frames[-1]
        elif name in ("aten::copy_", "aten::_copy_from") and len(set(marks)) == 2:
            self._note_copy(tensors[0], tensors[1], non_blocking := bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False)))
            on_device = marks[0]
            if non_blocking and not on_device and _is_pinned(tensors[0]):
                self.device.underway.append((tensors[0], tensors[1].clone()))
                return tensors[0].zero_()
        elif name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and marks[0]:
            for one in tree_leaves(args[1]):
                if isinstance(one, Tensor) and not is_on_device(one):
                    self.device.note("to device", f"{name} by {tuple(one.shape)}", blocks=True)
                elif isinstance(one, Tensor) and one.dtype == torch.bool:
                    self.device.note("wait", f"{name} by a mask", blocks=True)
            on_device = True
        else:
            on_device = any(marks) if tensors else (self.frames[-1] if self.frames else self.device.has_buckets)
            if on_device and any(not mark and one.dim() > 0 for mark, one in zip(marks, tensors, strict=True)):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {self.device.device} and cpu! ({name})"
                )
        if on_device and name in _WAITING and not self.looks:
            self.device.note("wait", f"{name} of {tuple(tensors[0].shape)}", blocks=True)
        if on_device and torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            with self._own_generator():
                result = func(*args, **kwargs)
        else:
            self.device.kernels += [name] * (name in SYNC_BN_KERNELS)
            result = SYNC_BN_KERNELS.get(name, func)(*args, **kwargs) if on_device else func(*args, **kwargs)
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and on_device and one.dtype == torch.float64 and self.device.kind == "mps":
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. ({name})")
            if isinstance(one, Tensor) and (on_device or self.moves):
                _mark(one, on_device)
        return result

    def _note_copy(self, to: Tensor, source: Tensor, non_blocking: bool) -> None:
        if is_on_device(to):
            self.device.note("to device", f"copy_ of {tuple(to.shape)}", blocks=not non_blocking, is_pinned=_is_pinned(source))
        else:
            is_pinned = _is_pinned(to)
            self.device.note("to host", f"copy_ of {tuple(to.shape)}", blocks=not (non_blocking and is_pinned), is_pinned=is_pinned)

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        state = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(state)


class _Calls(TorchFunctionMode):
    """Answers what Python asks of tensors, and takes the device out of its calls."""

    def __init__(self, device: Pretended, operators: _Operators) -> None:
        super().__init__()
        self.device, self.operators = device, operators
        self.answers: dict[Any, Callable[[Tensor], Any]] = {
            Tensor.device.__get__: lambda tensor: device.device,  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda tensor: device.kind == "cuda",  # type: ignore[attr-defined]
            Tensor.is_mps.__get__: lambda tensor: device.kind == "mps",  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda tensor: False,  # type: ignore[attr-defined]
            Tensor.get_device: lambda tensor: 0,
            Tensor.tolist: self._tolist,
            Tensor.numpy: _refuse_array,
            Tensor.__array__: _refuse_array,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.answers:
            return self.answers[func](args[0]) if is_on_device(args[0]) else func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            return self._pin(args[0])
        if func is torch.nn.functional.one_hot:  # checks its classes; on a GPU only where their number is not given
            self.operators.looks = True
            try:
                with self._within(is_on_device(args[0])):
                    return func(*args, **kwargs)
            finally:
                self.operators.looks = False
        if func is Tensor.is_pinned:
            return _is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        given = kwargs.get("device")
        if given is not None and torch.device(given).type in (self.device.kind, "cpu"):
            on_device = torch.device(given).type == self.device.kind
            with self._within(on_device):
                result = func(*args, **{**kwargs, "device": "cpu"})
            if on_device and func in (torch.tensor, torch.as_tensor):
                self.device.note("to device", f"torch.{func.__name__} of {tuple(result.shape)}", blocks=True)
            _mark(result, on_device)
            return result
        on_device = any(isinstance(one, Tensor) and is_on_device(one) for one in tree_leaves((args, kwargs)))
        with self._within(on_device):
            result = func(*args, **kwargs)
        if func is Tensor.new_tensor and on_device:
            self.device.note("to device", f"new_tensor of {tuple(result.shape)}", blocks=True)
            _mark(result, True)
        return result

    @contextmanager
    def _within(self, on_device: bool, *, moves: bool = False) -> Iterator[None]:
        self.operators.frames.append(on_device)
        self.operators.moves, before = moves, self.operators.moves
        try:
            yield
        finally:
            self.operators.frames.pop()
            self.operators.moves = before

    def _to(self, func: Any, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if func is not Tensor.to:
            device, dtype, non_blocking, memory_format = torch.device("cpu" if func is Tensor.cpu else self.device.kind), None, False, None
        elif args and isinstance(args[0], Tensor):
            device, dtype, non_blocking, memory_format = (
                self.device.device if is_on_device(args[0]) else torch.device("cpu"),
                args[0].dtype,
                False,
                None,
            )
        else:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = is_on_device(tensor)
        there = here if device is None else device.type == self.device.kind
        options = {"memory_format": memory_format} if memory_format is not None else {}
        if here == there:
            with self._within(here):
                return tensor.to(dtype=tensor.dtype if dtype is None else dtype, copy=copy, **options)
        what = f"{tensor.dtype} {tuple(tensor.shape)}"
        self.device.note("to device" if there else "to host", what, blocks=not non_blocking, is_pinned=_is_pinned(tensor))
        with self._within(there, moves=True):
            moved: Tensor = _aten._to_copy.default(tensor, dtype=dtype, **options)
        return moved

    def _pin(self, tensor: Tensor) -> Tensor:
        if is_on_device(tensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        pinned = tensor.clone()
        pinned.untyped_storage().is_in_pinned_memory = True  # type: ignore[attr-defined]
        return pinned

    def _tolist(self, tensor: Tensor) -> Any:
        self.device.note("wait", f"tolist of {tuple(tensor.shape)}", blocks=True)
        return tensor.tolist()


def _refuse_array(tensor: Tensor) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")


# --- kernels of SyncBatchNorm, which a CPU lacks; statistics of (N, C, …) over all but C -----------------------------


def _as_rows(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).float()


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _as_rows(x)
    return rows.mean(1), (rows.var(1, correction=0) + eps).rsqrt()


def _gather_stats(
    x: Tensor, means: Tensor, invstds: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, counts: Tensor
) -> tuple[Tensor, Tensor]:
    share, total = (counts / counts.sum())[:, None], counts.sum()
    mean = (share * means).sum(0)
    variance = (share * (invstds**-2 - eps + means**2)).sum(0) - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean, (variance + eps).rsqrt()


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return ((x - _per_channel(mean, x)) * _per_channel(invstd * weight, x) + _per_channel(bias, x)).to(x.dtype)


def _reduce(gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *_: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _as_rows(gradient)
    along = (rows * (_as_rows(x) - mean[:, None])).sum(1)
    return rows.sum(1), along, along * invstd, rows.sum(1)


def _input_gradient(
    gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, total: Tensor, along: Tensor, counts: Tensor
) -> Tensor:
    total, along = total / counts.sum(), along / counts.sum() * invstd**2
    centred = x - _per_channel(mean, x)
    return (gradient - _per_channel(total, x) - centred * _per_channel(along, x)) * _per_channel(invstd * weight, x)


SYNC_BN_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::batch_norm_stats": _stats,
    "aten::batch_norm_gather_stats_with_counts": _gather_stats,
    "aten::batch_norm_elemt": _normalised,
    "aten::batch_norm_backward_reduce": _reduce,
    "aten::batch_norm_backward_elemt": _input_gradient,
}
