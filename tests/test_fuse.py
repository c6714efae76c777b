"""Fusion groups against every possible plan of small problems."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decide import llama_session

from attar import decide, trials
from attar.errors import PlanError, SettingError
from attar.export import FUSED_ROLES
from attar.plan.fuse import expand, fuse, groups_of, treatment_of
from attar.plan.solve import RELATIVE_GAP, smallest, solve, weight_bytes
from attar.records import Candidate, Cost
from attar.writing import CHOICES

ATTENTION = ("q_proj", "k_proj", "v_proj")


def candidate(unit, bits, size, nats, refused=None):
    return Candidate(unit, "quantize_rtn", {"bits": bits}, Cost(size, 1), nats, refused)


def damage(choices):
    return sum(c.predicted_damage for c in choices.values())


OPTION = st.tuples(st.integers(1, 4000), st.floats(1e-3, 5.0))
UNIT = st.lists(OPTION, min_size=3, max_size=3)


@given(units=st.lists(UNIT, min_size=4, max_size=5), share=st.floats(0.0, 1.1))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_the_best_plan_that_obeys_is_found(units, share):
    candidates = {
        f"u{i}": [
            candidate(f"u{i}", bits, *of) for bits, of in zip((2, 3, 4), options, strict=True)
        ]
        for i, options in enumerate(units)
    }
    groups = [["u0", "u2"], ["u1", "u3"]]
    merged = fuse(candidates, groups)
    least, most = weight_bytes(smallest(merged)), sum(max(o)[0] for o in units)
    limit = least + int(share * max(0, most - least))
    chosen = expand(solve(merged, limit), candidates, groups)
    plans = (dict(zip(candidates, p, strict=True)) for p in product(*candidates.values()))
    obeying = [
        p
        for p in plans
        if weight_bytes(p) <= limit
        and all(len({treatment_of(p[name]) for name in group}) == 1 for group in groups)
    ]
    assert chosen in obeying and list(chosen) == list(candidates)
    assert damage(chosen) <= min(map(damage, obeying)) * (1 + RELATIVE_GAP) + 1e-4


def test_groups_are_the_roles_of_one_place():
    names = [f"layers.{i}.attn.{role}" for i in range(2) for role in (*ATTENTION, "o_proj")]
    experts = [f"layers.0.experts.{e}.{role}" for e in range(3) for role in ("up", "down")]
    found = groups_of([*names, *experts, "q_proj", "head"], [ATTENTION, ("experts.*.up",)])
    assert found == [names[:3], names[4:7], [e for e in experts if e.endswith("up")]]
    assert groups_of(names, ()) == []


def test_a_treatment_that_one_member_refuses_is_none_of_the_group():
    candidates = {
        "a": [candidate("a", 2, 1, 5.0), candidate("a", 4, 2, 1.0)],
        "b": [candidate("b", 2, 1, None, "has 7 columns"), candidate("b", 4, 2, 1.0)],
    }
    (only,) = fuse(candidates, [["a", "b"]])["a"]
    assert only.settings == {"bits": 4} and only.cost == Cost(4, 2)
    assert only.predicted_damage == 2.0
    with pytest.raises(PlanError, match="a, b must have one treatment"):
        fuse({**candidates, "b": candidates["b"][:1]}, [["a", "b"]])


def test_every_form_says_which_units_it_reads_as_one():
    assert set(FUSED_ROLES) == set(CHOICES["to"])


def test_a_plan_for_a_format_with_groups_obeys_them(monkeypatch):
    monkeypatch.setitem(FUSED_ROLES, "attar", (ATTENTION, ("gate_proj", "up_proj")))
    session = llama_session(rounds=1)
    statistics = decide.explain(session)
    candidates = decide.price(session, statistics)
    plan = decide.plan(session, candidates, statistics).plan
    groups = groups_of(list(candidates), FUSED_ROLES["attar"])
    assert len(groups) >= 2
    for group in groups:
        assert len({treatment_of(plan.choices[name]) for name in group}) == 1
    assert plan.weight_bytes <= session.budget_bytes()
    free = llama_session(rounds=1, decide="qbert")
    with pytest.raises(SettingError, match="qbert"):
        trials.Trials(free, statistics).decide(candidates, 10**6)
