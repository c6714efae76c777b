import math

import pytest

from attar.errors import SettingError
from attar.settings import (
    WIDTHS,
    WIDTHS_AND_FLOAT,
    check_choice,
    check_flag,
    check_fraction,
    check_group_size,
)

NOT_NUMBERS = [None, "4", True, False, [4], math.nan]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1, 9, 4.0, -4])
def test_width_outside_the_choices_is_named_with_all_of_them(value):
    with pytest.raises(SettingError) as caught:
        check_choice("some_method", "bits", value, WIDTHS, suggestion=4)
    assert caught.value.problem == (
        f"bits is {value!r}, but some_method takes one of 2, 3, 4, 5, 6, 7, 8."
    )
    assert caught.value.hint == "set bits to 4."


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1, 64.0])
def test_group_size_is_a_whole_number(value):
    with pytest.raises(SettingError, match=r"group_size is .* some_method") as caught:
        check_group_size("some_method", value)
    assert "64" in caught.value.hint


@pytest.mark.parametrize("value", [None, "true", 0, 1, 1.0])
def test_flag_is_true_or_false(value):
    with pytest.raises(SettingError, match=r"symmetric is .* takes true or false"):
        check_flag("some_method", "symmetric", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 1, 0.0, 1.0, -0.5, 50, math.inf])
def test_fraction_lies_between_0_and_1(value):
    with pytest.raises(SettingError, match="kept_fraction is"):
        check_fraction("some_method", "kept_fraction", value)


def test_good_values_pass():
    for bits in (2, 8, 16):
        assert check_choice("some_method", "bits", bits, WIDTHS_AND_FLOAT, 4) is None
    for group_size in (0, 1, 64):
        assert check_group_size("some_method", group_size) is None
    assert check_flag("some_method", "search", False) is None
    assert check_fraction("some_method", "kept_fraction", 0.25) is None
