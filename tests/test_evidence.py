"""Bundles: what is signed is what is read, and any change or other key is noticed."""

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.audit.evidence import bundle, read_key, verify
from attar.cli import main
from attar.errors import AttarError, DataError, SettingError

FACTS = {"model": {"name": "a"}, "verdict": {"outcome": "passed", "reasons": []}}
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


@pytest.fixture
def typed(capsys):
    """Run a command; give its exit code, what it printed, and its errors."""

    def run(*words):
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def pem(key, password=None):
    how = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password)
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, how)


def fingerprint(key):
    return hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()


def repacked(content, change):
    """The bundle with its files changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, value in files.items():
            archive.writestr(name, value)
    return packed.getvalue()


def test_what_was_signed_is_read_and_the_signer_is_named(tmp_path):
    file = tmp_path / "e.zip"
    file.write_bytes(bundle(FACTS, b"divergence: 1", KEY))
    for signer in (None, fingerprint(KEY), fingerprint(KEY).upper()):
        found = verify(file, signer)
        assert found.fingerprint == fingerprint(KEY)
        assert found.facts["verdict"] == FACTS["verdict"]
    with pytest.raises(DataError, match=f"signed by {fingerprint(KEY)}"):
        verify(file, fingerprint(OTHER))


def test_the_same_evidence_gives_the_same_bytes():
    assert bundle(FACTS, b"a", KEY) == bundle(dict(reversed(FACTS.items())), b"a", KEY)


def set_to(name, value):
    return lambda files: files.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        set_to("policy.yaml", b"divergence: 2"),
        set_to("extra", b""),
        set_to("signature", bytes(64)),
        set_to("signature", b""),
        set_to("public_key", OTHER.public_key().public_bytes_raw()),
        set_to("public_key", b"short"),
        set_to("evidence.json", b"{}"),
        set_to("evidence.json", b"\xff"),
        lambda files: files.update({"evidence.json": files["evidence.json"] + b" "}),
        lambda files: files.pop("policy.yaml"),
        lambda files: files.pop("signature"),
        lambda files: files.pop("evidence.json"),
    ],
)
def test_any_change_is_noticed(tmp_path, change):
    file = tmp_path / "e.zip"
    file.write_bytes(repacked(bundle(FACTS, b"divergence: 1", KEY), change))
    with pytest.raises(DataError):
        verify(file, None)


def test_signing_again_with_another_key_shows_in_the_fingerprint(tmp_path):
    file = tmp_path / "e.zip"
    file.write_bytes(bundle(FACTS, None, OTHER))
    assert verify(file, None).fingerprint != fingerprint(KEY)
    with pytest.raises(DataError, match="signed by"):
        verify(file, fingerprint(KEY))


@pytest.mark.parametrize(
    "text",
    [
        b"[1, 2]",
        b'{"files": {}}',
        b'{"files": {}, "format": "attar evidence", "model": {"name": "a"}}',
        b'{"files": {}, "format": "attar evidence", "model": 1, "verdict": 2}',
        b'{"files": {}, "format": "other", "model": {}, "verdict": {}}',
    ],
)
def test_what_is_signed_and_no_evidence_is_refused(tmp_path, text):
    files = {
        "evidence.json": text,
        "signature": KEY.sign(text),
        "public_key": KEY.public_key().public_bytes_raw(),
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, value in files.items():
            archive.writestr(name, value)
    (tmp_path / "e.zip").write_bytes(packed.getvalue())
    with pytest.raises(DataError, match="not what was signed"):
        verify(tmp_path / "e.zip", None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_errors_with_a_hint(tmp_path_factory, data):
    whole = bytearray(bundle(FACTS, b"divergence: 1", KEY))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.mktemp("damaged") / "e.zip"
    file.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        found = verify(file, None)
    except AttarError as error:
        assert error.hint
    else:  # a byte that means nothing, such as a time
        assert found.facts["verdict"] == FACTS["verdict"]


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("attar.audit.evidence.LARGEST_FILE_BYTES", 1000)
    content = repacked(bundle(FACTS, None, KEY), set_to("policy.yaml", bytes(1001)))
    (tmp_path / "e.zip").write_bytes(content)
    with pytest.raises(DataError, match="more than evidence"):
        verify(tmp_path / "e.zip", None)


def test_keys_that_cannot_sign_say_how_to_make_one(tmp_path):
    (tmp_path / "good.pem").write_bytes(pem(KEY))
    assert read_key(tmp_path / "good.pem").public_key() == KEY.public_key()
    (tmp_path / "text.pem").write_text("hello")
    (tmp_path / "secret.pem").write_bytes(pem(KEY, b"word"))
    wrong = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa.pem").write_bytes(pem(wrong))
    for name in ("none.pem", "text.pem", "secret.pem", "rsa.pem"):
        with pytest.raises(SettingError) as error:
            read_key(tmp_path / name)
        assert "openssl genpkey -algorithm ed25519" in error.value.hint


def test_an_audit_writes_what_verify_reads(typed, tmp_path):
    """The commands, on a network of one's own that is compared with itself."""
    rows = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    kinds = np.array(["a", "b"] * 30)
    np.savez(tmp_path / "d.npz", inputs=rows, kind=kinds, answers=np.arange(60) % 3)
    (tmp_path / "key.pem").write_bytes(pem(KEY))
    (tmp_path / "policy.yaml").write_text("divergence: 1e-6\nany_slice: {negative_flips: 0.1}\n")
    model = "toy_code:classifier"
    words = ["audit", model, model, "--task", "classify", "--data", str(tmp_path / "d.npz")]
    words += ["--slices", "kind", "--policy", str(tmp_path / "policy.yaml")]
    words += ["--evidence", str(tmp_path / "e.zip"), "--sign", str(tmp_path / "key.pem")]
    words += ["--junit", str(tmp_path / "j.xml")]
    code, out, err = typed(*words)
    assert code == 0, err
    assert "p worse" in out and "the limit is 1e-06: passed" in out
    assert 'tests="5"' in (tmp_path / "j.xml").read_text()
    code, out, _ = typed("audit", "verify", str(tmp_path / "e.zip"))
    assert code == 0 and fingerprint(KEY) in out and "passed" in out
    code, _, err = typed("audit", "verify", str(tmp_path / "e.zip"), "--signer", fingerprint(OTHER))
    assert code == 2 and "was signed by" in err
    facts = json.loads(zipfile.ZipFile(tmp_path / "e.zip").read("evidence.json"))
    sums = facts["provenance"]
    for name in ("original_sha256", "compressed_sha256", "audit_data_sha256"):
        assert len(sums[name]) == 64
    assert sorted(one["label"] for one in facts["verdict"]["slices"]) == ["a", "b"]


def test_evidence_without_a_key_is_refused_at_once(typed):
    code, _, err = typed("audit", "smollm2", "smollm2", "--evidence", "e.zip")
    assert code == 2 and "--sign KEY" in err
