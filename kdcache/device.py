"""Which device, and how it autocasts: cpu, cuda and mps alike. Nothing else in kdcache names a device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import UsageError
from .launch import Launch

SMALL_MODEL_PARAMETERS = 1_000_000


def resolve_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises UsageError for one that this machine lacks.

    A numbered GPU is made torch's current one: pinned memory belongs to that, and would open a context on the first GPU as well (pytorch#21081).
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if name.startswith("cuda") else None
        seen = f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
        raise UsageError(
            f"device {name!r}: this machine can't use it ({str(error).splitlines()[0]}{seen}); expected one that works here, e.g. --device cpu"
        ) from error
    return device


def share_machine(device: torch.device, launch: Launch) -> torch.device:
    """The device of one of several ranks on a machine: GPU number local rank, modulo the GPUs that this process sees.

    SLURM may show each task its own GPU only, as number 0. Also leaves each rank its share of the cores: torch would take all of them.
    """
    if launch.local_world_size == 1:
        return device
    torch.set_num_threads(min(torch.get_num_threads(), launch.cores))
    if str(device) != "cuda":  # the user chose one
        return device
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # or every rank would keep a context on the first GPU too
    return device


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Within, torch has so many threads; as many as before for None."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def fitting_threads(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On a CPU a small model runs on one thread; the rule looks at the model only, so that a resumed run repeats it.

    Two threads gain it little and lose much when a core is busy: extracting the quickstart's 108k-parameter teacher beside a busy
    neighbour on 2 cores took 58 s with two threads and 8 s with one.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or sum(parameter.numel() for parameter in model.parameters()) >= SMALL_MODEL_PARAMETERS:
        yield
        return
    with torch_threads(1):
        yield


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators that a model on this device draws from, by kind of device; uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on from what `generator_states` gave; kinds of device that it lacks are left as they are."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def works_ahead(device: torch.device) -> bool:
    """Whether the host need not wait for what this device is given to do, copies to it and from it among that.

    Not so on mps: it would read the memory when it may have been freed, and used again (pytorch#189690).
    """
    return device.type == "cuda"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on this device. The host does not wait for a copy to one that works ahead; from pinned memory it runs beside the device's other work."""
    return tensor.to(device, non_blocking=works_ahead(device))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host's tensor in pinned memory, for a device that works ahead; for others the tensor.

    It may be dropped as soon as it was `moved`: torch uses no pinned memory again before the copies from it and to it are done (pytorch#130785).
    """
    return tensor.pin_memory() if works_ahead(device) else tensor


class HostCopies:
    """Tensors of a device on their way to the host. The host goes on meanwhile if the device works ahead; else they are there at once.

    The copies queue behind the kernels that make the tensors, on the device's one stream: they need no other, since they are small beside a forward pass.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not works_ahead(device):
            self._tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            return
        self._tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True) for name, tensor in tensors.items()
        }
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the host, once all have arrived. What the device was given after them is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps of freed tensors, so that another model on the device may have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision name on any device; fp32 is a context that does nothing."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype if precision != "fp32" else None, enabled=precision != "fp32")
