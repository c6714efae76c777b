"""Whether an explanation can be trusted: checks of its own claims.

Features are taken away one after the other, those said to matter most first, and in reverse. If the
explanation is right the answer falls soon in the first case and late in the second: the area
between both curves is its faithfulness, in the unit of the answer. Random orders say what chance
reaches.

Source: Samek et al. 2017, Evaluating the visualization of what a deep neural network has learned,
https://arxiv.org/abs/1509.06321, eq. 2 (most relevant first); against least relevant first: Ancona
et al. 2018, https://arxiv.org/abs/1711.06104, section 4. They replace regions by random numbers;
here they stand at the baseline, as they do for the methods. Randomised weights: Adebayo et al.
2018, Sanity checks for saliency maps, https://arxiv.org/abs/1810.03292, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from attar.attribute.features import gathered
from attar.attribute.occlusion import answers_with
from attar.attribute.question import Question

# Steps of a curve, and random orders, each walked in both directions: the least p is 1 in 21.
STEPS, ORDERS = 12, 10
# Agreement with the explanation of a network of shuffled weights from which on an explanation is
# about the input and not about the model, and the gap of parts that should sum to the whole.
LARGEST_AGREEMENT, LARGEST_GAP = 0.8, 0.1
LARGEST_P = 0.05


@dataclass(frozen=True)
class Curves:
    """The answer while features are taken away.

    Attributes:
        shares: Of the features that are gone, 0 to 1.
        most_first: The answer, in nats or output units.
        least_first: The same.
        chance: The areas between the curves of random orders, both signs, sorted.
    """

    shares: tuple[float, ...]
    most_first: tuple[float, ...]
    least_first: tuple[float, ...]
    chance: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean of the least-first curve less the most-first one."""
        return _area(np.array(self.least_first), np.array(self.most_first), self.shares)

    @property
    def p(self) -> float:
        """How often a random order does as well, the explanation counted among them."""
        as_good = sum(one >= self.area for one in self.chance)
        return (as_good + 1) / (len(self.chance) + 1)


def chance_areas(question: Question) -> tuple[float, ...]:
    """Areas between the curves of random orders; the same for every method."""
    draws = question.draws()
    found = []
    for _ in range(ORDERS):
        order = torch.randperm(question.n_features, generator=draws)
        shares, both = _curves(question, order)
        found.append(_area(both[1], both[0], shares))
    return tuple(sorted(found + [-one for one in found]))


def curves_of(question: Question, places: Tensor, chance: tuple[float, ...]) -> Curves:
    """Take features away by an explanation."""
    order = torch.argsort(gathered(places, question.features), descending=True, stable=True)
    shares, (most, least) = _curves(question, order)
    return Curves(shares, tuple(most.tolist()), tuple(least.tolist()), chance)


def _curves(question: Question, order: Tensor) -> tuple[tuple[float, ...], np.ndarray]:
    """Shares that are gone, and the answers along an order and along its reverse, `2 steps`."""
    n = len(order)
    gone = torch.linspace(0, n, min(n, STEPS) + 1).round().long()
    there = []
    for one in (order, order.flip(0)):
        rank = torch.empty(n, dtype=torch.long)
        rank[one] = torch.arange(n)
        there.append(rank[None] >= gone[:, None])
    answers = answers_with(question, torch.cat(there)).reshape(2, -1)
    return tuple((gone / n).tolist()), answers.numpy()


def _area(upper: np.ndarray, lower: np.ndarray, shares: tuple[float, ...]) -> float:
    return float(np.trapezoid(upper - lower, shares))


def reordered(weight: Tensor, seed: int) -> Tensor:
    """Shuffle the numbers of a weight: what it was before it learned, in the same distribution."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return weight.detach().flatten()[order].reshape(weight.shape)


def agreement(places: Tensor, others: Tensor) -> float:
    """Rank correlation of the sizes of two explanations' parts; 0 where one is constant."""
    one, other = (t.abs().flatten().double().numpy() for t in (places, others))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(stats.spearmanr(one, other).statistic)


def sparsity(places: Tensor) -> float:
    """Gini coefficient of the sizes of the parts: 0 all alike, towards 1 few that are large.

    Source: Chalasani et al. 2020, Concise explanations of neural networks using adversarial
    training, https://arxiv.org/abs/1810.06583, section 4.
    """
    sizes = np.sort(places.abs().flatten().double().numpy())
    if sizes.sum() == 0:
        return 0.0
    ranks = np.arange(1, len(sizes) + 1)
    return float((2 * ranks - len(sizes) - 1) @ sizes / (len(sizes) * sizes.sum()))
