"""Lossless decoding of a transformers model: hata drafts a few tokens, a dense pass verifies them.

The loop is transformers' assisted generation, in which the model assists itself: `SparseDrafts`
decodes sparsely and takes back what that has put into the cache; the pass that verifies is dense
and writes keys and values of its own.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from hata.integrations.transformers_cache import CACHE_ARGUMENT


class SparseDrafts(CandidateGenerator):
    """Drafts greedily with the model that verifies, decoding sparsely into the same cache.

    Args:
        model: The model, enabled.
        num_draft_tokens: Tokens of a draft.
        generation_config: That of this `generate`.
        logits_processor: Likewise.
    """

    requires_model_outputs = True  # `get_candidates` is told more than the tokens
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}  # and asks for no more outputs

    def __init__(
        self, model: Any, num_draft_tokens: int, generation_config: Any, logits_processor: Any
    ) -> None:
        self._model, self._num_draft_tokens = model, num_draft_tokens
        self._max_length = generation_config.max_length
        self._eos_token_ids: Tensor | None = generation_config._eos_token_tensor
        self._logits_processor = logits_processor
        self._num_drafted, self._cache = 0, None

    def get_candidates(  # type: ignore[override]  # tokens alone are compared
        self, input_ids: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Returns the tokens with a draft behind them; without one where it would not be sparse.

        Args:
            input_ids: ``[1, seq_len]``, the last of which the cache does not hold yet.
            kwargs: ``model_kwargs``, the arguments of the pass that verifies, and
                ``is_first_iteration``, whether the prompt is still to be read.

        Returns:
            ``[1, seq_len + tokens of the draft]``, and no logits.
        """
        model, seq_len = self._model, input_ids.shape[1]
        cache = self._cache = kwargs["model_kwargs"][CACHE_ARGUMENT]
        number = min(self._num_draft_tokens, self._max_length - seq_len - 1)
        self._num_drafted = 0
        if kwargs["is_first_iteration"] or not cache.is_long_enough_to_draft:
            return input_ids, None
        tokens, arguments = input_ids, dict(kwargs["model_kwargs"])
        with cache.drafting(), model._optimize_model_for_decode():
            for _ in range(number):
                inputs = model.prepare_inputs_for_generation(
                    tokens, next_sequence_length=1, **arguments
                )
                outputs = model(**inputs, return_dict=True)
                arguments = model._update_model_kwargs_for_generation(outputs, arguments)
                logits = outputs.logits[:, -1].float()
                best = self._logits_processor(tokens, logits).argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, best.to(tokens.device)], 1)
        if self._eos_token_ids is not None:  # what follows an end is not part of the text
            ends = torch.isin(tokens[0, seq_len:], self._eos_token_ids.to(tokens.device)).nonzero()
            if len(ends) > 0:
                tokens = tokens[:, : seq_len + int(ends[0]) + 1]
        self._num_drafted = tokens.shape[1] - seq_len
        return tokens, None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int | Tensor
    ) -> None:
        """Counts in the cache what was drafted and accepted."""
        assert self._cache is not None
        self._cache.num_drafted += self._num_drafted
        self._cache.num_accepted += int(num_matches)
