"""Masks of a transformers model with hata attention.

The mask function makes no tensor: a `DeferredMask` goes to the attention function, which reads the
padding of a prompt from it where the layer is hata's, or makes the mask that "sdpa" takes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hata.checks import check
from hata.window_attention import Window

HERE = "integrations.transformers"  # in messages


@dataclass(frozen=True)
class Padding:
    """Where a prompt has padding.

    Attributes:
        new_seqlens: Real tokens, ``[batch]``.
        order: ``[batch, q_len]``: the tokens' columns, padding first, as a `HataCache` takes them.
        unpadded: Last columns without any padding.
    """

    new_seqlens: list[int]
    order: Tensor
    unpadded: int

    def first(self, x: Tensor) -> Tensor:
        """Moves padding to the left; x is ``[batch, q_len, heads, head_dim]``."""
        return x.take_along_dim(self.order.to(x.device)[:, :, None, None], 1)

    def back(self, x: Tensor) -> Tensor:
        """Undoes `first`."""
        return x.take_along_dim(self.order.to(x.device).argsort(1)[:, :, None, None], 1)


@dataclass
class DeferredMask:
    """The mask of one kind of layer, not yet a tensor.

    Attributes:
        arguments: What transformers hands to a mask function; ``attention_mask`` among them is None
            or ``[batch, kv_length]``, bool, with False for padding.
        rows: Which part of the tensor a model has taken, None for all of it: Gemma 4 leaves the
            layers that share keys the last tokens of a prompt.
    """

    arguments: dict[str, Any]
    rows: Any = None

    def __getitem__(self, rows: Any) -> "DeferredMask":
        return DeferredMask(self.arguments, rows)

    @property
    def padded(self) -> tuple[Tensor | None, int]:
        """The mask of padding, or None, and the number of keys."""
        return self.arguments["attention_mask"], self.arguments["kv_length"]

    @cached_property
    def for_sdpa(self) -> Tensor | None:
        """The mask as "sdpa" takes it; None where "sdpa" needs none."""
        if self.rows is None:
            return sdpa_mask(**self.arguments)
        mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        return None if mask is None else mask[self.rows]

    def check_window(self, window: Window | None) -> None:
        """Raises ValueError unless tokens see all positions before them, or a sliding window.

        Args:
            window: What a token sees; None for everything. Chunks are not checked: where they begin
                depends on padding, which is on the device.
        """
        if window is not None and window.is_chunk:
            return
        function = self.arguments["mask_function"]
        if window is None:
            fits, rule = function is causal_mask_function, "be causal over the whole context"
        else:
            size = window.size
            token, positions = torch.tensor([size]), torch.tensor([0, 1, size, size + 1])
            seen = function(0, 0, token, positions).tolist()
            fits, rule = seen == [False, True, True, False], f"be a causal window of {size}"
        check(fits, HERE, "attention_mask", rule, "another mask")

    def padding(self, q_len: int) -> Padding | None:
        """Reads which of the last ``q_len`` tokens are padding; None if none is.

        Waits for the device: once a prompt, where `generate` has found padding in it.
        """
        mask, kv_len = self.padded
        if mask is None:
            return None
        rule = "cover the tokens of the cache and the new ones"
        check(mask.shape[1] == kv_len, HERE, "attention_mask", rule, list(mask.shape))
        new = mask[:, kv_len - q_len :]
        column = torch.arange(1, q_len + 1, device=mask.device)
        last = (column * ~new).amax()  # the last column with padding, counted from 1
        *real, last_column = torch.cat([new.sum(1), last[None]]).tolist()
        if last_column == 0:
            return None
        return Padding(real, new.int().argsort(dim=1, stable=True), q_len - last_column)

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses what a model that changes its mask asks for."""
        raise AttributeError(f"hata.{HERE}: the model must leave its mask as it is, got .{name}")


def mask_function(**arguments: Any) -> DeferredMask:
    """Makes the mask of one kind of layer, as transformers asks for it."""
    return DeferredMask({"mask_function": causal_mask_function, **arguments})
