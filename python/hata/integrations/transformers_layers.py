"""The layers of hata's transformers cache, and what they share.

Such a layer stores nothing when it is handed new keys; it hands them on as `NewKeys`, which only
hata's attention function takes (`hata.integrations.transformers_attention`). That function then
calls the layer's `attend`. A `HataLayer` attends to the whole context, a `WindowLayer` to a sliding
window or a chunk of it.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.checks import check
from hata.integrations.transformers_mask import HERE, DeferredMask, Padding
from hata.integrations.transformers_settings import CacheSettings
from hata.window_attention import Window
from hata.window_cache import WindowCache

ATTENTION = "hata"  # transformers' name of the attention and mask functions

# After a prompt that `generate` has announced, longer passes are prompt again: no draft is as long.
MAX_DRAFT_LEN = 32


@dataclass
class NewKeys:
    """New keys on their way from the cache to hata's attention function, which alone takes them.

    Attributes:
        layer: The layer that will store them.
        states: ``[batch, num_kv_heads, q_len, head_dim]``.
        taken: Whether they have been attended to; once is all that a layer may, but for later
            layers that share them.
    """

    layer: "AttendingLayer"
    states: Tensor
    taken: bool = False

    def to(self, device: torch.device) -> "NewKeys":
        """Returns itself, where a layer that shares the keys asks for them on its device."""
        fits = device == self.states.device
        check(fits, HERE, "a layer", f"be on {self.states.device}, whose keys it shares", device)
        return self

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses any other attention function, and models that change cached keys."""
        raise ValueError(
            f"hata.{HERE}: keys of a hata cache must go to the attention function "
            f'"{ATTENTION}" (enable(model)), got another one, or a model that changes them: .{name}'
        )


@dataclass
class LayerGroup:
    """What the layers of one transformers cache share.

    Attributes:
        settings: What `enable` has settled.
        max_seq_len: Positions that a sequence of this cache can have, padding included.
        caches: The cache of each device, by its hata layers; made when the first keys tell batch,
            dtype and device.
        window_caches: The same for layers with a window or chunks.
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
    window_caches: dict[tuple[int, ...], WindowCache] = field(default_factory=dict)
    prompt_len: int | None = None
    croppable: int = 0
    drafting: bool = False
    decoding: bool = False
    padding: Padding | None = None
    seq_len_range: tuple[int, int] | None = None

    def cache_for(self, rows: tuple[int, ...], k: Tensor, seen: int) -> HataCache:
        """Returns one device's cache, made anew where it is empty and k is of another kind."""
        cache = self.caches.get(rows)
        if cache is None or _is_outdated(cache, k, seen):
            cache = self.caches[rows] = self.settings.new_cache(rows, k, self.max_seq_len)
        return cache

    def window_cache_for(self, rows: tuple[int, ...], k: Tensor, seen: int) -> WindowCache:
        """Returns one device's cache of windows, made anew in the same cases."""
        cache = self.window_caches.get(rows)
        if cache is None or _is_outdated(cache, k, seen):
            cache = self.window_caches[rows] = WindowCache(
                [self.settings.windows[row] for row in rows],
                batch=k.shape[0],
                max_seq_len=self.max_seq_len,
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

    def open_step(self, seen: int, q_len: int, mask: DeferredMask | None) -> None:
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


def _is_outdated(cache: HataCache | WindowCache, k: Tensor, seen: int) -> bool:
    """Returns whether a cache is empty and cannot take k, ``[batch, q_len, ...]``."""
    return seen == 0 and (cache.batch, cache.dtype, cache.device) != (k.shape[0], k.dtype, k.device)


# Compiled code names a layer by its number.
_numbers = itertools.count()
_layers: WeakValueDictionary[int, "AttendingLayer"] = WeakValueDictionary()


class AttendingLayer(CacheLayerMixin):
    """One layer: `update` hands the new keys on, `attend` stores them and attends.

    Args:
        group: What the layers share.
        row: The layer, as an index of the settings' layers of its kind.
        devices: The layers of its kind on each device, as such indices.
        is_first: Whether it is the first of all layers that attend.
    """

    is_croppable = True
    supports_early_init = False
    window: Window | None = None  # what a token sees, where that is not all

    def __init__(
        self, group: LayerGroup, row: int, devices: tuple[tuple[int, ...], ...], *, is_first: bool
    ) -> None:
        super().__init__()
        self.group, self.row, self.is_first, self.seen = group, row, is_first, 0
        self.rows = next(rows for rows in devices if row in rows)
        self.layer_idx = self.rows.index(row)  # in the cache of its device
        self._take_number()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills a copy, which is another layer."""
        vars(self).update(state)
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)
        _layers[self.number] = self

    @staticmethod
    def of_number(number: int) -> "AttendingLayer":
        """Returns the layer of this number."""
        return _layers[number]

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
        mask: DeferredMask | None,
        softmax_scale: float | None,
        softcap: float | None,
        sink_logits: Tensor | None,
        again: bool = False,
    ) -> Tensor:
        """Stores new tokens and attends, as its kind of layer does.

        Args:
            q: ``[batch, q_len, num_heads, head_dim]``; where the tokens are there again, of the
                last ones or of all.
            k: ``[batch, q_len, num_kv_heads, head_dim]``.
            v: The same.
            mask: The model's mask.
            softmax_scale: Factor of the logits; None is ``head_dim ** -0.5``.
            softcap: Cap of the logits, or None.
            sink_logits: ``[num_heads]``, or None.
            again: Whether the tokens are those of the last call, whose keys a later layer shares.

        Returns:
            The shape of q.
        """
        group, q_len, num_queries = self.group, k.shape[1], q.shape[1]
        if again:
            self._reopen_step()
            q = torch.nn.functional.pad(q, (0, 0, 0, 0, q_len - num_queries, 0))
        elif self.is_first:
            group.open_step(self.seen, q_len, mask)
        padding, new_seqlens = group.padding, None
        if padding is not None:
            q, k, v = (padding.first(x) for x in (q, k, v))
            new_seqlens = padding.new_seqlens
        out = self._attend(
            *(q, k, v, new_seqlens),
            softmax_scale=q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )
        if padding is not None:
            out = padding.back(out)
        out = out[:, q_len - num_queries :]
        if not again:
            self.seen += q_len
            if self.is_first:
                group.close_step(q_len)
        return out

    @abstractmethod
    def _reopen_step(self) -> None:
        """Lets the layer bring the tokens of the last step once more."""

    @abstractmethod
    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, new_seqlens: list[int] | None, **logits: Any
    ) -> Tensor:
        """Attends to tokens whose padding, if any, comes first."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that a mask would cover, and its offset."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens of every sequence, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Returns the positions that a sequence can have."""
        return self.group.max_seq_len


class HataLayer(AttendingLayer):
    """A layer that attends to the whole context: sparsely to decode, densely in a prompt."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of the layer's device."""
        self.group.cache_for(self.rows, key_states.transpose(1, 2), self.seen)

    def _reopen_step(self) -> None:
        self.group.caches[self.rows].reopen_step(self.layer_idx)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, new_seqlens: list[int] | None, **logits: Any
    ) -> Tensor:
        group, layer_idx = self.group, self.layer_idx
        cache = group.cache_for(self.rows, k, self.seen)
        function = partial(prefill, new_seqlens=new_seqlens)
        if group.decoding:
            function = partial(
                decode_attention, dense=group.verifying, seq_len_range=group.seq_len_range
            )
        out = function(q, k, v, cache, layer_idx, **logits)
        observer, sparse = group.settings.observer, group.decoding and not group.verifying
        if observer is not None and sparse and layer_idx >= cache.config.num_dense_layers:
            observer(layer_idx, q, cache, *cache.last_selection(layer_idx))
        return out


class WindowLayer(AttendingLayer):
    """A layer that attends to a sliding window, or in chunks, exactly."""

    is_sliding = True

    def __init__(
        self, group: LayerGroup, row: int, devices: tuple[tuple[int, ...], ...], *, is_first: bool
    ) -> None:
        super().__init__(group, row, devices, is_first=is_first)
        self.window = group.settings.windows[row]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of the layer's device."""
        self.group.window_cache_for(self.rows, key_states.transpose(1, 2), self.seen)

    def _reopen_step(self) -> None:
        self.group.window_caches[self.rows].reopen_step(self.layer_idx)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, new_seqlens: list[int] | None, **logits: Any
    ) -> Tensor:
        cache = self.group.window_cache_for(self.rows, k, self.seen)
        if self.group.decoding:
            return cache.decode(self.layer_idx, q, k, v, **logits)
        return cache.prefill(self.layer_idx, q, k, v, new_seqlens=new_seqlens, **logits)
