import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, zeros

from closeness import assert_equal
from hata import HashWeights, load_weights, save_weights

SHAPE = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 40, "num_bits": 96}
METADATA = {"format": "hata.hash_weights", **{name: str(size) for name, size in SHAPE.items()}}


def key_weights() -> Tensor:
    return torch.randn(tuple(SHAPE.values()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_file_loads_unchanged(tmp_path: Path, tied: bool) -> None:
    weights = HashWeights(
        key_weights(), None if tied else key_weights(), 2, True, metadata={"origin": "a test"}
    )
    save_weights(tmp_path / "hash.safetensors", weights)
    loaded = load_weights(tmp_path / "hash.safetensors")
    assert_equal(loaded.key_weights, weights.key_weights)
    assert loaded.shape == tuple(SHAPE.values())
    assert (loaded.query_bits, loaded.key_norms) == (2, True)
    assert loaded.metadata == {"origin": "a test"}
    if weights.query_weights is None:
        assert loaded.query_weights is None
    else:
        assert loaded.query_weights is not None
        assert_equal(loaded.query_weights, weights.query_weights)
    assert [path.name for path in tmp_path.iterdir()] == ["hash.safetensors"]


def test_the_same_tensor_for_keys_and_queries_can_be_saved(tmp_path: Path) -> None:
    tensor = key_weights()
    save_weights(tmp_path / "hash.safetensors", HashWeights(tensor, tensor))
    loaded = load_weights(tmp_path / "hash.safetensors").query_weights
    assert loaded is not None
    assert_equal(loaded, tensor)


@pytest.mark.parametrize(("head_dim", "num_bits"), [(64, 32), (64, 64), (64, 256), (40, 96)])
def test_random_columns_are_orthonormal_in_blocks(head_dim: int, num_bits: int) -> None:
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": head_dim, "num_bits": num_bits}
    weights = HashWeights.random(**sizes).key_weights
    assert weights.shape == tuple(sizes.values())
    for block in weights.double().split(head_dim, dim=-1):
        identity = torch.eye(block.shape[-1], dtype=torch.float64).expand(2, 3, -1, -1)
        # float32 rounding of head_dim products of numbers below 1
        assert (block.mT @ block - identity).abs().max() < head_dim * 2.0**-23


def test_random_weights_follow_their_seed() -> None:
    first, again, other = (HashWeights.random(**SHAPE, seed=seed) for seed in (1, 1, 2))
    assert_equal(first.key_weights, again.key_weights)
    assert not torch.equal(first.key_weights, other.key_weights)
    assert first.metadata == {"origin": "random orthogonal, seed 1"}
    layers = first.key_weights
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_comes_in_the_keys_dtype_and_only_once(
    device: str, dtype: torch.dtype, tied: bool
) -> None:
    weights = HashWeights(key_weights(), None if tied else key_weights())
    where = torch.device(device)
    keys, queries = weights.layer(1, dtype, where)
    queries_before = weights.key_weights if weights.query_weights is None else weights.query_weights
    assert_equal(keys.cpu(), weights.key_weights[1].to(dtype))
    assert_equal(queries.cpu(), queries_before[1].to(dtype))
    assert keys.device.type == queries.device.type == device
    assert (keys is queries) == tied
    assert weights.layer(1, dtype, where)[0] is keys


@pytest.mark.parametrize("layer_idx", [-1, 2])
def test_rejects_a_layer_that_is_not_there(layer_idx: int) -> None:
    with pytest.raises(ValueError, match=rf"layer_idx must be in 0\.\.1, got {layer_idx}"):
        HashWeights(key_weights()).layer(layer_idx, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([None], TypeError, "key_weights must be a tensor, got NoneType"),
        ([torch.zeros(2, 3)], ValueError, "num_bits], got [2, 3]"),
        ([zeros(1, 1, 8, 32).half()], ValueError, "must be torch.float32, got torch.float16"),
        ([torch.full((1, 1, 8, 32), torch.nan)], ValueError, "must be finite, got infinite values"),
        ([torch.zeros(1, 1, 8, 48)], ValueError, "num_bits must be a multiple of 32, got 48"),
        ([zeros(1, 1, 8, 32), 3], TypeError, "query_weights must be a tensor, got int"),
        (
            [zeros(1, 1, 8, 32), zeros(1, 1, 8, 64)],
            ValueError,
            "query_weights must have the shape of key_weights, [1, 1, 8, 32], got [1, 1, 8, 64]",
        ),
        ([zeros(1, 1, 8, 32), None, 5], ValueError, "query_bits must be in 1..4, got 5"),
        ([zeros(1, 1, 8, 32), None, True], TypeError, "query_bits must be an int, got bool"),
        ([zeros(1, 1, 8, 32), None, 4, 1], TypeError, "key_norms must be a bool, got int"),
        (
            [zeros(1, 1, 8, 32), None, 4, False, {"a": 1}],
            TypeError,
            "must hold strings by name",
        ),
        (
            [zeros(1, 1, 8, 32), None, 4, False, {"num_bits": "1"}],
            ValueError,
            "must not name any of",
        ),
        (
            [zeros(2, 1, 8, 64), None, 4, False, {}, (64,)],
            ValueError,
            "layer_bits must have num_layers=2 entries, got (64,)",
        ),
        (
            [zeros(1, 1, 8, 64), None, 4, False, {}, (96,)],
            ValueError,
            "must be in 32..64",
        ),
        (
            [zeros(1, 1, 8, 64), None, 4, False, {}, (40,)],
            ValueError,
            "of 32, got 40",
        ),
    ],
)
def test_rejects_what_are_no_weights(
    arguments: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        HashWeights(*arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_bits": 16}, "num_bits must be in 32..256, got 16"),
        ({"num_bits": 40}, "num_bits must be a multiple of 32, got 40"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_rejects_sizes_of_random_weights(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HashWeights.random(**{**SHAPE, **sizes})


def test_rejects_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    weights = HashWeights(key_weights())
    with pytest.raises(ValueError, match="path must lie in an existing folder, got"):
        save_weights(tmp_path / "missing" / "hash.safetensors", weights)
    with pytest.raises(ValueError, match="path must name a file, got"):
        save_weights(tmp_path, weights)
    with pytest.raises(TypeError, match="weights must be HashWeights, got Tensor"):
        save_weights(tmp_path / "hash.safetensors", key_weights())  # type: ignore[arg-type]


def test_rejects_a_file_that_is_missing_or_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "hash.safetensors"
    with pytest.raises(ValueError, match="path must name an existing file, got"):
        load_weights(path)
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match="path must be a safetensors file, got"):
        load_weights(path)
    save_file({"key_weights": key_weights()}, path)
    with pytest.raises(ValueError, match=r'have "format": "hata\.hash_weights" in its metadata'):
        load_weights(path)
    save_file({"query_weights": key_weights()}, path, metadata=METADATA)
    with pytest.raises(ValueError, match=r"must hold key_weights, got \['query_weights'\]"):
        load_weights(path)
    save_file({"key_weights": key_weights()}, path, metadata={**METADATA, "head_dim": "64"})
    with pytest.raises(ValueError, match="head_dim must be 40 in the metadata, got 64"):
        load_weights(path)


@pytest.mark.parametrize("size", ["num_layers", "num_kv_heads", "head_dim"])
def test_rejects_the_weights_of_another_model(size: str) -> None:
    sizes = {name: SHAPE[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
    weights = HashWeights(key_weights())
    assert weights.for_model("enable", **sizes) is weights
    rule = r"hata\.enable: weights must be for the model's .*, got"
    with pytest.raises(ValueError, match=rule):
        weights.for_model("enable", **{**sizes, size: SHAPE[size] + 1})


def test_weights_say_which_layers_of_a_model_they_are_for(tmp_path: Path) -> None:
    path, bits = tmp_path / "hash.safetensors", (64, 32, 96)
    layers = [torch.randn(3, 40, num_bits) for num_bits in bits]
    whole = HashWeights.from_layers(layers, layers)
    sizes = {"num_layers": 3, "num_kv_heads": 3, "head_dim": 40}
    some = whole.for_model("enable", **sizes, layers=(0, 1))
    assert (some.layers, some.layer_bits, some.num_bits) == ((0, 1), (64, 32), 64)
    save_weights(path, whole.for_model("enable", **sizes, layers=(1, 2)))
    loaded = load_weights(path)
    assert loaded.layers == (1, 2)
    assert "layers" not in loaded.metadata
    for i, layer_idx in enumerate(loaded.layers):
        found = loaded.layer(i, torch.float32, torch.device("cpu"))
        assert_equal(found[0], layers[layer_idx])
        assert_equal(found[1], layers[layer_idx])
    with pytest.raises(ValueError, match=r"for the model's 3 layers, got layers \[1, 2\]"):
        loaded.for_model("enable", **sizes)
    with pytest.raises(ValueError, match=r"layers must be num_layers=3 ascending indices"):
        HashWeights.from_layers(layers, layers=(0, 2, 1))


def test_a_file_of_before_the_code_format_was_always_saved_loads(tmp_path: Path) -> None:
    path = tmp_path / "hash.safetensors"
    save_file({"key_weights": key_weights()}, path, metadata=METADATA)
    loaded = load_weights(path)
    assert (loaded.query_bits, loaded.key_norms) == (4, False)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"query_bits": "5"}, "query_bits must be 1 to 4, got 5"),
        ({"key_norms": "yes"}, "key_norms must be true or false, got yes"),
    ],
)
def test_rejects_a_code_format_that_there_is_not(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "hash.safetensors"
    save_file({"key_weights": key_weights()}, path, metadata={**METADATA, **metadata})
    with pytest.raises(ValueError, match=message):
        load_weights(path)


def test_copies_share_their_tensors() -> None:
    weights = HashWeights(key_weights())
    assert copy.deepcopy([weights])[0] is weights


def layers_of(num_bits: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(3, 40, bits) for bits in num_bits]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_bits", [(32, 96, 64), (64, 64)])
def test_layers_of_different_bits_are_saved_and_loaded(
    tmp_path: Path, num_bits: tuple[int, ...], tied: bool
) -> None:
    keys, queries = layers_of(num_bits), None if tied else layers_of(num_bits)
    weights = HashWeights.from_layers(keys, queries, metadata={"origin": "a test"})
    assert weights.layer_bits == num_bits
    assert weights.num_bits == max(num_bits)
    save_weights(tmp_path / "hash.safetensors", weights)
    loaded = load_weights(tmp_path / "hash.safetensors")
    assert loaded.layer_bits == num_bits
    assert loaded.metadata == {"origin": "a test"}
    for i, key_layer in enumerate(keys):
        found = loaded.layer(i, torch.float32, torch.device("cpu"))
        assert_equal(found[0], key_layer)
        assert_equal(found[1], key_layer if queries is None else queries[i])


def test_a_layer_can_use_fewer_columns_than_there_are(tmp_path: Path) -> None:
    weights = HashWeights(key_weights(), layer_bits=(64, 64))
    found, _ = weights.layer(1, torch.float32, torch.device("cpu"))
    assert_equal(found, weights.key_weights[1, ..., :64])
    save_weights(tmp_path / "hash.safetensors", weights)
    assert load_weights(tmp_path / "hash.safetensors").num_bits == 64


def test_random_weights_of_different_bits() -> None:
    weights = HashWeights.random(**{**SHAPE, "num_bits": (32, 96)})
    assert weights.layer_bits == (32, 96)
    assert weights.shape == tuple(SHAPE.values())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (([],), "key_weights must hold [num_kv_heads, head_dim, num_bits] tensors"),
        (
            ([*layers_of((32,)), torch.zeros(2, 40, 32)],),
            "num_bits alone varying, got [[3, 40, 32]",
        ),
        ((layers_of((32, 64)), layers_of((32, 96))), "query_weights must have the num_bits of key"),
    ],
)
def test_rejects_layers_that_do_not_go_together(layers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HashWeights.from_layers(*layers)


def test_rejects_a_file_whose_layers_are_not_those_of_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "hash.safetensors"
    tensors = {f"key_weights.{i}": layer for i, layer in enumerate(layers_of((32, 96)))}
    save_file(tensors, path, metadata={**METADATA, "num_bits": "32,64"})
    with pytest.raises(ValueError, match="num_bits must be 32,96 in the metadata, got 32,64"):
        load_weights(path)


def test_half_the_space_costs_only_rounding(tmp_path: Path) -> None:
    weights = HashWeights(key_weights(), key_weights())
    save_weights(tmp_path / "hash.safetensors", weights, dtype=torch.float16)
    loaded = load_weights(tmp_path / "hash.safetensors")
    assert_equal(loaded.key_weights, weights.key_weights.half().float())
    assert (tmp_path / "hash.safetensors").stat().st_size < 0.6 * weights.key_weights.nbytes * 2
    with pytest.raises(ValueError, match=r"save_weights: dtype must be one of .* got torch.int8"):
        save_weights(tmp_path / "hash.safetensors", weights, dtype=torch.int8)
