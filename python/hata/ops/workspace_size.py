"""workspace_size: how much scratch memory a decoding step needs."""

from operator import index

import torch


def workspace_size(
    batch: int,
    q_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    top_k: int,
) -> int:
    """Returns the bytes of workspace that decode_step needs; a larger one is always accepted.

    Args:
        batch: Sequences.
        q_len: Query tokens of each sequence.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Size of a head.
        max_seq_len: Positions that a sequence can have, ``max_pages * page_size``.
        top_k: Positions to select; above ``max_seq_len`` it stands for that.
    """
    # index() makes a number that torch.compile took for dynamic a constant of its graph.
    return _workspace_size(
        index(batch),
        index(q_len),
        index(num_heads),
        index(num_kv_heads),
        index(head_dim),
        index(max_seq_len),
        index(top_k),
    )


# torch.compile can't put an operator that returns no tensor into its graph: it calls it instead.
@torch.compiler.assume_constant_result
def _workspace_size(*sizes: int) -> int:
    return torch.ops.hata.workspace_size.default(*sizes)
