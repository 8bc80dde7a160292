"""What every recipe is: settings that make a `Fit`, and a fit that finds the weights of heads."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.checks import check_int
from hata.training.data import TrainingData
from hata.weights import HashWeights, check_format


class Fit(torch.nn.Module, ABC):
    """Hash weights in the making, for all heads of a `TrainingData` at once.

    Its ``state_dict`` and its optimizer's are all that a checkpoint needs: a step draws nothing
    from torch's global generator. A closed form takes no step.

    Attributes:
        num_steps: Steps that training takes.
    """

    num_steps: int = 0

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Makes the optimizer; None where there is nothing to train."""
        return None

    def step(self, data: TrainingData, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        """Takes step number ``step`` and returns each head's loss before it, ``[heads]``."""
        raise NotImplementedError

    @abstractmethod
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Returns key weights ``[heads, head_dim, num_bits]`` and query weights, or None."""


class ClosedForm(Fit):
    """Weights that took no training.

    Args:
        key_weights: ``[heads, head_dim, num_bits]``; queries use them too.
    """

    def __init__(self, key_weights: Tensor) -> None:
        super().__init__()
        self.key_weights = torch.nn.Buffer(key_weights)

    def weights(self) -> tuple[Tensor, None]:
        """Returns the weights."""
        return self.key_weights, None


@dataclass(frozen=True)
class Recipe(ABC):
    """A way to find hash weights.

    Attributes:
        num_bits: Bits of a key's code.
        query_bits: Bits of a query's projection that the weights are for.
        key_norms: Whether the weights are for scores scaled by the key's norm.
        seed: Of everything that is drawn.
    """

    name: ClassVar[str]

    num_bits: int = 64
    query_bits: int = 4
    key_norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_format("train", self.num_bits, self.query_bits, self.key_norms)
        check_int("train", "seed", self.seed, 0)

    @abstractmethod
    def fit(self, data: TrainingData) -> Fit:
        """Starts a fit to these queries and keys."""

    @property
    def num_steps(self) -> int:
        """Steps that training takes."""
        return 0

    def head_bytes(self, shape: tuple[int, int, int, int, int, int]) -> int:
        """Estimates the bytes that each KV head needs beside the data.

        Args:
            shape: As `hata.training.source.Source.shape`.
        """
        return 0


def sign(x: Tensor) -> Tensor:
    """+1 where x > 0, else -1: the bits of a code."""
    return torch.where(x > 0, 1.0, -1.0)


def orthogonal(data: TrainingData, num_columns: int, seed: int) -> Tensor:
    """Draws random rotations: ``[heads, head_dim, num_columns]``, orthonormal in blocks."""
    num_bits = 32 * math.ceil(num_columns / 32)
    drawn = [
        HashWeights.random(
            num_layers=1,
            num_kv_heads=data.num_kv_heads,
            head_dim=data.head_dim,
            num_bits=num_bits,
            seed=seed * 1_000_003 + layer_idx,
        ).key_weights[0, ..., :num_columns]
        for layer_idx in data.layers
    ]
    return torch.cat(drawn).to(data.k.device)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The generator of one step, so that a resumed run draws what the whole run draws."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
