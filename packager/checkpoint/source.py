"""A checkpoint: one safetensors file or shards with an index, in a directory or on a hub, read by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from packager.checkpoint.folder import Folder, LocalFolder, OpenFile, combined_digest, read_json_object
from packager.checkpoint.header import ShardHeader, TensorInfo
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
__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SIDE_SUFFIXES",
    "SINGLE_NAME",
    "Checkpoint",
    "SideFile",
    "TensorReader",
    "listed",
    "locate",
    "numpy_dtype",
    "open_folder",
    "read_json_object",
]


_REMEDY = "Give the folder that holds config.json and *.safetensors."


def locate(source: str | Path) -> Path:
    """The directory of a checkpoint named on the command line, for what needs its files on this machine.

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
        raise BadInput(f"no directory {path}", _REMEDY)
    if not path.is_dir():
        raise BadInput(f"{path} is not a directory", _REMEDY)
    return path


def open_folder(source: str | Path) -> Folder:
    """The files behind SOURCE: a directory, a hub cache snapshot, or `hf://org/name@revision`.

    Raises:
        UsageProblem: a malformed hub name, or a scheme other than hf.
        BadInput: no such directory.
        RemoteFailure: the hub does not answer, or has no such repository or revision.
    """
    from packager.checkpoint.hub_name import HubName

    name = HubName.parse(source)
    if name is None:
        return LocalFolder(locate(source))
    from packager.checkpoint.hub import HubFolder

    return HubFolder(name)


def listed(problems: list[str], limit: int = 12) -> str:
    """Problems one a line, the first of them and the number of the rest."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit} more")
    return "\n".join(lines)


@dataclass(frozen=True)
class SideFile:
    """A small file that travels with the weights unchanged."""

    name: str
    folder: Folder

    def read_bytes(self) -> bytes:
        """Its content. Raises as `Folder.read`."""
        return self.folder.read(self.name)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers are read and agree with the index; data is read on demand.

    `tensors` is ordered by shard name, then by position in the shard: reading in that order is sequential.
    May be used from many threads, each with a reader of its own.
    """

    folder: Folder
    shards: dict[str, ShardHeader]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, source: str | Path | Folder) -> Checkpoint:
        """Open a directory, a hub cache snapshot, or `hf://org/name@revision`; only headers are read.

        Raises:
            BadInput: no weights; a shard missing, truncated or unsound; index and shards disagree (all
                disagreements are listed).
            UsageProblem: a malformed hub name.
            RemoteFailure: the hub does not answer, or has no such repository or revision.
        """
        folder = source if isinstance(source, Folder) else open_folder(source)
        files = folder.sizes()
        if INDEX_NAME in files:
            return cls._sharded(folder, _weight_map(folder))
        if SINGLE_NAME in files:
            header = folder.headers([SINGLE_NAME])[SINGLE_NAME]
            if isinstance(header, BadInput):
                raise header
            return cls(folder, {SINGLE_NAME: header}, dict(header.tensors))
        loose = [name for name in files if name.endswith(".safetensors")]
        if loose:
            raise BadInput(
                f"{folder.name} has {len(loose)} safetensors files but no {INDEX_NAME}",
                "Download the index file as well.",
            )
        pickles = sorted(name for name in files if name.endswith(".bin"))
        if pickles:
            raise BadInput(
                f"{folder.name} holds pickled weights ({pickles[0]}), which are never loaded", _REMEDY
            )
        raise BadInput(
            f"{folder.name} is not a checkpoint: it has no {SINGLE_NAME} and no {INDEX_NAME}", _REMEDY
        )

    @classmethod
    def _sharded(cls, folder: Folder, weight_map: dict[str, str]) -> Checkpoint:
        files, named = folder.sizes(), set(weight_map.values())
        problems = [f"missing shard {name}" for name in sorted(named - files.keys())]
        shards: dict[str, ShardHeader] = {}
        for name, found in folder.headers(sorted(named & files.keys())).items():
            if isinstance(found, BadInput):
                problems.append(found.message)
            else:
                shards[name] = found
        extra = sorted(name for name in files if name.endswith(".safetensors") and name not in named)
        problems.extend(f"{name} is not in the index" for name in extra)
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
                f"the shards of {folder.name} and its index do not agree:\n{listed(problems)}",
                "Download the checkpoint again; an interrupted download looks like this.",
            )
        return cls(folder, shards, tensors)

    @property
    def name(self) -> str:
        """As messages and records call it: the path, or `hf://org/name@commit` with the whole commit."""
        return self.folder.name

    @property
    def path(self) -> Path:
        """The directory. Raises UsageProblem: the checkpoint is read from a hub and has none."""
        if self.folder.path is None:
            return locate(self.folder.name)
        return self.folder.path

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        # Each header has been checked to describe exactly the data of its file.
        return sum(header.size - header.data_start for header in self.shards.values())

    def config(self) -> dict[str, Any]:
        """config.json as it stands. Raises BadInput: missing or not a JSON object."""
        return self.folder.json(CONFIG_NAME)

    def side_files(self) -> list[SideFile]:
        """Files that travel with the weights unchanged (tokenizer, template, generation settings)."""
        return [
            SideFile(name, self.folder)
            for name in sorted(self.folder.sizes())
            if name.endswith(SIDE_SUFFIXES) and name not in _NOT_SIDE and not name.startswith(".")
        ]

    def digest(self, hashed: Mapping[str, str] | None = None) -> str:
        """Identity of the checkpoint: of the manifest where it is a sealed artifact, else of all its bytes.

        The same files give the same digest wherever they lie. In a directory every byte is read, except of
        the files whose SHA-256 (file name -> bare hexadecimal) the caller gives as `hashed` because it has
        read them anyway. Of a hub repository only small files are: the hub states the SHA-256 of each weight
        file, and what is read later is held against it.

        Raises:
            IntegrityFailure: a sealed artifact was altered, or the hub gave other bytes than it announced.
            BadInput: a file vanished or has changed since the checkpoint was opened.
            RemoteFailure: the hub does not give a file.
        """
        known = hashed or {}
        if manifest := self.folder.manifest(deep=True, hashed=known):
            return manifest.digest
        side = [file.name for file in self.side_files()]
        files = ({CONFIG_NAME, INDEX_NAME} & self.folder.sizes().keys()) | {*self.shards, *side}
        return combined_digest({name: known.get(name) or self.folder.sha256(name) for name in sorted(files)})

    def reader(self) -> TensorReader:
        """A reader of tensor data; use it in a `with` block."""
        return TensorReader(self)


def _weight_map(folder: Folder) -> dict[str, str]:
    index = folder.where(INDEX_NAME)
    weight_map = folder.json(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map", "Download the index file again.")
    names = list(weight_map.values())
    for name in set(names) if all(isinstance(name, str) for name in names) else [None]:
        if name is None or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index} points to {name!r:.200}, which is no shard of this folder")
    return weight_map


class TensorReader:
    """Reads tensors by position, never more than is asked for; one file is open at a time.

    Of a hub's file a run of reads, each beginning where the one before ended, goes over one connection.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shard = ""
        self._file: OpenFile | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._shard, self._file = "", None

    def _open(self, shard: str) -> OpenFile:
        if self._file is None or shard != self._shard:
            self._close()
            self._shard, self._file = shard, self._checkpoint.folder.open(shard)
        return self._file

    def bytes(self, info: TensorInfo, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor's data, in fresh memory.

        Raises:
            BadInput: the file cannot be read, or has changed since the checkpoint was opened.
            RemoteFailure: the hub does not give the bytes, after several attempts.
            IntegrityFailure: the hub gave other bytes than it announced.
        """
        import numpy as np

        out = np.empty((info.nbytes if end is None else end) - begin, dtype=np.uint8)
        start = self._checkpoint.shards[info.shard].data_start + info.begin + begin
        self._open(info.shard).fill(out.data, start)
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
