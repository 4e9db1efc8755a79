"""A Sigstore instance on 127.0.0.1: OIDC tokens as GitHub Actions hands them out, Fulcio, Rekor (v1).

Real enough for the unmodified sigstore library: certificates with an embedded certificate timestamp, log
entries with inclusion proof, signed checkpoint and signed entry timestamp. Formats: RFC 6962 (timestamps, the
Merkle tree), Fulcio's API v2 and docs/oid-info.md, Rekor's openapi.yaml, C2SP signed-note.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://token.actions.githubusercontent.com"
WORKFLOW = "somebody/models/.github/workflows/release.yml@refs/heads/main"
IDENTITY = f"https://github.com/{WORKFLOW}"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


class LoopbackSigstore:
    """Serves inside `with`; `failing` names a path that is answered with an error."""

    def __init__(self) -> None:
        self._ca, self._ct, self._rekor = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._now = datetime.now(UTC).replace(microsecond=0)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback fulcio")])
        self._ca_certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._ca.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(days=1))
            .not_valid_after(self._now + timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._ca.public_key()), critical=False)
            .sign(self._ca, hashes.SHA256())
        )
        self._leaves: list[bytes] = []
        self.failing = ""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["Content-Length"])))

            def _answer(self, body: bytes) -> None:
                path = self.path.partition("?")[0]
                if path == owner.failing:
                    status, document = 503, {"message": "out of order"}
                else:
                    status, document = owner.answer(path, body)
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackSigstore:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a job that may ask for a token."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "job",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/token?job=1",
        }

    def write_trust_config(self, path: Path) -> Path:
        """The client trust configuration of this instance."""
        since = {"start": (self._now - timedelta(days=1)).isoformat().replace("+00:00", "Z")}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {
                "rawBytes": _b64(_spki(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": since,
            }
            identifier = {"keyId": _b64(hashlib.sha256(_spki(key)).digest())}
            return {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": identifier,
            }

        def service() -> dict[str, Any]:
            return {"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "loopback"}

        certificate = {"rawBytes": _b64(self._ca_certificate.public_bytes(Encoding.DER))}
        authority = {
            "subject": {"organization": "loopback", "commonName": "fulcio"},
            "uri": self.url,
            "certChain": {"certificates": [certificate]},
            "validFor": since,
        }
        document = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self._rekor)],
                "certificateAuthorities": [authority],
                "ctlogs": [log(self._ct)],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": [service()],
                "oidcUrls": [service()],
                "rekorTlogUrls": [service()],
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(document))
        return path

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and document for a request."""
        if path == "/token":
            return 200, {"value": _token()}
        if path == "/api/v2/signingCert":
            request = base64.b64decode(json.loads(body)["certificateSigningRequest"])
            leaf = self._certify(x509.load_pem_x509_csr(request))
            chain = [one.public_bytes(Encoding.PEM).decode() for one in (leaf, self._ca_certificate)]
            return 201, {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}
        if path == "/api/v1/log/entries":
            return 201, self._log(json.loads(body))
        return 404, {"message": f"no {path}"}

    def _certify(self, request: x509.CertificateSigningRequest) -> x509.Certificate:
        der_issuer = b"\x0c" + bytes([len(ISSUER)]) + ISSUER.encode()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._ca_certificate.subject)
            .public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(seconds=5))
            .not_valid_after(datetime.now(UTC) + timedelta(minutes=10))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(IDENTITY)]), critical=True
            )
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca.public_key()), critical=False
            )
            .add_extension(_other("1.3.6.1.4.1.57264.1.1", ISSUER.encode()), critical=False)
            .add_extension(_other("1.3.6.1.4.1.57264.1.8", der_issuer), critical=False)
        )
        # The log signs the certificate without the timestamp that will be embedded in it.
        body = builder.sign(self._ca, hashes.SHA256()).tbs_certificate_bytes
        milliseconds = int(time.time() * 1000)
        entry = hashlib.sha256(_spki(self._ca)).digest() + struct.pack("!I", len(body))[1:] + body
        head = struct.pack("!BBQH", 0, 0, milliseconds, 1)
        signature = _sign(self._ct, head + entry + b"\0\0")
        log_id = hashlib.sha256(_spki(self._ct)).digest()
        timestamp = b"\0" + log_id + struct.pack("!QH", milliseconds, 0)
        timestamp += b"\4\3" + struct.pack("!H", len(signature)) + signature
        listed = struct.pack("!H", len(timestamp)) + timestamp
        listed = struct.pack("!H", len(listed)) + listed
        octets = (
            b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        )
        return builder.add_extension(_other("1.3.6.1.4.1.11129.2.4.2", octets), critical=False).sign(
            self._ca, hashes.SHA256()
        )

    def _log(self, proposed: dict[str, Any]) -> dict[str, Any]:
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        payload = base64.b64decode(envelope["payload"])
        spec = {
            "envelopeHash": _sha256(content["envelope"].encode()),
            "payloadHash": _sha256(payload),
            "signatures": [
                {"signature": envelope["signatures"][0]["sig"], "verifier": content["verifiers"][0]}
            ],
        }
        body = json.dumps(
            {"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}, sort_keys=True, separators=(",", ":")
        ).encode()
        # Every entry is the right-most leaf of a tree of all leaves so far; two are as many as are needed.
        leaf = hashlib.sha256(b"\0" + body).digest()
        proof = [self._leaves[-1]] if self._leaves else []
        root = hashlib.sha256(b"\1" + proof[0] + leaf).digest() if proof else leaf
        index = len(proof)
        self._leaves = [leaf]
        log_id = hashlib.sha256(_spki(self._rekor)).digest()
        note = f"loopback - 1\n{index + 1}\n{_b64(root)}\n"
        checkpoint = f"{note}\n— loopback {_b64(log_id[:4] + _sign(self._rekor, note.encode()))}\n"
        entry = {
            "body": _b64(body), "integratedTime": int(time.time()), "logID": log_id.hex(), "logIndex": index,
        }  # fmt: skip
        promise = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        verification = {
            "signedEntryTimestamp": _b64(_sign(self._rekor, promise)),
            "inclusionProof": {
                "logIndex": index,
                "treeSize": index + 1,
                "rootHash": root.hex(),
                "hashes": [one.hex() for one in proof],
                "checkpoint": checkpoint,
            },
        }
        return {"0" * 64: {**entry, "verification": verification}}


def _sha256(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _other(oid: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _token() -> str:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": "sigstore",
        "sub": "repo:somebody/models:ref:refs/heads/main",
        "job_workflow_ref": WORKFLOW,
        "iat": now,
        "nbf": now - 5,
        "exp": now + 300,
    }
    parts = ({"alg": "RS256", "typ": "JWT"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])
