"""The solver against every possible plan of small problems."""

import ctypes
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attar.errors import BudgetError
from attar.plan.solve import RELATIVE_GAP, quiet, smallest, solve, usable, weight_bytes
from attar.records import Candidate, Cost


def candidate(unit, size, nats, refused=None):
    return Candidate(unit, "keep_float", {"bits": 16}, Cost(size, 0), nats, refused)


def problem(*units):
    """Units as lists of (bytes, nats)."""
    return {
        f"u{i}": [candidate(f"u{i}", size, nats) for size, nats in options]
        for i, options in enumerate(units)
    }


def damage(choices):
    return sum(choice.predicted_damage for choice in choices.values())


def best_by_trying_all(candidates, limit):
    plans = [dict(zip(candidates, plan, strict=True)) for plan in product(*candidates.values())]
    fitting = [plan for plan in plans if weight_bytes(plan) <= limit]
    return min(map(damage, fitting), default=None)


OPTION = st.tuples(st.integers(1, 5000), st.floats(1e-6, 10.0))
UNIT = st.lists(OPTION, min_size=1, max_size=5)


@given(units=st.lists(UNIT, min_size=1, max_size=4), share=st.floats(0.0, 1.2))
@settings(derandomize=True, max_examples=80, deadline=None)
@example(units=[[(1, 1e-9), (2, 0.0)], [(1, 10.0), (4000, 1.0)]], share=0.5)
def test_no_plan_that_fits_loses_less_than_the_gap_allows(units, share):
    candidates = problem(*units)
    least, most = weight_bytes(smallest(candidates)), sum(max(u)[0] for u in units)
    limit = least + int(share * (most - least))
    chosen = solve(candidates, limit)
    assert weight_bytes(chosen) <= limit
    assert list(chosen) == list(candidates)
    assert all(choice in candidates[name] for name, choice in chosen.items())
    best = best_by_trying_all(candidates, limit)
    # The solver scales by the largest price: what it can tell apart is a share of that.
    slack = 1e-6 * max(nats for unit in units for _, nats in unit)
    assert damage(chosen) <= best * (1 + RELATIVE_GAP) + slack


@given(units=st.lists(UNIT, min_size=1, max_size=4), missing=st.integers(1, 500))
@settings(derandomize=True, max_examples=20, deadline=None)
def test_a_budget_below_the_smallest_plan_is_refused_with_its_size(units, missing):
    candidates = problem(*units)
    least = weight_bytes(smallest(candidates))
    with pytest.raises(BudgetError) as error:
        solve(candidates, least - missing)
    assert (
        f"{least:,} bytes" in error.value.problem and f"{least - missing:,}" in error.value.problem
    )
    assert "--size" in error.value.hint


def test_the_smallest_plan_that_fits_exactly_is_found():
    candidates = problem([(10, 1.0), (20, 0.5)], [(7, 2.0), (8, 0.1)])
    assert weight_bytes(solve(candidates, 17)) == 17


def test_with_room_for_everything_every_unit_gets_its_best():
    candidates = problem([(10, 1.0), (20, 0.5)], [(7, 2.0), (8, 0.1)], [(5, 0.0)])
    assert damage(solve(candidates, 10**9)) == pytest.approx(0.6)


def test_bytes_go_where_they_buy_the_most_behaviour():
    dear, cheap = [(100, 5.0), (200, 1.0)], [(100, 0.02), (200, 0.01)]
    chosen = solve(problem(dear, cheap), 300)
    assert [c.cost.weight_bytes for c in chosen.values()] == [200, 100]


def test_the_same_problem_has_the_same_plan_twice():
    candidates = problem(*[[(100 * k, 1.0 / k) for k in range(1, 6)] for _ in range(12)])
    assert solve(candidates, 3333) == solve(candidates, 3333)


def test_prices_far_apart_do_not_hide_each_other():
    """Real prices lie between 1e-7 and 1 nat; small ones count once the large ones are spent."""
    candidates = problem([(10, 1.0), (20, 1e-3)], [(10, 1e-6), (20, 1e-8)])
    assert damage(solve(candidates, 40)) == pytest.approx(1e-3 + 1e-8, rel=1e-9)


def test_prices_of_nothing_are_solved():
    assert damage(solve(problem([(5, 0.0)], [(5, 0.0), (9, 0.0)]), 10)) == 0.0


@given(
    options=st.lists(st.tuples(st.integers(1, 30), st.floats(0.0, 3.0)), min_size=1, max_size=12)
)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_usable_candidates_are_those_that_no_other_beats(options):
    given = [candidate("u", size, nats) for size, nats in options]
    kept = usable(given)
    sizes = [c.cost.weight_bytes for c in kept]
    prices = [c.predicted_damage for c in kept]
    assert sizes == sorted(set(sizes)) and prices == sorted(set(prices), reverse=True)
    for one in given:
        assert any(
            c.cost.weight_bytes <= one.cost.weight_bytes
            and c.predicted_damage <= one.predicted_damage
            for c in kept
        )


def test_refused_and_unpriced_candidates_are_never_chosen():
    options = [
        candidate("u", 1, None, refused="has 7 columns"),
        candidate("u", 2, 0.0, refused="is not allowed"),
        candidate("u", 5, 1.0),
    ]
    assert usable(options) == [options[2]]
    assert solve({"u": options}, 10)["u"] is options[2]
    assert smallest({"u": options})["u"] is options[2]


def test_what_a_library_prints_past_python_while_it_solves_is_not_shown(capfd):
    library = ctypes.CDLL(None)
    with quiet():
        library.printf(b"of no use\n")
    library.printf(b"of use\n")
    library.fflush(None)
    assert capfd.readouterr().out == "of use\n"
