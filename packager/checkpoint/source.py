"""A checkpoint directory: one safetensors file or shards with an index, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from packager.artifact import check, file_sha256, is_sealed
from packager.checkpoint.header import ShardHeader, TensorInfo, read_header
from packager.errors import BadInput, UsageProblem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SIDE_SUFFIXES = (".json", ".jinja", ".txt")
"""What goes with the weights: tokenizer, chat template, generation settings. Never code, never pickles."""
_NOT_SIDE = frozenset({INDEX_NAME, CONFIG_NAME, "manifest.json"})
_LISTED = 12


def locate(source: str | Path) -> Path:
    """The directory of a checkpoint named on the command line.

    Raises:
        UsageProblem: a hub name, which has to be downloaded first.
        BadInput: no such directory.
    """
    text = str(source)
    if "://" in text:
        name, _, revision = text.partition("://")[2].partition("@")
        pinned = f" --revision {revision}" if revision else ""
        raise UsageProblem(
            f"{text} is not on this machine",
            f"Run `hf download {name}{pinned}` and give the folder it prints.",
        )
    path = Path(text)
    if not path.exists():
        raise BadInput(f"no directory {path}", "Give the folder that holds config.json and *.safetensors.")
    if not path.is_dir():
        raise BadInput(
            f"{path} is not a directory", "Give the folder that holds config.json and *.safetensors."
        )
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises BadInput: missing, not JSON, a key twice, or no object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"no file {path}") from None
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"cannot read {path}: {err}") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def finite(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(text, object_pairs_hook=once, parse_constant=finite)
    except (ValueError, RecursionError) as err:
        raise BadInput(f"{path} is not sound JSON: {err}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} does not hold a JSON object")
    return document


def listed(problems: list[str]) -> str:
    """Problems one a line, the first dozen and the number of the rest."""
    lines = [f"  {problem}" for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"  … and {len(problems) - _LISTED} more")
    return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers are read and agree with the index; data is read on demand.

    `tensors` is ordered by shard name, then by position in the shard: reading in that order is sequential.
    """

    path: Path
    shards: dict[str, ShardHeader]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a directory.

        Raises:
            BadInput: no weights; a shard missing, truncated or unsound; index and shards disagree (all
                disagreements are listed).
            UsageProblem: a hub name.
        """
        path = locate(source)
        index, single = path / INDEX_NAME, path / SINGLE_NAME
        if index.is_file():
            return cls._sharded(path, _weight_map(index))
        if single.is_file():
            header = read_header(single)
            return cls(path, {SINGLE_NAME: header}, dict(header.tensors))
        remedy = "Give the folder that holds config.json and *.safetensors."
        if loose := sorted(path.glob("*.safetensors")):
            raise BadInput(
                f"{path} has {len(loose)} safetensors files but no {INDEX_NAME}",
                "Download the index file as well.",
            )
        pickles = [name.name for name in sorted(path.glob("*.bin"))]
        if pickles:
            raise BadInput(f"{path} holds pickled weights ({pickles[0]}), which are never loaded", remedy)
        raise BadInput(f"{path} is not a checkpoint: it has no {SINGLE_NAME} and no {INDEX_NAME}", remedy)

    @classmethod
    def _sharded(cls, path: Path, weight_map: dict[str, str]) -> Checkpoint:
        problems: list[str] = []
        shards: dict[str, ShardHeader] = {}
        for name in sorted(set(weight_map.values())):
            if not (path / name).is_file():
                problems.append(f"missing shard {name}")
                continue
            try:
                shards[name] = read_header(path / name)
            except BadInput as err:
                problems.append(err.message)
        for extra in sorted(path.glob("*.safetensors")):
            if extra.name not in set(weight_map.values()):
                problems.append(f"{extra.name} is not in the index")
        tensors: dict[str, TensorInfo] = {}
        for name, header in shards.items():
            for tensor, info in header.tensors.items():
                if tensor in tensors:
                    problems.append(f"{tensor} is in {tensors[tensor].shard} and in {name}")
                elif tensor not in weight_map:
                    problems.append(f"{tensor} is in {name} but not in the index")
                elif weight_map[tensor] != name:
                    problems.append(f"{tensor} is in {name}, the index says {weight_map[tensor]}")
                tensors.setdefault(tensor, info)
        for tensor, name in weight_map.items():
            if name in shards and tensor not in shards[name].tensors:
                problems.append(f"{tensor} is not in {name}, where the index has it")
        if problems:
            raise BadInput(
                f"the shards of {path} and its index do not agree:\n{listed(problems)}",
                "Download the checkpoint again; an interrupted download looks like this.",
            )
        return cls(path, shards, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """config.json as it stands. Raises BadInput: missing or not a JSON object."""
        return read_json_object(self.path / CONFIG_NAME)

    def side_files(self) -> list[Path]:
        """Files that travel with the weights unchanged (tokenizer, template, generation settings)."""
        return sorted(
            entry
            for entry in self.path.iterdir()
            if entry.is_file()
            and entry.suffix in SIDE_SUFFIXES
            and entry.name not in _NOT_SIDE
            and not entry.name.startswith(".")
        )

    def digest(self, hashed: Mapping[str, str] | None = None) -> str:
        """Identity of the checkpoint: of the manifest where it is a sealed artifact, else of all its bytes.

        Every byte is read, except of the files whose SHA-256 (file name -> bare hexadecimal) the caller gives
        as `hashed` because it has read them anyway. Raises IntegrityFailure where a sealed artifact was
        altered.
        """
        known = hashed or {}
        if is_sealed(self.path):
            return check(self.path, hashed=known).digest
        names = [CONFIG_NAME, INDEX_NAME, *self.shards]
        files = [*(self.path / name for name in names), *self.side_files()]
        total = hashlib.sha256()
        for file in sorted(file for file in files if file.is_file()):
            total.update(f"{known.get(file.name) or file_sha256(file)}  {file.name}\n".encode())
        return "sha256:" + total.hexdigest()

    def reader(self) -> TensorReader:
        """A reader of tensor data; use it in a `with` block."""
        return TensorReader(self)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map", "Download the index file again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: {tensor} points to {name!r}, which is no shard of this folder")
    return weight_map


class TensorReader:
    """Reads tensors by position, never more than is asked for; one file is open at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shard, self._handle = "", -1

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._shard, self._handle = "", -1

    def _switch(self, shard: str) -> None:
        if shard != self._shard:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
            try:
                self._handle = os.open(self._checkpoint.path / shard, os.O_RDONLY)
            except OSError as err:
                raise BadInput(f"cannot read {self._checkpoint.path / shard}: {err.strerror}") from None
            self._shard = shard

    def bytes(self, info: TensorInfo, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor's data, in fresh memory.

        Raises:
            BadInput: the file has become shorter since it was opened, or cannot be read.
        """
        import numpy as np

        end = info.nbytes if end is None else end
        self._switch(info.shard)
        out = np.empty(end - begin, dtype=np.uint8)
        view, position = out.data, self._checkpoint.shards[info.shard].data_start + info.begin + begin
        while view.nbytes:
            try:
                got = os.preadv(self._handle, [view], position)
            except OSError as err:
                raise BadInput(f"cannot read {self._checkpoint.path / info.shard}: {err.strerror}") from None
            if not got:
                raise BadInput(f"{self._checkpoint.path / info.shard} ended within {info.name}")
            view, position = view[got:], position + got
        return out

    def chunks(self, info: TensorInfo, limit: int = 1 << 26) -> Iterator[NDArray[np.uint8]]:
        """A tensor's data in pieces of at most `limit` bytes."""
        for begin in range(0, info.nbytes, limit):
            yield self.bytes(info, begin, min(begin + limit, info.nbytes))

    def array(self, info: TensorInfo) -> NDArray[Any]:
        """A whole tensor as numpy; BF16 and FP8 come as the types of `ml_dtypes`."""
        return self.bytes(info).view(numpy_dtype(info.dtype)).reshape(info.shape)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a safetensors dtype."""
    import ml_dtypes
    import numpy as np

    narrow: dict[str, Any] = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "BOOL": np.bool_,
    }
    name: Any = narrow.get(dtype) or f"<{dtype[0].lower()}{int(dtype[1:]) // 8}"
    found: np.dtype[Any] = np.dtype(name)
    return found
