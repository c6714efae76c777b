"""Make a module that was just built as narrow as one that was cut, from a description of it.

What was cut is known by the shapes of the tensors in the file; what a layer knows of its own sizes
(its channels, heads and groups) is written down beside them. So no original is needed. Anybody may
have written a description: it can make a module narrower, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import ModelError
from attar.records import Model

Sizes = dict[str, dict[str, int]]
"""Name of a part to names of its numbers and what they are."""

_HINT = "the folder is damaged or not from Attar; compress or copy it again."


def changed_sizes(original: nn.Module, cut: nn.Module) -> Sizes:
    """Numbers that the parts of a module know otherwise since it was cut."""
    before = dict(original.named_modules())
    found: Sizes = {}
    for name, part in cut.named_modules():
        was = vars(before[name])
        changed = {
            key: value
            for key, value in vars(part).items()
            if type(value) is int and type(was.get(key)) is int and was[key] != value
        }
        if changed:
            found[name] = changed
    return found


def narrow(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], described: Any) -> None:
    """Give a module the shapes of the tensors it will hold, in place.

    Args:
        module: Just built; its weights do not matter.
        shapes: Of tensors by name; of tied ones by one of their names.
        described: What attar.json says of the cut: `{"sizes": Sizes}`.

    Raises:
        ModelError: A shape or a number does not fit the module, or is larger than it was.
    """
    for part, name, value in list(_numbers(module, described)):
        setattr(part, name, value)
    tensors = _tensors(module)
    for name, shape in shapes.items():
        old = tensors.get(name)
        if old is not None and tuple(old.shape) != shape:
            _check_narrower(name, tuple(old.shape), shape)
            _put(module, old, torch.empty(shape, dtype=old.dtype))


def check_runs(model: Model) -> None:
    """Run a model on its examples: what its layers were said to be must fit together.

    Raises:
        ModelError: It does not run.
    """
    try:
        with torch.no_grad():
            model.task.forward(model.module, model.examples)
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model.name} describes layers that do not fit together: {reason}", hint=_HINT
        ) from error


def _numbers(module: nn.Module, described: Any) -> Iterator[tuple[nn.Module, str, int]]:
    sizes = described.get("sizes") if isinstance(described, dict) else None
    if not isinstance(sizes, dict) or not all(isinstance(of, dict) for of in sizes.values()):
        raise ModelError("attar.json describes what was cut wrongly.", hint=_HINT)
    parts = dict(module.named_modules())
    for name, numbers in sizes.items():
        for key, value in numbers.items():
            was = vars(parts[name]).get(key) if name in parts else None
            if type(was) is not int or type(value) is not int or not 1 <= value < was:
                raise ModelError(
                    f"attar.json says that {key} of {name} is {value!r} after a cut, and it was "
                    f"{was!r} before.",
                    hint=_HINT,
                )
            yield parts[name], key, value


def _check_narrower(name: str, was: tuple[int, ...], now: tuple[int, ...]) -> None:
    narrower = all(1 <= new <= old for new, old in zip(now, was, strict=False))
    if len(now) != len(was) or not narrower:
        raise ModelError(
            f"the tensor {name} has the shape {list(now)} after a cut, and {list(was)} before.",
            hint=_HINT,
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(remove_duplicate=False)
    return {**dict(named), **dict(module.named_buffers(remove_duplicate=False))}


def _put(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a tensor wherever the old one is, also under the other names of a tied weight."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=False)
    for part in module.modules():
        held = [
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name in [name for name, one in held if one is old]:
            setattr(part, name, new)
