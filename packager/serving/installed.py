"""Which engine is installed, and whether it is one that a bundle was made for."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

from packager.errors import UsageProblem
from packager.serving.cpu import Device, installed_vllm

Engine = Literal["vllm", "sglang"]


def check_engine(
    engine: Engine, device: Device, versions: str | None = None, *, any_version: bool = False
) -> str:
    """The version of the engine that is installed.

    Args:
        versions: range that the bundle's serve.yaml names, of vLLM; None: none.
        any_version: take whatever is installed.

    Raises:
        UsageProblem: it is not installed, or its version lies outside the range.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if engine == "sglang":
        try:
            return metadata.version("sglang")
        except metadata.PackageNotFoundError:
            raise UsageProblem(
                "SGLang is not installed",
                "Install it (pip install sglang), or add --print-command for the command alone.",
            ) from None
    found = installed_vllm()
    if found is None:
        extra = "serve" if device == "cuda" else "serve-cpu"
        raise UsageProblem("vLLM is not installed", f"pip install 'moe-packager[{extra}]'")
    name, version = found
    try:
        allowed = versions is None or SpecifierSet(versions).contains(version, prereleases=True)
    except InvalidSpecifier:
        raise UsageProblem(
            f"the bundle's engine_versions {versions!r} is no range of versions", "Add --any-version."
        ) from None
    if not allowed and not any_version:
        raise UsageProblem(
            f"{name} {version} is installed; the bundle was tested with {versions}",
            f"pip install '{name}{versions}', or --any-version to try this one.",
        )
    return version
