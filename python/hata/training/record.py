"""Captures a model's queries and keys over text: what hash weights are trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hata.checks import check, check_int
from hata.integrations.model_shape import (
    full_attention_layers,
    model_shape,
    softcap,
    softmax_scale,
)
from hata.integrations.transformers_cache import CACHE_ARGUMENT
from hata.selectors import Softmax
from hata.torch_attention import MAX_LOGITS, torch_attention
from hata.training.captures import FULL_ATTENTION, CaptureInfo, Captures, CaptureWriter
from hata.training.data import turned
from hata.training.options import CaptureOptions
from hata.training.texts import text_files, token_sequences

_WHERE = "capture"
_SMALLEST_CHUNK = 256
_SAME_KEYS = 0.1  # relative difference of keys that are alike but for the rounding of all layers
_ATTENTION = "hata_capture"  # the attention function's name in transformers


def capture(
    model: Any,
    tokenizer: Any,
    texts: list[Path],
    folder: Path,
    options: CaptureOptions,
    *,
    name: str,
    on_layer: Callable[[], None] = lambda: None,
) -> Captures:
    """Runs a model over text and writes the queries and keys of its full-attention layers.

    Layers with a window, with chunks or without attention are left out: hata does not decode them.
    A sequence runs through the model once, with torch's attention: no matrix of scores ever
    exists, or, where logits are capped, that of some tokens at a time. Each layer is written as
    soon as it is known. The same call continues an interrupted capture; finished layers are kept.

    Args:
        model: A transformers decoder that takes attention functions: the Llama, Qwen, Mistral and
            Gemma families, gpt-oss, and others. A softcap and sink logits are captured too.
        tokenizer: Its tokenizer.
        texts: Files and folders of text.
        folder: Where to write.
        options: What to capture.
        name: Of the model, noted in the capture.
        on_layer: Called after each layer of each sequence.

    Returns:
        The capture.

    Raises:
        ValueError: The text is too short, the model is not as above, a tensor has NaN or infinite
            numbers, the disk or the memory does not suffice, or the folder holds something else.
    """
    layers = full_attention_layers(model)
    rule = "have a layer that attends to the whole context"
    check(layers != (), _WHERE, "model", rule, type(model).__name__)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int):
        check_int(_WHERE, "seq_len", options.seq_len, 2, limit)
    recorder = Recorder(model, layers, _chunk(model, options))
    sequences = token_sequences(
        tokenizer,
        text_files(texts),
        num_sequences=options.num_sequences,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    config = model.config.get_text_config(decoder=True)
    shape = model_shape(model)
    kinds = getattr(config, "layer_types", None) or ["other"] * shape["num_layers"]
    kinds = [FULL_ATTENTION if i in layers else kind for i, kind in enumerate(kinds)]
    info = CaptureInfo(
        model=name,
        num_heads=config.num_attention_heads,
        softmax_scale=softmax_scale(model),
        softcap=softcap(model),
        seq_len=options.seq_len,
        num_queries=options.num_queries,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=options.seed,
        has_values=options.values,
        texts=tuple(sequence.text for sequence in sequences),
        layer_types=tuple(kinds),
        num_kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        rotary=rotary_angles(model),
    )
    writer = CaptureWriter(folder, info)
    for sequence_idx, sequence in enumerate(sequences):
        if all(writer.has(sequence_idx, i) for i in range(info.num_layers)):
            for _ in range(info.num_layers):
                on_layer()
            continue
        positions = options.positions(sequence_idx)

        def write(
            layer_idx: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            softmax: Softmax,
            sequence_idx: int = sequence_idx,
            positions: Tensor = positions,
        ) -> None:
            same = abs(softmax.scale - info.softmax_scale) < 1e-6 * softmax.scale
            rule = f"be {info.softmax_scale} in every layer"
            check(same, _WHERE, "the model's softmax scale", rule, softmax.scale)
            same, rule = softmax.softcap == info.softcap, f"be {info.softcap} in every layer"
            check(same, _WHERE, "the model's softcap", rule, softmax.softcap)
            if not writer.has(sequence_idx, layer_idx):
                values = v if info.has_values else None
                tensors = {"q": q, "k": k, "positions": positions}
                sinks = softmax.sink_logits
                writer.write(sequence_idx, layer_idx, **tensors, v=values, sink_logits=sinks)
            on_layer()

        recorder.run(sequence.token_ids, positions, write)
    return Captures.open(folder)


@torch.inference_mode()
def rotary_angles(model: Any) -> tuple[float, ...]:
    """Returns by how many radians the model turns queries and keys for each position.

    One for each pair of channels i and ``i + head_dim / 2``. Empty where the model pairs channels
    otherwise, turns some of them or in some layers alone, or differently by layer or by length: the
    angles it names are compared with its keys. A text of one token again and again has, at every
    position, the same keys but for the turn, whatever attention does with values that are equal.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    angles = getattr(rotary, "inv_freq", None)
    if angles is None or getattr(rotary, "rope_type", None) in ("dynamic", "longrope"):
        return ()
    tokens = torch.ones(1, 8, dtype=torch.int64, device=model.device)
    cache = getattr(model.base_model(tokens, use_cache=True), CACHE_ARGUMENT)
    for layer in full_attention_layers(model):
        keys = cache.layers[layer].keys[0].float()  # [num_kv_heads, 8, head_dim]
        if not keys.shape[-1] == model_shape(model)["head_dim"] == 2 * len(angles):
            return ()
        wanted = torch.stack([turned(keys[:, 0], angles.double(), by) for by in range(8)], 1)
        if not (wanted - keys).norm() < _SAME_KEYS * keys.norm():
            return ()
    return tuple(angles.tolist())


def _chunk(model: Any, options: CaptureOptions) -> int:
    """Returns how many tokens may run at once within the memory limit."""
    chunk = options.seq_len
    if options.memory_limit_gb is None:
        return chunk
    while (need := _memory(model, options.seq_len, chunk)) > options.memory_limit_gb * 1e9:
        rule = f"be at least {need / 1e9:.3g}, what {chunk} tokens at once need"
        smallest = chunk <= _SMALLEST_CHUNK
        check(not smallest, _WHERE, "memory_limit_gb", rule, options.memory_limit_gb)
        chunk = max(chunk // 2, _SMALLEST_CHUNK)
    return chunk


def _memory(model: Any, seq_len: int, chunk: int) -> int:
    """Estimates the bytes of a model that runs ``chunk`` tokens at once, rounded up."""
    config = model.config.get_text_config(decoder=True)
    shape = model_shape(model)
    itemsize = model.dtype.itemsize
    row = shape["num_kv_heads"] * shape["head_dim"] * itemsize
    heads = config.num_attention_heads * shape["head_dim"] * itemsize
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    wide = max(getattr(config, "intermediate_size", 0), 4 * config.hidden_size)
    activations = chunk * ((6 * config.hidden_size + 4 * wide) * itemsize + 3 * heads + 4 * row)
    repeated = 2 * seq_len * heads  # keys and values are repeated for the group
    if softcap(model) is not None:  # four stages of some tokens' logits, and float32 keys, values
        repeated += 4 * (2 * seq_len * row // itemsize)
        repeated += 16 * min(MAX_LOGITS, config.num_attention_heads * chunk * seq_len)
    if chunk == seq_len:
        return weights + activations + repeated
    cache = 2 * seq_len * row * (shape["num_layers"] + 1)  # one layer's are copied while they grow
    return weights + activations + repeated + cache + 5 * chunk * seq_len  # and the mask


# layer_idx, q [num_queries, num_heads, head_dim], k and v [seq_len, num_kv_heads, head_dim],
# and the layer's softmax
OnLayer = Callable[[int, Tensor, Tensor, Tensor, Softmax], None]


class Recorder:
    """Runs a model over one sequence and hands over each layer as soon as it is complete.

    Attributes:
        model: Any model that takes attention functions.
        layers: The model's layers that are recorded.
        chunk: Tokens of one forward pass; fewer than the sequence's need less memory.

    Raises:
        ValueError: The model takes no attention functions.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], chunk: int) -> None:
        takes = isinstance(model, PreTrainedModel) and getattr(
            model, "_supports_attention_backend", False
        )
        rule = "take attention functions (transformers' AttentionInterface)"
        check(takes, _WHERE, "model", rule, type(model).__name__)
        self.model, self.layers, self.chunk = model, layers, chunk
        self._positions = torch.empty(0, dtype=torch.int64)
        self._start, self._seq_len = 0, 0
        self._queries: dict[int, list[Tensor]] = {}
        self._on_layer: OnLayer | None = None
        AttentionInterface.register(_ATTENTION, self._attend)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)

    @torch.inference_mode()
    def run(self, token_ids: list[int], positions: Tensor, on_layer: OnLayer) -> None:
        """Records one sequence.

        Args:
            token_ids: The sequence.
            positions: ``[num_queries]``, int64, ascending: whose queries are recorded.
            on_layer: Takes each layer, in the order in which the model finishes them.
        """
        model, seq_len = self.model, len(token_ids)
        before = model.config._attn_implementation
        model.set_attn_implementation(_ATTENTION)
        self._positions, self._on_layer, self._queries = positions, on_layer, {}
        self._seq_len = seq_len
        cache: Any = None
        tokens = torch.tensor([token_ids], device=model.device)
        try:
            for start in range(0, seq_len, self.chunk):
                self._start = start
                piece = tokens[:, start : start + self.chunk]
                kept = {CACHE_ARGUMENT: cache} if cache is not None else {}
                # The base model: a head would make logits for every token.
                out = model.base_model(piece, use_cache=self.chunk < seq_len, **kept)
                cache = getattr(out, CACHE_ARGUMENT, None)
        finally:
            model.set_attn_implementation(before)
            self._on_layer, self._queries = None, {}

    def _attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention function: q, k, v are ``[1, heads, length, head_dim]``."""
        no_bias = kwargs.get("position_bias") is None
        check(no_bias, _WHERE, "position_bias", "be None in attention", "a value")
        sink_logits = kwargs.get("s_aux")
        softmax = Softmax.of_attention(query, key, scaling, kwargs.get("softcap"), sink_logits)
        layer_idx: Any = module.layer_idx
        if layer_idx in self.layers:
            self._record(layer_idx, query, key, value, softmax)
        out = torch_attention(
            *(query, key, value),
            softmax_scale=softmax.scale,
            mask=attention_mask,
            is_causal=attention_mask is None,
            softcap=softmax.softcap,
            sink_logits=sink_logits,
        )
        return out.transpose(1, 2).contiguous(), None

    def _record(
        self, model_layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
    ) -> None:
        layer_idx = self.layers.index(model_layer)
        end = self._start + query.shape[2]
        held, rule = key.shape[2], f"hold all {end} positions"
        check(held == end, _WHERE, f"the keys of layer {model_layer}", rule, held)
        inside = (self._positions >= self._start) & (self._positions < end)
        rows = (self._positions[inside] - self._start).to(query.device)
        self._queries.setdefault(layer_idx, []).append(query[0][:, rows].transpose(0, 1).cpu())
        if end == self._seq_len:
            q = torch.cat(self._queries.pop(layer_idx))
            k, v = (x[0].transpose(0, 1) for x in (key, value))
            assert self._on_layer is not None  # run has set it
            self._on_layer(layer_idx, q, k, v, softmax)
