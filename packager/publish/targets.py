"""Where a bundle can be published: one row a scheme, each with what it understands.

A row costs nothing until it is used: the modules that do the work are imported by its `send`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from packager.errors import UsageProblem


@dataclass(frozen=True)
class Order:
    """What is to be published, and how. A row of SCHEMES names the settings that its scheme understands."""

    bundle: Path
    address: str
    """What stands behind the scheme, checked."""
    public_key: Path | None = None
    """Understood by every scheme."""
    tag: str | None = None
    private: bool = False
    gated: str | None = None
    collections: tuple[str, ...] = ()
    deprecate: str | None = None
    reason: str | None = None
    dry_run: bool = False
    offline: bool = False


class Done(Protocol):
    """What every scheme returns: a dataclass, printed field by field."""

    @property
    def digest(self) -> str:
        """The bundle's digest: the same one wherever it was published."""


@dataclass(frozen=True)
class Scheme:
    """One kind of target."""

    form: str
    """How a target is written: `hf://ORG/NAME`."""
    check: Callable[[str], str]
    """The address, if it can be one. Raises UsageProblem."""
    send: Callable[[Order, Callable[[str], None]], Done]
    """Does it; the second argument takes lines of progress. Raises PackagerError."""
    settings: frozenset[str] = frozenset()
    """Fields of Order, beyond bundle, address and public key, that it understands."""


def _hub_address(text: str) -> str:
    from packager.publish.hub import check_repo_id

    return check_repo_id(text)


def _to_hub(order: Order, progress: Callable[[str], None]) -> Done:
    settings: dict[str, Any] = {
        "tag": order.tag, "private": order.private, "gated": order.gated, "collections": order.collections,
        "deprecate": order.deprecate, "reason": order.reason, "public_key": order.public_key,
    }  # fmt: skip
    if order.dry_run:
        from packager.publish.hub_calls import dry_run

        return dry_run(order.bundle, order.address, offline=order.offline, progress=progress, **settings)
    if order.offline:
        raise UsageProblem("--offline asks the hub nothing, so nothing can be published", "Add --dry-run.")
    from packager.publish.hub import publish

    return publish(order.bundle, order.address, progress=progress, **settings)


def _directory_address(text: str) -> str:
    if not text:
        raise UsageProblem("dir: names no directory", "Write dir:PATH.")
    return text


def _to_directory(order: Order, progress: Callable[[str], None]) -> Done:
    from packager.publish.directory import copy_bundle

    return copy_bundle(order.bundle, Path(order.address), public_key=order.public_key, progress=progress)


def _registry_address(text: str) -> str:
    from packager.publish.oci import parse_reference

    return str(parse_reference(text))


def _to_registry(order: Order, progress: Callable[[str], None]) -> Done:
    from packager.publish.oci import push

    return push(order.bundle, order.address, tag=order.tag, public_key=order.public_key, progress=progress)


def _to_modelscope(order: Order, progress: Callable[[str], None]) -> Done:
    from packager.publish.modelscope import publish

    return publish(
        order.bundle,
        order.address,
        tag=order.tag,
        private=order.private,
        public_key=order.public_key,
        progress=progress,
    )


_HUB_SETTINGS = frozenset(
    {"tag", "private", "gated", "collections", "deprecate", "reason", "dry_run", "offline"}
)
SCHEMES: dict[str, Scheme] = {
    "hf://": Scheme("hf://ORG/NAME", _hub_address, _to_hub, _HUB_SETTINGS),
    "ms://": Scheme("ms://ORG/NAME", _hub_address, _to_modelscope, frozenset({"tag", "private"})),
    "oci://": Scheme("oci://HOST/NAME[:TAG]", _registry_address, _to_registry, frozenset({"tag"})),
    "dir:": Scheme("dir:PATH", _directory_address, _to_directory),
}


_OPTION = {"collections": "--collection"}


def parse(target: str) -> tuple[Scheme, str]:
    """The scheme of a target and its address. Raises UsageProblem for what cannot be published to."""
    for prefix, scheme in SCHEMES.items():
        if target.startswith(prefix):
            return scheme, scheme.check(target.removeprefix(prefix))
    forms = " or ".join(scheme.form for scheme in SCHEMES.values())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        forms = f"hf://{target}, or dir:{target} for a directory"
    raise UsageProblem(f"{target} is no target", f"Write {forms}.")


def order(scheme: Scheme, address: str, bundle: Path, public_key: Path | None, **settings: Any) -> Order:
    """An order of those settings that are not empty. Raises UsageProblem: the scheme does not know one."""
    given = {name: value for name, value in settings.items() if value not in (None, False, ())}
    unknown = sorted(set(given) - scheme.settings)
    if unknown:
        options = ", ".join(_OPTION.get(name, f"--{name.replace('_', '-')}") for name in unknown)
        raise UsageProblem(f"{scheme.form} does not know {options}", "Leave it out.")
    return replace(Order(bundle, address, public_key), **given)
