"""hata: the codes of `HashWeights`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check
from hata.reference import MAX_NORM, scale_by_norm
from hata.reference.bits import quantize
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.softmax import Softmax
from hata.weights import HashWeights


@dataclass(frozen=True)
class HataSelector(Selector):
    """The score of `hata.hamming_score`, from unpacked bits.

    ``score[t] = sum_i c_i b_i(t)``, with b_i = ±1 the signs of ``k_t @ key_weights`` and c the
    query's small integers; with key norms, ``score / num_bits * norm(k_t)``. ``query_bits=1`` is
    the paper's symmetric code.

    Source: HATA, arXiv 2506.02572, algorithm 3, and docs/algorithm.md. Reads ``num_bits / 8`` bytes
    a token, and 2 more for a norm.

    Attributes:
        weights: The hash weights; ``metadata["recipe"]``, where set, names how they were made.

    Raises:
        ValueError: Layers have codes of different lengths.
    """

    name: ClassVar[str] = "hata"
    weights: HashWeights

    def __post_init__(self) -> None:
        """Checks the rule."""
        bits = self.weights.layer_bits
        rule = "have one num_bits for all layers"
        check(len(set(bits)) == 1, "HataSelector", "weights", rule, bits)

    @property
    def num_bits(self) -> int:
        """Bits of a key's code."""
        return self.weights.layer_bits[0]

    @property
    def recipe(self) -> str:
        """How the weights were made."""
        metadata = self.weights.metadata
        return metadata.get("recipe") or metadata.get("origin", "unknown").split(" ")[0]

    @property
    def variant(self) -> str:
        """Recipe, bits and norms."""
        norms = ", norms" if self.weights.key_norms else ""
        return f"{self.recipe}, {self.num_bits} bits, query {self.weights.query_bits}{norms}"

    @property
    def settings(self) -> dict[str, object]:
        """Recipe, bits and norms, by name."""
        return {
            "recipe": self.recipe,
            "num_bits": self.num_bits,
            "query_bits": self.weights.query_bits,
            "key_norms": self.weights.key_norms,
        }

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Hashes the keys; weights are rounded to the keys' dtype, as a cache's are."""
        key_weights, query_weights = self.weights.layer(layer_idx, k.dtype, k.device)
        keys = k.float()
        z = torch.einsum("shd,hdi->shi", keys, key_weights.float())
        signs = 2 * (z > 0).to(torch.int8) - 1  # a byte each: float32 is made per call
        norms = keys.norm(dim=-1).clamp(max=MAX_NORM).half().T  # [num_kv_heads, seq_len]

        def score(q: Tensor, positions: Tensor) -> Tensor:
            # Integers below 2**24: exact in float32, in any order.
            code = self._query_code(q, query_weights)
            scores = torch.einsum("qhi,shi->qhs", code, signs.float())
            if self.weights.key_norms:
                return scale_by_norm(scores, self.num_bits, norms).float()
            return scores

        return score

    def _query_code(self, q: Tensor, query_weights: Tensor) -> Tensor:
        """The integer vectors c, ``[num_queries, num_kv_heads, num_bits]``, float32."""
        weights = query_weights.float()
        if self.weights.query_bits == 1:
            z = torch.einsum("qhgd,hdi->qhgi", q, weights)
            return torch.where(z > 0, 1.0, -1.0).sum(2)
        weight_sum = 2**self.weights.query_bits - 1
        z = torch.einsum("qhd,hdi->qhi", q.sum(2), weights)
        return (2 * quantize(z, weight_sum) - weight_sum).float()

    def bytes_per_token(self, head_dim: int) -> float:
        """The code's bytes, and the norm's."""
        return self.num_bits / 8 + 2 * self.weights.key_norms
