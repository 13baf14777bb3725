"""Float32 matrix products on a CPU, with the faster of torch's two libraries.

torch uses MKL for products and oneDNN for convolutions. On AMD CPUs, MKL uses only AVX2 even if AVX-512 is
available: on one core of an EPYC (Zen 5), it reaches 95 to 108 GFLOP/s, and oneDNN 225 to 250. Both add in
float32, but in different orders; their results differ by −120 dB. :mod:`kmdx.networks.kernels` lists which
one is faster on a processor.
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
        """Whether this class can replace a layer."""
        return type(module) is nn.Linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map the last axis of ``(…, in)`` by a weight ``(out, in)``, like ``torch.nn.functional.linear``."""
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
    """Whether the processor's entry in the table enables oneDNN, and it works in this build of torch."""
    return kernels.here().products and onednn_works()


def onednn_works() -> bool:
    """Whether this build of torch can multiply with oneDNN, and the result is correct."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, 512, 512, generator=generator)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        try:
            ours = _onednn(rows, weight)
        except RuntimeError:  # the function exists, but is not implemented in this build
            return False
        return torch.allclose(ours, F.linear(rows, weight), atol=1e-3)


def is_exact_on_cpu(tensor: Tensor) -> bool:
    """Whether operations on a tensor run in float32 on the CPU, without gradients or autocast."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
