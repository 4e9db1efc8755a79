"""The release itself: which stages there are, what each reads of the recipe, how each makes its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import Manifest, file_sha256
from packager.errors import BadInput, GateFailed
from packager.recipe import Recipe
from packager.release.answer import FirstAnswer, ask_downloaded
from packager.release.evidence import collect_evidence, first_question
from packager.release.pipeline import Pipeline, Say, Stage, StageResult, sections_of
from packager.release.rubrics import rubric_inputs
from packager.release.variants import Variants
from packager.release.workspace import SourceIdentity, Workspace, locate

if TYPE_CHECKING:
    from packager.quantize.convert import Executor

PASSPHRASE_VARIABLE = "PACKAGER_KEY_PASSPHRASE"


@dataclass(frozen=True)
class Outcome:
    """A finished release."""

    recipe: Recipe
    workspace: Workspace
    stages: list[StageResult]
    answer: FirstAnswer
    weights_served: str
    """`native`, or `dequantized` on a CPU without kernels for the scheme."""
    why_dequantized: str
    """In a sentence; empty if they were served as they are."""

    @property
    def nothing_to_do(self) -> bool:
        """Every stage was done before."""
        return all(stage.skipped for stage in self.stages) and self.answer.kept

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics of one stage."""
        return next(done.metrics for done in self.stages if done.name == stage)

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        ws = self.workspace
        return {
            "kind": "release",
            "recipe": self.recipe.name,
            "recipe_digest": self.recipe.digest,
            "nothing_to_do": self.nothing_to_do,
            "weights_served": self.weights_served,
            "stages": [
                {
                    "stage": stage.name,
                    "folder": str(stage.folder),
                    "digest": stage.manifest.digest,
                    "seconds": stage.seconds,
                    "skipped": stage.skipped,
                    "metrics": stage.metrics,
                }
                for stage in self.stages
            ],
            "answer": {
                "question": self.answer.question,
                "answer": self.answer.answer,
                "expected": self.answer.expected,
                "right": self.answer.right,
            },
            "tokens_per_s": self.metrics("validate")["tokens_per_s"],
            "report": str(ws.evidence / "report.html"),
            "bundle": str(ws.bundle),
            "published": str(ws.published),
        }


def release(
    recipe: Recipe,
    root: Path,
    say: Say,
    *,
    signing_key: Path | None = None,
    executor: Executor = "local",
    ray_address: str | None = None,
) -> Outcome:
    """Run a recipe to its end in the workspace `root`; finished stages are skipped.

    Args:
        recipe: what to release.
        root: workspace folder; made if missing.
        say: called with one line of progress at a time.
        signing_key: private key of the bundle's signature; None: one of the workspace's own.
        executor: where weights are converted, as `quantize` has it; stages and digests do not depend on it.
        ray_address: HOST:PORT of the cluster; None: RAY_ADDRESS.

    Raises:
        BadInput: source or settings cannot be used; another problem with files.
        GateFailed: a figure misses its bound or was not measured; the evidence is kept, nothing is bundled.
        UsageProblem: another release runs in this workspace.
        IntegrityFailure: a sealed folder was altered.
        RemoteFailure: an engine, a hub or a Ray cluster did not do its part.
    """
    workspace = Workspace(root)
    source = locate(recipe.source)
    with workspace.open():
        key, where = signing_key or workspace.signing_key, (executor, ray_address)
        return _Release(recipe, workspace, source, key, where, say).run()


class _Release:
    """One run; each method makes one folder."""

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace,
        source: Path,
        key: Path,
        where: tuple[Executor, str | None],
        say: Say,
    ) -> None:
        self.recipe, self.workspace, self.source, self.key, self.say = recipe, workspace, source, key, say
        self.executor, self.ray_address = where
        self.identity = SourceIdentity(source, workspace)
        self.pipeline = Pipeline(workspace, say)

    def run(self) -> Outcome:
        from packager.bundle.contents import TOLERATED
        from packager.bundle.licensing import licence_statements, require_decided
        from packager.bundle.signature import SIGNATURE_NAME
        from packager.serving import fp8_runs_here
        from validation.report.model import SCHEMA_VERSION

        recipe, ws, run = self.recipe, self.workspace, self.pipeline.run
        require_decided(recipe, licence_statements(self.source))  # now, not after hours of measuring
        native, reason = fp8_runs_here(recipe.quantize.scheme)
        if not native:
            self.say(f"{reason}; quantized weights are served dequantized to BF16, and the evidence says so")
        fp8 = run(
            Stage(
                "quantize",
                ws.fp8,
                sections_of(recipe, "quantize"),
                lambda: (self.identity.digest(),),
                self._quantize,
            )
        )
        context = run(
            Stage(
                "extend-context",
                ws.context,
                sections_of(recipe, "context"),
                lambda: (fp8.digest,),
                self._extend,
            )
        )
        why = "" if native else f"{reason[0].upper()}{reason[1:]}."
        self.variants = Variants(recipe, ws, self.source, fp8.inputs["source"], why, self.say)
        prompts = _file_input("prompts", recipe.draft.prompts_file)
        draft = run(
            Stage(
                "draft",
                ws.draft,
                sections_of(recipe, "draft"),
                lambda: (context.digest, *prompts.values()),
                lambda digest: self._draft(digest, {"context": context.digest, **prompts}),
            )
        )
        measured = {"source": fp8.inputs["source"], "fp8": fp8.digest, "context": context.digest}
        measured |= {"draft": draft.digest, **_file_input("items", recipe.validate_.items_file)}
        measured |= rubric_inputs(recipe)
        for at, file in enumerate(recipe.validate_.draft_evaluations):
            measured |= _file_input(f"draft-evaluation-{at}", file)
        evidence = run(
            Stage(
                "validate",
                ws.evidence,
                # A report of another schema is written anew, from the answers that were kept.
                {**sections_of(recipe, "name", "validate", "gates"), "report_schema": SCHEMA_VERSION},
                lambda: tuple(measured.values()),
                lambda digest: self._validate(digest, measured),
            )
        )
        _require_gates(evidence, ws)
        bundle = run(
            Stage(
                "bundle",
                ws.bundle,
                recipe.model_dump(mode="json", by_alias=True),  # the card and the lock show all of it
                lambda: (fp8.digest, context.digest, draft.digest, evidence.digest, self._signer()),
                self._bundle,
                beside=TOLERATED,
                finished=lambda: (ws.bundle / SIGNATURE_NAME).is_file(),
            )
        )
        self._rehearse(bundle)
        question = first_question(recipe)
        with self.variants.downloaded(ws.published) as served:
            answer = ask_downloaded(served, question, ws, recipe.validate_.max_output_tokens)
        return Outcome(recipe, ws, self.pipeline.results, answer, self.variants.weights_served, why)

    def _quantize(self, digest: str) -> Manifest:
        from packager.quantize import quantize

        manifest = quantize(
            self.source,
            self.workspace.fp8,
            self.recipe.quantize,
            recipe_digest=digest,
            progress=lambda line: self.say(f"  {line}"),
            executor=self.executor,
            ray_address=self.ray_address,
        )
        self.identity.remember(manifest.inputs["source"])
        return manifest

    def _extend(self, digest: str) -> Manifest:
        from packager.context import extend

        return extend(self.workspace.fp8, self.workspace.context, self.recipe.context, recipe_digest=digest)

    def _draft(self, digest: str, inputs: dict[str, str]) -> Manifest:
        """Train on the states of the extended target, not on the trained length's with a patch at export.

        Measured on the nano (benchmarks/draft_context.py; one seed, K = 3, vLLM's counters). Acceptance
        length served with YaRN: this way 2.72 on short questions (standard error about 0.03) and 2.35, 2.34,
        2.32 on records of 1x, 2x, 4x the trained length (0.05); the other way 2.57 and 2.34, 2.32, 2.26.
        With Muon and 1600 prompts (`draft compare`): 3.15 against 2.99 at K = 3 (standard error of the
        difference 0.05), 4.01 against 3.66 at K = 5 (0.10). Each draft is best with the embedding it was
        trained with: served as trained (`--context native`) on short questions the AdamW one gives 2.54, the
        other 2.74. A release is measured and served extended.
        """
        from packager.draft.stage import build

        return build(
            self.variants.servable(self.workspace.context),
            self.workspace.draft,
            self.recipe.draft,
            draft_prompts(self.recipe),
            recipe_digest=digest,
            inputs=inputs,
            workdir=self.workspace.work / "draft",
            engine={"tensor_parallel_size": self.variants.tensor_parallel},
            progress=lambda line: self.say(f"  {line}"),
        )

    def _validate(self, digest: str, inputs: dict[str, str]) -> Manifest:
        done = [*self.pipeline.results]
        return collect_evidence(self.recipe, self.workspace, self.variants, done, inputs, digest, self.say)

    def _signer(self) -> str:
        """Digest of the signing key, as the bundle's manifest names it."""
        from packager.bundle.signature import generate_keys, private_fingerprint

        if not self.key.is_file() and self.key == self.workspace.signing_key:
            generate_keys(self.key, passphrase=os.environ.get(PASSPHRASE_VARIABLE))
            self.say(f"  made a signing key, {self.key}; name your own with --signing-key")
        fingerprint = private_fingerprint(self.key, passphrase=os.environ.get(PASSPHRASE_VARIABLE))
        return f"sha256:{fingerprint}"

    def _bundle(self, digest: str) -> Manifest:
        from packager.bundle.assemble import assemble

        self._signer()
        ws = self.workspace
        return assemble(
            ws.bundle,
            recipe=self.recipe,
            recipe_digest=digest,
            fp8=ws.fp8,
            context=ws.context,
            draft=ws.draft,
            evidence=ws.evidence,
            source=self.source,
            signing_key=self.key,
            passphrase=os.environ.get(PASSPHRASE_VARIABLE),
            progress=lambda line: self.say(f"  {line}"),
        )

    def _rehearse(self, bundle: Manifest) -> None:
        """Publish to a loopback hub, download again, verify; `published/` is the download.

        What came back carries the bundle's own manifest, so the stage's record is kept in `work/`: a download
        that was cut off must not look finished.
        """
        from packager.bundle.contents import TOLERATED
        from packager.publish.rehearsal import rehearse

        ws, target = self.workspace, self.recipe.publish
        record = ws.read_json("published.json")
        skipped = record.get("bundle") == bundle.digest and ws.sealed(ws.published, TOLERATED) == bundle
        if not skipped:
            (ws.work / "published.json").unlink(missing_ok=True)
            with self.pipeline.timed("publish"):
                done = rehearse(
                    ws.bundle,
                    rehearsal_repo(target.target),
                    ws.work / "hub",
                    ws.published,
                    lambda line: self.say(f"  {line}"),
                    tag=target.tag,
                    private=target.private,
                    public_key=self.key.with_suffix(".pub"),
                )
            ws.remember_sealed(ws.published)
            record = {
                "bundle": bundle.digest,
                "repo_id": done.repo_id,
                "revision": done.revision,
                "tag": done.tag,
                "files": done.files,
                "bytes": done.bytes,
                "requests": done.requests,
            }
            ws.write_json("published.json", record)
        self.pipeline.add("publish", ws.published, bundle, skipped, record)


def rehearsal_repo(target: str) -> str:
    """The repository on the loopback hub: that of an `hf://org/name` target, else one of the same name."""
    scheme, _, rest = target.partition("://")
    if scheme == "hf" and rest.count("/") == 1:
        return rest
    return f"rehearsal/{Path(target.rpartition(':')[2]).name}"


def draft_prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """The prompts that the draft learns from: the recipe's file, or the nano's own language.

    Raises:
        BadInput: no file is named and the source is not the nano; the file is missing or malformed.
    """
    spec = recipe.draft
    if spec.prompts_file is not None:
        from packager.draft.prompts import read_prompts_file

        return read_prompts_file(Path(spec.prompts_file))
    if not recipe.source.packaged:
        raise BadInput(
            "the recipe names no prompts for the draft", "Give draft.prompts_file: JSONL of chats."
        )
    from packager.nano import language

    return language.prompts(spec.prompts, spec.seed)


def _file_input(name: str, path: str | None) -> dict[str, str]:
    """A data file of the recipe as an input: its name and digest; empty if the recipe names none.

    Raises:
        BadInput: it is not there.
    """
    if path is None:
        return {}
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"the recipe's {name} file {path} is not there", "Correct its path in the recipe.")
    return {name: f"sha256:{file_sha256(file)}"}


def _require_gates(evidence: Manifest, workspace: Workspace) -> None:
    """Raise GateFailed unless every bound of the recipe was measured and met."""
    wrong = [
        f"  {gate['name']}: {gate['outcome']}"
        + (f" ({gate['measured']:.4g}, bound {gate['bound']:g})" if gate["measured"] is not None else "")
        for gate in evidence.metrics["gates"]
        if gate["outcome"] in ("fail", "not measured")
    ]
    if wrong or evidence.metrics["outcome"] != "pass":
        raise GateFailed(
            "the gates are not passed, so nothing was bundled:\n" + "\n".join(wrong or ["  no bound is set"]),
            f"Read {workspace.evidence / 'report.html'}; mend the cause, or change the bounds openly.",
        )
