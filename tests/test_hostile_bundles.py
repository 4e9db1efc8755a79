"""Bundles made to deceive: sealed, locked and signed by whoever made them, and refused all the same."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import Stages, digest_of, make_stages, reseal

from packager.artifact import MANIFEST_NAME, file_sha256, strict_json
from packager.bundle import signature
from packager.bundle.contents import content_problem, path_problem
from packager.bundle.names import clashes, shown
from packager.bundle.secret_strings import secret_in
from packager.bundle.verify import verify_bundle
from packager.cli import run
from packager.errors import IntegrityFailure

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
JWT = ".".join(
    base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
    for part in ({"alg": "RS256", "typ": "JWT"}, {"sub": "0123456789", "name": "somebody"}, "x" * 30)
)
PEM = "-----BEGIN PRIVATE KEY-----\n" + "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIB" * 2
SECRETS = {
    TOKEN: "a Hugging Face token",
    "ms-01234567-89ab-cdef-0123-456789abcdef": "a ModelScope token",
    "sk-proj-aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dF": "a secret key",
    "AKIAQ4WEXAMPL3KEYS42": "an AWS access key",
    "ghp_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789": "a GitHub token",
    "github_pat_" + "aB3dE6gH9j_" * 7: "a GitHub token",
    JWT: "a signed web token",
    PEM: "a private key",
}
HARMLESS = (
    "task-0123456789abcdefABCDEF0123456789abcdef", "hf_" + "x" * 34, "hf_transfer and hf_xet",
    "sk-learn-classification-with-very-long-names-2023", "AKIAIOSFODNN7EXAMPLE", "a-ms-transform: none",
    "-----BEGIN PRIVATE KEY-----", "mask-" + "aB3" * 12, "eyJhbGciOiJIUzI1NiJ9", "sha256:" + "5e" * 32,
)  # fmt: skip
CONTENT: dict[str, tuple[bytes, str]] = {
    "a.safetensors": (b"\x80\x04" + bytes(300), "no safetensors file: "),
    "b.safetensors": ((10 * 10**9).to_bytes(8, "little") + b"{}", "the header claims 10000000000 bytes"),
    "c.safetensors": (b"PK\x03\x04" + bytes(500), "no safetensors file"),
    "d.safetensors": (b"abc", "no safetensors file: shorter"),
    "e.safetensors": (
        (lambda t: len(t).to_bytes(8, "little") + t)(json.dumps({"__metadata__": {"k": TOKEN}}).encode()),
        "a Hugging Face token",
    ),
    "pickle.json": (b"\x80\x05\x95", "it is a pickle"),
    "old-pickle.txt": (b"cposix\nsystem\n(S'id'\ntR.", "it is a pickle"),
    "zip.txt": (b"PK\x03\x04" + bytes(30), "a zip archive"),
    "tail.model": (b"\x0a\x05piece" + bytes(100) + b"PK\x05\x06" + bytes(18), "a zip archive behind"),
    "picture.png": (b"GIF89a", "no .png file"),
    "binary.txt": (b"\x93NUMPY\x01\x00", "no text"),
    "latin.md": (b"caf\xe9", "no text in UTF-8"),
    "script.txt": (b"#!/bin/sh\nrm -rf /", "a script"),
    "elf.model": (b"\x7fELF\x02", "an executable"),
    "twice.json": (b'{"a": {"b": 1, "b": 2}}', "the name 'b' occurs twice"),
    "deep.json": (b"[" * 49_000, "nested too deeply"),
    "nan.json": (b'{"a": NaN}', "NaN is not JSON"),
    "lists.json": (b"[" + b"[]," * 50_001 + b"[]]", "more lists and objects"),
    "tokenizer_config.json": (b'{"auto_map": {"AutoTokenizer": ["x--y.Z"]}}', r"code to run \(auto_map"),
    "escaped.json": (b'[{"a": {"auto\\u005fmap": "x--y.Z"}}]', r"code to run \(auto_map"),
    "remote.json": (b'{"trust_remote_code": true}', "code to run"),
    "token.json": (json.dumps({"note": f"use:\n{TOKEN}"}).encode(), "a Hugging Face token"),
    "jinja.jinja": (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", "Python's internals"),
    "template.json": (b'{"chat_template": [{"template": "{{ x.__globals__ }}"}]}', "Python's internals"),
    "object.yaml": (b"a: !!python/object/apply:os.system [id]", "code to run"),
    "key.yaml": (b"a: 1\nb: {c: 1, c: 2}", "the key 'c' occurs twice"),
    "deep.yaml": (b"[" * 600, "no(t)? sound YAML|nested"),
    "active.svg": (b"<svg onload='alert(1)'/>", "a script"),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def bundle(stages: Stages, tmp_path: Path) -> Path:
    """A bundle to damage: small files copied, so that nothing reaches the stages."""
    stages.bundle(tmp_path / "linked")
    copy = tmp_path / "bundle"
    for file in sorted(p for p in (tmp_path / "linked").rglob("*") if p.is_file()):
        target = copy / file.relative_to(tmp_path / "linked")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return copy


def refused(bundle: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code of `packager verify`, what it says, and what it advises."""
    code = run(["verify", str(bundle), "--key", str(key)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    what, _, advice = said.partition("what to do:")
    return code, what, advice


def test_content_that_its_name_hides_is_refused_in_a_bundle_whose_every_digest_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the real stages and signed: nothing but the look at the bytes can refuse it."""
    monkeypatch.setattr(strict_json, "MOST_CONTAINERS", 50_000)
    hostile = {name: data for name, (data, _) in CONTENT.items()}
    stages = make_stages(tmp_path / "stages", extra=hostile)
    stages.bundle(tmp_path / "b")
    code, said, advice = refused(tmp_path / "b", stages.public_key, capsys)
    assert code == 5
    lines = {line.strip().split(": ")[0]: line for line in said.splitlines()[2:]}
    assert set(lines) == set(CONTENT), "each is named, and no other file"
    for name, (_, reason) in CONTENT.items():
        assert re.search(reason, lines[name]), lines[name]
    assert "tell its publisher" in advice
    assert TOKEN not in said, "a secret is not repeated"


def test_what_opens_accounts_is_found_and_what_only_looks_like_it_is_not() -> None:
    for secret, kind in SECRETS.items():
        for text in (secret, f"key: {secret}\n", json.dumps({"env": f"A=1\n{secret}"})):
            found = secret_in(text.encode())
            assert found, text
            assert kind in found
    for text in HARMLESS:
        assert secret_in(f'"{text}": 1'.encode()) is None, text
    assert content_problem("tokenizer.json", json.dumps(dict.fromkeys(HARMLESS, 1)).encode()) is None


NAMES = {
    "\u0441onfig.json": r"U\+0441 CYRILLIC SMALL LETTER ES",
    "caf\u00e9.json": r"U\+00E9 LATIN SMALL LETTER E WITH ACUTE",
    "cafe\u0301.json": r"U\+0301 COMBINING ACUTE ACCENT",
    "a\u202etxt.json": r"U\+202E RIGHT-TO-LEFT OVERRIDE",
    "a\u200b.json": r"U\+200B ZERO WIDTH SPACE",
    "a\nb.json": r"U\+000A",
    "a:b.json": r"U\+003A COLON",
    "aux.json": "device on Windows",
    "draft/COM1.txt": "device on Windows",
    "-rf.json": "begins or ends",
    "a .json/b.json ": "begins or ends",
    "Config.json": "the same name as Config.json|on macOS and Windows the same name",
    "DRAFT/x.json": "on macOS and Windows the same name",
    "x.zip.safetensors": "code, pickles and archives",
    "weights.pt.json": "code, pickles and archives",
    "evidence/run.py": "code, pickles and archives",
    "data.parquet": "not a kind of file",
}


def test_names_that_look_like_others_or_break_other_systems_are_refused(
    bundle: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("{}")
    reseal(bundle, stages.private_key)
    code, said, _ = refused(bundle, stages.public_key, capsys)
    assert code == 5
    for name, reason in NAMES.items():
        pair = {"Config.json": "config.json", "DRAFT/x.json": "draft"}.get(name, name)
        lines = [line for line in said.splitlines() if line.startswith(f"  {shown(pair)}: ")]
        assert re.search(reason, lines[0]), lines
    # The two spellings of `café` clash too.
    assert said.count("\n") == len(NAMES) + 3


OUTSIDE = (
    "../x.json", "a/../../x.json", "/etc/x.json", "..\\x.json", "a\\b.json", "a/./b.json", "a//b.json",
    "a\0.json", "", ".", "..", "./config.json", "manifest.json", "C:x.json", "C:/x.json",
)  # fmt: skip


def test_a_manifest_that_names_a_path_outside_is_refused(
    bundle: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((bundle / MANIFEST_NAME).read_bytes())
    for path in OUTSIDE:
        document: dict[str, Any] = json.loads(json.dumps(whole))
        document["files"].append({"path": path, "size": 2, "sha256": "0" * 64})
        document["files"].sort(key=lambda entry: entry["path"])
        _sign_manifest(bundle, document, stages)
        code, said, _ = refused(bundle, stages.public_key, capsys)
        assert code in (3, 5), path
        assert repr(path)[1:-1] in said or shown(path) in said, said


def _sign_manifest(bundle: Path, document: dict[str, Any], stages: Stages) -> None:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (bundle / MANIFEST_NAME).write_bytes(text)
    signed = {entry["path"]: entry["sha256"] for entry in document["files"]}
    signed[MANIFEST_NAME] = file_sha256(bundle / MANIFEST_NAME)
    (bundle / "model.sig").write_bytes(signature.sign("tiny", signed, stages.private_key))


def test_documents_that_two_readers_read_differently_are_refused(
    bundle: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest, the lock, the index, the report, the signature: each with its first name twice."""
    sealed = ("bundle.lock", "config.json", "model.safetensors.index.json", "evidence/report.json")
    for name in (MANIFEST_NAME, "model.sig", *sealed):
        before = {bundle / part: (bundle / part).read_bytes() for part in (name, MANIFEST_NAME, "model.sig")}
        text = before[bundle / name].lstrip(b"{ \n")
        first = text.split(b":")[0]
        for change, reason in (
            (b"{" + first + b": 0, " + text, "occurs twice"),
            (b"[" * 50_000, "nested too deeply"),
            (b"\xff{}", "not |malformed"),
        ):
            (bundle / name).write_bytes(change)
            if name in sealed:
                reseal(bundle, stages.private_key)
            code, said, _ = refused(bundle, stages.public_key, capsys)
            assert code in (3, 5)
            assert name in said
            assert re.search(reason, said), said
            for path, data in before.items():
                path.write_bytes(data)
    verify_bundle(bundle, stages.public_key)


def test_a_statement_inside_the_signature_with_a_name_twice_is_refused(stages: Stages) -> None:
    whole = json.loads(signature.sign("tiny", {"a": "0" * 64}, stages.private_key))
    payload = base64.b64decode(whole["dsseEnvelope"]["payload"])
    whole["dsseEnvelope"]["payload"] = base64.b64encode(b'{"_type": 1, ' + payload[1:]).decode()
    with pytest.raises(IntegrityFailure, match="occurs twice"):
        signature.open_signature(json.dumps(whole).encode(), None)


def test_a_manifest_too_large_to_be_one_is_not_read(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle / MANIFEST_NAME).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert run(["verify", str(bundle)]) == 3
    assert "it is not read" in capsys.readouterr().err


def test_links_and_things_that_are_no_files_are_refused_and_never_opened(
    bundle: Path, stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would block whoever opens it."""
    (tmp_path / "secret.json").write_text("{}")
    for name, target in {
        "out.json": "../secret.json", "absolute.json": "/etc/hostname", "loop.json": "loop.json",
        "folder": "/etc", "nowhere.json": "not/there", "within.json": "config.json",
    }.items():  # fmt: skip
        (bundle / name).symlink_to(target)
    os.mkfifo(bundle / "pipe.json")
    (bundle / "tokenizer.json").unlink()
    os.mkfifo(bundle / "tokenizer.json")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(bundle)  # the path of a socket may have 107 bytes
        try:
            listening.bind("socket.json")
        finally:
            os.chdir(here)
        code, said, advice = refused(bundle, stages.public_key, capsys)
    assert code == 5
    for name in ("out.json", "absolute.json", "loop.json", "folder", "nowhere.json", "within.json"):
        assert f"  {name}: a link that leads out of the bundle" in said
    for name in ("pipe.json", "tokenizer.json", "socket.json"):
        assert f"  {name}: neither a file nor a directory" in said
    assert "Neither load nor serve" in advice


def test_remedies_name_the_command_for_the_kind_of_fault(
    bundle: Path,
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--org--tiny/snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    bundle.rename(snapshot)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "config.json").write_text("{}")
    (snapshot / "extra.json").write_text("{}")
    _, _, advice = refused(snapshot, stages.public_key, capsys)
    assert f"hf download org/tiny --revision {'a' * 40}\n" in advice
    assert f"hf download org/tiny config.json --revision {'a' * 40} --force-download;" in advice
    assert f"rm {snapshot / 'extra.json'}" in advice
    for path in ("extra.json", "config.json"):
        (snapshot / path).unlink()
    (snapshot / MANIFEST_NAME).unlink()
    for asked in ("org/tiny", "org/tiny@" + "a" * 40):
        assert run(["verify", asked]) == 3
        said = capsys.readouterr().err
        assert "download was not finished" in said
        assert f"hf download org/tiny --revision {'a' * 40}" in said


def test_a_repositorys_name_is_looked_up_in_the_hub_cache_without_a_network(
    bundle: Path,
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run(["verify", "org/tiny"]) == 3
    said = capsys.readouterr().err
    assert "nor in the hub cache" in said
    assert "hf download org/tiny;" in said
    snapshots = cache / "models--org--tiny/snapshots"
    snapshots.mkdir(parents=True)
    bundle.rename(snapshots / ("a" * 40))
    check = ["verify", "org/tiny", "--key", str(stages.public_key), "--json"]
    assert run(check) == 0, "the only one"
    assert json.loads(capsys.readouterr().out)["digest"] == digest_of(snapshots / ("a" * 40))
    (snapshots / ("b" * 40)).mkdir()
    assert run(check) == 2
    assert f"org/tiny@{'a' * 40} or org/tiny@{'b' * 40}" in capsys.readouterr().err
    refs = cache / "models--org--tiny/refs"
    (refs / "pr").mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    (refs / "v1").write_text("c" * 40)
    for asked, code in (("", 0), ("@" + "a" * 40, 0), ("@v1", 3), ("@v2", 3)):
        assert run(["verify", "org/tiny" + asked]) == code, asked
    assert "hf download org/tiny --revision v2" in capsys.readouterr().err


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), max_size=12)
        | st.sampled_from(["..", ".", "aux", "a.json", ""]),
        max_size=4,
    ).map("/".join)
    | st.from_regex(r"[A-Za-z0-9 ._-]{1,8}(/[A-Za-z0-9._-]{1,8})?\.(json|txt)", fullmatch=True)
)
def test_a_name_that_is_let_in_is_one_file_on_every_system(path: str) -> None:
    if path_problem(path) is not None:
        return
    assert path.isascii() and path.isprintable()
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    assert not posix.is_absolute() and ".." not in posix.parts and str(posix) == path
    assert not windows.drive and not windows.root and windows.parts == posix.parts
    assert not any(PureWindowsPath(part).is_reserved() for part in posix.parts)
    assert unicodedata.normalize("NFD", path) == path
    assert not any(part.endswith((" ", ".")) for part in posix.parts)
    assert not clashes([path])
    assert clashes([path, path.swapcase()]) or path == path.swapcase()
