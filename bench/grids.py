"""Which cases a run measures: grids of the step, its variants, and the operators' shapes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hata.checks import check

from .cases import CONFIGS, WIDE, Case, CodeConfig, Shape

K = 1 << 10
LAYOUTS = ((32, 8), (32, 32))  # num_heads, num_kv_heads: grouped and multi-head attention
FEW_HEADS = ((8, 1), (16, 2), (28, 4))  # of a shard, or of a small model
GROUPS = (1, 3, 5, 7, 8, 12, 16)
BUDGETS = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8)

TABLE = (
    Shape(1, 32, 8, 32 * K),
    Shape(1, 32, 8, 128 * K),
    Shape(8, 32, 8, 32 * K),
    Shape(8, 32, 8, 128 * K),
    Shape(1, 32, 32, 32 * K),
    Shape(8, 32, 32, 32 * K),
    Shape(1, 32, 32, 256 * K),
    Shape(8, 28, 4, 128 * K),
)
CPU_TABLE = tuple(Shape(1, 32, 8, length, dtype=torch.float32) for length in (2 * K, 8 * K, 32 * K))


@dataclass(frozen=True)
class Sweep:
    """Shapes in order, each measured in several code settings.

    Attributes:
        until_faster: Ends the sweep with the first shape at which every setting beats dense.
    """

    shapes: tuple[Shape, ...]
    configs: tuple[CodeConfig, ...] = CONFIGS
    until_faster: bool = False


def table() -> list[Sweep]:
    return [Sweep(TABLE)]


def figure5() -> list[Sweep]:
    """The axes of the paper's figure 5: batch at 32K, and length at batch 1."""
    sweeps = []
    for heads in LAYOUTS:
        sweeps.append(Sweep(tuple(Shape(batch, *heads, 32 * K) for batch in (1, 2, 4, 8))))
        lengths = tuple(4 * K << i for i in range(7))
        sweeps.append(Sweep(tuple(Shape(1, *heads, length) for length in lengths)))
    return sweeps


def budget() -> list[Sweep]:
    shapes = (Shape(1, 32, 8, 128 * K), Shape(8, 32, 8, 128 * K))
    return [Sweep(tuple(replace(shape, budget=share) for share in BUDGETS)) for shape in shapes]


def crossover() -> list[Sweep]:
    """From which length a step is faster than dense attention."""
    lengths = tuple(512 << i for i in range(9))
    layers = [(1, heads) for heads in FEW_HEADS]
    layers += [(batch, heads) for batch in (1, 8) for heads in LAYOUTS]
    return [
        Sweep(tuple(Shape(batch, *heads, length) for length in lengths), until_faster=True)
        for batch, heads in layers
    ]


def few() -> list[Sweep]:
    """Few (sequence, KV head) pairs, as shards of tensor parallelism have them, and many short."""
    pairs = (Shape(1, 8, 1, 128 * K), Shape(8, 8, 1, 32 * K), Shape(1, 16, 2, 128 * K))
    return [
        Sweep((*pairs, Shape(1, 5, 1, 32 * K), Shape(16, 32, 8, 8 * K), Shape(64, 32, 8, 4 * K)))
    ]


def million() -> list[Sweep]:
    return [Sweep((Shape(1, 4, 1, K * K), Shape(1, 32, 8, K * K)))]


def fp8() -> list[Sweep]:
    """The table over caches in float8."""
    return [Sweep(tuple(replace(shape, kv_cache_dtype=torch.float8_e4m3fn) for shape in TABLE))]


def wide() -> list[Sweep]:
    """Head_dim 256, as Gemma 3 has it, and groups of sixteen, each of few and of many pairs."""
    heads_256 = (Shape(1, 4, 1, 32 * K, head_dim=256), Shape(8, 16, 8, 32 * K, head_dim=256))
    groups_of_16 = (Shape(1, 64, 4, 128 * K), Shape(8, 64, 4, 128 * K))
    return [Sweep((*heads_256, *groups_of_16), configs=CONFIGS[1:2])]


GRIDS = {
    "table": table,
    "figure5": figure5,
    "budget": budget,
    "crossover": crossover,
    "few": few,
    "million": million,
    "fp8": fp8,
    "wide": wide,
}


@dataclass(frozen=True)
class Variant:
    """A case that differs in one point from a reference case, whose time predicts its own."""

    name: str
    case: Case
    reference: Case


def variants() -> list[Variant]:
    """Returns one variant per unusual setting; the reference is the largest grouped shape.

    Groups change the number of query heads alone, so that the bytes, and the share of what does not
    grow with them, stay the same. The case of a large capacity is paged: pages are given out as a
    sequence grows, so that a few tokens take little memory.
    """
    shape = Shape(8, 32, 8, 128 * K)
    changes = {
        "float16": replace(shape, dtype=torch.float16),
        **{f"head_dim {size}": replace(shape, head_dim=size) for size in (64, 256)},
        **{f"group {group}": replace(shape, num_heads=8 * group) for group in GROUPS},
        "q_len 4": replace(shape, q_len=4),
    }
    result = []
    for config in CONFIGS[:2]:
        reference = Case(shape, config)
        cases = [(name, Case(changed, config)) for name, changed in changes.items()]
        cases.append(("page_size 16", Case(shape, config, page_size=16)))
        result += [Variant(name, case, reference) for name, case in cases]
    result.insert(0, Variant("num_bits 256", Case(shape, WIDE), Case(shape, CONFIGS[0])))
    live = Case(Shape(1, 32, 8, 8 * K), CONFIGS[1], page_size=16)
    roomy = replace(live, shape=replace(live.shape, capacity=K * K))
    return [*result, Variant("large capacity", roomy, live)]


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    sweeps: tuple[Sweep, ...]  # of the decoding step
    variants: tuple[Variant, ...]
    shapes: tuple[Shape, ...]  # of the operators alone
    configs: tuple[CodeConfig, ...]
    paged: tuple[Shape, ...]  # operators also measured with pages of 16 tokens, in configs[1]
    prompt: Shape  # whose sequence is appended in one call

    def layouts(self, shape: Shape) -> list[Case]:
        """Returns the code settings and page sizes in which operators are measured."""
        cases = [Case(shape, config) for config in self.configs]
        return cases + [Case(shape, self.configs[1], page_size=16)] * (shape in self.paged)

    def only(self, shapes: Sequence[str], codes: Sequence[str]) -> "Plan":
        """Returns the plan without the steps and operators of other shapes and settings.

        Raises:
            ValueError: Nothing of what this plan has is named so.
        """
        every = [*self.shapes, *(shape for sweep in self.sweeps for shape in sweep.shapes)]
        known = dict.fromkeys(str(shape) for shape in every)
        for name in shapes:
            check(name in known, "bench", "--shape", f"be one of {'; '.join(known)}", name)
        sweeps = tuple(
            replace(
                sweep,
                shapes=tuple(s for s in sweep.shapes if not shapes or str(s) in shapes),
                configs=tuple(c for c in sweep.configs if not codes or c.name in codes),
            )
            for sweep in self.sweeps
        )
        chosen = tuple(s for s in self.shapes if not shapes or str(s) in shapes)
        return replace(self, sweeps=sweeps, shapes=chosen)


def plan_for(device: torch.device, grids: Sequence[str], quick: bool) -> Plan:
    """Returns the cases of ``grids`` on the device.

    A CPU has a shorter table, and its variants are of one sequence. ``quick`` keeps the first
    shapes of everything and makes them small: for continuous integration.
    """
    on_cpu = device.type == "cpu"
    limits = QUICK if quick else CPU if on_cpu else Limits()
    fit = functools.partial(fitted, limits=limits, on_cpu=on_cpu)
    chosen = [
        Variant(
            variant.name,
            replace(variant.case, shape=fit(variant.case.shape)),
            replace(variant.reference, shape=fit(variant.reference.shape)),
        )
        for variant in variants()
    ]
    if quick:
        sweeps = [
            replace(
                sweep,
                shapes=tuple(dict.fromkeys(fit(shape) for shape in sweep.shapes[:2])),
                configs=sweep.configs[:2],
            )
            for name in grids
            for sweep in GRIDS[name]()
        ]
        shape = fit(TABLE[0])
        return Plan(tuple(sweeps), tuple(chosen), (shape,), CONFIGS[:2], (), shape)
    if on_cpu:
        other = [name for name in grids if name != "table"]
        check(not other, "bench", "--grid", "be table on a CPU", ", ".join(other))
        last = CPU_TABLE[-1]
        return Plan((Sweep(CPU_TABLE),), tuple(chosen), CPU_TABLE, CONFIGS, (last,), last)
    sweeps = [sweep for name in grids for sweep in GRIDS[name]()]
    return Plan(tuple(sweeps), tuple(chosen), TABLE, CONFIGS, (TABLE[0], TABLE[3]), TABLE[0])


@dataclass(frozen=True)
class Limits:
    """The largest sizes that a run allows; larger shapes are cut to them."""

    batch: int = 8
    num_kv_heads: int = 32
    seq_len: int = K * K
    capacity: int = K * K


CPU = Limits(batch=1, seq_len=32 * K, capacity=128 * K)
QUICK = Limits(batch=2, num_kv_heads=2, seq_len=2 * K, capacity=4 * K)


def fitted(shape: Shape, limits: Limits, on_cpu: bool) -> Shape:
    """Returns the shape within the limits, its group kept, in a dtype that the device computes."""
    num_kv_heads = min(limits.num_kv_heads, shape.num_kv_heads)
    changed = replace(
        shape,
        batch=min(limits.batch, shape.batch),
        num_heads=shape.group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        seq_len=min(limits.seq_len, shape.seq_len),
        capacity=min(limits.capacity, shape.capacity),
    )
    bfloat16 = shape.dtype == torch.bfloat16
    return replace(changed, dtype=torch.float32) if on_cpu and bfloat16 else changed
