"""Matrix products in float32 on a CPU, by the faster of torch's two libraries.

torch asks MKL for products and oneDNN for convolutions. On an AMD CPU MKL keeps to AVX2, also where there is
AVX-512: on one core of an EPYC (Zen 5) it gives 95 to 108 GFLOP/s, oneDNN 225 to 250. Both sum in float32, in
another order: 120 dB apart. Which one is faster is known for the processor: see :mod:`kmdx.networks.kernels`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.networks import kernels


class OneDnnLinear(nn.Linear):
    """A fully connected layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Map the last axis of ``(…, in)``."""
        return linear(input, self.weight, self.bias)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Tell whether a layer is one of these."""
        return type(module) is nn.Linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map the last axis of ``(…, in)`` by a weight ``(out, in)``, as torch's function of that name does."""
    if is_exact_on_cpu(input) and weight.dtype == torch.float32 and onednn_is_used():
        return _onednn(input, weight, bias)
    return F.linear(input, weight, bias)


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """Multiply ``(M, K)`` with each matrix of ``(B, K, N)``."""
    if is_exact_on_cpu(first) and is_exact_on_cpu(second) and onednn_is_used():
        products = [_onednn(first, matrix.T) for matrix in second]
        return torch.stack(products) if len(products) > 1 else products[0][None]
    return torch.matmul(first, second)


@cache
def onednn_is_used() -> bool:
    """Whether the processor's entry of the table asks for oneDNN, and torch has it, and it is correct."""
    return kernels.here().products and onednn_works()


def onednn_works() -> bool:
    """Whether this build of torch multiplies by oneDNN, and correctly."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, 512, 512, generator=generator)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        try:
            ours = _onednn(rows, weight)
        except RuntimeError:  # a build of torch that has it in name only
            return False
        return torch.allclose(ours, F.linear(rows, weight), atol=1e-3)


def is_exact_on_cpu(tensor: Tensor) -> bool:
    """Tell whether what is computed of a tensor is float32 on the CPU, without gradients or autocast."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
