"""Import what only some models need, and say what to install where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from attar.errors import ModelError


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional extra of Attar.

    Raises:
        ModelError: The package that holds `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModelError(
            f"this model needs the package {package}, which is not installed",
            hint=f"pip install 'attar[{extra}]'",
        ) from error
