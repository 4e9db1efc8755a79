"""A process that answers a spool's requests with states files that lie in a folder, and logs what it does.

`python spooled_states.py SOURCE SPOOL LOG MODE`: MODE `dies` ends it at the third request, `full` writes to a
full disk. A line of LOG is a request and, behind each file, the bytes that the spool then held.
"""

import json
import shutil
import sys
from pathlib import Path


def main(source: Path, spool: Path, log: Path, mode: str) -> None:
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        if mode == "dies" and number == 2:
            sys.exit("the engine has had enough")
        held = []
        for name in filter(None, request["states"]):
            part = spool / f"{name}.partial"
            if mode == "full":
                Path("/dev/full").write_bytes(b"states")
            shutil.copyfile(source / name.split("-")[1], part)
            held.append(sum(path.stat().st_size for path in spool.glob("*-*")))
            part.replace(spool / name)
        with log.open("a") as out:
            out.write(json.dumps({"states": request["states"], "held": held}) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
