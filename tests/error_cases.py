"""Valid arguments of every operator, and what happens when some are replaced."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from cases import (
    copy_storage,
    make_caches,
    random_codes,
    random_indices,
    random_vectors,
    row_cache,
)
from closeness import assert_equal


class Rejects:
    """Calls an operator with some arguments replaced and expects an error that says so.

    The valid arguments: 2 sequences of 40 and 7 positions in 8 pages of 16, 1 query token, 6 and 2
    heads of 64 elements, 64 bits, 4 planes, float16.
    """

    def __init__(self, op: str, device: str) -> None:
        self.op = op
        self.device = device
        self.valid = arguments(op, device)
        getattr(hata, op)(**self.valid)

    def __call__(self, message: str, **changes: Any) -> None:
        """A dtype as a change converts the argument, anything else replaces it."""
        for name, value in changes.items():
            if isinstance(value, torch.dtype):
                changes[name] = self.valid[name].to(value)
        tensors = [t for t in self.valid.values() if isinstance(t, Tensor)]
        before = [copy_storage(t) for t in tensors]
        with pytest.raises(
            RuntimeError, match=re.escape(f"hata::{self.op}: {message}") + r"(\n|$)"
        ):
            getattr(hata, self.op)(**{**self.valid, **changes})
        for t, copy in zip(tensors, before, strict=True):
            assert_equal(t, copy)

    def half(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float16, device=self.device)

    def int32(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    def float32(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def workspace(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def strided(self, name: str) -> Tensor:
        """The argument with a gap after each element."""
        return self.valid[name].repeat_interleave(2, -1)[..., ::2]


def arguments(op: str, device: str) -> dict[str, Any]:
    def vectors(*shape: int) -> Tensor:
        return random_vectors(*shape, dtype=torch.float16, device=device)

    c = make_caches([40, 7], device=device, key_norms=True)
    kv = {"k_cache": c.k_cache, "v_cache": c.v_cache}
    codes = {"code_cache": c.code_cache, "norm_cache": c.norm_cache}
    tables = {"block_table": c.block_table, "cache_seqlens": c.cache_seqlens}
    q = {"q": vectors(2, 1, 6, 64)}
    tokens = {"k": vectors(2, 1, 2, 64), "v": vectors(2, 1, 2, 64)}
    key_weights = {"key_weights": vectors(2, 64, 64)}
    query = {"query_weights": vectors(2, 64, 64), "query_bits": 4}
    planes = {"planes": random_codes(2, 1, 2, 4, 2, device=device), "weight_sum": 15}
    budget = {"top_k": 8, "num_sink": 1, "num_recent": 2}
    scores = {"scores": torch.zeros(2, 1, 2, 48, dtype=torch.int32, device=device)}
    states = {name: vectors(2, 1, 6, 64) for name in ("out_a", "out_b")}
    lses = {name: torch.zeros(2, 1, 6, device=device) for name in ("lse_a", "lse_b")}
    indices = {"indices": random_indices([40, 7], 1, 2, 8, device=device)}
    return {
        "hash_encode": {"keys": vectors(2, 5, 2, 64), **key_weights},
        "encode_query": {**q, **query},
        "cache_append": {**tokens, **key_weights, **kv, **codes, **tables},
        "cache_write": {
            "k": vectors(3, 2, 64),
            "v": vectors(3, 2, 64),
            **key_weights,
            **kv,
            **codes,
            "slot_mapping": torch.tensor([0, -1, 127], device=device),
        },
        "hamming_score": {**planes, **codes, **tables, "max_seq_len": 48},
        "select_topk": {
            **scores,
            "cache_seqlens": c.cache_seqlens,
            **budget,
            "return_cut": True,
        },
        "score_select": {**planes, **codes, **tables, **budget, "return_cut": True},
        "fetch_rows": {**indices, **kv, **tables, **row_cache(c, 9)},
        "gather_attention": {**q, **kv, **tables, **indices},
        "dense_attention": {**q, **kv, **tables},
        "merge_attention_states": {**states, **lses},
        "decode_step": {**q, **tokens, **key_weights, **query, **kv, **codes, **tables, **budget},
    }[op]
