"""Pictures and tables of the committed rows, and the capture of a model's layer."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from bench import decode, generate, grids, offload, records, tables, vllm_arrivals
from bench.__main__ import app
from bench.capture import attention_inputs
from bench.cases import CONFIGS, Case, Shape, name_of
from bench.plot import TITLES
from bench.report import RESULTS, Report
from hata.cli import run_app
from tiny_models import make_model


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_app(app, "python -m bench", list(args))
    return exit_info.value.code


def step(seq_len: int, us: float, dense: float = 10.0) -> records.Step:
    shape = Shape(1, 32, 8, seq_len)
    return records.Step("gpu", shape, "B", seq_len // 64, False, us, 1.0, {}, {"fa2_us": dense})


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with rows of every grid for the device x, whose times are made up."""
    shutil.copy(RESULTS / "paper_figure5.csv", tmp_path)
    shutil.copy(RESULTS / "authors_h100.csv", tmp_path / "authors_x.csv")
    origin = dict.fromkeys(("gpu", "torch", "commit", "date", "command"), "x")
    report = Report(tmp_path / "decode_x.csv", decode.COLUMNS, origin)
    shapes = [shape for grid in grids.GRIDS.values() for sweep in grid() for shape in sweep.shapes]
    for shape, config in itertools.product(dict.fromkeys(shapes), CONFIGS):
        case = Case(shape, config)
        report.add(
            {
                "batch": shape.batch,
                "num_heads": shape.num_heads,
                "num_kv_heads": shape.num_kv_heads,
                "seq_len": shape.seq_len,
                **{f"{part}_us": 3.0 for part in decode.PARTS},
                "top_k": shape.top_k,
                "num_bits": config.num_bits,
                "query_bits": config.query_bits,
                "key_norms": config.key_norms,
                "page_size": shape.seq_len,
                "hata_us": 9 + case.num_bytes / 2.5e6,
                "floor_us": case.num_bytes / 3.1e6,
                "fa2_us": 8 + shape.kv_bytes / 3e6,
                "inputs": "random",
                "kv_cache_dtype": name_of(shape.kv_cache_dtype or shape.dtype),
            }
        )
    report = Report(tmp_path / "vllm_arrivals_x.csv", vllm_arrivals.COLUMNS, origin)
    for documents, backend, rate in itertools.product((0, 16), ("FLASH_ATTN", "hata"), (1.0, 2.0)):
        load = {"documents": documents, "backend": backend, "rate": rate}
        report.add({**load, "tpot_p50_ms": 9.0 + rate, "tokens_per_s": 99.0 * rate})
    report = Report(tmp_path / "generate_x.csv", generate.COLUMNS, origin)
    for context, method in itertools.product((1024, 8192), generate.METHODS):
        case = {"model": "llama-3.1-8b", "batch": 1, "context": context, "method": method}
        report.add({**case, "dense_layers": 2, "ms_per_token": context / 512})
    report = Report(tmp_path / "offload_x.csv", offload.COLUMNS, origin)
    for seq_len, mode in itertools.product((1024, 8192), offload.MODES):
        case = {"mode": mode, "batch": 1, "seq_len": seq_len, "us": seq_len / 99}
        report.add({**case, "pcie_floor_us": seq_len / 512})
    return tmp_path


def test_every_picture_is_drawn_and_the_same_rows_give_the_same(results):
    names = {f"{name}_x.svg" for name in TITLES}
    for folder in (results / "one", results / "two"):
        assert run("plot", "--device", "x", "--results", str(results), "--output", str(folder)) == 0
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (results / "one" / name).read_text() == (results / "two" / name).read_text()


def test_pictures_whose_rows_are_missing_are_left_out(results, capsys):
    for name in ("vllm_arrivals", "generate", "offload"):
        (results / f"{name}_x.csv").unlink()
    file = results / "decode_x.csv"
    header, first, *_ = file.read_text().splitlines()
    file.write_text(f"{header}\n{first}\n")
    options = ["--results", str(results), "--output", str(results / "plots"), "--png"]
    assert run("plot", "--device", "x", *options) == 0
    assert {path.name for path in (results / "plots").iterdir()} == {
        "parts_x.png",
        "speedup_x.png",
    }


def test_tables_quote_the_rows(results, capsys):
    assert run("tables", "--device", "x", "--results", str(results)) == 0
    shape = Shape(8, 28, 4, 128 << 10)
    dense = 8 + shape.kv_bytes / 3e6
    a, b, c = (9 + Case(shape, config).num_bytes / 2.5e6 for config in CONFIGS)
    cells = " | ".join(f"{us:.3g} | {dense / us:.1f}x" for us in (a, b, c))
    printed = capsys.readouterr().out
    assert f"| 8 | 28/4 | 128K | {dense:.0f} | {cells} |" in printed
    assert "| 16 | 2 | hata | 198 | 11 |" in printed


@pytest.mark.parametrize("command", ["plot", "tables"])
def test_a_device_without_rows_is_one_line_and_status_2(command, tmp_path, capsys):
    assert run(command, "--device", "b900", "--results", str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device must have rows in --results, got no ")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({512: 20.0, 1024: 9.0, 2048: 8.0}, "1K"),
        ({512: 20.0, 1024: 9.0, 2048: 12.0, 4096: 5.0}, "4K"),
        ({512: 9.0, 1024: 8.0}, "512 or less"),
        ({512: 20.0, 1024: 10.0}, ""),
    ],
)
def test_the_crossover_is_the_length_from_which_on_hata_is_faster(times, expected):
    assert tables.crossover(step(length, us) for length, us in times.items()) == expected


def test_captured_keys_are_those_that_the_model_caches():
    model = make_model("llama-group4")
    token_ids = torch.randint(1, 97, (40,))
    with torch.no_grad():
        cache = model.model(token_ids[None], use_cache=True).past_key_values
    q, k = attention_inputs(model, token_ids.tolist(), layer_idx=1)
    torch.testing.assert_close(k, cache.layers[1].keys[0].transpose(0, 1))
    assert q.shape == (40, 8, 64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "10"], "--tokens must be"),
        (["--model", "{tmp}"], "--model must name a local transformers folder"),
    ],
)
def test_what_cannot_be_captured_is_one_line_and_status_2(args, message, tmp_path, capsys):
    output = tmp_path / "captured.safetensors"
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert run("capture", "--output", str(output), *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()
