"""Captures a layer's queries and keys of a real model, for `python -m bench decode --inputs`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import hata
from hata.checks import check, check_int
from hata.outputs import whole_file

NUM_BITS = 256  # of the hash weights; a case takes the first bits
NUM_QUERIES = 64  # the last positions of the text


def capture(path: Path, folder: Path | None, num_tokens: int, layer_idx: int) -> None:
    """Runs a model over prose and writes one layer's attention inputs, in float16.

    The text is Python's documentation, as in ``hata demo``. The hash weights are random orthogonal
    (``hata.HashWeights.random``).

    Args:
        path: The safetensors file to write: ``queries`` ``[64, num_heads, head_dim]`` of the last
            positions and ``keys`` ``[num_tokens, num_kv_heads, head_dim]``, both after the rotary
            embedding, and ``key_weights`` ``[num_kv_heads, head_dim, 256]``.
        folder: A transformers folder; None takes the demo's SmolLM2-135M-Instruct.
        num_tokens: Length of the text.
        layer_idx: Which layer.

    Raises:
        ValueError: An argument is out of range, or no model is there.
    """
    from hata.demo.model import bundled_model, check_model_folder, load_model
    from hata.demo.prompt import build_prompt

    check_int("bench", "--tokens", num_tokens, NUM_QUERIES)
    folder = folder or bundled_model()
    check_model_folder(folder, num_tokens)
    model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32)
    num_layers = model.config.num_hidden_layers
    check(0 <= layer_idx < num_layers, "bench", "--layer", f"be in 0..{num_layers - 1}", layer_idx)
    token_ids = build_prompt(tokenizer, num_tokens, depth=0.5, seed=0).token_ids
    q, k = attention_inputs(model, token_ids, layer_idx)
    _, num_kv_heads, head_dim = k.shape
    weights = hata.HashWeights.random(
        num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim, num_bits=NUM_BITS
    )
    tensors = {"queries": q, "keys": k, "key_weights": weights.key_weights[0]}
    metadata = {"model": folder.name, "layer": str(layer_idx), "text": "pydoc_data.topics"}
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    with whole_file(path, "bench") as partial:
        save_file(halves, partial, metadata)


def attention_inputs(model: Any, token_ids: list[int], layer_idx: int) -> tuple[Tensor, Tensor]:
    """Returns q of the last positions and all of k, as `capture` writes them."""
    from hata.training.record import Recorder  # transformers is an extra

    found: list[tuple[Tensor, Tensor]] = []
    positions = torch.arange(len(token_ids))[-NUM_QUERIES:]

    def keep(recorded_idx: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        found.append((q, k))

    Recorder(model, [layer_idx], len(token_ids)).run(token_ids, positions, keep)
    return found[0]
