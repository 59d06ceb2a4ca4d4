"""One method and student in every process of several: alike in their weights, each with draws and running statistics of its own. Used by train.

Gradients are averaged by torch's DistributedDataParallel around the method, so that adapters and projectors are averaged like the student.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import Processes
from .errors import StudentError, UsageError
from .feature_maps import Noise
from .methods.base import Method
from .plan import canonical_json


def check_sync_bn(processes: Processes) -> None:
    """Raise UsageError where there is nothing to synchronise."""
    if processes.world == 1:
        raise UsageError("--sync-bn: one process has nobody to share its statistics with; start several with torchrun, or leave it out")


def average_batch_norms(module: nn.Module, processes: Processes) -> None:
    """The running statistics of BatchNorms, averaged over the processes: timm's `--dist-bn reduce`."""
    if processes.world > 1:
        from timm.utils import distribute_bn

        distribute_bn(module, processes.world, reduce=True)


def check_same_weights(method: Method[Any], processes: Processes) -> None:
    """Raise StudentError if the processes have not built the same weights."""
    if processes.world == 1:
        return
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in method.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    digests = processes.gather(digest.hexdigest())
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise processes.common(
            StudentError(
                f"rank {different[0]} has built other weights than rank 0 from the same seed; expected the same versions of torch and timm, and the same"
                f" pretrained files, on every machine"
            )
        )


def draw_apart(method: Method[Any], seed: int, processes: Processes) -> None:
    """Give every process but the first draws of its own: dropout, drop path and masks would be alike in all of them."""
    if processes.is_first:
        return
    words = hashlib.blake2b(canonical_json(["rank", seed, processes.rank]), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(words, "little") >> 1)
    for module in method.modules():
        if isinstance(module, Noise):
            module.reseed()


# --- gradients -------------------------------------------------------------------------------------------------------


def replicate(method: Method[Any], device: torch.device, run: Callable[[nn.Module], Mapping[str, Tensor]]) -> DistributedDataParallel:
    """The method, with its gradients averaged. run: the loss parts that it, or a module around it, gives for some batch.

    Parameters without a part in them are known by one pass, the order in which gradients come by another: DDP arranges its buckets by that after
    its first pass, and from three processes on a sum depends on the arrangement. So the first step of a resumed run is as it would have been.
    """
    with _untouched(method):
        reached = _leaves(list(run(method).values()))
    replica = DistributedDataParallel(
        method,
        device_ids=None if device.type == "cpu" else [torch.cuda.current_device() if str(device) == device.type else device.index],
        init_sync=False,  # `check_same_weights`, or a checkpoint
        gradient_as_bucket_view=True,
        find_unused_parameters=any(parameter.requires_grad and parameter not in reached for parameter in method.parameters()),
    )
    replica.broadcast_buffers = False  # running statistics are averaged where they are used: after an epoch (its argument warns from torch 2.15 on)
    with _untouched(method):
        torch.stack(list(run(replica).values())).sum().backward()  # type: ignore[no-untyped-call]
    method.zero_grad(set_to_none=True)
    return replica


@contextmanager
def _untouched(method: Method[Any]) -> Iterator[None]:
    """Eval mode, within; nothing that is drawn or counted there is seen after."""
    noises = {module: module.get_extra_state() for module in method.modules() if isinstance(module, Noise)}
    modes = [(module, module.training) for module in method.modules()]
    devices = [parameter.device for parameter in method.parameters() if parameter.device.type == "cuda"][:1]
    method.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for noise, state in noises.items():
            noise.set_extra_state(state)


def _leaves(tensors: list[Tensor]) -> set[Tensor]:
    """The parameters that these were computed from."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


@contextmanager
def naming_uneven_gradients(student_name: str) -> Iterator[None]:
    """Within, DDP's complaint of parameters that have a part in some steps only is a StudentError."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise StudentError(
            f"student {student_name}: some of its parameters, or of its method's, have a part in the loss of some steps only; several processes expect"
            f" the same ones in every step: train it in one process, or make their share 0 instead of leaving them out"
        ) from error


# --- checkpoints -----------------------------------------------------------------------------------------------------


def own_state(method: Method[Any], ema: nn.Module | None, generators: Mapping[str, Tensor]) -> dict[str, Any]:
    """What may differ between the processes, on the CPU: buffers, generators of masks, of torch."""
    return {"method": _buffers(method), "generators": dict(generators), **({"ema": _buffers(ema)} if ema is not None else {})}


def _buffers(module: nn.Module) -> dict[str, Any]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in module.state_dict().items() if name not in parameters}


def what_differs(own: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Of one process's `own_state` what the first one does not have as well."""
    return {part: {name: value for name, value in values.items() if not _equal(value, first[part][name])} for part, values in own.items()}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def state_of_rank(state: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """A checkpoint as this process wrote its part of it. Of its weights, optimizer and counters there is one for all."""
    if processes.is_first or "ranks" not in state:
        return dict(state)
    own = state["ranks"][processes.rank - 1]
    return {**state, **{part: {**state[part], **values} for part, values in own.items()}}
