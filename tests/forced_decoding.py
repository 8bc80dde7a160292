"""Given tokens decoded by a model, which may be a shard: torchrun forced_decoding.py FOLDER OUT."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hata
from hata import HashWeights, HataConfig
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, enable

PROMPT, NEW, TOP_K = 40, 12, 10
# num_dense_layers=1: the layers of a device must know which of them are dense.
CONFIG = HataConfig(top_k=TOP_K, num_sink=2, num_recent=4, num_dense_layers=1, min_sparse_len=0)


@torch.no_grad()
def decode(model: Any) -> tuple[Tensor, Tensor, Any]:
    """Decodes random tokens after a random prompt.

    Returns:
        The logits ``[batch, 1 + NEW, vocabulary]``, those of the prompt's last token first, what
        was selected, ``[steps, batch, 1, num_kv_heads of this process, TOP_K]``, and the cache.
    """
    selected = []

    def observe(layer: int, q: Tensor, cache: hata.HataCache, indices: Tensor, _: Tensor) -> None:
        selected.append(indices.cpu().clone())

    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, PROMPT + NEW), generator=random)
    weights = HashWeights.random(**model_shape(model))
    cache = enable(model, CONFIG, weights=weights, observer=observe)
    parts = tokens.to(model.device).split([PROMPT] + NEW * [1], 1)
    logits = [model(part, **{CACHE_ARGUMENT: cache}).logits[:, -1].cpu() for part in parts]
    return torch.stack(logits, 1), torch.stack(selected), cache


def main(folder: str, out: str) -> None:
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()
    logits, selected, cache = decode(model)
    num_kv_heads = cache.hata_cache.num_kv_heads
    assert num_kv_heads * torch.distributed.get_world_size() == model_shape(model)["num_kv_heads"]
    torch.save((logits, selected), Path(out) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()  # no rank leaves while another may talk to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
