"""Generate with layers of other kinds: windows, chunks, states, keys that layers share."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from closeness import assert_equal
from families import FAMILIES, Family
from generate_cases import answer, first_logits, switch_on
from hata.integrations.transformers import CACHE_ARGUMENT
from tiny_models import FEW, generate, random_prompt

pytestmark = pytest.mark.usefixtures("few_spare_rows")

HYBRIDS = [family for family in FAMILIES if family.layers not in ((), (0, 1, 2))]
# States cannot be taken back, so transformers has no drafts for models that have them.
WINDOWED = [f for f in HYBRIDS if "window" in f.notes or "chunks" in f.notes]


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_padding_in_every_kind_of_layer(family: Family) -> None:
    model, rows = family.make(), [random_prompt(1, n) for n in (40, 7, 20)]
    dense = answer(model, rows, 15)
    switch_on(model)
    assert_equal(answer(model, rows, 15), dense)


def test_keys_that_later_layers_share_in_a_prompt_in_pieces() -> None:
    model, prompt = next(f.make() for f in FAMILIES if f.model == "Gemma3n"), random_prompt(2, 61)
    dense = first_logits(model, prompt)
    switch_on(model)
    found = first_logits(model, prompt, prefill_chunk_size=24)  # each takes the rows of a window
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", WINDOWED, ids=lambda family: family.name)
def test_drafts_with_layers_of_the_models_own(family: Family) -> None:
    model, prompt = family.make(), random_prompt(1, 6).repeat(1, 6)
    dense = generate(model, prompt, 30, prompt_lookup_num_tokens=5)
    _, steps = switch_on(model)
    assert_equal(generate(model, prompt, 30, prompt_lookup_num_tokens=5), dense)
    assert max(steps.q_lens) > 1


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
