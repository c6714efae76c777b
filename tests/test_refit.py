"""Cuts are priced together, with the fit that follows, and the fit is the best there is."""

import pytest
import torch

from attar.cut import refit
from attar.cut.refit import Reader, cheapest_first, refitted, weighted

ROWS, COLUMNS, SAMPLES = 5, 12, 400


@pytest.fixture
def drawn(monkeypatch):
    """Inputs that hang together, a weight, a row factor; without damping, to be exact."""
    monkeypatch.setattr(refit, "DAMPING_FRACTION", 0.0)
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = make(SAMPLES, COLUMNS) @ make(COLUMNS, COLUMNS)
    root = make(ROWS, ROWS)
    return inputs, make(ROWS, COLUMNS), root @ root.T


def damage(change, moment, rows):
    """1/2 tr(R dW A dWᵀ), number by number."""
    total = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            for k in range(COLUMNS):
                for n in range(COLUMNS):
                    total += rows[i, j] * change[i, k] * moment[k, n] * change[j, n]
    return 0.5 * float(total)


def test_the_fit_is_that_of_least_squares_on_the_inputs(drawn):
    inputs, weight, _ = drawn
    gone = torch.tensor([2, 7, 8])
    kept = [one for one in range(COLUMNS) if one not in (2, 7, 8)]
    new = refitted(weight, inputs.T @ inputs / SAMPLES, gone)
    wanted = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    assert torch.equal(new[:, gone], torch.zeros(ROWS, 3, dtype=torch.float64))
    torch.testing.assert_close(new[:, kept], wanted)


@pytest.mark.parametrize("width", [1, 3])
def test_each_step_adds_what_the_fit_then_loses(drawn, width):
    inputs, weight, rows = drawn
    moment = inputs.T @ inputs / SAMPLES
    columns = torch.arange(COLUMNS).reshape(-1, width).flip(0)
    reader = Reader(weighted(weight, rows[None]), moment, columns)
    chosen, added = cheapest_first([reader], len(columns) - 1)
    assert len(set(chosen)) == len(columns) - 1
    for count in range(1, len(chosen) + 1):
        gone = columns[chosen[:count]].flatten()
        loss = damage(refitted(weight, moment, gone) - weight, moment, rows)
        assert sum(added[:count]) == pytest.approx(loss, rel=1e-6)
    others = [damage(refitted(weight, moment, one) - weight, moment, rows) for one in columns]
    assert added[0] == pytest.approx(min(others)) and chosen[0] == others.index(min(others))


def test_the_second_of_two_that_say_the_same_is_dear(drawn):
    inputs, weight, rows = drawn
    noise = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs[:, 4] = inputs[:, 9] + 1e-2 * noise
    moment = inputs.T @ inputs / SAMPLES
    reader = Reader(weighted(weight, rows[None]), moment, torch.arange(COLUMNS)[:, None])
    (first, second), (cheap, _) = cheapest_first([reader], 2)
    assert first in (4, 9) and second not in (4, 9)
    both = damage(refitted(weight, moment, torch.tensor([4, 9])) - weight, moment, rows)
    assert both > 100 * cheap


def test_all_readers_count_and_a_diagonal_fits_nothing(drawn):
    inputs, weight, rows = drawn
    moment, columns = inputs.T @ inputs / SAMPLES, torch.arange(COLUMNS)[:, None]
    full = Reader(weighted(weight, rows.diagonal()), moment, columns)
    power = moment.diagonal()
    plain = Reader(weighted(weight, rows.diagonal()), power, columns.flip(0))
    alone = [0.5 * float((rows.diagonal() * weight[:, k] ** 2).sum() * power[k]) for k in range(12)]
    chosen, added = cheapest_first([plain], 3)
    assert added == pytest.approx(sorted(alone)[:3])
    assert [11 - one for one in chosen] == sorted(range(12), key=alone.__getitem__)[:3]
    first = cheapest_first([full, plain], 1)[1][0]
    fitted = [
        damage(refitted(weight, moment, one) - weight, moment, rows.diagonal().diag())
        for one in columns
    ]
    assert first == pytest.approx(min(fitted[k] + alone[11 - k] for k in range(12)))
    assert torch.equal(refitted(weight, power, torch.tensor([3]))[:, :3], weight[:, :3])


def test_a_moment_of_zeros_is_no_error():
    weight, moment = torch.ones(2, 3), torch.zeros(3, 3)
    reader = Reader(weight.double(), moment, torch.arange(3)[:, None])
    assert cheapest_first([reader], 2)[1] == pytest.approx([1.0, 1.0])
    assert torch.equal(refitted(weight, moment, torch.tensor([1])), torch.tensor([[1.0, 0, 1]] * 2))
