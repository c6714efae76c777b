"""Explain what in a neural network matters, compress the rest under a budget, show what changed.

The public names are those of `attar.library`. They are looked up when first used, so that
`attar --help` needs no torch.
"""

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attar.errors import AttarError as AttarError
    from attar.library import apply as apply
    from attar.library import compress as compress
    from attar.library import explain_inputs as explain_inputs

# Threads of torch that wait by spinning fight with every other process for the cores: on a busy
# machine a run takes many times longer. Read when torch is loaded, so it is set here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Large tensors lie in pages of 2 MB where the system has them: a third of a run was spent on
# filling new pages of 4 kB with zeros.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["AttarError", "apply", "audit", "compress", "explain", "explain_inputs", "load", "plan"]

# Verbs of the library that are the names of stage folders too.
_STAGES = ("audit", "explain", "load", "plan")


class _Stage(ModuleType):
    """A stage folder that can be called: `attar.load("smollm2")` is `attar.library.load`."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from attar import library

        return getattr(library, self.__name__.rpartition(".")[2])(*arguments, **settings)


class _Attar(ModuleType):
    """This package: makes the stage folders callable as they are imported, in whatever order."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STAGES and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Attar


def __getattr__(name: str) -> Any:
    import importlib

    if name in _STAGES:
        return importlib.import_module(f"attar.{name}")
    if name == "AttarError":
        from attar.errors import AttarError

        return AttarError
    if name in __all__:
        return getattr(importlib.import_module("attar.library"), name)
    raise AttributeError(f"module 'attar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
