from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from hata import HataConfig
from hata.config import positions_of


def test_defaults_are_valid() -> None:
    config = HataConfig()
    assert (config.top_k, config.num_sink, config.num_recent) == (512, 4, 16)
    assert (config.num_dense_layers, config.min_sparse_len) == (2, None)


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        HataConfig().top_k = 7  # type: ignore[misc]


def test_extremes_are_valid() -> None:
    HataConfig(top_k=1, num_sink=0, num_recent=1, num_dense_layers=0)
    HataConfig(top_k=2**31 - 1, num_dense_layers=1000)


def test_one_number_holds_for_every_layer() -> None:
    config = HataConfig(top_k=40)
    assert config.layer_top_k(2) == (40, 40)


def test_every_layer_can_have_its_own() -> None:
    config = HataConfig(top_k=(512, 256, 64))
    assert config.layer_top_k(3) == (512, 256, 64)
    assert HataConfig(top_k=[512, 256, 64]) == config  # type: ignore
    with pytest.raises(ValueError, match="top_k must be one number or have num_layers=2 entries"):
        config.layer_top_k(2)


def test_a_share_is_of_the_longest_sequence_and_of_a_token_s_own() -> None:
    config = HataConfig(top_k=(1 / 64, 300, 0.1), min_top_k=50)
    budgets = config.layer_budgets(3, 6400)
    assert budgets == ((100, 1 / 64, 50), (300, None, None), (640, 0.1, 50))
    assert config.layer_budgets(3, 64)[0] == (50, 1 / 64, 50)
    assert [positions_of(0.29, n) for n in (100, 101, 0)] == [29, 30, 0]


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "lies_on", "length"),
    [
        (1, 8, "cuda", 8192),  # the crossovers of bench/results/decode_h100.csv
        (1, 32, "cuda", 2048),
        (8, 8, "cuda", 1024),
        (8, 32, "cuda", 256),
        (1, 5, "cuda:1", 13108),  # rounded up
        (1, 1, "cuda", 32768),  # of bench/results/crossover_h100.csv
        (2, 1, "cuda", 16384),
        (1, 4, "cuda", 8192),
        (70_000, 1, "cuda", 1),
        (1, 8, "cpu", 0),
    ],
)
def test_short_sequences_are_those_below_the_measured_crossover(
    batch: int, num_kv_heads: int, lies_on: str, length: int
) -> None:
    sizes = (batch, num_kv_heads, torch.device(lies_on))
    assert HataConfig().resolve_min_sparse_len(*sizes) == length
    assert HataConfig(min_sparse_len=0).resolve_min_sparse_len(*sizes) == 0
    assert HataConfig(min_sparse_len=77).resolve_min_sparse_len(*sizes) == 77


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be in 1..2147483647, got 0"),
        ({"num_sink": -1}, "num_sink must be at least 0, got -1"),
        ({"num_recent": -1}, "num_recent must be at least 0, got -1"),
        ({"top_k": 19}, "num_sink + num_recent must be at most top_k=19, got 20"),
        ({"num_dense_layers": -1}, "num_dense_layers must be at least 0, got -1"),
        ({"min_sparse_len": -1}, "min_sparse_len must be at least 0, got -1"),
        ({"top_k": ()}, "top_k must have an entry for each layer, got ()"),
        ({"top_k": (64, 0)}, "top_k must be in 1..2147483647, got 0"),
        ({"top_k": (512, 19)}, "num_sink + num_recent must be at most top_k=19, got 20"),
        ({"top_k": 1.0}, "top_k must be an int, or a share above 0 and below 1, got 1.0"),
        ({"min_top_k": 0}, "min_top_k must be in 1..2147483647, got 0"),
        (
            {"top_k": (512, 0.5), "min_top_k": 19},
            "num_sink + num_recent must be at most min_top_k=19, got 20",
        ),
    ],
)
def test_rejects_a_broken_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        HataConfig(**settings)
    assert str(error.value) == f"hata.HataConfig: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": "512"}, "top_k must be an int or a share, got str"),
        ({"num_sink": None}, "num_sink must be an int, got NoneType"),
        ({"num_recent": 1.5}, "num_recent must be an int, got float"),
        ({"num_dense_layers": 2.0}, "num_dense_layers must be an int, got float"),
        ({"min_sparse_len": "0"}, "min_sparse_len must be an int, got str"),
        ({"top_k": (64, None)}, "top_k must be an int or a share, got NoneType"),
    ],
)
def test_rejects_another_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        HataConfig(**settings)
    assert str(error.value) == f"hata.HataConfig: {message}"
