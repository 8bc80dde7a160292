"""hash_encode: keys to packed codes."""

from typing import Literal, overload

import torch
from torch import Tensor

from hata.ops.inference import inference_only


@overload
def hash_encode(
    keys: Tensor, key_weights: Tensor, *, key_norms: Literal[False] = ...
) -> Tensor: ...
@overload
def hash_encode(
    keys: Tensor, key_weights: Tensor, *, key_norms: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@inference_only
def hash_encode(
    keys: Tensor, key_weights: Tensor, *, key_norms: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Encodes keys as packed signs of their projections.

    Bit ``i`` of ``codes[b, h, s]`` is 1 iff ``keys[b, s, h] @ key_weights[h, :, i] > 0``, products
    accumulated in float32; bit ``i`` is bit ``i % 32`` of word ``i // 32``, lowest bit first
    (HATA, arXiv 2506.02572, section 3.1). The same key gives the same code in any batch and at any
    position. The codes of one call are themselves a contiguous code cache.

    Args:
        keys: Keys after position embedding, ``[batch, seq_len, num_kv_heads, head_dim]``, float16
            or bfloat16 (float32 too on CPU); any strides, last dimension contiguous. ``head_dim``
            is 64, 96, 128, 192, 256 or 512 on CUDA, a multiple of 8 up to 512 on CPU.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``, dtype of ``keys``, contiguous;
            ``num_bits`` is a multiple of 32 up to 256.
        key_norms: Whether to return the keys' Euclidean norms as well.

    Returns:
        ``codes`` ``[batch, num_kv_heads, seq_len, num_bits // 32]``, int32. With ``key_norms`` a
        pair of them and ``norms`` ``[batch, num_kv_heads, seq_len]``, computed in float32 and
        rounded to float16; norms saturate at 65504.

    Raises:
        ValueError: A tensor requires a gradient while autograd is on.
        RuntimeError: A shape, dtype, stride or device is not as above.
    """
    codes, norms = torch.ops.hata.hash_encode.default(keys, key_weights, key_norms)
    return (codes, norms) if key_norms else codes


@torch.library.register_fake("hata::hash_encode")
def _(keys: Tensor, key_weights: Tensor, key_norms: bool = False) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_kv_heads, _ = keys.shape
    num_words = key_weights.shape[2] // 32
    return (
        keys.new_empty((batch, num_kv_heads, seq_len, num_words), dtype=torch.int32),
        keys.new_empty((batch, num_kv_heads, seq_len if key_norms else 0), dtype=torch.float16),
    )
