"""``hata train``."""

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from hata.checks import check
from hata.commands import capture as capturing
from hata.commands.extras import need
from hata.config import HataConfig
from hata.device import torch_device
from hata.outputs import make_room_for
from hata.progress import terminal_progress

if TYPE_CHECKING:
    from hata.training.recipes import Recipe
    from hata.training.source import Source

_WHERE = "train"
_DEFAULTS = HataConfig()
_CUDA_MEMORY_GB = 16.0  # a CPU trains one layer at a time: its numbers stay in the caches


def train(
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files or folders to capture first; none with --captures."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Safetensors file to write; a run that was killed continues.")
    ] = Path("hash_weights.safetensors"),
    recipe: Annotated[str, typer.Option(help="hata, paper, pca-itq or random.")] = "hata",
    num_bits: Annotated[
        int | None, typer.Option(help="Bits of a key's code; by default the recipe's.")
    ] = None,
    query_bits: Annotated[
        int | None, typer.Option(help="Bits of a query's projection; by default the recipe's.")
    ] = None,
    key_norms: Annotated[
        bool | None, typer.Option(help="Scale scores by key norms; by default as the recipe does.")
    ] = None,
    num_steps: Annotated[int | None, typer.Option(help="Steps of recipe hata.")] = None,
    num_keys: Annotated[int | None, typer.Option(help="Keys of a step of recipe hata.")] = None,
    captures: Annotated[
        Path | None,
        typer.Option(help="Folder of captures; with TEXTS it is written, by default beside --out."),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Folder of captures to evaluate on; by default the last sequence."),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            help="Random numbers instead, to measure time and memory: "
            "layers x heads x KV heads x head_dim, such as 32x32x8x128."
        ),
    ] = None,
    model: capturing.Model = None,
    num_sequences: capturing.NumSequences = 16,
    seq_len: capturing.SeqLen = 8192,
    num_queries: capturing.NumQueries = 384,
    first_query: capturing.FirstQuery = 0.0625,
    seed: capturing.Seed = 0,
    num_sink: Annotated[
        int, typer.Option(help="First positions that are always selected.")
    ] = _DEFAULTS.num_sink,
    num_recent: Annotated[
        int, typer.Option(help="Last positions that are always selected.")
    ] = _DEFAULTS.num_recent,
    memory_limit_gb: Annotated[
        float | None,
        typer.Option(help="GB for the layers trained at once; by default one layer, on a GPU 16."),
    ] = None,
    device: capturing.Device = None,
    dtype: capturing.Dtype = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file with loss, mass and recall; by default --out's.")
    ] = None,
) -> None:
    """Learns hash weights for a model: captures its queries and keys, then trains on them."""
    need(_WHERE, "transformers", "matplotlib")
    from hata.training.record import CaptureOptions
    from hata.training.report import plot_layers, print_layers
    from hata.training.source_options import captured_sources, synthetic_source
    from hata.training.train import TrainOptions
    from hata.training.train import train as train_layers

    where = torch_device(device, _WHERE)
    if memory_limit_gb is None and where.type == "cuda":
        memory_limit_gb = _CUDA_MEMORY_GB
    check(not out.exists(), _WHERE, "--out", "not exist yet", out)
    chosen = _recipe(
        recipe,
        num_bits=num_bits,
        query_bits=query_bits,
        key_norms=key_norms,
        num_steps=num_steps,
        num_keys=num_keys,
        seed=seed,
    )
    picture = plot or out.with_suffix(".png")
    make_room_for(out, _WHERE, "--out")
    make_room_for(picture, _WHERE, "--plot")
    always = {"num_sink": num_sink, "num_recent": num_recent}
    metadata = {name: str(count) for name, count in always.items()}
    source: Source
    test: Source | None = None
    if synthetic is not None:
        source = synthetic_source(
            synthetic,
            num_sequences=num_sequences,
            seq_len=seq_len,
            num_queries=num_queries,
            **always,
        )
        metadata["model"] = f"random numbers, {synthetic}"
    else:
        folder = captures or out.with_name(out.name + ".captures")
        if texts:
            options = CaptureOptions(
                num_sequences=num_sequences,
                seq_len=seq_len,
                num_queries=num_queries,
                first_query=first_query,
                seed=seed,
            )
            capturing.capture_to(folder, texts, model, options, device, dtype)
        source, test, described = captured_sources(folder, heldout, **always)
        metadata |= described

    seq_len = source.shape[4]
    rule = f"be at most {seq_len // 64}, the smallest budget of {seq_len} tokens"
    fits = test is None or num_sink + num_recent <= seq_len // 64
    check(fits, _WHERE, "--num-sink + --num-recent", rule, num_sink + num_recent)
    options_ = TrainOptions(
        chosen,
        budgets=(seq_len // 64, seq_len // 32, seq_len // 16),
        memory_limit_gb=memory_limit_gb,
        device=where,
    )
    start = time.perf_counter()
    with _bar(source.num_layers * max(chosen.num_steps, 1)) as advance:
        parts = train_layers(source, test, out, options_, metadata, on_step=advance)
    seconds = time.perf_counter() - start
    console = Console(highlight=False)
    if test is not None:
        print_layers(console, parts, options_.budgets, _DEFAULTS.num_dense_layers)
        plot_layers(picture, parts, options_.budgets, f"{metadata['model']}, recipe {recipe}")
        console.print(f"plot: {picture}")
    memory = (
        torch.cuda.max_memory_allocated(where)
        if where.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    console.print(
        f"{out}: {len(parts)} layers in {seconds:.1f} s, peak memory {memory / 1e9:.2f} GB"
    )


def _recipe(name: str, **settings: Any) -> "Recipe":
    from hata.training.recipes import RECIPES

    check(name in RECIPES, _WHERE, "--recipe", f"be one of {', '.join(RECIPES)}", name)
    known = {field.name for field in dataclasses.fields(RECIPES[name])}
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        option = "--" + key.replace("_", "-")
        check(key in known, _WHERE, option, f"be left out for recipe {name}", given[key])
    return RECIPES[name](**given)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on the terminal and gives the function that advances it."""
    with terminal_progress() as progress:
        task = progress.add_task("training", total=total)
        yield lambda layers: progress.advance(task, layers)
