"""Where weights are converted: options that `quantize` and `release` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from packager.errors import UsageProblem
from packager.quantize.convert import Executor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def executor_options(command: _Function) -> _Function:
    """Give a command `executor` (`local` or `ray`) and `ray_address` (HOST:PORT or None)."""
    address = click.option(
        "--ray-address",
        default=None,
        callback=_with_executor,
        help="HOST:PORT of the Ray cluster. Default: RAY_ADDRESS.",
    )
    executor = click.option(
        "--executor",
        type=click.Choice(get_args(Executor)),
        default="local",
        show_default=True,
        is_eager=True,  # known when the address is looked at
        help="ray: tensors are converted by a cluster whose nodes see the source under the same path, or "
        "read it from the hub.",
    )
    return executor(address(command))


def _with_executor(context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and context.params.get("executor") != "ray":
        raise UsageProblem("--ray-address is of use with --executor ray only", "Add --executor ray.")
    return value
