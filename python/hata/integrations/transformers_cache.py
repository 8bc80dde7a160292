"""The transformers cache of hata.

The layers of a `HataTransformersCache` that attend to the whole context, to a sliding window or in
chunks are hata's (`hata.integrations.transformers_layers`), the others transformers' own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from hata.cache import HataCache
from hata.checks import check, check_int
from hata.integrations.model_shape import own_cache_layers
from hata.integrations.transformers_layers import (
    AttendingLayer,
    HataLayer,
    LayerGroup,
    WindowLayer,
)
from hata.integrations.transformers_mask import HERE
from hata.integrations.transformers_settings import CacheSettings
from hata.window_cache import WindowCache

# What forward passes and `generate` call a cache, and their outputs too: renamed in 5.24.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class HataTransformersCache(Cache):
    """A transformers cache that keeps a model's keys and values in a `hata.HataCache`.

    Layers with a sliding window or with chunks have a `hata.window_cache.WindowCache`; those with a
    state have transformers' cache layers in it. Its memory is allocated at the first forward pass,
    which tells batch, dtype and device. Like any transformers cache it continues where it stands:
    `reset` it before an unrelated prompt. After a forward pass that failed halfway, `reset` it too.

    Attributes:
        config: The settings.
        weights: The hash weights; ``weights.metadata["origin"]`` says if they are random.
        hata_layers: The model's index of each layer that decodes sparsely, those of ``hata_cache``.
        max_seq_len: Positions that a sequence can have.
        num_drafted: Tokens that were drafted and verified since the cache was made.
        num_accepted: Those among them that the dense model would have chosen too.
    """

    layers: list[Any]  # AttendingLayer, or transformers' own

    def __init__(self, settings: CacheSettings, max_seq_len: int) -> None:
        self._group = LayerGroup(settings, max_seq_len)
        self.config, self.weights = settings.config, settings.weights
        self.hata_layers, self.max_seq_len = settings.layers, max_seq_len
        self.num_drafted = self.num_accepted = 0
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        settings = self._group.settings
        layers = own_cache_layers(settings.model_config)
        first = min(settings.layers + settings.window_layers)
        for kind, chosen, devices in (
            (HataLayer, settings.layers, settings.devices),
            (WindowLayer, settings.window_layers, settings.window_devices),
        ):
            for row, model_layer in enumerate(chosen):
                is_first = model_layer == first
                layers[model_layer] = kind(self._group, row, devices, is_first=is_first)
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

    @property
    def window_caches(self) -> tuple[WindowCache, ...]:
        """What layers with a sliding window or chunks have on each device, likewise."""
        caches = self._group.window_caches
        return tuple(caches[rows] for rows in self._group.settings.window_devices if rows in caches)

    @property
    def _caches(self) -> tuple[HataCache | WindowCache, ...]:
        return (*self.hata_caches, *self.window_caches)

    @property
    def states(self) -> list[Tensor]:
        """What layers of linear attention hold; every pass updates it in place."""
        return [
            state
            for layer in self.layers
            if type(layer) is LinearAttentionLayer
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
            if state is not None
        ]

    def decodes(self, q_len: int) -> bool:
        """Returns whether a pass with as many new tokens is decoded, not prompt."""
        return self._group.decodes(self.get_seq_length(), q_len)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold its decoding: one GPU, fixed buffers, no observer."""
        states, drafting = self.states, self._group.drafting  # into other copies every time
        devices = {each.device for each in (*self._caches, *states)}
        on_gpu = [device.type for device in devices] == ["cuda"]
        fixed = all(
            isinstance(layer, AttendingLayer)
            or (type(layer) is LinearAttentionLayer and not layer.record_past and not drafting)
            or not isinstance(layer, CacheLayerMixin | LinearAttentionCacheLayerMixin)  # is empty
            for layer in self.layers
        ) and not any(state.is_inference() for state in states)  # which only passes like it change
        return on_gpu and fixed and self._group.settings.observer is None

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
                if isinstance(layer, AttendingLayer):
                    layer.seen = seen

    def extend(self, q_len: int) -> None:
        """Opens a step of ``q_len`` tokens in every layer, for a CUDA graph."""
        for cache in self._caches:
            cache.extend(q_len)

    def replayed(self, q_len: int) -> None:
        """Counts the tokens of a pass that a CUDA graph has run, in a step that is open."""
        for cache in self._caches:
            cache.close_step()
        self._group.close_step(q_len)
        for layer in self.layers:
            if isinstance(layer, AttendingLayer):
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

        Drafts go to copies of transformers' own layers, of which not all versions can take back
        several passes.
        """
        group, layers = self._group, self.layers
        self.layers = [x if isinstance(x, AttendingLayer) else _copy_of(x) for x in layers]
        seen, group.drafting = self.get_seq_length(), True
        try:
            yield
            drafted = self.get_seq_length() - seen
            self.layers = [x for x in layers if isinstance(x, AttendingLayer)]
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
        for cache in self._caches:
            cache.reset()
        self._group.prompt_len, self._group.croppable = None, 0
        self.layers = self._new_layers()

    def crop(self, tokens_to_remove: int | Tensor) -> None:  # 5.17 counts drafts on the device
        """Removes tokens from the end of every sequence.

        Args:
            tokens_to_remove: The negative number of them; 0 removes none.

        Raises:
            TypeError: It is no int.
            ValueError: It is positive, or there are not as many tokens since the last padding or
                in the layers with a window.
        """
        group = self._group
        if isinstance(tokens_to_remove, Tensor):
            tokens_to_remove = int(tokens_to_remove)
        most = min([group.croppable, *(cache.num_removable for cache in self.window_caches)])
        check_int(f"{HERE}.crop", "tokens_to_remove", tokens_to_remove, -most, 0)
        if tokens_to_remove < 0:
            for cache in self._caches:
                cache.truncate([n + tokens_to_remove for n in cache.seq_lens])
            group.croppable += tokens_to_remove
            if group.prompt_len is not None:
                group.prompt_len = min(group.prompt_len, self.get_seq_length() + tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, AttendingLayer):
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
        order = beam_idx.tolist() if isinstance(beam_idx, Tensor) else beam_idx
        for cache in self._caches:
            cache.reorder(order)
        rows = torch.as_tensor(beam_idx)
        for state in self.states:  # in place, where graphs know it
            state.copy_(state.index_select(0, rows.to(state.device)))
        for layer in self.layers:
            if not isinstance(layer, AttendingLayer) and type(layer) is not LinearAttentionLayer:
                layer.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{HERE}: the batch must stay as it is, got {repeats} repeats")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: the batch is fixed by the first forward pass."""
        raise ValueError(f"hata.{HERE}: the batch must stay as it is, got the selection {indices}")


def _copy_of(layer: Any) -> Any:
    """Returns a copy of one of transformers' layers, which stays as it is when the copy is used.

    A layer of keys and values puts new tensors in place of its old ones; states are written over.
    """
    new: Any = copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
    new.record_past = False
    return new
