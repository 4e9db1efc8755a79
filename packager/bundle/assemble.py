"""Assembly: sealed stages become one directory that is a Hugging Face model repository, sealed and signed.

<top>        weights, config, tokenizer, chat template: the files of the context stage, linked
draft/       the EAGLE3 draft
evidence/    the validation report
bundle.lock  the chain of digests, with every manifest
serve.yaml   how to serve it
README.md    the model card; README.zh.md the same in Chinese, .eval_results/ its results for the hub
deploy/, bom.cdx.json, provenance.json   plugin wheel, containers, what it is made of and how (companions.py)
model.sig    the signature; it covers all of the above and the manifest, and is written last
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from packager.artifact import (
    MANIFEST_NAME,
    ArtifactWriter,
    FileEntry,
    Manifest,
    check,
    is_sealed,
    read_manifest,
)
from packager.bundle.card import card_files, license_note, measured_context
from packager.bundle.card_settings import CardSettings, card_settings
from packager.bundle.companions import write_companions
from packager.bundle.contents import TOLERATED, path_problem
from packager.bundle.licensing import licence_statements, require_decided
from packager.bundle.lock import LOCK_NAME, Lock, build_lock
from packager.bundle.serve_profiles import (
    HOST,
    PORT,
    ServedBytes,
    measured_speculation,
    profiles,
    serve_yaml,
    served_bytes,
    served_name,
)
from packager.bundle.signature import SIGNATURE_NAME, KeySigner, Signer, open_signature
from packager.bundle.verify import STAGE
from packager.errors import BadInput
from packager.recipe import Recipe


def assemble(
    out: Path,
    *,
    recipe: Recipe,
    recipe_digest: str,
    fp8: Path,
    context: Path,
    draft: Path | None,
    evidence: Path,
    source: Path | None = None,
    signing_key: Path | None,
    passphrase: str | None = None,
    keyless: Signer | None = None,
    override: str | None = None,
    progress: Callable[[str], None],
) -> Manifest:
    """Make (or finish, or find finished) the bundle `out`; no weight byte is read or copied.

    Args:
        recipe_digest: recorded in the manifest.
        source: folder of the checkpoint, to see what it says of its licence; None: not at hand, and the card
            says so.
        signing_key: P-256 private key (PEM); None: the bundle stays unsigned, and publishing refuses it.
        keyless: what signs in place of a key.
        override: why it is to be published although a gate failed or was not measured; the card shows it.

    Raises:
        BadInput: a stage is not sealed, the stages do not belong together, `out` holds something else, the
            key cannot be used, or licences disagree and the recipe does not decide.
        RemoteFailure: nothing was signed without a key.
        IntegrityFailure: a finished `out` was altered.
    """
    folders = {"fp8": fp8, "context": context, "evidence": evidence} | ({"draft": draft} if draft else {})
    lock = build_lock(recipe, folders, override)
    signer: Signer | None = KeySigner(signing_key, passphrase) if signing_key else keyless
    card = _card_settings(recipe, lock, source, signer.label if signer else None)
    lock = lock.model_copy(update={"card": card})
    inputs = {name: stage.digest for name, stage in lock.stages.items()}
    if signer:
        inputs["signer"] = signer.digest
    if override:
        inputs["override"] = "sha256:" + hashlib.sha256(override.encode()).hexdigest()
    manifest = _found(out, recipe_digest, inputs)
    if manifest is None:
        progress(f"assembling {out}")
        manifest = _assemble(out, recipe, recipe_digest, inputs, lock, folders, progress)
    if signer and not _signed_by(out, manifest, signer):
        _write_signature(out, recipe.name, manifest, signer)
        progress(f"signed {f'with the key {signer.label[:16]}…' if signing_key else f'by {signer.label}'}")
    return manifest


def _card_settings(recipe: Recipe, lock: Lock, source: Path | None, signer: str | None) -> CardSettings:
    statements = None if source is None else licence_statements(source)
    require_decided(recipe, statements or ())
    measured = measured_speculation(lock.stages["evidence"].manifest.metrics)
    return card_settings(
        recipe,
        profiles(recipe, draft="draft" in lock.stages, measured=measured),
        served_name=served_name(recipe),
        address=f"http://{HOST}:{PORT}",
        upstream_licenses=statements,
        signer=signer,
    )


def _found(out: Path, recipe_digest: str, inputs: dict[str, str]) -> Manifest | None:
    if not is_sealed(out):
        return None
    manifest = read_manifest(out)
    if (manifest.stage, manifest.recipe_digest, manifest.inputs) != (STAGE, recipe_digest, inputs):
        raise BadInput(
            f"{out} is sealed already, and made from something else",
            "Choose another directory, or remove that one.",
        )
    return check(out, deep=False, ignore=(*TOLERATED, SIGNATURE_NAME + ".part"))


def _assemble(
    out: Path,
    recipe: Recipe,
    recipe_digest: str,
    inputs: dict[str, str],
    lock: Lock,
    folders: dict[str, Path],
    progress: Callable[[str], None],
) -> Manifest:
    has_draft = "draft" in folders
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        linked = 0
        for target, source, entry in _stage_files(lock, folders, progress):
            linked += entry.size
            if writer.done(target) is None:
                writer.link(target, source, entry.sha256)
        if writer.done("config.json") is None:
            raise BadInput(f"{folders['context']} has no config.json: it is not a checkpoint")
        writer.write_text(LOCK_NAME, lock.dumps())
        measured = measured_speculation(lock.stages["evidence"].manifest.metrics)
        served = _served_bytes(folders, progress)
        writer.write_text(
            "serve.yaml",
            serve_yaml(
                recipe,
                draft=has_draft,
                measured=measured,
                trained_length=lock.trained_length,
                claim=measured_context(recipe, folders["evidence"]),
                served=served,
            ),
        )
        assert lock.card is not None
        writer.write_text("LICENSE-NOTE.md", license_note(lock.card, lock.source.name))
        for name, text in card_files(lock, folders["evidence"]).items():
            writer.write_text(name, text)
        write_companions(writer, recipe, lock, folders)
        return writer.seal(
            {"gates": lock.gates.outcome, "override": lock.gates.override, "linked_bytes": linked}
        )


def _served_bytes(folders: dict[str, Path], progress: Callable[[str], None]) -> ServedBytes | None:
    """What serving takes; None, and said, for an architecture that is not known here."""
    try:
        return served_bytes(folders["context"], folders.get("draft"))
    except BadInput as err:
        progress(f"serve.yaml names no memory needed: {err.message}")
        return None


def _stage_files(
    lock: Lock, folders: dict[str, Path], progress: Callable[[str], None]
) -> Iterator[tuple[str, Path, FileEntry]]:
    """Path in the bundle, file, and manifest entry of all that the stages bring."""
    for path, stage, entry in lock.files():
        if path in (".gitattributes", "README.md"):
            continue  # the hub writes the one, this package the other
        reason = path_problem(entry.path)
        if reason:
            progress(f"leaving out {path}: {reason}")
            continue
        yield path, folders[stage] / entry.path, entry


def _signed_by(out: Path, manifest: Manifest, signer: Signer) -> bool:
    file = out / SIGNATURE_NAME
    if not file.is_file():
        return False
    signed = open_signature(file.read_bytes(), None)
    return signer.made(signed) and signed.files == _to_sign(manifest)


def _to_sign(manifest: Manifest) -> dict[str, str]:
    files = {entry.path: entry.sha256 for entry in manifest.files}
    return files | {MANIFEST_NAME: manifest.digest.removeprefix("sha256:")}


def _write_signature(out: Path, name: str, manifest: Manifest, signer: Signer) -> None:
    data = signer.sign(name, _to_sign(manifest))
    part = out / (SIGNATURE_NAME + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(out / SIGNATURE_NAME)
