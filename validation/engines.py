"""What a running server says of itself: its engine, the model it serves, how far it has come, acceptance.

vLLM: `/version`, `/v1/models`, `/metrics`. SGLang: `/get_server_info`, later `/server_info` (settings,
version, and `internal_states` with `avg_spec_accept_length`), `/v1/models`, and, if it was started with
--enable-metrics, `/metrics`. Both count acceptance with the token that is always right.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import httpx

EngineName = Literal["vllm", "sglang", "unknown"]
TIMEOUT_S = 15.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)$", re.MULTILINE)
_GENERATED = ("vllm:generation_tokens_total", "sglang:generation_tokens_total")


class Engine(NamedTuple):
    """What runs behind an address."""

    name: EngineName
    version: str | None


def identify(url: str) -> Engine:
    """The engine at a base URL; `unknown` if its answers are neither vLLM's nor SGLang's."""
    if (info := _sglang_info(url)) is not None:
        return Engine("sglang", str(info["version"]) if info.get("version") else None)
    found = _get_json(url, "/version")
    if isinstance(found, dict) and isinstance(found.get("version"), str):
        return Engine("vllm", found["version"])
    return Engine("unknown", None)


def models_served(url: str) -> tuple[str, ...] | None:
    """Names that a server lists; None: it lists none, or does not answer."""
    found = _get_json(url, "/v1/models")
    try:
        return tuple(str(entry["id"]) for entry in found["data"]) or None
    except (TypeError, KeyError):
        return None


def generated_tokens(url: str) -> float | None:
    """Tokens generated since the start, by the server's own counter; None: it has none."""
    samples = _metrics(url)
    found = [value for name, value in samples if name in _GENERATED]
    return sum(found) if found else None


def forget_acceptance(url: str, engine: EngineName) -> bool:
    """Have SGLang begin anew before a cell: flush its prefix cache, which older releases join with their
    average of acceptance. True if the average is indeed gone; False where there is none to forget.
    """
    if engine != "sglang":
        return False
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            client.post("/flush_cache").raise_for_status()
    except httpx.HTTPError:
        return False
    return not _sglang_average(url)


def acceptance_length(url: str, engine: EngineName, *, forgotten: bool) -> float | None:
    """SGLang's acceptance length after a cell, in tokens; None: no draft, or it does not tell.

    Its average is the cell's only if it was `forgotten` before it; otherwise it covers all since the start,
    and the gauge over the latest decode steps is taken, if the server exports it.
    """
    if engine != "sglang":
        return None
    if forgotten:
        return _sglang_average(url)
    # 0 until something was drafted.
    return max((v for name, v in _metrics(url) if name == "sglang:spec_accept_length"), default=0.0) or None


def _sglang_info(url: str) -> dict[str, Any] | None:
    for path in ("/get_server_info", "/server_info"):
        found = _get_json(url, path)
        if isinstance(found, dict) and "internal_states" in found:
            return found
    return None


def _sglang_average(url: str) -> float | None:
    """Over the data-parallel ranks, each counted once; None: nothing was drafted yet."""
    states = (_sglang_info(url) or {}).get("internal_states") or ()
    lengths = [
        float(state["avg_spec_accept_length"])
        for state in states
        if isinstance(state, dict) and state.get("avg_spec_accept_length")
    ]
    return sum(lengths) / len(lengths) if lengths else None


def _metrics(url: str) -> list[tuple[str, float]]:
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            text = client.get("/metrics").raise_for_status().text
    except httpx.HTTPError:
        return []
    found = []
    for name, value in _SAMPLE.findall(text):
        try:
            found.append((name, float(value)))
        except ValueError:
            continue
    return found


def _get_json(url: str, path: str) -> Any:
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
            return client.get(path).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return None
