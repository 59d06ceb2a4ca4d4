"""The teacher's tail: its last blocks, final norm and head, cut out of it by extract and built again by train without the rest.

The file holds every tensor of these modules, buffers that timm does not save included (Swin's relative-position index, BEiT's zero key
bias), and what the model's own pass gives them beside the tokens (rotary embeddings, a shared position bias): nothing is computed again,
so a tail equals the teacher to the bit. The modules' code is timm's: the whole model is built without memory (torch's meta device),
all but the tail taken out of it, and the tail's tensors put in. Nothing here needs the teacher.

A tail is frozen and in eval mode; gradients flow through it. It may run without prefix tokens (cls, registers), as ScaleKD's originals do
it: then rotary embeddings start at the first token, and the position bias loses the prefix's rows and columns. That is an approximation
of the teacher; its distance is measured when a tail is made.

Legend: B batch, T grid tokens, P prefix tokens, C channels, K classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import CorruptError, MissingError, TeacherError
from .format import TailIdentity
from .nodes import to_tokens
from .paths import tail_weights_path
from .plan import blake2b_128
from .timm_models import SAFETENSORS_ERRORS, bounded_modules, build_model, check_described_model

if TYPE_CHECKING:
    from .cache import TeacherLayer
    from .store import Store

MAX_TAIL_BYTES = 16 << 30
FINAL_NORM = "norm"
_ARGUMENT = "argument."
"""Prefix of tensors that are no parameter or buffer of a module."""

Layout = Literal["NLC", "NHWC", "NCHW"]


class Tail(nn.Module):
    """The last modules of a teacher, frozen and always in eval mode. Made by `build_tail`."""

    def __init__(self, model: nn.Module, card: TailIdentity, arguments: Mapping[str, Tensor], *, with_prefix: bool) -> None:
        """model: the teacher with all but the tail taken out of it. with_prefix: whether passes are given the teacher's prefix tokens."""
        super().__init__()
        self.model, self.card = model, card
        self.num_prefix = card.prefix_tokens if with_prefix else 0
        for name, tensor in arguments.items():
            self.register_buffer(_buffer_name(name), tensor if with_prefix else self._without_prefix(tensor))
        if not with_prefix and card.prefix_tokens:
            _drop_prefix(model, card.prefix_tokens)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Tail:
        """Eval mode, whatever is asked for: DropPath would make two passes differ."""
        super().train(False)
        return self

    def forward(self, tokens_BTC: Tensor, prefix_BPC: Tensor | None = None, *, modules: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Through `modules` (default: all of the card's): {"grid": (B, T', C')[, "prefix": (B, P, C')]}, row-major.

        tokens_BTC: the grid tokens that the first of them takes, row-major. prefix_BPC: given for a tail that was built with its prefix.
        """
        if (0 if prefix_BPC is None else prefix_BPC.shape[1]) != self.num_prefix:
            raise ValueError(f"expected {self.num_prefix} prefix tokens, found {0 if prefix_BPC is None else prefix_BPC.shape[1]}")
        x = self._to_layout(tokens_BTC, prefix_BPC)
        for name in self.card.modules if modules is None else modules:
            arguments = {keyword: getattr(self, _buffer_name(tensor)) for keyword, tensor in self.card.arguments.get(name, {}).items()}
            x = self.model.get_submodule(name)(x, **arguments)
        grid_BTC, passed_BPC = _split(x, self.card.layout, self.num_prefix)
        return {"grid": grid_BTC, "prefix": passed_BPC} if self.num_prefix else {"grid": grid_BTC}

    def head(self, value: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Logits (B, K) from the value of node `norm`: {"grid": (B, T, C)[, "prefix": (B, P, C)]}. Raises TeacherError without a head."""
        if not self.card.head:
            raise TeacherError(f"the tail of {self.card.model} has no head: the teacher has no classifier; expected logits in the cache")
        tokens = value["grid"] if "prefix" not in value else torch.cat([value["prefix"], value["grid"]], dim=1)
        logits: Tensor = self.model.forward_head(_as_map(tokens, self.card.layout, grid))  # type: ignore[operator]  # timm's own method
        return logits

    def _to_layout(self, tokens_BTC: Tensor, prefix_BPC: Tensor | None) -> Tensor:
        if prefix_BPC is not None:
            tokens_BTC = torch.cat([prefix_BPC, tokens_BTC], dim=1)
        return _as_map(tokens_BTC, self.card.layout, self.card.grid)

    def _without_prefix(self, tensor: Tensor) -> Tensor:
        """Of a bias between all tokens the part between grid tokens; anything else as it is."""
        count, prefix = self.card.grid[0] * self.card.grid[1] + self.card.prefix_tokens, self.card.prefix_tokens
        return tensor[..., prefix:, prefix:].contiguous() if tensor.ndim >= 2 and tensor.shape[-2:] == (count, count) else tensor


def _as_map(tokens_BTC: Tensor, layout: Layout, grid: tuple[int, int]) -> Tensor:
    if layout == "NLC":
        return tokens_BTC
    map_BHWC = tokens_BTC.reshape(len(tokens_BTC), *grid, -1)
    return map_BHWC if layout == "NHWC" else map_BHWC.permute(0, 3, 1, 2)


def _buffer_name(tensor: str) -> str:
    return tensor.replace(".", "_")


def _drop_prefix(model: nn.Module, prefix_tokens: int) -> None:
    """Tell the attention modules that no prefix tokens come: rotary embeddings from the first token on, position biases between grid tokens."""
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "num_prefix_tokens", None), int):
            module.num_prefix_tokens = 0
        for method in _BIAS_METHODS:
            if hasattr(module, method):
                setattr(module, method, partial(_bias_between_grid_tokens, module, method, prefix_tokens))


_BIAS_METHODS = ("_get_rel_pos_bias", "get_bias")
"""What timm's BEiT, and its ViTs with relative positions, make the (1, heads, P + T, P + T) bias of one block by."""


def _bias_between_grid_tokens(module: nn.Module, method: str, prefix_tokens: int) -> Tensor:
    """The bias without the prefix tokens' rows and columns."""
    bias: Tensor = getattr(type(module), method)(module)
    return bias[..., prefix_tokens:, prefix_tokens:]


# --- cutting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CutTail:
    """A tail as it comes out of a model: the file's tensors, and what its card says of them."""

    tensors: dict[str, Tensor]
    head: tuple[str, ...]
    layout: Layout
    grid: tuple[int, int]
    channels: int
    prefix_tokens: int
    arguments: dict[str, dict[str, str]]


def cut_tail(model: nn.Module, images_BCHW: Tensor, modules: Sequence[str], *, model_name: str) -> CutTail:
    """Cut `modules` and the head out of a model in eval mode, from what its own pass over a few images gives them.

    Raises TeacherError for modules that a pass does not go through, or that are given what can't be stored.
    """
    inputs, given = _watch(model, images_BCHW, modules, model_name=model_name)
    layout: Layout = "NLC" if inputs.ndim == 3 else "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"
    try:
        value, grid = to_tokens(model, inputs)
    except TeacherError as error:
        raise TeacherError(f"teacher {model_name}: its tail can't be cut: {error}; choose another teacher") from error
    prefix = value["prefix"].shape[1] if "prefix" in value else 0
    names = [name for name, _ in model.named_children()]
    has_head = int(getattr(model, "num_classes", 0) or 0) > 0 and FINAL_NORM in names
    head = tuple(names[names.index(FINAL_NORM) + 1 :]) if has_head else ()
    tensors = {name: _stored(tensor) for name, tensor in _tensors_of(model) if _is_within(name, (*modules, *head))}
    arguments: dict[str, dict[str, str]] = {}
    for module, keywords in given.items():
        for keyword, tensor in keywords.items():
            same = [name for name, one in tensors.items() if name.startswith(_ARGUMENT) and torch.equal(one, _stored(tensor))]
            name = same[0] if same else f"{_ARGUMENT}{sum(one.startswith(_ARGUMENT) for one in tensors)}"
            tensors[name] = _stored(tensor)
            arguments.setdefault(module, {})[keyword] = name
    return CutTail(tensors=tensors, head=head, layout=layout, grid=grid, channels=value["grid"].shape[2], prefix_tokens=prefix, arguments=arguments)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _watch(model: nn.Module, images_BCHW: Tensor, modules: Sequence[str], *, model_name: str) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """What the first module takes, and module → keyword → tensor that it is given beside."""
    taken: dict[str, Tensor] = {}
    given: dict[str, dict[str, Tensor]] = {}

    def hook_for(name: str):  # type: ignore[no-untyped-def]  # the hook's own types follow torch's
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*positional, **keywords).arguments
            first = next(iter(bound))
            taken[name] = bound.pop(first)
            for keyword, value in bound.items():
                if isinstance(value, Tensor):
                    given.setdefault(name, {})[keyword] = value
                elif value not in (None, False):
                    raise TeacherError(
                        f"teacher {model_name}: module {name!r} is given {keyword}={value!r}, which a tail can't store; choose another teacher"
                    )

        return hook

    try:
        handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in modules]
    except AttributeError as error:
        raise TeacherError(
            f"teacher {model_name}: expected modules {', '.join(modules)} for its tail, found: {error}; choose another teacher"
        ) from error
    try:
        with torch.no_grad():
            model.forward_features(images_BCHW)  # type: ignore[operator]  # timm's own method
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        if name not in taken:
            raise TeacherError(
                f"teacher {model_name}: its pass does not go through module {name!r} as a whole; its tail can't be cut; choose another teacher"
            )
    return taken[modules[0]], given


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, those included that are not in the state dict."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def tail_distance(tail: Tail, model: nn.Module, images_BCHW: Tensor) -> float:
    """Relative L2 between the grid tokens that a tail gives and those of the model it was cut from, given what its first module takes there."""
    inputs, _ = _watch(model, images_BCHW, tail.card.modules, model_name=tail.card.model)
    grid_BTC, prefix_BPC = _split(inputs, tail.card.layout, tail.card.prefix_tokens)
    with torch.no_grad():
        found = tail(grid_BTC, prefix_BPC if tail.num_prefix else None)["grid"].cpu().double()  # mps has no float64
        expected = _split(model.forward_features(images_BCHW), tail.card.layout, tail.card.prefix_tokens)[0].cpu().double()  # type: ignore[operator]
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm())


def _split(x: Tensor, layout: Layout, prefix: int) -> tuple[Tensor, Tensor]:
    """(grid tokens (B, T, C), prefix tokens (B, P, C)) of what a module takes or gives."""
    if layout == "NLC":
        return x[:, prefix:], x[:, :prefix]
    tokens_BTC = x.flatten(1, 2) if layout == "NHWC" else x.flatten(2).transpose(1, 2)
    return tokens_BTC, tokens_BTC[:, :0]


# --- building --------------------------------------------------------------------------------------------------------


def load_tail(store: Store, layer: TeacherLayer, *, with_prefix: bool = False) -> Tail:
    """The tail of a teacher in a cache, on the CPU. Raises MissingError for a teacher without one, CorruptError for a file that was changed."""
    if layer.tail is None:
        raise MissingError(f"{store.url}: teacher {layer.name!r} has no tail; run 'kdcache extract' again with --for METHOD to add it")
    card, path = layer.tail.identity, tail_weights_path(layer.name)
    data = store.get(path, max_size=MAX_TAIL_BYTES)
    if blake2b_128(data) != card.weights.digest:
        raise CorruptError(f"{store.url}/{path}: bytes were changed: expected digest {card.weights.digest}, found {blake2b_128(data)}")
    tail = build_tail(card, data, with_prefix=with_prefix)
    prefix_BPC = torch.zeros(1, card.prefix_tokens, card.channels) if tail.num_prefix else None
    try:
        with torch.no_grad():
            tail(torch.zeros(1, card.grid[0] * card.grid[1], card.channels), prefix_BPC)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        raise CorruptError(
            f"{store.url}/{path}: the tail can't be run on {card.grid} tokens of {card.channels} channels, as its card says: {error}"
        ) from error
    return tail


def build_tail(card: TailIdentity, data: bytes, *, with_prefix: bool = False) -> Tail:
    """The modules that a card describes, with the tensors of its safetensors file. Nothing of the rest of the teacher takes memory.

    with_prefix: whether passes are given prefix tokens. Raises TeacherError for a model that this timm builds otherwise.
    """
    try:
        tensors = safetensors.torch.load(data)
    except SAFETENSORS_ERRORS as error:
        raise CorruptError(f"the tail of {card.model}: its file is no safetensors file: {error}") from error
    check_described_model(card.model, card.model_args, error=TeacherError, role="the tail of teacher")
    with torch.device("meta"), bounded_modules(error=TeacherError, role=f"the tail of {card.model}"):
        model = build_model(card.model, pretrained=False, checkpoint=None, model_args=card.model_args, error=TeacherError, role="teacher")
    kept = (*card.modules, *card.head)
    _prune(model, kept)
    expected = dict(_tensors_of(model))
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ARGUMENT)}
    wrong = sorted(set(expected) ^ set(found)) or [name for name in expected if expected[name].shape != found[name].shape]
    if wrong:
        import timm

        raise TeacherError(
            f"the tail of {card.model}: timm {timm.__version__} builds other modules than were cached: {', '.join(wrong[:3])}; install the timm that the"
            f" tail was made with ('packages' in its tail.json)"
        )
    for name, tensor in found.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    return Tail(model, card, {name: tensor for name, tensor in tensors.items() if name.startswith(_ARGUMENT)}, with_prefix=with_prefix)


def _prune(model: nn.Module, kept: Sequence[str], prefix: str = "") -> None:
    """Take every parameter, buffer and module out of a model that is not in `kept`; what is taken out of a sequence leaves its place."""
    for registry in (model._parameters, model._buffers):
        for name in registry:
            registry[name] = None
    for name, child in list(model.named_children()):
        path = f"{prefix}{name}"
        if path in kept:
            continue
        if any(one.startswith(f"{path}.") for one in kept):
            _prune(child, kept, f"{path}.")
        else:
            setattr(model, name, nn.Identity())
