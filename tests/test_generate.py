"""What people do with generate, after one line: enable(model)."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, pipeline

import hata
from closeness import assert_equal
from families import FAMILIES, Family
from hata import HashWeights, HataConfig
from hata.integrations.model_shape import model_shape
from hata.integrations.transformers import CACHE_ARGUMENT, disable, enable, enabled
from tiny_folder import bytewise_tokenizer, save_tiny_llama
from tiny_models import EVERYTHING, FEW, POSITIONS, generate, make_model, random_prompt

pytestmark = pytest.mark.usefixtures("few_spare_rows")

HYBRIDS = [family for family in FAMILIES if family.layers not in ((), (0, 1, 2))]
# Their logits are capped or have sinks, for which torch's attention has no arguments.
OWN_LOGITS = [f for f in FAMILIES if f.notes.startswith("logits ")]
# States cannot be taken back, so transformers has no drafts for models that have them.
WINDOWED = [f for f in HYBRIDS if "window" in f.notes or "chunks" in f.notes]


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


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
@pytest.mark.parametrize("page_size", [None, 16])
def test_generate_makes_a_cache_where_none_is_passed(
    settings: dict[str, Any], page_size: int | None
) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(2, 21)
    torch.manual_seed(1)
    dense = generate(model, prompt, 12, **settings)
    _, steps = switch_on(model, page_size=page_size)
    for _ in range(2):  # each call has a cache of its own
        torch.manual_seed(1)
        assert_equal(generate(model, prompt, 12, **settings), dense)
    assert steps.q_lens == 2 * 11 * [1]
    generate(model, prompt, 3, use_cache=False)
    assert len(steps.q_lens) == 2 * 11


def test_its_cache_is_as_long_as_the_text() -> None:
    model = make_model("llama-group4")
    switch_on(model)
    out = generate(model, random_prompt(1, 21), 12, return_dict_in_generate=True)
    assert out[CACHE_ARGUMENT].max_seq_len == 21 + 12


def test_a_pipeline_just_works(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path))
    tokenizer = bytewise_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "!", "left"
    texts = ["the first of two texts", "another"]
    settings = {"max_new_tokens": 9, "do_sample": False, "batch_size": 2}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    dense = pipe(texts, **settings)
    config = HataConfig(top_k=1024, num_dense_layers=0, min_sparse_len=0)
    _, steps = switch_on(model, config)
    assert pipe(texts, **settings) == dense
    assert steps.q_lens == 8 * [1]


def test_disable_makes_the_model_what_it_was() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 21)
    model.set_attn_implementation("eager")
    before, hooks = dict(vars(model)), len(model._forward_pre_hooks)
    text = generate(model, prompt, 9)
    weights = HashWeights.random(**model_shape(model))
    with enabled(model, FEW, weights=weights) as cache:
        enable(model, EVERYTHING, weights=weights)  # once more
        assert_equal(generate(model, prompt, 9, **{CACHE_ARGUMENT: cache})[:, :21], prompt)
        assert model.config._attn_implementation == "hata"
    assert model.config._attn_implementation == "eager"
    assert vars(model).keys() == before.keys()
    assert len(model._forward_pre_hooks) == hooks
    out = generate(model, prompt, 9, return_dict_in_generate=True)
    assert_equal(out.sequences, text)
    assert isinstance(out[CACHE_ARGUMENT], DynamicCache)
    disable(model)  # nothing to do
    with pytest.raises(KeyError, match="stop"), enabled(model, FEW, weights=weights):
        raise KeyError("stop")
    assert model.config._attn_implementation == "eager"


def test_a_copied_model_is_enabled_by_itself() -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 21)
    dense = generate(model, prompt, 9)
    _, steps = switch_on(model)
    twin = copy.deepcopy(model)
    disable(model)
    assert_equal(generate(twin, prompt, 9), dense)
    assert steps.q_lens == 8 * [1]
    assert_equal(generate(model, prompt, 9), dense)
    assert len(steps.q_lens) == 8


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["qwen3", *(family.name for family in OWN_LOGITS)])
def test_a_forward_pass_without_a_cache_is_dense_and_has_gradients(
    name: str, use_cache: bool
) -> None:
    if name == "qwen3":
        model = make_model(name, attention_dropout=0.1)
    else:
        model = next(family.make() for family in OWN_LOGITS if family.name == name)
    batch = padded([random_prompt(1, n) for n in (30, 17)])
    inputs = {"input_ids": batch["inputs"], "attention_mask": batch["attention_mask"]}
    # Padding predicts nothing, and the first token is predicted by it.
    labels = batch["inputs"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, -100)
    inputs |= {"labels": labels, "use_cache": use_cache}

    def loss_and_gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    for train in (False, True):
        model.train(train)
        dense = loss_and_gradients()
        switch_on(model)
        assert model.training == train
        for found, expected in zip(loss_and_gradients(), dense, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        disable(model)


def test_threads_share_a_model_and_no_cache() -> None:
    model = make_model("llama-group4")
    prompts = [random_prompt(batch, 20 + batch) for batch in (1, 2, 3, 4)]
    switch_on(model, FEW)
    alone = [generate(model, prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = threads.map(lambda prompt: generate(model, prompt, 20), prompts)
        for found, expected in zip(together, alone, strict=True):
            assert_equal(found, expected)


def test_a_cache_serves_inference_mode_and_other_passes() -> None:
    model, tokens = make_model("llama-group4"), random_prompt(1, 30)
    cache, _ = switch_on(model, FEW)
    logits = []
    for inference in (False, True):
        cache.reset()
        for length in (20, 1, 1, 5, 1):
            inference = not inference
            with torch.inference_mode(inference), torch.set_grad_enabled(not inference):
                out = model(tokens[:, :length], **{CACHE_ARGUMENT: cache}).logits
            logits.append(out.detach().clone())
    for a, b in zip(logits[:5], logits[5:], strict=True):
        assert_equal(a, b)


def test_autocast_casts_queries_keys_and_values() -> None:
    model, tokens = make_model("llama-group4"), random_prompt(2, 30)
    dense = DynamicCache(config=model.config)

    def logits(cache: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = (tokens[:, :28], tokens[:, 28:29], tokens[:, 29:])
            return torch.cat([model(x, **{CACHE_ARGUMENT: cache}).logits for x in parts], 1)

    expected = logits(dense)
    cache, _ = switch_on(model)
    torch.testing.assert_close(logits(cache), expected, rtol=0.05, atol=0.05)
    assert cache.hata_cache.dtype == torch.bfloat16


class Adapter(torch.nn.Module):
    """A projection with a low-rank addition in float32, as PEFT's LoRA has it."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.active = base, True
        self.down = torch.randn(base.in_features, 2)
        self.up = torch.randn(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        added = (x.float() @ self.down @ self.up).to(x.dtype) if self.active else 0
        return self.base(x) + added


def test_adapters_of_a_model_in_bfloat16_are_switched_while_it_is_enabled() -> None:
    model, prompt = make_model("llama-group4", dtype=torch.bfloat16), random_prompt(2, 21)
    adapters = []
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            adapters.append(Adapter(getattr(layer.self_attn, name)))
            setattr(layer.self_attn, name, adapters[-1])

    def logits(active: bool) -> Tensor:
        for adapter in adapters:
            adapter.active = active
        out = generate(model, prompt, 2, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits)

    dense = [logits(active) for active in (True, False)]
    assert (dense[0] - dense[1]).abs().max() > 0.5
    switch_on(model)
    for active, expected in zip((True, False), dense, strict=True):
        torch.testing.assert_close(logits(active), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("config", [EVERYTHING, FEW], ids=["everything", "few"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_each_row_of_a_padded_batch_is_its_solo_run(
    config: HataConfig, page_size: int | None
) -> None:
    model, rows = make_model("llama-group4"), [random_prompt(1, n) for n in (33, 5, 20, 1)]
    dense = answer(model, rows, 15)
    cache, _ = switch_on(model, config, page_size=page_size)
    together = answer(model, rows, 15, **{CACHE_ARGUMENT: cache})
    assert cache.hata_cache.seq_lens == [47, 19, 34, 15]
    assert cache.get_seq_length() == 47
    for row, prompt in enumerate(rows):
        assert_equal(together[row : row + 1], answer(model, [prompt], 15))
    if config is EVERYTHING:
        assert_equal(together, dense)


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_padding_in_every_kind_of_layer(family: Family) -> None:
    model, rows = family.make(), [random_prompt(1, n) for n in (40, 7, 20)]
    dense = answer(model, rows, 15)
    switch_on(model)
    assert_equal(answer(model, rows, 15), dense)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_with_chunks_beams_and_a_second_turn(num_beams: int) -> None:
    model, rows = make_model("qwen2-group3"), [random_prompt(1, n) for n in (33, 5)]
    settings = {"num_beams": num_beams, "prefill_chunk_size": 8}
    dense = answer(model, rows, 15)
    switch_on(model)
    assert_equal(answer(model, rows, 15, prefill_chunk_size=8), dense)
    if num_beams == 1:
        batch = padded(rows)
        cache, _ = switch_on(model)
        first = answer(model, rows, 15, **settings, **{CACHE_ARGUMENT: cache})
        second = padded([random_prompt(1, n) for n in (3, 9)])
        ids = torch.cat([batch["inputs"], first, second["inputs"]], 1)
        ones = torch.ones_like(first)
        mask = torch.cat([batch["attention_mask"], ones, second["attention_mask"]], 1)
        both = {"attention_mask": mask, "max_new_tokens": 9, "pad_token_id": 0}
        both |= {"do_sample": False, "eos_token_id": None}
        text = model.generate(ids, **both, **{CACHE_ARGUMENT: cache})
        disable(model)
        assert_equal(text, model.generate(ids, **both))
    else:
        found = answer(model, rows, 15, num_beams=num_beams)
        disable(model)
        assert_equal(found, answer(model, rows, 15, num_beams=num_beams))


@pytest.mark.parametrize("length", [1, 2])
def test_a_turn_is_prompt_however_short(length: int) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 40)
    cache, steps = switch_on(model, FEW)
    text = generate(model, prompt, 10, **{CACHE_ARGUMENT: cache})
    turn = torch.cat([text[:, :-1], random_prompt(1, length)], 1)  # the last one is not cached
    held = copy.deepcopy(cache)
    steps.q_lens.clear()
    found = first_logits(model, turn, **{CACHE_ARGUMENT: cache})
    assert steps.q_lens == [1]
    with torch.no_grad():  # more than one token, outside of generate, is prompt
        held.announce_prompt(None)
        both = torch.cat([turn[:, -length:], turn[:, -length:]], 1)
        expected = model(both, **{CACHE_ARGUMENT: held}).logits[:, length - 1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [8, 20])
def test_the_last_chunk_of_a_prompt_is_prompt_though_it_is_one_token(chunk: int) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(2, 41)
    dense = first_logits(model, prompt)
    _, steps = switch_on(model, FEW)
    torch.testing.assert_close(first_logits(model, prompt, prefill_chunk_size=chunk), dense)
    assert steps.q_lens == [1]


def test_keys_that_later_layers_share_in_a_prompt_in_pieces() -> None:
    model, prompt = next(f.make() for f in FAMILIES if f.model == "Gemma3n"), random_prompt(2, 61)
    dense = first_logits(model, prompt)
    switch_on(model)
    found = first_logits(model, prompt, prefill_chunk_size=24)  # each takes the rows of a window
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_the_text_with_drafts_is_the_dense_one_where_everything_is_selected(kind: str) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(1, 6).repeat(1, 6)
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if kind == "assistant":
        settings = {"assistant_model": copy.deepcopy(model)}
    dense = generate(model, prompt, 30)
    _, steps = switch_on(model)
    assert_equal(generate(model, prompt, 30, **settings), dense)
    assert max(steps.q_lens) > 1
    if kind == "assistant":
        switch_on(settings["assistant_model"])
        assert_equal(generate(model, prompt, 30, **settings), dense)


def test_a_draft_is_decoded_as_token_by_token() -> None:
    model, tokens = make_model("llama-group4"), random_prompt(2, 58)
    cache, steps = switch_on(model, FEW)
    cache.announce_prompt(50)

    @torch.no_grad()
    def logits(cache: Any, q_len: int) -> Tensor:
        cache.crop(50 - cache.get_seq_length())
        parts = tokens[:, 50:].split(q_len, 1)
        return torch.cat([model(part, **{CACHE_ARGUMENT: cache}).logits for part in parts], 1)

    with torch.no_grad():
        model(tokens[:, :50], **{CACHE_ARGUMENT: cache})
    expected = logits(cache, 1)
    for q_len in (2, 8):
        torch.testing.assert_close(logits(cache, q_len), expected)
    assert steps.q_lens == 8 * [1] + 4 * [2] + [8]


@pytest.mark.parametrize("family", WINDOWED, ids=lambda family: family.name)
def test_drafts_with_layers_of_the_models_own(family: Family) -> None:
    model, prompt = family.make(), random_prompt(1, 6).repeat(1, 6)
    dense = generate(model, prompt, 30, prompt_lookup_num_tokens=5)
    _, steps = switch_on(model)
    assert_equal(generate(model, prompt, 30, prompt_lookup_num_tokens=5), dense)
    assert max(steps.q_lens) > 1


def test_tokens_can_be_cropped_up_to_the_padding() -> None:
    model, rows = make_model("llama-group4"), [random_prompt(1, n) for n in (20, 6)]
    cache, _ = switch_on(model, FEW)
    answer(model, rows, 5, **{CACHE_ARGUMENT: cache})
    cache.crop(-7)
    assert cache.hata_cache.seq_lens == [17, 3]
    assert cache.get_seq_length() == 17
    with pytest.raises(ValueError, match=r"tokens_to_remove must be in -3\.\.0, got -4"):
        cache.crop(-4)


@pytest.mark.parametrize("length", [12, 40])
def test_tokens_can_be_cropped_in_windows(length: int) -> None:
    family = next(family for family in WINDOWED if family.model == "Gemma3")
    model, tokens = family.make(), random_prompt(2, length + 12)
    cache, _ = switch_on(model, FEW)

    @torch.no_grad()
    def logits(start: int) -> Tensor:
        parts = tokens[:, start:].split(1, 1)
        return torch.cat([model(part, **{CACHE_ARGUMENT: cache}).logits for part in parts], 1)

    with torch.no_grad():
        model(tokens[:, :length], **{CACHE_ARGUMENT: cache})
    expected = logits(length)
    cache.crop(-12)
    assert [each.seq_lens for each in cache.window_caches] == [[length, length]]
    assert_equal(logits(length), expected)
    # Of 32 rows the next token's window takes 15; a sequence that fits is there as a whole.
    most = length + 12 if length + 12 <= 32 else 17
    with pytest.raises(ValueError, match=rf"tokens_to_remove must be in -{most}\.\.0"):
        cache.crop(-most - 1)
    cache.crop(-9)
    assert_equal(logits(length + 3), expected[:, 3:])


def test_without_generate_one_token_is_decoded_and_more_are_prompt() -> None:
    model, tokens = make_model("llama-group4"), random_prompt(1, POSITIONS)
    cache, steps = switch_on(model, FEW)
    with torch.no_grad():
        for length in (1, 40, 1, 5, 1):
            model(tokens[:, :length], **{CACHE_ARGUMENT: cache})
    assert steps.q_lens == [1, 1]


@pytest.mark.parametrize("config", [EVERYTHING, FEW], ids=["everything", "few"])
def test_a_compiled_model_is_compiled_for_the_prompt_and_for_a_token(config: HataConfig) -> None:
    model, prompt = make_model("llama-group4"), random_prompt(2, 21)
    _, steps = switch_on(model, config)
    text = generate(model, prompt, 30)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter)
    assert_equal(generate(model, prompt, 30), text)
    assert counter.frame_count <= 3
    rows = [random_prompt(1, length) for length in (40, 7)]
    found = answer(model, rows, 20)
    for _ in range(3):
        assert_equal(answer(model, rows, 20), found)
    del model.forward
    assert_equal(answer(model, rows, 20), found)
    assert counter.frame_count <= 3 + 3 + 3  # padded, and with layers of other caches
    assert steps.q_lens == 2 * 29 * [1] + 5 * 19 * [1]


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Llama4"])
def test_a_compiled_model_has_its_own_logits_and_windows(name: str) -> None:
    model = next(family.make() for family in FAMILIES if family.model == name)
    prompt = random_prompt(2, 21)
    settings = {"output_logits": True, "return_dict_in_generate": True}
    switch_on(model, FEW)
    eager = generate(model, prompt, 20, **settings)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.forward = torch.compile(model.forward, backend=counter)
    compiled = generate(model, prompt, 20, **settings)
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3  # prompts and tokens, with windows that fill meanwhile
