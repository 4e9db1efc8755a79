"""`packager validate schema` and `ruler-plan`: what needs no server."""

from __future__ import annotations

import json

import click

from packager.cli import options


@click.command()
@options.as_json
def schema(as_json: bool) -> None:
    """Print the JSON Schema of report.json, as this release writes it; with --json on one line."""
    from validation.report.schema import schema_text

    click.echo(json.dumps(json.loads(schema_text())) + "\n" if as_json else schema_text(), nl=False)


@click.command("ruler-plan")
@click.option(
    "--lengths",
    default="32768,65536,131072",
    show_default=True,
    callback=options.numbers,
    help="Tokens of prompt and answer, by commas.",
)
@click.option(
    "--samples", type=click.IntRange(1, 500), default=50, show_default=True, help="A task and length."
)
@click.option(
    "--prefill-tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    required=True,
    help="Prompt tokens the whole server reads a second, best at the longest length.",
)
@click.option(
    "--decode-tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    default=200.0,
    show_default=True,
    help="Tokens the whole server writes a second.",
)
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="That the server holds."
)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--model", default="model", show_default=True)
@click.option(
    "--tokenizer", default="TOKENIZER", help="Local folder; lm-eval allows it remote code, so read it."
)
@options.as_json
def ruler_plan(
    lengths: list[int],
    samples: int,
    prefill_tokens_per_s: float,
    decode_tokens_per_s: float,
    gpus: int,
    url: str,
    model: str,
    tokenizer: str,
    as_json: bool,
) -> None:
    """What RULER through lm-eval would cost at these lengths, and its commands; runs nothing."""
    import shlex

    from validation.budget import ruler_budget, ruler_commands

    plan = ruler_budget(
        lengths,
        samples,
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        gpus=gpus,
    )
    commands = ruler_commands(lengths, samples, url=url, model=model, tokenizer=tokenizer)
    if as_json:
        document = {
            "plan": plan.model_dump(mode="json"),
            "requests": plan.requests,
            "prompt_tokens": plan.prompt_tokens,
            "gpu_hours": plan.gpu_hours,
            "commands": commands,
        }
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    for one in plan.lengths:
        click.echo(f"{one.length:>8} tokens: {one.requests:,} requests, {one.hours * gpus:.2g} GPU-hours")
    click.echo(plan.sentence)
    click.echo("one run a length, since --limit takes the first samples of all lengths together:")
    for command in commands:
        click.echo("  " + shlex.join(command))
