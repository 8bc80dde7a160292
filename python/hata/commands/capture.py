"""``hata capture`` and ``hata corpus``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hata.commands.extras import need
from hata.device import torch_device, torch_dtype
from hata.progress import terminal_progress

if TYPE_CHECKING:
    from hata.training.record import CaptureOptions

Texts = Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")]
Model = Annotated[
    Path | None, typer.Option(help="Local transformers folder; by default SmolLM2-135M-Instruct.")
]
NumSequences = Annotated[int, typer.Option(help="Sequences, each from other documents.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of each sequence.")]
NumQueries = Annotated[int, typer.Option(help="Query positions sampled from each sequence.")]
FirstQuery = Annotated[
    float, typer.Option(help="First position that may be sampled, as a share of --seq-len.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="GB for model, cache and activations; long sequences then run in chunks."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="The model's dtype; by default float32, on a GPU bfloat16."),
]


def corpus(
    folder: Annotated[Path, typer.Argument(help="Where to write; empty or new.")],
) -> None:
    """Fetches a corpus from Debian packages: train/, heldout/ and SOURCES.txt with licences."""
    from hata.training.corpus import build_corpus

    sizes = build_corpus(folder)
    said = ", ".join(
        f"{count / 1e6:.1f} million characters in {split}/" for split, count in sizes.items()
    )
    Console(highlight=False).print(f"{folder}: {said}")


def capture(
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder to write, or to continue.")],
    model: Model = None,
    num_sequences: NumSequences = 8,
    seq_len: SeqLen = 8192,
    num_queries: NumQueries = 384,
    first_query: FirstQuery = 0.0625,
    values: Annotated[bool, typer.Option(help="Capture values too, for hata recall.")] = False,
    seed: Seed = 0,
    memory_limit_gb: MemoryLimit = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Runs a model over text and writes its queries and keys, to train hash weights on."""
    need("capture", "transformers")
    from hata.training.record import CaptureOptions

    options = CaptureOptions(
        num_sequences=num_sequences,
        seq_len=seq_len,
        num_queries=num_queries,
        first_query=first_query,
        values=values,
        seed=seed,
        memory_limit_gb=memory_limit_gb,
    )
    capture_to(out, texts, model, options, device, dtype)


def capture_to(
    folder: Path,
    texts: list[Path],
    model: Path | None,
    options: "CaptureOptions",
    device: str | None,
    dtype: str | None,
) -> None:
    """Loads a model and captures with a progress bar."""
    from transformers.utils import logging as transformers_logging

    from hata.demo.model import bundled_model, check_model_folder, load_model
    from hata.training.record import capture
    from hata.training.texts import text_files

    where = torch_device(device, "capture")
    kind = torch_dtype(dtype, where, "capture")
    text_files(texts, "capture")  # before a model is loaded
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model_folder = model or bundled_model()
    check_model_folder(model_folder, 0)
    with terminal_progress() as progress:
        loaded, tokenizer = load_model(model_folder, where, kind)
        total = options.num_sequences * loaded.config.num_hidden_layers
        task = progress.add_task("capturing layers", total=total)
        found = capture(
            loaded,
            tokenizer,
            texts,
            folder,
            options,
            name=model_folder.name,
            on_layer=lambda: progress.advance(task),
        )
    info = found.info
    Console(highlight=False).print(
        f"{folder}: {info.num_sequences} sequences of {info.seq_len} tokens, "
        f"{info.num_queries} queries each, {info.num_layers} layers, {info.dtype}"
    )
