"""Before stage one: a folder of images → WebDataset shards in timm's ImageNet layout, byte for byte the same each time.

IMAGES is an ImageFolder: one sub-folder a class, classes numbered in sorted order. Each sample becomes three members,
`<key>.jpg` (the file as it is), `<key>.cls` and `<key>.json`; tar headers carry a fixed time and owner. Hidden folders, such
as .ipynb_checkpoints, are passed over; other files that are no images are counted and reported, never packed in silence.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.console import ProgressBar, counted, say
from kdcache.errors import ShardError, StoreError, UsageError
from kdcache.images import IMAGE_EXTENSIONS
from kdcache.shards import printable, split_member

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Folders that hold the classes of a split: if a dataset has no others, its parts would become its classes."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack and how."""

    images: str
    """ImageFolder: IMAGES/<class>/<file>."""
    out: str
    """Folder for the tars; made if it is not there."""
    name: str | None = None
    """Shards are called NAME-0000.tar, …. Default: the name of IMAGES."""
    samples_per_shard: int = 1251
    """ImageNet's 1,281,167 training images in 1,024 shards have this many."""
    shuffle_seed: int | None = 0
    """Order of samples over shards; None: sorted, class after class, which makes shards of one class each."""


@dataclass(frozen=True)
class PackSummary:
    """What was written."""

    shards: int
    samples: int
    classes: int
    bytes: int
    ignored: int
    """Files that were not packed: no jpg, jpeg, png or webp, hidden, outside a class folder, or links to nothing."""

    def to_json(self) -> dict[str, Any]:
        return {"shards": self.shards, "samples": self.samples, "classes": self.classes, "bytes": self.bytes, "ignored": self.ignored}


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """Write the shards.

    Raises UsageError for a folder or class without images or a bad name, ShardError for a file whose name can be no sample key, StoreError
    if shards are there already or can't be written.
    """
    root = Path(config.images)
    if not root.is_dir():
        raise UsageError(f"images {config.images!r}: no such folder; expected one sub-folder of images a class")
    name = root.resolve().name if config.name is None else config.name
    if not name or any(c in name for c in "/\\\0"):
        raise UsageError(f"--name {name!r}: expected the first part of a file name, without '/' or '\\'; OUT is the folder")
    if config.samples_per_shard < 1:
        raise UsageError(f"samples per shard must be at least 1, found {config.samples_per_shard}")
    classes, samples, ignored = _find_images(root)
    if ignored:
        kinds = Counter(_kind(path) for path in ignored)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        say(f"{config.images}: {counted(len(ignored), 'file')} not packed ({printable(counts)}); first: {printable(str(ignored[0]))}")
    if config.shuffle_seed is not None:
        random.Random(config.shuffle_seed).shuffle(samples)
    keys = _keys(root, [path for path, _ in samples])  # all of them before the first shard is written
    out = Path(config.out)
    count = -(-len(samples) // config.samples_per_shard)
    width = max(4, len(str(count - 1)))
    total = 0
    with ProgressBar(total=len(samples), unit="image", desc="pack", disable=not progress) as bar:
        for shard in range(count):
            chosen = samples[shard * config.samples_per_shard : (shard + 1) * config.samples_per_shard]
            total += _write_shard(out / f"{name}-{shard:0{width}d}.tar", root, chosen, keys, classes, bar)
    return PackSummary(shards=count, samples=len(samples), classes=len(classes), bytes=total, ignored=len(ignored))


def _find_images(root: Path) -> tuple[list[str], list[tuple[Path, int]], list[Path]]:
    """(class names, (image, class) in sorted order, files that are not packed). Raises UsageError for a class without images: it would take a number."""
    try:
        children = sorted(root.iterdir())
    except OSError as error:
        raise UsageError(f"images {str(root)!r} can't be read: {error.strerror}") from error
    folders = [path for path in children if path.is_dir() and not path.name.startswith(".")]
    if not folders:
        raise UsageError(f"images {str(root)!r}: no class folders; expected IMAGES/<class>/<file>")
    ignored = [path for path in children if not path.is_dir()]
    splits = [path.name for path in folders if path.name.lower() in _SPLITS]
    if len(splits) == len(folders):
        example = os.path.join(str(root), splits[0])
        raise UsageError(
            f"images {str(root)!r}: its folders, {' and '.join(splits)}, are splits and no classes; pack each by itself, {example!r} first,"
            f" with a --name of its own"
        )
    samples: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        images, others = _walk(folder)
        if not images:
            raise UsageError(
                f"images {str(root)!r}: class folder {folder.name!r} holds no {', '.join(IMAGE_EXTENSIONS)} file, but would take class number {label};"
                f" remove the folder, or put its images there"
            )
        samples += [(image, label) for image in images]
        ignored += others
    return [folder.name for folder in folders], samples, ignored


def _kind(path: Path) -> str:
    """Why a file is not packed, in a word or two."""
    if path.is_symlink() and not path.is_file():
        return "link to a folder" if path.is_dir() else "link to nothing"
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "no extension"


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images, other files) below `folder`, each sorted. Hidden folders are passed over; links to folders are not followed."""
    images: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files + links:
            path = Path(place, name)
            is_image = not name.startswith(".") and path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()
            (images if is_image else others).append(path)
    return sorted(images), sorted(others)


def _raise(error: OSError) -> None:
    raise StoreError(f"{error.filename} can't be read: {error.strerror}; every image is needed, since classes and shards follow from them") from error


def _keys(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Image → sample key. Raises ShardError for two images with one key: a key is an identity, also across shards."""
    keys: dict[Path, str] = {}
    owners: dict[str, Path] = {}
    for path in sorted(paths):
        key = keys[path] = _key(path.relative_to(root))
        if key in owners:
            raise ShardError(f"key {key!r} would appear twice, for {owners[key]} and {path}; rename one of the files; nothing was written")
        owners[key] = path
    return keys


def _key(relative: Path) -> str:
    """The sample key of an image. Raises ShardError for one that webdataset would skip or read otherwise, or that is no text."""
    key = relative.with_suffix("").as_posix().replace(".", "_")
    extension = relative.suffix.lower().lstrip(".")
    if printable(key) != key:
        raise ShardError(f"{printable(str(relative))!r}: its name is not UTF-8; expected a name that can be a sample key: rename the file")
    if split_member(f"{key}.{extension}") != (key, extension):
        raise ShardError(
            f"{str(relative)!r}: webdataset would not read it as a sample, it skips what lies in a folder called __NAME__; rename the folder"
        )
    return key


def _write_shard(
    path: Path, root: Path, samples: Sequence[tuple[Path, int]], keys: Mapping[Path, str], classes: Sequence[str], bar: Any
) -> int:  # fmt: skip
    from webdataset import TarWriter

    if path.exists():
        raise StoreError(f"{path} is there already; expected a folder without shards of this name: remove them or pass --name")
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            writer = TarWriter(file, mtime=0, encoder=False)
            for image, label in samples:
                relative = image.relative_to(root)
                key = keys[image]
                note = {"label": label, "class": classes[label], "filename": relative.as_posix()}
                extension = image.suffix.lower().lstrip(".")
                writer.write(
                    {
                        "__key__": key,
                        extension: image.read_bytes(),
                        "cls": str(label).encode(),
                        "json": json.dumps(note, sort_keys=True).encode(),
                    }
                )
                bar.update()
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise StoreError(f"{path} can't be written: {error.strerror}{place}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size
