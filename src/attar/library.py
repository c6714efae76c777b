"""Attar from Python: the functions behind `attar.load`, `attar.explain` and so on.

    model = attar.load("smollm2")
    scores = attar.explain(model)
    plan = attar.plan(model, scores, size="56MB", keep=["lm_head"])
    small = attar.apply(model, plan)
    attar.audit(model, small).report("report.html")

What an explanation, a plan and a small model were made from is remembered as long as they live, so
that no step is done twice. An edited plan is carried out afresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from attar import (
    attributing,
    behaving,
    comparing,
    corrupting,
    cut_again,
    decide,
    drifting,
    equalising,
    judging,
    narrowing,
    pipeline,
    serving,
)
from attar.audited import Audit, Audits
from attar.errors import DataError, PlanError, SettingError
from attar.explained import UnitScores
from attar.explained import explain_inputs as explain_inputs
from attar.load.folder import is_attar_folder, load_folder, read_folder
from attar.records import (
    Behaviours,
    Model,
    Plan,
    Progress,
    Recipe,
    Report,
    Silent,
)
from attar.remembered import Made, judged, made_from, remember, with_plan
from attar.session import Session, open_model, open_session
from attar.transform.apply import biases, build_transform, materialise

Arrays = str | Path | Tensor | Mapping[str, Any] | None
"""A file or folder, the model's first input as one tensor, named inputs, or the default data."""


def load(
    source: str | Path | nn.Module,
    *,
    examples: Any = None,
    task: str | None = None,
    factory: str | nn.Module | None = None,
    degrid: int | None = None,
    accept_licence: bool = False,
) -> Model:
    """Load a model from a name, a folder, a file, code, or take a module at hand.

    Args:
        source: A built-in name, a folder, a GGUF file, "package.module:factory", or a module.
        examples: Of a module: inputs it accepts, to trace it with.
        task: Of a module: "classify", "regress" or "language"; what its outputs are.
        factory: Code of a folder that was made from code of your own.
        degrid: Seed of the exact rescaling that takes weights off a quantization grid.
        accept_licence: You accept the terms of a built-in model that has some.

    Raises:
        ModelError: The model is unknown, unreadable, damaged, or does not say what it is.
    """
    if isinstance(source, nn.Module):
        return open_model(Recipe(model="", task=task), source, examples)
    if isinstance(factory, nn.Module) and is_attar_folder(Path(source)):
        return load_folder(read_folder(Path(source), build_transform), factory)
    return open_model(
        Recipe(
            model=str(source),
            task=task,
            factory=factory if isinstance(factory, str) else None,
            degrid=degrid,
            accept_licence=accept_licence,
        )
    )


def explain(
    model: Model,
    data: Arrays = None,
    *,
    seed: int = 0,
    slices: str | None = None,
    calibration: int | None = None,
    progress: Progress | None = None,
) -> UnitScores:
    """Score every unit of a model by every criterion; higher = keep.

    Args:
        slices: Labels of the samples; see `attar explain --help`.
        calibration: Tokens or samples that prices are gathered on.

    Raises:
        DataError: Data that is missing, too little, or does not fit.
    """
    recipe = Recipe(model=model.name, seed=seed, slices=slices, calibration=calibration)
    session = _open(recipe, model, data, progress)
    return UnitScores(session, decide.explain(session))


def plan(
    model: Model,
    scores: UnitScores | None = None,
    *,
    size: str,
    keep: Sequence[str] = (),
    data: Arrays = None,
    seed: int = 0,
    rounds: int = 2,
    decide_by: str = "price",
    equalise: str = "none",
    cut: str = "off",
) -> Plan:
    """Decide what to do with every unit so that the written folder has at most a size.

    Args:
        scores: From `explain` on the same model; made here where left out.
        size: "60MB", "64MiB", "25%" or "3.1bits".
        keep: Names of units, or patterns with `*`, that stay in 16 bits.
        decide_by: "price", or the way of a paper: a name in `attar.plan.DECIDERS`.
        equalise: "auto" changes channels before rounding where that pays; "learned" also learns
            their scales end to end.
        cut: "auto" also cuts channels, neurons and heads whose bytes are worth more elsewhere,
            where that measures better; "only" cuts until the size is met, and rounds nothing.

    Raises:
        BudgetError: The size cannot be read, or cannot be reached.
    """
    known = scores if scores is not None else explain(model, data, seed=seed)
    asked = replace(
        known.session.recipe,
        size=size,
        keep=tuple(keep),
        rounds=rounds,
        decide=decide_by,
        equalise=equalise,
        cut=cut,
    )
    session = replace(known.session, recipe=asked)
    pipeline.check_wishes(session)
    if equalise != "none":  # the model at hand stays as it is
        session = replace(
            session, model=replace(session.model, module=deepcopy(session.model.module))
        )
    way = narrowing.plan(*equalising.equalise(session, known.statistics))
    session, decided = way.session, way.decided
    # A copy is remembered: what holds the plan itself would keep it alive for ever.
    copied = replace(decided, plan=replace(decided.plan))
    remember(decided.plan, Made(model, known, copied, session))
    return decided.plan


def apply(model: Model, plan: Plan, *, data: Arrays = None) -> Model:
    """Do what a plan says, in memory; the same plan gives the same weights.

    Args:
        plan: From `plan`, edited or not.
        data: For an edited plan: what it was made on.

    Raises:
        PlanError: The plan is for another model.
    """
    made = made_from(model, plan) or _carried_out(model, plan, data)
    session = made.session
    module = materialise(session.model.module, made.decided.treated)
    held = module.state_dict()
    # As a file would hold them.
    for name, tensor in session.leftovers(biases(made.decided.treated)).items():
        held[name].copy_(tensor)
    small = replace(
        session.model,
        module=module,
        name=f"{model.name}, compressed",
        origin=f"{model.origin}, compressed by Attar",
    )
    remember(small, made)
    return small


def _carried_out(model: Model, plan: Plan, data: Arrays) -> Made:
    recipe = plan.recipe or Recipe(model=model.name, seed=plan.seed)
    session = _open(recipe, model, data if data is not None else recipe.data, None)
    names = {unit.name for unit in cut_again.units_after(session, plan.cuts)}
    strange = names.symmetric_difference(plan.choices)
    if strange:
        raise PlanError(
            f"the plan is not for {model.name}: only one of them has {min(strange)}.",
            hint="make a plan for this model with attar.plan",
        )
    known = UnitScores(session, decide.explain(session))
    if plan.equalised:
        session = replace(
            session, model=replace(session.model, module=deepcopy(session.model.module))
        )
    session, decided = pipeline.follow(session, known.statistics, plan)
    return Made(model, known, decided, session)


@overload
def audit(
    model: Model,
    small: Model,
    data: Arrays = None,
    *,
    seed: int = 0,
    attribute: bool = False,
    drift: bool = False,
    reference: Model | None = None,
    corruptions: bool = False,
    generate: int = 0,
    prompts: str | Path | None = None,
    choices: Sequence[str | Path] = (),
) -> Audit: ...


@overload
def audit(
    model: Model,
    small: Sequence[Model],
    data: Arrays = None,
    *,
    seed: int = 0,
) -> Audits: ...


def audit(
    model: Model,
    small: Model | Sequence[Model],
    data: Arrays = None,
    *,
    seed: int = 0,
    attribute: bool = False,
    drift: bool = False,
    reference: Model | None = None,
    corruptions: bool = False,
    generate: int = 0,
    prompts: str | Path | None = None,
    choices: Sequence[str | Path] = (),
) -> Audit | Audits:
    """Compare models that answer the same question, on data that no plan was made with.

    Args:
        small: From `apply`, or any other model; or several of them, of which three or more also
            show what compression forgets.
        data: The same as given to `explain`; its audit split is used.
        attribute: Whether to say which units' changes are responsible for what was lost.
        drift: Whether to say how far explanations of predictions moved.
        reference: Another training of the model, say, whose drift is shown beside.
        corruptions: Whether to compare on slightly corrupted inputs too.
        generate: How many prompts both language models go on with; openings of the data without
            `prompts`.
        prompts: A file with a prompt a line.
        choices: Files of multiple-choice questions that both are asked.

    Raises:
        DataError: They do not answer the same question.
    """
    asked = Behaviours(
        generate, None if prompts is None else Path(prompts), tuple(Path(one) for one in choices)
    )
    drifting.check_asked(None, drift=drift, reference=reference is not None)
    if not isinstance(small, Model):
        if attribute or drift or corruptions or asked != Behaviours():
            what = "all that is asked for beside the verdict looks at one compressed model."
            raise SettingError(what, hint="call audit with each model alone.")
        return _audit_all(model, tuple(small), data, seed)
    read = behaving.read_asked(asked)
    behaving.check_asked(model, asked)
    if corruptions:
        corrupting.check_asked(model)
    made = made_from(model, small)
    if made is not None and data is None:
        session = made.session.before_cuts
    else:
        session = _open(Recipe(model=model.name, seed=seed), model, data, None)
    if drift:
        drifting.check_models(session, small, reference)
    verdict, done = judged(session, small, made)
    verdict = behaving.with_behaviours(session, small, verdict, asked, read)
    if corruptions:
        verdict = corrupting.with_corruptions(session, small, verdict)
    if attribute:
        verdict = attributing.with_attribution(session, small, verdict, done)
    if drift:
        verdict = drifting.with_drift(session, small, verdict, reference)
    return Audit(verdict, with_plan(serving.audit_report(session, small, verdict, None), made))


def _audit_all(model: Model, small: Sequence[Model], data: Arrays, seed: int) -> Audits:
    """Compare each with the original, on the same data."""
    if not small:
        raise DataError("there is no model to compare.", hint="give one or several")
    known = [made for one in small if (made := made_from(model, one)) is not None]
    session = known[0].session.before_cuts if known and data is None else None
    session = session or _open(Recipe(model=model.name, seed=seed), model, data, None)
    found = [judging.compare_models(session, one) for one in small]
    reports = [
        serving.audit_report(session, one, verdict, None)
        for one, (verdict, _) in zip(small, found, strict=True)
    ]
    names, measured = [one.name for one in small], [one for _, one in found]
    return Audits(comparing.population(session, names, reports, measured))


def compress(
    model: str | Path | Model,
    *,
    size: str,
    out: str | Path,
    data: Arrays = None,
    keep: Sequence[str] = (),
    protect: Sequence[str] = (),
    seed: int = 0,
    to: str = "attar",
    decide_by: str = "price",
    workers: str = "",
    equalise: str = "none",
    activations: str = "none",
    biases: str = "kept",
    cut: str = "off",
    heal: str = "none",
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Do all of it, and write the model with its report to a folder.

    Args:
        to: "gguf" writes one file that llama.cpp runs, "onnx" one that onnxruntime does.
        activations: With "onnx": "static" or "dynamic" computes in 8 bits too.
        decide_by, cut: See `plan`.
        heal: "distill=10min" lets what was made learn to answer as the original for so long.
        protect: Slices that may lose only so many nats, as "SLICE:NATS".
        biases: "moved" lets them take up the mean error that rounding their layer makes.
        equalise: "auto" changes channels before rounding where that pays; `model` stays as it is.
        model: From `load`, or what `load` takes.
        workers: How many to start, or the address of a Ray to join; see `attar compress --help`.
        force, restart: Replace what an earlier run wrote; do again what a killed one finished.

    Raises:
        AttarError: What was found and what to do instead; nothing is written then.
    """
    recipe = Recipe(
        model="",
        size=size,
        keep=tuple(keep),
        protect=tuple(protect),
        seed=seed,
        to=to,
        activations=activations,
        decide=decide_by,
        workers=workers,
        equalise=equalise,
        biases=biases,
        cut=cut,
        heal=heal,
    )
    pipeline.check_recipe(recipe)
    pipeline.check_output(Path(out), force=force, restart=restart)
    opened = model if isinstance(model, Model) else load(model)
    recipe = replace(recipe, model=opened.name)
    if equalise != "none":
        opened = replace(opened, module=deepcopy(opened.module))
    session = _open(recipe, opened, data, progress)
    return pipeline.compress_session(session, Path(out), opens_again=False)


def _open(recipe: Recipe, model: Model, data: Arrays, progress: Progress | None) -> Session:
    if isinstance(data, str | Path):
        return open_session(replace(recipe, data=str(data)), model, progress or Silent())
    if isinstance(data, Tensor):
        data = {next(iter(model.examples)): data}
    return open_session(recipe, model, progress or Silent(), data)
