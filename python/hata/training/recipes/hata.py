"""Recipe `hata`: the dense attention distribution, distilled into the hash score."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hata.checks import check, check_int
from hata.reference.bits import quantize
from hata.training.data import TrainingData
from hata.training.recipes.fit import Fit, Recipe, generator_of, orthogonal, sign

_WARM_UP = 10  # steps until the learning rate has its full height
_HIDDEN = -1e30  # the logit of a key that is not contested; finite, for queries without any
_FEWEST_KEYS = 16  # of a step; every eighth tells how far the scores spread
_LOGSUMEXP_ROWS = 128  # query tokens at once, which bounds memory


@dataclass(frozen=True)
class HataRecipe(Recipe):
    """Distillation with straight-through signs, for the decoder's own asymmetric score.

    Each step takes `num_queries` query tokens of one sequence and `num_keys` of its keys. The
    teacher p is the attention that the group's heads pay each key on average; the student is the
    hash score times a learned temperature. The first `num_sink` and last `num_recent` positions
    are always selected, so they are left out of both. Two gradients with respect to the score are
    mixed, both scaled by the mass that is at stake for the query:

    - cross-entropy, ``softmax(score) - p^power / Σ p^power``;
    - of the mass that a budget catches, ``(mean - p) bell``: a bell around the score of the last
      key that a budget selects, and the mean of p under it, so that the number of selected keys
      stays. What lies along the scores themselves is taken out: the bell is as wide as they spread,
      and what is selected does not depend on their scale. Budgets are drawn log-uniformly. It sets
      in when the codes have settled.

    Signs pass gradients as ``tanh(slope x)`` would, the quantized query as if it were not. Keys and
    queries have weights of their own, which begin as the same random rotation.

    Attributes:
        num_steps: Steps, with Adam and a cosine schedule.
        num_queries: Query tokens of a step.
        num_keys: Keys of a step.
        learning_rate: Relative to the root mean square of a head's weights.
        slope_first: Of the tanh in the first step, for projections of root mean square 1.
        slope_last: Of the tanh in the last step.
        power: Of the teacher's probabilities; below 1 the less likely keys count more.
        mass_weight: Of the second gradient.
        mass_from: Share of the steps after which it sets in.
        budget_first: The smallest budget, as a share of the keys that a query sees.
        budget_last: The largest.
        width: Of the bell, in standard deviations of a query's scores.
    """

    name: ClassVar[str] = "hata"

    num_steps: int = 1200
    num_queries: int = 64
    num_keys: int = 2048
    learning_rate: float = 0.25
    slope_first: float = 1.0
    slope_last: float = 4.0
    power: float = 0.7
    mass_weight: float = 0.5
    mass_from: float = 0.5
    budget_first: float = 0.01
    budget_last: float = 0.08
    width: float = 0.3

    def __post_init__(self) -> None:
        """Checks the rules of this recipe."""
        super().__post_init__()
        rule = "be False: recipe hata learns scores without norms"
        check(not self.key_norms, "train", "key_norms", rule, self.key_norms)
        check_int("train", "num_steps", self.num_steps, 1)
        check_int("train", "num_keys", self.num_keys, _FEWEST_KEYS)

    def head_bytes(self, shape: tuple[int, int, int, int, int, int]) -> int:
        """Logsumexps, and what a step holds for every pair and for every bit of a key."""
        num_sequences, num_queries, group, _, seq_len, _ = shape
        pairs = min(self.num_queries, num_queries) * min(self.num_keys, seq_len)
        once = _LOGSUMEXP_ROWS * seq_len * 2
        bits = min(self.num_keys, seq_len) * self.num_bits
        return 4 * (num_sequences * num_queries * group + max(10 * pairs + 8 * bits, once))

    def fit(self, data: TrainingData) -> "HataFit":
        """Draws the first weights."""
        return HataFit(self, data)


class HataFit(Fit):
    """The weights of recipe `hata` in training.

    Projections are ``x @ (scale * weights)``: the weights have root mean square 1, so that one
    learning rate suits every head.
    """

    def __init__(self, recipe: HataRecipe, data: TrainingData) -> None:
        super().__init__()
        self.recipe = recipe
        weights = orthogonal(data, recipe.num_bits, recipe.seed)
        size = weights.square().mean((1, 2), keepdim=True).sqrt()
        self.key_weights = torch.nn.Parameter(weights / size)
        self.query_weights = torch.nn.Parameter(weights / size)
        self.log_temperature = torch.nn.Parameter(torch.zeros(data.heads, 1, 1).to(weights))
        self.key_scale = torch.nn.Buffer(1 / _projected_size(data.k, self.key_weights))
        self.query_scale = torch.nn.Buffer(1 / _projected_size(data.q.sum(3), self.query_weights))
        self.log_sums = torch.nn.Buffer(_log_sums(data), persistent=False)
        self._positions = data.positions.cpu()  # to draw by, so that no step waits for a GPU
        with torch.no_grad():
            self.log_temperature.copy_(self._first_temperature(data))

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam; `step` sets the rates."""
        groups: list[dict[str, Any]] = [
            {"params": [self.key_weights, self.query_weights], "rate": self.recipe.learning_rate},
            {"params": [self.log_temperature], "rate": 0.02},
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.98))

    def step(self, data: TrainingData, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        """One step on some queries and keys of one sequence."""
        recipe = self.recipe
        done = step / recipe.num_steps
        height = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * height
        slope = recipe.slope_first * (recipe.slope_last / recipe.slope_first) ** done
        generator = generator_of(recipe.seed, step)
        sequence_idx, rows, keys = self._draw(data, generator)
        p, contested = self._teacher(data, sequence_idx, rows, keys)
        logits = self._logits(data, sequence_idx, rows, keys, slope)
        with torch.no_grad():
            at_stake = p.sum(-1, keepdim=True)
            shown = logits.masked_fill(~contested, _HIDDEN)
            target = p**recipe.power
            target *= at_stake / target.sum(-1, keepdim=True).clamp(min=1e-30)
            log_q = shown.log_softmax(-1)
            gradient = log_q.exp() * at_stake - target
            loss = -(target * log_q).sum(-1).mean(-1)
            if done >= recipe.mass_from and recipe.mass_weight > 0:
                draw = float(torch.rand((), generator=generator))
                span = recipe.budget_last / recipe.budget_first
                share = recipe.budget_first * span**draw
                caught = self._mass_gradient(shown, logits, p, contested, share)
                gradient.lerp_(caught, recipe.mass_weight)
            gradient /= at_stake.mean((1, 2), keepdim=True).clamp(min=1e-30) * len(rows)
        optimizer.zero_grad()
        logits.backward(gradient)
        optimizer.step()
        return loss

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor]:
        """Returns the weights; their scale does not matter to codes."""
        return self.key_weights * self.key_scale, self.query_weights * self.query_scale

    def _draw(self, data: TrainingData, generator: torch.Generator) -> tuple[int, Tensor, Tensor]:
        """Draws a sequence, rows of its queries and positions of its keys."""
        sequence_idx = int(torch.randint(data.num_sequences, (), generator=generator))
        available = data.positions.shape[1]
        rows = torch.randperm(available, generator=generator)[: self.recipe.num_queries]
        last = int(self._positions[sequence_idx, rows].max())
        keys = torch.randperm(last + 1, generator=generator)[: self.recipe.num_keys]
        device = data.k.device
        return sequence_idx, rows.to(device), keys.sort().values.to(device)

    def _teacher(
        self, data: TrainingData, sequence_idx: int, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the group's mean attention, 0 where not contested, and where it is.

        Shapes ``[heads, num_rows, num_keys]`` and ``[num_rows, num_keys]``.
        """
        last = data.positions[sequence_idx, rows, None] - data.num_recent
        contested = (keys <= last) & (keys >= data.num_sink)
        k = data.k[sequence_idx, :, keys].transpose(1, 2)
        q = data.q[sequence_idx, :, rows] * data.softmax.scale
        log_sums = self.log_sums[sequence_idx, :, rows]
        p = torch.zeros(data.heads, len(rows), len(keys), device=k.device)
        for group_idx in range(q.shape[2]):  # one head of the group at a time, to save memory
            logits = data.softmax.cap_(torch.bmm(q[:, :, group_idx], k))
            p += logits.sub_(log_sums[:, :, group_idx, None]).exp_()
        # Not multiplied: exp is infinite where a key after the query far outweighs all it sees.
        return p.div_(q.shape[2]).masked_fill_(~contested, 0), contested

    def _logits(
        self, data: TrainingData, sequence_idx: int, rows: Tensor, keys: Tensor, slope: float
    ) -> Tensor:
        """Returns the student's logits, ``[heads, num_rows, num_keys]``."""
        x = torch.bmm(data.k[sequence_idx, :, keys], self.key_weights * self.key_scale)
        q, weights = data.q[sequence_idx, :, rows], self.query_weights * self.query_scale
        if self.recipe.query_bits == 1:
            z = torch.bmm(q.flatten(1, 2), weights)
            c = _Sign.apply(z, slope).unflatten(1, q.shape[1:3]).sum(2)
        else:
            z = torch.bmm(q.sum(2), weights)
            with torch.no_grad():
                weight_sum = 2**self.recipe.query_bits - 1
                step = z.abs().amax(-1, keepdim=True) / weight_sum
                error = (2 * quantize(z, weight_sum) - weight_sum) * step - z
            c = z + error
        score = torch.bmm(c, _Sign.apply(x, slope).transpose(1, 2))
        return score * self.log_temperature.exp()

    def _mass_gradient(
        self, shown: Tensor, logits: Tensor, p: Tensor, contested: Tensor, share: float
    ) -> Tensor:
        """Returns minus the gradient of the mass that the best ``share`` of a row's keys hold."""
        most = max(1, int(share * shown.shape[-1]))
        counts = (share * contested.sum(-1)).long().clamp(1, most)
        best = shown.topk(most, -1).values
        cut = best.gather(-1, (counts[:, None] - 1).expand(len(p), -1, -1))
        spread = logits[..., ::8].std(-1, keepdim=True).clamp(min=1e-6)  # 0 where codes are equal
        width = self.recipe.width * spread
        bell = torch.sigmoid((shown - cut) / width)
        bell = bell * (1 - bell)
        mean = (p * bell).sum(-1, keepdim=True) / bell.sum(-1, keepdim=True)
        gradient = (mean - p).mul_(bell).mul_(4)
        # Left in, this part would raise temperature and query weights without end.
        seen = contested.sum(-1, keepdim=True).clamp(min=1)
        centred = (logits - (logits * contested).sum(-1, keepdim=True) / seen).mul_(contested)
        along = (gradient * centred).sum(-1, keepdim=True)
        along /= centred.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return gradient.addcmul_(centred, along, value=-1)

    def _first_temperature(self, data: TrainingData) -> Tensor:
        """Returns the log temperature that fits scores to logits of the group's mean query."""
        sequence_idx, rows, keys = self._draw(data, generator_of(self.recipe.seed, -1))
        score = self._logits(data, sequence_idx, rows, keys, 1.0)
        mean_q = data.q[sequence_idx, :, rows].mean(2) * data.softmax.scale
        k = data.k[sequence_idx, :, keys].transpose(1, 2)
        wanted = data.softmax.cap_(torch.bmm(mean_q, k))
        score = score - score.mean(-1, keepdim=True)
        wanted = wanted - wanted.mean(-1, keepdim=True)
        ratio = (score * wanted).sum((1, 2)) / score.square().sum((1, 2)).clamp(min=1e-30)
        return ratio.clamp(min=1e-4).log()[:, None, None]


class _Sign(torch.autograd.Function):
    """+1 and -1, with the gradient of ``tanh(slope x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        soft = torch.tanh(ctx.slope * x)
        return gradient * (1 - soft * soft) * ctx.slope, None


def _projected_size(x: Tensor, weights: Tensor) -> Tensor:
    """Returns the root mean square of each projection, ``[heads, 1, num_bits]``."""
    moments = sum(rows.transpose(1, 2) @ rows for rows in x) / (x.shape[0] * x.shape[2])
    return (weights * (moments @ weights)).sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def _log_sums(data: TrainingData) -> Tensor:
    """Returns the logarithms of the softmax's denominators.

    ``[num_sequences, heads, num_queries, group]``: over every key that a query sees, and its sink.
    """
    sums = torch.empty(data.q.shape[:-1], device=data.q.device)
    for sequence_idx in range(data.num_sequences):
        k = data.k[sequence_idx].transpose(1, 2)
        for start in range(0, data.positions.shape[1], _LOGSUMEXP_ROWS):
            rows = slice(start, start + _LOGSUMEXP_ROWS)
            hidden = ~data.visible(sequence_idx, rows)
            for group_idx in range(data.q.shape[3]):
                q = data.q[sequence_idx, :, rows, group_idx] * data.softmax.scale
                logits = data.softmax.cap_(torch.bmm(q, k)).masked_fill_(hidden, -torch.inf)
                sums[sequence_idx, :, rows, group_idx] = logits.logsumexp(-1)
    sinks = data.softmax.sink_logits  # [heads, group]
    return sums if sinks is None else torch.logaddexp(sums, sinks[:, None])
