"""Captures a layer's queries and keys of a real model, for `python -m bench decode --inputs`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import hata
from hata.checks import check, check_int

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
    tensors = {"queries": q[-NUM_QUERIES:], "keys": k, "key_weights": weights.key_weights[0]}
    metadata = {"model": folder.name, "layer": str(layer_idx), "text": "pydoc_data.topics"}
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    save_file(halves, path, metadata)


def attention_inputs(model: Any, token_ids: list[int], layer_idx: int) -> tuple[Tensor, Tensor]:
    """Returns q ``[tokens, num_heads, head_dim]`` and k after the rotary embedding."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    seen: dict[str, Tensor] = {}

    def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer_idx:
            seen["q"], seen["k"] = query[0].transpose(0, 1), key[0].transpose(0, 1)
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("hata_capture", attend)
    AttentionMaskInterface.register("hata_capture", sdpa_mask)
    model.set_attn_implementation("hata_capture")
    with torch.no_grad():
        model.model(torch.tensor([token_ids]), use_cache=False)
    return seen["q"], seen["k"]
