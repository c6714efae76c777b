"""The ten lines of Python: each verb on a module of one's own and on a tiny language model."""

import gc
import json
from dataclasses import replace

import pytest
import torch
import toy_code
import toys
from tiny_models import LLAMA, random_model, write_huggingface

import attar
from attar import remembered
from attar.errors import BudgetError, DataError, PlanError, SettingError


@pytest.fixture(scope="module")
def inputs():
    return toy_code.samples(100, seed=3)


@pytest.fixture(scope="module")
def model():
    module, examples = toy_code.classifier()
    return attar.load(module, examples=examples, task="classify")


@pytest.fixture(scope="module")
def scores(model, inputs):
    return attar.explain(model, inputs)


@pytest.fixture(scope="module")
def plan(model, scores):
    return attar.plan(model, scores, size="7kB", keep=["5"])


def forward(model, inputs):
    with torch.no_grad():
        return model.module(inputs)


def test_explain_gives_scores_by_criterion(scores):
    assert {"price", "magnitude"} <= set(scores) and len(scores) == len(dict(scores))
    assert scores["price"].nats and set(scores["price"].totals) == {"0", "3", "5"}


def test_a_plan_keeps_what_is_pinned_and_holds_its_budget(plan):
    assert plan.choices["5"].treatment == "keep_float"
    assert plan.weight_bytes <= 7000


def test_the_users_own_module_stays_as_it_is(inputs):
    module, examples = toy_code.classifier()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = attar.load(module, examples=examples, task="classify")
    attar.apply(model, attar.plan(model, data=inputs, size="7kB"))
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_apply_gives_a_dense_module_that_answers_alike(model, plan, inputs):
    small = attar.apply(model, plan)
    one, two = forward(model, inputs), forward(small, inputs)
    assert not torch.equal(one, two)
    assert (one.argmax(1) == two.argmax(1)).float().mean() > 0.9


def test_an_edited_plan_is_carried_out_afresh_with_the_same_weights(model, plan, inputs):
    known = attar.apply(model, plan)
    afresh = attar.apply(model, replace(plan), data=inputs)
    assert torch.equal(forward(known, inputs), forward(afresh, inputs))


def test_the_audit_knows_what_was_predicted(model, plan, tmp_path):
    found = attar.audit(model, attar.apply(model, plan))
    assert found.outcome == "passed"
    assert found.predicted_damage == pytest.approx(plan.predicted_damage)
    assert found.groups and found.divergence.value > 0
    page = found.report(tmp_path / "report.html").read_text()
    assert "quantize_feedback" in page and "keep_float" in page


def test_the_audit_says_who_is_responsible_if_asked(model, plan):
    found = attar.audit(model, attar.apply(model, plan), attribute=True)
    assert not attar.audit(model, attar.apply(model, plan)).responsible
    by_unit = {one.unit: one for one in found.responsible}
    assert set(by_unit) == set(plan.choices)
    assert all(one.treatment == plan.choices[name].treatment for name, one in by_unit.items())
    assert abs(found.unattributed) < 0.1


def test_an_audit_lets_both_write_and_asks_both_and_corrupts_if_asked(tmp_path):
    """As `attar audit` does with --generate, --prompts, --choices and --corruptions."""
    language = toys.language_model()
    text = tmp_path / "t.txt"
    text.write_text(toys.numbered_text(900))
    (tmp_path / "p.txt").write_text("The first\nThe second\nThe third\n")
    item = {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}
    (tmp_path / "c.jsonl").write_text(json.dumps(item) + "\n")
    found = attar.audit(
        language,
        language,
        text,
        corruptions=True,
        generate=2,
        prompts=str(tmp_path / "p.txt"),
        choices=[tmp_path / "c.jsonl"],
    )
    assert found.generation.n_prompts == 2 and found.corruptions
    (asked,) = found.choices
    assert asked.name == "c.jsonl"
    with pytest.raises(SettingError, match="looks at one compressed model"):
        attar.audit(language, [language, language], text, generate=2)


def test_only_a_language_model_is_let_write(model, inputs):
    with pytest.raises(DataError, match="only a language model goes on with prompts"):
        attar.audit(model, model, inputs, generate=1)


def test_any_two_models_can_be_compared(model, inputs, tmp_path):
    module, examples = toy_code.other()
    found = attar.audit(model, attar.load(module, examples=examples, task="classify"), inputs)
    assert found.outcome == "failed" and not found.groups
    assert found.report(tmp_path / "report.html").exists()


def test_compress_writes_what_load_reads(model, inputs, tmp_path):
    report = attar.compress(model, size="7kB", data=inputs, out=tmp_path / "out")
    assert report.verdict.outcome == "passed" and report.bytes_after <= 7000
    back = attar.load(tmp_path / "out", factory=toy_code.classifier()[0])
    small = attar.apply(model, attar.plan(model, size="7kB", data=inputs))
    assert torch.equal(forward(back, inputs), forward(small, inputs))


def test_a_language_model_goes_all_the_way(tmp_path):
    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)
    model = attar.load(folder)
    tokens = torch.randint(0, 61, (24, 16), generator=torch.Generator().manual_seed(0))
    plan = attar.plan(model, attar.explain(model, tokens), size="30kB")
    small = attar.apply(model, plan)
    assert attar.audit(model, small).n_predictions > 0
    report = attar.compress(model, size="30kB", data={"tokens": tokens}, out=tmp_path / "out")
    back = attar.load(tmp_path / "out")
    with torch.no_grad():
        one, two = (m.module(tokens[:2]).logits for m in (back, small))
    assert torch.equal(one, two) and report.bytes_after <= 30_000


def test_a_regression_goes_all_the_way(inputs):
    module, examples = toy_code.regressor()
    model = attar.load(module, examples=examples, task="regress")
    small = attar.apply(model, attar.plan(model, data=inputs, size="3kB"))
    found = attar.audit(model, small)
    assert found.flips is None and found.cosine.value > 0.9


def test_slices_are_labels_in_the_data(model, inputs):
    labels = ["low" if row[0] < 0 else "high" for row in inputs]
    scores = attar.explain(model, {"inputs": inputs, "half": labels}, slices="half")
    assert {"low", "high"} <= set(scores.statistics.unit_relevance)


def test_a_size_out_of_reach_is_refused(model, scores):
    with pytest.raises(BudgetError, match="smallest"):
        attar.plan(model, scores, size="1kB")
    with pytest.raises(BudgetError, match="lots"):
        attar.plan(model, scores, size="lots")


def test_data_that_does_not_fit_is_refused(model, inputs):
    with pytest.raises(DataError, match="shape"):
        attar.explain(model, inputs[:, :5])
    with pytest.raises(DataError, match="no array inputs"):
        attar.explain(model, {"other": inputs})


def test_a_plan_for_another_model_is_refused(plan, inputs):
    module, examples = toy_code.regressor()
    model = attar.load(module, examples=examples, task="regress")
    with pytest.raises(PlanError, match="not for"):
        attar.apply(model, plan, data=inputs)


def test_nothing_is_remembered_of_what_is_gone(model, scores):
    gc.collect()
    before = len(remembered._made)
    plan = attar.plan(model, scores, size="8kB")
    small = attar.apply(model, plan)
    assert len(remembered._made) == before + 2
    del plan, small
    gc.collect()
    assert len(remembered._made) == before


def test_stage_folders_can_be_called_and_still_be_imported():
    import attar.load.model
    from attar.explain import CRITERIA

    assert callable(attar.load) and callable(attar.explain)
    assert attar.load.model.load_model and CRITERIA
    with pytest.raises(AttributeError, match="nonsense"):
        attar.nonsense  # noqa: B018
