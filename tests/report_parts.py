"""Units, scores and choices that look like those of real models, for the report's tests."""

import random

import torch

from attar.records import (
    Applied,
    Candidate,
    Cost,
    Frontier,
    FrontierPoint,
    GroupClaim,
    Recipe,
    Scores,
    Unit,
)

SOURCE = (
    "The still was invented to separate what matters from what does not. "
    "A rose gives up its scent slowly: four thousand kilograms of petals leave one kilogram of oil."
)


def linear(name, rows, columns):
    return Unit(name, "linear", (rows, columns), ("linear",), macs=rows * columns)


def transformer_units(layers=30):
    units = [
        Unit(
            "model.embed_tokens",
            "embedding",
            (49152, 576),
            ("embedding", "linear"),
            coupled=("lm_head",),
        )
    ]
    for i in range(layers):
        block = f"model.layers.{i}"
        units += [
            linear(f"{block}.self_attn.q_proj", 576, 576),
            linear(f"{block}.self_attn.k_proj", 192, 576),
            linear(f"{block}.self_attn.v_proj", 192, 576),
            linear(f"{block}.self_attn.o_proj", 576, 576),
            linear(f"{block}.mlp.gate_proj", 1536, 576),
            linear(f"{block}.mlp.up_proj", 1536, 576),
            linear(f"{block}.mlp.down_proj", 576, 1536),
        ]
    return tuple(units)


def convolution_units():
    def conv(name, out, inside, side, groups=1):
        shape = (out, inside // groups, side, side)
        return Unit(name, "convolution", shape, ("convolution",), groups, out * inside * 49)

    units, width = [conv("_conv_stem", 32, 3, 3)], 32
    outs = [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    for i, out in enumerate(outs):
        hidden = width if i == 0 else width * 6
        if i:
            units.append(conv(f"_blocks.{i}._expand_conv", hidden, width, 1))
        units.append(conv(f"_blocks.{i}._depthwise_conv", hidden, hidden, 3 + 2 * (i % 2), hidden))
        units.append(conv(f"_blocks.{i}._project_conv", out, hidden, 1))
        width = out
    units.append(conv("_conv_head", 1280, 320, 1))
    units.append(linear("_fc", 1000, 1280))
    return tuple(units)


def score(criterion, units, nats, seed):
    draw = random.Random(seed)
    totals = {u.name: 10 ** draw.uniform(-3.3, 0.4) * (1 + 3 * ("v_proj" in u.name)) for u in units}
    channels = {u.name: torch.linspace(0, 1, min(u.rows, 123)) * totals[u.name] for u in units}
    return Scores(criterion, nats, channels, totals)


def treat(unit, worth, draw):
    """A treatment a solver might choose, its settings and its bytes."""
    if unit.kind == "embedding":
        return "quantize_feedback", {"bits": 3, "group_size": 64}, unit.n_weights * 3.4 / 8
    if draw.random() < 0.04:
        return "zero_smallest", {"sparsity": 0.5, "bits": 4}, unit.n_weights * 3.1 / 8
    bits = 4 if worth > 0.3 else 3 if worth > 0.005 else 2
    settings = {"bits": bits, "group_size": 64, "symmetric": False}
    return "quantize_feedback", settings, unit.n_weights * (bits + 0.375) / 8


def decide(units, worths, seed=0):
    draw = random.Random(seed)
    choices, applied = {}, []
    for unit in units:
        treatment, settings, stored = treat(unit, worths[unit.name], draw)
        damage = draw.uniform(0.0001, 0.003) * (unit.n_weights / 3e5) ** 0.5
        cost = Cost(int(stored), unit.macs)
        choices[unit.name] = Candidate(unit.name, treatment, settings, cost, damage)
        error = draw.uniform(0.03, 0.2)
        applied.append(Applied(unit.name, treatment, settings, int(stored), damage, error))
    return choices, applied


def group_claims(groups, choices):
    draw = random.Random(3)
    claims = []
    for group, members in groups.items():
        predicted = sum(choices[unit.name].predicted_damage for unit in members)
        claims.append(
            GroupClaim(
                group,
                tuple(unit.name for unit in members),
                predicted,
                predicted * draw.uniform(0.8, 1.6),
                sum(2 * unit.n_weights for unit in members),
                sum(choices[unit.name].cost.weight_bytes for unit in members),
            )
        )
    return tuple(claims)


def by_last_part(units):
    groups = {}
    for unit in units:
        groups.setdefault(unit.name.rsplit(".", 1)[-1], []).append(unit)
    return groups


def tokens():
    draw = random.Random(5)
    words = [piece for word in (SOURCE * 3).split(" ") for piece in ([" " + word[:4], word[4:]])]
    spread = [(word, min(6.0, draw.expovariate(4.5) ** 2.2 * 4)) for word in words if word]
    return ((spread[0][0].strip(), 0.0), *spread[1:40], ("\n", 0.003), *spread[40:])


def other_sizes(model, units, choices, made_bytes, overhead, factor=1.4):
    """A frontier around a plan, with bits that go up from point to point."""
    points = []
    for step in range(12):
        bits = 1.5 + 0.5 * step
        here = {
            unit.name: Candidate(
                unit.name,
                "quantize_entropy",
                {"bits": bits + 0.5 * (place % 3 == 0), "by_worth": True},
                Cost(int(unit.n_weights * (bits + 0.5 * (place % 3 == 0)) / 8), unit.macs),
                22.0 * 4.0**-bits / len(units),
            )
            for place, unit in enumerate(units)
        }
        size = overhead + sum(choice.cost.weight_bytes for choice in here.values())
        lost = sum(choice.predicted_damage for choice in here.values())
        points.append(
            FrontierPoint(size, lost, factor * lost, None, size > made_bytes, choices=here)
        )
    points.append(FrontierPoint(made_bytes, 0.216, 0.392, 0.392, choices=choices, is_made=True))
    weights = sum(unit.n_weights for unit in units)
    return Frontier(
        Recipe(model),
        weights + 35_000,
        2 * weights + 70_000,
        tuple(sorted(points, key=lambda point: point.weight_bytes)),
        {name: [choice] for name, choice in choices.items()},
        overhead_bytes=overhead,
    )
