"""What the tests of generate share: prompts of several lengths, and who counts the steps."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hata
from hata import HashWeights, HataConfig
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import enable
from tiny_models import EVERYTHING, generate


class Steps:
    """An observer: the q_len of each decoding step, as the last layer sees it."""

    def __init__(self) -> None:
        self.q_lens: list[int] = []

    def __call__(self, layer_idx: int, q: Tensor, cache: hata.HataCache, *_: Tensor) -> None:
        if layer_idx == cache.num_layers - 1:
            self.q_lens.append(q.shape[1])


def switch_on(
    model: PreTrainedModel, config: HataConfig = EVERYTHING, **settings: Any
) -> tuple[Any, Steps]:
    steps = Steps()
    weights = HashWeights.random(**model_shape(model))
    return enable(model, config, weights=weights, observer=steps, **settings), steps


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Prompts of ``[1, length]``, padded on the left, and their mask."""
    longest = max(row.shape[1] for row in rows)
    pad = [(longest - row.shape[1], 0) for row in rows]
    ids = [torch.nn.functional.pad(row, width) for row, width in zip(rows, pad, strict=True)]
    mask = [
        torch.nn.functional.pad(torch.ones_like(row), width)
        for row, width in zip(rows, pad, strict=True)
    ]
    return {"inputs": torch.cat(ids), "attention_mask": torch.cat(mask)}


def answer(model: PreTrainedModel, rows: list[Tensor], num_tokens: int, **settings: Any) -> Tensor:
    """The new tokens alone, ``[batch, num_tokens]``, of a batch that is padded on the left."""
    tokens = model.generate(
        **padded(rows),
        max_new_tokens=num_tokens,
        pad_token_id=0,
        eos_token_id=None,
        **{"do_sample": False, **settings},
    )
    return tokens[:, -num_tokens:]


def first_logits(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> Tensor:
    """The logits after the prompt."""
    out = generate(model, tokens, 2, output_logits=True, return_dict_in_generate=True, **settings)
    return out.logits[0]
