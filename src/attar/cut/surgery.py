"""Make a copy of a module without some of its coupled units: smaller tensors, not zeros."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from attar.coupling import CoupledGroup
from attar.disk import dense
from attar.errors import CutError

Removed = Mapping[str, Sequence[int]]
"""Name of a group to the numbers of its units."""

# Of heads times their width; models say it in these words.
WIDTHS = {"all_head_size", "embed_dim", "inner_dim", "hidden_size", "width", "d_model"}


def cut_out(
    module: nn.Module,
    groups: Sequence[CoupledGroup],
    removed: Removed,
    new: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Copy a module without these units; what stays is shared with the original, not copied.

    Args:
        new: Parameters to take in place of the module's own, in the shapes before the cut.

    Raises:
        CutError: No such group or unit, or nothing would be left of a layer.
    """
    gone = check_cut(module, groups, removed)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    memo: dict[int, object] = {id(tensor): tensor for tensor in tensors.values()}
    copy: nn.Module = deepcopy(module, memo)
    every = module.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in every}
    other = new or {}
    for name in {**gone, **other}:
        _replace(copy, tensors[name], _without(other.get(name, tensors[name]), gone.get(name, {})))
    for place, part in copy.named_modules():
        prefix = place + "." if place else ""
        _mend_sizes(part, shapes.get(prefix + "weight"))
    _mend_heads(copy, groups, removed)
    return copy


def masked(
    module: nn.Module, groups: Sequence[CoupledGroup], removed: Removed
) -> dict[str, Tensor]:
    """Give the parameters in which nothing reads these units: they are there, without effect."""
    new: dict[str, Tensor] = {}
    for group in groups:
        units = torch.as_tensor(list(removed.get(group.name, ())), dtype=torch.long)
        for member in group.members if len(units) else ():
            if member.reads:
                name = member.parameter
                tensor = new[name] if name in new else dense(module.get_parameter(name)).detach()
                new[name] = tensor.index_fill(member.dim, member.indices[units].flatten(), 0.0)
    return new


def check_cut(
    module: nn.Module, groups: Sequence[CoupledGroup], removed: Removed
) -> dict[str, dict[int, Tensor]]:
    """Refuse what cannot be cut; else give what goes of each parameter along each dimension."""
    by_name = {group.name: group for group in groups}
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, numbers in removed.items():
        group = by_name.get(name)
        if group is None:
            raise CutError(
                f"{name} has no coupled units that can be cut.",
                hint="`attar explain MODEL --units` lists those that can, and why others cannot.",
            )
        wrong = [one for one in numbers if not 0 <= one < group.units]
        if wrong or len(set(numbers)) != len(numbers):
            raise CutError(
                f"{name} has the units 0 to {group.units - 1}, and {wrong or 'one twice'} is asked "
                "to be cut.",
                hint="name each unit once.",
            )
        for member in group.members if numbers else ():
            gone[member.parameter][member.dim].append(member.indices[list(numbers)].flatten())
    joined = {
        name: {dim: torch.cat(parts) for dim, parts in dims.items()} for name, dims in gone.items()
    }
    for name, dims in joined.items():
        shape = _tensor(module, name).shape
        empty = [dim for dim, indices in dims.items() if len(indices) >= shape[dim]]
        if empty:
            raise CutError(
                f"the cut would leave nothing of {name}, which has {shape[empty[0]]} along "
                f"dimension {empty[0]}.",
                hint="leave at least one unit of each group.",
            )
    return joined


def _tensor(module: nn.Module, name: str) -> Tensor:
    place, _, own = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(place), own)
    return found


def _without(tensor: Tensor, by_dim: Mapping[int, Tensor]) -> Tensor:
    left = dense(tensor).detach()
    for dim, indices in by_dim.items():
        stays = torch.ones(left.shape[dim], dtype=torch.bool)
        stays[indices] = False
        left = left.index_select(dim, stays.nonzero().flatten())
    return left.contiguous()


def _replace(copy: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a tensor wherever the old one is, also under the other names of a tied weight."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for part in copy.modules():
        held = [
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name in [name for name, one in held if one is old]:
            setattr(part, name, new)


def _mend_sizes(part: Any, old: tuple[int, ...] | None) -> None:
    """Let the numbers that a layer knows of itself be those of its tensors."""
    weight, mean = getattr(part, "weight", None), getattr(part, "running_mean", None)
    if isinstance(mean, Tensor) and hasattr(part, "num_features"):
        part.num_features = len(mean)
    if not isinstance(weight, Tensor) or old is None or tuple(weight.shape) == old:
        return
    if hasattr(part, "in_features"):
        part.out_features, part.in_features = weight.shape
    if hasattr(part, "in_channels") and hasattr(part, "groups"):
        if part.groups != 1:  # whole groups go, so the others keep their sizes
            part.groups = part.groups * len(weight) // old[0]
        part.out_channels, part.in_channels = len(weight), weight.shape[1] * part.groups
    if hasattr(part, "num_groups"):
        part.num_groups = part.num_groups * len(weight) // old[0]
        part.num_channels = len(weight)
    if hasattr(part, "num_embeddings"):
        part.num_embeddings, part.embedding_dim = weight.shape


def _mend_heads(copy: nn.Module, groups: Sequence[CoupledGroup], removed: Removed) -> None:
    """Let an attention know how many heads it has left."""
    lost: dict[tuple[str, int, int], int] = defaultdict(int)
    for group in groups:
        for found in set(group.head_counts):
            lost[found.module, found.count, found.width] += found.each * len(
                removed.get(group.name, ())
            )
    new: dict[tuple[str, str], int] = {}
    for (place, count, width), number in lost.items():
        part = copy.get_submodule(place)
        for name, value in vars(part).items():
            if type(value) is int and number:
                is_count = value == count and "head" in name and "dim" not in name
                if is_count or (value == count * width and name in WIDTHS):
                    new[place, name] = (count - number) * (1 if is_count else width)
    for (place, name), value in new.items():
        setattr(copy.get_submodule(place), name, value)
