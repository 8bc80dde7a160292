"""`hata corpus`, `hata capture` and `hata train` from the command line, on a tiny model."""

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import hata
import hata.cli
import hata.training.corpus
from hata.integrations.transformers import enable
from hata.training.captures import Captures
from hata.training.corpus import SOURCES, build_corpus
from tiny_folder import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, bytewise_tokenizer, save_tiny_llama

FEW = "--num-sink 1 --num-recent 2"
SMALL = "--num-sequences 3 --seq-len 256 --num-queries 32"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Number {i} of the documents speaks of hashes. " * 40)
    return folder


def run(capsys: pytest.CaptureFixture[str], args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(args.split())
    said = capsys.readouterr()
    return exited.value.code, said.out, said.err


def test_one_command_captures_and_trains(tiny, texts, tmp_path, capsys):
    out = tmp_path / "new" / "weights.safetensors"  # the folder is made
    steps = "--num-steps 4 --num-keys 32"
    code, said, _ = run(
        capsys, f"train {texts} --model {tiny} --out {out} {SMALL} {FEW} {steps} --device cpu"
    )
    assert code == 0
    weights = hata.load_weights(out)
    assert weights.shape == (NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, 64)
    assert weights.metadata["recipe"] == "hata"
    assert weights.metadata["model"] == tiny.name
    names = {
        weights.metadata["trained_on"].count(".txt"),
        weights.metadata["heldout"].count(".txt"),
    }
    assert names == {2, 1}  # the last sequence, of another document, is held out
    config = json.loads(weights.metadata["config"])
    assert (config["num_steps"], config["num_keys"]) == (4, 32)
    assert "peak memory" in said
    assert "top_k 4" in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert Captures.open(tmp_path / "new" / "weights.safetensors.captures").info.num_sequences == 3


def test_a_model_with_windows_is_trained_for_the_layers_that_hata_decodes(texts, tmp_path, capsys):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    tokenizer = bytewise_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gemma")
    window = {"sliding_window": 16, "layer_types": kinds, "max_position_embeddings": 256}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), **sizes, **heads, **window)
    model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "gemma")
    out = tmp_path / "weights.safetensors"
    options = f"{SMALL} {FEW} --num-steps 2 --num-keys 32 --device cpu"
    code, said, _ = run(capsys, f"train {texts} --model {tmp_path / 'gemma'} --out {out} {options}")
    assert code == 0
    assert re.search(r"32\s+queries\s+each,\s+2\s+of\s+4\s+layers", said)
    assert re.findall(r"│\s+(\d|mean)\s+│", said) == ["1", "3", "mean"]
    weights = hata.load_weights(out)
    assert (weights.layers, weights.shape) == ((1, 3), (2, 1, 32, 64))
    cache = enable(model, top_k=64, weights=out)
    assert cache.hata_layers == (1, 3)


def test_captures_serve_every_recipe_and_seed(tiny, texts, tmp_path, capsys):
    captures, other = tmp_path / "captures", tmp_path / "other"
    for folder, seed in ((captures, 0), (other, 1)):
        code, said, _ = run(
            capsys,
            f"capture {texts} --out {folder} --model {tiny} {SMALL} --seed {seed} --device cpu",
        )
        assert code == 0
        assert "3 sequences of 256 tokens, 32 queries each" in " ".join(said.split())
    for recipe in ("random", "pca-itq"):
        out = tmp_path / f"{recipe}.safetensors"
        code, said, _ = run(
            capsys,
            f"train --captures {captures} --heldout {other} --out {out} --recipe {recipe} {FEW} "
            "--num-bits 32 --query-bits 1 --key-norms --device cpu",
        )
        assert code == 0
        assert "closed form" in said
        weights = hata.load_weights(out)
        assert (weights.query_bits, weights.key_norms) == (1, True)


def test_synthetic_data_measures_time_and_memory(tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    code, said, _ = run(
        capsys,
        f"train --synthetic 2x4x2x32 {SMALL} --num-steps 2 --out {out} --device cpu",
    )
    assert code == 0
    assert re.search(r"2 layers in \d+\.\d s, peak memory \d+\.\d\d GB", " ".join(said.split()))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--recipe best", "--recipe must be one of random, pca-itq, paper, hata, got best"),
        ("--synthetic 2x4", "--synthetic must be layers x heads x KV heads x head_dim, .* got 2x4"),
        ("--synthetic 2x4x3x32", "--synthetic must be layers x heads .* got 2x4x3x32"),
        ("--recipe paper --num-steps 9", "--num-steps must be left out for recipe paper, got 9"),
        ("--num-bits 100", "num_bits must be a multiple of 32, got 100"),
        ("--num-steps 0", "num_steps must be at least 1, got 0"),
        ("--num-keys 15", "num_keys must be at least 16, got 15"),
        ("--recipe random --num-keys 64", "--num-keys must be left out for recipe random, got 64"),
        ("--key-norms", "key_norms must be False: recipe hata learns scores without norms"),
        ("--captures no/such", r"folder must hold a capture \(captures.json\), got no/such"),
        ("no/such.txt", "texts must name existing files or folders, got no/such.txt"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--memory-limit-gb 0 --synthetic 2x4x2x32", "memory_limit_gb must be positive, got 0"),
    ],
)
def test_a_wrong_option_is_one_line(tiny, tmp_path, capsys, args, message):
    out = tmp_path / "weights.safetensors"
    code, _, err = run(capsys, f"train --out {out} --model {tiny} {args}")
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not out.exists()


def test_an_existing_file_is_not_replaced(tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    out.write_text("mine")
    code, _, err = run(capsys, f"train --synthetic 2x4x2x32 --out {out}")
    assert code == 2
    assert "--out must not exist yet" in err
    assert out.read_text() == "mine"


def test_the_corpus_has_train_and_heldout_of_different_sources(tmp_path, monkeypatch):
    def fetch(source: Any, scratch: Path) -> tuple[Path, str]:
        pattern = re.sub(r"\*+", "x", source.pattern)
        for name in ("first", "pydoc_data"):
            file = scratch / name / pattern if not source.packages else scratch / pattern
            file.parent.mkdir(parents=True, exist_ok=True)
            text = b"<p>text of some length</p>\n" * 100
            file.write_bytes(gzip.compress(text) if file.name.endswith("z") else text)
        file.with_name("x.dat").write_bytes(bytes(9999))  # as the fortunes' indices
        return scratch, source.name

    monkeypatch.setattr(hata.training.corpus, "_fetch", fetch)
    monkeypatch.setattr(hata.training.corpus, "_scripture", lambda root: "In the beginning " * 200)
    monkeypatch.setattr(hata.training.corpus.shutil, "which", lambda name: name)
    sizes = build_corpus(tmp_path / "corpus")
    assert min(sizes.values()) > 0
    split = {
        part: {folder.name for folder in (tmp_path / "corpus" / part).iterdir()}
        for part in ("train", "heldout")
    }
    assert split["train"] == {"python", "perl", "linux", "essays", "quotations"}
    assert split["heldout"] == {"bible", "handbook", "dictionary", "licences"}
    assert not list((tmp_path / "corpus" / "train").rglob("*pydoc_data*"))
    assert not list((tmp_path / "corpus").rglob("*x.dat*"))
    essay = next((tmp_path / "corpus" / "train" / "essays").iterdir()).read_text()
    assert essay.startswith("text of some length\n")
    notes = (tmp_path / "corpus" / "SOURCES.txt").read_text()
    assert notes.count("\n") == len(SOURCES)
    with pytest.raises(ValueError, match=r"hata\.corpus: folder must be empty or not exist"):
        build_corpus(tmp_path / "corpus")


def test_without_apt_the_corpus_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hata.training.corpus.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="the machine must be Debian's kind, got no apt-get"):
        build_corpus(tmp_path / "corpus")


def test_a_package_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    def fail(command: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package")

    monkeypatch.setattr(hata.training.corpus.shutil, "which", lambda name: name)
    monkeypatch.setattr(hata.training.corpus.subprocess, "run", fail)
    perl = [source for source in SOURCES if source.name == "perl"]
    monkeypatch.setattr(hata.training.corpus, "SOURCES", perl)
    with pytest.raises(ValueError, match="perl-doc must be downloadable with apt-get, got E: Una"):
        build_corpus(tmp_path / "corpus")
