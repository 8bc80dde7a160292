"""Recipe `pca-itq`: principal components of the keys, rotated towards the corners of a cube."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hata.training.data import TrainingData
from hata.training.recipes.fit import ClosedForm, Recipe, orthogonal, sign

_KEYS = 16384  # of each head, enough for second moments of up to 256 channels


@dataclass(frozen=True)
class PcaItqRecipe(Recipe):
    """Iterative quantization (Gong and Lazebnik, 2011), without centring: codes have no bias.

    The keys' leading principal components V are rotated by the R that minimizes
    ``‖sign(K V R) - K V R‖``, found by alternating between the signs and the rotation (orthogonal
    Procrustes). More bits than channels take several rotations, each from its own random start.

    Attributes:
        num_iterations: Alternations.
    """

    name: ClassVar[str] = "pca-itq"

    num_iterations: int = 50

    def fit(self, data: TrainingData) -> ClosedForm:
        """Computes them."""
        step = math.ceil(data.num_sequences * data.seq_len / _KEYS)
        keys = data.k[:, :, ::step].transpose(0, 1).flatten(1, 2)
        moments = keys.transpose(1, 2) @ keys
        components = torch.linalg.eigh(moments).eigenvectors.flip(-1)  # the largest first
        blocks = []
        for start in range(0, self.num_bits, data.head_dim):
            width = min(data.head_dim, self.num_bits - start)
            chosen = components[..., :width]
            turns = orthogonal(data, data.head_dim, self.seed + start)
            first = torch.linalg.qr(turns[:, :width, :width]).Q
            blocks.append(chosen @ self._rotation(keys @ chosen, first))
        return ClosedForm(torch.cat(blocks, -1))

    def _rotation(self, projected: Tensor, rotation: Tensor) -> Tensor:
        for _ in range(self.num_iterations):
            codes = sign(projected @ rotation)
            # On the CPU: a GPU factors matrices of this size one after the other, and slowly.
            left, _, right = torch.linalg.svd((projected.transpose(1, 2) @ codes).cpu())
            rotation = (left @ right).to(projected.device)
        return rotation
