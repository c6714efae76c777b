"""Where a change lies: heads and rows by name, and nothing where it is spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.explain.concentration import FEW, MOSTLY, where


def spread(rows=12, columns=8, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_change_that_is_spread_has_no_name_and_neither_has_none():
    assert where(spread(40, 30)) == ""
    assert where(spread(40, 30), heads=3) == ""
    assert where(torch.zeros(3, 4)) == ""


@pytest.mark.parametrize("head", range(4))
def test_a_head_that_is_gone_is_named(head):
    change = 1e-3 * spread()
    change[:, 2 * head : 2 * head + 2] += 1.0
    assert where(change, heads=4) == f"head {head}"


@pytest.mark.parametrize(
    ("rows", "name"),
    [([5], "row 5"), ([3, 4, 5], "rows 3 to 5"), ([0, 4, 11], "3 of 12 rows, such as 0")],
)
def test_rows_are_named_whether_the_others_changed_a_little_or_not(rows, name):
    for rest in (0.0, 1e-3):
        change = rest * spread()
        change[rows] += 1.0
        assert where(change) == name


@given(
    sizes=st.lists(st.floats(0.0, 10.0), min_size=2, max_size=30).filter(lambda s: max(s) > 1e-3),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_what_is_named_holds_nearly_all_and_is_few(sizes):
    change = torch.tensor(sizes)[:, None]
    named = where(change)
    squares = sorted((s * s for s in sizes), reverse=True)
    held, count = 0.0, 0
    while held < MOSTLY * sum(squares) - 1e-9:
        held, count = held + squares[count], count + 1
    if named == "":
        assert count > FEW * len(sizes) - 1  # within the rounding of one sum
    else:
        assert count <= FEW * len(sizes)
        assert named.startswith("row") or " rows" in named
