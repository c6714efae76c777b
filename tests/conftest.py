"""Set before torch is imported: what every test runs under."""

import os

# Threads that wait by spinning make tiny operations forty times slower on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

pytest_plugins = ("browser_parts",)


@pytest.fixture
def text_here(tmp_path, monkeypatch):
    """A folder with a text, to type commands in; the cache is empty."""
    from toys import numbered_text

    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(numbered_text(150))
    return tmp_path


@pytest.fixture
def typed(capsys):
    """Run a command; return its exit code and what it printed."""
    from attar.cli import main

    def run(*words):
        code = main([str(word) for word in words])
        return code, capsys.readouterr()

    return run
