"""Signatures without a key of one's own: Sigstore, by the identity that a CI job has.

The job's OIDC token buys a certificate of ten minutes from Fulcio, in the name of the workflow; the signature
goes into the public log Rekor; a verifier asks for the name and who vouched for it. Files and statement are
those of `packager.bundle.signature`, so that the stock `model_signing verify sigstore` takes it too. It needs
the extra `sigstore`; the trust root is refreshed where there is a network, and taken as it is where not.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.bundle.signature import SIGNATURE_NAME, SignedFiles, open_signature, statement
from packager.errors import BadInput, IntegrityFailure, RemoteFailure, UsageProblem

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken


@dataclass(frozen=True)
class Identity:
    """Who must have signed."""

    name: str
    """E-mail address or URI, of a workflow for instance, as the certificate spells it."""
    issuer: str
    """URL of the OpenID provider that vouches for the name."""
    trust_config: Path | None = None
    """Sigstore's client trust configuration (JSON) of an instance of one's own; None: the public one."""


class KeylessSigner:
    """Signs in the name of the job that this process runs in."""

    def __init__(self, token: IdentityToken, trust_config: Path | None) -> None:
        self._token, self._trust_config = token, trust_config
        self.label = f"{_certified_name(token)} ({token.federated_issuer})"
        """Name and who vouches for it, as the certificate will spell them."""

    @classmethod
    def of_this_job(cls, trust_config: Path | None = None) -> KeylessSigner:
        """The signer that the environment offers.

        Raises:
            UsageProblem: it offers none, or the job may not ask for a token.
            ModuleNotFoundError: the extra is not installed.
        """
        from sigstore.oidc import IdentityError, IdentityToken, detect_credential

        try:
            raw = detect_credential()
            if raw is None:
                raise UsageProblem(
                    "nothing here offers an identity to sign with: keyless signing is for CI jobs",
                    "Run it in GitHub Actions with `permissions: id-token: write`, in GitLab CI with "
                    "`id_tokens: SIGSTORE_ID_TOKEN: aud: sigstore`, in Buildkite, CircleCI or Google Cloud; "
                    "elsewhere sign with --key.",
                )
            return cls(IdentityToken(raw), trust_config)
        except IdentityError as err:
            raise UsageProblem(
                f"the identity that this environment offers cannot be used: {err}",
                "In GitHub Actions the job needs `permissions: id-token: write`, and pull requests of forks "
                "never have it.",
            ) from None

    @property
    def digest(self) -> str:
        """What stands for the signer in the bundle's manifest."""
        return "sha256:" + hashlib.sha256(self.label.encode()).hexdigest()

    def sign(self, name: str, files: Mapping[str, str]) -> bytes:
        """The signature, as the bytes of a `model.sig`; arguments as `packager.bundle.signature.sign`.

        Raises:
            RemoteFailure: Sigstore cannot be reached, or does not sign.
            BadInput: the trust configuration cannot be read.
        """
        from sigstore.dsse import Statement
        from sigstore.sign import SigningContext

        with _sigstore_faults():
            context = SigningContext.from_trust_config(_trust(self._trust_config, offline_too=False))
            with context.signer(self._token) as signer:
                data = (signer.sign_dsse(Statement(statement(name, files))).to_json() + "\n").encode()
        signed = open_signature(data, None)
        if not self.made(signed):
            # The card names the signer, and is among what was signed.
            raise RemoteFailure(
                f"Sigstore certified {signed.signer}, not {self.label}, which the card names",
                "Sign with --key, and report which CI service this was.",
            )
        return data

    def made(self, signed: SignedFiles) -> bool:
        """Whether a signature says that it is this signer's."""
        return signed.signer == self.label


def _certified_name(token: IdentityToken) -> str:
    """What Fulcio certifies: of two services the workflow's address, of others what the library says.

    Source: github.com/sigstore/fulcio, docs/oidc.md and config/identity.
    """
    part = str(token).split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    if workflow := claims.get("job_workflow_ref"):
        return f"https://github.com/{workflow}"
    if pipeline := claims.get("ci_config_ref_uri"):
        return f"https://{pipeline}"
    return str(token.identity)


def check_identity(data: bytes, expected: Identity) -> bytes:
    """The statement in a `model.sig`, once certificate, log entry and signature are proved to be in order.

    Raises:
        IntegrityFailure: not signed by that identity, or not valid.
        BadInput: the trust configuration cannot be read.
    """
    from sigstore.errors import VerificationError
    from sigstore.models import Bundle, InvalidBundle
    from sigstore.verify import Verifier, policy

    trusted = _trust(expected.trust_config, offline_too=True).trusted_root
    try:
        bundle = Bundle.from_json(data)
        asked = policy.Identity(identity=expected.name, issuer=expected.issuer)
        _, payload = Verifier(trusted_root=trusted).verify_dsse(bundle, asked)
    except (VerificationError, InvalidBundle, ValueError) as err:
        raise IntegrityFailure(
            f"{SIGNATURE_NAME} is not a valid signature of {expected.name} ({expected.issuer}): {err}",
            "Compare identity and provider with what the publisher says; if they are right, treat the bundle "
            "as not theirs.",
        ) from None
    return payload


def _trust(file: Path | None, *, offline_too: bool) -> ClientTrustConfig:
    from sigstore.errors import TUFError
    from sigstore.models import ClientTrustConfig

    if file is not None:
        try:
            return ClientTrustConfig.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise BadInput(
                f"{file} is no trust configuration of Sigstore: {err}", "See the instance's documentation."
            ) from None
    try:
        return ClientTrustConfig.production()
    except TUFError:
        if not offline_too:
            raise
        return ClientTrustConfig.production(offline=True)


@contextmanager
def _sigstore_faults() -> Iterator[None]:
    """What the library raises, some of it from modules that are its own affair, as one kind of failure."""
    try:
        yield
    except Exception as err:
        if type(err).__module__.partition(".")[0] not in ("sigstore", "requests"):
            raise
        raise RemoteFailure(
            f"Sigstore did not sign: {type(err).__name__} {err}".rstrip(),
            "Check that this job reaches the internet and run the same command again, or sign with --key.",
        ) from err
