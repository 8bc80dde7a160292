"""The tensors of a cache: pages of keys, values, codes and norms for every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hata.config import HataConfig


@dataclass(frozen=True)
class PageStorage:
    """Pages of every layer, zeros at first.

    Attributes:
        k_cache: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``.
        v_cache: The same shapes.
        code_cache: Per layer ``[num_pages, num_kv_heads, page_size, num_words]``, int32.
        norm_cache: Per layer ``[num_pages, num_kv_heads, page_size]``, float16; or None.
    """

    k_cache: list[Tensor]
    v_cache: list[Tensor]
    code_cache: list[Tensor]
    norm_cache: list[Tensor | None]

    @classmethod
    def allocate(
        cls,
        config: HataConfig,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "PageStorage":
        """Allocates the pages of all layers; norms only where the config keeps them."""
        rows = (num_pages, page_size, num_kv_heads, head_dim)
        codes = (num_pages, num_kv_heads, page_size, config.num_words)

        def per_layer(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        norms: list[Tensor | None] = [None] * num_layers
        if config.key_norms:
            norms = [*per_layer(codes[:3], torch.float16)]
        keys, values = per_layer(rows, dtype), per_layer(rows, dtype)
        return cls(keys, values, per_layer(codes, torch.int32), norms)

    def gather(self, layer_idx: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copies a layer's keys and values together.

        Args:
            layer_idx: The layer.
            pages: ``[batch, num_pages]``, int32.

        Returns:
            k and v, ``[batch, num_pages * page_size, num_kv_heads, head_dim]``.
        """
        page_size, *row = self.k_cache[layer_idx].shape[1:]
        shape = (pages.shape[0], pages.shape[1] * page_size, *row)
        k = self.k_cache[layer_idx].index_select(0, pages.flatten())
        v = self.v_cache[layer_idx].index_select(0, pages.flatten())
        return k.view(shape), v.view(shape)

    def copy_pages(self, sources: Tensor, copies: Tensor, used: int) -> None:
        """Copies pages onto others, in all layers at once.

        Args:
            sources: Pages to read, 1-D, int32.
            copies: Distinct pages to write, as many.
            used: Rows at the start of a page that are worth copying.
        """
        pages = [cache[:, :used] for cache in (*self.k_cache, *self.v_cache)]
        pages += [cache[:, :, :used] for cache in self.code_cache]
        pages += [cache[:, :, :used] for cache in self.norm_cache if cache is not None]
        for cache in pages:
            cache.index_copy_(0, copies.long(), cache.index_select(0, sources))
