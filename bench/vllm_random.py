"""A KV connector that takes the place of prompts: random numbers in their part of the cache.

vLLM names it in ``kv_transfer_config``. Like the one of vLLM that it is made from, it says that it
has the keys and values of every token of a new prompt but the last, and writes them when they are
asked for. That one writes the same number everywhere; here keys and values are normal and codes are
random bits, which are scored and selected as those of a text would be, at other positions.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import (
    DecodeBenchConnector,
)

BLOCKS = 2048  # at once: what a layer's random numbers take beside the cache


class RandomCache(DecodeBenchConnector):  # type: ignore[misc]
    """Every new prompt has been computed elsewhere, to random numbers."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes the blocks that vLLM gave to new prompts, in all layers' caches."""
        for groups, _ in self._connector_metadata.reqs_to_fill.values():
            (block_ids,) = groups  # full attention, and codes with it
            for cache in self.connector_worker.kv_caches.values():
                for blocks in torch.tensor(block_ids, device=cache.device).split(BLOCKS):
                    cache[blocks] = random_like(cache[blocks])


def random_like(cache: Tensor) -> Tensor:
    if cache.dtype == torch.int8:  # codes
        return torch.randint_like(cache, -128, 128)
    if cache.dtype == torch.uint8:  # float8 keys and values
        return (
            torch.randn(cache.shape, device=cache.device).to(torch.float8_e4m3fn).view(torch.uint8)
        )
    return torch.randn_like(cache)
