"""Where queries and keys come from: random numbers, or a real model's layer.

Random codes flatter a selection by histogram: their scores follow one bell curve and hardly tie.
Captured ones cluster, tie and lead to rows that lie close together. A captured file is short; its
keys are tiled to the length of a sequence, unchanged, so that each score occurs once per tile.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hata.checks import check

from .cases import Shape


@dataclass(frozen=True)
class Captured:
    """One layer's queries and keys after position embedding, and its hash weights.

    A case has more heads than the file, and maybe a multiple of its head_dim. KV head h of a case
    is the file's KV head h modulo their number; with twice the head_dim it is that head beside the
    next one, so that products are sums over both. Query heads follow their KV head.

    Attributes:
        queries: ``[positions, num_heads, head_dim]``, of the last positions of the text.
        keys: ``[tokens, num_kv_heads, head_dim]``.
        key_weights: ``[num_kv_heads, head_dim, num_bits]``.
        query_weights: The same; the key weights where the file has none.
    """

    queries: Tensor
    keys: Tensor
    key_weights: Tensor
    query_weights: Tensor

    @classmethod
    def load(cls, path: Path) -> "Captured":
        """Loads a file of ``python -m bench capture``.

        Raises:
            ValueError: It is no such file.
        """
        check(path.is_file(), "bench", "--inputs", "be a file of python -m bench capture", path)
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"hata.bench: --inputs must be safetensors, got {error}") from error
        missing = {"queries", "keys", "key_weights"} - tensors.keys()
        rule = "hold queries, keys and key_weights"
        check(not missing, "bench", "--inputs", rule, f"no {' and no '.join(sorted(missing))}")
        tensors.setdefault("query_weights", tensors["key_weights"])
        return cls(**tensors)

    def tile(self, shape: Shape, device: torch.device) -> Tensor:
        """Returns the file's keys in the heads of ``shape``, ``[tokens, num_kv_heads, head_dim]``.

        Longer than the sequence, they are cut.
        """
        keys = self.keys[: shape.seq_len].to(device, shape.dtype)
        return keys[:, self._kv_heads(shape)].reshape(-1, shape.num_kv_heads, shape.head_dim)

    def q(self, shape: Shape, num_sets: int, device: torch.device) -> Tensor:
        """Returns ``[num_sets, batch, q_len, num_heads, head_dim]``, one position after another."""
        per_kv_head = self.queries.shape[1] // self.keys.shape[1]
        kv_heads = self._kv_heads(shape).view(shape.num_kv_heads, 1, -1)
        members = torch.arange(shape.group).view(1, -1, 1) % per_kv_head
        heads = (kv_heads * per_kv_head + members).flatten()
        count = num_sets * shape.batch * shape.q_len
        positions = torch.arange(count, device=device) % len(self.queries)
        queries = self.queries.to(device, shape.dtype)[positions][:, heads.to(device)]
        return queries.reshape(num_sets, shape.batch, shape.q_len, shape.num_heads, shape.head_dim)

    def weights(self, shape: Shape, num_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns key and query weights ``[num_kv_heads, head_dim, num_bits]``: the first bits."""
        available = self.key_weights.shape[2]
        rule = f"have weights of {num_bits} bits or more"
        check(num_bits <= available, "bench", "--inputs", rule, available)
        size = (shape.num_kv_heads, shape.head_dim, num_bits)
        heads = self._kv_heads(shape)
        key, query = (
            weights[heads, :, :num_bits].to(device, shape.dtype).reshape(size)
            for weights in (self.key_weights, self.query_weights)
        )
        return key, query

    def _kv_heads(self, shape: Shape) -> Tensor:
        """Returns which of the file's heads make up each KV head, one after another."""
        _, num_heads, head_dim = self.keys.shape
        rule = f"have a head_dim that divides {shape.head_dim}"
        check(shape.head_dim % head_dim == 0, "bench", "--inputs", rule, head_dim)
        parts = torch.arange(shape.head_dim // head_dim)
        return ((torch.arange(shape.num_kv_heads)[:, None] + parts) % num_heads).flatten()


def repeat_to(tile: Tensor, dim: int, length: int) -> Tensor:
    """Repeats a tensor along ``dim`` until it has ``length`` there; the last copy may be cut."""
    dim %= tile.dim()
    counts = [1] * tile.dim()
    counts[dim] = -(-length // tile.shape[dim])
    return tile.repeat(counts).narrow(dim, 0, length)
