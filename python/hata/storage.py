"""The tensors of a cache: pages of keys, values, codes and norms for every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hata.checks import check
from hata.weights import HashWeights

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PageStorage:
    """Pages of every layer, zeros at first.

    Attributes:
        k_cache: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``.
        v_cache: The same shapes.
        code_cache: Per layer ``[num_pages, num_kv_heads, page_size, num_words]``, int32; num_words
            is the layer's own.
        norm_cache: Per layer ``[num_pages, num_kv_heads, page_size]``, float16; or None.
    """

    k_cache: list[Tensor]
    v_cache: list[Tensor]
    code_cache: list[Tensor]
    norm_cache: list[Tensor | None]

    @classmethod
    def allocate(
        cls,
        weights: HashWeights,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "PageStorage":
        """Allocates the pages of all layers; norms only where the weights want them."""
        _, num_kv_heads, head_dim, _ = weights.shape
        rows = (num_pages, page_size, num_kv_heads, head_dim)
        slots = (num_pages, num_kv_heads, page_size)

        def pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        bits, norms = weights.layer_bits, weights.key_norms
        return cls(
            k_cache=[pages(rows, dtype) for _ in bits],
            v_cache=[pages(rows, dtype) for _ in bits],
            code_cache=[pages((*slots, num_bits // 32), torch.int32) for num_bits in bits],
            norm_cache=[pages(slots, torch.float16) if norms else None for _ in bits],
        )

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


def check_dtype(function: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises ValueError unless the operators take caches of this dtype on this device."""
    floats = _FLOATS if torch.device(device).type == "cpu" else _FLOATS[:2]
    check(dtype in floats, function, "dtype", f"be one of {floats} on {device}", dtype)
