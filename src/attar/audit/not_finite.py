"""Where numbers that are none begin: the first part of a module that gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def first_not_finite(module: nn.Module, run: Callable[[], object]) -> str | None:
    """Run once, and name the first part that gives NaN or infinity.

    A part inside another ends first, so the innermost one is named; a part whose own operations
    (a softmax, a sum) are at fault is named itself.

    Returns:
        None where every part gives finite numbers; "" where only the whole module does not.
    """
    found: list[str] = []
    with _watching(module, found), torch.no_grad():
        run()
    return found[0] if found else None


@contextmanager
def _watching(module: nn.Module, found: list[str]) -> Iterator[None]:
    """Hooks on every part, which are gone afterwards."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(map(_is_finite, _tensors(output))):
                found.append(name)

        return look

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in what a module gives: alone, in tuples and lists, or by name."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
