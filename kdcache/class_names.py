"""What a teacher's classes are called, where that is known for sure: for people who look at a cache. Nothing else reads names.

A wrong name is worse than a number. So names are taken from timm only for a teacher that was given by one of timm's own names
with a tag that says which ImageNet its classes are, and from a `local-dir:` folder only if its config.json is the one that the
teacher was loaded from. Else the user gives them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .plan import blake2b_128

if TYPE_CHECKING:
    from .cache import TeacherLayer

_MAX_BYTES = 64 << 20
_TAGS = {1000: "1k", 11821: "12k", 11221: "21k", 21841: "22k", 21842: "22k", 21843: "21k"}
"""Number of classes → what follows `in` in the tag of a model whose last training set has so many (timm 1.0.31: all of its models but two without a set)."""


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes 0 to K - 1."""

    names: tuple[str, ...]
    source: str
    """Where they come from, for people."""

    def __len__(self) -> int:
        return len(self.names)

    def of(self, number: int) -> str | None:
        """The name of a class, None for a number that has none."""
        return self.names[number] if 0 <= number < len(self.names) else None


def read_class_names(path: str) -> ClassNames:
    """Names from a file of the user's: one a line, class 0 first; or JSON, a list or an object of numbers to names. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"class names {path!r}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"class names {path!r}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"class names {path!r}: expected at most {_MAX_BYTES} bytes")
    if path.endswith(".json"):
        try:
            names = _names_of_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"class names {path!r}: expected JSON: {error}") from error
    else:
        names = tuple(line.strip() for line in text.splitlines())
    if not names or not all(names):
        raise UsageError(
            f"class names {path!r}: expected a name a line, class 0 first; or a .json file with a list of names, or an object of numbers"
            f' from "0" on to names'
        )
    return ClassNames(names, path)


def _names_of_json(value: Any) -> tuple[str, ...]:
    """A list of names, or {"0": name, …} without a gap; () for anything else."""
    if isinstance(value, dict):
        value = [value.get(str(number)) for number in range(len(value))]
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    return ()


def teacher_class_names(layer: TeacherLayer) -> ClassNames | None:
    """The names of a cached teacher's classes, or None where they are not known for sure. Imports timm for a teacher of that name."""
    card, made = layer.document.identity, layer.document.provenance
    source = str(made.get("source", ""))
    if not card.num_classes or made.get("checkpoint") or "num_classes" in made.get("model_args", {}):
        return None
    if source.startswith("local-dir:"):
        return _names_in_folder(Path(source.partition(":")[2]), str(made.get("weight_files", {}).get("config.json", "")), card.num_classes)
    return _imagenet_names(source.removeprefix("hf-hub:timm/"), card.num_classes)


def _names_in_folder(folder: Path, digest: str, num_classes: int) -> ClassNames | None:
    """`label_names` of a config.json that timm's save_for_hf wrote, described by `label_descriptions` where it has them."""
    try:
        with open(folder / "config.json", "rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:  # the folder may be gone by now
        return None
    if blake2b_128(data) != digest:
        return None
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return None
    names = _names_of_json(config.get("label_names")) if isinstance(config, dict) else ()
    if len(names) != num_classes:
        return None
    descriptions = config.get("label_descriptions")
    described = tuple(str(descriptions.get(name, name)) for name in names) if isinstance(descriptions, dict) else names
    return ClassNames(described, f"label_names in {folder / 'config.json'}")


def _imagenet_names(name: str, num_classes: int) -> ClassNames | None:
    """timm's names of an ImageNet's classes, for a model name of timm's whose tag says that its last training set was that one."""
    if ":" in name or num_classes not in _TAGS:
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset
    from timm.models import get_pretrained_cfg, is_model

    config = get_pretrained_cfg(name, allow_unregistered=False) if is_model(name) else None
    if config is None or config.num_classes != num_classes:
        return None
    sets: list[str] = re.findall(r"in(1k|12k|21k|22k)(?![0-9a-z])", config.tag or "")
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None or sets[-1:] != [_TAGS[num_classes]]:
        return None
    names = tuple(text.split(",")[0] for text in ImageNetInfo(subset).label_descriptions())
    return ClassNames(names, f"timm's {subset}") if len(names) == num_classes else None
