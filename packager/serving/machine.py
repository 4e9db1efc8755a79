"""What this machine serves with: its GPUs as nvidia-smi lists them, and the main memory that is free."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
_TIMEOUT_S = 30.0
"""A driver without persistence mode wakes eight GPUs in ten seconds."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; sizes in bytes, None where the driver does not say (GPUs that share the main memory)."""

    index: int
    """As nvidia-smi counts: by PCI bus."""
    uuid: str
    name: str
    memory: int | None
    free: int | None
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True)
class Machine:
    """What can be served with."""

    gpus: tuple[Gpu, ...]
    """In the order that the engine takes them in."""
    memory: int
    """Bytes of main memory that are available; 0: not known."""
    trouble: str = ""
    """Why no GPU could be listed."""


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs of `nvidia-smi --query-gpu=… --format=csv`: a header, then a line a GPU.

    Columns may come in any order and with or without units; `[N/A]`, `[Not Supported]` and columns that are
    missing give None. What is no such table gives no GPU.
    """
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    header = [name.partition(" [")[0].strip() for name in next(rows, [])]
    if "name" not in header:
        return ()
    found = []
    for position, row in enumerate(rows):
        if len(row) != len(header):
            continue
        said = {name: value.strip() for name, value in zip(header, row, strict=True)}
        index = said.get("index", "")
        capability = re.fullmatch(r"(\d+)\.(\d+)", said.get("compute_cap", ""))
        found.append(
            Gpu(
                index=int(index) if index.isdecimal() else position,
                uuid=said.get("uuid", ""),
                name=said["name"],
                memory=_mebibytes(said.get("memory.total", "")),
                free=_mebibytes(said.get("memory.free", "")),
                compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
            )
        )
    return tuple(found)


def _mebibytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d+)(?: MiB)?", text)
    return int(match[1]) * _MIB if match else None


def visible(gpus: tuple[Gpu, ...], devices: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; up to the first that is unknown, as CUDA.

    None: all. MIG devices are known to nobody here: they leave none.
    """
    if devices is None:
        return gpus
    left: list[Gpu] = []
    for name in (part.strip() for part in devices.split(",")):
        by_uuid = [gpu for gpu in gpus if name.startswith("GPU-") and gpu.uuid.startswith(name)]
        matching = by_uuid or [gpu for gpu in gpus if name == str(gpu.index)]
        if not matching:
            break
        left.append(matching[0])
    return tuple(left)


def list_gpus() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs of this machine that may be used, and why there is none."""
    fields = list(_FIELDS)
    while True:
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            return (), "there is no nvidia-smi here"
        except (OSError, subprocess.TimeoutExpired) as err:
            return (), f"nvidia-smi does not answer ({type(err).__name__})"
        said = f"{done.stdout}\n{done.stderr}"
        # Drivers before 470 do not know compute_cap.
        unknown = re.search(r'Field "([\w.]+)" is not a valid field', said)
        if unknown is None or unknown[1] not in fields:
            break
        fields.remove(unknown[1])
    found = parse_nvidia_smi(done.stdout)
    if done.returncode or not found:
        first = next((line.strip() for line in said.splitlines() if line.strip()), "nothing")
        return (), f"nvidia-smi says: {first}"
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    left = visible(found, devices)
    return left, "" if left else f"CUDA_VISIBLE_DEVICES={devices} leaves none of the {len(found)} GPUs"


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that a new process may take: what the kernel has, and what a container is left.

    0: neither says.
    """
    room = []
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
        room += [int(match[1]) * 1024] if match else []
    except OSError:
        pass
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        cached = re.search(
            r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text(encoding="ascii"), re.MULTILINE
        )
        if limit.isdecimal():  # else "max"
            room.append(max(0, int(limit) - used + (int(cached[1]) if cached else 0)))
    except (OSError, ValueError):
        pass
    return min(room, default=0)


def this_machine() -> Machine:
    """The machine that this runs on."""
    gpus, trouble = list_gpus()
    return Machine(gpus, available_memory(), trouble)
