"""Capturing: the model's own queries and keys, whatever interrupts it."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hata.training.captures
from closeness import assert_equal
from families import FAMILIES
from hata.training.captures import CaptureInfo, Captures, CaptureWriter, shard_path
from hata.training.data import turned
from hata.training.record import CaptureOptions, capture, rotary_angles
from hata.training.source import Source
from hata.training.texts import text_files, token_sequences
from tiny_folder import bytewise_tokenizer
from tiny_models import MODELS, make_model

SEQ_LEN = 96
OPTIONS = CaptureOptions(
    num_sequences=2, seq_len=SEQ_LEN, num_queries=7, first_query=0.5, values=True
)
WORDS = ("hash", "attention", "keys", "of", "the", "long", "context", "a", "query", "sees")


def write_texts(folder: Path, count: int = 6, words: int = 60) -> list[Path]:
    chosen = random.Random(0)
    for i in range(count):
        home = folder / f"kind{i % 2}"
        home.mkdir(parents=True, exist_ok=True)
        text = " ".join(chosen.choices(WORDS, k=words))
        (home / f"document{i}.txt").write_text(text)
    return [folder]


def tiny(name: str = "llama-group4", **changes: Any) -> Any:
    return make_model(name, vocab_size=256, **changes)


def run(tmp_path: Path, model: Any, options: CaptureOptions = OPTIONS, **settings: Any) -> Captures:
    texts = write_texts(tmp_path / "texts")
    folder = tmp_path / "captures"
    return capture(model, bytewise_tokenizer(), texts, folder, options, name="tiny", **settings)


def tensors_of(found: Captures) -> list[Tensor]:
    layers = [found.layer(i, with_values=True) for i in range(found.info.num_layers)]
    return [x for layer in layers for x in (layer.q, layer.k, layer.v, layer.positions)]


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_those_that_attention_sees(tmp_path, name):
    seen: dict[int, tuple[Tensor, ...]] = {}

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = (q, k, v)
        return AttentionInterface()["sdpa"](module, q, k, v, *args, **kwargs)

    model = tiny(name)
    found = run(tmp_path, model)
    files = text_files([tmp_path / "texts"])
    sequences = token_sequences(
        bytewise_tokenizer(), files, num_sequences=2, seq_len=SEQ_LEN, seed=0
    )
    AttentionInterface.register("spy", spy)
    for i, sequence in enumerate(sequences):
        model.set_attn_implementation("spy")
        with torch.no_grad():
            model(torch.tensor([sequence.token_ids]))
        for layer_idx, (q, k, v) in seen.items():
            layer = found.layer(layer_idx, with_values=True)
            assert_equal(layer.k[i], k[0].transpose(0, 1))
            assert layer.v is not None
            assert_equal(layer.v[i], v[0].transpose(0, 1))
            assert_equal(layer.q[i], q[0].transpose(0, 1)[layer.positions[i]])
            assert bool((layer.positions[i].diff() > 0).all())
            assert int(layer.positions[i].min()) >= SEQ_LEN // 2
    assert sorted(seen) == list(range(found.info.num_layers))


def test_the_model_attends_as_before_when_it_is_captured(tmp_path):
    model = tiny()
    before = model.config._attn_implementation
    run(tmp_path, model)
    assert model.config._attn_implementation == before


def test_the_same_seed_gives_the_same_capture_and_another_one_does_not(tmp_path):
    model = tiny()
    first, again = (tensors_of(run(tmp_path / name, model)) for name in "ab")
    other = run(tmp_path / "c", model, dataclasses.replace(OPTIONS, seed=1))
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert not torch.equal(first[3], other.layer(0).positions)


def test_chunks_capture_what_a_whole_pass_captures(tmp_path, monkeypatch):
    monkeypatch.setattr(hata.training.record, "_SMALLEST_CHUNK", 32)
    model = tiny()
    whole = run(tmp_path / "whole", model)
    need = hata.training.record._memory(model, SEQ_LEN, 32) / 1e9
    options = dataclasses.replace(OPTIONS, memory_limit_gb=need)
    chunks = run(tmp_path / "chunks", model, options)
    for a, b in zip(tensors_of(whole), tensors_of(chunks), strict=True):
        # float32 sums in another order, through three layers
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_interrupted_capture_continues_and_keeps_finished_layers(tmp_path):
    class Killed(Exception):
        pass

    def kill() -> None:
        done.append(1)
        if len(done) == 4:
            raise Killed

    model = tiny()
    done: list[int] = []
    whole = tensors_of(run(tmp_path / "whole", model))
    with pytest.raises(Killed):
        run(tmp_path / "killed", model, on_layer=kill)
    folder = tmp_path / "killed" / "captures"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 4
    times = [file.stat().st_mtime_ns for file in files]
    with pytest.raises(ValueError, match="hold a complete capture"):
        Captures.open(folder)
    continued = run(tmp_path / "killed", model)
    assert [file.stat().st_mtime_ns for file in files] == times
    for a, b in zip(whole, tensors_of(continued), strict=True):
        assert_equal(a, b)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        if "layer-001" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save_file = hata.training.captures.save_file
    monkeypatch.setattr(hata.training.captures, "save_file", fail)
    model = tiny()
    with pytest.raises(
        ValueError,
        match=r"captures must have room for sequence-0000-layer-001.* No space left .* continue",
    ):
        run(tmp_path, model)
    left = [file.name for file in (tmp_path / "captures").glob("sequence*")]
    assert left == ["sequence-0000-layer-000.safetensors"]
    monkeypatch.setattr(hata.training.captures, "save_file", save_file)
    assert run(tmp_path, model).info.num_sequences == 2


def test_short_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"hata\.capture: texts must hold 900 x 96 tokens, got"):
        run(tmp_path, tiny(), dataclasses.replace(OPTIONS, num_sequences=900))
    with pytest.raises(ValueError, match="texts must name existing files or folders, got no/such"):
        text_files([Path("no/such")])


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("Übung macht den Meister. ".encode("latin-1") * 40, "'utf-8' codec can't decode"),
        (b"\x7fELF\x02\x01\x01" + bytes(400), "NUL bytes"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, got):
    write_texts(tmp_path, count=4, words=10)
    file = tmp_path / "kind0" / "other.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"hata\.capture: {file} must be UTF-8 text, got {got}"):
        token_sequences(bytewise_tokenizer(), [file], num_sequences=1, seq_len=100, seed=0)


def test_nan_is_an_error(tmp_path):
    model = tiny()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"k must be finite in float32, got NaN .* layer 1"):
        run(tmp_path, model)


def test_a_model_without_the_interface_is_an_error(tmp_path):
    class Old(GPT2LMHeadModel):
        _supports_attention_backend = False

    model = Old(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=256, n_positions=128))
    with pytest.raises(ValueError, match=r"model must take attention functions .* got Old"):
        run(tmp_path, model)


GEMMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "sliding_window": 16,
}
KINDS = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")


@pytest.mark.parametrize("chunk", [None, 32])
def test_layers_with_a_window_are_left_out(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(hata.training.record, "_SMALLEST_CHUNK", 32)
    config = Gemma3TextConfig(**GEMMA, layer_types=list(KINDS))
    model, options, finished = Gemma3ForCausalLM(config).eval(), OPTIONS, []
    whole = run(tmp_path / "whole", model, on_layer=lambda: finished.append(1))
    if chunk is not None:
        need = hata.training.record._memory(model, SEQ_LEN, chunk) / 1e9
        options = dataclasses.replace(OPTIONS, memory_limit_gb=need)
    found = run(tmp_path, model, options)
    assert len(finished) == 2 * 2
    assert found.info.layer_types == KINDS
    assert (found.info.layers, found.info.num_layers) == ((1, 3), 2)
    assert found.info.softmax_scale == pytest.approx(config.query_pre_attn_scalar**-0.5)
    assert found.layer(1).k.shape == (2, SEQ_LEN, 1, 32)
    names = sorted(path.name for path in found.folder.glob("*-layer-*"))
    assert names == [f"sequence-{i:04d}-layer-{n:03d}.safetensors" for i in (0, 1) for n in (1, 3)]
    for a, b in zip(tensors_of(whole), tensors_of(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
@pytest.mark.parametrize("chunk", [SEQ_LEN, 32])
def test_a_softcap_and_sink_logits_are_captured(tmp_path, monkeypatch, name, chunk):
    """The keys of layer 1 depend on attention below, which the model does in eager code."""
    family = next(family for family in FAMILIES if family.model == name)
    model = family.make(vocab_size=256, attn_implementation="eager")
    monkeypatch.setattr(hata.training.record, "_SMALLEST_CHUNK", 32)
    need = hata.training.record._memory(model, SEQ_LEN, chunk) + 1
    found = run(tmp_path, model, dataclasses.replace(OPTIONS, memory_limit_gb=need / 1e9))
    sequence = token_sequences(
        bytewise_tokenizer(),
        text_files([tmp_path / "texts"]),
        num_sequences=1,
        seq_len=SEQ_LEN,
        seed=0,
    )[0]
    with torch.no_grad():
        expected = model(torch.tensor([sequence.token_ids])).past_key_values.layers[1].keys[0]
    layer = found.layer(0)
    torch.testing.assert_close(layer.k[0], expected.transpose(0, 1), rtol=1e-4, atol=1e-4)
    sinks = getattr(model.model.layers[1].self_attn, "sinks", None)
    assert layer.softmax.softcap == getattr(model.config, "attn_logit_softcapping", None)
    data = Source(found, range(2), 2, 3).load([0], torch.device("cpu"))
    if sinks is None:
        assert layer.softmax.sink_logits is None
        assert data.softmax == layer.softmax
    else:
        assert sinks.detach().std() > 0
        assert_equal(layer.softmax.sink_logits, sinks.detach().view(2, 2))
        assert_equal(data.softmax.sink_logits, layer.softmax.sink_logits)


def test_a_layer_with_another_softcap_is_an_error(tmp_path):
    model = next(family for family in FAMILIES if family.model == "Gemma2").make(vocab_size=256)
    model.model.layers[1].self_attn.attn_logit_softcapping = 3.0
    with pytest.raises(ValueError, match=r"softcap must be 2\.0 in every layer, got 3\.0"):
        run(tmp_path, model)


def test_a_model_with_windows_alone_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="have a layer that attends to the whole context"):
        run(tmp_path, tiny("mistral", sliding_window=16))


def test_an_older_capture_is_read_for_the_layers_that_attend_to_everything(tmp_path):
    config = Gemma3TextConfig(**GEMMA, layer_types=list(KINDS))
    found = run(tmp_path, Gemma3ForCausalLM(config).eval())
    file = found.folder / "captures.json"
    settings = {**json.loads(file.read_text()), "num_layers": 4}
    del settings["softcap"], settings["rotary"]
    file.write_text(json.dumps(settings))
    assert Captures.open(found.folder).info == found.info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"num_queries": 100}, "num_queries must be in 1..48, got 100"),
        ({"first_query": 1.0}, r"first_query must be in \[0, 1\), got 1.0"),
        ({"memory_limit_gb": -1.0}, "memory_limit_gb must be positive, got -1.0"),
        ({"memory_limit_gb": 1e-6}, "memory_limit_gb must be at least .* what .* tokens .* need"),
        ({"seq_len": 400}, "seq_len must be in 2..160, got 400"),
    ],
)
def test_options_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny(), dataclasses.replace(OPTIONS, **changes))


def test_another_capture_is_not_overwritten(tmp_path):
    model = tiny()
    run(tmp_path, model)
    with pytest.raises(ValueError, match=r"hold a capture with these settings, got .*'seed': 0"):
        run(tmp_path, model, dataclasses.replace(OPTIONS, seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    info = Captures.open(tmp_path / "captures").info
    with pytest.raises(ValueError, match="folder must be empty"):
        CaptureWriter(tmp_path / "other", info)


def test_a_damaged_file_is_named(tmp_path):
    found = run(tmp_path, tiny())
    shard_path(found.folder, 1, 2).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"sequence-0001-layer-002.safetensors must be readable"):
        found.layer(2)


def test_settings_that_no_version_has_written_are_an_error(tmp_path):
    (tmp_path / "captures.json").write_text('{"format": "hata.captures"}')
    with pytest.raises(ValueError, match="must be as hata capture wrote it"):
        Captures.open(tmp_path)


def test_long_documents_come_first_and_folders_take_turns(tmp_path):
    write_texts(tmp_path, count=4, words=10)
    for kind in (0, 1):
        (tmp_path / f"kind{kind}" / "long.txt").write_text("word " * 200)
    files = text_files([tmp_path])
    sequences = token_sequences(bytewise_tokenizer(), files, num_sequences=2, seq_len=100, seed=0)
    assert all(sequence.text.startswith("long.txt[") for sequence in sequences)
    assert all(len(sequence.token_ids) == 100 for sequence in sequences)


def test_info_counts_the_group(tmp_path):
    info = run(tmp_path, tiny()).info
    assert isinstance(info, CaptureInfo)
    assert (info.group, info.num_sequences, info.has_values) == (4, 2, True)


def test_rotated_keys_are_captured(tmp_path):
    # The first token stands at position 0, where the rotary embedding is the identity.
    model = tiny("llama-group1")
    found = run(tmp_path, model)
    files = text_files([tmp_path / "texts"])
    sequence = token_sequences(
        bytewise_tokenizer(), files, num_sequences=1, seq_len=SEQ_LEN, seed=0
    )[0]
    ids = torch.tensor([sequence.token_ids])
    decoder = model.model
    with torch.no_grad():
        layer = decoder.layers[0]
        hidden = layer.input_layernorm(decoder.embed_tokens(ids))
        k = layer.self_attn.k_proj(hidden).unflatten(-1, (2, 64)).transpose(1, 2)
        cos, sin = decoder.rotary_emb(hidden, torch.arange(SEQ_LEN)[None])
        _, rotated = apply_rotary_pos_emb(k, k, cos, sin)
    torch.testing.assert_close(found.layer(0).k[0], rotated[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("family", "turns"),
    [
        *((name, True) for name in ("Llama", "Qwen2", "Gemma")),
        *((name, False) for name in ("Ernie4_5", "Gemma3", "DeepseekV3", "SmolLM3")),
    ],
)
def test_angles_are_captured_where_they_turn_keys(family, turns):
    # Ernie 4.5 pairs neighbouring channels, Gemma 3's layers have angles of their own, DeepSeek
    # turns some channels, SmolLM3 some layers.
    model = next(x for x in FAMILIES if x.model == family).make(vocab_size=256)
    angles = rotary_angles(model)
    assert bool(angles) == turns
    if turns:
        with torch.no_grad():
            ids = torch.full((1, 60), 7)
            k = model(ids, use_cache=True).past_key_values.layers[0].keys[0]
        later = turned(k[:, 3], torch.tensor(angles).double(), 56)
        torch.testing.assert_close(later, k[:, 59], rtol=1e-4, atol=1e-5)
