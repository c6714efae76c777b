"""Sizes as people write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import BudgetError
from attar.plan.size import parse_size

MODEL = {"bytes_at_16_bits": 2_000_000, "n_parameters": 1_000_000}


@pytest.mark.parametrize(
    "text, size",
    [
        ("60MB", 60_000_000),
        ("64MiB", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2 * 2**30),
        ("700kB", 700_000),
        ("3KiB", 3072),
        ("12345", 12345),
        ("12345 b", 12345),
        ("25%", 500_000),
        ("12.5 %", 250_000),
        ("3.1bits", 387_500),
        ("4bit", 500_000),
        ("  60 mb ", 60_000_000),
        (".5MB", 500_000),
        ("100%", 2_000_000),
        ("1.9999999b", 1),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text, **MODEL) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "small",
        "MB",
        "-60MB",
        "6e7",
        "60 M B",
        "60MB!",
        "60,5MB",
        "1.MB",
        "nan",
        "inf",
        "٣MB%",
    ],
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(BudgetError, match="cannot read the size") as error:
        parse_size(text, **MODEL)
    assert "60MB" in error.value.hint and "3.1bits" in error.value.hint


@pytest.mark.parametrize("unit", ["TB", "MBit", "percent", "byte"])
def test_an_unknown_unit_is_named(unit):
    with pytest.raises(BudgetError, match=f"unit '{unit}'"):
        parse_size(f"60{unit}", **MODEL)


@pytest.mark.parametrize("text", ["0", "0MB", "0.4b", "0%", "0.0bits"])
def test_no_bytes_at_all_are_refused(text):
    with pytest.raises(BudgetError, match="no bytes at all"):
        parse_size(text, **MODEL)


@given(st.text(max_size=12))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_any_text_is_a_size_above_zero_or_refused(text):
    try:
        found = parse_size(text, **MODEL)
    except BudgetError as error:
        assert error.hint
    else:
        assert found >= 1


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "MB", "1" + "0" * 305 + "GB"])
def test_a_number_beyond_all_bounds_is_refused_or_read(text):
    try:
        assert parse_size(text, **MODEL) >= 1
    except BudgetError as error:
        assert error.hint
