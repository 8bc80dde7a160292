"""MagicPIG's decoding step: keys that share buckets with the query, attended to on the CPU.

Each query head attends to its own keys: those that fall into its bucket in two hash tables or more,
and the first and last ones, which lie on the GPU with their values; both parts are merged by lse
(arXiv 2410.16179, algorithm 1 and section 4.3). Tables, the other keys and values lie in host
memory.

Deviation: the paper divides each key's weight by the probability that it was retrieved. This step
attends plainly, which takes less time and gives another result.
"""

from pathlib import Path

import torch
from torch import Tensor

from hata import ops
from hata.checks import check
from hata.offload import OffloadedCache

from .host_steps import HostStep

LIBRARY = Path(__file__).with_name("lsh_tables.so")
# The paper's settings for Llama 3.1 8B.
NUM_TABLES = 150
TABLE_BITS = 10
MIN_COLLISIONS = 2
NUM_SINK = 4
NUM_RECENT = 64
WINDOW_PAGE = 128  # positions; room for the sink and recent ones
HASH_CHUNK = 64 << 10  # tokens


class MagicPig(HostStep):
    """A step of MagicPIG's.

    Attributes:
        retrieved: Positions of the last call, ``[batch, group, num_kv_heads, longest list]``.
    """

    mode = "magicpig"
    overlaps = True

    def __init__(self, cache: OffloadedCache, num_heads: int) -> None:
        rule = "be built: run make build-tests"
        check(LIBRARY.is_file(), "bench", "bench/lsh_tables.so", rule, "no such file")
        torch.ops.load_library(LIBRARY)
        super().__init__(cache, num_heads)
        device, batch = cache.device, cache.batch
        shape = (cache.head_dim, NUM_TABLES * TABLE_BITS)
        self.projection = torch.randn(shape, dtype=torch.float32).to(device, cache.dtype)
        self.place_values = (2 ** torch.arange(TABLE_BITS, device=device)).float()
        self.buckets = self.pinned(batch, num_heads, NUM_TABLES, dtype=torch.int32)
        window = (batch, WINDOW_PAGE, cache.num_kv_heads, cache.head_dim)
        self.windows, self.tables_of_layers = [], []
        for layer_idx in range(cache.num_layers):
            k_window, v_window = (
                torch.zeros(window, dtype=cache.dtype, device=device) for _ in range(2)
            )
            starts, positions = [], []
            for b in range(batch):
                k, v = (rows[0] for rows in cache.keys_values(layer_idx, b))
                for near, rows in ((k_window, k), (v_window, v)):
                    near[b, :NUM_SINK] = rows[:NUM_SINK]
                    near[b, NUM_SINK : NUM_SINK + NUM_RECENT] = rows[-NUM_RECENT:]
                del v
                for head in k[NUM_SINK:-NUM_RECENT].unbind(1):
                    start, order = self.table(head)
                    starts.append(start)
                    positions.append(order)
            by_head = (batch, cache.num_kv_heads, NUM_TABLES, -1)
            tables = (torch.cat(starts).view(by_head), torch.cat(positions).view(by_head))
            self.tables_of_layers.append(tables)
            self.windows.append((k_window, v_window))
        self.capacity = int(self.tables[1].max())
        self.window_tables = (
            torch.arange(batch, dtype=torch.int32, device=device)[:, None],
            torch.full((batch,), NUM_SINK + NUM_RECENT, dtype=torch.int32, device=device),
        )

    def table(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Sorts one head's keys ``[num_keys, head_dim]``, centred, into its tables.

        Returns:
            Where each bucket begins, ``[num_tables, num_buckets + 1]``, and the positions by
            bucket, ``[num_tables, num_keys]``, both int32 on the host.
        """
        mean = keys.float().mean(0).to(keys.dtype)
        chunks = [self.buckets_of(chunk - mean).short() for chunk in keys.split(HASH_CHUNK)]
        buckets, order = torch.cat(chunks).t().contiguous().sort()
        edges = torch.arange((1 << TABLE_BITS) + 1, dtype=torch.int16, device=keys.device)
        starts = torch.searchsorted(buckets, edges.expand(NUM_TABLES, -1).contiguous())
        return starts.int().cpu(), (order.int() + NUM_SINK).cpu()

    def buckets_of(self, x: Tensor) -> Tensor:
        """Returns the bucket of ``[..., head_dim]`` in each table, ``[..., num_tables]``, int32."""
        signs = (x @ self.projection > 0).view(*x.shape[:-1], NUM_TABLES, TABLE_BITS)
        return (signs.float() @ self.place_values).int()  # exact

    def select(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Sends queries and their buckets."""
        self.buckets.copy_(self.buckets_of(q[:, 0]), non_blocking=True)
        self.q.copy_(q, non_blocking=True)
        for near, row in zip(self.windows[layer_idx], (k, v), strict=True):
            near[:, NUM_SINK + NUM_RECENT - 1] = row[:, 0]

    def meanwhile(self, layer_idx: int, q: Tensor) -> None:
        """Attends to the first and last keys."""
        rows = self.windows[layer_idx]
        self.near = ops.dense_attention(q, *rows, *self.window_tables)

    def on_host(self, layer_idx: int) -> None:
        """Retrieves and attends; the heads of a group are tokens with lists of their own."""
        self.retrieved = torch.ops.lsh_tables.retrieve(
            self.buckets, *self.tables_of_layers[layer_idx], self.capacity, MIN_COLLISIONS
        )
        out, lse = self.attend(layer_idx, by_token(self.q, self.group), self.retrieved)
        by_token(self.out, self.group).copy_(out)
        by_token(self.lse, self.group).copy_(lse)

    def finish(self, layer_idx: int, q: Tensor) -> Tensor:
        """Merges both."""
        return ops.merge_attention_states(*self.bring_back(), *self.near)[0]

    def columns(self) -> dict[str, object]:
        """Says which share of the positions a head attended to on the CPU, in the last call."""
        per_head = (self.retrieved >= 0).sum(-1).float().mean().item()
        return {"retrieved": per_head / self.capacity}


def by_token(rows: Tensor, group: int) -> Tensor:
    """Views ``[batch, 1, num_heads, ...]`` as ``[batch, group, num_kv_heads, ...]``."""
    return rows.unflatten(2, (-1, group)).squeeze(1).transpose(1, 2)
