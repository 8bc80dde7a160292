"""The cache: keys, values and key codes of every layer, paged or contiguous."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hata import ops
from hata.checks import check, check_int, check_tensor, check_type
from hata.config import HataConfig
from hata.decode_buffers import DecodeBufferPool
from hata.pages import page_pool
from hata.sequences import Sequences
from hata.storage import PageStorage, check_dtype


class HataCache:
    """Keys, values and their codes for all layers of one batch of sequences.

    A *step* adds tokens to the sequences: the first layer that appends opens it, which advances the
    lengths, and every other layer must then append as many tokens. `extend` opens one on its own,
    for captured CUDA graphs. The device's buffers keep their addresses for the cache's whole life.

    Attributes:
        k_cache: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``, ``dtype``.
        v_cache: The same shapes.
        code_cache: Per layer ``[num_pages, num_kv_heads, page_size, num_words]``, int32.
        norm_cache: Per layer ``[num_pages, num_kv_heads, page_size]``, float16; or None.
        block_table: ``[batch, max_pages]``, int32; -1 where a sequence has no page yet.
        cache_seqlens: ``[batch]``, int32: positions in use, those of the last step included.
        layer_bits, layer_top_k: Bits of codes and budget of each layer, ``[num_layers]``.
        min_sparse_len: The config's, resolved: shorter sequences are decoded densely.

    Args:
        config: The settings; they fix the codes' size and whether norms are kept.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
        batch: Sequences.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page, a power of two; None makes the cache contiguous, with one
            page of ``max_seq_len`` positions for each sequence.
        num_pages: Pages that the sequences share; None gives every sequence enough for
            ``max_seq_len``. Only for a paged cache.
        dtype: float16, bfloat16 or (on the CPU) float32.
        device: Where the cache lies.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        config: HataConfig,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        batch: int,
        max_seq_len: int,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        where = "HataCache"
        check_type(isinstance(config, HataConfig), where, "config", "be a HataConfig", config)
        check_int(where, "num_layers", num_layers, 1)
        check_int(where, "num_kv_heads", num_kv_heads, 1)
        check_int(where, "head_dim", head_dim, 1, 256)
        check_int(where, "batch", batch, 1)
        check_int(where, "max_seq_len", max_seq_len, 1, 2**30)
        check_dtype(where, dtype, device)
        self.layer_bits = config.layer_bits(num_layers)
        self.layer_top_k = config.layer_top_k(num_layers)
        pool = page_pool(where, batch, max_seq_len, page_size, num_pages)
        num_pages, page_size = (pool.num_pages, pool.page_size) if pool else (batch, max_seq_len)

        self.config = config
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.batch, self.max_seq_len = batch, max_seq_len
        self.num_pages, self.page_size, self.paged = num_pages, page_size, pool is not None

        self._storage = PageStorage.allocate(
            config,
            num_layers=num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        self.k_cache, self.v_cache = self._storage.k_cache, self._storage.v_cache
        self.code_cache, self.norm_cache = self._storage.code_cache, self._storage.norm_cache
        self.dtype, self.device = dtype, self.k_cache[0].device
        self.min_sparse_len = config.resolve_min_sparse_len(batch, num_kv_heads, self.device)
        self._sequences = Sequences(
            batch=batch,
            num_layers=num_layers,
            max_seq_len=max_seq_len,
            pool=pool,
            device=self.device,
        )
        self.block_table = self._sequences.block_table
        self.cache_seqlens = self._sequences.cache_seqlens
        self.decode_buffers = DecodeBufferPool(
            batch=batch,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            capacity=self.block_table.shape[1] * page_size,
            top_k=self.layer_top_k,
            dtype=dtype,
            device=self.device,
        )

    @property
    def seq_lens(self) -> list[int]:
        """``cache_seqlens`` as the host knows it, ``[batch]``."""
        return list(self._sequences.seq_lens)

    def append(
        self,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
        key_weights: Tensor,
        *,
        new_seqlens: int | Sequence[int] | Tensor | None = None,
    ) -> None:
        """Appends new tokens to one layer: keys, values, codes and (if kept) norms.

        The first layer to append opens a step, which advances the lengths; the others must follow
        with as many tokens. On failure lengths, pages and contents stay.

        Args:
            layer_idx: The layer.
            k: ``[batch, q_len, num_kv_heads, head_dim]`` in the cache's dtype, after the rotary
                embedding; last dimension contiguous.
            v: The same shape and dtype.
            key_weights: The layer's, ``[num_kv_heads, head_dim, num_bits]`` in the cache's dtype.
            new_seqlens: ``[batch]`` ints in ``0..q_len``: only the last ``new_seqlens[b]`` tokens
                of sequence b are new, those before are left padding; None: all are. Reading a
                tensor on a GPU synchronizes, a list does not.

        Raises:
            TypeError: An argument has another type.
            ValueError: A shape, dtype, device or length is wrong, a sequence would pass
                ``max_seq_len``, no page is left, or the layer's tokens are not those of the step.
            RuntimeError: The operator rejects a stride or the weights.
        """
        where = "HataCache.append"
        new = self.check_new(where, layer_idx, k, v, new_seqlens)
        device_new = None if new_seqlens is None else self._sequences.to_device(new)
        with self.filling(where, layer_idx, new):
            ops.cache_append(
                k.detach(),
                v.detach(),
                key_weights,
                self.k_cache[layer_idx],
                self.v_cache[layer_idx],
                self.code_cache[layer_idx],
                self.norm_cache[layer_idx],
                self.block_table,
                self.cache_seqlens,
                new_seqlens=device_new,
            )

    def extend(self, new: int | Sequence[int] | Tensor) -> None:
        """Opens a step: advances every sequence's length and hands out the pages it needs.

        Each layer then fills it once: by `append`, by `hata.decode_attention`, or by replaying a
        graph of the latter, which cannot be seen: after a replay, `extend` the next step too.

        Args:
            new: New tokens, one number for all sequences or ``[batch]``, at least 0.

        Raises:
            TypeError: ``new`` has another type.
            ValueError: A number is negative, a sequence would pass ``max_seq_len``, no page is
                left, or some layers have not filled the last step; nothing has changed.
        """
        where = "HataCache.extend"
        self._sequences.open(where, self._sequences.counts(where, "new", new, self.max_seq_len))

    def reset(self) -> None:
        """Empties every sequence and takes back its pages; the buffers stay."""
        self._sequences.resize("HataCache.reset", [0] * self.batch)

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Cuts every sequence to a length and takes back the pages it no longer needs.

        Args:
            lengths: New lengths, one number for all sequences or ``[batch]``, none longer than
                what the sequence has.

        Raises:
            TypeError: ``lengths`` has another type.
            ValueError: A length is negative or longer than its sequence, or some layers have not
                filled the last step; nothing has changed.
        """
        where = "HataCache.truncate"
        kept = self._sequences.counts(where, "lengths", lengths, self.max_seq_len)
        shorter = all(length <= old for length, old in zip(kept, self.seq_lens, strict=True))
        check(shorter, where, "lengths", f"be at most the present ones, {self.seq_lens}", kept)
        self._sequences.check_step_filled(where)
        self._sequences.resize(where, kept)

    def reorder(self, batch_idx: Sequence[int] | Tensor) -> None:
        """Lets sequence b continue as the old sequence ``batch_idx[b]``, as beam search wants.

        Pages move; only a sequence that continues more than once is copied. None are shared.

        Args:
            batch_idx: ``[batch]`` ints in ``0..batch - 1``.

        Raises:
            TypeError: ``batch_idx`` has another type.
            ValueError: A number is out of range, no page is left for a copy, or some layers have
                not filled the last step; nothing has changed.
        """
        where = "HataCache.reorder"
        order = self._sequences.counts(where, "batch_idx", batch_idx, self.batch - 1)
        used = min(self.page_size, max(self.seq_lens))  # rows of a page worth copying
        sources, copies = self._sequences.reorder(where, order)
        if sources:
            to_device = self._sequences.to_device
            self._storage.copy_pages(to_device(sources), to_device(copies), used)

    def keys_values(self, layer_idx: int, batch_idx: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of one layer: views of a contiguous cache, else copies.

        Args:
            layer_idx: The layer.
            batch_idx: The sequence; None for all of them, which must then be of equal length.

        Returns:
            k and v, ``[batch (1 for one sequence), seq_len, num_kv_heads, head_dim]``.

        Raises:
            ValueError: An index is out of range, or the lengths differ.
        """
        where = "HataCache.keys_values"
        check_int(where, "layer_idx", layer_idx, 0, self.num_layers - 1)
        sequences = slice(None)
        if batch_idx is not None:
            check_int(where, "batch_idx", batch_idx, 0, self.batch - 1)
            sequences = slice(batch_idx, batch_idx + 1)
        lengths, rule = self.seq_lens[sequences], "name a sequence where lengths differ"
        check(len(set(lengths)) == 1, where, "batch_idx", rule, lengths)
        if self.paged:
            pages = self.block_table[sequences, : -(-lengths[0] // self.page_size)]
            k, v = self._storage.gather(layer_idx, pages)
        else:
            k, v = self.k_cache[layer_idx][sequences], self.v_cache[layer_idx][sequences]
        return k[:, : lengths[0]], v[:, : lengths[0]]

    def last_selection(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns the positions that the layer's last decoding step attended to.

        Args:
            layer_idx: A sparse layer that has decoded.

        Returns:
            indices and num_selected as `hata.decode_step` gives them: buffers that the layer's next
            step overwrites. Where a sequence was decoded densely, wider copies, with all positions
            that its tokens see.

        Raises:
            ValueError: The layer has not decoded sparsely.
        """
        last, rule = self.decode_buffers.last, "be a sparse layer that has decoded"
        check(layer_idx in last, "HataCache.last_selection", "layer_idx", rule, layer_idx)
        return last[layer_idx].selection()

    def filling(
        self, function: str, layer_idx: int, new: list[int]
    ) -> AbstractContextManager[None]:
        """Lets a layer write ``new`` tokens inside the block; undoes the step if that fails."""
        return self._sequences.filling(function, layer_idx, new)

    def check_new(
        self,
        function: str,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
        new_seqlens: int | Sequence[int] | Tensor | None = None,
    ) -> list[int]:
        """Checks a layer's new tokens for a public function; returns each sequence's number."""
        check_int(function, "layer_idx", layer_idx, 0, self.num_layers - 1)
        row = (("num_kv_heads", self.num_kv_heads), ("head_dim", self.head_dim))
        dims = (("batch", self.batch), ("q_len", None), *row)
        check_tensor(function, "k", k, dims, self.dtype, self.device)
        q_len = k.shape[1]
        like_k = (("batch", self.batch), ("q_len", q_len), *row)
        check_tensor(function, "v", v, like_k, self.dtype, self.device)
        if new_seqlens is None:
            return [q_len] * self.batch
        return self._sequences.counts(function, "new_seqlens", new_seqlens, q_len)
