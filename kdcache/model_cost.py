"""What a model costs to use: parameters and multiply-accumulates of one image. For tables; nothing is trained or stored by it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModelCost:
    """Of a model in evaluation."""

    params: int
    macs: int
    """Multiply-accumulates of one image: matrix products, convolutions and attention, as timm's tables have them."""


def cost_of(model: nn.Module, input_size: int) -> ModelCost:
    """Count on square images of `input_size` pixels. The model is left as it was.

    Counted by torch's FlopCounterMode (two operations each) on the meta device, where nothing is computed; a model that can't run there is
    run once on the CPU.
    """
    params = sum(parameter.numel() for parameter in model.parameters())
    twin = copy.deepcopy(model).eval()
    try:
        macs = _macs(twin.to("meta"), input_size, "meta")
    except (NotImplementedError, RuntimeError):  # what torch raises for an operation that has no shape without values
        macs = _macs(copy.deepcopy(model).cpu().eval(), input_size, "cpu")
    return ModelCost(params, macs)


def _macs(model: nn.Module, input_size: int, device: str) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(torch.zeros(1, 3, input_size, input_size, device=device))
    return int(counter.get_total_flops()) // 2
