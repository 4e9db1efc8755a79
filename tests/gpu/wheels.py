"""Wheels for a machine without internet: downloaded, cut into pieces that a transfer takes, joined there.

python tests/gpu/wheels.py download FOLDER             wheels.txt, for Python 3.12 on x86-64
python tests/gpu/wheels.py cut FOLDER PIECES --mib 58  one archive, in files of at most that size
python tests/gpu/wheels.py join PIECES TARGET          checked by SHA-256, then installed with pip --target
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 38, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
INDEX = "pieces.json"


def download(folder: Path) -> None:
    """Fetch wheels.txt as it stands, without dependencies."""
    platforms = [*PLATFORMS, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += ["--dest", str(folder), "--requirement", str(Path(__file__).with_name("wheels.txt"))]
    subprocess.run(command, check=True)


def cut(folder: Path, pieces: Path, mib: int) -> int:
    """Cut an archive of the folder into pieces; how many there are."""
    pieces.mkdir(parents=True, exist_ok=True)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for wheel in sorted(folder.glob("*.whl")):
            archive.add(wheel, wheel.name)
    data, digests = raw.getbuffer(), []
    for number, start in enumerate(range(0, len(data), mib << 20)):
        part = data[start : start + (mib << 20)]
        (pieces / f"{number:03d}").write_bytes(part)
        digests.append(hashlib.sha256(part).hexdigest())
    (pieces / INDEX).write_text(json.dumps(digests))
    return len(digests)


def join(pieces: Path, target: Path) -> None:
    """Join pieces that have all come, install their wheels. Raises SystemExit: one is missing or spoiled."""
    digests = json.loads((pieces / INDEX).read_text())
    raw = io.BytesIO()
    for number, digest in enumerate(digests):
        file = pieces / f"{number:03d}"
        if not file.exists():
            raise SystemExit(f"piece {number:03d} of {len(digests)} is missing: send it, then join again")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise SystemExit(f"piece {number:03d} is spoiled: send it again")
        raw.write(data)
    raw.seek(0)
    wheels = target.with_name(target.name + "-wheels")
    with tarfile.open(fileobj=raw) as archive:
        archive.extractall(wheels, filter="data")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--target", str(target), *map(str, sorted(wheels.glob("*.whl")))]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("download").add_argument("folder", type=Path)
    cutting = verbs.add_parser("cut")
    cutting.add_argument("folder", type=Path)
    cutting.add_argument("pieces", type=Path)
    cutting.add_argument("--mib", type=int, default=58)
    joining = verbs.add_parser("join")
    joining.add_argument("pieces", type=Path)
    joining.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.verb == "download":
        download(options.folder)
    elif options.verb == "cut":
        print(cut(options.folder, options.pieces, options.mib), "pieces")
    else:
        join(options.pieces, options.target)


if __name__ == "__main__":
    main()
