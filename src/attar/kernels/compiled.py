"""Loops over single numbers, compiled to machine code when they are first called, then kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of numpy arrays; it does not hold the interpreter while it runs.

    The function itself stays plain Python, which tests may call.
    """
    # Unwrapped, because tests put a check of shapes around every function.
    made: Callable[..., Any] = njit(nogil=True, cache=True)(inspect.unwrap(function))
    return made
