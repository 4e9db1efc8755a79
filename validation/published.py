"""Published measurements against the bound: none may lie above it, and how far below is worth knowing.

The bound is taken as favourable to the figure as what is not stated allows: every byte that has to be read is
read once and spread evenly over the cards, the cache counts at the mean length of a request, and where the
source names no concurrency it is the one, of those that memory holds, at which the bound is highest.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field, model_validator

from validation.document import Document
from validation.hardware import Hardware, parse_hardware
from validation.models import ModelShape, Precision, known_models
from validation.predict import Cell
from validation.roofline import Draft, Setting, decode_rate, decode_step, prefill_step

Quantity = Literal["TPOT in ms", "output tokens/s of each card", "gain of a draft"]


class Published(Document):
    """A measured figure with its source and what the source says of its conditions."""

    id: str
    source: str
    """Key of `PublishedFile.sources`."""
    quantity: Quantity
    value: float = Field(gt=0)
    model: str
    engine: str
    hardware: str
    """Number x card."""
    precision: Precision
    kv_value_bytes: float = 2.0
    concurrency: int | None = Field(default=None, gt=0)
    """None: not stated, the most that memory holds."""
    input_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    draft_tokens: int | None = Field(default=None, gt=0)
    acceptance_length: float | None = Field(default=None, ge=1)
    note: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Published:
        parse_hardware(self.hardware)
        drafted = self.draft_tokens is not None and self.acceptance_length is not None
        if self.quantity == "gain of a draft" and not drafted:
            raise ValueError("a gain of a draft needs draft_tokens and acceptance_length")
        if self.quantity != "output tokens/s of each card" and self.concurrency is None:
            raise ValueError(f"{self.quantity} needs a concurrency")
        return self

    @property
    def context(self) -> float:
        """Mean cached tokens of a request while it decodes."""
        return self.input_tokens + self.output_tokens / 2


class PublishedFile(Document):
    """published.yaml."""

    shapes: dict[str, ModelShape]
    sources: dict[str, str]
    rows: tuple[Published, ...]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: dict[str, dict[str, dict[str, int]]]) -> dict[str, object]:
        return {**data, "shapes": {name: {"name": name, **one} for name, one in data["shapes"].items()}}

    @model_validator(mode="after")
    def _known(self) -> PublishedFile:
        for row in self.rows:
            if row.source not in self.sources or row.model not in {**known_models(), **self.shapes}:
                raise ValueError(f"{row.id} names a source or model that is not in the file")
        return self

    def shape(self, row: Published) -> ModelShape:
        """The model of a row."""
        return {**known_models(), **self.shapes}[row.model]


class Compared(Document):
    """A published figure beside the bound."""

    row: Published
    bound: float
    """In the row's quantity: the least TPOT, the most tokens/s, the acceptance length that no gain passes."""
    share: float
    """Of the speed that the bound allows; above 1 the bound would be wrong."""
    concurrency: int
    """The row's, or that of the highest bound."""
    roofline_gain: float | None = None
    """Of a draft, by the ratio of the two bounds, experts chosen independently; a ratio of two bounds is no
    bound. A measured gain lies above it where neighbouring tokens share experts, or where plain decoding
    stays further below its bound than verification does."""


@cache
def published_file() -> PublishedFile:
    """What comes with the package."""
    text = resources.files("validation.models").joinpath("published.yaml").read_text(encoding="utf-8")
    return PublishedFile.model_validate(yaml.safe_load(text))


def compare_published() -> tuple[Compared, ...]:
    """Every row beside its bound."""
    file = published_file()
    return tuple(_compare(row, file.shape(row)) for row in file.rows)


def published_cells() -> tuple[Cell, ...]:
    """The rows that time a step, as cells to calibrate with: a TPOT without a draft is a step's time."""
    file = published_file()
    return tuple(
        Cell(
            label=f"{row.id} ({row.engine})",
            model=file.shape(row),
            card=parse_hardware(row.hardware).card,
            setting=_setting(row),
            concurrency=row.concurrency,
            context=row.context,
            seconds=row.value / 1000,
        )
        for row in file.rows
        if row.quantity == "TPOT in ms" and row.draft_tokens is None and row.concurrency is not None
    )


def _setting(row: Published) -> Setting:
    cards = parse_hardware(row.hardware).count
    return Setting(precision=row.precision, kv_value_bytes=row.kv_value_bytes, tensor=cards)


def _compare(row: Published, model: ModelShape) -> Compared:
    hardware, setting = parse_hardware(row.hardware), _setting(row)
    if row.draft_tokens is not None and row.acceptance_length is not None:
        # Its own size is not published with such figures: its steps count as free, which favours them.
        draft = Draft(
            weight_bytes=0.0, kv_bytes=0.0, tokens=row.draft_tokens, acceptance_length=row.acceptance_length
        )
        drafted = setting.model_copy(update={"draft": draft})
    else:
        drafted = setting
    if row.quantity == "TPOT in ms":
        at = row.concurrency or 1
        bound = 1000 * decode_step(model, hardware.card, drafted, sequences=at, context=row.context).seconds
        bound /= row.acceptance_length or 1.0
        return Compared(row=row, bound=bound, share=bound / row.value, concurrency=at)
    if row.quantity == "gain of a draft":
        at, context = row.concurrency or 1, round(row.context)
        plain, fast = (
            decode_rate(model, hardware, one, concurrency=at, context=context) for one in (setting, drafted)
        )
        # A verifying step is no shorter than a plain one: that alone bounds the gain.
        most = row.acceptance_length or 1.0
        gain = fast.tokens_per_s / plain.tokens_per_s
        return Compared(
            row=row, bound=most, share=row.value / most, concurrency=at, roofline_gain=min(gain, most)
        )
    at, rate = _most(row, model, hardware, drafted)
    return Compared(row=row, bound=rate, share=row.value / rate, concurrency=at)


def _most(row: Published, model: ModelShape, hardware: Hardware, setting: Setting) -> tuple[int, float]:
    """Concurrency and output tokens/s of each card at the highest bound, prompts read as well."""
    room = hardware.memory - model.weight_bytes(row.precision)
    fits = max(1, int(room / (row.context * model.kv_bytes(row.kv_value_bytes))))
    tried = [row.concurrency] if row.concurrency else [*(2**k for k in range(fits.bit_length())), fits]
    gain = setting.draft.acceptance_length if setting.draft else 1.0
    # Reading is never cheaper a token than in a large batch, where it costs arithmetic alone.
    prompt = prefill_step(model, hardware.card, setting, prompts=1, length=row.input_tokens).compute_s
    each = prompt / row.output_tokens
    found = []
    for at in tried:
        step = decode_step(model, hardware.card, setting, sequences=at, context=row.context)
        tokens = gain * at
        # Prompts are read beside decoding: their arithmetic shares the units, their bytes may be hidden.
        seconds = max(step.memory_s, step.link_s, step.compute_s + tokens * each)
        found.append((at, tokens / seconds / hardware.count))
    return max(found, key=lambda one: one[1])
