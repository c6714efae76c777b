"""Peak memory: what it was, and what it will be."""

import ctypes

import pytest
import torch
import toys
from torch import nn

from attar import memory
from attar.load.units import list_units
from attar.memory import (
    forecast,
    machine_bytes,
    peak_bytes,
    release,
    resident_bytes,
    saved_bytes,
)


def model(width=16):
    module = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))
    return toys.toy("classify", module, examples={"inputs": torch.zeros(2, 8)})


def said(small, batch, *, samples=1, statistics=0, priced=10**6):
    return forecast(
        small,
        list_units(small),
        [batch],
        samples_at_once=samples,
        statistics_bytes=statistics,
        priced_weights_at_once=priced,
    )


def test_the_peak_is_at_least_what_is_resident_and_never_falls():
    before = peak_bytes()
    block = torch.ones(25_000_000)  # 100 MB
    assert resident_bytes() > block.nbytes
    peak = peak_bytes()
    assert peak >= before and peak > block.nbytes
    del block
    assert peak_bytes() >= peak


def test_what_backward_keeps_is_counted_once_and_weights_not_at_all():
    small = model(width=16)
    # Kept: the inputs (2 x 8) and what comes out of tanh (2 x 16), in float32; the latter is
    # needed twice, by tanh and by the second map.
    assert saved_bytes(small, small.examples) == 4 * (2 * 8 + 2 * 16)
    assert all(not p.requires_grad for p in small.module.parameters())


def test_what_backward_keeps_grows_with_the_samples():
    small = model()
    more = {"inputs": torch.zeros(10, 8)}
    assert saved_bytes(small, more) == 5 * saved_bytes(small, small.examples)


def test_the_forecast_grows_with_everything_that_needs_memory():
    small, batch = model(), {"inputs": torch.zeros(2, 8)}
    base = said(small, batch)
    assert base > 0
    assert said(small, batch, statistics=10**9) >= base + 0.9 * 10**9
    large = model(width=4000)
    assert said(large, batch) > base + 4000 * 8 * 4  # float32
    assert said(large, batch, priced=10) < said(large, batch)


def test_long_samples_count_by_their_length():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(64, 64)

        def forward(self, x):
            return torch.tanh(self.mix(x))

    small = toys.toy("regress", Long(), examples={"inputs": torch.zeros(1, 10, 64)})
    short, long = ({"inputs": torch.zeros(1, n, 64)} for n in (10, 100_000))
    kept = saved_bytes(small, long)
    more = said(small, long, priced=1) - said(small, short, priced=1)
    assert more > 0.9 * kept  # what is resident may shrink a little in between


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_was_freed_between_what_stays_is_given_back():
    pieces = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each: too small to be mapped alone
    full = resident_bytes()
    kept = pieces[::2]
    del pieces
    release()
    assert full - resident_bytes() > 0.3 * sum(piece.nbytes for piece in kept)


def test_a_containers_limit_counts_where_it_is_below_what_the_machine_has(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CONTROL_GROUP_LIMITS", (tmp_path / "missing",))
    whole = machine_bytes()
    assert whole is None or whole > 10**8
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTROL_GROUP_LIMITS", (limit,))
    for said, expected in (("max\n", whole), ("50000000\n", 50_000_000), (f"{2**63}\n", whole)):
        limit.write_text(said)
        assert machine_bytes() == expected or whole is None
