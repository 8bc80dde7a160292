"""What stands in for a transformers model's own methods of generation while it is enabled."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from hata.checks import check
from hata.integrations.transformers_cache import CACHE_ARGUMENT, HataTransformersCache
from hata.integrations.transformers_drafts import SparseDrafts
from hata.integrations.transformers_layers import ATTENTION, MAX_DRAFT_LEN
from hata.integrations.transformers_mask import HERE
from hata.integrations.transformers_settings import CacheSettings

# Settings of `generate` that ask for drafts of another kind.
_OTHER_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def stand_ins(model: Any, settings: CacheSettings) -> dict[str, Callable[..., Any]]:
    """Returns the functions by the names of the methods of ``model`` that they stand in for."""
    functions: dict[str, Callable[..., Any]] = {
        "_prepare_cache_for_generation": prepare_cache,
        "init_continuous_batching": continuous_batching,
    }
    if settings.num_draft_tokens is not None:
        functions |= {
            "generate": generate,
            "_get_candidate_generator": candidate_generator,
            "prepare_inputs_for_generation": sliced_inputs(type(model)),
        }
    return functions


def prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands in for ``_prepare_cache_for_generation``: makes the cache, or takes it."""
    settings = model._hata.settings
    given = model_kwargs.get(CACHE_ARGUMENT) is not None
    active = model.config._attn_implementation == ATTENTION
    if not given and active and generation_config.use_cache is not False:
        kind, where = generation_config.cache_implementation, f"{HERE}.generate"
        check(kind in (None, "dynamic"), where, "cache_implementation", "be None", kind)
        max_seq_len = settings.max_seq_len
        if not generation_config.is_assistant:  # whose cache serves many short calls
            max_seq_len = min(max_seq_len, max_cache_length + 1)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            max_seq_len += MAX_DRAFT_LEN  # the last draft may be longer than what is left to write
        new = HataTransformersCache(settings, max_seq_len)
        if generation_config.is_assistant:
            new.activate_past_recording()
        model_kwargs[CACHE_ARGUMENT] = new
    else:
        prepare = type(model)._prepare_cache_for_generation
        prepare(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    cache = model_kwargs.get(CACHE_ARGUMENT)
    if isinstance(cache, HataTransformersCache):
        mask = model_kwargs.get("attention_mask")  # None where it would be all ones, since 5.24
        without_mask = getattr(generation_config, "_mask_length", None)
        cache.announce_prompt(without_mask if mask is None else mask.shape[1])


def continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``init_continuous_batching``, through which ``generate_batch`` goes.

    Continuous batching keeps keys in transformers' paged cache, which has no codes, and where
    FlashAttention is installed it takes that in place of the model's attention function.
    """
    attention = model.config._attn_implementation
    rule = "be used after disable(model): transformers' paged cache holds no codes"
    where = f"{HERE}.generate_batch"
    check(attention != ATTENTION, where, "continuous batching", rule, f"attention {attention!r}")
    return type(model).init_continuous_batching(model, *args, **kwargs)


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``generate``: the model assists itself, if it has no other assistant."""
    if model.config._attn_implementation == ATTENTION and kwargs.get("assistant_model") is None:
        kwargs["assistant_model"] = model
    return type(model).generate(model, *args, **kwargs)


def sliced_inputs(model_class: Any) -> Callable[..., Any]:
    """Returns what stands in for ``prepare_inputs_for_generation``, with its signature.

    Assisted generation hands on the whole text at first, whatever the cache holds of it (as of
    transformers 5.24); what it holds is left out.
    """
    original = model_class.prepare_inputs_for_generation

    @wraps(original)
    def prepare_inputs(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        cache, positions = kwargs.get(CACHE_ARGUMENT), kwargs.get("position_ids")
        seen = 0 if cache is None else cache.get_seq_length()
        whole = positions is not None and positions.shape[-1] == input_ids.shape[1]
        if kwargs.get("is_first_iteration") and whole and seen > 0:
            kwargs["next_sequence_length"] = input_ids.shape[1] - seen
        return original(model, input_ids, **kwargs)

    return prepare_inputs


def candidate_generator(model: Any, **kwargs: Any) -> Any:
    """Stands in for ``_get_candidate_generator``, which chooses where drafts come from."""
    config = kwargs["generation_config"]
    others = any(getattr(config, name, None) for name in _OTHER_DRAFTS)
    if others or kwargs["assistant_model"] is not model:
        return type(model)._get_candidate_generator(model, **kwargs)
    number = model._hata.settings.num_draft_tokens
    return SparseDrafts(model, number, config, kwargs["logits_processor"])
