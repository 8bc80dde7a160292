"""One attention layer and one batch, as they are on every device."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from hata import ops
from hata.checks import check
from hata.integrations.vllm.code_check import first_wrong_code
from hata.integrations.vllm.metrics import measure_mass
from hata.integrations.vllm.settings import HERE, Settings, check_windows
from hata.integrations.vllm.side_cache import SideCache
from hata.torch_attention import add_sink_logits


class Decodes(NamedTuple):
    """A run of sequences that decode the same number of tokens."""

    tokens: slice  # of the batch
    q_len: int
    block_table: Tensor  # [batch, max_blocks], int32
    cache_seqlens: Tensor  # [batch], int32


class KVCache(NamedTuple):
    """A layer's cached keys and values, as hata's operators take them.

    Attributes:
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``.
        v_cache: The same.
        k_scale: Of float8 keys, one number or ``[num_kv_heads]``, float32; None for others.
        v_scale: The same of values.
    """

    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def rows_of(cache: Tensor, pages: Tensor, seq_len: int) -> Tensor:
    """Returns a sequence's keys or values, ``[seq_len, num_kv_heads, head_dim]``.

    Bytes are copied, since torch copies no float8 by index.
    """
    return cache.view(torch.uint8)[pages].view(cache.dtype).flatten(0, 1)[:seq_len]


@dataclass
class Batch:
    """What a step's layers need to know: sequences that decode first, then those with a prompt.

    Attributes:
        common: vLLM's own description of the batch.
        decodes: The sequences that decode.
        num_decode_tokens: Their tokens, the first of the batch.
        prompts: The device's description of the other sequences; None if there are none.
        everything: The same for the whole batch, for layers without codes; None if there are none.
    """

    common: CommonAttentionMetadata
    decodes: list[Decodes]
    num_decode_tokens: int
    prompts: Any
    everything: Any


def make_batch(
    common: CommonAttentionMetadata,
    max_decode_len: int,
    has_dense_layers: bool,
    describe: Callable[[CommonAttentionMetadata, bool], Any],
) -> Batch:
    """Splits a batch.

    Leading sequences with at most ``max_decode_len`` new tokens decode; that of a prompt can be
    one. What a CUDA graph captures has as many tokens in every sequence, those of its padding
    included: a sequence of length 0 whose token goes nowhere.

    Args:
        common: The batch.
        max_decode_len: 1, or the tokens that speculative decoding verifies at once.
        has_dense_layers: Whether `Batch.everything` is needed.
        describe: Makes the device's description, of the whole batch if its second argument is true.
    """
    num_reqs, q_len = common.num_reqs, common.max_query_len
    if q_len <= max_decode_len and common.num_actual_tokens == num_reqs * q_len:
        new_tokens = [q_len] * num_reqs
    else:
        starts = common.query_start_loc_cpu[: num_reqs + 1].tolist()
        new_tokens = [end - start for start, end in pairwise(starts)]
    decodes: list[Decodes] = []
    num_decodes = num_tokens = 0
    for q_len, run in groupby(new_tokens):
        if q_len > max_decode_len:
            break
        end = num_decodes + len(list(run))
        tokens = slice(num_tokens, num_tokens + (end - num_decodes) * q_len)
        if q_len > 0:
            rows = slice(num_decodes, end)
            table, seqlens = common.block_table_tensor[rows], common.seq_lens[rows]
            decodes.append(Decodes(tokens, q_len, table, seqlens))
        num_decodes, num_tokens = end, tokens.stop
    all_prompts, any_prompt = num_decodes == 0, num_decodes < num_reqs
    everything = describe(common, True) if has_dense_layers or all_prompts else None
    prompts = everything if all_prompts else None
    if any_prompt and not all_prompts:
        prompts = describe(_without(common, num_decodes, num_tokens), False)
    return Batch(common, decodes, num_tokens, prompts, everything)


def _without(common: CommonAttentionMetadata, num_reqs: int, num_tokens: int) -> Any:
    """The batch without its first sequences, which have ``num_tokens`` tokens."""

    def rest(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[num_reqs:]

    return replace(
        common,
        query_start_loc=common.query_start_loc[num_reqs:] - num_tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[num_reqs:] - num_tokens,
        seq_lens=common.seq_lens[num_reqs:],
        num_reqs=common.num_reqs - num_reqs,
        num_actual_tokens=common.num_actual_tokens - num_tokens,
        block_table_tensor=common.block_table_tensor[num_reqs:],
        slot_mapping=common.slot_mapping[num_tokens:],
        seq_lens_cpu_upper_bound=rest(common.seq_lens_cpu_upper_bound),
        is_prefilling=rest(common.is_prefilling),
    )


class HataLayer:
    """A layer's attention: decodes sparse, prompts dense.

    The first layers and those with a window are dense throughout.

    A mixin before the device's implementation, which has `write_dense` and `attend_dense`.
    """

    num_kv_heads: int
    head_size: int
    scale: float
    sinks: Tensor | None  # [num_heads], a logit each that has no position

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        for name, value in {
            "alibi_slopes": alibi_slopes,
            "cross-layer KV sharing": kv_sharing_target_layer_name,
            "encoder attention": None if attn_type == "decoder" else attn_type,
        }.items():
            check(value is None, HERE, "the model", f"have no {name}", value)
        super().__init__(  # type: ignore[call-arg]
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )
        self.engine = get_current_vllm_config()
        self.settings = Settings.of(self.engine)
        self.window = sliding_window
        self.softcap = logits_soft_cap or None  # 0 says None to some models of vLLM
        if sliding_window is not None:
            check_windows(self.engine, sliding_window)
        draft = self.engine.model_config.runner_type == "draft"
        self.hash_weights = None if draft else self.settings.load(self.engine)
        observer = self.settings.observer
        self.observer = None if observer is None else pkgutil.resolve_name(observer)
        self.codes: SideCache | None = None  # None in a dense layer
        self.query_quant: Any = None  # makes float8 queries where dense attention needs them
        self.num_steps = 0  # with sequences that decode

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Takes this rank's part of the layer's hash weights, and a side cache for its codes."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        layers = self.engine.compilation_config.static_forward_context
        name, layer = next(
            (name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self
        )
        self.layer_idx = extract_layer_index(name)
        weights, config = self.hash_weights, self.settings.config
        if weights is None or self.window is not None or self.layer_idx < config.num_dense_layers:
            return
        if self.layer_idx not in weights.layers:  # a draft that continues the model, as EAGLE's do
            return
        # As vLLM shares out KV heads: in order, and each to several ranks where they are too few.
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        first = rank * weights.shape[1] // ranks
        heads = slice(first, first + self.num_kv_heads)
        device = torch.empty(0, device=self.engine.device_config.device).device
        row = weights.layers.index(self.layer_idx)
        key_weights, query_weights = weights.layer(row, act_dtype, device)
        self.key_weights, self.query_weights = key_weights[heads], query_weights[heads]
        num_layers = self.engine.model_config.get_total_num_hidden_layers()
        longest = self.engine.model_config.max_model_len
        self.budget = config.layer_budgets(num_layers, longest)[self.layer_idx]
        num_words = key_weights.shape[2] // 32
        self.codes = SideCache(self.num_kv_heads, num_words, weights.key_norms)
        layers[f"{name}.codes"] = self.codes
        # Beside a float8 cache vLLM's layer makes queries float8 for FlashAttention. Those that
        # decode are hashed, and attend, as they are: this layer makes those of prompts float8.
        self.query_quant, layer.query_quant = layer.query_quant, None

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the new tokens' keys, values and codes, and attends.

        Args:
            layer: vLLM's layer.
            query: ``[num_tokens, num_heads, head_dim]``; padding may follow.
            key: ``[num_tokens, num_kv_heads, head_dim]``, likewise.
            value: The same.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``: keys, then values;
                uint8 if they are float8.
            attn_metadata: The batch; None while vLLM measures its memory.
            output: Like ``query``. Written.
            output_scale: None: outputs are not quantized.
            output_block_scale: None.
        """
        batch = attn_metadata
        if batch is None:
            return output.fill_(0)
        slot_mapping = batch.common.slot_mapping
        if self.codes is None:
            self.write_dense(layer, key, value, kv_cache, slot_mapping)
            self.attend_dense(layer, query, kv_cache, batch.everything, output)
            return output
        cache = self.operands(layer, kv_cache)
        self.num_steps += len(batch.decodes) > 0
        for run in batch.decodes:
            self._decode(run, slot_mapping, query, key, value, cache, output)
        if batch.prompts is not None:
            tokens = slice(batch.num_decode_tokens, batch.common.num_actual_tokens)
            ops.cache_write(
                key[tokens],
                value[tokens],
                self.key_weights,
                code_cache=self.codes.code_cache,
                norm_cache=self.codes.norm_cache,
                slot_mapping=slot_mapping[tokens],
                **cache._asdict(),
            )
            self.attend_dense(layer, query[tokens], kv_cache, batch.prompts, output[tokens])
        if self.settings.check:
            self._check_codes(batch.common, cache)
        return output

    def operands(self, layer: Any, kv_cache: Tensor) -> KVCache:
        """Returns vLLM's cache of this layer as hata's operators take it."""
        is_float8 = kv_cache.dtype == torch.uint8
        rows = kv_cache.view(torch.float8_e4m3fn) if is_float8 else kv_cache
        k_cache, v_cache = rows.transpose(1, 2).split(self.head_size, -1)
        k_scale, v_scale = (layer._k_scale, layer._v_scale) if is_float8 else (None, None)
        return KVCache(k_cache, v_cache, k_scale, v_scale)

    def write_dense(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Writes keys and values alone."""
        raise NotImplementedError

    def attend_dense(
        self, layer: torch.nn.Module, query: Tensor, kv_cache: Tensor, batch: Any, output: Tensor
    ) -> None:
        """Attends to everything that the sequences of ``batch`` have in the cache."""
        raise NotImplementedError

    def _decode(
        self,
        run: Decodes,
        slot_mapping: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        output: Tensor,
    ) -> None:
        assert self.codes is not None
        assert self.hash_weights is not None
        shape = (-1, run.q_len)
        q, k, v, out = (t[run.tokens].unflatten(0, shape) for t in (query, key, value, output))
        step = ops.decode_step(
            q=q,
            k=k,
            v=v,
            key_weights=self.key_weights,
            query_weights=self.query_weights,
            **cache._asdict(),
            code_cache=self.codes.code_cache,
            block_table=run.block_table,
            cache_seqlens=run.cache_seqlens,
            query_bits=self.hash_weights.query_bits,
            **self.budget._asdict(),
            num_sink=self.settings.config.num_sink,
            num_recent=self.settings.config.num_recent,
            norm_cache=self.codes.norm_cache,
            softmax_scale=self.scale,
            softcap=self.softcap,
            out=out,
        )
        if self.observer is not None:
            self.observer(self.layer_idx, step.indices, step.num_selected, run.cache_seqlens)
        every = self.settings.measure_every
        chosen = every > 0 and self.num_steps % every == 0
        if chosen and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            _, dense_lse = ops.dense_attention(
                q,
                **cache._asdict(),
                block_table=run.block_table,
                cache_seqlens=run.cache_seqlens,
                softmax_scale=self.scale,
                softcap=self.softcap,
            )
            measure_mass(self.layer_idx, step.lse, dense_lse, slot_mapping[run.tokens])
        if self.sinks is not None:
            add_sink_logits(out, step.lse, self.sinks)

    def _check_codes(self, common: CommonAttentionMetadata, cache: KVCache) -> None:
        """Raises at the first cached key whose code is not that of the key."""
        assert self.codes is not None
        block_size = cache.k_cache.shape[1]
        for b, seq_len in enumerate(common.seq_lens[: common.num_reqs].tolist()):
            pages = common.block_table_tensor[b, : -(-seq_len // block_size)].long()
            keys = rows_of(cache.k_cache, pages, seq_len)
            codes = self.codes.code_cache[pages].transpose(1, 2).flatten(0, 1)[:seq_len]
            position = first_wrong_code(keys, codes, self.key_weights)
            if position is not None:
                raise RuntimeError(
                    f"hata.{HERE}: the code of position {position} of sequence {b} of the "
                    f"batch in layer {self.layer_idx} must be that of its key, got another"
                )
