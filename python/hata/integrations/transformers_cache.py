"""The transformers cache of hata.

The layers of a `HataTransformersCache` are transformers' own but for those that attend to the whole
context, which are `HataLayer`. Such a layer stores nothing when it is handed new keys; it hands
them on as `NewKeys`, which only hata's attention function takes
(`hata.integrations.transformers_attention`).
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.checks import check, check_int
from hata.integrations.model_shape import own_cache_layers
from hata.integrations.transformers_mask import HERE, CausalMask, Padding
from hata.integrations.transformers_settings import CacheSettings

ATTENTION = "hata"  # transformers' name of the attention and mask functions

# What forward passes and `generate` call a cache, and their outputs too: renamed in 5.24.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

# After a prompt that `generate` has announced, longer passes are prompt again: no draft is as long.
MAX_DRAFT_LEN = 32


@dataclass
class NewKeys:
    """New keys on their way from the cache to hata's attention function, which alone takes them.

    Attributes:
        layer: The layer that will store them.
        states: ``[batch, num_kv_heads, q_len, head_dim]``.
        taken: Whether they have been attended to; once is all that a layer may.
    """

    layer: "HataLayer"
    states: Tensor
    taken: bool = False

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses any other attention function, and models that change cached keys."""
        raise ValueError(
            f"hata.{HERE}: keys of a hata cache must go to the attention function "
            f'"{ATTENTION}" (enable(model)), got another one, or a model that changes them: .{name}'
        )


@dataclass
class _LayerGroup:
    """What the hata layers of one transformers cache share.

    Attributes:
        settings: What `enable` has settled.
        max_seq_len: Positions that a sequence of this cache can have, padding included.
        caches: The cache of each device, by its layers; made when the first keys tell batch, dtype
            and device.
        prompt_len: Tokens of the prompt, padding included, as `generate` has announced it, or None.
        croppable: Last tokens that are real in every sequence.
        drafting: Whether tokens are drafted, which are decoded sparsely where others are not.
        decoding: Whether the step decodes; else its tokens are prompt.
        padding: Of the step's tokens; None if all are real.
        seq_len_range: Lengths that a CUDA graph being captured is good for, or None.
    """

    settings: CacheSettings
    max_seq_len: int
    caches: dict[tuple[int, ...], HataCache] = field(default_factory=dict)
    prompt_len: int | None = None
    croppable: int = 0
    drafting: bool = False
    decoding: bool = False
    padding: Padding | None = None
    seq_len_range: tuple[int, int] | None = None

    def cache_for(self, rows: tuple[int, ...], k: Tensor, seen: int) -> HataCache:
        """Returns one device's cache, made anew where it is empty and k is of another kind."""
        batch, _, num_kv_heads, _ = k.shape
        cache, wanted = self.caches.get(rows), (batch, k.dtype, k.device)
        if cache is None or (seen == 0 and wanted != (cache.batch, cache.dtype, cache.device)):
            cache = self.caches[rows] = HataCache(
                self.settings.weights_for(rows, num_kv_heads),
                self.settings.config_for(rows),
                batch=batch,
                max_seq_len=self.max_seq_len,
                page_size=self.settings.page_size,
                dtype=k.dtype,
                device=k.device,
            )
        return cache

    @property
    def verifying(self) -> bool:
        """Whether passes that decode are dense."""
        return self.settings.num_draft_tokens is not None and not self.drafting

    def decodes(self, seen: int, q_len: int) -> bool:
        """Returns whether ``q_len`` new tokens after ``seen`` are decoded, not prompt."""
        if self.prompt_len is None:
            return seen > 0 and q_len == 1
        return seen >= self.prompt_len and q_len <= MAX_DRAFT_LEN

    def open_step(self, seen: int, q_len: int, mask: CausalMask | None) -> None:
        """Decides how all layers treat the tokens of a forward pass.

        Args:
            seen: Tokens that the cache holds, padding included.
            q_len: New tokens.
            mask: The model's mask.
        """
        self.decoding = self.decodes(seen, q_len)
        self.padding = None if self.decoding or mask is None else mask.padding(q_len)

    def close_step(self, q_len: int) -> None:
        """Notes what the first layer has stored."""
        padding = self.padding
        self.croppable = self.croppable + q_len if padding is None else padding.unpadded


# Compiled code names a layer by its number.
_numbers = itertools.count()
_layers: WeakValueDictionary[int, "HataLayer"] = WeakValueDictionary()


class HataLayer(CacheLayerMixin):
    """One layer: `update` hands the new keys on, `attend` stores them and attends.

    Args:
        group: What the layers share.
        row: The layer, as an index of ``CacheSettings.layers``.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, group: _LayerGroup, row: int) -> None:
        super().__init__()
        self.group, self.row, self.seen = group, row, 0
        self.rows = next(rows for rows in group.settings.devices if row in rows)
        self._take_number()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills a copy, which is another layer."""
        vars(self).update(state)
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)
        _layers[self.number] = self

    @staticmethod
    def of_number(number: int) -> "HataLayer":
        """Returns the layer of this number."""
        return _layers[number]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of the layer's device."""
        self.group.cache_for(self.rows, key_states.transpose(1, 2), self.seen)

    def update(  # type: ignore[override]  # the keys are for hata's attention function
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[NewKeys, Tensor]:
        """Hands the new keys and values on to the attention function."""
        return NewKeys(self, key_states), value_states

    @torch.inference_mode(False)  # its tensors serve passes inside and outside of inference mode
    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: CausalMask | None,
        softmax_scale: float | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Stores new tokens and attends: sparsely where they are decoded, densely in a prompt.

        Args:
            q: ``[batch, q_len, num_heads, head_dim]``.
            k: ``[batch, q_len, num_kv_heads, head_dim]``.
            v: The same.
            mask: The model's mask.
            softmax_scale: Factor of the logits, or None.
            softcap: Cap of the logits, or None.
            sink_logits: ``[num_heads]``, or None.

        Returns:
            ``[batch, q_len, num_heads, head_dim]``.
        """
        group, q_len, layer_idx = self.group, q.shape[1], self.rows.index(self.row)
        cache = group.cache_for(self.rows, k, self.seen)
        if self.row == 0:
            group.open_step(self.seen, q_len, mask)
        padding, new_seqlens = group.padding, None
        if padding is not None:
            q, k, v = (padding.first(x) for x in (q, k, v))
            new_seqlens = padding.new_seqlens
        function = partial(prefill, new_seqlens=new_seqlens)
        if group.decoding:
            function = partial(
                decode_attention, dense=group.verifying, seq_len_range=group.seq_len_range
            )
        out = function(
            *(q, k, v, cache, layer_idx),
            softmax_scale=softmax_scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )
        if padding is not None:
            out = padding.back(out)
        self.seen += q_len
        if self.row == 0:
            group.close_step(q_len)
        observer, sparse = group.settings.observer, group.decoding and not group.verifying
        if observer is not None and sparse and layer_idx >= cache.config.num_dense_layers:
            observer(layer_idx, q, cache, *cache.last_selection(layer_idx))
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that a mask would cover, and its offset."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens of every sequence, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Returns the positions that a sequence can have."""
        return self.group.max_seq_len


class HataTransformersCache(Cache):
    """A transformers cache that keeps a model's keys and values in a `hata.HataCache`.

    The layers that do not attend to the whole context have transformers' own cache layers in it.
    Its memory is allocated at the first forward pass, which tells batch, dtype and device. Like any
    transformers cache it continues where it stands: `reset` it before an unrelated prompt. After a
    forward pass that failed halfway, `reset` it too.

    Attributes:
        config: The settings.
        weights: The hash weights; ``weights.metadata["origin"]`` says if they are random.
        hata_layers: The model's index of each layer that is hata's, those of ``hata_cache``.
        max_seq_len: Positions that a sequence can have.
        num_drafted: Tokens that were drafted and verified since the cache was made.
        num_accepted: Those among them that the dense model would have chosen too.
    """

    layers: list[Any]  # HataLayer, or transformers' own

    def __init__(self, settings: CacheSettings, max_seq_len: int) -> None:
        self._group = _LayerGroup(settings, max_seq_len)
        self.config, self.weights = settings.config, settings.weights
        self.hata_layers, self.max_seq_len = settings.layers, max_seq_len
        self.num_drafted = self.num_accepted = 0
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        layers = own_cache_layers(self._group.settings.model_config)
        for row, model_layer in enumerate(self.hata_layers):
            layers[model_layer] = HataLayer(self._group, row)
        return layers

    @property
    def hata_cache(self) -> HataCache | None:
        """The cache itself; None before the first forward pass. Only where there is one device."""
        caches, rule = self.hata_caches, "be asked for where all layers lie on one device"
        check(len(caches) <= 1, HERE, "hata_cache", rule, [str(c.device) for c in caches])
        return caches[0] if caches else None

    @property
    def hata_caches(self) -> tuple[HataCache, ...]:
        """The cache of each device, in the order of the layers; none before the first pass.

        The layers of each are those of ``hata_layers`` that the model has there.
        """
        caches = self._group.caches
        return tuple(caches[rows] for rows in self._group.settings.devices if rows in caches)

    def decodes(self, q_len: int) -> bool:
        """Returns whether a pass with as many new tokens is decoded, not prompt."""
        return self._group.decodes(self.get_seq_length(), q_len)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold its decoding: no layer of another kind, and no observer."""
        on_gpu = [cache.device.type for cache in self.hata_caches] == ["cuda"]
        all_hata = len(self.hata_layers) == len(self.layers)
        return on_gpu and all_hata and self._group.settings.observer is None

    @contextmanager
    def captured(self, seq_len_range: tuple[int, int]) -> Iterator[None]:
        """Lets a CUDA graph capture a decoding pass inside the block, which counts no tokens.

        Args:
            seq_len_range: Least and greatest length that the graph is good for.
        """
        group, seen = self._group, self.get_seq_length()
        croppable, group.seq_len_range = group.croppable, seq_len_range
        try:
            yield
        finally:
            group.croppable, group.seq_len_range = croppable, None
            for layer in self.layers:
                layer.seen = seen

    def replayed(self, q_len: int) -> None:
        """Counts the tokens of a pass that a CUDA graph has run, in a step that is open."""
        assert self.hata_cache is not None  # which a graph has written to
        self.hata_cache.close_step()
        self._group.close_step(q_len)
        for layer in self.layers:
            layer.seen += q_len

    @property
    def verifying(self) -> bool:
        """Whether passes that decode are dense, since what they are given was drafted."""
        return self._group.verifying

    @property
    def is_long_enough_to_draft(self) -> bool:
        """Whether a sequence is long enough for its next token to be decoded sparsely."""
        return any(max(x.seq_lens) + 1 >= x.min_sparse_len for x in self.hata_caches)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Decodes sparsely inside the block, whose tokens are removed from the cache at its end.

        transformers' own layers put new tensors in place of the old ones, so that a copy of a layer
        keeps what was in it. Not all versions can take back several passes otherwise.
        """
        group, layers = self._group, self.layers
        own = {i: copy.copy(x) for i, x in enumerate(layers) if not isinstance(x, HataLayer)}
        for layer in own.values():
            layer.record_past = False
        self.layers = [own.get(i, x) for i, x in enumerate(layers)]
        seen, group.drafting = self.get_seq_length(), True
        try:
            yield
            drafted = self.get_seq_length() - seen
            self.layers = [x for x in layers if isinstance(x, HataLayer)]
            self.crop(-drafted)
        finally:
            self.layers, group.drafting = layers, False

    def announce_prompt(self, prompt_len: int | None) -> None:
        """Says how many tokens of every sequence, padding included, are prompt.

        Those beyond are decoded. None, as at first: a pass of one token after others is decoded.
        """
        self._group.prompt_len = prompt_len

    def reset(self) -> None:
        """Empties every sequence."""
        for cache in self.hata_caches:
            cache.reset()
        self._group.prompt_len, self._group.croppable = None, 0
        self.layers = self._new_layers()

    def crop(self, tokens_to_remove: int | Tensor) -> None:  # 5.17 counts drafts on the device
        """Removes tokens from the end of every sequence.

        Args:
            tokens_to_remove: The negative number of them; 0 removes none.

        Raises:
            TypeError: It is no int.
            ValueError: It is positive, or there are not as many tokens since the last padding.
        """
        group = self._group
        if isinstance(tokens_to_remove, Tensor):
            tokens_to_remove = int(tokens_to_remove)
        check_int(f"{HERE}.crop", "tokens_to_remove", tokens_to_remove, -group.croppable, 0)
        if self.hata_caches and tokens_to_remove < 0:
            for cache in self.hata_caches:
                cache.truncate([n + tokens_to_remove for n in cache.seq_lens])
            group.croppable += tokens_to_remove
            if group.prompt_len is not None:
                group.prompt_len = min(group.prompt_len, self.get_seq_length() + tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, HataLayer):
                layer.seen += tokens_to_remove
            else:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Lets sequence b continue as the old sequence ``beam_idx[b]``, for beam search.

        Args:
            beam_idx: ``[batch]`` ints.

        Raises:
            ValueError: An entry is out of range, or there are not ``batch`` of them.
        """
        if isinstance(beam_idx, Tensor) and len(self.hata_caches) > 1:
            beam_idx = beam_idx.tolist()  # waits for the device once
        for cache in self.hata_caches:
            cache.reorder(beam_idx)
        for layer in self.layers:
            if not isinstance(layer, HataLayer):
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{HERE}: the batch must stay as it is, got {repeats} repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{HERE}: the batch must stay as it is, got the selection {indices}")
