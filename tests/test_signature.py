"""A bundle's signature: made with our key, accepted by the stock verifier, refused once a bit is flipped."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from packager.bundle import signature
from packager.cli.keys import command as keys_command
from packager.errors import BadInput, IntegrityFailure, UsageProblem


@pytest.fixture(scope="module")
def key_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    private = tmp_path_factory.mktemp("keys") / "release.pem"
    return private, signature.generate_keys(private)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signed_model(root: Path, private: Path) -> Path:
    """A directory whose order by string differs from that by path part (`draft-x.txt`, `draft/…`)."""
    for name in (
        "config.json",
        "model.safetensors",
        "draft/model.safetensors",
        "draft-x.txt",
        "evidence/é.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 50)
    files = {p.relative_to(root).as_posix(): sha256(p) for p in root.rglob("*") if p.is_file()}
    (root / "model.sig").write_bytes(signature.sign("model", files, private))
    return root


def stock_verify(root: Path, public: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", str(root),
         "--signature", str(root / "model.sig"), "--public_key", str(public)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_stock_verifier_accepts_our_signature_also_among_the_hub_clients_own_files(
    tmp_path: Path, key_pair: tuple[Path, Path]
) -> None:
    root = signed_model(tmp_path / "model", key_pair[0])
    (root / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (root / ".cache/huggingface").mkdir(parents=True)
    (root / ".cache/huggingface/download.lock").write_text("")
    result = stock_verify(root, key_pair[1])
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_stock_verifier_rejects_a_flipped_bit_a_missing_an_added_and_a_renamed_file(
    tmp_path: Path, key_pair: tuple[Path, Path]
) -> None:
    from model_signing import verifying

    verifier = verifying.Config().use_elliptic_key_verifier(public_key=key_pair[1])

    def flip(root: Path) -> None:
        data = bytearray((root / "model.safetensors").read_bytes())
        data[17] ^= 1
        (root / "model.safetensors").write_bytes(data)

    changes = {
        "flipped": flip,
        "missing": lambda root: (root / "draft/model.safetensors").unlink(),
        "added": lambda root: (root / "extra.json").write_text("{}"),
        "renamed": lambda root: (root / "config.json").rename(root / "konfig.json"),
    }
    for name, change in changes.items():
        root = signed_model(tmp_path / name, key_pair[0])
        verifier.verify(root, root / "model.sig")
        change(root)
        with pytest.raises(ValueError, match="mismatch"):
            verifier.verify(root, root / "model.sig")


def test_our_own_check_returns_what_was_signed_and_is_reproducible(
    tmp_path: Path, key_pair: tuple[Path, Path]
) -> None:
    root = signed_model(tmp_path / "model", key_pair[0])
    data = (root / "model.sig").read_bytes()
    signed = signature.open_signature(data, key_pair[1])
    assert signed.authenticated
    assert signed.files["draft/model.safetensors"] == sha256(root / "draft/model.safetensors")
    assert signed.key_fingerprint == signature.fingerprint(key_pair[1])
    assert signature.sign("model", signed.files, key_pair[0]) == data
    assert not signature.open_signature(data, None).authenticated


def test_every_single_flipped_bit_of_payload_or_signature_is_refused(
    tmp_path: Path, key_pair: tuple[Path, Path]
) -> None:
    bundle = json.loads((signed_model(tmp_path / "model", key_pair[0]) / "model.sig").read_bytes())
    envelope = bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    for position in range(0, len(payload), 37):
        changed = bytearray(payload)
        changed[position] ^= 4
        forged = {**bundle, "dsseEnvelope": {**envelope, "payload": base64.b64encode(changed).decode()}}
        with pytest.raises(IntegrityFailure, match="not valid"):
            signature.open_signature(json.dumps(forged).encode(), key_pair[1])
    raw = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    raw[-1] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(raw).decode()
    with pytest.raises(IntegrityFailure, match="not valid"):
        signature.open_signature(json.dumps(bundle).encode(), key_pair[1])


def test_another_key_and_a_file_that_is_no_signature_are_refused(
    tmp_path: Path, key_pair: tuple[Path, Path]
) -> None:
    data = (signed_model(tmp_path / "model", key_pair[0]) / "model.sig").read_bytes()
    stranger = signature.generate_keys(tmp_path / "stranger.pem")
    with pytest.raises(IntegrityFailure, match="another key"):
        signature.open_signature(data, stranger)
    for junk in (b"", b"{}", b"[1]", b'{"mediaType": "x"}', data[:100]):
        with pytest.raises(IntegrityFailure, match="not a model signature"):
            signature.open_signature(junk, key_pair[1])
    with pytest.raises(BadInput, match="no public key"):
        signature.open_signature(data, tmp_path / "model" / "config.json")


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    private = tmp_path / "locked.pem"
    public = signature.generate_keys(private, passphrase="open sesame")
    assert b"ENCRYPTED" in private.read_bytes()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    files = {"a": "00" * 32}
    data = signature.sign("m", files, private, passphrase="open sesame")
    assert signature.open_signature(data, public).files == files
    for wrong, said in ((None, "no passphrase was given"), ("open barley", "passphrase .* is wrong")):
        with pytest.raises(BadInput, match=said):
            signature.sign("m", files, private, passphrase=wrong)


def test_a_passphrase_comes_from_environment_file_or_terminal_and_never_from_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACKAGER_KEY_PASSPHRASE", raising=False)
    monkeypatch.setenv("OTHER", "öffne dich")
    (tmp_path / "word").write_text("from a file\nnot this line\n")
    (tmp_path / "empty").write_text("\n")
    sources = {
        "env": (["--passphrase-env", "OTHER"], "öffne dich"),
        "file": (["--passphrase-file", str(tmp_path / "word")], "from a file"),
        "ask": (["--passphrase"], "typed"),
    }
    for name, (option, expected) in sources.items():
        out = tmp_path / f"{name}.pem"
        made = CliRunner().invoke(
            keys_command, ["generate", "--out", str(out), *option], input="typed\ntyped\n"
        )
        assert made.exit_code == 0, made.output
        assert expected not in made.output
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        assert signature.is_encrypted(out)
        assert signature.private_fingerprint(out, passphrase=expected)
    for option in (
        ["--passphrase-env", "NOT_SET"],
        ["--passphrase-file", str(tmp_path / "empty")],
        ["--passphrase-env", "OTHER", "--passphrase-file", str(tmp_path / "word")],
        ["--passphrase", "--passphrase-env", "OTHER"],
    ):
        refused = CliRunner().invoke(keys_command, ["generate", "--out", str(tmp_path / "no.pem"), *option])
        assert isinstance(refused.exception, UsageProblem), option
        assert not (tmp_path / "no.pem").exists()
    with pytest.raises(UsageProblem, match="name of a public key"):
        signature.generate_keys(tmp_path / "key.pub")


def test_keys_generate_writes_a_pair_and_never_overwrites_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACKAGER_KEY_PASSPHRASE", raising=False)
    out = tmp_path / "new" / "key.pem"
    result = CliRunner().invoke(keys_command, ["generate", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["fingerprint"] == signature.fingerprint(Path(written["public_key"]))
    assert written["encrypted"] is False
    before = out.read_bytes()
    again = CliRunner().invoke(keys_command, ["generate", "--out", str(out)])
    assert isinstance(again.exception, UsageProblem)
    assert out.read_bytes() == before
