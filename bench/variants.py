"""Unusual settings of the decoding step, each against what its bytes predict from a usual one."""

from collections.abc import Iterable

from rich.progress import Progress

from .cases import Case
from .decode import COLUMNS as DECODE_COLUMNS
from .decode import SHOWN as DECODE_SHOWN
from .decode import step_row
from .grids import Variant
from .report import Report, Row
from .run import Run

RATIOS = ("ratio", "score_select_ratio", "gather_attention_ratio")
TITLE = "Unusual settings"
COLUMNS = ("variant", "expected_us", *RATIOS, *DECODE_COLUMNS)
SHOWN = {
    "variant": "variant",
    "expected_us": "expected us",
    "ratio": "ratio",
    "score_select_ratio": "of score, select",
    "gather_attention_ratio": "of gather",
    **DECODE_SHOWN,
}


def bench(run: Run, report: Report, progress: Progress) -> None:
    """Adds one row per reference case and one per variant, shape by shape."""
    cases = list(dict.fromkeys(in_order(run.plan.variants)))
    expectations = {variant.case: variant for variant in run.plan.variants}
    rows: dict[Case, Row] = {}
    task = progress.add_task("variants", total=len(cases))
    kv = None
    for case in cases:
        progress.update(task, description=f"variants: {case}", advance=1)
        with run.case(case):
            if kv is None or kv.shape != case.shape:
                kv = None  # frees the last one first
                kv = run.kv_pool(case.shape)
            rows[case] = step_row(run, kv, case)
            variant = expectations.get(case)
            against = rows.get(variant.reference) if variant else None
            if variant and against:
                rows[case] |= ratios(rows[case], against, variant)
            report.add({"variant": variant.name if variant else "reference"} | rows[case])
    progress.remove_task(task)


def in_order(variants: Iterable[Variant]) -> list[Case]:
    """Returns every reference before its variants, cases of one shape together."""
    cases = [v.reference for v in variants] + [v.case for v in variants]
    shapes = list(dict.fromkeys(case.shape for case in cases))
    return sorted(cases, key=lambda case: shapes.index(case.shape))


def ratios(row: Row, reference: Row, variant: Variant) -> Row:
    """Returns the time that the bytes predict, and measured times over predicted ones.

    A step is expected to take the reference's time times the ratio of the bytes that they must
    read; its scan and its gather are, each by its own bytes.
    """
    case, other = variant.case, variant.reference
    expected = reference["hata_us"] * case.num_bytes / other.num_bytes
    result: Row = {"expected_us": expected, "ratio": row["hata_us"] / expected}
    for part, size, other_size in (
        ("score_select", case.code_bytes, other.code_bytes),
        ("gather_attention", case.row_bytes, other.row_bytes),
    ):
        predicted = reference[f"{part}_us"] * size / other_size
        result[f"{part}_ratio"] = row[f"{part}_us"] / predicted
    return result
