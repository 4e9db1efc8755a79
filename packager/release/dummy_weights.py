"""A shape served before there are weights: folders of configs alone, for an engine's `--load-format dummy`.

The engine fills the tensors with random numbers. Speed depends on shapes, precision and lengths, not on what
the numbers mean; three things that do depend on them are set right here:

- Routing. With dummy weights the router's scores are all but equal and its bias decides: every token goes to
  the same experts, and a step reads a fraction of what a trained model's would. vLLM is told to route at
  random, uniformly (`VLLM_MOE_ROUTING_SIMULATION_STRATEGY`), as the roofline bound assumes.
- Drafts. Nothing an untrained draft guesses is ever accepted: acceptance is synthetic, and given beforehand.
- Tokens. Answers are of any id of the vocabulary. The folder's tokenizer reads real prompts with the nano's
  byte-level vocabulary and knows a name for each of the other ids. It needs more tokens a word than the
  model's own: lengths in tokens are exact, characters a token are not those of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from packager.bailing.vllm_plugin import ROUTING, UNIFORM_ON_CPU
from packager.checkpoint.source import CONFIG_NAME, read_json_object
from packager.draft.config import TOKEN_IDS, draft_config
from packager.errors import BadInput, UsageProblem
from packager.layouts import Described
from packager.nano import CHECKPOINT
from packager.quantize.dialects import Quantization, quantization_config
from packager.recipe import DraftSpec
from packager.serving.cpu import device, fp8_runs_here
from packager.serving.engine import ServeSpec
from packager.serving.plan import shape_file

if TYPE_CHECKING:
    from validation.sweep import ServedVariant
    from validation.sweep_model import Role

Scheme = Literal["bf16", "fp8-block"]
SCHEMES = get_args(Scheme)
DRAFT_VOCAB = 32000
"""Draft vocabulary of the line's own drafts; a smaller model's own vocabulary if that is less."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class DummyShape:
    """One shape, written and ready to be served."""

    name: str
    """For tables: shape, precision, acceptance."""
    simulated: tuple[str, ...]
    """What is not as in service, beside dummy weights and synthetic acceptance: `4 of 32 layers`, routing."""
    notes: tuple[str, ...]
    """What else a reader must know, in sentences."""
    subject: str
    """`dummy:` and a digest of the configs: never that of a checkpoint."""
    scheme: Scheme
    """Served so; may be `bf16` where `fp8-block` was asked for and does not run."""
    tokenizer: Path
    spec: ServeSpec


@dataclass(frozen=True)
class _Source:
    name: str
    config: dict[str, Any]
    tokenizer: Path | None


def dummy_shape(
    shape: str,
    out: Path,
    *,
    scheme: Scheme = "fp8-block",
    layers: int | None = None,
    draft_vocab: int | None = None,
    synthetic_acceptance: float | None = None,
    draft_tokens: int = 3,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
) -> DummyShape:
    """Write the folder of a shape, and of a draft for it; nothing is downloaded.

    Args:
        shape: a published architecture's name (`packager plan --shape`), a config.json, or a folder with one;
            a tokenizer.json beside it is used.
        out: folder in which `model` and `draft` are written; what is there already is replaced.
        scheme: `fp8-block` gives way to BF16 where this machine's engine has no kernel for it.
        layers: serve the first so many alone; None: all.
        draft_vocab: tokens of the draft's vocabulary.
        synthetic_acceptance: tokens a step of the target yields, from 1 to `draft_tokens` + 1; None: no
            draft.

    Raises:
        UsageProblem: an unknown shape, or numbers that cannot be.
        BadInput: a config that is not understood, or that the tokenizer does not fit.
    """
    source = _source(shape)
    config = dict(source.config)
    whole = config["num_hidden_layers"]
    simulated, notes = [], []
    if layers is not None and layers != whole:
        config = _with_layers(config, layers, source.name)
        simulated.append(f"{layers} of {whole} layers")
    runs, reason = fp8_runs_here()
    if scheme == "fp8-block" and not runs:
        notes.append(f"Served in BF16: {reason}.")
        scheme = "bf16"
    config = {**config, "torch_dtype": "bfloat16"}
    described = Described.parse(config, source.name)
    if described.quantization_config:
        raise BadInput(f"{source.name} is quantized already", "Give the config of the BF16 checkpoint.")
    if scheme == "fp8-block":
        stated = Quantization("compressed-tensors", ())
        tensors = [want for want in described.model.tensors() if not want.optional]
        quantized = {want.name for want in tensors if stated.quantizes(want)}
        config["quantization_config"] = quantization_config(stated, tensors, quantized)
    env = {}
    if described.model.experts:
        simulated.append("uniform random routing")
        env[ROUTING] = UNIFORM_ON_CPU if device() == "cpu" else "uniform_random"
    model = out / "model"
    if source.tokenizer is None:
        config |= _write_nano_tokenizer(model, described.vocab_size, described.max_position_embeddings)
        notes.append(
            "Prompts are real text in the nano's byte-level tokens: lengths in tokens are exact, tokens a "
            "word are not the model's."
        )
    else:
        _write_own_tokenizer(model, source.tokenizer)
    ids = {key: config[key] for key in TOKEN_IDS if key in config}
    _write_json(model / CONFIG_NAME, config)
    _write_json(model / "generation_config.json", ids)
    spec = ServeSpec(
        model, dummy_weights=True, tensor_parallel=tensor_parallel, max_model_len=max_model_len, env=env
    )
    parts = [config]
    if synthetic_acceptance is not None:
        if not 1 <= synthetic_acceptance <= draft_tokens + 1:
            raise UsageProblem(
                f"{draft_tokens} draft tokens cannot yield {synthetic_acceptance:g} tokens a step",
                f"Give a synthetic acceptance from 1 to {draft_tokens + 1}.",
            )
        head = draft_config(config, _draft_spec(described, draft_vocab))
        _write_json(out / "draft" / CONFIG_NAME, head)
        parts.append({**head, "num_speculative_tokens": draft_tokens, "acceptance": synthetic_acceptance})
        spec = replace(
            spec,
            draft=out / "draft",
            num_speculative_tokens=draft_tokens,
            synthetic_acceptance_length=synthetic_acceptance,
        )
    name = f"{source.name} {scheme}"
    digest = hashlib.sha256(json.dumps([*parts, env], sort_keys=True).encode()).hexdigest()
    return DummyShape(
        name=name if synthetic_acceptance is None else f"{name} acceptance {synthetic_acceptance:g}",
        simulated=tuple(simulated),
        notes=tuple(notes),
        subject=f"dummy:sha256:{digest}",
        scheme=scheme,
        tokenizer=model,
        spec=spec,
    )


def dummy_variants(
    shape: str,
    out: Path,
    *,
    baseline: bool = False,
    synthetic_acceptance: Sequence[float] = (),
    draft_tokens: int | None = None,
    logs: Path,
    **settings: Any,
) -> list[ServedVariant]:
    """A shape as variants of a sweep: with a draft at each synthetic acceptance, then without one.

    Args:
        baseline: measured against, instead of measured.
        draft_tokens: None: 3, or as many as the largest acceptance needs.
        logs: folder of the servers' logs.
        settings: as for `dummy_shape`.

    Raises:
        UsageProblem, BadInput: as `dummy_shape`.
    """
    from packager.release.sweep_variants import own_variant

    lengths = list(dict.fromkeys(synthetic_acceptance))
    tokens = draft_tokens or max([3, *(ceil(length) - 1 for length in lengths)])
    found = []
    for length in (*lengths, None):
        made = dummy_shape(shape, out, synthetic_acceptance=length, draft_tokens=tokens, **settings)
        role: Role = "baseline" if baseline else "candidate"
        if lengths and length is None and not baseline:
            role = "candidate without draft"
        served = own_variant(
            made.name,
            role,
            made.spec,
            subject=made.subject,
            tokenizer=made.tokenizer,
            log=logs / f"serve-{made.name.replace(' ', '-')}.log",
            weights="dummy",
        )
        told = {"simulated": made.simulated, "notes": made.notes}
        found.append(replace(served, variant=served.variant.model_copy(update=told)))
    return found


def aux_layers(layers: int) -> tuple[int, int, int]:
    """Layers whose inputs feed a draft: as engines choose them, (2, n/2, n-3), or the first three of few.

    Raises:
        UsageProblem: fewer than three layers.
    """
    if layers < 3:
        raise UsageProblem(
            f"an EAGLE3 draft reads three layers, the shape has {layers}", "Keep three layers or more."
        )
    usual = (2, layers // 2, layers - 3)
    return usual if usual[0] < usual[1] < usual[2] else (1, 2, 3)


def _draft_spec(target: Described, vocab: int | None) -> DraftSpec:
    """The usual draft: one Llama layer as wide as the target's dense one, as `packager plan` counts it."""
    return DraftSpec(
        vocab_size=min(vocab or DRAFT_VOCAB, target.vocab_size),
        aux_layers=aux_layers(target.model.layers),
        intermediate_size=int(target.model.value("intermediate_size")),
        prompts=1,
        steps=1,
    )


def _source(shape: str) -> _Source:
    path = Path(shape)
    if path.is_dir():
        path = path / CONFIG_NAME
    if path.suffix == ".json" or path.exists():
        folder = path.parent.resolve()
        tokenizer = folder if (folder / "tokenizer.json").is_file() else None
        name = folder.name if path.name == CONFIG_NAME else path.stem
        return _Source(name, read_json_object(path), tokenizer)
    return _Source(shape, shape_file(shape), None)


def _with_layers(config: dict[str, Any], layers: int, name: str) -> dict[str, Any]:
    """The config of the first `layers` layers; lists with an entry a layer are cut, too."""
    whole = config["num_hidden_layers"]
    if not 0 < layers <= whole:
        raise UsageProblem(f"{name} has {whole} layers, not {layers}", "Ask for as many or fewer.")
    cut = {**config, "num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        cut["layer_types"] = config["layer_types"][:layers]
    if isinstance(config.get("mlp_only_layers"), list):
        cut["mlp_only_layers"] = [index for index in config["mlp_only_layers"] if index < layers]
    if isinstance(config.get("first_k_dense_replace"), int):
        cut["first_k_dense_replace"] = min(layers, config["first_k_dense_replace"])
    return cut


def _write_nano_tokenizer(model: Path, vocabulary: int, length: int) -> dict[str, int]:
    """The nano's tokenizer with a name for every id below `vocabulary`; its special ids, for config.json.

    Raises:
        BadInput: the shape's vocabulary is smaller than the nano's.
    """
    tokenizer = read_json_object(CHECKPOINT / "tokenizer.json")
    known = tokenizer["model"]["vocab"]
    if vocabulary < len(known):
        raise BadInput(
            f"the shape's vocabulary of {vocabulary} is smaller than the nano tokenizer's {len(known)}",
            "Put a tokenizer.json beside its config.json.",
        )
    # No merge leads to them: no prompt has them, and answers of any id have a text.
    known |= {f"<{index}>": index for index in range(len(known), vocabulary)}
    settings = {**read_json_object(CHECKPOINT / "tokenizer_config.json"), "model_max_length": length}
    _write_json(model / "tokenizer.json", tokenizer, indent=None)
    _write_json(model / "tokenizer_config.json", settings)
    _replace(model / "chat_template.jinja", (CHECKPOINT / "chat_template.jinja").read_bytes())
    nano = read_json_object(CHECKPOINT / CONFIG_NAME)
    return {key: nano[key] for key in TOKEN_IDS}


def _write_own_tokenizer(model: Path, folder: Path) -> None:
    for name in _TOKENIZER:
        if (folder / name).is_file():
            _replace(model / name, (folder / name).read_bytes())


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    _replace(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
