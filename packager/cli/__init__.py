"""The `packager` command: one file a verb, each imported only when it is called.

Data goes to stdout, everything else to stderr. This package is the only code that prints or exits.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from packager import __version__
from packager.errors import PackagerError

# The help texts stand here so that `packager --help` imports no verb.
VERBS: dict[str, str] = {
    "inspect": "What this checkpoint is, and what is wrong with it.",
    "plan": "Will it fit; a bound on speed; the exact serve command.",
    "release": "Run a recipe: every stage in order, skipping what is done.",
    "quantize": "Weights to FP8, INT8 or INT4, at the speed of the disk, in little memory.",
    "calibrate": "Weights to four bits with calibration data: GPTQ, AWQ, NVFP4, MXFP4.",
    "dequantize": "Quantized weights back to BF16.",
    "relabel": "The same FP8 bytes under the other naming.",
    "diff": "Compare two checkpoints tensor by tensor.",
    "extend-context": "A longer context through YaRN.",
    "draft": "Prepare, train, evaluate and export an EAGLE3 head.",
    "validate": "Measure a served model, or check a checkpoint's structure.",
    "bundle": "Assemble, document, lock and sign a release.",
    "verify": "Check a bundle byte by byte, or quantized weights against their source.",
    "serve": "Serve a bundle or checkpoint with its settings.",
    "chat": "Talk to a bundle or a running server, with the speed of each answer.",
    "publish": "Upload a bundle as one transaction, or rehearse it.",
    "keys": "Make a signing key.",
}

# Distributions outside the base install, and the extra that brings each.
_EXTRAS = {
    "torch": "quantize",
    "llmcompressor": "quantize",
    "compressed_tensors": "quantize",
    "transformers": "draft",
    "speculators": "draft",
    "vllm": "serve",
    "httpx": "validate",
    "scipy": "validate",
    "matplotlib": "validate",
    "psutil": "validate",
    "tokenizers": "nano",
    "ray": "ray",
    "sigstore": "sigstore",
}

_CLOSED_PIPE = 128 + 13  # what a shell reports for SIGPIPE


def module_of(verb: str) -> str:
    """The module that defines `verb`."""
    return f"packager.cli.{verb.replace('-', '_')}"


class VerbGroup(click.Group):
    """A click group that imports a verb's module when the verb is asked for, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(module_of(cmd_name)).command
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb not in VERBS and not verb.startswith("-"):
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"there is no verb {verb!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.command(
    cls=VerbGroup,
    epilog="Exit codes: 0 ok, 1 a bug of ours, 2 usage, 3 bad input, 4 a gate failed, "
    "5 integrity, 6 a remote. Every verb takes --json.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="packager")
def packager() -> None:
    """Turn a BailingMoeV2 checkpoint into a signed, validated bundle that anybody can serve."""


def _say(message: str, remedy: str = "") -> None:
    click.echo(f"error: {message}", err=True)
    if remedy:
        click.echo(f"what to do: {remedy}", err=True)


def _disk_trouble(err: OSError) -> tuple[str, str] | None:
    """Message and remedy for failures of the file system that are the user's to mend; None for others."""
    where = f": {err.filename}" if err.filename else ""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}", "Free space or choose another folder; the same command resumes."
    if err.errno == errno.EROFS:
        return f"the file system is read-only{where}", "Choose a folder that can be written."
    if err.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied{where}", "Choose a folder that you may read and write."
    return None


def _measurement_exit(err: BaseException) -> int | None:
    """Exit code of an error of the `validation` package, None for any other error."""
    errors = sys.modules.get("validation.errors")  # if it was never imported, it raised nothing
    if errors is None:
        return None
    if isinstance(err, errors.ServerUnreachable):
        return 6
    return 3 if isinstance(err, errors.MeasurementError) else None


def _exit_code_of(err: BaseException) -> int:
    """Tell the user about `err` on stderr; return the exit code that stands for it."""
    if isinstance(err, PackagerError):
        _say(err.message, err.remedy)
        return err.exit_code
    if isinstance(err, click.exceptions.NoArgsIsHelpError):
        err.show()
        return 2
    if isinstance(err, click.UsageError):
        path = err.ctx.command_path if err.ctx else "packager"
        _say(err.format_message(), f"See `{path} --help`.")
        return 2
    if isinstance(err, click.ClickException):
        _say(err.format_message())
        return 3
    if isinstance(err, (click.Abort, KeyboardInterrupt)):
        click.echo("interrupted; the same command resumes", err=True)
        return 130
    code = _measurement_exit(err)
    if code is not None:
        _say(str(getattr(err, "message", err)), str(getattr(err, "remedy", "")))
        return code
    if isinstance(err, OSError):
        trouble = _disk_trouble(err)
        if trouble is not None:
            _say(*trouble)
            return 3
    if isinstance(err, ModuleNotFoundError):
        extra = _EXTRAS.get((err.name or "").partition(".")[0])
        if extra is not None:
            _say(f"{err.name} is not installed", f"pip install 'moe-packager[{extra}]'")
            return 2
    traceback.print_exception(err)
    _say(
        f"this is a bug in packager {__version__} ({type(err).__name__})",
        "Please report it with the command and the lines above. Finished work is kept.",
    )
    return 1


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code; never raises."""
    try:
        result: Any = packager.main(
            args=None if args is None else list(args), prog_name="packager", standalone_mode=False
        )
        sys.stdout.flush()
    except SystemExit:
        # Outside standalone mode click exits by itself only when the reader of our stdout went away.
        return _CLOSED_PIPE
    except BrokenPipeError:
        # The interpreter would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except BaseException as err:
        return _exit_code_of(err)
    return result if type(result) is int else 0


def main() -> None:
    """Entry point of the `packager` script."""
    sys.exit(run())
