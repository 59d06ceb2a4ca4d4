"""Items of a DataLoader, with a killed worker process as an error of ours. Used by both stages' loaders."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .errors import StoreError


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Within, a worker process that was killed is a StoreError that says what to try.

    torch's signal handler raises a RuntimeError in the main thread, wherever that is: in the loader, the model or a wait.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"a worker process was killed ({reason}), often for lack of memory; run the command again with fewer --workers or a smaller --batch-size"
        ) from error


def iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """The loader's items. Raises StoreError if a worker process was killed while it waited for one."""
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
        yield item


def as_it_is(item: Any) -> Any:
    """A collate function for datasets that make whole batches themselves."""
    return item
