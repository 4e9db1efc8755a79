"""A quantized checkpoint held against its source, element by element, by a second implementation.

For each chosen weight: the scales are those of the stated rounding, and each code is weight / scale rounded
to nearest even. All other tensors have the bytes of the source; none is missing, none is extra. One band of
rows (the rows that share scales) and one weight's scales are in memory at a time, for each worker.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.errors import BadInput
from packager.proof import reference
from packager.proof.dialect import SCALE_DTYPES, Stated, read_stated, scale_of, scale_shape
from packager.proof.files import Storage, Stored, WeightFiles
from packager.proof.integers import Integers
from packager.proof.reference import Arithmetic, Rounding

_CHUNK = 1 << 24
_ROWS_AT_ONCE = 1 << 20
"""Elements of a band where each row has a scale of its own."""
_ROLES = (
    (r"\.experts\.\d+\.", "routed_expert"),
    (r"\.shared_experts?\.", "shared_expert"),
    (r"\.mlp\.(gate|up|down)_proj\.", "dense_mlp"),
    (r"\.(self_attn|attention)\.(query_key_value|qkv_proj|q_proj|k_proj|v_proj)\.", "attention_input"),
    (r"\.(self_attn|attention)\.", "attention_output"),
)


@dataclass(frozen=True)
class Mismatch:
    """The first fault of one kind in one tensor."""

    tensor: str
    kind: str
    """`code`, `scale`, `kept` (bytes that should be the source's), `source` (a value that is not finite)."""
    position: tuple[int, ...]
    found: str
    expected: str
    count: int
    """Elements of this tensor with this fault."""

    def __str__(self) -> str:
        where = ", ".join(map(str, self.position))
        more = f" ({self.count} such elements)" if self.count > 1 else ""
        return f"{self.tensor}[{where}]: {self.kind} {self.found}, expected {self.expected}{more}"


@dataclass
class RoleProof:
    """All quantized weights of one role."""

    tensors: int = 0
    checked: int = 0
    elements: int = 0
    """Of the checked tensors."""
    snr_db: float | None = None
    """Of the checked tensors, source against code x scale; None where they are equal or not finite."""
    worst_relative_error: float = 0.0
    """FP8: over elements of at least 2**-6 scales, the normal numbers of E4M3; at most 1/17 if all is right.
    Integers: |w' - w| over the largest |w| of the group; at most about 1/15 (INT4) or 1/255 (INT8)."""
    signal: float = field(default=0.0, repr=False)
    noise: float = field(default=0.0, repr=False)


@dataclass
class Proof:
    """What was recomputed and what did not agree."""

    scheme: str | None
    """`fp8-block`, `fp8-channel`, `int4-g128`, `w8a8`; None: nothing is quantized."""
    dialect: str | None
    rounding: Rounding | None
    """float32, power-of-two or bfloat16; None: nothing was recomputed."""
    rounding_from: str
    """Where that is stated: `manifest.json`, `asked for`, `their dtype`, or `the scales themselves`."""
    seed: int
    roles: dict[str, RoleProof] = field(default_factory=dict)
    kept: int = 0
    """Tensors with the bytes of the source; all of them are always compared."""
    left_out: int = 0
    """Multi-token prediction tensors that the config says are left out."""
    problems: list[str] = field(default_factory=list)
    """Tensors missing, extra, misshapen, without a scale."""
    mismatches: list[Mismatch] = field(default_factory=list)
    worst_relative_error: float = 0.0
    worst_tensor: str = ""
    snr_db: float | None = None

    @property
    def sound(self) -> bool:
        """Whether everything that was looked at is as it must be."""
        return not (self.problems or self.mismatches)

    @property
    def tensors(self) -> int:
        """Quantized weights."""
        return sum(role.tensors for role in self.roles.values())

    @property
    def checked(self) -> int:
        """Of these, the ones recomputed."""
        return sum(role.checked for role in self.roles.values())

    @property
    def elements(self) -> int:
        """Elements recomputed."""
        return sum(role.elements for role in self.roles.values())


def verify_against(
    path: Path | Storage,
    source: Path | Storage,
    *,
    sample: int | None,
    seed: int = 0,
    rounding: Rounding | None = None,
    workers: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Recompute `sample` quantized weights of `path` from `source`, or all if None.

    Args:
        path: FP8 checkpoint in either dialect, symmetric INT4 or INT8 of compressed-tensors; an unquantized
            one must equal its source.
        source: the BF16, FP16 or FP32 checkpoint that it was made from. Both may be folders, or whatever else
            hands out files: of large ones only headers and the tensors that are looked at are read.
        sample: weights to recompute, spread over roles and layers; the first and the last are always among
            them.
        seed: of the sample.
        rounding: of the scales; None: as manifest.json says, else as most of the scales are.
        workers: threads; each holds one band. The result is the same for any number.
        progress: called with a line now and then.

    Raises:
        BadInput: a folder that is no checkpoint, unsound files, a quantized source, an unknown scheme.
        RemoteFailure: a hub does not give the bytes.
    """
    with WeightFiles.open(path) as made, WeightFiles.open(source) as original:
        for files in (made, original):
            if files.problems:
                raise BadInput(f"{files.name} is not sound:\n  " + "\n  ".join(files.problems))
        stated = _stated(made, original)
        proof = Proof(
            scheme=stated.scheme if stated else None,
            dialect=stated.dialect if stated else None,
            rounding=None,
            rounding_from="",
            seed=seed,
        )
        pairs = _pairs(made, original, stated, proof)
        for weight, _, _ in pairs:
            proof.roles.setdefault(role_of(weight.name), RoleProof()).tensors += 1
        chosen = pairs if sample is None else _sampled(pairs, sample, seed)
        _settle_rounding(proof, made, stated, [scale for _, scale, _ in chosen], rounding)
        jobs = [
            _Bands(made, original, weight, scale, want, stated) for weight, scale, want in chosen if stated
        ]
        with ThreadPoolExecutor(workers) as pool:
            # In the order of the jobs, so the figures do not depend on the number of workers.
            results = pool.map(lambda bands: _recompute(bands, proof.rounding or "float32"), jobs)
            for number, (bands, found) in enumerate(zip(jobs, results, strict=True), start=1):
                _add(proof, bands.want, found)
                if number % 500 == 0 or number == len(jobs):
                    progress(f"recomputed {number} of {len(jobs)} weights")
    _sum_up(proof)
    return proof


def _stated(made: WeightFiles, original: WeightFiles) -> Stated | None:
    if "quantization_config" in original.object("config.json"):
        remedy = "Give the checkpoint that was quantized, in BF16."
        raise BadInput(f"{original.name} is quantized itself", remedy)
    stated, problems = read_stated(made.object("config.json"))
    if problems:
        raise BadInput(f"{made.name}/config.json: " + "; ".join(problems))
    return stated


def role_of(name: str) -> str:
    """What a weight is for, told from its name alone."""
    return next((role for pattern, role in _ROLES if re.search(pattern, name)), "other")


def _layer_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _model_order(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _pairs(
    made: WeightFiles, original: WeightFiles, stated: Stated | None, proof: Proof
) -> list[tuple[Stored, Stored, Stored]]:
    """(weight, scale, source) of each quantized weight, in model order; kept tensors are compared here."""
    pairs = []
    known = set()
    left_out = _left_out(made, original)
    for name in sorted(original.tensors, key=_model_order):
        want, have = original.tensors[name], made.tensors.get(name)
        known.add(name)
        if stated and (codes := _codes(made, stated, want)) is not None:
            known |= {codes.name, scale_of(name, stated.suffix), stated.shape_of(name) or name}
            if have is not None and have is not codes:
                proof.problems.append(f"{name}: stored twice, as {have.dtype} and as {codes.name}")
            faults = list(_faults_of_codes(made, stated, codes, want))
            proof.problems += faults
            if not faults:
                pairs.append((codes, made.tensors[scale_of(name, stated.suffix)], want))
        elif have is None:
            if name in left_out:
                proof.left_out += 1
            else:
                proof.problems.append(f"missing: {name} {list(want.shape)}")
        elif have.shape != want.shape:
            proof.problems.append(f"{name}: shape {list(have.shape)}, the source has {list(want.shape)}")
        elif have.dtype == "F8_E4M3" and want.dtype != "F8_E4M3":
            why = f"the codes stated are {stated.scheme}" if stated else "config.json states no quantization"
            proof.problems.append(f"{name}: FP8, but {why}")
        else:
            _compare_kept(proof, made, original, have, want)
    proof.problems.extend(f"extra: {name}" for name in made.tensors if name not in known)
    return pairs


def _codes(made: WeightFiles, stated: Stated, want: Stored) -> Stored | None:
    """The tensor that holds a weight's codes; None: it is not quantized."""
    codes = made.tensors.get(stated.codes_of(want.name))
    return codes if codes and codes.dtype == stated.code_dtype != want.dtype else None


def _faults_of_codes(made: WeightFiles, stated: Stated, codes: Stored, want: Stored) -> Iterator[str]:
    """What keeps a quantized weight from being recomputed."""
    if len(want.shape) != 2 or want.dtype not in ("BF16", "F16", "F32"):
        yield f"{want.name}: {want.dtype} {list(want.shape)} cannot become {stated.kind.upper()} with scales"
        return
    shape = stated.code_shape(want.shape)
    if codes.shape != shape:
        came = f"the source has {list(want.shape)}"
        expected = came if shape == want.shape else f"expected {list(shape)}, {came}"
        yield f"{codes.name}: shape {list(codes.shape)}, {expected}"
        return
    name = scale_of(want.name, stated.suffix)
    scale, shape = made.tensors.get(name), scale_shape(want.shape, stated.block)
    if scale is None:
        yield f"{want.name}: {stated.kind.upper()} without {name}"
    elif scale.shape != shape or scale.dtype not in SCALE_DTYPES:
        yield f"{name}: {scale.dtype} {list(scale.shape)}, expected F32 or BF16 {list(shape)}"
    written = stated.shape_of(want.name)
    if written is not None:
        said = made.tensors.get(written)
        if said is None or said.dtype not in ("I64", "I32") or said.shape != (2,):
            yield f"{want.name}: INT4 without {written} of two integers"
        elif (shape := made.integers(said)) != want.shape:
            yield f"{written}: says {list(shape)}, the source has {list(want.shape)}"


def _left_out(made: WeightFiles, original: WeightFiles) -> set[str]:
    """Tensors of multi-token prediction layers, if the output has none of them and its config says so."""
    config = made.object("config.json")
    layers = config.get("num_hidden_layers")
    if config.get("num_nextn_predict_layers") or not isinstance(layers, int):
        return set()
    names = {name for name in original.tensors if _layer_of(name) >= layers}
    return set() if names & made.tensors.keys() else names


def _compare_kept(proof: Proof, made: WeightFiles, original: WeightFiles, have: Stored, want: Stored) -> None:
    if have.dtype != want.dtype:
        proof.problems.append(f"{have.name}: {have.dtype}, the source has {want.dtype}")
        return
    width = want.nbytes // max(want.count, 1)
    first, count = -1, 0
    for begin in range(0, want.nbytes, _CHUNK):
        end = min(begin + _CHUNK, want.nbytes)
        differs = made.read(have, begin, end) != original.read(want, begin, end)
        if differs.any():
            bad = np.flatnonzero(differs.reshape(-1, width).any(axis=1))
            first = first if first >= 0 else begin // width + int(bad[0])
            count += len(bad)
    if not count:
        proof.kept += 1
        return
    found, expected = (
        "0x" + files.read(tensor, first * width, (first + 1) * width)[::-1].tobytes().hex()
        for files, tensor in ((made, have), (original, want))
    )
    position = tuple(int(axis) for axis in np.unravel_index(first, want.shape))
    proof.mismatches.append(Mismatch(have.name, "kept", position, found, expected, count))


def _sampled(
    pairs: list[tuple[Stored, Stored, Stored]], count: int, seed: int
) -> list[tuple[Stored, Stored, Stored]]:
    """First, last, and the rest in turn from each role, each time from another layer; in model order."""
    if count >= len(pairs):
        return pairs
    chosen = {0, len(pairs) - 1}
    chance = random.Random(seed)
    strata: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (weight, _, _) in enumerate(pairs):
        if index not in chosen:
            strata[role_of(weight.name)][_layer_of(weight.name)].append(index)
    queues = [_by_layers(layers, chance) for _, layers in sorted(strata.items())]
    while len(chosen) < count:
        for queue in queues:
            for index in islice(queue, count > len(chosen)):
                chosen.add(index)
    return [pairs[index] for index in sorted(chosen)]


def _by_layers(layers: dict[int, list[int]], chance: random.Random) -> Iterator[int]:
    """Every index of one role, one from each layer before a second from any."""
    order = sorted(layers)
    chance.shuffle(order)
    for members in layers.values():
        chance.shuffle(members)
    for turn in range(max(map(len, layers.values()))):
        for layer in order:
            if turn < len(layers[layer]):
                yield layers[layer][turn]


def _settle_rounding(
    proof: Proof, made: WeightFiles, stated: Stated | None, scales: list[Stored], asked: Rounding | None
) -> None:
    if not scales or stated is None:
        return
    if stated.kind != "fp8":
        if asked == "power-of-two":
            raise BadInput(f"scales of {stated.scheme} are rounded to no power of two")
        proof.rounding = "bfloat16" if scales[0].dtype == "BF16" else "float32"
        proof.rounding_from = "their dtype"
        return
    if asked is not None:
        proof.rounding, proof.rounding_from = asked, "asked for"
        return
    if "manifest.json" in made.storage.sizes():
        metrics = made.object("manifest.json").get("metrics")
        said = metrics.get("scale_rounding") if isinstance(metrics, dict) else None
        if said in ("float32", "power-of-two"):
            proof.rounding, proof.rounding_from = said, "manifest.json"
            return
    powers = sum(
        reference.powers_of_two(reference.widen(made.read(scale, 0, scale.nbytes), scale.dtype))
        for scale in scales
    )
    # One changed scale does not change the rule that all the others follow.
    most = 2 * powers > sum(scale.count for scale in scales)
    proof.rounding, proof.rounding_from = "power-of-two" if most else "float32", "the scales themselves"


_INTEGERS = {"int4": Integers(4), "int8": Integers(8)}


def _arithmetic(stated: Stated) -> Arithmetic:
    return reference if stated.kind == "fp8" else _INTEGERS[stated.kind]


@dataclass(frozen=True)
class _Bands:
    """A weight, cut into bands of rows that share no scale with others."""

    made: WeightFiles
    original: WeightFiles
    weight: Stored
    scale: Stored
    want: Stored
    stated: Stated

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None: a whole row does."""
        return self.stated.block[1] if self.stated.block else None

    @property
    def whole(self) -> bool:
        """Whether all rows of a band share scales."""
        return self.stated.block is not None and self.stated.block[0] > 1

    def __iter__(
        self,
    ) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32], int]]:
        """First row; source [R, K]; codes [R, K]; scales [1, blocks] or [R, groups]; their first row."""
        rows, width = self.want.shape
        block = self.stated.block if self.whole else None
        step = block[0] if block else max(_ROWS_AT_ONCE // max(width, 1), 1)
        # All at once: what is read from afar is then read in order.
        stored = reference.widen(self.made.read(self.scale, 0, self.scale.nbytes), self.scale.dtype)
        stored = stored.reshape(self.scale.shape)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            source = reference.widen(self.original.rows(self.want, first, last), self.want.dtype)
            codes = self.made.rows(self.weight, first, last)
            begin, end = (first // step, first // step + 1) if block else (first, last)
            codes = _arithmetic(self.stated).unpacked(codes, width)
            yield first, source.reshape(-1, width), codes, stored[begin:end], begin


@dataclass
class _Weight:
    """What one recomputed weight adds to the proof."""

    signal: float = 0.0
    noise: float = 0.0
    worst: float = 0.0
    mismatches: list[Mismatch] = field(default_factory=list)


def _recompute(bands: _Bands, rounding: Rounding) -> _Weight:
    """Check one weight: figures, and at most one mismatch of each kind."""
    arithmetic = _arithmetic(bands.stated)
    faults, found = _Faults(arithmetic, bands.weight.name, bands.scale.name), _Weight()
    for first, source, codes, scales, scale_row in bands:
        with np.errstate(all="ignore"):  # damaged scales divide by zero; they are reported, not warned about
            largest = reference.largest_in_blocks(source, bands.columns, whole=bands.whole)
            if not np.isfinite(largest).all():
                faults.source(first, source)
                continue
            right = arithmetic.expected_scales(largest, rounding, bands.scale.dtype)
            faults.scales(scale_row, scales, right)
            spread = scales
            if bands.columns is not None:
                spread = np.repeat(scales, bands.columns, axis=1)[:, : source.shape[1]]
            faults.codes(first, source, spread, codes)
            back = arithmetic.VALUES[codes] * spread
            difference = np.abs(back - source)
            found.signal += float(np.einsum("ij,ij->i", source, source).sum(dtype=np.float64))
            found.noise += float(np.einsum("ij,ij->i", difference, difference).sum(dtype=np.float64))
            relative = arithmetic.relative_errors(difference, source, spread)
            found.worst = max(found.worst, float(np.nan_to_num(relative, nan=np.inf).max(initial=0.0)))
    found.mismatches.extend(faults.found.values())
    return found


def _add(proof: Proof, weight: Stored, found: _Weight) -> None:
    role = proof.roles[role_of(weight.name)]
    role.checked += 1
    role.elements += weight.count
    role.signal += found.signal
    role.noise += found.noise
    role.worst_relative_error = max(role.worst_relative_error, found.worst)
    if found.worst > proof.worst_relative_error:
        proof.worst_relative_error, proof.worst_tensor = found.worst, weight.name
    proof.mismatches.extend(found.mismatches)


@dataclass
class _Faults:
    """Of one weight: the first fault of each kind and how many there are."""

    arithmetic: Arithmetic
    weight: str
    scale: str
    found: dict[str, Mismatch] = field(default_factory=dict)

    def _note(self, kind: str, tensor: str, where: Any, count: int, found: str, expected: str) -> None:
        if kind in self.found:
            old = self.found[kind]
            where, found, expected, count = old.position, old.found, old.expected, old.count + count
        position = tuple(int(axis) for axis in where)
        self.found[kind] = Mismatch(tensor, kind, position, found, expected, count)

    def source(self, first_row: int, rows: NDArray[np.float32]) -> None:
        bad = ~np.isfinite(rows)
        row, column = np.argwhere(bad)[0]
        what = str(rows[row, column])
        self._note("source", self.weight, (first_row + row, column), int(bad.sum()), what, "a finite value")

    def scales(self, first_row: int, found: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        bad = np.argwhere(found != right)
        if bad.size:
            row, column = bad[0]
            where, values = (first_row + row, column), (found[row, column], right[row, column])
            self._note("scale", self.scale, where, len(bad), *(f"{value:.9g}" for value in values))

    def codes(
        self,
        first_row: int,
        source: NDArray[np.float32],
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
    ) -> None:
        wrong = self.arithmetic.wrong_codes(source, scales, codes)
        count = int(np.count_nonzero(wrong))
        if count:
            row, column = np.argwhere(wrong)[0]
            spread = np.broadcast_to(scales, source.shape)
            expected = int(self.arithmetic.nearest_codes(source[row, column], spread[row, column]))
            found = f"0x{int(codes[row, column]):02X}"
            where = (first_row + row, column)
            self._note("code", self.weight, where, count, found, f"0x{expected:02X}")


def _sum_up(proof: Proof) -> None:
    for role in proof.roles.values():
        role.snr_db = _decibels(role.signal, role.noise)
    signal = math.fsum(role.signal for role in proof.roles.values())
    proof.snr_db = _decibels(signal, math.fsum(role.noise for role in proof.roles.values()))


def _decibels(signal: float, noise: float) -> float | None:
    if not (signal > 0 and noise > 0 and math.isfinite(noise)):
        return None
    return round(10 * math.log10(signal / noise), 2)
