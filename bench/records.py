"""The committed rows of ``bench/results``, for plots and for the tables of the documentation."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .baselines import DENSE, DENSE_MORE
from .cases import CONFIGS, Shape
from .decode import PARTS
from .grids import LAYOUTS, TABLE

DENSE_NAMES = {
    "fa2_us": "SDPA, FlashAttention-2",
    "cudnn_us": "SDPA, cuDNN",
    "flashinfer_us": "FlashInfer",
    "flashinfer_tc_us": "FlashInfer, tensor cores",
    "flash_attn2_us": "flash-attn 2",
    "flash_attn3_us": "flash-attn 3",
    "sdpa_us": "SDPA",
}


def shape_of(row: dict[str, str]) -> Shape:
    """Returns what rows of different files have in common."""
    return Shape(*(int(row[name]) for name in ("batch", "num_heads", "num_kv_heads", "seq_len")))


@dataclass(frozen=True)
class Step:
    """One row of ``decode_<device>.csv``, times in microseconds."""

    gpu: str
    shape: Shape
    config: str  # A, B or C
    top_k: int
    captured: bool
    us: float
    floor_us: float
    parts: dict[str, float]
    dense: dict[str, float]

    @property
    def best_dense(self) -> float | None:
        return min(self.dense.values(), default=None)

    @property
    def speedup(self) -> float | None:
        return self.best_dense / self.us if self.dense else None


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load_steps(path: Path) -> list[Step]:
    """Returns the steps over contiguous caches, but float8 ones; of repeated cases the last."""
    names = {(c.num_bits, c.query_bits, c.key_norms): c.name for c in CONFIGS}
    steps: dict[tuple[object, ...], Step] = {}
    for row in read(path):
        codes = (int(row["num_bits"]), int(row["query_bits"]), row["key_norms"] == "1")
        of_float8 = row.get("kv_cache_dtype", "").startswith("float8")
        if codes not in names or row["page_size"] != row["seq_len"] or of_float8:
            continue
        step = Step(
            gpu=row["gpu"],
            shape=shape_of(row),
            config=names[codes],
            top_k=int(row["top_k"]),
            captured=row.get("inputs") == "captured",
            us=float(row["hata_us"]),
            floor_us=float(row["floor_us"]),
            parts={part: float(row[f"{part}_us"]) for part in PARTS},
            dense={name: float(row[name]) for name in (*DENSE, *DENSE_MORE) if row[name]},
        )
        steps[step.shape, step.config, step.top_k, step.captured] = step
    return list(steps.values())


def usual(steps: Iterable[Step], captured: bool = False) -> list[Step]:
    """Returns the steps with the paper's budget."""
    return [step for step in steps if step.captured == captured and step.top_k == step.shape.top_k]


def by_heads(
    steps: list[Step],
    batch: int | None = None,
    seq_len: int | None = None,
    layouts: Iterable[tuple[int, int]] = LAYOUTS,
) -> list[tuple[str, list[Step]]]:
    """Returns, per head layout, its name and those steps of one batch or length, if several."""
    found = []
    for layout in layouts:
        name = "{}/{}".format(*layout)
        chosen = [
            step
            for step in usual(steps)
            if step.shape.heads == name
            and batch in (None, step.shape.batch)
            and seq_len in (None, step.shape.seq_len)
        ]
        if len({step.shape for step in chosen}) > 1:
            found.append((name, chosen))
    return found


def table_steps(steps: list[Step], captured: bool = False) -> dict[Shape, dict[str, Step]]:
    """Returns the steps of the main table's shapes, by shape and setting."""
    found: dict[Shape, dict[str, Step]] = {}
    for shape in TABLE:
        chosen = {step.config: step for step in usual(steps, captured) if step.shape == shape}
        if chosen:
            found[shape] = chosen
    return found
