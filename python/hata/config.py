"""The budget of hash-aware top-k attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hata.checks import check, check_int, check_type

# Cached positions of all sequences and KV heads from which one sparse step is the faster one on a
# GPU. On an H100, with top_k 1.56 % of the length and at least 32, the step with the default codes
# overtakes the fastest dense attention here for batch 1 with 8 KV heads (8K tokens), 1 with 32
# (2K) and 8 with 8 (1K), and has overtaken it at twice as many, the fewest measured, for 8 with 32
# (512). 32 bits cross here too, 128 with norms at twice as many.
# Source: bench/results/decode_h100.csv, `python -m bench decode --grid crossover`.
MEASURED_SPARSE_ROWS = 65536
# The same for few (sequence, KV head) pairs, whose dense attention is far from the bandwidth: with
# one pair at 32K tokens, two at 16K and four at 8K a step with 64 bits takes 13.1, 12.6 and 12.2 us
# and dense attention 13.8, 13.2 and 13.7; at half of these lengths dense attention is faster.
# Source: bench/results/crossover_h100.csv, `python -m bench decode --grid crossover --codes B`.
FEW_PAIRS = 4
MEASURED_SPARSE_ROWS_OF_FEW = 32768


class LayerBudget(NamedTuple):
    """A layer's budget as the operators take it, for sequences up to some length.

    Attributes:
        top_k: The most positions that a token selects.
        top_k_share: The share of the positions that it sees, or None.
        min_top_k: The fewest with a share, or None without one.
    """

    top_k: int
    top_k_share: float | None
    min_top_k: int | None


@dataclass(frozen=True)
class HataConfig:
    """The budget: how many positions are attended to, which always are, and what stays dense.

    How keys are coded is said by `HashWeights`.

    Source: HATA, arXiv 2506.02572, sections 3 and 4; ``share_selection`` after Kascade, arXiv
    2512.16391.

    Attributes:
        top_k: Positions that each KV head attends to: a count of at least 1, or a share of the
            positions that a token sees, above 0 and below 1 and rounded up; or one of them for each
            layer, the dense ones included, as ``hata recall --frontier`` and ``hata eval
            --choose-on`` write them.
        min_top_k: The fewest positions where ``top_k`` is a share, at least 1.
        num_sink: First positions that are always among them, at least 0.
        num_recent: Last positions that are always among them, at least 0;
            ``num_sink + num_recent`` is at most a count's ``top_k``, and ``min_top_k`` where there
            is a share.
        num_dense_layers: Leading layers whose decoding stays dense, at least 0.
        min_sparse_len: Sequences with fewer positions than this, the new ones included, are decoded
            densely, at least 0; 0 is none. None is the length from which a sparse step was measured
            to be the faster one, which `HataCache.min_sparse_len` then says. See
            `hata.decode_attention`.
        share_selection: Which sparse layers select. A layer that does not attends to the positions
            that the last one before it that does has selected in the same step, for the same KV
            heads; it keeps no codes. An int n is every n-th sparse layer, 1 all of them; a tuple
            names their indices, ascending, the first sparse layer's among them; dense layers'
            do not matter.

    Raises:
        TypeError: A value has another type.
        ValueError: A value breaks its rule.
    """

    top_k: int | float | tuple[int | float, ...] = 512
    min_top_k: int = 128
    num_sink: int = 4
    num_recent: int = 16
    num_dense_layers: int = 2
    min_sparse_len: int | None = None
    share_selection: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        """Checks every rule."""
        where = "HataConfig"
        if isinstance(self.top_k, Sequence) and not isinstance(self.top_k, str):
            object.__setattr__(self, "top_k", tuple(self.top_k))  # JSON has lists
            check(self.top_k != (), where, "top_k", "have an entry for each layer", self.top_k)
        check_int(where, "min_top_k", self.min_top_k, 1, 2**31 - 1)
        check_int(where, "num_sink", self.num_sink, 0)
        check_int(where, "num_recent", self.num_recent, 0)
        always = self.num_sink + self.num_recent
        for top_k in self.top_k if isinstance(self.top_k, tuple) else (self.top_k,):
            check_budget(where, "top_k", top_k)
            name, least = ("top_k", top_k) if top_k >= 1 else ("min_top_k", self.min_top_k)
            rule = f"be at most {name}={least}"
            check(always <= least, where, "num_sink + num_recent", rule, always)
        check_int(where, "num_dense_layers", self.num_dense_layers, 0)
        if self.min_sparse_len is not None:
            check_int(where, "min_sparse_len", self.min_sparse_len, 0)
        chosen = self.share_selection
        if isinstance(chosen, Sequence) and not isinstance(chosen, str):
            object.__setattr__(self, "share_selection", tuple(chosen))  # JSON has lists
            for layer in chosen:
                check_int(where, "share_selection", layer, 0)
            rule = "name each layer once, in ascending order"
            check(sorted(set(chosen)) == list(chosen), where, "share_selection", rule, chosen)
        else:
            check_int(where, "share_selection", chosen, 1)

    def layer_top_k(self, num_layers: int) -> tuple[int | float, ...]:
        """Returns ``top_k`` of each layer, ``[num_layers]``.

        Args:
            num_layers: Layers of the model.

        Raises:
            ValueError: ``top_k`` names another number of layers.
        """
        if not isinstance(self.top_k, tuple):
            return (self.top_k,) * num_layers
        rule, entries = f"be one number or have num_layers={num_layers} entries", len(self.top_k)
        check(entries == num_layers, "HataConfig", "top_k", rule, f"{entries} entries")
        return self.top_k

    def selecting_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layer whose selection each layer attends to, ``[num_layers]``.

        That is the layer itself where it selects, and where it is dense.

        Args:
            num_layers: Layers of the model.

        Raises:
            ValueError: ``share_selection`` names a layer that there is not, or does not name the
                first sparse layer.
        """
        first, chosen = self.num_dense_layers, self.share_selection
        if isinstance(chosen, int):
            return tuple(i - max(i - first, 0) % chosen for i in range(num_layers))
        where, name = "HataConfig", "share_selection"
        rule = f"name layers below num_layers={num_layers}"
        check(max(chosen, default=0) < num_layers, where, name, rule, chosen)
        rule = f"name the first sparse layer, {first}"
        check(first in chosen or first >= num_layers, where, name, rule, chosen)
        return tuple(
            i if i < first else max(layer for layer in chosen if layer <= i)
            for i in range(num_layers)
        )

    def for_layers(self, layers: Sequence[int], num_layers: int) -> "HataConfig":
        """Returns the settings of some of a model's layers, which are numbered anew.

        Args:
            layers: The model's index of each of them, ascending.
            num_layers: Layers of the model.

        Raises:
            ValueError: ``top_k`` names another number of layers, or ``share_selection`` a layer
                that is not among them or none for their first sparse one.
        """
        budgets, chosen = self.layer_top_k(num_layers), self.share_selection
        if isinstance(chosen, tuple):
            others = sorted(set(chosen) - set(layers))
            rule = f"name layers that attend to the whole context, {list(layers)}"
            check(not others, "HataConfig", "share_selection", rule, others)
            chosen = tuple(map(list(layers).index, chosen))
        config = replace(
            self,
            top_k=tuple(budgets[layer] for layer in layers),
            num_dense_layers=sum(layer < self.num_dense_layers for layer in layers),
            share_selection=chosen,
        )
        config.selecting_layers(len(layers))  # raises where the first sparse one does not select
        return config

    def layer_budgets(self, num_layers: int, max_seq_len: int) -> tuple[LayerBudget, ...]:
        """Returns the budget of each layer, ``[num_layers]``.

        Args:
            num_layers: Layers of the model.
            max_seq_len: Positions that a sequence can have.

        Raises:
            ValueError: ``top_k`` names another number of layers.
        """
        return tuple(
            LayerBudget(top_k, None, None)
            if isinstance(top_k, int)
            else LayerBudget(
                max(positions_of(top_k, max_seq_len), self.min_top_k), top_k, self.min_top_k
            )
            for top_k in self.layer_top_k(num_layers)
        )

    def resolve_min_sparse_len(self, batch: int, num_kv_heads: int, device: torch.device) -> int:
        """Returns ``min_sparse_len``, or where it is None the measured one.

        On CUDA that is ``ceil(MEASURED_SPARSE_ROWS / (batch * num_kv_heads))``, or
        ``MEASURED_SPARSE_ROWS_OF_FEW`` for up to ``FEW_PAIRS`` of them. Elsewhere it is 0:
        on a CPU a sparse step is the faster one at every length measured, 8 to 14 times at 2K
        tokens, the shortest (bench/results/decode_cpu.csv).

        Args:
            batch: Sequences.
            num_kv_heads: KV heads of a layer.
            device: Where the cache lies.
        """
        if self.min_sparse_len is not None:
            return self.min_sparse_len
        if device.type != "cuda":
            return 0
        pairs = batch * num_kv_heads
        rows = MEASURED_SPARSE_ROWS_OF_FEW if pairs <= FEW_PAIRS else MEASURED_SPARSE_ROWS
        return -(-rows // pairs)


def check_budget(function: str, argument: str, top_k: object) -> None:
    """Raises unless ``top_k`` is a count of positions or a share of them.

    Raises:
        TypeError: It is no number.
        ValueError: It is a count below 1, or a share that is not above 0 and below 1.
    """
    if isinstance(top_k, float):
        check(0 < top_k < 1, function, argument, "be an int, or a share above 0 and below 1", top_k)
    else:
        is_int = isinstance(top_k, int) and not isinstance(top_k, bool)
        check_type(is_int, function, argument, "be an int or a share", top_k)
        check_int(function, argument, top_k, 1, 2**31 - 1)


def positions_of(top_k: int | float, seq_len: int) -> int:
    """Returns a budget in positions, as `hata.select_topk` rounds a share.

    Args:
        top_k: A count, or a share of ``seq_len``.
        seq_len: Positions that a token sees.
    """
    if isinstance(top_k, int):
        return top_k
    return -(-seq_len * math.floor(top_k * 2**32) // 2**32)
