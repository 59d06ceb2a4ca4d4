"""Items of a DataLoader, with what befalls its worker processes as an error of ours. Used by both stages' loaders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .errors import KDCacheError, StoreError
from .interrupt import raise_if_dropped

_ALIGNED_TO = 64
"""Bytes at whose multiples tensors begin in a piece of memory: a cache line."""
_SPARE_DESCRIPTORS = 32
"""That a worker must have left: more than sending a batch takes and than the next one opens meanwhile, as a rule."""


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Within, a worker process that was killed is a StoreError that says what to try.

    torch's signal handler raises a RuntimeError in the main thread, wherever that is: in the loader, the model or a wait.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_killed_worker(error):
            raise
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"a worker process was killed ({reason}), often for lack of memory; run the command again with fewer --workers or a smaller --batch-size"
        ) from error


def is_killed_worker(error: BaseException | None) -> bool:
    """Whether an error is torch's word, or has it as its cause, that a worker process was killed. What a worker raised says otherwise, and is a bug."""
    while error is not None:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):  # not "DataLoader worker process"
            return True
        error = error.__cause__
    return False


def iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """The loader's items. Raises an item that is a KDCacheError, and StoreError if a worker process was killed while it waited for one."""
    items: Iterator[Any] | None = None
    while True:
        try:
            with naming_killed_workers():
                if items is None:
                    items = iter(loader)
                item = next(items)
            raise_if_dropped()
        except StopIteration:
            return
        except (KeyboardInterrupt, StoreError):
            if isinstance(items, _MultiProcessingDataLoaderIter):  # its traceback would keep the workers alive
                items._shutdown_workers()
            end_workers(loader)  # those that it would go on with
            raise
        if isinstance(item, KDCacheError):
            raise item
        yield item.item() if isinstance(item, Packed) else item


def end_workers(loader: DataLoader[Any]) -> None:
    """End the processes that a loader keeps, if it has begun any, whoever still holds it. It begins new ones if it is asked for items again.

    Left to its last reference they would be there while an error's traceback is, and at the interpreter's end, which sends them a SIGTERM and waits:
    for ever for those that `outlast_a_signal`.
    """
    if isinstance(items := loader._iterator, _MultiProcessingDataLoaderIter):
        items._shutdown_workers()
        loader._iterator = None


def hand_over(item: Any) -> Any:
    """A collate function for datasets that make whole batches themselves: the item, its tensors in shared memory if this is a worker.

    Full shared memory is a StoreError in the item's place. Left to the queue that carries items, it would be a traceback on its
    thread, a lost item, and a parent that waits for it for ever.
    """
    if get_worker_info() is None:
        return item
    try:
        with _naming_full_memory():
            _share(item)
    except StoreError as error:
        return StoreError(*error.args)  # without its cause, which may not pickle
    return item


class Room:
    """Memory for all tensors of an item: in a worker process one piece of shared memory, else what torch gives.

    Each tensor in shared memory holds file descriptors in both processes and is sent in a message of its own; a piece does that once for all of them.
    """

    def __init__(self, num_bytes: int, num_tensors: int, *, shared: bool) -> None:
        """num_bytes: of num_tensors tensors together. shared: in shared memory if this is a worker. Raises StoreError if that is full."""
        self._storage: torch.UntypedStorage | None = None
        self._used = 0
        if shared and get_worker_info() is not None:
            with _naming_full_memory():  # as torch's own collation does:
                self._storage = torch.UntypedStorage._new_shared(num_bytes + _ALIGNED_TO * num_tensors, device="cpu")  # type: ignore[no-untyped-call]

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
        """A tensor to be filled. uint16 is int16 here, bit for bit: torch lacks it in full."""
        of_torch = torch.from_numpy(np.empty(0, np.int16 if dtype == np.uint16 else dtype)).dtype
        if self._storage is None:
            return torch.empty(tuple(shape), dtype=of_torch)
        part = _Part(self._used, tuple(shape), of_torch)
        self._used += -(-prod(shape) * dtype.itemsize // _ALIGNED_TO) * _ALIGNED_TO
        return part.of(self._storage)


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in a piece of memory."""

    offset: int
    """Bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor; in autograd's eyes one of its own, so that changes in place are counted apart."""
        strides = [prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset // self.dtype.itemsize, self.shape, strides)


class Packed:
    """An item whose tensors are parts of one piece of memory, on its way from a worker. `iterate` gives the item."""

    def __init__(self, piece: Tensor, parts: Any) -> None:
        """piece: uint8 (bytes,). parts: the item, its tensors as parts of it."""
        self._piece, self._parts = piece, parts

    def pin_memory(self) -> Packed:
        """The same in pinned memory; torch's loader calls this."""
        return Packed(self._piece.pin_memory(), self._parts)

    def item(self) -> Any:
        storage = self._piece.untyped_storage()
        return _replaced(self._parts, _Part, lambda part: part.of(storage))


def pack(item: Any) -> Any:
    """A collate function for items of tensors from one `Room` in mappings: what a worker hands over of them, `Packed`; here, or of an error, the item."""
    if get_worker_info() is None or isinstance(item, KDCacheError):
        return item
    try:
        _check_descriptors()
    except StoreError as error:
        return StoreError(*error.args)
    storages: dict[int, torch.UntypedStorage] = {}

    def part(tensor: Tensor) -> _Part:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return _Part(int(tensor.storage_offset()) * tensor.itemsize, tuple(tensor.shape), tensor.dtype)

    parts = _replaced(item, Tensor, part)
    (storage,) = storages.values()
    return Packed(torch.empty(0, dtype=torch.uint8).set_(storage), parts)


def _check_descriptors() -> None:
    """Raise StoreError if few file descriptors are left: the thread that sends items would lose one for lack of them, and the parent wait for it for ever."""
    taken: list[int] = []
    try:
        for _ in range(_SPARE_DESCRIPTORS):
            taken.append(os.dup(2))
    except OSError as error:
        raise StoreError(
            f"a worker process has fewer than {_SPARE_DESCRIPTORS} file descriptors left ({error.strerror}); raise the limit (ulimit -n 4096) and run the"
            f" command again"
        ) from error
    finally:
        for descriptor in taken:
            os.close(descriptor)


def _replaced(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """The same mappings, with something else for each `kind` in them."""
    if isinstance(value, Mapping):
        return {key: _replaced(inner, kind, by) for key, inner in value.items()}
    return by(value) if isinstance(value, kind) else value


@contextmanager
def _naming_full_memory() -> Iterator[None]:
    """Within, no room for a tensor in shared memory is a StoreError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if name := re.search(r"</(torch_\w+)>", reason):
            Path("/dev/shm", name[1]).unlink(missing_ok=True)  # torch leaves it there
        raise StoreError(
            f"a worker process has no shared memory left for its batch ({reason}); enlarge /dev/shm (docker run --shm-size=2g, or --ipc=host),"
            f" or run the command again with fewer --workers; --workers 0 needs none"
        ) from error


def _share(value: Any) -> None:
    """Move the tensors of an item to shared memory, which is where the queue would move them."""
    if isinstance(value, Tensor):
        if value.numel():
            value.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(value, Mapping):
        for part in value.values():
            _share(part)
    elif isinstance(value, tuple | list):
        for part in value:
            _share(part)
    elif is_dataclass(value):
        for part in vars(value).values():
            _share(part)
