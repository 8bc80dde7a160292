"""The command `hata recall` on tiny captures."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

import hata.cli
from capture_cases import NUM_KV_HEADS, NUM_LAYERS, SHAPE, make_captures
from hata import HashWeights, HataConfig, save_weights

COLUMNS = (
    "gpu,torch,commit,date,model,context,selector,recipe,num_bits,query_bits,key_norms,channels,top_k,"
    "bytes_per_token,recall,attention_mass,output_error,command"
)
BUDGETS = ["--top-k", "20", "--top-k", "40", "--top-k", "60"]
PNG = b"\x89PNG\r\n\x1a\n"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(["recall", *map(str, args)])
    said = capsys.readouterr()
    return exited.value.code, said.out, said.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Held-out and training captures, and weights of 32 and 64 bits."""
    make_captures(tmp_path / "heldout")
    make_captures(tmp_path / "train")
    for num_bits in (32, 64):
        weights = HashWeights.random(**SHAPE, num_bits=num_bits, seed=1)
        trained = HashWeights(weights.key_weights, metadata={"recipe": "ours"})
        save_weights(tmp_path / f"ours-{num_bits}.safetensors", trained)
    return tmp_path


def weights_of(folder: Path) -> list[object]:
    return [x for n in (32, 64) for x in ("--weights", folder / f"ours-{n}.safetensors")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_every_file(folder: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--calibration", folder / "train", *weights_of(folder), *BUDGETS, "--device", device]
    args += ["--hash-attention-steps", 2]
    written = folder / "not" / "there" / "yet"
    files = ["--csv", written / "means.csv", "--per-head", written / "heads.csv"]
    files += ["--plot", written / "plots", "--frontier", written / "frontier.json"]
    code, out, _ = run(capsys, folder / "heldout", *args, *files)
    assert code == 0
    for said in ("exact: softmax", "hata: ours, 64 bits, query 4", "loki: 8 channels", "Frontier"):
        assert said in out

    assert (written / "means.csv").read_text().splitlines()[0] == COLUMNS
    means = rows_of(written / "means.csv")
    names = ["exact"] * 2 + ["hata"] * 2 + ["loki"] * 2 + ["hashattention"]
    names += ["streaming", "h2o", "snapkv", "quest"] + ["sparq"] * 2
    names += ["magicpig", "rabitq"] + ["vattention"] * 3 + ["hata"] * 2
    assert [row["selector"] for row in means[::3]] == names
    ours = means[-3]
    assert (ours["recipe"], ours["num_bits"], ours["query_bits"]) == ("ours", "64", "4")
    assert (ours["key_norms"], ours["channels"], ours["top_k"]) == ("0", "", "20")
    assert (ours["bytes_per_token"], ours["torch"]) == ("8", torch.__version__)

    heads = rows_of(written / "heads.csv")
    assert len(heads) == len(means) * NUM_LAYERS * NUM_KV_HEADS
    wanted = {"selector": "hata", "num_bits": "64", "top_k": "20", "layer": "2"}
    same = [row for row in heads if wanted.items() <= row.items()]
    mean = sum(float(row["attention_mass"]) for row in same) / NUM_KV_HEADS
    assert mean == pytest.approx(float(ours["attention_mass"]), abs=1e-4)  # five digits are kept

    levels = json.loads((written / "frontier.json").read_text())["levels"]
    for level in levels:
        assert HataConfig(top_k=level["uniform"]["top_k"], num_sink=0, num_recent=0)
        assert len(level["per_layer"]["num_bits"]) == NUM_LAYERS
        config = HataConfig(top_k=level["per_layer"]["top_k"])
        assert len(config.layer_top_k(NUM_LAYERS)) == NUM_LAYERS
    pictures = sorted(path.name for path in (written / "plots").iterdir())
    assert pictures == ["budgets.png", "frontier.png", "heat_map.png", "num_bits.png"]
    assert all((written / "plots" / name).read_bytes().startswith(PNG) for name in pictures)


def test_a_model_of_which_some_layers_attend_to_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers keep the model's numbers, and only those that were captured stand in the means."""
    kinds = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    make_captures(tmp_path / "heldout", layer_types=kinds)
    whole = HashWeights.random(**{**SHAPE, "num_layers": 4}, num_bits=32)
    some = HashWeights(whole.key_weights[[1, 3]], layers=(1, 3))
    lost = []
    for name, weights in (("whole", whole), ("some", some)):
        save_weights(tmp_path / f"{name}.safetensors", weights)
        files = ["--per-head", tmp_path / "heads.csv", "--frontier", tmp_path / "frontier.json"]
        args = ["--no-baselines", "--num-dense-layers", 2, "--plot", tmp_path / name, *files]
        weights_file = ["--weights", tmp_path / f"{name}.safetensors"]
        code, out, _ = run(capsys, tmp_path / "heldout", *weights_file, *BUDGETS, *args)
        assert code == 0
        assert "means over KV heads and layers 3;" in " ".join(out.split())
        rows = rows_of(tmp_path / "heads.csv")
        assert {row["layer"] for row in rows} == {"1", "3"}
        lost.append([row["attention_mass"] for row in rows])
        levels = json.loads((tmp_path / "frontier.json").read_text())["levels"]
        assert {len(level["per_layer"]["top_k"]) for level in levels} == {4}
    assert lost[0] == lost[1]


def test_weights_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*weights_of(folder), *BUDGETS, "--no-baselines", "--query-bits", 1, "--key-norms"]
    code, out, _ = run(capsys, folder / "heldout", *args)
    assert code == 0
    assert "hata: ours, 64 bits, query 1, norms" in out
    assert "exact: softmax" in out  # the bound is always measured
    assert "quest" not in out


def test_without_calibration_there_is_no_loki(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, folder / "heldout", *BUDGETS, "--num-queries", 2)
    assert code == 0
    assert "quest" in out
    assert "loki" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nowhere", "folder must hold a capture .* got nowhere"),
        ("HELDOUT --top-k 40 --weights nowhere", "path must name an existing file, got nowhere"),
        ("HELDOUT --no-baselines", "--weights must be given with --no-baselines, got none"),
        ("HELDOUT --frontier a.json", "--weights must be given with --frontier, got none"),
        ("HELDOUT --top-k 40 --csv HELDOUT", "--csv must be a file, got the folder .*heldout"),
        ("HELDOUT --top-k 40 --csv /dev/null/a.csv", "--csv must lie in a folder that can be"),
        ("HELDOUT --top-k 40 --plot PLAIN", "--plot must be a folder that can be written, got "),
        ("HELDOUT --query-bits 5", r"--query-bits must be in 1\.\.4, got 5"),
        ("HELDOUT --hash-attention-steps 9", "--calibration must be given with --hash-attention"),
        ("HELDOUT --num-dense-layers 3", "--num-dense-layers must leave one of .* got 3"),
        ("HELDOUT --top-k 10", r"top_k must be at least num_sink \+ num_recent=20, got 10"),
        ("HELDOUT --top-k 2.5", r"--top-k must be an int, or a share .*, got 2\.5"),
        ("HELDOUT --top-k 40 --channels 33", r"channels must be in 1\.\.32, got 33"),
        ("HELDOUT --top-k 40 --random-bits 48", "num_bits must be a multiple of 32"),
        (
            "HELDOUT --top-k 40 --weights OTHER",
            r"weights must be for .* got layers \[0, 1\]",
        ),
        ("HELDOUT --device tpu", "--device must be cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], args: str, message: str
) -> None:
    save_weights(folder / "plain.safetensors", HashWeights.random(**SHAPE, num_bits=32))
    other = HashWeights.random(**{**SHAPE, "num_layers": 2}, num_bits=32)
    save_weights(folder / "other.safetensors", other)
    paths = {"HELDOUT": "heldout", "PLAIN": "plain.safetensors", "OTHER": "other.safetensors"}
    words = [str(folder / paths[word]) if word in paths else word for word in args.split()]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert re.match(f"error: .*{message}", err), err
