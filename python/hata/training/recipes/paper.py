"""Recipe `paper`: the published objective, labels and optimizer.

Source: HATA, arXiv 2506.02572, equations 7 to 9 and appendix B. Where text and released code
differ, the code's choice is taken, since it made the published numbers; docs/training.md lists
them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check
from hata.training.data import TrainingData
from hata.training.recipes.fit import Fit, Recipe, generator_of


@dataclass(frozen=True)
class PaperRecipe(Recipe):
    """Pairs of a query and a key, pulled together by their rank and pushed apart.

    Minimizes, over the weights W of a KV head, with the relaxed code ``h(x) = 2 sigmoid(slope x W)
    - 1`` (equation 7) of n labelled pairs (equation 9)::

        similarity    · Σ_pairs s ‖h(q) - h(k)‖² / n
      + balance       · Σ_query heads ‖Σ_pairs (h(q) + h(k)) / (n num_bits)‖²
      + decorrelation · ‖WᵀW - I‖, the Frobenius norm over all heads of a layer

    Labels s: of the keys that a query sees, the tenth with the largest inner products gets 20 to 1
    in order of rank, the others -1 (appendix B.1). The pairs are those of a few query tokens with
    every key they see, `num_pairs` of them in all; every query head of a group has its own.

    Attributes:
        slope: sigma in the paper.
        similarity: epsilon in the paper.
        balance: lambda in code, eta in equation 9.
        decorrelation: eta in code, lambda in equation 9.
        learning_rate: Of plain gradient descent with momentum.
        momentum: Of the gradient.
        weight_decay: Of the weights.
        num_epochs: Draws of pairs.
        steps_per_epoch: Steps on each draw.
        num_pairs: Labelled pairs of a head (150K to 300K in the paper).
        chunk_pairs: Pairs that are drawn together.
        chunks_per_epoch: Such chunks in a draw.
    """

    name: ClassVar[str] = "paper"

    num_bits: int = 128
    query_bits: int = 1
    key_norms: bool = True
    slope: float = 0.1
    similarity: float = 0.01
    balance: float = 1.0
    decorrelation: float = 2.0
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    num_epochs: int = 15
    steps_per_epoch: int = 20
    num_pairs: int = 200_000
    chunk_pairs: int = 32768
    chunks_per_epoch: int = 3

    @property
    def num_steps(self) -> int:
        """Steps that training takes."""
        return self.num_epochs * self.steps_per_epoch

    def head_bytes(self, shape: tuple[int, int, int, int, int, int]) -> int:
        """Labels of every pair, codes of every key and, for one sequence, their gradients."""
        num_sequences, _, group, _, seq_len, _ = shape
        labels = 2 * group * max(self.num_pairs, num_sequences * seq_len)
        return 4 * (labels + (num_sequences + 6) * seq_len * self.num_bits)

    def fit(self, data: TrainingData) -> "PaperFit":
        """Labels the pairs and draws the first weights."""
        return PaperFit(self, data)


class PaperFit(Fit):
    """The weights of recipe `paper` in training.

    A pair enters the loss through its label alone, so pairs that share a query or a key are summed
    over first: ``Σ s ‖a - b‖² = Σ s ‖a‖² + Σ s ‖b‖² - 2 Σ s a·b``.
    """

    def __init__(self, recipe: PaperRecipe, data: TrainingData) -> None:
        super().__init__()
        self.recipe = recipe
        drawn = [
            torch.randn(
                data.num_kv_heads,
                data.head_dim,
                recipe.num_bits,
                generator=generator_of(recipe.seed, layer_idx),
            )
            for layer_idx in data.layers
        ]
        self.key_weights = torch.nn.Parameter(torch.cat(drawn).to(data.k.device))
        self.rows = _rows(data, recipe.num_pairs, recipe.seed)
        # [heads, group, num_sequences, num_rows, seq_len], 0 where a query does not see a key
        self.labels = torch.stack(
            [_labels(data, i, rows) for i, rows in enumerate(self.rows)], dim=2
        )
        seen = torch.stack([data.visible(i, rows) for i, rows in enumerate(self.rows)])
        self.pairs = seen.flatten().nonzero()[:, 0]
        order = torch.randperm(len(self.pairs), generator=generator_of(recipe.seed, 0))
        self.pairs = self.pairs[order.to(self.pairs.device)]
        self._drawn = (-1, seen)

    def optimizer(self) -> torch.optim.Optimizer:
        """Plain gradient descent with momentum; the rate stays (appendix B)."""
        recipe = self.recipe
        return torch.optim.SGD(
            self.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def step(self, data: TrainingData, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        """One step on the pairs of this epoch."""
        drawn = self._pairs_of(step // self.recipe.steps_per_epoch)
        optimizer.zero_grad()
        num_pairs = int(drawn.sum())
        squared = torch.zeros(data.heads, device=data.k.device)
        sums = torch.zeros(data.heads, 1, self.recipe.num_bits, device=data.k.device)
        for sequence_idx, rows in enumerate(self.rows):
            inside = drawn[sequence_idx]
            labels = (self.labels[:, :, sequence_idx] * inside).flatten(1, 2)
            a = self._code(data.q[sequence_idx, :, rows].transpose(1, 2))  # as the labels
            b = self._code(data.k[sequence_idx])  # [heads, seq_len, num_bits]
            of_row = inside.sum(1).to(b.dtype).expand(data.heads, a.shape[1], 1, -1)
            of_key = inside.sum(0).to(b.dtype).expand(data.heads, 1, -1)
            sums = sums + (of_row @ a).squeeze(2) + of_key @ b
            a = a.flatten(1, 2)  # [heads, group * num_rows, num_bits]
            squared = squared + (labels.sum(2)[:, None] @ a.square()).sum((1, 2))
            squared = squared + (labels.sum(1)[:, None] @ b.square()).sum((1, 2))
            squared = squared - 2 * ((labels @ b) * a).sum((1, 2))
        loss = self._loss(data, squared / num_pairs, sums / (num_pairs * self.recipe.num_bits))
        loss.sum().backward()
        optimizer.step()
        return loss.detach()

    def weights(self) -> tuple[Tensor, None]:
        """Returns the weights, the same for queries and keys."""
        return self.key_weights.detach(), None

    def _loss(self, data: TrainingData, squared: Tensor, balance: Tensor) -> Tensor:
        recipe = self.recipe
        identity = torch.eye(recipe.num_bits, device=data.k.device)
        gram = self.key_weights.transpose(1, 2) @ self.key_weights - identity
        of_layer = gram.square().sum((1, 2)).unflatten(0, (len(data.layers), -1)).sum(1).sqrt()
        share = of_layer.repeat_interleave(data.num_kv_heads) / data.num_kv_heads
        return (
            recipe.similarity * squared
            + recipe.balance * balance.square().sum((1, 2))
            + recipe.decorrelation * share
        )

    def _code(self, x: Tensor) -> Tensor:
        """h(x), equation 7: ``2 sigmoid(slope y) - 1 = tanh(slope y / 2)``."""
        weights = 0.5 * self.recipe.slope * self.key_weights
        return torch.bmm(x.flatten(1, -2), weights).unflatten(1, x.shape[1:-1]).tanh()

    def _pairs_of(self, epoch: int) -> Tensor:
        """Returns which pairs an epoch trains on: ``[num_sequences, num_rows, seq_len]``, bool."""
        if self._drawn[0] != epoch:
            recipe = self.recipe
            whole = max(len(self.pairs) // recipe.chunk_pairs, 1) * recipe.chunk_pairs
            chunks = self.pairs[:whole].split(recipe.chunk_pairs)
            order = torch.randperm(len(chunks), generator=generator_of(recipe.seed, epoch + 1))
            chosen = [chunks[i] for i in order[: recipe.chunks_per_epoch].tolist()]
            drawn = torch.zeros_like(self._drawn[1])
            drawn.view(-1)[torch.cat(chosen)] = True
            self._drawn = (epoch, drawn)
        return self._drawn[1]


def _rows(data: TrainingData, num_pairs: int, seed: int) -> list[Tensor]:
    """Draws as many query tokens from each sequence, for ``num_pairs`` pairs in all.

    From its second half, as appendix B.1 has it.
    """
    second_half = data.positions >= data.seq_len // 2
    available = [int(sees.sum()) for sees in second_half]
    rule = f"have queries of each sequence's second half, from position {data.seq_len // 2} on"
    check(min(available) > 0, "train", "captures for recipe paper", rule, available)
    seen = float(data.positions[second_half].double().mean()) + 1
    count = max(round(num_pairs / (seen * data.num_sequences)), 1)
    rows = []
    for i, sees in enumerate(second_half):
        order = torch.randperm(available[i], generator=generator_of(seed, -1 - i))
        chosen = order[: min(count, *available)].sort().values
        rows.append(sees.nonzero()[:, 0].cpu()[chosen])
    return rows


def _labels(data: TrainingData, sequence_idx: int, rows: Tensor) -> Tensor:
    """Returns the labels of every pair: ``[heads, group, num_rows, seq_len]``."""
    q, k = data.q[sequence_idx, :, rows], data.k[sequence_idx]
    products = torch.einsum("hrgd,hsd->hgrs", q, k)
    seen = data.visible(sequence_idx, rows)
    order = products.masked_fill_(~seen, -torch.inf).argsort(-1, descending=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(data.seq_len, device=k.device).expand_as(order)
    )
    top = (seen.sum(-1) // 10).clamp(min=1)[:, None].to(k.dtype)
    graded = 20 - 19 * ranks / (top - 1).clamp(min=1)
    return torch.where(ranks < top, graded, -1.0) * seen
