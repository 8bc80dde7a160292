"""The rows of ``hata eval``: one CSV file, which a run continues."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hata.checks import check
from hata.eval.prose import WHERE
from hata.eval.tasks import Sample
from hata.outputs import CONTINUE, whole_file
from hata.recall.report import cell

# What a row is of: two rows that agree here would be the same measurement.
KEY = (
    *("model", "dtype", "texts", "task", "context", "depth", "method", "recipe", "num_bits"),
    *("query_bits", "key_norms", "channels", "top_k", "dense_layers", "share_layers"),
    *("leading_top_k", "layer_budgets", "completion"),
    *("num_sink", "num_recent", "num_decoded", "num_samples", "seed"),
)
_FOUND = (
    *("bytes_per_token", "bytes_read", "score", "stderr", "dense_score"),
    *("nll_excess", "nll_stderr", "kl", "kl_stderr"),
)
_ADDED = ("layer_budgets",)  # what older files do not have, and nothing of theirs had
COLUMNS = ("gpu", "torch", "commit", "date", *KEY, *_FOUND, "command")

Row = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What one sample gave.

    Attributes:
        score: Share of its values of which each token is the model's first choice after the right
            ones before it; None in plain text.
        dense_score: The same of dense attention.
        nll_excess: Negative log likelihood of a token beyond dense attention's, in nats; mean over
            the tokens of the values, or over all but the first token of plain text.
        kl: KL(dense || sparse) of what follows, in nats; mean over the same tokens.
    """

    score: float | None
    dense_score: float | None
    nll_excess: float
    kl: float


def compare(sample: Sample, dense: Tensor, sparse: Tensor) -> Outcome:
    """Compares two ways to decode a sample.

    Args:
        sample: The sample.
        dense: ``[num_decoded - 1, vocabulary]``: log probabilities of what follows each of its
            decoded tokens but the last, with dense attention.
        sparse: The same of what is compared with it.
    """
    tokens = dense.new_tensor(sample.decoded_ids[1:]).long()
    nll_excess = (dense - sparse).gather(1, tokens[:, None])[:, 0]
    kl = (dense.exp() * (dense - sparse)).sum(1)
    if not sample.answers:
        return Outcome(None, None, float(nll_excess.mean()), float(kl.mean()))
    counted = [i - 1 for answer in sample.answers for i in answer]

    def score(found: Tensor) -> float:
        right = (found.argmax(1) == tokens).tolist()
        return statistics.fmean(all(right[i - 1] for i in x) for x in sample.answers)

    nll_excess, kl = nll_excess[counted], kl[counted]
    return Outcome(score(sparse), score(dense), float(nll_excess.mean()), float(kl.mean()))


def summary(outcomes: Sequence[Outcome], dense: bool) -> dict[str, object]:
    """Returns the means over samples and their standard errors, as columns.

    ``stderr`` is that of the difference to dense attention on the same samples, and for dense
    attention itself that of its score.
    """
    nll, nll_stderr = _mean([x.nll_excess for x in outcomes])
    kl, kl_stderr = _mean([x.kl for x in outcomes])
    found: dict[str, object] = {"nll_excess": nll, "nll_stderr": nll_stderr}
    found |= {"kl": kl, "kl_stderr": kl_stderr}
    pairs = [
        (x.score, x.dense_score)
        for x in outcomes
        if x.score is not None and x.dense_score is not None
    ]
    if pairs:
        found["score"], own = _mean([score for score, _ in pairs])
        found["dense_score"], _ = _mean([score for _, score in pairs])
        found["stderr"] = own if dense else _mean([score - base for score, base in pairs])[1]
    return found


def _mean(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


class Rows:
    """The rows of a CSV file, which is written anew, as a whole, whenever some are added.

    Args:
        path: The file, in an existing folder; it may not exist yet.

    Raises:
        ValueError: It has other columns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.rows = [{**dict.fromkeys(_ADDED, ""), **row} for row in reader]
                got = tuple(reader.fieldnames or ())
            known = got in (COLUMNS, tuple(name for name in COLUMNS if name not in _ADDED))
            rule = f"be a file of hata eval, with the columns {','.join(COLUMNS)}"
            check(known, WHERE, "--csv", rule, f"{path} with {','.join(got)}")

    def has(self, row: dict[str, object]) -> bool:
        """Whether a row with this one's `KEY` stands there."""
        key = _key(_cells(row))
        return any(_key(other) == key for other in self.rows)

    def add(self, rows: Iterable[dict[str, object]]) -> None:
        """Adds rows and writes the file.

        Raises:
            ValueError: It cannot be written.
        """
        self.rows += map(_cells, rows)
        with (
            whole_file(self._path, WHERE, CONTINUE) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _cells(row: dict[str, object]) -> Row:
    values = {name: cell(row.get(name)) for name in COLUMNS}
    return {name: "" if value is None else str(value) for name, value in values.items()}
