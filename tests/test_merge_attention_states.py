import pytest
import torch

from cases import make_caches, random_indices, random_vectors
from closeness import assert_equal, assert_no_worse_than_pytorch
from hata import gather_attention, merge_attention_states, reference


def random_states(*rows: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple:
    """Two states, some of whose rows are empty in one, the other or both."""
    outs = [random_vectors(*rows, head_dim, dtype=dtype, device=device) for _ in range(2)]
    lses = [torch.randn(rows).mul(4).to(device) for _ in range(2)]
    for out, lse in zip(outs, lses, strict=True):
        empty = torch.rand(rows, device=device) < 0.3
        out[empty] = 0
        lse[empty] = -torch.inf
    return outs[0], lses[0], outs[1], lses[1]


def plain_merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (x.sub(lse).exp().nan_to_num(0).to(out_a.dtype)[..., None] for x in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


def assert_merges(states: tuple, merged: tuple) -> None:
    out_a, lse_a, out_b, lse_b = states
    truth = reference.merge_attention_states(
        out_a.double(), lse_a.double(), out_b.double(), lse_b.double()
    )
    for actual, plain, exact in zip(merged, plain_merge(*states), truth, strict=True):
        assert_no_worse_than_pytorch(actual, plain, exact)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
def test_matches_the_reference(device, dtype, head_dim):
    states = random_states(3, 2, 5, head_dim=head_dim, dtype=dtype, device=device)
    assert_merges(states, merge_attention_states(*states))


def test_float32_on_every_device(device):
    states = random_states(3, 2, 5, head_dim=64, dtype=torch.float32, device=device)
    assert_merges(states, merge_attention_states(*states))


def test_two_empty_states_are_empty(device, dtype):
    out = torch.zeros(1, 1, 2, 64, dtype=dtype, device=device)
    lse = torch.full((1, 1, 2), -torch.inf, device=device)
    merged_out, merged_lse = merge_attention_states(out, lse, out, lse)
    assert_equal(merged_out, out)
    assert_equal(merged_lse, lse)


def test_an_empty_state_changes_nothing(device, dtype):
    """Whatever its out holds."""
    out = random_vectors(2, 1, 3, 64, dtype=dtype, device=device)
    lse = torch.randn(2, 1, 3).to(device)
    empty_out = torch.full_like(out, torch.nan)
    empty_lse = torch.full_like(lse, -torch.inf)
    for states in ((out, lse, empty_out, empty_lse), (empty_out, empty_lse, out, lse)):
        merged_out, merged_lse = merge_attention_states(*states)
        assert_equal(merged_out, out)
        assert_equal(merged_lse, lse)


def test_states_of_any_size_do_not_overflow(device):
    out_a, out_b = torch.zeros(2, 1, 1, 1, 64, dtype=torch.float16, device=device)
    for lse_a, lse_b in ((3e38, -3e38), (1e4, 1e4 - 1), (-1e4, -1e4)):
        lses = (
            torch.full((1, 1, 1), lse_a, device=device),
            torch.full((1, 1, 1), lse_b, device=device),
        )
        out, lse = merge_attention_states(out_a + 1, lses[0], out_b + 1, lses[1])
        assert_equal(out, out_a + 1)
        torch.testing.assert_close(
            lse, torch.logaddexp(*lses), rtol=2**-22, atol=0
        )  # two roundings


def test_merging_two_halves_equals_attention_over_both(device, dtype):
    caches = make_caches([90, 61], device=device, dtype=dtype)
    q = random_vectors(2, 2, 6, 64, dtype=dtype, device=device)
    indices = random_indices([90, 61], 2, 2, 50, device=device)
    halves = [
        gather_attention(q, *caches.kv, half.contiguous()) for half in indices.split([20, 30], -1)
    ]
    merged = merge_attention_states(*halves[0], *halves[1])
    assert_merges((*halves[0], *halves[1]), merged)
    _, whole_lse = gather_attention(q, *caches.kv, indices)
    # The logits' float32 rounding, of at most 64 products of magnitude |q| |k| / 8.
    torch.testing.assert_close(merged[1], whole_lse, rtol=1e-5, atol=1e-5)


def test_accepts_an_empty_batch(device):
    out = torch.zeros(0, 1, 2, 64, dtype=torch.float16, device=device)
    lse = torch.zeros(0, 1, 2, device=device)
    assert merge_attention_states(out, lse, out, lse)[0].shape == (0, 1, 2, 64)


def test_batch_past_65535(device):
    states = random_states(7, 1, 1, head_dim=64, dtype=torch.float16, device=device)
    few = merge_attention_states(*states)
    out_a, lse_a, out_b, lse_b = (s.repeat(10_000, *[1] * (s.dim() - 1)) for s in states)
    out, lse = merge_attention_states(out_a, lse_a, out_b, lse_b)
    assert_equal(out, few[0].repeat(10_000, 1, 1, 1))
    assert_equal(lse, few[1].repeat(10_000, 1, 1))


def test_opcheck(device):
    states = random_states(2, 3, 5, head_dim=64, dtype=torch.float16, device=device)
    torch.library.opcheck(torch.ops.hata.merge_attention_states.default, states)
