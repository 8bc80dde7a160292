"""What `hata.integrations.transformers.enable` settles for all caches of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]
from torch import Tensor

from hata.cache import HataCache
from hata.checks import check, check_type
from hata.config import HataConfig
from hata.offload import PAGE_SIZE, OffloadedCache
from hata.weights import HashWeights
from hata.window_attention import Window

# The HataCache's layer_idx, q [batch, q_len, num_heads, head_dim], it, indices, num_selected
DecodeObserver = Callable[[int, Tensor, HataCache, Tensor, Tensor], None]


@dataclass(frozen=True)
class CacheSettings:
    """What `enable` has settled, and every cache of the model is made from.

    Attributes:
        model_config: The model's config.
        config: The budget, of the model's layers.
        weights: The hash weights as they were given.
        layers: The model's layers that decode sparsely, ``[num_layers]`` of a `HataCache`.
        window_layers: Those with a sliding window or with chunks.
        windows: What the tokens of each of them see.
        layer_config: The budget, of these layers.
        layer_weights: Their weights.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page; None for a contiguous cache.
        kv_cache_dtype: Of cached keys and values; None for the model's.
        host_memory: Bytes of host memory for keys and values of all devices and shards together;
            None leaves them on the devices.
        observer: Called after each sparse decoding step, or None.
        num_draft_tokens: Tokens of a draft that a dense pass verifies; None: decoding is sparse.
        devices: The layers of each device, as indices of ``layers``; each device has a cache.
        window_devices: The same for ``window_layers``.
        shard: Which shard of its KV heads a layer holds here, of how many, if it does not hold all.
    """

    model_config: Any
    config: HataConfig
    weights: HashWeights
    layers: tuple[int, ...]
    window_layers: tuple[int, ...]
    windows: tuple[Window, ...]
    layer_config: HataConfig
    layer_weights: HashWeights
    max_seq_len: int
    page_size: int | None
    kv_cache_dtype: torch.dtype | None
    host_memory: int | None
    observer: DecodeObserver | None
    devices: tuple[tuple[int, ...], ...]
    window_devices: tuple[tuple[int, ...], ...]
    shard: tuple[int, int]
    num_draft_tokens: int | None = None
    _made: dict[tuple[tuple[int, ...], int], HashWeights] = field(
        default_factory=dict, init=False, repr=False
    )

    def weights_for(self, rows: tuple[int, ...], num_kv_heads: int) -> HashWeights:
        """Returns the weights of one device's layers, of its KV heads where they are split.

        Args:
            rows: The layers, as indices of ``layers``.
            num_kv_heads: How many KV heads the device holds.
        """
        (rank, size), all_heads = self.shard, self.layer_weights.shape[1]
        is_shard = num_kv_heads * size == all_heads  # any other number will not fit the weights
        if len(rows) == len(self.layers) and not (is_shard and size > 1):
            return self.layer_weights
        found = self._made.get((rows, num_kv_heads))
        if found is None:
            heads = slice(rank * num_kv_heads, (rank + 1) * num_kv_heads)
            part = self.layer_weights.part(rows, heads if is_shard else slice(None))
            found = self._made[rows, num_kv_heads] = part
        return found

    def config_for(self, rows: tuple[int, ...]) -> HataConfig:
        """Returns the budget of one device's layers, of which the first sparse one selects."""
        budgets = self.layer_config.layer_top_k(len(self.layers))
        dense = self.layer_config.num_dense_layers
        selecting = self.layer_config.selecting_layers(len(self.layers))
        first = sum(row < dense for row in rows)
        return replace(
            self.layer_config,
            top_k=tuple(budgets[row] for row in rows),
            num_dense_layers=first,
            share_selection=tuple(
                i for i, row in enumerate(rows) if i == first or selecting[row] == row
            ),
        )

    def new_cache(self, rows: tuple[int, ...], k: Tensor, max_seq_len: int) -> HataCache:
        """Makes the cache of one device's layers.

        Args:
            rows: The layers, as indices of ``layers``.
            k: ``[batch, q_len, num_kv_heads, head_dim]``; says for which batch, dtype and device.
            max_seq_len: Positions that a sequence can have.
        """
        arguments: dict[str, Any] = {
            "weights": self.weights_for(rows, k.shape[2]),
            "config": self.config_for(rows),
            "batch": k.shape[0],
            "max_seq_len": max_seq_len,
            "dtype": k.dtype,
            "device": k.device,
            "kv_cache_dtype": self.kv_cache_dtype,
            "record_cuts": self.observer is not None,
        }
        if self.host_memory is None:
            return HataCache(page_size=self.page_size, **arguments)
        share = self.host_memory * len(rows) // (len(self.layers) * self.shard[1])
        page_size = PAGE_SIZE if self.page_size is None else self.page_size
        return OffloadedCache(page_size=page_size, host_memory=share, **arguments)

    def __deepcopy__(self, memo: object) -> "CacheSettings":
        """Returns itself: nothing in it changes."""
        return self


def checked_host_memory(
    function: str, offload: int | str | None, num_layers: int, config: HataConfig
) -> int | None:
    """Returns the bytes of host memory that ``offload`` means; None where it is None.

    Args:
        function: The public function that takes it, for error messages.
        offload: Bytes, or a size as accelerate writes them: "64GB", "60GiB".
        num_layers: Layers that are hata's.
        config: Their budget.
    """
    if offload is None:
        return None
    rule = 'be bytes or a size such as "64GB"'
    is_size = isinstance(offload, int | str) and not isinstance(offload, bool)
    check_type(is_size, function, "offload", rule, offload)
    try:
        host_memory = convert_file_size_to_int(offload)
    except ValueError:
        host_memory = 0
    check(host_memory > 0, function, "offload", rule, repr(offload))
    dense, rule = config.num_dense_layers, "leave a sparse layer for offload"
    got = f"{dense} of {num_layers}"
    check(dense < num_layers, function, "config.num_dense_layers", rule, got)
    return host_memory


def layers_by_device(devices: Sequence[torch.device]) -> tuple[tuple[int, ...], ...]:
    """Returns the indices of each device's layers, of the first layer's device first.

    Args:
        devices: Of each layer.
    """
    found: dict[torch.device, list[int]] = {}
    for row, device in enumerate(devices):
        found.setdefault(device, []).append(row)
    return tuple(map(tuple, found.values()))
