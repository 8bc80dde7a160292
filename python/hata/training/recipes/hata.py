"""Recipe `hata`: the dense attention distribution, distilled into the hash score."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hata.checks import check, check_int
from hata.reference.bits import quantize
from hata.training.data import TrainingData, turned
from hata.training.recipes.fit import Fit, Recipe, generator_of, orthogonal, sign

_WARM_UP = 10  # steps until the learning rate has its full height
_HIDDEN = -1e30  # the logit of a key that is not contested; finite, for queries without any
_FEWEST_KEYS = 16  # of a step, so that a spread of scores can be told
_SURVEY_ROWS = 128  # query tokens at once, which bounds memory
_UNIT = 2**32  # of the odds of keys
_UNIFORM = 0.5  # share of a step's keys that are drawn whatever attention they get


@dataclass(frozen=True)
class HataRecipe(Recipe):
    """Distillation with straight-through signs, for the decoder's own asymmetric score.

    Each step takes `num_queries` query tokens of one sequence and, for each head, `num_keys` of its
    keys: the more often the more they are attended to. A key that is drawn with probability 1/w
    stands for w keys in every sum over keys. The teacher p is the attention that the group's heads
    pay each key on average; the student is the hash score times a learned temperature. The first
    `num_sink` and last `num_recent` positions are always selected, so they are left out of both.
    Two gradients with respect to the score are mixed, both scaled by the mass that is at stake for
    the query:

    - cross-entropy, ``softmax(score) - p^power / Σ p^power``;
    - of the mass that a budget catches, ``(mean - p) bell``: a bell around the score of the last
      key that a budget selects, and the mean of p under it, so that the number of selected keys
      stays. What lies along the scores themselves is taken out: the bell is as wide as they spread,
      and what is selected does not depend on their scale. Budgets are drawn log-uniformly. It sets
      in when the codes have settled.

    Where the model's rotary embedding is known, queries and keys of a step are turned as if the
    sequence began elsewhere, so that each is seen at more than one position.

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
        turn: By how many positions a step is turned at most, as a share of the sequence's.
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
    turn: float = 0.125

    def __post_init__(self) -> None:
        """Checks the rules of this recipe."""
        super().__post_init__()
        rule = "be False: recipe hata learns scores without norms"
        check(not self.key_norms, "train", "key_norms", rule, self.key_norms)
        check_int("train", "num_steps", self.num_steps, 1)
        check_int("train", "num_keys", self.num_keys, _FEWEST_KEYS)

    def head_bytes(self, shape: tuple[int, int, int, int, int, int]) -> int:
        """What the survey keeps, and what a step holds for every pair and every bit of a key."""
        num_sequences, num_queries, group, _, seq_len, head_dim = shape
        pairs = min(self.num_queries, num_queries) * min(self.num_keys, seq_len)
        survey = _SURVEY_ROWS * seq_len * 3
        columns = min(self.num_keys, seq_len) * (8 * self.num_bits + 4 * head_dim)
        kept = num_sequences * (num_queries * group + 2 * seq_len)
        return 4 * (kept + max(14 * pairs + columns, survey))

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
        log_sums, attention = _survey(data, recipe.power)
        self.log_sums = torch.nn.Buffer(log_sums, persistent=False)
        self._odds = torch.nn.Buffer(_odds(attention, recipe.num_keys), persistent=False)
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
        sequence_idx, rows, keys, counts = self._draw(data, generator)
        p, contested = self._teacher(data, sequence_idx, rows, keys)
        most = int(recipe.turn * data.seq_len)
        turn = int(torch.randint(-most, most + 1, (), generator=generator))
        logits = self._logits(data, sequence_idx, rows, keys, slope, turn)
        with torch.no_grad():
            at_stake = (p * counts).sum(-1, keepdim=True)
            shown = logits.masked_fill(~contested, _HIDDEN)
            target = p**recipe.power * counts
            target *= at_stake / target.sum(-1, keepdim=True).clamp(min=1e-30)
            log_counts = counts.log()
            log_q = (shown + log_counts).log_softmax(-1)
            gradient = log_q.exp() * at_stake - target
            loss = (target * (log_counts - log_q)).sum(-1).mean(-1)
            if done >= recipe.mass_from and recipe.mass_weight > 0:
                draw = float(torch.rand((), generator=generator))
                span = recipe.budget_last / recipe.budget_first
                share = recipe.budget_first * span**draw
                caught = self._mass_gradient(shown, logits, p, contested, counts, share)
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

    def _draw(
        self, data: TrainingData, generator: torch.Generator
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """Draws a sequence, rows of its queries and, for each head, positions of its keys.

        Returns:
            The sequence; rows, ``[num_rows]``; positions, ``[heads, num_keys]``, ascending and
            different; how many keys each of them stands for, ``[heads, 1, num_keys]``.
        """
        sequence_idx = int(torch.randint(data.num_sequences, (), generator=generator))
        available = data.positions.shape[1]
        rows = torch.randperm(available, generator=generator)[: self.recipe.num_queries]
        # One key is drawn in each unit of the summed odds: systematic sampling.
        first = int(torch.rand((), generator=generator) * _UNIT)
        odds = self._odds[sequence_idx]
        num_keys = min(self.recipe.num_keys, data.seq_len)
        at = (torch.arange(num_keys, device=odds.device) * _UNIT + first).repeat(len(odds), 1)
        keys = torch.searchsorted(odds.cumsum(-1), at, right=True).clamp_(max=data.seq_len - 1)
        counts = _UNIT / odds.gather(1, keys).float()
        return sequence_idx, rows.to(odds.device), keys, counts[:, None]

    def _teacher(
        self, data: TrainingData, sequence_idx: int, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the group's mean attention, 0 where not contested, and where it is.

        Both ``[heads, num_rows, num_keys]``.
        """
        contested = _contested(data, sequence_idx, rows, keys)
        k = _rows_of(data.k[sequence_idx], keys).transpose(1, 2)
        q = data.q[sequence_idx, :, rows] * data.softmax.scale
        log_sums = self.log_sums[sequence_idx, :, rows]
        p = torch.zeros(data.heads, len(rows), keys.shape[1], device=k.device)
        for group_idx in range(q.shape[2]):  # one head of the group at a time, to save memory
            logits = data.softmax.cap_(torch.bmm(q[:, :, group_idx], k))
            p += logits.sub_(log_sums[:, :, group_idx, None]).exp_()
        # Not multiplied: exp is infinite where a key after the query far outweighs all it sees.
        return p.div_(q.shape[2]).masked_fill_(~contested, 0), contested

    def _logits(
        self,
        data: TrainingData,
        sequence_idx: int,
        rows: Tensor,
        keys: Tensor,
        slope: float,
        turn: int = 0,
    ) -> Tensor:
        """Returns the student's logits, ``[heads, num_rows, num_keys]``."""
        k = turned(_rows_of(data.k[sequence_idx], keys), data.rotary, turn)
        x = torch.bmm(k, self.key_weights * self.key_scale)
        q = turned(data.q[sequence_idx, :, rows], data.rotary, turn)
        weights = self.query_weights * self.query_scale
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
        self,
        shown: Tensor,
        logits: Tensor,
        p: Tensor,
        contested: Tensor,
        counts: Tensor,
        share: float,
    ) -> Tensor:
        """Returns minus the gradient of the mass that the best ``share`` of a row's keys hold."""
        counts = counts * contested
        order = shown.argsort(-1, descending=True)
        reached = counts.gather(-1, order).cumsum(-1)
        seen = reached[..., -1:].clamp(min=1)
        at = torch.searchsorted(reached, share * seen).clamp(max=shown.shape[-1] - 1)
        cut = shown.gather(-1, order.gather(-1, at))
        centred = (logits - (logits * counts).sum(-1, keepdim=True) / seen).mul_(contested)
        weighted = centred * counts
        variance = (weighted * centred).sum(-1, keepdim=True) / seen
        width = self.recipe.width * variance.sqrt().clamp(min=1e-6)  # 0 where codes are equal
        bell = torch.sigmoid((shown - cut) / width)
        bell = (bell * (1 - bell)).mul_(counts)
        mean = (p * bell).sum(-1, keepdim=True) / bell.sum(-1, keepdim=True).clamp(min=1e-30)
        gradient = (mean - p).mul_(bell).mul_(4)
        # Left in, this part would raise temperature and query weights without end.
        along = (gradient * centred).sum(-1, keepdim=True)
        along /= (variance * seen).clamp(min=1e-30)
        return gradient.addcmul_(weighted, along, value=-1)

    def _first_temperature(self, data: TrainingData) -> Tensor:
        """Returns the log temperature that fits scores to logits of the group's mean query."""
        sequence_idx, rows, keys, _ = self._draw(data, generator_of(self.recipe.seed, -1))
        score = self._logits(data, sequence_idx, rows, keys, 1.0)
        mean_q = data.q[sequence_idx, :, rows].mean(2) * data.softmax.scale
        k = _rows_of(data.k[sequence_idx], keys).transpose(1, 2)
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


def _rows_of(x: Tensor, positions: Tensor) -> Tensor:
    """Returns rows of ``[heads, seq_len, head_dim]`` at ``[heads, num_keys]``, each head's own."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _contested(data: TrainingData, sequence_idx: int, rows: Tensor | slice, keys: Tensor) -> Tensor:
    """Returns whether a query sees a key that is not always selected.

    ``[..., num_rows, num_keys]``, for positions ``[..., num_keys]``.
    """
    last = data.positions[sequence_idx, rows, None] - data.num_recent
    return (keys[..., None, :] <= last) & (keys[..., None, :] >= data.num_sink)


def _survey(data: TrainingData, power: float) -> tuple[Tensor, Tensor]:
    """Looks at every query and every key once.

    Args:
        data: Queries and keys.
        power: Of the teacher's probabilities.

    Returns:
        The logarithms of the softmax's denominators, over every key that a query sees and its sink,
        ``[num_sequences, heads, num_queries, group]``; the sum over the queries of the group's
        attention to the power, normalized, to keys that are not always selected,
        ``[num_sequences, heads, seq_len]``.
    """
    num_sequences, heads, num_queries, group, _ = data.q.shape
    sums = torch.empty(data.q.shape[:-1], device=data.q.device)
    attention = torch.zeros(num_sequences, heads, data.seq_len, device=data.q.device)
    sinks = data.softmax.sink_logits  # [heads, group]
    positions = torch.arange(data.seq_len, device=data.k.device)
    for sequence_idx in range(num_sequences):
        k = data.k[sequence_idx].transpose(1, 2)
        for start in range(0, num_queries, _SURVEY_ROWS):
            rows = slice(start, start + _SURVEY_ROWS)
            hidden = ~data.visible(sequence_idx, rows)
            p = torch.zeros(heads, len(hidden), data.seq_len, device=k.device)
            for group_idx in range(group):
                q = data.q[sequence_idx, :, rows, group_idx] * data.softmax.scale
                logits = data.softmax.cap_(torch.bmm(q, k)).masked_fill_(hidden, -torch.inf)
                found = logits.logsumexp(-1)
                if sinks is not None:
                    found = torch.logaddexp(found, sinks[:, group_idx, None])
                sums[sequence_idx, :, rows, group_idx] = found
                p += logits.sub_(found[..., None]).exp_()
            p = p.masked_fill_(~_contested(data, sequence_idx, rows, positions), 0).pow_(power)
            p /= p.sum(-1, keepdim=True).clamp(min=1e-30)
            attention[sequence_idx] += p.sum(1)
    return sums, attention


def _odds(attention: Tensor, num_keys: int) -> Tensor:
    """Returns how probably each key is drawn: ``[num_sequences, heads, seq_len]``, int64.

    In units of 1 / `_UNIT`; together ``num_keys``, none above one. Integers, so that running sums
    are exact: no key is drawn twice. Half of the keys are spread evenly, the others by attention.

    Args:
        attention: ``[num_sequences, heads, seq_len]``, in any unit.
        num_keys: Keys of a step.
    """
    seq_len = attention.shape[-1]
    if num_keys >= seq_len:
        return torch.full_like(attention, _UNIT, dtype=torch.int64)
    even = torch.full_like(attention, 1 / seq_len, dtype=torch.float64)
    total = attention.double().sum(-1, keepdim=True)
    # Where it is not finite the loss is not either, and is checked: any keys will do.
    found = torch.where(total.isfinite() & (total > 0), attention / total, even)
    odds = num_keys * torch.lerp(found, even, _UNIFORM)
    while bool((odds > 1).any()):  # what is above one goes to the others
        certain = odds >= 1
        room = num_keys - certain.sum(-1, keepdim=True)
        others = odds.masked_fill(certain, 0)
        odds = torch.where(certain, 1, others * (room / others.sum(-1, keepdim=True)))
    return (odds * _UNIT).round().long().clamp(1, _UNIT)
