"""The committed results as Markdown tables for the documentation: ``python -m bench tables``."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import CONFIGS, tokens
from .grids import FEW_HEADS, LAYOUTS
from .records import Step, by_heads, load_steps, read, table_steps, usual

NAMES = [config.name for config in CONFIGS]
AS_THEY_ARE = {  # title: the file's name, its columns
    "Variants": (
        "variants",
        "variant num_bits hata_us expected_us ratio score_select_ratio gather_attention_ratio",
    ),
    "Answers in vLLM": (
        "vllm_quality",
        "context top_k tokens_equal first_difference found found_stock logprob_difference stderr",
    ),
    "Serving in vLLM": (
        "vllm_arrivals",
        "documents rate backend tokens_per_s tpot_p50_ms tpot_p99_ms ttft_p50_s",
    ),
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Returns three digits: 9.87, 98.7, 987."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def step_table(steps: list[Step], captured: bool) -> str:
    """Times and speedups of the main table's shapes."""
    header = ["batch", "heads/kv", "seq_len", "dense"]
    header += [column for name in NAMES for column in (name, "")]
    rows = []
    for shape, chosen in table_steps(steps, captured).items():
        first = next(iter(chosen.values()))
        dense = number(first.best_dense) if first.best_dense else ""
        row = [str(shape.batch), shape.heads, tokens(shape.seq_len), dense]
        for name in NAMES:
            step = chosen.get(name)
            speedup = f"{step.speedup:.1f}x" if step and step.speedup else ""
            row += [number(step.us) if step else "", speedup]
        rows.append(row)
    return markdown(header, rows)


def crossover_table(steps: list[Step]) -> str:
    """The shortest length from which on every measured length is faster than dense."""
    rows = []
    for batch in sorted({step.shape.batch for step in usual(steps)}):
        for heads, chosen in by_heads(steps, batch=batch, layouts=(*FEW_HEADS, *LAYOUTS)):
            cells = [crossover(s for s in chosen if s.config == name) for name in NAMES]
            rows.append([str(batch), heads, *cells])
    return markdown(["batch", "heads/kv", *NAMES], rows)


def crossover(steps: Iterable[Step]) -> str:
    """Returns "8K"; "up to 512" if no shorter length was slower; "" if none is faster."""
    by_length = sorted(steps, key=lambda step: step.shape.seq_len)
    slower = [i for i, step in enumerate(by_length) if (step.speedup or 0) <= 1]
    first = slower[-1] + 1 if slower else 0
    if first == len(by_length):
        return ""
    length = tokens(by_length[first].shape.seq_len)
    return length if slower else f"{length} or less"


def columns_table(path: Path, columns: Sequence[str]) -> str:
    """Some columns of a file as they are."""
    return markdown(columns, [[row[name] for name in columns] for row in read(path)])


def all_tables(results: Path, device: str) -> str:
    """Returns every table that the rows of a device suffice for, with titles."""
    steps = load_steps(results / f"decode_{device}.csv")
    parts = [("A step in microseconds", step_table(steps, captured=False))]
    if any(step.captured for step in steps):
        parts.append(("The same with captured inputs", step_table(steps, captured=True)))
    parts.append(("Faster than dense from", crossover_table(steps)))
    for title, (name, columns) in AS_THEY_ARE.items():
        path = results / f"{name}_{device}.csv"
        if path.is_file():
            parts.append((title, columns_table(path, columns.split())))
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)
