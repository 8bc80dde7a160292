import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hata
from attention_model import DENSE, FEW, SPARSE, all_positions, fill, queries
from cache_model import make_cache, new_tokens
from hata import reference


@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_mass_is_the_selected_share(
    device: str, softcap: float | None, q_len: int, page_size: int | None
) -> None:
    cache = make_cache(device, torch.float16, config=FEW, page_size=page_size)
    fill(cache, 40, [40, 11, 1])
    q, (k, v) = queries(cache, q_len), new_tokens(cache, q_len)
    for layer_idx in (DENSE, SPARSE):
        hata.decode_attention(q, k, v, cache, layer_idx)
    indices, _ = cache.last_selection(SPARSE)
    mass = hata.attention_mass(q, cache, SPARSE, indices, softcap=softcap)
    assert mass.shape == q.shape[:3]
    assert mass.dtype == torch.float32
    everything = all_positions(cache, q_len)
    kv = (cache.k_cache[SPARSE].double(), cache.v_cache[SPARSE].double())
    place = (cache.block_table, cache.cache_seqlens)
    _, lse = reference.gather_attention(q.double(), *kv, *place, indices, softcap=softcap)
    _, dense_lse = reference.gather_attention(q.double(), *kv, *place, everything, softcap=softcap)
    # float32 softmax over at most 43 positions: a few roundings of numbers below 1
    torch.testing.assert_close(mass.double(), (lse - dense_lse).exp().double(), rtol=0, atol=1e-5)
    whole = hata.attention_mass(q, cache, SPARSE, everything)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-5)
    none = torch.full_like(indices, -1)
    assert (hata.attention_mass(q, cache, SPARSE, none) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_idx": -1}, "layer_idx must be in 0..1, got -1"),
        ({"q": torch.zeros(3, 1, 6, 32)}, "q must have shape [batch=3, q_len, num_heads, head_dim"),
        ({"softcap": -1.0}, "softcap must be above 0, got -1.0"),
        ({"indices": torch.zeros(3, 2, 2, 9)}, "indices must have shape [batch=3, q_len=1"),
        ({"indices": torch.zeros(3, 1, 2, 9)}, "indices must be torch.int32, got torch.float32"),
    ],
)
def test_attention_mass_rejects(device: str, changes: dict[str, Any], message: str) -> None:
    cache = make_cache(device, torch.float16, config=FEW)
    fill(cache, 10)
    indices = torch.zeros(3, 1, 2, 9, dtype=torch.int32)
    arguments = {"q": queries(cache, 1), "layer_idx": SPARSE, "indices": indices, **changes}
    moved = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(f"hata.attention_mass: {message}")):
        hata.attention_mass(cache=cache, **moved)
