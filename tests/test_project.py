"""What holds for the whole repository: names, docs, layout, sizes."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attar
from attar.load.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "attar"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
MOST_CODE_LINES, MOST_LINES = 40, 400
BANNED_NAMES = {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"}


def name_of(path):
    return str(path.relative_to(ROOT))


EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=name_of)


# --- names and docs


@pytest.mark.parametrize("name", attar.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(attar, name)
    from attar import library

    assert (getattr(library, name, found).__doc__ or "").strip()


def test_the_public_names_of_the_library_are_those_of_the_package():
    tree = ast.parse((SOURCE / "library.py").read_text())
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    handed_on = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert defined | handed_on == set(attar.__all__) - {"AttarError"}


def test_the_page_of_methods_is_what_the_tables_give():
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == made.methods_page(), "run: python docs/make_methods.py"


def test_every_entry_of_the_tables_is_in_the_page_of_methods():
    from attar.explain import CRITERIA
    from attar.export import FORMATS
    from attar.transform import TRANSFORMS

    page = (ROOT / "docs" / "methods.md").read_text()
    for name in (*TRANSFORMS, *CRITERIA, *FORMATS):
        assert f"### {name}\n" in page


# --- code in the docs

PAGES = [
    *[page for page in (ROOT / "README.md", ROOT / "ARCHITECTURE.md") if page.exists()],
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(language):
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


def needs_a_real_model(code):
    return any(f'"{name}"' in code or f"'{name}'" in code for name in CATALOGUE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_docs_runs(code, tmp_path, monkeypatch):
    tree = ast.parse(code)
    for node in ast.walk(tree):  # also where it cannot be run: names that are gone are found
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "attar":
            assert node.attr in attar.__all__
    if needs_a_real_model(code):
        pytest.skip("fetches a real model: its names were checked, it was not run")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs", "exec"), {})


@pytest.mark.parametrize("code", blocks("(?:sh|bash|console)"))
def test_commands_in_the_docs_exist(code):
    from attar.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    typed = re.findall(r"^(?:\$ )?attar ([a-z]+)", code, re.MULTILINE)
    targets = re.findall(r"^(?:\$ )?make ([a-z]+)", code, re.MULTILINE)
    assert set(typed) <= commands
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


# --- layout


@EVERY_FILE
def test_no_file_lies_deeper_than_one_folder(path):
    assert len(path.relative_to(SOURCE).parts) <= 2


@EVERY_FILE
def test_a_file_is_named_after_what_it_holds(path):
    assert path.name not in BANNED_NAMES


@EVERY_FILE
def test_a_file_is_not_longer_than_can_be_read(path):
    lines = len(path.read_text().splitlines())
    # records.py holds every noun in one place, which is its point.
    assert lines <= MOST_LINES or path.name == "records.py" or path.parent.name == "kernels"


@EVERY_FILE
def test_no_function_has_more_code_than_fits_a_screen(path):
    if path.parent.name == "kernels":
        return
    text = path.read_text()
    long = {
        node.name: lines
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := code_lines(node, text)) > MOST_CODE_LINES
    }
    assert not long


def code_lines(node, text):
    """Lines of a body that are neither empty, nor comments, nor docstring."""
    body = node.body
    if ast.get_docstring(node) is not None:
        body = body[1:]
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_code_lines_are_counted_without_docstrings_and_comments():
    text = 'def f():\n    """Doc.\n\n    More.\n    """\n    # why\n    a = 1\n\n    return a\n'
    assert code_lines(ast.parse(text).body[0], text) == 2


def test_stages_meet_only_in_the_pipeline():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_can_fail(path):
    tree = ast.parse(path.read_text())
    helpers = {  # functions of the file that assert, or expect an error
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and checks(node, ())
    }
    helpers |= {"refused", "write", "check"}
    silent = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not checks(node, helpers)
    ]
    assert not silent


def checks(function, helpers):
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in helpers or called in ("raises", "assert_close", "assert_allclose"):
                return True
    return False


PRIVATE = re.compile(r"/w[o]rk/|/t[m]p/|/r[o]ot/|shared/")


@pytest.mark.parametrize(
    "path",
    [*FILES, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *PAGES],
    ids=name_of,
)
def test_nothing_points_at_one_machine(path):
    assert not PRIVATE.search(path.read_text())
