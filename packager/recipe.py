"""The release recipe: one YAML file that describes a release, read into frozen models with a stable digest.

A recipe is data: it names schemes, lengths and bounds, never Python paths. Unknown keys are errors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packager.errors import BadInput


class Spec(BaseModel):
    """Base of all recipe sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the section's canonical JSON; equal settings give equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class SourceSpec(Spec):
    """Where the BF16 checkpoint comes from: a directory, or a hub repository at a pinned revision."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    """The commit to release; a real run refuses a repository without one."""
    shape: str | None = None
    """config.json of the architecture, beside the recipe: a dry run computes from it what is not here yet."""

    @property
    def packaged(self) -> bool:
        """Whether it is a checkpoint that this package brings (`package:nano`)."""
        return self.path is not None and self.path.startswith("package:")

    @model_validator(mode="after")
    def _one_source(self) -> SourceSpec:
        if (self.path is None) == (self.repo is None):
            raise ValueError("source needs exactly one of `path` and `repo`")
        return self


class TensorRule(Spec):
    """What becomes of tensors that the architecture's declaration does not know, or decides otherwise."""

    tensors: str = Field(min_length=1)
    """Glob over whole tensor names (`model.layers.0.*`), or a regular expression after `re:`."""
    do: Literal["quantize", "keep", "drop"]

    @property
    def _pattern(self) -> re.Pattern[str]:
        expression = self.tensors.removeprefix("re:")
        return _compiled(expression if expression != self.tensors else fnmatch.translate(self.tensors))

    @model_validator(mode="after")
    def _compiles(self) -> TensorRule:
        try:
            _ = self._pattern
        except re.error as err:
            raise ValueError(f"{self.tensors!r} is no regular expression: {err}") from None
        return self

    def matches(self, name: str) -> bool:
        """Whether the whole of a tensor name matches."""
        return self._pattern.fullmatch(name) is not None


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


Dialect = Literal["compressed-tensors", "deepseek"]
"""How engines are told of a quantization: the names of scales, the fields of config.json."""
Prediction = Literal["drop", "keep", "quantize"]
"""What becomes of multi-token prediction layers."""
SchemeName = Literal["fp8-block", "fp8-channel", "int4-g128", "w8a8"]
ScaleRounding = Literal["float32", "power-of-two", "bfloat16"]
SCALE_ROUNDINGS: Mapping[SchemeName, tuple[ScaleRounding, ...]] = {
    "fp8-block": ("power-of-two", "float32"),
    "fp8-channel": ("float32", "power-of-two"),
    "int4-g128": ("bfloat16",),
    "w8a8": ("float32",),
}
"""What scales may be rounded to, by scheme; the first is the default.

fp8-block: DeepGEMM on Hopper re-quantizes to power-of-two scales; such ones survive it, FP32 ones lose 3 dB.
fp8-channel: engines multiply a row's FP32 scale onto the finished product, so no other number is better.
Integers have a fixed step: rounded up to a power of two it would be up to twice as wide, 3 dB lost on
average. INT4 scales are stored as BF16, and codes are chosen for the scale as stored.
"""


WEIGHTS: Mapping[SchemeName, str] = {
    "fp8-block": "FP8",
    "fp8-channel": "FP8",
    "int4-g128": "INT4",
    "w8a8": "INT8",
}
"""What reports call the weights of a scheme."""


class QuantizeSpec(Spec):
    """How weights are quantized."""

    scheme: SchemeName = "fp8-block"
    """fp8-block: FP8, a scale for each 128x128 weights. fp8-channel: FP8, a scale a row. int4-g128: INT4, a
    scale for each 128 columns of a row. w8a8: INT8, a scale a row."""
    dialect: Dialect = "compressed-tensors"
    """Only block FP8 has the second one."""
    scale_rounding: ScaleRounding = "power-of-two"
    """See `SCALE_ROUNDINGS`; where it is not given, it is the scheme's default."""
    shard_bytes: int = Field(default=5_000_000_000, gt=0)
    """Size of an output shard in bytes."""
    mtp: Prediction = "drop"
    """Multi-token prediction layers: left out, in BF16, or quantized as the others are. vLLM has no class for
    BailingMoeV2's; it has one for DeepSeek-V3's."""
    rules: tuple[TensorRule, ...] = ()
    """Decisions on single tensors; each must match some, and no tensor may match two."""

    @property
    def weights(self) -> str:
        """What reports call the quantized weights: FP8, INT8 or INT4."""
        return WEIGHTS[self.scheme]

    @model_validator(mode="before")
    @classmethod
    def _default_rounding(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "scale_rounding" in raw:
            return raw
        choices = SCALE_ROUNDINGS.get(raw.get("scheme", "fp8-block"))
        return {**raw, "scale_rounding": choices[0]} if choices else raw

    @model_validator(mode="after")
    def _agrees(self) -> QuantizeSpec:
        if self.dialect == "deepseek" and self.scheme != "fp8-block":
            raise ValueError(f"{self.scheme} has no deepseek dialect; only fp8-block does")
        choices = SCALE_ROUNDINGS[self.scheme]
        if self.scale_rounding not in choices:
            raise ValueError(
                f"scales of {self.scheme} are rounded to {' or '.join(choices)}, not {self.scale_rounding}"
            )
        return self


class ContextSpec(Spec):
    """How far the context is extended."""

    length: int = Field(gt=0)
    """Tokens served; must be a multiple of the checkpoint's trained length."""
    method: Literal["yarn"] = "yarn"


DraftLoss = Literal["soft", "hard", "kl", "reverse_kl", "js", "tv", "nla", "lk_hybrid"]
"""Losses of the draft's training; `packager.draft.loss` says what each is."""
StatesDtype = Literal["bfloat16", "float8"]
"""How hidden states are stored; float8: E4M3 with a scale for each token and layer, half the bytes. On the
nano (200 held-out questions) a draft trained on such states has an acceptance length of 3.22 at K = 3 and
4.15 at K = 5, one trained on BF16 of 3.23 and 4.19."""

StatesMode = Literal["offline", "online"]
"""Where hidden states lie: all on disk before training, or in a spool that an engine fills ahead of the
trainer. On-line needs disk for the held-out responses and the steps between two checkpoints, and computes the
states again in every epoch."""


class DraftSpec(Spec):
    """The EAGLE3 draft head and its training."""

    vocab_size: int = Field(gt=0)
    """Draft vocabulary: the most frequent target tokens in the responses."""
    aux_layers: tuple[int, ...]
    """Target layers whose *inputs* feed the draft (layer j's input is the output of layer j-1)."""
    num_speculative_tokens: int = Field(default=3, ge=1)
    intermediate_size: int | None = Field(default=None, gt=0)
    """Width of the draft layer's feed-forward; None: four times the hidden size."""
    prompts: int = Field(gt=0)
    """How many prompts get a response from the target."""
    prompts_file: str | None = None
    """Chat file (JSONL or a JSON array); None: the nano's own language."""
    max_response_tokens: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    """Of the responses; 0: greedy, and `top_p` and `response_seed` are of no account."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    response_seed: int = 0
    """Each response is sampled from a seed of its own, derived from this and the prompt's id. The same batch
    gives the same responses; in another, engines round differently, and texts may part."""
    states_dtype: StatesDtype = "bfloat16"
    max_states_bytes: int | None = Field(default=None, gt=0)
    """Disk that hidden states may take. Off-line capturing stops before it would be exceeded (None: what is
    free); on-line it is the size of the spool, and must be given."""
    states: StatesMode = "offline"
    steps: int = Field(gt=0)
    batch_tokens: int = Field(default=4096, gt=0)
    """Padded tokens a training step, prompts included."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the head's matrices, AdamW for the rest. On the nano (1600 prompts, 420 steps, 5 of
    training-time test) it came to an acceptance length of 3.22 at K = 3 and 4.16 at K = 5, predicted on
    held-out prompts; AdamW to 2.80 and 3.42. Data helps as much again: with 3200 prompts 3.42 and 4.56."""
    learning_rate: float = Field(default=1e-3, gt=0)
    ttt_steps: int = Field(default=3, ge=1)
    """Steps of training-time test: how often the draft is fed its own states while training."""
    loss: DraftLoss = "soft"
    accumulate: int = Field(default=1, ge=1)
    """Batches of `batch_tokens` whose gradients make one training step."""
    sliding_window: int | None = Field(default=None, ge=16)
    """Tokens that the draft attends to, its own included; None: all. vLLM reads it from the draft's config;
    SGLang does not, and needs `--speculative-draft-window-size`."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of acceptance on the held-out responses; the best weights are kept. None:
    the last weights are kept."""
    patience: int | None = Field(default=None, ge=1)
    """How many measurements in a row may be no better than the best before training stops; None: it never
    stops early."""
    checkpoint_every: int = Field(default=40, ge=1)
    """Training steps that a kill can lose."""
    seed: int = 0

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> DraftSpec:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience needs evaluate_every: nothing is measured while training")
        return self

    @model_validator(mode="after")
    def _online_needs_a_budget(self) -> DraftSpec:
        if self.states == "online" and self.max_states_bytes is None:
            raise ValueError("states: online needs max_states_bytes, the size of the spool")
        return self


class SpeculationRange(Spec):
    """How many draft tokens a step has up to a number of requests at once."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Up to and with this many requests in a step; None: any number."""
    num_speculative_tokens: int = Field(ge=0)
    """0: no draft tokens; the engine still keeps the draft's cache filled, so they can come back."""


def check_speculation(ranges: tuple[SpeculationRange, ...]) -> None:
    """Raise ValueError unless the ranges ascend and only the last is open."""
    ends = [one.max_concurrency for one in ranges]
    bounded = [end for end in ends if end is not None]
    if None in ends[:-1] or bounded != sorted(set(bounded)):
        raise ValueError("speculation: max_concurrency must ascend, and only the last may be left out")


class ServeSettings(Spec):
    """How the bundle is served, beside its context and draft."""

    speculation: tuple[SpeculationRange, ...] = ()
    """Draft tokens by batch, e.g. what `draft evaluate` proposes. Empty: by the release's own measurement,
    which stops speculation where it was slower; else draft.num_speculative_tokens always."""
    speculation_max_context: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer beyond which nothing is drafted; None: to the end of the context. vLLM 0.32
    decides it for a whole batch, by its longest request; it saves the draft's time, not verification's."""

    @model_validator(mode="after")
    def _ascending(self) -> ServeSettings:
        check_speculation(self.speculation)
        return self


class HealthBenchSpec(Spec):
    """Rubrics graded by a judge: HealthBench's own files, or others of their form."""

    rows: str
    """JSONL of rubrics, or the folder that HealthBench was downloaded to."""
    subset: Literal["main", "hard", "consensus"] = "main"
    rows_digest: str | None = None
    """`sha256:…` that the rows must have."""
    examples: int | None = Field(default=None, gt=1)
    """How many conversations are drawn; None: all."""
    judge_url: str
    """OpenAI-compatible server, without /v1."""
    judge_model: str
    judge_subject: str | None = None
    """What judgements are kept under; None: model and URL."""
    judge_key_env: str | None = None
    """Environment variable that holds the judge's key; the key itself is in no file."""
    meta: str | None = None
    """Meta-evaluation that the judge must pass before its scores count; None: they do not count."""
    min_balanced_f1: float = Field(default=0.7, ge=0, le=1)
    max_output_tokens: int = Field(default=2048, gt=0)


class BenchmarkSpec(Spec):
    """Public benchmarks that BF16 and the quantized weights answer, by the names lm-eval gives them."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks, groups or patterns, such as multimedqa, cmmlu_anatomy, careqa_en, gsm8k. Tasks that run code
    which the model wrote (humaneval) are refused in a release."""
    style: Literal["likelihood", "reasoning"] = "likelihood"
    """reasoning: multiple choices are asked in chat, thought through, and ended with `Answer: X`."""
    data: str | None = None
    """Folder with data sets as <organisation>/<name>, before the hub."""
    include: str | None = None
    """Folder with task definitions (YAML) of one's own."""
    limit: int | None = Field(default=None, gt=0)
    """First N items of each task."""
    fewshot: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, gt=0)
    margin_points: float | None = Field(default=None, gt=0)
    """Loss that the verdict counts as none; None: the margin of the gates."""
    digests: dict[str, str] = {}
    """Task to `sha256:…` of its items, as a run records them; other data is refused."""


class FidelityBounds(Spec):
    """Where fidelity's alarms go off. How far a sound step is depends on how certain a model's answers are:
    name bounds by measurements of sound ones, as recipes/nano.yaml does."""

    max_mean_kl_nats: float = Field(default=0.02, gt=0)
    """KL divergence from the model before the step, nats a token."""
    max_p99_kl_nats: float = Field(default=0.5, gt=0)
    min_top1_agreement: float = Field(default=0.97, ge=0, le=1)
    max_perplexity_ratio: float = Field(default=1.02, gt=0)
    min_experts_shared: float = Field(default=0.85, ge=0, le=1)
    """Jaccard index of the experts that a token is sent to, mean over tokens and layers."""


class FidelitySpec(Spec):
    """How the variants' token distributions are compared, each with the one before it."""

    texts: int = Field(default=60, ge=0)
    """Answers of the original that every variant scores; 0: fidelity is not measured."""
    routing_texts: int = Field(default=16, ge=0)
    """Of these, how many are sent through both checkpoints to see which experts they use."""
    quantize: FidelityBounds = FidelityBounds()
    context: FidelityBounds = FidelityBounds(
        max_mean_kl_nats=0.2, max_p99_kl_nats=4.0, min_top1_agreement=0.95, max_perplexity_ratio=1.2
    )
    """Static YaRN changes attention at every length: on the nano (three sets of 60 answers within the trained
    length) it cost 0.048 to 0.062 nats, 0.4 to 1.3 at the 99th percentile, 5 to 7 % of perplexity; these are
    three times that."""


class ValidateSpec(Spec):
    """What is measured, on how many items."""

    items_per_task: int = Field(default=40, gt=0)
    tasks: tuple[str, ...] | None = None
    """The items' tasks that are measured; None: all."""
    items_file: str | None = None
    """JSONL of items; None: the nano's held-out set."""
    long_items: int = Field(default=30, ge=0)
    """Long-record items per multiple (1x, 2x, 4x) of the trained length. Where `items_file` has none, records
    with needles are made by the model's own tokenizer, over five depths."""
    identity_prompts: int = Field(default=100, ge=0)
    """Prompts on which greedy output with and without the draft is compared."""
    concurrency: tuple[int, ...] = (1, 8)
    max_output_tokens: int = Field(default=128, gt=0)
    """Longest answer to an item."""
    dense_baseline: str | None = None
    """Folder of the dense checkpoint whose speed is compared; None: the nano's sibling, or not measured."""
    benchmarks: tuple[BenchmarkSpec, ...] = ()
    """Each entry is judged by the gates on accuracy, apart from the items."""
    draft_tokens: tuple[int, ...] = ()
    """Draft lengths K at which the release measures its draft, by concurrency, task, language and context, as
    `draft evaluate` does; the fastest at each concurrency goes into the serve settings. Empty: only
    draft.num_speculative_tokens, and less of it."""
    draft_evaluations: tuple[str, ...] = ()
    """Files of `draft evaluate --out` that the report shows. Each must have been measured on this release's
    target, one at least with its draft; those of other drafts are compared with it."""
    throughput_prompts: int = Field(default=24, gt=0)
    throughput_output_tokens: int = Field(default=96, gt=0)
    noise_floor: bool = True
    """Ask BF16 a second time, in another order and concurrency: what flips without any change."""
    whole_matrix: bool = True
    """Also serve the quantized weights with the draft and without YaRN, so that each step's cost is told
    apart; one server more."""
    fidelity: FidelitySpec = FidelitySpec()
    healthbench: HealthBenchSpec | None = None
    """None: the nano's own rubrics and judge, or not measured."""
    seed: int = 0


VerdictRule = Literal["non-inferior", "not inferior", "no loss shown"]
"""What passes; `validation.verdict` says what each rule does by chance."""


class GatesSpec(Spec):
    """Bounds named beforehand. None: the figure is reported, not gated."""

    max_accuracy_loss_points: float | None = None
    """Largest loss, in percentage points, of the quantized weights against BF16 (the point estimate)."""
    accuracy_margin_points: float | None = Field(default=None, gt=0)
    """Loss that verdicts still count as none; None: `max_accuracy_loss_points`, or 2."""
    task_margins: dict[str, float] = {}
    """Margins of single tasks, in points; a task named here gates by itself, by `accuracy_verdict`."""
    accuracy_verdict: VerdictRule | None = None
    """On the quantized weights against BF16, by the 95 % interval of the paired difference.
    non-inferior: it must rule out a loss beyond the margin (needs enough items). not inferior: it must not
    show one. no loss shown: the exact one-sided test must not show any loss at 2.5 %."""
    served_verdict: VerdictRule | None = None
    """The same of all that is served, with YaRN and the draft, on the same short items."""
    safety_tasks: tuple[str, ...] = ()
    """Tasks of which every item is one of safety, besides items whose meta says `safety: true`."""
    max_safety_flips: int | None = Field(default=None, ge=0)
    """Safety items that all that is served may turn from right to wrong, beyond those that BF16 itself flips
    when asked twice."""
    max_rubric_loss_points: float | None = Field(default=None, gt=0)
    """Largest loss of the quantized weights' rubric score, in points of 100; also the verdict's margin."""
    max_new_rubric_harm: int | None = Field(default=None, ge=0)
    """Criteria with negative points that the quantized weights may meet where BF16 did not."""
    min_acceptance_length: float | None = None
    min_identical_fraction: float | None = None
    min_draft_speedup: float | None = None
    min_tokens_per_second: float | None = None
    """Single-stream output tokens/s on the recipe's hardware."""
    min_ratio_to_dense: float | None = None
    min_long_context_tokens: int | None = None
    """Longest record that must still be read with `min_long_accuracy`."""
    min_long_accuracy: float = Field(default=0.6, ge=0, le=1)


class InheritedFigure(Spec):
    """A figure that others published and this release did not measure."""

    name: str = Field(min_length=1)
    value: str | int | float
    source: str = Field(min_length=1)
    """Where it stands: a URL, or words that find it."""
    conditions: str = ""
    """How it was measured, as far as the source says."""


class CardProse(Spec):
    """The sentences of the card in another language; what is empty is shown in the first one."""

    title: str = ""
    description: str = ""
    intended_use: str = ""
    limitations: str = ""
    license_reason: str = ""


class EvaluationSet(Spec):
    """The benchmark on the hub that a task's items are; only such results may stand in `.eval_results/`."""

    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository of the data set."""
    task_id: str
    """The task in the data set's own `eval.yaml`."""
    revision: str | None = None


class BundleSpec(Spec):
    """What the model card must say that cannot be measured."""

    title: str
    license: str | None = None
    license_reason: str = ""
    """Why this licence, where the source's own statements disagree with it or with one another."""
    base_model: str | None = None
    languages: tuple[str, ...] = ("en", "zh")
    tags: tuple[str, ...] = ()
    """Beside those that follow from the release."""
    description: str = ""
    intended_use: str = ""
    limitations: str = ""
    zh: CardProse = CardProse()
    """The same for README.zh.md."""
    inherited: tuple[InheritedFigure, ...] = ()
    """Printed as inherited, never as measured."""
    evaluation_sets: dict[str, EvaluationSet] = {}
    """By task of the items, or by lm-eval's name of a benchmark."""
    image: str | None = Field(default=None, pattern=r"^[a-z0-9][\w./:-]*@sha256:[0-9a-f]{64}$")
    """vLLM's container, `name@sha256:digest` (`docker buildx imagetools inspect` prints it); None: the tag of
    the release that this package was tested with, which its owner can move."""


class PublishSpec(Spec):
    """Where the bundle goes: `hf://org/name` or `dir:PATH`."""

    target: str
    tag: str | None = None
    private: bool = False


class Recipe(Spec):
    """A whole release."""

    name: str
    hardware: str = "cpu"
    source: SourceSpec
    quantize: QuantizeSpec = QuantizeSpec()
    context: ContextSpec
    draft: DraftSpec
    serve: ServeSettings = ServeSettings()
    validate_: ValidateSpec = Field(default=ValidateSpec(), alias="validate")
    gates: GatesSpec = GatesSpec()
    bundle: BundleSpec
    publish: PublishSpec

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; the standard loader keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        BadInput: the file is missing, not YAML, or has unknown, repeated, missing or ill-typed keys (each is
            listed).
    """
    remedy = "Give the path of a YAML recipe; see the recipes folder."
    try:
        raw: Any = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except FileNotFoundError:
        raise BadInput(f"no recipe at {path}", remedy) from None
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}", remedy) from None
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise BadInput(f"{path} is not YAML: {err}", remedy) from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} does not hold a mapping at its top level", remedy)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as err:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in err.errors()]
        raise BadInput(
            f"{path} is not a valid recipe:\n" + "\n".join(lines), "Correct the keys named above."
        ) from None
