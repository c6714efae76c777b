"""Directions that a network's activations are made of, and how strongly each is met: concepts.

An activation x, each feature in units of its spread, is taken apart into an offset and a sum of few
directions, each with a strength that is never negative:

    z = x / spread / √features ≈ b + Σₖ uₖ dₖ        u ≥ 0, each dₖ of length 1
    u = argmin ½ |z − b − Σₖ uₖ dₖ|² + λ Σₖ uₖ

Source: Mairal, Bach, Ponce and Sapiro 2010, Online learning for matrix factorization and sparse
coding, https://arxiv.org/abs/0908.0050, eq. 2 and 3, with u ≥ 0 (section 3.4). They learn from one
sample after the other, with directions of length at most 1; here all are at hand, u is found by
coordinate descent (as their algorithm 2 finds the directions), and an offset is learned too, as for
the dictionaries of language models: Bricken et al. 2023, Towards monosemanticity,
https://transformer-circuits.pub/2023/monosemantic-features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# λ: vectors have length 1 on average, so that a strength of this size is not told from none.
PENALTY = 0.05
# Rounds of learning, and of finding the strengths: more change the third digit.
ROUNDS, SWEEPS = 40, 60
# What counts as nothing, as a share.
LEAST = 1e-9

Vectors = Float[np.ndarray, "vectors features"]
Strengths = Float[np.ndarray, "vectors concepts"]


@dataclass(frozen=True)
class Dictionary:
    """What activations at one place are taken apart into.

    Attributes:
        spread: What each feature is divided by; > 0.
        offset: b.
        directions: d, each of length 1.
    """

    spread: Float[np.ndarray, " features"]
    offset: Float[np.ndarray, " features"]
    directions: Float[np.ndarray, "concepts features"]

    def strengths(self, vectors: Vectors) -> Strengths:
        """How strongly each concept is met in each vector: u."""
        products = (vectors / self.spread - self.offset) @ self.directions.T
        return _swept(np.zeros_like(products), products, self.directions, SWEEPS)


def learn(vectors: Vectors, n_concepts: int, seed: int) -> Dictionary:
    """Find directions that leave little of these vectors.

    Args:
        vectors: At least one.
        n_concepts: At most; fewer where the vectors are made of fewer.
        seed: Of the vectors that directions begin as.
    """
    deviation = vectors.std(0)
    varied = deviation > LEAST * max(1.0, float(np.abs(vectors).max()))
    spread = np.where(varied, deviation, 1.0) * np.sqrt(vectors.shape[1])
    scaled = vectors / spread
    offset = np.median(scaled, axis=0)
    directions = _unlike(scaled - offset, n_concepts, np.random.default_rng(seed))
    strengths = np.zeros((len(scaled), len(directions)))
    for _ in range(ROUNDS):
        strengths = _swept(strengths, (scaled - offset) @ directions.T, directions, 1)
        met = strengths.any(0)
        strengths, directions = strengths[:, met], directions[met]
        offset = scaled.mean(0) - strengths.mean(0) @ directions
        directions = _turned(directions, strengths, scaled - offset)
    return Dictionary(spread, offset, directions)


def _unlike(centred: Vectors, n: int, draws: np.random.Generator) -> np.ndarray:
    """Vectors of length 1 that lie apart, drawn by how far each is from those drawn before."""
    lengths = np.linalg.norm(centred, axis=1)
    pool = centred[lengths > LEAST] / lengths[lengths > LEAST, None]
    chosen: list[np.ndarray] = []
    left = np.ones(len(pool))
    while len(chosen) < n and left.sum() > LEAST * len(pool):
        chosen.append(pool[draws.choice(len(pool), p=left / left.sum())])
        left = np.minimum(left, np.clip(1.0 - pool @ chosen[-1], 0.0, None))
    return np.array(chosen).reshape(len(chosen), centred.shape[1])


def _swept(start: Strengths, products: Strengths, directions: np.ndarray, times: int) -> Strengths:
    """Minimize over one concept's strengths after the other.

    Args:
        products: Vectors times directions.
        directions: Of length 1 each.
    """
    gram = directions @ directions.T
    found = start.copy()
    for _ in range(times):
        for k in range(len(gram)):
            left = products[:, k] - found @ gram[k] + found[:, k] - PENALTY
            found[:, k] = np.clip(left, 0.0, None)
    return found


def _turned(directions: np.ndarray, strengths: Strengths, centred: Vectors) -> np.ndarray:
    """Minimize over one direction after the other, each of length 1."""
    gram, products = strengths.T @ strengths, strengths.T @ centred
    found = directions.copy()
    for k in range(len(found)):
        wanted = products[k] - gram[k] @ found + gram[k, k] * found[k]
        length = float(np.linalg.norm(wanted))
        if length > 0:
            found[k] = wanted / length
    return found
