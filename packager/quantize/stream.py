"""The conversion stream: reads, conversion, hashing and writes overlap, in memory that does not grow.

The source is cut, in the order of its bytes, into *pieces* of a few megabytes: of a weight that is quantized,
rows that share no scale with others; of one that is kept, any bytes. Worker threads take pieces in that
order, read and convert them and write the result to its place in the output shard; pieces overtake one
another here. Two chains then follow in strict order, each on whichever worker is free: the SHA-256 of the
source files, and that of the output shards. When both have passed the last piece of a tensor, the tensor is
finished and goes into the journal; when a shard's last tensor is finished, the calling thread gives the shard
its name.

How the source is cut depends on shapes alone, so the number of workers, the memory they may use and an
interruption leave no trace in the output. The kernel, hashlib, reads and writes release the interpreter's
lock; each worker is one thread of computation.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from packager.checkpoint.header import TensorInfo, readable_bytes
from packager.checkpoint.source import Checkpoint, TensorReader, numpy_dtype
from packager.checkpoint.writer import TensorSpec
from packager.errors import BadInput, IntegrityFailure
from packager.quantize.fidelity import Figures, LedgerEntry
from packager.quantize.journal import FinishedFile, FinishedTensor, TensorJournal
from packager.quantize.kernel import Kernel
from packager.quantize.output import OutputShards, Place
from packager.quantize.source_files import header_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

PIECE_BYTES = 8 << 20
"""Source bytes of a piece, where a row of blocks is not larger."""
_PROGRESS_SECONDS = 5.0
_Chain = Literal["source", "output"]


class SourceChanged(Exception):
    """Bytes from which finished tensors were made are other ones now. The message names the file."""


@dataclass(frozen=True)
class TensorWork:
    """What becomes of one tensor of the source."""

    info: TensorInfo
    role: str
    stored: tuple[TensorSpec, ...]
    """The tensors it becomes, in the order of their data: itself, or codes, scales and the like. Empty: it
    is left out."""
    band: int = 0
    """Rows that are quantized together; 0: the tensor keeps its bytes."""
    constants: bytes = b""
    """Data of what is stored after the scales."""


@dataclass(frozen=True)
class Converted:
    """What was read, and what it became. All of it can be sent from one process to another."""

    source: Bytes | None
    """As read; None: nobody asked for it."""
    output: list[Bytes]
    """The weight as written, in order; nothing where nothing is written."""
    scales: list[Bytes]
    """Follow the weight once all of it is there."""
    figures: list[Figures]


class Away(Protocol):
    """Converts on other machines. The chains, the journal and the output stay here."""

    def convert(self, work: TensorWork, begin: int, end: int, *, written: bool, hashed: bool) -> Converted:
        """As `convert_part`, elsewhere; called from many threads, each of which waits for its result."""

    def news(self) -> list[str]:
        """What has happened since the last call, a line each."""

    def stop(self) -> None:
        """Nothing more is wanted: calls of `convert` that wait end in any exception."""


@dataclass
class _Piece:
    """Some bytes of the source on their way: filled by the conversion, emptied by the chains."""

    shard: str
    work: TensorWork | None
    """None: the header of the shard."""
    begin: int
    end: int
    """Bytes of the tensor's data, or of the file for a header."""
    place: Place | None
    """None: nothing is to be written, only hashed."""
    hashed: bool
    """Whether the source file's digest is still to be found."""
    ends_tensor: bool
    ends_file: bool = False
    source: memoryview | bytes | None = None
    output: list[memoryview] = field(default_factory=list)
    scales: list[memoryview] = field(default_factory=list)
    figures: list[Figures] = field(default_factory=list)
    ready: bool = False
    passed: int = 0
    """Chains that are through with it."""
    source_digest: str | None = None
    """Of the file up to the end of this piece; on a tensor's last piece."""
    output_digest: str | None = None
    entry: LedgerEntry | None = None

    @property
    def cost(self) -> int:
        """Bytes of memory until both chains have passed: what was read, and what it became."""
        return (self.end - self.begin) * (2 if self.place else 1)


class Stream:
    """One conversion, or the rest of one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        works: Mapping[str, TensorWork],
        outputs: OutputShards,
        journal: TensorJournal,
        kernel: Kernel | None,
        away: Away | None = None,
    ) -> None:
        """Nothing happens until `run`.

        Args:
            checkpoint: the source.
            works: every tensor of it, by name.
            outputs: where results go, and which are there.
            journal: of this output.
            kernel: None where no weight is left to be quantized.
            away: who converts instead of the threads of `run`, which then only hash and write.
        """
        self._away = away
        self._checkpoint, self._works = checkpoint, works
        self._outputs, self._journal, self._kernel = outputs, journal, kernel
        self._identities = {shard: checkpoint.folder.identity(shard) for shard in checkpoint.shards}
        self.hashed: dict[str, str] = {
            name: file.sha256
            for name, file in journal.files.items()
            if self._identities.get(name) == file.identity
        }
        """File name -> SHA-256 of source files; of all of them once `run` has returned."""
        self._changed = threading.Condition()
        self._pieces = self._cut()
        self._upcoming: _Piece | None = next(self._pieces, None)
        self._flight: deque[_Piece] = deque()
        """Pieces begun and not passed by both chains; the first of them has the number `_first`."""
        self._first = 0
        self._next: dict[_Chain, int] = {"source": 0, "output": 0}
        self._busy: dict[_Chain, bool] = {"source": False, "output": False}
        self._in_flight = 0
        self._budget = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._unnamed: deque[str] = deque(outputs.unnamed)
        self._source_sha = hashlib.sha256()
        self._scales: list[memoryview] = []
        self._figures: list[Figures] = []
        self._bytes_done = 0
        self._current = ""

    # ---- what is to be done ---------------------------------------------------------------------------

    def _cut(self) -> Iterator[_Piece]:
        """All pieces, in the order of the source's bytes; bytes that nothing needs are left out."""
        for shard, header in self._checkpoint.shards.items():
            hashed = shard not in self.hashed
            waiting: _Piece | None = None
            if hashed:
                waiting = _Piece(shard, None, 0, header.data_start, None, True, False)
            for info in header.tensors.values():
                work = self._works[info.name]
                place = None if info.name in self._outputs.kept else self._outputs.places.get(info.name)
                if place is None and not hashed:
                    continue
                step = _piece_bytes(work)
                for begin in range(0, max(info.nbytes, 1), step):
                    if waiting:
                        yield waiting
                    end = min(begin + step, info.nbytes)
                    waiting = _Piece(shard, work, begin, end, place, hashed, end == info.nbytes)
            if waiting:
                waiting.ends_file = True
                yield waiting

    def _bytes_to_pass(self) -> int:
        return sum(piece.end - piece.begin for piece in self._cut())

    # ---- the calling thread ---------------------------------------------------------------------------

    def run(
        self,
        workers: int,
        memory: int,
        progress: Callable[[str], None],
        *,
        disk_rate: float | None = None,
    ) -> None:
        """Do all of it, with this many threads.

        Args:
            workers: threads; each converts, hashes, reads and writes.
            memory: bytes that pieces on their way may take; one piece is always let through.
            progress: called on this thread with a line a shard and one every few seconds.
            disk_rate: bytes of source a second that the disks allow, to compare with; None: not known.

        Raises:
            BadInput: NaN or infinity (named, with its position); the source changed while it was read; the
                disk is full.
            SourceChanged: finished tensors were made from other bytes.
        """
        self._budget = memory
        total, began, spoke = self._bytes_to_pass(), time.monotonic(), time.monotonic()
        threads = [threading.Thread(target=self._work, name=f"quantize-{n}") for n in range(workers)]
        for thread in threads:
            thread.start()
        try:
            while (shard := self._wait()) is not None:
                if shard:
                    entry = self._outputs.finish(shard)
                    progress(f"{shard}: {readable_bytes(entry.size)}")
                self._outputs.write_back()
                for line in self._away.news() if self._away else ():
                    progress(line)
                if time.monotonic() - spoke >= _PROGRESS_SECONDS:
                    spoke = time.monotonic()
                    progress(self._status(total, spoke - began, disk_rate))
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            if self._away:
                self._away.stop()
            for thread in threads:
                thread.join()
            self._outputs.close()
        if self._failure is not None:
            raise self._failure
        for line in self._away.news() if self._away else ():
            progress(line)

    def _wait(self) -> str | None:
        """A shard to be named, "" after a while without one, None at the end."""
        with self._changed:
            if self._failure is None and not self._unnamed and not self._stopped:
                self._changed.wait(timeout=1.0)
            if self._failure is not None:
                return None
            if self._unnamed:
                return self._unnamed.popleft()
            return None if self._stopped else ""

    def _status(self, total: int, seconds: float, disk_rate: float | None) -> str:
        done, current = self._bytes_done, self._current
        rate = done / seconds
        left = f", {_duration((total - done) / rate)} left" if done else ""
        speed = f"{readable_bytes(int(rate))}/s"
        if disk_rate is not None:
            speed += f" of {readable_bytes(int(disk_rate))}/s that the disks allow"
        return f"{readable_bytes(done)} of {readable_bytes(total)}, {speed}{left}: {current}"

    # ---- worker threads -------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if self._kernel:
                self._kernel.enter_thread()
            with self._checkpoint.reader() as reader:
                while (task := self._next_task()) is not None:
                    what, piece = task
                    if what == "convert":
                        self._convert(reader, piece)
                    elif what == "source":
                        self._pass_source(piece)
                    else:
                        self._pass_output(piece)
                    self._report(what, piece)
        except BaseException as err:
            with self._changed:
                self._failure = self._failure or err
                self._stopped = True
                self._changed.notify_all()

    def _next_task(self) -> tuple[_Chain | Literal["convert"], _Piece] | None:
        """What to do next, chains first: what they have passed gives memory free."""
        chains: tuple[_Chain, ...] = ("output", "source")
        with self._changed:
            while not self._stopped:
                for chain in chains:
                    number = self._next[chain] - self._first
                    if not self._busy[chain] and number < len(self._flight) and self._flight[number].ready:
                        self._busy[chain] = True
                        return chain, self._flight[number]
                piece = self._upcoming
                if piece and (not self._in_flight or self._in_flight + piece.cost <= self._budget):
                    if piece.place:
                        self._outputs.opened(piece.place.shard)
                    self._upcoming = next(self._pieces, None)
                    self._flight.append(piece)
                    self._in_flight += piece.cost
                    return "convert", piece
                if piece is None and not self._flight:
                    self._stopped = True
                    self._changed.notify_all()
                    break
                self._changed.wait()
        return None

    def _report(self, what: _Chain | Literal["convert"], piece: _Piece) -> None:
        """Take note of a task that is done."""
        with self._changed:
            if what == "convert":
                piece.ready = True
            else:
                self._busy[what] = False
                self._next[what] += 1
                piece.passed += 1
                if piece.passed == 2:
                    self._flight.popleft()
                    self._first += 1
                    self._in_flight -= piece.cost
                    self._finish(piece)
            self._changed.notify_all()

    def _convert(self, reader: TensorReader, piece: _Piece) -> None:
        """Read, convert and write one piece."""
        if piece.work is None:
            piece.source = header_bytes(self._checkpoint, piece.shard)
            return
        info, written, hashed = piece.work.info, piece.place is not None, piece.hashed
        if self._away:
            found = self._away.convert(piece.work, piece.begin, piece.end, written=written, hashed=hashed)
        else:
            found = convert_part(
                reader, self._kernel, piece.work, piece.begin, piece.end, written=written, hashed=hashed
            )
        if piece.place:
            shard = self._outputs.opened(piece.place.shard)
            position = piece.place.begin + piece.begin
            if piece.work.band:
                position = piece.place.begin + piece.begin * piece.work.stored[0].nbytes // info.nbytes
            piece.output = [part.data for part in found.output]
            piece.scales = [scales.data for scales in found.scales]
            piece.figures = found.figures
            for part in piece.output:
                shard.write(part, position)
                position += part.nbytes
        if found.source is not None:
            piece.source = found.source.data

    def _pass_source(self, piece: _Piece) -> None:
        if not piece.hashed:
            return
        if piece.work is None:
            self._source_sha = hashlib.sha256()
        assert piece.source is not None
        self._source_sha.update(piece.source)
        piece.source = None
        if piece.ends_tensor or piece.ends_file:
            piece.source_digest = self._source_sha.copy().hexdigest()

    def _pass_output(self, piece: _Piece) -> None:
        if piece.place is None:
            return
        shard = self._outputs.opened(piece.place.shard)
        for part in piece.output:
            shard.passed(part)
        piece.output = []
        self._scales += piece.scales
        self._figures += piece.figures
        if not piece.ends_tensor:
            return
        assert piece.work is not None
        position = piece.place.rest_begin
        for part in (*self._scales, memoryview(piece.work.constants)):
            shard.write(part, position)
            shard.passed(part)
            position += part.nbytes
        if self._figures:
            info = piece.work.info
            total = Figures.total(self._figures)
            piece.entry = LedgerEntry.of(info.name, piece.work.role, info.shape, total)
        self._scales, self._figures = [], []
        piece.output_digest = shard.sha256()

    def _finish(self, piece: _Piece) -> None:
        """Both chains have passed a piece. Called in order, one piece at a time."""
        self._bytes_done += piece.end - piece.begin
        if piece.work and piece.ends_tensor:
            self._finish_tensor(piece, piece.work)
        if piece.ends_file and piece.hashed:
            self._finish_file(piece)
        if piece.place and piece.ends_tensor and piece.place.last:
            self._unnamed.append(piece.place.shard)

    def _finish_tensor(self, piece: _Piece, work: TensorWork) -> None:
        name = self._current = work.info.name
        earlier = self._journal.tensors.get(name)
        if earlier and earlier.source and piece.hashed and earlier.source != piece.source_digest:
            raise SourceChanged(f"{piece.shard} (up to {name})")
        if piece.place or earlier is None:
            source = piece.source_digest or (earlier.source if earlier else None)
            self._journal.add_tensor(FinishedTensor(name, source, piece.output_digest, piece.entry))

    def _finish_file(self, piece: _Piece) -> None:
        folder = self._checkpoint.folder
        if folder.identity(piece.shard) != self._identities[piece.shard]:
            raise BadInput(
                f"{folder.where(piece.shard)} changed while it was read",
                "Run the same command again when nothing writes to the source.",
            )
        assert piece.source_digest is not None
        if folder.stated_sha256(piece.shard) not in (None, piece.source_digest):
            raise IntegrityFailure(
                f"the bytes of {folder.where(piece.shard)} are not those that the hub lists",
                "Run the same command again; if it happens again, something on the way alters them.",
            )
        earlier = self._journal.files.get(piece.shard)
        if earlier and earlier.sha256 != piece.source_digest:
            raise SourceChanged(piece.shard)
        self.hashed[piece.shard] = piece.source_digest
        self._journal.add_file(FinishedFile(piece.shard, piece.source_digest, self._identities[piece.shard]))


def convert_part(
    reader: TensorReader,
    kernel: Kernel | None,
    work: TensorWork,
    begin: int,
    end: int,
    *,
    written: bool,
    hashed: bool,
) -> Converted:
    """Read bytes [begin, end) of a tensor and convert them, on this thread.

    Args:
        reader: of the source.
        kernel: None where nothing is to be quantized.
        work: the tensor.
        begin: where it is quantized, the first byte of a row of blocks.
        end: likewise, or the end of the tensor.
        written: whether the result is wanted.
        hashed: whether the bytes read are.

    Raises:
        BadInput: NaN or infinity (named, with its position), or as the reader raises.
    """
    data = reader.bytes(work.info, begin, end)
    source = data if hashed else None
    if not written:
        return Converted(source, [], [], [])
    if not work.band:
        refuse_nonfinite(work.info, data, begin)
        return Converted(source, [data], [], [])
    assert kernel is not None
    slabs = kernel(data.view(numpy_dtype(work.info.dtype)).reshape(-1, work.info.shape[1]))
    if slabs is None:
        refuse_nonfinite(work.info, data, begin)
        raise RuntimeError(f"{work.info.name}: overflow in float32")
    return Converted(
        source,
        [slab.codes for slab in slabs],
        [slab.scales.view("u1") for slab in slabs],
        [slab.figures for slab in slabs],
    )


def _piece_bytes(work: TensorWork) -> int:
    """Bytes of a piece of this tensor: whole bands of rows where it is quantized."""
    if not work.band:
        return PIECE_BYTES
    band = work.info.nbytes // work.info.shape[0] * work.band
    return max(PIECE_BYTES // band, 1) * band


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600} h {whole % 3600 // 60} min"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02} min"
    )


def refuse_nonfinite(info: TensorInfo, chunk: NDArray[np.uint8], begin: int) -> None:
    """Raise BadInput at the first NaN or infinity in `chunk`, which starts at byte `begin` of the tensor."""
    import numpy as np

    # All exponent bits set: the test is on bits, so it costs one pass and no conversion.
    kind, exponent = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}[info.dtype]
    bits = chunk.view(kind)
    bad = (bits & exponent) == exponent
    if not bad.any():
        return
    first = int(bad.argmax())
    position = np.unravel_index(begin // bits.itemsize + first, info.shape)
    what = "infinity" if int(bits[first]) & (exponent ^ (2 ** (8 * bits.itemsize - 1) - 1)) == 0 else "NaN"
    raise BadInput(
        f"{info.name}[{', '.join(str(int(axis)) for axis in position)}] is {what} (in {info.shard})",
        "The source checkpoint is damaged: download that shard again.",
    )
