"""The tensors of a cache: pages of keys, values, codes and norms for every layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hata import ops
from hata.checks import check
from hata.host_memory import HostMemory
from hata.weights import HashWeights

FLOAT8 = torch.float8_e4m3fn
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PageStorage:
    """Pages of every layer, zeros at first.

    Attributes:
        k_cache: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``.
        v_cache: The same shapes.
        code_cache: Per layer ``[num_pages, num_kv_heads, page_size, num_words]``, int32; num_words
            is the layer's own. None for a layer without codes.
        norm_cache: Per layer ``[num_pages, num_kv_heads, page_size]``, float16; or None.
        k_scale: Per layer ``[num_kv_heads]``, float32, ones: a key is what its row holds times
            this. None but for float8.
        v_scale: The same for values.
    """

    k_cache: list[Tensor]
    v_cache: list[Tensor]
    code_cache: list[Tensor | None]
    norm_cache: list[Tensor | None]
    k_scale: list[Tensor | None]
    v_scale: list[Tensor | None]

    @classmethod
    def allocate(
        cls,
        weights: HashWeights,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        selecting_layers: Sequence[int],
        host: HostMemory | None = None,
        num_resident_layers: int = 0,
    ) -> "PageStorage":
        """Allocates the pages of all layers; norms only where the weights want them.

        Args:
            weights: The model's hash weights.
            num_pages: Pages of each layer.
            page_size: Positions of a page.
            dtype: The dtype of keys and values.
            device: Where the tensors lie.
            selecting_layers: The layer whose selection each layer attends to; a layer that attends
                to another's keeps neither codes nor norms.
            host: Where the keys and values of all but the first layers lie: page after page, in
                each one layer and KV head after the other, and a position's key beside its value.
                So a row is one piece of memory, and neighbouring rows are neighbours, in as few of
                the small pages by which a GPU finds host memory as can be.
            num_resident_layers: First layers whose keys and values do not.
        """
        _, num_kv_heads, head_dim, _ = weights.shape
        rows = (num_pages, page_size, num_kv_heads, head_dim)
        slots = (num_pages, num_kv_heads, page_size)

        def pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def scales() -> list[Tensor | None]:
            scaled = dtype == FLOAT8
            return [torch.ones(num_kv_heads, device=device) if scaled else None for _ in bits]

        bits, norms = weights.layer_bits, weights.key_norms
        hashed = [i == selecting for i, selecting in enumerate(selecting_layers)]
        num_resident = len(bits) if host is None else num_resident_layers
        k_cache, v_cache = ([pages(rows, dtype) for _ in range(num_resident)] for _ in range(2))
        if host is not None:
            shape = (num_pages, len(bits) - num_resident, num_kv_heads, page_size, 2, head_dim)
            used = math.prod(shape) * dtype.itemsize
            layers = host.tensor()[:used].view(dtype).view(shape).transpose(2, 3).unbind(1)
            k_cache += [layer[:, :, :, 0] for layer in layers]
            v_cache += [layer[:, :, :, 1] for layer in layers]
        return cls(
            k_cache=k_cache,
            v_cache=v_cache,
            code_cache=[
                pages((*slots, num_bits // 32), torch.int32) if has_codes else None
                for num_bits, has_codes in zip(bits, hashed, strict=True)
            ],
            norm_cache=[
                pages(slots, torch.float16) if has_codes and norms else None for has_codes in hashed
            ],
            k_scale=scales(),
            v_scale=scales(),
        )

    def append(
        self,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
        key_weights: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        new_seqlens: Tensor | None,
    ) -> None:
        """Writes a layer's new tokens, with codes where it keeps them, by `hata.cache_append`."""
        codes = self.code_cache[layer_idx]
        ops.cache_append(
            k,
            v,
            None if codes is None else key_weights,
            self.k_cache[layer_idx],
            self.v_cache[layer_idx],
            codes,
            self.norm_cache[layer_idx],
            block_table,
            cache_seqlens,
            new_seqlens=new_seqlens,
            k_scale=self.k_scale[layer_idx],
            v_scale=self.v_scale[layer_idx],
        )

    def unscaled(
        self, layer_idx: int, k: Tensor, v: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns rows of a layer, those of a float8 cache times their scales in ``dtype``."""
        k, v = (
            rows if scale is None else (rows.float() * scale[:, None]).to(dtype)
            for rows, scale in ((k, self.k_scale[layer_idx]), (v, self.v_scale[layer_idx]))
        )
        return k, v

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
        k, v = (
            _copyable(cache[layer_idx]).index_select(0, pages.flatten())
            for cache in (self.k_cache, self.v_cache)
        )
        dtype = self.k_cache[layer_idx].dtype
        return k.view(dtype).view(shape), v.view(dtype).view(shape)

    def copy_pages(self, sources: Tensor, copies: Tensor, used: int) -> None:
        """Copies pages onto others, in all layers at once.

        Args:
            sources: Pages to read, 1-D, int32.
            copies: Distinct pages to write, as many.
            used: Rows at the start of a page that are worth copying.
        """
        pages = [_copyable(cache)[:, :used] for cache in (*self.k_cache, *self.v_cache)]
        hashed = (*self.code_cache, *self.norm_cache)
        pages += [cache[:, :, :used] for cache in hashed if cache is not None]
        for cache in pages:
            cache.index_copy_(0, copies.long(), cache.index_select(0, sources))


def _copyable(rows: Tensor) -> Tensor:
    """A view that torch can copy by index, which it does not do with float8."""
    return rows.view(torch.uint8) if rows.dtype == FLOAT8 else rows


def check_dtype(function: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises ValueError unless the operators take caches of this dtype on this device."""
    floats = _FLOATS if torch.device(device).type == "cpu" else _FLOATS[:2]
    check(dtype in floats, function, "dtype", f"be one of {floats} on {device}", dtype)


def check_kv_cache_dtype(
    function: str, kv_cache_dtype: torch.dtype | None, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError unless a cache for queries of this dtype can hold rows of that one.

    Args:
        function: Who asks, for the message.
        kv_cache_dtype: Of keys and values; None is the queries'.
        dtype: The queries'; None where it is not known yet.
    """
    fits = kv_cache_dtype in (None, dtype, FLOAT8)
    rule = f"be None or {FLOAT8}" if dtype is None else f"be None, {dtype} or {FLOAT8}"
    check(fits, function, "kv_cache_dtype", rule, kv_cache_dtype)
