"""What ``hata eval`` prints, and its report in Markdown."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hata.eval.prose import WHERE
from hata.eval.rows import Row
from hata.eval.tasks import LIKELIHOOD, chance
from hata.outputs import whole_file

# A task counts where dense attention scores this much above chance, and two standard errors.
LEAST_ABOVE_CHANCE = 0.3

_HEADINGS = ("method", "top_k", "dense layers", "bytes read", "excess NLL", "KL")


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Returns the rows that have these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[str, ...]]:
    """Returns the combinations of values in these columns, in order of appearance."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def label(row: Row) -> str:
    """Names a row's method and its settings but for the budget."""
    words = [row["recipe"]]
    codes = row["num_bits"] and row["method"] in ("hata", "vattention")
    words += [f"{row['num_bits']} bits"] if codes else []
    words += [f"query {row['query_bits']}"] if row["query_bits"] else []
    words += ["norms"] if row["key_norms"] == "1" else []
    words += [f"{row['channels']} channels"] if row["channels"] else []
    shared = row["share_layers"]
    words += [f"{shared} layers share"] if shared not in ("", "1") and "," not in shared else []
    words += [f"layers {shared} select"] if "," in shared else []
    words += [f"{row['leading_top_k']} in the first layers"] if row["leading_top_k"] else []
    words += [f"layers as in {row['layer_budgets']}"] if row["layer_budgets"] else []
    words += [f"completed: {row['completion']}"] if row["completion"] else []
    said = ", ".join(word for word in words if word)
    return f"{row['method']}: {said}" if said else row["method"]


def mean_score(rows: Sequence[Row]) -> tuple[float, float | None]:
    """The mean score over depths, and its standard error where the rows have one."""
    mean = sum(float(row["score"]) for row in rows) / len(rows)
    if not all(row["stderr"] for row in rows):
        return mean, None
    return mean, math.sqrt(sum(float(row["stderr"]) ** 2 for row in rows)) / len(rows)


def counts(task: str, dense: Sequence[Row]) -> bool:
    """Whether dense attention's rows of a task are well above chance, and beyond their error."""
    mean, error = mean_score(dense)
    above = mean - chance(task)
    return above >= LEAST_ABOVE_CHANCE and above > 2 * (error or 0.0)


def score(rows: Sequence[Row]) -> str:
    """The mean score over depths, with its standard error where there is one."""
    mean, error = mean_score(rows)
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def print_means(console: Console, rows: Sequence[Row]) -> None:
    """Prints the same tables as the report has."""
    if not console.is_terminal:
        console.width = 200
    for where in _runs(rows):
        for title, headings, lines in _tables(select(rows, **where)):
            table = Table(title=f"{where['model']}: {title}", box=SIMPLE_HEAD)
            for heading in headings:
                table.add_column(heading, justify="left" if heading == "method" else "right")
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for said in left_out(select(rows, **where)):
            console.print(said)


def write_report(folder: Path, rows: Sequence[Row]) -> None:
    """Writes report.md and the pictures that it shows.

    Args:
        folder: An existing folder.
        rows: Rows of a CSV file.

    Raises:
        ValueError: They cannot be written.
    """
    from hata.eval import plots  # matplotlib is an extra

    text: list[str] = []
    for number, where in enumerate(_runs(rows)):
        of_run = select(rows, **where)
        made = "; ".join(
            f"{gpu}, torch {torch}, commit {commit}"
            for gpu, torch, commit in distinct(of_run, "gpu", "torch", "commit")
        )
        text += [f"# {where['model']}: what sparse decoding costs", ""]
        samples = f"{where['num_samples']} samples of each task, context and depth"
        text += [f"Text: {where['texts']}. {samples}. {where['dtype']}; {made}.", ""]
        text += [f"{_SAID}", ""]
        for title, headings, lines in _tables(of_run):
            text += [f"## {title}", "", _line(headings)]
            text += [_line("---" for _ in headings), *map(_line, lines), ""]
        text += [f"Left out: {said}" for said in left_out(of_run)]
        text += ["", *map(_picture, plots.plot_run(folder, number, of_run)), ""]
    text += [*map(_picture, plots.plot_needles(folder, rows)), ""]
    with whole_file(folder / "report.md", WHERE) as partial:
        partial.write_text("\n".join(text), encoding="utf-8")


_SAID = (
    "Prompts are dense, answers are decoded sparsely. `bytes read` are those of a step, for each "
    "cached position and KV head: what choosing reads, and the selected keys and values. ± is a "
    "standard error over samples; of a score it is that of the difference to dense attention on "
    "the same samples, and in the line `dense` that of dense attention itself."
)


def left_out(rows: Sequence[Row]) -> list[str]:
    """Says which tasks do not count, and why."""
    said = []
    for task, context in distinct(rows, "task", "context"):
        if task == LIKELIHOOD:
            continue
        dense = select(rows, task=task, context=context, method="dense")
        if not counts(task, dense):
            said.append(
                f"{task} at {context} tokens, where dense attention scores {score(dense)} and a "
                f"guess {chance(task):.2f}"
            )
    return said


def _runs(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The models, texts and samples of a file, which stand in tables of their own."""
    names = ("model", "dtype", "texts", "num_sink", "num_recent", "num_samples", "seed")
    return [dict(zip(names, x, strict=True)) for x in distinct(rows, *names)]


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and lines of each table: two or three for each context."""
    tables = []
    for (context,) in distinct(rows, "context"):
        of_context = select(rows, context=context)
        plain = [row for row in select(of_context, task=LIKELIHOOD) if row["method"] != "dense"]
        for (num_decoded,) in distinct(plain, "num_decoded"):
            lines = [
                [*_setting(row), _with_error(row, "nll"), _with_error(row, "kl")]
                for row in select(plain, num_decoded=num_decoded)
            ]
            title = f"Likelihood of the last {num_decoded} of {context} tokens"
            tables.append((title, list(_HEADINGS), lines))
            tables += _by_dense_layers(select(plain, num_decoded=num_decoded))
        tasks = [task for (task,) in distinct(of_context, "task") if task != LIKELIHOOD]
        shown = [x for x in tasks if counts(x, select(of_context, task=x, method="dense"))]
        if shown:
            answers = [row for row in of_context if row["task"] in shown]
            groups: dict[tuple[str, ...], list[Row]] = {}
            for row in answers:
                groups.setdefault(tuple(_setting(row)), []).append(row)
            lines = []
            for setting, group in groups.items():
                found = [select(group, task=task) for task in shown]
                lines.append([*setting, *(score(some) if some else "" for some in found)])
            headings = [*_HEADINGS[:4], *shown]
            tables.append((f"Share of right answers, {context} tokens", headings, lines))
    return tables


def _by_dense_layers(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table of what leading dense layers are worth, where rows differ in their number."""
    numbers = sorted({int(row["dense_layers"]) for row in rows})
    if len(numbers) < 2:
        return []
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        group = groups.setdefault((label(row), row["top_k"]), {})
        group[int(row["dense_layers"])] = _with_error(row, "kl")
    lines = [[*of, *(found.get(n, "") for n in numbers)] for of, found in groups.items()]
    headings = ["method", "top_k", *(f"{n} dense layers" for n in numbers)]
    decoded, context = rows[0]["num_decoded"], rows[0]["context"]
    title = f"KL by leading dense layers, last {decoded} of {context} tokens"
    return [(title, headings, lines)]


def _setting(row: Row) -> list[str]:
    return [label(row), row["top_k"], row["dense_layers"], f"{float(row['bytes_read']):.1f}"]


def _with_error(row: Row, name: str) -> str:
    value = float(row["nll_excess" if name == "nll" else name])
    error = row[f"{name}_stderr"]
    return f"{value:.4f} ± {float(error):.4f}" if error else f"{value:.4f}"


def _picture(path: Path) -> str:
    return f"![{path.stem}]({path.name})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
