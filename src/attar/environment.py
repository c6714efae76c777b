"""What the last bits of a result depend on, beside what is asked for."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

COMPUTES = ("torch", "numpy", "numba", "scipy")


version = cache(metadata.version)  # which reads a file each time


@cache
def environment() -> dict[str, str]:
    """Versions of what computes, and the kind of processor, by name."""
    return {
        "Attar": f"{version('attar')} ({code_hash()[:12]})",
        "Python": platform.python_version(),
        **{name: version(name) for name in COMPUTES},
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@cache
def code_hash() -> str:
    """sha256 over the code of Attar itself: a version may have been changed by hand."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
