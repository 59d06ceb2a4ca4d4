"""BatchNorm over the batches of all processes, on CPUs too: torch has its SyncBatchNorm for GPUs only. Used by replicas.

On a GPU torch's own kernels do it. Elsewhere the statistics are summed by differentiable all-reduces, so that two processes with half a batch each
normalise, and pass gradients back, as one with the whole batch. A step costs two small all-reduces a layer, and as many backwards.

Legend: N images of all processes times places, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverProcesses(torch.autograd.Function):
    """y = Σ x over the processes. The gradient of every process's loss by x is the sum of theirs by y."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _OverProcesses(_BatchNorm):
    """Before a BatchNorm in a class's bases: its training pass, over the batches of all processes."""

    _acts: bool
    """Whether it is timm's, with `drop` and `act` after it."""
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float()
        count = x.new_tensor([x.numel() // x.shape[1]])
        totals: Tensor = _SumOverProcesses.apply(torch.cat([x.sum(axes), count]))
        number, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = x - mean.view(shape)
        variance: Tensor = _SumOverProcesses.apply(centred.square().sum(axes)) / number
        self._track(mean.detach(), variance.detach() * number / (number - 1).clamp(min=1))
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        normalised = normalised.to(input.dtype)
        return self.act(self.drop(normalised)) if self._acts else normalised

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C, share)


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Every BatchNorm below `module`, timm's with activation too, takes the statistics of all processes' batches. Names and weights stay."""
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm  # late: timm brings tensorboard along where it is installed

    if device.type == "cuda":
        convert_sync_batchnorm(module)
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            own = type(layer)
            layer.__class__ = type(own.__name__, (_OverProcesses, own), {"_acts": issubclass(own, BatchNormAct2d)})
