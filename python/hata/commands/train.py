"""``hata train``."""

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from rich.console import Console
from typer import Argument, Option

from hata.checks import check
from hata.commands import need
from hata.commands.capture import capture_to
from hata.commands.options import with_options
from hata.config import HataConfig
from hata.device import ModelOptions, torch_device
from hata.outputs import make_output_folder, make_room_for
from hata.progress import progress_bar
from hata.training.options import CaptureOptions, RecipeOptions

if TYPE_CHECKING:
    from hata.training.source import Source

_WHERE = "train"
_DEFAULT = HataConfig()
_CAPTURED = CaptureOptions(num_sequences=16)
_CUDA_MEMORY_GB = 16.0  # a CPU trains one layer at a time: its numbers stay in the caches


@with_options(without=("values", "memory_limit_gb"))
def train(
    *,
    texts: Annotated[
        list[Path] | None,
        Argument(help="Text files or folders to capture first; none with --captures."),
    ] = None,
    out: Annotated[
        Path, Option(help="Safetensors file to write; a run that was killed continues.")
    ] = Path("hash_weights.safetensors"),
    chosen: RecipeOptions,
    captures: Annotated[
        Path | None,
        Option(help="Folder of captures; with TEXTS it is written, by default beside --out."),
    ] = None,
    heldout: Annotated[
        Path | None, Option(help="Folder of captures to evaluate on; by default the last sequence.")
    ] = None,
    synthetic: Annotated[
        str | None,
        Option(
            help="Random numbers instead, to measure time and memory: "
            "layers x heads x KV heads x head_dim, such as 32x32x8x128."
        ),
    ] = None,
    run_on: ModelOptions,
    captured: CaptureOptions = _CAPTURED,
    num_sink: Annotated[
        int, Option(help="First positions that are always selected.")
    ] = _DEFAULT.num_sink,
    num_recent: Annotated[
        int, Option(help="Last positions that are always selected.")
    ] = _DEFAULT.num_recent,
    memory_limit_gb: Annotated[
        float | None,
        Option(help="GB for the layers trained at once; by default one layer, on a GPU 16."),
    ] = None,
    plot: Annotated[
        Path | None, Option(help="PNG file with loss, mass and recall; by default --out's.")
    ] = None,
) -> None:
    """Learns hash weights for a model: captures its queries and keys, then trains on them."""
    need(_WHERE, "transformers", "matplotlib")
    from hata.training.report import plot_layers, print_layers
    from hata.training.source import captured_sources, random_source
    from hata.training.train import TrainOptions
    from hata.training.train import train as train_layers

    device = torch_device(run_on.device, _WHERE)
    if memory_limit_gb is None and device.type == "cuda":
        memory_limit_gb = _CUDA_MEMORY_GB
    check(not out.exists(), _WHERE, "--out", "not exist yet", out)
    recipe = chosen.make(captured.seed)
    picture = plot or out.with_suffix(".png")
    make_room_for(out, _WHERE, "--out")
    make_room_for(picture, _WHERE, "--plot")
    always = {"num_sink": num_sink, "num_recent": num_recent}
    metadata = {name: str(count) for name, count in always.items()}
    test: Source | None = None
    if synthetic is not None:
        source = random_source(synthetic, captured, **always)
    else:
        folder = captures or out.with_name(out.name + ".captures")
        if texts:
            make_output_folder(folder, _WHERE, "--captures")
            capture_to(folder, texts, run_on, captured)
        source, test = captured_sources(folder, heldout, **always)
        metadata |= {"trained_on": source.texts, "heldout": test.texts}
    metadata["model"] = source.captures.info.model

    seq_len = source.shape[4]
    rule = f"be at most {seq_len // 64}, the smallest budget of {seq_len} tokens"
    fits = test is None or num_sink + num_recent <= seq_len // 64
    check(fits, _WHERE, "--num-sink + --num-recent", rule, num_sink + num_recent)
    budgets = (seq_len // 64, seq_len // 32, seq_len // 16)
    options = TrainOptions(recipe, budgets, memory_limit_gb, device)
    start = time.perf_counter()
    with progress_bar("training", source.num_layers * max(recipe.num_steps, 1)) as on_step:
        parts = train_layers(source, test, out, options, metadata, on_step=on_step)
    seconds = time.perf_counter() - start
    console = Console(highlight=False)
    if test is not None:
        layers = source.captures.info.layers
        print_layers(console, parts, layers, budgets, _DEFAULT.num_dense_layers)
        plot_layers(picture, parts, layers, budgets, f"{metadata['model']}, recipe {recipe.name}")
        console.print(f"plot: {picture}")
    memory = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    console.print(
        f"{out}: {len(parts)} layers in {seconds:.1f} s, peak memory {memory / 1e9:.2f} GB"
    )
