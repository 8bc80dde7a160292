"""What Prometheus is told, beside vLLM's own metrics."""

from prometheus_client import Summary
from torch import Tensor

ATTENTION_MASS = Summary(
    "hata:attention_mass",
    "Share of dense attention that the selected positions hold, a mean for each measured step.",
    ["layer"],
)


def measure_mass(layer_idx: int, lse: Tensor, dense_lse: Tensor, slots: Tensor) -> None:
    """Adds one step to the metric: ``exp(lse - dense_lse)``, which is that share.

    Args:
        layer_idx: The layer.
        lse: Of the selected positions, ``[batch, q_len, num_heads]``.
        dense_lse: Of all positions, the same.
        slots: Where the tokens' keys are, ``[batch * q_len]``; -1 for padding, which counts
            nothing, and for most of what vLLM makes up while it starts.
    """
    kept = (slots.view(lse.shape[:2]) >= 0)[..., None] & dense_lse.isfinite()
    mass = (lse - dense_lse).exp()[kept]
    if len(mass) > 0:
        ATTENTION_MASS.labels(layer_idx).observe(mass.mean().item())
