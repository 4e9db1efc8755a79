"""`python -m validation.vllm_bench`: `vllm bench serve`, many times in one process.

The `vllm` command asks for the metadata of a distribution named `vllm`, which a CPU build does not have,
and it imports the whole engine for each run (about 10 s). This program imports the benchmark alone, once,
and then runs it for each line of standard input: a JSON array of `vllm bench serve` arguments. For each it
prints one line of JSON to standard output, {"ok": true} or {"error": …}; what the benchmark prints goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # A tokenizer's folder may name an architecture that only a plugin knows: without it the benchmark looks
    # for its config twice, with two seconds in between, in every run.
    load_general_plugins()
    print(json.dumps({"ok": True}), file=replies, flush=True)
    for line in sys.stdin:
        reply: dict[str, object] = {"ok": True}
        try:
            parser = FlexibleArgumentParser(prog="vllm bench serve")
            add_cli_args(parser)
            bench(parser.parse_args(json.loads(line)))
        except SystemExit as err:
            reply = {"error": f"vllm bench serve does not accept its arguments (exit {err.code})"}
        except Exception as err:  # whatever the benchmark raises is the answer to this one run
            reply = {"error": f"{type(err).__name__}: {err}"}
        sys.stdout.flush()
        print(json.dumps(reply), file=replies, flush=True)
    replies.flush()
    # Nothing is left to save, and the engine libraries spend seconds on tearing down.
    os._exit(0)


if __name__ == "__main__":
    main()
