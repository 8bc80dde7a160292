"""A layer's softmax: what turns products of queries and keys into shares of attention."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """The softmax of a layer, with a softcap and sink logits where the model has them.

    ``shares_t = exp(x_t) / (exp(sink) + sum_u exp(x_u))`` over the positions u that a query sees,
    with ``x_t = scale q . k_t``, or ``softcap tanh(scale q . k_t / softcap)``. Source: see
    `hata.torch_attention`.

    Attributes:
        scale: Factor of the products.
        softcap: Cap of the logits, above 0; None: they stay.
        sink_logits: ``[num_kv_heads, group]``, float32; None: there are none.
    """

    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @classmethod
    def of_attention(
        cls,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> "Softmax":
        """Takes what transformers hands its attention functions.

        Args:
            q: ``[batch, num_heads, q_len, head_dim]``.
            k: ``[batch, num_kv_heads, seq_len, head_dim]``.
            scale: Factor of the products; None is ``head_dim ** -0.5``.
            softcap: Cap of the logits, or None.
            sink_logits: ``[num_heads]``, or None.
        """
        scale = q.shape[3] ** -0.5 if scale is None else scale
        groups = None if sink_logits is None else sink_logits.float().unflatten(0, (k.shape[1], -1))
        return cls(scale, softcap, groups)

    def to(self, device: torch.device) -> "Softmax":
        """Returns the same with its sink logits on this device."""
        sinks = self.sink_logits
        return self if sinks is None else replace(self, sink_logits=sinks.to(device))

    def cap_(self, logits: Tensor) -> Tensor:
        """Caps scaled products of queries and keys in place, and returns them."""
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def shares(self, products: Tensor, positions: Tensor) -> Tensor:
        """Computes the attention that each query pays the positions it sees, 0 on the others.

        Args:
            products: ``[num_queries, num_kv_heads, group, seq_len]``, float32.
            positions: ``[num_queries]``: query i sees ``0..positions[i]``.

        Returns:
            The same shape. A query's shares sum to 1, less what a sink takes.
        """
        hidden = torch.arange(products.shape[-1], device=products.device) > positions[:, None]
        x = self.cap_(products * self.scale).masked_fill_(hidden[:, None, None], -torch.inf)
        shares = x.softmax(-1)
        if self.sink_logits is None:
            return shares
        return shares.mul_(torch.sigmoid(x.logsumexp(-1) - self.sink_logits)[..., None])
