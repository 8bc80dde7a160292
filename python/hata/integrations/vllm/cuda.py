"""The backend of vLLM on a GPU: hata's fused step for decodes, FlashAttention for prompts."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from hata.integrations.vllm.layer import Batch, HataLayer, make_batch

_HEAD_DIMS = [64, 96, 128, 192, 256]


class HataBackend(FlashAttentionBackend):
    """hata's attention for vLLM; keys and values lie as FlashAttention has them."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """vLLM's name for a backend that is not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["HataImpl"]:
        """A layer."""
        return HataImpl

    @staticmethod
    def get_builder_cls() -> type["HataBuilder"]:
        """What describes a batch."""
        return HataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """The head dimensions of hata's kernels."""
        return head_size in _HEAD_DIMS

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders alone."""
        return attn_type == "decoder"


class HataBuilder(FlashAttentionMetadataBuilder):
    """Describes a batch once for all layers; decodes of one q_len can be captured."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        self.has_dense_layers = any(layer.impl.codes is None for layer in layers.values())

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        """Splits the batch; dense attention has FlashAttention's own description.

        That of a part of the batch is made without FlashAttention's ahead-of-time schedule, whose
        buffer holds one.
        """

        def describe(common: CommonAttentionMetadata, whole: bool) -> Any:
            build = super(HataBuilder, self).build
            return build(0, common, fast_build=fast_build or not whole)

        threshold = self.reorder_batch_threshold
        return make_batch(common_attn_metadata, threshold, self.has_dense_layers, describe)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a shared prefix is selected from like the rest."""
        return False


class HataImpl(HataLayer, FlashAttentionImpl):
    """A layer on a GPU."""

    def write_dense(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Writes keys and values alone."""
        self.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def attend_dense(
        self, layer: torch.nn.Module, query: Tensor, kv_cache: Tensor, batch: Any, output: Tensor
    ) -> None:
        """Attends as vLLM does, with float8 queries to a float8 cache."""
        if self.query_quant is not None:  # by its kernel: vLLM's compiler does not come here
            float8, _ = self.query_quant.forward_cuda(query.flatten(1), layer._q_scale)
            query = float8.view(query.shape)
        FlashAttentionImpl.forward(self, layer, query, query, query, kv_cache, batch, output)
