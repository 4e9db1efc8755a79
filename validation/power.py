"""Power while something runs, if this machine tells it: GPUs by nvidia-smi, else processors by RAPL."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

from validation.document import Document

POWERCAP = Path("/sys/class/powercap")
SAMPLE_MS = 200


class Power(Document):
    """Mean power over a span."""

    watts: float
    of: str
    """Whose power, and who says so."""


class PowerMeter:
    """Context manager around what is measured; `power` afterwards, None: nothing tells it.

    GPUs are those of CUDA_VISIBLE_DEVICES, or all: their mean is that of samples every `SAMPLE_MS`, which the
    driver itself averages over some tens of milliseconds. A processor's is an energy counter's difference;
    the kernel shows it to root alone on most machines. Whatever else draws power meanwhile is in it.
    """

    def __init__(self, *, powercap: Path = POWERCAP, nvidia_smi: str = "nvidia-smi") -> None:
        self.power: Power | None = None
        self._powercap, self._program = powercap, shutil.which(nvidia_smi)
        self._process: subprocess.Popen[str] | None = None
        self._samples: dict[str, list[float]] = {}
        self._reader: threading.Thread | None = None
        self._before: dict[Path, int] = {}
        self._began = 0.0

    def __enter__(self) -> PowerMeter:
        self.power = None
        self._samples = {}
        if self._program is not None:
            wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
            chosen = ["-i", wanted] if wanted else []
            query = ["--query-gpu=index,power.draw", "--format=csv,noheader,nounits", "-lms", str(SAMPLE_MS)]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [self._program, *chosen, *query],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
                self._reader.start()
        self._before = self._counters()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        after = self._counters()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            if self._reader is not None:
                self._reader.join(timeout=2)
            self._process = None
        means = [sum(values) / len(values) for values in self._samples.values()]
        if means:
            many = "1 GPU" if len(means) == 1 else f"{len(means)} GPUs"
            self.power = Power(watts=sum(means), of=f"{many}, nvidia-smi")
        elif self._before and self._before.keys() <= after.keys() and seconds > 0:
            used = [self._difference(zone, self._before[zone], after[zone]) for zone in self._before]
            joules = sum(microjoules for microjoules in used if microjoules is not None) / 1e6
            if None not in used:
                many = "1 processor" if len(used) == 1 else f"{len(used)} processors"
                self.power = Power(watts=joules / seconds, of=f"{many}, RAPL")

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            index, _, watts = line.partition(",")
            with contextlib.suppress(ValueError):  # [N/A] on cards that do not tell
                self._samples.setdefault(index.strip(), []).append(float(watts))

    def _counters(self) -> dict[Path, int]:
        """Microjoules by package; empty if there are none or we may not read them."""
        found = {}
        # Packages alone: the domains within (core, dram) are parts of them.
        for zone in sorted(self._powercap.glob("intel-rapl:[0-9]*")):
            if zone.name.count(":") != 1:
                continue
            try:
                if (zone / "name").read_text().startswith("package"):
                    found[zone] = int((zone / "energy_uj").read_text())
            except (OSError, ValueError):
                return {}
        return found

    @staticmethod
    def _difference(zone: Path, before: int, after: int) -> int | None:
        """The counter wraps around at a value of its own; None: it did, and does not say where."""
        if after >= before:
            return after - before
        with contextlib.suppress(OSError, ValueError):
            return after - before + int((zone / "max_energy_range_uj").read_text())
        return None
