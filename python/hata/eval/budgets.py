"""Budgets of each layer's own: a file of them, read or chosen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hata.checks import check
from hata.config import HataConfig
from hata.eval.allocation import layer_losses
from hata.eval.decode import SparseDecoder
from hata.eval.options import EvalOptions
from hata.eval.prose import WHERE
from hata.eval.setting import Setting
from hata.eval.tasks import Sample
from hata.integrations.model_shape import ModelShape
from hata.outputs import whole_file
from hata.progress import progress_bar
from hata.selectors import HataSelector
from hata.selectors.selector import CACHE_ITEMSIZE
from hata.training.texts import text_files, token_sequences

_OPTION = "--layer-budgets"


@dataclass(frozen=True)
class BudgetFile:
    """Levels as ``hata recall --frontier`` writes them: one budget for all layers, and shared out.

    Attributes:
        name: Of the file.
        num_dense_layers: The model's leading layers that stay dense with them.
        levels: ``top_k`` of each of the model's layers, by the one ``top_k`` that costs as much.
    """

    name: str
    num_dense_layers: int
    levels: dict[int, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path, options: EvalOptions) -> "BudgetFile":
        """Reads a file.

        Raises:
            ValueError: It is no such file, its codes differ in their number of bits, or its number
                of dense layers is not asked for.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(level["uniform"], level["per_layer"]) for level in found["levels"]]
            bits = {n for alike, own in pairs for n in (alike["num_bits"], *own["num_bits"])}
            levels = {alike["top_k"]: tuple(own["top_k"]) for alike, own in pairs}
            num_dense = found["num_dense_layers"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            rule = f"be of hata recall --frontier or of --choose-on, got {path}: {error}"
            raise ValueError(f"hata.{WHERE}: {_OPTION} must {rule}") from error
        rule = "name files of one number of bits"
        check(len(bits) == 1, WHERE, _OPTION, rule, f"{path} with {sorted(bits)}")
        asked = options.num_dense_layers
        rule = f"include {num_dense}, as {path} has it"
        check(num_dense in asked, WHERE, "--num-dense-layers", rule, asked)
        return cls(path.name, num_dense, levels)

    def top_k(self, top_k: int, num_layers: int, options: EvalOptions) -> tuple[int, ...]:
        """Returns ``top_k`` of each layer.

        Args:
            top_k: What all layers have at the level.
            num_layers: Layers of the model.
            options: What every budget includes.

        Raises:
            ValueError: There is no such level, or it is another model's.
        """
        known = ", ".join(map(str, self.levels))
        rule = f"be one of {known} with {_OPTION} {self.name}"
        check(top_k in self.levels, WHERE, "--top-k", rule, top_k)
        own, always = self.levels[top_k], (options.num_sink, options.num_recent)
        HataConfig(own, num_sink=always[0], num_recent=always[1]).layer_top_k(num_layers)  # checks
        return own


def choose_budgets(
    path: Path,
    options: EvalOptions,
    decoder: SparseDecoder,
    tokenizer: Any,
    selector: HataSelector,
    shape: ModelShape,
    layers: tuple[int, ...],
    where_from: Mapping[str, str],
) -> None:
    """Shares the budgets that are asked for out among the layers, and writes the file.

    Args:
        path: The file.
        options: The budgets, the texts to choose on and how.
        decoder: Has the model.
        tokenizer: The model's.
        selector: Whose selections the layers attend to.
        shape: The model's.
        layers: The model's layers that attend to the whole context.
        where_from: The model's name, and what `hata.provenance.origin` says.

    Raises:
        ValueError: The texts hold too little, or the file cannot be written.
    """
    (context,), (num_dense,) = options.context, options.num_dense_layers
    levels, num_decoded = options.budgets(context), options.num_decoded
    texts = token_sequences(
        tokenizer,
        text_files(options.choose_on),
        num_sequences=options.num_samples,
        seq_len=context,
        seed=options.seed,
    )
    samples = [Sample(x.token_ids[:-num_decoded], x.token_ids[-num_decoded:], ()) for x in texts]
    sparse = [layer for layer in layers if layer >= num_dense]
    always, most = options.num_sink + options.num_recent, context - num_decoded
    rule = f"be at most half of the prompt, {most // 2}, with --choose-on"
    check(levels[-1] <= most // 2, WHERE, "--top-k", rule, levels[-1])
    around = sorted({x for k in levels for x in (k // 2, k, 2 * k) if x >= max(1, always)})
    total = len(samples) * len(sparse) * len(around)
    with progress_bar("choosing budgets", total) as on_decoded:
        of_selector = Setting(selector, 0, 0, options.num_sink, options.num_recent)
        losses = layer_losses(decoder, samples, of_selector, sparse, around, on_decoded)
    scan = context * selector.bytes_per_token(shape["head_dim"])
    found = []
    for top_k in levels:
        own = dict(zip(sparse, losses.near(top_k).share_out(top_k, always), strict=True))
        of_all = [own.get(layer, top_k) for layer in range(shape["num_layers"])]
        bits = selector.num_bits
        found.append(
            {
                "bytes_per_step": scan + top_k * 2 * CACHE_ITEMSIZE * shape["head_dim"],
                "uniform": {"num_bits": bits, "top_k": top_k},
                "per_layer": {"num_bits": [bits] * len(of_all), "top_k": of_all},
            }
        )
    heading = {**where_from, "context": context, "num_dense_layers": num_dense}
    measured = {"layers": sparse, "top_k": around, "kl": losses.kl.tolist()}
    heading |= {"texts": [x.text for x in texts], "num_decoded": num_decoded, "alone": measured}
    with whole_file(path, WHERE) as partial:
        partial.write_text(json.dumps({**heading, "levels": found}) + "\n", encoding="utf-8")
