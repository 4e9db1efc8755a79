"""Keyless signatures: by the identity of a CI job, through a Sigstore here and the real library."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from loopback_sigstore import IDENTITY, ISSUER, LoopbackSigstore
from tiny_bundle import Stages, make_stages

from packager.bundle.keyless import Identity, KeylessSigner
from packager.bundle.signature import open_signature
from packager.bundle.verify import verify_bundle
from packager.cli import run
from packager.errors import BadInput, IntegrityFailure, UsageProblem

AMBIENT = ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI", "GOOGLE_SERVICE_ACCOUNT_NAME")


@pytest.fixture(autouse=True)
def _no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def sigstore() -> Iterator[LoopbackSigstore]:
    with LoopbackSigstore() as running:
        yield running


@pytest.fixture
def job(sigstore: LoopbackSigstore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this process a job that may ask for a token; the trust configuration."""
    for name, value in sigstore.environment.items():
        monkeypatch.setenv(name, value)
    return sigstore.write_trust_config(tmp_path / "trust.json")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    made = make_stages(tmp_path_factory.mktemp("stages"))
    recipe = made.recipe.model_dump(mode="json", by_alias=True)
    (made.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return made


def bundle(stages: Stages, out: Path, *options: str | Path) -> int:
    recipe = str(stages.root / "recipe.yaml")
    return run(["bundle", str(stages.root), str(out), "--recipe", recipe, "--keyless", *map(str, options)])


def test_a_job_signs_by_its_identity_and_ours_and_the_stock_verifier_ask_for_it(
    stages: Stages, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from model_signing import verifying

    out = tmp_path / "b"
    assert bundle(stages, out, "--trust-config", job) == 0, capsys.readouterr().err
    signature = (out / "model.sig").read_bytes()
    assert bundle(stages, out, "--trust-config", job) == 0
    assert (out / "model.sig").read_bytes() == signature, "what is signed is not signed again"
    assert IDENTITY in (out / "README.md").read_text()
    capsys.readouterr()

    who = ["--identity", IDENTITY, "--identity-provider", ISSUER, "--trust-config", str(job)]
    assert run(["verify", str(out), *who, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == f"valid, by {IDENTITY} ({ISSUER})"
    assert run(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"].startswith("not checked")

    stock = verifying.Config().use_sigstore_verifier(identity=IDENTITY, oidc_issuer=ISSUER, trust_config=job)
    stock.verify(out, out / "model.sig")

    others = (Identity("https://github.com/other", ISSUER, job), Identity(IDENTITY, "https://other", job))
    with LoopbackSigstore() as stranger:
        others += (Identity(IDENTITY, ISSUER, stranger.write_trust_config(tmp_path / "stranger.json")),)
    for other in others:
        with pytest.raises(IntegrityFailure, match="not a valid signature of"):
            verify_bundle(out, identity=other)
    with pytest.raises(IntegrityFailure, match="made without a key, by https://github"):
        verify_bundle(out, stages.public_key)

    envelope = json.loads(signature)
    payload = envelope["dsseEnvelope"]["payload"]
    envelope["dsseEnvelope"]["payload"] = (
        payload[:200] + ("A" if payload[200] != "A" else "B") + payload[201:]
    )
    with pytest.raises(IntegrityFailure, match="not a valid signature"):
        open_signature(json.dumps(envelope).encode(), Identity(IDENTITY, ISSUER, job))
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityFailure, match=r"tokenizer\.json: changed"):
        verify_bundle(out, identity=Identity(IDENTITY, ISSUER, job))


def test_a_signature_with_a_key_is_no_identitys(stages: Stages, tmp_path: Path) -> None:
    stages.bundle(tmp_path / "b")
    with pytest.raises(IntegrityFailure, match="made with a key, not by an identity"):
        verify_bundle(tmp_path / "b", identity=Identity(IDENTITY, ISSUER))


def test_where_nothing_offers_an_identity_the_refusal_says_where_there_is_one(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle(stages, tmp_path / "b") == 2
    said = capsys.readouterr().err
    assert "nothing here offers an identity" in said
    assert "id-token: write" in said
    assert not (tmp_path / "b").exists()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with pytest.raises(UsageProblem, match="cannot be used"):
        KeylessSigner.of_this_job()
    assert bundle(stages, tmp_path / "b", "--key", "key.pem") == 2
    assert run(["verify", str(tmp_path), "--identity", "x"]) == 2
    assert run(["verify", str(tmp_path), "--identity", "x", "--identity-provider", "y", "--key", "z"]) == 2
    capsys.readouterr()
    for name in [name for name in sys.modules if name.split(".")[0] == "sigstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigstore", None)
    assert bundle(stages, tmp_path / "b") == 2
    assert "pip install 'moe-packager[sigstore]'" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/token", "/api/v1/log/entries"])
def test_a_service_that_fails_leaves_an_unsigned_bundle_that_the_same_command_signs(
    path: str, sigstore: LoopbackSigstore, stages: Stages, job: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    sigstore.failing = path
    try:
        assert bundle(stages, out, "--trust-config", job) == (2 if path == "/token" else 6)
    finally:
        sigstore.failing = ""
    assert not (out / "model.sig").exists()
    assert bundle(stages, out, "--trust-config", job) == 0
    assert verify_bundle(out, identity=Identity(IDENTITY, ISSUER, job)).authenticated


@pytest.mark.usefixtures("job")
def test_a_trust_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    signer = KeylessSigner.of_this_job(tmp_path / "none.json")
    for text in (None, "{}", "[", '{"trustedRoot": {}}'):
        if text is not None:
            (tmp_path / "none.json").write_text(text)
        with pytest.raises(BadInput, match="no trust configuration"):
            signer.sign("tiny", {"a": "0" * 64})
