"""Items of a DataLoader, with a killed worker process as an error of ours. Used by both stages' loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from .errors import StoreError


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's items. Raises StoreError if a worker process was killed; the message says what to try."""
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise StoreError(
                f"a worker process was killed ({reason}), often for lack of memory; run the command again with fewer --workers or a smaller --batch-size"
            ) from error
        yield item


def as_it_is(item: Any) -> Any:
    """A collate function for datasets that make whole batches themselves."""
    return item
