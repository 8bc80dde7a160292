import pytest
import torch

from cases import integer_vectors, random_vectors, strided
from closeness import assert_bits_within_rounding, assert_equal, projection_bound
from hata import hash_encode, reference


def exact_projections(keys: torch.Tensor, key_weights: torch.Tensor) -> tuple:
    """The exact projections ``[batch, num_kv_heads, seq_len, num_bits]`` and their error bounds."""
    x = keys.transpose(1, 2)
    return x.double() @ key_weights.double(), projection_bound(x, key_weights)


@pytest.mark.parametrize(
    ("head_dim", "num_bits"),
    [*((64, n) for n in range(32, 257, 32)), (96, 64), (128, 128), (192, 96), (256, 256)],
)
def test_bits_are_the_signs_of_the_projections(device, dtype, head_dim, num_bits):
    keys = random_vectors(2, 37, 3, head_dim, dtype=dtype, device=device)
    key_weights = random_vectors(3, head_dim, num_bits, dtype=dtype, device=device)
    codes = hash_encode(keys, key_weights)
    assert codes.dtype == torch.int32
    assert codes.shape == (2, 3, 37, num_bits // 32)
    assert codes.is_contiguous()
    z, bound = exact_projections(keys, key_weights)
    assert_bits_within_rounding(reference.unpack_bits(codes), z, bound)


def test_matches_the_reference_where_projections_are_exact(device, dtype):
    keys = integer_vectors(2, 19, 2, 64, dtype=dtype, device=device)
    key_weights = integer_vectors(2, 64, 96, dtype=dtype, device=device)
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    expected_codes, expected_norms = reference.hash_encode(keys, key_weights, key_norms=True)
    assert_equal(codes, expected_codes)
    assert_equal(norms, expected_norms)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
def test_norms_are_rounded_once(device, dtype, head_dim):
    keys = random_vectors(2, 37, 3, head_dim, dtype=dtype, device=device)
    key_weights = random_vectors(3, head_dim, 32, dtype=dtype, device=device)
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    assert_equal(codes, hash_encode(keys, key_weights))
    exact = keys.double().norm(dim=-1).transpose(1, 2)
    # Half a unit of float16, and the float32 sum's rounding before it.
    allowed = exact * (2.0**-11 + head_dim * 2.0**-24)
    assert norms.dtype == torch.float16
    assert ((norms.double() - exact).abs() <= allowed).all()


def test_norms_saturate_at_the_largest_float16(device):
    keys = torch.full((1, 1, 1, 64), 60000.0, dtype=torch.float16, device=device)
    key_weights = random_vectors(1, 64, 32, dtype=torch.float16, device=device)
    _, norms = hash_encode(keys, key_weights, key_norms=True)
    assert norms.item() == 65504.0


def test_bits_are_packed_lowest_first(device):
    keys = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device=device)
    keys[..., 0] = 1
    key_weights = torch.full((1, 64, 64), -1.0, dtype=torch.float16, device=device)
    key_weights[:, :, 0] = 1
    key_weights[:, :, 33] = 1
    key_weights[:, :, 63] = 1
    assert hash_encode(keys, key_weights).flatten().tolist() == [1, 2 - 2**31]


def test_a_zero_projection_clears_the_bit(device, dtype):
    keys = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device)
    key_weights = random_vectors(1, 64, 64, dtype=dtype, device=device)
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    assert codes.flatten().tolist() == [0, 0]
    assert norms.item() == 0


def test_a_key_has_one_code_wherever_it_stands(device, dtype):
    """The same key alone, in a prompt of any length, in any sequence and head."""
    key_weights = random_vectors(1, 128, 96, dtype=dtype, device=device).expand(3, -1, -1)
    key_weights = key_weights.contiguous()
    keys = random_vectors(1, 131, 1, 128, dtype=dtype, device=device)
    keys = keys.expand(4, -1, 3, -1).contiguous()
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    for length in (1, 15, 16, 17, 64, 130):
        some_codes, some_norms = hash_encode(keys[:, :length], key_weights, key_norms=True)
        assert_equal(some_codes, codes[:, :, :length])
        assert_equal(some_norms, norms[:, :, :length])
    for position in range(0, 131, 10):
        alone = keys[2:3, position : position + 1]
        assert_equal(
            hash_encode(alone, key_weights), codes[:1, :1, position, None].expand(-1, 3, -1, -1)
        )
    assert_equal(codes, codes[:1, :1].expand_as(codes))


def test_reads_strided_keys(device, dtype):
    keys = random_vectors(2, 20, 3, 64, dtype=dtype, device=device)
    key_weights = random_vectors(3, 64, 64, dtype=dtype, device=device)
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    for same in (strided(keys), keys.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not same.is_contiguous()
        same_codes, same_norms = hash_encode(same, key_weights, key_norms=True)
        assert_equal(same_codes, codes)
        assert_equal(same_norms, norms)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64)])
def test_accepts_no_keys(device, shape):
    keys = random_vectors(*shape, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 32, dtype=torch.float16, device=device)
    codes, norms = hash_encode(keys, key_weights, key_norms=True)
    assert codes.shape == (shape[0], 2, shape[1], 1)
    assert norms.shape == (shape[0], 2, shape[1])


def test_batch_past_65535(device):
    keys = random_vectors(7, 1, 1, 64, dtype=torch.float16, device=device).repeat(10_000, 1, 1, 1)
    key_weights = random_vectors(1, 64, 32, dtype=torch.float16, device=device)
    codes = hash_encode(keys, key_weights)
    assert_equal(codes, hash_encode(keys[:7], key_weights).repeat(10_000, 1, 1, 1))


@pytest.mark.parametrize("key_norms", [False, True])
def test_opcheck(device, key_norms):
    keys = random_vectors(2, 5, 2, 64, dtype=torch.float16, device=device)
    key_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    torch.library.opcheck(torch.ops.hata.hash_encode.default, (keys, key_weights, key_norms))
