"""Text that every Python brings along: its reference documentation and its docstrings.

Source files are parsed, not imported, so reading them runs nothing.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_DOCUMENT = 400  # characters: a shorter one is a stub
MIN_DOCSTRING = 80  # characters: a shorter one is a label, not prose
SHINGLE = 10  # words; two paragraphs that share half of their runs of this length say the same


def documents(seed: int, max_characters: int) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documentation in an order that depends on the seed alone.

    A paragraph that repeats what an earlier document said is left out (many topics quote each
    other), as are documents of which little remains.

    Args:
        seed: Of the order.
        max_characters: Cut longer documents at a paragraph, so that many are heard.
    """
    names = document_names()
    random.Random(f"documentation {seed}").shuffle(names)
    heard: set[tuple[str, ...]] = set()
    for name in names:
        text = _only_new(read_document(name), heard, max_characters)
        if len(text) >= MIN_DOCUMENT:
            yield name, text


def document_names() -> list[str]:
    """Names of all documents: "topic assert", "module argparse"."""
    modules = Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")
    # this and antigravity are jokes, one of them in code
    stems = {path.stem for path in modules} - {"this", "antigravity"}
    return sorted([*(f"topic {name}" for name in _topics()), *(f"module {stem}" for stem in stems)])


def read_document(name: str) -> str:
    """Text of one document, paragraphs separated by empty lines; "" where it holds none."""
    kind, stem = name.split(" ", 1)
    if kind == "topic":
        return _topics()[stem]
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{stem}.py"
    return "\n\n".join(docstrings(path.read_text(encoding="utf-8", errors="replace")))


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the docstrings remain
        return {}
    return dict(topics)


def docstrings(source: str) -> list[str]:
    """Docstrings of a Python source in order of appearance; none where it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's source
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None and len(text) >= MIN_DOCSTRING:
                found.append((getattr(node, "lineno", 0), inspect.cleandoc(text)))
    return [text for _, text in sorted(found)]


def _only_new(text: str, heard: set[tuple[str, ...]], max_characters: int) -> str:
    """Paragraphs that `heard` does not know yet; adds what it takes."""
    kept: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        if length >= max_characters:
            break
        words = paragraph.split()
        ends = range(max(1, len(words) - SHINGLE + 1))
        shingles = {tuple(words[start : start + SHINGLE]) for start in ends}
        if not words or 2 * len(shingles & heard) > len(shingles):
            continue
        heard |= shingles
        kept.append(paragraph)
        length += len(paragraph) + 2
    return "\n\n".join(kept)
