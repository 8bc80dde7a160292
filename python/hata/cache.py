"""The cache: keys, values and key codes of every layer, paged or contiguous."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hata import ops
from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.decode_buffers import DecodeBufferPool, DecodeBuffers
from hata.sequences import PagePool, Sequences, page_pool
from hata.storage import PageStorage, check_dtype, check_kv_cache_dtype
from hata.weights import HashWeights


class HataCache:
    """Keys, values and their codes for all layers of one batch of sequences.

    A *step* adds tokens to the sequences: the first layer that appends opens it, which advances the
    lengths, and every other layer must then append as many tokens. `extend` opens one on its own,
    for captured CUDA graphs. The device's buffers keep their addresses for the cache's whole life.

    Attributes:
        k_cache: Per layer ``[num_pages, page_size, num_kv_heads, head_dim]``, ``kv_cache_dtype``.
        v_cache: The same shapes.
        code_cache: Per layer ``[num_pages, num_kv_heads, page_size, num_words]``, int32;
            None for a layer that attends to another's selection.
        norm_cache: Per layer ``[num_pages, num_kv_heads, page_size]``, float16; or None.
        k_scale: Per layer ``[num_kv_heads]``, float32: keys of a float8 cache are what it holds
            times this. Ones, until the caller writes others, before the first token. None where
            the cache is not float8.
        v_scale: The same for values.
        block_table: ``[batch, max_pages]``, int32; -1 where a sequence has no page yet.
        cache_seqlens: ``[batch]``, int32: positions in use, those of the last step included.
        layer_budgets: The `hata.config.LayerBudget` of each layer, ``[num_layers]``.
        selecting_layers: The layer whose selection each layer attends to, ``[num_layers]``.
        min_sparse_len: The config's, resolved: shorter sequences are decoded densely.

    Args:
        weights: The model's hash weights; they say how many layers and KV heads there are, of which
            size, and how keys are coded.
        config: The budget; None is `HataConfig`'s defaults.
        batch: Sequences.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page, a power of two; None makes the cache contiguous, with one
            page of ``max_seq_len`` positions for each sequence.
        num_pages: Pages that the sequences share; None gives every sequence enough for
            ``max_seq_len``. Only for a paged cache.
        dtype: Of queries, new keys and new values: float16, bfloat16 or (on the CPU) float32.
        device: Where the cache lies.
        kv_cache_dtype: Of the cached keys and values: ``dtype``, which None stands for, or
            float8_e4m3fn, at half of float16's memory and traffic. Codes are of the keys as given.
        record_cuts: Whether decoding steps note how their selections ended, for `last_cut`.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument breaks its rule.
    """

    def __init__(
        self,
        weights: HashWeights,
        config: HataConfig | None = None,
        *,
        batch: int,
        max_seq_len: int,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_cache_dtype: torch.dtype | None = None,
        record_cuts: bool = False,
    ) -> None:
        where = type(self).__name__
        check_type(isinstance(weights, HashWeights), where, "weights", "be HashWeights", weights)
        config = HataConfig() if config is None else config
        check_type(isinstance(config, HataConfig), where, "config", "be a HataConfig", config)
        check_int(where, "batch", batch, 1)
        check_int(where, "max_seq_len", max_seq_len, 1, 2**30)
        check_dtype(where, dtype, device)
        check_kv_cache_dtype(where, kv_cache_dtype, dtype)
        num_layers, num_kv_heads, head_dim, _ = weights.shape
        self.layer_budgets = config.layer_budgets(num_layers, max_seq_len)
        self.selecting_layers = config.selecting_layers(num_layers)

        self.weights, self.config = weights, config
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.batch, self.max_seq_len = batch, max_seq_len
        self.dtype, self.kv_cache_dtype = dtype, kv_cache_dtype or dtype
        pool = page_pool(where, batch, max_seq_len, page_size, num_pages)
        pool, self._storage = self._allocate(where, pool, self.kv_cache_dtype, torch.device(device))
        self.num_pages, self.page_size = self._storage.k_cache[0].shape[:2]
        self.paged = pool is not None
        self.k_cache, self.v_cache = self._storage.k_cache, self._storage.v_cache
        self.code_cache, self.norm_cache = self._storage.code_cache, self._storage.norm_cache
        self.k_scale, self.v_scale = self._storage.k_scale, self._storage.v_scale
        self.device = self.k_cache[0].device
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
        self._buffers = DecodeBufferPool(
            batch=batch,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            capacity=self.block_table.shape[1] * self.page_size,
            top_k=[budget.top_k for budget in self.layer_budgets],
            selecting_layers=self.selecting_layers,
            dtype=dtype,
            score_dtype=weights.score_dtype if record_cuts else None,
            device=self.device,
        )

    @property
    def seq_lens(self) -> list[int]:
        """``cache_seqlens`` as the host knows it, ``[batch]``."""
        return list(self._sequences.seq_lens)

    @torch.no_grad()
    def append(
        self,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
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
            new_seqlens: ``[batch]`` ints in ``0..q_len``: only the last ``new_seqlens[b]`` tokens
                of sequence b are new, those before are left padding; None: all are. Reading a
                tensor on a GPU synchronizes, a list does not.

        Raises:
            TypeError: An argument has another type.
            ValueError: A length is wrong, a sequence would pass ``max_seq_len``, no page is left,
                or the layer's tokens are not those of the step.
            RuntimeError: The operator rejects a shape, dtype, device or stride.
        """
        where = "HataCache.append"
        new = self._new_tokens(where, layer_idx, k, new_seqlens)
        device_new = None if new_seqlens is None else self._sequences.to_device(new)
        with self._sequences.filling(where, layer_idx, new):
            self._write(layer_idx, k, v, device_new)

    def extend(self, new: int | Sequence[int] | Tensor) -> None:
        """Opens a step: advances every sequence's length and hands out the pages it needs.

        Each layer then fills it once: by `append`, by `hata.decode_attention`, or by replaying a
        graph of the latter, which cannot be seen: after a replay, `close_step`, or `extend` the
        next step too.

        Args:
            new: New tokens, one number for all sequences or ``[batch]``, at least 0.

        Raises:
            TypeError: ``new`` has another type.
            ValueError: A number is negative, a sequence would pass ``max_seq_len``, no page is
                left, or some layers have not filled the last step; nothing has changed.
        """
        where = "HataCache.extend"
        self._sequences.open(where, self._sequences.counts(where, "new", new, self.max_seq_len))

    def reopen_step(self, layer_idx: int) -> None:
        """Lets a layer bring the tokens of the last step once more, which are written again.

        For models whose later layers attend to the keys and values of an earlier one.

        Args:
            layer_idx: The layer, which has filled the step.
        """
        self._sequences.reopen(layer_idx)

    def close_step(self) -> None:
        """Says that every layer has filled the open step, as replays of a graph have."""
        self._sequences.close()

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
        self._reordered(order, sources, copies)

    def keys_values(self, layer_idx: int, batch_idx: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of one layer: views of a contiguous cache, else copies.

        Those of a float8 cache are multiplied with their scales and rounded to ``dtype``.

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
        rows = (k[:, : lengths[0]], v[:, : lengths[0]])
        return self._storage.unscaled(layer_idx, *rows, self.dtype)

    def last_selection(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns the positions that the layer's last decoding step attended to.

        A replayed CUDA graph counts. Ask before the lengths change: they tell which sequences were
        too short to be decoded sparsely.

        Args:
            layer_idx: A sparse layer that has decoded.

        Returns:
            indices and num_selected as `hata.decode_step` gives them: buffers that the layer's next
            step overwrites. Where a sequence was decoded densely, wider copies, with all positions
            that its tokens see.

        Raises:
            ValueError: The layer has not decoded sparsely.
        """
        buffers, dense_lens = self._last_step("HataCache.last_selection", layer_idx)
        return buffers.selection(dense_lens)

    def last_cut(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns how the selections of the layer's last decoding step ended.

        Args:
            layer_idx: A sparse layer that has decoded, of a cache with ``record_cuts``.

        Returns:
            last_score and num_ties as `hata.score_select` gives them, in the manner of
            `last_selection`; the lowest score and 0 where a sequence was decoded densely.

        Raises:
            ValueError: The layer has not decoded sparsely, or cuts are not recorded.
        """
        where = "HataCache.last_cut"
        buffers, dense_lens = self._last_step(where, layer_idx)
        check(buffers.last_score is not None, where, "record_cuts", "be True for this cache", False)
        return buffers.cut(list(dense_lens))

    def _last_step(self, function: str, layer_idx: int) -> tuple[DecodeBuffers, dict[int, int]]:
        """Returns what a layer's last step wrote, and the lengths of sequences that were dense."""
        last, rule = self._buffers.last, "be a sparse layer that has decoded"
        check(layer_idx in last, function, "layer_idx", rule, layer_idx)
        lengths = enumerate(self.seq_lens)
        return last[layer_idx], {b: n for b, n in lengths if n < self.min_sparse_len}

    def _allocate(
        self, function: str, pool: PagePool | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[PagePool | None, PageStorage]:
        """Returns the pages that sequences share, perhaps fewer of them, and their tensors."""
        num_pages, page_size = self.batch, self.max_seq_len
        if pool is not None:
            num_pages, page_size = pool.num_pages, pool.page_size
        return pool, PageStorage.allocate(
            self.weights,
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
            device=device,
            selecting_layers=self.selecting_layers,
        )

    def _write(self, layer_idx: int, k: Tensor, v: Tensor, new_seqlens: Tensor | None) -> None:
        """Writes a layer's new tokens, in a step that is open."""
        key_weights = self.weights.layer(layer_idx, self.dtype, self.device)[0]
        tables = (self.block_table, self.cache_seqlens, new_seqlens)
        self._storage.append(layer_idx, k, v, key_weights, *tables)

    def _reordered(self, order: list[int], sources: list[int], copies: list[int]) -> None:
        """Follows a `reorder` that has copied some pages onto others."""

    def _sparse_step(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        buffers: DecodeBuffers,
        softmax_scale: float,
        softcap: float | None,
    ) -> DecodeBuffers:
        """Appends, selects and attends in one layer, in a step that is open.

        Returns:
            Where the results are: in ``buffers``, or in tensors of their own.
        """
        logits: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap}
        logits |= {"k_scale": self.k_scale[layer_idx], "v_scale": self.v_scale[layer_idx]}
        codes = self.code_cache[layer_idx]
        if codes is None:
            made = self._buffers.shared(layer_idx, self._sequences.num_steps)
            self._write(layer_idx, k, v, None)
            caches = (self.k_cache[layer_idx], self.v_cache[layer_idx])
            where = (self.block_table, self.cache_seqlens, made.indices)
            out, lse = ops.gather_attention(q, *caches, *where, **logits)
            return replace(made, out=out, lse=lse)
        ops.decode_step(
            *(q, k, v),
            *self.weights.layer(layer_idx, self.dtype, self.device),
            self.k_cache[layer_idx],
            self.v_cache[layer_idx],
            codes,
            self.norm_cache[layer_idx],
            self.block_table,
            self.cache_seqlens,
            query_bits=self.weights.query_bits,
            **(self.layer_budgets[layer_idx]._asdict() | vars(buffers) | logits),
            num_sink=self.config.num_sink,
            num_recent=self.config.num_recent,
        )
        return buffers

    def _new_tokens(
        self,
        function: str,
        layer_idx: int,
        k: Tensor,
        new_seqlens: int | Sequence[int] | Tensor | None = None,
    ) -> list[int]:
        """Returns each sequence's number of new tokens, ``[batch]``, for a public function.

        Checks what must be known before the host's lengths change; the operators check the rest.
        """
        check_int(function, "layer_idx", layer_idx, 0, self.num_layers - 1)
        check_type(isinstance(k, Tensor), function, "k", "be a tensor", k)
        rule = "have shape [batch, q_len, num_kv_heads, head_dim]"
        check(k.dim() == 4, function, "k", rule, list(k.shape))
        if new_seqlens is None:
            return [k.shape[1]] * self.batch
        return self._sequences.counts(function, "new_seqlens", new_seqlens, k.shape[1])
