import pytest
import torch

from cases import integer_vectors, random_vectors, strided
from closeness import assert_equal, projection_bound
from hata import encode_query, num_planes, plane_weight_sum, reference

GROUPS = [1, 3, 4, 5, 7, 8, 12, 16, 20]


def levels_of(planes: torch.Tensor, weight_sum: int) -> torch.Tensor:
    return (reference.unpack_planes(planes, weight_sum) + weight_sum) // 2


def assert_levels_within_rounding(
    planes: torch.Tensor, q: torch.Tensor, query_weights: torch.Tensor, query_bits: int
) -> None:
    """Levels are the reference's, but where a projection is within rounding of a boundary."""
    group = q.shape[2] // query_weights.shape[0]
    heads = q.unflatten(2, (-1, group)).double()  # [batch, q_len, num_kv_heads, group, head_dim]
    weights = query_weights.double()
    if query_bits == 1:
        z = torch.einsum("bjhgd,hdi->bjhgi", heads, weights)
        bound = projection_bound(heads, query_weights)
        within = z.abs() <= bound
        level = levels_of(planes, group)
        assert (level >= ((z > 0) & ~within).sum(3)).all()
        assert (level <= ((z > 0) | within).sum(3)).all()
        return
    largest_level = 2**query_bits - 1
    z = torch.einsum("bjhgd,hdi->bjhi", heads, weights)
    # The sum over the group rounds as well: group - 1 more terms.
    magnitudes = heads.abs().sum(3)
    bound = (q.shape[3] + group) * 2.0**-23 * (magnitudes.unsqueeze(3) @ weights.abs()).squeeze(3)
    largest = z.abs().amax(-1, keepdim=True)
    boundary = (z / largest * largest_level + largest_level) / 2 + 0.5
    # A quotient's error: z's and the largest z's; then four float32 roundings of at most 16.
    error = largest_level / 2 * (bound + bound.amax(-1, keepdim=True)) / largest + 4 * 16 * 2.0**-24
    expected = reference.quantize(z.float(), largest_level)
    wrong = levels_of(planes, largest_level) != expected
    assert not (wrong & ((boundary - boundary.round()).abs() > error)).any()
    assert ((levels_of(planes, largest_level) - expected).abs() <= 1).all()


@pytest.mark.parametrize("query_bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("head_dim", "num_bits"), [(64, 64), (96, 32), (128, 128), (256, 256)])
def test_matches_the_reference(device, dtype, head_dim, num_bits, query_bits):
    q = random_vectors(2, 3, 8, head_dim, dtype=dtype, device=device)
    query_weights = random_vectors(2, head_dim, num_bits, dtype=dtype, device=device)
    planes = encode_query(q, query_weights, query_bits=query_bits)
    weight_sum = plane_weight_sum(query_bits, 4)
    assert planes.dtype == torch.int32
    assert planes.shape == (2, 3, 2, num_planes(weight_sum), num_bits // 32)
    assert_levels_within_rounding(planes, q, query_weights, query_bits)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("query_bits", [1, 4])
def test_any_group_size(device, group, query_bits):
    q = random_vectors(1, 2, 2 * group, 64, dtype=torch.bfloat16, device=device)
    query_weights = random_vectors(2, 64, 96, dtype=torch.bfloat16, device=device)
    planes = encode_query(q, query_weights, query_bits=query_bits)
    assert_levels_within_rounding(planes, q, query_weights, query_bits)


@pytest.mark.parametrize("num_bits", range(32, 257, 32))
def test_any_number_of_bits(device, num_bits):
    q = random_vectors(1, 2, 6, 192, dtype=torch.float16, device=device)
    query_weights = random_vectors(2, 192, num_bits, dtype=torch.float16, device=device)
    for query_bits in (1, 3):
        planes = encode_query(q, query_weights, query_bits=query_bits)
        assert_levels_within_rounding(planes, q, query_weights, query_bits)


@pytest.mark.parametrize("query_bits", [1, 2, 3, 4])
def test_equals_the_reference_where_projections_are_exact(device, dtype, query_bits):
    """Also the levels at the very boundaries, where the rounding rule decides."""
    q = integer_vectors(4, 2, 6, 64, dtype=dtype, device=device)
    query_weights = torch.randint(-1, 2, (2, 64, 96)).to(dtype).to(device)
    planes = encode_query(q, query_weights, query_bits=query_bits)
    assert_equal(planes, reference.encode_query(q, query_weights, query_bits=query_bits))


@pytest.mark.parametrize("query_bits", [2, 3, 4])
def test_a_zero_projection_rounds_up_and_the_largest_saturate(device, query_bits):
    query_weights = torch.zeros(1, 64, 32, dtype=torch.float16)
    query_weights[0, 0, 0], query_weights[0, 0, 1] = 5, -5
    q = torch.ones(1, 1, 1, 64, dtype=torch.float16)
    planes = encode_query(q.to(device), query_weights.to(device), query_bits=query_bits)
    largest = 2**query_bits - 1
    c = reference.unpack_planes(planes.cpu(), largest).flatten()
    assert c.tolist() == [largest, -largest, *[1] * 30]


def test_all_zero_queries(device, dtype):
    q = torch.zeros(1, 1, 4, 64, dtype=dtype, device=device)
    query_weights = random_vectors(2, 64, 32, dtype=dtype, device=device)
    for query_bits in (2, 3, 4):
        c = reference.unpack_planes(
            encode_query(q, query_weights, query_bits=query_bits), 2**query_bits - 1
        )
        assert (c == 1).all()
    assert (reference.unpack_planes(encode_query(q, query_weights, query_bits=1), 2) == -2).all()


def test_tokens_do_not_depend_on_each_other(device, dtype):
    q = random_vectors(3, 5, 6, 64, dtype=dtype, device=device)
    query_weights = random_vectors(2, 64, 64, dtype=dtype, device=device)
    for query_bits in (1, 4):
        planes = encode_query(q, query_weights, query_bits=query_bits)
        assert_equal(encode_query(strided(q), query_weights, query_bits=query_bits), planes)
        for b in range(3):
            for j in range(5):
                alone = encode_query(q[b : b + 1, j : j + 1], query_weights, query_bits=query_bits)
                assert_equal(alone, planes[b : b + 1, j : j + 1])


@pytest.mark.parametrize("shape", [(0, 1, 4, 64), (2, 0, 4, 64)])
def test_accepts_no_queries(device, shape):
    q = random_vectors(*shape, dtype=torch.float16, device=device)
    query_weights = random_vectors(2, 64, 32, dtype=torch.float16, device=device)
    assert encode_query(q, query_weights, query_bits=4).shape == (*shape[:2], 2, 4, 1)


def test_batch_past_65535(device):
    q = random_vectors(7, 1, 2, 64, dtype=torch.float16, device=device).repeat(10_000, 1, 1, 1)
    query_weights = random_vectors(1, 64, 32, dtype=torch.float16, device=device)
    few = encode_query(q[:7], query_weights, query_bits=4)
    assert_equal(encode_query(q, query_weights, query_bits=4), few.repeat(10_000, 1, 1, 1, 1))


@pytest.mark.parametrize("query_bits", [1, 4])
def test_opcheck(device, query_bits):
    q = random_vectors(2, 3, 6, 64, dtype=torch.float16, device=device)
    query_weights = random_vectors(2, 64, 64, dtype=torch.float16, device=device)
    args = (q, query_weights, query_bits)
    torch.library.opcheck(torch.ops.hata.encode_query.default, args)
