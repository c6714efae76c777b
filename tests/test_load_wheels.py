import hashlib
import subprocess
import zipfile

import pytest

from attar.errors import ModelError
from attar.load import wheels
from attar.load.catalogue import CATALOGUE, Wheel, built_in, nearest_built_in
from attar.load.tasks import TASKS
from attar.load.wheels import (
    cache_folder,
    check_licence,
    fetch_wheels,
    join_members,
    read_member,
    run_pip_download,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def pinned(tmp_path, members, name="fake-1.0-py3-none-any.whl"):
    """A wheel beside the cache, its pin, and a pip that copies it."""
    source = write_wheel(tmp_path / name, members)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    wheel = Wheel("fake", "1.0", name, sha256, source.stat().st_size)

    def pip(requirement, folder):
        assert requirement == "fake==1.0"
        (folder / name).write_bytes(source.read_bytes())

    return wheel, pip


def no_pip(requirement, folder):
    raise AssertionError("the network was used")


def leftovers(cache):
    return [path.name for path in cache.rglob("*") if path.is_file()]


def test_a_wheel_is_fetched_once_and_then_needs_no_network(tmp_path, monkeypatch, cache):
    wheel, pip = pinned(tmp_path, {"data/x": b"content"})
    monkeypatch.setattr(wheels, "run_pip_download", pip)
    first = fetch_wheels([wheel])["fake"]
    monkeypatch.setattr(wheels, "run_pip_download", no_pip)
    assert fetch_wheels([wheel])["fake"] == first
    assert read_member(first, "data/x") == b"content"
    assert leftovers(cache) == [wheel.file_name]


def test_a_wrong_hash_is_an_error_and_nothing_is_kept(tmp_path, monkeypatch, cache):
    wheel, pip = pinned(tmp_path, {"data/x": b"content"})
    other = Wheel("fake", "1.0", wheel.file_name, "0" * 64, 1)
    monkeypatch.setattr(wheels, "run_pip_download", pip)
    with pytest.raises(ModelError, match="sha256"):
        fetch_wheels([other])
    assert leftovers(cache) == []


def test_a_wheel_that_changed_in_the_cache_is_removed(tmp_path, monkeypatch, cache):
    wheel, pip = pinned(tmp_path, {"data/x": b"content"})
    monkeypatch.setattr(wheels, "run_pip_download", pip)
    path = fetch_wheels([wheel])["fake"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match="removed"):
        fetch_wheels([wheel])
    assert not path.exists()
    assert fetch_wheels([wheel])["fake"].exists()


def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch, cache):
    wheel, pip = pinned(tmp_path, {"data/x": b"content"})

    def interrupted(requirement, folder):
        pip(requirement, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "run_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_wheels([wheel])
    assert leftovers(cache) == []


def test_pip_may_only_download_wheels_and_no_dependencies(tmp_path, monkeypatch):
    seen = []

    def run(command, **_):
        seen.extend(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    run_pip_download("fake==1.0", tmp_path)
    assert seen[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(seen)
    assert seen[-1] == "fake==1.0"


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ERROR: No matching distribution\n", "check the network"),
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("", "check the network"),
    ],
)
def test_a_failing_pip_gives_its_reason_and_what_to_do(tmp_path, monkeypatch, stderr, expected):
    monkeypatch.setattr(
        wheels.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
    )
    with pytest.raises(ModelError, match="pip could not fetch") as caught:
        run_pip_download("fake==1.0", tmp_path)
    assert expected in caught.value.hint


def test_parts_are_joined_in_order(tmp_path):
    one = write_wheel(tmp_path / "1.whl", {"a": b"first "})
    two = write_wheel(tmp_path / "2.whl", {"b": b"second"})
    join_members([(one, "a"), (two, "b")], tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"first second"


def test_a_missing_member_and_a_broken_archive_are_named(tmp_path):
    good = write_wheel(tmp_path / "good.whl", {"a": b"1"})
    broken = tmp_path / "broken.whl"
    broken.write_bytes(good.read_bytes()[:20])
    for path, member in [(good, "b"), (broken, "a"), (tmp_path / "none.whl", "a")]:
        with pytest.raises(ModelError, match=path.name):
            read_member(path, member)
    with pytest.raises(ModelError, match="good"):
        join_members([(good, "b")], tmp_path / "whole")


def test_the_cache_is_where_the_variable_says_or_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ATTAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "attar"


def test_terms_are_asked_for_once():
    gemma = CATALOGUE["gemma3-270m"]
    with pytest.raises(ModelError, match="Gemma Terms") as caught:
        check_licence(gemma, accept=False)
    assert "attar models get gemma3-270m --accept-licence" in caught.value.hint
    check_licence(gemma, accept=True)
    check_licence(gemma, accept=False)
    assert (cache_folder() / "licences" / "gemma3-270m.accepted").is_file()


def test_free_licences_ask_for_nothing():
    check_licence(CATALOGUE["smollm2"], accept=False)
    assert not (cache_folder() / "licences").exists()


def test_every_built_in_is_pinned_and_described():
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert entry.task in TASKS
        assert entry.licence and entry.parameters > 0
        assert all(len(wheel.sha256) == 64 and wheel.download_bytes for wheel in entry.wheels)
        assert str(round(entry.download_bytes / 1e6)) in entry.describe()
        assert entry.wheels[0].package in entry.origin
    assert "--degrid" in CATALOGUE["smollm2"].grid and not CATALOGUE["minilm"].grid


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ModelError, match="unknown model 'smolm2'") as caught:
        built_in("smolm2")
    assert caught.value.hint == "did you mean smollm2? `attar models` lists all"
    assert nearest_built_in("zzzz") is None
    with pytest.raises(ModelError) as caught:
        built_in("zzzz")
    assert caught.value.hint == "`attar models` lists all"
