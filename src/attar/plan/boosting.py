"""Gradient-boosted regression trees, for the few dozen samples of a search.

Source: Chen and Guestrin 2016, XGBoost, https://arxiv.org/abs/1603.02754, eqs. 5 to 7 with squared
loss and exact greedy splits (algorithm 1). No pruning, no sampling of rows or columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

TREES, DEPTH, RATE = 40, 3, 0.2
# λ: what is added to the number of samples in a leaf, so that small leaves say little.
SHRINKAGE = 1.0


@dataclass(frozen=True)
class Leaf:
    """A part of the samples.

    Attributes:
        value: Added to the prediction.
    """

    value: float


@dataclass(frozen=True)
class Split:
    """Samples whose feature is at most `threshold` go to `low`."""

    feature: int
    threshold: float
    low: Tree
    high: Tree


Tree = Leaf | Split


@dataclass(frozen=True)
class Boosted:
    """A mean and trees that correct it."""

    mean: float
    trees: tuple[Tree, ...]

    def predict(
        self, features: Float64[np.ndarray, "samples features"]
    ) -> Float64[np.ndarray, " samples"]:
        """Predicted targets."""
        total = np.full(len(features), self.mean)
        for tree in self.trees:
            total += RATE * _values(tree, features)
        return total


def boost(
    features: Float64[np.ndarray, "samples features"], targets: Float64[np.ndarray, " samples"]
) -> Boosted:
    """Fit trees one after the other, each to what is left of the targets."""
    mean = float(targets.mean())
    left, trees = targets - mean, []
    for _ in range(TREES):
        tree = grow(features, left, DEPTH)
        left = left - RATE * _values(tree, features)
        trees.append(tree)
    return Boosted(mean, tuple(trees))


def grow(
    features: Float64[np.ndarray, "samples features"],
    left: Float64[np.ndarray, " samples"],
    depth: int,
) -> Tree:
    """Split where the regularised squared error falls most; a leaf where it falls nowhere."""
    total, n = left.sum(), len(left)
    leaf = Leaf(float(total / (n + SHRINKAGE)))
    if depth == 0 or n < 2:
        return leaf
    order = np.argsort(features, axis=0, kind="stable")
    values = np.take_along_axis(features, order, 0)
    below = left[order].cumsum(0)[:-1]
    n_below = np.arange(1, n)[:, None]
    gain = below**2 / (n_below + SHRINKAGE) + (total - below) ** 2 / (n - n_below + SHRINKAGE)
    gain = np.where(values[:-1] < values[1:], gain, -np.inf)
    place, feature = np.unravel_index(int(np.argmax(gain)), gain.shape)
    if gain[place, feature] <= total**2 / (n + SHRINKAGE):
        return leaf
    threshold = float(values[place, feature] + values[place + 1, feature]) / 2
    low = features[:, feature] <= threshold
    return Split(
        int(feature),
        threshold,
        grow(features[low], left[low], depth - 1),
        grow(features[~low], left[~low], depth - 1),
    )


def _values(
    tree: Tree, features: Float64[np.ndarray, "samples features"]
) -> Float64[np.ndarray, " samples"]:
    if isinstance(tree, Leaf):
        return np.full(len(features), tree.value)
    low = features[:, tree.feature] <= tree.threshold
    return np.where(low, _values(tree.low, features), _values(tree.high, features))
