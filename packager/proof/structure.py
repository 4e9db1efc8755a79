"""The structure of a checkpoint: what engines load without a word although it is wrong.

vLLM does not report a missing scale of a quantized model, and no engine looks for NaN codes, orphans or a
skip list that contradicts the tensors. Data is read in chunks of a few MB, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from packager.layouts import FLOATS, QUANTIZABLE, Expected, Model, Role, recognise
from packager.proof.dialect import SCALE_DTYPES, SUFFIXES, Stated, read_stated, scale_of, scale_shape
from packager.proof.engines import Facts, Need, needs
from packager.proof.files import Stored, WeightFiles, read_object
from packager.proof.parallel import Split, splits
from packager.proof.reference import widen

_FP8 = "F8_E4M3"
_CHUNK = 1 << 24
_LINEAR_KEPT = frozenset({Role.LM_HEAD, Role.ROUTER, Role.MTP_PROJECTION})
"""Linear layers that engines keep; whoever takes `targets: [Linear]` at its word needs them in the list."""
_ROUTING_KEYS = ("routed_scaling_factor", "n_group", "topk_group", "score_function", "norm_topk_prob")
"""What changes the answers as much as a shape does, where a config has it."""


@dataclass(frozen=True)
class Problem:
    """One fault."""

    kind: str
    """file, config, missing, unknown, shape, dtype, scale-missing, scale-name, scale-shape, scale-dtype,
    scale-value, orphan, not-quantized, quantized, skip-list, nan-code, parallel, engine, source."""
    where: str
    """A tensor or module; empty for the checkpoint as a whole."""
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}" if self.where else self.detail


@dataclass
class Structure:
    """What was found."""

    path: str
    architecture: str
    scheme: str | None
    """`fp8-block`, `fp8-channel`, `int4-g128`, `w8a8`; None: config.json states no quantization."""
    dialect: str | None
    quantized: int = 0
    """Weights stored as codes."""
    scales: int = 0
    kept: int = 0
    """Tensors that are neither, nor the shape of a packed weight."""
    data_read: bool = False
    """Whether codes and scales were read, not headers alone."""
    problems: list[Problem] = field(default_factory=list)
    parallel: list[Split] = field(default_factory=list)
    engines: list[Need] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def differs_from_source(self) -> bool:
        """Whether it is not what the source was, rather than malformed in itself."""
        return any(problem.kind == "source" for problem in self.problems)


def check_structure(
    path: Path, *, source: Path | None = None, read_data: bool = True, engine: str | None = None
) -> Structure:
    """Check a BailingMoeV2 checkpoint: FP8 in either dialect, INT4 or INT8, or unquantized.

    Args:
        path: checkpoint folder.
        source: the checkpoint it was made from; names, shapes and shape-fixing settings are compared.
        read_data: look for NaN codes, for scales that are no positive number, and for the shapes that packed
            weights are said to have.
        engine: `vllm` or `sglang`: its refusals are problems; None: what both refuse is.

    Raises:
        BadInput: no checkpoint at all, no readable config.json, or another architecture. Everything else is
            a problem in the result.
    """
    raw = read_object(path / "config.json") if path.is_dir() else {}
    with WeightFiles.open(path) as files:
        model = recognise(raw, str(path / "config.json"))
        stated, complaints = read_stated(raw)
        layout = _layout(model, files)
        found = Structure(
            path=str(path),
            architecture=model.architecture.name,
            scheme=stated.scheme if stated else None,
            dialect=stated.dialect if stated else None,
            data_read=read_data,
        )
        found.problems += [Problem("file", "", text) for text in files.problems]
        found.problems += [Problem("config", "", f"quantization_config: {text}") for text in complaints]
        check = _Tensors(files, layout, stated, readable=stated is not None or not complaints)
        found.problems += check.problems()
        codes = {want.name: held for want in layout if (held := check.codes(want)) is not None}
        quantized = frozenset(codes)
        found.quantized, found.scales = len(quantized), len(check.scales)
        found.kept = len(files.tensors) - found.quantized - found.scales - len(check.shapes)
        if read_data:
            for _, held in sorted(codes.items()):
                found.problems += _nan_codes(files, held) if held.dtype == _FP8 else ()
            for name in sorted(check.scales):
                found.problems += _bad_scales(files, files.tensors[name])
            for name, want in sorted(check.shapes.items()):
                found.problems += _other_shape(files, files.tensors[name], want)
        roles = frozenset(want.role for want in layout if want.name in quantized)
        found.parallel = splits(model, layout, stated.block if stated else None, roles)
        scale_dtypes = frozenset(files.tensors[name].dtype for name in check.scales)
        mtp = model.mtp_layers_in(files.tensors)
        found.engines = needs(Facts(raw, model, stated, layout, quantized, scale_dtypes, mtp))
        found.problems += _refusals(found, engine)
        if source is not None:
            stored = {held.name for held in codes.values()} | check.scales | check.shapes.keys()
            found.problems += _source_problems(files, raw, model, source, quantized, stored)
    return found


class _Tensors:
    """Names, shapes and dtypes against the layout and the stated dialect; headers only."""

    def __init__(
        self, files: WeightFiles, layout: list[Expected], stated: Stated | None, *, readable: bool
    ) -> None:
        self._tensors, self._layout, self._stated = files.tensors, layout, stated
        self._readable = readable
        """False: what the config states is not understood, so it is no measure."""
        self._by_name = {want.name: want for want in layout}
        self.scales = {
            name
            for name in files.tensors
            if name.endswith(tuple(SUFFIXES.values())) and name not in self._by_name
        }
        self.shapes = {
            name: want
            for want in layout
            if stated and (name := stated.shape_of(want.name)) is not None and name in files.tensors
        }
        """Tensors that state the shape of a packed weight -> that weight."""
        self._other = next((s for s in SUFFIXES.values() if stated and s != stated.suffix), "")

    def codes(self, want: Expected) -> Stored | None:
        """The tensor that holds the codes of a weight; None: it is not quantized, or not there."""
        packed = self._tensors.get(self._stated.codes_of(want.name)) if self._stated else None
        have = packed or self._tensors.get(want.name)
        dtypes = {_FP8, self._stated.code_dtype} if self._stated else {_FP8}
        return have if have is not None and have.dtype in dtypes else None

    def problems(self) -> Iterator[Problem]:
        """Every fault, weight by weight, then what belongs to no weight."""
        owned: set[str] = set()
        swapped = self._swapped()
        if swapped:
            dialect = self._stated.dialect if self._stated else ""
            wrong = next(name for name, suffix in SUFFIXES.items() if suffix == self._other)
            yield Problem(
                "scale-name",
                "",
                f"config.json states the {dialect} dialect, but all {len(self.scales)} scales are named "
                f"{self._other} as in the {wrong} dialect",
            )
        for want in self._layout:
            codes = self.codes(want)
            have = codes or self._tensors.get(want.name)
            if have is None:
                yield Problem("missing", want.name, f"missing; expected {list(want.shape)}")
                continue
            packed = codes is not None and codes.name != want.name
            shape = self._stated.code_shape(want.shape) if self._stated and packed else want.shape
            if have.shape != shape:
                yield Problem("shape", have.name, f"shape {list(have.shape)}, expected {list(shape)}")
            elif codes is not None:
                owned.add(codes.name)
                yield from self._code(want, codes, swapped, owned)
            elif have.dtype not in FLOATS:
                expected = self._stated.code_dtype if self._stated else _FP8
                yield Problem("dtype", want.name, f"dtype {have.dtype}, expected {expected} or BF16")
            elif want.role in QUANTIZABLE and self._readable and not self._skips(want):
                yield Problem(
                    "not-quantized",
                    want.name,
                    f"{have.dtype}, but the config does not skip it: no {self._code_name}, no scale",
                )
            if want.role in _LINEAR_KEPT and self._stated and not self._skips(want):
                module = want.name.removesuffix(".weight")
                yield Problem("skip-list", module, "kept unquantized, but not in the config's list of skips")
        for name in sorted(self.scales - owned):
            if not swapped:
                yield Problem("orphan", name, f"a scale whose weight is not there in {self._code_name}")
        for name in sorted(self.shapes.keys() - owned):
            yield Problem("orphan", name, "the shape of a weight that is not packed")
        for name, have in self._tensors.items():
            if name not in self._by_name and name not in self.scales | self.shapes.keys() | owned:
                yield Problem("unknown", name, f"{have.dtype} {list(have.shape)} is no part of this model")

    @property
    def _code_name(self) -> str:
        return self._stated.kind.upper() if self._stated else "FP8"

    def _skips(self, want: Expected) -> bool:
        return self._stated is None or self._stated.skips(want.name.removesuffix(".weight"))

    def _swapped(self) -> bool:
        return bool(
            self._stated and self.scales and all(name.endswith("." + self._other) for name in self.scales)
        )

    def _code(self, want: Expected, codes: Stored, swapped: bool, owned: set[str]) -> Iterator[Problem]:
        stated, name = self._stated, "FP8" if codes.dtype == _FP8 else self._code_name
        if want.role not in QUANTIZABLE:
            yield Problem("quantized", want.name, f"stored as {name}; engines keep the {want.role} as it was")
        elif self._readable and self._skips(want):
            why = "the config skips it" if stated else "config.json has no quantization_config"
            yield Problem("skip-list", want.name, f"stored as {name}, but {why}")
        elif stated and codes.dtype != stated.code_dtype:
            yield Problem("dtype", want.name, f"dtype {codes.dtype}, expected {stated.code_dtype} or BF16")
        if stated is None:
            owned |= {scale_of(want.name, suffix) for suffix in SUFFIXES.values()}
            return
        written = stated.shape_of(want.name)
        if written is not None:
            owned.add(written)
            if written not in self._tensors:
                yield Problem("missing", written, "missing; engines read the shape of a packed weight there")
        name = scale_of(want.name, self._other if swapped else stated.suffix)
        scale = self._tensors.get(name)
        if scale is None:
            other = scale_of(want.name, self._other)
            if other in self._tensors:
                owned.add(other)
                yield Problem("scale-name", other, f"in the {stated.dialect} dialect it is called {name}")
            else:
                yield Problem("scale-missing", want.name, f"{self._code_name} without its scale {name}")
            return
        owned.add(name)
        shape = scale_shape(want.shape, stated.block) if len(want.shape) == 2 else ()
        if scale.shape != shape:
            yield Problem("scale-shape", name, f"shape {list(scale.shape)}, expected {list(shape)}")
        if scale.dtype not in SCALE_DTYPES:
            yield Problem("scale-dtype", name, f"dtype {scale.dtype}, expected {' or '.join(SCALE_DTYPES)}")


def _nan_codes(files: WeightFiles, tensor: Stored) -> Iterator[Problem]:
    first, count = -1, 0
    for begin in range(0, tensor.nbytes, _CHUNK):
        data = files.read(tensor, begin, min(begin + _CHUNK, tensor.nbytes))
        bad = np.flatnonzero((data & 0x7F) == 0x7F)
        if bad.size:
            first = first if first >= 0 else begin + int(bad[0])
            count += bad.size
    if count:
        yield Problem("nan-code", tensor.name, f"{count} NaN code(s), the first at {_at(first, tensor)}")


def _bad_scales(files: WeightFiles, tensor: Stored) -> Iterator[Problem]:
    if tensor.dtype not in SCALE_DTYPES:
        return
    values = widen(files.read(tensor, 0, tensor.nbytes), tensor.dtype)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        what = f"{values[bad[0]]:g} at {_at(int(bad[0]), tensor)}"
        yield Problem("scale-value", tensor.name, f"{bad.size} scale(s) not positive and finite: {what}")


def _other_shape(files: WeightFiles, tensor: Stored, want: Expected) -> Iterator[Problem]:
    if tensor.dtype not in ("I64", "I32") or tensor.shape != (2,):
        yield Problem("dtype", tensor.name, f"{tensor.dtype} {list(tensor.shape)}, expected I64 [2]")
        return
    said = files.integers(tensor)
    if said != want.shape:
        yield Problem("shape", tensor.name, f"says {list(said)}, the weight is {list(want.shape)}")


def _at(index: int, tensor: Stored) -> str:
    return "[" + ", ".join(str(int(axis)) for axis in np.unravel_index(index, tensor.shape)) + "]"


def _refusals(found: Structure, engine: str | None) -> Iterator[Problem]:
    if not any(split.possible for split in found.parallel):
        reasons = "; ".join(found.parallel[0].reasons)
        yield Problem("parallel", "", f"no number of GPUs from 1 to 8 can hold it; on one: {reasons}")
    for need in found.engines:
        verdicts = {"vllm": need.vllm, "sglang": need.sglang}
        asked = [verdicts[engine]] if engine else list(verdicts.values())
        # A scale's dtype is a problem of that scale already.
        if need.matter != "scales" and all(verdict.level == "problem" for verdict in asked):
            who = {"vllm": "vLLM", "sglang": "SGLang"}.get(engine or "", "neither engine loads it")
            yield Problem("engine", "", f"{need.matter} ({who}): {asked[0].text}")


def _layout(model: Model, files: WeightFiles) -> list[Expected]:
    """The tensors that the model has, those of packed weights under the names of the weights."""
    names = {name.removesuffix("_packed") for name in files.tensors}
    return [want for want in model.tensors_in(names) if not want.optional or want.name in names]


def _source_problems(
    files: WeightFiles,
    raw: dict[str, Any],
    model: Model,
    source: Path,
    quantized: frozenset[str],
    stored: set[str],
) -> Iterator[Problem]:
    theirs = read_object(source / "config.json")
    for key in dict.fromkeys([*(known.name for known in model.architecture.fields), *_ROUTING_KEYS]):
        if raw.get(key) != theirs.get(key):
            yield Problem("source", "", f"{key} is {raw.get(key)}, in the source {theirs.get(key)}")
    layers, left_out = raw.get("num_hidden_layers"), not raw.get("num_nextn_predict_layers")
    with WeightFiles.open(source) as original:
        for text in original.problems:
            yield Problem("source", "", f"the source itself: {text}")
        for name, want in original.tensors.items():
            have = files.tensors.get(name)
            if have is None and name in quantized:
                continue  # packed: under another name, its shape held against the config's
            if have is None:
                parts = name.split(".")
                layer = int(parts[2]) if len(parts) > 2 and parts[2].isdigit() else -1
                if not (left_out and isinstance(layers, int) and layer >= layers):
                    yield Problem("source", name, "in the source, but not here")
            elif have.shape != want.shape:
                yield Problem("source", name, f"shape {list(have.shape)}, in the source {list(want.shape)}")
            elif name not in quantized and have.dtype != want.dtype:
                yield Problem("source", name, f"dtype {have.dtype}, in the source {want.dtype}")
        extra = files.tensors.keys() - original.tensors.keys() - stored
        yield from (Problem("source", name, "not in the source") for name in sorted(extra))
