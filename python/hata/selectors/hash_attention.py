"""HashAttention: bits that small networks make of queries and keys."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, relu

from hata.selectors.selector import Queries, Score, Selector, products
from hata.selectors.softmax import Softmax

_LEARNING_RATE = 1e-3
_NUM_POSITIVES = 64  # positions of a query that it shall find
_KEYS_AT_ONCE, _QUERIES_AT_ONCE = 4096, 64

# Weights [num_kv_heads, in, out] and bias [num_kv_heads, 1, out] of each linear layer.
Network = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class HashNetworks:
    """The networks of one layer of a model.

    Attributes:
        queries: That of the queries, the same for a group's heads.
        keys: That of the keys.
    """

    queries: Network
    keys: Network

    def to(self, device: torch.device) -> "HashNetworks":
        """Returns the same on this device."""

        def moved(network: Network) -> Network:
            return tuple((weights.to(device), bias.to(device)) for weights, bias in network)

        return HashNetworks(moved(self.queries), moved(self.keys))


@dataclass(frozen=True)
class HashAttentionSelector(Selector):
    """Agreeing bits, which networks of three linear layers make of queries and keys.

    ``score[t] = sum over the group's heads g and bits i of sign(f_q(q_g))_i sign(f_k(k_t))_i``.

    Source: HashAttention, arXiv 2412.14468: networks that are trained to tell the positions with
    the most attention from the others, with tanh in place of the sign, and 32 bits. It also weighs
    a position by its value's norm, which captures may lack. See `fit_hash_networks` for the
    training, whose settings are this package's. Reads ``num_bits / 8`` bytes a token.

    Attributes:
        layers: The networks of each layer, as `fit_hash_networks` gives them.
    """

    name: ClassVar[str] = "hashattention"
    layers: tuple[HashNetworks, ...] = field(repr=False)

    @property
    def num_bits(self) -> int:
        """Bits of a key."""
        return self.layers[0].keys[-1][0].shape[2]

    @property
    def variant(self) -> str:
        """The number of bits."""
        return f"{self.num_bits} bits"

    @property
    def settings(self) -> dict[str, object]:
        """Bits, by name."""
        return {"recipe": self.variant, "num_bits": self.num_bits}

    def index(
        self, layer_idx: int, k: Tensor, softmax: Softmax, queries: Queries | None = None
    ) -> Score:
        """Hashes the keys."""
        networks = self.layers[layer_idx].to(k.device)
        keys = _signs(_through(networks.keys, k.float().transpose(0, 1)))

        def score(q: Tensor, positions: Tensor) -> Tensor:
            codes = _of_groups(networks.queries, q, _signs)
            return torch.einsum("hqi,hsi->qhs", codes, keys)

        return score

    def bytes_per_token(self, head_dim: int) -> float:
        """The code's bytes."""
        return self.num_bits / 8


def fit_hash_networks(
    layers: Iterable[tuple[Tensor, Tensor, Tensor, Softmax]],
    device: torch.device,
    *,
    num_steps: int,
    num_bits: int = 32,
    hidden: int = 128,
    seed: int = 0,
) -> tuple[HashNetworks, ...]:
    """Trains the networks of each layer to find what its queries attend to most.

    A step draws a sequence, 64 of its queries and 4096 of its keys; the loss is the binary cross
    entropy of ``scale mean_g tanh(f_q(q_g)) . tanh(f_k(k_t)) + bias``, scale and bias learned, for
    the question whether a position is among the 64 with the most attention, which weigh as much as
    all others. Adam, with a cosine decay.

    Args:
        layers: Of each layer, of text that is not measured on: q ``[num_sequences, num_queries,
            num_kv_heads, group, head_dim]``, k ``[num_sequences, seq_len, num_kv_heads,
            head_dim]``, positions ``[num_sequences, num_queries]`` and its softmax.
        device: Where to compute.
        num_steps: Of each layer.
        num_bits: Bits of a query and of a key.
        hidden: Channels between the linear layers.
        seed: Draws the beginning and the steps.
    """
    return tuple(
        _fit(q, k, positions, softmax.to(device), device, num_steps, (num_bits, hidden), seed)
        for q, k, positions, softmax in layers
    )


def _fit(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    softmax: Softmax,
    device: torch.device,
    num_steps: int,
    sizes: tuple[int, int],
    seed: int,
) -> HashNetworks:
    num_sequences, num_queries, num_kv_heads, _, head_dim = q.shape
    generator = torch.Generator().manual_seed(seed)
    networks = []
    for x in (q, k):
        size = float(x.float().square().mean().sqrt())
        networks.append(_network(num_kv_heads, head_dim, *sizes, size, generator, device))
    scale = torch.full((num_kv_heads, 1, 1), 2 / sizes[0] ** 0.5, device=device)
    bias = torch.zeros(num_kv_heads, 1, 1, device=device)
    parameters = [scale, bias, *(x for network in networks for pair in network for x in pair)]
    optimizer = torch.optim.Adam([x.requires_grad_() for x in parameters], lr=_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        sequence = int(torch.randint(num_sequences, (), generator=generator))
        rows = torch.randperm(num_queries, generator=generator)[:_QUERIES_AT_ONCE]
        places = torch.randperm(k.shape[1], generator=generator)[:_KEYS_AT_ONCE]
        some_q, some_k = (
            x[sequence, some].to(device).float() for x, some in ((q, rows), (k, places))
        )
        seen = (places <= positions[sequence, rows, None]).to(device)[:, None]
        keys = _through(networks[1], some_k.transpose(0, 1)).tanh()
        codes = _of_groups(networks[0], some_q, torch.tanh) / some_q.shape[2]
        scores = (codes @ keys.mT * scale + bias).transpose(0, 1)
        loss = _loss(scores, _wanted(some_q, some_k, seen, softmax), seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    found = [tuple((w.detach().cpu(), b.detach().cpu()) for w, b in x) for x in networks]
    return HashNetworks(*found)


def _wanted(q: Tensor, k: Tensor, seen: Tensor, softmax: Softmax) -> Tensor:
    """1 for the positions with the most attention of those seen, 0 for the others."""
    logits = softmax.cap_(products(q, k) * softmax.scale)
    shares = logits.masked_fill_(~seen[:, None], -torch.inf).softmax(-1).mean(2)
    best = shares.nan_to_num(0.0).topk(min(_NUM_POSITIVES, len(k))).indices  # NaN: sees nothing
    return torch.zeros_like(shares).scatter_(2, best, 1.0)


def _loss(scores: Tensor, wanted: Tensor, seen: Tensor) -> Tensor:
    """Binary cross entropy, the mean of both answers' means."""
    ones, zeros = seen * wanted, seen * (1 - wanted)
    weights = ones / ones.sum().clamp(min=1) + zeros / zeros.sum().clamp(min=1)
    return binary_cross_entropy_with_logits(scores, wanted, weights / 2, reduction="sum")


def _network(
    num_kv_heads: int,
    head_dim: int,
    num_bits: int,
    hidden: int,
    size: float,
    generator: torch.Generator,
    device: torch.device,
) -> Network:
    """Three linear layers, drawn so that channels of inputs of this size come out near 1."""
    layers = []
    for a, b, scale in ((head_dim, hidden, size), (hidden, hidden, 1.0), (hidden, num_bits, 1.0)):
        weights = torch.randn(num_kv_heads, a, b, generator=generator) * (2 / a) ** 0.5 / scale
        layers.append((weights.to(device), torch.zeros(num_kv_heads, 1, b, device=device)))
    return tuple(layers)


def _through(network: Network, x: Tensor) -> Tensor:
    """``[num_kv_heads, number, head_dim]`` to ``[num_kv_heads, number, num_bits]``."""
    for weights, bias in network[:-1]:
        x = relu(torch.baddbmm(bias, x, weights))
    weights, bias = network[-1]
    return torch.baddbmm(bias, x, weights)


def _of_groups(network: Network, q: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums what a group's heads say, ``[num_kv_heads, num_queries, num_bits]``."""
    heads = q.permute(1, 0, 2, 3)  # [num_kv_heads, num_queries, group, head_dim]
    return turned(_through(network, heads.flatten(1, 2))).unflatten(1, heads.shape[1:3]).sum(2)


def _signs(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0)
