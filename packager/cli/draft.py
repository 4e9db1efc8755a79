"""`packager draft`: an EAGLE3 head for a checkpoint, in steps that a release runs as one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from pydantic import ValidationError

from packager.cli import options
from packager.cli.draft_breakeven import breakeven_command
from packager.cli.draft_compare import compare_command
from packager.cli.draft_evaluate import evaluate_command
from packager.cli.output import progress, training_bar
from packager.errors import BadInput, UsageProblem
from packager.recipe import DraftLoss, DraftSpec, StatesDtype, StatesMode, load_recipe

if TYPE_CHECKING:
    from packager.draft.prepare import DraftData

_SPEC_FILE = "spec.json"
_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _finish(as_json: bool, document: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(document, ensure_ascii=False) if as_json else text)


def _load_spec(workdir: Path) -> DraftSpec:
    path = workdir / _SPEC_FILE
    if not path.exists():
        raise BadInput(f"{workdir} was not prepared", "Run `packager draft prepare TARGET WORKDIR` first.")
    return DraftSpec.model_validate_json(path.read_text(encoding="utf-8"))


def _save_spec(workdir: Path, spec: DraftSpec) -> None:
    part = workdir / f"{_SPEC_FILE}.partial"
    part.write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    part.replace(workdir / _SPEC_FILE)  # at once: the other processes of a torchrun read it


def _spec(settings: dict[str, Any]) -> DraftSpec:
    try:
        return DraftSpec(**settings)
    except ValidationError as err:
        raise UsageProblem("; ".join(str(error["msg"]) for error in err.errors())) from None


def _prepared(target: Path, workdir: Path) -> DraftData:
    from packager.draft.prepare import target_digest
    from packager.draft.workdir import prepared

    if not (workdir / "complete").exists():
        raise BadInput(f"{workdir} holds no complete responses", "Run `packager draft prepare` to the end.")
    return prepared(workdir, target_digest(target))


def _prompts(source: Path | None, count: int) -> list[dict[str, Any]]:
    if source is None:
        from packager.nano import language

        return language.prompts(count)
    from packager.draft.prompts import read_prompts_file

    return read_prompts_file(source)


@click.group(name="draft")
def command() -> None:
    """Prepare, train, evaluate and export an EAGLE3 head for a BailingMoeV2 checkpoint."""


@command.command("prepare")
@click.argument("target", type=_DIRECTORY)
@click.argument("workdir", type=_DIRECTORY)
@click.option("--recipe", type=_FILE, help="Take the draft section of a release recipe; options override it.")
@click.option(
    "--prompts",
    "source",
    type=_FILE,
    help="Chats, JSONL or a JSON array (messages, ShareGPT's conversations, or prompt); without it the "
    "nano's own language.",
)
@click.option("--count", type=click.IntRange(min=1), help="How many prompts get a response.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Draft vocabulary.")
@click.option("--aux-layers", metavar="J,J,J", help="Layers whose inputs feed the draft.")
@click.option("--max-response-tokens", type=click.IntRange(min=2))
@click.option("--temperature", type=click.FloatRange(min=0), help="Of the responses; 0, the default: greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1))
@click.option("--response-seed", type=int, help="Of sampled responses.")
@click.option("--states-dtype", type=click.Choice(get_args(StatesDtype)), help="How states are stored.")
@click.option(
    "--max-states-bytes",
    type=click.IntRange(min=1),
    help="Disk for hidden states; capturing stops before it is exceeded. On-line: size of the spool.",
)
@click.option(
    "--states",
    type=click.Choice(get_args(StatesMode)),
    help="online: responses alone; `draft train` has their states captured as it goes.",
)
@options.as_json
def prepare_command(
    target: Path,
    workdir: Path,
    recipe: Path | None,
    source: Path | None,
    count: int | None,
    aux_layers: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate responses with TARGET served by vLLM and keep its hidden states in WORKDIR.

    Interrupted, the same command goes on where it was. That the states are those of the layers named is
    proved by TARGET's own forward, layer by layer.
    """
    from packager.draft.layer_proof import describe
    from packager.draft.prepare import prepare
    from packager.draft.stage import coverages, response_vocabulary

    given: dict[str, Any] = load_recipe(recipe).draft.model_dump() if recipe else {}
    if aux_layers is not None:
        try:
            given["aux_layers"] = tuple(int(part) for part in aux_layers.split(","))
        except ValueError:
            raise UsageProblem(
                f"--aux-layers {aux_layers!r} is not a list of numbers such as 1,2,3"
            ) from None
    settings["prompts"] = count
    given |= {key: value for key, value in settings.items() if value is not None}
    if source is None and given.get("prompts_file"):
        source = Path(given["prompts_file"])
    given.setdefault("prompts", 600)
    given.setdefault("steps", 400)
    if missing := [key for key in ("vocab_size", "aux_layers") if key not in given]:
        raise UsageProblem(
            f"--{missing[0].replace('_', '-')} is missing", "Give it, or a recipe that has it with --recipe."
        )
    spec = _spec(given)
    data = prepare(target, spec, _prompts(source, spec.prompts), workdir, progress)
    _save_spec(workdir, spec)
    records = data.records()
    from packager.checkpoint.source import Checkpoint

    vocabulary = response_vocabulary(data, spec, Checkpoint.open(target).config()["vocab_size"])
    covered = coverages(records, vocabulary)
    document = {
        "responses": len(records),
        "distinct_responses": len({tuple(record["response_ids"]) for record in records}),
        "response_tokens": sum(len(record["response_ids"]) for record in records),
        "states_bytes": data.states_bytes(),
        "layer_proof": data.layer_proof,
        "draft_vocabulary": spec.vocab_size,
        **covered,
    }
    lines = [
        f"{document['responses']} responses ({document['distinct_responses']} distinct), "
        f"{document['response_tokens']} tokens in {workdir}",
        *(
            ["hidden states are captured while training, and their layers proved then"]
            if spec.states == "online"
            else describe(data.layer_proof)
        ),
        f"{spec.vocab_size} draft tokens, chosen on the training side; a token that they do not cover is "
        "always rejected. They cover of the responses",
    ]
    for side, kinds in (("training", covered["coverage"]), ("held out", covered["held_out_coverage"])):
        for kind, name in (("language", "language"), ("task", "domain")):
            lines += [f"  {side}, {name} {value}: {share:.2%}" for value, share in kinds[kind].items()]
    _finish(as_json, document, "\n".join(lines))


@command.command("train")
@click.argument("target", type=_DIRECTORY)
@click.argument("workdir", type=_DIRECTORY)
@click.option("--steps", type=click.IntRange(min=1))
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Padded tokens a step.")
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), help="What moves the head's matrices.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True))
@click.option("--ttt-steps", type=click.IntRange(min=1), help="Steps of training-time test.")
@click.option("--intermediate-size", type=click.IntRange(min=1))
@click.option("--loss", type=click.Choice(get_args(DraftLoss)))
@click.option("--accumulate", type=click.IntRange(min=1), help="Batches whose gradients make one step.")
@click.option("--sliding-window", type=click.IntRange(min=16), help="Tokens the draft attends to.")
@click.option(
    "--evaluate-every", type=click.IntRange(min=1), help="Measure held-out acceptance; keep the best weights."
)
@click.option("--patience", type=click.IntRange(min=1), help="Stop after so many measurements without gain.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps that a kill can lose.")
@click.option(
    "--states",
    type=click.Choice(get_args(StatesMode)),
    help="online: TARGET is served beside the training and hidden states pass through a spool.",
)
@click.option("--max-states-bytes", type=click.IntRange(min=1), help="Size of that spool, on disk.")
@click.option(
    "--capture-devices",
    metavar="N,N",
    help="GPUs of the engine that captures on-line; the training uses others.",
)
@click.option("--seed", type=int)
@options.as_json
def train_command(
    target: Path, workdir: Path, capture_devices: str | None, as_json: bool, **settings: Any
) -> None:
    """Train a head on what `prepare` left in WORKDIR. Interrupted, the same command goes on where it was.

    With --states online nothing but responses need be there: TARGET is served by vLLM beside the training,
    and the hidden states of each step are captured ahead of it, within --max-states-bytes.

    On several devices: torchrun --nproc-per-node N -m packager draft train TARGET WORKDIR. The loss and
    acceptance of every step go into WORKDIR/training.jsonl.
    """
    from packager.draft.ranks import leads
    from packager.draft.stage import train

    given = {key: value for key, value in settings.items() if value is not None}
    spec = _spec(_load_spec(workdir).model_dump() | given)
    data = _prepared(target, workdir)
    if leads():
        _save_spec(workdir, spec)
    with training_bar(spec.steps, live=leads()) as (say, on_step):
        trained = train(target, spec, data, say, on_step=on_step, devices=capture_devices)
    if leads():
        predicted = trained.metrics["predicted_acceptance"]
        _finish(
            as_json,
            trained.metrics,
            f"predicted acceptance length on held-out prompts: {predicted['length'] or 'not measured'}",
        )
    if trained.trainer.ranks.size > 1:
        # All is written. Seen with gloo in torch 2.13: the interpreter's own end, which destroys the sharded
        # head, aborts now and then ("terminate called without an active exception"), and torchrun fails.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@command.command("export")
@click.argument("target", type=_DIRECTORY)
@click.argument("workdir", type=_DIRECTORY)
@click.argument("out", type=_DIRECTORY)
@click.option(
    "--format",
    "form",
    type=click.Choice(("engines", "speculators")),
    default="engines",
    show_default=True,
    help="engines: one checkpoint for vLLM and SGLang. speculators: for `vllm serve OUT`.",
)
@click.option(
    "--verifier",
    help="Hub name or folder of the target that a speculators export names.  [default: TARGET as given]",
)
@options.as_json
def export_command(
    target: Path, workdir: Path, out: Path, form: str, verifier: str | None, as_json: bool
) -> None:
    """Write the trained head of WORKDIR to OUT as one checkpoint for vLLM and SGLang."""
    from packager.draft.prepare import target_digest
    from packager.draft.stage import TRAINING_STATE, export, train

    if not (workdir / TRAINING_STATE).exists():
        raise BadInput(f"{workdir} holds no trained head", "Run `packager draft train` first.")
    spec = _load_spec(workdir)
    trained = train(
        target, spec, _prepared(target, workdir), progress
    )  # reads the checkpoint, finishes the rest
    manifest = export(
        out,
        trained,
        target,
        recipe_digest=spec.digest,
        inputs={"target": target_digest(target)},
        verifier=(verifier or str(target)) if form == "speculators" else None,
    )
    _finish(
        as_json,
        {"draft": str(out), "digest": manifest.digest, **manifest.metrics},
        f"{out}  {manifest.digest}",
    )


command.add_command(evaluate_command)
command.add_command(compare_command)
command.add_command(breakeven_command)
