import numpy as np
import pytest
from scipy.optimize import nnls

from attar.audit import concepts
from attar.explain import dictionary


def made(n=400, features=9, n_concepts=5, seed=0, noise=0.0):
    """Vectors of which each is made of one or two concepts."""
    draws = np.random.default_rng(seed)
    directions = np.linalg.qr(draws.normal(size=(features, features)))[0][:n_concepts]
    strengths = draws.exponential(size=(n, n_concepts)) * (draws.random((n, n_concepts)) < 0.3)
    vectors = strengths @ directions + noise * draws.normal(size=(n, features))
    return vectors, strengths, directions


def fixed(directions):
    width = directions.shape[1]
    return dictionary.Dictionary(np.ones(width), np.zeros(width), directions)


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_the_least_squares_that_are_not_negative(seed, monkeypatch):
    monkeypatch.setattr(dictionary, "PENALTY", 0.0)
    draws = np.random.default_rng(seed)
    directions = draws.normal(size=(4, 7))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = draws.normal(size=(11, 7))
    found = fixed(directions).strengths(vectors)
    truth = np.array([nnls(directions.T, vector)[0] for vector in vectors])
    assert np.allclose(found, truth, atol=1e-6)


def test_strengths_are_where_the_penalized_square_has_no_way_down():
    """The conditions of the minimum: no slope where u > 0, none that points inward where u is 0."""
    draws = np.random.default_rng(5)
    directions = draws.normal(size=(4, 7))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vectors = draws.normal(size=(33, 7))
    found = fixed(directions).strengths(vectors)
    slope = (found @ directions - vectors) @ directions.T + dictionary.PENALTY
    assert np.abs(slope[found > 0]).max() < 1e-6
    assert slope[found == 0].min() > -1e-9 and (found == 0).any()


def test_directions_that_vectors_were_made_of_are_found():
    vectors, _, directions = made(n=900, noise=0.01)
    # A few more than there are: with as many, two may begin as one and leave another out.
    found = dictionary.learn(vectors + 3.0, 8, seed=0)
    assert np.allclose(np.linalg.norm(found.directions, axis=1), 1.0)
    own = found.directions * found.spread
    alike = directions @ (own / np.linalg.norm(own, axis=1, keepdims=True)).T
    assert (alike.max(1) > 0.98).all()


def test_no_more_directions_than_there_are_and_none_of_what_never_varies():
    line = np.outer(np.arange(8.0), [1.0, 0.0, 2.0])
    found = dictionary.learn(line, 6, seed=0)
    assert 1 <= len(found.directions) <= 2  # up and down from the mean
    assert np.isfinite(found.strengths(line)).all() and found.spread[1] == np.sqrt(3)
    assert len(dictionary.learn(np.ones((4, 3)), 2, seed=0).directions) == 0


def test_the_same_seed_gives_the_same_directions():
    vectors = made()[0]
    one, two = (dictionary.learn(vectors, 4, seed=3).directions for _ in range(2))
    assert np.array_equal(one, two)


def test_a_direction_taken_away_is_the_one_concept_lost():
    vectors, _, directions = made()
    before = fixed(directions).strengths(vectors)
    kept = vectors - np.outer(vectors @ directions[2], directions[2])
    after = fixed(directions).strengths(kept)
    assert concepts.lost(before, after).tolist() == [False, False, True, False, False]
    assert concepts.strength_ratio(before, after) == pytest.approx([1, 1, 0, 1, 1], abs=1e-6)
    assert concepts.merged(before, after) == []


def test_two_concepts_that_share_a_direction_now_are_merged():
    vectors, before, directions = made()
    one, four = (vectors @ directions[k] for k in (1, 4))
    mean = np.outer(one + four, directions[1] + directions[4]) / 2
    own = np.outer(one, directions[1]) + np.outer(four, directions[4])
    after = fixed(directions).strengths(vectors - own + mean)
    assert concepts.merged(before, after) == [(1, 4)]
    assert concepts.merged(before, before) == []


def test_what_is_kept_is_the_share_of_the_variance_that_is_left():
    before = np.array([[0.0, 1.0, 2.0], [4.0, 1.0, 2.0]])
    after = np.array([[1.0, 1.0, 3.0], [4.0, 1.0, 2.0]])
    # Of the first 1 of 8 is off; the others never varied: one is as it was, one is not.
    assert concepts.kept(before, after).tolist() == [0.875, 1.0, 0.0]
    assert concepts.strength_ratio(np.zeros((2, 2)), np.array([[0.0, 1], [0, 1]])).tolist() == [
        1.0,
        np.inf,
    ]
