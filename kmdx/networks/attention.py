"""Attention without a full matrix of weights, and Demucs' local attention in float32.

There are two implementations: torch's fused kernel and, on a CPU, matrix products of one block of queries at
a time. On one core of an AMD EPYC (Zen 5), 8 heads of 2688 steps took 0.09 s with blocks instead of 0.16 s
in float32, and 0.08 s instead of 0.16 s in bfloat16, with the same error. :mod:`kmdx.networks.kernels` lists
the processors on which blocks are faster, by precision. The more heads and the fewer steps, the more time
goes into starting each product: on Zen 4, blocks take 1.2 × the time of the fused kernel for 801 steps, and
3.4 × for 62.
"""

from __future__ import annotations

import torch
from demucs.demucs import LocalState
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.networks import kernels, product

BLOCK = 384  # queries at a time
SHORT = 256  # fewer queries than these always use the fused kernel
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # in which blocks can be used


class FusedAttention(nn.MultiheadAttention):
    """Multi-head attention without masks, batch first, that does not return attention weights.

    In inference, torch's own layer computes the full matrix of attention weights if query and key are the
    same. On two cores of an AMD EPYC (Zen 1), the fused kernel needs 0.26 s instead of 0.33 s for 8 heads of
    2656 steps.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *masks: object, **options: object
    ) -> tuple[Tensor, None]:
        """Attend from ``(B, T, C)`` to ``(B, S, C)``."""
        assert key is value
        assert not any(mask is not None for mask in masks)
        assert all(options.get(name) is None for name in ("attn_mask", "key_padding_mask"))
        size = self.embed_dim
        weights, biases = self.in_proj_weight, self.in_proj_bias
        if query is key:
            parts = product.linear(query, weights, biases).chunk(3, dim=-1)
        else:
            queries = product.linear(query, weights[:size], biases[:size])
            parts = (queries, *product.linear(key, weights[size:], biases[size:]).chunk(2, dim=-1))
        heads = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        result = attend(*heads)
        out = self.out_proj
        return product.linear(result.transpose(1, 2).flatten(2), out.weight, out.bias), None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this class can replace a layer."""
        return (
            type(module) is nn.MultiheadAttention
            and module.batch_first
            and module._qkv_same_embed_dim
            and module.in_proj_bias is not None
            and module.bias_k is None
            and not module.add_zero_attn
        )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from ``(B, heads, T, D)`` to ``(B, heads, S, D)``, in the faster way for this processor."""
    on_cpu = query.device.type == "cpu" and not torch.is_grad_enabled()
    if on_cpu and query.shape[-2] >= SHORT and blocks_are_used(query.dtype):
        return attend_in_blocks(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by matrix products; weights are computed in float32 even if all else is in half precision."""
    query = query * query.shape[-1] ** -0.5
    result = torch.empty_like(query)
    with torch.autocast(query.device.type, enabled=False):
        for batch in range(query.shape[0]):
            for head in range(query.shape[1]):
                keys = key[batch, head].float().contiguous()  # (S, D)
                values = value[batch, head].T.contiguous()  # (D, S)
                parts = query[batch, head].split(BLOCK), result[batch, head].split(BLOCK)
                for queries, target in zip(*parts, strict=True):
                    weights = product.linear(queries.float(), keys).softmax(-1).to(value.dtype)
                    target.copy_(product.linear(weights, values))
    return result


def blocks_are_used(dtype: torch.dtype) -> bool:
    """Whether the processor's entry in the table enables blocks for this precision."""
    return PRECISIONS.get(dtype) in kernels.here().attention


class ExactLocalState(LocalState):
    """Demucs' local attention, always in float32.

    It counts frames in the type of its input, and bfloat16 has no odd numbers above 256: in a window of
    44 s, neighboring frames would get the same position. In float32, a branch's error falls from -8 dB to
    -35 dB.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, C, T)``; float32 out."""
        with torch.autocast(x.device.type, enabled=False):
            attended: Tensor = super().forward(x.float())
        return attended
