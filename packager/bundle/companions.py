"""What a bundle carries beside model, evidence and card, to be run, checked and passed on.

deploy/<wheel>                       the plugin for engines (`plugin_wheel`)
deploy/Containerfile, compose.yaml,  ready to run (`containers`)
       kubernetes.yaml
deploy/vllm-recipe.yaml              an entry for vLLM's recipes (`engine_notes`)
deploy/OTHER-ENGINES.md              SGLang and Ascend
bom.cdx.json                         the bill of materials; it lists all files but the next
provenance.json                      how they were made; its subjects are all files but itself

All of it follows from recipe, lock and evidence, to the byte; SOURCE_DATE_EPOCH and a CI job's GITHUB_*
variables are told of where they are set.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packager.artifact import ArtifactWriter, Manifest
from packager.bundle.bill_of_materials import BOM_NAME, bill_of_materials, listed_files
from packager.bundle.containers import CONTAINER_FILES, container_files
from packager.bundle.engine_notes import CATALOGUE_PATH, NOTES_PATH, catalogue_entry, other_engines
from packager.bundle.lock import REPORT_NAME, Lock
from packager.bundle.plugin_wheel import REVIEWED, WHEEL_FOLDER, WHEEL_PATH, build_wheel
from packager.bundle.provenance import PROVENANCE_NAME, provenance, subjects
from packager.bundle.serve_profiles import measured_speculation, profiles
from packager.recipe import Recipe

COMPANIONS = frozenset(
    {
        BOM_NAME,
        PROVENANCE_NAME,
        CATALOGUE_PATH,
        NOTES_PATH,
        *CONTAINER_FILES,
        *(f"{WHEEL_FOLDER}/{name}" for name in REVIEWED),
    }
)
"""Paths of all that this module may write into a bundle, now or in an earlier release."""


def write_companions(writer: ArtifactWriter, recipe: Recipe, lock: Lock, folders: dict[str, Path]) -> None:
    """Write them all into an open bundle that holds everything else.

    Args:
        folders: of the sealed stages; `context` and `evidence` are read.
    """
    from validation.report import read_report

    measured = measured_speculation(lock.stages["evidence"].manifest.metrics)
    made = profiles(recipe, draft="draft" in folders, measured=measured)
    profile = next(one for one in made if one.device == "cuda")
    weights = sum(entry.size for entry in writer.entries if entry.path.endswith(".safetensors"))
    writer.write_bytes(WHEEL_PATH, build_wheel())
    for path, text in container_files(recipe, profile, weight_bytes=weights).items():
        writer.write_text(path, text)
    entry = catalogue_entry(recipe, lock, profile, weight_bytes=weights)
    if entry is not None:
        writer.write_text(CATALOGUE_PATH, entry)
    writer.write_text(NOTES_PATH, other_engines(recipe, profile))
    report = read_report(folders["evidence"] / REPORT_NAME)
    config = json.loads((folders["context"] / "config.json").read_bytes())
    # What a killed assembly left of these two would otherwise be listed in them.
    listed = [entry for entry in writer.entries if entry.path not in (BOM_NAME, PROVENANCE_NAME)]
    writer.write_text(BOM_NAME, bill_of_materials(recipe, lock, report, config, listed))
    listed = [entry for entry in writer.entries if entry.path != PROVENANCE_NAME]
    writer.write_text(PROVENANCE_NAME, provenance(recipe, lock, listed))


def companion_problems(root: Path, manifest: Manifest) -> list[str]:
    """Where the bill of materials or the provenance tells of other files than the manifest, one line each."""
    sealed = {entry.path: entry.sha256 for entry in manifest.files if entry.path != PROVENANCE_NAME}
    told: tuple[tuple[str, Callable[[Any], dict[str, str]], set[str]], ...] = (
        (BOM_NAME, listed_files, {BOM_NAME}),
        (PROVENANCE_NAME, subjects, set()),
    )
    problems = []
    for name, read, without in told:
        try:
            found = read(json.loads((root / name).read_bytes()))
        except (OSError, ValueError) as err:
            problems.append(f"{name}: {err}")
            continue
        expected = {path: digest for path, digest in sealed.items() if path not in without}
        problems += [
            f"{name}: it tells of another {path} than the bundle holds"
            for path in sorted({*expected, *found})
            if expected.get(path) != found.get(path)
        ]
    return problems
