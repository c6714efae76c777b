"""Find coupled units, and cut one of each group on the examples before any is offered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from attar.coupling import CoupledGroup, CoupledUnits, HeadCount, Member
from attar.cut.narrower import numbers_each
from attar.cut.nodes import (
    BIAS,
    CONVOLUTION_GROUP,
    NORM,
    NORM_GROUP,
    ONE_HEAD,
    READ,
    Nodes,
)
from attar.cut.surgery import Removed, cut_out, masked
from attar.cut.trace import Tracer
from attar.errors import CutError
from attar.sites import substituted

# Float32 rounding: 2**-24 per operation, over sums of some thousand products and tens of layers.
RELATIVE_TOLERANCE = 1e-4
# Joins that are found in one run can make a later check come out otherwise in the next.
MOST_RUNS = 6
# Every channel has these.
UNSAID = {READ, BIAS, NORM}

Run = Callable[[nn.Module], Tensor]
"""Run a module on the examples; its answer."""


def find_coupled(module: nn.Module, run: Run) -> CoupledUnits:
    """Trace the module on its examples, and verify each group by a cut.

    Args:
        module: In eval mode; left as it is.
    """
    nodes, tracer = Nodes(), Tracer(module, Nodes())
    for _ in range(MOST_RUNS):
        before = nodes.labels
        nodes.fixed.clear()
        tracer = Tracer(module, nodes)
        with tracer.running():
            tracer.end(run(module))
        if torch.equal(before, nodes.labels):
            break
    groups, pinned = _sorted_out(module, nodes, tracer)
    wrong = _wrong(module, run, groups)
    pinned.update(wrong)
    return CoupledUnits(tuple(one for one in groups if one.name not in wrong), pinned)


def check_same(
    module: nn.Module, run: Run, groups: Sequence[CoupledGroup], removed: Removed
) -> None:
    """Compare a network that was cut with the original in which nothing reads what was cut.

    Raises:
        CutError: They answer differently, or the one that was cut does not run.
    """
    zeroed = masked(module, groups, removed)
    with torch.no_grad():
        with substituted(module, {name: partial(Tensor.detach, t) for name, t in zeroed.items()}):
            wanted = run(module)
        small = cut_out(module, groups, removed)
        try:
            found = run(small)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CutError(
                f"cut out of {', '.join(removed)}, the model does not run: "
                + str(error).splitlines()[0],
                hint="leave that group as it is.",
            ) from error
    limit = RELATIVE_TOLERANCE * wanted.abs().max().clamp(min=1e-30)
    if found.shape != wanted.shape or not bool(((found - wanted).abs() <= limit).all()):
        raise CutError(
            f"cut out of {', '.join(removed)}, the model does not answer as with zeros there.",
            hint="leave that group as it is.",
        )


def _wrong(module: nn.Module, run: Run, groups: Sequence[CoupledGroup]) -> dict[str, str]:
    """Cut one unit of each group; all at once where that is right, else in halves."""
    if not groups:
        return {}
    try:
        check_same(module, run, groups, {one.name: [one.units // 2] for one in groups})
    except CutError as error:
        if len(groups) == 1:
            return {groups[0].name: error.problem}
        middle = len(groups) // 2
        return _wrong(module, run, groups[:middle]) | _wrong(module, run, groups[middle:])
    return {}


Parts = dict[tuple[str, int], list[int]]
"""Parameter and dimension to the places along it that go with one unit."""


def _sorted_out(
    module: nn.Module, nodes: Nodes, tracer: Tracer
) -> tuple[list[CoupledGroup], dict[str, str]]:
    """Sort what goes together into groups of units that are alike, and what must stay."""
    units: dict[int, Parts] = defaultdict(lambda: defaultdict(list))
    for key, start in nodes.starts.items():
        for place, label in enumerate(nodes.labels[start : start + nodes.sizes[key]].tolist()):
            units[label][key].append(place)
    fixed: dict[int, str] = {}
    for places, why in reversed(nodes.fixed):
        fixed.update(dict.fromkeys(torch.unique(nodes.labels[places]).tolist(), why))
    alike: dict[tuple[tuple[tuple[str, int], int], ...], list[int]] = defaultdict(list)
    pinned: dict[str, str] = {}
    reasons = _reasons(nodes)
    for label, parts in units.items():
        if all(key in tracer.readers for key in parts):
            continue  # only read: the input of the model
        holder = _holder(next(iter(parts))[0])
        whole = [key for key, places in parts.items() if len(places) == nodes.sizes[key]]
        if label in fixed:
            pinned.setdefault(holder, fixed[label])
        elif whole:
            why = "; ".join(reasons.get(label, ())) or "there is only one"
            pinned.setdefault(holder, f"all of them go together: {why}")
        elif not any(key in tracer.readers for key in parts):
            pinned.setdefault(holder, "no linear map or convolution reads them")
        else:
            alike[tuple((key, len(places)) for key, places in parts.items())].append(label)
    groups: list[CoupledGroup] = []
    for labels in alike.values():
        members = [units[label] for label in labels]
        name = _name([one.name for one in groups], _holder(next(iter(members[0]))[0]))
        whys = tuple(dict.fromkeys(one for label in labels for one in reasons.get(label, ())))
        counts = _counts(tracer, nodes, labels)
        groups.append(_group(name, module, members, tracer.readers, whys, counts))
    return groups, pinned


def _reasons(nodes: Nodes) -> dict[int, tuple[str, ...]]:
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for places, why in nodes.joined:
        for label in torch.unique(nodes.labels[places]).tolist():
            found[label][why] = None
    return {label: tuple(one for one in whys if one not in UNSAID) for label, whys in found.items()}


def _group(
    name: str,
    module: nn.Module,
    parts: Sequence[Parts],
    readers: set[tuple[str, int]],
    reasons: tuple[str, ...],
    counts: tuple[HeadCount, ...],
) -> CoupledGroup:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    members = tuple(
        Member(*key, torch.tensor([one[key] for one in parts]), key in readers) for key in parts[0]
    )
    weights = sum(numbers_each(module, members).values())
    kind = "channel"
    if counts or ONE_HEAD in reasons:
        kind = "head"
    elif NORM_GROUP in reasons or CONVOLUTION_GROUP in reasons:
        kind = "channel group"
    elif all(tensors[one.parameter].dim() <= 2 for one in members):
        kind = "neuron"
    return CoupledGroup(name, kind, len(parts), members, weights, reasons, counts)


def _counts(tracer: Tracer, nodes: Nodes, labels: Sequence[int]) -> tuple[HeadCount, ...]:
    """Say where heads of these units are counted."""
    found: dict[HeadCount, None] = {}
    for split in tracer.splits:
        each = int((nodes.labels[split.blocks] == labels[0]).sum())
        if each:
            found[HeadCount(split.module, len(split.blocks), split.width, each)] = None
    return tuple(found)


def _holder(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _name(taken: Sequence[str], name: str) -> str:
    """Number the second and later groups that one module writes."""
    same = sum(one == name or one.startswith(name + "#") for one in taken)
    return f"{name}#{same + 1}" if same else name
