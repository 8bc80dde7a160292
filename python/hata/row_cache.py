"""The row cache of a cache in host memory: rows on the GPU that recent steps selected."""

import torch
from torch import Tensor

from hata import ops


class RowCache:
    """Copies of rows on the GPU, ``num_slots`` for each layer, sequence and KV head.

    `hata.ops.fetch_rows` says how they are replaced; nothing in it waits for the device.

    Attributes:
        num_slots: Rows of a layer, sequence and KV head.
        k_rows: Per layer ``[batch, num_slots, num_kv_heads, head_dim]``, dtype of the cache.
        v_rows: The same shapes.
        num_missing: ``[num_layers, batch, num_kv_heads]``, int32: rows that the last query token of
            a layer has had read from host memory.

    Args:
        k_cache: The keys in host memory, per layer.
        batch: Sequences.
        num_slots: Rows of a layer, sequence and KV head.
        device: Where they lie.
    """

    def __init__(
        self, k_cache: list[Tensor], *, batch: int, num_slots: int, device: torch.device
    ) -> None:
        num_pages, page_size, num_kv_heads, head_dim = k_cache[0].shape
        self.num_slots = num_slots
        rows = (batch, num_slots, num_kv_heads, head_dim)
        self.k_rows, self.v_rows = (
            [torch.zeros(rows, dtype=k.dtype, device=device) for k in k_cache] for _ in range(2)
        )
        pairs = (len(k_cache), batch, num_kv_heads)

        def filled(shape: tuple[int, ...], value: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._slot_of_row = [filled((num_pages, num_kv_heads, page_size), 0) for _ in k_cache]
        self._position_of_slot = filled((*pairs, num_slots), -1)
        self._referenced = filled((*pairs, num_slots), 0, torch.uint8)
        self._hand = filled(pairs, 0)
        self.num_missing = filled(pairs, 0)
        # Slots as gather_attention takes positions: of a contiguous cache, all of it in sight.
        self._block_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        self._all_slots = filled((batch,), num_slots)

    def attend(
        self,
        layer: int,
        q: Tensor,
        indices: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        softmax_scale: float,
        softcap: float | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fetches what one layer has selected and attends to it, query token by query token.

        Args:
            layer: Which of the row cache's layers.
            q: ``[batch, q_len, num_heads, head_dim]``.
            indices: ``[batch, q_len, num_kv_heads, top_k]``, int32; top_k is at most num_slots.
            k_cache: The layer's keys, as the operators take them, like what follows.
            v_cache: Its values.
            block_table: Of the sequences.
            cache_seqlens: Of the sequences.
            softmax_scale: Factor of the logits.
            softcap: Cap of the logits, or None.
            k_scale: Of float8 keys, as `hata.ops.gather_attention` takes it; None for others.
            v_scale: Of float8 values, likewise.

        Returns:
            out ``[batch, q_len, num_heads, head_dim]`` and lse ``[batch, q_len, num_heads]``.
        """
        attended = []
        for j in range(q.shape[1]):
            fetched = ops.fetch_rows(
                indices[:, j : j + 1].contiguous(),
                k_cache,
                v_cache,
                block_table,
                cache_seqlens,
                self.k_rows[layer],
                self.v_rows[layer],
                self._slot_of_row[layer],
                self._position_of_slot[layer],
                self._referenced[layer],
                self._hand[layer],
                num_missing=self.num_missing[layer],
            )
            attended.append(
                ops.gather_attention(
                    q[:, j : j + 1],
                    self.k_rows[layer],
                    self.v_rows[layer],
                    self._block_table,
                    self._all_slots,
                    fetched.slots,
                    softmax_scale=softmax_scale,
                    softcap=softcap,
                    k_scale=k_scale,
                    v_scale=v_scale,
                )
            )
        if len(attended) == 1:
            return attended[0]
        out, lse = (torch.cat(parts, dim=1) for parts in zip(*attended, strict=True))
        return out, lse

    def forget(self, lengths: Tensor) -> None:
        """Drops the rows of positions that sequences no longer have.

        Args:
            lengths: ``[batch]``, int32, on the device.
        """
        gone = self._position_of_slot >= lengths[:, None, None]
        self._position_of_slot.masked_fill_(gone, -1)
        self._referenced.masked_fill_(gone, 0)

    def reorder(self, order: Tensor, sources: Tensor, copies: Tensor) -> None:
        """Lets sequence b have the rows of the old sequence ``order[b]``.

        Args:
            order: ``[batch]``, int32.
            sources: Pages that were copied, 1-D, int32.
            copies: Onto which, as many.
        """
        for state in (self._position_of_slot, self._referenced, self._hand):
            state.copy_(state.index_select(1, order))
        for rows in (*self.k_rows, *self.v_rows):
            words = rows.view(torch.int32)  # torch does not select rows of float8
            words.copy_(words.index_select(0, order))
        for slots in self._slot_of_row:
            slots.index_copy_(0, copies.long(), slots.index_select(0, sources))
