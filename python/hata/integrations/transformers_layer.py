"""One layer of a transformers cache that lies in a `hata.HataCache`."""

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.config import HataConfig
from hata.weights import HashWeights

DecodeObserver = Callable[[int, Tensor, HataCache, Tensor, Tensor], None]

_MARK = "_hata_layer"


class LayerGroup:
    """What the layers of one transformers cache share.

    Attributes:
        cache: The cache; None until the first keys tell batch, dtype and device.

    Args:
        config: The settings.
        weights: The model's hash weights.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page; None for a contiguous cache.
        observer: Called after each sparse decoding step, or None.
    """

    def __init__(
        self,
        config: HataConfig,
        weights: HashWeights,
        max_seq_len: int,
        page_size: int | None,
        observer: DecodeObserver | None,
    ) -> None:
        self.config, self.weights = config, weights
        self.max_seq_len, self.page_size = max_seq_len, page_size
        self.observer = observer
        self.cache: HataCache | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of every sequence."""
        return 0 if self.cache is None else self.cache.seq_lens[0]

    def cache_for(self, k: Tensor) -> HataCache:
        """Returns the cache, made anew where it is empty and k is of another batch or kind."""
        wanted = (k.shape[0], k.dtype, k.device)
        cache = self.cache
        if cache is None or (
            self.seq_len == 0 and wanted != (cache.batch, cache.dtype, cache.device)
        ):
            num_layers, num_kv_heads, head_dim, _ = self.weights.shape
            cache = self.cache = HataCache(
                self.config,
                num_layers=num_layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                batch=k.shape[0],
                max_seq_len=self.max_seq_len,
                page_size=self.page_size,
                dtype=k.dtype,
                device=k.device,
            )
        return cache


class HataLayer(CacheLayerMixin):
    """One layer: `update` marks the new keys, `attend` stores them and attends.

    Args:
        group: What the layers share.
        layer_idx: The layer.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, group: LayerGroup, layer_idx: int) -> None:
        super().__init__()
        self.group, self.layer_idx = group, layer_idx

    @staticmethod
    def of(key: Tensor) -> "HataLayer | None":
        """Returns the layer that passed on these keys, if one did."""
        return getattr(key, _MARK, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache of all layers."""
        self.group.cache_for(key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Passes the new keys and values on to the attention function, marked as this layer's."""
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Tensor:
        """Stores new tokens and attends: sparsely for one token, densely for a prompt.

        Args:
            q: ``[batch, q_len, num_heads, head_dim]``.
            k: ``[batch, q_len, num_kv_heads, head_dim]``.
            v: The same.
            softmax_scale: Factor of the logits, or None.

        Returns:
            ``[batch, q_len, num_heads, head_dim]``.
        """
        group = self.group
        cache = group.cache_for(k)
        where = (cache, self.layer_idx, group.weights)
        if q.shape[1] > 1:
            return prefill(q, k, v, *where, softmax_scale=softmax_scale)
        out = decode_attention(q, k, v, *where, softmax_scale=softmax_scale)
        if group.observer is not None and self.layer_idx >= group.config.num_dense_layers:
            selection = cache.last_selection(self.layer_idx)
            group.observer(self.layer_idx, q, cache, *selection)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that a mask would cover, and its offset."""
        return self.group.seq_len + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens of every sequence."""
        return self.group.seq_len

    def get_max_length(self) -> int:
        """Returns the positions that a sequence can have."""
        return self.group.max_seq_len
