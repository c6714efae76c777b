"""Write docs/methods.md from the tables in the code: `python docs/make_methods.py`.

Each method's text is the docstring of its file; its settings are the fields of its class.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from attar.attribute import METHODS
from attar.equalise import FOLDS
from attar.equalise.learn import Learned
from attar.explain import CRITERIA
from attar.export import FORMATS
from attar.plan import DECIDERS
from attar.transform import TRANSFORMS

HEAD = """\
# Methods

Made from the tables in the code by `python docs/make_methods.py`; edit the docstrings, not this.
"""


def methods_page() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += _section(
        "Treatments", "What a plan can do to a unit (`transform/`).", "transform", TRANSFORMS
    )
    parts += _section(
        "Changes of channels",
        "What `--equalise auto` may do before rounding, without changing an answer (`equalise/`); "
        "`learn` is what `--equalise learned` does after that.",
        "equalise",
        {**FOLDS, "learn": Learned},
    )
    parts += _section(
        "Criteria", "What a unit is worth (`explain/`). Higher = keep.", "explain", CRITERIA
    )
    parts += _section(
        "Explanations of an answer",
        "What it rests on in the input (`attribute/`): `attar explain MODEL INPUT --method NAME`.",
        "attribute",
        METHODS,
    )
    deciders = {f"decide_{name}": entry for name, entry in DECIDERS.items()}
    sentence = (
        "Which candidate each unit gets (`plan/`): `--decide NAME`, the name without `decide_`."
    )
    parts += _section("Deciders", sentence, "plan", deciders)
    parts += _section("Formats", "What is written (`export/`).", "export", FORMATS)
    return "\n".join(parts)


def _section(title: str, sentence: str, folder: str, table: dict[str, Any]) -> list[str]:
    parts = [f"\n## {title}\n\n{sentence}\n"]
    for name, entry in table.items():
        module = importlib.import_module(f"attar.{folder}.{name}")
        parts.append(f"### {name}\n\n{inspect.getdoc(module)}\n")
        if is_dataclass(entry):
            parts.append(_settings(entry))
    return parts


def _settings(kind: Any) -> str:
    lines = ["| setting | default |", "| --- | --- |"]
    for field in fields(kind):
        default = "none" if field.default is MISSING else f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {default} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(methods_page(), encoding="utf-8")
