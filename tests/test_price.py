"""Nats for a change of a weight: the formula by loops, and against the divergence measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from torch import nn

from attar.divergence import Divergence, fit_gaussian
from attar.explain import statistics as gathering
from attar.explain.price import (
    bias_change,
    damage,
    of_rows,
    rounding_moment,
    row_damage,
    sample_rows,
)
from attar.explain.statistics import gather_statistics
from attar.load.units import list_units
from attar.records import Curvature, Silent
from attar.sites import substituted
from attar.transform.quantize_rtn import QuantizeRtn


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(groups, side, seed):
    """Of few samples; all moments of one size estimate the same one, which is not diagonal."""
    x = random(groups, 3 * side, side, seed=seed) @ random(groups, side, side, seed=99)
    return x.transpose(1, 2) @ x / (3 * side)


def curvature(groups, rows, columns, *, diagonal_rows=False, diagonal_columns=False, seed=0):
    """Random R and C of a weight of `groups * rows` rows."""
    r = moment(groups, rows, seed)
    first, second = moment(groups, columns, seed + 1), moment(groups, columns, seed + 2)
    if diagonal_rows:
        r = r.diagonal(dim1=1, dim2=2).flatten().clone()
    if diagonal_columns:
        first, second = (m.diagonal(dim1=1, dim2=2).flatten().clone() for m in (first, second))
    return Curvature(r, first, second)


def by_loops(change, c, columns, groups):
    """1/2 Σ R[i, j] dW[i, k] C[k, l] dW[j, l] within each group."""
    n_rows, n_columns = change.shape
    each = n_rows // groups
    r, dw = c.rows.double().numpy(), change.double().numpy()
    columns = columns.double().numpy()
    total = 0.0
    for i, j in np.ndindex(n_rows, n_rows):
        group = i // each
        if group != j // each or (r.ndim == 1 and i != j):
            continue
        row_factor = r[i] if r.ndim == 1 else r[group, i % each, j % each]
        if columns.ndim == 1:
            own = columns[group * n_columns : (group + 1) * n_columns]
            total += 0.5 * row_factor * (dw[i] * own * dw[j]).sum()
        else:
            total += 0.5 * row_factor * dw[i] @ columns[group] @ dw[j]
    return total


@pytest.mark.parametrize("diagonal_rows", [False, True])
@pytest.mark.parametrize("diagonal_columns", [False, True])
@pytest.mark.parametrize("groups, rows, columns", [(1, 5, 7), (3, 2, 4), (5, 1, 3), (1, 1, 1)])
def test_damage_is_half_the_trace(groups, rows, columns, diagonal_rows, diagonal_columns):
    c = curvature(
        groups, rows, columns, diagonal_rows=diagonal_rows, diagonal_columns=diagonal_columns
    )
    change = random(groups * rows, columns)
    assert damage(change, [c]) == pytest.approx(by_loops(change, c, c.columns, groups), rel=1e-5)
    held_out = damage(change, [c], held_out=True)
    assert held_out == pytest.approx(by_loops(change, c, c.second, groups), rel=1e-5)


@pytest.mark.parametrize("diagonal_rows", [False, True])
def test_shares_of_rows_are_the_rows_of_the_trace_and_sum_to_the_damage(diagonal_rows):
    c = curvature(1, 5, 7, diagonal_rows=diagonal_rows)
    change = random(5, 7)
    shares = row_damage(change, [c])
    r = torch.diag(c.rows) if diagonal_rows else c.rows[0]
    expected = 0.5 * ((r @ change @ c.columns[0]) * change).sum(1)
    assert torch.allclose(shares, expected, rtol=1e-4, atol=1e-5)
    assert float(shares.sum()) == pytest.approx(damage(change, [c]), rel=1e-5)


def test_damage_of_two_uses_is_the_sum():
    one, two, change = curvature(1, 5, 7), curvature(1, 5, 7, seed=9), random(5, 7)
    assert damage(change, [one, two]) == pytest.approx(
        damage(change, [one]) + damage(change, [two]), rel=1e-5
    )


def test_damage_grows_with_the_square_and_no_change_costs_nothing():
    c, change = curvature(1, 5, 7), random(5, 7)
    assert damage(3 * change, [c]) == pytest.approx(9 * damage(change, [c]), rel=1e-5)
    assert damage(0 * change, [c]) == 0.0
    assert all(damage(random(5, 7, seed=s), [c]) > 0 for s in range(20))


@pytest.fixture
def many_at_once(monkeypatch):
    """Backward passes over many samples: more gradients in less time."""
    monkeypatch.setattr(gathering, "samples_at_once", lambda _task: 500)


def gathered(module, x, divergence, task, draws):
    model = toys.toy(task, module, examples={"inputs": x[:2]})
    statistics = gather_statistics(
        model,
        list_units(model),
        [{"inputs": x}],
        divergence,
        seed=0,
        draws=draws,
        progress=Silent(),
    )
    return model, statistics


def measured(model, name, change, x, divergence):
    weight = model.module.get_parameter(name + ".weight")
    with torch.no_grad():
        before = model.module(x)
        with substituted(model.module, {name + ".weight": lambda: weight + change}):
            after = model.module(x)
    if divergence.family == "categorical":  # small differences of large numbers
        before, after = before.double(), after.double()
    return float(divergence.between(before, after).double().mean())


def test_price_of_a_small_change_of_a_softmax_regression_is_the_divergence_measured(many_at_once):
    """All inputs are one vector, so that A and G are independent and A ⊗ G leaves nothing out."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, bias=False))
    x = random(1, 6).expand(4000, 6).clone()
    divergence = Divergence("categorical")
    model, statistics = gathered(module, x, divergence, "classify", draws=8)
    for seed in range(5):
        change = 0.005 * random(5, 6, seed=seed)
        predicted = damage(change, statistics.curvatures["0"])
        # 32,000 answers: their second moment is good to about 1%; the third order is below that.
        assert predicted == pytest.approx(measured(model, "0", change, x, divergence), rel=0.05)


def test_price_predicts_small_random_changes_of_a_network_within_a_few_percent(many_at_once):
    """Random changes average over most of what Kronecker leaves out."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))
    x, divergence = random(2000, 12), Divergence("categorical")
    model, statistics = gathered(module, x, divergence, "classify", draws=8)
    for name, shape in (("0", (16, 12)), ("2", (7, 16))):
        changes = [0.01 * random(*shape, seed=seed) for seed in range(12)]
        predicted = [damage(change, statistics.curvatures[name]) for change in changes]
        real = [measured(model, name, change, x, divergence) for change in changes]
        # 16,000 gradients (1%), and the norms of inputs and gradients that go together.
        assert sum(predicted) == pytest.approx(sum(real), rel=0.1)
        assert np.corrcoef(predicted, real)[0, 1] > 0.8


def test_price_of_a_linear_regression_is_exact_at_any_size_of_change(many_at_once):
    """The divergence of means is quadratic and G is the whitening itself: nothing is left out."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 3)), random(1000, 4)
    with torch.no_grad():
        divergence = fit_gaussian(module(x))
    model, statistics = gathered(module, x, divergence, "regress", draws=16)
    change = 2.0 * random(3, 4, seed=1)
    # Sampling of 16,000 gradients: about 1%.
    assert damage(change, statistics.curvatures["0"]) == pytest.approx(
        measured(model, "0", change, x, divergence), rel=0.05
    )


def off_diagonal(matrices):
    return matrices - torch.diag_embed(matrices.diagonal(dim1=1, dim2=2))


def test_what_lies_off_the_diagonal_is_shrunk_by_the_share_that_is_noise():
    c = curvature(2, 3, 5)
    found = rounding_moment([c]) / c.rows_mean
    noise = off_diagonal(c.first - c.second).square().sum() / 4
    share = float(noise / off_diagonal(c.columns).square().sum())
    assert 0 < share < 1
    assert torch.allclose(
        found.diagonal(dim1=1, dim2=2), c.columns.diagonal(dim1=1, dim2=2), rtol=1e-5
    )
    assert torch.allclose(
        off_diagonal(found), (1 - share) * off_diagonal(c.columns), rtol=1e-4, atol=1e-6
    )


def test_only_the_first_half_is_used_where_the_second_prices():
    c = curvature(1, 3, 5)
    other = replace(c, second=c.second + 0.0)
    found = rounding_moment([c], held_out=True) / c.rows_mean
    noise = off_diagonal(c.first - c.second).square().sum() / 2
    share = min(1.0, float(noise / off_diagonal(c.first).square().sum()))
    expected = (1 - share) * off_diagonal(c.first)
    assert torch.allclose(off_diagonal(found), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        found.diagonal(dim1=1, dim2=2), c.first.diagonal(dim1=1, dim2=2), rtol=1e-5
    )
    assert torch.equal(c.second, other.second)


def test_shrinkage_vanishes_as_the_halves_agree_and_is_full_where_they_share_nothing():
    base, noise = moment(1, 6, 0), moment(1, 6, 1)
    left = []
    for size in (1.0, 0.3, 0.1, 0.0):
        c = Curvature(torch.ones(4), base + size * noise, base - size * noise)
        kept = off_diagonal(rounding_moment([c])).norm() / off_diagonal(base).norm()
        left.append(float(kept))
    assert left == sorted(left) and left[-1] == pytest.approx(1.0)
    opposite = off_diagonal(base)
    diagonal = torch.diag_embed(base.diagonal(dim1=1, dim2=2))
    nothing = Curvature(torch.ones(4), diagonal + opposite, diagonal - opposite)
    assert torch.equal(rounding_moment([nothing]), diagonal)


def test_halves_that_are_one_tensor_are_not_shrunk():
    half = moment(1, 5, 0)
    assert torch.allclose(rounding_moment([Curvature(torch.ones(4), half, half)]), half)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_rounding_moment_stays_a_second_moment_and_changes_no_curvature(held_out):
    c = curvature(3, 2, 5, seed=4)
    before = [t.clone() for t in (c.rows, c.first, c.second)]
    found = rounding_moment([c, curvature(3, 2, 5, seed=8)], held_out=held_out)
    # Between a second moment and its diagonal there are only second moments.
    assert torch.linalg.eigvalsh(found).min() > 0
    now = (c.rows, c.first, c.second)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_uses_count_by_how_much_their_rows_matter():
    one, two = curvature(1, 3, 5), curvature(1, 3, 5, diagonal_rows=True, seed=7)
    assert one.rows_mean == pytest.approx(float(one.rows[0].diagonal().mean()), rel=1e-6)
    assert torch.allclose(
        rounding_moment([one, two]), rounding_moment([one]) + rounding_moment([two]), rtol=1e-5
    )


def test_one_use_with_a_diagonal_alone_makes_the_whole_a_diagonal():
    full, diagonal = curvature(2, 3, 5), curvature(2, 3, 5, diagonal_columns=True, seed=7)
    found = rounding_moment([full, diagonal])
    expected = full.rows_mean * full.columns.diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(found, expected + diagonal.rows_mean * diagonal.columns, rtol=1e-5)


def skewed(rows, columns, *, diagonal_rows):
    """A weight whose rows differ in size, with rows that differ in worth, as tokens do."""
    c = curvature(1, 3 if diagonal_rows else rows, columns)
    if diagonal_rows:
        c = replace(c, rows=1 / torch.arange(1.0, rows + 1))
    return random(rows, columns) * torch.linspace(0.5, 2, rows)[:, None], c


@pytest.mark.parametrize(("rows", "columns", "diagonal"), [(5000, 200, True), (900, 700, False)])
def test_some_rows_stand_for_all_within_a_few_percent(rows, columns, diagonal):
    weight, c = skewed(rows, columns, diagonal_rows=diagonal)
    sample = sample_rows(weight, [c])
    assert len(sample.rows) < 0.8 * rows and len(set(sample.rows.tolist())) == len(sample.rows)
    assert float(sample.counts.sum()) == pytest.approx(rows, rel=1e-4)
    for bits in (2, 4):
        change = QuantizeRtn(bits, 0).apply(weight, None).dense - weight
        estimate = damage(change[sample.rows], of_rows([c], sample), held_out=True)
        assert estimate == pytest.approx(damage(change, [c], held_out=True), rel=0.06)


def test_a_weight_of_few_rows_is_priced_whole():
    for rows in (1, 7, 256, 319):
        weight, c = skewed(rows, 1000, diagonal_rows=True)
        assert sample_rows(weight, [c]) is None


@pytest.mark.parametrize("groups", [1, 3])
def test_with_its_bias_moved_a_change_costs_what_is_left_of_it_and_no_other_move_costs_less(groups):
    rows, columns = 2, 5
    c = curvature(groups, rows, columns)
    x = random(groups, 400, columns, seed=7) + random(groups, 1, columns, seed=8)
    means = x.mean(1)
    about = x - means[:, None]
    cut = about.transpose(1, 2) @ about / x.shape[1]
    centred = replace(c, first=cut, second=cut, means=means.flatten().expand(2, -1))
    change = random(groups * rows, columns, seed=9)
    best = bias_change(change, [centred])

    def left(moved):
        """1/2 E[(dW x + db)ᵀ R (dW x + db)], group by group."""
        total = 0.0
        for group in range(groups):
            own = slice(group * rows, (group + 1) * rows)
            dy = x[group].double() @ change[own].double().T + moved[own].double()
            total += 0.5 * (dy @ c.rows[group].double() * dy).sum(1).mean()
        return float(total)

    assert damage(change, [centred]) == pytest.approx(left(best), rel=1e-4)
    for seed in range(5):
        assert left(best + 0.1 * random(groups * rows, seed=seed)) > left(best)


def test_the_bias_of_what_was_rounded_on_one_half_moves_by_that_halfs_mean():
    c = replace(curvature(1, 3, 4), means=random(2, 4))
    change = random(3, 4, seed=5)
    assert torch.allclose(bias_change(change, [c], held_out=True), -change @ c.means[0])
    assert torch.allclose(bias_change(change, [c]), -change @ c.means.mean(0), atol=1e-6)
