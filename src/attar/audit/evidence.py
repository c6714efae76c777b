"""A verdict that others can check: what was compared, on what, by which limits, and who says so.

A bundle is a ZIP file:

    evidence.json   the verdict with all that was measured, hashes of models, data and policy,
                    versions, and the hash of every other file
    policy.yaml     the limits, where there were some
    signature       Ed25519 (RFC 8032) over evidence.json, 64 bytes
    public_key      of who signed, 32 bytes

A signature says that whoever holds the key made this file and that nobody changed it since. Whose
key it is, a reader must know: by its fingerprint, the sha256 of the public key.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.errors import DataError, SettingError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

EVIDENCE, POLICY, SIGNATURE, PUBLIC_KEY = "evidence.json", "policy.yaml", "signature", "public_key"
# Of any one file in a bundle: what is not ours may unpack to anything.
LARGEST_FILE_BYTES = 64 * 2**20
# ZIP knows no time before this; the same evidence gives the same bytes.
NO_TIME = (1980, 1, 1, 0, 0, 0)
INSTALL = "pip install 'attar[evidence]'"
FORMAT = "attar evidence"
# Facts that whoever reads evidence looks for.
FACTS = ("model", "verdict")
SIGNED_APART = frozenset({EVIDENCE, SIGNATURE, PUBLIC_KEY})
# A password and an unknown packing are a RuntimeError and its NotImplementedError.
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError)


@dataclass(frozen=True)
class Checked:
    """A bundle that is whole and signed by the key in it.

    Attributes:
        fingerprint: sha256 of the public key, hexadecimal.
    """

    facts: Mapping[str, Any]
    fingerprint: str


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read the key that signs.

    Raises:
        SettingError: No such file, or no Ed25519 key without a password.
    """
    serialization, ed25519 = _library()
    hint = f"make one: openssl genpkey -algorithm ed25519 -out {path}"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as fault:
        raise SettingError(
            f"the key {path} cannot be read: {fault.strerror}.", hint=hint
        ) from fault
    except (ValueError, TypeError) as fault:
        raise SettingError(f"{path} is no private key without a password.", hint=hint) from fault
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SettingError(f"{path} is a key of another kind than Ed25519.", hint=hint)
    return key


def bundle(facts: Mapping[str, Any], policy: bytes | None, key: Ed25519PrivateKey) -> bytes:
    """Put evidence into a signed file.

    Args:
        facts: JSON-ready.
        policy: The file as it was read; None without one.
    """
    files = {} if policy is None else {POLICY: policy}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    whole = {"format": FORMAT, "format_version": 1, **facts, "files": hashes}
    evidence = json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True).encode()
    files |= {EVIDENCE: evidence, SIGNATURE: key.sign(evidence)}
    files[PUBLIC_KEY] = key.public_key().public_bytes_raw()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, NO_TIME), content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def verify(path: Path, signer: str | None) -> Checked:
    """Check that a bundle is whole and signed.

    Args:
        signer: Fingerprint that its key must have; None: any key will do.

    Raises:
        DataError: It is no bundle, was changed, or somebody else signed it.
    """
    from cryptography.exceptions import InvalidSignature

    _, ed25519 = _library()
    files = _unpacked(path)
    missing = SIGNED_APART - files.keys()
    if missing:
        raise _refused(path, f"holds no {', '.join(sorted(missing))}")
    evidence = files[EVIDENCE]
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(files[PUBLIC_KEY])
        public.verify(files[SIGNATURE], evidence)
        facts = json.loads(evidence)
        expected = dict(facts["files"])
        if facts["format"] != FORMAT or not all(isinstance(facts[name], dict) for name in FACTS):
            raise ValueError("signed, and something else than evidence")
    except (InvalidSignature, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise _refused(path, "is not what was signed") from fault
    held = {name: hashlib.sha256(files[name]).hexdigest() for name in files.keys() - SIGNED_APART}
    if held != expected:
        raise _refused(path, "holds other files than were signed")
    fingerprint = hashlib.sha256(files[PUBLIC_KEY]).hexdigest()
    if signer is not None and signer.lower().replace(":", "") != fingerprint:
        raise _refused(path, f"was signed by {fingerprint}")
    return Checked(facts, fingerprint)


def _unpacked(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
            if any(one.file_size > LARGEST_FILE_BYTES for one in found) or len(found) > 8:
                raise _refused(path, "holds more than evidence does")
            if len({one.filename for one in found}) < len(found):
                raise _refused(path, "holds two files of one name")
            return {one.filename: archive.read(one) for one in found}
    except UNREADABLE as fault:
        raise _refused(path, "cannot be read as a ZIP file") from fault


def _refused(path: Path, found: str) -> DataError:
    return DataError(f"{path} {found}.", hint="ask for the file again from who signed it.")


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as fault:
        raise SettingError("cryptography is not installed.", hint=INSTALL) from fault
    return serialization, ed25519
