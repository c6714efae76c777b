"""Range-coded integers, against plain loops and against what theory says they must reach."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError, SettingError
from attar.kernels import rans, trellis
from attar.plan.solve import solve
from attar.records import Candidate, Cost, RowWeights, Unit
from attar.transform import coded
from attar.transform.apply import Treated
from attar.transform.quantize_entropy import QuantizeEntropy, Rounding, search, trials
from attar.transform.quantize_feedback import DAMPING_FRACTION, QuantizeFeedback, rounding_order

WIDTHS, BOTH = (1.5, 2.5, 4, 6), (False, True)
BY_WORTH, ALONG = QuantizeEntropy(3, True), QuantizeEntropy(3, True, True)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns, seed=1):
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    x = x / columns**0.5 + random(4 * columns, columns, seed=seed + 2)
    return (x.T @ x / len(x))[None]


def damage(change, c, importance):
    return float((((change @ c[0]) * change).sum(1) * importance).sum())


def unpacked(stored, width, n):
    """Take n codes of a few bits from the front, lowest bit first."""
    bits = np.unpackbits(stored, bitorder="little")[: n * width].reshape(n, width)
    return [int(sum(int(b) << i for i, b in enumerate(code))) for code in bits]


def decoded_by_hand(stored, rows, columns, along):
    """Read the stored form from its description, in plain loops."""
    contexts = 32 if along else 16
    at, raw = 4, stored.tobytes()
    (step,) = struct.unpack("<f", raw[:4])
    fields = []
    for width, n in ((6, rows), (6, columns), (4, rows), (4, columns)):
        size = -(-n * width // 8)
        fields.append(unpacked(stored[at : at + size], width, n))
        at += size
    row, column, row_class, column_class = fields
    ranges = struct.unpack(f"<{2 * contexts}H", raw[at : at + 4 * contexts])
    at += 4 * contexts
    counts = []
    for first, last in zip(ranges[::2], ranges[1::2], strict=True):
        own = [0] * 2048
        for code in range(first, last + 1):
            own[code] = round(2 ** ((raw[at] - 1) / 16)) if raw[at] else 0
            at += 1
        counts.append(own)
    frequencies = rans.normalised(np.array(counts)).tolist()
    context = [
        min(15, max(0, row_class[i] + column_class[j] - 8))
        for i in range(rows)
        for j in range(columns)
    ]
    walk = rans.Walk(trellis.NEXT, 16 * trellis.ODD, columns) if along else rans.STILL
    codes = rans.reference_decode(raw[at:], context, frequencies, walk)
    levels, state = [], [0] * columns
    for place, code in enumerate(codes):
        k, now = code - 1024, state[place % columns]
        levels.append(2 * k - (k > 0) * trellis.ODD[now] + (k < 0) * trellis.ODD[now])
        state[place % columns] = trellis.NEXT[now][k % 2]
    levels = levels if along else [code - 1024 for code in codes]
    factors = [2.0 ** ((k - 32) / 3) for k in range(64)]
    return np.array(
        [
            [levels[i * columns + j] * step * factors[row[i]] * factors[column[j]]
             for j in range(columns)]
            for i in range(rows)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("bits", [1.5, 3, 6])
def test_the_stored_form_is_as_described(bits, along):
    weight, c = random(70, 33) * torch.exp(random(70, 1, seed=2)), moment(33)
    rows = RowWeights(torch.exp(random(70, seed=3)), torch.ones(70))
    rounding = Rounding.of(weight, c, rows, ALONG if along else BY_WORTH)
    stored = coded.to_bytes(*search(rounding, int(bits * weight.numel() / 8) + 400))
    found = coded.from_bytes(stored, 70, 33, along=along).dense().double().numpy()
    # Products of three float32 numbers.
    assert np.allclose(found, decoded_by_hand(stored, 70, 33, along), rtol=1e-6, atol=0)


def rounded_by_hand(weight, c, row, column, step):
    """Round column after column in float64, moving errors by solving for the columns left."""
    c = c.double() + DAMPING_FRACTION * c.double().diagonal().mean() * torch.eye(
        len(c), dtype=torch.float64
    )
    order = torch.argsort(c.diagonal(), descending=True, stable=True).tolist()
    left, codes = weight.double().clone(), torch.zeros(weight.shape)
    for place, j in enumerate(order):
        size = step * row.double() * float(column[j])
        codes[:, j] = (left[:, j] / size).round().clamp(-1024, 1023)
        error = left[:, j] - codes[:, j] * size
        rest = order[place + 1 :]
        if rest:
            # The change of the columns left that makes good most of an error of 1.
            share = torch.linalg.solve(c[rest][:, rest], c[rest, j])
            left[:, rest] += error[:, None] * share
    return codes


def test_rounding_is_error_feedback_with_a_step_for_each_weight():
    weight, c = random(12, 9), moment(9)
    rows = RowWeights(torch.exp(random(12, seed=3)), torch.ones(12))
    rounding = Rounding.of(weight, c, rows, BY_WORTH)
    table = coded.factor_table()
    for step in (0.05, 0.4, 2.0):
        factors = rounding.factors_at(step)
        row, column = table[factors.rows.long()], table[factors.columns.long()]
        codes = rounding.codes(step)
        by_hand = rounded_by_hand(weight, c[0], row, column, step)
        # A tie or nearly one may fall the other way in float32, and move what follows.
        assert (codes - coded.MIDDLE == by_hand).float().mean() > 0.97


def test_steps_follow_what_rows_and_columns_are_worth():
    c = torch.diag(torch.tensor([1.0, 4.0, 16.0, 64.0] * 10))[None]
    rows = RowWeights(torch.tensor([1.0, 16.0, 64.0] * 20), torch.ones(60))
    for known in (c, c[0].diagonal()):
        rounding = Rounding.of(random(60, 40), known, rows, BY_WORTH)
        table = coded.factor_table()
        row, column = table[rounding.factors.rows.long()], table[rounding.factors.columns.long()]
        # Factors are powers of two in thirds: half a third off is 12%; damping of C takes 10% more.
        for found, exact in ((row, rows.importance), (column, c[0].diagonal())):
            product = found * exact.sqrt()
            assert float(product.max() / product.min()) < 1.6


def test_a_column_that_is_worth_a_million_others_is_nearly_exact():
    weight, c = random(128, 130), moment(130)
    loud = c.clone()
    loud[0, 7] *= 1e3
    loud[0, :, 7] *= 1e3
    alone, found = (
        QuantizeEntropy(3, True).apply(weight, known).dense - weight
        for known in (loud[0].diagonal(), loud)
    )
    assert float(found[:, 7].abs().max()) < 0.02
    # Damping follows the mean worth, so that feedback between the others is weak; yet no loss.
    assert damage(found, loud, torch.ones(128)) < 1.02 * damage(alone, loud, torch.ones(128))


@given(
    rows=st.integers(32, 200),
    columns=st.integers(32, 90),
    bits=st.floats(1.0, 7.0),
    loud=st.floats(0, 2),
    known=st.sampled_from(["nothing", "diagonal", "full"]),
    along=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=30, deadline=None)
def test_bytes_are_never_more_than_allowed_and_nearly_all_used(
    rows, columns, bits, loud, known, along, seed
):
    weight = random(rows, columns, seed=seed) * torch.exp(loud * random(rows, 1, seed=seed + 1))
    c = None if known == "nothing" else moment(columns, seed)
    c = c[0].diagonal() if known == "diagonal" else c
    rounding = Rounding.of(weight, c, None, ALONG if along else BY_WORTH)
    allowed = int(bits * weight.numel() / 8) + 500
    codes, frequencies = search(rounding, allowed)
    stored = coded.to_bytes(codes, frequencies)
    assert 0.95 * allowed - 60 <= len(stored) <= allowed
    again = coded.from_bytes(stored, rows, columns, along=along)
    assert torch.equal(again.dense(), codes.dense())
    assert torch.equal(codes.small().dense(), codes.dense())
    assert codes.dense().isfinite().all()


def test_gaussian_weights_come_close_to_what_theory_allows_uniform_steps():
    weight = random(512, 512)
    for bits in (3, 4, 5):
        dense = QuantizeEntropy(bits, True).apply(weight, None).dense
        found = float((dense - weight).double().square().mean())
        # Entropy-coded uniform steps: pi e / 6 above the bound 2^-2R (Gish and Pierce 1968).
        best = 2.0 ** (-2 * bits) * torch.pi * torch.e / 6
        overhead = 2.0 ** (2 * 0.047)  # 9 bits for each row and column, tables, states
        assert found < 1.04 * overhead * best


def test_along_a_trellis_gaussian_weights_come_within_a_decibel_of_the_bound():
    weight = random(512, 512)
    for bits in (2, 3, 4):
        dense, plain = (
            QuantizeEntropy(bits, False, along).apply(weight, None).dense for along in (True, False)
        )
        found, scalar = (float((d - weight).double().square().mean()) for d in (dense, plain))
        overhead = 2.0 ** (2 * 0.047)  # 9 bits for each row and column, tables, states
        # Rate-distortion bound 2^-2R; 8 states leave half a decibel of the 1.53 that uniform steps
        # lose (Fischer and Wang 1992, table II).
        assert found < 10**0.085 * overhead * 2.0 ** (-2 * bits)
        assert found < 0.84 * scalar


@pytest.mark.parametrize("bits", [1.5, 2.5, 4])
def test_along_a_trellis_less_is_lost_with_feedback_on_both_sides_too(bits):
    weight, c, r = random(256, 192), moment(192), moment(256, 5)[0]
    rows = RowWeights(r.diagonal(), torch.ones(256), r)
    lost = []
    for along in (False, True):
        change = QuantizeEntropy(bits, True, along).apply(weight, c, rows).dense - weight
        lost.append(float((r @ change @ c[0] * change).sum()))
    assert lost[1] < 0.9 * lost[0]


def test_at_equal_bytes_it_loses_much_less_than_codes_of_fixed_width():
    weight, c = random(256, 192), moment(192)
    rows = RowWeights(torch.exp(random(256, seed=3)), torch.ones(256))
    unit = Unit("w", "linear", (256, 192), ("linear",))
    for width in (2, 3, 4):
        fixed = QuantizeFeedback(width, 64)
        bits = 8 * fixed.cost(unit).weight_bytes / weight.numel()
        coded_dense = QuantizeEntropy(bits, True).apply(weight, c, rows).dense
        fixed_dense = fixed.apply(weight, c, rows).dense
        own = damage(coded_dense - weight, c, rows.importance)
        assert own < 0.5 * damage(fixed_dense - weight, c, rows.importance)


def test_trials_are_what_applying_gives_to_within_a_few_percent():
    weight, c = random(300, 160), moment(160)
    rows = RowWeights(torch.exp(random(300, seed=3)), torch.ones(300))
    transforms = [QuantizeEntropy(bits, True, along) for along in BOTH for bits in WIDTHS]
    for transform, made in zip(transforms, trials(weight, c, rows, transforms), strict=True):
        exact = damage(transform.apply(weight, c, rows).dense - weight, c, rows.importance)
        # A trial misses its bytes by a few hundredths of a bit.
        assert damage(made.dense - weight, c, rows.importance) == pytest.approx(exact, rel=0.1)


def test_trials_with_and_without_worth_do_not_mix():
    weight, c = random(200, 96), moment(96)
    rows = RowWeights(torch.exp(random(200, seed=3)), torch.ones(200))
    mixed = [QuantizeEntropy(3), QuantizeEntropy(3, True), QuantizeEntropy(4, True)]
    for transform, made in zip(mixed, trials(weight, c, rows, mixed), strict=True):
        (alone,) = trials(weight, c, rows, [transform])
        assert torch.equal(made.dense, alone.dense)


def test_sampled_rows_get_the_steps_of_all_rows():
    weight, c = random(2000, 64), moment(64)
    importance = torch.exp(random(2000, seed=3))
    all_rows = RowWeights(importance, torch.ones(2000))
    some = RowWeights(importance[::4], torch.full((500,), 4.0))
    for bits in (2, 4):
        (whole,) = trials(weight, c, all_rows, [QuantizeEntropy(bits, True)])
        (part,) = trials(weight[::4], c, some, [QuantizeEntropy(bits, True)])
        found = 4 * damage(part.dense - weight[::4], c, importance[::4])
        # 500 of 2000 rows: their mean importance alone is off by a few percent.
        assert found == pytest.approx(damage(whole.dense - weight, c, importance), rel=0.15)


@pytest.mark.parametrize("power", [-60, 60])
def test_the_size_of_weights_and_moments_changes_nothing_but_the_step(power):
    weight, c = random(140, 120), moment(120)
    rows = RowWeights(torch.exp(random(140, seed=3)), torch.ones(140))
    one = QuantizeEntropy(3, True).apply(weight, c, rows).dense
    scaled = RowWeights(rows.importance * 2.0**-power, rows.counts)
    other = QuantizeEntropy(3, True).apply(weight * 2.0**power, c * 2.0**power, scaled).dense
    assert torch.equal(one * 2.0**power, other)


def test_without_worth_there_is_one_step():
    weight, c = random(200, 96), moment(96)
    rows = RowWeights(torch.exp(random(200, seed=3)), torch.ones(200))
    plain = Rounding.of(weight, c, rows, QuantizeEntropy())
    assert len(plain.factors.columns.unique()) == len(plain.factors.rows.unique()) == 1
    ones = torch.ones(200)
    own = damage(QuantizeEntropy(3).apply(weight, c, rows).dense - weight, c, ones)
    blind = damage(QuantizeEntropy(3).apply(weight, None).dense - weight, c, ones)
    assert own < 0.8 * blind  # errors are fed back all the same


def test_large_codes_are_kept_and_decode_the_same():
    weight = random(128, 160)
    weight[0, 0] = 60.0
    transform = QuantizeEntropy(6, True)
    made = transform.apply(weight, None)
    assert made.unpacked.codes.dtype == torch.int16
    assert abs(float(made.dense[0, 0]) - 60) < 0.1
    for kept in (made, QuantizeEntropy(2, True).apply(random(128, 160), None)):
        assert torch.equal(kept.unpacked.dense(), kept.dense)
    assert kept.unpacked.codes.dtype == torch.int8
    unit = Unit("w", "linear", (128, 160), ("linear",))
    treated = Treated(unit, QuantizeEntropy(2, True), {}, kept.unpacked)
    assert torch.equal(treated.weight(), kept.dense)


@pytest.mark.parametrize("along", BOTH)
def test_weights_of_zeros_take_no_bits_and_stay_zeros(along):
    made = QuantizeEntropy(2, True, along).apply(torch.zeros(128, 160), moment(160))
    assert not made.dense.any()


def test_what_no_step_can_reach_is_refused():
    with pytest.raises(SettingError, match="no step brings"):
        search(Rounding.of(random(40, 40), None, None, BY_WORTH), 100)


def test_weights_too_small_for_a_step_are_refused():
    with pytest.raises(SettingError, match="float32 cannot hold"):
        QuantizeEntropy(5).apply(random(130, 130) * 1e-45, None)


def test_a_damaged_form_is_refused_or_decodes_to_other_finite_weights():
    transform, weight = QuantizeEntropy(2, True), random(130, 130)
    made = transform.apply(weight, None)
    stored = made.tensors["coded"]
    draw = np.random.default_rng(0)
    for place in [*range(300), *draw.integers(300, len(stored), 200)]:
        changed = stored.clone()
        changed[place] ^= int(draw.integers(1, 256))
        try:
            dense = transform.decode({"coded": changed}, 130, 130)
        except ModelError:
            continue
        assert dense.shape == weight.shape and not dense.isnan().any()
    for step in (0.0, -1.0, float("inf"), float("nan")):
        changed = stored.clone()
        changed[:4] = torch.from_numpy(np.array([step], "<f4").view(np.uint8))
        with pytest.raises(ModelError, match="step"):
            transform.decode({"coded": changed}, 130, 130)


def test_what_lasts_of_an_error_is_the_spread_left_when_later_columns_are_known():
    c = moment(7)[0].double()
    ridge = DAMPING_FRACTION * c.diagonal().mean()
    c = c + ridge * torch.eye(7, dtype=torch.float64)
    order = rounding_order(moment(7))
    for place, j in enumerate(order.places.tolist()):
        rest = order.places.tolist()[place + 1 :]
        left = c[j, j]
        if rest:
            left = left - c[j, rest] @ torch.linalg.solve(c[rest][:, rest], c[rest, j])
        assert float(order.lasting[0, place]) == pytest.approx(
            float((left - ridge).sqrt()), rel=1e-3
        )


def test_units_it_does_not_suit_are_refused_with_the_reason():
    transform = QuantizeEntropy(3, True)
    good = Unit("w", "linear", (128, 160), ("linear",))
    assert transform.rejects(good) is None
    assert "too few" in transform.rejects(replace(good, shape=(100, 100)))
    assert "fewer than 32" in transform.rejects(replace(good, shape=(4000, 8)))
    grouped = Unit("c", "convolution", (256, 64, 3, 3), ("convolution",), groups=2)
    assert "groups" in transform.rejects(grouped)


def blocks_of_rows(weight, importance, bits, n_blocks=16):
    """Fixed widths of 2 to 8 bits by blocks of rows of like worth, chosen for the least damage."""
    order = importance.argsort(descending=True)
    options = {}
    for number, rows in enumerate(order.chunk(n_blocks)):
        options[str(number)] = [
            Candidate(
                str(number), "quantize_feedback", {"bits": width},
                Cost(sum(t.nbytes for t in made.tensors.values()), 0),
                float(((made.dense - weight[rows]).square().sum(1) * importance[rows]).sum()),
            )
            for width in (2, 3, 4, 5, 6, 8)
            for made in [QuantizeFeedback(width, 0).apply(weight[rows], None)]
        ]  # fmt: skip
    permutation = 2 * len(weight)  # 16 bits say where each row went
    chosen = solve(options, int(bits * weight.numel() / 8) - permutation)
    return sum(c.predicted_damage for c in chosen.values()), chosen


def test_rows_of_an_embedding_have_bits_by_their_worth_and_lose_less_than_by_blocks_of_rows():
    """Tokens as frequent as in a text (Zipf): rare rows are cheap, one by one."""
    weight, importance = random(2048, 64), 1 / torch.arange(1.0, 2049)
    importance = importance[torch.randperm(2048, generator=torch.Generator().manual_seed(4))]
    rows = RowWeights(importance, torch.ones(2048))
    rounding = Rounding.of(weight, None, rows, BY_WORTH)
    codes, _ = search(rounding, int(3 * weight.numel() / 8))
    spread = (codes.codes.float() - coded.MIDDLE).square().mean(1).sqrt()
    # A row worth four times as much has steps half as wide: one bit more for each weight.
    bits_of_row = spread.log2()
    order = importance.argsort(descending=True)
    for one, two in ((20, 80), (80, 320), (320, 1280)):
        here, there = (bits_of_row[order[at - 8 : at + 8]].mean() for at in (one, two))
        assert float(here - there) == pytest.approx(1.0, abs=0.25)
    lost = float(((codes.dense() - weight).square().sum(1) * importance).sum())
    by_blocks, chosen = blocks_of_rows(weight, importance, 3)
    assert len({c.settings["bits"] for c in chosen.values()}) > 2  # they do mix
    even, _ = search(
        Rounding.of(weight, None, rows, QuantizeEntropy()), int(3 * weight.numel() / 8)
    )
    evenly = float(((even.dense() - weight).square().sum(1) * importance).sum())
    assert lost < 0.7 * by_blocks and by_blocks < evenly
