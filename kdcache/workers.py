"""Items of a DataLoader, with what befalls its worker processes as an error of ours. Used by both stages' loaders."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .errors import KDCacheError, StoreError


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
    items = iter(loader)
    while True:
        try:
            with naming_killed_workers():
                item = next(items)
        except StopIteration:
            return
        except KeyboardInterrupt:
            if isinstance(items, _MultiProcessingDataLoaderIter):  # its traceback would keep the workers alive
                items._shutdown_workers()
            raise
        if isinstance(item, KDCacheError):
            raise item
        yield item


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


def empty_tensor(shape: Sequence[int], dtype: np.dtype[Any], *, shared: bool) -> Tensor:
    """A tensor to be filled. uint16 is int16 here, bit for bit: torch lacks it in full.

    shared: in shared memory if this is a worker, so that `hand_over` copies nothing.

    Raises StoreError if shared memory is full.
    """
    of_torch = torch.from_numpy(np.empty(0, np.int16 if dtype == np.uint16 else dtype)).dtype
    if not shared or get_worker_info() is None or 0 in shape:
        return torch.empty(tuple(shape), dtype=of_torch)
    with _naming_full_memory():  # as torch's own collation does:
        storage = torch.UntypedStorage._new_shared(prod(shape) * dtype.itemsize, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=of_torch).set_(storage).view(tuple(shape))


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
