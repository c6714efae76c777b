"""What every transform in the table promises, over odd shapes, all widths and every flag."""

from dataclasses import FrozenInstanceError, fields
from itertools import product
from pathlib import Path

import pytest
import torch

import attar.transform
from attar.errors import AttarError, ModelError, SettingError
from attar.records import Unit
from attar.transform import TRANSFORMS

UNITS = (
    Unit("one", "linear", (1, 1), ("linear",), macs=1),
    Unit("column", "linear", (7, 1), ("linear",), macs=7),
    Unit("odd", "linear", (7, 33), ("linear",), macs=231),
    Unit("larger", "linear", (33, 123), ("linear",), macs=33 * 123),
    Unit("even", "linear", (5, 64), ("linear",), macs=320),
    Unit("conv", "convolution", (8, 3, 3, 3), ("convolution",), macs=8 * 27 * 49),
    Unit("depthwise", "convolution", (6, 1, 5, 5), ("convolution",), groups=6, macs=150),
    Unit("embedding", "embedding", (11, 32), ("embedding", "linear")),
    Unit("tall", "embedding", (520, 33), ("embedding", "linear")),
    Unit("wide", "linear", (65, 256), ("linear",), macs=65 * 256),
)
# Values to try for settings of these names; others keep their default.
TRIED = {
    "bits": (2, 3, 4, 5, 6, 7, 8, 16, 32),
    "group_size": (0, 3),
    "symmetric": (False, True),
    "search": (False,),  # the default, with search, is always tried too
    "bfloat16": (False, True),
    "by_worth": (True,),  # the default is False
    "trellis": (False, True),
    "levels": ("nf4", "fp8", "ternary", "fp4_e3m0"),
    "score": ("wanda", "magnitude"),
    "minimise": ("outputs", "weights"),
    "type": ("Q8_0", "Q5_1", "IQ4_NL", "Q3_K", "IQ4_XS"),
}
ALL = pytest.mark.parametrize("kind", TRANSFORMS.values(), ids=TRANSFORMS)


def variants(kind):
    """Build the transform with its defaults and every combination of settings it allows."""
    yield kind()
    names = [field.name for field in fields(kind) if field.name in TRIED]
    for values in product(*(TRIED[name] for name in names)):
        try:
            yield kind(**dict(zip(names, values, strict=True)))
        except SettingError:
            continue


def cases(kind):
    """Pair every variant with every unit it does not reject."""
    return [(t, unit) for t in variants(kind) for unit in UNITS if t.rejects(unit) is None]


def some_cases(kind):
    """Take every 11th case: 11 shares no factor with the lengths of the lists above."""
    return cases(kind)[::11]


def weight_of(unit):
    generator = torch.Generator().manual_seed(unit.n_weights)
    return torch.randn(unit.rows, unit.columns, generator=generator)


def moments_of(unit):
    """Return no moment, a diagonal and a full one."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(unit.groups, 2 * unit.columns, unit.columns, generator=generator)
    full = inputs.mT @ inputs
    return None, full.diagonal(dim1=1, dim2=2).mean(0), full


@ALL
def test_every_entry_is_tried_on_several_units(kind):
    assert len({unit.name for _, unit in cases(kind)}) >= 2


@ALL
def test_cost_is_the_bytes_really_stored_and_they_decode_bit_for_bit(kind):
    for transform, unit in cases(kind):
        replacement = transform.apply(weight_of(unit), None)
        stored = sum(tensor.nbytes for tensor in replacement.tensors.values())
        assert transform.cost(unit).weight_bytes == stored, (transform, unit)
        for name, tensor in replacement.tensors.items():
            assert tensor.is_contiguous(), (transform, unit, name)
            # What is written is the tensor, not a larger buffer it is cut from.
            assert tensor.untyped_storage().nbytes() - tensor.nbytes < 8, (transform, unit, name)
        dense = transform.decode(replacement.tensors, unit.rows, unit.columns)
        assert torch.equal(dense, replacement.dense), (transform, unit)
        assert dense.shape == (unit.rows, unit.columns)
        assert dense.dtype == torch.float32


@ALL
def test_a_moment_changes_neither_cost_nor_exact_decoding(kind):
    for transform, unit in some_cases(kind):
        for moment in moments_of(unit):
            replacement = transform.apply(weight_of(unit), moment)
            stored = sum(tensor.nbytes for tensor in replacement.tensors.values())
            assert transform.cost(unit).weight_bytes == stored, (transform, unit)
            dense = transform.decode(replacement.tensors, unit.rows, unit.columns)
            assert torch.equal(dense, replacement.dense), (transform, unit)


@ALL
def test_input_is_untouched(kind):
    for transform, unit in some_cases(kind):
        weight, moment = weight_of(unit), moments_of(unit)[2]
        replacement = transform.apply(weight, moment)
        replacement.dense.fill_(7)
        for tensor in replacement.tensors.values():
            tensor.zero_()
        assert torch.equal(weight, weight_of(unit)), (transform, unit)
        assert torch.equal(moment, moments_of(unit)[2]), (transform, unit)


@ALL
def test_decode_leaves_stored_tensors_alone(kind):
    for transform, unit in some_cases(kind):
        tensors = transform.apply(weight_of(unit), None).tensors
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        transform.decode(tensors, unit.rows, unit.columns).fill_(7)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]), (transform, unit, name)


@ALL
def test_same_input_gives_same_bytes(kind):
    for transform, unit in some_cases(kind):
        moment = moments_of(unit)[2]
        first = transform.apply(weight_of(unit), moment).tensors
        again = transform.apply(weight_of(unit), moment).tensors
        assert first.keys() == again.keys()
        for name in first:
            assert torch.equal(first[name], again[name]), (transform, unit, name)


@ALL
def test_rows_of_zeros_stay_zeros(kind):
    for transform, unit in some_cases(kind):
        weight = weight_of(unit)
        weight[::2] = 0
        dense = transform.apply(weight, moments_of(unit)[2]).dense
        assert not dense[::2].any(), (transform, unit)


@ALL
def test_inputs_that_were_never_seen_break_nothing(kind):
    for transform, unit in some_cases(kind):
        for shape in [(unit.columns,), (unit.groups, unit.columns, unit.columns)]:
            dense = transform.apply(weight_of(unit), torch.zeros(shape)).dense
            assert dense.isfinite().all(), (transform, unit)


@ALL
@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_extreme_weights_work_or_are_refused_with_a_hint(kind, size):
    for transform, unit in some_cases(kind):
        try:
            dense = transform.apply(weight_of(unit) * size, None).dense
        except AttarError as error:
            assert isinstance(error, SettingError)
            assert "32 bits" in error.hint, (transform, unit)
        else:
            assert dense.isfinite().all(), (transform, unit)
            assert dense.any(), (transform, unit)


@ALL
def test_damaged_tensors_are_refused_not_decoded(kind):
    for transform, unit in some_cases(kind):
        tensors = transform.apply(weight_of(unit), None).tensors
        for name, tensor in tensors.items():
            without = {other: part for other, part in tensors.items() if other != name}
            broken = [tensor[:-1], tensor.to(torch.float64), tensor[None], torch.zeros(0)]
            for damaged in [without, *({**tensors, name: part} for part in broken)]:
                with pytest.raises(ModelError):
                    transform.decode(damaged, unit.rows, unit.columns)


@ALL
def test_rejection_is_a_reason_in_words(kind):
    for transform, unit in product(variants(kind), UNITS):
        reason = transform.rejects(unit)
        assert reason is None or (len(reason.split()) > 3 and not reason.endswith("."))


@ALL
def test_label_is_short_and_tells_widths_apart(kind):
    widths = {getattr(t, "bits", t): t.label() for t in variants(kind)}
    assert len(set(widths.values())) == len(widths)
    assert all(0 < len(label) <= 45 for label in widths.values())


@ALL
def test_settings_are_frozen_and_checked(kind):
    with pytest.raises(FrozenInstanceError):
        kind().bits = 4
    for field in fields(kind):
        # Past the type checks of tests: a plan edited by hand may hold anything.
        settings = object.__new__(kind)
        object.__setattr__(settings, field.name, "many")
        with pytest.raises(SettingError, match=f"{field.name} is 'many'") as caught:
            settings.__post_init__()
        assert field.name in caught.value.hint


@ALL
def test_multiply_accumulates_never_grow(kind):
    for transform, unit in cases(kind):
        assert 0 <= transform.cost(unit).macs <= unit.macs


def test_every_method_file_in_the_folder_is_in_the_table():
    families = ("quantize_", "zero_", "keep_", "factorize_")
    folder = Path(attar.transform.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if path.stem.startswith(families)}
    assert files == set(TRANSFORMS)
