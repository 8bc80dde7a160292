"""What commands write: whole files, readable as the umask says, in places that can be written."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hata.cli
from capture_cases import make_captures
from hata import HashWeights, save_weights
from hata.outputs import whole_file


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets a umask and gives the mode that it leaves a file."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path, mode):
    file = tmp_path / "numbers.safetensors"
    for _ in range(2):  # a new file, and one that is replaced
        with whole_file(file, "test") as partial:
            save_file({"x": torch.zeros(2)}, partial)  # makes it 0600
        assert mode_of(file) == mode
    assert list(tmp_path.iterdir()) == [file]


def test_weights_have_the_mode_that_the_umask_leaves(tmp_path, mode):
    file = tmp_path / "weights.safetensors"
    save_weights(file, HashWeights.random(num_layers=1, num_kv_heads=1, head_dim=32, num_bits=32))
    assert mode_of(file) == mode


def test_captures_have_the_mode_that_the_umask_leaves(tmp_path, mode):
    make_captures(tmp_path / "captures")
    modes = {mode_of(file) for file in (tmp_path / "captures").iterdir()}
    assert modes == {mode}


def test_what_cannot_be_written_leaves_what_stood_there(tmp_path):
    file = tmp_path / "file.csv"
    file.write_text("old")

    def write_half() -> None:
        with whole_file(file, "test") as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(
        ValueError, match=r"hata\.test: .* must have room for file.csv, got .*space"
    ):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_and_a_device_is_no_file_to_replace(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    for file in (tmp_path / "link.csv", Path("/dev/null")):
        with whole_file(file, "test") as partial:
            partial.write_text("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "new"
    assert Path("/dev/null").is_char_device()


# Nobody can make a file in /proc, whoever runs the tests.
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train texts --out /proc/x.safetensors", "--out must lie in a folder that can be written"),
        ("train texts --out /proc/x/y.safetensors", "--out must lie in a folder that can be"),
        ("train texts --plot /proc/x.png", "--plot must lie in a folder that can be written"),
        ("train texts --captures /proc/x", "--captures must be a folder that can be written"),
        ("capture texts --out /proc/x", "--out must be a folder that can be written, got /proc/x"),
        ("corpus /proc/x", "folder must be a folder that can be written, got /proc/x"),
        ("demo --plot /proc/x.png", "--plot must lie in a folder that can be written"),
        ("recall captures --top-k 40 --csv /proc/x.csv", "--csv must lie in a folder that can be"),
        ("recall captures --top-k 40 --per-head /proc/x.csv", "--per-head must lie in a folder"),
        ("recall captures --top-k 40 --plot /proc/x", "--plot must be a folder that can be"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    make_captures(Path("captures"))
    Path("texts").mkdir()
    Path("texts/some.txt").write_text("some text")
    with pytest.raises(SystemExit) as exited:
        hata.cli.main(args.split())
    said = capsys.readouterr()
    assert (exited.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"error: {message}"), said.err
