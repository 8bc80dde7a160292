"""The command line: one clear line for every mistake, and no trace."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hata.cli
import hata.demo.run
from hata.demo.model import bundled_model
from hata.version import VERSION


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(list(args))
    said = capsys.readouterr()
    return exited.value.code, said.out, said.err


@pytest.fixture(scope="module")
def converted_model() -> Path:
    """Returns the demo's model; converting it, once per machine, shows a progress bar on stderr."""
    return bundled_model()


def test_version_is_printed_by_the_module_as_by_the_command(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"hata {VERSION}\n")
    command = [sys.executable, "-m", "hata", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == out


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(
        command in out for command in ("demo", "corpus", "capture", "train", "recall", "eval")
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model no/such/folder", "--model must name a local transformers folder .* got no/such"),
        ("--context 32", "--context must be more than --max-new-tokens=32, got 32"),
        ("--depth 1.5", "--depth must be in 0..1, got 1.5"),
        ("--depth nan", "--depth must be in 0..1, got nan"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--max-new-tokens 1", "--max-new-tokens must be at least 2, got 1"),
        ("--top-k 0", "top_k must be in 1..2147483647, got 0"),
        ("--top-k 19", "num_sink \\+ num_recent must be at most top_k=19, got 20"),
        ("--num-bits 100", "num_bits must be a multiple of 32, got 100"),
        ("--query-bits 5", "query_bits must be in 1..4, got 5"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N, a device that torch sees, got tpu"),
        ("--device cuda:99", "--device must be .* got cuda:99"),
        ("--dtype int8", "--dtype must be one of float32, bfloat16, float16, got int8"),
        pytest.param(
            "--weights no/such.safetensors",
            "path must name an existing file, got no/such",
            marks=pytest.mark.model,  # looked at once the model is there
        ),
        ("--plot /dev/null/plot.png", "--plot must lie in a folder that can be written, got /dev"),
        ("--plot plot.jpeg", "--plot must name a .png file, got plot.jpeg"),
        ("--context many", "[Ii]nvalid value for '--context'"),
        ("--contxt 10", "[Nn]o such option: --contxt"),
    ],
)
def test_a_wrong_option_of_the_demo_is_one_line(capsys, args, message):
    assert_demo_rejects(capsys, args, message)


@pytest.mark.model
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--context 8193", "--context must be at most the model's max_position_embeddings=8192"),
        ("--context 90", "--context must leave room .* more tokens, got"),
    ],
)
def test_a_context_that_does_not_fit_the_model_is_one_line(converted_model, capsys, args, message):
    assert_demo_rejects(capsys, args, message)


def assert_demo_rejects(capsys: pytest.CaptureFixture[str], args: str, message: str) -> None:
    code, out, err = run(capsys, "demo", *args.split())
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert out == ""


def test_an_unknown_command_is_one_line(capsys):
    code, _, err = run(capsys, "dmo")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: No such command 'dmo'")


def test_a_folder_that_transformers_cannot_load_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    code, _, err = run(capsys, "demo", "--model", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert f"--model must name a folder that transformers loads, got {tmp_path}" in err


def test_a_config_that_is_no_json_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text("no json")
    code, _, err = run(capsys, "demo", "--model", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "--model must hold a config.json in JSON" in err


def test_a_fault_of_hatas_own_keeps_its_trace(monkeypatch):
    def fail(options: object) -> None:
        raise RuntimeError("something is broken")

    monkeypatch.setattr(hata.demo.run, "run_demo", fail)
    with pytest.raises(RuntimeError, match="something is broken"):
        hata.cli.main(["demo"])
