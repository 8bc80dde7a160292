"""EleutherAI's lm-evaluation-harness with hata attention: its model class "hata".

On the command line this module stands in for ``lm_eval``, and knows that model too::

    python -m hata.integrations.lm_eval run --tasks longbench --model hata \\
        --model_args pretrained=Qwen/Qwen2.5-1.5B-Instruct,top_k=512

In Python, importing it registers the model for ``lm_eval.simple_evaluate(model="hata", ...)``.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from hata.checks import check
from hata.config import HataConfig
from hata.integrations.transformers import enabled
from hata.integrations.transformers_cache import CACHE_ARGUMENT, HataTransformersCache
from hata.integrations.transformers_layers import MAX_DRAFT_LEN
from hata.progress import progress_bar
from hata.weights import HashWeights

# What the harness asks: a key of its own, the tokens of the context and those that continue it.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]

_BUDGET = {field.name for field in dataclasses.fields(HataConfig)}


@register_model("hata")
class HataLM(HFLM):
    """A transformers model that answers the harness with hata attention.

    Contexts are prompts, and read densely. What follows is decoded sparsely: generated text token
    by token, as `hata.integrations.transformers.enable` does; the tokens whose likelihood is asked
    for up to 32 at a time, which gives the same, one request after the other. The context's last
    token is decoded with them, for what it says of the next one would be dense attention's word
    otherwise, and all there is to a choice of one token; so that sparse attention chooses.

    Args:
        pretrained: A model, or its name or folder.
        weights: Hash weights or a file of them; None as in `hata.integrations.transformers.enable`.
        kwargs: Fields of `hata.HataConfig`, such as ``top_k``, and arguments of lm_eval's "hf".
            On a GPU, ``min_sparse_len=0`` makes contexts sparse that are so short that hata would
            decode them densely. ``batch_size`` is that of generation.

    Raises:
        TypeError: A field of the budget has another type.
        ValueError: One breaks its rule, or the model is no decoder.
    """

    def __init__(
        self, pretrained: Any, *, weights: HashWeights | str | None = None, **kwargs: Any
    ) -> None:
        self._budget = HataConfig(**{k: v for k, v in kwargs.items() if k in _BUDGET})
        self._weights = weights
        super().__init__(pretrained, **{k: v for k, v in kwargs.items() if k not in _BUDGET})
        decoder = self.backend == "causal"
        check(decoder, "lm_eval", "pretrained", "be a decoder", type(self.model).__name__)

    def _enabled(self, max_seq_len: int) -> AbstractContextManager[HataTransformersCache]:
        return enabled(self.model, self._budget, weights=self._weights, max_seq_len=max_seq_len)

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        """Generates with caches that the model makes."""
        with self._enabled(self.max_length):
            return super().generate_until(*args, **kwargs)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Returns the log likelihood of each continuation, and whether greedy decoding gives it.

        Requests with the same context are answered after one reading of it, where the model's
        layers can all forget an answer; those with a recurrent state cannot.
        """
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        inputs = [self._input(*tokens) for _, *tokens in requests]
        longest = max(map(len, inputs), default=1)
        order = sorted(range(len(requests)), key=lambda i: self._prompt(inputs, requests, i))
        groups = itertools.groupby(order, key=lambda i: self._prompt(inputs, requests, i))
        with (
            self._enabled(longest) as cache,
            progress_bar("log likelihoods", None if disable_tqdm else len(requests)) as on_answer,
        ):
            for prompt, members in groups:
                read = False
                for i in members:
                    if not read:
                        cache.reset()
                        cache.announce_prompt(len(prompt))
                        if prompt:
                            self._pass(prompt, cache, logits_to_keep=1)
                    key, _, continuation = requests[i]
                    decoded = inputs[i][len(prompt) :]
                    found = torch.cat([self._pass(x, cache) for x in _pieces(decoded)])
                    read = all(getattr(layer, "is_croppable", False) for layer in cache.layers)
                    if read:
                        cache.crop(-len(decoded))
                    answers[i] = _answer(found.log_softmax(-1), continuation)
                    if key is not None:  # the key of a window of rolling likelihood is None
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
                    on_answer()
        return answers

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        """What the model reads: all tokens but the last, as many as it can, from the right."""
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    @staticmethod
    def _prompt(inputs: list[list[int]], requests: list[_Request], i: int) -> list[int]:
        """What is read densely: a token is decoded for each that is asked for."""
        return inputs[i][: max(0, len(inputs[i]) - len(requests[i][2]))]

    def _pass(self, tokens: list[int], cache: HataTransformersCache, **settings: Any) -> Tensor:
        """One forward pass: ``[len(tokens), vocabulary]``, float32."""
        settings[CACHE_ARGUMENT] = cache
        ids = torch.tensor([tokens], device=self.device)
        logits: Tensor = self.model(ids, use_cache=True, **settings).logits
        return logits[0].float()


def _pieces(tokens: list[int]) -> Iterator[list[int]]:
    """As many tokens at a time as a pass that decodes may have."""
    for start in range(0, len(tokens), MAX_DRAFT_LEN):
        yield tokens[start : start + MAX_DRAFT_LEN]


def _answer(log_probs: Tensor, continuation: list[int]) -> tuple[float, bool]:
    wanted = torch.tensor(continuation, device=log_probs.device)
    wanted = wanted[-len(log_probs) :]  # a continuation longer than the model is cut like its input
    found = log_probs.gather(1, wanted[:, None]).sum()
    return float(found), bool((log_probs.argmax(1) == wanted).all())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
