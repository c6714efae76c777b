"""Signs of powers of two, against every choice of exponents and signs by plain loops."""

from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decide import classifier_session, divergence_by_hand
from test_feedback import factors, grid
from test_feedback import moment as row_moment
from torch.nn import functional as F

from attar import decide
from attar.errors import ModelError, SettingError
from attar.kernels.feedback import reference_round, round_both
from attar.plan.solve import solve, weight_bytes
from attar.records import Budget, Unit
from attar.transform.apply import build_transform, materialise
from attar.transform.quantize_binary import QuantizeBinary, fitted_exponents, sums_of
from attar.transform.quantize_levels import QuantizeLevels


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns, seed=1):
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return (x.T @ x / len(x))[None]


def every_sum(exponents):
    return sorted(sum(s * 2.0**e for s, e in zip(signs, exponents, strict=True))
                  for signs in product((-1, 1), repeat=len(exponents)))  # fmt: skip


def loss_of(values, share, exponents):
    sums = every_sum(exponents)
    return sum(w * min((v - s) ** 2 for s in sums) for v, w in zip(values, share, strict=True))


@pytest.mark.parametrize("exponents", [(0,), (2, -1), (3, 2, 1), (1, 0, -4, -6)])
def test_codes_rise_with_the_sums_they_stand_for(exponents):
    found = sums_of(torch.tensor(exponents)[None, None])
    assert found[0, 0].tolist() == every_sum(exponents)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_exponents_are_nearly_the_best_of_all(bits):
    """Near the best of every choice of different exponents, over many small groups."""
    x, share = random(12, 2, 9, seed=3), random(12, 2, 9, seed=4).square()
    found = fitted_exponents(x, share, bits)
    ratios = []
    for row in range(12):
        for group in range(2):
            values, weights = x[row, group].tolist(), share[row, group].tolist()
            own = sorted(found[row, group].tolist(), reverse=True)
            assert own == found[row, group].tolist() and len(set(own)) == bits
            best = min(loss_of(values, weights, e) for e in combinations(range(2, -8, -1), bits))
            ratios.append(loss_of(values, weights, own) / best)
    assert min(ratios) > 0.999
    assert sum(r < 1.001 for r in ratios) > 0.6 * len(ratios)
    assert sum(ratios) / len(ratios) < 1.25


def test_a_table_for_each_row_and_group_rounds_as_the_formula_does():
    steps = grid(37, 41, groups=2, top=7.0)
    tables = random(37, 2, 8, seed=9).sort(-1).values
    low = torch.zeros(37, 2)
    steps = steps.__class__(
        scale=torch.ones(37, 2), column_scale=torch.ones(41), group_of=steps.group_of,
        lowest=low, highest=low + 7, levels=tables,
    )  # fmt: skip
    weight = random(37, 41, seed=4)
    above, left = factors(row_moment(37, 1))[0], factors(row_moment(41, 2))[0]
    expected = reference_round(weight, above, left, steps)
    found = round_both(weight, above, left, steps)
    assert float((found != expected).float().mean()) < 0.02
    values = steps.values(found)
    for i, j in ((0, 0), (36, 40), (5, 33)):
        assert float(values[i, j]) == float(tables[i, int(steps.group_of[j]), int(found[i, j])])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.sampled_from([(8, 8), (12, 4), (5, 0)]),
       st.floats(-30, 30), st.integers(0, 99))  # fmt: skip
def test_what_is_read_back_is_what_was_priced_and_made_of_its_sizes(bits, rows, shape, size, seed):
    columns, group = shape
    weight = random(rows, columns, seed=seed) * 2.0**size
    made = QuantizeBinary(bits, group)
    found = made.apply(weight, None)
    assert torch.equal(found.dense, made.decode(found.tensors, rows, columns))
    sums = sums_of(found.tensors["exponent"].int() - 127)
    width = group or columns
    for i in range(rows):
        for j in range(columns):
            assert float(found.dense[i, j]) in sums[i, j // width].tolist()


def test_more_signs_lose_less_and_two_lose_less_than_ternary_with_one_size():
    """As its works_when asks: the error of what comes out, by bits."""
    weight, c = random(96, 128, seed=5), moment(128)
    x = random(200, 128, seed=7) @ torch.linalg.cholesky(c[0].double()).T.float()

    def lost(transform):
        return float((x @ (transform.apply(weight, c).dense - weight).T).square().mean())

    by_bits = [lost(QuantizeBinary(bits, 64)) for bits in (1, 2, 3, 4)]
    assert all(b < 0.55 * a for a, b in pairwise(by_bits[:3]))
    assert by_bits[3] < by_bits[2]
    assert by_bits[1] < lost(QuantizeLevels("ternary", 64))


def test_shifts_and_additions_alone_give_the_answer():
    """What it is for: an answer to whole numbers takes no multiplication."""
    weight = random(6, 16, seed=2)
    made = QuantizeBinary(3, 8)
    stored = made.apply(weight, None)
    x = torch.randint(-128, 128, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    exponent = stored.tensors["exponent"].int() - 127
    lowest = int(exponent.min())
    sums = sums_of(exponent)
    multiplied = F.linear(torch.tensor(x).double(), stored.dense.double())
    for row in range(6):
        total = 0
        for j, value in enumerate(x):
            code = int((sums[row, j // 8] == stored.dense[row, j]).nonzero()[0])
            for k in range(3):
                shifted = value << (int(exponent[row, j // 8, k]) - lowest)
                total += shifted if code >> (2 - k) & 1 else -shifted
        assert total * 2.0**lowest == float(multiplied[row])


def test_the_planner_gives_each_unit_its_signs_and_loses_less_than_three_for_all():
    """Its works_when: automatic bits for each layer."""
    session = classifier_session()
    statistics = decide.explain(session)
    menu = [("quantize_binary", {"bits": bits, "group_size": 0}) for bits in (1, 2, 3, 4)]
    names = [u.name for u in session.units]
    candidates = decide.price_treatments(session, statistics, dict.fromkeys(names, menu))
    even = {name: of[2] for name, of in candidates.items()}
    lost = []
    planned = solve(candidates, weight_bytes(even))
    for choices in (planned, even):
        assert weight_bytes(choices) <= weight_bytes(even)
        done = decide.carry_out(session, choices, Budget(0), 0, statistics)
        small = materialise(session.model.module, done.treated)
        lost.append(divergence_by_hand(session, small, session.data.recovery))
    assert len({c.settings["bits"] for c in solve(candidates, weight_bytes(even)).values()}) > 1
    assert lost[0] < lost[1]


def test_damaged_exponents_and_unknown_settings_are_refused():
    made = QuantizeBinary(2, 0)
    tensors = dict(made.apply(random(3, 8), None).tensors)
    tensors["exponent"] = torch.full_like(tensors["exponent"], 255)
    with pytest.raises(ModelError, match="exponent"):
        made.decode(tensors, 3, 8)
    with pytest.raises(SettingError, match="1, 2, 3, 4"):
        build_transform("quantize_binary", {"bits": 5})
    assert made.rejects(Unit("w", "linear", (3, 8), ("linear",))) is None
