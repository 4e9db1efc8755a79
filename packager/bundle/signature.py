"""Signatures in the OpenSSF model-signing format, made and checked with an ECDSA P-256 key.

A signature is a Sigstore bundle (v0.3, JSON) around a DSSE envelope around an in-toto statement whose
predicate lists the SHA-256 of every file. The stock `model_signing verify key` (1.1.1) accepts it. Sources:
the DSSE protocol v1.0.0 (pre-authentication encoding), in-toto Statement v1, and model_signing's
`_signing/signing.py` (predicate) and `_signing/sign_ec_key.py` (key hint, hash of the curve).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from packager.artifact.strict_json import strict_json
from packager.errors import BadInput, IntegrityFailure, UsageProblem

if TYPE_CHECKING:
    from packager.bundle.keyless import Identity

SIGNATURE_NAME = "model.sig"
UNSIGNED_PATHS = (SIGNATURE_NAME, ".cache/huggingface", ".git", ".gitattributes", ".github", ".gitignore")
"""Paths outside the signature: itself, what git and the hub add, and the client's download bookkeeping."""

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_HOW_TO_UNLOCK = "Set PACKAGER_KEY_PASSPHRASE to it, or use --passphrase-env or --passphrase-file."
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class SignedFiles:
    """What a signature says."""

    files: dict[str, str]
    """Path (POSIX, relative) to bare hex SHA-256."""
    key_fingerprint: str | None
    """SHA-256 (hex) of the signer's public key in PEM form; None: signed without a key of one's own."""
    identity: str | None
    """Name and issuer in the certificate of a keyless signature; None: signed with a key."""
    authenticated: bool
    """True when a key or an identity was asked for and the signature is valid under it."""

    @property
    def signer(self) -> str:
        """Fingerprint of the key, or the identity."""
        return str(self.key_fingerprint or self.identity)


class Signer(Protocol):
    """What `assemble` signs with."""

    label: str
    """Fingerprint or identity, as card and signature name it."""

    @property
    def digest(self) -> str:
        """What stands for the signer in the bundle's manifest."""

    def sign(self, name: str, files: Mapping[str, str]) -> bytes:
        """As the function `sign`."""

    def made(self, signed: SignedFiles) -> bool:
        """Whether a signature says that it is this signer's."""


class KeySigner:
    """Signs with a P-256 key file. Raises as `private_fingerprint`."""

    def __init__(self, private_key: Path, passphrase: str | None) -> None:
        self._key, self._passphrase = private_key, passphrase
        self.label = private_fingerprint(private_key, passphrase=passphrase)

    @property
    def digest(self) -> str:
        """What stands for the signer in the bundle's manifest."""
        return f"sha256:{self.label}"

    def sign(self, name: str, files: Mapping[str, str]) -> bytes:
        """As the function `sign`."""
        return sign(name, files, self._key, passphrase=self._passphrase)

    def made(self, signed: SignedFiles) -> bool:
        """Whether a signature says that it is this signer's."""
        return signed.key_fingerprint == self.label


def generate_keys(private_key: Path, *, passphrase: str | None = None) -> Path:
    """Write a new P-256 key pair: `private_key` (PKCS#8 PEM, mode 0600) and beside it `<stem>.pub`.

    Returns the path of the public key.

    Raises:
        UsageProblem: one of the two files is there already (a key is never overwritten), or both would have
            the same name.
    """
    public_key = private_key.with_suffix(".pub")
    if public_key == private_key:
        raise UsageProblem(f"{private_key} is the name of a public key", "Name the private one: key.pem.")
    for path in (private_key, public_key):
        if path.exists():
            raise UsageProblem(f"{path} is there already", "Choose another name; a key is never overwritten.")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    private_key.parent.mkdir(parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    # O_EXCL with the mode given at creation: at no moment can another user read or pre-empt the file.
    with os.fdopen(os.open(private_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    public_key.write_bytes(_public_pem(key.public_key()))
    return public_key


def is_encrypted(private_key: Path) -> bool:
    """Whether a private key needs a passphrase. Raises BadInput: it cannot be read."""
    return b"ENCRYPTED" in _read_key(private_key)


def fingerprint(public_key: Path) -> str:
    """SHA-256 (hex) of a public key's PEM form, the `hint` that signatures carry.

    Raises:
        BadInput: the file is missing or is no P-256 public key.
    """
    return hashlib.sha256(_public_pem(_load_public(public_key))).hexdigest()


def private_fingerprint(private_key: Path, *, passphrase: str | None = None) -> str:
    """`fingerprint` of the public half of `private_key`.

    Raises:
        BadInput: as `sign`.
    """
    return hashlib.sha256(_public_pem(_load_private(private_key, passphrase).public_key())).hexdigest()


def sign(name: str, files: Mapping[str, str], private_key: Path, *, passphrase: str | None = None) -> bytes:
    """The signature, as the bytes of a `model.sig`.

    The signature is deterministic (RFC 6979): the same files and key give the same bytes.

    Args:
        name: what the signed directory is called; informative only.
        files: path (POSIX, relative) to bare hex SHA-256, of every file outside `UNSIGNED_PATHS`.

    Raises:
        BadInput: the key file is missing, is no P-256 key, or its passphrase is wrong or missing.
    """
    key = _load_private(private_key, passphrase)
    payload = statement(name, files)
    signature = key.sign(_pre_authentication(payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    hint = hashlib.sha256(_public_pem(key.public_key())).hexdigest()
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return (json.dumps(bundle, sort_keys=True) + "\n").encode()


def statement(name: str, files: Mapping[str, str]) -> bytes:
    """What is signed: an in-toto statement (JSON) about files, arguments as `sign`."""
    # The order of the stock implementation: path parts compared one by one, not as one string.
    ordered = sorted(files, key=PurePosixPath)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in ordered)).hexdigest()
    document = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(UNSIGNED_PATHS),
            },
            "resources": [{"name": p, "algorithm": "sha256", "digest": files[p]} for p in ordered],
        },
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def open_signature(data: bytes, trusted: Path | Identity | None) -> SignedFiles:
    """Read a `model.sig` and, where a public key or an identity is given, check it.

    Without either the list of files is only what somebody claims; `authenticated` is then False.

    Raises:
        IntegrityFailure: not a signature of this format, made by another signer, or not valid.
        BadInput: the public key is missing or no P-256 key.
    """
    hint = identity = None
    try:
        bundle = strict_json(data)
        if bundle["mediaType"] != _MEDIA_TYPE:
            raise ValueError(f"media type {bundle['mediaType']!r}")
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError(f"payload type {envelope['payloadType']!r}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        if "certificate" in material:
            identity = _certified(base64.b64decode(material["certificate"]["rawBytes"], validate=True))
        else:
            hint = str(material["publicKey"]["hint"])
    except (ValueError, KeyError, TypeError, IndexError, binascii.Error) as err:
        raise IntegrityFailure(
            f"{SIGNATURE_NAME} is not a model signature: {err}", "Get the bundle again from its publisher."
        ) from None
    if isinstance(trusted, Path):
        if hint is None:
            raise IntegrityFailure(
                f"{SIGNATURE_NAME} was made without a key, by {identity}",
                "If that is the publisher, verify with --identity and --identity-provider.",
            )
        _check(payload, signature, hint, trusted)
    elif trusted is not None:
        if identity is None:
            raise IntegrityFailure(
                f"{SIGNATURE_NAME} was made with a key, not by an identity", "Verify with --key."
            )
        from packager.bundle.keyless import check_identity

        payload = check_identity(data, trusted)
    return SignedFiles(_signed_files(payload), hint, identity, trusted is not None)


def _certified(certificate: bytes) -> str:
    """Name and issuer in a certificate of Fulcio. ValueError: there are none, or it is no certificate.

    Extensions: github.com/sigstore/fulcio, docs/oid-info.md (1.8 the issuer in DER, 1.1 the older raw one).
    """
    found = {extension.oid.dotted_string: extension.value for extension in _extensions(certificate)}
    names = found.get("2.5.29.17")
    issuer = found.get("1.3.6.1.4.1.57264.1.8") or found.get("1.3.6.1.4.1.57264.1.1")
    if not isinstance(names, x509.SubjectAlternativeName) or not isinstance(
        issuer, x509.UnrecognizedExtension
    ):
        raise ValueError("its certificate names no identity")
    text = issuer.value
    if issuer.oid.dotted_string.endswith(".8"):
        text = text[2:] if text[1] < 0x80 else text[2 + text[1] - 0x80 :]
    return f"{', '.join(str(name.value) for name in names)} ({text.decode()})"


def _extensions(certificate: bytes) -> x509.Extensions:
    return x509.load_der_x509_certificate(certificate).extensions


def _check(payload: bytes, signature: bytes, hint: str, public_key: Path) -> None:
    key = _load_public(public_key)
    if hashlib.sha256(_public_pem(key)).hexdigest() != hint:
        raise IntegrityFailure(
            f"{SIGNATURE_NAME} was made with another key (fingerprint {hint[:16]}…) than {public_key}",
            "Give the publisher's own public key, or treat the bundle as not theirs.",
        )
    try:
        key.verify(signature, _pre_authentication(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise IntegrityFailure(
            f"{SIGNATURE_NAME} is not valid: its content was changed after signing",
            "Get the bundle again from its publisher.",
        ) from None


def _signed_files(payload: bytes) -> dict[str, str]:
    try:
        found: dict[str, Any] = strict_json(payload)
        if found["_type"] != _STATEMENT_TYPE or found["predicateType"] != _PREDICATE_TYPE:
            raise ValueError(f"statement of type {found['predicateType']!r}")
        resources = found["predicate"]["resources"]
        files = {str(item["name"]): str(item["digest"]) for item in resources}
        if len(files) != len(resources) or any(item["algorithm"] != "sha256" for item in resources):
            raise ValueError("a file listed twice, or a hash other than SHA-256")
        root = hashlib.sha256(b"".join(bytes.fromhex(str(item["digest"])) for item in resources)).hexdigest()
        if [s["digest"]["sha256"] for s in found["subject"]] != [root]:
            raise ValueError("its root digest does not follow from its files")
    except (ValueError, KeyError, TypeError) as err:
        raise IntegrityFailure(
            f"{SIGNATURE_NAME} holds a malformed statement: {err}", "Get the bundle again from its publisher."
        ) from None
    return files


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE PAE: lengths in ASCII decimal, so that type and payload cannot run into one another."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_private(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    data, locked = _read_key(path), is_encrypted(path)
    if locked and not passphrase:
        raise BadInput(f"the key {path} is encrypted, and no passphrase was given", _HOW_TO_UNLOCK)
    try:
        # A passphrase that a plain key does not need does no harm: the environment may hold another key's.
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase and locked else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if locked:
            raise BadInput(f"the passphrase of the key {path} is wrong", _HOW_TO_UNLOCK) from None
        raise BadInput(
            f"{path} is no private key in PEM form", "Make one with `packager keys generate`."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise BadInput(f"{path} is not an ECDSA P-256 key", "Make one with `packager keys generate`.")
    return key


def _load_public(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(_read_key(path))
    except ValueError:
        raise BadInput(f"{path} is no public key in PEM form", "Give the publisher's `.pub` file.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise BadInput(f"{path} is not an ECDSA P-256 public key", "Give the publisher's `.pub` file.")
    return key


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise BadInput(
            f"cannot read the key {path}: {err.strerror}", "Make one with `packager keys generate`."
        ) from None
