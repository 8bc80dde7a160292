"""``hata capture`` and ``hata corpus``."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from hata.commands import need
from hata.commands.options import with_options
from hata.device import ModelOptions, torch_device, torch_dtype
from hata.outputs import make_output_folder
from hata.progress import progress_bar
from hata.training.options import CaptureOptions


def corpus(
    folder: Annotated[Path, Argument(help="Where to write; empty or new.")],
) -> None:
    """Fetches a corpus from Debian packages: train/, heldout/ and SOURCES.txt with licences."""
    from hata.training.corpus import build_corpus

    sizes = build_corpus(folder)
    said = ", ".join(
        f"{count / 1e6:.1f} million characters in {split}/" for split, count in sizes.items()
    )
    Console(highlight=False).print(f"{folder}: {said}")


@with_options()
def capture(
    texts: Annotated[list[Path], Argument(help="Text files, or folders of them.")],
    out: Annotated[Path, Option(help="Folder to write, or to continue.")],
    run_on: ModelOptions,
    options: CaptureOptions,
) -> None:
    """Runs a model over text and writes its queries and keys, to train hash weights on."""
    need("capture", "transformers")
    make_output_folder(out, "capture", "--out")
    capture_to(out, texts, run_on, options)


def capture_to(
    folder: Path, texts: list[Path], run_on: ModelOptions, options: CaptureOptions
) -> None:
    """Loads a model and captures with a progress bar."""
    from transformers.utils import logging as transformers_logging

    from hata.demo.model import bundled_model, check_model_folder, load_model
    from hata.integrations.model_shape import full_attention_layers
    from hata.training.record import capture
    from hata.training.texts import text_files

    device = torch_device(run_on.device, "capture")
    dtype = torch_dtype(run_on.dtype, device, "capture")
    text_files(texts)  # before a model is loaded
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model_folder = run_on.model or bundled_model()
    check_model_folder(model_folder, 0)
    model, tokenizer = load_model(model_folder, device, dtype)
    total = options.num_sequences * len(full_attention_layers(model))
    with progress_bar("capturing layers", total) as on_layer:
        found = capture(
            model, tokenizer, texts, folder, options, name=model_folder.name, on_layer=on_layer
        )
    info = found.info
    of_all = "" if info.num_layers == len(info.layer_types) else f" of {len(info.layer_types)}"
    Console(highlight=False).print(
        f"{folder}: {info.num_sequences} sequences of {info.seq_len} tokens, "
        f"{info.num_queries} queries each, {info.num_layers}{of_all} layers, {info.dtype}"
    )
