"""``hata eval`` from options to rows and a report."""

import itertools
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hata.checks import check
from hata.demo.model import bundled_model, check_model_folder, load_model
from hata.eval.budgets import BudgetFile, choose_budgets
from hata.eval.completion import COMPLETIONS
from hata.eval.datasets import Dataset, open_datasets
from hata.eval.decode import SparseDecoder
from hata.eval.options import NUM_LEADING, EvalOptions
from hata.eval.prose import WHERE, Prose
from hata.eval.report import print_means, write_report
from hata.eval.rows import Outcome, Row, Rows, compare, summary
from hata.eval.setting import DENSE, Setting
from hata.eval.tasks import AT_DEPTHS, LIKELIHOOD, Sample, likelihood_samples, task_sample
from hata.integrations.model_shape import ModelShape, full_attention_layers, model_shape
from hata.pretrained import find_pretrained
from hata.progress import progress_bar
from hata.provenance import origin
from hata.recall.lineup import SelectedLayers, baseline_selectors, trained_selectors
from hata.selectors import ExactSelector, HataSelector, Selector
from hata.selectors.selector import CACHE_ITEMSIZE
from hata.training.captures import Captures


@dataclass(frozen=True)
class Case:
    """What samples are of.

    Attributes:
        task: `LIKELIHOOD`, one of `TASKS` or a dataset's.
        context: Tokens of a sample; of a dataset's the most that there may be.
        depth: Of the single needle; None for other tasks.
        dataset: What its questions are of; None for `LIKELIHOOD` and `TASKS`.
    """

    task: str
    context: int
    depth: float | None = None
    dataset: Dataset | None = None


def run_eval(options: EvalOptions) -> list[Row]:
    """Measures, prints and writes what the options ask for.

    Args:
        options: What to do.

    Returns:
        All rows of the CSV file, those of earlier runs too.

    Raises:
        ValueError: An option does not fit the model or the texts, or a file is not what it should
            be.
    """
    prose, datasets = Prose.open(options.texts), open_datasets(options.dataset)
    chosen = [path for path in options.layer_budgets if options.choose_on and not path.exists()]
    files = [BudgetFile.open(x, options) for x in options.layer_budgets if x not in chosen]
    folder = options.model or bundled_model()
    check_model_folder(folder, max(options.context))
    options.make_folders()
    rows = Rows(options.csv)
    device = options.torch_device()
    model, tokenizer = load_model(folder, device, options.torch_dtype())
    shape = model_shape(model)
    layers = full_attention_layers(model)
    dense = max(options.num_dense_layers)
    rule = f"leave one of the layers that see the whole context, {list(layers)}"
    check(any(layer >= dense for layer in layers), WHERE, "--num-dense-layers", rule, dense)
    selectors = _selectors(options, folder, shape, layers)
    made = origin(device, shlex.join(["hata", *sys.argv[1:]]))
    of_model = {**made, "model": folder.name}
    decoder = SparseDecoder(model, observe=any(x.observes for x in selectors))
    for path in chosen:
        coded = [x for x in selectors if isinstance(x, HataSelector)]
        rule = "name hash weights, or the package have the model's, with --choose-on"
        check(len(coded) > 0, WHERE, "--weights", rule, "none")
        choose_budgets(path, options, decoder, tokenizer, coded[0], shape, layers, of_model)
        files.append(BudgetFile.open(path, options))
    common = {
        **of_model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "texts": prose.name,
        "num_sink": options.num_sink,
        "num_recent": options.num_recent,
        "num_samples": options.num_samples,
        "seed": options.seed,
    }
    work: list[tuple[list[Sample], list[tuple[dict[str, object], Setting]]]] = []
    for case in _cases(options, datasets):
        planned = _planned(case, options, files, selectors, shape, layers, common)
        missing = [(row, setting) for row, setting in planned if not rows.has(row)]
        if missing:
            work.append((_samples(case, options, tokenizer, prose), missing))

    total = sum(len(samples) * len(missing) for samples, missing in work)
    with progress_bar("decoding samples", total) as on_decoded:
        for samples, missing in work:
            outcomes = _measure(decoder, samples, missing, on_decoded)
            rows.add(
                row | summary(found, setting.selector is None)
                for (row, setting), found in zip(missing, outcomes, strict=True)
            )
    print_means(Console(highlight=False), rows.rows)
    if options.report is not None:
        write_report(options.report, rows.rows)
    return rows.rows


def _selectors(
    options: EvalOptions, folder: Path, shape: ModelShape, layers: tuple[int, ...]
) -> list[Selector]:
    """The selectors to compare; the package's weights for the model are among them if no others."""
    of = SelectedLayers(shape["num_layers"], layers, shape["num_kv_heads"], shape["head_dim"])
    calibration = None if options.calibration is None else Captures.open(options.calibration)
    learned = trained_selectors(of, options)
    own = find_pretrained(folder.name, **shape, layers=layers)
    if not options.weights and own is not None:
        learned.append(HataSelector(own.for_model(WHERE, **shape, layers=layers)))
    found: list[Selector] = [ExactSelector(), *learned]
    if options.baselines:
        found += baseline_selectors(of, calibration, options, options.torch_device(), learned)
    names = {selector.name for selector in found}
    for method in options.method:
        check(method in names, WHERE, "--method", f"be one of {', '.join(sorted(names))}", method)
    kept = [x for x in found if x.name in (options.method or names)]
    said = [(selector.name, *selector.settings.values()) for selector in kept]
    twice = next((x for x in said if said.count(x) > 1), None)
    rule = "differ in what a row says of them"
    check(twice is None, WHERE, "--weights and --random-bits", rule, twice)
    return kept


def _cases(options: EvalOptions, datasets: list[Dataset]) -> Iterator[Case]:
    for context, task in itertools.product(options.context, dict.fromkeys(options.task)):
        if task == AT_DEPTHS:
            yield from (Case(task, context, depth) for depth in options.depth)
        else:
            yield Case(task, context)
    for context, dataset in itertools.product(options.context, datasets):
        yield Case(dataset.task, context, dataset=dataset)


def _planned(
    case: Case,
    options: EvalOptions,
    files: list[BudgetFile],
    selectors: list[Selector],
    shape: ModelShape,
    layers: tuple[int, ...],
    common: dict[str, Any],
) -> Iterator[tuple[dict[str, object], Setting]]:
    """Yields each setting of a case with what its row says before it is measured."""
    of_case = {**common, "task": case.task, "context": case.context, "depth": case.depth}
    if case.dataset is not None:
        of_case["texts"] = case.dataset.origin
    of_case["num_decoded"] = options.num_decoded if case.task == LIKELIHOOD else None
    selected = 2 * CACHE_ITEMSIZE * shape["head_dim"]  # bytes of a position's key and value
    dense = {"method": "dense", "bytes_per_token": 0.0, "bytes_read": float(selected)}
    yield {**of_case, **dense}, DENSE
    always = (options.num_sink, options.num_recent)
    for selector, (said, top_k), (written, share), completion in itertools.product(
        selectors,
        list(_budgets(options, files, case.context, layers, shape["num_layers"])),
        options.share_selections().items(),
        [None, *dict.fromkeys(options.completion)],
    ):
        if completion is not None and (not isinstance(selector, HataSelector) or share != 1):
            continue
        setting = Setting(
            *(selector, top_k, said["dense_layers"], *always, share),
            completion=None if completion is None else COMPLETIONS[completion],
        )
        followed = setting.selecting(layers)
        selecting = len(set(followed.values())) / len(followed)  # share of the sparse layers
        mean_top_k = statistics.fmean(map(setting.budget, followed.values()))
        scan = selector.bytes_per_token(shape["head_dim"]) * selecting
        row = {
            **of_case,
            "method": selector.name,
            **selector.settings,
            **said,
            "share_layers": written,
            "completion": completion,
            "bytes_per_token": scan,
            "bytes_read": scan + selected * min(mean_top_k / case.context, 1.0),
        }
        yield row, setting


def _budgets(
    options: EvalOptions,
    files: list[BudgetFile],
    context: int,
    layers: tuple[int, ...],
    num_layers: int,
) -> Iterator[tuple[dict[str, Any], int | tuple[int, ...]]]:
    """Yields what rows say of each budget, and its positions: of all layers, or of each."""
    for top_k, num_dense in itertools.product(
        options.budgets(context), dict.fromkeys(options.num_dense_layers)
    ):
        said = {"top_k": top_k, "dense_layers": num_dense}
        yield said, top_k
        first = next(layer for layer in layers if layer >= num_dense)
        for leading in options.leading_budgets(context):
            if leading > top_k and first < NUM_LEADING:
                own = (leading,) * NUM_LEADING + (top_k,) * (num_layers - NUM_LEADING)
                yield {**said, "leading_top_k": leading}, own
        for file in files:
            if file.num_dense_layers == num_dense:
                own = file.top_k(top_k, num_layers, options)
                yield {**said, "layer_budgets": file.name}, own


def _samples(case: Case, options: EvalOptions, tokenizer: Any, prose: Prose) -> list[Sample]:
    task, context, number = case.task, case.context, options.num_samples
    if case.dataset is not None:
        return case.dataset.samples(tokenizer, number, context)
    if task == LIKELIHOOD:
        return likelihood_samples(tokenizer, prose, number, context, options.num_decoded)
    seeds = [(options.seed, task, context, case.depth, i) for i in range(number)]
    depth = case.depth or 0.0
    return [task_sample(tokenizer, prose, task, depth, context, seed) for seed in seeds]


def _measure(
    decoder: SparseDecoder,
    samples: list[Sample],
    missing: list[tuple[dict[str, object], Setting]],
    on_decoded: Callable[[], None],
) -> list[list[Outcome]]:
    """Returns, for each setting, the outcome of each sample."""
    outcomes: list[list[Outcome]] = [[] for _ in missing]
    for sample in samples:
        decoder.read(sample.prompt_ids)
        tokens = sample.decoded_ids[:-1]
        dense = decoder.decode(tokens).log_softmax(1)
        for (_, setting), found in zip(missing, outcomes, strict=True):
            sparse = dense
            if setting.selector is not None:
                sparse = decoder.decode(tokens, setting).log_softmax(1)
            found.append(compare(sample, dense, sparse))
            on_decoded()
    return outcomes
