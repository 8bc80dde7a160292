"""The codes of one layer's keys, in vLLM's own blocks."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hata.integrations.vllm.versions import SideCacheBackend


class SideCache(torch.nn.Module, AttentionLayerBase):
    """A second cache of one attention layer: the same blocks, other bytes.

    To vLLM it is an attention layer that nobody calls. Its blocks are those of the keys, so that
    memory is counted, and prefix caching, preemption and the reuse of blocks hold for codes as
    they do for keys. A block holds the codes of all heads, then their norms.

    Args:
        num_kv_heads: KV heads of this rank.
        num_words: Words of a code.
        key_norms: Whether norms are kept too.
    """

    def __init__(self, num_kv_heads: int, num_words: int, key_norms: bool) -> None:
        super().__init__()
        self.num_kv_heads, self.num_words, self.key_norms = num_kv_heads, num_words, key_norms
        self.code_cache = torch.tensor([])
        self.norm_cache: Tensor | None = None

    @property
    def kv_cache(self) -> Tensor:
        """What vLLM allocates: int8, a block a row, the other dimensions as its version has it."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: Tensor) -> None:
        self._kv_cache = kv_cache
        if kv_cache.numel() == 0:
            return
        blocks = kv_cache.flatten(1)
        token_bytes = self.num_kv_heads * self.num_words * 4
        block_size = blocks.shape[1] // (token_bytes + 2 * self.num_kv_heads * self.key_norms)
        end = block_size * token_bytes
        shape = (len(blocks), self.num_kv_heads, block_size)
        self.code_cache = blocks[:, :end].view(torch.int32).view(*shape, self.num_words)
        self.norm_cache = (
            blocks[:, end:].view(torch.float16).view(shape) if self.key_norms else None
        )

    def get_attn_backend(self) -> type[SideCacheBackend]:
        """What says how the cache lies in memory."""
        return CodeBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """Its size: one head whose elements are the bytes of a token."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.num_kv_heads * (4 * self.num_words + 2 * self.key_norms),
            head_size_v=0,
            dtype=torch.int8,
        )


class _NoMetadata(AttentionMetadataBuilder):
    """A layer that nobody calls needs no metadata, in a CUDA graph or outside."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, *args: Any, **kwargs: Any) -> None:
        return None


class CodeBackend(SideCacheBackend):
    """The backend of a side cache, as far as vLLM asks for it."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's messages."""
        return "HATA_CODES"

    @staticmethod
    def get_impl_cls() -> type:
        """There is none: nothing attends to codes by themselves."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[_NoMetadata]:
        """What builds nothing."""
        return _NoMetadata
