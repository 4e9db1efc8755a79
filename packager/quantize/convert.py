"""BF16 to FP8 or integers: headers alone say what goes where; the stream does it; the manifest seals it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packager.artifact import ArtifactWriter, Manifest, is_sealed, sealed_for
from packager.checkpoint.folder import Folder
from packager.checkpoint.header import TensorInfo, readable_bytes
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, listed, numpy_dtype
from packager.checkpoint.writer import ShardPlan, TensorSpec, plan_shards, require_space, write_index
from packager.errors import BadInput, UsageProblem
from packager.layouts import Do, Expected, count_parameters
from packager.quantize import fidelity
from packager.quantize.decided import DecidedCheckpoint
from packager.quantize.dialects import quantization_config
from packager.quantize.disk import probe
from packager.quantize.dry_run import DryRun, plan_dry_run
from packager.quantize.fidelity import LEDGER_NAME, LedgerEntry
from packager.quantize.journal import TensorJournal
from packager.quantize.kernel import Choice, Kernel, choose_kernel
from packager.quantize.output import OutputShards
from packager.quantize.plot import PLOT_NAME, ledger_svg
from packager.quantize.schemes import Scheme, scheme_of
from packager.quantize.source_files import outline
from packager.quantize.stream import PIECE_BYTES, Away, SourceChanged, Stream, TensorWork
from packager.recipe import QuantizeSpec

STAGE = "quantize"
Executor = Literal["local", "ray"]
"""Where pieces are converted: on threads of this process, or by the workers of a Ray cluster."""
_TORCH_BYTES = 400_000_000
DEFAULT_MAX_MEMORY = 1_500_000_000
_WORTH_PROBING = 8_000_000_000
"""Bytes of source that take so long that people look at the progress."""
_KERNEL_MEMORY = 50_000_000
"""Bytes of temporaries of a worker whose kernel runs op by op."""


@dataclass(frozen=True)
class _Job:
    """All that the conversion needs to know before it reads a byte of data."""

    source: DecidedCheckpoint
    spec: QuantizeSpec
    scheme: Scheme
    works: dict[str, TensorWork]
    shards: list[ShardPlan]

    @property
    def checkpoint(self) -> Checkpoint:
        """The source's files."""
        return self.source.checkpoint

    @cached_property
    def dropped(self) -> list[Expected]:
        """Prediction layers, unless the spec has them, and what its rules or the layout drop."""
        return self.source.decisions.those(Do.DROP)


def quantize(
    source: str | Path | Folder,
    out: Path,
    spec: QuantizeSpec,
    *,
    recipe_digest: str,
    progress: Callable[[str], None],
    workers: int | None = None,
    max_memory: int | None = None,
    kernel: Choice = "auto",
    min_snr_db: float | Literal["default"] | None = "default",
    executor: Executor = "local",
    ray_address: str | None = None,
) -> Manifest:
    """Write `source` (BF16, FP16 or FP32, safetensors), quantized, into the sealed artifact `out`.

    Embeddings, output head, norms, router, `expert_bias` and biases keep their bytes. Every byte of the
    source is read once: it is hashed as it is converted. Killed at any moment and called again, it goes on
    with the first unfinished tensor and ends in the same bytes and the same digest; called on a finished
    `out` of the same source and settings, it returns its manifest. `fidelity.jsonl` in `out` has the figures
    of each quantized weight, in the order of the source; `fidelity.svg` draws them.

    Args:
        source: checkpoint directory, or `hf://org/name@revision`, read by byte ranges; or either, opened.
        out: new, unfinished, or already finished artifact.
        spec: scheme, dialect, rounding of scales, shard size, decisions on single tensors.
        recipe_digest: what the manifest records as the settings' digest.
        progress: called with a line a shard, and one every few seconds.
        workers: threads; None: one for each processor that this process may use. With Ray: tasks at once;
            None: two for each processor of the cluster. The output is the same.
        max_memory: bytes of resident memory that this process may take, all that it holds already included;
            None: pieces on their way are bounded by what the workers can be busy with, and nothing else is.
        kernel: `auto` uses the compiled one where the size of the source is worth its start-up.
        min_snr_db: a weight with a lower signal-to-noise ratio fails the gate: 30 dB, for INT4 15 (`Scheme`),
            unless another bound is named; None: no gate.
        executor: `ray` has tensors read and converted by a cluster whose nodes see the source under the same
            path, or read it from the hub. This process hashes and writes. An output that was begun with one
            executor can be finished with the other.
        ray_address: HOST:PORT of the cluster; None: RAY_ADDRESS.

    Raises:
        UsageProblem: `max_memory` is too little to work in; Ray is not installed, or not the same software
            on all nodes.
        BadInput: not a checkpoint of a known architecture, tensors that do not fit the config or the scheme
            (listed), already quantized, NaN or infinity in a weight (named, with its position), no room, or a
            target that cannot be written.
        GateFailed: weights below the gate; `out` stays unfinished, with its ledger.
        IntegrityFailure: `source` is a sealed artifact that was altered; a hub gave other bytes.
        RemoteFailure: the hub does not give the bytes; the Ray cluster cannot be reached or is lost.
    """
    job = _plan(source, spec)
    if is_sealed(out):
        progress(f"reading {readable_bytes(job.checkpoint.nbytes)} of source for its digest")
        inputs = {"source": job.checkpoint.digest()}
        if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
            progress(f"{out} is finished already")
            return found
    if job.dropped:
        progress(f"leaving out {len(job.dropped)} tensors")
    if job.source.prediction.found:
        progress(str(job.source.prediction))
    # The digest of the source is known once it has been read: until then its outline and the tensor journal
    # stand for it.
    key = {"source": outline(job.checkpoint)}
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=key) as writer:
        settings = _Settings(workers, max_memory, kernel, executor, ray_address)
        try:
            entries, hashed = _convert(job, writer, settings, progress)
        except SourceChanged as change:
            progress(f"the source has changed since the last run ({change}): starting again")
            writer.discard()
            entries, hashed = _convert(job, writer, settings, progress)
        inputs = {"source": job.checkpoint.digest(hashed)}
        writer.write_bytes(LEDGER_NAME, fidelity.ledger_jsonl(entries))
        writer.write_bytes(PLOT_NAME, ledger_svg(entries, job.scheme.min_snr_db))
        if min_snr_db is not None:
            fidelity.require_snr(entries, job.scheme.min_snr_db if min_snr_db == "default" else min_snr_db)
        for side in job.checkpoint.side_files():
            if writer.done(side.name) is None:
                writer.write_bytes(side.name, side.read_bytes())
        write_index(writer, job.shards)
        stated = quantization_config(
            job.scheme.quantization, job.source.decisions.written, job.source.quantized
        )
        writer.write_json(CONFIG_NAME, job.source.output_config(stated))
        return writer.seal(_metrics(job, entries), tools=_tools(), inputs=inputs)


@dataclass(frozen=True)
class _Settings:
    """How, not what: nothing of it shows in the output."""

    workers: int | None
    max_memory: int | None
    kernel: Choice
    executor: Executor
    ray_address: str | None


@dataclass(frozen=True)
class _Run:
    """A job on its way: what either executor needs."""

    job: _Job
    outputs: OutputShards
    journal: TensorJournal
    settings: _Settings
    progress: Callable[[str], None]

    def stream(self, kernel: Kernel | None, away: Away | None = None) -> Stream:
        """What is left of the job, to be converted by this kernel or elsewhere."""
        job = self.job
        return Stream(job.checkpoint, job.works, self.outputs, self.journal, kernel, away)


def _convert(
    job: _Job, writer: ArtifactWriter, settings: _Settings, progress: Callable[[str], None]
) -> tuple[list[LedgerEntry], Mapping[str, str]]:
    """Write all shards. Returns the ledger in the order of the source, and SHA-256 of each source file."""
    with TensorJournal(writer.scratch, _plan_digest(job)) as journal:
        firsts = {work.stored[0].name: name for name, work in job.works.items() if work.stored}
        outputs = OutputShards(job.shards, firsts, writer, journal)
        try:
            for name in outputs.named:
                progress(f"{name}: kept from an earlier run")
            if partly := len(outputs.kept) - _tensors_in(job.shards, outputs.named, firsts):
                progress(f"{partly} tensors of unfinished shards: kept from an earlier run")
            require_space(writer.path, outputs.remaining_bytes)
            run = _Run(job, outputs, journal, settings, progress)
            stream = _run_on_ray(run) if settings.executor == "ray" else _run_here(run)
        finally:
            outputs.close()
        done = journal.tensors
        entries = [entry for name in job.works if name in done and (entry := done[name].entry) is not None]
        return entries, stream.hashed


def _run_here(run: _Run) -> Stream:
    make_kernel = _kernel_maker(run.job, run.outputs, run.settings.kernel)
    kernel = make_kernel(progress=run.progress) if make_kernel else None
    workers = run.settings.workers or len(os.sched_getaffinity(0))
    memory = _memory_for_pieces(run.settings.max_memory, workers, _KERNEL_MEMORY)
    stream = run.stream(kernel)
    stream.run(workers, memory, run.progress, disk_rate=_disk_rate(run.job, run.outputs))
    return stream


def _disk_rate(job: _Job, outputs: OutputShards) -> float | None:
    """Bytes of source a second that the disks allow; None: not known, or not worth the second it takes."""
    folder = job.checkpoint.folder.path
    if folder is None or job.checkpoint.nbytes < _WORTH_PROBING:
        return None
    found = probe(folder / list(job.checkpoint.shards)[-1], outputs.scratch)
    written = sum(plan.nbytes for plan in job.shards)
    return found.bound(written / job.checkpoint.nbytes) if found else None


def _run_on_ray(run: _Run) -> Stream:
    from packager.quantize.ray_executor import MOST_TASKS, RayCluster

    settings = run.settings
    with RayCluster(settings.ray_address) as cluster:
        run.progress(cluster.title())
        tasks = min(settings.workers or 2 * cluster.cpus, MOST_TASKS)
        make_kernel = _kernel_maker(run.job, run.outputs, settings.kernel, sharers=cluster.cpus)
        away = cluster.conversion(run.job.checkpoint, make_kernel)
        memory = min(_memory_for_pieces(settings.max_memory, tasks, 0), cluster.object_bytes // 2)
        stream = run.stream(None, away)
        # A thread waits for each task; two more, for the chains of hashes.
        stream.run(tasks + 2, memory, run.progress)
        return stream


def _tensors_in(plans: list[ShardPlan], names: list[str], firsts: Mapping[str, str]) -> int:
    chosen = [plan for plan in plans if plan.name in names]
    return sum(spec.name in firsts for plan in chosen for spec in plan.tensors)


def _plan_digest(job: _Job) -> str:
    """Identity of the output's layout and of the arithmetic, for the tensor journal."""
    total = hashlib.sha256(job.spec.digest.encode())
    for plan in job.shards:
        total.update(plan.name.encode() + plan.header)
    return total.hexdigest()


def _kernel_maker(
    job: _Job, outputs: OutputShards, choice: Choice, sharers: int = 1
) -> Callable[..., Kernel] | None:
    """`choose_kernel` for what is left to be quantized by so many, `progress` still to be given; None where
    nothing is left."""
    left = [w.info for name, w in job.works.items() if w.band and name not in outputs.kept]
    if not left:
        return None
    return partial(
        choose_kernel,
        choice,
        job.scheme,
        dtypes={numpy_dtype(info.dtype).name for info in left},
        nbytes=sum(info.nbytes for info in left) // sharers,
    )


def _memory_for_pieces(max_memory: int | None, workers: int, each: int) -> int:
    """Bytes left for pieces once interpreter, torch and the temporaries of `each` worker have theirs."""
    useful = _useful_memory(workers)
    if max_memory is None:
        return useful
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = pages * os.sysconf("SC_PAGE_SIZE") + workers * each
    left = max_memory - held
    if left < 4 * PIECE_BYTES:
        raise UsageProblem(
            f"{readable_bytes(max_memory)} is too little memory for {workers} workers",
            f"Give --max-memory {readable_bytes(held + 8 * PIECE_BYTES)} or more, or fewer --workers.",
        )
    # The allocator keeps about as much again as is in use.
    return min(left // 2, useful)


def _useful_memory(workers: int) -> int:
    """More bytes of pieces than the workers can be busy with, and wait for, are of no use."""
    return (2 * workers + 2) * 2 * PIECE_BYTES


def dry_run(source: str | Path | Folder, spec: QuantizeSpec) -> DryRun:
    """What `quantize` would do, from headers alone. Raises as `quantize` does before it reads data."""
    job = _plan(source, spec)
    workers = len(os.sched_getaffinity(0))
    peak = min(DEFAULT_MAX_MEMORY, _TORCH_BYTES + workers * _KERNEL_MEMORY + 2 * _useful_memory(workers))
    layout = job.source.decisions.layout
    return plan_dry_run(job.checkpoint.name, spec.scheme, job.works, layout, job.shards, peak)


def _plan(source: str | Path | Folder, spec: QuantizeSpec) -> _Job:
    checkpoint = Checkpoint.open(source)
    decided = DecidedCheckpoint.of(checkpoint, rules=spec.rules, mtp=spec.mtp)
    scheme, decisions = scheme_of(spec), decided.decisions
    works = {
        name: _work(info, decisions.layout[name], decisions.do[name], scheme)
        for name, info in checkpoint.tensors.items()
    }
    _require_shapes(spec, scheme, works)
    shards = plan_shards((work.stored for work in works.values() if work.stored), spec.shard_bytes)
    return _Job(decided, spec, scheme, works, shards)


def _work(info: TensorInfo, want: Expected, do: Do, scheme: Scheme) -> TensorWork:
    if do is Do.DROP:
        return TensorWork(info, str(want.role), ())
    if do is Do.KEEP:
        return TensorWork(info, str(want.role), (TensorSpec(info.name, info.dtype, info.shape),))
    stored, constants = scheme.stored(want), scheme.constants(info.shape)
    return TensorWork(info, str(want.role), stored, scheme.rows, constants)


def _require_shapes(spec: QuantizeSpec, scheme: Scheme, works: Mapping[str, TensorWork]) -> None:
    """Raise BadInput, naming every weight that the scheme cannot store."""
    infos = [work.info for work in works.values() if work.band]
    lines = [
        f"{info.name} {list(info.shape)}: {spec.scheme} needs {why}"
        for info in infos
        if (why := scheme.objection(info.shape))
    ]
    if lines:
        raise BadInput(
            f"{len(lines)} weights do not fit the scheme:\n{listed(lines, limit=20)}",
            "Keep them as they are with a rule (--rule 'NAME=keep', quantize.rules in a recipe), together "
            "with what engines join to them, or choose another scheme.",
        )


def _metrics(job: _Job, ledger: list[LedgerEntry]) -> dict[str, Any]:
    parameters = count_parameters(job.source.model)
    return {
        "scheme": job.spec.scheme,
        "dialect": job.spec.dialect,
        "scale_rounding": job.spec.scale_rounding,
        "parameters": {
            "total": parameters.total,
            "float32": parameters.float32,
            "active": parameters.active,
            "left_out": sum(want.count for want in job.dropped),
        },
        "tensors": {
            "quantized": len(ledger),
            "kept": sum(bool(work.stored and not work.band) for work in job.works.values()),
            "left_out": len(job.dropped),
        },
        "bytes": {"source": job.checkpoint.nbytes, "written": sum(plan.nbytes for plan in job.shards)},
        "prediction_layers": job.source.prediction.document(),
        "fidelity": fidelity.by_role(ledger),
        "fidelity_by_layer": fidelity.by_layer(ledger),
    }


def _tools() -> dict[str, str]:
    return {"torch": metadata.version("torch")}
