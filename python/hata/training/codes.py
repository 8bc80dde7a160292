"""Codes of keys and integer vectors of queries, as numbers that one can train through."""

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """+1 where x > 0, else -1: the bits of a code."""
    return torch.where(x > 0, 1.0, -1.0)


def quantize(z: Tensor, query_bits: int) -> Tensor:
    """The odd integers nearest to ``M z / max|z|``, ``M = 2^query_bits - 1``; +1 for zeros.

    Source: docs/algorithm.md, step 2, in float32 numbers.
    """
    weight_sum = 2**query_bits - 1
    largest = z.abs().amax(-1, keepdim=True)
    x = torch.where(largest == 0, 1.0, z / largest * weight_sum)
    return 2 * ((x + weight_sum) * 0.5 + 0.5).floor().clamp(0, weight_sum) - weight_sum


def query_vector(q: Tensor, query_weights: Tensor, query_bits: int) -> Tensor:
    """The integer vector of each query token.

    Args:
        q: ``[heads, num_queries, group, head_dim]``, float32.
        query_weights: ``[heads, head_dim, num_bits]``.
        query_bits: 1 for the sum of the group's sign codes, 2 to 4 for a quantized projection.

    Returns:
        ``[heads, num_queries, num_bits]``, float32 integers.
    """
    if query_bits == 1:
        flat = q.flatten(1, 2)
        return sign(torch.bmm(flat, query_weights)).unflatten(1, q.shape[1:3]).sum(2)
    return quantize(torch.bmm(q.sum(2), query_weights), query_bits)
