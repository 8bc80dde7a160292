"""encode_query: the queries of a group to bit planes."""

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@inference_only
def encode_query(q: Tensor, query_weights: Tensor, *, query_bits: int) -> Tensor:
    """Turns each query token and KV head into one integer vector c, packed as bit planes.

    With ``W = query_weights[h]`` and the query heads ``g`` of KV head ``h``'s group:

    * ``query_bits = 1``: ``c_i = sum_g sign(q_g @ W[:, i])``, where ``sign(0) = -1``: the codes of
      HATA (arXiv 2506.02572, algorithm 3), summed over the group.
    * ``query_bits = 2, 3, 4``: ``z = (sum_g q_g) @ W`` and ``c_i`` is the odd integer nearest
      ``z_i / max|z| * M``, ``M = 2**query_bits - 1``, that is ``2 * level_i - M`` with ``level_i =
      floor((z_i / max|z| * M + M) / 2 + 0.5)``; where all of z is 0, every ``c_i`` is 1.

    Sums and products are float32. The score of a key code b in ``{-1, +1}`` is then ``c @ b``. The
    planes ``s_p`` in ``{-1, +1}`` satisfy ``c_i = sum_p w_p s_p,i`` with the weights 1, 2, 4, ...
    and a last one that brings their sum to ``plane_weight_sum(query_bits, group)``.

    Args:
        q: Queries after position embedding, ``[batch, q_len, num_heads, head_dim]``, float16 or
            bfloat16 (float32 too on CPU); any strides, last dimension contiguous. Query head ``i``
            belongs to KV head ``i // group``, ``group = num_heads // num_kv_heads`` in 1..255.
        query_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of ``q``, contiguous;
            ``num_bits`` is a multiple of 32 up to 256.
        query_bits: 1 to 4.

    Returns:
        ``planes`` ``[batch, q_len, num_kv_heads, num_planes, num_bits // 32]``, int32, where
        ``num_planes = num_planes(plane_weight_sum(query_bits, group))``; bits as in a key code.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride, device or ``query_bits`` is not as above.
    """
    return torch.ops.hata.encode_query.default(q, query_weights, query_bits)


@torch.library.register_fake("hata::encode_query")
def _(q: Tensor, query_weights: Tensor, query_bits: int) -> Tensor:
    batch, q_len, num_heads, _ = q.shape
    num_kv_heads, _, num_bits = query_weights.shape
    planes = num_planes(plane_weight_sum(query_bits, int(num_heads // num_kv_heads)))
    return q.new_empty((batch, q_len, num_kv_heads, planes, num_bits // 32), dtype=torch.int32)


def plane_weight_sum(query_bits: int, group: int) -> int:
    """Returns the largest ``|c_i|``: ``group`` for 1 query bit, else ``2**query_bits - 1``."""
    return group if query_bits == 1 else 2**query_bits - 1


def num_planes(weight_sum: int) -> int:
    """Returns the number of bit planes that hold integers of up to ``weight_sum``."""
    return weight_sum.bit_length()
