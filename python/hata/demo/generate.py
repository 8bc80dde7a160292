"""Greedy generation with a clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hata.integrations.transformers_cache import CACHE_ARGUMENT


@dataclass
class Generation:
    """What one generation gave.

    Attributes:
        token_ids: The answer's tokens, the end-of-sequence token included where one came.
        prefill_seconds: From the start to the first token, which the prompt alone decides.
        step_seconds: Of each further token: one decoding step through all layers.
    """

    token_ids: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds_per_token(self) -> float:
        """Median time of a decoding step."""
        return 1e3 * statistics.median(self.step_seconds) if self.step_seconds else 0.0


class _Clock(BaseStreamer):
    """Receives the prompt once, then each token as soon as it is on the host."""

    def __init__(self, generation: Generation, on_token: Callable[[], object]) -> None:
        self.generation = generation
        self.on_token = on_token
        self.last: float | None = None

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        if self.last is not None:
            if self.generation.token_ids:
                self.generation.step_seconds.append(now - self.last)
            else:
                self.generation.prefill_seconds = now - self.last
            self.generation.token_ids += value.flatten().tolist()
            self.on_token()
        self.last = time.perf_counter()

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    on_token: Callable[[], object],
    cache: Any = None,
) -> Generation:
    """Generates greedily, with the attention that the model is set to.

    Args:
        model: A transformers causal language model.
        prompt_ids: The prompt's tokens.
        max_new_tokens: At most this many tokens; fewer where the model ends its answer.
        on_token: Called after each token.
        cache: The transformers cache to fill; None takes the model's default.

    Returns:
        The answer and its times.
    """
    generation = Generation()
    end = model.generation_config.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    prompt = torch.tensor([prompt_ids], device=model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        **{CACHE_ARGUMENT: cache},
        streamer=_Clock(generation, on_token),
    )
    return generation
