import pytest
import torch

from attar.errors import SettingError
from attar.records import Unit
from attar.transform import groups
from attar.transform.quantize_rtn import QuantizeRtn

SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True])


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def unit(*shape):
    return Unit("fc", "linear", shape, ("linear",), macs=1000)


@SYMMETRIC
def test_more_bits_never_mean_more_error_without_search(symmetric):
    for seed, group_size in [(0, 0), (1, 11), (2, 33)]:
        weight = random_weight(33, 33, seed)
        errors = [
            float((QuantizeRtn(bits, group_size, symmetric, False).apply(weight, None).dense
                   - weight).square().sum())
            for bits in range(2, 9)
        ]  # fmt: skip
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * errors[0]


@SYMMETRIC
def test_weights_on_the_grid_come_back_exactly(symmetric):
    codes = torch.arange(16).repeat(3, 2)[:, :32].float()
    weight = 0.25 * (codes - 8)
    dense = QuantizeRtn(4, 16, symmetric, search=False).apply(weight, None).dense
    assert torch.equal(dense, weight)


def test_search_spends_its_range_where_inputs_are_strong():
    weight = random_weight(8, 32)
    diagonal = torch.where(torch.arange(32) < 4, 1.0, 1e-4)
    weight[:, 4:] *= 10  # large weights on inputs that are nearly silent
    transform = QuantizeRtn(bits=3, group_size=32)
    informed = transform.apply(weight, diagonal).dense
    blind = transform.apply(weight, None).dense

    def damage(dense):
        return float((diagonal * (dense - weight) ** 2).sum())

    assert damage(informed) < damage(blind)


def test_a_moment_per_row_group_is_used_for_its_rows():
    weight, transform = random_weight(6, 16), QuantizeRtn(2, 8)
    moments = torch.stack([torch.diag(random_weight(1, 16, s)[0].square()) for s in range(3)])
    # The same scale for all, as the whole moment is scaled together.
    together = transform.apply(weight, moments).dense
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = transform.apply(weight[rows], moments[group : group + 1]).dense
        assert torch.equal(together[rows], alone)


def test_side_information_is_counted():
    # Codes 4 bits; per group of 64 one float16 scale (0.25) and one 4-bit zero point (0.0625).
    assert QuantizeRtn(4, 64).cost(unit(64, 64)).weight_bytes * 8 == 64 * 64 * 4.3125
    assert QuantizeRtn(4, 64, True).cost(unit(64, 64)).weight_bytes * 8 == 64 * 64 * 4.25
    assert QuantizeRtn(4, 64).cost(unit(64, 64)).macs == 1000


def test_convolution_takes_whole_rows_or_a_divisor():
    convolution = Unit("conv", "convolution", (8, 3, 3, 3), ("convolution",))
    assert QuantizeRtn(4, 64).rejects(convolution) == groups.refuse_groups(27, 64)
    assert QuantizeRtn(4, 9).rejects(convolution) is None
    assert QuantizeRtn(4, 0).rejects(convolution) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": 1}, "bits is 1, but quantize_rtn takes one of 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 9}, "bits is 9"),
        ({"group_size": -1}, "group_size is -1"),
    ],
)
def test_bad_setting_is_named_with_what_to_type(settings, named):
    with pytest.raises(SettingError, match=named) as caught:
        QuantizeRtn(**settings)
    assert caught.value.hint.startswith("set ")


def test_label_says_bits_and_groups():
    assert QuantizeRtn(3, 64).label() == "3 bit, groups of 64"
    assert QuantizeRtn(8, 0, symmetric=True).label() == "8 bit, one scale per row, symmetric"
