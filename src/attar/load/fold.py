"""Fold batch normalisation into the layer before it, where that layer feeds nothing else.

In eval mode a batch norm multiplies each channel by a number and adds one, which the convolution
or linear layer before it can do itself: w' = w γ/σ and b' = (b - μ) γ/σ + β.

Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2, eq. 14.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from attar.errors import ModelError

if TYPE_CHECKING:
    from attar.records import Batch

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FEEDERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
SEPARATOR = "+"  # between the two names of a folded pair
# Float32 rounding of one layer: 2**-24 per operation, over sums of up to some thousand products.
RELATIVE_TOLERANCE = 1e-4


@dataclass
class _Seen:
    """What one forward pass showed about the layers.

    Attributes:
        calls: Module name to number of calls.
        inputs: Module name to its first input.
        outputs: Module name to its first output.
    """

    calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _LayerTracer(fx.Tracer):
    """Looks into every module but torch's own layers and their subclasses."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*FEEDERS, *NORMS)) or super().is_leaf_module(m, module_qualified_name)


def call_in_order(module: nn.Module, examples: Batch) -> Any:
    """Call a module with the tensors of a batch as positional arguments."""
    return module(*examples.values())


def fold_batch_norm(
    module: nn.Module,
    examples: Batch,
    forward: Callable[[nn.Module, Batch], Any] = call_in_order,
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Fold every batch norm that can be, in a copy; outputs stay equal to float32 rounding.

    Args:
        module: In eval mode.
        examples: A small batch the module accepts; each fold is checked on it.
        forward: How the module is called, `task.forward`.

    Returns:
        module: The copy, folded norms `nn.Identity`; the module itself where it has no norm.
        folded: Pairs "convolution+norm", for `fold_again`.
        reasons: A line for each norm that stays.
    """
    if module.training:
        raise ModelError(
            "batch norms cannot be folded while the module is in training mode.",
            hint="call module.eval() first",
        )
    norms = [name for name, one in module.named_modules() if isinstance(one, NORMS)]
    if not norms:  # nothing will change, and a copy of a language model is gigabytes
        return module, (), ()
    folding = copy.deepcopy(module)
    pairs, reasons = _find_pairs(folding)
    seen = _watch(folding, examples, forward, pairs)
    folded = []
    for norm, feeder in pairs.items():
        reason = _refusal(folding, feeder, norm, seen) or _fold_pair(folding, feeder, norm, seen)
        if reason is None:
            folded.append(f"{feeder}{SEPARATOR}{norm}")
        else:
            reasons[norm] = reason
    lines = tuple(f"{norm} stays: {reasons[norm]}" for norm in norms if norm in reasons)
    return folding, tuple(folded), lines


def fold_again(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Give a copy of an unfolded module the structure of a folded one: identities and biases.

    Args:
        module: Just built; its weights do not matter.
        names: As `fold_batch_norm` gave them.

    Raises:
        ModelError: A name does not belong to this module.
    """
    shaped = copy.deepcopy(module)
    for name in names:
        feeder_name, _, norm_name = name.partition(SEPARATOR)
        try:
            feeder, norm = shaped.get_submodule(feeder_name), shaped.get_submodule(norm_name)
        except AttributeError as fault:
            raise ModelError(
                f"the folded pair {name} does not exist in the module: {fault}.",
                hint="the model was written with another version of its code; install that one",
            ) from fault
        if isinstance(norm, nn.Identity) and getattr(feeder, "bias", None) is not None:
            continue  # the module at hand was folded before
        if not (isinstance(feeder, FEEDERS) and isinstance(norm, NORMS)):
            raise ModelError(
                f"the folded pair {name} is a {type(feeder).__name__} and a "
                f"{type(norm).__name__}, not a convolution and a batch norm.",
                hint="the model was written with another version of its code; install that one",
            )
        bias = torch.zeros(len(feeder.weight), dtype=feeder.weight.dtype)
        _replace(shaped, feeder, norm_name, feeder.weight.detach(), bias)
    return shaped


# ---------------------------------------------------------------------------------------------
# which norm follows which layer


def _find_pairs(module: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Norm to the layer that alone feeds it; and norms without one, with the reason."""
    pairs: dict[str, str] = {}
    reasons: dict[str, str] = {}
    _trace_into(module, "", pairs, reasons)
    return pairs, reasons


def _trace_into(
    module: nn.Module, prefix: str, pairs: dict[str, str], reasons: dict[str, str]
) -> None:
    """Trace a module; where that fails, trace its children, each on its own."""
    if not any(isinstance(one, NORMS) for one in module.modules()):
        return
    try:
        graph = _LayerTracer().trace(module)
    except Exception as fault:  # tracing runs the module's own code on stand-ins
        why = f"the code around it cannot be traced ({type(fault).__name__})"
        for name, child in module.named_children():
            if isinstance(child, NORMS):
                reasons.setdefault(prefix + name, why)
            else:
                _trace_into(child, f"{prefix}{name}.", pairs, reasons)
        return
    named = dict(module.named_modules())
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(named[node.target], NORMS):
            _judge_node(node, named, prefix, pairs, reasons)
    for name, one in named.items():
        full = prefix + name
        if isinstance(one, NORMS) and full not in pairs and full not in reasons:
            reasons[full] = "it is not called when the module runs"


def _judge_node(
    node: fx.Node,
    named: dict[str, nn.Module],
    prefix: str,
    pairs: dict[str, str],
    reasons: dict[str, str],
) -> None:
    norm = prefix + str(node.target)
    source = node.args[0] if node.args else None
    is_layer = isinstance(source, fx.Node) and source.op == "call_module"
    feeder = named.get(str(source.target)) if is_layer and isinstance(source, fx.Node) else None
    if not isinstance(feeder, FEEDERS) or not isinstance(source, fx.Node):
        reasons[norm] = "what comes before it is no convolution or linear layer"
    elif len(source.users) > 1:
        reasons[norm] = f"the output of {prefix}{source.target} is used elsewhere too"
    else:
        pairs[norm] = f"{prefix}{source.target}"


def _watch(
    module: nn.Module,
    examples: Batch,
    forward: Callable[[nn.Module, Batch], Any],
    pairs: dict[str, str],
) -> _Seen:
    """Run the module once and keep what goes into each layer and comes out of each norm."""
    seen = _Seen()

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.calls[name] += 1
            # clones, because an activation that works in place follows the norm
            seen.inputs.setdefault(name, inputs[0].clone())
            seen.outputs.setdefault(name, output.clone())

        return hook

    watched = {*pairs, *pairs.values()}
    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    try:
        with torch.no_grad():
            forward(module, examples)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _refusal(module: nn.Module, feeder_name: str, norm_name: str, seen: _Seen) -> str | None:
    feeder, norm = module.get_submodule(feeder_name), module.get_submodule(norm_name)
    assert isinstance(feeder, FEEDERS) and isinstance(norm, NORMS)
    holders = [one for one in module.modules() if getattr(one, "weight", None) is feeder.weight]
    if len(holders) > 1:
        return f"the weight of {feeder_name} is shared with another layer"
    if seen.calls[feeder_name] != 1 or seen.calls[norm_name] != 1:
        return f"it or {feeder_name} is called {seen.calls[feeder_name]} times, not once"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics, so it depends on the batch"
    if isinstance(feeder, nn.Linear) and seen.outputs[feeder_name].ndim != 2:
        return f"it normalises another dimension than the outputs of {feeder_name}"
    if len(feeder.weight) != norm.num_features:
        return f"it has {norm.num_features} channels and {feeder_name} {len(feeder.weight)}"
    return None


# ---------------------------------------------------------------------------------------------
# the fold itself


def _fold_pair(module: nn.Module, feeder_name: str, norm_name: str, seen: _Seen) -> str | None:
    """Fold one pair; undo it and say why where the layer then computes something else."""
    feeder, norm = module.get_submodule(feeder_name), module.get_submodule(norm_name)
    assert isinstance(feeder, FEEDERS) and isinstance(norm, NORMS)
    old_weight, old_bias = feeder.weight, feeder.bias
    weight, bias = folded_weight(feeder.weight, feeder.bias, norm)
    _replace(module, feeder, norm_name, weight, bias)
    with torch.no_grad():
        found = feeder(seen.inputs[feeder_name])
    wanted = seen.outputs[norm_name]
    if (found - wanted).abs().max() <= RELATIVE_TOLERANCE * wanted.abs().max().clamp(min=1):
        return None
    feeder.weight, feeder.bias = old_weight, old_bias
    _set_submodule(module, norm_name, norm)
    return f"{feeder_name} does more with its weight than multiply, so folding changes its output"


def folded_weight(
    weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm1d | nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias that do the work of both; computed in float64, returned as `weight.dtype`."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = (variance + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.detach().double()
    old = torch.zeros_like(mean) if bias is None else bias.detach().double()
    shift = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    per_row = gain.reshape(-1, *[1] * (weight.ndim - 1))
    folded = weight.detach().double() * per_row
    return folded.to(weight.dtype), ((old - mean) * gain + shift).to(weight.dtype)


def _replace(
    module: nn.Module,
    feeder: nn.Conv1d | nn.Conv2d | nn.Linear,
    norm_name: str,
    weight: Tensor,
    bias: Tensor,
) -> None:
    feeder.weight = nn.Parameter(weight, requires_grad=False)
    feeder.bias = nn.Parameter(bias, requires_grad=False)
    _set_submodule(module, norm_name, nn.Identity())


def _set_submodule(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)
