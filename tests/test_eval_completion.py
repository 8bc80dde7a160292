"""Completing attention: what a selection leaves out, as one more position."""

import math

import pytest
import torch

from hata import HashWeights
from hata.eval.completion import COMPLETIONS, Completion, complete
from hata.eval.decode import SparseDecoder
from hata.eval.setting import DENSE, Setting
from hata.integrations.model_shape import model_shape
from hata.selectors import HataSelector, Softmax
from hata.selectors.selector import products
from tiny_models import make_model, random_prompt

Q_LEN, KV_HEADS, GROUP, SEQ_LEN, HEAD_DIM = 3, 2, 4, 90, 16
KNOWN = COMPLETIONS["known"]


class Attention:
    """Random queries and keys, the same on every device, and the 20 best positions.

    Logits are linear in the scores.
    """

    def __init__(self, device: str, slope: float = 0.4, sinks: bool = False) -> None:
        self.positions = torch.arange(SEQ_LEN - Q_LEN, SEQ_LEN, device=device)
        self.scores = torch.randint(-9, 10, (1, KV_HEADS, SEQ_LEN)).float().to(device)
        self.scores = self.scores.repeat(Q_LEN, 1, 1)
        self.k = torch.randn(SEQ_LEN, KV_HEADS, HEAD_DIM).to(device)
        self.k[:, :, 0] = self.scores[0].T
        self.q = torch.zeros(Q_LEN, KV_HEADS, GROUP, HEAD_DIM, device=device)
        self.q[..., 0] = slope * torch.rand(Q_LEN, KV_HEADS, GROUP).to(device)
        sink = torch.randn(KV_HEADS, GROUP).to(device) if sinks else None
        self.softmax = Softmax(1.0, sink_logits=sink)
        self.selected = torch.zeros_like(self.scores, dtype=torch.bool)
        self.selected.scatter_(2, self.scores[:, :, : SEQ_LEN - Q_LEN].topk(20).indices, True)

    def rest(self, completion: Completion) -> torch.Tensor:
        of = (self.q, self.k, self.scores, self.selected, self.positions, self.softmax)
        return completion.rest(*of)


@pytest.mark.parametrize("sinks", [False, True])
def test_the_known_mass_is_what_dense_attention_pays_the_others(device, sinks):
    attention = Attention(device, sinks=sinks)
    attention.q.normal_()
    shares = attention.softmax.shares(products(attention.q, attention.k), attention.positions)
    left = shares.masked_fill(attention.selected[:, :, None], 0.0).sum(-1)
    torch.testing.assert_close(attention.rest(KNOWN), left)
    attention.selected[:] = True
    assert (attention.rest(KNOWN) == 0).all()


def test_the_estimate_is_right_where_logits_are_linear_in_scores(device):
    attention = Attention(device)
    known = attention.rest(KNOWN)
    torch.testing.assert_close(attention.rest(Completion(cap=math.inf)), known)
    assert known.min() > 0.2  # above both caps
    for name in ("estimate", "cap"):
        cap = COMPLETIONS[name].cap
        expected = torch.full_like(known, cap / (1 + cap))
        torch.testing.assert_close(attention.rest(COMPLETIONS[name]), expected)


def test_a_falling_line_is_taken_as_level(device):
    """Each position that is left out then counts as the mean logit of the selected ones."""
    attention = Attention(device, slope=-0.4)
    logits = products(attention.q, attention.k)
    kept = attention.selected[:, :, None]
    mean = logits.where(kept, 0.0).sum(-1) / 20
    mass = logits.masked_fill(~kept, -torch.inf).logsumexp(-1)
    left = attention.positions[:, None, None] + 1 - 20
    expected = torch.sigmoid(mean + left.log() - mass)
    torch.testing.assert_close(attention.rest(Completion(cap=math.inf)), expected)


def test_a_head_that_attends_to_few_positions_is_not_completed(device):
    attention = Attention(device, slope=0.0)  # level: each selected position counts
    attention.q[:, :, 0, 1] = 30.0  # but for the first head of a group
    rest = attention.rest(COMPLETIONS["spread"])
    assert (rest[:, :, 0] == 0).all()
    torch.testing.assert_close(rest[:, :, 1:], attention.rest(COMPLETIONS["estimate"])[:, :, 1:])


def test_the_rest_has_the_mean_of_the_values_that_a_token_sees(device):
    out = torch.randn(1, Q_LEN, KV_HEADS * GROUP, HEAD_DIM, device=device)
    v = torch.randn(1, KV_HEADS, SEQ_LEN, HEAD_DIM, device=device)
    rest = torch.rand(Q_LEN, KV_HEADS, GROUP, device=device)
    found = complete(out, v, rest)
    for i in range(Q_LEN):
        mean = v[0, :, : SEQ_LEN - Q_LEN + i + 1].mean(1).repeat_interleave(GROUP, 0)
        w = rest[i].flatten()[:, None]
        torch.testing.assert_close(found[0, i], (1 - w) * out[0, i] + w * mean)


def test_decoding_is_completed_token_by_token(device):
    """It changes logits, no later token is heard, and a budget of everything leaves no rest."""
    model = make_model("llama-group4", device)
    tokens = random_prompt(1, 79, device)[0].tolist()
    selector = HataSelector(HashWeights.random(**model_shape(model), num_bits=64))
    decoder = SparseDecoder(model)
    decoder.read(tokens[:70])
    plain = decoder.decode(tokens[70:], Setting(selector, 12, 1, 2, 4))
    setting = Setting(selector, 12, 1, 2, 4, completion=COMPLETIONS["estimate"])
    found = decoder.decode(tokens[70:], setting)
    assert (found - plain).abs().max() > 1e-3
    shorter = decoder.decode(tokens[70:74], setting)
    torch.testing.assert_close(shorter, found[:4], rtol=1e-4, atol=1e-4)
    everything = decoder.decode(tokens[70:], Setting(selector, 80, completion=KNOWN))
    dense = decoder.decode(tokens[70:], DENSE)
    torch.testing.assert_close(everything, dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="share_selection must be 1 with a completion, got 2"):
        Setting(selector, 12, share_selection=2, completion=KNOWN)
