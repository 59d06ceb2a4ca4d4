"""Building timm models by name, with errors that say what to do. Shared by the teacher and the students; holds neither.

Names are timm's: a bare name, `hf-hub:org/name`, `local-dir:PATH`. Checkpoints are safetensors or PyTorch files read with
`weights_only`, so that none can run code.
"""

from __future__ import annotations

import contextlib
import difflib
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .errors import KDCacheError
from .plan import canonical_json

SAFETENSORS_ERRORS = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError)
"""What reading a damaged safetensors file raises; KeyError for a type that torch lacks."""
UNPICKLING_ERRORS = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, AssertionError, ArithmeticError, MemoryError, ImportError,
    struct.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip
"""What reading a damaged PyTorch file with `weights_only` raises."""


MAX_MODULES = 100_000
"""Of a model that a cache describes; timm's largest have some thousands."""
_MAX_NUMBER = 1 << 16
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_FOREIGN_ARGS = ("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only", "feature_cfg", "feature_cls", "model_name")


def check_described_model(name: str, model_args: Mapping[str, Any], *, error: type[KDCacheError], role: str) -> None:
    """Raise for a model that a file describes and timm would fetch, read from a path or never finish: a cache may come from anywhere.

    What is left are constructor arguments of an architecture in timm: numbers, names of timm's layers, lists and mappings of them.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise error(f"{role} {name!a:.200}: expected the name of an architecture in timm; nothing is fetched or loaded for a cache")
    foreign = [key for key in model_args if key in _FOREIGN_ARGS or key.startswith("pretrained")]
    if foreign:
        raise error(f"{role} {name}: argument {foreign[0]!a} is none of an architecture; nothing is fetched or loaded for a cache")
    left: list[Any] = [model_args]
    while left:
        value = left.pop()
        if isinstance(value, Mapping | list | tuple):
            left += value.values() if isinstance(value, Mapping) else value
        elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            raise error(f"{role} {name}: expected arguments of at most {_MAX_NUMBER}, found {value!a:.80}")


@contextlib.contextmanager
def bounded_modules(*, error: type[KDCacheError], role: str) -> Iterator[None]:
    """Within it a model of more than MAX_MODULES modules is refused while it is built: a depth of millions would take hours and all memory."""
    count = 0

    def hook(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise error(f"{role}: its arguments ask for a model of more than {MAX_MODULES} modules")

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def build_model(
    name: str, *, pretrained: bool, checkpoint: Path | None, model_args: Mapping[str, Any], error: type[KDCacheError], role: str
) -> nn.Module:
    """A timm model on the CPU in float32. error, role: how failures are reported, e.g. TeacherError and 'teacher'."""
    import timm

    args = dict(model_args)
    state: Mapping[str, Tensor] | None = None
    if checkpoint is not None:
        state = load_weights(checkpoint, error=error, role=role)
        if "num_classes" not in args:
            num_classes = _classes_in(name, state)
            if num_classes is not None:
                args["num_classes"] = num_classes
    source = name.partition(":")[2] if name.startswith("local-dir:") else None
    if source is not None and not Path(source, "config.json").is_file():
        raise error(f"{role} {name!r}: no {Path(source, 'config.json')}; expected a folder that timm's save_for_hf wrote")
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        suggestion = f"near ones: {', '.join(near)}" if near else "none is called nearly so"
        if Path(name, "config.json").is_file():
            suggestion = f"a folder of this name is here: 'local-dir:{name}' takes its model"
        raise error(f"{role} {name!r}: timm {timm.__version__} knows no such model; {suggestion}; timm.list_models() names all")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained and checkpoint is None, **args)
    except TypeError as problem:
        raise error(f"{role} {name!r}: can't be built with {args}: {problem}") from problem
    except SafetensorError as problem:
        raise error(f"{role} {name!r}: its safetensors file is damaged: {_first_line(problem)}") from problem
    except pickle.UnpicklingError as problem:
        raise error(f"{role} {name!r}: its weights file is no weights-only PyTorch file; save it as safetensors: {_first_line(problem)}") from problem
    except (OSError, RuntimeError, ValueError) as problem:
        if isinstance(problem, OSError) or "pretrained" in str(problem).lower() or "connect" in str(problem).lower():
            elsewhere = " or --checkpoint FILE" if role == "teacher" else f" as the {role}, or leave --pretrained out"
            raise error(
                f"{role} {name!r}: its pretrained weights can't be had ({type(problem).__name__}: {_first_line(problem)}); on a machine"
                f" without the hub pass 'local-dir:FOLDER' (as timm's save_for_hf writes){elsewhere}"
            ) from problem
        raise error(f"{role} {name!r}: can't be built: {_first_line(problem)}") from problem
    except (AssertionError, LookupError, AttributeError, ArithmeticError, MemoryError) as problem:  # what timm's constructors raise for odd arguments
        raise error(f"{role} {name!r}: can't be built with {args!r:.300}: {type(problem).__name__} {_first_line(problem)}") from problem
    if state is not None:
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as problem:
            raise error(f"{role} {name!r}: {checkpoint} does not fit the model: {_misfit(model, state)}") from problem
    return model


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Why a state dict can't be loaded, with an example of each kind of difference, and what to do."""
    own = model.state_dict()
    other = [key for key in own if key in state and getattr(state[key], "shape", None) != own[key].shape]
    lacking, beyond = [key for key in own if key not in state], [key for key in state if key not in own]
    parts = [f"it lacks {len(lacking)} of the model's {len(own)} tensors, {lacking[0]} first"] if lacking else []
    parts += [f"it has {len(beyond)} of {len(state)} that the model lacks, {beyond[0]} first"] if beyond else []
    parts += [f"{key} is {_shape(state[key])}, the model's {_shape(own[key])}" for key in other[:2]]
    if len(other) > 2:
        parts.append(f"{len(other) - 2} more are of other shapes")
    if other and not lacking and not beyond:
        remedy = "build the model as it was trained: --model-kwargs img_size=…, num_classes=…"
    else:
        remedy = "expected the state dict of this very architecture: name the model that it was saved from, its arguments by --model-kwargs"
    return f"{'; '.join(parts) or 'its tensors are of another kind'}; {remedy}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, getattr(tensor, "shape", ()))) or "a number"


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or "no message").splitlines()[0][:300]


def load_weights(path: Path, *, error: type[KDCacheError], role: str) -> Mapping[str, Tensor]:
    """A state dict from safetensors or a PyTorch file (timm's own wrappers are looked through). Runs no code from the file."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            tensors: Mapping[str, Tensor] = safetensors.torch.load_file(path)
            return tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as problem:
        raise error(f"{role}: no checkpoint file {path}") from problem
    except (*UNPICKLING_ERRORS, SafetensorError) as problem:
        raise error(f"{role}: {path} can't be read as safetensors or as a weights-only PyTorch file: {_first_line(problem)}") from problem
    for wrapper in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise error(f"{role}: {path} holds no state dict; expected a mapping of names to tensors")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _classes_in(name: str, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a checkpoint's classifier, by the name timm gives it."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name and timm.is_model(name) else None
    classifier = getattr(config, "classifier", None) or "head"
    for candidate in (classifier, "head", "fc", "head.fc", "classifier"):
        weight = state.get(f"{candidate}.weight") if isinstance(candidate, str) else None
        if weight is not None and weight.ndim in (2, 4):
            return int(weight.shape[0])
    return None


def architecture_of(model: nn.Module, name: str) -> str:
    """timm's architecture name of a built model, whatever it was called by."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or name.partition(":")[2].rstrip("/").rpartition("/")[2] or name).split(".")[0]


def model_args_of(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments to rebuild the model with, as JSON types."""
    args = {**getattr(model, "_model_args", {}), **given}
    canonical_json(args)  # a TypeError here is a bug: what can't be written down can't be rebuilt
    return args


def input_size_of(model: nn.Module) -> int:
    """Side of the model's own square input, pixels: the size it was built for, else its data config's."""
    from timm.data import resolve_model_data_config

    size = built_size_of(model) or resolve_model_data_config(model)["input_size"][-2:]
    height, width = int(size[0]), int(size[1])
    if height != width:
        raise KDCacheError(f"{type(model).__name__}: input of {height}x{width} pixels; kdcache serves square inputs only")
    return height


def built_size_of(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels that a model's patch embedding was built for, None where it takes any."""
    for name in ("patch_embed", "stem"):  # Mixers call theirs stem
        size = getattr(getattr(model, name, None), "img_size", None)
        if size is not None:
            return int(size[0]), int(size[1])
    return None


def mean_std_of(model: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Channel mean and standard deviation of the model's input, for pixels in [0, 1]."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = (tuple(float(value) for value in config[name]) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise KDCacheError(f"{type(model).__name__}: {len(mean)} input channels; kdcache serves RGB models only")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
